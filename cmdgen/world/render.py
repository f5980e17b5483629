"""Draw clips of the rendered world in batched torch.

Layers are painted once per size and only cut and stacked for each frame; sprites are placed by one
`grid_sample` for each mip level. Poses are computed in float64 on the CPU: the same on every device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from cmdgen.world.config import WorldConfig
from cmdgen.world.layers import paint_scene
from cmdgen.world.motions import DRAWS, POSE, VIEW, evaluate
from cmdgen.world.paint import rgb
from cmdgen.world.sprites import build_mipmaps, load_sprites
from cmdgen.world.tables import Motion, Scene, Subject, read_tables

# longer side of the subject, in frame heights, alone and as one of two
_SIZE = 0.52
_PAIR_SIZE = 0.8
_PAIR_OFFSET = 0.25
# a moving camera looks at a canvas that much larger
_CANVAS = 1.5
# clips drawn together, fewer of large ones: memory is bounded, and small ones stay in the cache
_CHUNK = 16
_CHUNK_PIXELS = 2**18


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
        """() -> (B,)."""
        return self.actors[:, 0]

    @property
    def partner(self) -> Tensor:
        """() -> (B,): the second subject."""
        return self.actors[:, 1]

    @property
    def labels(self) -> dict[str, Tensor]:
        """Numbers of the subject, the motion and the scene, (B,) each."""
        return {"subject": self.subject, "motion": self.motion, "scene": self.scene}


@dataclass(frozen=True)
class Batch:
    """Clips to draw: what they show, their random numbers in [0, 1), and their size."""

    specs: Specs
    look: Tensor  # (B, 2, 8): of either subject
    scroll: Tensor  # (B, layers): where the layers start
    time: Tensor  # (1, T) in [0, 1)
    size: tuple[int, int]
    device: str

    def __getitem__(self, rows: Tensor) -> "Batch":
        return replace(self, specs=self.specs[rows], look=self.look[rows], scroll=self.scroll[rows])


@dataclass(frozen=True)
class _Pose:
    """Where a sprite is on every frame, (b, T) each, in frame heights from the top left."""

    centre_x: Tensor
    centre_y: Tensor
    wide: Tensor  # half of the sprite's square; negative is mirrored
    tall: Tensor
    angle: Tensor
    extent: Tensor  # (b, 2): width and height of the picture as a share of its square
    foot: Tensor | None  # (b, 1): the ground below it


class Renderer:
    """Draws batches of clips of some subjects, motions and scenes."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        motions: Sequence[Motion],
        scenes: Sequence[Scene],
        config: WorldConfig,
    ) -> None:
        self.subjects, self.motions, self.scenes = subjects, motions, scenes
        self.config = config
        self._facing = torch.tensor([subject.facing for subject in subjects])
        self._filmed = torch.tensor([motion.camera for motion in motions])
        self._travel = torch.tensor([motion.travel for motion in motions]).double()
        self._mipmaps = lru_cache(maxsize=4)(self._load_mipmaps)
        self._extents = lru_cache(maxsize=1)(self._measure)

    def render(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> (B, T, 3, H, W) uint8 and the subjects' mask (B, T, H, W) bool."""
        (height, width), device = batch.size, batch.device
        clips, frames = len(batch.look), batch.time.shape[1]
        video = torch.empty(clips, frames, 3, height, width, dtype=torch.uint8, device=device)
        mask = torch.empty(clips, frames, height, width, dtype=torch.bool, device=device)
        chunk = max(1, min(_CHUNK, _CHUNK_PIXELS // (height * width)))
        # clips that one canvas serves: of one scene, all with or all without a moving camera
        groups = 2 * batch.specs.scene + self._filmed[batch.specs.motion]
        for group in groups.unique().tolist():
            for rows in (groups == group).nonzero()[:, 0].split(chunk):
                picture, cover = self._film(batch[rows])
                picture = (picture * 255).round_().clamp_(0, 255).to(torch.uint8)
                video[rows.to(device)] = picture.view(-1, *video.shape[1:])
                mask[rows.to(device)] = (cover > 0.5).view(-1, *mask.shape[1:])
        return video, mask

    def _load_mipmaps(self, device: str) -> list[Tensor]:
        return build_mipmaps(load_sprites(tuple(self.subjects), self.config).to(device))

    def _measure(self) -> Tensor:
        """() -> (S, 2): width and height of every picture as a share of its square."""
        cover = self._mipmaps("cpu")[0][:, 3] > 0.1
        side = cover.shape[-1]
        return torch.stack([cover.any(1).sum(1) / side, cover.any(2).sum(1) / side], 1)

    def _film(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> (b·T, 3, H, W) in [0, 1] and the subjects' cover (b·T, H, W)."""
        if not self._filmed[batch.specs.motion[0]]:
            return self._draw(batch)
        height, width = (round(_CANVAS * side) for side in batch.size)
        picture, cover = self._draw(replace(batch, size=(height, width)))
        views = self._follow(VIEW, batch, batch.look[:, 0, :DRAWS])
        seen = _look_at(torch.cat([picture, cover[:, None]], 1), views, batch.size)
        return seen[:, :3], seen[:, 3]

    def _follow(self, rest: Mapping[str, float], batch: Batch, draws: Tensor) -> dict[str, Tensor]:
        """(b, DRAWS) -> (b, T) float64 for each name in `rest`, by the formulas of the motions."""
        shape = (len(draws), batch.time.shape[1])
        tracks = {name: torch.full(shape, at, dtype=torch.float64) for name, at in rest.items()}
        for number in batch.specs.motion.unique().tolist():
            rows = batch.specs.motion == number
            path = evaluate(self.motions[number].path, batch.time, draws[rows].T[:, :, None])
            for name in rest.keys() & path.keys():
                tracks[name][rows] = torch.as_tensor(path[name], dtype=torch.float64)
        return tracks

    def _heading(self, batch: Batch) -> Tensor:
        """-> (b,): 1 for clips whose first subject travels right, -1 for left."""
        mirrored = self.config.flips & (batch.look[:, 0, 6] < 0.5)
        return torch.where(mirrored, -1.0, 1.0) * self._facing[batch.specs.subject]

    def _draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> (b·T, 3, H, W) in [0, 1] and the subjects' cover (b·T, H, W)."""
        scene, (height, width) = self.scenes[batch.specs.scene[0]], batch.size
        base, strips = paint_scene(scene, batch.size, batch.device)
        clips, frames = len(batch.look), batch.time.shape[1]
        travel = self._travel[batch.specs.motion] * self._heading(batch)
        picture = base.expand(clips * frames, 3, height, width).clone()
        cover = torch.zeros(clips * frames, height, width, device=batch.device)

        def stack(front: bool) -> None:
            for i, (layer, strip) in enumerate(zip(scene.layers, strips, strict=True)):
                if layer.front != front:
                    continue
                moved = layer.speed + layer.depth * travel
                span = 2 * width / height if layer.axis == "x" else 1.0
                shift = (batch.scroll[:, i, None] * span + moved[:, None] * batch.time) * height
                cut = strip.shifted(shift.flatten().to(batch.device))
                part = picture[:, :, strip.rows]
                torch.addcmul(cut[:, :3], part, cut[:, 3:], out=part)

        stack(front=False)
        # the partner is behind
        for part in (1, 0):
            rows = (batch.specs.actors[:, part] >= 0).nonzero()[:, 0]
            if not len(rows):
                continue
            everyone = len(rows) == clips
            chosen = (rows[:, None] * frames + torch.arange(frames)).flatten().to(batch.device)
            # a view of all frames, or a copy of those concerned
            shown = picture if everyone else picture[chosen]
            covered = self._place(shown, scene, batch[rows], part)
            if everyone:
                cover = torch.maximum(cover, covered)
            else:
                picture[chosen], cover[chosen] = shown, covered
        stack(front=True)
        return picture, cover

    def _pose(self, scene: Scene, batch: Batch, part: int) -> _Pose:
        """Where the first subjects (`part` 0) or the second ones are."""
        specs, look, variety = batch.specs, batch.look[:, part], self.config.variety
        heading, subject = self._heading(batch)[:, None], specs.actors[:, part]
        aspect = batch.size[1] / batch.size[0]
        path = self._follow(POSE, batch, look[:, :DRAWS] * variety)
        unit = min(1.0, aspect)
        half = unit * _SIZE * (1 + 0.16 * variety * (look[:, 3:4] - 0.5)) * path["scale"] / 2
        factors = torch.tensor([*(size.factor for size in read_tables().sizes.values()), 1.0])
        paired = specs.partner[:, None] >= 0
        half = half * factors.double()[specs.grade[:, part], None]
        half = half * torch.where(paired, _PAIR_SIZE, 1.0)
        tall = half * path["stretch"].sqrt()
        wide = half * path["stretch"].rsqrt() * heading * self._facing[subject, None]
        aside = unit * torch.where(paired, _PAIR_OFFSET * (1 - 2 * part), 0.0)
        forward = heading * path["forward"] + 0.16 * variety * (look[:, 4:5] - 0.5)
        jitter = 0.06 * variety * (look[:, 5:6] - 0.5)
        extent, up = self._extents()[subject], unit * path["up"]
        if scene.ground is None:
            foot, centre_y = None, scene.centre + jitter - up
        else:
            foot = scene.ground + jitter
            centre_y = foot - extent[:, 1:].double() * tall - up
        centre_x = aspect / 2 + unit * forward + aside
        return _Pose(centre_x, centre_y, wide, tall, heading * path["angle"], extent, foot)

    def _place(self, picture: Tensor, scene: Scene, batch: Batch, part: int) -> Tensor:
        """(N, 3, H, W) -> cover (N, H, W): draw a sprite and its shadow on every frame, in place."""
        height, width = picture.shape[-2:]
        device, frames = picture.device, batch.time.shape[1]
        pose = self._pose(scene, batch, part)
        if pose.foot is not None:
            _cast_shadow(picture, scene, pose, pose.foot)
        subject = batch.specs.actors[:, part].repeat_interleave(frames)
        tint = batch.specs.tint[:, part].repeat_interleave(frames)
        mipmaps = self._mipmaps(str(device))
        # the coarsest level that is at least as fine as the frame
        drawn = 2 * torch.maximum(pose.wide.abs(), pose.tall).flatten() * height
        sides = torch.tensor([level.shape[-1] for level in mipmaps])
        level = ((sides[None] >= drawn[:, None]).sum(1) - 1).clamp(min=0)
        cosine, sine = torch.cos(pose.angle), torch.sin(pose.angle)
        x, y = _axes(height, width, device)
        right = x[:, None, :] - _columns(pose.centre_x, device)
        down = y[:, :, None] - _columns(pose.centre_y, device)
        grid = torch.empty(len(subject), height, width, 2, device=device)
        grid[..., 0] = right * _columns(cosine / pose.wide, device)
        grid[..., 0] += down * _columns(sine / pose.wide, device)
        grid[..., 1] = down * _columns(cosine / pose.tall, device)
        grid[..., 1] -= right * _columns(sine / pose.tall, device)
        cover = torch.empty(len(subject), height, width, device=device)
        for number in level.unique().tolist():
            rows = (level == number).nonzero()[:, 0]
            texture = _tinted(mipmaps[number][subject[rows].to(device)], tint[rows])
            rows = rows.to(device)
            sprite = F.grid_sample(texture, grid[rows], align_corners=False)
            picture[rows] = torch.addcmul(sprite[:, :3], picture[rows], 1 - sprite[:, 3:])
            cover[rows] = sprite[:, 3]
        return cover


def _axes(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel centres in frame heights: x (1, W), y (1, H)."""
    x = (torch.arange(width, device=device) + 0.5) / height
    y = (torch.arange(height, device=device) + 0.5) / height
    return x[None], y[None]


def _columns(value: Tensor, device: torch.device) -> Tensor:
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


def _cast_shadow(picture: Tensor, scene: Scene, pose: _Pose, foot: Tensor) -> None:
    """Darken a soft ellipse on the ground; fainter and wider the higher the subject is."""
    device, extent = picture.device, pose.extent.double()
    x, y = _axes(*picture.shape[-2:], device)
    rise = (foot - (pose.centre_y + pose.tall * extent[:, 1:])).clamp(min=0)
    spread = 0.92 * (pose.wide.abs() * extent[:, :1]) * (1 + 0.8 * rise)
    strength = scene.shade / (1 + 5 * rise)
    across = (x[None] - _columns(pose.centre_x, device)) / _columns(spread, device)  # (N, 1, W)
    down = y[..., None] - _columns(foot.expand_as(rise), device)  # (N, H, 1)
    down = down / _columns(0.16 * spread + 0.02, device)
    light = (1 - across**2 - down**2).clamp_(min=0)
    light = light.sqrt_().mul_(_columns(strength, device))
    tone = rgb(scene.shadow).to(device)
    picture.add_((tone - picture) * light[:, None])


def _look_at(canvas: Tensor, view: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) -> (N, C, H, W): what the camera sees."""
    height, width = size
    aspect = width / height
    zoom, right, down, roll = (_columns(view[name], canvas.device) for name in VIEW)
    x = ((torch.arange(width, device=canvas.device) + 0.5) / width * 2 - 1)[None, None]
    y = ((torch.arange(height, device=canvas.device) + 0.5) / height * 2 - 1)[None, :, None]
    cosine, sine = roll.cos(), roll.sin()
    grid = torch.empty(len(canvas), height, width, 2, device=canvas.device)
    grid[..., 0] = (x * cosine - y * sine / aspect) / zoom + right
    grid[..., 1] = (x * sine * aspect + y * cosine) / zoom + down
    return F.grid_sample(canvas, grid, padding_mode="border", align_corners=False)
