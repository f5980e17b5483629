"""Training by several processes that torchrun started: sharded parameters, means over ranks, one lead.

Parameters, gradients, moments and averages are sharded by PyTorch's FSDP2 (Zhao et al. 2023,
arXiv:2304.11277), within a node where there are several, and copied between nodes.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmdgen.training.recompute import BLOCKS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# what one rank may do while the others wait, such as encoding all clips
_PATIENCE = timedelta(days=7)
# layers that are called outside of their block's `forward`, so that they are units of their own: the
# DiT's modulations, the UNet's projections of time and text
_OUTSIDE = ("modulation", "time_emb_proj", "attn2.to_k", "attn2.to_v")
# methods that are called instead of `forward`
_METHODS = ("encode", "decode")


@dataclass(frozen=True)
class Ranks:
    """The processes of a training: this one's number, from 0, and how many there are."""

    rank: int = 0
    world: int = 1
    # where parameters are sharded, and the group that exchanges what is on the CPU
    mesh: "DeviceMesh | None" = None
    group: "ProcessGroup | None" = None

    @property
    def leads(self) -> bool:
        """Return whether this process writes and reports."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return which of `count` rows are this rank's; ValueError where they cannot be shared out."""
        if count % self.world:
            raise ValueError(f"a batch of {count} rows is not a multiple of the {self.world} processes")
        size = count // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flags)

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the means over the processes of scalars, which all of them have."""
        if self.world == 1 or not values:
            return values
        stacked = torch.stack([value.float().cpu() for value in values.values()]) / self.world
        torch.distributed.all_reduce(stacked, group=self.group)
        return dict(zip(values, stacked.unbind(), strict=True))

    def agree(self, value: Any) -> Any:
        """Return the leading process's value."""
        if self.world > 1:
            values = [value]
            torch.distributed.broadcast_object_list(values, 0, group=self.group)
            return values[0]
        return value

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the leading process run a block first, and the others when it has ended well."""
        if not self.leads:
            self.agree(None)
        yield
        if self.leads:
            self.agree(None)


ALONE = Ranks()


@contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes that torchrun started, if any."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    try:
        group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        # a copy in each node, sharded over its GPUs
        shape = (world // local, local) if 1 < local < world else (world,)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        yield Ranks(distributed.get_rank(), world, mesh, group)
    finally:
        distributed.destroy_process_group()


def shard(module: nn.Module, ranks: Ranks, reduce: torch.dtype) -> None:
    """Shard a module's parameters in place, equal in all processes from here on.

    `reduce` is the type in which gradients are summed over the network.
    """
    from torch.distributed import broadcast
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    assert ranks.mesh is not None
    # of what no stage does
    warnings.filterwarnings("ignore", message=".*returned a view tensor. An in-place op")
    for tensor in (*module.parameters(), *module.buffers()):
        # filters in channels-last cannot be sharded by rows
        tensor.data = tensor.data.contiguous()
        broadcast(tensor.data, 0)
    settings: dict[str, Any] = {"mesh": ranks.mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce)}
    # also at the root: averaged weights take the parameters' place between two steps
    settings["reshard_after_forward"] = True
    named = dict(module.named_modules())
    for suffix in _OUTSIDE:
        # one exchange for all that are called together
        if together := [layer for name, layer in named.items() if name.endswith(suffix)]:
            fully_shard(together, **settings)
    for layer in named.values():
        if isinstance(layer, BLOCKS):
            fully_shard(layer, **settings)
    fully_shard(module, **settings)
    for method in _METHODS:
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def sync(modules: dict[str, nn.Module], last: bool) -> None:
    """Exchange gradients in the backward pass of the last part of a batch alone."""
    for module in modules.values():
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(last)  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a whole; all processes must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors; of shards, whole ones on the CPU in the leading process, nothing in the others."""
    state = module.state_dict()
    if all(local(tensor) is tensor for tensor in state.values()):
        return state
    gathered = {}
    for name, tensor in state.items():
        complete = whole(tensor)
        if torch.distributed.get_rank() == 0:
            gathered[name] = complete.cpu()
    return gathered
