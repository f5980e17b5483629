"""Default values of options from a file: TOML, a table for each command, keys as its long options.

[sample]
steps = 20
sampler = "dpm++"

[train.content]
batch = 16
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperOption

from cmdgen.cli.command import read_text
from cmdgen.files import blame, decode_text
from cmdgen.options import option

# bytes; what a person writes is far smaller
_LARGEST = 2**20


def config_path() -> Path | None:
    """Return where the file is unless --config names another; None without a home directory."""
    from platformdirs import user_config_path

    try:
        return user_config_path("cmdgen") / "config.toml"
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Defaults:
    """Options of `cmdgen` itself."""

    config: Path | None = option(
        None,
        "Read default values of options from this TOML file: a table for each command, such as [sample].",
        metavar="FILE",
        shown="config.toml in the folder that `cmdgen doctor` names",
        complete="file",
    )
    no_config: bool = option(False, "Read no such file.")

    def __post_init__(self) -> None:
        if self.no_config and self.config is not None:
            raise ValueError("--config and --no-config contradict each other: give one")

    @property
    def path(self) -> Path | None:
        """Return the file to read; None for none."""
        path = self.config or config_path()
        if self.no_config or path is None or not (self.config or path.exists()):
            return None
        return path


def read_settings(path: Path, commands: Any) -> dict[str, Any]:
    """Return the values in a file, for `Context.default_map`.

    Raises ValueError, with the file and the key, for unknown keys and values that are not valid.
    """
    # most commands find no file
    import tomllib

    with path.open("rb") as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError(f"{path}: larger than {_LARGEST // 1024} KiB")
    try:
        tables = tomllib.loads(decode_text(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as TOML ({error})") from error
    with blame(path):
        return _read_table(tables, typer.Context(commands, info_name="cmdgen"), [])


def _read_table(table: Mapping[str, Any], context: Any, above: list[str]) -> dict[str, Any]:
    """Return the values for the command of `context`, in the tables named `above`."""
    title = f"[{'.'.join(above)}]"
    commands = getattr(context.command, "commands", {})
    options = {
        flag.removeprefix("--"): option
        for option in context.command.params
        if isinstance(option, TyperOption) and not option.hidden
        for flag in option.opts
        if flag.startswith("--")
    }
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            if name not in commands:
                inside = f"{title} has" if above else "there is"
                raise ValueError(f"{inside} no command {key!r}{_suggest(name, commands)}")
            command = context.command.get_command(context, name)
            inner = typer.Context(command, info_name=name, parent=context)
            values[name] = _read_table(value, inner, [*above, name])
        elif not above:
            raise ValueError(f"{key} is in no table: expected it in one such as [sample]")
        elif name not in options:
            raise ValueError(f"{title} has no option {key!r}{_suggest(name, options)}")
        else:
            try:
                values[options[name].name] = _check_value(key, value, options[name], context)
            except ValueError as error:
                raise ValueError(f"{title} {error}") from error
    return values


def _check_value(key: str, value: Any, option: TyperOption, context: Any) -> Any:
    """Return a value as it stands on the command line, where its option takes it."""
    several = option.multiple or option.nargs != 1
    items = value if several and isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) != option.is_flag or not isinstance(item, int | float | str):
            scalar = isinstance(item, bool | int | float | str)
            shown = json.dumps(item) if scalar else f"a {type(item).__name__}"
            expected = "true or false" if option.is_flag else "a number or a text"
            raise ValueError(f"{key}: {shown} is not allowed, expected {expected}")
    texts = [str(item) for item in items]
    words = value if option.is_flag else texts if several else texts[0]
    try:
        typed = option.process_value(context, words)
    except typer.BadParameter as error:
        raise ValueError(f"{key} {json.dumps(value)}: {error.message}") from error
    # of a command that `expand` made
    if described := getattr(context.command.callback, "options", {}).get(option.name):
        read_text(described, typed)
    return words


def _suggest(name: str, possible: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, possible, n=1)
    return f": did you mean {close[0]!r}?" if close else ""
