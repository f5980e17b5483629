"""Typer's options, made from the fields of dataclasses; see `cmdgen.options`."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import Field, is_dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

import typer

from cmdgen.cli.completion import WORDS, complete_model, one_of
from cmdgen.options import Option, is_required, option_of, options_of, read_value

# what Typer reads; all else it hands on as text, for `read_text`
_TYPERS = (bool, tuple, list)
# how --help names a value
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}


class Only(tuple[str, ...]):
    """The fields of a dataclass that a command takes: `Annotated[Request, Only(("size",))]`."""


def parameter(item: Field[Any], kind: type) -> Parameter:
    """Return one field as a parameter of a command, whose value is text or None for most types."""
    described, value_type = option_of(item), cast(Any, str)
    default = Parameter.empty if is_required(item) else item.default
    if kind in _TYPERS and described.read is None:
        # with the types of its members
        candidates = (item.type, *get_args(item.type))
        value_type = next(each for each in candidates if (get_origin(each) or each) is kind)
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
        settings["metavar"] = described.metavar or item.name.upper()
        info: Any = typer.Argument(**settings)
    else:
        flags = described.flags or (f"--{item.name.replace('_', '-')}",)
        info = typer.Option(*flags, **settings)
    hint: Any = Annotated[value_type | None if default is None else value_type, info]
    return Parameter(item.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _describe(described: Option, words: Sequence[str]) -> str:
    """Return an option's help with what is possible and, in a bracket, range and default."""
    text, low, high = described.help, described.low, described.high
    if described.complete in ("format", "codec"):
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


def read_text(cls: type, name: str, value: Any) -> Any:
    """Return the typed value of a field, given on the command line; None where it is not given."""
    if value is None:
        return None
    item, kind, _ = options_of(cls)[name]
    if isinstance(value, str) and kind in (int, float) and option_of(item).read is None:
        # what is no number, `read_value` refuses in its words
        with suppress(ValueError):
            value = kind(value)
    return read_value(cls, name, value)


def expand(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command with one option for each field of the dataclasses that `function` takes.

    Parameters of other types stay as they are. The dataclasses are made of the options' values, so
    that a value which is not valid is their ValueError. `command.fields` holds the class of each
    of these options.
    """
    makers: dict[str, tuple[type, list[str]]] = {}
    parameters: list[Parameter] = []
    for own in signature(function, eval_str=True).parameters.values():
        hint, only = own.annotation, None
        if get_origin(hint) is Annotated and is_dataclass(get_args(hint)[0]):
            hint, only = get_args(hint)
        if not (isinstance(hint, type) and is_dataclass(hint)):
            parameters.append(own.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        table = options_of(hint)
        names = list(table) if only is None else list(only)
        makers[own.name] = hint, names
        parameters += [parameter(*table[name][:2]) for name in names]

    if not makers:
        return function

    def command(**values: Any) -> None:
        made = {
            name: cls(**{field: read_text(cls, field, values.pop(field)) for field in names})
            for name, (cls, names) in makers.items()
        }
        function(**values, **made)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    vars(command).update(
        __signature__=Signature(parameters),
        fields={name: cls for cls, names in makers.values() for name in names},
    )
    return command
