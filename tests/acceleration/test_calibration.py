"""Calibrations: what is measured, its file, and the plan that is made of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmdgen.acceleration.calibration import (
    Calibration,
    Measurement,
    choose_key_steps,
    read_calibrations,
    write_calibrations,
)
from cmdgen.acceleration.keysteps import by_threshold, minimax
from cmdgen.config import MINI, ModelConfig, NoiseConfig
from cmdgen.diffusion.samplers import SAMPLERS, Sampling
from cmdgen.request import KeySteps, Request, resolve

STEPS = 8
MODEL = replace(MINI, steps=STEPS, motion_steps=STEPS)


class Line:
    """A denoiser with a feature that turns from step to step, and is all that it answers."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, x: Tensor, t: Tensor, *conditions: Tensor) -> tuple[Tensor, Tensor]:
        self.runs += 1
        angle = t / 1000 * torch.pi / 2
        feature = torch.stack((angle.cos(), angle.sin()), dim=1)[:, :, None, None]
        return self.resume(feature, x, t), feature

    def resume(self, feature: Tensor, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        return 0.5 * x + feature


def how() -> Sampling:
    return Sampling(NoiseConfig(), STEPS, [torch.Generator().manual_seed(i) for i in range(3)])


def measure(sampler: str, protected: int) -> tuple[Line, Calibration]:
    network, noise = Line(), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    measurement = Measurement(STEPS, protected)
    done = []
    final = measurement.add(network, lambda predict: SAMPLERS[sampler](predict, noise, how()), lambda: done.append(1))
    assert len(done) == measurement.runs
    plain = SAMPLERS[sampler](lambda x, t: network.run(x, t)[0], noise, how())
    assert torch.equal(final, plain)
    return network, measurement.finish("content", sampler, 3)


# those of lcm are not even
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "lcm"])
def test_similarity_is_the_cosine_of_features(sampler: str) -> None:
    _, found = measure(sampler, 1)
    # timesteps are even: so is the angle between neighbours
    cosines = torch.tensor(found.similarity_map())
    assert torch.equal(cosines, cosines.T)
    angles = cosines.clamp(max=1).acos()
    between = angles.diagonal(1)
    assert between.max() - between.min() < 0.01
    torch.testing.assert_close(angles[0, 2], 2 * between[0], atol=0.01, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_errors_are_those_of_sampling_with_the_steps_skipped(sampler: str) -> None:
    network, found = measure(sampler, 2)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(full: set[int]) -> Tensor:
        step, feature = -1, torch.empty(0)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            nonlocal step, feature
            step += 1
            if step not in full:
                return network.resume(feature, x, t)
            output, feature = network.run(x, t)
            return output

        return SAMPLERS[sampler](predict, noise, how())

    every, errors = set(range(STEPS)), found.error_map()
    whole = run(every)
    for i, j in ((1, 3), (2, 6), (4, STEPS), (6, STEPS)):
        changed = run(every - set(range(i + 1, j)))
        error = float((changed - whole).square().sum() / whole.square().sum())
        assert errors[i][j] == pytest.approx(error, rel=1e-2)
    # neighbours skip nothing; what is protected was not measured
    assert all(errors[i][i + 1] == 0 for i in range(STEPS))
    assert not any(errors[0])


def test_two_batches_are_one() -> None:
    together, apart = Measurement(4, 1), Measurement(4, 1)
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def sample(noise: Tensor):
        return lambda predict: SAMPLERS["dpm++"](predict, noise, Sampling(NoiseConfig(), 4))

    together.add(Line(), sample(noise))
    for each in noise.split(1):
        apart.add(Line(), sample(each))
    a, b = (each.finish("motion", "dpm++", 2) for each in (together, apart))
    assert a == b


@pytest.fixture
def calibrations() -> list[Calibration]:
    _, content = measure("dpm++", 2)
    _, other = measure("ddim", 2)
    _, motion = measure("dpm++", 1)
    return [content, other, replace(motion, part="motion")]


def test_a_file_gives_back_what_was_written(calibrations, tmp_path: Path) -> None:
    path = tmp_path / "rehash.json"
    write_calibrations(path, "mini", calibrations)
    found = read_calibrations(path, "mini")
    assert sorted(found, key=str) == sorted(calibrations, key=str)
    # what is measured again replaces what was, and nothing else
    changed = replace(calibrations[0], prompts=9)
    write_calibrations(path, "mini", [changed])
    found = read_calibrations(path, "mini")
    assert sorted(found, key=str) == sorted([changed, *calibrations[1:]], key=str)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_a_calibration_for_each_cut(calibrations, tmp_path: Path) -> None:
    path = tmp_path / "rehash.json"
    write_calibrations(path, "mini", calibrations)
    data = json.loads(path.read_text())
    content, other, motion = data["calibrations"]
    # none as the packaged file has it
    others = [content | {"cut": cut, "prompts": 1} for cut in ("resnet", "attention")]
    entries = [content | {"cut": "layer"}, *others, other | {"cut": "layer"}, motion | {"cut": None}]
    path.write_text(json.dumps({"model": "mini", "calibrations": entries}))
    found = read_calibrations(path, "mini")
    expected = [Calibration(**each) for each in others]
    assert sorted(found, key=str) == sorted([*calibrations, *expected], key=str)


def entry(calibrations: list[Calibration], path: Path) -> dict:
    write_calibrations(path, "mini", calibrations[:1])
    return json.loads(path.read_text())["calibrations"][0]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("part", "vae", "part 'vae' is not one of"),
        ("part", ["content"], "part ['content'] is not text"),
        ("sampler", "euler", "sampler 'euler' is not one of"),
        ("steps", 10**9, "steps 1000000000 is not between 2 and 250"),
        ("steps", True, "steps True is not a whole number"),
        ("steps", "8", "steps '8' is not a whole number"),
        ("steps", 7, "similarity has not 6 rows, of 6 numbers down to 1"),
        ("prompts", 0, "prompts 0 is not between"),
        ("protected", 9, "protected 9 is not between 1 and 8"),
        ("protected", 1, "errors has not 7 rows, of 7 numbers down to 1"),
        ("similarity", None, "similarity is not a list of lists"),
        ("similarity", [[0.5] * 8] * 7, "similarity has not 7 rows, of 7 numbers down to 1"),
        ("errors", [[float("nan")] * n for n in range(6, 0, -1)], "NaN is not a finite number"),
        ("errors", [[-1] * n for n in range(6, 0, -1)], "errors -1 is not a number between 0 and"),
        ("errors", [["1"] * n for n in range(6, 0, -1)], "errors '1' is not a number"),
        ("errors", [[True] * n for n in range(6, 0, -1)], "errors True is not a number"),
    ],
)
def test_a_hostile_file_is_one_line_that_names_it(
    calibrations, tmp_path: Path, key: str, value: object, says: str
) -> None:
    path = tmp_path / "rehash.json"
    broken = entry(calibrations, path) | {key: value}
    path.write_text(json.dumps({"model": "mini", "calibrations": [broken]}))
    with pytest.raises(ValueError) as error:
        read_calibrations(path, "mini")
    assert str(error.value).startswith(f"{path}: ") and says in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not readable as JSON"),
        ("[1]", "is not a JSON object"),
        ('{"model": "mini", "calibrations": 3}', "calibrations 3 is not a list"),
        ('{"model": "mini", "calibrations": [3]}', r"calibrations \[3\] is not a list of objects"),
        ('{"model": "other", "calibrations": []}', "model 'other' is not mini"),
        ('{"calibrations": []}', "model None is not mini"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rehash.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_calibrations(path, "mini")


def choose(folder: Path, model: ModelConfig = MODEL, **options: object) -> KeySteps | None:
    # two of the content model's steps are protected
    request = Request(**{"rehash_protect": 0.2} | options)
    resolve(request, model)
    return choose_key_steps(request, model, folder)


def test_key_steps_are_those_of_the_policy(calibrations, tmp_path: Path) -> None:
    write_calibrations(tmp_path / "rehash.json", "mini", calibrations)
    content, other, motion = calibrations
    assert choose_key_steps(Request(), MODEL, tmp_path) is None
    found = choose(tmp_path, rehash=5)
    assert found == KeySteps(
        "minimax",
        minimax(content.error_map(), 5, protected=2),
        # of motion the first step alone
        minimax(motion.error_map(), 5, protected=1),
    )
    found = choose(tmp_path, rehash_threshold=0.99)
    assert found.content == by_threshold(content.similarity_map(), 0.99, protected=2)
    assert (found.policy, found.threshold) == ("similarity", 0.99)
    found = choose(tmp_path, rehash=5, rehash_policy="uniform", rehash_protect=0)
    assert found == KeySteps("uniform", (0, 2, 4, 5, 7), (0, 2, 4, 5, 7))
    ddim = choose(tmp_path, replace(MODEL, sampler="ddim", frames=1), rehash=5)
    assert ddim == KeySteps("minimax", minimax(other.error_map(), 5, protected=2), ())
    assert choose(tmp_path, rehash=STEPS).content == tuple(range(STEPS))


def test_motion_steps_run_in_proportion(tmp_path: Path) -> None:
    for steps, budget, expected in ((16, 4, 8), (8, 8, 8), (4, 4, 2), (12, 3, 5), (1, 4, 1)):
        model = replace(MODEL, motion_steps=steps)
        found = choose(tmp_path, model, rehash=budget, rehash_policy="uniform")
        assert (len(found.content), len(found.motion)) == (budget, expected)


def test_what_was_not_measured_is_one_line_that_says_how(calibrations, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.json"
    write_calibrations(path, "mini", calibrations)
    with pytest.raises(ValueError) as error:
        choose(tmp_path, rehash=5)
    assert str(error.value) == (
        "no calibration of mini's content for 8 steps of dpm++: "
        "make one by cmdgen rehash calibrate, or ask for policy uniform"
    )
    options = {"rehash": 5, "rehash_file": path}
    assert choose(tmp_path, **options) is not None
    for model, says in (
        (replace(MODEL, steps=9), "content for 9 steps of dpm"),
        (replace(MODEL, motion_steps=9), "motion for 9 steps of dpm"),
        (replace(MODEL, sampler="ddpm"), "steps of ddpm"),
    ):
        with pytest.raises(ValueError, match=says):
            choose(tmp_path, model, **options)
    with pytest.raises(ValueError, match="the first 2 of 8 steps protected: protect as many"):
        choose(tmp_path, **options, rehash_protect=0)
    with pytest.raises(FileNotFoundError, match=r"none\.json: No such file"):
        choose(tmp_path, rehash=5, rehash_file=tmp_path / "none.json")
    with pytest.raises(ValueError, match="rehash 9 is not between 1 and the 8 steps"):
        choose(tmp_path, rehash=9)
    with pytest.raises(ValueError, match="rehash 2: of 8 steps between 3 and 8 can run in full"):
        choose(tmp_path, **options | {"rehash": 2})


def test_key_steps_may_be_listed(tmp_path: Path) -> None:
    found = choose(tmp_path, rehash="0,1,3+0,2")
    assert found == KeySteps("listed", (0, 1, 3), (0, 2))
    still = replace(MODEL, frames=1)
    assert choose(tmp_path, still, rehash="0,1").motion == ()
    for listed, says in (
        (f"0,{STEPS}+0", f"rehash lists step {STEPS} of content, which has {STEPS} from 0"),
        ("0,1", "rehash lists no steps of motion"),
        ("1+0", "neither off nor a number"),
        ("0,2,2+0", "do not rise from 0"),
    ):
        with pytest.raises(ValueError, match=says):
            choose(tmp_path, rehash=listed)
    with pytest.raises(ValueError, match="nothing is left to choose"):
        choose(tmp_path, rehash="0,1,3+0,2", rehash_policy="uniform")
