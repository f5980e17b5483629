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
class View:
    """What the camera sees of a canvas half as large again, (B, T) each: 1/zoom of its sides."""

    zoom: Tensor
    right: Tensor  # of the canvas's half width
    down: Tensor
    roll: Tensor  # radians


@dataclass(frozen=True)
class Motion:
    """A motion: its path, and where it happens."""

    name: str
    path: Callable[[Tensor, Tensor], Path]
    # the scene that a caption without one implies
    home: str = "grass"
    # scenes need one of these tags; empty is anywhere
    places: tuple[str, ...] = ()
    # how fast the scene scrolls past
    travel: float = 0.25
    # set if it is the camera that moves: the verbs are its own then
    camera: Callable[[Tensor, Tensor], View] | None = None

    @property
    def verbs(self) -> tuple[tuple[str, str], ...]:
        """Both forms of every verb for it: ("swimming", "swims")."""
        return _VERBS[self.name]


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


def _view(
    time: Tensor,
    draws: Tensor,
    zoom: Tensor | float,
    right: Tensor | float = 0.0,
    down: Tensor | float = 0.0,
    roll: Tensor | float = 0.0,
) -> View:
    """Completes a view with whatever stays at rest."""
    shape = torch.broadcast_shapes(time.shape, draws[0].shape)
    values = (torch.as_tensor(v, dtype=time.dtype) for v in (zoom, right, down, roll))
    return View(*(value.expand(shape) for value in values))


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


def _bounce(t: Tensor, u: Tensor) -> Path:
    arc = torch.remainder(4 * t + u[0], 1)
    height = 4 * arc * (1 - arc)
    return _path(t, u, up=0.13 * height, stretch=0.72 + 0.28 * (3 * height).clamp(max=1))


def _walk(t: Tensor, u: Tensor) -> Path:
    step = _wave(t, 1.5, u[0])
    return _path(t, u, 0.1 * (t - 0.5), 0.035 * step.abs(), angle=0.11 * step)


def _run(t: Tensor, u: Tensor) -> Path:
    step = _wave(t, 3, u[0])
    return _path(t, u, 0.2 * (t - 0.5), 0.07 * step.abs(), stretch=0.94 + 0.1 * step, angle=0.14)


def _roll(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, 0.2 * (t - 0.5), angle=2 * pi * (2 * t + u[0]))


def _float(t: Tensor, u: Tensor) -> Path:
    phase = u[0]
    return _path(
        t,
        u,
        0.05 * _wave(t, 0.5, phase),
        0.06 * _wave(t, 1, phase),
        angle=0.1 * _wave(t, 0.5, phase),
    )


def _fall(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, up=0.38 * (1 - t * t), angle=0.25 * _wave(t, 1.5, u[0]) * (1 - t))


def _rise(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, 0.02 * _wave(t, 2, u[0]), 0.3 * _ease(t))


def _dance(t: Tensor, u: Tensor) -> Path:
    beat = _wave(t, 2, u[0])
    lift = _wave(t, 2, u[0] + 0.25).abs()
    return _path(t, u, 0.07 * beat, 0.07 * lift, stretch=0.9 + 0.2 * lift, angle=0.25 * beat)


def _slide(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, 0.44 * (_ease(t) - 0.5) + 0.04 * u[0], angle=-0.06)


def _dive(t: Tensor, u: Tensor) -> Path:
    return _path(
        t, u, 0.24 * (t - 0.5), 0.16 - 0.4 * _ease(t) + 0.03 * u[0], angle=-0.3 + 1.1 * _ease(t)
    )


def _somersault(t: Tensor, u: Tensor) -> Path:
    arc = torch.remainder(2 * t + u[0], 1)
    return _path(t, u, up=0.8 * arc * (1 - arc), angle=2 * pi * _ease(arc))


def _wobble(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, stretch=1 + 0.3 * _wave(t, 3, u[0]))


def _pulse(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, scale=1 + 0.2 * _wave(t, 3, u[0]))


def _circle(t: Tensor, u: Tensor) -> Path:
    return _path(t, u, 0.16 * _wave(t, 1, u[0]), 0.13 + 0.13 * _wave(t, 1, u[0] + 0.25))


def _zigzag(t: Tensor, u: Tensor) -> Path:
    saw = 2 * (2 * torch.remainder(2 * t + u[0], 1) - 1).abs() - 1
    return _path(t, u, 0.36 * (t - 0.5), 0.12 + 0.12 * saw)


def _nod(t: Tensor, u: Tensor) -> Path:
    bow = 0.5 - 0.5 * _wave(t, 2.5, u[0])
    return _path(t, u, 0.03 * bow, stretch=1 - 0.1 * bow, angle=0.4 * bow)


def _tip(t: Tensor, u: Tensor) -> Path:
    fallen = (1.5 * t - 0.2 * u[0]).clamp(0, 1) ** 2
    return _path(t, u, 0.14 * fallen, angle=1.45 * fallen)


def _rest(t: Tensor, u: Tensor) -> Path:
    return _path(t, u)


def _zoom_in(t: Tensor, u: Tensor) -> View:
    return _view(t, u, 1 + 0.75 * _ease(t))


def _zoom_out(t: Tensor, u: Tensor) -> View:
    return _view(t, u, 1.75 - 0.75 * _ease(t))


def _pan_left(t: Tensor, u: Tensor) -> View:
    return _view(t, u, 1.4, right=0.26 - 0.52 * t)


def _pan_right(t: Tensor, u: Tensor) -> View:
    return _view(t, u, 1.4, right=0.52 * t - 0.26)


def _tilt(t: Tensor, u: Tensor) -> View:
    return _view(t, u, 1.5, roll=0.32 * _wave(t, 1, u[0]))


def _quake(t: Tensor, u: Tensor) -> View:
    return _view(t, u, 1.35, 0.05 * _wave(t, 5, u[0]), 0.06 * _wave(t, 4, u[1]))


_VERBS = {
    name: tuple((pair.split("/")[0], pair.split("/")[1]) for pair in verbs.split("; "))
    for name, verbs in (
        line.split(": ")
        for line in """
swimming: swimming/swims; paddling/paddles; going for a swim/goes for a swim
flying: flying/flies; soaring/soars; gliding/glides
jumping: jumping/jumps; hopping/hops; leaping/leaps
spinning: spinning/spins; turning round and round/turns round and round
growing: growing/grows; getting bigger/gets bigger; expanding/expands
shrinking: shrinking/shrinks; getting smaller/gets smaller
shaking: shaking/shakes; trembling/trembles; shivering/shivers
swinging: swinging/swings; swaying/sways; rocking/rocks
bouncing: bouncing/bounces; bobbing up and down/bobs up and down; springing/springs
walking: walking/walks; strolling/strolls; taking a walk/takes a walk; waddling/waddles
running: running/runs; racing/races; sprinting/sprints; dashing/dashes
rolling: rolling/rolls; rolling along/rolls along; tumbling along/tumbles along
floating: floating/floats; drifting/drifts; hovering/hovers
falling: falling/falls; dropping/drops; falling down/falls down
rising: rising/rises; ascending/ascends; going up/goes up
dancing: dancing/dances; grooving/grooves; boogieing/boogies
sliding: sliding/slides; skidding/skids; slipping/slips
diving: diving/dives; diving down/dives down; plunging/plunges
somersaulting: somersaulting/somersaults; doing a flip/does a flip; flipping over/flips over
wobbling: wobbling/wobbles; jiggling/jiggles; wobbling like jelly/wobbles like jelly
pulsing: pulsing/pulses; throbbing/throbs; beating/beats
circling: circling/circles; going in circles/goes in circles; moving in a circle/moves in a circle
zigzagging: zigzagging/zigzags; zigging and zagging/zigs and zags; weaving/weaves
nodding: nodding/nods; bowing/bows; taking a bow/takes a bow
tipping over: tipping over/tips over; toppling/topples; keeling over/keels over
zoom in: zooming in on/zooms in on; moving closer to/moves closer to
zoom out: zooming out from/zooms out from; pulling back from/pulls back from
pan left: panning left past/pans left past; moving left past/moves left past
pan right: panning right past/pans right past; moving right past/moves right past
camera tilt: tilting around/tilts around; rolling around/rolls around
camera shake: jittering around/jitters around; jolting around/jolts around
""".strip().splitlines()
    )
}

MOTIONS = {
    motion.name: motion
    for motion in (
        Motion("swimming", _swim, home="ocean", places=("water",), travel=0.8),
        Motion("flying", _fly, home="sky", places=("land", "air", "open water"), travel=1.4),
        Motion("jumping", _jump, home="grass"),
        Motion("spinning", _spin, home="space"),
        Motion("growing", _grow, home="grass"),
        Motion("shrinking", _shrink, home="desert"),
        Motion("shaking", _shake, home="snow"),
        Motion("swinging", _swing, home="sky"),
        Motion("bouncing", _bounce, home="grass", places=("land",)),
        Motion("walking", _walk, home="road", places=("land",), travel=0.6),
        Motion("running", _run, home="road", places=("land",), travel=1.3),
        Motion("rolling", _roll, home="desert", places=("land",), travel=0.7),
        Motion("floating", _float, home="space", travel=0.1),
        Motion("falling", _fall, home="sky"),
        Motion("rising", _rise, home="sky"),
        Motion("dancing", _dance, home="stage"),
        Motion("sliding", _slide, home="snow", places=("land",), travel=0.0),
        Motion("diving", _dive, home="underwater", places=("water",), travel=0.4),
        Motion("somersaulting", _somersault, home="stage"),
        Motion("wobbling", _wobble, home="plain pink"),
        Motion("pulsing", _pulse, home="plain pink"),
        Motion("circling", _circle, home="sky"),
        Motion("zigzagging", _zigzag, home="sky"),
        Motion("nodding", _nod, home="stage"),
        Motion("tipping over", _tip, home="room", places=("land",), travel=0.0),
        Motion("zoom in", _rest, home="", travel=0.0, camera=_zoom_in),
        Motion("zoom out", _rest, home="", travel=0.0, camera=_zoom_out),
        Motion("pan left", _rest, home="", travel=0.0, camera=_pan_left),
        Motion("pan right", _rest, home="", travel=0.0, camera=_pan_right),
        Motion("camera tilt", _rest, home="", travel=0.0, camera=_tilt),
        Motion("camera shake", _rest, home="", travel=0.0, camera=_quake),
    )
}
