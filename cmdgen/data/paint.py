"""Painting the layers of a scene: colours, outlines, clouds, periodic in x so that they can scroll.

A painter takes x (1, w) and y (h, 1) in frame heights, the period of x, and a generator for its
layout, and returns (colour (3, h, w), cover (h, w)). Edges are hard: the caller paints at several
times the size and averages.
"""

from collections.abc import Callable, Sequence
from math import pi

import torch
from torch import Tensor

Painted = tuple[Tensor, Tensor]
Painter = Callable[[Tensor, Tensor, float, torch.Generator], Painted]


def colour(code: str) -> Tensor:
    """ "rrggbb" -> (3, 1, 1) in [0, 1]."""
    return torch.tensor([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]).view(3, 1, 1)


def smooth(value: Tensor, low: float, high: float) -> Tensor:
    """0 below `low`, 1 above `high`, an S between."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def ramp(value: Tensor, stops: str) -> Tensor:
    """(h, w) -> (3, h, w): from colour to colour along `value`: "rrggbb 0.4 rrggbb 1 rrggbb"."""
    first, *rest = stops.split()
    result, low = colour(first).expand(3, *value.shape), 0.0
    for place, code in zip(rest[::2], rest[1::2], strict=True):
        result = torch.lerp(result, colour(code), smooth(value, low, float(place)))
        low = float(place)
    return result


def uniform(generator: torch.Generator, count: int, low: float, high: float) -> list[float]:
    """`count` numbers between `low` and `high`."""
    return (low + (high - low) * torch.rand(count, generator=generator)).tolist()


def spread(generator: torch.Generator, period: float, gap: float) -> list[float]:
    """Places along x about `gap` apart that never crowd."""
    count = max(2, round(period / gap))
    jitter = uniform(generator, count, -0.3, 0.3)
    return [(i + 0.5 + jitter[i]) * period / count for i in range(count)]


def distance(x: Tensor, centre: float, period: float) -> Tensor:
    """Signed distance along x, the short way round."""
    return torch.remainder(x - centre + period / 2, period) - period / 2


def outline(x: Tensor, period: float, *waves: tuple[float, float, float]) -> Tensor:
    """(1, w): a sum of (length, height, phase) sines, lengths rounded to fit the period."""
    total = torch.zeros_like(x)
    for length, height, phase in waves:
        cycles = max(1, round(period / length))
        total = total + height * torch.sin(2 * pi * (cycles * x / period + phase))
    return total


def noise(x: Tensor, y: Tensor, period: float, generator: torch.Generator, length: float) -> Tensor:
    """(h, w) in [0, 1], smooth: random waves of about `length`."""
    total = torch.zeros(y.shape[0], x.shape[1])
    for _ in range(7):
        cycles, phase, wiggle = torch.rand(3, generator=generator).tolist()
        along = max(1, round(period / length * (0.4 + 0.9 * cycles)))
        down = (2 * wiggle - 1) / length
        total = total + torch.sin(2 * pi * (along * x / period + down * y + phase))
    return (0.5 + total / 7).clamp(0, 1)


def backdrop(stops: str, *, sun: tuple[float, float, float, str] | None = None) -> Painter:
    """A vertical gradient, with a glowing disc (right of the middle, down, radius, colour)."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        flat = torch.zeros(y.shape[0], x.shape[1])
        picture = ramp(y + flat, stops)
        if sun is not None:
            right, down, radius, code = sun
            far = torch.hypot(x - period / 4 - right, y - down)
            glow = 0.55 * (1 - smooth(far, 0.6 * radius, 3.5 * radius)) ** 2
            light = torch.maximum(glow, (far < radius).float())
            picture = torch.lerp(picture, colour(code), light)
        return picture, flat + 1

    return paint


def land(
    top: float,
    waves: Sequence[tuple[float, float, float]],
    stops: str,
    *,
    rim: str | None = None,
    rim_width: float = 0.02,
    opacity: float = 1.0,
    patches: tuple[float, str, float] | None = None,
) -> Painter:
    """Everything below an outline: coloured by depth, with a bright rim and soft patches.

    `patches` are their length, colour and strength.
    """

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        depth = y - top - outline(x, period, *waves)
        picture = ramp(depth, stops)
        if patches is not None:
            length, code, strength = patches
            # patches lie flat: wider than high
            field = noise(x, 2.5 * y, period, generator, length)
            picture = torch.lerp(picture, colour(code), strength * smooth(field, 0.45, 0.75))
        cover = torch.where(depth > 0, opacity, 0.0)
        if rim is not None:
            edge = 1 - smooth(depth, 0.4 * rim_width, rim_width)
            picture = torch.lerp(picture, colour(rim), edge)
            cover = torch.where(depth > 0, torch.maximum(cover, 0.9 * edge), 0.0)
        return picture, cover

    return paint


def clouds(
    rows: Sequence[float],
    gap: float,
    size: float,
    light: str = "ffffff",
    shade: str = "c4dcf2",
    opacity: float = 0.95,
) -> Painter:
    """Puffy clouds with flat feet, one line of them for each height in `rows`."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        flat = torch.zeros(y.shape[0], x.shape[1])
        cover, body = flat, flat
        for row in rows:
            for middle in spread(generator, period, gap):
                scale = size * uniform(generator, 1, 0.75, 1.2)[0]
                foot = row + uniform(generator, 1, -0.04, 0.04)[0]
                tilt = uniform(generator, 1, -0.25, 0.25)[0]
                puffs = ((-0.95, 0.34), (-0.4, 0.58 - tilt), (0.25, 0.62 + tilt), (0.9, 0.36))
                for right, radius in puffs:
                    across = distance(x, middle + right * scale, period) / (radius * scale)
                    down = (y - foot + 0.45 * radius * scale) / (radius * scale)
                    inside = ((across**2 + down**2 < 1) & (y < foot)).float()
                    # every puff is lit from above left
                    lit = (0.75 - 0.55 * down - 0.2 * across).clamp(0, 1)
                    body = torch.where(inside > 0, torch.maximum(lit, body * cover), body)
                    cover = torch.maximum(cover, inside)
        picture = torch.lerp(colour(shade), colour(light), smooth(body, 0.25, 0.85))
        return picture, cover * opacity

    return paint


def discs(
    gap: float,
    rows: tuple[float, float],
    radii: tuple[float, float],
    *codes: str,
    soft: float = 0.5,
    tall: float = 1.0,
) -> Painter:
    """Scattered soft things, `tall` times as high as wide: stars, flowers, flakes, drops."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        cover = torch.zeros(y.shape[0], x.shape[1])
        picture = colour(codes[0]).expand(3, *cover.shape)
        for number, middle in enumerate(spread(generator, period, gap)):
            down = uniform(generator, 1, *rows)[0]
            radius = uniform(generator, 1, *radii)[0]
            far = torch.hypot(distance(x, middle, period), (y - down) / tall) / radius
            inside = 1 - smooth(far, 1 - soft, 1.0)
            picture = torch.where(inside > cover, colour(codes[number % len(codes)]), picture)
            cover = torch.maximum(cover, inside)
        return picture, cover

    return paint


def nebula(*veils: tuple[float, str]) -> Painter:
    """Soft coloured veils, each of some (length, colour)."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        cover = torch.zeros(y.shape[0], x.shape[1])
        picture = torch.zeros(3, *cover.shape)
        for length, code in veils:
            veil = 0.6 * smooth(noise(x, y, period, generator, length), 0.45, 0.95)
            picture = torch.lerp(picture, colour(code), veil / (veil + cover + 1e-6))
            cover = cover + veil * (1 - cover)
        return picture, cover

    return paint


def planet(down: float, radius: float, light: str, shade: str) -> Painter:
    """One lit ball a period."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        across = distance(x, uniform(generator, 1, 0, period)[0], period) / radius
        below = (y - down) / radius
        picture = torch.lerp(colour(light), colour(shade), smooth(across + below, -0.9, 1.1))
        return picture, (across**2 + below**2 < 1).float()

    return paint


def peaks(
    foot: float, gap: float, height: float, light: str, shade: str, cap: str | None = None
) -> Painter:
    """A range of mountains lit from the left, with snow on their upper third."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        cover = torch.zeros(y.shape[0], x.shape[1])
        picture = colour(light).expand(3, *cover.shape)
        for middle in spread(generator, period, gap):
            tall = height * uniform(generator, 1, 0.65, 1.0)[0]
            across = distance(x, middle, period)
            # the ridge wanders as it comes down
            side = across - 0.25 * (y - foot + tall) * torch.sin(9 * y + middle)
            inside = ((y - foot + tall) > 1.15 * across.abs()) & (y < foot)
            face = torch.lerp(colour(light), colour(shade), smooth(side, -0.02, 0.02))
            if cap is not None:
                line = foot - 0.62 * tall + 0.03 * torch.sin(40 * across)
                snow = torch.lerp(colour(cap), colour(shade), 0.3 * smooth(side, -0.02, 0.02))
                face = torch.where(y < line, snow, face)
            picture = torch.where(inside, face, picture)
            cover = torch.maximum(cover, inside.float())
        return picture, cover

    return paint


def skyline(foot: float, gap: float, height: float, wall: str, window: str) -> Painter:
    """Houses in a row with large windows, some of them lit."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        cover = torch.zeros(y.shape[0], x.shape[1])
        picture = colour(wall).expand(3, *cover.shape)
        for middle in spread(generator, period, gap):
            wide, tall = 0.42 * gap, height * uniform(generator, 1, 0.45, 1.0)[0]
            across, up = distance(x, middle, period), foot - y
            inside = (across.abs() < wide) & (up < tall) & (up > 0)
            cell, first = wide / 1.6, uniform(generator, 1, 0, 6)[0]
            column, row = torch.floor(across / cell + 0.5), torch.floor(up / cell)
            right = (across / cell - column).abs() < 0.27
            pane = right & ((up / cell - row - 0.5).abs() < 0.27) & (tall - up > 0.5 * cell)
            lit = torch.remainder(3 * column + 5 * row + first, 4) < 2.2
            face = colour(wall) * (0.8 + 0.4 * uniform(generator, 1, 0, 1)[0])
            face = torch.where(pane & lit, colour(window), face.expand_as(picture))
            picture = torch.where(inside, face, picture)
            cover = torch.maximum(cover, inside.float())
        return picture, cover

    return paint


def trees(
    foot: float, gap: float, height: float, light: str, shade: str, *, round_crown: bool
) -> Painter:
    """A row of trees, firs or round ones, on brown trunks."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        cover = torch.zeros(y.shape[0], x.shape[1])
        picture = colour(light).expand(3, *cover.shape)
        for middle in spread(generator, period, gap):
            tall = height * uniform(generator, 1, 0.75, 1.0)[0]
            across, up = distance(x, middle, period) / tall, (foot - y) / tall
            trunk = (across.abs() < 0.05) & (up > 0) & (up < 0.5)
            if round_crown:
                crown = torch.hypot(across / 0.34, (up - 0.68) / 0.32) < 1
            else:
                # three skirts, one above the other
                skirt = torch.remainder((up - 0.18) / 0.274, 1) * 0.12
                crown = (across.abs() < 0.36 * (1 - up) + 0.06 - skirt) & (up > 0.18) & (up < 1)
            leaf = torch.lerp(colour(light), colour(shade), smooth(across - up, -0.9, 0.1))
            picture = torch.where(trunk, colour("6b4426"), picture)
            picture = torch.where(crown, leaf, picture)
            cover = torch.maximum(cover, (trunk | crown).float())
        return picture, cover

    return paint


def beams(gap: float, code: str, strength: float, slant: float, fade: float = 1.0) -> Painter:
    """Soft slanted rays of light from above that are gone at the height `fade`."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        wave = outline(x - slant * y, period, (gap, 1.0, 0.2), (0.6 * gap, 0.5, 0.7))
        cover = strength * smooth(wave, 0.0, 1.3) * (1 - smooth(y, 0.2 * fade, fade))
        return colour(code).expand(3, *cover.shape), cover

    return paint


def stripes(gap: float, light: str, shade: str, rows: tuple[float, float]) -> Painter:
    """Soft upright folds between two heights: a curtain, a wallpaper."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        wave = 0.5 + 0.5 * outline(x, period, (gap, 1.0, 0.0)) + 0 * y
        picture = torch.lerp(colour(shade), colour(light), smooth(wave, 0.0, 1.0))
        return picture, ((y > rows[0]) & (y < rows[1])).float() + 0 * x

    return paint


def weeds(gap: float, height: float, light: str, shade: str) -> Painter:
    """Wavy water plants that grow from below."""

    def paint(x: Tensor, y: Tensor, period: float, generator: torch.Generator) -> Painted:
        cover = torch.zeros(y.shape[0], x.shape[1])
        for middle in spread(generator, period, gap):
            tall, phase = (uniform(generator, 1, 0.6 * height, height)[0], 6 * middle)
            up = (1 - y) / tall
            bend = 0.035 * torch.sin(16 * y + phase) * up
            blade = 0.045 * (1 - up).clamp(min=0) ** 0.5
            inside = (distance(x, middle, period) - bend).abs() < blade
            cover = torch.maximum(cover, inside.float())
        return torch.lerp(colour(light), colour(shade), smooth(y + 0 * x, 1 - height, 1.0)), cover

    return paint
