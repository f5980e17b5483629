"""Options of the commands that measure. Never imports torch."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cmdgen.options import option, read_fields
from cmdgen.request import MAX_SEED, Request

_count = partial(option, low=1)
_instead = partial(option, False, group="Instead of a sample")
_seed = partial(option, 0, "Seed of the first clip; the next ones count up.", low=0, high=MAX_SEED)
_batch = partial(_count, help="Clips at a time.")
_protect = partial(
    option,
    Request.rehash_protect,
    "Share of the content model's steps, from the first, that always run in full.",
    low=0,
    high=1,
)


def check_writable(path: Path | None) -> None:
    """Raise ValueError where no file can be written."""
    if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"{path}: not the name of a file in a folder that can be written to")


@dataclass(frozen=True)
class Profiling:
    """Options of `cmdgen profile`."""

    steps: int | None = _count(
        None, help="Steps of both models.", shown="the model's own; 50 with --suite"
    )
    batch: int = option(1, "Clips at a time.", low=1, high=1000)
    runs: int = option(5, "Runs to measure, after one to warm up.", low=1, high=1000)
    trace: Path | None = option(
        None,
        "Write one more run as a trace for Chrome or Perfetto.",
        metavar="FILE",
        complete="file",
    )
    paper: bool = _instead("Count the paper's Tables 8 and 9; runs no model.")
    decoding: bool = _instead(
        "Decode a clip of the paper's model, with random weights, whole and in slices; 512x1024 "
        "unless --size is given, and one run unless --runs is."
    )
    suite: bool = _instead(
        "Make clips as the paper counts them, as a user waits for them, and with step rehash; all "
        "in one process with the weights loaded."
    )

    def __post_init__(self) -> None:
        read_fields(self)
        check_writable(self.trace)


@dataclass(frozen=True)
class Evaluation:
    """Options of `cmdgen eval`."""

    model: str = option(
        Request.model,
        "A packaged model's name, a folder, or OWNER/NAME that was pulled.",
        argument=True,
        metavar="MODEL",
        complete="model",
    )
    clips: int = option(500, "Clips to generate; 0 measures reconstruction alone.", low=0)
    reconstructed: int = _count(256, help="Clips to encode and decode.")
    batch: int = _batch(32)
    seed: int = _seed()
    probe: Path | None = option(None, "Folder of the probe.", shown="the packaged one")
    cost: bool = option(
        False,
        "Measure seconds and memory of a cold `sample`.",
        group="Instead of the evaluation",
    )
    train_probe: Path | None = option(
        None,
        "Train a probe into this folder; takes minutes.",
        metavar="FOLDER",
        group="Instead of the evaluation",
    )

    def __post_init__(self) -> None:
        read_fields(self)
        if self.clips == 1:
            raise ValueError("clips 1 is neither 0 nor at least 2")


@dataclass(frozen=True)
class Calibrating:
    """Options of `cmdgen rehash calibrate`."""

    prompts: Path | None = option(
        None,
        "A file with a prompt a line.",
        metavar="FILE",
        shown="captions of the rendered world",
        complete="file",
    )
    output: Path | None = option(
        None,
        "File to write.",
        flags=("--output", "-o"),
        metavar="FILE",
        shown="rehash.json of the model",
        complete="file",
    )
    plot: Path | None = option(
        None, "Also draw the similarities as a PNG.", metavar="FILE", complete="file"
    )
    protect: float = _protect()
    batch: int = _count(8, help="Prompts at a time.")

    def __post_init__(self) -> None:
        read_fields(self)
        check_writable(self.output)
        check_writable(self.plot)


@dataclass(frozen=True)
class Comparing:
    """Options of `cmdgen rehash compare`."""

    full: list[int] | None = option(
        None, "Full steps of the content model; may be repeated.", metavar="N", shown="13, 9"
    )
    clips: int = _count(128, help="Clips to make in each way.")
    batch: int = _batch(16)
    seed: int = _seed()
    protect: float = _protect()

    def __post_init__(self) -> None:
        read_fields(self)
