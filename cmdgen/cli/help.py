"""What `--help` prints: commands and options in groups, then examples, in plain text."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable
from functools import partial
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from cmdgen.cli.errors import EXIT_CODES
from cmdgen.options import Option

# titles of what is in no group
OPTIONS, COMMANDS = "Options", "Commands"
EXAMPLES = "Examples"
# columns: of a page at most, and of the names of options and commands
_WIDTH, _NAMES = 80, 28
_NOTES = re.compile(r"  \[([^]]*)\]")
_fill = partial(textwrap.fill, break_on_hyphens=False, break_long_words=False)

Rows = list[tuple[str, str]]


class _Plain:
    """A command whose help is `describe`'s, and whose fields' texts are `read_text`'s to check."""

    help: str | None
    callback: Any

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        options = getattr(self.callback, "options", {})
        for each in parameters:
            keep = partial(_keep, each, options.get(each.name), each.process_value)
            vars(each).setdefault("process_value", keep)
        return parameters

    def get_help(self, ctx: Any) -> str:
        return describe(self, ctx, min(_WIDTH, shutil.get_terminal_size().columns))

    def get_short_help_str(self, limit: int = 0) -> str:
        return summarise(self.help)


def _keep(parameter: Any, described: Option | None, check: Any, context: Any, value: Any) -> Any:
    """Return None and texts as they are: Typer would import pydantic for them, 0.07 s."""
    needed = parameter.required or parameter.multiple or parameter.nargs == -1
    if (value is None and not needed) or (described is not None and isinstance(value, str)):
        return value
    if described is not None and described.repeats:
        # texts, each of one use of the option
        return value or ()
    return check(context, value)


class Command(_Plain, TyperCommand):
    """A command that does something."""


class Group(_Plain, TyperGroup):
    """Commands under one name."""

    def summaries(self) -> Iterable[tuple[str, str, str]]:
        """Return the title of its group, name and summary of each command."""
        return [(COMMANDS, name, summarise(each.help)) for name, each in self.commands.items()]


def describe(command: Any, context: typer.Context, width: int) -> str:
    """Return the help of a command: usage, what it does, its options and examples."""
    text, examples = split_help(command.help)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    # Typer puts what is required in braces
    usage = usage.replace("{", "").replace("}", "")
    parts = [_fill(f"Usage: {usage}", width, subsequent_indent=" " * 7)]
    parts += [_fill(paragraph, width) for paragraph in text.split("\n\n")]
    groups = sections(command, context)
    column = 4 + min(_NAMES, max(len(name) for rows in groups.values() for name, _ in rows))
    for title, rows in groups.items():
        parts.append("\n".join([f"{title}:", *_lay_out(rows, column, width)]))
    if examples:
        parts.append("\n  ".join([f"{EXAMPLES}:", *examples]))
    if command.epilog:
        parts.append(command.epilog)
    return "\n\n".join([*parts, _fill(EXIT_CODES, width)])


def split_help(text: str | None) -> tuple[str, list[str]]:
    """Split a docstring into its text and the lines of its last section, `Examples:`."""
    text, _, examples = inspect.cleandoc(text or "").partition(f"\n{EXAMPLES}:\n")
    return text.strip(), textwrap.dedent(examples).splitlines()


def summarise(text: str | None) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join(split_help(text)[0].partition("\n\n")[0].split())


def sections(command: Any, context: typer.Context) -> dict[str, Rows]:
    """Return the names and meanings of commands, arguments and options by the group's title.

    Groups come in the order of their first member; one that holds `--help` alone comes last.
    """
    groups: dict[str, Rows] = {}
    for title, name, summary in getattr(command, "summaries", tuple)():
        groups.setdefault(title, []).append((name, summary))
    for parameter in command.get_params(context):
        if record := parameter.get_help_record(context):
            plain = OPTIONS if parameter.param_type_name == "option" else "Arguments"
            title = getattr(parameter, "rich_help_panel", None) or plain
            # Typer adds the type of an argument, which its name says
            name, _, _ = record[0].partition(" <")
            groups.setdefault(title, []).append((name, _merge_notes(record[1])))
    if len(groups[OPTIONS]) == 1:
        groups[OPTIONS] = groups.pop(OPTIONS)
    return groups


def _merge_notes(text: str) -> str:
    """Return help with one bracket at its end: the possible values, and the last default."""
    notes = [note.partition("default: ") for note in _NOTES.findall(text)]
    kept = [before.rstrip("; ") for before, _, _ in notes if before]
    kept += [f"default: {default}" for _, _, default in notes if default][-1:]
    text = _NOTES.sub("", text)
    return f"{text}  [{'; '.join(kept)}]" if kept else text


def _lay_out(rows: Rows, column: int, width: int) -> list[str]:
    """Return lines with meanings from `column` on; a name that is too long has its own line."""
    lines = []
    for name, text in rows:
        start = f"  {name}"
        if len(start) + 2 > column:
            lines.append(start)
            start = ""
        meaning, bracket, notes = text.partition("  [")
        if len(notes) < width - column:
            # on one line
            notes = notes.replace(" ", "\xa0")
        filled = _fill(
            meaning + bracket + notes, width, initial_indent=start.ljust(column), subsequent_indent=" " * column
        )
        lines.append(filled.replace("\xa0", " "))
    return lines
