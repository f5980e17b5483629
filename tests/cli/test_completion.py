"""What shells offer: through the command that their scripts run, and in the shells themselves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from cmdgen.cli.app import app
from cmdgen.cli.completion import SCRIPTS, find
from cmdgen.config import PRESETS, SAMPLERS
from cmdgen.world.config import WORLDS

ROOT = Path(__file__).parents[2]


def offered(*words: str) -> list[str] | None:
    """What can stand for the last word; None: a file."""
    found = find(get_command(app), list(words))
    return None if found is None else [value for value, _ in found]


def test_commands_are_offered_without_those_that_are_hidden() -> None:
    commands = offered("")
    assert commands is not None
    assert {"sample", "eval", "doctor", "models", "train", "completion"} <= set(commands)
    assert "__complete" not in commands
    assert offered() == commands
    assert offered("mod") == ["models"]
    assert offered("models", "") == ["list", "show", "init", "pull"]
    assert offered("nothing", "") == []


def test_options_are_offered_once_with_their_meaning() -> None:
    options = offered("profile", "--")
    assert options is not None
    assert {"--model", "--steps", "--json", "--help"} <= set(options)
    assert "--json" not in offered("profile", "--json", "--")
    # one that may be repeated
    assert "--full" in offered("rehash", "compare", "--full", "3", "--")
    assert offered("train", "vae", "--no-rest") == ["--no-restart"]
    # options of other stages are hidden
    assert "--mask" in offered("train", "vae", "--")
    assert "--mask" not in offered("train", "content", "--")
    meanings = dict(find(get_command(app), ["data", "preview", "--sp"]) or ())
    assert meanings == {"--split": "train, or test: held out"}


def test_values_are_offered() -> None:
    assert offered("rehash", "calibrate", "--sampler", "") == list(SAMPLERS)
    assert offered("profile", "--device", "c") == ["cpu", "cuda"]
    assert offered("models", "init", "cmd-") == [name for name in PRESETS if "cmd-" in name]
    assert offered("train", "vae", "--data", "") == list(WORLDS)
    assert offered("completion", "") == list(SCRIPTS)
    # numbers have no end
    assert offered("profile", "--steps", "") == []
    assert offered("train", "vae", "--betas", "0.9", "") == []
    # the option has its two values: what comes next is another
    assert "--lr" in offered("train", "vae", "--betas", "0.9", "0.99", "--l")


def test_values_after_an_equals_sign_are_offered_in_each_shells_words() -> None:
    # as zsh and fish have it, and as bash has
    assert offered("profile", "--dtype=b") == ["--dtype=bfloat16"]
    assert offered("profile", "--dtype", "=", "b") == ["bfloat16"]
    assert offered("profile", "--device", "=") == ["auto", "cpu", "cuda"]
    assert offered("profile", "--steps=3", "--mod") == ["--model"]


def test_files_are_offered_where_they_are_meant() -> None:
    assert offered("profile", "--trace", "") is None
    assert offered("--config", "") is None
    assert offered("train", "vae", "-o", "ru") is None
    assert offered("sample", "-f", "") is None
    assert offered("sample", "-o", "cl") is None
    assert offered("decode", "a.safetensors", "-o", "") is None
    assert offered("train", "vae", "--output=ru") is None
    # names first, then folders
    assert offered("profile", "--model", "mi") == ["mini"]
    assert offered("profile", "--model", "./mo") is None


def test_models_in_the_hubs_cache_are_offered(monkeypatch, tmp_path) -> None:
    snapshot = tmp_path / "models--acme--video--small" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert offered("eval", "") == ["mini"]
    (snapshot / "model_index.json").write_text("{}")
    assert offered("eval", "") == ["mini", "acme/video--small"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, where `cmdgen` is a command."""
    (tmp_path / "a clip.mp4").touch()
    command = tmp_path / "bin" / "cmdgen"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cmdgen "$@"\n')
    command.chmod(0o755)
    return tmp_path


def run(shell: str, script: str, folder: Path) -> list[str]:
    """A shell's script in a folder -> its lines."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run(
        [shell, "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        },
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_bash_completes(folder: Path) -> None:
    script = 'eval "$(cmdgen completion bash)"\n'
    script += "ask() { COMP_WORDS=(cmdgen \"$@\"); COMP_CWORD=$#; _cmdgen cmdgen '' ''; "
    script += "printf '%s\\n' \"${COMPREPLY[@]}\" --; }\n"
    script += "ask prof; ask profile --dtype = b; ask profile --trace a; complete -p cmdgen"
    assert run("bash", script, folder) == [
        *("profile", "--", "bfloat16", "--", "a clip.mp4", "--"),
        "complete -F _cmdgen cmdgen",
    ]


def test_fish_completes(folder: Path) -> None:
    script = "cmdgen completion fish | source\n"
    script += "for line in 'prof' 'profile --dtype=b' 'profile --dtype b' 'profile --trace a'; "
    script += 'complete -C "cmdgen $line"; end'
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
for text in 'cmdgen prof' 'cmdgen profile --dtype=b' 'cmdgen profile --dtype b' \\
    'cmdgen profile --trace a'; do
    zpty -w -n shell "$text"$'\\t'
    zpty -w -n shell $'\\a'
    while zpty -r shell line; do [[ $line == *LINE:* ]] && break; done
    print -r -- "${${line##*LINE:}%%:*}"
done
zpty -d shell
"""


def test_zsh_completes(folder: Path) -> None:
    assert [line.rstrip() for line in run("zsh", TYPE_INTO_ZSH, folder)] == [
        "cmdgen profile",
        "cmdgen profile --dtype=bfloat16",
        "cmdgen profile --dtype bfloat16",
        r"cmdgen profile --trace a\ clip.mp4",
    ]


def test_an_unknown_shell_is_refused(capsys) -> None:
    from cmdgen.cli.app import main

    with pytest.raises(SystemExit) as end:
        main(["completion", "tcsh"])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err == "error: shell 'tcsh' is not one of bash, zsh, fish\n"
