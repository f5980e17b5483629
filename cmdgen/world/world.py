"""The rendered world: captioned clips by index.

Everything about a clip follows from (seed, index) by hashing, so a clip is the same alone, in any
batch, and on any device up to rounding.
"""

from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import torch
from torch import Tensor

from cmdgen.data.clips import SPLITS, Clips, Indices, Size
from cmdgen.world.captions import caption, pick
from cmdgen.world.config import WORLDS, WorldConfig
from cmdgen.world.render import Shot, Specs
from cmdgen.world.sprites import load_sprites, write_sprites
from cmdgen.world.tables import read_tables

# shares of subjects with a colour and with a size
_TINTED = 0.35
_SIZED = 0.25
# of so many training indices one is kept for validation
_VALIDATED = 32
# what is hashed: one stream of random numbers for each
_SUBJECT, _MOTION, _SCENE, _LOOK, _SCROLL, _CAPTION, _PARTNER, _ADJECTIVE, _WORD = range(9)
# clips drawn together, fewer of large ones: memory is bounded, and small ones stay in the cache
_CHUNK = 16
_CHUNK_PIXELS = 2**18
# indices looked through before a split counts as empty
_SEARCH = 2**18

Entry = TypeVar("Entry")


def _choose(table: dict[str, Entry], names: tuple[str, ...], kind: str) -> list[Entry]:
    """Look up `names`, all of the table if there are none; ValueError if one is unknown."""
    for name in names:
        if name not in table:
            near = get_close_matches(name, table)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(table)}"
            raise ValueError(f"unknown {kind} {name!r}: {hint}")
    return [table[name] for name in names or table]


class World:
    """Captioned clips by index."""

    def __init__(self, config: WorldConfig) -> None:
        self.config, self._tables = config, read_tables()
        self.key = self.contents = repr(config)
        self._subjects = _choose(self._tables.subjects, config.subjects, "subject")
        self._motions = _choose(self._tables.motions, config.motions, "motion")
        self._scenes = _choose(self._tables.scenes, config.scenes, "scene")
        self.subjects = tuple(subject.name for subject in self._subjects)
        self.motions = tuple(motion.name for motion in self._motions)
        self.scenes = tuple(scene.name for scene in self._scenes)
        fits = torch.tensor([[motion.fits(s) for s in self._scenes] for motion in self._motions])
        for name, anywhere in zip(self.motions, fits.any(1), strict=True):
            if not anywhere:
                raise ValueError(f"motion {name} fits none of the scenes {self.scenes}")
        # (M, S): the scenes that a motion fits first, and how many those are
        self._fitting = fits.int().argsort(dim=1, descending=True, stable=True)
        self._fitting_count = fits.sum(1)
        # by name, so that a combination is held out of every world or of none
        held_out = [
            crc32("/".join(names).encode()) < config.held_out * 2**32
            for names in product(self.subjects, self.motions, self.scenes)
        ]
        shape = (len(self.subjects), len(self.motions), len(self.scenes))
        self._held_out = torch.tensor(held_out).view(shape)

    def _draw(self, indices: Tensor, stream: int, count: int) -> Tensor:
        """(B,) -> (B, count) float64 in [0, 1): splitmix64 of seed, index and stream."""
        lanes = torch.arange(count) + (stream << 8)
        seed = self.config.seed * 0x5851F42D4C957F2D % 2**62
        state = (indices[:, None] * 0x632BE59BD9B4E019) ^ seed
        state = state + (lanes + 1) * -0x61C8864680B583EB
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            logical = (state >> shift) & ((1 << (64 - shift)) - 1)
            state = (state ^ logical) * factor
        return ((state >> 11) & (2**53 - 1)).double() / 2**53

    def specs(self, indices: Indices) -> Specs:
        """(B,) -> what the clips show."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        many = len(self.subjects)
        subject = (self._draw(indices, _SUBJECT, 1)[:, 0] * many).long()
        motion = (self._draw(indices, _MOTION, 1)[:, 0] * len(self.motions)).long()
        place = self._draw(indices, _SCENE, 1)[:, 0] * self._fitting_count[motion]
        scene = self._fitting[motion, place.long()]
        paired, step = self._draw(indices, _PARTNER, 2).unbind(1)
        partner = (subject + 1 + (step * (many - 1)).long()) % many
        partner = torch.where((paired < self.config.pairs) & (partner != subject), partner, -1)
        draws = self._draw(indices, _ADJECTIVE, 8)
        shares = torch.tensor([_TINTED, _TINTED, _SIZED, _SIZED])
        chosen = (draws[:, :4] < shares) & self.config.adjectives
        counts = torch.tensor([len(self._tables.colours)] * 2 + [len(self._tables.sizes)] * 2)
        adjectives = torch.where(chosen, (draws[:, 4:] * counts).long(), -1)  # (B, 4)
        actors = torch.stack([subject, partner], 1)
        return Specs(actors, motion, scene, adjectives[:, :2], adjectives[:, 2:])

    def write_sprites(self, path: Path) -> None:
        """Write the subjects' pictures for machines without the font; ValueError for a world of shapes."""
        if self.config.sprites != "emoji":
            raise ValueError("this world is drawn without a font: it needs no sprites")
        write_sprites(path, self._subjects, self.config.font)

    def indices(self, split: str, count: int) -> Tensor:
        """Find the first `count` of "train", of "validation", or of "test": held-out (subject, motion, scene).

        A training clip shows no held-out combination, not even by its second subject; a clip for
        validation shows what others train on.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        blocks = [torch.empty(0, dtype=torch.int64)]
        start, block = 0, 4096
        while sum(map(len, blocks)) < count:
            candidates = torch.arange(start, start + block)
            specs = self.specs(candidates)
            # (N, 2): a partner that is not there is held out of nothing
            held_out = self._held_out[specs.actors, specs.motion[:, None], specs.scene[:, None]]
            held_out &= specs.actors >= 0
            if split == "test":
                chosen = held_out[:, 0]
            else:
                chosen = ~held_out.any(1) & ((candidates % _VALIDATED == 0) == (split == "validation"))
            blocks.append(candidates[chosen])
            start += block
            if start > _SEARCH and not sum(map(len, blocks)):
                share = self.config.held_out
                raise ValueError(f"held out {share} leaves this world no {split} split")
        return torch.cat(blocks)[:count]

    def captions(self, indices: Indices, variant: int = 0, *, motions: Tensor | None = None) -> list[str]:
        """Write one caption each; `variant` rewords it, and `motions` (B,) stand for the clips' own."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        specs, keys = self.specs(indices), indices * 1009 + variant
        texts = []
        for actors, tints, grades, motion, scene, draws, words in zip(
            *(part.tolist() for part in (specs.actors, specs.tint, specs.grade)),
            *(part.tolist() for part in (specs.motion if motions is None else motions, specs.scene)),
            self._draw(keys, _CAPTION, 6).tolist(),
            self._draw(keys, _WORD, 2).tolist(),
            strict=True,
        ):
            parts = zip(actors, tints, grades, draws[:2], words, strict=True)
            who = [self._describe(*part) for part in parts if part[0] >= 0]
            texts.append(caption(who, self._motions[motion], self._scenes[scene], draws[2:]))
        return texts

    def _describe(self, subject: int, tint: int, grade: int, name: float, word: float) -> str:
        """Name a subject with its size and colour; two random numbers choose the words."""
        # half of the captions use the plain name
        text = pick(self._subjects[subject].words, max(0.0, 2 * name - 1))
        if tint >= 0:
            text = f"{list(self._tables.colours)[tint]} {text}"
        if grade >= 0:
            text = f"{pick(list(self._tables.sizes.values())[grade].words, word)} {text}"
        return text

    def render(self, indices: Indices, size: Size, frames: int = 16, device: str = "cpu") -> Clips:
        """(B,) -> clips of `size` (height, width)."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        specs = self.specs(indices)
        look = self._draw(indices, _LOOK, 16).view(-1, 2, 8)
        scroll = self._draw(indices, _SCROLL, max(len(scene.layers) for scene in self._scenes))
        time = (torch.arange(frames).double() / frames)[None]
        kind, font = self.config.sprites, self.config.font
        sprites = load_sprites(tuple(self._subjects), kind, font, device)
        world = (self.config, sprites, self._motions, self._scenes)
        batch = Shot(*world, specs, look, scroll, time, size, device)
        video = torch.empty(len(indices), frames, 3, *size, dtype=torch.uint8, device=device)
        mask = torch.empty(len(indices), frames, *size, dtype=torch.bool, device=device)
        chunk = max(1, min(_CHUNK, _CHUNK_PIXELS // (size[0] * size[1])))
        # clips that one canvas serves
        cameras = torch.tensor([motion.camera for motion in self._motions])
        groups = 2 * specs.scene + cameras[specs.motion]
        for group in groups.unique():
            for rows in (groups == group).nonzero()[:, 0].split(chunk):
                picture, cover = batch[rows].film()
                picture = (picture * 255).round_().clamp_(0, 255).to(torch.uint8)
                video[rows.to(device)] = picture.view(-1, *video.shape[1:])
                mask[rows.to(device)] = (cover > 0.5).view(-1, *mask.shape[1:])
        labels = {name: getattr(specs, name).to(device) for name in ("subject", "motion", "scene")}
        return Clips(video, mask, labels)


def open_world(name: str) -> World:
    """Return a rendered world by its name; ValueError where there is none."""
    if name not in WORLDS:
        raise ValueError(f"data {name!r} is not one of the worlds {', '.join(WORLDS)}")
    return World(WORLDS[name])
