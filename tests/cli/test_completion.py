"""What shells offer: as Typer's scripts ask the command, and in the shells themselves."""

import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmdgen.compression.units import PRUNED
from cmdgen.config import PRESETS, SAMPLERS
from cmdgen.world.config import WORLDS

ROOT = Path(__file__).parents[2]
SHELLS = ["bash", "zsh", "fish"]


@pytest.fixture
def offered(cmdgen, monkeypatch):
    """Returns what can stand for the last word; where that is nothing, a shell offers files."""

    def ask(*words: str, shell: str = "bash") -> list[str]:
        monkeypatch.setenv("_CMDGEN_COMPLETE", f"complete_{shell}")
        # bash gives all words and the index of the last one, the others a part of a line
        monkeypatch.setenv("COMP_WORDS", "\n".join(["cmdgen", *words]))
        monkeypatch.setenv("COMP_CWORD", str(max(1, len(words))))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(["cmdgen", *words]))
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        result = cmdgen()
        assert (result.code, result.err) == (0, "")
        return result.out.split("\n")[:-1] if result.out.strip() else []

    return ask


def test_commands_are_offered(offered) -> None:
    commands = offered("")
    assert {"sample", "eval", "doctor", "models", "train", "completion"} <= set(commands)
    assert offered() == commands
    assert offered("mod") == ["models"]
    assert offered("models", "") == ["list", "show", "init", "pull", "import"]
    # nothing is printed by a flag that would end the command
    assert offered("--version", "") == commands


def test_options_are_offered_once_with_their_meaning(offered) -> None:
    options = offered("profile", "--")
    assert {"--model", "--steps", "--json", "--help"} <= set(options)
    assert "--json" not in offered("profile", "--json", "--")
    # one that may be repeated
    assert "--full" in offered("rehash", "compare", "--full", "3", "--")
    assert offered("train", "vae", "--no-rest") == ["--no-restart"]
    # options of other stages are hidden
    assert "--mask" in offered("train", "vae", "--")
    assert "--mask" not in offered("train", "content", "--")
    # of the help, the first sentence without the default
    assert offered("profile", "--dt", shell="fish")[0].startswith("--dtype\tauto")
    (meaning,) = offered("data", "preview", "--spl", shell="fish")
    assert meaning.startswith("--split\t") and "default" not in meaning and "." not in meaning
    assert all("\t" in line for line in offered("sample", "--", shell="fish"))
    assert offered("data", "preview", "--spl", shell="zsh")[0].startswith("""_arguments '*: :(("--split":""")


def test_values_are_offered(offered) -> None:
    assert offered("rehash", "calibrate", "--sampler", "") == list(SAMPLERS)
    assert offered("profile", "--device", "c") == ["cpu", "cuda"]
    assert offered("models", "init", "cmd-") == [name for name in (*PRESETS, *PRUNED) if name.startswith("cmd-")]
    assert offered("train", "vae", "--data", "") == list(WORLDS)
    assert offered("completion", "") == SHELLS
    # numbers have no end
    assert offered("profile", "--steps", "") == []
    assert offered("train", "vae", "--betas", "0.9", "") == []
    # the option has its two values: what comes next is another
    assert "--lr" in offered("train", "vae", "--betas", "0.9", "0.99", "--l")


def test_values_after_an_equals_sign_are_offered_in_each_shells_words(offered) -> None:
    # as zsh and fish have it, and as bash has
    assert offered("profile", "--dtype=b", shell="fish") == ["--dtype=bfloat16"]
    assert offered("profile", "--dtype", "=", "b") == ["bfloat16"]
    assert offered("profile", "--device", "=") == ["auto", "cpu", "cuda", "mps"]
    assert offered("profile", "--steps=3", "--mod") == ["--model"]


@pytest.mark.parametrize(
    "words",
    [
        "profile --trace ",
        "--config ",
        "train vae -o ru",
        "sample -f ",
        "sample -o cl",
        "decode a.safetensors -o ",
        "train vae --output=ru",
        # no model's name begins so
        "profile --model ./mo",
    ],
)
def test_files_are_left_to_the_shell(offered, words) -> None:
    assert offered(*words.split(" ")) == []


def test_models_in_the_hubs_cache_are_offered(offered, monkeypatch, tmp_path) -> None:
    snapshot = tmp_path / "models--acme--video--small" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert offered("eval", "") == ["evdm", "evdm-world", "mini"]
    (snapshot / "model_index.json").write_text("{}")
    assert offered("eval", "") == ["evdm", "evdm-world", "mini", "acme/video--small"]


def test_completion_imports_neither_torch_nor_rich() -> None:
    code = "import sys\nfrom cmdgen.cli.app import main\ntry: main([])\n"
    code += "finally: assert not {'torch', 'rich'} & {*sys.modules}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "_CMDGEN_COMPLETE": "complete_fish",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "_TYPER_COMPLETE_ARGS": "cmdgen sample --s",
        },
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--sampler\t" in done.stdout


# what is typed, with Tab after it, and what the line becomes
TYPED = {
    "cmdgen prof": "cmdgen profile",
    "cmdgen profile --dtype=b": "cmdgen profile --dtype=bfloat16",
    "cmdgen profile --dtype b": "cmdgen profile --dtype bfloat16",
    "cmdgen profile --trace a": r"cmdgen profile --trace a\ clip.mp4",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, where `cmdgen` is a command."""
    (tmp_path / "a clip.mp4").touch()
    command = tmp_path / "bin" / "cmdgen"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cmdgen "$@"\n')
    command.chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
    }


def run(shell: str, script: str, folder: Path) -> list[str]:
    """A shell's script, with all of TYPED as its arguments -> its lines."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run(
        [shell, "-c", script, *([shell] if shell == "zsh" else []), *TYPED],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder),
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


# prints each line when Ctrl-G is pressed
BASH_SETUP = r"""
PS1=; stty -echo; bind 'set enable-bracketed-paste off'
bind -x '"\C-g": printf "LINE:%s:\n" "$READLINE_LINE"; READLINE_LINE='
eval "$(cmdgen completion bash)"; printf '%s\n' REA""DY
"""


def test_bash_completes(folder: Path) -> None:
    leader, follower = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        **{"stdin": follower, "stdout": follower, "stderr": follower, "start_new_session": True},
        **{"cwd": folder, "env": {**environment(folder), "TERM": "dumb"}},
    )
    os.close(follower)

    def type_in(text: str, end: bytes) -> str:
        os.write(leader, text.encode())
        shown = b""
        while end not in shown:
            assert select.select([leader], [], [], 60)[0], shown
            shown += os.read(leader, 4096)
        return shown.decode()

    type_in(BASH_SETUP, b"READY\r\n")
    lines = [type_in(f"{text}\t\a", b":\r\n").partition("LINE:")[2] for text in TYPED]
    assert [line.strip(": \r\n") for line in lines] == list(TYPED.values())
    os.write(leader, b"exit\n")
    assert shell.wait(timeout=10) == 0
    os.close(leader)


def test_fish_completes(folder: Path) -> None:
    script = "cmdgen completion fish | source; for line in $argv; complete -C $line; end"
    found = [line.partition("\t")[0] for line in run("fish", script, folder)]
    assert found == ["profile", "--dtype=bfloat16", "bfloat16", "a clip.mp4"]


# types into a shell of its own, and prints what the line becomes
TYPE_INTO_ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
ask() { zpty -w shell "$1"; }
ask 'PS1=; stty -echo; autoload -Uz compinit; compinit -u -D'
ask 'eval "$(cmdgen completion zsh)"'
ask 'show() { print -r -- "LINE:$BUFFER:"; BUFFER=; zle accept-line }; zle -N show'
ask 'bindkey "^I" complete-word; bindkey "^G" show; print READY'
while zpty -r shell line; do [[ $line == *READY* ]] && break; done
for text; do
    zpty -w -n shell "$text"$'\\t'
    zpty -w -n shell $'\\a'
    while zpty -r shell line; do [[ $line == *LINE:* ]] && break; done
    print -r -- "${${line##*LINE:}%%:*}"
done
zpty -d shell
"""


def test_zsh_completes(folder: Path) -> None:
    lines = run("zsh", TYPE_INTO_ZSH, folder)
    assert [line.rstrip() for line in lines] == list(TYPED.values())


def test_an_unknown_shell_is_refused(cmdgen, monkeypatch) -> None:
    refused = (2, "", "error: shell 'tcsh' is not one of bash, zsh, fish\n")
    assert cmdgen("completion", "tcsh") == refused
    monkeypatch.setenv("_CMDGEN_COMPLETE", "complete_tcsh")
    assert cmdgen() == refused
