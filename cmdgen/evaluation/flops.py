"""How much a model computes and what it reads of its weights: counted on the meta device, no GPU.

Two accountings of arithmetic. The honest one: every matrix product and convolution, two operations
for each multiply-add. That of CMD's Tables 8 and 9 (Yu et al. 2024, arXiv:2403.14148), whose
counter took a multiply-add for one operation and did not see inside fused attention.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cmdgen.acceleration.memory import FusedAttention, LiveBytes, evaluate, peak_bytes
from cmdgen.acceleration.rehash import CutDiT, CutUNet
from cmdgen.compression.units import PRUNED
from cmdgen.config import CMD_SD21, CUTS, PRESETS, PUBLIC, EvdmConfig, ModelConfig, UNetConfig
from cmdgen.latents import latent_shapes
from cmdgen.models.temporal import MotionAdapter
from cmdgen.models.unet import UNet
from cmdgen.pipelines.base import TIMESTEPS_TOGETHER
from cmdgen.request import Plan, Request, resolve
from cmdgen.store.parts import build_part, network_configs
from cmdgen.weights import build_empty

# what the tables count in
TERA = 10**12

# Table 8: one forward of each model at 512x512, in 10^12 multiply-adds
TABLE_8 = {"autoencoder": 0.77, "content": 0.34, "motion": 0.14}
# Table 9: sampling one clip at 512x1024 in so many steps of both models
TABLE_9 = {50: 46.8, 100: 92.1}
# the forwards of each row of Table 8
_FORWARDS = {
    "autoencoder": ("frame encode", "frame decode"),
    "content": ("content step", "content time", "content text"),
    "motion": ("motion step", "motion time", "motion place"),
}


@dataclass(frozen=True)
class Count:
    """What a function computes, and what it reads of a network's weights.

    Multiply-adds are those of matrix products and convolutions. Attention's are the products of
    queries with keys and of weights with values, not projections.
    """

    multiply_adds: int
    attention: int
    # numbers of each weight and buffer by name, once; of a table that is looked up, the rows of one
    # sample
    reads: dict[str, int]

    @property
    def flops(self) -> int:
        """Return the honest count."""
        return 2 * self.multiply_adds

    @property
    def published(self) -> int:
        """Return the count of one that sees multiply-adds as one, fused attention as none."""
        return self.multiply_adds - self.attention


class _AttentionCounter(TorchFunctionMode):
    """Multiply-adds of attention, which it counts instead of computing: nothing on the meta device has values."""

    multiply_adds = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            self.multiply_adds += prod(q.shape[:-1]) * k.shape[-2] * (k.shape[-1] + v.shape[-1])
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    """Multiply-adds by torch's formulas, and which tensors of a network are read, how many numbers of each.

    torch's own counter would import its compiler, which takes seconds.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        state = network.state_dict(keep_vars=True)
        self.names = {id(tensor): name for name, tensor in state.items()}
        self.reads: dict[str, int] = {}
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = evaluate(func, args, kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        looked_up = func is torch.ops.aten.embedding.default
        for operand in tree_leaves((args, kwargs)):
            if (name := self.names.get(id(operand))) is not None:
                self.reads[name] = (result if looked_up else operand).numel()
        return result


def count(run: Callable[[], object], network: nn.Module | None = None) -> Count:
    """Count a function of tensors on the meta device."""
    with (
        # it would hand over whole what is made of other operators
        torch.inference_mode(False),
        torch.no_grad(),
        _AttentionCounter() as attention,
        _Counter(network or nn.Module()) as counter,
    ):
        run()
    return Count(counter.flops // 2 + attention.multiply_adds, attention.multiply_adds, counter.reads)


@dataclass(frozen=True)
class Forward:
    """A network, or a piece of one, and one run of it on one sample of the meta device."""

    network: nn.Module
    run: Callable[[], object]

    @cached_property
    def count(self) -> Count:
        """Count what it computes and reads."""
        return count(self.run, self.network)

    @cached_property
    def peak(self) -> int:
        """Count the bytes of tensors that it makes and holds at once, in float32."""
        with FusedAttention():
            return peak_bytes(self.run)


@dataclass(frozen=True)
class Use:
    """How often a stage runs a forward: on so many samples, in so many runs."""

    forward: Forward
    samples: int
    runs: int = 1
    # made once for all steps, beside the runs of the network
    shared: bool = False


@dataclass(frozen=True)
class Work:
    """What a stage, or all of them, has to do."""

    # of the half of a network that runs; of "load", of everything that is loaded
    parameters: int = 0
    weight_bytes: int = 0
    # of the whole network; beside them run what all steps share
    forwards: int = 0
    flops: int = 0
    # the weights, for each run; of "load", all weights; of "video encode", the frames
    bytes_read: int = 0


def build_networks(model: ModelConfig) -> dict[str, Any]:
    """Build the networks of a model on the meta device, by folder.

    Raises ValueError where the model makes no video from text.
    """
    configs = network_configs(model)
    if not {"unet", "vae"} <= configs.keys() or not {"text_encoder", "image_encoder"} & configs.keys():
        raise ValueError(f"{model.name} makes no video from text: it has no text, UNet or VAE")
    networks = {name: build_part(name, config) for name, config in configs.items()}
    if "motion_adapter" in networks:
        networks["unet"] = _attach(configs["unet"], networks.pop("motion_adapter"))
    return networks


@lru_cache(maxsize=2)
def _attach(config: UNetConfig, adapter: MotionAdapter) -> UNet:
    # not the one that others may have
    unet = build_empty(UNet, config)
    unet.attach(adapter)
    return unet


def list_forwards(model: ModelConfig, cut: int = 0, window: int | None = None) -> dict[str, Forward]:
    """Return the networks of a model, and their pieces, at its size and length.

    `cut` is as in `CutUNet`, `window` the frames that a UNet along time sees at once.

    Those that make content and motion run in pieces: what each step runs, in full or reusing
    features, and what is made beforehand. Raises ValueError as `build_networks`.
    """
    # one forward is the same whatever the sampler does
    model = replace(model, sampler="", steps=1, motion_steps=1, guidance_interval=None, fps=1)
    return _list_forwards(replace(model, guidance=1.0, motion_guidance=1.0), cut, window)


@lru_cache(maxsize=8)
@torch.no_grad()
def _list_forwards(model: ModelConfig, cut: int, window: int | None) -> dict[str, Forward]:
    with LiveBytes(), _AttentionCounter():
        return _prepare_forwards(model, cut, window)


def _prepare_forwards(model: ModelConfig, cut: int, window: int | None) -> dict[str, Forward]:
    empty = partial(torch.empty, device="meta")
    if isinstance(shape := model.content, EvdmConfig):
        evdm, clip = build_part("evdm", shape), empty(1, shape.channels, shape.frames, *model.size)
        block, context = clip.split((shape.current, shape.past + shape.future), dim=2)
        return {"evdm": Forward(evdm, lambda: evdm(block, empty(1), context))}
    networks = build_networks(model)
    unet, vae = networks["unet"], networks["vae"]
    still, time = empty(1, vae.config.latent_channels, *model.latent_size), empty(1)
    numbers: Tensor | None = None
    # a sample is a clip where the UNet looks along time
    clip_frames = model.frames if model.looks_along_time else 1
    frames = window or clip_frames
    rows = empty(frames, unet.config.in_channels, *model.latent_size)
    pictures = still.expand(clip_frames if model.decodes_clips else 1, -1, -1, -1)
    if model.vision is not None:
        vision = networks["image_encoder"]
        numbers = empty(1, 3)
        seen = empty(1, 3, model.vision.image_size, model.vision.image_size)
        photo = empty(1, 3, model.height, model.width)
        states = empty(1, 1, model.vision.projection_dim)
        forwards = {
            "image": Forward(vision, lambda: vision(seen)),
            "image encode": Forward(vae, lambda: vae.encode(photo)),
        }
    else:
        text = networks["text_encoder"]
        length = text.config.max_position_embeddings
        ids, states = empty(1, length, dtype=torch.long), empty(1, length, text.config.hidden_size)
        forwards = {"text": Forward(text, lambda: text(ids))}
    project_time = partial(unet.project_time, time, numbers)
    forwards |= {
        "content": Forward(unet, lambda: unet(rows, time, states, numbers)),
        "content time": Forward(unet, project_time),
        "content text": Forward(unet, lambda: unet.project_text(states)),
        **_steps("content", CutUNet(unet, cut), rows, project_time(), *unet.project_text(states)),
        "VAE decode": Forward(vae, lambda: vae.decode(pictures)),
    }
    if model.frames == 1 or not {"autoencoder", "motion"} <= networks.keys():
        return forwards
    autoencoder, dit = networks["autoencoder"], networks["motion"]
    clip = still.unsqueeze(2).expand(-1, -1, model.frames, -1, -1)
    motion = empty(1, *latent_shapes(model)[1])
    ground = {"context": still, "split": model.latent_size[1] // autoencoder.config.patch}
    condition = {"text": None if dit.config.text_width is None else states}
    modulate = partial(dit.modulations, time, **condition)
    place = partial(dit.place, *motion.shape[-2:], **ground)
    return forwards | {
        "motion": Forward(dit, lambda: dit(motion, time, **condition, **ground)),
        "motion time": Forward(dit, modulate),
        "motion place": Forward(dit, place),
        **_steps("motion", CutDiT(dit), motion, modulate(), place()),
        "frame encode": Forward(autoencoder, lambda: autoencoder.encode(clip)),
        "frame decode": Forward(autoencoder, lambda: autoencoder.decode(still, motion)),
    }


def _steps(part: str, network: Any, x: Tensor, *conditions: Tensor) -> dict[str, Forward]:
    """Return a step in full, and one that reuses the feature of another."""
    denoiser: Any = network.unet if isinstance(network, CutUNet) else network.dit
    _, feature = network.run(x, *conditions)
    return {
        f"{part} step": Forward(denoiser, lambda: denoiser.denoise(x, *conditions)),
        f"{part} skipped": Forward(denoiser, lambda: network.resume(feature, x, *conditions)),
    }


def list_uses(plan: Plan, *, batch: int = 1) -> dict[str, list[Use]]:
    """Return what each stage of `Pipeline.run` runs for a batch of clips.

    The clips of a batch, and the two branches of guidance, share a run; so do the pictures of one
    of the VAE's slices. The negative prompt and the timesteps are the same for all clips.
    """
    model, windows = plan.model, len(plan.windows)
    forwards = list_forwards(model, CUTS.index(plan.rehash_cut or CUTS[0]), plan.window)
    if model.vision is None:
        uses = {"text": [Use(forwards["text"], batch + 1)]}
    else:
        uses = {"image": [Use(forwards["image"], 1), Use(forwards["image encode"], batch, shared=True)]}
    denoisers = [("content", model.steps, max(model.guidance, model.guidance_first or 0))]
    if plan.samples_motion:
        denoisers.append(("motion", model.motion_steps, model.motion_guidance))
    for part, steps, guidance in denoisers:
        branches = 1 if guidance == 1 else 2
        texts = batch + branches - 1
        full = steps if plan.key_steps is None else len(getattr(plan.key_steps, part))
        # what all steps share: samples of the condition and of the timesteps
        condition, samples, times = {"content": ("text", texts, steps), "motion": ("place", batch, steps * texts)}[part]
        projections = ceil(steps / TIMESTEPS_TOGETHER)
        uses[part] = [
            Use(forwards[f"{part} step"], batch * branches * full * windows, full * windows),
            Use(forwards[f"{part} skipped"], batch * branches * (steps - full) * windows, (steps - full) * windows),
            Use(forwards[f"{part} {condition}"], samples, shared=True),
            Use(forwards[f"{part} time"], times, projections, shared=True),
        ]
    pictures, together = [batch], plan.slices.pictures
    if plan.samples_motion:
        uses["frame decode"] = [Use(forwards["frame decode"], batch)]
    if plan.moves and not model.decodes_clips:
        # after the content frames
        pictures.append(batch * model.frames)
    runs = sum(ceil(number / together) for number in pictures)
    return uses | {"VAE decode": [Use(forwards["VAE decode"], sum(pictures), runs)]}


def count_work(plan: Plan, dtype: torch.dtype, *, batch: int = 1) -> dict[str, Work]:
    """Count the work of each stage, from reading the weights to the encoded files."""
    model = plan.model
    stages = list_uses(plan, batch=batch)
    loaded = nn.ModuleDict(build_networks(model)).state_dict(keep_vars=True).values()
    weights = sum(tensor.numel() for tensor in loaded) * dtype.itemsize
    # a still is RGB; of a video, the planes of colour have half the height and width
    numbers = model.height * model.width * 3 // (2 if plan.moves else 1)
    return {
        "load": Work(_count_parameters(loaded), weights, bytes_read=weights),
        **{stage: _count_stage(uses, dtype) for stage, uses in stages.items()},
        "video encode": Work(bytes_read=batch * model.frames * numbers),
    }


def _count_stage(uses: list[Use], dtype: torch.dtype) -> Work:
    uses = [use for use in uses if use.runs]
    state: dict[str, Tensor] = {}
    for use in uses:
        state |= use.forward.network.state_dict(keep_vars=True)
    read = [state[name] for name in {name for use in uses for name in use.forward.count.reads}]
    return Work(
        parameters=_count_parameters(read),
        weight_bytes=sum(tensor.numel() for tensor in read) * dtype.itemsize,
        forwards=sum(use.runs for use in uses if not use.shared),
        flops=sum(use.samples * use.forward.count.flops for use in uses),
        bytes_read=sum(use.runs * sum(use.forward.count.reads.values()) for use in uses) * dtype.itemsize,
    )


def _count_parameters(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))


def compare_with_paper() -> dict[str, Any]:
    """Return Tables 8 and 9 beside our counts, and where 50 steps compute, all in 10^12.

    Table 8 is one forward of each model at 512x512, the autoencoder's there and back. Table 9 is,
    for each step, one forward of both models, unguided, then the autoencoder there and back, at
    512x1024; neither text encoder nor VAE. Ours beside them is what `cmdgen sample` computes: with
    guidance, text encoder and VAE, the autoencoder one way.
    """
    square, wide = (list_forwards(replace(CMD_SD21, height=512, width=width)) for width in (512, 1024))

    def add_up(forwards: dict[str, Forward], label: str) -> dict[str, float]:
        counts = [forwards[name].count for name in _FORWARDS[label]]
        ours, honest = sum(c.published for c in counts), sum(c.flops for c in counts)
        return {"ours": ours / TERA, "honest": honest / TERA}

    once, content, motion = (add_up(wide, label)["ours"] for label in TABLE_8)
    stages = {}
    for steps in TABLE_9:
        request = Request(size=(512, 1024), steps=steps, motion_steps=steps)
        work = count_work(resolve(request, CMD_SD21), torch.float32)
        stages[steps] = {name: stage.flops / TERA for name, stage in work.items() if stage.flops}
    return {
        "model": CMD_SD21.name,
        "table_8": [
            {"label": label, "published": published, **add_up(square, label)} for label, published in TABLE_8.items()
        ],
        "table_9": [
            {
                **{"label": f"{steps} steps", "published": published},
                **{"ours": once + steps * (content + motion)},
                "honest": sum(stages[steps].values()),
            }
            for steps, published in TABLE_9.items()
        ],
        "stages": stages[50],
    }


def count_pruned() -> list[dict[str, Any]]:
    """Return parameters and operations of UNets, whole and by VDMini's rule, with their motion modules."""
    rows = []
    for small in PRUNED.values():
        for model in ((PRESETS | PUBLIC)[small.name.removesuffix("-vdmini")], small):
            forward = list_forwards(model)["content"]
            row = {"model": model.name, "frames": model.frames if model.looks_along_time else 1}
            parameters = _count_parameters(forward.network.parameters())
            operations = forward.count.flops / 10**9
            rows.append(row | {"latents": model.latent_size, "parameters": parameters, "giga_operations": operations})
    return rows
