"""Files of a training run that survive a kill: the new one is whole, or the old one stays."""

import json
from contextlib import suppress
from pathlib import Path
from reprlib import repr as short
from typing import Any

from torch import Tensor

from cmdgen.files import parse_json, read_bytes, replace_with
from cmdgen.weights import read_tensors, save_tensors

NAME = "checkpoint.safetensors"
# bytes of a log: a million lines
_MOST_LOG = 2**28


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors, and what is plain JSON."""
    save_tensors(folder / NAME, tensors, metadata={"state": json.dumps(state)})


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read what save_checkpoint wrote, memory-mapped, or None where there is none.

    Raises ValueError where it is damaged, or is of a version that pickled.
    """
    path, pickled = folder / NAME, folder / "checkpoint.pt"
    if pickled.exists() and not path.exists():
        raise ValueError(f"{pickled} is pickled, as an earlier version did: use --restart, or go on with that version")
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
        return tensors, parse_json(metadata.get("state", ""))
    except ValueError as error:
        raise ValueError(f"{path} is not a readable checkpoint: use --restart ({error})") from error


def check_origin(path: Path, expected: dict[str, Any], got: Any) -> None:
    """Raise ValueError where a checkpoint is of other data, another seed and so on than the run."""
    for name, value in expected.items():
        if not isinstance(got, dict) or got.get(name) != value:
            other = got.get(name) if isinstance(got, dict) else got
            shown = f"{name} {short(other)}" if isinstance(value, int) else f"another {name}"
            raise ValueError(f"{path} was trained with {shown}: repeat the former command, or use --restart")


class Log:
    """JSON lines, flushed one by one; opening it at a step removes the lines after that step."""

    def __init__(self, path: Path, step: int) -> None:
        lines = read_bytes(path, _MOST_LOG).splitlines(keepends=True) if path.exists() else []
        with replace_with(path) as temporary:
            temporary.write_bytes(b"".join(line for line in lines if _is_until(line, step)))
        # line-buffered
        self.file = path.open("a", buffering=1)

    def write(self, record: dict[str, float]) -> None:
        """Append one record; six significant digits."""
        rounded = {name: float(f"{value:.6g}") for name, value in record.items()}
        self.file.write(json.dumps({**rounded, "step": int(record["step"])}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _is_until(line: bytes, step: int) -> bool:
    """Return whether a line is a record until `step`: a killed run leaves half a line."""
    with suppress(ValueError):
        record = parse_json(line, finite=False)
        return line.endswith(b"\n") and type(record.get("step")) is int and record["step"] <= step
    return False
