"""Exponential moving average of parameters: the weights that are evaluated and exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Moving average of every parameter of the modules, one fused call a step.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the random start is
    forgotten fast.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        named = [
            (f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters()
        ]
        self.names = [name for name, _ in named]
        self.parameters = [parameter.data for _, parameter in named]
        self.averages = [parameter.clone() for parameter in self.parameters]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the averages into the modules for the length of a block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """() -> averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Reads what state_dict gave."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])
        self.updates = updates
