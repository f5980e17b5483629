"""What UNet, VAE and DiT share: time embedding, attention, feed-forward, residual block, resampling."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.models.attention import Attend
from cmdgen_kernels import geglu
from cmdgen_kernels.convolution import convolution, convolution_obstacle, doubled_convolution, fold_doubling
from cmdgen_kernels.gated_attention import softmax_attention
from cmdgen_kernels.group_norm_silu import group_norm_silu, group_norm_silu_obstacle
from cmdgen_kernels.layer_norm import layer_norm

# of one attention, (B, N, M, D) x 2
KeysValues = tuple[Tensor, Tensor]


def timestep_embedding(t: Tensor, width: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B,) -> (B, width): cosines, then sines, of t at frequencies from 1 down to 1/10000.

    Sec. 3.5 of Vaswani et al. 2017 (arXiv:1706.03762), in Stable Diffusion's and DiT's order.
    Computed in at least float32 and returned in `dtype`.
    """
    assert width % 2 == 0, f"width {width} is odd"
    precise = torch.promote_types(dtype, torch.float32)
    # the order of operations is diffusers', whose float32 it gives to the last bit
    exponent = -math.log(10000) * torch.arange(width // 2, device=t.device, dtype=precise)
    angle = t[:, None].to(precise) * torch.exp(exponent / (width // 2))  # (B, width / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)


class Attention(nn.Module):
    """Multi-head attention of x over a context, or over itself, under diffusers' names."""

    # see `fuse_weights`
    fused: Tensor | None

    def __init__(
        self, width: int, context_width: int, heads: int, *, bias: bool, attend: Attend = softmax_attention
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.attend = attend
        self.register_buffer("fused", None, persistent=False)

    def project(self, context: Tensor) -> KeysValues:
        """(B, M, D') -> keys and values of it, (B, N, M, D / N) x 2."""
        keys, values = (
            rearrange(y, "b m (n d) -> b n m d", n=self.heads) for y in (self.to_k(context), self.to_v(context))
        )
        return keys, values

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., D) -> queries, keys and values of x itself."""
        if self.fused is not None:
            return F.linear(x, self.fused).chunk(3, dim=-1)
        return self.to_q(x), self.to_k(x), self.to_v(x)

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        """(B, L, D), what `project` made of a context, or nothing for x itself -> (B, L, D).

        A context of fewer rows is one of clips, whose frames, rows of x, follow one another.
        """
        if context is None:
            q, k, v = (rearrange(y, "b l (n d) -> b n l d", n=self.heads) for y in self.split(x))
        else:
            k, v = context
            q = rearrange(self.to_q(x), "(b t) l (n d) -> b n (t l) d", n=self.heads, b=len(k))
        out = self.attend(q, k, v)  # (B, N, L, D / N)
        return self.to_out[0](rearrange(out, "b n (t l) d -> (b t) l (n d)", l=x.shape[1]))

    def read_token(self, token: Tensor) -> Tensor:
        """(B, 1, D') -> (B, 1, D): what attention to one token is, whatever asks: its own value."""
        return self.to_out[0](self.to_v(token))


class TimeEmbedding(nn.Module):
    """Two linear layers on sinusoids: of a timestep, of several numbers, of the index of a frame."""

    def __init__(self, width: int, inner_width: int, out_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, inner_width)
        self.linear_2 = nn.Linear(inner_width, out_width)

    def forward(self, numbers: Tensor) -> Tensor:
        """(B,) or (B, n) -> (B, D)."""
        weight = self.linear_1.weight
        width = weight.shape[1] * len(numbers) // numbers.numel()
        # Stable Diffusion's are float32 whatever the weights are, also where these are float64
        sinusoids = timestep_embedding(numbers.flatten(), width).to(weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids.view(len(numbers), -1))))


class GatedLinear(nn.Module):
    """GEGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D')."""
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # diffusers has a dropout between the two
        self.net = nn.ModuleList([GatedLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.net[2](self.net[0](x))


def normalise(norm: nn.GroupNorm, x: Tensor, *, shift: Tensor | None = None, activation: str = "silu") -> Tensor:
    """(B, C, H, W), (B, C) -> (B, C, H, W): the activation of norm(x + shift).

    A shift of fewer rows is one of clips, whose frames, rows of x, follow one another.
    """
    groups, eps = norm.num_groups, norm.eps
    if shift is not None and len(shift) != len(x):
        shift = shift.repeat_interleave(len(x) // len(shift), dim=0)
    return group_norm_silu(x, norm.weight, norm.bias, shift, groups=groups, eps=eps, activation=activation)


def normalise_tokens(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """(B, ..., D) -> (B, ..., D): its layer norm."""
    return layer_norm(x.flatten(1, -2), norm.weight, norm.bias, eps=norm.eps)[1].view(x.shape)


def add_normalised(norm: nn.LayerNorm, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """(B, ..., D) x 2 -> x + branch, and its layer norm."""
    y, out = layer_norm(x.flatten(1, -2), norm.weight, norm.bias, branch.flatten(1, -2), eps=norm.eps)
    return y.view(x.shape), out.view(x.shape)


class Conv2d(nn.Conv2d):
    """A convolution to which a residual may be added."""

    bias: nn.Parameter

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B, C', H', W') -> (B, C', H', W')."""
        assert not isinstance(self.padding, str)
        return convolution(x, self.weight, self.bias, residual, stride=self.stride, padding=self.padding)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a skip; the time joins in between.

    `time_emb_proj` is here for its name: who has the time embedding projects it to the shift.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_width: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if time_width:
            self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B, C') -> (B, C', H, W)."""
        h, conv, norm = normalise(self.norm1, x), self.conv1, self.norm2
        if group_norm_silu_obstacle(h, norm.weight, norm.bias) is None:
            # the norm's kernel adds the convolution's bias, with the time: they move the moments alone
            shift = conv.bias[None] if shift is None else conv.bias + shift
            h = F.conv2d(h, conv.weight, None, padding=1)  # (B, C', H, W)
        else:
            h = conv(h)  # (B, C', H, W)
        h = normalise(norm, h, shift=shift)
        conv, shortcut = self.conv2, self.conv_shortcut
        if shortcut is None:
            return conv(h, x)
        if convolution_obstacle(h, conv.weight, conv.bias) is None:
            # the two biases in one pass
            bias, x = conv.bias + shortcut.bias, F.conv2d(x, shortcut.weight)
            return convolution(h, conv.weight, bias, x, padding=(1, 1))
        return conv(h, shortcut(x))


class Downsample(nn.Module):
    """Strided 3x3 convolution; the UNet pads all four sides, the VAE only right and bottom."""

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(x if self.conv.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, or resizing, followed by a 3x3 convolution."""

    # see `fuse_weights`
    folded: Tensor | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)
        self.register_buffer("folded", None, persistent=False)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or to the `size` asked for."""
        doubled = 2 * x.shape[2], 2 * x.shape[3]
        if self.folded is not None and size in (None, doubled):
            return doubled_convolution(x, self.folded, self.conv.bias)
        return self.conv(F.interpolate(x, size=size or doubled, mode="nearest"))


def fuse_weights(network: nn.Module) -> None:
    """Give layers what they are fastest with, beside their own weights, which must not change from then on.

    Doubling and its convolution as one; queries, keys and values of attention to itself as one product.
    """
    for layer in network.modules():
        if isinstance(layer, Upsample) and layer.folded is None:
            layer.folded = fold_doubling(layer.conv.weight.detach())
        elif isinstance(layer, Attention) and layer.fused is None and layer.to_q.bias is None:
            weights = [each.weight.detach() for each in (layer.to_q, layer.to_k, layer.to_v)]
            # else it looks at something else
            if weights[0].shape == weights[1].shape:
                layer.fused = torch.cat(weights)
