"""The page of all commands, docs/cli.md: `python -m cmdgen.cli.docs > docs/cli.md`."""

import textwrap
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from cmdgen.cli.app import app
from cmdgen.cli.errors import EXIT_CODES
from cmdgen.cli.help import describe

# of the text in it, whatever the terminal's width is
_WIDTH = 88
_HEAD = """\
# The command line

Made from the app by `python -m cmdgen.cli.docs > docs/cli.md`; a test keeps it so.

Data goes to stdout, everything else to stderr.

{exit_codes}

Options have defaults in a TOML file, `config.toml` in the platform's folder for configuration
(`cmdgen doctor` names it) or the file after `--config`: a table for each command, keys as its long
options. Flags win.

    [sample]
    steps = 20
    sampler = "dpm++"

    [train.content]
    batch = 16

`cmdgen completion bash|zsh|fish` prints what completes commands, options and values in a shell."""


def write_page() -> str:
    """Markdown: the help of each command that is not hidden, without the exit codes of each."""
    root = get_command(app)
    parts = [_HEAD.format(exit_codes=textwrap.fill(EXIT_CODES, 100, break_on_hyphens=False))]
    for context in _walk(root, typer.Context(root, info_name="cmdgen")):
        command: Any = context.command
        text = describe(command, context, _WIDTH).partition("\n\nExit codes: ")[0]
        if context.parent is not None:
            parts.append(f"## {context.command_path}")
        parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _walk(command: Any, context: typer.Context) -> Iterator[typer.Context]:
    yield context
    for name, inner in command.commands.items() if isinstance(command, TyperGroup) else ():
        if not inner.hidden:
            yield from _walk(inner, typer.Context(inner, info_name=name, parent=context))


if __name__ == "__main__":
    print(write_page(), end="")
