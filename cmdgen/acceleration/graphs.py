"""CUDA graphs: a network's hundreds of kernel launches become one."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

# of a denoiser: its output, or its output and a feature
Out = TypeVar("Out", Tensor, tuple[Tensor, ...])

# runs before a capture: libraries choose algorithms and allocate workspaces in the first ones
_WARM_UP = 3


class Graphed(Generic[Out]):
    """A function of tensors on a GPU, captured once for each set of shapes, then replayed.

    What it returns is overwritten by the next call with the same shapes. The function must do the
    same work whatever the values are.
    """

    def __init__(self, function: Callable[..., Out]) -> None:
        self.function: Callable[..., Out] = function
        self.captures: dict[tuple[object, ...], tuple[list[Tensor], Callable[[], Out]]] = {}

    def __call__(self, *given: Tensor) -> Out:
        """What the function would return."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if key not in self.captures:
            inputs = [tensor.clone() for tensor in given]
            self.captures[key] = inputs, capture(self.function, inputs)
        inputs, replay = self.captures[key]
        torch._foreach_copy_(inputs, list(given))
        return replay()


def capture(function: Callable[..., Out], inputs: list[Tensor]) -> Callable[[], Out]:
    """Record what a function does with these tensors; what is given does it again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)

    def replay() -> Out:
        graph.replay()
        return output

    return replay
