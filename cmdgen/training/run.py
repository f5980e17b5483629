"""A training run: one folder that the stages fill in turn, each reading the parts that came before.

RUN/                      a model folder: model_index.json, vae/, autoencoder/, unet/ ...
RUN/training/run.json     what every stage of it shares
RUN/training/cache/       encoded clips, but for latents that were precomputed elsewhere
RUN/training/<stage>/     checkpoint, log and sample sheets
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmdgen.config import DiTConfig, ModelConfig, NoiseConfig, TextConfig
from cmdgen.files import create_folder, replace_with
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.text import ClipTextModel
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.schema import read_config, write_config
from cmdgen.store.parts import write_model_index
from cmdgen.training.autoencoder import AutoencoderStage
from cmdgen.training.cache import Rows
from cmdgen.training.config import StageConfig, TrainConfig
from cmdgen.training.content import ContentStage
from cmdgen.training.data import TrainingData
from cmdgen.training.latents import Codec, Encodings
from cmdgen.training.loop import Report, Stage, train, uses_bf16
from cmdgen.training.motion import MotionStage
from cmdgen.training.recompute import recompute_blocks
from cmdgen.training.vae import VaeStage, fresh_vae

# the stage that makes a part
MAKERS = {
    "vae": "vae",
    "autoencoder": "autoencoder",
    "unet": "content",
    "text_encoder": "content",
    "tokenizer": "content",
    "motion": "motion",
}
TOKENIZER_CAPTIONS = 10_000
# of a part that training starts from: what must be as in the model that is built
FITTING = {
    "vae": ("latent_channels",),
    "text_encoder": ("hidden_size",),
    "unet": ("in_channels", "cross_attention_dim"),
    "autoencoder": ("channels", "motion_channels"),
    "motion": ("in_channels", "context_channels", "text_width"),
}


def settle(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What all stages of a run share: what was asked for now (None: nothing), or before.

    Raises ValueError where the two differ.
    """
    path = folder / "training" / "run.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    asked = {name: value for name, value in asked.items() if value is not None}
    for name, value in asked.items():
        if known.get(name, value) != value:
            raise ValueError(
                f"{folder} was started with {name} {known[name]}, not {value}: use another folder"
            )
    return known | asked


def run_stage(
    name: str,
    folder: Path,
    model: ModelConfig,
    data: TrainingData,
    config: TrainConfig,
    options: StageConfig,
    *,
    device: torch.device,
    report: Report,
    stopped: Callable[[], bool],
    shared: dict[str, Any],
    started: float,
) -> int:
    """Trains one stage from wherever it stands; returns the number of steps done.

    `shared` is kept for the other stages, see `settle`; `minutes` count from `started`.
    Raises ValueError where a former stage is missing, or a part of `init` does not fit.
    """
    if options.init is not None:
        if options.init.resolve() == folder.resolve():
            raise ValueError(f"{folder} cannot start from itself: leave --init out")
        check_init(options.init, model)
    state = folder / "training" / name
    if options.restart and state.exists():
        shutil.rmtree(state)
    # fresh weights follow from the seed
    torch.manual_seed(config.seed)
    parts = Parts(folder, options.init)
    scheduler = parts.given("scheduler") or folder / "scheduler"
    if scheduler.is_dir():
        model = replace(model, noise=read_config(scheduler, NoiseConfig))
    build = {"vae": _vae, "autoencoder": _autoencoder, "content": _content, "motion": _motion}[name]
    latents = Path(shared["latents"]) if "latents" in shared else None
    stage = build(_Setting(folder, parts, model, data, config, options, latents, device, report))
    with replace_with(folder / "training" / "run.json") as temporary:
        temporary.write_text(json.dumps(shared, indent=2) + "\n")
    write_model_index(folder, model)
    if config.gradient_checkpointing:
        for module in stage.modules.values():
            recompute_blocks(module)
    return train(
        stage, config, state, folder, device=device, report=report, stopped=stopped, started=started
    )


def check_init(init: Path, model: ModelConfig) -> None:
    """ValueError where the parts of a folder are not those of the model."""
    if (init / "unet").is_dir() and not (init / "scheduler").is_dir():
        raise ValueError(
            f"{init} has unet/ but no scheduler/: whether its UNet predicts noise or velocity is"
            " written there and nowhere else"
        )
    parts = {
        "vae": model.vae,
        "text_encoder": model.text,
        "unet": model.content,
        "autoencoder": model.autoencoder,
        "motion": model.motion,
    }
    for part, config in parts.items():
        if config is None or not (init / part).is_dir():
            continue
        given = read_config(init / part, type(config))
        for name in FITTING[part]:
            got, expected = getattr(given, name), getattr(config, name)
            if got != expected:
                raise ValueError(
                    f"{init / part}: {name} is {got}, preset {model.name} has {expected}"
                )


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model come from: the run's folder, or the folder that it starts from."""

    folder: Path
    init: Path | None

    def former(self, name: str) -> Path:
        """A part that this stage only reads; one of `init` is copied into the run."""
        place = self.folder / name
        if place.is_dir():
            return place
        given = self.given(name)
        if given is None:
            raise ValueError(
                f"{self.folder} has no {name}/ yet: first run"
                f" `cmdgen train {MAKERS[name]} -o {self.folder}`"
            )
        # Stable Diffusion's folders hold the same weights in other formats too
        others = shutil.ignore_patterns("*.bin", "*.msgpack", "*.onnx*")
        self.folder.mkdir(parents=True, exist_ok=True)
        with create_folder(place) as temporary:
            shutil.copytree(given, temporary, ignore=others, dirs_exist_ok=True)
        return place

    def given(self, name: str) -> Path | None:
        """A part of `init`, if there is one."""
        place = None if self.init is None else self.init / name
        return place if place is not None and place.is_dir() else None


@dataclass(frozen=True)
class _Setting:
    folder: Path
    parts: Parts
    model: ModelConfig
    data: TrainingData
    config: TrainConfig
    options: StageConfig
    latents: Path | None
    device: torch.device
    report: Report

    def codec(self) -> Codec:
        """One that has not read its VAE."""
        place = None if self.model.vae is None else self.parts.former("vae")
        bf16 = uses_bf16(self.config.precision, self.device)
        return Codec(place, self.model, self.device, bf16)

    def encodings(self) -> Encodings:
        folder = self.folder / "training" / "cache"
        # a VAE of its own, which goes when all is encoded
        return Encodings(self.data, self.codec(), folder, self.report, self.latents)

    def pairs(self, encodings: Encodings) -> tuple[dict[str, Rows], CmdAutoencoder]:
        """Content and motion of the training clips, and the autoencoder that they are of."""
        place = self.parts.former("autoencoder")
        autoencoder = CmdAutoencoder.from_pretrained(place, device=self.device)
        autoencoder.requires_grad_(False)
        return encodings.pairs(autoencoder, place), autoencoder


def _vae(at: _Setting) -> Stage:
    if at.model.vae is None:
        raise ValueError(f"preset {at.model.name} works on pixels: it has no VAE to train")
    given = at.parts.given("vae")
    vae = fresh_vae(at.model.vae) if given is None else KlVae.from_pretrained(given)
    # the layout that convolutions are fastest in
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return VaeStage(
        vae.to(at.device),
        at.data,
        at.options.vae,
        batch=at.config.batch,
        seed=at.config.seed,
        device=at.device,
    )


def _autoencoder(at: _Setting) -> Stage:
    encodings = at.encodings()
    latents, held_out = encodings.latents(), encodings.held_out(at.config.held_out)
    given = at.parts.given("autoencoder")
    if given is None:
        assert at.model.autoencoder is not None
        autoencoder = CmdAutoencoder(at.model.autoencoder)
    else:
        autoencoder = CmdAutoencoder.from_pretrained(given)
    return AutoencoderStage(
        autoencoder.to(at.device),
        latents,
        held_out,
        at.codec(),
        at.data,
        at.options.autoencoder,
        batch=at.config.batch,
        seed=at.config.seed,
        device=at.device,
    )


def _content(at: _Setting) -> Stage:
    if at.model.text is None or isinstance(at.model.content, DiTConfig):
        raise ValueError(f"preset {at.model.name} has no text encoder: only text can be trained on")
    frozen = _frozen_text(at) if at.options.freeze_text else None
    encodings = at.encodings()
    pairs, autoencoder = at.pairs(encodings)
    latents = encodings.held_out(at.config.held_out)
    with torch.no_grad(), encodings.codec.autocast():
        held_out = torch.cat([autoencoder.encode(part)[0] for part in latents.split(8)])
    # before the content model takes the memory
    del encodings, autoencoder
    given = at.parts.given("unet")
    unet = UNet(at.model.content) if given is None else UNet.from_pretrained(given)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tokenizer, text = frozen or _text(at, at.model.text)
    return ContentStage(
        unet.to(at.device),
        text.to(at.device),
        tokenizer,
        at.model.noise,
        pairs["content"],
        held_out.float(),
        at.codec(),
        at.data,
        at.options.denoising,
        batch=at.config.batch,
        seed=at.config.seed,
        device=at.device,
        freeze_text=at.options.freeze_text,
    )


def _frozen_text(at: _Setting) -> tuple[Tokenizer, ClipTextModel]:
    """Those of the run, else copies of init's."""
    names = ("tokenizer", "text_encoder")
    for name in names:
        if at.options.restart and at.parts.given(name) is not None:
            shutil.rmtree(at.folder / name, ignore_errors=True)
        if at.parts.given(name) is None and not (at.folder / name).is_dir():
            raise ValueError(
                f"{at.folder} has no {name}/ that could stay frozen: give --init a folder that has,"
                " or --no-freeze-text"
            )
    tokenizer, text = (at.parts.former(name) for name in names)
    return Tokenizer.from_pretrained(tokenizer), ClipTextModel.from_pretrained(text)


def _text(at: _Setting, config: TextConfig) -> tuple[Tokenizer, ClipTextModel]:
    tokenizer, given = _tokenizer(at, config), at.parts.given("text_encoder")
    if given is None:
        return tokenizer, ClipTextModel(config)
    return tokenizer, ClipTextModel.from_pretrained(given)


def _tokenizer(at: _Setting, text: TextConfig) -> Tokenizer:
    """The one that this stage began with, else init's, else one trained on the captions."""
    place = at.folder / "tokenizer"
    given = at.parts.given("tokenizer")
    if place.is_dir() and not at.options.restart:
        return Tokenizer.from_pretrained(place)
    if given is not None:
        tokenizer = Tokenizer.from_pretrained(given)
    else:
        indices = at.data.source.indices("train", TOKENIZER_CAPTIONS)
        texts = [text for variant in range(2) for text in at.data.captions(indices, variant)]
        tokenizer = Tokenizer.train(texts, text.vocab_size)
    # before the first checkpoint: token ids must never change under the weights
    tokenizer.save_pretrained(place, length=text.max_position_embeddings)
    return tokenizer


def _motion(at: _Setting) -> Stage:
    encodings = at.encodings()
    pairs, autoencoder = at.pairs(encodings)
    text = ClipTextModel.from_pretrained(at.parts.former("text_encoder")).to(at.device)
    tokenizer = Tokenizer.from_pretrained(at.parts.former("tokenizer"))
    if autoencoder.config.motion_activation == "linear":
        mean, std = _moments(pairs["motion"])
        autoencoder.config = replace(
            autoencoder.config,
            motion_mean=tuple(round(value, 6) for value in mean.tolist()),
            motion_std=tuple(round(value, 6) for value in std.tolist()),
        )
        write_config(autoencoder.config, at.folder / "autoencoder")
    given = at.parts.given("motion")
    assert at.model.motion is not None
    return MotionStage(
        (DiT(at.model.motion) if given is None else DiT.from_pretrained(given)).to(at.device),
        autoencoder,
        text.requires_grad_(False),
        tokenizer,
        pairs,
        encodings.held_out(at.config.held_out),
        at.codec(),
        at.data,
        at.options.denoising,
        batch=at.config.batch,
        seed=at.config.seed,
        device=at.device,
    )


def _moments(motion: Rows) -> tuple[Tensor, Tensor]:
    """(N, D, T, S) -> (D,) x 2 float64: mean and standard deviation of each channel."""
    total = squares = torch.zeros(motion.shape[1], dtype=torch.float64)
    for rows in torch.arange(len(motion)).split(1024):
        part = motion[rows].double()
        total = total + part.sum(dim=(0, 2, 3))
        squares = squares + part.square().sum(dim=(0, 2, 3))
    count = math.prod(motion.shape) / motion.shape[1]
    mean = total / count
    return mean, ((squares - count * mean.square()) / (count - 1)).sqrt()
