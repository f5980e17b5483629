"""Files of a training run that survive a kill: the new one is whole, or the old one stays.

One process writes checkpoint.safetensors; several write checkpoint-STEP/, a file of shards each, as
PyTorch's distributed checkpoint has them. Any number of processes reads either.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import IO, Any

from torch import Tensor

from cmdgen.files import parse_json, publish, read_bytes, read_json, replace_with, temporary_folder, write_json
from cmdgen.training.distributed import ALONE, Ranks
from cmdgen.weights import read_tensors, save_tensors

NAME, STATE = "checkpoint.safetensors", "state.json"
# bytes of a log: a million lines
_MOST_LOG = 2**28


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its state, and the shapes of its tensors."""

    path: Path
    state: dict[str, Any]
    shapes: dict[str, list[int]]
    # of one process, memory-mapped
    tensors: dict[str, Tensor] | None = None

    def copy_to(self, tensors: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
        """Replace the values of tensors of these shapes, of which several processes hold shards."""
        if self.tensors is not None and ranks.world == 1:
            for name, tensor in tensors.items():
                tensor.copy_(self.tensors[name])
            return
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load

        folder = self.path if self.path.is_dir() else self.path.parent
        with warnings.catch_warnings():
            # that one process reads it is meant
            warnings.simplefilter("ignore")
            reader = HuggingFaceStorageReader(str(folder))
            load(tensors, storage_reader=reader, process_group=ranks.group, no_dist=ranks.world == 1)


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write what one process holds, and what is plain JSON."""
    save_tensors(folder / NAME, tensors, metadata={"state": json.dumps(state)})
    _remove_others(folder, folder / NAME)


def save_shards(
    folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks, *, background: bool
) -> Future[None]:
    """Write what each of several processes holds, one folder in all; nothing is there before it is whole.

    In the background, what is written is a copy. The future ends when all is on the disk.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save, save

    target, stack = folder / f"checkpoint-{state['step']:09d}", ExitStack()
    place = None
    if ranks.leads and not target.exists():
        place = stack.enter_context(temporary_folder(folder)) / target.name
        place.mkdir()
    place = ranks.agree(place)
    done: Future[None] = Future()
    if place is None:
        done.set_result(None)
        return done
    arguments: dict[str, Any] = {
        "storage_writer": HuggingFaceStorageWriter(str(place), save_distributed=True),
        "process_group": ranks.group,
    }
    written: Future[Any] | None = async_save(tensors, **arguments) if background else None  # type: ignore[assignment]
    if not background:
        save(tensors, **arguments)

    def finish() -> None:
        with stack:
            if written is not None:
                written.result()
            if ranks.leads:
                files = {path.name: _hash(path) for path in sorted(place.glob("*.safetensors"))}
                write_json(place / STATE, state | {"files": files})
                publish({place: target})
                _remove_others(folder, target)

    if background:
        return _in_thread(finish)
    finish()
    # nobody goes on, and is killed, before it has its name
    ranks.agree(None)
    done.set_result(None)
    return done


def _in_thread(function: Callable[[], None]) -> Future[None]:
    thread = ThreadPoolExecutor(1)
    future = thread.submit(function)
    thread.shutdown(wait=False)
    return future


def _remove_others(folder: Path, newest: Path) -> None:
    for path in (folder / NAME, *folder.glob("checkpoint-*")):
        if path != newest:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load_checkpoint(folder: Path, ranks: Ranks = ALONE) -> Checkpoint | None:
    """Read the newest checkpoint, or None where there is none; of several files each process checks some.

    Raises ValueError where it is damaged, or is of a version that pickled.
    """
    path, pickled = folder / NAME, folder / "checkpoint.pt"
    checkpoints = []
    try:
        for path in folder.glob("checkpoint-*"):
            checkpoints.append(_read_shards(path, ranks))
        if (path := folder / NAME).exists():
            tensors, metadata = read_tensors(path)
            shapes = {name: [*tensor.shape] for name, tensor in tensors.items()}
            checkpoints.append(Checkpoint(path, parse_json(metadata.get("state", "")), shapes, tensors))
    except ValueError as error:
        raise ValueError(f"{path} is not a readable checkpoint: use --restart ({error})") from error
    if pickled.exists() and not checkpoints:
        raise ValueError(f"{pickled} is pickled, as an earlier version did: use --restart, or go on with that version")
    # a kill may have left an older one beside the newest
    return max(checkpoints, key=lambda one: step if type(step := one.state.get("step")) is int else 0, default=None)


def _read_shards(path: Path, ranks: Ranks) -> Checkpoint:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    state = read_json(path / STATE)
    files = state.pop("files", None)
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if not isinstance(files, dict) or sorted(files) != names:
        raise ValueError(f"its {STATE} names other files than there are")
    for name in names[ranks.rank :: ranks.world]:
        if _hash(path / name) != files[name]:
            raise ValueError(f"{name} is damaged: its digest is another one")
    tensors = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    # bytes that are no tensors are none of ours
    shapes = {name: [*getattr(tensor, "size", ())] for name, tensor in tensors.items()}
    return Checkpoint(path, state, shapes)


def check_origin(path: Path, expected: dict[str, Any], got: Any) -> None:
    """Raise ValueError where a checkpoint is of other data, another seed and so on than the run."""
    for name, value in expected.items():
        if not isinstance(got, dict) or got.get(name) != value:
            other = got.get(name) if isinstance(got, dict) else got
            shown = f"{name} {short(other)}" if isinstance(value, int) else f"another {name}"
            raise ValueError(f"{path} was trained with {shown}: repeat the former command, or use --restart")


class Log:
    """JSON lines, flushed one by one; opening it at a step removes the lines after that step.

    Without a path, as where another process leads, nothing is written.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.file: IO[str] | None = None
        if path is None:
            return
        lines = read_bytes(path, _MOST_LOG).splitlines(keepends=True) if path.exists() else []
        with replace_with(path) as temporary:
            temporary.write_bytes(b"".join(line for line in lines if _is_until(line, step)))
        # line-buffered
        self.file = path.open("a", buffering=1)

    def write(self, record: dict[str, float]) -> None:
        """Append one record; six significant digits."""
        if self.file is None:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in record.items()}
        self.file.write(json.dumps({**rounded, "step": int(record["step"])}) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def _is_until(line: bytes, step: int) -> bool:
    """Return whether a line is a record until `step`: a killed run leaves half a line."""
    with suppress(ValueError):
        record = parse_json(line, finite=False)
        return line.endswith(b"\n") and type(record.get("step")) is int and record["step"] <= step
    return False
