"""What a rendered world shows. Never imports torch: the command line reads its defaults here."""

from dataclasses import dataclass, replace
from functools import partial

from cmdgen.options import Options, option


def _names(text: str) -> tuple[str, ...]:
    """Return the names in a text with commas between them."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


_world = partial(option, group="Rendered world")
_only = partial(_world, (), read=_names, write=",".join, shown="all that it has")
_share = partial(option, low=0, high=1)


@dataclass(frozen=True)
class WorldConfig(Options):
    """What the rendered world shows; no names mean everything there is of that kind."""

    seed: int = _world(0, "Seed of the world.", low=0)
    subjects: tuple[str, ...] = _only("Only these subjects, with commas between.")
    motions: tuple[str, ...] = _only("Only these motions.")
    scenes: tuple[str, ...] = _only("Only these scenes.")
    pairs: float = _share(0.25, "Share of clips with a second subject.")
    # colours and sizes: "a small green corgi"
    adjectives: bool = True
    # sprites face either way
    flips: bool = True
    variety: float = _share(1.0, "Scale of the randomness of position, size, phase and speed.")
    # of the (subject, motion, scene) combinations
    held_out: float = _share(0.1, "Share of the combinations that only the test split shows.")
    # "shapes" are drawn polygons that need no font, for tests
    sprites: str = option("emoji", "Pictures of subjects.", choices=("emoji", "shapes"))
    font: str | None = _world(None, "NotoColorEmoji.ttf, or sprites.", shown="where fonts usually are")


WORLD = WorldConfig()

# what a small model learns on a CPU: subjects that are easily told apart, in-place motions, smooth scenes
MINI_WORLD = WorldConfig(
    subjects=_names(
        "dog,cat,fox,lion,panda,rabbit,pig,frog,elephant,penguin,owl,fish,"
        "whale,turtle,octopus,butterfly,bee,car,airplane,rocket,sailboat,robot,balloon,pumpkin"
    ),
    motions=_names(
        "swimming,flying,jumping,spinning,growing,shrinking,shaking,swinging,falling,rising,wobbling,pulsing"
    ),
    scenes=_names("ocean,sky,grass,desert,space,snow,underwater,mountains,sunset,stage"),
    pairs=0.0,
    flips=False,
    variety=0.5,
)

# and what where a GPU trains
MINI_GPU_WORLD = replace(
    MINI_WORLD,
    subjects=(
        *MINI_WORLD.subjects,
        *_names("tiger,wolf,unicorn,zebra,giraffe,cow,mouse,koala,bear,monkey,chick,duck,flamingo,parrot,crocodile"),
        *_names("dinosaur,dolphin,blowfish,shark,crab,snail,ladybug,bus,tractor,bicycle,train,helicopter"),
        *_names("flying saucer,ship,snowman,ghost,alien,sunflower,cactus,watermelon,mushroom"),
    ),
    motions=(*MINI_WORLD.motions, *_names("dancing,circling,sliding,tipping over")),
    scenes=(*MINI_WORLD.scenes, *_names("city,road")),
)

# without emoji, and so without their font
SHAPES_WORLD = replace(MINI_WORLD, sprites="shapes")

WORLDS = {"world": WORLD, "mini": MINI_WORLD, "mini-gpu": MINI_GPU_WORLD, "shapes": SHAPES_WORLD}
