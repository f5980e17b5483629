"""Dataclass fields that describe themselves, and the one typed reader of their values.

A field made by `option` carries its help, range and choices. The command line, JSON lines, TOML
tables, the metadata of files and Python callers all read a value by `read_value`, so a value is
either valid everywhere or refused everywhere, in the same words.
"""

import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

# bytes of a text: hundreds of times what a text encoder reads
MAX_TEXT_BYTES = 2**14

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


V = TypeVar("V")
# (height, width), the order of tensors
Size = tuple[int, int]
_UNITS = {"B": 1, "M": 10**6, "MB": 10**6, "MIB": 2**20, "G": 10**9, "GB": 10**9, "GIB": 2**30}


@dataclass(frozen=True)
class Option:
    """How one field is shown, checked, read from text and written to text."""

    help: str
    # title of the options' group in --help
    group: str | None = None
    # smallest and largest value
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    # flags other than --field-name, such as ("--output", "-o"); with `argument`: none
    flags: tuple[str, ...] = ()
    argument: bool = False
    # whether a line of a batch file may set it
    per_job: bool = False
    # the default that help shows, where the field's own says little
    shown: str | None = None
    # text to value and back, of a field whose values are not plain numbers, texts and paths
    read: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    # what a shell completes, such as "model" or "file"
    complete: str | None = None
    # of the field: its name, its type without None, whether None is valid, its default if any
    name: str = ""
    type: Any = str
    optional: bool = False
    required: bool = False
    default: Any = None

    @property
    def repeats(self) -> bool:
        """Return whether the option may be given several times."""
        return self.type == tuple[str, ...]

    @property
    def kind(self) -> Any:
        """Return the class of the values: of a tuple of numbers, tuple."""
        return get_origin(self.type) or self.type


def option(default: Any, help: str, **settings: Any) -> Any:
    """Return a dataclass field with an `Option`; `MISSING` makes it required."""
    return field(default=default, metadata={"option": Option(help, **settings)})


@cache
def options_of(cls: Any) -> Mapping[str, Option]:
    """Return the options of a dataclass by the names of its fields."""
    hints, table = get_type_hints(cls), {}
    for item in fields(cls):
        if "option" in item.metadata:
            hint = hints[item.name]
            members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            table[item.name] = replace(
                item.metadata["option"],
                name=item.name,
                type=next(member for member in members if member is not NoneType),
                optional=NoneType in members,
                required=item.default is MISSING,
                default=item.default,
            )
    return table


def read_value(described: Option, value: Any) -> Any:
    """Return the typed value of one field, given as a value of its type or as its text.

    Raises ValueError in one line that says what is possible.
    """
    title, kind = described.name.replace("_", " "), described.kind
    if value is None and described.optional:
        return None
    if described.read is not None:
        try:
            # a typed value is checked as its text
            text = value if isinstance(value, str) else described.write(value)
        except (LookupError, TypeError) as error:
            raise ValueError(f"{title} {short(value)} is not valid") from error
        return described.read(text)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**53 else math.inf
    if kind is Path and isinstance(value, str):
        value = Path(value)
    if described.repeats and isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        return tuple(check_text(title, text) for text in value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{title} {short(value)} is not {_KINDS.get(kind, 'text')}")
    if isinstance(value, str) and described.complete != "file":
        # names of files may hold any bytes
        value = check_text(title, value)
    if described.choices and value not in described.choices:
        raise ValueError(f"{title} {short(value)} is not one of {', '.join(described.choices)}")
    _check_range(title, value, described)
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{title} {short(value)} is not a number")
    return value


def _check_range(title: str, value: Any, described: Option) -> None:
    low, high = described.low, described.high
    if low is not None and high is not None and not low <= value <= high:
        top = "2^63 - 1" if high == 2**63 - 1 else high
        hint = ": leave it out for a random one" if described.shown == "random" else ""
        raise ValueError(f"{title} {short(value)} is not between {low} and {top}{hint}")
    if low is not None and not value >= low:
        raise ValueError(f"{title} {short(value)} is not at least {low}")


@dataclass(frozen=True)
class Options:
    """A dataclass with options as fields, which are read and checked when one is made."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, described in options_of(cls).items():
            object.__setattr__(self, name, read_value(described, getattr(self, name)))


def with_values(instance: V, values: Mapping[str, Any]) -> V:
    """Return a copy of a dataclass with other values, which have been read: nothing is checked again."""
    changed = object.__new__(type(instance))
    vars(changed).update(vars(instance), **values)
    return changed


def check_text(title: str, text: str) -> str:
    """Return a text as one line; tabs and line breaks become spaces.

    Raises ValueError for lone surrogates, control characters and more than `MAX_TEXT_BYTES`.
    """
    if text.isascii() and text.isprintable() and len(text) <= MAX_TEXT_BYTES:
        return text
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"the {title} is not valid UTF-8")
    if (size := len(text.encode())) > MAX_TEXT_BYTES:
        raise ValueError(f"the {title} has {size} bytes, more than {MAX_TEXT_BYTES}")
    line = re.sub(r"[\t\n\v\f\r\x85\u2028\u2029]", " ", text)
    for letter in line:
        if unicodedata.category(letter) == "Cc":
            raise ValueError(f"the {title} holds the control character U+{ord(letter):04X}")
    return line


def parse_size(text: str) -> Size:
    """Return (height, width) of WIDTHxHEIGHT."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if match is None:
        raise ValueError(f"size {short(text)} is not WIDTHxHEIGHT, such as 64x64")
    size = int(match[2]), int(match[1])
    for name, side in zip(("height", "width"), size, strict=True):
        if side < 1:
            raise ValueError(f"{name} {side} is not at least 1")
    return size


def write_size(size: Size) -> str:
    """Return WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


# the settings of an option for a size
SIZE: dict[str, Any] = {"metavar": "WIDTHxHEIGHT", "read": parse_size, "write": write_size}


class Shard(NamedTuple):
    """The part of a list that process `number`, from 0, of several does: every item with a number like its own."""

    number: int
    of: int

    def has(self, item: int) -> bool:
        """Return whether the item with this number, from 0, is in the shard."""
        return item % self.of == self.number

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.of}"


WHOLE = Shard(0, 1)


def parse_shard(text: str) -> Shard:
    """Return the shard of I/N, from 1/N to N/N; "auto" reads what SLURM and torchrun set."""
    if text == "auto":
        return _read_shard()
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard {short(text)} is neither auto nor I/N, from 1/N to N/N")
    return Shard(int(match[1]) - 1, int(match[2]))


def _read_shard() -> Shard:
    """Return which task of a SLURM array this is, which process of torchrun, or, of both, which of all."""
    task = {"ID": "0", "MIN": "0", "STEP": "1", "COUNT": "1"}
    task = {name: os.environ.get(f"SLURM_ARRAY_TASK_{name}", value) for name, value in task.items()}
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not os.environ.keys() & {"SLURM_ARRAY_TASK_ID", "RANK"}:
        raise ValueError("shard auto: neither a SLURM array nor torchrun started this process: give I/N")
    try:
        number = (int(task["ID"]) - int(task["MIN"])) // int(task["STEP"])
        shard = Shard(number * int(world) + int(rank), int(task["COUNT"]) * int(world))
    except (ValueError, ArithmeticError):
        shard = Shard(0, 0)
    if not 0 <= shard.number < shard.of:
        raise ValueError("shard auto: SLURM_ARRAY_TASK_*, RANK and WORLD_SIZE do not count tasks one by one: give I/N")
    return shard


# the settings of an option for a shard
SHARD: dict[str, Any] = {"metavar": "I/N", "read": parse_shard, "write": str}


def parse_output(text: str) -> str:
    """Return the name of a file to write; those that the system gives stdout are -."""
    return "-" if text in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1") else text


def parse_memory(text: str) -> int:
    """Return the bytes of a number with its unit, such as 4GB."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Z]{1,3})", text.upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"memory {short(text)} is not a number of MB, MiB, GB or GiB, such as 4GB")
    size = round(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise ValueError(f"max memory {size} is not at least 1")
    return size
