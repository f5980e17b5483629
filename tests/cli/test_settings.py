"""Defaults from a file: which apply, which win, and what is said of those that are wrong."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import typer

from cmdgen.cli import app as application
from cmdgen.cli import settings
from cmdgen.cli.command import expand
from cmdgen.options import Options, option, parse_size, write_size


@dataclass(frozen=True)
class Values(Options):
    """A field of every kind."""

    count: int = option(1, "A number.", low=1)
    share: float = option(0.5, "A number.")
    long_name: str = option("own", "A text.")
    file: Path | None = option(None, "A file.")
    size: tuple[int, int] | None = option(None, "A size.", read=parse_size, write=write_size)
    quiet: bool = option(False, "A flag.")
    both: bool = option(False, "One of two flags.", flags=("--both/--neither",))
    pair: tuple[float, float] | None = option(None, "Two numbers.")
    as_json: bool = option(False, "A flag.", flags=("--json",))


OWN = asdict(Values())


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What a command got: `cmdgen say` has an option of every kind, `deep say` as well."""
    got: dict[str, object] = {}
    inner = typer.Typer(rich_markup_mode=None)

    @application.app.command("say")
    @inner.command("say")
    @expand
    def say(values: Values, many: list[int] | None = None) -> None:
        got.update(asdict(values), many=many)

    application.app.add_typer(inner, name="deep")
    # two commands make a group of it
    inner.command("other")(lambda: None)
    yield got
    application.app.registered_commands.pop()
    application.app.registered_groups.pop()


def test_a_file_sets_what_no_flag_says(cmdgen, given, tmp_path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        '[say]\ncount = 2\nshare = 1\nlong-name = "x y"\nfile = "a.txt"\nquiet = true\n'
        "both = true\npair = [1, 2.5]\nmany = [3, 4]\njson = true\nsize = '48x32'\n"
        "[deep.say]\nlong_name = 'deep'\n"
    )
    assert cmdgen("--config", config, "say").code == 0
    expected = {
        **{"count": 2, "share": 1.0, "long_name": "x y", "file": Path("a.txt"), "quiet": True},
        **{"both": True, "pair": (1.0, 2.5), "many": [3, 4], "as_json": True, "size": (32, 48)},
    }
    assert given == expected
    flags = ("--count", 5, "--neither", "--pair", 3, 4, "--many", 9)
    assert cmdgen("--config", config, "say", *flags).code == 0
    assert (given["count"], given["both"], given["many"]) == (5, False, [9])
    assert given["pair"] == (3.0, 4.0)
    assert given["long_name"] == "x y"
    assert cmdgen("--config", config, "deep", "say").code == 0
    assert (given["long_name"], given["count"]) == ("deep", 1)


def test_the_file_in_its_usual_place_is_read_unless_told_not_to(cmdgen, given, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert cmdgen("say").code == 0
    assert {name: given[name] for name in OWN} == OWN
    path = settings.config_path()
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("[say]\ncount = 3\n")
    assert cmdgen("say").code == 0
    assert given["count"] == 3
    assert cmdgen("--no-config", "say").code == 0
    assert given["count"] == 1
    other = tmp_path / "other.toml"
    other.write_text("")
    assert cmdgen("--config", other, "say").code == 0
    assert given["count"] == 1
    assert cmdgen("--config", other, "--no-config", "say").code == 2


def test_help_shows_the_defaults_that_apply(cmdgen, tmp_path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[profile]\nruns = 7\nsteps = 9\n")
    shown = " ".join(cmdgen("--config", config, "profile", "--help").out.split())
    assert "after one to warm up. [1 to 1000; default: 7]" in shown
    assert "Steps of both models. [>= 1; default: 9] --batch" in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[sampel]", "there is no command 'sampel': did you mean 'sample'?"),
        ("count = 3", "count is in no table: expected it in one such as [sample]"),
        ("[say]\ncuont = 3", "[say] has no option 'cuont': did you mean 'count'?"),
        ("[say]\nhelp = true", "[say] has no option 'help'"),
        ("[say]\ncount = 'many'", "[say] count 'many' is not a whole number"),
        ("[say]\ncount = 1.5", "[say] count '1.5' is not a whole number"),
        ("[say]\ncount = true", "[say] count: true is not allowed, expected a number or a text"),
        ("[say]\nquiet = 'yes'", '[say] quiet: "yes" is not allowed, expected true or false'),
        ("[say]\ncount = [3]", "[say] count: a list is not allowed"),
        ("[say]\nmany = [3, [4]]", "[say] many: a list is not allowed"),
        ("[say]\ncount = 2024-01-01", "[say] count: a date is not allowed"),
        ("[say]\ncount = 0", "[say] count 0 is not at least 1"),
        ("[say]\nsize = 64", "[say] size '64' is not WIDTHxHEIGHT"),
        ("[say]\npair = [1]", "[say] pair [1]: "),
        ("[say]\nmany = ['x']", '[say] many ["x"]: '),
        ("[say.x]\n", "[say] has no command 'x'"),
        ("[deep]\nsay = 1", "[deep] has no option 'say'"),
        ("[say\n", "not readable as TOML ("),
        ("a" * 2**20 + "b", "larger than 1024 KiB"),
        ("a = " + "[" * 100_000, "not readable as TOML ("),
        ("[say]\nlong-name = '\udcff'", "not readable as TOML ("),
    ],
)
def test_what_is_wrong_is_one_line_that_names_file_and_key(cmdgen, given, tmp_path, text, says) -> None:
    config = tmp_path / "c.toml"
    config.write_bytes(text.encode(errors="surrogateescape"))
    result = cmdgen("--config", config, "say")
    assert (result.code, result.out, given) == (2, "", {})
    assert re.fullmatch("error: .+\n", result.err)
    assert result.err.startswith(f"error: {config}: {says}")


def test_a_file_that_is_named_must_be_there(cmdgen, tmp_path) -> None:
    path = tmp_path / "none.toml"
    result = cmdgen("--config", path, "models", "list")
    assert result == (3, "", f"error: {path}: No such file or directory\n")


def test_without_a_home_directory_there_is_no_file(cmdgen, monkeypatch) -> None:
    def fail(name: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    for kind in ("config", "data", "cache"):
        monkeypatch.setattr(f"platformdirs.user_{kind}_path", fail)
    assert settings.config_path() is None
    assert cmdgen("models", "list").code == 0
