"""Draw clips of the rendered world in batched torch.

Layers are painted once per size and only cut and stacked for each frame; sprites are placed by one
`grid_sample` for each mip level. Poses are in float64 on the CPU: the same on every device.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from cmdgen.data.clips import Size
from cmdgen.world.config import WorldConfig
from cmdgen.world.layers import paint_scene
from cmdgen.world.motions import DRAWS, POSE, VIEW, evaluate
from cmdgen.world.paint import rgb
from cmdgen.world.sprites import Sprites
from cmdgen.world.tables import Motion, Scene, read_tables

# longer side of the subject, in frame heights, alone and as one of two
_SIZE = 0.52
_PAIR_SIZE = 0.8
_PAIR_OFFSET = 0.25
# a moving camera looks at a canvas that much larger
_CANVAS = 1.5


@dataclass(frozen=True)
class Specs:
    """What a batch of clips shows, by number in the world's lists; -1 is none."""

    actors: Tensor  # (B, 2): the subject and its partner
    motion: Tensor  # (B,)
    scene: Tensor  # (B,)
    tint: Tensor  # (B, 2) among the colours
    grade: Tensor  # (B, 2) among the sizes

    def __getitem__(self, rows: Tensor) -> "Specs":
        return Specs(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def subject(self) -> Tensor:
        """() -> (B,): the first subject."""
        return self.actors[:, 0]


@dataclass(frozen=True)
class Pose:
    """Where a sprite is on every frame, (b, T) each, in frame heights from the top left."""

    centre_x: Tensor
    centre_y: Tensor
    wide: Tensor  # half of the sprite's square; negative is mirrored
    tall: Tensor
    angle: Tensor


@dataclass(frozen=True)
class Shot:
    """Clips to draw together: of one scene, all with or all without a moving camera."""

    config: WorldConfig
    sprites: Sprites
    motions: list[Motion]
    scenes: list[Scene]
    specs: Specs
    look: Tensor  # (b, 2, 8) in [0, 1), float64: how the subjects differ
    scroll: Tensor  # (b, layers) in [0, 1), float64: where the layers start
    time: Tensor  # (1, T) in [0, 1), float64
    size: Size
    device: str

    def __getitem__(self, rows: Tensor) -> "Shot":
        chosen = {name: getattr(self, name)[rows] for name in ("specs", "look", "scroll")}
        return replace(self, **chosen)

    def film(self) -> tuple[Tensor, Tensor]:
        """-> (b·T, 3, H, W) in [0, 1] and the subjects' cover (b·T, H, W)."""
        if not self.motions[self.specs.motion[0]].camera:
            return self._draw()
        height, width = (round(_CANVAS * side) for side in self.size)
        picture, cover = replace(self, size=(height, width))._draw()
        view = self._follow(VIEW, self.look[:, 0, :DRAWS])
        seen = _look_at(torch.cat([picture, cover[:, None]], 1), view, self.size)
        return seen[:, :3], seen[:, 3]

    @property
    def _scene(self) -> Scene:
        return self.scenes[self.specs.scene[0]]

    @cached_property
    def _heading(self) -> Tensor:
        """() -> (b,): 1 where the subject travels right, -1 where it travels left."""
        mirrored = self.config.flips & (self.look[:, 0, 6] < 0.5)
        return torch.where(mirrored, -1.0, 1.0) * self.sprites.facing[self.specs.subject]

    def _follow(self, rest: dict[str, float], draws: Tensor) -> dict[str, Tensor]:
        """(b, DRAWS) -> (b, T) float64 for each name in `rest`: what the motions change it to."""
        shape = (len(draws), self.time.shape[1])
        tracks = {name: torch.full(shape, at, dtype=torch.float64) for name, at in rest.items()}
        for number in self.specs.motion.unique().tolist():
            rows = self.specs.motion == number
            path = evaluate(self.motions[number].path, self.time, draws[rows].T[:, :, None])
            for name in rest.keys() & path.keys():
                tracks[name][rows] = path[name]
        return tracks

    def _draw(self) -> tuple[Tensor, Tensor]:
        """-> (b·T, 3, H, W) in [0, 1] and the subjects' cover (b·T, H, W)."""
        clips, frames, (height, width) = len(self.look), self.time.shape[1], self.size
        base, strips = paint_scene(self._scene, self.size, self.device)
        picture = base.expand(clips * frames, 3, height, width).clone()
        travel = torch.tensor([motion.travel for motion in self.motions])[self.specs.motion]
        travel = travel.double() * self._heading

        def stack(front: bool) -> None:
            for i, (layer, strip) in enumerate(zip(self._scene.layers, strips, strict=True)):
                if layer.front == front:
                    speed = layer.speed + layer.depth * travel
                    span = 1.0 if layer.rises else 2 * width / height
                    moved = self.scroll[:, i, None] * span + speed[:, None] * self.time
                    cut = strip.shifted((moved * height).flatten().to(self.device))
                    part = picture[:, :, strip.rows]
                    torch.addcmul(cut[:, :3], part, cut[:, 3:], out=part)

        stack(front=False)
        # the partner, where there is one, is behind
        paired = (self.specs.actors[:, 1] >= 0).nonzero()[:, 0]
        if len(paired):
            chosen = (paired[:, None] * frames + torch.arange(frames)).flatten().to(self.device)
            shown = picture[chosen]
            behind = self[paired]._place(shown, 1)
            picture[chosen] = shown
        cover = self._place(picture, 0)
        if len(paired):
            cover[chosen] = torch.maximum(cover[chosen], behind)
        stack(front=True)
        return picture, cover

    def _place(self, picture: Tensor, part: int) -> Tensor:
        """(N, 3, H, W) -> cover (N, H, W): draw the subjects, or partners, on it in place."""
        (height, width), device = self.size, picture.device
        pose, frames = self._pose(picture, part), self.time.shape[1]
        subject = self.specs.actors[:, part].repeat_interleave(frames)
        tint = self.specs.tint[:, part].repeat_interleave(frames)
        # the coarsest level that is at least as fine as the frame
        drawn = 2 * torch.maximum(pose.wide.abs(), pose.tall).flatten() * height
        sides = torch.tensor([level.shape[-1] for level in self.sprites.levels])
        level = ((sides[None] >= drawn[:, None]).sum(1) - 1).clamp(min=0)
        cosine, sine = torch.cos(pose.angle), torch.sin(pose.angle)
        x, y = _axes(height, width, device)
        right, down = x - _column(pose.centre_x, device), y - _column(pose.centre_y, device)
        grid = torch.empty(len(subject), height, width, 2, device=device)
        wide = [_column(part / pose.wide, device) for part in (cosine, sine)]
        tall = [_column(part / pose.tall, device) for part in (cosine, sine)]
        grid[..., 0] = right * wide[0] + down * wide[1]
        grid[..., 1] = down * tall[0] - right * tall[1]
        cover = torch.empty(len(subject), height, width, device=device)
        for number in level.unique().tolist():
            rows = (level == number).nonzero()[:, 0]
            texture = self.sprites.levels[number][subject[rows].to(device)]
            texture, rows = _tinted(texture, tint[rows]), rows.to(device)
            sprite = F.grid_sample(texture, grid[rows], align_corners=False)
            picture[rows] = torch.addcmul(sprite[:, :3], picture[rows], 1 - sprite[:, 3:])
            cover[rows] = sprite[:, 3]
        return cover

    def _pose(self, picture: Tensor, part: int) -> Pose:
        """Find where the subjects, or partners, are; draw their shadows on `picture`."""
        specs, look, variety = self.specs, self.look[:, part], self.config.variety
        heading, subject = self._heading[:, None], specs.actors[:, part]
        aspect = self.size[1] / self.size[0]
        unit = min(1.0, aspect)
        path = self._follow(POSE, look[:, :DRAWS] * variety)
        sizes = torch.tensor([*(size.factor for size in read_tables().sizes.values()), 1.0])
        paired = specs.actors[:, 1:] >= 0
        half = unit * _SIZE * (1 + 0.16 * variety * (look[:, 3:4] - 0.5)) * path["scale"] / 2
        half = half * sizes[specs.grade[:, part], None].double()
        half = half * torch.where(paired, _PAIR_SIZE, 1.0)
        tall = half * path["stretch"].sqrt()
        wide = half * path["stretch"].rsqrt() * heading * self.sprites.facing[subject, None]
        forward = heading * path["forward"] + 0.16 * variety * (look[:, 4:5] - 0.5)
        aside = unit * torch.where(paired, _PAIR_OFFSET * (1 - 2 * part), 0.0)
        centre_x = aspect / 2 + unit * forward + aside
        jitter, up = 0.06 * variety * (look[:, 5:6] - 0.5), unit * path["up"]
        angle, ground = heading * path["angle"], self._scene.ground
        if ground is None:
            return Pose(centre_x, self._scene.centre + jitter - up, wide, tall, angle)
        foot, extent = ground + jitter, self.sprites.extents[subject].double()
        pose = Pose(centre_x, foot - extent[:, 1:] * tall - up, wide, tall, angle)
        _cast_shadow(picture, self._scene, pose, foot.expand_as(tall), extent)
        return pose


def _axes(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel centres in frame heights: x (1, 1, W), y (1, H, 1)."""
    x = (torch.arange(width, device=device) + 0.5) / height
    y = (torch.arange(height, device=device) + 0.5) / height
    return x[None, None], y[None, :, None]


def _column(value: Tensor, device: torch.device) -> Tensor:
    """(b, T) -> (N, 1, 1) float32: one number for each frame."""
    return value.flatten().float().to(device)[:, None, None]


def _tinted(texture: Tensor, tint: Tensor) -> Tensor:
    """(N, 4, h, w), (N,) among the colours or -1 -> its light and shade in that colour."""
    rows = (tint >= 0).nonzero()[:, 0].to(texture.device)
    if not len(rows):
        return texture
    palette = torch.stack([rgb(code) for code in read_tables().colours.values()])
    paint = palette.to(texture.device)[tint.to(texture.device)[rows]]  # (n, 3, 1, 1)
    weights = torch.tensor([0.3, 0.59, 0.11], device=texture.device).view(3, 1, 1)
    picture, alpha = texture[rows, :3], texture[rows, 3:]
    light = (picture * weights).sum(1, keepdim=True)
    # a bright tint lifts the shadows, a dark one keeps its highlights
    toned = paint * (0.3 * alpha + 0.85 * light)
    texture[rows, :3] = torch.minimum(0.12 * picture + 0.88 * toned, alpha)
    return texture


def _cast_shadow(picture: Tensor, scene: Scene, pose: Pose, foot: Tensor, extent: Tensor) -> None:
    """Darken a soft ellipse on the ground; fainter and wider the higher the subject is."""
    device = picture.device
    x, y = _axes(picture.shape[2], picture.shape[3], device)
    rise = (foot - (pose.centre_y + pose.tall * extent[:, 1:])).clamp(min=0)
    spread = 0.92 * (pose.wide.abs() * extent[:, :1]) * (1 + 0.8 * rise)
    across = (x - _column(pose.centre_x, device)) / _column(spread, device)  # (N, 1, W)
    down = (y - _column(foot, device)) / _column(0.16 * spread + 0.02, device)  # (N, H, 1)
    light = (1 - across**2 - down**2).clamp_(min=0)
    light = light.sqrt_().mul_(_column(scene.shade / (1 + 5 * rise), device))
    picture.add_((rgb(scene.shadow).to(device) - picture) * light[:, None])


def _look_at(canvas: Tensor, view: dict[str, Tensor], size: Size) -> Tensor:
    """(N, C, h, w) -> (N, C, H, W): what the camera sees."""
    (height, width), device = size, canvas.device
    aspect = width / height
    zoom, right, down, roll = (_column(view[name], device) for name in VIEW)
    x = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1)[None, None]
    y = ((torch.arange(height, device=device) + 0.5) / height * 2 - 1)[None, :, None]
    cosine, sine = roll.cos(), roll.sin()
    grid = torch.empty(len(canvas), height, width, 2, device=device)
    grid[..., 0] = (x * cosine - y * sine / aspect) / zoom + right
    grid[..., 1] = (x * sine * aspect + y * cosine) / zoom + down
    return F.grid_sample(canvas, grid, padding_mode="border", align_corners=False)
