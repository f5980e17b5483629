"""A kill at any rename leaves old files or new ones, whole; the same command afterwards makes the rest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cmdgen import files
from cmdgen.files import create_folder, write_json
from cmdgen.latents import Latents, save_latents
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.store.create import create_model
from cmdgen.training.cache import fill
from cmdgen.video.formats import Encoding
from cmdgen.video.write import write_still
from cmdgen.weights import save_tensors
from tests.conftest import tiny_config
from tests.killing import kill_at_every_rename
from tests.videos import write_video

FRAMES = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)


def tree(folder: Path) -> dict[str, bytes]:
    """The files that a user sees, by name."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in paths.items() if "/." not in f"/{name}"}


class Writer(NamedTuple):
    """What makes files in a folder: `old` ones, which `new` replaces."""

    old: Callable[[Path], object]
    new: Callable[[Path], object]
    # whether new files never stand beside old ones
    together: bool = False
    # whether there are all of the new files or none
    whole: bool = False
    # a file that lists the others, and is written whole after each of them
    index: str = ""


def twice(write: Callable[[Path, int], object], *, together: bool = False) -> Writer:
    return Writer(lambda folder: write(folder, 0), lambda folder: write(folder, 1), together)


def video(name: str, *, sidecar: bool = False) -> Writer:
    def write(folder: Path, change: int) -> None:
        encoding = Encoding("frames" if "%" in name else "apng", sidecar=sidecar)
        # the old one is longer
        frames = FRAMES[: 4 - change] + np.uint8(change)
        write_video(folder / name, frames, 8, {"cmdgen": "0", "n": change}, encoding, overwrite=True)

    return twice(write, together=True)


def latents(folder: Path, value: int) -> None:
    clip = Latents(torch.full((1, 2, 2), float(value)), torch.ones(1, 2, 4), 8, {})
    save_latents(folder / "a.safetensors", clip, overwrite=True)


def make_folder(folder: Path) -> None:
    """As a run's tokenizer is made: where it is there already, it is whole."""
    if not (folder / "m").is_dir():
        Tokenizer.train(["a dog"], 520).save_pretrained(folder / "m")


def replace_folder(folder: Path, number: int) -> None:
    with create_folder(folder / "m", overwrite=True) as target:
        for name in ("a", f"{number}"):
            (target / name).write_text(f"{number}")


def encode(folder: Path) -> None:
    rows = torch.arange(20.0).view(10, 2)
    fill(folder / "x-a", 10, lambda part: {"x": rows[part.start : part.stop]}, lambda *_: None, step=2, rows=4)


def nothing(folder: Path) -> None:
    pass


WRITERS = {
    "json": twice(lambda folder, n: write_json(folder / "a.json", {"n": n})),
    "tensors": twice(lambda folder, n: save_tensors(folder / "a.safetensors", {"n": torch.full((3,), float(n))})),
    "still": twice(lambda folder, n: write_still(folder / "a.png", FRAMES[n], {"n": n}, overwrite=True)),
    "latents": twice(latents),
    "video": video("a.apng"),
    "video and sidecar": video("a.apng", sidecar=True),
    "frames": video("f%02d.png"),
    "frames and sidecar": video("f%02d.png", sidecar=True),
    "longer frames": Writer(video("f%02d.png").new, video("f%02d.png").old, together=True),
    "folder": Writer(nothing, make_folder, whole=True),
    "folder over another": twice(replace_folder, together=True),
    "model": Writer(nothing, lambda folder: create_model(tiny_config(), folder / "m"), whole=True),
    "cache": Writer(nothing, encode, index="x-a/index-00001-of-00001.json"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_leaves_old_or_new_files_and_the_next_start_makes_the_rest(name: str, tmp_path: Path) -> None:
    writer, trial = WRITERS[name], tmp_path / "trial"
    for write, folder in ((writer.old, "old"), (writer.new, "new")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder)
    old, new = tree(tmp_path / "old"), tree(tmp_path / "new")

    def begin() -> None:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(tmp_path / "old", trial)
        writer.new(trial)

    for _ in kill_at_every_rename(begin):
        left = tree(trial)
        index = left.pop(writer.index, None)
        assert index is None or set(json.loads(index)["files"]) <= {Path(file).name for file in left}
        assert all(data in (old.get(file), new.get(file)) for file, data in left.items())
        if writer.together:
            assert left.items() <= old.items() or left.items() <= new.items()
        if writer.whole:
            assert left in ({}, new)
        files._remove_leftovers.cache_clear()
        if writer.together:
            # any start in that folder will do: nothing is lost
            files._remove_leftovers(trial)
            assert tree(trial) in (old, new)
            assert not [*trial.rglob(".*")]
        writer.new(trial)
        assert tree(trial) == new
        assert not [*trial.rglob(".*")]
