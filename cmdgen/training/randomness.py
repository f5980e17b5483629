"""Every draw of training follows from the seed and the step: resuming needs no generator state."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def seeded(*key: int | str) -> torch.Generator:
    """Return a CPU generator that depends on the whole key, and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


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
