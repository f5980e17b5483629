"""The caption grammar: who does what where, in several phrasings."""

from collections.abc import Sequence
from typing import TypeVar

from cmdgen.world.tables import Motion, Scene, read_tables

Option = TypeVar("Option")


def pick(options: Sequence[Option], draw: float) -> Option:
    """Choose an option by a number in [0, 1)."""
    return options[int(draw * len(options))]


def article(words: str) -> str:
    """orange cat -> an orange cat."""
    vowel = words[0] in "aeiou" and not words.startswith(("uni", "ufo"))
    return f"{'an' if vowel else 'a'} {words}"


def caption(who: list[str], motion: Motion, scene: Scene, draws: list[float]) -> str:
    """Write one sentence; `draws` choose phrasing, verb, place, and whether to name it."""
    phrasing, verb, place, implied = draws
    forms = read_tables().captions
    doing, does = pick(motion.verbs, verb)
    placed = motion.home != scene.name or implied >= forms.implied
    choices = forms.placed if placed else forms.unplaced
    form = pick(forms.camera if motion.camera else choices, phrasing)
    if len(who) > 1 and not motion.camera:
        form, does = form.replace(" is ", " are "), f"are {doing}"
    names = " and ".join(map(article, who))
    return form.format(who=names, doing=doing, does=does, where=pick(scene.phrases, place))
