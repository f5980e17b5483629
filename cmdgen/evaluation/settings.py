"""Options of the commands that measure. Never imports torch."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cmdgen.config import CALIBRATION
from cmdgen.options import option, read_fields
from cmdgen.request import MAX_SEED, Request

_count = partial(option, low=1)
_runs = partial(option, low=1, high=1000)
_file = partial(option, None, metavar="FILE", complete="file")
_argument = partial(option, argument=True, metavar="MODEL", complete="model")
_sample = partial(option, False, group="Instead of a sample")
_evaluation = partial(option, group="Instead of the evaluation")
_seed = partial(option, 0, "Seed of the first clip; the next ones count up.", low=0, high=MAX_SEED)
_share = partial(option, Request.rehash_protect, low=0, high=1)
PROTECTED = "Share of the content model's steps, from the first, that always run in full."


def check_writable(path: Path | None) -> None:
    """Raise ValueError where no file can be written."""
    if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"{path}: not the name of a file in a folder that can be written to")


@dataclass(frozen=True)
class _Options:
    def __post_init__(self) -> None:
        read_fields(self)


@dataclass(frozen=True)
class Profiling(_Options):
    """Options of `cmdgen profile`."""

    steps: int | None = option(
        None, "Steps of both models.", low=1, shown="the model's own; 50 with --suite"
    )
    batch: int = _runs(1, "Clips at a time.")
    runs: int = _runs(5, "Runs to measure, after one to warm up.")
    trace: Path | None = _file("Write one more run as a trace for Chrome or Perfetto.")
    paper: bool = _sample("Count the paper's Tables 8 and 9; runs no model.")
    decoding: bool = _sample(
        "Decode a clip of the paper's model, with random weights, whole and in slices; 512x1024 "
        "unless --size is given, and one run unless --runs is."
    )
    suite: bool = _sample(
        "Make clips as the paper counts them, as a user waits for them, and with step rehash; all "
        "in one process with the weights loaded."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_writable(self.trace)


@dataclass(frozen=True)
class Evaluation(_Options):
    """Options of `cmdgen eval`."""

    model: str = _argument(Request.model, "Packaged model, folder, or OWNER/NAME that was pulled.")
    clips: int = option(500, "Clips to generate; 0 measures reconstruction alone.", low=0)
    reconstructed: int = _count(256, "Clips to encode and decode.")
    batch: int = _count(32, "Clips at a time.")
    seed: int = _seed()
    probe: Path | None = option(None, "Folder of the probe.", shown="the packaged one")
    cost: bool = _evaluation(False, "Measure seconds and memory of a cold `sample`.")
    train_probe: Path | None = _evaluation(
        None, "Train a probe into this folder; takes minutes.", metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clips == 1:
            raise ValueError("clips 1 is neither 0 nor at least 2")


@dataclass(frozen=True)
class Calibrating(_Options):
    """Options of `cmdgen rehash calibrate`."""

    prompts: Path | None = _file("A prompt a line.", shown="captions of the rendered world")
    output: Path | None = _file(
        "File to write.", flags=("--output", "-o"), shown=f"{CALIBRATION} of the model"
    )
    plot: Path | None = _file("Also draw the similarities as a PNG.")
    protect: float = _share(PROTECTED)
    batch: int = _count(8, "Prompts at a time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_writable(self.output)
        check_writable(self.plot)


@dataclass(frozen=True)
class Comparing(_Options):
    """Options of `cmdgen rehash compare`."""

    full: list[int] | None = option(
        None, "Full steps of the content model; may be repeated.", metavar="N", shown="13, 9"
    )
    clips: int = _count(128, "Clips to make in each way.")
    batch: int = _count(16, "Clips at a time.")
    seed: int = _seed()
    protect: float = _share(PROTECTED)
