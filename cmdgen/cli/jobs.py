"""The jobs of `cmdgen sample`: from an argument, a file or a pipe, each checked on its own.

A line is a prompt, or a JSON object whose keys are options' names; a JSON array, and objects over
several lines, are read as what they are. Blank lines and lines that start with # are skipped. An
error in a line is an error of that job alone.
"""

import json
import os
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from queue import Empty, Queue
from reprlib import repr as short
from secrets import randbits
from stat import S_ISREG
from threading import Thread
from typing import IO, Any, NamedTuple

from cmdgen.cli.errors import describe
from cmdgen.cli.naming import check_inside, fields, fill
from cmdgen.files import decode_text, parse_json
from cmdgen.metadata import FIELDS, read_job
from cmdgen.options import SHARD, Shard, option, read_value, with_values
from cmdgen.request import Plan, Request, threads_option
from cmdgen.video.formats import STDOUT, Encoding, choose_encoding, list_outputs

# bytes of a line; a longer one is skipped, unless it never seems to end
MAX_LINE_BYTES, MAX_SKIPPED_BYTES = 2**20, 2**26
# bytes of a file that is checked before anything is made; from a longer one, as from a pipe, jobs
# start at once
MAX_AHEAD_BYTES = 2**26
# lines of a pipe that wait
_WAITING = 256
# seconds to wait for one more line before the jobs so far start
_PATIENCE = 0.05

# the format of one picture, and of content frame and motion latents
STILL, LATENTS = "png", "safetensors"


_jobs = partial(option, group="Several clips")
_count = partial(_jobs, 1, metavar="N", low=1)
_path = partial(_jobs, None, metavar="FILE", complete="file")


@dataclass(frozen=True)
class Batching:
    """Options of `cmdgen sample` that hold for all jobs."""

    file: str | None = _path(
        "Read a prompt, or a JSON object of options, from each line; - is stdin.", flags=("--file", "-f")
    )
    num: int = _count("Clips of each prompt. Seeds count up from --seed.", high=100_000)
    batch: int = _count("Clips per forward pass; only rounding differs.", high=1024)
    overwrite: bool = _jobs(False, "Replace existing files.")
    shard: Shard | None = _jobs(
        None, "Make this part of the clips, 1/N to N/N; auto: as a SLURM array or torchrun counts.", **SHARD
    )
    ray: str | None = _jobs(
        None, "Make the clips on a Ray cluster: local (all of this machine), auto, or its address.", metavar="ADDRESS"
    )
    skip_existing: bool = _jobs(False, "Make only clips whose files do not exist yet.")
    fail_fast: bool = _jobs(False, "Stop at the first error.")
    like: Path | None = _path("Make this file's clip again, except for the options you change.")
    preview: Path | None = _path("Rewrite this .png with the content frame while it is sampled.")
    dry_run: bool = _jobs(False, "Check everything; estimate memory and time; make nothing.")
    threads: int | None = threads_option()

    def __post_init__(self) -> None:
        if self.overwrite and self.skip_existing:
            raise ValueError("--overwrite and --skip-existing contradict each other: give one")
        if self.ray is not None and self.preview is not None:
            raise ValueError("--preview shows one clip as it is made: leave it out with --ray")


class Entry(NamedTuple):
    """One line that is not skipped: values by the names of options, or its error."""

    line: int
    values: dict[str, Any] | ValueError


@dataclass(frozen=True)
class Job:
    """One clip: the request, where it goes and, once a model has resolved it, the plan."""

    # from 1, the same whatever becomes of other jobs
    index: int
    line: int
    request: Request
    target: str
    encoding: Encoding
    resolved: Plan | None = None
    # frames of the file, of a job that was checked
    length: int = 0
    # whether --skip-existing found all its files, or some of them, which are replaced
    exists: bool = False
    unfinished: bool = False

    @property
    def plan(self) -> Plan:
        """Return the plan of a job that was checked."""
        assert self.resolved is not None
        return self.resolved

    @property
    def files(self) -> list[str]:
        """Return the files of a job that was checked."""
        return list_outputs(self.target, self.encoding, self.length)

    def describe(self) -> dict[str, Any]:
        """Return the job for JSON."""
        request, place = self.request, {"index": self.index, "line": self.line}
        return place | {"prompt": request.prompt, "seed": request.seed, "output": self.target}


@dataclass(frozen=True)
class Refused:
    """A job that cannot be made."""

    index: int
    line: int
    error: Exception
    # whether the error has been reported
    reported: bool = False

    def __str__(self) -> str:
        return f"line {self.line}: {describe(self.error)}"

    def describe(self) -> dict[str, Any]:
        """Return the error for JSON."""
        return {"index": self.index, "line": self.line, "error": describe(self.error)}


_END = Entry(0, {})


def open_entries(file: str | None) -> tuple[Iterator[Entry | None], bool]:
    """Return the entries of a file, and whether it is read to its end before jobs start.

    "-" is stdin, whose entries start as they come: None stands where no line is there yet. None is
    what is piped to stdin, one prompt or, as for "-", more; a terminal has none. Raises OSError and
    ValueError for what cannot be read.
    """
    if file is None and os.isatty(0):
        return iter(()), True
    # not sys.stdin: at its end Python waits for a thread that reads from that
    descriptor = os.dup(0) if file is None or file == "-" else os.open(file, os.O_RDONLY)
    if os.path.isdir(descriptor):
        raise ValueError(f"{file} is a folder, not a file of prompts")
    stream, status = os.fdopen(descriptor, "rb"), os.fstat(descriptor)
    if S_ISREG(status.st_mode) and status.st_size <= MAX_AHEAD_BYTES:
        return read_entries(stream), True
    entries = _as_they_come(stream)
    if file is None:
        first = list(islice(filter(None, entries), 1))
        if (second := next(entries, _END)) is _END:
            return iter(first), True
        entries = chain(first, [second], entries)
    return entries, False


def _as_they_come(stream: IO[bytes]) -> Iterator[Entry | None]:
    waiting: Queue[Entry | OSError | None] = Queue(_WAITING)

    def read() -> None:
        try:
            for entry in read_entries(stream):
                waiting.put(entry)
            waiting.put(None)
        except OSError as error:
            waiting.put(error)

    Thread(target=read, daemon=True).start()
    while True:
        try:
            entry = waiting.get(timeout=_PATIENCE)
        except Empty:
            yield None
            entry = waiting.get()
        if isinstance(entry, OSError):
            raise entry
        if entry is None:
            return
        yield entry


def read_entries(file: IO[bytes]) -> Iterator[Entry]:
    """Yield the lines of a file that are not skipped, in bounded memory; close it at its end."""
    with file:
        for line, text in enumerate(_read_lines(file), 1):
            try:
                if isinstance(text, ValueError):
                    raise text
                if line == 1 and text.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                    yield from read_entries(BytesIO(_read_rest(file, text).encode()))
                elif _begins_json(text):
                    yield from _parse_values(_read_rest(file, text), line)
                elif (values := _parse(text)) is not None:
                    yield Entry(line, values)
            except ValueError as error:
                yield Entry(line, error)


def _read_rest(file: IO[bytes], start: bytes) -> str:
    """Return the rest of a file that is not read by lines."""
    data = start + file.read(MAX_AHEAD_BYTES)
    if file.read(1):
        raise ValueError(f"goes on for more than {MAX_AHEAD_BYTES} bytes: give one JSON object a line, in UTF-8")
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid {error.encoding}") from error


def _begins_json(line: bytes) -> bool:
    """Return whether an array, or an object that goes on in the next line, begins here."""
    text = line.strip()
    if text in (b"[", b"{") or not text.startswith(b"["):
        return text in (b"[", b"{")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # it goes on in the next line; else it is a prompt such as [neon] a sign
        return error.pos >= len(error.doc) - 1
    except (ValueError, RecursionError):
        return False
    return True


def _parse_values(text: str, line: int) -> Iterator[Entry]:
    """Yield the entries of an array, or of objects one after another, by the lines where they begin."""
    text = text.rstrip()
    try:
        if text.startswith("["):
            json.loads(text)
        gap, values, end = re.compile(r"[\s,\[\]]*" if text.startswith("[") else r"\s*"), [], 0
        while (start := end + len(gap.match(text, end)[0])) < len(text):  # type: ignore[index]
            value, end = json.JSONDecoder().raw_decode(text, start)
            values.append((value, start, end))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"begins JSON that is not readable, of which nothing is made: {error}") from error
    previous = 0
    for value, start, end in values:
        line, previous = line + text.count("\n", previous, start), start
        try:
            if not isinstance(value, str | dict):
                raise ValueError(f"{short(value)} is neither a prompt nor an object")
            yield Entry(line, {"prompt": value} if isinstance(value, str) else _parse(text[start:end].encode()) or {})
        except ValueError as error:
            yield Entry(line, error)


def _read_lines(file: IO[bytes]) -> Iterator[bytes | ValueError]:
    while text := file.readline(MAX_LINE_BYTES + 1):
        rest, size = text, len(text)
        while size > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):
            if size > MAX_SKIPPED_BYTES:
                yield ValueError(f"goes on for more than {MAX_SKIPPED_BYTES} bytes: nothing after it is read")
                return
            rest = file.readline(MAX_LINE_BYTES)
            size += len(rest)
        too_long = ValueError(f"has {size} bytes, more than {MAX_LINE_BYTES}")
        yield too_long if size > MAX_LINE_BYTES else text


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line; None where it is blank or a comment."""
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError("is not valid UTF-8") from error
    if not text or text.startswith("#"):
        return None
    if not text.startswith("{"):
        return {"prompt": text}
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    return values


def make_jobs(
    entries: Iterable[Entry | None], request: Request, *, num: int, reads_text: bool = True
) -> Iterator[Job | Refused | None]:
    """Yield `num` jobs for each entry; `request` has the values that an entry does not set.

    Each has a prompt, unless the model does not read text.
    """
    index = 1
    for entry in entries:
        if entry is None:
            yield None
            continue
        try:
            if isinstance(entry.values, ValueError):
                raise entry.values
            if reads_text and request.prompt is None and entry.values.get("prompt") is None:
                raise ValueError("has no prompt")
            values = read_job(entry.values)
            if (output := values.pop("output", None)) is not None:
                if request.output == STDOUT:
                    raise ValueError(f"output {short(output)}: all of them go to stdout")
                # in the folder of --output, if it has one
                values["output"] = str(Path(request.output or "").parent / check_inside(output))
            merged = with_values(request, values)
            if reads_text and not (merged.prompt or "").strip():
                raise ValueError('the prompt is empty: say what to show, such as "a corgi swimming"')
            yield from [_make_job(entry.line, merged, index + i, i) for i in range(num)]
        except ValueError as error:
            yield Refused(index, entry.line, error)
        index += num


def check_seeds(request: Request, jobs: Batching, *, alone: bool) -> None:
    """Raise ValueError where names have random seeds, and clips that exist are to be skipped."""
    if jobs.skip_existing and request.seed is None and not alone and "seed" in fields(request.output or ""):
        raise ValueError("--skip-existing with random seeds in names finds nothing: give --seed")


def _make_job(line: int, request: Request, index: int, offset: int) -> Job:
    prompt = (request.prompt or "").strip()
    if request.output is None:
        raise ValueError("no output: give a name with --output, or - for stdout")
    seed = randbits(32) if request.seed is None else read_value(FIELDS["seed"], request.seed + offset)
    target = fill(request.output, prompt, {"index": index, "line": line, "seed": seed})
    encoding = choose_encoding(
        target,
        **{name: getattr(request, name) for name in ("format", "crf", "codec", "loop", "sidecar")},
        metadata=not request.no_metadata,
    )
    frames = request.frames
    if encoding.format == STILL:
        if frames not in (None, 1):
            raise ValueError(f"{target} holds one frame, not {frames}: give the name of a video")
        frames = 1
    request = with_values(request, {"prompt": prompt or None, "seed": seed, "frames": frames})
    return Job(index, line, request, target, encoding)
