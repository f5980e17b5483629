"""CMD's video autoencoder: a clip is one content frame plus small motion latents.

Sec. 3.2 of Yu et al. 2024 (arXiv:2403.14148). Tokens travel as `(T, B, N, D)`, time first, so that
attention over time and attention over space both read the projections through views, uncopied.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.config import AutoencoderConfig
from cmdgen.models.attention import self_attention
from cmdgen.models.layers import add_normalised, normalise_tokens
from cmdgen.models.pretrained import Pretrained
from cmdgen_kernels import content_frame, geglu, motion_latents, motion_tokens, rotate, time_attention
from cmdgen_kernels.gated_attention import softmax_attention
from cmdgen_kernels.time_attention import MOST_ROWS

# an axis has tens of positions: slower rotations than this would tell nothing apart
SLOWEST_ROTATION = 1 / 100


def axial_rotation(sizes: tuple[int, ...], head_dim: int, like: Tensor) -> Tensor:
    """() -> complex (L, head_dim / 2): unit rotations of a grid's positions, the last axis fastest.

    The axes share the head evenly; pairs of channels left over do not turn. In float32 at least,
    on the device of `like`.
    """
    share = head_dim // 2 // len(sizes)
    dtype = torch.promote_types(like.dtype, torch.float32)
    speeds = SLOWEST_ROTATION ** (torch.arange(share, dtype=dtype, device=like.device) / share)
    grid = torch.cartesian_prod(*(torch.arange(size, dtype=dtype, device=like.device) for size in sizes))
    angles = (grid.view(-1, len(sizes), 1) * speeds).flatten(1)
    angles = F.pad(angles, (0, head_dim // 2 - angles.shape[1]))
    return torch.polar(torch.ones_like(angles), angles)


class Attention(nn.Module):
    """Self-attention with rotary positions along one of two axes, the other being a batch."""

    def __init__(self, config: AutoencoderConfig, dim: int) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.dim = dim
        self.attend = self_attention(config, width // config.heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(S, R, D), complex broadcasting to (S, R, D) -> (S, R, D): attend along S or along R.

        The rotation holds D / 2 numbers for the queries, then D / 2 for the keys.
        """
        qk, v = self.qkv(x).tensor_split((2 * x.shape[-1],), dim=-1)
        q, k = rotate(qk, rotation).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        if self.dim == 0 and self.attend is softmax_attention:
            return self.out(time_attention(q[None], k[None], v[None])[0].flatten(2))
        to_heads = (1 - self.dim, 2, self.dim, 3)
        mixed = self.attend(*(part.permute(to_heads) for part in (q, k, v)))  # (batch, N, L, D / N)
        mixed = mixed.permute((2, 0, 1, 3) if self.dim == 0 else (0, 2, 1, 3)).flatten(2)
        return self.out(mixed)


class GegluFeedForward(nn.Module):
    """Gated feed-forward of hidden width 4 D: `W (a * gelu(b))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(geglu(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block: attention over time, attention over space, feed-forward."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.width
        self.time_norm = nn.LayerNorm(width)
        self.time = Attention(config, dim=0)
        self.space_norm = nn.LayerNorm(width)
        self.space = Attention(config, dim=1)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = GegluFeedForward(width)

    def forward(self, x: Tensor, time_rotation: Tensor, space_rotation: Tensor) -> Tensor:
        """(T, B, N, D) -> (T, B, N, D)."""
        shape = x.shape
        parts = [self.mix_time(part, time_rotation) for part in x.flatten(1, 2).split(MOST_ROWS, dim=1)]
        x = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(shape)
        return self.mix_space(x.flatten(0, 1), space_rotation).view(shape)

    def mix_time(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(T, R, D) -> (T, R, D): what knows no other position; any part of the R alone will do."""
        return x + self.time(normalise_tokens(self.time_norm, x), rotation)

    def mix_space(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(S, N, D) -> (S, N, D): what knows no other frame; any part of the S alone will do."""
        mixed = self.space(normalise_tokens(self.space_norm, x), rotation)
        x, h = add_normalised(self.feed_forward_norm, x, mixed)
        return x + self.feed_forward(h)


class Unpatch(nn.Module):
    """Transposed convolution whose kernel equals its stride: a linear layer, a bias per channel."""

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(width, patch * patch * channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """(T, B, N, D) -> (B, C, T, H, W) of N = rows * columns tokens."""
        patches = self.linear(x).unflatten(-1, (-1, self.bias.shape[0])) + self.bias
        return rearrange(patches, "t b (h w) (p q) c -> b c t (h p) (w q)", h=rows, p=self.patch, q=self.patch)


class CmdAutoencoder(Pretrained[AutoencoderConfig]):
    """Frames (scaled VAE latents, or pixels in [-1, 1]) to content and motion, and back."""

    config_type = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        width, channels, patch = config.width, config.channels, config.patch
        if width % (2 * config.heads):
            raise ValueError(f"width {width} is not an even multiple of heads {config.heads}")
        self.embed_frames = nn.Linear(patch * patch * channels, width)
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.importance: Unpatch | nn.Linear
        if config.importance == "pixel":
            self.importance = Unpatch(width, channels, patch)
        else:
            self.importance = nn.Linear(width, 1)
        self.motion_width = nn.Linear(width, config.motion_channels)
        self.motion_height = nn.Linear(width, config.motion_channels)
        self.embed_content = nn.Linear(patch * patch * channels, width)
        self.embed_motion_width = nn.Linear(config.motion_channels, width)
        self.embed_motion_height = nn.Linear(config.motion_channels, width)
        depth = config.depth if config.decoder_depth is None else config.decoder_depth
        self.decoder = nn.ModuleList(Block(config) for _ in range(depth))
        self.output = Unpatch(width, channels, patch)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) -> content (B, C, H, W), motion (B, K, T, W' + H').

        Eq. 3-4; the width-indexed part of the motion comes first. Raises ValueError where a side is
        not a multiple of the patch.
        """
        tokens = self.embed_clip(frames)
        rows = frames.shape[-2] // self.config.patch
        return self.summarise(frames, self._transform(self.encoder, tokens, rows))

    def embed_clip(self, frames: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (T, B, N, D): what the encoder's blocks begin with."""
        patch = self.config.patch
        height, width = frames.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"frames {height}x{width} are not multiples of the patch {patch}")
        return self.embed_frames(rearrange(frames, "b c t (h p) (w q) -> t b (h w) (p q c)", p=patch, q=patch))

    def summarise(self, frames: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W), (T, B, N, D) -> content (B, C, H, W), motion (B, K, T, W' + H')."""
        rows = frames.shape[-2] // self.config.patch
        if isinstance(self.importance, Unpatch):
            content = content_frame(frames, self.importance(tokens, rows))
        else:
            content = (frames * self.smooth_weights(tokens, rows)).sum(dim=2).to(frames.dtype)
        motion = motion_latents(
            rearrange(tokens, "t b (h w) d -> b t h w d", h=rows),
            *(self.motion_width.weight, self.motion_width.bias),
            *(self.motion_height.weight, self.motion_height.bias),
            activation=self.config.motion_activation,
        )
        return content, motion.to(frames.dtype)

    def smooth_weights(self, tokens: Tensor, rows: int) -> Tensor:
        """(T, B, N, D) -> (B, 1, T, H, W): each frame's share of the content, summing to 1."""
        logits = self.importance(tokens)
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=0)
        smooth = F.interpolate(
            rearrange(weights, "t b (h w) 1 -> b t h w", h=rows), scale_factor=self.config.patch, mode="bilinear"
        )
        return smooth.unsqueeze(1)

    def decode(self, content: Tensor, motion: Tensor) -> Tensor:
        """(B, C, H, W), (B, K, T, W' + H') -> (B, C, T, H, W). Eq. 5-6.

        Raises ValueError where the motion does not have the content frame's W' + H' positions.
        """
        rows = content.shape[-2] // self.config.patch
        tokens = self._transform(self.decoder, self.embed(content, motion), rows)
        return self.output(tokens, rows).to(content.dtype)

    def embed(self, content: Tensor, motion: Tensor) -> Tensor:
        """(B, C, H, W), (B, K, T, W' + H') -> (T, B, N, D): content_hw + width_tw + height_th."""
        patch = self.config.patch
        rows, columns = (side // patch for side in content.shape[-2:])
        if motion.shape[-1] != columns + rows:
            raise ValueError(
                f"motion of {motion.shape[-1]} positions does not fit the content frame's {columns} + {rows}"
            )
        still = self.embed_content(rearrange(content, "b c (h p) (w q) -> b h w (p q c)", p=patch, q=patch))
        tokens = motion_tokens(
            still,
            motion,
            *(self.embed_motion_width.weight, self.embed_motion_width.bias),
            *(self.embed_motion_height.weight, self.embed_motion_height.bias),
        )
        return rearrange(tokens, "b t h w d -> t b (h w) d")

    def _transform(self, blocks: nn.ModuleList, tokens: Tensor, rows: int) -> Tensor:
        time, space = self.rotations(tokens, rows)
        for block in blocks:
            tokens = block(tokens, time, space)
        return tokens

    def rotations(self, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """(T, B, N, D) -> complex (T, 1, D), (N, D): what the blocks turn time and space by."""
        frames, _, count, width = tokens.shape
        heads = self.config.heads
        head_dim = width // heads
        time = axial_rotation((frames,), head_dim, tokens)
        space = axial_rotation((rows, count // rows), head_dim, tokens)
        # one copy for each head of the queries and of the keys: rows as long as those they multiply
        return time.repeat(1, 2 * heads)[:, None], space.repeat(1, 2 * heads)

    def standardise(self, motion: Tensor) -> Tensor:
        """(B, K, T, S) -> the same, zero mean and unit variance on the training data."""
        mean, deviation = self._statistics(motion)
        return (motion - mean) / deviation

    def destandardise(self, motion: Tensor) -> Tensor:
        """(B, K, T, S) -> the same: the inverse of `standardise`."""
        mean, deviation = self._statistics(motion)
        return motion * deviation + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """() -> mean and standard deviation on the training data, (K, 1, 1) x 2, or () x 2."""
        config = self.config
        measured = config.motion_mean is not None and config.motion_std is not None
        pair = (config.motion_mean, config.motion_std) if measured else (0.0, 1.0)
        mean, deviation = torch.tensor(pair, dtype=like.dtype, device=like.device)
        return (mean[:, None, None], deviation[:, None, None]) if measured else (mean, deviation)
