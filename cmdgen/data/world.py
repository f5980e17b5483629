"""The rendered world: captioned clips of emoji subjects that move in scrolling scenes.

Everything about a clip follows from (seed, index) by hashing, so a clip is the same alone, in any
batch, and on any device up to rounding. Drawing is batched torch: layers are painted once per size
and only cut and stacked for each frame; sprites are placed by one `grid_sample` for each mip level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F

from cmdgen.config import WorldConfig
from cmdgen.data.captions import caption
from cmdgen.data.clips import Clips
from cmdgen.data.motions import MOTIONS, PATH_DRAWS, Motion
from cmdgen.data.paint import colour
from cmdgen.data.scenes import SCENES, Scene, Strip, paint_base, paint_layer
from cmdgen.data.subjects import SUBJECTS, Subject, build_mipmaps, load_sprites

# longer side of the subject, in frame heights
_SIZE = 0.52
# what is hashed: one stream of random numbers for each
_SUBJECT, _MOTION, _SCENE, _LOOK, _SCROLL, _CAPTION = range(6)
_CHUNK = 16

Entry = TypeVar("Entry")


def _choose(table: dict[str, Entry], names: tuple[str, ...], kind: str) -> list[Entry]:
    """Entries called `names`, all of them if there are none; ValueError if one is unknown."""
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(f"unknown {kind} {', '.join(unknown)}; there are {', '.join(table)}")
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
    """What a batch of clips shows, by number in the world's lists; (B,) each."""

    subject: Tensor
    motion: Tensor
    scene: Tensor


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
                raise ValueError(
                    f"motion {motion} fits none of the scenes {', '.join(self.scenes)}"
                )
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
        self._strips = lru_cache(maxsize=256)(self._paint)

    def specs(self, indices: Tensor | Sequence[int]) -> Specs:
        """(B,) -> what the clips show."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        seed = self.config.seed
        subject = (_draw(seed, indices, _SUBJECT, 1)[:, 0] * len(self.subjects)).long()
        motion = (_draw(seed, indices, _MOTION, 1)[:, 0] * len(self.motions)).long()
        place = _draw(seed, indices, _SCENE, 1)[:, 0] * self._plausible_count[motion]
        return Specs(subject, motion, self._plausible[motion, place.long()])

    def indices(self, split: str, count: int) -> Tensor:
        """The first `count` indices of "train" or of "test", the held-out combinations."""
        if split not in ("train", "test"):
            raise ValueError(f"split {split!r} is not one of train, test")
        if not 0 < self.config.held_out < 1 and split == "test":
            raise ValueError("no combination is held out, so there is no test split")
        found: list[Tensor] = []
        start, block = 0, 4096
        while sum(map(len, found)) < count:
            candidates = torch.arange(start, start + block)
            specs = self.specs(candidates)
            held_out = self._held_out[specs.subject, specs.motion, specs.scene]
            found.append(candidates[held_out if split == "test" else ~held_out])
            start += block
        return torch.cat(found)[:count] if found else torch.empty(0, dtype=torch.int64)

    def captions(self, indices: Tensor | Sequence[int], variant: int = 0) -> list[str]:
        """One caption each; `variant` rewords it."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        specs = self.specs(indices)
        draws = _draw(self.config.seed, indices * 1009 + variant, _CAPTION, 6).tolist()
        sentences = []
        for row, subject, motion, scene in zip(
            draws, specs.subject.tolist(), specs.motion.tolist(), specs.scene.tolist(), strict=True
        ):
            words = self._subjects[subject].words
            # half of the captions use the plain name
            who = words[int(max(0.0, 2 * row[0] - 1) * len(words))]
            sentences.append(caption([who], self._motions[motion], self._scenes[scene], row[2:]))
        return sentences

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
        for number in specs.scene.unique().tolist():
            for chunk in (specs.scene == number).nonzero()[:, 0].split(_CHUNK):
                chosen = Specs(specs.subject[chunk], specs.motion[chunk], specs.scene[chunk])
                drawn, covered = self._draw_scene(
                    number, indices[chunk], chosen, size, frames, device
                )
                video[chunk.to(device)], mask[chunk.to(device)] = drawn, covered
        labels = {"subject": specs.subject, "motion": specs.motion, "scene": specs.scene}
        return Clips(
            video,
            mask,
            self.captions(indices, variant),
            {name: label.to(device) for name, label in labels.items()},
        )

    def _load_mipmaps(self, device: str) -> list[Tensor]:
        sprites = load_sprites(tuple(self._subjects), self.config).to(device)
        return build_mipmaps(sprites)

    def _paint(self, number: int, size: tuple[int, int], device: str) -> tuple[Tensor, list[Strip]]:
        scene = self._scenes[number]
        layers = [paint_layer(scene, i, size, device) for i in range(len(scene.layers))]
        return paint_base(scene, size, device), layers

    def _draw_scene(
        self,
        number: int,
        indices: Tensor,
        specs: Specs,
        size: tuple[int, int],
        frames: int,
        device: str,
    ) -> tuple[Tensor, Tensor]:
        """Clips in one scene -> (b, T, 3, H, W) uint8, (b, T, H, W) bool."""
        scene, (height, width) = self._scenes[number], size
        base, strips = self._strips(number, size, device)
        count, config = len(indices), self.config
        time = (torch.arange(frames).double() / frames)[None]
        look = _draw(config.seed, indices, _LOOK, 8)
        scroll = _draw(config.seed, indices, _SCROLL, len(strips) + 1)
        flipped = config.flips & (look[:, 6:7] < 0.5)
        facing = torch.where(flipped, -1.0, 1.0) * self._facing[specs.subject, None]  # (b, 1)
        travel = torch.tensor([self._motions[m].travel for m in specs.motion.tolist()])
        travel = travel.double() * facing[:, 0]
        picture = base.expand(count * frames, 3, height, width).clone()

        def stack(layers: list[int]) -> None:
            for i in layers:
                layer, strip = scene.layers[i], strips[i]
                moved = layer.speed + layer.depth * travel
                span = 2 * width / height if layer.axis == "x" else 1.0
                shift = (scroll[:, i, None] * span + moved[:, None] * time) * height
                cut = strip.shifted(shift.flatten().to(device))
                part = picture[:, :, strip.rows]
                torch.addcmul(cut[:, :3], part, cut[:, 3:], out=part)

        back = [i for i, layer in enumerate(scene.layers) if not layer.front]
        stack(back)
        # paths in float64 on the CPU: the same on every device
        wobble = config.variety
        forward = torch.empty(count, frames, dtype=torch.float64)
        up, scale, stretch, angle = (forward.clone() for _ in range(4))
        draws = (look[:, :PATH_DRAWS] * wobble).T[:, :, None]
        for m in specs.motion.unique().tolist():
            rows = specs.motion == m
            path = self._motions[m].path(time, draws[:, rows])
            forward[rows], up[rows], scale[rows] = path.forward, path.up, path.scale
            stretch[rows], angle[rows] = path.stretch, path.angle
        unit = min(1.0, width / height)
        half = unit * _SIZE * (1 + 0.16 * wobble * (look[:, 3:4] - 0.5)) * scale / 2
        extent = self._extents()[specs.subject].double()
        wide = half * stretch.rsqrt()
        tall = half * stretch.sqrt()
        centre_x = width / height / 2 + unit * (
            facing * forward + 0.16 * wobble * (look[:, 4:5] - 0.5)
        )
        jitter = 0.06 * wobble * (look[:, 5:6] - 0.5)
        if scene.ground is None:
            centre_y = scene.centre + jitter - unit * up
        else:
            foot = scene.ground + jitter
            centre_y = foot - extent[:, 1:] * tall - unit * up
            self._cast_shadow(
                picture,
                scene,
                centre_x,
                foot,
                wide * extent[:, :1],
                centre_y + tall * extent[:, 1:],
            )
        alpha = self._place(
            picture,
            specs.subject.repeat_interleave(frames),
            centre_x,
            centre_y,
            torch.where(flipped, -wide, wide),
            tall,
            facing * angle,
        )
        front = [i for i in range(len(strips)) if i not in back]
        stack(front)
        uint8 = (picture * 255).round_().clamp_(0, 255).to(torch.uint8)
        shape = (count, frames, -1, height, width)
        return uint8.view(shape), (alpha > 0.5).view(count, frames, height, width)

    def _extents(self) -> Tensor:
        """(S, 2): half width and half height of every sprite in its square."""
        cover = self._mipmaps("cpu")[0][:, 3] > 0.1
        side = cover.shape[-1]
        return torch.stack([cover.any(1).sum(1) / side, cover.any(2).sum(1) / side], 1)

    def _cast_shadow(
        self,
        picture: Tensor,
        scene: Scene,
        centre_x: Tensor,
        foot: Tensor,
        radius: Tensor,
        lowest: Tensor,
    ) -> None:
        """Darkens a soft ellipse on the ground; fainter and wider the higher the subject is."""
        height, width = picture.shape[-2:]
        x, y = _axes(height, width, picture.device)
        rise = (foot - lowest).clamp(min=0)
        spread = 0.92 * radius * (1 + 0.8 * rise)
        strength = scene.shade / (1 + 5 * rise)
        column = lambda v: v.flatten().float().to(picture.device)[:, None]  # noqa: E731
        across = ((x - column(centre_x)) / column(spread)) ** 2  # (N, W)
        down = ((y - column(foot.expand_as(rise))) / column(0.16 * spread + 0.02)) ** 2  # (N, H)
        light = (1 - across[:, None, :] - down[:, :, None]).clamp_(min=0)
        light = light.sqrt_().mul_(column(strength)[:, :, None])
        tone = colour(scene.shadow).to(picture.device)
        picture.add_((tone - picture) * light[:, None])

    def _place(
        self,
        picture: Tensor,
        subject: Tensor,
        centre_x: Tensor,
        centre_y: Tensor,
        wide: Tensor,
        tall: Tensor,
        angle: Tensor,
    ) -> Tensor:
        """Draws one sprite on every frame, in place -> its cover (N, H, W)."""
        height, width = picture.shape[-2:]
        device = picture.device
        mipmaps = self._mipmaps(str(device))
        # the coarsest level that is at least as fine as the frame
        drawn = 2 * torch.maximum(wide.abs(), tall).flatten() * height
        sides = torch.tensor([level.shape[-1] for level in mipmaps])
        level = ((sides[None] >= drawn[:, None]).sum(1) - 1).clamp(min=0)
        cosine, sine = torch.cos(angle), torch.sin(angle)

        def column(value: Tensor) -> Tensor:
            return value.flatten().float().to(device)[:, None, None]

        x, y = _axes(height, width, device)
        x, y = x[:, None, :], y[:, :, None]
        grid = torch.empty(len(subject), height, width, 2, device=device)
        cx, cy = column(centre_x), column(centre_y)
        grid[..., 0] = (x - cx) * column(cosine / wide) + (y - cy) * column(sine / wide)
        grid[..., 1] = (y - cy) * column(cosine / tall) - (x - cx) * column(sine / tall)
        cover = torch.empty(len(subject), height, width, device=device)
        for number in level.unique().tolist():
            rows = (level == number).nonzero()[:, 0].to(device)
            texture = mipmaps[number][subject.to(device)[rows]]
            sprite = F.grid_sample(texture, grid[rows], align_corners=False)
            picture[rows] = torch.addcmul(sprite[:, :3], picture[rows], 1 - sprite[:, 3:])
            cover[rows] = sprite[:, 3]
        return cover


def _axes(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel centres in frame heights: x (1, W), y (1, H)."""
    x = (torch.arange(width, device=device) + 0.5) / height
    y = (torch.arange(height, device=device) + 0.5) / height
    return x[None], y[None]
