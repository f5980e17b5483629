"""What a pruned denoiser learns from the whole one (VDMini, 2024, arXiv:2411.18375).

    ICD   individual content: features of each frame after each block that was kept, beside the teacher's
    MCA   motion: a critic, whose heads alone learn, tells the student's clips from the teacher's

VDMini's critic reads features of a UNet that sees all frames. CMD's content model never sees two: its
frames meet in the CMD decoder, in whose frozen tokens this critic reads the clean samples that student
and teacher head for.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.compression.units import kept_blocks, origin_of
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT

# of a head's inner layer
_WIDTH = 64


class Matched:
    """The blocks of a student, those of its teacher that make what they should, and what each made last."""

    def __init__(self, student: nn.Module, teacher: Any, units: Collection[str]) -> None:
        names = {name: origin_of(name, teacher.config, units) for name in _list_blocks(student)}
        if isinstance(teacher, DiT):
            # what a block makes is what the next one read, also where others were in between
            kept = kept_blocks("blocks", len(teacher.blocks), units)
            names = {f"blocks.{i}": f"blocks.{end - 1}" for i, end in enumerate([*kept[1:], len(teacher.blocks)])}
        self.pairs = [(student.get_submodule(name), teacher.get_submodule(old)) for name, old in names.items()]
        self.made: dict[nn.Module, Tensor] = {}
        for block in (block for pair in self.pairs for block in pair):
            block.register_forward_hook(self._keep)

    def _keep(self, block: Any, _: Any, made: Any) -> None:
        # of a down block, its last layer's: the smaller UNet's innermost one does not halve
        self.made[block] = made[len(block.resnets) - 1] if isinstance(made, list) else made

    def difference(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the sum over blocks of the distance of features from the teacher's, a mean over frames.

        A vector norm, of the length of the teacher's features: the division is ours, without it blocks of
        large activations rule. A feature map is one frame; tokens have first a grid of frames, (T, N).
        """
        terms = []
        for pair in self.pairs:
            ours, theirs = (_split_frames(self.made.pop(block).float(), grid) for block in pair)
            terms.append(((ours - theirs).norm(dim=2) / theirs.norm(dim=2).clamp(min=1e-6)).mean())
        return torch.stack(terms).sum()


def _split_frames(feature: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """(B, C, H, W) -> (B, 1, D); (B, L, D) whose first T N tokens are of T frames -> (B, T, N D)."""
    if grid is None:
        return feature.flatten(1)[:, None]
    return feature[:, : grid[0] * grid[1]].unflatten(1, grid).flatten(2)


def _list_blocks(student: Any) -> list[str]:
    if isinstance(student, DiT):
        return [f"blocks.{i}" for i in range(len(student.blocks))]
    sides = {"down_blocks": student.down_blocks, "up_blocks": student.up_blocks}
    blocks = [f"{side}.{i}" for side, stages in sides.items() for i in range(len(stages))]
    return blocks + (["mid_block"] if student.mid_block is not None else [])


class Critic(nn.Module):
    """Two heads at each of several depths of frozen tokens: one sees a frame, one a position at all times.

    Two convolutions each, along rows and columns or along time; a logit for each token.
    """

    def __init__(self, width: int, depths: int) -> None:
        super().__init__()
        self.space = nn.ModuleList(_head(nn.Conv2d, width) for _ in range(depths))
        self.time = nn.ModuleList(_head(nn.Conv1d, width) for _ in range(depths))

    def forward(self, features: Sequence[Tensor], rows: int) -> Tensor:
        """(T, B, N, D) for each depth, of N = rows * columns tokens -> all logits, (L,)."""
        logits = []
        for tokens, space, time in zip(features, self.space, self.time, strict=True):
            tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
            frames = len(tokens)
            logits.append(space(rearrange(tokens, "t b (h w) d -> (t b) d h w", h=rows)).flatten())
            logits.append(time(rearrange(tokens, "t b n d -> (b n) d t", t=frames)).flatten())
        return torch.cat(logits)


def _head(convolution: Any, width: int) -> nn.Sequential:
    return nn.Sequential(convolution(width, _WIDTH, 3, padding=1), nn.SiLU(), convolution(_WIDTH, 1, 3, padding=1))


def decoder_tokens(autoencoder: CmdAutoencoder, content: Tensor, motion: Tensor) -> list[Tensor]:
    """(B, C, H, W), (B, K, T, W' + H') -> (T, B, N, D) after half of the CMD decoder's blocks, and after all."""
    tokens = autoencoder.embed(content, motion)
    rotations = autoencoder.rotations(tokens, content.shape[-2] // autoencoder.config.patch)
    kept, depths = [], list_depths(autoencoder)
    for i, block in enumerate(autoencoder.decoder, 1):
        tokens = block(tokens, *rotations)
        if i in depths:
            kept.append(tokens)
    return kept


def list_depths(autoencoder: CmdAutoencoder) -> list[int]:
    """Return after how many of the CMD decoder's blocks a critic sees the tokens."""
    depth = len(autoencoder.decoder)
    return sorted({(depth + 1) // 2, depth})


def hinge(critic: Critic, student: Sequence[Tensor], teacher: Sequence[Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Return the loss of the student, -E D(student), and that of the critic, which must not reach the student.

    max(0, 1 + D(student)) + max(0, 1 - D(teacher)): Eq. 2 of Lim and Ye 2017 (arXiv:1705.02894).
    """
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    judged: Tensor = torch.func.functional_call(critic, frozen, (student, rows))
    fake, real = (critic([part.detach() for part in each], rows) for each in (student, teacher))
    return -judged.mean(), F.relu(1 + fake).mean() + F.relu(1 - real).mean()
