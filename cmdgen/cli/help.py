"""How `--help` looks: options and commands in groups, then examples, in plain text."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from cmdgen.cli.errors import EXIT_CODES

# of options and commands that are in no group
OPTIONS, COMMANDS = "Options", "Commands"
EXAMPLES = "Examples"
# of a page, at most; and of the column of names
_WIDTH, _NAMES = 80, 28

Row = tuple[str, str]


class Command(TyperCommand):
    """A command whose help is `describe`'s."""

    def get_help(self, ctx: Any) -> str:
        return describe(self, ctx, min(_WIDTH, shutil.get_terminal_size().columns))


class Group(TyperGroup):
    """Commands under one name, whose help is `describe`'s."""

    def get_help(self, ctx: Any) -> str:
        return describe(self, ctx, min(_WIDTH, shutil.get_terminal_size().columns))


def describe(command: TyperCommand | TyperGroup, context: typer.Context, width: int) -> str:
    """The help of a command: usage, what it does, its arguments, options and examples."""
    said, examples = split_help(command.help)
    pieces = [context.command_path, *command.collect_usage_pieces(context)]
    parts = [_wrap(" ".join(pieces), width, "Usage: ", " " * 7)]
    parts += [_wrap(paragraph, width) for paragraph in said.split("\n\n")]
    groups = sections(command, context)
    column = 4 + min(_NAMES, max(len(name) for rows in groups.values() for name, _ in rows))
    for name, rows in groups.items():
        parts.append("\n".join([f"{name}:", *_lay_out(rows, column, width)]))
    if examples:
        parts.append("\n  ".join([f"{EXAMPLES}:", *examples]))
    if command.epilog:
        parts.append(command.epilog)
    return "\n\n".join([*parts, _wrap(EXIT_CODES, width)])


def split_help(text: str | None) -> tuple[str, list[str]]:
    """A docstring -> what it says, and the lines of its last section, `Examples:`."""
    said, _, examples = inspect.cleandoc(text or "").partition(f"\n{EXAMPLES}:\n")
    return said.strip(), textwrap.dedent(examples).splitlines()


def sections(command: TyperCommand | TyperGroup, context: typer.Context) -> dict[str, list[Row]]:
    """The rows of arguments, of options by group and of commands by group, under their titles.

    Groups come in the order of their first option; one that holds `--help` alone comes last.
    """
    found: dict[str, list[Row]] = {}
    for parameter in command.get_params(context):
        row = parameter.get_help_record(context)
        if row is not None:
            group = getattr(parameter, "rich_help_panel", None)
            own = OPTIONS if parameter.param_type_name == "option" else "Arguments"
            found.setdefault(group or own, []).append((row[0], _keep_last_default(row[1])))
    if len(found[OPTIONS]) == 1:
        found[OPTIONS] = found.pop(OPTIONS)
    for name, each in command.commands.items() if isinstance(command, TyperGroup) else ():
        if not each.hidden:
            group = getattr(each, "rich_help_panel", None) or COMMANDS
            summary, *_ = split_help(each.help)[0].split("\n\n")
            found.setdefault(group, []).append((name, summary))
    return found


def _keep_last_default(text: str) -> str:
    """Help without the default that its text names, where the user's file has another."""
    named, *others = re.findall(r" *\[default: [^]]*\]", text) or [""]
    return text.replace(named, "", 1) if others else text


def _wrap(text: str, width: int, first: str = "", other: str = "") -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=other,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _lay_out(rows: Sequence[Row], column: int, width: int) -> list[str]:
    """Names, and what they mean from a column on; a name that is too long has its own line."""
    lines = []
    for name, text in rows:
        start = f"  {name}"
        if len(start) + 2 > column:
            lines.append(start)
            start = ""
        lines.append(_wrap(text, width, start.ljust(column), " " * column))
    return lines
