"""What `cmdgen sample` is asked for: an argument's, a file's or a pipe's jobs, checked one by one.

A line is a prompt, or a JSON object whose keys are the names of options; blank lines and those that
start with # are skipped. Whatever is wrong with a line is wrong with that job alone.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from reprlib import repr as short
from stat import S_ISREG
from threading import Thread
from types import NoneType
from typing import IO, Any, BinaryIO, get_args

import typer

from cmdgen.cli.errors import Failure, describe
from cmdgen.cli.naming import check_inside, fill
from cmdgen.cli.size import parse_memory, parse_size
from cmdgen.config import SampleConfig
from cmdgen.video.formats import STDOUT, Encoding, choose_encoding

# bytes of a line; a longer one is skipped, unless it never seems to end
MOST_LINE, MOST_SKIPPED = 2**20, 2**26
# bytes of a prompt: hundreds of times what a text encoder reads
MOST_PROMPT = 2**14
# bytes of a file that is looked over before anything is made; from a longer one, as from a pipe,
# jobs start at once
MOST_AHEAD = 2**26
# clips of a file, all of which are known before the first is made
MOST_JOBS = 10**6
# lines of a pipe that wait
_WAITING = 256
# seconds to wait for one more line before what there is starts
_PATIENCE = 0.05

# the format of one picture
STILL, LATENTS = "png", "safetensors"
# of step rehash, where nothing is said
HOW = (SampleConfig.rehash_cut, SampleConfig.rehash_protect, None)
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """What a line asks for, by the names of options, or what is wrong with it."""

    # of those that are not skipped, from 0
    number: int
    line: int
    values: dict[str, Any] = field(default_factory=dict)
    error: ValueError | None = None


@dataclass(frozen=True)
class Job:
    """One clip: what is asked, and where it goes."""

    # from 1, and the same whatever is wrong with others
    index: int
    line: int
    prompt: str
    config: SampleConfig
    target: str
    encoding: Encoding

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{"index": self.index, "line": self.line, "prompt": self.prompt},
            **{"seed": self.config.seed, "output": self.target},
        }


@dataclass(frozen=True)
class Refused:
    """A job that cannot be."""

    index: int
    line: int
    error: Exception
    # whether that was said
    told: bool = False

    def __str__(self) -> str:
        return f"line {self.line}: {describe(self.error)}"

    @property
    def located(self) -> Exception:
        """The error, with the line that it is of."""
        if isinstance(self.error, Failure):
            return Failure(str(self), self.error.code)
        return type(self.error)(str(self))

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {"index": self.index, "line": self.line, "error": describe(self.error)}


class Options:
    """What a job may set: the command's own options of some groups, checked as its flags are."""

    def __init__(self, context: typer.Context, hints: Mapping[str, Any], groups: set[str]) -> None:
        self.context = context
        self.parameters = {
            parameter.name: parameter
            for parameter in context.command.params
            if parameter.name is not None and parameter.name in hints
        }
        self.kinds = {
            name: next(kind for kind in get_args(hints[name]) or (hints[name],) if kind != NoneType)
            for name in self.parameters
        }
        self.of_jobs = {
            name
            for name, parameter in self.parameters.items()
            if getattr(parameter, "rich_help_panel", None) in groups
        }

    def check(self, given: Mapping[str, Any], *, beside: Iterable[str] = ()) -> dict[str, Any]:
        """Values of JSON -> those of the options, by the names of parameters.

        `beside` names further options that may be set. ValueError says what is wrong.
        """
        allowed = self.of_jobs.union(beside)
        values: dict[str, Any] = {}
        for key, value in given.items():
            name = key.replace("-", "_")
            if name in values:
                raise ValueError(f"{short(key)} is given twice")
            if name not in allowed:
                known = ", ".join(sorted(allowed))
                raise ValueError(
                    f"{short(key)} is the same for all jobs: give it as a flag"
                    if name in self.parameters
                    else f"{short(key)} is not one of {known}"
                )
            values[name] = self._convert(name, value)
        return values

    def defaults(self, names: Iterable[str]) -> dict[str, Any]:
        """What options are where neither a flag nor the user's file says so."""
        return {name: self.parameters[name].default for name in names}

    def _convert(self, name: str, value: Any) -> Any:
        parameter, kind = self.parameters[name], self.kinds[name]
        if value is None:
            return parameter.default
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}
        # steps in a number, or listed in text
        if name == "rehash" and type(value) is int:
            value = str(value)
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**53 else math.inf
        if type(value) is not (str if kind is Path else kind):
            raise ValueError(f"{name} {short(value)} is not {wanted.get(kind, 'text')}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} {short(value)} is not a number")
        if kind is Path:
            value = str(check_text(name, value))
        try:
            return parameter.process_value(self.context, value)
        except typer.TyperException as error:
            raise ValueError(error.format_message()) from error


def check_text(name: str, text: str) -> str:
    """A text as it is used: one line; ValueError where it holds what is no text, or too much.

    Tabs and line breaks become spaces, other control characters are refused.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"the {name} is not valid UTF-8")
    if (size := len(text.encode())) > MOST_PROMPT:
        raise ValueError(f"the {name} has {size} bytes, more than {MOST_PROMPT}")
    line = re.sub(r"[\t\n\v\f\r\x85\u2028\u2029]", " ", text)
    for letter in line:
        if unicodedata.category(letter) == "Cc":
            raise ValueError(f"the {name} holds the control character U+{ord(letter):04X}")
    return line


def read_entries(file: IO[bytes]) -> Iterator[Entry]:
    """The lines of a file that ask for something; memory is bounded, whatever is in it."""
    number = 0
    for line, text in enumerate(_read_lines(file), 1):
        if isinstance(text, ValueError):
            yield Entry(number, line, error=text)
            number += 1
            continue
        try:
            values = _parse(text)
        except ValueError as error:
            yield Entry(number, line, error=error)
        else:
            if values is None:
                continue
            yield Entry(number, line, values)
        number += 1


def _read_lines(file: IO[bytes]) -> Iterator[bytes | ValueError]:
    while text := file.readline(MOST_LINE + 1):
        if len(text) <= MOST_LINE:
            yield text
            continue
        size = len(text)
        while text and not text.endswith(b"\n"):
            if size > MOST_SKIPPED:
                yield ValueError(
                    f"goes on for more than {MOST_SKIPPED} bytes: nothing after it is read"
                )
                return
            text = file.readline(MOST_LINE)
            size += len(text)
        yield ValueError(f"has {size} bytes, more than {MOST_LINE}")


def _parse(line: bytes) -> dict[str, Any] | None:
    """What a line asks for; None where it is blank or a comment."""
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError("is not valid UTF-8") from error
    if not text or text.startswith("#"):
        return None
    if not text.startswith("{"):
        return {"prompt": text}
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    assert isinstance(values, dict)
    if "prompt" not in values:
        raise ValueError("has no prompt")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{short(twice)} is given twice")
    return values


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def open_entries(file: str) -> tuple[Iterator[Entry | None], bool]:
    """The entries of a file, "-" stdin, and whether they can be read to the end before any starts.

    From a pipe, None stands where no line is there yet. FileNotFoundError and OSError say why not.
    """
    # not sys.stdin: at its end Python waits for a thread that reads from that
    descriptor = os.dup(0) if file == "-" else os.open(file, os.O_RDONLY)
    if os.path.isdir(descriptor):
        raise ValueError(f"{file} is a folder, not a file of prompts")
    stream = os.fdopen(descriptor, "rb")
    status = os.fstat(stream.fileno())
    if S_ISREG(status.st_mode) and status.st_size <= MOST_AHEAD:
        return _closing(stream), True
    return _as_they_come(stream), False


def read_piped() -> Iterator[Entry]:
    """The entries of what is piped in, to its end; of a terminal none, as of nothing at all."""
    try:
        stream = os.fdopen(os.dup(0), "rb")
    except OSError:
        return iter(())
    if stream.isatty():
        stream.close()
        return iter(())
    return _closing(stream)


def _closing(stream: BinaryIO) -> Iterator[Entry]:
    with stream:
        yield from read_entries(stream)


def _as_they_come(stream: BinaryIO) -> Iterator[Entry | None]:
    waiting: Queue[Entry | OSError | None] = Queue(_WAITING)

    def read() -> None:
        try:
            for entry in read_entries(stream):
                waiting.put(entry)
        except OSError as error:
            waiting.put(error)
        waiting.put(None)

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


def make_jobs(
    entries: Iterable[Entry | None], options: Options, values: Values, *, num: int
) -> Iterator[Job | Refused | None]:
    """The jobs of entries, `num` of each; `values` are those of what an entry does not set."""
    for entry in entries:
        if entry is None:
            yield None
            continue
        index = entry.number * num + 1
        try:
            if entry.error is not None:
                raise entry.error
            own = options.check(entry.values)
            jobs = [_make_job(entry, own, values, index + i, i) for i in range(num)]
        except ValueError as error:
            yield Refused(index, entry.line, error)
        else:
            yield from jobs


def _make_job(entry: Entry, own: Values, values: Values, index: int, offset: int) -> Job:
    asked = {**values, **own}
    prompt = check_text("prompt", asked["prompt"]).strip()
    if not prompt:
        raise ValueError('the prompt is empty: say what to show, such as "a corgi swimming"')
    seed = asked["seed"]
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed + offset
    template = values["output"]
    if own.get("output") is not None:
        template = _own_template(own["output"], template)
    if template is None:
        raise ValueError("no output: give a name with --output, or - for stdout")
    if template == STDOUT:
        target = template
    else:
        target = fill(template, index=index, line=entry.line, seed=seed, prompt=prompt)
    encoding = choose_encoding(
        target,
        **{name: asked[name] for name in ("format", "crf", "codec", "loop", "sidecar")},
        metadata=not asked["no_metadata"],
    )
    frames = asked["frames"]
    if encoding.format == STILL:
        if frames not in (None, 1):
            raise ValueError(f"{target} holds one frame, not {frames}: give the name of a video")
        frames = 1
    config = _configure({**asked, "seed": seed, "frames": frames})
    return Job(index, entry.line, prompt, config, target, encoding)


def _own_template(output: str, template: str | None) -> str:
    """Where a job's own output lies: in the folder of the command's, if it has one."""
    if template == STDOUT:
        raise ValueError(f"output {short(output)}: all of them go to stdout")
    folder = Path() if template is None else Path(template).parent
    return str(folder / check_inside(check_text("output", output)))


def _configure(asked: Values) -> SampleConfig:
    height, width = (None, None) if asked["size"] is None else parse_size(asked["size"])
    interval, memory = asked["guidance_interval"], asked["max_memory"]
    budget, steps = _parse_rehash(asked["rehash"])
    how = (asked["rehash_cut"], asked["rehash_protect"], asked["rehash_file"])
    if budget is steps is asked["rehash_threshold"] is None and how != HOW:
        raise ValueError("say how many steps run in full with --rehash N: nothing is rehashed")
    same = (
        *("seed", "content_seed", "motion_seed", "steps", "motion_steps", "sampler", "guidance"),
        *("motion_guidance", "frames", "fps", "rehash_threshold", "rehash_policy", "rehash_cut"),
        "rehash_protect",
    )
    return SampleConfig(
        **{name: asked[name] for name in same},
        negative=check_text("negative prompt", asked["negative"]),
        height=height,
        width=width,
        guidance_interval=None if interval is None else _parse_interval(interval),
        rehash=budget,
        rehash_steps=steps,
        rehash_file=None if asked["rehash_file"] is None else str(asked["rehash_file"]),
        max_memory=None if memory is None else parse_memory(memory),
    )


def _parse_interval(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"([01](?:\.\d{1,6})?)-([01](?:\.\d{1,6})?)", text)
    if match is None:
        raise ValueError(f"guidance interval {text!r} is not LOW-HIGH, such as 0.1-0.8")
    return float(match[1]), float(match[2])


Steps = tuple[tuple[int, ...], tuple[int, ...]]


def _parse_rehash(text: str) -> tuple[int | None, Steps | None]:
    """How many steps run in full, or which: of content, and after a + of motion."""
    if text == "off":
        return None, None
    if re.fullmatch(r"[0-9]{1,6}", text):
        return int(text), None
    if len(text) > 2**14 or not re.fullmatch(r"0(,[0-9]{1,4})*(\+0(,[0-9]{1,4})*)?", text):
        raise ValueError(
            f"rehash {short(text)} is neither off nor a number of steps, such as 13, nor the steps "
            "themselves, such as 0,1,4+0,2"
        )
    content, _, motion = text.partition("+")
    return None, (_parse_steps(content), _parse_steps(motion))


def _parse_steps(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()
