"""Step rehash: most of a network is skipped at most steps, and its last feature reused.

Zhan et al. 2024 (arXiv:2411.01171), section 4.3. One feature is kept, for the length of one clip;
both branches of guidance are in its batch. Nothing stays on the networks.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from cmdgen.acceleration.graphs import GraphedNetwork
from cmdgen.acceleration.video import SlicedUNet
from cmdgen.models.dit import DiT
from cmdgen.models.unet import UNet


class Network(Protocol):
    """A denoiser in two parts: a large one that makes a feature, a small one that ends on it.

    `time` is what the network made of the timesteps.
    """

    def run(self, x: Tensor, time: Tensor, *conditions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, ...), (B, P) -> the output (B, C or 2 C, ...), the feature."""

    def resume(self, feature: Tensor, x: Tensor, time: Tensor, *conditions: Tensor) -> Tensor:
        """The feature of another step, (B, C, ...), (B, P) -> the output (B, C or 2 C, ...)."""


@dataclass(frozen=True)
class CutUNet:
    """A UNet whose feature is the input of its last layer, or what `cut` operators of that made of it.

    No down, mid or other up layer runs on a skipped step. Its output depends on the new sample
    through the first convolution alone; after a cut within the last layer, not at all. The cut of
    the paper, after the last temporal layer, is 1 of SVD and 3 of AnimateDiff.
    """

    unet: UNet | SlicedUNet
    cut: int = 0

    def run(self, x: Tensor, time: Tensor, *text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w), (B, P), the projected text -> (B, C, h, w), the feature (B, C', h, w)."""
        shares, first = self.unet.hand_out(time, text), self.unet.embed(x)
        feature = self.unet.deepen(self.unet.trunk(first, shares), first, shares, self.cut)
        return self.unet.tail(feature, first, shares, self.cut), feature

    def resume(self, feature: Tensor, x: Tensor, time: Tensor, *text: Tensor) -> Tensor:
        """(B, C', h, w), (B, C, h, w), (B, P), the projected text -> (B, C, h, w)."""
        first = None if self.cut else self.unet.embed(x)
        return self.unet.tail(feature, first, self.unet.hand_out(time, text), self.cut)


@dataclass(frozen=True)
class CutDiT:
    """CMD's motion model, whose feature is what its blocks add to the tokens.

    Embedding and last layer run at every step, on the new sample.
    """

    dit: DiT

    def run(self, x: Tensor, time: Tensor, *ground: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, T, W' + H'), (B, P), what `place` made -> the output, what is added (B, L, D)."""
        tokens = self.dit.embed(x, *ground)
        after = self.dit.trunk(tokens, time)
        return self.dit.finish(after, time, *x.shape[-2:]), after - tokens

    def resume(self, feature: Tensor, x: Tensor, time: Tensor, *ground: Tensor) -> Tensor:
        """(B, L, D), (B, K, T, W' + H'), (B, P), what `place` made -> the output."""
        return self.dit.finish(self.dit.embed(x, *ground) + feature, time, *x.shape[-2:])


class Rehash:
    """A network that a sampler calls once a step: in full, or skipped, of one clip or batch."""

    def __init__(self, network: Network, full: Collection[int]) -> None:
        assert 0 in full, "the first step has nothing to reuse"
        self.network = network
        self.full = frozenset(full)
        self.step = 0
        self.feature: Tensor | None = None

    def __call__(self, x: Tensor, time: Tensor, *conditions: Tensor) -> Tensor:
        """(B, C, ...), (B, P), conditions -> (B, C or 2 C, ...)."""
        full = self.step in self.full
        self.step += 1
        if full:
            # two of them never exist at once
            self.feature = None
            output, self.feature = self.network.run(x, time, *conditions)
            return output
        assert self.feature is not None
        if len(self.feature) != len(x):
            assert len(self.feature) == 2 * len(x), "guidance came on, with nothing to reuse"
            # it went off: what is left is its positive branch
            self.feature = self.feature[len(x) :]
        return self.network.resume(self.feature, x, time, *conditions)


def rehash(network: CutUNet | CutDiT, full: Collection[int], graphed: Callable[..., Callable[..., Any]]) -> Rehash:
    """Return a denoiser that runs `full` steps in full and reuses features in the others.

    `graphed` makes a function faster; its first argument tells functions apart.
    """
    run, resume = (graphed((network, name), getattr(network, name)) for name in ("run", "resume"))
    return Rehash(GraphedNetwork(run, resume), full)
