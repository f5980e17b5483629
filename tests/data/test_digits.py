"""Moving digits: drawn by the test, read from both kinds of files, placed by seed and index."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdgen.data.digits import Digits, bounce, read_idx


def draw(count: int) -> np.ndarray:
    """uint8 (count, 28, 28): squares, each of its own brightness."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 6:22, 6:22] = np.linspace(100, 250, count).astype(np.uint8)[:, None, None]
    return images


def write_idx(file: Path, values: np.ndarray) -> None:
    data = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count, end in (("train", 20, ""), ("t10k", 10, ".gz")):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{end}", draw(count))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{end}", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_a_clip_follows_from_seed_and_index(folder: Path) -> None:
    digits = Digits(folder)
    indices = digits.indices("train", 5)
    clips = digits.render(indices, (64, 48), 6)
    assert clips.frames.shape == (5, 6, 3, 64, 48)
    assert clips.frames.dtype == torch.uint8
    for i in range(5):
        alone = digits.render([int(indices[i])], (64, 48), 9)
        assert torch.equal(alone.frames[0, :6], clips.frames[i])
        assert torch.equal(alone.labels["digits"][0], clips.labels["digits"][i])
        a, b = clips.labels["digits"][i].tolist()
        assert digits.captions(indices)[i] == f"the digits {a} and {b} moving"
    assert not torch.equal(Digits(folder, seed=1).render(indices, (64, 48), 6).frames, clips.frames)


def test_the_test_split_shows_digits_of_its_own(folder: Path) -> None:
    digits = Digits(folder)
    train, test = (digits.render(digits.indices(split, 40), (64, 64), 1) for split in ("train", "test"))
    assert not set(digits.indices("train", 40).tolist()) & set(digits.indices("test", 40).tolist())
    # the brightest square is of the last image: 250 in both, the second brightest is not
    assert {int(clip.max()) for clip in train.frames} - {int(clip.max()) for clip in test.frames}
    with pytest.raises(ValueError, match="split 'all' is not one of train, validation, test"):
        digits.indices("all", 1)


def test_digits_stay_inside_and_turn_at_walls() -> None:
    generator = torch.Generator().manual_seed(0)
    rolls = torch.rand(64, 102, 2, 2, generator=generator, dtype=torch.float64)
    paths = bounce(rolls, torch.tensor((32, 16)), fastest=4)
    assert paths.shape == (64, 100, 2, 2)
    assert paths.amin((0, 1, 2)).tolist() == [0, 0]
    assert paths.amax((0, 1, 2)).tolist() == [32, 16]
    speeds = paths.diff(dim=1)
    assert speeds.abs().max() == 4
    # between walls nothing changes speed
    free = ((paths > 4) & (paths < torch.tensor((28, 12)))).all(-1)[:, 1:-1]
    assert torch.equal(speeds[:, :-1][free], speeds[:, 1:][free])


def test_the_npm_package_holds_out_the_last_of_each_digit(tmp_path: Path) -> None:
    place = tmp_path / "src" / "digits"
    place.mkdir(parents=True)
    for digit in range(10):
        values = np.full((101, 784), digit / 10)
        (place / f"{digit}.json").write_text(json.dumps({"data": values.ravel().tolist()}))
    digits = Digits(tmp_path)
    assert digits.render(digits.indices("train", 3), (64, 64), 2).frames.any()
    (place / "3.json").write_text('{"data": [1, 2]}')
    with pytest.raises(ValueError, match=r"3\.json is not .*28x28 values"):
        Digits(tmp_path)


def test_folders_without_digits_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither train-images"):
        Digits(tmp_path)


def test_small_frames_have_no_room(folder: Path) -> None:
    with pytest.raises(ValueError, match="size 12x64 is too small"):
        Digits(folder).render([0], (64, 12))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00\x08\x01",
        bytes((0, 0, 8, 1)) + np.array([5], ">u4").tobytes() + b"1234",
        bytes((0, 0, 8, 2)) + np.array([2, 2], ">u4").tobytes() + b"1234",
        bytes((0, 0, 13, 1)) + np.array([4], ">u4").tobytes() + b"1234",
    ],
)
def test_other_files_are_no_idx(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "labels"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="is not an IDX file of bytes in 1 dimensions"):
        read_idx(file, 1)


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "labels.gz"
    file.write_bytes(gzip.compress(b"1234" * 99)[:20])
    with pytest.raises(ValueError, match="is not readable"):
        read_idx(file, 1)
