"""Help as it is read: in groups, with examples, in plain text; and the page that is made of it."""

import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from cmdgen.cli.app import VERBS, app
from cmdgen.cli.help import describe, sections, split_help, summarise

SCRIPT = Path(__file__).parents[2] / "docs" / "write_cli.py"


def commands(command: Any, context: typer.Context) -> list[tuple[Any, typer.Context]]:
    """All commands, each with its context."""
    found = [(command, context)]
    for name in getattr(command, "commands", ()):
        inner = command.get_command(context, name)
        found += commands(inner, typer.Context(inner, info_name=name, parent=context))
    return found


COMMANDS = {
    context.command_path: (command, context)
    for command, context in commands(get_command(app), typer.Context(get_command(app), info_name="cmdgen"))
}


@pytest.fixture
def help_of(cmdgen):
    def run(*arguments: str) -> str:
        result = cmdgen(*arguments, "--help")
        assert result.code == 0
        return result.out

    return run


def test_the_page_of_all_commands_is_as_the_app_is() -> None:
    script = runpy.run_path(str(SCRIPT))
    page = script["PAGE"].read_text()
    assert page == script["write_page"](page), "run: python docs/write_cli.py"


def test_commands_are_grouped_before_examples_and_exit_codes(help_of) -> None:
    shown = help_of()
    titles = ["Videos:", "Models:", "This machine:", "Options:", "Examples:"]
    places = [shown.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    assert shown.index("Exit codes: 0 done") > places[-1]
    for code in (1, 2, 3, 4, 5, 6, 7, 129, 130, 141, 143):
        assert f" {code} " in " ".join(shown.split())
    assert "__complete" not in shown


def test_options_are_grouped_and_those_of_other_stages_are_not_there(help_of) -> None:
    shown = help_of("train", "content")
    for title in ("Options", "Learning", "Model and machine", "Checkpoints and logs", "What is learned"):
        assert f"\n{title}:\n" in shown
    learning = shown.partition("\nLearning:\n")[2].partition("\n\n")[0]
    assert "  --lr X " in learning and "--device" not in learning
    assert "--min-snr" in shown and "--mask" not in shown


@pytest.mark.parametrize("path", COMMANDS)
def test_help_has_groups_examples_and_no_line_too_long(path: str) -> None:
    command, context = COMMANDS[path]
    for width in (60, 80):
        lines = describe(command, context, width).splitlines()
        first, *_ = sections(command, context)
        prose = lines[: lines.index(f"{first}:")]
        assert all(len(line) <= width for line in prose)
    options = [each for each in command.params if not each.hidden]
    groups = {getattr(each, "rich_help_panel", None) for each in options}
    if len(options) > 8:
        assert len(groups) > 1
        assert split_help(command.help)[1], "no examples"


@pytest.mark.parametrize("path", [path for path in COMMANDS if COMMANDS[path][0].help])
def test_examples_are_commands_that_are_understood(path: str) -> None:
    root = get_command(app)
    for line in split_help(COMMANDS[path][0].help)[1]:
        for example in line.split(" | "):
            words = shlex.split(example.partition(" > ")[0])
            if words[0] != "cmdgen":
                continue
            # parsed, not run
            command: Any = root
            context = typer.Context(root, info_name="cmdgen")
            rest = words[1:]
            while hasattr(command, "commands"):
                command = command.get_command(context, rest[0])
                context = typer.Context(command, info_name=rest.pop(0), parent=context)
            command.make_context(context.info_name, rest, parent=context.parent)


def test_help_is_plain_where_colours_are_forced(help_of, monkeypatch) -> None:
    # some CI services set these, and typer then colours what goes into a pipe
    for name in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS"):
        monkeypatch.setenv(name, "1")
    for arguments in ((), ("train",), ("profile",)):
        assert "\x1b" not in help_of(*arguments)


def test_a_group_without_a_command_shows_its_help(cmdgen) -> None:
    code, out, err = cmdgen("models")
    assert (code, out) == (2, "")
    assert err.startswith("Usage: cmdgen models [OPTIONS] COMMAND")


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_summarised_by_the_start_of_its_help(name: str) -> None:
    root = get_command(app)
    command = root.get_command(typer.Context(root, info_name="cmdgen"), name)
    assert summarise(command.help) == VERBS[name][2]
