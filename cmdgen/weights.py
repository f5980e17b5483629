"""Weights as safetensors files: checked, memory-mapped, sharded, hashed.

Files are untrusted: whatever is wrong is one line of ValueError that names the file. What is
written appears whole or not at all.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cmdgen.files import check_file, replace_with, user_folder
from cmdgen.headers import FLOATS, open_weights, weight_paths
from cmdgen.schema import Folder

_INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_DTYPES = {getattr(torch, name): stored for stored, name in (FLOATS | _INTEGERS).items()}
# tensors that are copied before their file is mapped anew
_AT_ONCE = 8
# bytes of a hash, and of so few weights that hashing them takes a moment
_DIGEST, HASHED_AT_ONCE = 16, 2**26
# a stored tensor's name -> the module's, or None for a tensor that is skipped
Rename = Callable[[str], str | None]
C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)


def load_weights(
    module: nn.Module,
    folder: Folder,
    filename: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rename: Rename = str,
) -> None:
    """Replace all tensors of a module, maybe on the meta device, by those of a safetensors file.

    `dtype` None keeps the module's own; filters of convolutions become channels-last. On a CPU a
    tensor in the right dtype and layout is not read but mapped; others are copied. `rename` maps a
    stored name to the module's, or to None for a tensor that is skipped. diffusers' "fp16" variant
    and shards are found too. A digest in a header, as `save_tensors` writes it, is checked where the
    file is small enough for that to take a moment.
    """
    expected, state = module.state_dict(), {}
    for path, names in match_weights(expected, folder, filename, rename).items():
        if path.stat().st_size < HASHED_AT_ONCE:
            read_tensors(path, foreign=True)
        dtypes = {stored: dtype or expected[name].dtype for stored, name in names.items()}
        for stored, tensor in _read_tensors(path, dtypes, device):
            state[names[stored]] = tensor
    module.load_state_dict(state, assign=True)
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer was left without values"


def match_weights(
    expected: Mapping[str, torch.Tensor], folder: Folder, filename: str, rename: Rename = str
) -> dict[Path, dict[str, str]]:
    """Map the names of stored tensors to the expected ones, by file; nothing is read but headers.

    ValueError names a tensor that is missing, unknown, or of another shape or kind.
    """
    paths = weight_paths(Path(folder), filename)
    matched = {path: _match_file(path, expected, rename) for path in paths}
    stored = {name for names in matched.values() for name in names.values()}
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{paths[0]}: tensor {missing[0]}{more} is missing")
    return matched


def _match_file(path: Path, expected: Mapping[str, torch.Tensor], rename: Rename) -> dict[str, str]:
    names = {}
    with open_weights(path) as file:
        for stored in file.keys():  # noqa: SIM118
            name = rename(stored)
            if name is None:
                continue
            if name not in expected:
                raise ValueError(f"{path}: tensor {short(stored)} is not part of the model")
            shape, needed = file.get_slice(stored).get_shape(), list(expected[name].shape)
            if shape != needed:
                raise ValueError(f"{path}: {name} has shape {shape}, expected {needed}")
            kind = file.get_slice(stored).get_dtype()
            if kind not in FLOATS and expected[name].is_floating_point():
                raise ValueError(f"{path}: {name} has type {kind}, not one of {', '.join(FLOATS)}")
            names[stored] = name
    return names


def _read_tensors(
    path: Path, dtypes: dict[str, torch.dtype], device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors of a file in these dtypes, filters channels-last."""
    names = list(dtypes)
    with open_weights(path, "cpu") as mapped:
        for start in range(0, len(names), _AT_ONCE):
            # closing the file unmaps the tensors that were copied from it
            with open_weights(path, device) as file:
                for name in names[start : start + _AT_ONCE]:
                    read = file.get_tensor(name)
                    layout = torch.channels_last if read.ndim == 4 else torch.preserve_format
                    tensor = read.to(dtypes[name], memory_format=layout)
                    stays = tensor is read and read.device.type == "cpu"
                    yield name, mapped.get_tensor(name) if stays else tensor


def save_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> None:
    """Write tensors, floating ones cast to `dtype`, to a safetensors file.

    Its header holds `metadata` and a digest of all, which `read_tensors` checks. Raises OSError,
    naming the file, where the disk does not take it, FileExistsError unless `overwrite`.
    """
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    metadata = {"format": "pt", **(metadata or {})}
    entries: dict[str, Any] = {"__metadata__": metadata | {"digest": _digest(state, metadata)}}
    end = 0
    # by size of elements, so that all are aligned
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))
    for name in names:
        start, end = end, end + state[name].nbytes
        kind = {"dtype": _DTYPES[state[name].dtype], "shape": list(state[name].shape)}
        entries[name] = kind | {"data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    # the library's own writer puts metadata in another order each time
    with replace_with(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            file.write(_bytes(state[name]))


def read_tensors(
    path: Path, *, foreign: bool = False, hashed: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a file that `save_tensors` wrote: its tensors, memory-mapped, and its metadata.

    ValueError names a file that is missing, damaged or, unless it may be `foreign`, without a digest.
    Unless it is `hashed`, that the tensors have this digest is taken on trust, and they are not read.
    """
    with open_weights(path, "cpu") as file:
        header: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = header.pop("digest", None)
    if digest is None and not foreign:
        raise ValueError(f"{path} is damaged: it has no digest")
    if hashed and digest is not None and digest != _digest(tensors, header):
        raise ValueError(f"{path} is damaged: its digest is another one")
    return tensors, header


def verify_weights(path: Path) -> bool:
    """Compare a file with its SHA-256, which is its name in the hub's cache, or with the digest in its header.

    False where it has neither. ValueError names a file that is damaged.
    """
    if re.fullmatch("[0-9a-f]{64}", name := path.resolve().name):
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != name:
                raise ValueError(f"{path} is damaged: remove {path.resolve()} and pull it again")
        return True
    with open_weights(path) as weights:
        has_digest = "digest" in (weights.metadata() or {})
    if has_digest:
        read_tensors(path)
    return has_digest


def _digest(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """Return a hash of names, types, shapes and bytes of tensors, and of their metadata."""
    kinds = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    text = json.dumps([dict(header), kinds], sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST)
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device its `normal_` would import torch's compiler first."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build_empty(build: Callable[[C], M], config: C) -> M:
    """Build a module on the meta device: its names and shapes, no values and no memory."""
    with torch.device("meta"), _NoInitialisation():
        return build(config)


def hash_weights(folder: Folder, files: Mapping[str, str]) -> str:
    """Hash the weights of a folder with BLAKE2b: `files` maps its parts to names of files.

    The hash of large files is kept in the user's cache for as long as their sizes and times stay.
    ValueError names a file that cannot be read.
    """
    folder = Path(folder).resolve()
    paths = [
        path for part in sorted(files) if (folder / part).is_dir() for path in weight_paths(folder / part, files[part])
    ]
    for path in paths:
        check_file(path)
    try:
        state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        note = None
        if sum(size for _, size, _ in state) >= HASHED_AT_ONCE:
            key = hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
            note = user_folder("cache") / "weights" / key
        if note is not None and note.is_file():
            kept = note.read_text(errors="replace")
            if re.fullmatch(f"[0-9a-f]{{{2 * _DIGEST}}}", kept):
                return kept
        total = hashlib.blake2b(digest_size=_DIGEST)
        for path in paths:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST))
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + digest.digest())
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    if note is not None:
        # without a writable cache nothing is kept
        with suppress(OSError), replace_with(note) as temporary:
            temporary.write_text(total.hexdigest())
    return total.hexdigest()
