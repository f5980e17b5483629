"""`cmdgen eval --real --generated`: two folders of videos."""

import json
import math
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from cmdgen.evaluation.metrics import kernel_distance
from tests.videos import write_video


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six videos of noise; three others, two of which are samples of the first."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("folders")
    for name in ("real", "made"):
        (root / name).mkdir()
    clips = rng.integers(60, 190, (6, 4, 32, 32, 3), np.uint8)
    for i, clip in enumerate(clips):
        write_video(root / "real" / f"{i}.apng", clip, 8, None)
    for name, clip in (("0-0", clips[0] + 50), ("0-1", clips[0] + 2), ("3", clips[3])):
        write_video(root / "made" / f"{name}.apng", clip.astype(np.uint8), 8, None)
    return root / "real", root / "made"


def run(cmdgen, real: Path, generated: Path, *more: object):
    sizes = ("--frames", 4, "--size", "32x32")
    return cmdgen("eval", "--real", real, "--generated", generated, *sizes, *more)


def test_sets_are_compared_beside_real_against_real(cmdgen, folders) -> None:
    done = run(cmdgen, *folders, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["n"], record["real"], record["generated"]) == (3, 6, 3)
    for name in ("frechet_distance", "kernel_distance"):
        assert all(math.isfinite(value) for value in record[name].values())
    assert "3 clips of each set, 4 frames" in run(cmdgen, *folders).out


def test_of_several_samples_the_best_counts(cmdgen, folders) -> None:
    pairs = json.loads(run(cmdgen, *folders, "--pairs", "--json").out)["pairs"]
    # an error of 2 levels, and none, which counts as 60 dB
    expected = (-20 * math.log10(2 / 255) + 60) / 2
    assert pairs["psnr"] == pytest.approx(expected, abs=1e-3)
    assert (pairs["clips"], pairs["trajectories"]) == (2, 2)


def test_what_cannot_be_compared_is_one_line(cmdgen, folders, tmp_path: Path) -> None:
    real, made = folders
    assert "at least 4 and 2 are needed" in run(cmdgen, real, tmp_path).err
    assert "go together" in cmdgen("eval", "--real", real).err
    assert "is not a folder" in cmdgen("eval", "--real", real, "--generated", tmp_path / "none").err
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.apng", np.zeros((4, 32, 32, 3), np.uint8), 8, None)
    done = run(cmdgen, real, tmp_path, "--pairs")
    assert done.code == 2 and "is named as no real video" in done.err
    for name in ("one", "two"):
        copytree(real, tmp_path / "twice" / name)
    done = run(cmdgen, tmp_path / "twice", made, "--pairs")
    assert done.code == 2 and "one/0.apng and " in done.err and "two/0.apng have one name" in done.err
    short = cmdgen("eval", "--real", real, "--generated", made, "--size", "32x32")
    assert "has 4 frames, 16 are compared" in short.err


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    same = [kernel_distance(*torch.randn(2, 40, 4, generator=generator)) for _ in range(60)]
    error = torch.tensor(same).std() / 60**0.5
    assert abs(sum(same) / 60) < 3 * error
    a, b = torch.randn(2, 200, 4, generator=generator)
    assert kernel_distance(a, b + 1) > 20 * error
