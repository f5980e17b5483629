"""A folder of captioned video files as a source of clips, one clip from each file."""

import json
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen.data.clips import Clips
from cmdgen.video.read import read_video

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
# of the files, chosen by name, at least one
HELD_OUT = 0.05


class Folder:
    """Videos at any depth, with captions from `captions.jsonl` or from a `.txt` beside each.

    A line of captions.jsonl is {"file": path within the folder, "caption": text or list of texts}; each line
    of a .txt is a caption.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if len(files) < 2:
            raise ValueError(
                f"{path} holds {len(files)} videos ({' '.join(SUFFIXES)}), at least 2 needed"
            )
        self.names = [str(file.relative_to(path)) for file in files]
        self.texts = _captions(path, self.names)
        self.key = " ".join(
            f"{name}:{stat.st_size}:{stat.st_mtime_ns}"
            for name, stat in ((name, (path / name).stat()) for name in self.names)
        )
        order = sorted(range(len(files)), key=lambda i: crc32(self.names[i].encode()))
        held_out = max(1, int(HELD_OUT * len(files)))
        self.splits = {"test": sorted(order[:held_out]), "train": sorted(order[held_out:])}

    def indices(self, split: str, count: int) -> Tensor:
        """At most `count` files of "train" or "test"."""
        if split not in self.splits:
            raise ValueError(f"split {split!r} is not one of train, test")
        return torch.tensor(self.splits[split][:count])

    def captions(self, indices: Tensor | Sequence[int], variant: int = 0) -> list[str]:
        """One caption each; `variant` picks among several."""
        texts = [self.texts[i] for i in torch.as_tensor(indices).tolist()]
        return [choices[variant % len(choices)] for choices in texts]

    def render(
        self,
        indices: Tensor | Sequence[int],
        size: tuple[int, int],
        frames: int = 16,
        device: str = "cpu",
        variant: int = 0,
    ) -> Clips:
        """(B,) -> `frames` consecutive frames from somewhere in each file, cut and scaled to `size`."""
        clips = [self._read(i, size, frames) for i in torch.as_tensor(indices).tolist()]
        return Clips(torch.stack(clips).to(device), None, self.captions(indices, variant))

    def _read(self, index: int, size: tuple[int, int], frames: int) -> Tensor:
        path = self.path / self.names[index]
        pixels, _ = read_video(path)
        if len(pixels) < frames:
            raise ValueError(f"{path} has {len(pixels)} frames, {frames} are needed")
        start = crc32(self.names[index].encode()) % (len(pixels) - frames + 1)
        video = torch.from_numpy(pixels[start : start + frames].copy()).permute(0, 3, 1, 2)
        height, width = video.shape[-2:]
        # the largest part in the middle that has the wanted shape
        scale = min(height / size[0], width / size[1])
        tall, wide = round(size[0] * scale), round(size[1] * scale)
        top, left = (height - tall) // 2, (width - wide) // 2
        part = video[..., top : top + tall, left : left + wide].float()
        scaled = F.interpolate(part, size, mode="bilinear", antialias=True)
        return scaled.round().clamp(0, 255).to(torch.uint8)


def _captions(folder: Path, names: list[str]) -> list[list[str]]:
    """The captions of every file, at least one."""
    found: dict[str, list[str]] = {}
    listing = folder / "captions.jsonl"
    if listing.is_file():
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                caption = entry["caption"]
                found[entry["file"]] = [caption] if isinstance(caption, str) else list(caption)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{listing}, line {number}: expected {{"file": ..., "caption": ...}}'
                ) from error
    for name in names:
        beside = (folder / name).with_suffix(".txt")
        if name not in found and beside.is_file():
            lines = beside.read_text(encoding="utf-8").splitlines()
            found[name] = [line.strip() for line in lines if line.strip()]
        if not found.get(name):
            raise ValueError(f"{folder / name} has no caption in captions.jsonl or {beside.name}")
    return [found[name] for name in names]
