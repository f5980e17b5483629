"""Typer's options, made from the fields of dataclasses; see `cmdgen.options`."""

import inspect
from collections.abc import Callable
from dataclasses import Field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from cmdgen.cli.completion import COMPLETIONS, one_of
from cmdgen.options import is_required, option_of, options_of

# what the command line reads by itself; all else comes as text, and the dataclass reads that
_PLAIN = (int, float, bool, Path, tuple)


class Only(tuple[str, ...]):
    """The fields of a dataclass that a command takes: `Annotated[Request, Only(("size",))]`."""


def parameter(
    item: Field[Any],
    kind: type,
    *,
    default: Any = inspect.Parameter.empty,
    shown: str | None = None,
) -> inspect.Parameter:
    """Return one field as a parameter of a command.

    `default` and `shown`, the default that help shows, stand for the field's own.
    """
    described = option_of(item)
    if default is inspect.Parameter.empty and not is_required(item):
        default = item.default
        if described.read is not None and default is not None:
            default = described.write(default)
    shown = shown or described.shown
    settings: dict[str, Any] = {
        "help": f"{described.help}  [default: {shown}]" if shown else described.help,
        "metavar": described.metavar,
        "rich_help_panel": described.group,
        "show_default": not shown and default not in (None, "", False),
    }
    if described.choices:
        settings["autocompletion"] = one_of(described.choices)
    elif described.complete in COMPLETIONS:
        settings["autocompletion"] = COMPLETIONS[described.complete]
    if described.argument:
        info: Any = typer.Argument(**settings)
    else:
        name = f"--{item.name.replace('_', '-')}"
        info = typer.Option(*(described.flags or (name,)), **settings)
    typed: Any = str
    if kind in _PLAIN and described.read is None:
        typed = item.type if kind is tuple else kind
    if default is None:
        typed = typed | None
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[typed, info],
    )


def expand(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command with one option for each field of the dataclasses that `function` takes.

    Parameters of other types stay as they are. The dataclasses are made of the options' values, so
    that a value which is not valid is their ValueError.
    """
    makers: dict[str, tuple[type, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for own in inspect.signature(function, eval_str=True).parameters.values():
        hint, only = own.annotation, None
        if get_origin(hint) is Annotated and is_dataclass(get_args(hint)[0]):
            hint, only = get_args(hint)
        if not (isinstance(hint, type) and is_dataclass(hint)):
            parameters.append(own.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        table = options_of(hint)
        names = list(table) if only is None else list(only)
        makers[own.name] = hint, names
        parameters += [parameter(*table[name][:2]) for name in names]

    def command(**values: Any) -> None:
        made = {
            name: cls(**{field: values.pop(field) for field in names})
            for name, (cls, names) in makers.items()
        }
        function(**values, **made)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
