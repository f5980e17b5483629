"""Count what a GPU that is not here would launch, and the bytes of that: shapes decide, tensors are fake."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmdgen_kernels
from cmdgen_kernels import dispatch, gated_attention, wide_attention

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
# they allocate, or change what is said of a tensor
FREE = {"empty", "empty_like", "empty_strided", "_unsafe_view", "new_empty", "new_empty_strided", "detach", "alias"}


@dataclass
class Count:
    """Launches of all but products, convolutions and attention, the bytes they move; and products."""

    launches: int = 0
    bytes: int = 0
    products: int = 0

    def add(self, *tensors: Any) -> None:
        """Count a launch that reads or writes each of these tensors once."""
        self.launches += 1
        self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))


class _Operators(TorchDispatchMode):
    """Count PyTorch's operators."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            self.count.products += 1
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


class _Cuda(TorchFunctionMode):
    """Do as CUDA does where a CPU would do otherwise."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            # by a library, which lays its output out as the tokens lie
            self.count.products += 1
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
