"""Every draw of training follows from the seed and the step: resuming needs no generator state."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor


def seeded(*key: int | str) -> torch.Generator:
    """Return a CPU generator that depends on the whole key, and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Draws:
    """Random numbers for the rows of a batch: all are drawn, and a process keeps those of its own rows."""

    generator: torch.Generator
    count: int
    own: slice = field(default_factory=lambda: slice(None))

    def __call__(self, function: Callable[..., Tensor], *shape: int) -> Tensor:
        """() -> (B, *shape) of torch.rand or torch.randn."""
        return function((self.count, *shape), generator=self.generator)[self.own]


@dataclass(frozen=True)
class Order:
    """The rows of a data set that each step sees: one shuffled pass after another."""

    count: int
    seed: int

    def rows(self, step: int, batch: int) -> Tensor:
        """() -> (batch,) int64, positions step * batch and on of the endless sequence of passes."""
        positions = torch.arange(step * batch, (step + 1) * batch)
        passes, offsets = positions // self.count, positions % self.count
        return torch.cat(
            [_shuffle(self.count, self.seed, number)[offsets[passes == number]] for number in passes.unique().tolist()]
        )


@lru_cache(2)
def _shuffle(count: int, seed: int, number: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, "order", number))
