"""What makes a network fast on a GPU as it is: CUDA graphs, and the best attention there is.

A graph makes one launch of the hundreds of kernels of a forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.utils._pytree import tree_map

from cmdgen_kernels.gated_attention import ATTENTION_LIBRARIES

# of a denoiser: its output, or its output and a feature
Out = TypeVar("Out", Tensor, tuple[Tensor, Tensor])
# () -> the same pool of a GPU's memory every time
Pool = Callable[[], Any]

# runs before a capture: libraries choose algorithms and allocate workspaces in the first ones
_WARM_UP = 1
# sets of shapes whose graphs a function keeps: a clip needs two
_MOST_CAPTURES = 4


class Graphed(Generic[Out]):
    """A function of tensors on a GPU, captured once for each set of shapes, then replayed.

    The function must do the same work whatever the values are. Graphs of one pool share their
    memory, and may not run at the same time. Any of them overwrites what another has written,
    also what it returned: step rehash uses a feature again after other graphs have run. So what
    goes in and out is copied, and no graph reads anything but its inputs, which are not in the
    pool.
    """

    def __init__(self, function: Callable[..., Out], pool: Pool) -> None:
        self.function: Callable[..., Out] = function
        self.pool = pool
        self.captures: dict[tuple[object, ...], tuple[list[Tensor], Callable[[], Out]]] = {}

    def __call__(self, *tensors: Tensor) -> Out:
        """Return what the function would."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key in self.captures:
            inputs, replay = self.captures.pop(key)
        else:
            inputs = [tensor.clone() for tensor in tensors]
            replay = capture(self.function, inputs, self.pool)
        # the last that was used stands last
        self.captures[key] = inputs, replay
        if len(self.captures) > _MOST_CAPTURES:
            del self.captures[next(iter(self.captures))]
        torch._foreach_copy_(inputs, list(tensors))
        output: Out = tree_map(Tensor.clone, replay())
        return output


class GraphedNetwork(NamedTuple):
    """A `Network` of step rehash, each of its two ways as graphs."""

    run: Callable[..., tuple[Tensor, Tensor]]
    resume: Callable[..., Tensor]


@contextmanager
def fastest_libraries(device: torch.device) -> Iterator[None]:
    """Launch kernels on this device within the block, attention by flash attention where it can.

    `softmax_attention` asks for cuDNN's where that pays.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), sdpa_kernel(ATTENTION_LIBRARIES, set_priority=True):
        yield


@contextmanager
def record(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Record the block's work on the stream's device; an error in the block is what is raised."""
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            yield
    except RuntimeError as error:
        # joining the streams of a capture that has failed, and ending it, fail as well, without saying why
        first: BaseException = error
        while isinstance(first.__context__, RuntimeError):
            first = first.__context__
        raise first from None


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return the one stream of all captures: what a graph lets go of in a pool serves its own stream alone."""
    return torch.cuda.Stream(device)


def capture(function: Callable[..., Out], inputs: list[Tensor], pool: Pool) -> Callable[[], Out]:
    """Record what a function does with these tensors, and return what does it again.

    Any other graph of the pool overwrites the output.
    """
    side = _capture_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    # what they took is kept for their stream alone: the graph would take as much again
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with record(graph, pool(), side):
        output = function(*inputs)

    def replay() -> Out:
        graph.replay()
        return output

    return replay
