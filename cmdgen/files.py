"""Files that appear whole or not at all, and untrusted files that are read with care."""

import json
import math
import os
import shutil
import tempfile
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import Any

try:
    import fcntl
except ImportError:
    # Windows has none: nothing is locked there
    fcntl = None  # type: ignore[assignment]

# how the names of temporary folders begin
_HIDDEN = ".cmdgen-"
# inside them: files that are to be replaced, those that are replaced, and those that take their places
_OLD, _GONE, _NEW = ".cmdgen.old", ".cmdgen.gone", ".cmdgen.new"
# bytes of a text file: the largest tokenizer has a fifth of it
MOST_TEXT = 2**24
# how a file begins that stands for one which was not downloaded
_POINTER = b"version https://git-lfs.github.com/spec/"


def user_folder(kind: str) -> Path:
    """Return the user's folder for "data" or "cache" of cmdgen; without a home directory, one that is never there."""
    import platformdirs

    try:
        return Path(getattr(platformdirs, f"user_{kind}_path")("cmdgen"))
    except RuntimeError:
        return Path(os.devnull) / "cmdgen"


@contextmanager
def replace_with(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary path with the suffix of `path`; the file written there becomes `path`.

    It does so if the block ends well. A symlink stays, and the file it points to is replaced.
    Raises FileExistsError where `path` exists at the end, unless `overwrite`, and OSError, naming
    `path`, where the disk does not take it.
    """
    place = Path(os.path.realpath(path))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(place.parent) as folder:
            # no longer than the name that it gets
            yield (temporary := folder / place.name)
            publish({temporary: place}, overwrite=overwrite)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"{path} was not written: {error.strerror or error}") from error


@contextmanager
def create_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder, which becomes `path` if the block ends well.

    Raises ValueError where `path` exists, unless `overwrite`, or where its parent does not.
    """
    old = [path.absolute()] if os.path.lexists(path) else []
    if old and not overwrite:
        raise ValueError(f"{path} exists already: give another folder")
    place = path.absolute()
    if not place.parent.is_dir():
        raise ValueError(f"folder {place.parent} does not exist")
    try:
        with temporary_folder(place.parent) as folder:
            (temporary := folder / place.name).mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            publish({temporary: place}, old=old)
    except OSError as error:
        # what cannot be found or reached is no fault of the folder
        if type(error) not in (OSError, PermissionError):
            raise
        raise OSError(f"{path} was not written: {error.strerror or str(error).rpartition(': ')[2]}") from error


@contextmanager
def fill_folder(path: Path) -> Iterator[Path]:
    """Give a folder that exists, to replace files in it, or a temporary one as `create_folder` does."""
    if path.is_dir():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with create_folder(path) as folder:
        yield folder


@contextmanager
def temporary_folder(beside: Path | None) -> Iterator[Path]:
    """Give a hidden folder beside a file to be, or of the system; it goes when the block ends.

    It is locked for as long as its process lives; what dead processes have left there is removed.
    """
    with ExitStack() as stack:
        parent = beside or Path(tempfile.gettempdir())
        _remove_leftovers(parent)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=parent))
            # another process may take it for a leftover before it is locked
            if stack.enter_context(_lock(folder)) is not False and folder.is_dir():
                break
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


@contextmanager
def hold_folder(path: Path) -> Iterator[None]:
    """Keep a folder, made if need be, to this process; one that stays empty is removed.

    Raises OSError where another process holds it, ValueError where it is a file.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file: give a folder")
    path.mkdir(parents=True, exist_ok=True)
    with _lock(path.resolve()) as got:
        if got is False:
            raise OSError(f"{path} is in use by another cmdgen: wait for its end, or give another folder")
        for folder in {hidden.parent for hidden in path.rglob(f"{_HIDDEN}*")}:
            _remove_leftovers(folder)
        try:
            yield
        finally:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _lock(folder: Path) -> Iterator[bool | None]:
    """Lock a folder; give False where another process has, None where the system cannot."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        yield None
        return
    try:
        if fcntl is None:
            yield None
            return
        got: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # a network's file system may have no locks
            got = False if isinstance(error, BlockingIOError) else None
        yield got
    finally:
        os.close(descriptor)


@lru_cache(256)
def _remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of dead processes, once in a process; no file that had a name is lost."""
    for path in folder.glob(f"{_HIDDEN}*"):
        with _lock(path) as got:
            if got:
                # what cannot be put in its place stays here
                with suppress(OSError):
                    _recover(path)
                    shutil.rmtree(path, ignore_errors=True)


def publish(moves: Mapping[Path, Path], *, overwrite: bool = True, old: Iterable[Path] = ()) -> None:
    """Move files of a temporary folder to their names beside it, all or none, in place of the `old` ones.

    They are on the disk before their names are, and never stand beside old ones. Where the process is
    killed here, the next start in that folder puts the old files back, or all new ones in their place.
    Raises FileExistsError where a file exists, unless `overwrite`.
    """
    for source in moves:
        _sync(source)
    [temporary], targets = {source.parent for source in moves}, [*moves.values()]
    if overwrite:
        old = dict.fromkeys([*old, *(target for target in targets if os.path.lexists(target) and not target.is_dir())])
    if len(moves) == 1 and all(file in targets and not file.is_dir() for file in old):
        # one file alone is replaced or not
        [(source, target)] = moves.items()
        _move(source, target, overwrite=overwrite)
    else:
        with ExitStack() as undo:
            # `_recover` reads what a kill leaves
            (temporary / _OLD).mkdir()
            (temporary / _NEW).mkdir()
            waiting = {temporary / _NEW / target.name: target for target in targets}
            for source, place in zip(moves, waiting, strict=True):
                os.replace(source, place)
            for file in old:
                os.replace(file, place := temporary / _OLD / file.name)
                undo.callback(os.replace, place, file)
            os.replace(temporary / _OLD, temporary / _GONE)
            undo.callback(os.replace, temporary / _GONE, temporary / _OLD)
            for place, target in waiting.items():
                _move(place, target, overwrite=overwrite)
                undo.callback(_take_back, target, place)
            undo.pop_all()
    _sync(targets[0].parent)


def _take_back(target: Path, place: Path) -> None:
    """Undo `_move`."""
    if place.exists():
        target.unlink()
    else:
        os.replace(target, place)


def _recover(temporary: Path) -> None:
    """Put back the old files that a dead process had moved aside, or finish what `publish` had begun."""
    old, new = temporary / _OLD, temporary / _NEW
    waiting = old if old.is_dir() else new
    for file in waiting.iterdir() if waiting.is_dir() and not waiting.is_symlink() else ():
        if not os.path.lexists(target := temporary.parent / file.name):
            os.replace(file, target)


def _move(source: Path, target: Path, *, overwrite: bool) -> None:
    """Rename a file; without `overwrite`, `source` may stay as a second name of it."""
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


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            # not every system opens folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def kept(path: Path) -> FileExistsError:
    """Return the error that says that a file exists and may not be replaced."""
    return FileExistsError(f"{path} exists: give another name, or replace it with --overwrite")


@contextmanager
def blame(file: object) -> Iterator[None]:
    """Put the file at fault before what a ValueError in the block says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def check_file(path: Path) -> None:
    """Raise ValueError for a folder, for a device or pipe, which may never end, and for a Git LFS pointer.

    A missing file passes: opening it says so.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    # opening it says what else is wrong
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a Git LFS pointer to a file that is not here: `git lfs pull` brings it")


def read_bytes(path: Path, limit: int = MOST_TEXT) -> bytes:
    """Read a file of at most `limit` bytes; ValueError names one that is anything else."""
    try:
        check_file(path)
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if len(data) > limit:
        raise ValueError(f"{path}: larger than {limit // 2**20} MiB")
    return data


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 that begins with its mark, as Windows writes it; drop the mark."""
    return data.decode("utf-16" if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")


def read_text(path: Path, limit: int = MOST_TEXT) -> str:
    """Read a text file of at most `limit` bytes; ValueError names one that is anything else."""
    try:
        return decode_text(read_bytes(path, limit))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from error


def parse_json(text: str | bytes, *, finite: bool = True) -> dict[str, Any]:
    """Parse one JSON object from untrusted text.

    Raises ValueError for anything else, a repeated key, deep nesting, a lone surrogate, and,
    where numbers must be `finite`, for NaN and inf.
    """
    text = decode_text(text) if isinstance(text, bytes) else text
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
