"""The caption grammar: who does what where, in several phrasings."""

from cmdgen.data.motions import Motion
from cmdgen.data.scenes import Scene

# {who} {doing} {does} {where}; a sentence may start with the place
_PLACED = (
    "{who} {doing} {where}",
    "{who} is {doing} {where}",
    "{who} {does} {where}",
    "{where}, {who} is {doing}",
    "a video of {who} {doing} {where}",
)
_UNPLACED = (
    "{who} {doing}",
    "{who} is {doing}",
    "{who} {does}",
    "a video of {who} {doing}",
)
# how often a caption leaves out a scene that its motion implies
_IMPLIED = 0.5


def article(words: str) -> str:
    """ "orange cat" -> "an orange cat"."""
    return (
        f"{'an' if words[0] in 'aeiou' and not words.startswith(('uni', 'ufo')) else 'a'} {words}"
    )


def caption(who: list[str], motion: Motion, scene: Scene, draws: list[float]) -> str:
    """One sentence; `draws` are four numbers in [0, 1): phrasing, verb, place, whether it is named."""
    phrasing, verb, place, implied = draws
    doing, does = motion.verbs[int(verb * len(motion.verbs))]
    if len(who) > 1:
        does = f"are {doing}"
    where = scene.phrases[int(place * len(scene.phrases))]
    named = motion.home != scene.name or implied >= _IMPLIED
    forms = _PLACED if named else _UNPLACED
    text = forms[int(phrasing * len(forms))].format(
        who=" and ".join(map(article, who)), doing=doing, does=does, where=where
    )
    return text.replace(" is ", " are ") if len(who) > 1 else text
