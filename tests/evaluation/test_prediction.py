"""Evaluation of predicted frames: on clips whose best prediction is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cmdgen.data.digits import Digits
from cmdgen.evaluation import prediction
from cmdgen.evaluation.metrics import psnr
from cmdgen.evaluation.prediction import blend, clip_psnr, clip_ssim, evaluate_prediction, repeat_last, train_classifier
from cmdgen.evaluation.settings import Evaluation
from cmdgen.pipelines.clip import Task
from cmdgen.pipelines.evdm import EvdmPipeline
from cmdgen.pipelines.load import load_predictor
from tests.data.test_digits import write_idx
from tests.pipelines.test_evdm import write_model


def strokes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten kinds of bars, thick and thin, here and there: pictures (N, 28, 28) and their kinds."""
    rng = np.random.default_rng(seed)
    kinds = (np.arange(count) % 10).astype(np.uint8)
    pictures = np.zeros((count, 28, 28), np.uint8)
    for picture, kind in zip(pictures, kinds, strict=True):
        start = 4 + 4 * (kind % 5) + rng.integers(0, 2)
        part = (slice(3, 25), slice(start, start + 3)) if kind < 5 else (slice(start, start + 3), slice(3, 25))
        picture[part] = rng.integers(180, 256)
    return pictures, kinds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("digits")
    for seed, (split, count) in enumerate((("train", 400), ("t10k", 100))):
        pictures, kinds = strokes(count, seed)
        write_idx(place / f"{split}-images-idx3-ubyte", pictures)
        write_idx(place / f"{split}-labels-idx1-ubyte", kinds)
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EvdmPipeline:
    return load_predictor(write_model(tmp_path_factory.mktemp("evdm") / "tiny", size=(32, 32)), device="cpu")


def test_psnr_of_clips_is_that_of_their_mean_error() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 1, 2, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    got = clip_psnr(a, b)
    assert got.tolist() == pytest.approx([psnr((x + 1) / 2, (y + 1) / 2) for x, y in zip(a, b, strict=True)])
    # beyond the range, and below what 8 bits show
    assert torch.equal(clip_psnr(a * 9, b), clip_psnr((a * 9).clamp(-1, 1), b))
    assert clip_psnr(b, b).tolist() == [60, 60, 60]
    assert clip_ssim(*(x.repeat(1, 1, 1, 2, 2) for x in (b, b))).tolist() == pytest.approx([1, 1, 1])


def test_a_blend_goes_evenly_from_one_side_to_the_other() -> None:
    past, future = torch.zeros(1, 1, 2, 3, 3), torch.ones(1, 1, 2, 3, 3)
    assert blend(past, future, 3)[0, 0, :, 0, 0].tolist() == [0.25, 0.5, 0.75]
    assert torch.equal(repeat_last(torch.cat([past, future], 2), 4), torch.ones(1, 1, 4, 3, 3))


def test_the_best_sample_counts_and_a_perfect_one_is_perfect(
    model: EvdmPipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = Digits(folder), Evaluation(clips=3, batch=2, trajectories=2)
    calls = []

    def cheat(self: EvdmPipeline, task: Task, past: Tensor, future: Tensor, number: int) -> Tensor:
        rows = source.indices("test", 3)[len(calls) // 4 * 2 :][: len(task.plans)]
        calls.append([plan.seed for plan in task.plans])
        frames = source.render(rows, (32, 32), 7).frames[:, 2:5, :1].transpose(1, 2).float() / 127.5 - 1
        # the second sample of each clip is right, the first one grey
        return frames if len(calls) % 2 == 0 else torch.zeros_like(frames)

    monkeypatch.setattr(EvdmPipeline, "denoise_block", cheat)
    report = evaluate_prediction(model, source, options, lambda *_: None)
    figures = {figure.key: figure for figure in report.figures}
    for key in ("predict_psnr", "predict_psnr_first", "interpolate_psnr"):
        assert figures[key].value == pytest.approx(60, abs=0.01) and figures[key].met
        assert figures[key].beside["one sample"] < 10
    assert figures["predict_ssim"].value == pytest.approx(1, abs=1e-4)
    assert "blend" in figures["interpolate_psnr"].beside
    # every sample has a seed of its own
    assert len(calls) == 8
    seeds = [seed for some in calls[:2] + calls[4:6] for seed in some]
    assert sorted(seeds) == list(range(6))
    assert report.settings["trajectories"] == 2


def test_the_classifier_names_digits_under_others(folder: Path) -> None:
    source = Digits(folder)
    classifier = train_classifier(source, 32, lambda *_: None)
    assert classifier.accuracy > 0.95
    clips = source.render(source.indices("test", 40), (64, 64), 1)
    frames = clips.frames[:, 0, 0].float() / 127.5 - 1
    labels = clips.labels["digits"], clips.labels["places"][:, 0]
    real = prediction._name_both(classifier, frames, *labels)
    assert float(real.mean()) > 0.5
    blank = prediction._name_both(classifier, torch.full_like(frames, -1), *labels)
    assert float(blank.mean()) < 0.2


def test_eval_prints_a_predictors_figures(cmdgen, model: EvdmPipeline, folder: Path) -> None:
    options = ("--clips", 2, "--trajectories", 1, "--steps", 1, "--json")
    done = cmdgen("eval", model.folder, "--data", f"digits:{folder}", *options)
    assert done.code == 0, done.err
    record = json.loads(done.out)
    keys = ("predict_psnr", "predict_psnr_first", "predict_ssim", "predict_ssim_rounded")
    assert {*keys, "interpolate_psnr", "interpolate_ssim", "digits"} <= record["figures"].keys()
    assert record["clips"] == 2
