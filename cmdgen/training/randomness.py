"""Every draw of training follows from the seed and the step: resuming needs no generator state."""

import hashlib

import torch
from torch import Tensor


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on the whole key, and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Order:
    """The rows of a data set that each step sees: one shuffled pass after another."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.epochs: dict[int, Tensor] = {}

    def rows(self, step: int, batch: int) -> Tensor:
        """() -> (batch,) int64, positions step * batch and on of the endless sequence of passes."""
        positions = torch.arange(step * batch, (step + 1) * batch)
        epochs, offsets = positions // self.count, positions % self.count
        self.epochs = {epoch: self._pass(epoch) for epoch in epochs.unique().tolist()}
        return torch.cat([rows[offsets[epochs == epoch]] for epoch, rows in self.epochs.items()])

    def _pass(self, epoch: int) -> Tensor:
        known = self.epochs.get(epoch)
        if known is not None:
            return known
        return torch.randperm(self.count, generator=seeded(self.seed, "order", epoch))
