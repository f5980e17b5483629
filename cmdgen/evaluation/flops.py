"""How much arithmetic a model takes, counted on the meta device: no weights, no GPU, no waiting.

Two accountings. The honest one: every matrix product and convolution, two operations for each
multiply-add. That of CMD's Tables 8 and 9 (Yu et al. 2024, arXiv:2403.14148), whose counter took a
multiply-add for one operation and did not see inside fused attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from cmdgen.config import CMD_SD21, ModelConfig, UNetConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.text import ClipTextModel
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.pipeline import Parts
from cmdgen.weights import build_empty

# what the tables count in
TERA = 10**12

# Table 8: one forward of each model at 512x512, in 10^12 multiply-adds
TABLE_8 = {"autoencoder": 0.77, "content": 0.34, "motion": 0.14}
# Table 9: sampling one clip at 512x1024 in so many steps of both models
TABLE_9 = {50: 46.8, 100: 92.1}


@dataclass(frozen=True)
class Products:
    """Multiply-adds of matrix products and convolutions, and how many of them are attention's.

    Attention's are those of queries with keys and of weights with values, projections are not.
    """

    multiply_adds: int
    attention: int

    def __add__(self, other: "Products") -> "Products":
        return Products(self.multiply_adds + other.multiply_adds, self.attention + other.attention)

    def __mul__(self, times: int) -> "Products":
        return Products(self.multiply_adds * times, self.attention * times)

    @property
    def flops(self) -> int:
        """The honest count."""
        return 2 * self.multiply_adds

    @property
    def published(self) -> int:
        """What a counter reports that sees a multiply-add as one and fused attention as none."""
        return self.multiply_adds - self.attention


class _AttentionCounter(TorchFunctionMode):
    """Multiply-adds inside fused attention; what else is a batched product cannot be told apart."""

    multiply_adds = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            self.multiply_adds += prod(q.shape[:-1]) * k.shape[-2] * (k.shape[-1] + v.shape[-1])
        return function(*args, **(kwargs or {}))


def count_products(run: Callable[[], object]) -> Products:
    """What a function of tensors on the meta device would compute."""
    with (
        torch.inference_mode(),
        _AttentionCounter() as attention,
        FlopCounterMode(display=False) as counter,
    ):
        run()
    return Products(counter.get_total_flops() // 2, attention.multiply_adds)


@dataclass(frozen=True)
class Forwards:
    """One forward of each network on one sample; of the VAE, one frame."""

    text: Products
    content: Products
    motion: Products
    frame_encode: Products
    frame_decode: Products
    vae_decode: Products


def build_parts(model: ModelConfig) -> Parts:
    """The networks on the meta device; ValueError where the model makes no video from text."""
    if model.text is None or model.vae is None or not isinstance(model.content, UNetConfig):
        raise ValueError(f"{model.name} makes no video from text: it has no text, UNet or VAE")
    return Parts(
        text=build_empty(ClipTextModel, model.text),
        content=build_empty(UNet, model.content),
        vae=build_empty(KlVae, model.vae),
        autoencoder=build_empty(CmdAutoencoder, model.autoencoder),
        motion=build_empty(DiT, model.motion),
    )


def count_forwards(model: ModelConfig, parts: Parts | None = None) -> Forwards:
    """Count each network of a model at its size and length."""
    parts = build_parts(model) if parts is None else parts
    assert model.text is not None and model.vae is not None
    height, width = (side // model.vae.stride for side in (model.height, model.width))
    rows, columns = (side // model.autoencoder.patch for side in (height, width))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    length = model.text.max_position_embeddings
    ids = torch.empty((1, length), dtype=torch.long, device="meta")
    states, when = empty(1, length, model.text.hidden_size), empty(1)
    still = empty(1, model.vae.latent_channels, height, width)
    clip = still.unsqueeze(2).expand(-1, -1, model.frames, -1, -1)
    motion = empty(1, model.autoencoder.motion_channels, model.frames, columns + rows)
    given = None if model.motion.text_width is None else states
    return Forwards(
        text=count_products(lambda: parts.text(ids)),
        content=count_products(lambda: parts.content(still, when, states)),
        motion=count_products(
            lambda: parts.motion(motion, when, text=given, context=still, split=columns)
        ),
        frame_encode=count_products(lambda: parts.autoencoder.encode(clip)),
        frame_decode=count_products(lambda: parts.autoencoder.decode(still, motion)),
        vae_decode=count_products(lambda: parts.vae.decode(still)),
    )


def count_sampling(
    model: ModelConfig, forwards: Forwards | None = None, *, batch: int = 1
) -> dict[str, Products]:
    """Each stage of `TextToVideo.sample_batch`, with the model's own steps and guidance."""
    each = count_forwards(model) if forwards is None else forwards
    content, motion = (1 if scale == 1 else 2 for scale in (model.guidance, model.motion_guidance))
    return {
        # the negative prompt is one for all, except where clips are made one at a time
        "text": each.text * (batch + (batch if model.sampler == "ddpm" else 1)),
        "content": each.content * (batch * model.steps * content),
        "motion": each.motion * (batch * model.motion_steps * motion),
        "frame decode": each.frame_decode * batch,
        # the frames of the clip and the content frame
        "VAE decode": each.vae_decode * (batch * (model.frames + 1)),
    }


@dataclass(frozen=True)
class Comparison:
    """A figure of the paper, ours in its accounting, and the honest count, in 10^12."""

    label: str
    published: float
    ours: float
    honest: float


@dataclass(frozen=True)
class PaperTables:
    """CMD's Tables 8 and 9 beside ours, and where the operations of 50 steps go, in 10^12."""

    model: str
    table_8: list[Comparison]
    table_9: list[Comparison]
    stages: dict[str, float]


def compare_with_paper(model: ModelConfig = CMD_SD21) -> PaperTables:
    """Count what the paper counted.

    Table 8 is one forward of each model at 512x512, the autoencoder's there and back. Table 9 is,
    for each step, one forward of both models, unguided, then the autoencoder there and back, at
    512x1024; neither text encoder nor VAE. Ours beside them is what `cmdgen sample` computes: with
    guidance, text encoder and VAE, the autoencoder one way.
    """
    parts = build_parts(model)
    square = count_forwards(replace(model, height=512, width=512), parts)
    wide_model = replace(model, height=512, width=1024)
    wide = count_forwards(wide_model, parts)
    single = {
        "autoencoder": square.frame_encode + square.frame_decode,
        "content": square.content,
        "motion": square.motion,
    }
    sampled = {
        steps: count_sampling(replace(wide_model, steps=steps, motion_steps=steps), wide)
        for steps in TABLE_9
    }
    return PaperTables(
        model=model.name,
        table_8=[
            _compare(name, published, single[name], single[name])
            for name, published in TABLE_8.items()
        ],
        table_9=[
            _compare(
                f"{steps} steps",
                published,
                (wide.content + wide.motion) * steps + wide.frame_encode + wide.frame_decode,
                sum(sampled[steps].values(), Products(0, 0)),
            )
            for steps, published in TABLE_9.items()
        ],
        stages={name: products.flops / TERA for name, products in sampled[50].items()},
    )


def _compare(label: str, published: float, ours: Products, honest: Products) -> Comparison:
    return Comparison(label, published, ours.published / TERA, honest.flops / TERA)
