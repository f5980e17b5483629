"""`cmdgen completion`: what shells offer when Tab is pressed, by Typer's own scripts.

A shell runs `cmdgen` with `_CMDGEN_COMPLETE=complete_SHELL` and the words of the command line in
other variables; `complete` prints what can follow. Where that is nothing, shells offer files.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.completion import completion_init, get_completion_script, shell_completion

from cmdgen.config import packaged_models
from cmdgen.store.find import composed_models
from cmdgen.video.formats import CODECS, FORMATS
from cmdgen.world.config import WORLDS

VARIABLE = "_CMDGEN_COMPLETE"
# what separates a word from its meaning in what a shell's script reads; bash shows no meanings
_SEPARATORS = {"bash": "", "zsh": ":", "fish": "\t"}


def one_of(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the `autocompletion` of an option that takes one of `values`."""
    words = list(values)

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def complete_model(incomplete: str) -> list[str]:
    """Return the packaged models, and those that were pulled."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = Path(HF_HUB_CACHE).glob("models--*--*/snapshots/*/model_index.json")
    names = {path.parts[-4].removeprefix("models--").replace("--", "/", 1) for path in cached}
    names |= {path.parent.name for path in composed_models().glob("*/model_index.json")}
    return one_of([*packaged_models(), *sorted(names)])(incomplete)


# what completes an option, by `Option.complete`; other values are possible, too
WORDS: dict[str | None, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "float32", "float16", "bfloat16"),
    "format": tuple(FORMATS),
    "codec": tuple(CODECS),
    "world": tuple(WORLDS),
}

_SHELLS = ", ".join(_SEPARATORS)
_SHELL = typer.Argument(metavar="SHELL", help=f"{_SHELLS}.", autocompletion=one_of(_SEPARATORS))


def completion(shell: Annotated[str, _SHELL]) -> None:
    """Print a script for completion in a shell.

    Examples:
        echo 'eval "$(cmdgen completion bash)"' >> ~/.bashrc
        echo 'eval "$(cmdgen completion zsh)"' >> ~/.zshrc
        cmdgen completion fish > ~/.config/fish/completions/cmdgen.fish
    """
    _check(shell)
    typer.echo(get_completion_script(prog_name="cmdgen", complete_var=VARIABLE, shell=shell))


def complete(command: Any, instruction: str) -> None:
    """Print what can follow the words of a command line; `instruction` is complete_SHELL."""
    shell = instruction.removeprefix("complete_")
    _check(shell)
    completion_init()
    base: Any = shell_completion.get_completion_class(shell)
    typer.echo(type(shell, (_Words, base), {})(command, {}, "cmdgen", VARIABLE).complete())


def _check(shell: str) -> None:
    if shell not in _SEPARATORS:
        raise ValueError(f"shell {shell!r} is not one of {_SHELLS}")


class _Words(shell_completion.ShellComplete):
    """What Typer's classes lack: --option=value, and meanings without 0.1 s to import rich."""

    def get_completions(self, args: list[str], incomplete: str) -> list[Any]:
        # bash takes the = of --option=value for a word, the other shells replace the whole word
        items = super().get_completions([word for word in args if word != "="], incomplete)
        option, equals, _ = incomplete.partition("=")
        if equals and option.startswith("--"):
            for item in items:
                item.value = f"{option}={item.value}"
        return items

    def format_completion(self, item: Any) -> str:
        parts = [item.value]
        if item.help and self.name != "bash":
            # the first sentence, without the default
            sentence = " ".join(item.help.partition("  [")[0].split()).partition(". ")[0]
            parts.append(sentence.rstrip("."))
        quote = super().format_completion  # type: ignore[safe-super]
        return _SEPARATORS[self.name].join(quote(type(item)(part)) for part in parts)
