"""One stage of a training run: what it trains on and how, and the parts of its model on disk.

RUN/                      a model folder: model_index.json, vae/, autoencoder/, unet/ ...
RUN/training/run.json     what all stages share
RUN/training/cache/       encoded clips, except latents that were precomputed elsewhere
RUN/training/<stage>/     checkpoint, log and sample sheets
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cmdgen.config import ModelConfig
from cmdgen.files import create_folder
from cmdgen.headers import weight_paths
from cmdgen.store.find import find_model
from cmdgen.store.parts import NETWORKS, PARTS, hash_weights, load_part
from cmdgen.training.cache import fingerprint
from cmdgen.training.config import Loss, Report, Shared, Start, TrainConfig
from cmdgen.training.data import TrainingData
from cmdgen.training.distributed import ALONE, Ranks
from cmdgen.training.latents import Codec, Encodings
from cmdgen.training.randomness import Draws, seeded


@dataclass(frozen=True)
class Run:
    """One stage of a run."""

    stage: str
    start: Start
    shared: Shared
    config: TrainConfig
    loss: Loss
    model: ModelConfig
    data: TrainingData
    device: torch.device
    report: Report = lambda *_: None
    stopped: Callable[[], bool] = lambda: False
    # the time.monotonic() from which `config.minutes` count
    started: float = field(default_factory=time.monotonic)
    # the processes that train together
    ranks: Ranks = ALONE
    # former stages' parts that this one has read
    parts: dict[str, Path] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Return the model's folder."""
        return self.start.folder

    @property
    def state(self) -> Path:
        """Return the folder of the checkpoint, log.jsonl and sheet-*.png."""
        return self.folder / "training" / self.stage

    def autocast(self) -> torch.autocast:
        """Return the precision of forward passes."""
        bf16 = self.config.uses_bf16(self.device.type)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def initial(self, part: str) -> Path | None:
        """Return a part of `init`, if there is one."""
        init = self.start.init
        return init / part if init is not None and (init / part).is_dir() else None

    def finished(self, part: str) -> Path:
        """Return the folder of a part that this stage only reads; copy it from `init` if need be.

        Raises ValueError, naming the stage that trains it, where there is none.
        """
        place, initial = self.folder / part, self.initial(part)
        self.parts[part] = place
        if place.is_dir():
            return place
        if initial is None:
            raise ValueError(
                f"{self.folder} has no {part}/ yet: first run `cmdgen train {PARTS[part].stage} -o {self.folder}`"
            )
        # Stable Diffusion's folders hold the same weights in other formats too
        others = shutil.ignore_patterns("*.bin", "*.msgpack", "*.onnx*")
        self.folder.mkdir(parents=True, exist_ok=True)
        with create_folder(place) as temporary:
            shutil.copytree(initial, temporary, ignore=others, dirs_exist_ok=True)
        return place

    def origin(self) -> dict[str, Any]:
        """Return what a checkpoint of this stage, once it is built, belongs to."""
        data = self.data
        numbers = {"batch": self.config.batch, "seed": self.config.seed, "clips": data.count, "frames": data.frames}
        weights = {
            # of the VAE what latents depend on: its decoder learns on at last
            part: self.codec().key if part == "vae" else fingerprint(weight_paths(place, NETWORKS[part].filename))
            for part, place in self.parts.items()
            if part in NETWORKS
        }
        contents, teacher = fingerprint([], data.source.contents), self.start.teacher
        taught = {} if teacher is None else {"teacher": hash_weights(find_model(teacher))}
        return {"stage": self.stage, **numbers, "data": contents, "size": list(data.size), **weights, **taught}

    def draws(self, step: int, count: int) -> Draws:
        """Return the random numbers for `count` rows of a step's batch, of which some are this process's."""
        return Draws(seeded(self.config.seed, self.stage, step), count, self.ranks.part(count))

    def read(self, part: str) -> Any:
        """Return the network of a former stage, frozen."""
        module = load_part(self.finished(part).parent, part, device=self.device)
        return module.requires_grad_(False)

    def teach(self, part: str) -> Any:
        """Return a network of the teacher, frozen."""
        assert self.start.teacher is not None
        return load_part(find_model(self.start.teacher), part, device=self.device).requires_grad_(False)

    def build(self, part: str) -> Any:
        """Return the network that this stage trains: that of `init`, or one with fresh weights."""
        initial = self.initial(part)
        if self.start.teacher is not None:
            # what was pruned is there already
            module: Any = load_part(self.folder, part)
        elif initial is None:
            module = PARTS[part].network(getattr(self.model, PARTS[part].field))
        else:
            module = load_part(initial.parent, part)
        # the layout in which convolutions are fastest
        return module.to(memory_format=torch.channels_last).to(self.device)

    def codec(self) -> Codec:
        """Return a codec that has not read its VAE yet."""
        place = None if self.model.vae is None else self.finished("vae")
        return Codec(place, self.model, self.device, self.config.uses_bf16(self.device.type))

    def encodings(self) -> Encodings:
        """Return the encoded clips, with a codec that is freed when all are encoded."""
        folder = self.folder / "training" / "cache"
        return Encodings(self.data, self.codec(), folder, self.report, self.shared.latents)
