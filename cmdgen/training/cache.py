"""Encoded clips on disk: shards that are written once and memory-mapped row by row.

One mechanism for frames -> latents by the VAE and latents -> (content, motion) by the CMD
autoencoder. A cache's name is a hash of everything it depends on: other weights, data or sizes make
another cache.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from cmdgen.files import read_json, write_json
from cmdgen.headers import open_weights
from cmdgen.options import WHOLE, Shard
from cmdgen.training.config import Report
from cmdgen.weights import HASHED_AT_ONCE, read_tensors, save_tensors

# rows of a file: 64 MB of latents at 512x1024
ROWS = 64
# most seconds of encoding that a kill may cost
_KEEP = 300.0
# bytes of an index: a million files
_MOST_INDEX = 2**28
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

    def __init__(self, place: Path, name: str, count: int, rows: int) -> None:
        self.rows = rows
        self.paths = [_path(place, start) for start in range(0, count, rows)]
        # mapped, not read: memory holds what was gathered, and whatever pages there is room for
        self.map = lru_cache(_OPEN)(lambda i: _load(self.paths[i], name)[name])
        self.shape = (count, *self.map(0).shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(B,) int64 -> (B, ...) float16."""
        return torch.stack([self.map(row // self.rows)[row % self.rows] for row in rows.tolist()])


def fill(
    place: Path,
    count: int,
    encode: Callable[[range], dict[str, Tensor]],
    report: Report,
    *,
    step: int,
    rows: int = ROWS,
    shard: Shard = WHOLE,
) -> None:
    """Encode the rows 0 .. count - 1 that a folder lacks, at most `step` at once, in files of `rows`.

    However it ends, whole steps are kept, and rows on disk are not encoded again; a kill costs the last
    minutes. Of several processes each encodes the files of its `shard`. The index names whole files,
    so that nobody has to open them.
    """
    phase = f"encode {place.name.rpartition('-')[0]}"
    rows, whole = _read_index(place, rows)
    index = place / f"index-{shard.number + 1:05d}-of-{shard.of:05d}.json"
    if not index.exists():
        write_json(index, {"rows": rows, "files": []})
    for number, start in enumerate(range(0, count, rows)):
        path, stop = _path(place, start), min(start + rows, count)
        if not shard.has(number) or (filled := _count_rows(path, whole, rows)) >= stop - start:
            continue
        parts, kept = [_load(path)] if filled else [], time.monotonic()
        try:
            for first in range(start + filled, stop, step):
                report(phase, first, count, {})
                encoded = encode(range(first, min(first + step, stop)))
                halves = {name: tensor.half().cpu() for name, tensor in encoded.items()}
                for name, tensor in halves.items():
                    if not tensor.isfinite().all():
                        raise ValueError(f"clip {first} or one of the next {step} is encoded to {name} with NaN or inf")
                parts.append(halves)
                if time.monotonic() - kept > _KEEP:
                    parts, kept = [_save(path, parts)], time.monotonic()
        finally:
            if len(parts) > (filled > 0):
                _save(path, parts)
    mine = [_path(place, start) for number, start in enumerate(range(0, count, rows)) if shard.has(number)]
    names = [path.name for path in mine if _count_rows(path, whole, rows) == rows]
    if not whole.issuperset(names):
        write_json(index, {"rows": rows, "files": names})
    report(phase, count, count, {})


def read(place: Path, names: tuple[str, ...], count: int) -> dict[str, Rows]:
    """Return rows 0 .. count - 1 of each tensor; raise ValueError where the folder lacks some."""
    rows, whole = _read_index(place)
    starts = range(0, count, rows)
    filled = sum(min(rows, count - start, _count_rows(_path(place, start), whole, rows)) for start in starts)
    if filled < count:
        raise ValueError(f"{place} holds {filled} of {count} clips")
    return {name: Rows(place, name, count, rows) for name in names}


def _read_index(place: Path, rows: int = ROWS) -> tuple[int, set[str]]:
    """Return the rows of each file, `rows` in a new folder, and the names of files that hold so many."""
    names: set[str] = set()
    paths = sorted(place.glob("index-*.json"))
    if not paths and _path(place, 0).exists():
        # an earlier version had no index
        return ROWS, names
    for path in paths:
        index = read_json(path, limit=_MOST_INDEX)
        files, in_file = index.get("files"), index.get("rows")
        if not (isinstance(files, list) and all(isinstance(name, str) for name in files)):
            raise ValueError(f"{path}: files is not a list of names: remove it, and it is made again")
        if type(in_file) is not int or not 0 < in_file < 2**32 or (path != paths[0] and in_file != rows):
            raise ValueError(
                f"{path}: rows {in_file} is not the number of rows of a file: remove it, and it is made again"
            )
        rows, names = in_file, names | {*files}
    return rows, names


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


def _count_rows(path: Path, whole: set[str], rows: int) -> int:
    """Return how many rows a file holds, by its header unless it is one of the whole ones."""
    if not path.exists():
        return 0
    if path.name in whole:
        return rows
    with _removable(), open_weights(path) as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return min((shape[0] if shape else 0 for shape in shapes), default=0)


def _load(path: Path, *names: str) -> dict[str, Tensor]:
    """Map a file that holds tensors of these names; the digest of a large one, read row by row, is not checked."""
    with _removable():
        tensors, metadata = read_tensors(path, hashed=path.stat().st_size <= HASHED_AT_ONCE)
        if metadata.get("rows") != _origin(path) or not tensors.keys() >= {*names}:
            raise ValueError(f"{path} is of another cache")
    return tensors


def _save(path: Path, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    save_tensors(path, tensors, metadata={"rows": _origin(path)})
    return tensors


@contextmanager
def _removable() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}: remove it, and it is made again") from error
