"""The caption grammar: who does what where, in several phrasings."""

from cmdgen.data.layers import Scene
from cmdgen.data.motions import Motion

_PLACED: tuple[str, ...] = (
    "{who} {doing} {where}",
    "{who} is {doing} {where}",
    "{who} {does} {where}",
    "{where}, {who} is {doing}",
    "a video of {who} {doing} {where}",
)
# for a scene that the motion implies
_UNPLACED = (
    "{who} {doing}",
    "{who} is {doing}",
    "{who} {does}",
    "a video of {who} {doing}",
)
_CAMERA = (
    "the camera {does} {who} {where}",
    "the camera is {doing} {who} {where}",
    "{where}, the camera {does} {who}",
    "a camera {doing} {who} {where}",
)
# how often a caption leaves out a scene that its motion implies
_IMPLIED = 0.5

COLOURS = {
    "red": "e8303a",
    "orange": "ff8a1e",
    "yellow": "ffd62a",
    "green": "3fbf4a",
    "blue": "2f7df0",
    "purple": "9a4fe0",
    "pink": "ff7ab8",
    "white": "ffffff",
    "black": "33343c",
}

# words for a size, and how large that is
SIZES = (
    (("small", "little", "tiny"), 0.64),
    (("big", "large", "huge"), 1.28),
)


def article(words: str) -> str:
    """orange cat -> an orange cat."""
    vowel = words[0] in "aeiou" and not words.startswith(("uni", "ufo"))
    return f"{'an' if vowel else 'a'} {words}"


def caption(who: list[str], motion: Motion, scene: Scene, draws: list[float]) -> str:
    """One sentence; `draws`, in [0, 1), choose phrasing, verb, place, and whether to name it."""
    phrasing, verb, place, implied = draws
    doing, does = motion.verbs[int(verb * len(motion.verbs))]
    where = scene.phrases[int(place * len(scene.phrases))]
    names = " and ".join(map(article, who))
    named = motion.home != scene.name or implied >= _IMPLIED
    forms = _CAMERA if motion.camera is not None else _PLACED if named else _UNPLACED
    form = forms[int(phrasing * len(forms))]
    if len(who) > 1 and motion.camera is None:
        form, does = form.replace(" is ", " are "), f"are {doing}"
    return form.format(who=names, doing=doing, does=does, where=where)
