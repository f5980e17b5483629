"""What a rendered world shows. Never imports torch: the command line reads its defaults here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorldConfig:
    """What the rendered world shows; an empty tuple means everything there is of that kind."""

    seed: int = 0
    subjects: tuple[str, ...] = ()
    motions: tuple[str, ...] = ()
    scenes: tuple[str, ...] = ()
    # share of clips with a second subject
    pairs: float = 0.25
    # colours and sizes: "a small green corgi"
    adjectives: bool = True
    # sprites face either way
    flips: bool = True
    # scales all continuous randomness: position, size, phase, speed
    variety: float = 1.0
    # share of the (subject, motion, scene) combinations that only the test split shows
    held_out: float = 0.1
    # "emoji": Noto Color Emoji; "shapes": drawn polygons that need no font, for tests
    sprites: str = "emoji"
    font: str | None = None

    def __post_init__(self) -> None:
        if self.sprites not in ("emoji", "shapes"):
            raise ValueError(f"sprites {self.sprites!r} is not one of emoji, shapes")
        for name in ("pairs", "variety", "held_out"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name.replace('_', ' ')} {value} is not between 0 and 1")


WORLD = WorldConfig()

# what a small model learns on a CPU: few subjects, in-place motions, smooth scenes
MINI_WORLD = WorldConfig(
    subjects=(
        *("dog", "cat", "fish", "penguin", "elephant"),
        *("car", "rocket", "butterfly", "sailboat", "frog"),
    ),
    motions=(
        *("swimming", "flying", "jumping", "spinning"),
        *("growing", "shrinking", "shaking", "swinging"),
    ),
    scenes=("ocean", "sky", "grass", "desert", "space", "snow"),
    pairs=0.0,
    adjectives=False,
    flips=False,
    variety=0.5,
)

WORLDS = {"world": WORLD, "mini": MINI_WORLD}
