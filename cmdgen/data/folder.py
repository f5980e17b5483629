"""A folder of video files with captions: captions.jsonl, or a .txt of the same name beside each."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

from cmdgen.data.clips import Clips
from cmdgen.video.read import read_video

_CAPTIONS = "captions.jsonl"
_SUFFIXES = (".mp4", ".m4v", ".webm", ".mov", ".mkv", ".avi", ".gif")
# one video in so many belongs to the test split, by a hash of its name
_TEST_EVERY = 10


@dataclass(frozen=True)
class _Entry:
    file: Path
    caption: str


class VideoFolder:
    """Captioned video files by number; a clip is the beginning of its file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder")
        listed = self.path / _CAPTIONS
        self._entries = list(_listed(listed) if listed.is_file() else _beside(self.path))
        if not self._entries:
            raise ValueError(f"{self.path} holds no video ({', '.join(_SUFFIXES)})")
        names = [entry.file.relative_to(self.path.resolve()).as_posix() for entry in self._entries]
        order = sorted(names, key=lambda name: (crc32(name.encode()), name))
        test = set(order[: len(set(names)) // _TEST_EVERY])
        self._test = torch.tensor([name in test for name in names])

    def __len__(self) -> int:
        return len(self._entries)

    def indices(self, split: str, count: int) -> Tensor:
        """-> (N,) int64: at most `count` of "train", or of "test", every tenth file."""
        if split not in ("train", "test"):
            raise ValueError(f"split {split!r} is not one of train, test")
        chosen = self._test if split == "test" else ~self._test
        return chosen.nonzero()[:count, 0]

    def captions(self, indices: Tensor | Sequence[int], variant: int = 0) -> list[str]:
        """The captions as written: a folder has no other wording for any variant."""
        return [self._entries[i].caption for i in torch.as_tensor(indices).tolist()]

    def render(
        self,
        indices: Tensor | Sequence[int],
        size: tuple[int, int],
        frames: int = 16,
        device: str = "cpu",
        variant: int = 0,
    ) -> Clips:
        """(B,) -> clips of `size` (height, width): the middle of every frame, resized."""
        clips = [
            _read(self._entries[i].file, size, frames) for i in torch.as_tensor(indices).tolist()
        ]
        video = torch.stack(clips) if clips else torch.empty(0, frames, 3, *size, dtype=torch.uint8)
        return Clips(video.to(device), None, self.captions(indices, variant))


def _listed(listed: Path) -> Iterator[_Entry]:
    """Entries of captions.jsonl; ValueError naming the line for whatever is wrong with one."""
    root = listed.parent.resolve()
    for number, line in enumerate(_text(listed).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{listed} line {number}"
        try:
            row = json.loads(line)
        # a RecursionError is what a thousand brackets give
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {line[:40]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f'{where}: got {line[:40]!r}, expected {{"file": ..., "caption": ...}}'
            )
        for key in ("file", "caption"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{where}: {key!r} is missing, empty or not text")
        if "\0" in row["file"]:
            raise ValueError(f"{where}: the file name {row['file']!r} is none")
        file = (root / row["file"]).resolve()
        if not file.is_relative_to(root):
            raise ValueError(f"{where}: {row['file']!r} lies outside the folder")
        if not file.is_file():
            raise ValueError(f"{where}: {row['file']!r} does not exist")
        yield _Entry(file, " ".join(row["caption"].split()))


def _beside(folder: Path) -> Iterator[_Entry]:
    """Entries of the videos that lie in the folder, each with its own .txt."""
    root = folder.resolve()
    for file in sorted(root.iterdir()):
        if file.suffix.lower() not in _SUFFIXES:
            continue
        if not file.resolve().is_relative_to(root):
            raise ValueError(f"{file} is a link out of the folder")
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"{file} has no caption: neither {_CAPTIONS} nor {text.name} exists")
        caption = " ".join(_text(text).split())
        if not caption:
            raise ValueError(f"{text} is empty")
        yield _Entry(file, caption)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text") from error


def _read(file: Path, size: tuple[int, int], frames: int) -> Tensor:
    """-> (T, 3, H, W) uint8: the first `frames` frames, cropped in the middle and resized."""
    pixels, _ = read_video(file, max_frames=frames)
    if len(pixels) < frames:
        raise ValueError(f"{file} has {len(pixels)} frames, fewer than {frames}")
    video = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)  # (T, 3, h, w)
    tall, wide = video.shape[-2:]
    scale = min(tall / size[0], wide / size[1])
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (tall - height) // 2, (wide - width) // 2
    video = video[..., top : top + height, left : left + width].float()
    if (height, width) != tuple(size):
        video = F.interpolate(video, size=size, mode="bilinear", antialias=True)
    return video.round().clamp(0, 255).to(torch.uint8)
