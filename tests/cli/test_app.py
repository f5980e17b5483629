"""How commands end: exit codes, one line on stderr, nothing of it on stdout."""

import os
import re
import signal
import subprocess
import sys

import pytest
import typer

from cmdgen.cli import app as application
from cmdgen.cli import errors
from cmdgen.cli.errors import Failure, on_the_way, within_memory
from cmdgen.video.write import EncoderError


@pytest.fixture
def ends_with(cmdgen, monkeypatch: pytest.MonkeyPatch):
    """Runs a command that ends with an error."""

    def run(error: BaseException):
        app = typer.Typer(rich_markup_mode=None)

        @app.callback(invoke_without_command=True)
        def fail() -> None:
            print("data")
            raise error

        monkeypatch.setattr(application, "app", app)
        return cmdgen()

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Failure("the weights\nare odd"), 1, "the weights\nare odd"),
        (Failure("three of nine jobs failed", errors.PARTIAL), 6, "three of nine jobs failed"),
        (ValueError("steps 0\n is not at least 1"), 2, "steps 0 is not at least 1"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 3, "a.txt: No such file"),
        (FileNotFoundError("no probe in x"), 3, "no probe in x"),
        (ConnectionError("the hub cannot be reached"), 3, "the hub cannot be reached"),
        (PermissionError(13, "Permission denied", "a.txt"), 1, "a.txt: Permission denied"),
        (EncoderError("a.mp4 was not written: No space left"), 5, "a.mp4 was not written: No space"),
        (MemoryError(), 4, "MemoryError"),
        (ImportError("libx.so: failed to map segment from shared object"), 4, "libx.so: failed to map segment"),
        (ImportError("No module named 'x'"), 1, "No module named 'x'"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "DefaultCPUAllocator: can't allocate"),
        (OSError(12, "Cannot allocate memory"), 4, "Cannot allocate memory"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_a_code(ends_with, error, code, line) -> None:
    result = ends_with(error)
    assert (result.code, result.out) == (code, "data\n")
    assert result.err.startswith("error: " + " ".join(line.split()))
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [AssertionError("a\nbug"), KeyError("a bug"), RuntimeError("a bug"), RecursionError()]
)
def test_what_is_our_own_fault_is_one_line_and_a_traceback_for_who_asks(ends_with, monkeypatch, error) -> None:
    result = ends_with(error)
    assert result.code == errors.BUG
    name = type(error).__name__
    assert re.fullmatch(
        rf"error: this is a bug of cmdgen: {name}: .*\(CMDGEN_TRACEBACK=1 shows where it is\)\n", result.err
    )
    monkeypatch.setenv("CMDGEN_TRACEBACK", "1")
    result = ends_with(error)
    assert result.code == errors.BUG
    assert result.err.startswith("Traceback (most recent call last)") and ", in fail\n" in result.err


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("app._reopen_streams = send", signal.SIGINT),
        ("app._run = lambda _: send()", signal.SIGTERM),
        # after a KeyboardInterrupt out of such code, python -m ends with SIGINT
        ("app._run = lambda _: exec('send()')", signal.SIGTERM),
        ("atexit.register(send)", signal.SIGHUP),
        # what is raised in a destructor does not go on
        ("app._run = lambda _: (bool(Ends()), time.sleep(20))", signal.SIGINT),
    ],
)
def test_a_signal_at_any_time_ends_it_without_a_traceback(tmp_path, when: str, number: int) -> None:
    (tmp_path / "ends.py").write_text(f"""
import atexit, signal, time
from cmdgen.cli import app
send = lambda: signal.raise_signal({number})
class Ends:
    def __del__(self):
        send()
signal.signal({number}, signal.SIG_DFL)
{when}
app.main(["--version"])
""")
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command, environment = [sys.executable, "-m", "ends"], os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, env=environment)
    assert (done.returncode, done.stderr) == (-number if "atexit" in when else 128 + number, "")


def test_threads_of_openmp_sleep_unless_the_user_says_else() -> None:
    code = "import os; from cmdgen.cli.app import main\ntry: main(['--version'])\n"
    code += "finally: print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for more, policy in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment | more)
        assert done.stdout.splitlines()[-1] == policy


def test_a_command_that_asks_for_a_code_gets_it(ends_with) -> None:
    assert ends_with(typer.Exit(143)) == (143, "data\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sample", "a dog", "-o", "a.mp4", "--model", "nano"), "unknown model 'nano'"),
        (("models", "show", "maxi"), "unknown model 'maxi': expected a folder, OWNER/NAME that"),
        (("models", "show", "./maxi"), "unknown model './maxi': expected a folder, OWNER/NAME that"),
        (("train", "export", "maxi", "to"), "maxi is not a folder"),
        (("profile", "--model", "maxi"), "unknown model 'maxi'"),
        (("eval", "mini", "--probe", "none"), "no probe in none: make one by"),
        (("rehash", "calibrate", "--prompts", "none.txt"), "none.txt: No such file"),
        (("sample", "a dog", "-o", "a.mp4", "--rehash", 9, "--rehash-file", "none.json"), "none.json: No such file"),
        (("train", "vae", "-o", "run", "--data", "nowhere"), "'nowhere' is neither one of world"),
        (("train", "vae", "-o", "run", "--init", "nowhere"), "init nowhere is not a folder"),
        (("data", "preview", "-o", "a.png", "--data", "nothing"), "neither one of world, mini, mini-gpu, shapes nor"),
        (("data", "preview", "-o", "a.png", "--font", "none.ttf"), "font none.ttf does not exist"),
        (("data", "precompute", "-o", "x", "--vae", "none"), "vae none is no model folder"),
    ],
)
def test_what_is_not_there_is_one_line_and_leaves_nothing(cmdgen, monkeypatch, tmp_path, arguments, says) -> None:
    monkeypatch.chdir(tmp_path)
    result = cmdgen(*arguments)
    assert (result.code, result.out) == (3, "")
    assert says in result.err and re.fullmatch("error: .+\n", result.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("eval", "mini", "--pairs"), "mini makes clips from text: --pairs has no use there"),
        (("eval", "mini", "--steps", 3), "mini makes clips from text: --steps has no use there"),
        (("eval", "evdm", "--reconstructed", 3), "evdm predicts frames: --reconstructed has no use there"),
        (("eval", "evdm", "--clips", 0), "--clips 0: evdm predicts frames, of at least 2 clips"),
        (("eval", "--cost", "--clips", 4), "--cost measures a cold sample: --clips has no use there"),
        (("eval", "--train-probe", "p", "--probe", "p"), "--train-probe trains a probe: --probe has no use there"),
        (("eval", "evdm", "--real", ".", "--generated", "."), "compare folders: model has no use there"),
        (("rehash", "compare", "--clips", 2, "--full", 99), "rehash 99 is not between 1 and the 25 steps"),
        (("compress", "compare", "--clips", 2), "Missing argument 'MODEL'."),
        (("compress", "importance", "--clips", 1), "--clips 1 is not at least 2"),
        (("compress", "importance", "--plot", "map.jpg"), "map.jpg: its name must end in .png"),
        (
            ("compress", "prune", "-o", "small", "--drop", "unet.mid", "--budget", 0.5),
            "without --rule measured nothing is chosen: --budget has no use there",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(cmdgen, monkeypatch, tmp_path, arguments, says) -> None:
    monkeypatch.chdir(tmp_path)
    result = cmdgen(*arguments)
    assert (result.code, result.out) == (2, "")
    assert says in result.err and re.fullmatch("error: .+\n", result.err)
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_says_what_would_fit() -> None:
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")):
        with (
            pytest.raises(Failure, match=r"^not enough memory: 16 frames fit$") as end,
            within_memory(lambda: "16 frames fit"),
        ):
            raise error
        assert end.value.code == errors.MEMORY
    with pytest.raises(RuntimeError, match="a bug"), on_the_way("ask for less"):
        raise RuntimeError("a bug")
    with pytest.raises(Failure, match="unreadable") as end, on_the_way("ask for less"):
        raise ValueError("unreadable")
    assert end.value.code == errors.FAILED


def spawn(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell's command line, `cmdgen` in it this package's."""
    start = f'cmdgen() {{ "{sys.executable}" -m cmdgen "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", start + command], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    # the reader has gone before a line comes
    done = spawn("(sleep 0.5; cmdgen models list; echo $? >&2) | true")
    assert (done.stdout, done.stderr) == ("", "141\n")
    # help is longer than what is read of it
    done = spawn("set -o pipefail; (sleep 0.5; cmdgen train vae --help) | true")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
# torch's libraries abort the process at 510
@pytest.mark.parametrize("megabytes", [250, 510, 639, 700])
def test_too_little_address_space_is_one_line(megabytes: int) -> None:
    done = spawn(f"ulimit -v {megabytes * 1024}; cmdgen sample 'a dog' -o /tmp/none.gif", OMP_NUM_THREADS="1")
    assert done.returncode == errors.MEMORY, done.stderr
    assert re.fullmatch("(seed .*\n)?error: .+\n", done.stderr)


def test_ctrl_c_while_modules_are_imported_is_silent() -> None:
    code = """
import os, signal, sys
# who runs the tests in the background may have it ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, *_):
        if name == "%s":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from cmdgen.__main__ import main
main(["models", "list"])"""
    for module, code_of_signal in (("cmdgen.cli.command", -signal.SIGINT), ("cmdgen.cli.models", 130)):
        done = subprocess.run([sys.executable, "-c", code % module], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (code_of_signal, "", "")


def test_a_full_disk_under_stdout_is_one_line() -> None:
    done = spawn("cmdgen --version > /dev/full")
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_what_a_terminal_would_act_on_is_said_as_escapes(ends_with) -> None:
    result = ends_with(ValueError("\x1b]0;x\x07\u202e does not exist"))
    assert result.err == "error: \\x1b]0;x\\x07\\u202e does not exist\n"


def test_an_error_has_an_end(ends_with) -> None:
    result = ends_with(ValueError(f"seed {'9' * 10_000} is not at least 1"))
    assert len(result.err) < 1100
    assert result.err.startswith("error: seed 99") and result.err.endswith("99 is not at least 1\n")


def test_any_stream_may_be_closed() -> None:
    # what is opened next would have its number
    done = spawn("cmdgen completion bash 2>&- <&-")
    assert done.returncode == 0 and "cmdgen" in done.stdout
    for stderr in ("&-", "/dev/full"):
        assert spawn(f"cmdgen nothing 2>{stderr}").returncode == errors.USAGE


def test_a_closed_stdout_is_no_error() -> None:
    done = spawn("cmdgen --version >&-")
    assert (done.returncode, done.stderr) == (0, "")
