"""Files that appear whole or not at all, and untrusted files that are read with care."""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import Any

# bytes of a text file: the largest tokenizer has a fifth of it
MOST_TEXT = 2**24


@contextmanager
def replace_with(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; the file written there becomes `path`.

    It does so if the block ends well. A symlink stays, and the file it points to is replaced.
    Raises FileExistsError where `path` exists at the end, unless `overwrite`.
    """
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(place)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors replaces the file by one that only its owner can read
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        move_file(temporary, place, overwrite=overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def move_file(source: Path, target: Path, *, overwrite: bool = True) -> None:
    """Rename a file on its disk; raise FileExistsError where `target` exists, unless `overwrite`.

    Without `overwrite`, `source` may stay as a second name of the file.
    """
    if not overwrite:
        try:
            # unlike a rename, this fails where the target exists
            os.link(source, target)
            return
        except FileExistsError:
            raise kept(target) from None
        except OSError:
            # the file system has no hard links
            if os.path.lexists(target):
                raise kept(target) from None
    os.replace(source, target)


def kept(path: Path) -> FileExistsError:
    """Return the error that says that a file exists and may not be replaced."""
    return FileExistsError(f"{path} exists: give another name, or overwrite it")


@contextmanager
def create_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder, which becomes `path` if the block ends well.

    Raises ValueError where `path` exists, or where its parent does not.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already: give another folder")
    place = path.absolute()
    if not place.parent.is_dir():
        raise ValueError(f"folder {place.parent} does not exist")
    temporary = _hidden(place)
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_file(path: Path) -> None:
    """Raise ValueError for a folder, and for a device or pipe, which may never end.

    A missing file passes: opening it says so.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")


def read_text(path: Path, limit: int = MOST_TEXT) -> str:
    """Read a UTF-8 file of at most `limit` bytes; ValueError names one that is anything else."""
    try:
        check_file(path)
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if len(data) > limit:
        raise ValueError(f"{path}: larger than {limit // 2**20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from error


def parse_json(text: str | bytes, *, finite: bool = True) -> dict[str, Any]:
    """Parse one JSON object from untrusted text.

    Raises ValueError for anything else, a repeated key, deep nesting, a lone surrogate, and,
    where numbers must be `finite`, for NaN and inf.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    check = _finite if finite else None
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=check, parse_float=check)
        if "\\ud" in text.lower():
            # a lone surrogate has no encoding
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("text is not valid UTF-8") from error
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    if not isinstance(data, dict):
        raise ValueError(f"{short(data)} is not a JSON object")
    return data


def read_json(path: Path, *, limit: int = MOST_TEXT, finite: bool = True) -> dict[str, Any]:
    """Read one JSON object from an untrusted file; ValueError names the file."""
    text = read_text(path, limit)
    try:
        return parse_json(text, finite=finite)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an object to a JSON file, keys in order."""
    with replace_with(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _hidden(path: Path) -> Path:
    """Return a free name beside `path`, with the same suffix: encoders choose by it."""
    return path.with_name(f".cmdgen-{os.urandom(8).hex()}{path.suffix}")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {short(twice)} is repeated")
    return data
