"""How subjects and the camera move: paths over time in plain functions."""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

# random numbers in [0, 1) that one path may use: (B, 1) each
PATH_DRAWS = 3


@dataclass(frozen=True)
class Path:
    """Where a subject is relative to its resting place, (B, T) each; lengths in frame heights.

    As for one that faces right; `forward` and `angle` turn over for one that faces left.
    """

    forward: Tensor
    up: Tensor
    scale: Tensor
    stretch: Tensor  # height over width, area kept
    angle: Tensor  # radians, clockwise


@dataclass(frozen=True)
class Motion:
    """A motion: its verbs ("swimming", "swims"), where it happens, and its path."""

    name: str
    verbs: tuple[tuple[str, str], ...]
    path: Callable[[Tensor, Tensor], Path]
    # the scene that a caption without one implies
    home: str = "grass"
    # scenes need one of these tags; empty is anywhere
    places: tuple[str, ...] = ()
    # how fast the scene scrolls past
    travel: float = 0.25
    # zoom, right, down, roll of the camera, (B, T) each
    camera: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None


def _path(
    time: Tensor,
    draws: Tensor,
    forward: Tensor | float = 0.0,
    up: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    stretch: Tensor | float = 1.0,
    angle: Tensor | float = 0.0,
) -> Path:
    """Completes a path with whatever stays at rest."""
    shape = torch.broadcast_shapes(time.shape, draws[0].shape)
    values = (torch.as_tensor(v, dtype=time.dtype) for v in (forward, up, scale, stretch, angle))
    return Path(*(value.expand(shape) for value in values))


def _wave(time: Tensor, cycles: float, phase: Tensor | float = 0.0) -> Tensor:
    return torch.sin(2 * pi * (cycles * time + phase))


def _ease(time: Tensor) -> Tensor:
    return time * time * (3 - 2 * time)


def _swim(t: Tensor, u: Tensor) -> Path:
    phase = 0.5 * u[0]
    return _path(
        t,
        u,
        0.10 * (t - 0.5),
        0.035 * _wave(t, 2, phase) - 0.06,
        angle=0.16 * _wave(t, 2, phase + 0.2),
    )


def _fly(t: Tensor, u: Tensor) -> Path:
    phase = 0.5 * u[0]
    bob, flap = _wave(t, 1, phase), _wave(t, 4, phase)
    return _path(
        t, u, 0.16 * (t - 0.5), 0.09 + 0.07 * bob, stretch=1 + 0.10 * flap, angle=-0.22 + 0.1 * bob
    )


def _jump(t: Tensor, u: Tensor) -> Path:
    height = _wave(t, 1, 0.4 * u[0]).abs()
    landing = (1 - 4 * height).clamp(0, 1)
    return _path(t, u, up=0.22 * height, stretch=1 - 0.22 * landing + 0.06 * height)


def _spin(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, angle=2 * pi * (t + 0.3 * (u[0] - 0.5)))


def _grow(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, scale=0.55 + 0.65 * _ease(t) + 0.1 * (u[0] - 0.5))


def _shrink(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, scale=1.2 - 0.65 * _ease(t) + 0.1 * (u[0] - 0.5))


def _shake(t: Tensor, u: Tensor) -> Path:
    phase = 0.5 * u[0]
    return _path(t, u, forward=0.055 * _wave(t, 4, phase), angle=0.10 * _wave(t, 4, phase))


def _swing(t: Tensor, u: Tensor) -> Path:
    angle = 0.55 * _wave(t, 1.5, 0.6 * u[0])
    return _path(t, u, -0.34 * torch.sin(angle), 0.04 + 0.34 * (1 - torch.cos(angle)), angle=angle)


MOTIONS = {
    motion.name: motion
    for motion in (
        Motion(
            "swimming",
            (
                ("swimming", "swims"),
                ("paddling", "paddles"),
                ("going for a swim", "goes for a swim"),
            ),
            _swim,
            home="ocean",
            places=("water",),
            travel=0.8,
        ),
        Motion(
            "flying",
            (("flying", "flies"), ("soaring", "soars"), ("gliding", "glides")),
            _fly,
            home="sky",
            places=("land", "air", "open water"),
            travel=1.4,
        ),
        Motion(
            "jumping",
            (("jumping", "jumps"), ("hopping", "hops"), ("leaping", "leaps")),
            _jump,
            home="grass",
        ),
        Motion(
            "spinning",
            (("spinning", "spins"), ("turning round and round", "turns round and round")),
            _spin,
            home="space",
        ),
        Motion(
            "growing",
            (("growing", "grows"), ("getting bigger", "gets bigger"), ("expanding", "expands")),
            _grow,
            home="grass",
        ),
        Motion(
            "shrinking",
            (("shrinking", "shrinks"), ("getting smaller", "gets smaller")),
            _shrink,
            home="desert",
        ),
        Motion(
            "shaking",
            (("shaking", "shakes"), ("trembling", "trembles"), ("shivering", "shivers")),
            _shake,
            home="snow",
        ),
        Motion(
            "swinging",
            (("swinging", "swings"), ("swaying", "sways"), ("rocking", "rocks")),
            _swing,
            home="sky",
        ),
    )
}
