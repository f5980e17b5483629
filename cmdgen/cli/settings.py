"""Defaults for options from a file: TOML, a table for each command, keys as its long options.

[sample]
steps = 20
sampler = "dpm++"

[train.content]
batch = 16
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

# bytes; what a person writes is far smaller
_MOST = 2**20


def config_path() -> Path:
    """Where the file is looked for unless another is named."""
    from platformdirs import user_config_path

    return user_config_path("cmdgen") / "config.toml"


def read_settings(path: Path, commands: TyperGroup) -> dict[str, Any]:
    """The defaults in a file, for `Context.default_map`.

    ValueError names the file and the key that is unknown or that its option does not take;
    FileNotFoundError where there is no file.
    """
    with path.open("rb") as file:
        text = file.read(_MOST + 1)
    if len(text) > _MOST:
        raise ValueError(f"{path}: larger than {_MOST // 1024} KiB")
    try:
        tables = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as TOML ({error})") from error
    try:
        return _parse(tables, commands, typer.Context(commands, info_name="cmdgen"), [])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(
    table: Mapping[str, Any], command: Any, context: typer.Context, above: list[str]
) -> dict[str, Any]:
    """A table whose command is `command`, in the tables named `above`."""
    where = f"[{'.'.join(above)}]"
    commands = command.commands if isinstance(command, TyperGroup) else {}
    options = {} if not above else _options(command)
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            if name not in commands:
                inside = f"{where} has" if above else "there is"
                raise ValueError(f"{inside} no command {key!r}{_suggest(name, commands)}")
            inner = typer.Context(commands[name], info_name=name, parent=context)
            found[name] = _parse(value, commands[name], inner, [*above, name])
        elif not above:
            raise ValueError(f"{key} is in no table: expected it in one such as [sample]")
        elif name not in options:
            raise ValueError(f"{where} has no option {key!r}{_suggest(name, options)}")
        else:
            option = options[name]
            try:
                found[option.name] = typed = _as_typed(value, option)
                option.process_value(context, typed)
            except typer.BadParameter as error:
                raise ValueError(f"{where} {key} {_show(value)}: {error.message}") from error
            except ValueError as error:
                raise ValueError(f"{where} {key}: {error}") from error
    return found


def _options(command: TyperCommand | TyperGroup) -> dict[str, TyperOption]:
    """The options of a command by their long names, without dashes."""
    return {
        flag.removeprefix("--"): parameter
        for parameter in command.params
        if isinstance(parameter, TyperOption) and not parameter.hidden
        for flag in parameter.opts
        if flag.startswith("--")
    }


def _as_typed(value: Any, option: TyperOption) -> bool | str | list[str]:
    """A value of TOML as it would stand on the command line: the option checks it as there."""
    if option.is_flag or isinstance(value, bool):
        if not (option.is_flag and isinstance(value, bool)):
            expected = "true or false" if option.is_flag else "a value, not true or false"
            raise ValueError(f"{_show(value)} is not allowed, expected {expected}")
        return value
    several = option.multiple or option.nargs != 1
    if isinstance(value, list) and several:
        return [_scalar(each) for each in value]
    return [_scalar(value)] if several else _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{_show(value)} is not allowed, expected a number or a text")
    return str(value)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]!r}?" if close else ""
