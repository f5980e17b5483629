"""The rendered world: captioned clips of emoji subjects that move in scrolling scenes.

Everything about a clip follows from (seed, index) by hashing, so a clip is the same alone, in any
batch, and on any device up to rounding. Drawing is batched torch: layers are painted once per size
and only cut and stacked for each frame; sprites are placed by one `grid_sample` for each mip level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import TypeVar
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

from cmdgen.config import WorldConfig
from cmdgen.data.captions import COLOURS, SIZES, caption
from cmdgen.data.clips import Clips
from cmdgen.data.layers import Scene, paint_scene
from cmdgen.data.motions import MOTIONS, PATH_DRAWS, Motion, View
from cmdgen.data.paint import colour
from cmdgen.data.scenes import SCENES
from cmdgen.data.subjects import SUBJECTS, Subject, build_mipmaps, load_sprites

# longer side of the subject, in frame heights, alone and as one of two
_SIZE = 0.52
_PAIR_SIZE = 0.8
_PAIR_OFFSET = 0.25
# shares of subjects with a colour and with a size
_TINTED = 0.35
_SIZED = 0.25
# a moving camera looks at a canvas that much larger
_CANVAS = 1.5
# what is hashed: one stream of random numbers for each
_SUBJECT, _MOTION, _SCENE, _LOOK, _SCROLL, _CAPTION, _PARTNER, _ADJECTIVE, _WORD = range(9)
# clips drawn together, fewer of large ones: memory is bounded, and small ones stay in the cache
_CHUNK = 16
_CHUNK_PIXELS = 2**18
# indices looked through before a split counts as empty
_SEARCH = 2**18

Entry = TypeVar("Entry")


def _choose(table: dict[str, Entry], names: tuple[str, ...], kind: str) -> list[Entry]:
    """Entries called `names`, all of them if there are none; ValueError if one is unknown."""
    for name in names:
        if name not in table:
            near = get_close_matches(name, table)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(table)}"
            raise ValueError(f"unknown {kind} {name!r}: {hint}")
    return [table[name] for name in names or table]


def _draw(seed: int, indices: Tensor, stream: int, count: int) -> Tensor:
    """(B,) -> (B, count) float64 in [0, 1): splitmix64 of seed, index and stream."""
    lanes = torch.arange(count) + (stream << 8)
    state = (indices[:, None] * 0x632BE59BD9B4E019) ^ (seed * 0x5851F42D4C957F2D % 2**62)
    state = state + (lanes + 1) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        logical = (state >> shift) & ((1 << (64 - shift)) - 1)
        state = (state ^ logical) * factor
    return ((state >> 11) & (2**53 - 1)).double() / 2**53


@dataclass(frozen=True)
class Specs:
    """What a batch of clips shows, by number in the world's lists; -1 is none."""

    subject: Tensor  # (B,)
    motion: Tensor  # (B,)
    scene: Tensor  # (B,)
    partner: Tensor  # (B,): the second subject
    tint: Tensor  # (B, 2) in COLOURS
    grade: Tensor  # (B, 2) in SIZES

    def __getitem__(self, rows: Tensor) -> "Specs":
        parts = (self.subject, self.motion, self.scene, self.partner, self.tint, self.grade)
        return Specs(*(part[rows] for part in parts))

    @property
    def actors(self) -> Tensor:
        """(B, 2): both subjects."""
        return torch.stack([self.subject, self.partner], 1)


@dataclass(frozen=True)
class _Pose:
    """Where a sprite is on every frame, (b, T) each, in frame heights from the top left."""

    centre_x: Tensor
    centre_y: Tensor
    wide: Tensor  # half of the sprite's square; negative is mirrored
    tall: Tensor
    angle: Tensor


class World:
    """Captioned clips by index."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self._subjects: list[Subject] = _choose(SUBJECTS, config.subjects, "subject")
        self._motions: list[Motion] = _choose(MOTIONS, config.motions, "motion")
        self._scenes: list[Scene] = _choose(SCENES, config.scenes, "scene")
        self.subjects = tuple(subject.name for subject in self._subjects)
        self.motions = tuple(motion.name for motion in self._motions)
        self.scenes = tuple(scene.name for scene in self._scenes)
        # scenes that a motion is plausible in, padded: (M, S), and how many
        plausible = [
            [
                number
                for number, scene in enumerate(self._scenes)
                if not motion.places or set(motion.places) & set(scene.tags)
            ]
            for motion in self._motions
        ]
        for motion, scenes in zip(self.motions, plausible, strict=True):
            if not scenes:
                raise ValueError(f"motion {motion} fits none of the scenes {self.scenes}")
        width = len(self.scenes)
        self._plausible = torch.tensor([row + [0] * (width - len(row)) for row in plausible])
        self._plausible_count = torch.tensor([len(row) for row in plausible])
        # by name, so that a combination is held out of every world or of none
        self._held_out = torch.tensor(
            [
                [
                    [
                        crc32(f"{subject}/{motion}/{scene}".encode()) < config.held_out * 2**32
                        for scene in self.scenes
                    ]
                    for motion in self.motions
                ]
                for subject in self.subjects
            ]
        )
        self._facing = torch.tensor([subject.facing for subject in self._subjects])
        self._mipmaps = lru_cache(maxsize=4)(self._load_mipmaps)
        self._extents = lru_cache(maxsize=1)(self._measure)

    def specs(self, indices: Tensor | Sequence[int]) -> Specs:
        """(B,) -> what the clips show."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        seed, config, many = self.config.seed, self.config, len(self.subjects)
        subject = (_draw(seed, indices, _SUBJECT, 1)[:, 0] * many).long()
        motion = (_draw(seed, indices, _MOTION, 1)[:, 0] * len(self.motions)).long()
        place = _draw(seed, indices, _SCENE, 1)[:, 0] * self._plausible_count[motion]
        scene = self._plausible[motion, place.long()]
        paired, step = _draw(seed, indices, _PARTNER, 2).unbind(1)
        partner = (subject + 1 + (step * (many - 1)).long()) % many
        partner = torch.where((paired < config.pairs) & (partner != subject), partner, -1)
        draws = _draw(seed, indices, _ADJECTIVE, 8)
        shares = torch.tensor([_TINTED, _TINTED, _SIZED, _SIZED])
        chosen = (draws[:, :4] < shares) & config.adjectives
        counts = torch.tensor([len(COLOURS)] * 2 + [len(SIZES)] * 2)
        adjectives = torch.where(chosen, (draws[:, 4:] * counts).long(), -1)  # (B, 4)
        return Specs(subject, motion, scene, partner, adjectives[:, :2], adjectives[:, 2:])

    def indices(self, split: str, count: int) -> Tensor:
        """The first `count` indices of "train", or of "test": held-out (subject, motion, scene).

        A training clip shows no held-out combination, not even by its second subject.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split {split!r} is not one of train, test")
        found = [torch.empty(0, dtype=torch.int64)]
        start, block = 0, 4096
        while sum(map(len, found)) < count:
            candidates = torch.arange(start, start + block)
            specs = self.specs(candidates)
            first, second = (
                self._held_out[actor, specs.motion, specs.scene]
                for actor in (specs.subject, specs.partner)
            )
            second &= specs.partner >= 0
            found.append(candidates[first if split == "test" else ~(first | second)])
            start += block
            if start > _SEARCH and not sum(map(len, found)):
                held_out = self.config.held_out
                raise ValueError(f"held out {held_out} leaves this world no {split} split")
        return torch.cat(found)[:count]

    def captions(self, indices: Tensor | Sequence[int], variant: int = 0) -> list[str]:
        """One caption each; `variant` rewords it."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        specs, texts, seed = self.specs(indices), [], self.config.seed
        draws = _draw(seed, indices * 1009 + variant, _CAPTION, 6).tolist()
        words = _draw(seed, indices * 1009 + variant, _WORD, 2).tolist()
        subjects, tints, grades = (
            part.tolist() for part in (specs.actors, specs.tint, specs.grade)
        )
        places = zip(specs.motion.tolist(), specs.scene.tolist(), strict=True)
        for row, (motion, scene) in enumerate(places):
            who = []
            for part, subject in enumerate(subjects[row]):
                if subject < 0:
                    continue
                names = self._subjects[subject].words
                # half of the captions use the plain name
                name = names[int(max(0.0, 2 * draws[row][part] - 1) * len(names))]
                if tints[row][part] >= 0:
                    name = f"{list(COLOURS)[tints[row][part]]} {name}"
                if grades[row][part] >= 0:
                    sizes = SIZES[grades[row][part]][0]
                    name = f"{sizes[int(words[row][part] * len(sizes))]} {name}"
                who.append(name)
            texts.append(caption(who, self._motions[motion], self._scenes[scene], draws[row][2:]))
        return texts

    def render(
        self,
        indices: Tensor | Sequence[int],
        size: tuple[int, int],
        frames: int = 16,
        device: str = "cpu",
        variant: int = 0,
    ) -> Clips:
        """(B,) -> clips of `size` (height, width)."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        specs = self.specs(indices)
        video = torch.empty(len(indices), frames, 3, *size, dtype=torch.uint8, device=device)
        mask = torch.empty(len(indices), frames, *size, dtype=torch.bool, device=device)
        moving = torch.tensor([motion.camera is not None for motion in self._motions])
        chunk = max(1, min(_CHUNK, _CHUNK_PIXELS // (size[0] * size[1])))
        # clips that one canvas serves
        groups = 2 * specs.scene + moving[specs.motion]
        for group in groups.unique().tolist():
            for rows in (groups == group).nonzero()[:, 0].split(chunk):
                drawn = self._film(indices[rows], specs[rows], group // 2, size, frames, device)
                video[rows.to(device)], mask[rows.to(device)] = drawn
        labels = {"subject": specs.subject, "motion": specs.motion, "scene": specs.scene}
        labels = {name: label.to(device) for name, label in labels.items()}
        return Clips(video, mask, self.captions(indices, variant), labels)

    def _load_mipmaps(self, device: str) -> list[Tensor]:
        return build_mipmaps(load_sprites(tuple(self._subjects), self.config).to(device))

    def _measure(self) -> Tensor:
        """(S, 2): width and height of every picture as a share of its square."""
        cover = self._mipmaps("cpu")[0][:, 3] > 0.1
        side = cover.shape[-1]
        return torch.stack([cover.any(1).sum(1) / side, cover.any(2).sum(1) / side], 1)

    def _film(
        self,
        indices: Tensor,
        specs: Specs,
        number: int,
        size: tuple[int, int],
        frames: int,
        device: str,
    ) -> tuple[Tensor, Tensor]:
        """Clips in one scene, all with or all without a moving camera.

        -> (b, T, 3, H, W) uint8, (b, T, H, W) bool.
        """
        time = (torch.arange(frames).double() / frames)[None]
        look = _draw(self.config.seed, indices, _LOOK, 16).view(-1, 2, 8)
        motions = [self._motions[m] for m in specs.motion.tolist()]
        canvas = size
        if motions[0].camera is not None:
            canvas = (round(_CANVAS * size[0]), round(_CANVAS * size[1]))
        picture, cover = self._draw_canvas(indices, specs, number, canvas, time, look, device)
        if motions[0].camera is not None:
            views = [
                motion.camera(time, look[row, 0, :PATH_DRAWS, None, None])
                for row, motion in enumerate(motions)
                if motion.camera is not None
            ]
            seen = _look_at(torch.cat([picture, cover[:, None]], 1), views, size)
            picture, cover = seen[:, :3], seen[:, 3]
        video = (picture * 255).round_().clamp_(0, 255).to(torch.uint8)
        shape = (len(indices), frames, -1, *size)
        return video.view(shape), (cover > 0.5).view(len(indices), frames, *size)

    def _draw_canvas(
        self,
        indices: Tensor,
        specs: Specs,
        number: int,
        size: tuple[int, int],
        time: Tensor,
        look: Tensor,
        device: str,
    ) -> tuple[Tensor, Tensor]:
        """-> (b·T, 3, H, W) in [0, 1] and the subjects' cover (b·T, H, W)."""
        scene, (height, width) = self._scenes[number], size
        base, strips = paint_scene(scene, size, device)
        frames = time.shape[1]
        scroll = _draw(self.config.seed, indices, _SCROLL, len(strips))
        mirrored = self.config.flips & (look[:, 0, 6] < 0.5)
        heading = torch.where(mirrored, -1.0, 1.0) * self._facing[specs.subject]  # (b,)
        travel = torch.tensor([self._motions[m].travel for m in specs.motion.tolist()])
        travel = travel.double() * heading
        picture = base.expand(len(indices) * frames, 3, height, width).clone()
        cover: Tensor | None = None

        def stack(front: bool) -> None:
            for i, (layer, strip) in enumerate(zip(scene.layers, strips, strict=True)):
                if layer.front != front:
                    continue
                moved = layer.speed + layer.depth * travel
                span = 2 * width / height if layer.axis == "x" else 1.0
                shift = (scroll[:, i, None] * span + moved[:, None] * time) * height
                cut = strip.shifted(shift.flatten().to(device))
                part = picture[:, :, strip.rows]
                torch.addcmul(cut[:, :3], part, cut[:, 3:], out=part)

        stack(front=False)
        for part in (1, 0):
            rows = (specs.actors[:, part] >= 0).nonzero()[:, 0]
            if not len(rows):
                continue
            pose, foot = self._pose(scene, specs[rows], part, time, look[rows], heading[rows], size)
            subject, tint = specs.actors[rows, part], specs.tint[rows, part]
            # a view of all frames, or a copy of those concerned
            chosen = (rows[:, None] * frames + torch.arange(frames)).flatten().to(device)
            shown = picture if len(rows) == len(indices) else picture[chosen]
            if foot is not None:
                extent = self._extents()[subject]
                _cast_shadow(shown, scene, pose, foot, extent)
            covered = self._place(
                shown, subject.repeat_interleave(frames), tint.repeat_interleave(frames), pose
            )
            if shown is picture:
                cover = covered if cover is None else torch.maximum(cover, covered)
            else:
                cover = torch.zeros(len(picture), height, width, device=device)
                picture[chosen], cover[chosen] = shown, covered
        stack(front=True)
        assert cover is not None
        return picture, cover

    def _pose(
        self,
        scene: Scene,
        specs: Specs,
        part: int,
        time: Tensor,
        look: Tensor,
        heading: Tensor,
        size: tuple[int, int],
    ) -> tuple[_Pose, Tensor | None]:
        """-> the pose, and where it stands; in float64 on the CPU: the same on every device."""
        wobble, aspect = self.config.variety, size[1] / size[0]
        look, heading, subject = look[:, part], heading[:, None], specs.actors[:, part]
        forward = torch.empty(len(look), time.shape[1], dtype=torch.float64)
        up, scale, stretch, angle = (forward.clone() for _ in range(4))
        draws = (look[:, :PATH_DRAWS] * wobble).T[:, :, None]
        for m in specs.motion.unique().tolist():
            rows = specs.motion == m
            path = self._motions[m].path(time, draws[:, rows])
            forward[rows], up[rows], scale[rows] = path.forward, path.up, path.scale
            stretch[rows], angle[rows] = path.stretch, path.angle
        unit = min(1.0, aspect)
        half = unit * _SIZE * (1 + 0.16 * wobble * (look[:, 3:4] - 0.5)) * scale / 2
        factors = torch.tensor([*(factor for _, factor in SIZES), 1.0]).double()
        paired = specs.partner[:, None] >= 0
        half = half * factors[specs.grade[:, part], None] * torch.where(paired, _PAIR_SIZE, 1.0)
        tall = half * stretch.sqrt()
        wide = half * stretch.rsqrt() * heading * self._facing[subject, None]
        aside = unit * torch.where(paired, _PAIR_OFFSET * (1 - 2 * part), 0.0)
        centre_x = aspect / 2 + unit * (heading * forward + 0.16 * wobble * (look[:, 4:5] - 0.5))
        jitter = 0.06 * wobble * (look[:, 5:6] - 0.5)
        if scene.ground is None:
            centre_y, foot = scene.centre + jitter - unit * up, None
        else:
            foot = scene.ground + jitter
            extent = self._extents()[subject].double()
            centre_y = foot - extent[:, 1:] * tall - unit * up
        return _Pose(centre_x + aside, centre_y, wide, tall, heading * angle), foot

    def _place(self, picture: Tensor, subject: Tensor, tint: Tensor, pose: _Pose) -> Tensor:
        """(N, 3, H, W), (N,), (N,) -> cover (N, H, W): draws a sprite on every frame, in place."""
        height, width = picture.shape[-2:]
        device = picture.device
        mipmaps = self._mipmaps(str(device))
        # the coarsest level that is at least as fine as the frame
        drawn = 2 * torch.maximum(pose.wide.abs(), pose.tall).flatten() * height
        sides = torch.tensor([level.shape[-1] for level in mipmaps])
        level = ((sides[None] >= drawn[:, None]).sum(1) - 1).clamp(min=0)
        cosine, sine = torch.cos(pose.angle), torch.sin(pose.angle)

        def column(value: Tensor) -> Tensor:
            return value.flatten().float().to(device)[:, None, None]

        x, y = _axes(height, width, device)
        right, down = x[:, None, :] - column(pose.centre_x), y[:, :, None] - column(pose.centre_y)
        grid = torch.empty(len(subject), height, width, 2, device=device)
        grid[..., 0] = right * column(cosine / pose.wide) + down * column(sine / pose.wide)
        grid[..., 1] = down * column(cosine / pose.tall) - right * column(sine / pose.tall)
        cover = torch.empty(len(subject), height, width, device=device)
        for number in level.unique().tolist():
            rows = (level == number).nonzero()[:, 0]
            texture = mipmaps[number][subject[rows].to(device)]
            texture = _tinted(texture, tint[rows])
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


def _tinted(texture: Tensor, tint: Tensor) -> Tensor:
    """(N, 4, h, w), (N,) in COLOURS or -1 -> the same, its light and shade in that colour."""
    rows = (tint >= 0).nonzero()[:, 0].to(texture.device)
    if not len(rows):
        return texture
    palette = torch.stack([colour(code) for code in COLOURS.values()]).to(texture.device)
    paint = palette[tint.to(texture.device)[rows]]  # (n, 3, 1, 1)
    weights = torch.tensor([0.3, 0.59, 0.11], device=texture.device).view(3, 1, 1)
    picture, alpha = texture[rows, :3], texture[rows, 3:]
    light = (picture * weights).sum(1, keepdim=True)
    # a bright tint lifts the shadows, a dark one keeps its highlights
    toned = paint * (0.3 * alpha + 0.85 * light)
    texture[rows, :3] = torch.minimum(0.12 * picture + 0.88 * toned, alpha)
    return texture


def _cast_shadow(picture: Tensor, scene: Scene, pose: _Pose, foot: Tensor, extent: Tensor) -> None:
    """Darkens a soft ellipse on the ground; fainter and wider the higher the subject is."""
    height, width = picture.shape[-2:]
    x, y = _axes(height, width, picture.device)
    rise = (foot - (pose.centre_y + pose.tall * extent[:, 1:].double())).clamp(min=0)
    spread = 0.92 * (pose.wide.abs() * extent[:, :1].double()) * (1 + 0.8 * rise)
    strength = scene.shade / (1 + 5 * rise)

    def column(value: Tensor) -> Tensor:
        return value.flatten().float().to(picture.device)[:, None]

    across = ((x - column(pose.centre_x)) / column(spread)) ** 2  # (N, W)
    down = ((y - column(foot.expand_as(rise))) / column(0.16 * spread + 0.02)) ** 2  # (N, H)
    light = (1 - across[:, None, :] - down[:, :, None]).clamp_(min=0)
    light = light.sqrt_().mul_(column(strength)[:, :, None])
    tone = colour(scene.shadow).to(picture.device)
    picture.add_((tone - picture) * light[:, None])


def _look_at(canvas: Tensor, views: list[View], size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) -> (N, C, H, W): what the camera sees."""

    def column(name: str) -> Tensor:
        value = torch.cat([getattr(view, name) for view in views]).flatten()
        return value.float().to(canvas.device)[:, None, None]

    height, width = size
    aspect = width / height
    x = ((torch.arange(width, device=canvas.device) + 0.5) / width * 2 - 1)[None, None]
    y = ((torch.arange(height, device=canvas.device) + 0.5) / height * 2 - 1)[None, :, None]
    cosine, sine, zoom = column("roll").cos(), column("roll").sin(), column("zoom")
    grid = torch.empty(len(canvas), height, width, 2, device=canvas.device)
    grid[..., 0] = (x * cosine - y * sine / aspect) / zoom + column("right")
    grid[..., 1] = (x * sine * aspect + y * cosine) / zoom + column("down")
    return F.grid_sample(canvas, grid, padding_mode="border", align_corners=False)
