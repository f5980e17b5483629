"""What makes a network fast on a GPU as it is: CUDA graphs, and the best attention there is.

A graph makes one launch of the hundreds of kernels of a forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
# sets of shapes whose graphs a function keeps before it starts anew: a clip needs two
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
        self.captures: dict[tuple[object, ...], _Capture[Out]] = {}

    def __call__(self, *tensors: Tensor) -> Out:
        """Return what the function would."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        full = key not in self.captures and len(self.captures) == _MOST_CAPTURES
        if full or any(not each.generation.whole for each in self.captures.values()):
            self.captures.clear()
        if key not in self.captures:
            inputs, generation = [tensor.clone() for tensor in tensors], _generation(tensors[0].device)
            replay = capture(self.function, inputs, self.pool, generation)
            self.captures[key] = _Capture(inputs, replay, generation)
        held = self.captures[key]
        torch._foreach_copy_(held.inputs, list(tensors))
        output: Out = tree_map(Tensor.clone, held.replay())
        return output


@dataclass(eq=False)
class Generation:
    """Graphs that were captured on one stream: when one of them has gone, none may run any more.

    A graph that is destroyed gives back the workspace that cuBLAS has on its stream, and the others
    of that stream would still write there (github.com/pytorch/pytorch/issues/193402). All captures
    of a time are of one stream, as what a graph lets go of in a pool serves its own stream alone.
    """

    whole: bool = True

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """Return the stream of these captures, of the current device."""
        return torch.cuda.Stream()


@dataclass(eq=False)
class _Capture(Generic[Out]):
    """A graph, and the tensors that it reads."""

    inputs: list[Tensor]
    replay: Callable[[], Out]
    generation: Generation

    def __del__(self) -> None:
        self.generation.whole = False


_generations: dict[torch.device, Generation] = {}


def _generation(device: torch.device) -> Generation:
    """Return the generation of a device that is whole."""
    if device not in _generations or not _generations[device].whole:
        _generations[device] = Generation()
    return _generations[device]


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


def capture(
    function: Callable[..., Out], inputs: list[Tensor], pool: Pool, generation: Generation
) -> Callable[[], Out]:
    """Record what a function does with these tensors, and return what does it again.

    Any other graph of the pool overwrites the output.
    """
    side = generation.stream
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
