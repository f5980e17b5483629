"""Where things happen: scenes made of layers that scroll at their own speeds."""

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

from cmdgen.data.paint import Painter, backdrop, clouds, discs, land, nebula, planet

# sub-pixel positions that a layer is kept at, and how much finer it is painted
_PHASES = 4


@dataclass(frozen=True)
class Layer:
    """Something painted that scrolls: sideways (along "x", repeating) or down (along "y")."""

    paint: Painter
    # rows that it may cover, in frame heights
    top: float = 0.0
    bottom: float = 1.0
    # frame heights per clip that it moves left (or up) by itself, and while the subject travels right
    speed: float = 0.0
    depth: float = 0.0
    axis: str = "x"
    # drawn before the subject
    front: bool = False


@dataclass(frozen=True)
class Scene:
    """A place: the phrases that name it, its backdrop and layers, and where a subject rests in it."""

    name: str
    phrases: tuple[str, ...]
    tags: tuple[str, ...]
    base: Painter
    layers: tuple[Layer, ...]
    # where the subject stands: its foot with a shadow there, or its centre if there is no ground
    ground: float | None = None
    centre: float = 0.5
    shadow: str = "000000"
    shade: float = 0.35


@dataclass(frozen=True)
class Strip:
    """A painted layer at one size: every sub-pixel phase of it, premultiplied, with 1 - cover last."""

    windows: Tensor  # (phases, shifts, 4, h, W), a view
    rows: slice

    def shifted(self, distance: Tensor) -> Tensor:
        """(N,) pixels -> (N, 4, h, W): the layer moved left (or up) that far."""
        steps = torch.round(distance * _PHASES).long()
        steps = steps % ((self.windows.shape[1] - 1) * _PHASES)
        return self.windows[steps % _PHASES, steps // _PHASES]


def _grid(height: int, width: int, rows: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Centres of `height` by `width` pixels over `rows`, in frame heights: x (1, w), y (h, 1)."""
    step = (rows[1] - rows[0]) / height
    y = rows[0] + (torch.arange(height) + 0.5) * step
    return ((torch.arange(width) + 0.5) * step)[None], y[:, None]


def _generator(scene: Scene, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(f"{scene.name} {number}".encode()))


def paint_base(scene: Scene, size: tuple[int, int], device: str) -> Tensor:
    """-> (3, H, W): what never moves."""
    height, width = size
    x, y = _grid(height * _PHASES, width * _PHASES, (0.0, 1.0))
    # painters put suns relative to a quarter of the period: here that is the middle
    picture, _ = scene.base(x, y, 2 * width / height, _generator(scene, 0))
    return F.avg_pool2d(picture, _PHASES).to(device)


def paint_layer(scene: Scene, number: int, size: tuple[int, int], device: str) -> Strip:
    """Paints layer `number` at every phase, ready to be cut at any shift."""
    layer, (height, width) = scene.layers[number], size
    fine, long = _PHASES, width * 2 if layer.axis == "x" else height
    first, last = int(layer.top * height), min(height, int(layer.bottom * height) + 1)
    if layer.axis == "y":
        first, last = 0, height
    x, y = _grid(
        (last - first) * fine,
        width * (2 if layer.axis == "x" else 1) * fine,
        (first / height, last / height),
    )
    colour, cover = layer.paint(x, y, 2 * width / height, _generator(scene, number + 1))
    painted = torch.cat([colour * cover, 1 - cover[None]])  # (4, h·fine, w·fine)
    dim = 2 if layer.axis == "x" else 1
    phases = torch.stack(
        [F.avg_pool2d(painted.roll(-phase, dim), fine) for phase in range(fine)]
    )  # (phases, 4, h, w)
    wrap = width if layer.axis == "x" else height
    phases = torch.cat([phases, phases.narrow(dim + 1, 0, wrap)], dim + 1).to(device).contiguous()
    phase_step, channel_step, row_step, _ = phases.stride()
    windows = phases.as_strided(
        (fine, long + 1, 4, last - first, width),
        (phase_step, 1 if layer.axis == "x" else row_step, channel_step, row_step, 1),
    )
    return Strip(windows, slice(first, last))


OCEAN = Scene(
    "ocean",
    ("in the ocean", "in the sea", "in the water", "among the waves"),
    ("water", "open water"),
    backdrop(
        (0.0, "5bb4f0"),
        (0.44, "d8f1fb"),
        (0.45, "49b6cf"),
        (0.75, "1f86bd"),
        sun=(0.28, 0.16, 0.085, "fff6c8"),
    ),
    (
        Layer(clouds((0.33,), 0.8, 0.15, shade="bfe0f3"), 0.1, 0.36, speed=0.10, depth=0.05),
        Layer(
            land(
                0.485,
                ((0.66, 0.018, 0.1), (0.33, 0.006, 0.6)),
                (0.0, "3fb0d2"),
                (0.25, "1f7fbf"),
                rim="a9e4ee",
                rim_width=0.022,
            ),
            0.44,
            1.0,
            speed=-0.08,
            depth=0.15,
        ),
        Layer(
            land(
                0.57,
                ((1.0, 0.028, 0.3), (0.5, 0.01, 0.1)),
                (0.0, "2c9bd0"),
                (0.3, "1467ae"),
                rim="b9ebf5",
                rim_width=0.026,
            ),
            0.5,
            1.0,
            speed=0.10,
            depth=0.35,
        ),
        Layer(
            land(
                0.675,
                ((0.9, 0.034, 0.55), (0.45, 0.01, 0.2)),
                (0.0, "2a98d4"),
                (0.25, "0d559c"),
                rim="e2f8ff",
                rim_width=0.03,
                opacity=0.68,
            ),
            0.58,
            1.0,
            speed=-0.12,
            depth=0.7,
            front=True,
        ),
        Layer(
            land(
                0.88,
                ((1.3, 0.03, 0.0), (0.65, 0.01, 0.4)),
                (0.0, "1573b4"),
                (0.12, "0a4384"),
                rim="8fd3ee",
                rim_width=0.024,
            ),
            0.8,
            1.0,
            speed=-0.20,
            depth=1.0,
            front=True,
        ),
    ),
    centre=0.54,
)

SKY = Scene(
    "sky",
    ("in the sky", "in the air", "above the clouds", "up in the blue sky"),
    ("air",),
    backdrop((0.0, "2f8fe6"), (0.6, "8fcdf7"), (1.0, "d9f0fd"), sun=(-0.3, 0.16, 0.09, "fff7d1")),
    (
        Layer(clouds((0.34,), 1.0, 0.17, shade="b7dcf7"), 0.1, 0.4, speed=0.14, depth=0.2),
        Layer(clouds((0.72,), 1.0, 0.23, shade="b2d7f5"), 0.4, 0.8, speed=0.22, depth=0.4),
        Layer(
            clouds((1.04,), 0.8, 0.3, shade="8fc0ee"), 0.6, 1.0, speed=0.32, depth=0.7, front=True
        ),
    ),
    centre=0.53,
)

GRASS = Scene(
    "grass",
    ("on the grass", "in a meadow", "in a green field", "on a lawn"),
    ("land",),
    backdrop((0.0, "58b3f3"), (0.6, "d5effc"), sun=(0.3, 0.15, 0.085, "fff6c4")),
    (
        Layer(clouds((0.27,), 0.9, 0.15), 0.05, 0.3, speed=0.16, depth=0.05),
        Layer(
            land(
                0.50,
                ((1.3, 0.05, 0.2), (0.65, 0.02, 0.7)),
                (0.0, "8ccf5e"),
                (0.25, "4fa54a"),
            ),
            0.4,
            1.0,
            speed=0.02,
            depth=0.25,
        ),
        Layer(
            land(
                0.66,
                ((2.0, 0.03, 0.5),),
                (0.0, "9be05a"),
                (0.34, "3f9a3a"),
                rim="c4f07a",
                rim_width=0.02,
                patches=(0.5, "2f8637", 0.55),
            ),
            0.6,
            1.0,
            speed=0.05,
            depth=0.6,
        ),
        Layer(
            discs(0.24, (0.84, 0.97), (0.028, 0.045), "ffffff", "ffd84a", "ff8fb0", soft=0.35),
            0.78,
            1.0,
            speed=0.05,
            depth=0.8,
        ),
    ),
    ground=0.82,
    shadow="0c3a14",
)

DESERT = Scene(
    "desert",
    ("in the desert", "on the sand dunes", "among sand dunes"),
    ("land",),
    backdrop((0.0, "f2a65a"), (0.55, "fde7b5"), sun=(-0.28, 0.2, 0.12, "fffbe0")),
    (
        Layer(
            land(
                0.47,
                ((1.0, 0.06, 0.1), (0.5, 0.02, 0.3)),
                (0.0, "eeb873"),
                (0.3, "d3894a"),
            ),
            0.36,
            1.0,
            speed=0.05,
            depth=0.2,
        ),
        Layer(
            land(
                0.58,
                ((1.3, 0.05, 0.6), (0.65, 0.012, 0.2)),
                (0.0, "f6c983"),
                (0.3, "c9793a"),
                rim="fde3ac",
            ),
            0.5,
            1.0,
            speed=0.09,
            depth=0.4,
        ),
        Layer(
            land(
                0.70,
                ((2.0, 0.03, 0.0),),
                (0.0, "f8d28f"),
                (0.34, "d58e48"),
                rim="ffedc0",
                patches=(0.55, "b96f32", 0.5),
            ),
            0.64,
            1.0,
            speed=0.14,
            depth=0.6,
        ),
    ),
    ground=0.83,
    shadow="5a2a08",
)

SPACE = Scene(
    "space",
    ("in space", "in outer space", "among the stars", "in the galaxy"),
    ("void",),
    backdrop((0.0, "0b0a2a"), (0.6, "1c1245"), (1.0, "0a1030")),
    (
        Layer(
            nebula((1.1, "5b35b8"), (1.3, "a8447f"), (1.2, "1f5aa8")),
            speed=0.12,
            depth=0.1,
        ),
        Layer(
            discs(0.21, (0.04, 0.96), (0.025, 0.045), "ffffff", "ffe9b0", "bfe4ff", soft=0.85),
            speed=0.2,
            depth=0.3,
        ),
        Layer(
            planet(0.2, 0.11, "ffcf8a", "b4532f"),
            0.0,
            0.5,
            speed=0.3,
            depth=0.35,
        ),
    ),
    centre=0.53,
)

SNOW = Scene(
    "snow",
    ("in the snow", "on a snowy hill", "in a snowy field"),
    ("land",),
    backdrop((0.0, "8fb3d9"), (0.6, "e3edf7")),
    (
        Layer(
            land(0.46, ((1.0, 0.07, 0.4), (0.5, 0.03, 0.1)), (0.0, "c3d6ea"), (0.3, "a4bfdc")),
            0.34,
            1.0,
            speed=0.02,
            depth=0.2,
        ),
        Layer(
            land(
                0.64,
                ((1.3, 0.04, 0.2), (0.65, 0.012, 0.5)),
                (0.0, "ffffff"),
                (0.36, "b9d0ea"),
                rim="ffffff",
                patches=(0.6, "a3c0e2", 0.6),
            ),
            0.56,
            1.0,
            speed=0.04,
            depth=0.6,
        ),
        Layer(discs(0.11, (0.07, 0.93), (0.035, 0.055), "ffffff", soft=0.6), speed=-0.5, axis="y"),
    ),
    ground=0.83,
    shadow="1d3f72",
    shade=0.3,
)


SCENES = {scene.name: scene for scene in (OCEAN, SKY, GRASS, DESERT, SPACE, SNOW)}
