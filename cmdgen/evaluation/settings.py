"""Options of the commands that measure. Never imports torch."""

import os
from dataclasses import MISSING, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cmdgen.config import CALIBRATION, IMPORTANCE
from cmdgen.metadata import FIELDS
from cmdgen.options import SIZE, Options, Size, option
from cmdgen.request import MAX_FRAMES, MAX_SEED

_count = partial(option, low=1)
_runs = partial(option, low=1, high=1000)
_file = partial(option, None, metavar="FILE", complete="file")
_sample = partial(option, False, group="Instead of a sample")
_evaluation = partial(option, group="Instead of the evaluation")
_folders = partial(option, group="Two folders instead of a model")
_data = partial(option, "mini", "World of the captions.", complete="world")
_probe = partial(option, None, "Folder of the probe.", shown="the packaged one")
_seed = partial(option, 0, "Seed of the first clip; the next ones count up.", low=0, high=MAX_SEED)


def _like(name: str, **changes: Any) -> Any:
    """Return a field like one of `Request`, except for changes of its option."""
    described = replace(FIELDS[name], group=None, **changes)
    return field(default=described.default, metadata={"option": described})


def check_writable(path: Path | None) -> None:
    """Raise ValueError where no file can be written."""
    if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"{path}: not the name of a file in a folder that can be written to")


@dataclass(frozen=True)
class _Options(Options):
    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("output", "plot", "trace"):
            check_writable(getattr(self, name, None))
        plot: Path | None = getattr(self, "plot", None)
        if plot is not None and plot.suffix.lower() != ".png":
            raise ValueError(f"{plot}: its name must end in .png")


@dataclass(frozen=True)
class Profiling(_Options):
    """Options of `cmdgen profile`."""

    steps: int | None = option(None, "Steps of both models.", low=1, shown="the model's own; 50 with --suite")
    batch: int = _runs(1, "Clips at a time.")
    runs: int = _runs(5, "Runs to measure, after one to warm up.")
    trace: Path | None = _file("Write one more run as a trace for Chrome or Perfetto.")
    paper: bool = _sample("Count CMD's Tables 8 and 9, and EVDM's 1 and 2; runs no model.")
    decoding: bool = _sample(
        "Decode a clip of the paper's model, with random weights, whole and in slices; 512x1024 "
        "unless --size is given, and one run unless --runs is."
    )
    memory: bool = _sample(
        "Count what a clip of AnimateDiff or SVD, a folder or a public name, holds in each way to make it; on a GPU "
        "also measure it, with random weights."
    )
    suite: bool = _sample(
        "Make clips as the paper counts them, as a user waits for them, and with step rehash; all "
        "in one process with the weights loaded."
    )


@dataclass(frozen=True)
class Evaluation(_Options):
    """Options of `cmdgen eval`."""

    model: str = _like("model", argument=True, metavar="MODEL")
    clips: int = option(500, "Clips to generate; 0 measures reconstruction alone.", low=0)
    reconstructed: int = _count(256, "Clips to encode and decode.")
    batch: int = _count(32, "Clips at a time.")
    seed: int = _seed()
    data: str | None = option(
        None, "World of the test clips; or a folder, for a model that predicts.", shown="mini", complete="world"
    )
    trajectories: int = _count(10, "Samples of each such clip, of which the best counts.")
    steps: int | None = option(None, "Sampling steps of such a model.", low=1, shown="the model's own")
    real: Path | None = _folders(None, "Folder of real videos.")
    generated: Path | None = _folders(None, "Folder of generated videos.")
    pairs: bool = _folders(False, "Also compare files of one name; NAME-0, NAME-1 are samples of NAME.")
    frames: int = _folders(16, "Frames of each video, from its first.", low=1, high=MAX_FRAMES)
    size: Size = _folders((64, 64), "Size that they are compared at.", **SIZE)
    probe: Path | None = _probe()
    cost: bool = _evaluation(False, "Measure seconds and memory of a cold `sample`.")
    train_probe: Path | None = _evaluation(None, "Train a probe into this folder; takes 20 minutes.", metavar="FOLDER")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clips == 1:
            raise ValueError("clips 1 is neither 0 nor at least 2")
        if (self.real is None) != (self.generated is None):
            raise ValueError("--real and --generated go together: give both")
        for folder in (self.real, self.generated):
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(f"{folder} is not a folder")


@dataclass(frozen=True)
class Calibrating(_Options):
    """Options of `cmdgen rehash calibrate`."""

    prompts: Path | None = _file("A prompt a line.", shown="captions of the rendered world")
    output: Path | None = _file("File to write.", flags=("--output", "-o"), shown=f"{CALIBRATION} of the model")
    plot: Path | None = _file("Also draw the similarities as a PNG.")
    protect: float = _like("rehash_protect", flags=("--protect",))
    policy: str | None = option(
        None,
        "Measure what this policy reads: similarity needs K runs of a network, not (K - P)^3 / 6.",
        choices=("similarity", "minimax"),
        shown="minimax, and similarity with it",
    )
    image: tuple[str, ...] = option(
        (), "Picture to calibrate on, for models that animate one; repeatable.", metavar="FILE"
    )
    batch: int = _count(8, "Prompts at a time.")


@dataclass(frozen=True)
class Comparing(_Options):
    """Options of `cmdgen rehash compare`."""

    full: list[int] | None = option(
        None, "Full steps of the content model; may be repeated.", metavar="N", shown="13, 9"
    )
    clips: int = _count(128, "Clips to make in each way.")
    batch: int = _count(16, "Clips at a time.")
    seed: int = _seed()
    protect: float = _like("rehash_protect", flags=("--protect",))


@dataclass(frozen=True)
class Weighing(_Options):
    """Options of `cmdgen compress importance`."""

    model: str = _like("model", argument=True, metavar="MODEL")
    output: Path | None = _file("File to write.", flags=("--output", "-o"), shown=f"{IMPORTANCE} of the model")
    plot: Path | None = _file("Also draw it as a PNG.")
    part: str | None = option(
        None, "One part alone.", choices=("unet", "motion", "autoencoder", "vae"), shown="all of them"
    )
    clips: int = option(32, "Clips to make without each block.", low=2)
    steps: int | None = option(None, "Sampling steps of content and motion.", low=1, shown="the model's own")
    batch: int = _count(16, "Clips at a time.")
    seed: int = _seed()
    data: str = _data()
    probe: Path | None = _probe()


@dataclass(frozen=True)
class Pruning(_Options):
    """Options of `cmdgen compress prune`."""

    folder: Path = option(MISSING, "Folder to write.", flags=("--output", "-o"))
    model: str = _like("model", argument=True, metavar="MODEL")
    rule: str | None = option(None, "How blocks are chosen.", choices=("vdmini", "measured"))
    budget: float = option(0.7, "Share of the sampler's time that the measured rule leaves.", low=0, high=1)
    importance: Path | None = _file("What was measured.", shown=f"{IMPORTANCE} of the model")
    drop: tuple[str, ...] = option((), "A block to drop, such as unet.mid; repeatable.", metavar="BLOCK")


@dataclass(frozen=True)
class Contest(_Options):
    """Options of `cmdgen compress compare`."""

    models: tuple[str, ...] = option(
        MISSING, "The whole model, then smaller ones.", argument=True, metavar="MODEL", complete="model"
    )
    decoder: tuple[str, ...] = option((), "A small decoder of the first model; repeatable.", metavar="DIR")
    clips: int = option(128, "Clips to make with each.", low=2)
    steps: int | None = option(None, "Sampling steps of content and motion.", low=1, shown="each model's own")
    batch: int = _count(16, "Clips at a time.")
    seed: int = _seed()
    data: str = _data()
    probe: Path | None = _probe()
