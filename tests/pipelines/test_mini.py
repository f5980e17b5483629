"""The shipped model makes the clips that it made before: fingerprints are of version 0.1.0.

A fingerprint is four random projections of a clip's latents, and the mean colour of its frames.
"""

import json
from pathlib import Path

import pytest
import torch

import cmdgen
from cmdgen.pipelines.clip import Clip
from cmdgen.request import Request

EXPECTED = json.loads((Path(__file__).parent / "mini.json").read_text())


def project(x: torch.Tensor) -> torch.Tensor:
    x = x.double().flatten()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, len(x), generator=generator, dtype=torch.float64)
    return rows @ x / len(x) ** 0.5


def check(clip: Clip, expected: dict[str, list[float]]) -> None:
    for part in ("content", "motion"):
        made = project(getattr(clip.latents, part))
        torch.testing.assert_close(made, torch.tensor(expected[part]).double(), rtol=0, atol=2e-3)
    assert clip.frames.mean((0, 1, 2)) == pytest.approx(expected["frames"], abs=0.05)


@pytest.fixture(scope="module")
def mini():
    return cmdgen.load("mini", device="cpu", dtype="float32")


@pytest.mark.parametrize("name", [name for name in EXPECTED if not name.startswith("batch")])
def test_a_seed_gives_the_same_clip(mini, name):
    expected = EXPECTED[name]
    check(mini.sample("a corgi swimming", seed=3, **expected["options"]), expected)


@pytest.mark.parametrize("sampler", ["dpm++", "ddpm"])
def test_a_seed_gives_the_same_clip_in_a_batch(mini, sampler):
    prompts = {3: "a dog jumping", 4: "a cat flying"}
    plans = [
        mini.plan(Request(prompt=prompt, seed=seed, sampler=sampler, steps=4, motion_steps=4))
        for seed, prompt in prompts.items()
    ]
    for i, clip in enumerate(mini.run(plans)):
        check(clip, EXPECTED[f"batch {sampler} {i}"])


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png", "cmd.safetensors"])
def test_the_python_interface_of_the_readme(mini, tmp_path, suffix):
    clip = mini.sample("a corgi swimming", seed=1, steps=2, motion_steps=2, size="96x96")
    assert clip.frames.shape == (16, 96, 96, 3) and clip.fps == 8
    assert clip.metadata["seed"] == 1
    path = tmp_path / f"out.{suffix}"
    clip.save(path)
    assert path.stat().st_size > 0
    with pytest.raises(FileExistsError):
        clip.save(path)
    clip.save(path, overwrite=True)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"steps": 0}, ValueError, "steps 0 is not at least 1"),
        ({"size": (64, 65)}, ValueError, "such as 48x48"),
        ({"size": 64}, ValueError, "size 64 is not valid"),
        ({"speed": 1}, TypeError, "speed"),
    ],
)
def test_python_options_are_checked_as_flags_are(mini, options, error, says):
    with pytest.raises(error, match=says):
        mini.sample("a corgi swimming", **options)
