"""Options made from the fields of dataclasses: how they are shown, and how they are read."""

import inspect
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer

from cmdgen.cli import app as application
from cmdgen.cli.command import Only, expand
from cmdgen.cli.help import Command
from cmdgen.options import Options, option, parse_size, write_size


@dataclass(frozen=True)
class Fields(Options):
    kind: str = option(MISSING, "A kind.", choices=("one", "other"), argument=True)
    count: int = option(1, "A count.", low=1, high=9)
    share: float | None = option(None, "A share.", low=0, shown="the model's own")
    size: tuple[int, int] = option((32, 64), "A size.", read=parse_size, write=write_size)
    seed: int | None = option(None, "A seed.", high=2**63 - 1, shown="random", group="Seeds")
    file: Path | None = option(None, "A file.", flags=("--input", "-i"))
    pair: tuple[float, float] = option((1.0, 2.0), "Two numbers.")
    many: list[int] | None = option(None, "Some numbers.")
    flag: bool = option(False, "A flag.")


@dataclass(frozen=True)
class Other:
    taken: int | None = option(None, "A number.")
    left_out: int = option(3, "A number.")


@pytest.fixture
def make(cmdgen, monkeypatch):
    """Runs a command that takes `Fields` and one of the fields of `Other`."""
    app, got = typer.Typer(add_completion=False, rich_markup_mode=None), []

    @app.command(cls=Command)
    @expand
    def make(fields: Fields, other: Annotated[Other, Only(("taken",))], plain: bool = False) -> None:
        """Make it."""
        got.append((fields, other, plain))

    monkeypatch.setattr(application, "app", app)

    def run(*arguments: object):
        got.clear()
        result = cmdgen(*arguments)
        return got[0] if got else result

    return run


def test_values_are_read_as_the_dataclass_reads_them(make) -> None:
    assert make("one") == (Fields("one"), Other(), False)
    words = "--count 9 --share 0 --size 8x4 --seed 5 -i a.txt --pair 3 4 --many 1 --many 2 --flag"
    expected = Fields("other", 9, 0.0, (4, 8), 5, Path("a.txt"), (3.0, 4.0), [1, 2], True)
    assert make("other", *words.split(), "--taken", 7, "--plain") == (expected, Other(7), True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--count x", "--count 'x' is not a whole number"),
        ("--count 1.5", "--count '1.5' is not a whole number"),
        ("--count 10", "--count 10 is not between 1 and 9"),
        ("--share nan", "--share nan is not at least 0"),
        ("--share -1", "--share -1.0 is not at least 0"),
        ("--size 8", "--size '8' is not WIDTHxHEIGHT"),
        ("--left-out 1", "No such option: --left-out"),
        ("--pair 1", "Option '--pair' requires 2 arguments"),
    ],
)
def test_a_value_that_is_not_valid_is_one_line(make, words, says) -> None:
    code, out, err = make("one", *words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {says}") and err.count("\n") == 1


def test_an_argument_has_choices_and_is_required(make) -> None:
    assert make("two")[2] == "error: kind 'two' is not one of one, other\n"
    assert make()[2].startswith("error: Missing argument")


def test_help_names_values_ranges_and_defaults(make) -> None:
    assert make("--help").out.partition("\n\nExit codes")[0] == inspect.cleandoc("""
        Usage: cmdgen [OPTIONS] KIND

        Make it.

        Arguments:
          KIND                  A kind. One of one, other.  [required]

        Options:
          --count N             A count.  [1 to 9; default: 1]
          --share X             A share.  [>= 0; default: the model's own]
          --size TEXT           A size.  [default: 64x32]
          -i, --input PATH      A file.
          --pair X X            Two numbers.  [default: 1.0, 2.0]
          --many N              Some numbers.
          --flag                A flag.
          --taken N             A number.
          --plain / --no-plain  [default: no-plain]
          --help                Show this message and exit.

        Seeds:
          --seed N              A seed.  [default: random]
        """)


def test_a_function_without_dataclasses_stays_as_it_is() -> None:
    def verb(name: str) -> None: ...

    assert expand(verb) is verb
