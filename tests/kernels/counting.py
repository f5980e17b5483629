"""Count what a GPU that is not here would launch, and the bytes of that: shapes decide, tensors are fake."""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmdgen_kernels
from cmdgen_kernels import dispatch, gated_attention, wide_attention

Module = TypeVar("Module", bound=nn.Module)
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
# they allocate, or change what is said of a tensor
FREE = {"empty", "empty_like", "empty_strided", "_unsafe_view", "new_empty", "new_empty_strided", "detach", "alias"}


class Launch(NamedTuple):
    """What is launched: its kind, "attention", "wide attention", "product" or "other"; operations, bytes."""

    kind: str
    flops: int
    bytes: int


class Count(list[Launch]):
    """All launches of a run."""

    def add(self, *tensors: Any, kind: str = "other", flops: int = 0) -> None:
        """Count a launch that reads or writes each of these tensors once."""
        size = 0
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                # what is broadcast is read once
                sides = (side for side, stride in zip(x.shape, x.stride(), strict=True) if stride)
                size += math.prod(sides) * x.element_size()
        self.append(Launch(kind, flops, size))

    @property
    def summary(self) -> tuple[int, int, int]:
        """Launches of all but products and attention, the megabytes that they move; products and attentions."""
        others = [launch for launch in self if launch.kind == "other"]
        return len(others), sum(launch.bytes for launch in others) // 10**6, len(self) - len(others)


class _Operators(TorchDispatchMode):
    """Count PyTorch's operators."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            self.count.add(args, result, kind="product", flops=self._flops(name, args, result))
            if name == "convolution" and args[2] is not None:
                # cuDNN adds no bias: PyTorch does, in a pass of its own
                self.count.add(result, result, args[2])
            if name == "convolution_backward" and result[2] is not None:
                self.count.add(args[0], result[2])
        elif name == "native_group_norm":
            # moments; a scale and an offset; y
            for tensors in (args[0], result[1:], (args[0], result[0])):
                self.count.add(tensors)
        elif not function.is_view and name not in FREE and function.namespace == "aten":
            self.count.add(args, kwargs, result)
        return result

    def _flops(self, name: str, args: Any, result: Any) -> int:
        if name == "convolution":
            return 2 * result.numel() * args[1][0].numel()
        if name == "convolution_backward":
            # of the input and of the weight
            return 2 * 2 * args[0].numel() * args[2][0].numel()
        return 2 * result.numel() * args[name in ("addmm", "baddbmm")].shape[-1]


class _Cuda(TorchFunctionMode):
    """Do as CUDA does where a CPU would do otherwise."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            # by a library, which lays its output out as the tokens lie
            q, k, v = args
            kind = "attention" if q.shape[-1] <= 256 else "wide attention"
            self.count.add(q, q, k, v, kind=kind, flops=4 * q.numel() * k.shape[-2])
            return torch.empty_like(args[0].transpose(1, 2)).transpose(1, 2)
        if function in (F.group_norm, F.layer_norm):
            x, *rest = args
            if torch.is_autocast_enabled("cpu"):
                x = x.float()
            if function is F.group_norm:
                # PyTorch 2.11 loses channels_last
                x = x.contiguous()
            args = (x, *rest)
        return function(*args, **(kwargs or {}))


def feature_map(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def inference(module: Callable[[], Module]) -> Module:
    """A module as a pipeline holds it."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return module().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def count(make: Callable[[], Callable[[], object]], *, without: tuple[str, ...] = ()) -> Count:
    """Return what the function that `make` returns launches; of the ops in `without`, the references'.

    "op of module" turns off what that module's own code does where the op has a kernel.
    """
    counted = Count()

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        counted.add(arguments)

    triton = pytest.importorskip("triton.runtime")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    changes: list[tuple[Any, str, Any]] = [
        # tensors of a CPU take the kernels then
        (dispatch, "_interpreting", True),
        (sys.modules[gated_attention.__module__], "is_short", lambda q: False),
        (sys.modules[wide_attention.__module__], "_scores", lambda q, k: torch.bmm(q, k.mT, out_dtype=torch.float32)),
        (triton.JITFunction, "run", note),
        (interpreter.InterpretedFunction, "run", note),
    ]
    for name in without:
        op, _, module = name.partition(" of ")
        module = module or vars(cmdgen_kernels)[op].__module__
        name = op if op == "obstacle" else f"{op}_obstacle"
        changes.append((sys.modules[module], name, lambda *_, **__: "turned off"))
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for where, name, value in changes:
            stack.enter_context(patch.object(where, name, value))
        run = make()
        for mode in (_Cuda(counted), _Operators(counted)):
            stack.enter_context(mode)
        run()
    return counted
