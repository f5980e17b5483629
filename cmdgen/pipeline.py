"""Text to video: the one place that composes text, content frame, motion latents and decoding."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cmdgen import __version__
from cmdgen.config import ModelConfig, SampleConfig, UNetConfig
from cmdgen.diffusion.guidance import guide
from cmdgen.diffusion.parametrisation import recognise_prediction
from cmdgen.diffusion.samplers import SAMPLERS
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.text import ClipTextModel, Tokenizer
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.weights import read_model, resolve_model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# stage, how much of it is done, of how much
OnProgress = Callable[[str, int, int], None]
# stage to what is entered around it: a clock, a name in a trace
OnStage = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Clip:
    """A video and what made it."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    content: np.ndarray  # (H, W, 3) uint8: the content frame as a picture
    fps: int
    metadata: dict[str, Any]


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
        self, folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.folder = folder
        self.config = config
        self.device = device
        self.dtype = dtype

    @classmethod
    def load(
        cls, model: str | os.PathLike[str] = "mini", *, device: str = "auto", dtype: str = "auto"
    ) -> Self:
        """A packaged model's name or a folder; "auto" is a GPU if there is one, bfloat16 on it.

        Reads configurations only. Raises ValueError, saying what is possible.
        """
        folder = resolve_model(model)
        config = read_model(folder)
        if config.text is None or config.vae is None or not isinstance(config.content, UNetConfig):
            raise ValueError(f"{folder} makes no video from text: it needs text_encoder, unet, vae")
        place = choose_device(device)
        if dtype == "auto":
            dtype = "float32" if place.type == "cpu" else "bfloat16"
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return cls(folder, config, place, DTYPES[dtype])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Prompts to token ids."""
        return Tokenizer.from_pretrained(self.folder / "tokenizer")

    @cached_property
    def parts(self) -> Parts:
        """The networks; reading them raises ValueError, naming the file that is wrong."""
        folder, moves = self.folder, self.config.motion is not None
        on: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        parts = Parts(
            text=ClipTextModel.from_pretrained(folder / "text_encoder", **on),
            content=UNet.from_pretrained(folder / "unet", **on),
            vae=KlVae.from_pretrained(folder / "vae", **on),
            autoencoder=(
                CmdAutoencoder.from_pretrained(folder / "autoencoder", **on) if moves else None
            ),
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

    def fits(self, prompt: str) -> bool:
        """Whether the text encoder reads the prompt to its end."""
        length = self._length()
        ids = self.tokenizer([prompt], length + 1)
        # a longer text has a token of its own where one that fits has ended
        return int(ids[0, length - 1]) in (self.tokenizer.eos_id, self.tokenizer.pad_id)

    def sample(
        self, prompt: str, config: SampleConfig, *, on_progress: OnProgress | None = None
    ) -> Clip:
        """One clip. Raises ValueError where this model cannot do what `config` asks."""
        return self.sample_batch([prompt], config, [config.seed], on_progress=on_progress)[0]

    @torch.inference_mode()
    def sample_batch(
        self,
        prompts: Sequence[str],
        config: SampleConfig,
        seeds: Sequence[int],
        *,
        on_progress: OnProgress | None = None,
        on_stage: OnStage = nullcontext,
    ) -> list[Clip]:
        """A clip for each prompt and seed, as it would be alone; `config.seed` is not used.

        `config.content_seed` and `config.motion_seed`, where given, hold for all. A clip of one
        frame is a still: the content frame, without motion.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds")
        asked = config.apply(self.config)
        report = on_progress or (lambda stage, done, total: None)
        if asked.sampler == "ddpm" and len(prompts) > 1:
            # its noise at each step comes from one generator: one clip at a time has its own
            pairs = zip(prompts, seeds, strict=True)
            return [
                self.sample_batch([p], config, [s], on_progress=report, on_stage=on_stage)[0]
                for p, s in pairs
            ]
        content_seeds = [s if config.content_seed is None else config.content_seed for s in seeds]
        motion_seeds = [s if config.motion_seed is None else config.motion_seed for s in seeds]

        report("load", 0, 1)
        with on_stage("load"):
            parts, _ = self.parts, self.tokenizer
        report("load", 1, 1)
        # kernels are launched on the current GPU
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            with on_stage("text"):
                text, empty = self._encode(prompts, config.negative)
            with on_stage("content"):
                content = self._sample_content(asked, text, empty, content_seeds, report)
            latents = None
            if asked.frames > 1:
                with on_stage("motion"):
                    motion = self._sample_motion(asked, text, empty, content, motion_seeds, report)
                with on_stage("frame decode"):
                    assert parts.autoencoder is not None
                    motion = parts.autoencoder.destandardise(motion).to(self.dtype)
                    latents = parts.autoencoder.decode(content.to(self.dtype), motion)
            with on_stage("VAE decode"):
                still = self._to_pixels(content.to(self.dtype)).numpy()
                frames = still[:, None] if latents is None else self._decode(latents, report)

        recorded = asdict(asked)
        unused = () if asked.frames > 1 else ("motion_steps", "motion_guidance")
        for name in ("text", "content", "vae", "autoencoder", "motion", "noise", "name", *unused):
            del recorded[name]
        recorded |= {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type}
        return [
            Clip(
                frames=frames[i],
                content=still[i],
                fps=asked.fps,
                metadata={
                    **{"cmdgen": __version__, "model": asked.name},
                    **{"prompt": prompts[i], "negative": config.negative, "seed": seeds[i]},
                    "content_seed": content_seeds[i],
                    **({"motion_seed": motion_seeds[i]} if asked.frames > 1 else {}),
                    **recorded,
                },
            )
            for i in range(len(prompts))
        ]

    def _encode(self, prompts: Sequence[str], negative: str) -> tuple[Tensor, Tensor]:
        """B prompts -> (B, L, D), and the same shape of the negative prompt."""
        ids = self.tokenizer([*prompts, negative], self._length())
        states = self.parts.text(ids.to(self.device)).last_hidden_state
        return states[:-1], states[-1:].expand(len(prompts), -1, -1)

    def _length(self) -> int:
        assert self.config.text is not None
        return self.config.text.max_position_embeddings

    def _sample_content(
        self, asked: ModelConfig, text: Tensor, empty: Tensor, seeds: list[int], report: OnProgress
    ) -> Tensor:
        """(B, L, D) x 2 -> (B, C, h, w): the content frame, a scaled latent, in float32."""
        unet, vae = self.parts.content, self.parts.vae.config
        shape = (vae.latent_channels, asked.height // vae.stride, asked.width // vae.stride)

        def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            output: Tensor = unet(x.to(self.dtype), t, text)
            return output

        noise, generator = self._noise("content", shape, seeds)
        content = SAMPLERS[asked.sampler](
            guide(predict, asked.guidance, (text,), (empty,)),
            noise,
            asked.noise,
            steps=asked.steps,
            generator=generator,
            on_step=partial(report, "content"),
        )
        if not content.isfinite().all():
            dtype = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"{self.folder / 'unet'} overflows in {dtype}: its weights are damaged"
                " or need float32"
            )
        return content

    def _sample_motion(
        self,
        asked: ModelConfig,
        text: Tensor,
        empty: Tensor,
        content: Tensor,
        seeds: list[int],
        report: OnProgress,
    ) -> Tensor:
        """(B, L, D) x 2, (B, C, h, w) -> (B, K, T, W' + H'): standardised motion, in float32."""
        motion = self.parts.motion
        assert motion is not None and asked.autoencoder is not None
        rows, columns = (side // asked.autoencoder.patch for side in content.shape[-2:])
        shape = (asked.autoencoder.motion_channels, asked.frames, columns + rows)
        context = content.to(self.dtype)

        def predict(x: Tensor, t: Tensor, text: Tensor, context: Tensor) -> Tensor:
            given = None if motion.config.text_width is None else text
            sample = x.to(self.dtype)
            output: Tensor = motion(sample, t, text=given, context=context, split=columns)
            return output

        # guidance is on the text alone: both branches see the content frame
        denoise = guide(predict, asked.motion_guidance, (text, context), (empty, context))
        noise, generator = self._noise("motion", shape, seeds)
        return SAMPLERS[asked.sampler](
            denoise,
            noise,
            motion.config.noise,
            steps=asked.motion_steps,
            generator=generator,
            on_step=partial(report, "motion"),
        )

    def _noise(
        self, part: str, shape: tuple[int, ...], seeds: list[int]
    ) -> tuple[Tensor, torch.Generator]:
        """() -> (B, *shape) float32, each from its seed's generator, and the first generator."""
        generators = [seeded(part, seed) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=each) for each in generators])
        return noise.to(self.device), generators[0]

    def _decode(self, latents: Tensor, report: OnProgress) -> np.ndarray:
        """(B, C, T, h, w) -> uint8 (B, T, H, W, 3), one frame of all clips at a time."""
        frames = []
        count = latents.shape[2]
        for i in range(count):
            frames.append(self._to_pixels(latents[:, :, i]))
            report("decode", i + 1, count)
        return torch.stack(frames, dim=1).numpy()

    def _to_pixels(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> uint8 (B, H, W, 3) on the CPU."""
        pixels = self.parts.vae.from_latents(latents).float()
        levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return rearrange(levels, "b c h w -> b h w c").cpu()


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
