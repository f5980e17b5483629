"""The transformer among the positions of a feature map, which reads the text, and what it reads."""

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.config import UNetConfig
from cmdgen.models.attention import self_attention
from cmdgen.models.layers import Attention, FeedForward, KeysValues, add_normalised, normalise, normalise_tokens


class Conditions(NamedTuple):
    """Timestep and text as the layers read them, by layer."""

    # rows of both; of a video, a row is a clip, whose frames are rows of the feature maps
    clips: int
    shifts: dict[nn.Module, Tensor]
    # where the text is one token, what attention to it is: (B, 1, D)
    text: dict[nn.Module, KeysValues | Tensor]

    def of(self, clips: slice) -> "Conditions":
        """Return those of some clips."""
        text = {
            layer: read[clips] if isinstance(read, Tensor) else (read[0][clips], read[1][clips])
            for layer, read in self.text.items()
        }
        shifts = {layer: shift[clips] for layer, shift in self.shifts.items()}
        return Conditions(len(range(self.clips)[clips]), shifts, text)


class Layers(nn.Module):
    """Two attentions and a feed-forward, each with its norm, of a transformer block."""

    def __init__(self, width: int, attn1: Attention, attn2: Attention) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), attn1
        self.norm2, self.attn2 = nn.LayerNorm(width), attn2
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)


class TransformerBlock(Layers):
    """Attention among positions, attention to the text, feed-forward, each around a skip."""

    def __init__(self, width: int, heads: int, config: UNetConfig) -> None:
        attend = self_attention(config, width // heads)
        among = Attention(width, width, heads, bias=False, attend=attend)
        super().__init__(width, among, Attention(width, config.cross_attention_dim, heads, bias=False))

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, H*W, D) -> (B, H*W, D)."""
        text, mixed = conditions.text[self.attn2], self.attn1(normalise_tokens(self.norm1, x))
        if isinstance(text, Tensor):
            mixed = (mixed.unflatten(0, (len(text), -1)) + text[:, None]).flatten(0, 1)
        else:
            x, h = add_normalised(self.norm2, x, mixed)
            mixed = self.attn2(h, text)
        x, h = add_normalised(self.norm3, x, mixed)
        # the feed-forward is where memory peaks
        del mixed
        return x + self.ff(h)


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, around a skip."""

    def __init__(self, channels: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        # the same map either way: Stable Diffusion 1 stores it as a 1x1 convolution, 2 as a matrix
        linear = config.use_linear_projection
        self.proj_in, self.proj_out = (
            nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1) for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, config)])

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        added = self.leave(self.transform(x, conditions))
        return x + rearrange(added, "b (h w) c -> b c h w", h=x.shape[2])

    def transform(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, H, W) -> (B, H*W, C): the tokens, transformed."""
        tokens = rearrange(normalise(self.norm, x, activation="none"), "b c h w -> b (h w) c")
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        return self.transformer_blocks[0](tokens, conditions)

    def leave(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C): what they add to the map."""
        return F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)

    def readers(self) -> list[Attention]:
        """List the attentions to the text."""
        blocks = self.transformer_blocks
        return [block.attn2 for block in blocks if isinstance(block, TransformerBlock)]
