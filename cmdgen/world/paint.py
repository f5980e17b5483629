"""Painters of the layers of a scene, periodic in x so that a layer can scroll.

A painter returns (colour (3, h, w), cover (h, w)). Edges are hard: the caller paints at several
times the size and averages. Lengths are in frame heights, colours are "rrggbb", light before shade.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

Painted = tuple[Tensor, Tensor]
Painter = Callable[..., Painted]
# length, height and phase of a sine
Wave = tuple[float, float, float]
Range = tuple[float, float]
# right of the middle, down, radius and colour
Sun = tuple[float, float, float, str]
Colours = tuple[str, str]
Palette = tuple[str, ...]
Rows = tuple[float, ...]


def rgb(code: str) -> Tensor:
    """ "rrggbb" -> (3, 1, 1) in [0, 1]."""
    return torch.tensor([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]).view(3, 1, 1)


def smooth(value: Tensor, low: float, high: float) -> Tensor:
    """0 below `low`, 1 above `high`, an S between."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def mix(colours: Colours, share: Tensor) -> Tensor:
    """(h, w) -> (3, h, w): from one colour to another."""
    return torch.lerp(rgb(colours[0]), rgb(colours[1]), share)


def ramp(value: Tensor, stops: str) -> Tensor:
    """(h, w) -> (3, h, w): from colour to colour along `value`: "rrggbb 0.4 rrggbb 1 rrggbb"."""
    first, *rest = stops.split()
    result, low = rgb(first).expand(3, *value.shape), 0.0
    for place, code in zip(rest[::2], rest[1::2], strict=True):
        result = torch.lerp(result, rgb(code), smooth(value, low, float(place)))
        low = float(place)
    return result


@dataclass(frozen=True)
class Canvas:
    """Where a painter paints: pixel centres, the period of x, and the random layout."""

    x: Tensor  # (1, w)
    y: Tensor  # (h, 1)
    period: float
    generator: torch.Generator

    def zeros(self) -> Tensor:
        """() -> (h, w)."""
        return torch.zeros(self.y.shape[0], self.x.shape[1])

    def uniform(self, low: float, high: float) -> float:
        """Draw a number between `low` and `high`."""
        return (low + (high - low) * torch.rand(1, generator=self.generator)).item()

    def spread(self, gap: float) -> list[float]:
        """Draw places along x, about `gap` apart, that never crowd."""
        count = max(2, round(self.period / gap))
        jitter = (-0.3 + 0.6 * torch.rand(count, generator=self.generator)).tolist()
        return [(i + 0.5 + jitter[i]) * self.period / count for i in range(count)]

    def distance(self, centre: float) -> Tensor:
        """() -> (1, w): the signed distance along x, the short way round."""
        return torch.remainder(self.x - centre + self.period / 2, self.period) - self.period / 2

    def outline(self, waves: Iterable[Wave], slant: float = 0.0) -> Tensor:
        """() -> (1, w), or (h, w) if slanted: a sum of sines, lengths rounded to fit the period."""
        x = self.x - slant * self.y if slant else self.x
        total = torch.zeros_like(x)
        for length, height, phase in waves:
            cycles = max(1, round(self.period / length))
            total = total + height * torch.sin(2 * pi * (cycles * x / self.period + phase))
        return total

    def noise(self, length: float, flatness: float = 1.0) -> Tensor:
        """() -> (h, w) in [0, 1], smooth: random waves of about `length`."""
        total = self.zeros()
        for _ in range(7):
            cycles, phase, wiggle = torch.rand(3, generator=self.generator).tolist()
            along = max(1, round(self.period / length * (0.4 + 0.9 * cycles)))
            down = (2 * wiggle - 1) / length
            across = along * self.x / self.period
            total = total + torch.sin(2 * pi * (across + down * (flatness * self.y) + phase))
        return (0.5 + total / 7).clamp(0, 1)

    def stack(self, shapes: Iterable[tuple[Tensor, Tensor]]) -> Painted:
        """(inside (h, w), colour (3, h, w)) each -> all of them, later ones in front."""
        cover = self.zeros()
        picture = cover.expand(3, *cover.shape)
        for inside, face in shapes:
            picture = torch.where(inside, face, picture)
            cover = torch.maximum(cover, inside.float())
        return picture, cover


def backdrop(canvas: Canvas, stops: str, sun: Sun | None = None) -> Tensor:
    """() -> (3, h, w): a vertical gradient, with a glowing disc."""
    picture = ramp(canvas.y + canvas.zeros(), stops)
    if sun is not None:
        right, down, radius, code = sun
        # the middle is at a quarter of the period
        far = torch.hypot(canvas.x - canvas.period / 4 - right, canvas.y - down)
        glow = 0.55 * (1 - smooth(far, 0.6 * radius, 3.5 * radius)) ** 2
        light = torch.maximum(glow, (far < radius).float())
        picture = torch.lerp(picture, rgb(code), light)
    return picture


def land(
    canvas: Canvas,
    top: float,
    stops: str,
    waves: tuple[Wave, ...] = (),
    rim: str | None = None,
    rim_width: float = 0.02,
    opacity: float = 1.0,
    patches: tuple[float, str, float] | None = None,
) -> Painted:
    """Paint everything below an outline: coloured by depth, with a bright rim and soft patches.

    `patches` are their length, colour and strength.
    """
    depth = canvas.y - top - canvas.outline(waves)
    picture = ramp(depth, stops)
    if patches is not None:
        length, code, strength = patches
        # patches lie flat: wider than high
        field = canvas.noise(length, flatness=2.5)
        picture = torch.lerp(picture, rgb(code), strength * smooth(field, 0.45, 0.75))
    cover = torch.where(depth > 0, opacity, 0.0)
    if rim is not None:
        edge = 1 - smooth(depth, 0.4 * rim_width, rim_width)
        picture = torch.lerp(picture, rgb(rim), edge)
        cover = torch.where(depth > 0, torch.maximum(cover, 0.9 * edge), 0.0)
    return picture, cover


def clouds(
    canvas: Canvas, rows: Rows, gap: float, size: float, colours: Colours = ("ffffff", "c4dcf2"), opacity: float = 0.95
) -> Painted:
    """Paint puffy clouds with flat feet, one line of them for each height in `rows`."""
    cover, body = canvas.zeros(), canvas.zeros()
    for row, middle in ((row, middle) for row in rows for middle in canvas.spread(gap)):
        scale = size * canvas.uniform(0.75, 1.2)
        foot = row + canvas.uniform(-0.04, 0.04)
        tilt = canvas.uniform(-0.25, 0.25)
        for right, radius in ((-0.95, 0.34), (-0.4, 0.58 - tilt), (0.25, 0.62 + tilt), (0.9, 0.36)):
            across = canvas.distance(middle + right * scale) / (radius * scale)
            down = (canvas.y - foot + 0.45 * radius * scale) / (radius * scale)
            inside = ((across**2 + down**2 < 1) & (canvas.y < foot)).float()
            # every puff is lit from above left
            lit = (0.75 - 0.55 * down - 0.2 * across).clamp(0, 1)
            body = torch.where(inside > 0, torch.maximum(lit, body * cover), body)
            cover = torch.maximum(cover, inside)
    return mix(colours[::-1], smooth(body, 0.25, 0.85)), cover * opacity


def discs(
    canvas: Canvas, gap: float, rows: Range, radii: Range, colours: Palette, soft: float = 0.5, tall: float = 1.0
) -> Painted:
    """Paint scattered soft things, `tall` times as high as wide: stars, flowers, flakes, drops."""
    cover = canvas.zeros()
    picture = rgb(colours[0]).expand(3, *cover.shape)
    for number, middle in enumerate(canvas.spread(gap)):
        down, radius = canvas.uniform(*rows), canvas.uniform(*radii)
        far = torch.hypot(canvas.distance(middle), (canvas.y - down) / tall) / radius
        inside = 1 - smooth(far, 1 - soft, 1.0)
        picture = torch.where(inside > cover, rgb(colours[number % len(colours)]), picture)
        cover = torch.maximum(cover, inside)
    return picture, cover


def nebula(canvas: Canvas, veils: tuple[tuple[float, str], ...]) -> Painted:
    """Paint soft coloured veils, each of some (length, colour)."""
    cover = canvas.zeros()
    picture = torch.zeros(3, *cover.shape)
    for length, code in veils:
        veil = 0.6 * smooth(canvas.noise(length), 0.45, 0.95)
        picture = torch.lerp(picture, rgb(code), veil / (veil + cover + 1e-6))
        cover = cover + veil * (1 - cover)
    return picture, cover


def planet(canvas: Canvas, down: float, radius: float, colours: Colours) -> Painted:
    """Paint one lit ball a period."""
    across = canvas.distance(canvas.uniform(0, canvas.period)) / radius
    below = (canvas.y - down) / radius
    picture = mix(colours, smooth(across + below, -0.9, 1.1))
    return picture, (across**2 + below**2 < 1).float()


def peaks(canvas: Canvas, foot: float, gap: float, height: float, colours: Colours, cap: str | None = None) -> Painted:
    """Paint a range of mountains lit from the left, with snow on their upper third."""

    def mountain(middle: float) -> tuple[Tensor, Tensor]:
        tall, y = height * canvas.uniform(0.65, 1.0), canvas.y
        across = canvas.distance(middle)
        # the ridge wanders as it comes down
        side = across - 0.25 * (y - foot + tall) * torch.sin(9 * y + middle)
        inside = ((y - foot + tall) > 1.15 * across.abs()) & (y < foot)
        lit = smooth(side, -0.02, 0.02)
        face = mix(colours, lit)
        if cap is not None:
            line = foot - 0.62 * tall + 0.03 * torch.sin(40 * across)
            face = torch.where(y < line, mix((cap, colours[1]), 0.3 * lit), face)
        return inside, face

    return canvas.stack(map(mountain, canvas.spread(gap)))


def skyline(canvas: Canvas, foot: float, gap: float, height: float, wall: str, window: str) -> Painted:
    """Paint houses in a row with large windows, some of them lit."""

    def house(middle: float) -> tuple[Tensor, Tensor]:
        wide, tall = 0.42 * gap, height * canvas.uniform(0.45, 1.0)
        across, up = canvas.distance(middle), foot - canvas.y
        inside = (across.abs() < wide) & (up < tall) & (up > 0)
        cell, first = wide / 1.6, canvas.uniform(0, 6)
        column, row = torch.floor(across / cell + 0.5), torch.floor(up / cell)
        right = (across / cell - column).abs() < 0.27
        pane = right & ((up / cell - row - 0.5).abs() < 0.27) & (tall - up > 0.5 * cell)
        lit = torch.remainder(3 * column + 5 * row + first, 4) < 2.2
        face = rgb(wall) * (0.8 + 0.4 * canvas.uniform(0, 1))
        return inside, torch.where(pane & lit, rgb(window), face)

    return canvas.stack(map(house, canvas.spread(gap)))


def trees(canvas: Canvas, foot: float, gap: float, height: float, colours: Colours, round_crown: bool) -> Painted:
    """Paint a row of trees, firs or round ones, on brown trunks."""

    def tree(middle: float) -> tuple[Tensor, Tensor]:
        tall = height * canvas.uniform(0.75, 1.0)
        across, up = canvas.distance(middle) / tall, (foot - canvas.y) / tall
        trunk = (across.abs() < 0.05) & (up > 0) & (up < 0.5)
        if round_crown:
            crown = torch.hypot(across / 0.34, (up - 0.68) / 0.32) < 1
        else:
            # three skirts, one above the other
            skirt = torch.remainder((up - 0.18) / 0.274, 1) * 0.12
            crown = (across.abs() < 0.36 * (1 - up) + 0.06 - skirt) & (up > 0.18) & (up < 1)
        leaf = mix(colours, smooth(across - up, -0.9, 0.1))
        return trunk | crown, torch.where(crown, leaf, rgb("6b4426"))

    return canvas.stack(map(tree, canvas.spread(gap)))


def beams(canvas: Canvas, gap: float, colour: str, strength: float, slant: float, fade: float = 1.0) -> Painted:
    """Paint soft slanted rays of light from above that are gone at the height `fade`."""
    wave = canvas.outline(((gap, 1.0, 0.2), (0.6 * gap, 0.5, 0.7)), slant)
    cover = strength * smooth(wave, 0.0, 1.3) * (1 - smooth(canvas.y, 0.2 * fade, fade))
    return rgb(colour).expand(3, *cover.shape), cover


def stripes(canvas: Canvas, gap: float, colours: Colours, rows: Range) -> Painted:
    """Paint soft upright folds between two heights: a curtain, a wallpaper."""
    x, y = canvas.x, canvas.y
    wave = 0.5 + 0.5 * canvas.outline(((gap, 1.0, 0.0),)) + 0 * y
    picture = mix(colours[::-1], smooth(wave, 0.0, 1.0))
    return picture, ((y > rows[0]) & (y < rows[1])).float() + 0 * x


def weeds(canvas: Canvas, gap: float, height: float, colours: Colours) -> Painted:
    """Paint wavy water plants that grow from below."""
    x, y, cover = canvas.x, canvas.y, canvas.zeros()
    for middle in canvas.spread(gap):
        tall, phase = canvas.uniform(0.6 * height, height), 6 * middle
        up = (1 - y) / tall
        bend = 0.035 * torch.sin(16 * y + phase) * up
        blade = 0.045 * (1 - up).clamp(min=0) ** 0.5
        cover = torch.maximum(cover, ((canvas.distance(middle) - bend).abs() < blade).float())
    return mix(colours, smooth(y + 0 * x, 1 - height, 1.0)), cover
