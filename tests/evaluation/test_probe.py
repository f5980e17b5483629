"""The probe learns what clips show, and survives being written to disk."""

from pathlib import Path

import pytest
import torch

from cmdgen.evaluation.probe import HEADS, Probe, ProbeConfig, ProbeTraining, degrade, train_probe
from cmdgen.world.config import WorldConfig
from cmdgen.world.world import World

WORLD = WorldConfig(
    subjects=("dog", "fish"),
    motions=("spinning", "growing"),
    scenes=("grass", "space"),
    **{"pairs": 0.0, "adjectives": False, "flips": False, "sprites": "shapes"},
)


@pytest.fixture(scope="module")
def world() -> World:
    return World(WORLD)


def test_probe_learns_a_tiny_world(world: World, tmp_path: Path) -> None:
    training = ProbeTraining(steps=60, batch=8, size=32)
    probe = train_probe(world, training, device=torch.device("cpu"))
    clips = world.render(world.indices("train", 24), (32, 32))
    features, named = probe.read(clips.frames)
    assert features.shape == (24, probe.config.features)
    for head in HEADS:
        assert (named[head] == clips.labels[head]).float().mean() > 0.85, head

    probe.save_pretrained(tmp_path)
    again = Probe.from_pretrained(tmp_path)
    assert again.config == probe.config
    torch.testing.assert_close(again.read(clips.frames)[0], features, rtol=0.02, atol=0.02)


def test_probe_reads_a_clip_the_same_alone_and_at_another_size(world: World) -> None:
    torch.manual_seed(0)
    probe = Probe(ProbeConfig(("a", "b"), ("c",), ("d", "e"))).eval()
    frames = world.render([0, 1, 2], (64, 64)).frames
    together, _ = probe.read(frames)
    torch.testing.assert_close(probe.read(frames[1:2])[0], together[1:2], rtol=1e-4, atol=1e-5)
    twice = frames.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(probe.read(twice)[0], together, rtol=1e-4, atol=1e-5)


def test_packaged_size_is_below_one_mebibyte_in_half_precision() -> None:
    probe = Probe(ProbeConfig(("",) * 12, ("",) * 10, ("",) * 8))
    assert sum(p.numel() for p in probe.parameters()) < 400_000


def test_degraded_clips_stay_in_range_and_differ() -> None:
    frames = torch.rand(8, 4, 3, 16, 16)
    degraded = degrade(frames, torch.Generator().manual_seed(0))
    assert degraded.shape == frames.shape
    assert degraded.min() >= 0 and degraded.max() <= 1
    changes = (degraded - frames).abs().mean((1, 2, 3, 4))
    assert changes.unique().numel() == 8 and (changes > 0).all()
