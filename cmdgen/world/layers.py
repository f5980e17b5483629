"""Layers of scenery that scroll: painted once per size, then only cut for every frame."""

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

from cmdgen.data.clips import Size
from cmdgen.world.paint import Canvas, backdrop
from cmdgen.world.tables import Scene

# sub-pixel positions that a layer is kept at, and how much finer it is painted
_PHASES = 4


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


@lru_cache(maxsize=128)
def paint_scene(scene: Scene, size: Size, device: str) -> tuple[Tensor, tuple[Strip, ...]]:
    """Paint what never moves, (3, H, W), and the layers of a scene."""
    canvas = _canvas(scene, 0, size, slice(0, size[0]), size[1])
    base = F.avg_pool2d(backdrop(canvas, scene.backdrop, scene.sun), _PHASES).to(device)
    layers = (_paint_layer(scene, number, size, device) for number in range(len(scene.layers)))
    return base, tuple(layers)


def _canvas(scene: Scene, number: int, size: Size, rows: slice, width: int) -> Canvas:
    """Make the canvas of layer `number` over some rows of pixels, as fine as the phases."""
    (height, frame_width), count = size, (rows.stop - rows.start) * _PHASES
    top, bottom = rows.start / height, rows.stop / height
    step = (bottom - top) / count
    x = ((torch.arange(width * _PHASES) + 0.5) * step)[None]
    y = (top + (torch.arange(count) + 0.5) * step)[:, None]
    generator = torch.Generator().manual_seed(crc32(f"{scene.name} {number}".encode()))
    return Canvas(x, y, 2 * frame_width / height, generator)


def _paint_layer(scene: Scene, number: int, size: Size, device: str) -> Strip:
    """Paint layer `number` at every phase, ready to be cut at any shift."""
    layer, (height, width) = scene.layers[number], size
    if layer.rises:
        # the dimension that scrolls, and how much of it a frame shows
        dim, shown, rows = 1, height, slice(0, height)
    else:
        top, bottom = (int(side * height) for side in layer.span)
        dim, shown, rows = 2, width, slice(top, min(height, bottom + 1))
    canvas = _canvas(scene, number + 1, size, rows, width if layer.rises else 2 * width)
    colour, cover = layer.paint(canvas)
    painted = torch.cat([colour * cover, 1 - cover[None]])  # (4, h·phases, w·phases)
    phases = torch.stack(
        [F.avg_pool2d(painted.roll(-phase, dim), _PHASES) for phase in range(_PHASES)]
    )  # (phases, 4, h, w)
    phases = torch.cat([phases, phases.narrow(dim + 1, 0, shown)], dim + 1).to(device)
    windows = phases.contiguous().unfold(dim + 1, shown, 1)
    # unfold puts the pixels of a window last
    order = (0, 2, 1, 4, 3) if layer.rises else (0, 3, 1, 2, 4)
    return Strip(windows.permute(order), rows)
