"""How much a model computes, and reads of its weights: counted on the meta device, no GPU needed.

Two accountings of arithmetic. The honest one: every matrix product and convolution, two operations
for each multiply-add. That of CMD's Tables 8 and 9 (Yu et al. 2024, arXiv:2403.14148), whose
counter took a multiply-add for one operation and did not see inside fused attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cmdgen.acceleration.memory import Work, choose_slices, peak_bytes
from cmdgen.config import CMD_SD21, ModelConfig, UNetConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.text import ClipTextModel
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.pipeline import TIMESTEPS_TOGETHER, Parts
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


class _FusedAttention(TorchFunctionMode):
    """Attention as libraries run it, which never hold its scores; the meta device has none."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            q, _, v = args
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return function(*args, **(kwargs or {}))


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


NOTHING = Products(0, 0)


@dataclass(frozen=True)
class Weights:
    """What a forward takes of a part's weights, in numbers, not bytes."""

    # of the half that runs, where a part has two
    parameters: int
    # those and the buffers
    numbers: int
    # once each; of a table that is looked up, the rows of one sample
    read: int


class _WeightCounter(TorchDispatchMode):
    """Which tensors of a part are operands, and how many of their numbers are read."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in part.state_dict(keep_vars=True).items()}
        self.read: dict[str, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        looked_up = function is torch.ops.aten.embedding.default
        for operand in tree_leaves((args, kwargs)):
            if (name := self.names.get(id(operand))) is not None:
                self.read[name] = (result if looked_up else operand).numel()
        return result


def count_weights(part: nn.Module, run: Callable[[], object]) -> Weights:
    """What a function of tensors on the meta device would take of a part's weights."""
    with torch.inference_mode(), _WeightCounter(part) as counter:
        run()
    state = part.state_dict(keep_vars=True)
    taken = {name: state[name] for name in counter.read}
    return Weights(
        parameters=sum(t.numel() for t in taken.values() if isinstance(t, nn.Parameter)),
        numbers=sum(t.numel() for t in taken.values()),
        read=sum(counter.read.values()),
    )


@dataclass(frozen=True)
class Forwards:
    """One forward of each network on one sample; of the VAE, one frame. Stills need no motion.

    What makes content and motion is in parts: what each step runs, and what is made for all steps
    beforehand.
    """

    text: Products
    # of a step, of a timestep, of a text
    content_step: Products
    content_time: Products
    content_text: Products
    vae_decode: Products
    # of a step, of a timestep and text, of a content frame
    motion_step: Products = NOTHING
    motion_time: Products = NOTHING
    motion_place: Products = NOTHING
    frame_encode: Products = NOTHING
    frame_decode: Products = NOTHING

    @property
    def content(self) -> Products:
        """Of the UNet as a whole."""
        return self.content_step + self.content_time + self.content_text

    @property
    def motion(self) -> Products:
        """Of the motion model as a whole."""
        return self.motion_step + self.motion_time + self.motion_place


def build_parts(model: ModelConfig) -> Parts:
    """The networks on the meta device; ValueError where the model makes no video from text."""
    if model.text is None or model.vae is None or not isinstance(model.content, UNetConfig):
        raise ValueError(f"{model.name} makes no video from text: it has no text, UNet or VAE")
    return Parts(
        text=build_empty(ClipTextModel, model.text),
        content=build_empty(UNet, model.content),
        vae=build_empty(KlVae, model.vae),
        autoencoder=(
            None if model.autoencoder is None else build_empty(CmdAutoencoder, model.autoencoder)
        ),
        motion=None if model.motion is None else build_empty(DiT, model.motion),
    )


def count_forwards(model: ModelConfig, parts: Parts | None = None) -> Forwards:
    """Count each network of a model at its size and length."""
    parts = build_parts(model) if parts is None else parts
    runs = _forwards(model, parts)
    return Forwards(
        **{
            each.name: count_products(runs[each.name][1])
            for each in fields(Forwards)
            if each.name in runs
        }
    )


def count_peaks(model: ModelConfig, dtype: torch.dtype) -> dict[str, int]:
    """Of text, content and motion: bytes of tensors that one forward makes and holds at once.

    Counted in float32, and taken in proportion for `dtype`.
    """
    runs = _forwards(model, build_parts(model))
    with _FusedAttention():
        return {
            name: peak_bytes(runs[name][1]) * dtype.itemsize // 4
            for name in ("text", "content", "motion")
            if name in runs
        }


@torch.inference_mode()
def _forwards(
    model: ModelConfig, parts: Parts
) -> dict[str, tuple[nn.Module, Callable[[], object]]]:
    """What of `Forwards` a model has: the network, and what of it runs."""
    assert model.text is not None and model.vae is not None
    height, width = (side // model.vae.stride for side in (model.height, model.width))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    length = model.text.max_position_embeddings
    ids = torch.empty((1, length), dtype=torch.long, device="meta")
    states, when = empty(1, length, model.text.hidden_size), empty(1)
    still = empty(1, model.vae.latent_channels, height, width)
    unet = parts.content
    time, text = unet.project_time(when), unet.project_text(states)
    forwards: dict[str, tuple[nn.Module, Callable[[], object]]] = {
        "text": (parts.text, lambda: parts.text(ids)),
        "content": (unet, lambda: unet(still, when, states)),
        "content_step": (unet, lambda: unet.denoise(still, time, *text)),
        "content_time": (unet, lambda: unet.project_time(when)),
        "content_text": (unet, lambda: unet.project_text(states)),
        "vae_decode": (parts.vae, lambda: parts.vae.decode(still)),
    }
    if parts.autoencoder is None or parts.motion is None or model.frames == 1:
        return forwards
    autoencoder, mover = parts.autoencoder, parts.motion
    clip = still.unsqueeze(2).expand(-1, -1, model.frames, -1, -1)
    rows, columns = (side // autoencoder.config.patch for side in (height, width))
    motion = empty(1, autoencoder.config.motion_channels, model.frames, columns + rows)
    given = None if mover.config.text_width is None else states
    place = partial(mover.place, *motion.shape[-2:], context=still, split=columns)
    modulations, ground = mover.modulations(when, text=given), place()
    return forwards | {
        "motion": (
            mover,
            lambda: mover(motion, when, text=given, context=still, split=columns),
        ),
        "motion_step": (mover, lambda: mover.denoise(motion, modulations, ground)),
        "motion_time": (mover, lambda: mover.modulations(when, text=given)),
        "motion_place": (mover, place),
        "frame_encode": (autoencoder, lambda: autoencoder.encode(clip)),
        "frame_decode": (autoencoder, lambda: autoencoder.decode(still, motion)),
    }


def count_sampling(
    model: ModelConfig, forwards: Forwards | None = None, *, batch: int = 1
) -> dict[str, Products]:
    """Each stage of `TextToVideo.sample_batch`, with the model's own steps and guidance."""
    each = count_forwards(model) if forwards is None else forwards
    content, motion = (1 if scale == 1 else 2 for scale in (model.guidance, model.motion_guidance))
    # the negative prompt and the timesteps are the same for all clips that are made together
    times = _times(model, batch)
    stages = {
        "text": each.text * (batch + times),
        "content": each.content_step * (batch * model.steps * content)
        + each.content_time * (times * model.steps)
        + each.content_text * (batch + times * (content - 1)),
    }
    if model.frames > 1:
        stages["motion"] = (
            each.motion_step * (batch * model.motion_steps * motion)
            + each.motion_time * ((batch + times * (motion - 1)) * model.motion_steps)
            + each.motion_place * batch
        )
        stages["frame decode"] = each.frame_decode * batch
    return stages | {"VAE decode": each.vae_decode * (batch * _pictures(model))}


@dataclass(frozen=True)
class Reads:
    """How often a stage runs its network, and what that takes of the weights."""

    forwards: int
    # of each forward
    weights: Weights
    # what all forwards share is made of: read beside, in numbers
    once: int = 0

    @property
    def read(self) -> int:
        """Numbers read by all of it."""
        return self.forwards * self.weights.read + self.once


def count_reads(
    model: ModelConfig, *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Reads]:
    """Each stage of `TextToVideo.sample_batch`: its forwards, and the weights of one.

    The clips of a batch, and the two branches of guidance, share a forward; of the VAE, the frames
    that are decoded together unless memory is short.
    """
    runs = _forwards(model, build_parts(model))
    times = _times(model, batch)
    together = choose_slices(Work(model, dtype, batch // times), torch.device("meta")).pictures
    # beside the content frame
    slices = ceil(batch // times * model.frames / together) if model.frames > 1 else 0
    forwards = {
        "text": ("text", 1),
        "content": ("content", model.steps),
        "motion": ("motion", model.motion_steps),
        "frame decode": ("frame_decode", 1),
        "VAE decode": ("vae_decode", 1 + slices),
    }
    # of the networks that run at each step: what is made for all steps, and how often
    shared = {
        "content": {"content_time": _projections(model.steps), "content_text": 1},
        "motion": {"motion_time": _projections(model.motion_steps), "motion_place": 1},
    }
    found = {}
    for stage, (name, count) in forwards.items():
        if name not in runs:
            continue
        weights = count_weights(*runs[name])
        if stage in shared:
            weights = replace(weights, read=count_weights(*runs[f"{name}_step"]).read)
        once = sum(
            count_weights(*runs[part]).read * often for part, often in shared.get(stage, {}).items()
        )
        found[stage] = Reads(times * count, weights, times * once)
    return found


def _times(model: ModelConfig, batch: int) -> int:
    # this sampler makes clips one at a time
    return batch if model.sampler == "ddpm" else 1


def _projections(steps: int) -> int:
    return ceil(steps / TIMESTEPS_TOGETHER)


def _pictures(model: ModelConfig) -> int:
    # the content frame is decoded too, and is all there is of a still
    return model.frames + 1 if model.frames > 1 else 1


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
