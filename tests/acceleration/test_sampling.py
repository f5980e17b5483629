"""Step rehash of whole clips: the pipeline, and the commands around it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cmdgen.acceleration.calibration import PARTS, read_calibrations, write_calibrations
from cmdgen.acceleration.chart import colour
from cmdgen.acceleration.keysteps import minimax
from cmdgen.cli import rehash as command
from cmdgen.cli.app import app
from cmdgen.cli.errors import Failure
from cmdgen.config import SampleConfig
from cmdgen.evaluation import probe as probes
from cmdgen.evaluation.probe import HEADS, Probe, ProbeConfig
from cmdgen.pipeline import TextToVideo
from cmdgen.store.find import find_model
from cmdgen.video.read import read_metadata
from cmdgen.world.config import WorldConfig

PROMPT = "a dog swimming in the ocean"
STEPS = {"steps": 6, "motion_steps": 6}
WORLD = WorldConfig(
    subjects=("dog", "fish", "car"),
    motions=("spinning", "growing"),
    scenes=("grass", "space"),
    **{"pairs": 0.0, "adjectives": False, "flips": False, "sprites": "shapes", "held_out": 0.3},
)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> TextToVideo:
    return TextToVideo.load(tiny_model)


@pytest.fixture(scope="module")
def calibration(model: TextToVideo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rehash") / "rehash.json"
    prompts = [PROMPT, "a red car driving", "two birds"]
    found = model.calibrate(prompts, SampleConfig(**STEPS), batch=2)
    write_calibrations(path, "tiny", found)
    return path


def uniform(number: int, **more: object) -> SampleConfig:
    return SampleConfig(rehash=number, rehash_policy="uniform", **STEPS, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_all_steps_in_full_are_no_rehash_bit_for_bit(model, sampler: str) -> None:
    plain = model.sample(PROMPT, SampleConfig(**STEPS, sampler=sampler))
    full = model.sample(PROMPT, uniform(6, sampler=sampler))
    fewer = model.sample(PROMPT, uniform(3, sampler=sampler))
    assert np.array_equal(plain.frames, full.frames)
    assert not np.array_equal(plain.content, fewer.content)
    assert not np.array_equal(plain.frames, fewer.frames)
    assert "rehash" not in plain.metadata


def test_each_network_runs_its_full_steps(model) -> None:
    calls = {"content": 0, "motion": 0}
    parts = {"content": model.parts.content.mid_block, "motion": model.parts.motion.blocks[0]}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        for name, part in parts.items()
    ]
    clip = model.sample(PROMPT, uniform(4, rehash_protect=0))
    for hook in hooks:
        hook.remove()
    assert calls == {"content": 4, "motion": 4}
    assert clip.metadata["rehash"] == {
        **{"policy": "uniform", "cut": "layer"},
        **{"content": (0, 2, 3, 5), "motion": (0, 2, 3, 5)},
    }


@pytest.mark.parametrize("config", [uniform(3), uniform(3, guidance=1), uniform(3, sampler="ddpm")])
def test_nothing_of_one_clip_is_left_for_the_next(model, tiny_model, config) -> None:
    model.sample("a red car driving", config)
    second = model.sample(PROMPT, config)
    fresh = TextToVideo.load(tiny_model).sample(PROMPT, config)
    assert np.array_equal(second.frames, fresh.frames)


@pytest.mark.parametrize("config", [uniform(3), uniform(3, motion_guidance=2)])
def test_batch_of_two_is_two_batches_of_one(model, config) -> None:
    prompts, seeds = [PROMPT, "a red car driving"], [1, 2]
    both = model.sample_batch(prompts, config, seeds)
    for clip, prompt, seed in zip(both, prompts, seeds, strict=True):
        (alone,) = model.sample_batch([prompt], config, [seed])
        assert clip.metadata == alone.metadata
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1


def test_a_calibration_serves_any_size_and_length(model, calibration: Path) -> None:
    config = SampleConfig(
        rehash=4, rehash_file=str(calibration), height=16, width=32, frames=2, **STEPS
    )
    clip = model.sample(PROMPT, config)
    assert clip.frames.shape == (2, 16, 32, 3)
    content = read_calibrations(calibration, "tiny")[0]
    assert clip.metadata["rehash"]["content"] == minimax(content.errors, 4, protected=1)
    still = model.sample(
        PROMPT, SampleConfig(rehash=4, rehash_file=str(calibration), frames=1, steps=6)
    )
    assert "motion" not in still.metadata["rehash"]


def test_calibration_needs_steps_and_prompts(model) -> None:
    with pytest.raises(ValueError, match="content in 1 step has nothing to reuse"):
        model.calibrate([PROMPT], SampleConfig(steps=1))
    with pytest.raises(ValueError, match="no prompts"):
        model.calibrate([], SampleConfig())


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"rehash_policy": "random", "rehash": 4}, "'random' is not one of similarity, uniform"),
        ({"rehash_policy": "uniform"}, "policy uniform chooses nothing"),
        ({"rehash_cut": "mid"}, "rehash cut 'mid' is not one of layer, resnet, attention"),
        ({"rehash_threshold": 1.5}, "rehash threshold 1.5 is not between -1 and 1"),
        ({"rehash_threshold": float("nan")}, "rehash threshold nan is not between"),
        ({"rehash_threshold": 0.9, "rehash": 4}, "it takes no number"),
        ({"rehash_threshold": 0.9, "rehash_policy": "minimax"}, "minimax has no threshold"),
        ({"rehash_protect": -0.1}, "rehash protect -0.1 is not between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SampleConfig(**asked)


# the commands


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def sample(model: Path, output: Path, *arguments: object):
    steps = ("--steps", 6, "--motion-steps", 6, "--seed", 3)
    return run("sample", PROMPT, "-o", output, "--overwrite", "--model", model, *steps, *arguments)


def test_sample_says_which_steps_were_full_and_the_video_knows(
    tiny_model: Path, calibration: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    result = sample(tiny_model, path, "--rehash", 4, "--rehash-file", calibration)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}\n"
    recorded = read_metadata(path)["rehash"]
    assert recorded["policy"] == "minimax"
    for part in PARTS:
        steps = " ".join(map(str, recorded[part]))
        assert re.search(
            rf"^rehash: .*{part} in full at 4 of 6 steps: {steps}$", result.stderr, re.M
        )
    path = tmp_path / "b.mp4"
    result = sample(tiny_model, path, "--rehash-threshold", -1, "--rehash-file", calibration)
    assert "rehash: similarity, content in full at 2 of 6 steps: 0 5\n" in result.stderr
    assert read_metadata(path)["rehash"]["threshold"] == -1
    path = tmp_path / "c.mp4"
    result = sample(tiny_model, path, "--rehash", "off")
    assert "rehash" not in result.stderr and "rehash" not in read_metadata(path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rehash", "some"], "rehash 'some' is neither off nor a number of steps, such as 13"),
        (["--rehash", "4"], "make one by cmdgen rehash calibrate, or ask for policy uniform"),
        (["--rehash", "7"], "rehash 7 is not between 1 and the 6 steps"),
        (["--rehash", "1", "--rehash-policy", "uniform"], "rehash 1: of 6 steps between 2 and 6"),
        (
            ["--rehash", "3", "--rehash-protect", "0.5", "--rehash-policy", "uniform"],
            "the first 3 always do",
        ),
        (["--rehash", "4", "--rehash-file", "none.json"], "none.json: No such file"),
        (["--rehash-file", "none.json"], "say how many steps run in full with --rehash N"),
        (["--rehash-cut", "resnet"], "say how many steps run in full with --rehash N"),
        (
            ["--rehash", "3", "--rehash-policy", "uniform", "--guidance-interval", "0.2-0.8"],
            "with rehash, a guidance interval must reach up to 1",
        ),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(
    tiny_model: Path, tmp_path: Path, arguments: list[str], says: str, monkeypatch
) -> None:
    monkeypatch.setattr(TextToVideo, "parts", property(lambda self: pytest.fail("weights read")))
    result = sample(tiny_model, tmp_path / "a.mp4", *arguments)
    assert isinstance(result.exception, ValueError) and says in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_calibrate_writes_a_file_that_sample_reads_and_draws_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    prompts, path, plot = (tmp_path / name for name in ("prompts.txt", "a.json", "a.png"))
    prompts.write_text("a dog\n\na red car driving\n")
    arguments = ("rehash", "calibrate", "--model", tiny_model, "--prompts", prompts, "-o", path)
    result = run(*arguments, "--steps", 3, "--plot", plot)
    assert (result.exit_code, result.stdout) == (0, f"{path}\n"), result.output
    result = run(*arguments, "--steps", 3, "--sampler", "ddim", "--cut", "resnet")
    found = read_calibrations(path, "tiny")
    assert sorted((each.part, each.sampler, str(each.cut)) for each in found) == [
        *(("content", "ddim", "resnet"), ("content", "dpm++", "layer")),
        *(("motion", "ddim", "None"), ("motion", "dpm++", "None")),
    ]
    assert {(each.steps, each.prompts) for each in found} == {(3, 2)}
    with Image.open(plot) as image:
        pixels = np.asarray(image.convert("RGB"))
    # two maps beside each other: the diagonal is the brightest colour, and there is ink around
    brightest = (pixels == colour(np.array(1.0))).all(axis=-1)
    left, right = np.split(brightest, 2, axis=1)
    for half in (left, right):
        assert half[64 + 80, 64 + 80] and half[64 + 240, 64 + 240] and half[64 + 400, 64 + 400]
        assert not half[64 + 80, 64 + 400]
    assert (pixels < 64).all(axis=-1).sum() > 1000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "1"], "content in 1 steps: between 2 and 250 are searched"),
        (["--steps", "300"], "content in 300 steps: between 2 and 250 are searched"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompts", "empty.txt"], "no prompt in it"),
        (["-o", "none/a.json"], "not the name of a file in a folder that can be written to"),
        (["-o", "other.json"], "other.json: model 'other' is not tiny"),
        (["--batch", "0"], "batch 0 is not at least 1"),
        (["--cut", "mid"], "rehash cut 'mid' is not one of"),
    ],
)
def test_calibrate_says_what_is_wrong_before_it_measures(
    tiny_model: Path, tmp_path: Path, monkeypatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("other.json").write_text('{"model": "other", "calibrations": []}')
    result = run("rehash", "calibrate", "--model", tiny_model, "-o", "a.json", *arguments)
    assert isinstance(result.exception, (ValueError, OSError)) and says in str(result.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "other.json"]


def test_a_calibration_of_no_numbers_is_refused_and_not_written(
    tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    path = tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_out.bias"].fill_(torch.nan)
    save_file(state, path)
    result = run("rehash", "calibrate", "--model", tmp_path / "tiny", "--steps", 3)
    assert isinstance(result.exception, Failure) and "unet overflows" in str(result.exception)
    assert not (tmp_path / "tiny" / "rehash.json").exists()


def test_compare_has_a_row_for_each_way_at_equal_full_steps(
    tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(command, "MINI_WORLD", WORLD)
    monkeypatch.setattr(probes, "PACKAGED", tmp_path / "probe")
    probe = Probe(ProbeConfig(WORLD.subjects, WORLD.motions, WORLD.scenes))
    probe.save_pretrained(tmp_path / "probe")
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_model, folder)
    shutil.copy(calibration, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["cmdgen"] |= STEPS
    (folder / "model_index.json").write_text(json.dumps(index))

    arguments = ["rehash", "compare", "--model", folder, "--clips", 3, "--batch", 2]
    result = run(*arguments, "--full", 4, "--full", 6, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    policies = ("rehash similarity", "rehash uniform", "rehash minimax")
    ways = [(row["full_steps"], row["full_motion_steps"], row["way"]) for row in data["rows"]]
    assert ways == [
        (6, 6, "all steps"),
        *((number, number, way) for number in (4, 6) for way in ("fewer steps", *policies)),
    ]
    for number, row in zip((None, *[4] * 4, *[6] * 4), data["rows"], strict=True):
        assert 0 < row["sampler_seconds"] < row["seconds"]
        assert set(row["named"]) == set(HEADS)
        assert (row["ssim"] is None) == (number is None)
        # as many as there are: the same frames, and no error to take a logarithm of
        assert (row["psnr"] is None) == (number != 4)
        if number is not None:
            assert (row["ssim"] == 1) == (number == 6)

    result = run(*arguments[:-2], "--full", 4)
    title, _, header, _, *rows = result.stdout.splitlines()
    assert title == "tiny: 3 clips, dpm++, 6 + 6 steps, cut layer"
    assert header.split("|")[3].strip() == "subject" and len(rows) == 5
    assert re.search(r"4 \+ 4 +\| rehash minimax +\|.* dB +\|", rows[-1])


def test_mini_ships_its_calibration() -> None:
    model = TextToVideo.load("mini")
    path = find_model("mini") / "rehash.json"
    assert path.stat().st_size < 50_000
    for number in (13, 9):
        for policy in ("similarity", "uniform", "minimax"):
            plan = model.plan_rehash(SampleConfig(rehash=number, rehash_policy=policy))
            assert plan is not None
            assert (len(plan.content), len(plan.motion)) == (number, number)
