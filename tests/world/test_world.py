"""The world on drawn shapes: no font is needed, and the rest is the same."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor

from cmdgen.world import sprites
from cmdgen.world.config import MINI_WORLD, WORLD, WORLDS, WorldConfig
from cmdgen.world.sprites import Sprites, load_sprites
from cmdgen.world.tables import read_tables
from cmdgen.world.world import World

TABLES = read_tables()
SUBJECTS, MOTIONS, SCENES = TABLES.subjects, TABLES.motions, TABLES.scenes
COLOURS, SIZES = TABLES.colours, list(TABLES.sizes.values())
SHAPES = replace(WORLD, sprites="shapes")
SIZE = (24, 32)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SHAPES)


WORDS = {
    word: name
    for table in (
        {name: entry.words for name, entry in SUBJECTS.items()},
        {name: sum(entry.verbs, ()) for name, entry in MOTIONS.items()},
        {name: entry.phrases for name, entry in SCENES.items()},
    )
    for name, words in table.items()
    for word in words
}
# at one place the longest counts
PATTERN = re.compile(rf"\b({'|'.join(sorted(WORDS, key=len, reverse=True))})\b")


def parse(caption: str) -> list[str]:
    """Subjects, motion and scene that a caption names, in any order."""
    return sorted(WORDS[word] for word in PATTERN.findall(caption))


def test_the_world_is_as_large_as_promised() -> None:
    assert len(SUBJECTS) >= 120 and len(MOTIONS) >= 24 and len(SCENES) >= 16


# caption, mean level of red, green and blue, and mean change of a pixel from frame to frame
CLIPS = {
    "a small purple chicken and a red panda are wobbling next to a lake of lava": (*(104.35, 45.38, 44.62, 5.475),),
    "a camera panning left past a moped on a lawn": (150.99, 201.61, 145.45, 9.045),
    "a speedboat plunging": (87.89, 160.57, 190.56, 11.85),
}


def test_clips_are_those_that_models_learned_from(world: World) -> None:
    clips = world.render([3, 50, 184], (32, 32), 8)
    assert world.captions([3, 50, 184]) == list(CLIPS)
    for frames, figures in zip(clips.frames.float(), CLIPS.values(), strict=True):
        change = frames.diff(dim=0).abs().mean().item()
        assert [*frames.mean((0, 2, 3)).tolist(), change] == pytest.approx(figures, abs=0.02)


def test_a_clip_is_the_same_alone_and_in_a_batch(world: World) -> None:
    indices = world.indices("train", 40)
    together = world.render(indices, SIZE)
    for row in range(0, 40, 3):
        alone = world.render(indices[row : row + 1], SIZE)
        assert torch.equal(alone.frames[0], together.frames[row])
        assert torch.equal(alone.mask[0], together.mask[row])  # type: ignore[index]
        assert world.captions(indices[row : row + 1]) == world.captions(indices)[row : row + 1]


def test_a_seed_and_an_index_are_a_clip(world: World) -> None:
    few = replace(SHAPES, subjects=("dog", "cat", "car", "bee"))
    worlds = World(few), World(few), World(replace(few, seed=1))
    first, again, other = (each.render([5, 9], SIZE) for each in worlds)
    captions = [each.captions([5, 9]) for each in worlds]
    assert torch.equal(first.frames, again.frames) and captions[0] == captions[1]
    assert not torch.equal(first.frames, other.frames) and captions[0] != captions[2]
    assert first.frames.shape == (2, 16, 3, *SIZE) and first.frames.dtype == torch.uint8
    assert first.mask.shape == (2, 16, *SIZE) and first.mask.dtype == torch.bool  # type: ignore[union-attr]


def test_more_frames_are_the_same_motion_in_finer_steps(world: World) -> None:
    few, many = (world.render([3], SIZE, frames=frames).frames for frames in (8, 16))
    assert torch.equal(few, many[:, ::2])


def test_sizes_agree(world: World) -> None:
    small = world.render(range(4), (32, 32)).frames.float()
    large = world.render(range(4), (96, 96)).frames.float()
    shrunk = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 3).view_as(small)
    assert (small - shrunk).abs().mean() < 6


def combinations(world: World, indices: Tensor) -> set[tuple[int, int, int]]:
    specs = world.specs(indices)
    return {
        (actor, motion, scene)
        for actors, motion, scene in zip(
            specs.actors.tolist(), specs.motion.tolist(), specs.scene.tolist(), strict=True
        )
        for actor in actors
        if actor >= 0
    }


@pytest.mark.parametrize("config", [SHAPES, replace(MINI_WORLD, sprites="shapes")])
def test_training_never_shows_a_held_out_combination(config: WorldConfig) -> None:
    world = World(config)
    train, test = world.indices("train", 5000), world.indices("test", 500)
    specs = world.specs(test)
    held_out = set(zip(specs.subject.tolist(), specs.motion.tolist(), specs.scene.tolist(), strict=True))
    assert len(train) == 5000 and len(test) == 500
    assert not held_out & combinations(world, train)


def test_every_motion_subject_and_scene_of_mini_is_tested_and_a_dog_may_swim() -> None:
    world = World(replace(MINI_WORLD, sprites="shapes"))
    specs = world.specs(world.indices("test", 2000))
    assert specs.subject.unique().numel() == len(world.subjects)
    assert specs.motion.unique().numel() == len(world.motions)
    assert specs.scene.unique().numel() == len(world.scenes)
    dog = tuple(
        names.index(name)
        for names, name in ((world.subjects, "dog"), (world.motions, "swimming"), (world.scenes, "ocean"))
    )
    assert dog in combinations(world, world.indices("train", 3000))


def test_an_empty_split_is_refused() -> None:
    for held_out, split in ((0.0, "test"), (1.0, "train")):
        with pytest.raises(ValueError, match=f"no {split} split"):
            World(replace(MINI_WORLD, sprites="shapes", held_out=held_out)).indices(split, 1)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"unknown subject 'dgo': did you mean .*dog"):
        World(replace(SHAPES, subjects=("dgo",)))
    with pytest.raises(ValueError, match="unknown scene 'zzz': there are ocean, sky"):
        World(replace(SHAPES, scenes=("zzz",)))
    with pytest.raises(ValueError, match="swimming fits none"):
        World(replace(SHAPES, motions=("swimming",), scenes=("sky",)))


def test_the_mask_covers_where_the_subject_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the same clips with an invisible subject."""
    config = replace(SHAPES, subjects=("dog",), motions=("floating",), scenes=("sky", "space"))
    config = replace(config, pairs=0.0, adjectives=False)
    clips = World(config).render(range(8), (48, 48))

    def load_invisible(*what: Any) -> Sprites:
        sprites = load_sprites(*what)
        return replace(sprites, levels=tuple(map(torch.zeros_like, sprites.levels)))

    monkeypatch.setattr("cmdgen.world.world.load_sprites", load_invisible)
    empty = World(config).render(range(8), (48, 48))
    assert clips.mask is not None and empty.mask is not None
    changed = (clips.frames.int() - empty.frames.int()).abs().amax(2) > 100
    assert changed.any() and not empty.mask.any()
    assert (changed & clips.mask).sum() > 0.98 * changed.sum()
    assert (changed & clips.mask).sum() > 0.3 * clips.mask.sum()


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_moves_the_subject(motion: str) -> None:
    config = replace(SHAPES, subjects=("dog",), motions=(motion,), pairs=0.0, adjectives=False)
    world = World(config)
    clips = world.render(range(3), (32, 32))
    assert clips.mask is not None
    mask = clips.mask.float()
    assert mask.any()
    assert (mask - mask.mean(1, keepdim=True)).abs().sum() > 0.1 * mask.sum()


@pytest.mark.parametrize("scene", SCENES)
def test_every_scene_moves_by_itself(scene: str) -> None:
    motion = "pan left" if scene == "underwater" else "nodding"
    config = replace(SHAPES, subjects=("dog",), motions=(motion,), scenes=(scene,), pairs=0.0)
    clips = World(config).render(range(3), (32, 32))
    assert clips.mask is not None
    seen = ~clips.mask.any(1, keepdim=True)[:, :, None]
    frames = clips.frames.float()
    change = ((frames - frames.mean(1, keepdim=True)).abs() * seen).sum() / (seen.sum() * 3 * 16)
    assert change > 0.3


def test_captions_name_what_is_shown(world: World) -> None:
    indices = world.indices("train", 1500)
    specs = world.specs(indices)
    for variant in (0, 1):
        for row, caption in enumerate(world.captions(indices, variant)):
            motion, scene = world.motions[specs.motion[row]], world.scenes[specs.scene[row]]
            actors = [world.subjects[i] for i in specs.actors[row].tolist() if i >= 0]
            named = parse(caption)
            if scene not in named:
                assert MOTIONS[motion].home == scene, caption
                named.append(scene)
            assert sorted(named) == sorted([*actors, motion, scene]), caption
            tints = [list(COLOURS)[i] for i in specs.tint[row, : len(actors)].tolist() if i >= 0]
            sizes = [SIZES[i].words for i in specs.grade[row, : len(actors)].tolist() if i >= 0]
            assert all(f" {tint} " in caption for tint in tints), caption
            assert all(any(f" {word} " in caption for word in words) for words in sizes), caption


def test_no_word_means_two_things() -> None:
    for words in (
        [word for entry in SUBJECTS.values() for word in entry.words],
        [phrase for entry in SCENES.values() for phrase in entry.phrases],
        [word for entry in MOTIONS.values() for verb in entry.verbs for word in set(verb)],
    ):
        assert len(words) == len(set(words))
    assert {"corgi", "puppy", "hound"} <= set(SUBJECTS["dog"].words)
    assert MOTIONS["swimming"].home == "ocean" and "water" in SCENES["ocean"].tags


def test_variants_reword_a_caption(world: World) -> None:
    assert len({world.captions([7], variant)[0] for variant in range(30)}) > 8


def test_adjectives_change_the_picture() -> None:
    config = replace(SHAPES, subjects=("dog",), motions=("nodding",), scenes=("space",), pairs=0.0)
    plain, world = World(replace(config, adjectives=False)), World(config)
    specs = world.specs(torch.arange(200))
    red = ((specs.tint[:, 0] == 0) & (specs.grade[:, 0] < 0)).nonzero()[:1, 0]
    small = ((specs.tint[:, 0] < 0) & (specs.grade[:, 0] == 0)).nonzero()[:1, 0]
    masked, before = world.render(red, (48, 48)), plain.render(red, (48, 48))
    assert " red " in world.captions(red)[0] and masked.mask is not None
    colours = masked.frames.transpose(1, 2)[:, :, masked.mask[0]].float().mean((0, 2))
    assert colours[0] > 2 * colours[2] and not torch.equal(masked.frames, before.frames)
    little, whole = (w.render(small, (48, 48)).mask for w in (world, plain))
    assert little is not None and whole is not None and little.sum() < 0.6 * whole.sum()


def test_without_the_font_there_is_a_world_that_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sprites, "_FONT", "none.ttf")
    sprites._open_font.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"none\.ttf not found: install it .*, or train on --data shapes"):
        sprites._open_font(None)
    sprites._open_font.cache_clear()
    world = World(WORLDS["shapes"])
    assert world.render(world.indices("train", 1), (16, 16), frames=2).frames.float().std() > 0


@pytest.fixture
def some_font(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pillow's own font in place of the emoji's."""
    caches = (sprites._find_sprites, sprites._draw_glyph, sprites._read_sprites, sprites.load_sprites)
    font = ImageFont.load_default(size=100)
    monkeypatch.setattr(sprites, "_open_font", lambda path: font)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_sprites_in_a_file_draw_the_clips_that_the_font_draws(some_font, tmp_path, monkeypatch) -> None:
    config, file = replace(SHAPES, sprites="emoji", subjects=("dog", "cat")), tmp_path / "cmdgen" / "sprites.png"
    world = World(config)
    clips = world.render(range(4), (32, 32), 4).frames
    world.write_sprites(file)

    def no_font(path: str | None) -> None:
        raise FileNotFoundError("no font")

    monkeypatch.setattr(sprites, "_open_font", no_font)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for each in (config, replace(config, font=str(file))):
        for cached in (sprites._find_sprites, sprites._draw_glyph, sprites.load_sprites):
            cached.cache_clear()
        assert torch.equal(World(each).render(range(4), (32, 32), 4).frames, clips)
    other = replace(config, subjects=("whale",), font=str(file))
    with pytest.raises(ValueError, match=r"sprites\.png have no picture of"):
        World(other).render(range(1), (32, 32), 4)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", "picture"])
def test_a_file_that_holds_no_sprites_is_one_line(some_font, tmp_path, content) -> None:
    file = tmp_path / "a.png"
    if content == "picture":
        Image.new("RGBA", (8, 8)).save(file)
    else:
        file.write_bytes(content)
    world = World(replace(SHAPES, sprites="emoji", font=str(file)))
    with pytest.raises(ValueError, match=r"a\.png: not written by `cmdgen data preview --sprites`"):
        world.render(range(1), (32, 32), 4)
    with pytest.raises(ValueError, match="needs no sprites"):
        World(SHAPES).write_sprites(file)
