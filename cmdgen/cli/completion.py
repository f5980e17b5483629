"""`cmdgen completion`: what a shell offers when Tab is pressed.

A shell's script runs the command `cmdgen __complete -- WORDS` with what stands after `cmdgen`, the
word at the cursor last. It prints `files` where names of files are wanted, else `words`, then a
word a line, with a tab and its meaning where it has one.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup, TyperOption

from cmdgen.config import packaged_models
from cmdgen.video.formats import CODECS, FORMATS

BASH = r"""# bash completion of cmdgen: eval "$(cmdgen completion bash)"
_cmdgen() {
    local line kind='' current=${COMP_WORDS[COMP_CWORD]}
    # bash takes the = of --option=value for a word
    [[ $current == = ]] && current=''
    COMPREPLY=()
    while IFS= read -r line; do
        if [[ -z $kind ]]; then kind=$line; else COMPREPLY+=("${line%%$'\t'*}"); fi
    done < <("$1" __complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    if [[ $kind == files ]]; then
        compopt -o filenames 2>/dev/null
        while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$current")
    fi
}
complete -F _cmdgen cmdgen
"""

ZSH = r"""#compdef cmdgen
# zsh completion of cmdgen: eval "$(cmdgen completion zsh)", or as _cmdgen in a folder of $fpath
_cmdgen() {
    local line meaning
    local -a lines found
    lines=("${(@f)$("${words[1]}" __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ $lines[1] == files ]]; then
        [[ $PREFIX == --*=* ]] && compset -P '*='
        _files
        return
    fi
    for line in "${(@)lines[2,-1]}"; do
        meaning=''
        [[ $line == *$'\t'* ]] && meaning=":${line#*$'\t'}"
        found+=("${${line%%$'\t'*}//:/\\:}$meaning")
    done
    _describe cmdgen found
}
if [[ $funcstack[1] == _cmdgen ]]; then _cmdgen "$@"; else compdef _cmdgen cmdgen; fi
"""

FISH = r"""# fish completion of cmdgen: cmdgen completion fish | source
function __cmdgen_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l found (command $words[1] __complete -- $words[2..-1] 2>/dev/null)
    if test "$found[1]" = files
        __fish_complete_path (commandline -ct)
    else
        printf '%s\n' $found[2..-1]
    end
end
complete --command cmdgen --no-files --arguments '(__cmdgen_complete)'
"""

# parameters that take a file or folder, or a text: a name, a template, - for stdin or stdout
_OR_FILES = ("model", "data", "file", "output")

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def one_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """For `autocompletion` of an option that takes one of these."""
    names = list(known)

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def complete_model(incomplete: str) -> list[str]:
    """The models that ship, and those of the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = Path(HF_HUB_CACHE).glob("models--*--*/snapshots/*/model_index.json")
    names = {path.parts[-4].removeprefix("models--").replace("--", "/", 1) for path in cached}
    return one_of([*packaged_models(), *sorted(names)])(incomplete)


# what completes an option, by `Option.complete`
COMPLETIONS: dict[str | None, Callable[[str], list[str]]] = {
    "model": complete_model,
    "device": one_of(("auto", "cpu", "cuda")),
    "dtype": one_of(("auto", "float32", "float16", "bfloat16")),
    "format": one_of(FORMATS),
    "codec": one_of(CODECS),
}


def completion(
    shell: Annotated[
        str,
        typer.Argument(
            metavar="SHELL", help=f"{', '.join(SCRIPTS)}.", autocompletion=one_of(SCRIPTS)
        ),
    ],
) -> None:
    """Print a script that completes commands, options and their values.

    Examples:
        echo 'eval "$(cmdgen completion bash)"' >> ~/.bashrc
        echo 'eval "$(cmdgen completion zsh)"' >> ~/.zshrc
        cmdgen completion fish > ~/.config/fish/completions/cmdgen.fish
    """
    if shell not in SCRIPTS:
        raise ValueError(f"shell {shell!r} is not one of {', '.join(SCRIPTS)}")
    typer.echo(SCRIPTS[shell], nl=False)


def complete(
    context: typer.Context, words: Annotated[list[str] | None, typer.Argument()] = None
) -> None:
    """What the scripts run."""
    root = context.find_root().command
    assert isinstance(root, TyperGroup)
    found = find(root, words or [])
    typer.echo("words" if found is not None else "files")
    for value, meaning in found or ():
        typer.echo(f"{value}\t{meaning}" if meaning else value)


class _Place(NamedTuple):
    """Where in a command line the cursor is."""

    command: Any
    context: typer.Context
    # names of options that have been given
    given: set[str]
    # arguments that have been given
    arguments: int
    # the option whose value comes next
    waiting: TyperOption | None


def find(root: TyperGroup, words: list[str]) -> list[tuple[str, str]] | None:
    """Words with their meanings that the last one can become; None: a file's name."""
    # bash takes the = of --option=value for a word of its own
    typed = [word for word in words if word != "="]
    if not words or words[-1] == "=":
        typed.append("")
    *before, current = typed
    place = _walk(root, before)
    if place is None:
        return []
    command, context = place.command, place.context
    if place.waiting is not None:
        return _values(place.waiting, context, current)
    if current.startswith("-"):
        name, equals, value = current.partition("=")
        if not equals:
            return _flags(place, current)
        option = _options(command, context).get(name)
        if option is None:
            return []
        found = _values(option, context, value)
        return found and [(f"{name}={text}", meaning) for text, meaning in found]
    if isinstance(command, TyperGroup):
        return [
            (name, each.get_short_help_str(80))
            for name, each in command.commands.items()
            if name.startswith(current) and not each.hidden
        ]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    if not arguments:
        return []
    argument = arguments[min(place.arguments, len(arguments) - 1)]
    if place.arguments >= len(arguments) and argument.nargs != -1:
        return []
    return _values(argument, context, current)


def _walk(root: TyperGroup, words: list[str]) -> _Place | None:
    """The place after these words; None where no command is."""
    context = typer.Context(root, info_name="cmdgen", resilient_parsing=True)
    place = _Place(root, context, set(), 0, None)
    values = 0
    for word in words:
        options = _options(place.command, place.context)
        if values:
            values -= 1
            if not values:
                place = place._replace(waiting=None)
        elif word.startswith("-") and word != "-":
            name, equals, _ = word.partition("=")
            option = options.get(name)
            if option is not None:
                place.given.update((*option.opts, *option.secondary_opts))
                if not (option.is_flag or option.count or equals):
                    values = option.nargs
                    place = place._replace(waiting=option)
        elif isinstance(place.command, TyperGroup):
            inner = place.command.commands.get(word)
            if inner is None:
                return None
            context = typer.Context(
                inner, info_name=word, parent=place.context, resilient_parsing=True
            )
            place = _Place(inner, context, set(), 0, None)
        else:
            place = place._replace(arguments=place.arguments + 1)
    return place


def _options(command: Any, context: typer.Context) -> dict[str, TyperOption]:
    return {
        flag: option
        for option in command.get_params(context)
        if isinstance(option, TyperOption) and not option.hidden
        for flag in (*option.opts, *option.secondary_opts)
    }


def _flags(place: _Place, current: str) -> list[tuple[str, str]]:
    """Options that are not given yet, or may be again."""
    return [
        (flag, _summarise(option.help or ""))
        for flag, option in _options(place.command, place.context).items()
        if flag.startswith(current) and (option.multiple or flag not in place.given)
    ]


def _summarise(text: str) -> str:
    """The first sentence, without the default."""
    return " ".join(text.partition("  [")[0].split()).partition(". ")[0].rstrip(".")


def _values(parameter: Any, context: typer.Context, current: str) -> list[tuple[str, str]] | None:
    found = [(item.value, item.help or "") for item in parameter.shell_complete(context, current)]
    if not found and (parameter.type_descriptor.is_path or parameter.name in _OR_FILES):
        return None
    return found
