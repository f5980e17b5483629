"""A training run: one folder that the stages fill in turn, each reading the parts that came before.

RUN/                      a model folder: model_index.json, vae/, autoencoder/, unet/ ...
RUN/training/run.json     what every stage of it shares
RUN/training/cache/       encoded clips
RUN/training/<stage>/     checkpoint, log and sample sheets
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cmdgen.config import DiTConfig, ModelConfig, NoiseConfig, TextConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.text import ClipTextModel, Tokenizer
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.training.autoencoder import AutoencoderStage
from cmdgen.training.config import StageConfig, TrainConfig
from cmdgen.training.content import ContentStage
from cmdgen.training.data import TrainingData
from cmdgen.training.latents import Codec, Encodings
from cmdgen.training.loop import Report, Stage, train, uses_bf16
from cmdgen.training.motion import MotionStage
from cmdgen.training.vae import VaeStage, fresh_vae
from cmdgen.weights import read_config, replace_with, write_config, write_model_index

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
HELD_OUT = 32


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
    Raises ValueError where a former stage is missing.
    """
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
    stage = build(_Setting(folder, parts, model, data, config, options, device, report))
    with replace_with(folder / "training" / "run.json") as temporary:
        temporary.write_text(json.dumps(shared, indent=2) + "\n")
    write_model_index(folder, model)
    return train(
        stage, config, state, folder, device=device, report=report, stopped=stopped, started=started
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
        shutil.copytree(given, place)
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
    device: torch.device
    report: Report

    def codec(self) -> Codec:
        vae = None
        if self.model.vae is not None:
            vae = KlVae.from_pretrained(self.parts.former("vae")).to(self.device)
            vae.requires_grad_(False)
        return Codec(vae, self.device, uses_bf16(self.config, self.device))

    def encodings(self, codec: Codec) -> Encodings:
        return Encodings(self.data, codec, self.folder / "training" / "cache", self.report)

    def autoencoder(self) -> CmdAutoencoder:
        place = self.parts.former("autoencoder")
        return CmdAutoencoder.from_pretrained(place).to(self.device).requires_grad_(False)


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
    codec = at.codec()
    latents = at.encodings(codec).latents()
    given = at.parts.given("autoencoder")
    if given is None:
        autoencoder = CmdAutoencoder(at.model.autoencoder)
    else:
        autoencoder = CmdAutoencoder.from_pretrained(given)
    return AutoencoderStage(
        autoencoder.to(at.device),
        latents,
        codec,
        at.data,
        at.options.autoencoder,
        batch=at.config.batch,
        seed=at.config.seed,
        device=at.device,
    )


def _content(at: _Setting) -> Stage:
    from cmdgen.models.text import ClipTextModel

    if at.model.text is None or isinstance(at.model.content, DiTConfig):
        raise ValueError(f"preset {at.model.name} has no text encoder: only text can be trained on")
    codec, autoencoder = at.codec(), at.autoencoder()
    content = at.encodings(codec).pairs(autoencoder)["content"]
    with torch.no_grad(), codec.autocast():
        latents = codec.encode(at.data.clips(at.data.held_out(HELD_OUT)).frames)
        held_out = torch.cat([autoencoder.encode(part)[0] for part in latents.split(8)])
    tokenizer = _tokenizer(at, at.model.text)
    given = at.parts.given("unet")
    unet = UNet(at.model.content) if given is None else UNet.from_pretrained(given)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    given = at.parts.given("text_encoder")
    text = ClipTextModel(at.model.text) if given is None else ClipTextModel.from_pretrained(given)
    return ContentStage(
        unet.to(at.device),
        text.to(at.device),
        tokenizer,
        at.model.noise,
        content,
        held_out.float(),
        codec,
        at.data,
        batch=at.config.batch,
        seed=at.config.seed,
        device=at.device,
        freeze_text=at.options.freeze_text,
    )


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
    codec, autoencoder = at.codec(), at.autoencoder()
    text = ClipTextModel.from_pretrained(at.parts.former("text_encoder")).to(at.device)
    tokenizer = Tokenizer.from_pretrained(at.parts.former("tokenizer"))
    pairs = at.encodings(codec).pairs(autoencoder)
    if autoencoder.config.motion_activation == "linear":
        motion = pairs["motion"].double()
        mean, std = motion.mean(dim=(0, 2, 3)), motion.std(dim=(0, 2, 3))
        autoencoder.config = replace(
            autoencoder.config,
            motion_mean=tuple(round(value, 6) for value in mean.tolist()),
            motion_std=tuple(round(value, 6) for value in std.tolist()),
        )
        write_config(autoencoder.config, at.folder / "autoencoder")
    given = at.parts.given("motion")
    return MotionStage(
        (DiT(at.model.motion) if given is None else DiT.from_pretrained(given)).to(at.device),
        autoencoder,
        text.requires_grad_(False),
        tokenizer,
        pairs,
        codec,
        at.data,
        batch=at.config.batch,
        seed=at.config.seed,
        device=at.device,
    )
