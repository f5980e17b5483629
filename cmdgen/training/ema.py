"""Exponential moving average of parameters: the weights that are evaluated and exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cmdgen.training.distributed import local


class Ema:
    """Moving average of every parameter of the modules, one fused call a step.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the random start is
    forgotten fast.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        parameters = {
            f"{name}.{key}": parameter.data
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
        }
        self.averages = {name: parameter.clone() for name, parameter in parameters.items()}
        # of sharded ones what this process holds
        self.parameters = [local(parameter) for parameter in parameters.values()]
        self.shards = [local(average) for average in self.averages.values()]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shards, self.parameters, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averages into the modules for the length of a block, without gradients."""
        with torch.no_grad():
            self._swap()
            try:
                yield
            finally:
                self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.shards, strict=True):
            current = parameter.clone()
            parameter.copy_(average)
            average.copy_(current)
