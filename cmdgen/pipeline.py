"""Text to video: the one place that composes text, content frame, motion latents and decoding."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cmdgen import __version__
from cmdgen.acceleration.calibration import Calibration, Measurement, Predict, choose_key_steps
from cmdgen.acceleration.compiled import Compiled, check_compiler
from cmdgen.acceleration.graphs import Graphed, GraphedNetwork, Out, fastest_libraries
from cmdgen.acceleration.keysteps import count_protected
from cmdgen.acceleration.memory import Work, choose_slices
from cmdgen.acceleration.overlap import Pending, start
from cmdgen.acceleration.rehash import CutDiT, CutUNet, Network, Rehash
from cmdgen.acceleration.slicer import (
    decode_clip,
    decode_pictures,
    encode_clip,
    encode_pictures,
    fetch,
)
from cmdgen.config import ModelConfig, NoiseConfig, SampleConfig, UNetConfig
from cmdgen.diffusion.guidance import guide
from cmdgen.diffusion.parametrisation import recognise_prediction
from cmdgen.diffusion.samplers import SAMPLERS, VISITED, OnStep
from cmdgen.diffusion.samplers import OnEstimate as OnLatent
from cmdgen.latents import Latents, check_fit, fit_model, latent_shapes
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.text import ClipTextModel
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.request import KeySteps, Request, Slices
from cmdgen.store.find import find_model
from cmdgen.store.parts import hash_weights, read_model
from cmdgen.video.formats import Pixels
from cmdgen.video.pixels import CONVERT, to_rgb24, to_unit

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# timesteps that are projected at once: all of them, but for bounds on the memory
TIMESTEPS_TOGETHER = 64

# stage, how much of it is done, of how much
OnProgress = Callable[[str, int, int], None]
# which clip, its next frames, in the pixels asked for: as soon as they are decoded
OnFrames = Callable[[int, np.ndarray], None]
# which clip, its content frame as a picture, uint8 (H, W, 3): before its frames
OnContent = Callable[[int, np.ndarray], None]
# a function that decodes the content frame that sampling is heading for, uint8 (H, W, 3)
OnEstimate = Callable[[Callable[[], np.ndarray]], None]
# stage to what is entered around it: a clock, a name in a trace
OnStage = Callable[[str], AbstractContextManager[object]]


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Clip:
    """A video and what made it."""

    frames: np.ndarray  # uint8: (T, H, W, 3) of rgb24, planes (T, 3 * H // 2, W) of yuv420p
    pixels: Pixels
    content: np.ndarray  # (H, W, 3) uint8: the content frame as a picture
    fps: int
    metadata: dict[str, Any]
    # of a still: none
    latents: Latents | None


@dataclass(frozen=True)
class Given:
    """What of clips is not to be sampled: the same content frame or motion for all of them.

    `origin` goes into their metadata: where it came from.
    """

    content: Tensor | None = None  # (C, h, w), as in Latents
    motion: Tensor | None = None  # (K, T, W' + H')
    origin: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """The networks of one model, on its device."""

    text: ClipTextModel
    content: UNet
    vae: KlVae
    # of a model that makes stills: none
    autoencoder: CmdAutoencoder | None
    motion: DiT | None


class TextToVideo:
    """A model folder, ready to sample; its weights are read when first needed."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compile: bool = False,
    ) -> None:
        self.folder = folder
        self.config = config
        self.device = device
        self.dtype = dtype
        self.uses_compiler = compile
        # where it takes longer to launch kernels than to run them
        self.uses_graphs = device.type == "cuda"
        # what was compiled and captured, and the memory of the latter
        self.prepared: dict[object, Callable[..., Any]] = {}
        self.pool = cache(torch.cuda.graph_pool_handle)
        self._hash: str | None = None
        self._hashing = Lock()
        # searching for the steps of a plan takes time
        self.plans: dict[SampleConfig, KeySteps | None] = {}

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] = "mini",
        *,
        device: str = "auto",
        dtype: str = "auto",
        compile: bool = False,
    ) -> Self:
        """A packaged model's name or a folder; "auto" is a GPU if there is one, bfloat16 on it.

        Reads configurations only. With `compile` the UNet and the motion model go through torch's
        compiler, which takes minutes for the first clip of a size. Raises ValueError, saying what
        is possible.
        """
        folder = find_model(os.fspath(model))
        config = read_model(folder)
        if config.text is None or config.vae is None or not isinstance(config.content, UNetConfig):
            raise ValueError(f"{folder} makes no video from text: it needs text_encoder, unet, vae")
        place = choose_device(device)
        number = choose_dtype(dtype, place)
        if compile:
            check_compiler(place)
        return cls(folder, config, place, number, compile=compile)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Prompts to token ids."""
        return Tokenizer.from_pretrained(self.folder / "tokenizer")

    @cached_property
    def vae(self) -> KlVae:
        """The VAE; reading it raises ValueError, naming the file that is wrong."""
        return KlVae.from_pretrained(self.folder / "vae", dtype=self.dtype, device=self.device)

    @cached_property
    def autoencoder(self) -> CmdAutoencoder:
        """The autoencoder of a model that has one; raises as `vae` does."""
        return CmdAutoencoder.from_pretrained(
            self.folder / "autoencoder", dtype=self.dtype, device=self.device
        )

    @cached_property
    def parts(self) -> Parts:
        """The networks; reading them raises ValueError, naming the file that is wrong."""
        folder, moves = self.folder, self.config.motion is not None
        on: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        parts = Parts(
            text=ClipTextModel.from_pretrained(folder / "text_encoder", **on),
            content=UNet.from_pretrained(folder / "unet", **on),
            vae=self.vae,
            autoencoder=self.autoencoder if moves else None,
            motion=DiT.from_pretrained(folder / "motion", **on) if moves else None,
        )
        self._check_prediction(parts)
        return parts

    @torch.inference_mode()
    def _check_prediction(self, parts: Parts) -> None:
        """ValueError where the UNet predicts something else than the schedule says."""
        said = self.config.noise.prediction_type
        ids = self.tokenizer([""], parts.text.config.max_position_embeddings).to(self.device)
        text = parts.text(ids).last_hidden_state

        def predict(x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = parts.content(x.to(self.dtype), t, text.expand(len(x), -1, -1))
            return output

        # a few positions do: what is told apart is noise
        side = 2 ** len(parts.content.config.block_out_channels)
        noise, _ = self._noise("check", (parts.content.config.in_channels, side, side), [0])
        predicts = recognise_prediction(predict, noise, self.config.noise)
        if predicts not in (said, None):
            path = self.folder / "scheduler" / "scheduler_config.json"
            raise ValueError(
                f"{path}: prediction_type is {said}, but unet/ predicts {predicts}: correct it"
            )

    @property
    def weights_hash(self) -> str:
        """Tells these weights from others, wherever they lie; a thread may ask for it early."""
        with self._hashing:
            if self._hash is None:
                self._hash = hash_weights(self.folder)
        return self._hash

    def fits(self, prompt: str) -> bool:
        """Whether the text encoder reads the prompt to its end."""
        length = self._length()
        ids = self.tokenizer([prompt], length + 1)
        # a longer text has a token of its own where one that fits has ended
        return int(ids[0, length - 1]) in (self.tokenizer.eos_id, self.tokenizer.pad_id)

    def sample(
        self,
        prompt: str,
        config: SampleConfig,
        *,
        pixels: Pixels = "rgb24",
        on_progress: OnProgress | None = None,
        on_content: OnContent | None = None,
        on_frames: OnFrames | None = None,
        given: Given | None = None,
    ) -> Clip:
        """One clip. Raises ValueError where this model cannot do what `config` asks."""
        return self.sample_batch(
            *([prompt], config, [config.seed]),
            pixels=pixels,
            on_progress=on_progress,
            on_content=on_content,
            on_frames=on_frames,
            given=given,
        )[0]

    @torch.inference_mode()
    def sample_batch(
        self,
        prompts: Sequence[str],
        config: SampleConfig,
        seeds: Sequence[int],
        *,
        pixels: Pixels = "rgb24",
        on_progress: OnProgress | None = None,
        on_content: OnContent | None = None,
        on_frames: OnFrames | None = None,
        on_estimate: OnEstimate | None = None,
        on_stage: OnStage = nullcontext,
        given: Given | None = None,
    ) -> list[Clip]:
        """A clip for each prompt and seed, as it would be alone; `config.seed` is not used.

        `config.content_seed` and `config.motion_seed`, where given, hold for all. A clip of one
        frame is a still: the content frame, without motion. What is `given` is kept, and only the
        rest is sampled; ValueError where it is not of the size and length asked for. `pixels` is
        what frames are made in; the content frame's picture is always RGB. After each step towards
        the first clip's, `on_estimate` may look at it.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds")
        if pixels not in CONVERT:
            raise ValueError(f"pixels {pixels!r} is not one of {', '.join(CONVERT)}")
        asked, plan = config.apply(self.config), self.plan_rehash(config)
        if given is None:
            given = Given()
        else:
            halves = (given.content, given.motion)
            check_fit(asked, *(None if half is None else tuple(half.shape) for half in halves))
        report = on_progress or (lambda stage, done, total: None)
        show_content, show = on_content or _ignore, on_frames or _ignore
        slices = self.plan_decoding(config, batch=len(prompts))
        pairs = [_seeds(config, seed) for seed in seeds]
        content_seeds, motion_seeds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

        report("load", 0, 1)
        with on_stage("load"):
            _ = self.parts, self.tokenizer
        report("load", 1, 1)
        with fastest_libraries(self.device):
            with on_stage("text"):
                text, empty = self._encode(prompts, config.negative)
            with on_stage("content"):
                if given.content is None:
                    look = None if on_estimate is None else self._estimator(on_estimate, slices)
                    content = self._sample_content(
                        asked, text, empty, content_seeds, plan, report, look
                    )
                else:
                    content = self._repeat(given.content, len(prompts))
            with on_stage("VAE decode"):
                # who is short of memory gets one thing after another; beside a still is nothing
                moves = asked.frames > 1
                stream = self.aside if moves and config.max_memory is None else None
                still = content.to(self.dtype)
                picture = self._decode_content(still, slices, show_content, stream)

            def report_motion(stage: str, done: int, total: int) -> None:
                report(stage, done, total)
                picture.poll()

            motion = None
            if asked.frames > 1:
                with on_stage("motion"):
                    if given.motion is None:
                        motion = self._sample_motion(
                            asked, text, empty, content, motion_seeds, plan, report_motion
                        )
                        motion = self.autoencoder.destandardise(motion)
                    else:
                        motion = self._repeat(given.motion, len(prompts))
            frames = self._decode_frames(
                *(picture, still, motion, slices, pixels, report, show, on_stage)
            )
        pictures = picture.finish()
        # of what a GPU made, when it has made all of it
        contents, motions = content.cpu(), None if motion is None else motion.cpu()
        clips = []
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            about = self._describe(prompt, config, seed, plan, given)
            latents = (
                None if motions is None else Latents(contents[i], motions[i], asked.fps, about)
            )
            clips.append(Clip(frames[i], pixels, pictures[i].numpy(), asked.fps, about, latents))
        return clips

    @torch.inference_mode()
    def encode(
        self,
        frames: np.ndarray,
        fps: int,
        *,
        origin: Mapping[str, object] | None = None,
        max_memory: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> Latents:
        """uint8 (T, H, W, 3) -> the clip's content frame and motion latents; nothing is drawn.

        `origin` goes into the metadata: where it came from. Raises ValueError where the model has
        no autoencoder, or makes no clips of this size and length.
        """
        count, height, width = frames.shape[:3]
        asked = SampleConfig(
            frames=count, height=height, width=width, fps=fps, max_memory=max_memory
        )
        model = asked.apply(self.config)
        fit_model(model, *latent_shapes(model))
        slices = self.plan_encoding(asked)
        report = on_progress or _ignore
        report("load", 0, 1)
        autoencoder, _ = self.autoencoder, self.vae
        report("load", 1, 1)
        with fastest_libraries(self.device):
            parts = []
            for done in range(0, count, slices.pictures):
                some = frames[done : done + slices.pictures]
                parts.append(self._to_latents(some, slices.strips))
                report("encode", done + len(some), count)
            latents = rearrange(torch.cat(parts), "t c h w -> 1 c t h w")
            content, motion = encode_clip(autoencoder, latents, slices)
        return Latents(
            self._finite(content, "autoencoder")[0].float().cpu(),
            self._finite(motion, "autoencoder")[0].float().cpu(),
            fps,
            {
                **{"cmdgen": __version__, "model": self.config.name},
                "weights": self.weights_hash,
                **{"frames": count, "height": height, "width": width, "fps": fps},
                **{"dtype": self._dtype_name, "device": self.device.type},
                **(origin or {}),
            },
        )

    @torch.inference_mode()
    def encode_still(self, picture: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) -> (C, h, w) on the CPU: the content frame of a clip that shows it."""
        with fastest_libraries(self.device):
            latents = self._to_latents(picture[None])
        return self._finite(latents, "vae")[0].float().cpu()

    @torch.inference_mode()
    def decode_still(self, content: Tensor) -> np.ndarray:
        """(C, h, w) -> uint8 (H, W, 3): a content frame as a picture."""
        height, width = (side * self.vae.config.stride for side in content.shape[1:])
        slices = self.plan_decoding(SampleConfig(frames=1, height=height, width=width))
        with fastest_libraries(self.device):
            still = self._repeat(content, 1).to(self.dtype)
            return self._decode_content(still, slices, _ignore, None).finish()[0].numpy()

    @torch.inference_mode()
    def decode(
        self,
        latents: Latents,
        *,
        pixels: Pixels = "rgb24",
        max_memory: int | None = None,
        on_progress: OnProgress | None = None,
        on_content: OnContent | None = None,
        on_frames: OnFrames | None = None,
    ) -> Clip:
        """The clip of these latents, with their metadata; ValueError where they are not its."""
        shapes = tuple(latents.content.shape), tuple(latents.motion.shape)
        model = fit_model(self.config, *shapes)
        slices = choose_slices(Work(model, self.dtype), self.device, max_memory)
        report = on_progress or _ignore
        report("load", 0, 1)
        _ = self.autoencoder, self.vae
        report("load", 1, 1)
        with fastest_libraries(self.device):
            still = self._repeat(latents.content, 1).to(self.dtype)
            picture = self._decode_content(still, slices, on_content or _ignore, None)
            frames = self._decode_frames(
                *(picture, still, self._repeat(latents.motion, 1), slices, pixels),
                *(report, on_frames or _ignore, nullcontext),
            )
        content = picture.finish()[0].numpy()
        return Clip(frames[0], pixels, content, latents.fps, latents.metadata, latents)

    def _repeat(self, half: Tensor, count: int) -> Tensor:
        """(...) -> (B, ...) float32 on the device."""
        return half.to(self.device, torch.float32).expand(count, *half.shape)

    def _decode_frames(
        self,
        picture: Pending,
        still: Tensor,
        motion: Tensor | None,
        slices: Slices,
        pixels: Pixels,
        report: OnProgress,
        show: OnFrames,
        on_stage: OnStage,
    ) -> np.ndarray:
        """(B, C, h, w), (B, K, T, W' + H') -> uint8 (B, T, ...) in `pixels`.

        Without motion that is the content frame, whose picture is there or on its way.
        """
        if motion is None:
            with on_stage("VAE decode"):
                levels = rearrange(picture.finish(), "b h w c -> b c h w")
                frames: np.ndarray = CONVERT[pixels](to_unit(levels))[:, None].numpy()
            for i, frame in enumerate(frames):
                show(i, frame)
            return frames
        with on_stage("frame decode"):
            latents = decode_clip(self.autoencoder, still, motion.to(self.dtype), slices)
            self._finite(latents, "autoencoder")
        with on_stage("VAE decode"):
            picture.finish()
            return self._decode(latents, slices, pixels, report, show)

    def describe(
        self, prompt: str, config: SampleConfig, *, given: Given | None = None
    ) -> dict[str, Any]:
        """The metadata of the clip that `sample` would make; reads no weights."""
        plan = self.plan_rehash(config)
        return self._describe(prompt, config, config.seed, plan, given or Given())

    def _describe(
        self, prompt: str, config: SampleConfig, seed: int, plan: KeySteps | None, given: Given
    ) -> dict[str, Any]:
        asked = config.apply(self.config)
        recorded = asdict(asked)
        draws_content, draws_motion = given.content is None, given.motion is None
        draws_motion &= asked.frames > 1
        unused = [] if draws_content else ["steps", "guidance"]
        unused += [] if draws_motion else ["motion_steps", "motion_guidance"]
        unused += [] if asked.guidance_interval else ["guidance_interval"]
        for name in ("text", "content", "vae", "autoencoder", "motion", "noise", "name", *unused):
            del recorded[name]
        recorded |= {"dtype": self._dtype_name, "device": self.device.type}
        if self.uses_compiler:
            # it rounds otherwise
            recorded["compile"] = True
        if plan is not None:
            steps = {
                "content": plan.content if draws_content else (),
                "motion": plan.motion if draws_motion else (),
                "threshold": plan.threshold,
            }
            kept = {name: value for name, value in steps.items() if value not in ((), None)}
            recorded["rehash"] = {"policy": plan.policy, **kept}
        # rounding alone depends on it
        if config.max_memory is not None:
            recorded["max_memory"] = config.max_memory
        content_seed, motion_seed = _seeds(config, seed)
        return {
            **{"cmdgen": __version__, "model": asked.name, "weights": self.weights_hash},
            **{"prompt": prompt, "negative": config.negative, "seed": seed},
            **({"content_seed": content_seed} if draws_content else {}),
            **({"motion_seed": motion_seed} if draws_motion else {}),
            **recorded,
            **given.origin,
        }

    def plan_decoding(self, config: SampleConfig, *, batch: int = 1) -> Slices:
        """How `config.max_memory` cuts the decoding of a batch of clips; reads no weights.

        Raises ValueError, saying how much memory would do, where that is too little.
        """
        work = Work(config.apply(self.config), self.dtype, batch)
        return choose_slices(work, self.device, config.max_memory)

    def plan_encoding(self, config: SampleConfig, *, batch: int = 1) -> Slices:
        """`plan_decoding`, of frames to latents by the VAE, these to content and motion."""
        work = Work(config.apply(self.config), self.dtype, batch, "encode")
        return choose_slices(work, self.device, config.max_memory)

    def plan_rehash(self, config: SampleConfig) -> KeySteps | None:
        """The steps that run in full where `config` asks for step rehash; reads no weights.

        Raises ValueError where this model cannot do what is asked.
        """
        # the same for all seeds
        config = replace(config, seed=0, content_seed=None, motion_seed=None)
        if config not in self.plans:
            request = Request(
                rehash=config.rehash if config.rehash_steps is None else config.rehash_steps,
                **{
                    name: getattr(config, name)
                    for name in ("rehash_policy", "rehash_threshold", "rehash_protect")
                },
                rehash_file=None if config.rehash_file is None else Path(config.rehash_file),
            )
            model = config.apply(self.config)
            self.plans[config] = choose_key_steps(request, model, self.folder)
        return self.plans[config]

    @torch.inference_mode()
    def calibrate(
        self,
        prompts: Sequence[str],
        config: SampleConfig,
        *,
        batch: int = 8,
        on_progress: OnProgress | None = None,
    ) -> list[Calibration]:
        """Measure what step rehash of `config`'s sampler and steps would change, for each network.

        Prompts have the seeds 0, 1, ...; those of `config` are not used. Where P of the K steps are
        protected, each network runs about (K - P)^3 / 6 times for each prompt.
        """
        asked = config.apply(self.config)
        moves = asked.frames > 1
        steps = {"content": asked.steps} | ({"motion": asked.motion_steps} if moves else {})
        for part, count in steps.items():
            if count < 2:
                raise ValueError(f"{part} in {count} step has nothing to reuse: ask for 2 or more")
        if not prompts:
            raise ValueError("no prompts to calibrate on")
        sums = {
            part: Measurement(count, count_protected(part, count, config.rehash_protect))
            for part, count in steps.items()
        }
        batches = range(0, len(prompts), batch)
        totals = {part: len(batches) * each.runs for part, each in sums.items()}
        done = dict.fromkeys(totals, 0)

        def count_run(part: str) -> None:
            done[part] += 1
            if on_progress is not None:
                on_progress(part, done[part], totals[part])

        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            for start in batches:
                some = prompts[start : start + batch]
                seeds = list(range(start, start + len(some)))
                text, empty = self._encode(some, config.negative)
                content = sums["content"].add(
                    CutUNet(self.parts.content),
                    partial(self._run_content, asked, text, empty, seeds),
                    partial(count_run, "content"),
                )
                if moves:
                    assert self.parts.motion is not None
                    sums["motion"].add(
                        CutDiT(self.parts.motion),
                        partial(self._run_motion, asked, text, empty, content, seeds),
                        partial(count_run, "motion"),
                    )
        return [each.finish(part, asked.sampler, len(prompts)) for part, each in sums.items()]

    def _encode(self, prompts: Sequence[str], negative: str) -> tuple[Tensor, Tensor]:
        """B prompts -> (B, L, D), and (1, L, D) of the negative prompt."""
        ids = self.tokenizer([*prompts, negative], self._length())
        states = self.parts.text(ids.to(self.device)).last_hidden_state
        return states[:-1], states[-1:]

    def _length(self) -> int:
        assert self.config.text is not None
        return self.config.text.max_position_embeddings

    def _sample_content(
        self,
        asked: ModelConfig,
        text: Tensor,
        empty: Tensor,
        seeds: list[int],
        plan: KeySteps | None,
        report: OnProgress,
        look: OnLatent | None = None,
    ) -> Tensor:
        """(B, L, D), (1, L, D) -> (B, C, h, w): the content frame, a scaled latent, in float32."""
        unet = self.parts.content
        predict: Predict = self._graphed("content", unet.denoise)
        if plan is not None:
            predict = Rehash(self._graphed_network(CutUNet(unet)), plan.content)
        on_step = partial(report, "content")
        return self._run_content(asked, text, empty, seeds, predict, on_step, look)

    def _estimator(self, on_estimate: OnEstimate, slices: Slices) -> OnLatent:
        def look(content: Tensor) -> None:
            latent = content[:1].to(self.dtype)
            on_estimate(lambda: to_rgb24(self._to_pixels(latent, slices))[0].cpu().numpy())

        return look

    def _run_content(
        self,
        asked: ModelConfig,
        text: Tensor,
        empty: Tensor,
        seeds: list[int],
        denoise: Predict,
        on_step: OnStep | None = None,
        look: OnLatent | None = None,
    ) -> Tensor:
        """(B, L, D), (1, L, D) -> (B, C, h, w), by what has the arguments of `UNet.denoise`."""
        unet, count = self.parts.content, len(text)
        vae = self.parts.vae.config
        shape = (vae.latent_channels, asked.height // vae.stride, asked.width // vae.stride)

        # of the batch's texts and, where it is guided, of the one negative prompt
        states = text if asked.guidance == 1 else torch.cat((text, empty))
        projected = unet.project_text(states)
        positive = tuple(each[:count] for each in projected)
        negative = tuple(each[-1:].expand(count, -1, -1, -1) for each in projected)
        times = self._project(unet.project_time, asked.sampler, asked.noise, asked.steps)

        def predict(x: Tensor, t: Tensor, *text: Tensor) -> Tensor:
            # in the same order of memory at every step: a graph's inputs are then one copy
            x = x.to(self.dtype, memory_format=torch.channels_last)
            return denoise(x, next(times).repeat(len(x), 1), *text)

        interval = _interval(asked, asked.noise)
        noise, generators = self._noise("content", shape, seeds)
        content = SAMPLERS[asked.sampler](
            guide(predict, asked.guidance, positive, negative, interval=interval),
            noise,
            asked.noise,
            steps=asked.steps,
            generators=generators,
            on_step=on_step,
            on_estimate=look,
        )
        return self._finite(content, "unet")

    def _sample_motion(
        self,
        asked: ModelConfig,
        text: Tensor,
        empty: Tensor,
        content: Tensor,
        seeds: list[int],
        plan: KeySteps | None,
        report: OnProgress,
    ) -> Tensor:
        """(B, L, D), (1, L, D), (B, C, h, w) -> (B, K, T, W' + H'): standardised, in float32."""
        motion = self.parts.motion
        assert motion is not None
        predict: Predict = self._graphed("motion", motion.denoise)
        if plan is not None:
            predict = Rehash(self._graphed_network(CutDiT(motion)), plan.motion)
        on_step = partial(report, "motion")
        return self._run_motion(asked, text, empty, content, seeds, predict, on_step)

    def _run_motion(
        self,
        asked: ModelConfig,
        text: Tensor,
        empty: Tensor,
        content: Tensor,
        seeds: list[int],
        denoise: Predict,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """(B, L, D), (1, L, D), (B, C, h, w) -> (B, K, T, W' + H').

        By what has the arguments of `DiT.denoise`.
        """
        motion, count = self.parts.motion, len(text)
        assert asked.autoencoder is not None and asked.motion is not None and motion is not None
        columns = content.shape[-1] // asked.autoencoder.patch
        rows = content.shape[-2] // asked.autoencoder.patch
        shape = (asked.autoencoder.motion_channels, asked.frames, columns + rows)
        # of the batch's texts and, where it is guided, of the one negative prompt
        states = text if asked.motion_guidance == 1 else torch.cat((text, empty))
        # all that is taken of a text is the mean of its tokens
        pooled = states.mean(dim=1, keepdim=True)  # (texts, 1, D)

        def modulate(timesteps: Tensor) -> Tensor:
            """(S,) -> (S, texts, P)."""
            given = None
            if motion.config.text_width is not None:
                given = pooled.repeat(len(timesteps), 1, 1)
            rows = motion.modulations(timesteps.repeat_interleave(len(pooled)), text=given)
            return rows.unflatten(0, (-1, len(pooled)))

        modulations = self._project(modulate, asked.sampler, asked.motion.noise, asked.motion_steps)

        def predict(x: Tensor, t: Tensor, which: Tensor, ground: Tensor) -> Tensor:
            return denoise(x.to(self.dtype), next(modulations)[which], ground)

        ground = motion.place(*shape[1:], context=content.to(self.dtype), split=columns)
        # guidance is on the text alone: both branches see the content frame
        own = torch.arange(count, device=self.device)
        positive, negative = (own, ground), (torch.full_like(own, len(pooled) - 1), ground)
        interval = _interval(asked, asked.motion.noise)
        noise, generators = self._noise("motion", shape, seeds)
        sampled = SAMPLERS[asked.sampler](
            guide(predict, asked.motion_guidance, positive, negative, interval=interval),
            noise,
            asked.motion.noise,
            steps=asked.motion_steps,
            generators=generators,
            on_step=on_step,
        )
        return self._finite(sampled, "motion")

    def _project(
        self,
        project: Callable[[Tensor], Tensor],
        sampler: str,
        noise: NoiseConfig,
        steps: int,
    ) -> Iterator[Tensor]:
        """(S,) -> (S, ...) of all timesteps of a sampler, then one's (...) after the other.

        The weights that a network has for timesteps are read once for a clip, not at each step. A
        sampler calls a network once for each timestep: nothing is looked up, on no device.
        """
        visited = VISITED[sampler](noise, steps).to(self.device)
        for some in visited.split(TIMESTEPS_TOGETHER):
            yield from project(some)

    def _finite(self, sample: Tensor, part: str) -> Tensor:
        """(B, C, ...) -> the same; ValueError, naming the part, where it is not all numbers."""
        if not sample.isfinite().all():
            raise ValueError(
                f"{self.folder / part} overflows in {self._dtype_name}: its weights are damaged"
                f"{'' if self.dtype == torch.float32 else ' or need float32'}"
            )
        return sample

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _graphed(self, key: object, function: Callable[..., Out]) -> Callable[..., Out]:
        """A function compiled, where asked for, and as graphs, where they pay; else itself.

        Those of former clips serve again.
        """
        if not (self.uses_compiler or self.uses_graphs):
            return function
        if key not in self.prepared:
            if self.uses_compiler:
                function = Compiled(function)
            # the first calls, before a capture, compile
            self.prepared[key] = Graphed(function, self.pool) if self.uses_graphs else function
        return self.prepared[key]

    def _graphed_network(self, network: CutUNet | CutDiT) -> Network:
        return GraphedNetwork(
            run=self._graphed((network, "run"), network.run),
            resume=self._graphed((network, "resume"), network.resume),
        )

    def _noise(
        self, part: str, shape: tuple[int, ...], seeds: list[int]
    ) -> tuple[Tensor, list[torch.Generator]]:
        """() -> (B, *shape) float32, each from its seed's generator, and these generators."""
        generators = [seeded(part, seed) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=each) for each in generators])
        return noise.to(self.device), generators

    @cached_property
    def aside(self) -> torch.cuda.Stream | None:
        """For what a GPU does beside something smaller; one, as libraries keep memory for each."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _decode_content(
        self,
        content: Tensor,
        slices: Slices,
        on_content: OnContent,
        stream: torch.cuda.Stream | None,
    ) -> Pending:
        """(B, C, h, w) -> uint8 (B, H, W, 3), beside what follows if there is a stream for it."""

        def decode(content: Tensor) -> Tensor:
            sums: list[Tensor] = []
            parts = content.split(slices.pictures)
            made = torch.cat([to_rgb24(self._to_pixels(part, slices, sums)) for part in parts])
            if stream is None:
                # beside other work nothing may wait: of that, the frames tell
                self._finite(torch.stack(sums), "vae")
            return made

        def show(pictures: Tensor) -> None:
            for i, picture in enumerate(pictures.numpy()):
                on_content(i, picture)

        return start(decode, content, show, stream=stream)

    def _decode(
        self,
        latents: Tensor,
        slices: Slices,
        pixels: Pixels,
        report: OnProgress,
        on_frames: OnFrames,
    ) -> np.ndarray:
        """(B, C, T, h, w) -> uint8 (B, T, ...) in `pixels`, the first frames of all clips first."""
        batch, _, count = latents.shape[:3]
        frames: np.ndarray | None = None
        parts = rearrange(latents, "b c t h w -> (t b) c h w").split(slices.pictures)
        pictures = done = 0
        sums: list[Tensor] = []
        for part in fetch(CONVERT[pixels](self._to_pixels(part, slices, sums)) for part in parts):
            if frames is None:
                frames = np.empty((batch, count, *part.shape[1:]), np.uint8)
            for picture in part.numpy():
                frames[pictures % batch, pictures // batch] = picture
                pictures += 1
            ready, done = slice(done, pictures // batch), pictures // batch
            if ready.start < done:
                for i in range(batch):
                    on_frames(i, frames[i, ready])
                report("decode", done, count)
        assert frames is not None
        # once, at the end: a GPU waits for nobody
        self._finite(torch.stack(sums), "vae")
        return frames

    def _to_pixels(
        self, latents: Tensor, slices: Slices, sums: list[Tensor] | None = None
    ) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W), in [-1, 1] but for overshoot.

        Their sum, which tells whether all are numbers, is left on the device, in `sums`.
        """
        pixels = decode_pictures(self.vae, latents, slices.strips)
        if sums is not None:
            sums.append(pixels.sum(dtype=torch.float32))
        return pixels

    def _to_latents(self, frames: np.ndarray, strips: int = 1) -> Tensor:
        """uint8 (N, H, W, 3) -> (N, C, h, w) scaled, the posterior's mean."""
        # copied: the frames of others may be read-only, or no array of their own
        pixels = torch.tensor(frames, device=self.device)
        unit = to_unit(rearrange(pixels, "n h w c -> n c h w"))
        return encode_pictures(self.vae, unit.to(self.dtype), strips)


def _seeds(config: SampleConfig, seed: int) -> tuple[int, int]:
    """The seeds of content and motion of a clip whose own is `seed`."""
    return (
        seed if config.content_seed is None else config.content_seed,
        seed if config.motion_seed is None else config.motion_seed,
    )


def _interval(asked: ModelConfig, noise: NoiseConfig) -> tuple[float, float] | None:
    """Where guidance is on, in timesteps."""
    if asked.guidance_interval is None:
        return None
    low, high = (share * noise.num_train_timesteps for share in asked.guidance_interval)
    return low, high


def seeded(part: str, seed: int) -> torch.Generator:
    """A CPU generator for one part of one video.

    torch keeps 32 bits of a seed: all of ours is hashed into them.
    """
    digest = hashlib.blake2b(f"{part}/{seed}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def choose_device(name: str) -> torch.device:
    """The device of a name, "auto" a GPU if there is one; ValueError names those there are."""
    possible = ["cpu"]
    if torch.cuda.is_available():
        possible += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device("cuda" if "cuda" in possible else "cpu")
    if name not in possible:
        raise ValueError(f"device {name!r} is not one of auto, {', '.join(possible)}")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name, "auto" the fastest that is safe; ValueError names those there are."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]
