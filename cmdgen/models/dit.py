"""Diffusion transformer with adaLN-Zero blocks (Peebles & Xie 2023, arXiv:2212.09748).

One class for CMD's motion model, whose tokens are patches of the motion latents followed by patches
of the content frame, and for its class-conditional content model, an ordinary image DiT.

Timestep, text and content frame are embedded apart from the rest. A sampler embeds them once for
all steps (`modulations`, `place`) and passes the part of each step to `denoise`. `forward` does one
after the other. The weights of the modulations are a third of the model's.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.config import DiTConfig
from cmdgen.models.layers import timestep_embedding
from cmdgen.models.pretrained import Pretrained
from cmdgen_kernels.dispatch import inference_obstacle, obstacle
from cmdgen_kernels.gated_attention import softmax_attention
from cmdgen_kernels.layer_norm import layer_norm

FREQUENCIES = 256
EPS = 1e-6


def grid_positions(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """() -> (rows * columns, width): sines and cosines, half the channels for each axis."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(width // 4, dtype=dtype, device=like.device) / (width // 4)
    speeds = torch.exp(-math.log(10000) * exponent)
    down, across = (torch.arange(size, dtype=dtype, device=like.device)[:, None] * speeds for size in (rows, columns))
    angles = torch.stack(
        (down[:, None].expand(-1, columns, -1), across.expand(rows, -1, -1)), dim=2
    )  # (rows, columns, 2, width / 4)
    return rearrange(torch.stack((angles.sin(), angles.cos()), dim=3), "h w side part d -> (h w) (side part d)").to(
        like.dtype
    )


def to_patches(image: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, L, P P C), row by row."""
    height, width = image.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"{height}x{width} is not a multiple of the patch {patch}")
    return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


class Mlp(nn.Sequential):
    """To four times the width and back; GELU in between, by its approximation with tanh."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        up, _, down = self
        assert isinstance(up, nn.Linear)
        if not _fuses_gelu(x, up):
            return super().forward(x)
        # applied by cuBLASLt to what its product holds in registers
        h = torch._addmm_activation(up.bias, x.flatten(0, 1), up.weight.t(), use_gelu=True)  # (B L, 4 D)
        return down(h.unflatten(0, x.shape[:2]))


def _fuses_gelu(x: Tensor, layer: nn.Linear) -> bool:
    """Return whether to use `_addmm_activation`: only CUDA's GELU is by tanh, and it has no gradient."""
    half = x.dtype == layer.weight.dtype and x.dtype.itemsize == 2
    return half and x.is_cuda and inference_obstacle(x, layer.weight) is None


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition; the identity at first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """(B, L, D), (B, 1, 6 D), which `modulation` made of the condition -> (B, L, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, -1)
        _, h = layer_norm(x, scale, shift, eps=EPS)
        qkv = self.qkv(h)
        q, k, v = rearrange(qkv, "b l (three n d) -> three b n l d", three=3, n=self.heads)
        mixed = self.out(rearrange(softmax_attention(q, k, v), "b n l d -> b l (n d)"))
        x, h = layer_norm(x, mlp_scale, mlp_shift, mixed, gate, eps=EPS)
        h = self.mlp(h)
        # one launch where launches cost
        return torch.addcmul(x, mlp_gate, h) if obstacle(x) is None else x + mlp_gate * h


class DiT(Pretrained[DiTConfig]):
    """Predict noise (and its variance) of an image, or of motion latents for a content frame."""

    config_type = DiTConfig
    text_mean: Tensor
    text_whitening: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width = config.width
        if width % config.heads or width % 4:
            raise ValueError(f"width {width} is not a multiple of heads {config.heads} and of 4")
        self.out_channels = config.in_channels * (2 if config.learned_sigma else 1)
        self.embed_sample = nn.Linear(config.patch**2 * config.in_channels, width)
        self.embed_time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        if config.text_width is not None:
            self.embed_text = nn.Linear(config.text_width, width)
            if config.text_whitened:
                self.register_buffer("text_mean", torch.zeros(config.text_width))
                # on the meta device torch.eye would import torch's compiler, which takes a second
                identity = torch.zeros(config.text_width, config.text_width).fill_diagonal_(1.0)
                self.register_buffer("text_whitening", identity)
        if config.num_classes is not None:
            # the last row is the null class of guidance
            self.embed_label = nn.Embedding(config.num_classes + 1, width)
        if config.context_channels is not None:
            self.embed_context = nn.Linear(config.context_patch**2 * config.context_channels, width)
            # told apart by these: the width-indexed tokens, the height-indexed ones, the context
            self.kinds = nn.Parameter(torch.empty(3, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, config.patch**2 * self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "modulation" in name or name == "final.weight":
                nn.init.zeros_(parameter)
            elif name.startswith(("embed_time", "embed_label", "kinds")):
                # DiT's deviation of 0.02, but not its normal draw: that takes seconds of imports on
                # the meta device, where models are loaded
                nn.init.uniform_(parameter, -0.02 * math.sqrt(3), 0.02 * math.sqrt(3))
            else:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        text: Tensor | None = None,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        split: int | None = None,
    ) -> Tensor:
        """(B, C, H, W), (B,) -> (B, C or 2 C, H, W).

        `text` (B, L, D) are token states, `labels` (B,) classes, `context` (B, C, H, W) the content
        frame. Of motion latents (B, K, T, W' + H'), `split` says W', the columns of the first part.
        """
        modulations = self.modulations(timestep, text=text, labels=labels)
        ground = self.place(sample.shape[-2], sample.shape[-1], context=context, split=split)
        return self.denoise(sample, modulations, ground)

    def modulations(self, timestep: Tensor, *, text: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """(B,) -> (B, P): of all blocks and of the last layer; the rest is as in `forward`."""
        self._check("text", text, self.config.text_width)
        self._check("labels", labels, self.config.num_classes)
        dtype = self.final.weight.dtype
        condition = self.embed_time(timestep_embedding(timestep, FREQUENCIES, dtype=dtype))
        if text is not None:
            condition = condition + self.embed_text(self.pool(text))
        if labels is not None:
            condition = condition + self.embed_label(labels)
        condition = F.silu(condition)  # (B, D)
        layers = [*(block.get_submodule("modulation") for block in self.blocks)]
        return torch.cat([layer(condition) for layer in (*layers, self.final_modulation)], dim=-1)

    @property
    def whitening(self) -> tuple[Tensor, Tensor]:
        """Return what whitens the mean state: a mean (D) and a matrix (D, D)."""
        return self.text_mean, self.text_whitening

    def pool(self, text: Tensor) -> Tensor:
        """(B, L, D) -> (B, D): the mean state, whitened if the configuration says so, in float32 at least."""
        pooled = text.mean(dim=1)
        if not self.config.text_whitened:
            return pooled
        wide = torch.promote_types(text.dtype, torch.float32)
        mean, matrix = (part.to(wide) for part in self.whitening)
        return ((pooled.to(wide) - mean) @ matrix).to(text.dtype)

    def place(self, height: int, width: int, *, context: Tensor | None = None, split: int | None = None) -> Tensor:
        """() -> (B or 1, L, D): the positions of a sample's tokens, then the tokens of its context.

        Height and width are those of the sample; the rest is as in `forward`.
        """
        self._check("context", context, self.config.context_channels)
        self._check("split", split, self.config.context_channels)
        rows, columns = self._grid(height, width)
        if context is None or split is None:
            return self._positions(rows, columns)[None]
        positions = self._motion_positions(rows, columns, split)
        tokens = self._embed_context(context)
        return torch.cat((positions.expand(len(tokens), -1, -1), tokens), dim=1)

    def denoise(self, sample: Tensor, modulations: Tensor, ground: Tensor) -> Tensor:
        """(B, C, H, W), (B, P), what `place` made -> (B, C or 2 C, H, W)."""
        tokens = self.trunk(self.embed(sample, ground), modulations)
        return self.finish(tokens, modulations, sample.shape[-2], sample.shape[-1])

    def embed(self, sample: Tensor, ground: Tensor) -> Tensor:
        """(B, C, H, W), what `place` made -> (B, L, D), the tokens of the sample first."""
        tokens = self.embed_sample(to_patches(sample, self.config.patch))
        positions, context = ground.tensor_split([tokens.shape[1]], dim=1)
        tokens = tokens + positions
        return torch.cat((tokens, context), dim=1) if context.shape[1] else tokens

    def trunk(self, tokens: Tensor, modulations: Tensor) -> Tensor:
        """(B, L, D), (B, P) -> (B, L, D): all blocks."""
        *parts, _ = modulations[:, None].split(6 * self.config.width, dim=-1)
        for block, part in zip(self.blocks, parts, strict=True):
            tokens = block(tokens, part)
        return tokens

    def finish(self, tokens: Tensor, modulations: Tensor, height: int, width: int) -> Tensor:
        """(B, L, D), (B, P) -> (B, C or 2 C, H, W), of the tokens of the sample."""
        rows, columns = self._grid(height, width)
        shift, scale = modulations[:, None, -2 * self.config.width :].chunk(2, dim=-1)
        _, tokens = layer_norm(tokens[:, : rows * columns], scale, shift, eps=EPS)
        patches = self.final(tokens)
        patch = self.config.patch
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch)

    def _check(self, name: str, value: Tensor | int | None, wanted: int | None) -> None:
        if (value is None) != (wanted is None):
            raise ValueError(f"this model {'takes no' if wanted is None else 'needs'} {name}")

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a sample."""
        return height // self.config.patch, width // self.config.patch

    def _positions(self, rows: int, columns: int) -> Tensor:
        # like a weight, not like the tokens: under autocast the residual stream stays in float32
        return grid_positions(rows, columns, self.config.width, self.embed_sample.weight)

    def _motion_positions(self, rows: int, columns: int, split: int) -> Tensor:
        """() -> (rows * columns, D): positions in time and in the part, the part's kind."""
        patch = self.config.patch
        if split % patch or not 0 < split < columns * patch:
            raise ValueError(f"split {split} of {columns * patch} columns is not a multiple of the patch {patch}")
        across = split // patch
        parts = [
            rearrange(self._positions(rows, size), "(h w) d -> h w d", h=rows) + kind
            for size, kind in zip((across, columns - across), self.kinds[:2], strict=True)
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def _embed_context(self, context: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, D)."""
        patch = self.config.context_patch
        tokens = self.embed_context(to_patches(context, patch))
        rows, columns = (side // patch for side in context.shape[-2:])
        return tokens + self._positions(rows, columns) + self.kinds[2]
