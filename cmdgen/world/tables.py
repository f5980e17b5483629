"""The tables of the rendered world: their rows, and how world.toml is read."""

import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from cmdgen.world import paint
from cmdgen.world.paint import Painter, Range, Sun


@dataclass(frozen=True)
class Captions:
    """The phrasings of a caption: in a place, without one, and of a moving camera."""

    placed: tuple[str, ...]
    unplaced: tuple[str, ...]
    camera: tuple[str, ...]
    # how often a caption leaves out a scene that its motion implies
    implied: float


@dataclass(frozen=True)
class Size:
    """Words for a size, and how large that is."""

    words: tuple[str, ...]
    factor: float


@dataclass(frozen=True)
class Subject:
    """A name, the emoji that shows it, and the other words for it."""

    name: str
    glyph: str
    synonyms: tuple[str, ...] = ()
    # the way its picture looks and it travels: 1 right, -1 left
    facing: int = -1

    @property
    def words(self) -> tuple[str, ...]:
        """Return every word for it, its name first."""
        return (self.name, *self.synonyms)


@dataclass(frozen=True)
class Layer:
    """Something painted that scrolls: sideways, or up."""

    paint: Painter
    # rows that it may cover, in frame heights
    span: Range = (0.0, 1.0)
    # frame heights a clip that it moves left (or up) by itself, and while the subject travels right
    speed: float = 0.0
    depth: float = 0.0
    rises: bool = False
    # drawn in front of the subject
    front: bool = False


@dataclass(frozen=True)
class Scene:
    """A place: the phrases that name it, its backdrop and layers, where a subject rests in it."""

    name: str
    phrases: tuple[str, ...]
    tags: tuple[str, ...]
    backdrop: str
    layers: tuple[Layer, ...]
    sun: Sun | None = None
    # where the subject stands: its foot with a shadow there, or its centre if there is no ground
    ground: float | None = None
    centre: float = 0.5
    shadow: str = "000000"
    shade: float = 0.35


@dataclass(frozen=True)
class Motion:
    """A motion: its path, and where it happens."""

    name: str
    # both forms of every verb: ("swimming", "swims")
    verbs: tuple[tuple[str, str], ...]
    path: dict[str, str]
    # the scene that a caption without one implies
    home: str = ""
    # scenes need one of these tags; empty is anywhere
    places: tuple[str, ...] = ()
    # how fast the scene scrolls past
    travel: float = 0.25

    @property
    def camera(self) -> bool:
        """Return whether it is the camera that moves."""
        return "zoom" in self.path

    def fits(self, scene: Scene) -> bool:
        """Return whether it is plausible in a scene."""
        return not self.places or not set(self.places).isdisjoint(scene.tags)


@dataclass(frozen=True)
class Tables:
    """Everything that a world may show, by name."""

    captions: Captions
    colours: dict[str, str]
    sizes: dict[str, Size]
    subjects: dict[str, Subject]
    motions: dict[str, Motion]
    scenes: dict[str, Scene]


@cache
def read_tables() -> Tables:
    """Read world.toml, once; ValueError says what is wrong in it."""
    data = tomllib.loads(Path(__file__).with_name("world.toml").read_text("utf-8"))
    for kind in ("subjects", "motions", "scenes"):
        for name, entry in data[kind].items():
            entry["name"] = name
    return read(Tables, data, "world.toml")


def read(hint: Any, value: Any, where: str) -> Any:
    """Convert a TOML value to the type `hint`; ValueError says where that is not possible."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return read(inner[0], value, where)
    if origin is tuple and type(value) is list:
        hints = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(hints) != len(value):
            raise ValueError(f"{where}: got {len(value)} values, expected {len(hints)}")
        return tuple(map(read, hints, value, (f"{where}[{i}]" for i in range(len(value)))))
    if origin is dict and type(value) is dict:
        return {name: read(inner[1], entry, f"{where}.{name}") for name, entry in value.items()}
    if hint is Layer:
        return _read_layer(value, where)
    if is_dataclass(hint) and isinstance(hint, type) and type(value) is dict:
        return hint(**_read_arguments(hint, value, where))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where}: got {value!r}, expected {hint}")
    return value


def _read_layer(row: dict[str, Any], where: str) -> Layer:
    """Read a row that holds the arguments of its painter beside those of the layer."""
    row = dict(row)
    name = row.pop("paint", None)
    of_layer = {field.name: row.pop(field.name) for field in fields(Layer) if field.name in row}
    painter = getattr(paint, str(name), None)
    if painter is None:
        raise ValueError(f"{where}: unknown painter {name!r}")
    # the canvas comes when it is painted
    bound = partial(painter, **_read_arguments(painter, row, where, None))
    return Layer(bound, **_read_arguments(Layer, of_layer, where, bound))


def _read_arguments(function: Callable[..., Any], table: dict[str, Any], where: str, *first: Any) -> dict[str, Any]:
    """Read the arguments of `function` after the first ones."""
    try:
        inspect.signature(function).bind(*first, **table)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
    hints = get_type_hints(function)
    return {name: read(hints[name], value, f"{where}.{name}") for name, value in table.items()}
