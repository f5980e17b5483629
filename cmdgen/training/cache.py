"""Encoded clips on disk: shards that are written once and memory-mapped row by row.

One mechanism for frames -> latents by the VAE and latents -> (content, motion) by the CMD
autoencoder. A cache's name is a hash of everything it depends on: other weights, data or sizes make
another cache.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from cmdgen.headers import open_weights
from cmdgen.training.config import Report
from cmdgen.weights import read_tensors, save_tensors

# rows of a file: 64 MB of latents at 512x1024
SHARD = 64
# files that one tensor's reader keeps mapped: a process may have 65,530 maps
_OPEN = 4096


def fingerprint(weights: list[Path], *more: str) -> str:
    """Return a hex digest of files of weights and of what else an encoding depends on."""
    digest = hashlib.blake2b("\n".join(more).encode(), digest_size=8)
    for path in weights:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


class Rows:
    """One tensor of an encoding, (N, ...) float16, on disk until its rows are read."""

    def __init__(self, place: Path, name: str, count: int, shard: int) -> None:
        self.shard = shard
        self.paths = [_path(place, start) for start in range(0, count, shard)]
        # mapped, not read: memory holds what was gathered, and whatever pages there is room for
        self.map = lru_cache(_OPEN)(lambda i: _load(self.paths[i], name)[name])
        self.shape = (count, *self.map(0).shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(B,) int64 -> (B, ...) float16."""
        return torch.stack([self.map(row // self.shard)[row % self.shard] for row in rows.tolist()])


def fill(
    place: Path,
    count: int,
    encode: Callable[[range], dict[str, Tensor]],
    report: Report,
    *,
    step: int,
    shard: int = SHARD,
) -> None:
    """Encode the rows 0 .. count - 1 that a folder lacks, at most `step` at once.

    However it ends, whole steps are kept, and rows on disk are not encoded again.
    """
    phase = f"encode {place.name.rpartition('-')[0]}"
    for start in range(0, count, shard):
        path, stop = _path(place, start), min(start + shard, count)
        filled = _rows(path)
        # a whole shard is not read here
        parts = [_load(path)] if 0 < filled < stop - start else []
        try:
            for first in range(start + filled, stop, step):
                report(phase, first, count, {})
                encoded = encode(range(first, min(first + step, stop)))
                halves = {name: tensor.half().cpu() for name, tensor in encoded.items()}
                for name, tensor in halves.items():
                    if not tensor.isfinite().all():
                        raise ValueError(f"clip {first} or one of the next {step} is encoded to {name} with NaN or inf")
                parts.append(halves)
        finally:
            if len(parts) > (filled > 0):
                tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                save_tensors(path, tensors, metadata={"rows": _origin(path)})
    report(phase, count, count, {})


def read(place: Path, names: tuple[str, ...], count: int, *, shard: int = SHARD) -> dict[str, Rows]:
    """Return rows 0 .. count - 1 of each tensor; raise ValueError where the folder lacks some."""
    for start in range(0, count, shard):
        filled = _rows(_path(place, start))
        if filled < min(shard, count - start):
            raise ValueError(f"{place} holds {start + filled} of {count} clips")
    return {name: Rows(place, name, count, shard) for name in names}


def remove_others(place: Path) -> None:
    """Remove caches of the same kind beside this one: encodings of former weights or data."""
    for other in place.parent.glob(f"{place.name.rpartition('-')[0]}-*"):
        if other != place:
            shutil.rmtree(other)


def _path(place: Path, start: int) -> Path:
    return place / f"{start:09d}.safetensors"


def _origin(path: Path) -> str:
    """Return what a shard holds: the cache's name is a hash of all else that it depends on."""
    return f"{path.parent.name} {path.stem}"


def _rows(path: Path) -> int:
    """Return how many rows a shard holds, by its header."""
    if not path.exists():
        return 0
    with _removable(), open_weights(path) as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return min((shape[0] if shape else 0 for shape in shapes), default=0)


def _load(path: Path, *names: str) -> dict[str, Tensor]:
    """Read a shard that holds tensors of these names."""
    with _removable():
        tensors, metadata = read_tensors(path)
        if metadata.get("rows") != _origin(path) or not tensors.keys() >= {*names}:
            raise ValueError(f"{path} is of another cache")
    return tensors


@contextmanager
def _removable() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}: remove it, and it is made again") from error
