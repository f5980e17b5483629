"""Files of weights by their names and headers; never imports torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from cmdgen.files import check_file, read_json

if TYPE_CHECKING:
    import torch

# types that weights are stored in
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@contextmanager
def open_weights(path: Path, device: "torch.device | str | None" = None) -> Iterator[safe_open]:
    """Give an open safetensors file whose tensors go to `device`; None reads its header alone.

    ValueError names a file that is missing or damaged.
    """
    check_file(path)
    try:
        with safe_open(path, framework="np" if device is None else "pt", device=str(device or "cpu")) as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"{path}: No such file or directory") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({str(error)[:200]})") from error


def weight_names(filename: str) -> tuple[list[str], dict[str, str]]:
    """Return the names that a part's weights may have in one file, and those of a shard index with its shards'."""
    variant = f"{filename.removesuffix('.safetensors')}.fp16.safetensors"
    indices = {f"{name}.index.json": name for name in (filename, variant)}
    # diffusers has named the index of a variant in two ways
    return [filename, variant], indices | {f"{filename}.index.fp16.json": variant}


def weight_paths(folder: Path, filename: str) -> list[Path]:
    """Return the files that hold a part's weights: one, its "fp16" variant or its shards.

    Where there are none, that is the one file that is missing.
    """
    names, indices = weight_names(filename)
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
    index = next((folder / name for name in indices if (folder / name).is_file()), None)
    if index is None:
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"{folder}: the weights are pickled, and reading those could run any code: expected {filename}"
            )
        return [folder / filename]
    shards = read_json(index).get("weight_map")
    files = shards.values() if isinstance(shards, dict) else [None]
    if not all(isinstance(name, str) and name and name == Path(name).name for name in files):
        raise ValueError(f"{index}: weight_map does not map tensors to names of files in the folder")
    return [folder / name for name in sorted(set(files))] or [folder / filename]
