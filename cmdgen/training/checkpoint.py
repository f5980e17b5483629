"""Files of a training run that survive a kill: the new one is whole, or the old one stays."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from cmdgen.files import replace_with


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values."""
    with replace_with(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what save_checkpoint wrote, memory-mapped, without running code from the file."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: use --restart") from error
    return state


class Log:
    """JSON lines, flushed one by one; opening it at a step removes the lines after that step."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        with replace_with(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _step(line) <= step))
        # line-buffered
        self.file = path.open("a", buffering=1)

    def write(self, record: dict[str, float]) -> None:
        """Append one record; six significant digits."""
        rounded = {name: float(f"{value:.6g}") for name, value in record.items()}
        self.file.write(json.dumps({**rounded, "step": int(record["step"])}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        # a killed run left half a line
        return float("inf")
