"""Step rehash of whole clips: the pipeline, and the commands around it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file

from cmdgen.acceleration.calibration import PARTS, read_calibrations, write_calibrations
from cmdgen.acceleration.chart import BRIGHT
from cmdgen.acceleration.keysteps import minimax
from cmdgen.config import POLICIES, SAMPLERS
from cmdgen.evaluation import measure
from cmdgen.evaluation.probe import HEADS, Probe, ProbeConfig
from cmdgen.evaluation.rehash import calibrate
from cmdgen.evaluation.settings import Calibrating
from cmdgen.pipelines.load import load_pipeline
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Request
from cmdgen.store.find import find_model
from cmdgen.video.read import read_metadata
from cmdgen.world.config import WORLDS, WorldConfig

PROMPT = "a dog swimming in the ocean"
STEPS = {"steps": 6, "motion_steps": 6}
WORLD = WorldConfig(
    subjects=("dog", "fish", "car"),
    motions=("spinning", "growing"),
    scenes=("grass", "space"),
    **{"pairs": 0.0, "adjectives": False, "flips": False, "sprites": "shapes", "held_out": 0.3},
)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> StillPipeline:
    return load_pipeline(tiny_model)


@pytest.fixture(scope="module")
def calibration(model: StillPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rehash") / "rehash.json"
    prompts = [PROMPT, "a red car driving", "two birds"]
    found = measure_steps(model, prompts, batch=2, **STEPS)
    write_calibrations(path, "tiny", found)
    return path


def measure_steps(model: StillPipeline, prompts: list[str], *, batch: int = 1, **options: object):
    plan = model.plan(Request(**options))
    return calibrate(model, plan, prompts, Calibrating(protect=0.1, batch=batch), show=lambda *_: None)


def uniform(number: int, **more: object) -> dict:
    return {"rehash": number, "rehash_policy": "uniform", "seed": 0, **STEPS, **more}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_steps_in_full_are_no_rehash_bit_for_bit(model, sampler: str) -> None:
    plain = model.sample(PROMPT, seed=0, sampler=sampler, **STEPS)
    full = model.sample(PROMPT, **uniform(6, sampler=sampler))
    fewer = model.sample(PROMPT, **uniform(3, sampler=sampler))
    assert np.array_equal(plain.frames, full.frames)
    assert not np.array_equal(plain.content, fewer.content)
    assert not np.array_equal(plain.frames, fewer.frames)
    assert "rehash" not in plain.metadata


def test_each_network_runs_its_full_steps(model) -> None:
    calls = {"content": 0, "motion": 0}
    parts = {"content": model.unet.mid_block, "motion": model.motion.blocks[0]}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        for name, part in parts.items()
    ]
    clip = model.sample(PROMPT, **uniform(4, rehash_protect=0))
    for hook in hooks:
        hook.remove()
    assert calls == {"content": 4, "motion": 4}
    assert clip.metadata["rehash"] == "0,2,3,5+0,2,3,5"
    assert clip.metadata["rehash_policy"] == "uniform"


@pytest.mark.parametrize("more", [{}, {"guidance": 1}, {"sampler": "ddpm"}])
def test_nothing_of_one_clip_is_left_for_the_next(model, tiny_model, more) -> None:
    model.sample("a red car driving", **uniform(3, **more))
    second = model.sample(PROMPT, **uniform(3, **more))
    fresh = load_pipeline(tiny_model).sample(PROMPT, **uniform(3, **more))
    assert np.array_equal(second.frames, fresh.frames)


@pytest.mark.parametrize("more", [{}, {"motion_guidance": 2}])
def test_batch_of_two_is_two_batches_of_one(model, more) -> None:
    plans = [
        model.plan(Request(prompt=prompt, **uniform(3, seed=seed, **more)), batch=2)
        for prompt, seed in ((PROMPT, 1), ("a red car driving", 2))
    ]
    for clip, plan in zip(model.run(plans), plans, strict=True):
        (alone,) = model.run([plan])
        assert clip.metadata == alone.metadata
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1


def test_a_calibration_serves_any_size_and_length(model, calibration: Path) -> None:
    options = {"rehash": 4, "rehash_file": calibration, "steps": 6}
    plan = model.plan(Request(size=(16, 32), frames=2, motion_steps=6, **options))
    content = read_calibrations(calibration, "tiny")[0]
    assert plan.key_steps.content == minimax(content.error_map(), 4, protected=1)
    assert model.run([plan])[0].frames.shape == (2, 16, 32, 3)
    still = model.plan(Request(frames=1, **options)).key_steps
    assert (len(still.content), still.motion) == (4, ())


def test_calibration_needs_steps_and_prompts(model) -> None:
    with pytest.raises(ValueError, match="content in 1 step has nothing to reuse"):
        measure_steps(model, [PROMPT], steps=1)
    with pytest.raises(ValueError, match="no prompts"):
        measure_steps(model, [])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rehash_policy": "random", "rehash": 4}, "'random' is not one of similarity, uniform"),
        ({"rehash_policy": "uniform"}, "nothing is rehashed: say how many steps"),
        ({"rehash_threshold": 1.5}, "rehash threshold 1.5 is not between -1 and 1"),
        ({"rehash_threshold": float("nan")}, "rehash threshold nan is not"),
        ({"rehash_threshold": 0.9, "rehash": 4}, "leave out the number"),
        ({"rehash_threshold": 0.9, "rehash_policy": "minimax"}, "minimax has no threshold"),
        ({"rehash_protect": -0.1}, "rehash protect -0.1 is not between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(model, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model.plan(Request(**options))


# the commands


@pytest.fixture
def sample(cmdgen, tiny_model: Path):
    def run(output: Path, *arguments: object):
        steps = ("--steps", 6, "--motion-steps", 6, "--seed", 3)
        options = ("-o", output, "--overwrite", "--model", tiny_model, *steps, *arguments)
        return cmdgen("sample", PROMPT, *options)

    return run


def test_sample_says_which_steps_were_full_and_the_video_knows(sample, calibration: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    code, out, err = sample(path, "--rehash", 4, "--rehash-file", calibration)
    assert (code, out) == (0, f"{path}\n"), err
    metadata = read_metadata(path)
    assert metadata["rehash_policy"] == "minimax"
    for part, listed in zip(PARTS, metadata["rehash"].split("+"), strict=True):
        steps = listed.replace(",", " ")
        assert re.search(rf"^rehash: .*{part} in full at 4 of 6 steps: {steps}$", err, re.M)
    path = tmp_path / "b.mp4"
    result = sample(path, "--rehash-threshold", -1, "--rehash-file", calibration)
    assert "rehash: similarity, content in full at 2 of 6 steps: 0 5\n" in result.err
    assert read_metadata(path)["rehash_threshold"] == -1
    path = tmp_path / "c.mp4"
    result = sample(path, "--rehash", "off")
    assert "rehash" not in result.err and "rehash" not in read_metadata(path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rehash", "some"], "rehash 'some' is neither off nor a number of steps, such as 13"),
        (["--rehash", "4"], "make one by cmdgen rehash calibrate, or ask for policy uniform"),
        (["--rehash", "7"], "rehash 7 is not between 1 and the 6 steps"),
        (["--rehash", "1", "--rehash-policy", "uniform"], "rehash 1: of 6 steps between 2 and 6"),
        (["--rehash", "3", "--rehash-protect", "0.5", "--rehash-policy", "uniform"], "the first 3 always do"),
        (["--rehash", "4", "--rehash-file", "none.json"], "none.json: No such file"),
        (["--rehash-file", "none.json"], "say how many steps run in full with --rehash N"),
        (
            ["--rehash", "3", "--rehash-policy", "uniform", "--guidance-interval", "0.2-0.8"],
            "with rehash, a guidance interval must reach up to 1",
        ),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(
    sample, tmp_path: Path, arguments: list[str], says: str, monkeypatch
) -> None:
    monkeypatch.setattr(StillPipeline, "part", lambda *_: pytest.fail("weights read"))
    code, out, err = sample(tmp_path / "a.mp4", *arguments)
    assert (code, out) in ((2, ""), (3, "")) and says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_calibrate_writes_a_file_that_sample_reads_and_draws_it(cmdgen, tiny_model: Path, tmp_path: Path) -> None:
    prompts, path, plot = (tmp_path / name for name in ("prompts.txt", "a.json", "a.png"))
    prompts.write_text("a dog\n\na red car driving\n")
    arguments = ("rehash", "calibrate", "--model", tiny_model, "--prompts", prompts, "-o", path)
    code, out, err = cmdgen(*arguments, "--steps", 3, "--plot", plot)
    assert (code, out) == (0, f"{path}\n"), err
    assert cmdgen(*arguments, "--steps", 3, "--sampler", "ddim").code == 0
    found = read_calibrations(path, "tiny")
    assert sorted((each.part, each.sampler) for each in found) == [
        *(("content", "ddim"), ("content", "dpm++")),
        *(("motion", "ddim"), ("motion", "dpm++")),
    ]
    assert {(each.steps, each.prompts) for each in found} == {(3, 2)}
    with Image.open(plot) as image:
        pixels = np.asarray(image.convert("RGB"))
    # two maps beside each other: the diagonal is the brightest colour, and there is ink around
    brightest = (pixels == ImageColor.getrgb(BRIGHT)).all(axis=-1)
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
    ],
)
def test_calibrate_says_what_is_wrong_before_it_measures(
    cmdgen, tiny_model: Path, tmp_path: Path, monkeypatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("other.json").write_text('{"model": "other", "calibrations": []}')
    code, out, err = cmdgen("rehash", "calibrate", "--model", tiny_model, "-o", "a.json", *arguments)
    assert (code, out) in ((2, ""), (3, "")) and says in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "other.json"]


def test_a_calibration_of_no_numbers_is_refused_and_not_written(cmdgen, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    path = tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_out.bias"].fill_(torch.nan)
    save_file(state, path)
    code, out, err = cmdgen("rehash", "calibrate", "--model", tmp_path / "tiny", "--steps", 3)
    assert code and not out and "unet overflows" in err
    assert not (tmp_path / "tiny" / "rehash.json").exists()


def test_compare_has_a_row_for_each_way_at_equal_full_steps(
    cmdgen, tiny_model: Path, calibration: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(WORLDS, "mini", WORLD)
    monkeypatch.setattr(measure, "PACKAGED", tmp_path / "probe")
    probe = Probe(ProbeConfig(WORLD.subjects, WORLD.motions, WORLD.scenes))
    probe.save_pretrained(tmp_path / "probe")
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_model, folder)
    shutil.copy(calibration, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["cmdgen"] |= STEPS
    (folder / "model_index.json").write_text(json.dumps(index))

    arguments = ["rehash", "compare", "--model", folder, "--clips", 3, "--batch", 2]
    code, out, err = cmdgen(*arguments, "--full", 4, "--full", 6, "--json")
    assert code == 0, err
    data = json.loads(out)
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

    title, _, header, _, *rows = cmdgen(*arguments[:-2], "--full", 4).out.splitlines()
    assert title == "tiny: 3 clips, dpm++, 6 + 6 steps"
    assert header.split("|")[3].strip() == "subject" and len(rows) == 5
    assert re.search(r"4 \+ 4 +\| rehash minimax +\|.* dB +\|", rows[-1])


def test_mini_ships_its_calibration() -> None:
    model = load_pipeline("mini")
    path = find_model("mini") / "rehash.json"
    assert path.stat().st_size < 50_000
    for number in (13, 9):
        for policy in POLICIES:
            steps = model.plan(Request(rehash=number, rehash_policy=policy)).key_steps
            assert (len(steps.content), len(steps.motion)) == (number, number)
