"""Typer's options, made from the fields of dataclasses; see `cmdgen.options`."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

import typer

from cmdgen.cli.completion import WORDS, complete_model, one_of
from cmdgen.options import Option, options_of, read_value
from cmdgen.request import Request

# what Typer reads; all else it hands on as text, for `read_text`
_TYPERS = (bool, tuple, list)
# how --help names a value
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH", tuple: "X X", list: "N"}


class Only(tuple[str, ...]):
    """The fields of a dataclass that a command takes: `Annotated[Request, Only(("size",))]`."""


Device = Annotated[Request, Only(("device",))]


def parameter(described: Option) -> Parameter:
    """Return one field as a parameter of a command, whose value is text or None for most types."""
    name, kind, value_type = described.name, str if described.read else described.kind, cast(Any, str)
    default = Parameter.empty if described.required else described.default
    if kind in _TYPERS:
        # an option of several values is repeated
        value_type = list[str] if described.repeats else described.type
    elif default not in (None, Parameter.empty):
        default = described.write(default)
    words = described.choices or WORDS.get(described.complete, ())
    complete = complete_model if described.complete == "model" else one_of(words) if words else None
    settings: dict[str, Any] = {
        "help": _describe(described, words),
        "metavar": described.metavar or ("NAME" if complete else _METAVARS.get(kind)),
        "rich_help_panel": described.group,
        "autocompletion": complete,
        # Typer adds the default, or the one in the user's file; `cmdgen.cli.help` shows one of them
        "show_default": not described.shown or default is None,
    }
    if described.argument:
        settings["metavar"] = described.metavar or name.upper()
        info: Any = typer.Argument(**settings)
    else:
        info = typer.Option(*_flags(described), **settings)
    hint: Any = Annotated[value_type | None if default is None else value_type, info]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _describe(described: Option, words: Sequence[str]) -> str:
    """Return an option's help with what is possible and, in a bracket, range and default."""
    text, low, high = described.help, described.low, described.high
    if described.choices or described.complete in ("format", "codec"):
        text += f" One of {', '.join(words)}."
    notes = []
    if high is None and low is not None:
        notes.append(f">= {low}")
    # the range of a seed says nothing
    elif high is not None and high < 2**53:
        notes.append(f"{low} to {high}")
    if described.shown:
        notes.append(f"default: {described.shown}")
    return f"{text}  [{'; '.join(notes)}]" if notes else text


def read_text(described: Option, value: Any) -> Any:
    """Return the typed value of a field, given on the command line; None where it is not given."""
    if value is None:
        if described.required:
            # Typer lets a list of arguments be empty
            raise ValueError(f"Missing argument '{described.metavar}'.")
        return None
    numeric = described.kind in (int, float) and described.read is None
    if isinstance(value, str) and numeric:
        # `read_value` refuses other text in its words
        with suppress(ValueError):
            value = described.kind(value)
    return read_value(described, value)


def list_flags(context: typer.Context) -> list[str]:
    """Return the options that come from the command line, not from defaults or settings."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source and source.name in ("COMMANDLINE", "ENVIRONMENT")]


def check_flags(context: typer.Context, what: str, used: str) -> None:
    """Raise ValueError, which says `what` runs, where an option is given that is not among the `used`."""
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for flag in list_flags(context):
        if flag not in ("as_json", "quiet", *used.split()):
            raise ValueError(f"{what}: {names[flag]} has no use there")


def expand(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command with one option for each field of the dataclasses that `function` takes.

    Parameters of other types stay as they are. The dataclasses are made of the options' values, so
    that a value which is not valid is their ValueError. `command.options` holds the `Option` of
    each parameter that has one.
    """
    makers: dict[str, tuple[type, dict[str, Option]]] = {}
    parameters: list[Parameter] = []
    for argument in signature(function, eval_str=True).parameters.values():
        hint, only = argument.annotation, None
        if get_origin(hint) is Annotated and is_dataclass(get_args(hint)[0]):
            hint, only = get_args(hint)
        if not (isinstance(hint, type) and is_dataclass(hint)):
            parameters.append(argument.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        table = options_of(hint)
        makers[argument.name] = hint, {name: table[name] for name in only or table}
        parameters += map(parameter, makers[argument.name][1].values())

    if not makers:
        return function

    options = {name: of for _, table in makers.values() for name, of in table.items()}

    def command(**values: Any) -> None:
        try:
            made = {
                name: cls(**{field: read_text(of, values.pop(field)) for field, of in table.items()})
                for name, (cls, table) in makers.items()
            }
            function(**values, **made)
        except ValueError as error:
            if type(error) is not ValueError or (text := _name_flag(str(error), options)) is None:
                raise
            raise ValueError(text) from error

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    vars(command).update(__signature__=Signature(parameters), options=options)
    return command


def _name_flag(text: str, options: Mapping[str, Option]) -> str | None:
    """Return what is wrong with a field's value in a shell's terms: by its flag; None for any other error."""
    for name, of in options.items():
        title = name.replace("_", " ")
        # a name that is followed by no value may be that of a file
        if not of.argument and re.match(rf"{title} (['\"\d-]|(nan|inf) |has no effect)", text):
            return _flags(of)[0] + text.removeprefix(title)
    return None


def _flags(described: Option) -> tuple[str, ...]:
    return described.flags or (f"--{described.name.replace('_', '-')}",)
