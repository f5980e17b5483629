"""What is said on stderr while a command works, on a terminal and elsewhere."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from cmdgen.cli import progress
from cmdgen.cli.progress import Say


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves time on."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_without_a_terminal_a_stage_is_a_line_when_it_ends_and_now_and_then(capsys, clock) -> None:
    with Say().progress() as show:
        for step in range(26):
            show("content", step, 25)
            clock(0.04)
        for step in range(7):
            show("motion", step, 6, f"loss {step}")
            clock(3)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "content 25/25, 25.0/s, 1.0 s",
        # 2 seconds after the last line, then 4, then 8
        "motion 1/6, loss 1, 3.0 s each, 15 s left",
        "motion 3/6, loss 3, 3.0 s each, 9.0 s left",
        "motion 6/6, loss 6, 3.0 s each, 18 s",
    ]


def test_the_same_stage_of_the_next_clip_starts_anew(capsys, clock) -> None:
    with Say().progress() as show:
        for _ in range(2):
            for step in range(3):
                show("decode", step, 2)
                clock(100)
    line = "decode 2/2, 100.0 s each, 3:20"
    assert capsys.readouterr().err.splitlines().count(line) == 2


def test_one_thing_has_no_rate_and_a_moment_no_time(capsys, clock) -> None:
    with Say().progress() as show:
        show("load", 0, 1)
        clock(2.7)
        show("load", 1, 1)
        show("clips", 0, 4)
        clock(0.001)
        show("clips", 4, 4)
    assert capsys.readouterr().err == "load 1/1, 2.7 s\nclips 4/4\n"


def test_the_time_left_ends_at_the_deadline(capsys, clock) -> None:
    with Say().progress(deadline=1000 + 60) as show:
        show("train", 0, 1_000_000)
        clock(10)
        show("train", 10, 1_000_000)
    assert capsys.readouterr().err == "train 10/1000000, 1.0/s, 50 s left\n"


def test_quiet_says_nothing_but_results(capsys, clock) -> None:
    say = Say(quiet=True)
    say.note("a note")
    with say.progress() as show:
        show("content", 0, 1)
        clock(5)
        show("content", 1, 1)
    say.result("a.mp4", {"file": "a.mp4"})
    assert capsys.readouterr() == ("a.mp4\n", "")


def test_details_are_for_those_who_ask(capsys) -> None:
    Say().detail("float32")
    Say(verbose=True).detail("bfloat16")
    assert capsys.readouterr() == ("", "bfloat16\n")
    Say(quiet=True, verbose=True).note("a note")
    assert capsys.readouterr().err == "a note\n"


def test_results_as_json_are_one_line_each(capsys) -> None:
    say = Say(as_json=True)
    say.result("é.mp4", {"file": "é.mp4", "seed": 1})
    say.result("b.mp4", {"file": "b.mp4", "seed": 2})
    assert capsys.readouterr().out == '{"file": "é.mp4", "seed": 1}\n{"file": "b.mp4", "seed": 2}\n'


def on_a_terminal(code: str, **environment: str) -> tuple[str, str]:
    """Python whose stderr is a terminal: what came through a pipe at stdout, and what it showed."""
    leader, follower = pty.openpty()
    # what stands in this environment would decide for rich
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
        env={**inherited, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
    except OSError:
        # the terminal's other end has been closed
        pass
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait() == 0, shown.decode()
    os.close(leader)
    return out, shown.decode()


WORK = """
import time
from cmdgen.cli.progress import Say
say = Say()
with say.progress() as show:
    for step in range(9):
        show("content", step, 8)
        time.sleep(0.03)
    say.note("a [bold]note[/bold] :smile: " + "long " * 30)
    say.result("out.mp4", {})
"""


def test_bars_leave_stdout_to_the_pipe() -> None:
    out, shown = on_a_terminal(WORK)
    assert out == "out.mp4\n"
    assert "━" in shown and "8/8" in shown and re.search(r"\d/s, \d\.\d s", shown)
    # neither markup nor broken into lines of the terminal's width
    assert "a [bold]note[/bold] :smile: " + ("long " * 30).strip() in shown


def test_colour_is_left_out_where_it_is_not_wanted() -> None:
    coloured = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|38;|9[0-7])[\d;]*m")
    assert coloured.search(on_a_terminal(WORK)[1])
    plain = on_a_terminal(WORK, NO_COLOR="1")[1]
    assert "8/8" in plain and not coloured.search(plain)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines() -> None:
    shown = on_a_terminal(WORK, TERM="dumb")[1]
    assert "\x1b" not in shown and "content 8/8" in shown


def test_lines_need_no_rich() -> None:
    code = "import sys\nfrom cmdgen.cli.progress import Say\n"
    code += "with Say().progress() as show: show('content', 1, 1)\nassert 'rich' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "content 1/1\n")
