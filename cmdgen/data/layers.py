"""Layers of scenery that scroll: painted once per size, then only cut for every frame."""

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

from cmdgen.data.paint import Painter

# sub-pixel positions that a layer is kept at, and how much finer it is painted
_PHASES = 4


@dataclass(frozen=True)
class Layer:
    """Something painted that scrolls: sideways (along "x", repeating) or down (along "y")."""

    paint: Painter
    # rows that it may cover, in frame heights
    top: float = 0.0
    bottom: float = 1.0
    # frame heights a clip that it moves left (or up) by itself, and while the subject travels right
    speed: float = 0.0
    depth: float = 0.0
    axis: str = "x"
    # drawn before the subject
    front: bool = False


@dataclass(frozen=True)
class Scene:
    """A place: the phrases that name it, its backdrop and layers, where a subject rests in it."""

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
    """A layer painted at one size: all sub-pixel phases, premultiplied, with 1 - cover last."""

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


@lru_cache(maxsize=128)
def paint_scene(
    scene: Scene, size: tuple[int, int], device: str
) -> tuple[Tensor, tuple[Strip, ...]]:
    """-> what never moves (3, H, W), and the layers, painted once per size."""
    layers = (_paint_layer(scene, number, size, device) for number in range(len(scene.layers)))
    return _paint_base(scene, size, device), tuple(layers)


def _paint_base(scene: Scene, size: tuple[int, int], device: str) -> Tensor:
    """-> (3, H, W): what never moves."""
    height, width = size
    x, y = _grid(height * _PHASES, width * _PHASES, (0.0, 1.0))
    # painters put suns relative to a quarter of the period: here that is the middle
    picture, _ = scene.base(x, y, 2 * width / height, _generator(scene, 0))
    return F.avg_pool2d(picture, _PHASES).to(device)


def _paint_layer(scene: Scene, number: int, size: tuple[int, int], device: str) -> Strip:
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
