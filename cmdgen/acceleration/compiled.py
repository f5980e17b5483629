"""Networks through torch's compiler, which fuses what lies between products: an option.

It costs a minute or more for each set of shapes, and rounds otherwise than the networks as they
are. Its programs stay on disk, in a folder of torch's own, so that other processes only trace.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import SubprocessError
from typing import Generic

import torch
from torch import Tensor

from cmdgen.acceleration.graphs import Out

# what torch builds its programs with; CXX names another C++ compiler than g++
_TOOLS = {"cpu": "a C++ compiler (g++, or that of CXX)", "cuda": "Triton, gcc", "mps": "a PyTorch that has Metal"}
# sets of shapes in one process that a function is compiled for: torch would stop at 8
_MAX_SHAPES = 1000


class Compiled(Generic[Out]):
    """A function of tensors, compiled as one graph for each set of shapes.

    Raises ValueError, in one line, where the compiler fails.
    """

    def __init__(self, function: Callable[..., Out]) -> None:
        self.compiled: Callable[..., Out] = torch.compile(function, fullgraph=True, dynamic=False)
        self.shapes: set[tuple[object, ...]] = set()

    def __call__(self, *tensors: Tensor) -> Out:
        """Return what the function would, except for rounding."""
        # the order in memory is a part of a program: one program for all of them
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key in self.shapes:
            return self.compiled(*tensors)
        # all models of a process count together
        limits = {"recompile_limit": _MAX_SHAPES, "accumulated_recompile_limit": _MAX_SHAPES}
        with _one_line(tensors[0].device.type), torch._dynamo.config.patch(limits):
            output = self.compiled(*tensors)
        self.shapes.add(key)
        return output


def check_compiler(device: torch.device) -> None:
    """Raise ValueError, in one line, where torch's compiler cannot build programs for a device."""
    with _one_line(device.type, RuntimeError, OSError, SubprocessError):
        torch.compile(lambda x: x + x)(torch.ones(16, device=device))


@contextmanager
def _one_line(device: str, *others: type[Exception]) -> Iterator[None]:
    """Turn what the compiler raises, and `others`, into a ValueError of one line."""
    from torch._dynamo.exc import TorchDynamoException

    errors: tuple[type[Exception], ...] = (TorchDynamoException, *others)
    try:
        yield
    except errors as error:
        raise ValueError(
            f"torch.compile fails on {device}: {_reason(error)}; it needs {_TOOLS[device]} and Python's headers"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the first error of a compiler that torch called, or else torch's own."""
    while isinstance(error.__cause__, RuntimeError):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    # the first line may say no more than that what follows was raised
    lines = [line for line in lines if line and not line.startswith("backend=")]
    reasons = [line for line in lines if "error:" in line] or lines or [type(error).__name__]
    return reasons[0].rstrip(".")
