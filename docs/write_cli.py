"""The page of all commands: `python docs/write_cli.py` rewrites docs/cli.md in place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from cmdgen.cli.app import app
from cmdgen.cli.help import describe

# columns of the help, whatever the terminal's width is
_WIDTH = 88
PAGE = Path(__file__).parent / "cli.md"


def write_page(page: str) -> str:
    """Return the page with the help of each command in place of the old one."""
    head, start, _ = page.partition("\n## cmdgen\n")
    assert start, "the page has lost its head, such as by > docs/cli.md: check it out again"
    parts = [head]
    root = typer.Context(get_command(app), info_name="cmdgen")
    for context in _walk(root):
        text = describe(context.command, context, _WIDTH)
        if context is not root:
            # the exit codes are the same
            text = text.partition("\n\nExit codes: ")[0]
        parts.append(f"## {context.command_path}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def _walk(context: Any) -> Iterator[typer.Context]:
    yield context
    for name in getattr(context.command, "commands", ()):
        command = context.command.get_command(context, name)
        yield from _walk(typer.Context(command, info_name=name, parent=context))


if __name__ == "__main__":
    PAGE.write_text(write_page(PAGE.read_text()))
