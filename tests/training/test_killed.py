"""A training that is killed at any rename goes on to what it would have been, bit for bit."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.killing import kill_at_every_rename, run_child

FEW = "--preset mini --data shapes --steps 2 --batch 2 --clips 4 --held-out 2 --save-every 0 --log-every 1 -q"


def train(folder: Path, stage: str) -> None:
    """Train a stage for two steps, with a checkpoint after each."""
    from cmdgen.cli.app import main

    try:
        main(["train", stage, "-o", str(folder), *FEW.split()])
    except SystemExit as end:
        assert not end.code, end.code


def tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files, logs without times."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    timed = re.compile(rb', "(samples/s|seconds)": [^,}]+')
    return {name: timed.sub(b"", data) if name.endswith("log.jsonl") else data for name, data in files.items()}


def kill(folder: Path, stage: str) -> None:
    """Train a stage of the run in `folder`; in copies of it, die at every rename."""
    trial, begin = (folder.with_name(f"{name} {stage}") for name in ("trial", "begin"))
    folder.mkdir(exist_ok=True)
    shutil.copytree(folder, begin)
    run_child(partial(train, folder, stage))
    expected = tree(folder)

    def begin_anew() -> None:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(begin, trial)
        train(trial, stage)

    for number in kill_at_every_rename(begin_anew):
        run_child(partial(train, trial, stage))
        got = tree(trial)
        other = sorted(name for name in got.keys() | expected if got.get(name) != expected.get(name))
        assert not other, f"{stage}, killed at rename {number}: {other}"


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    # in a process of its own: autograd does not run in children of one that it ran in
    subprocess.run([sys.executable, "-m", __name__, tmp_path / "run", "vae"], check=True, timeout=300)


if __name__ == "__main__":
    import torch

    # imported once, and not in every child
    import torch._dynamo

    from cmdgen.config import PRESETS
    from cmdgen.training import denoising, run, text  # noqa: F401
    from cmdgen.world.config import WORLDS
    from tests.conftest import tiny_config
    from tests.training.conftest import SHAPES

    torch.set_num_threads(1)
    os.fsync = lambda _: None
    PRESETS["mini"], WORLDS["shapes"] = replace(tiny_config(), name="mini"), SHAPES
    text.CAPTIONS, denoising.SHEET_STEPS = 20, 2
    for name in sys.argv[2:]:
        kill(Path(sys.argv[1]), name)
