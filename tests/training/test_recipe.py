"""The settings that a preset is trained with, against the paper's numbers."""

import math
from dataclasses import replace

import pytest

from cmdgen.config import PRESETS
from cmdgen.training.config import STAGES, AutoencoderLoss, Recipe, TrainConfig, recipe

PAPER = [name for name in PRESETS if name != "mini"]


@pytest.mark.parametrize("stage", STAGES)
def test_mini_keeps_the_defaults_that_it_was_trained_beside(stage: str) -> None:
    assert recipe("mini", stage) == Recipe()
    train, loss = TrainConfig(), recipe("mini", stage).stage
    values = (train.steps, train.batch, train.accumulate, train.lr, train.warmup, train.final_lr)
    assert values == (20_000, 32, 1, 4e-4, 200, 1.0)
    assert (train.weight_decay, train.betas, train.ema) == (0.01, (0.9, 0.99), 0.999)
    assert (train.clip_norm, train.gradient_checkpointing, train.held_out) == (1.0, False, 32)
    assert loss.autoencoder == AutoencoderLoss(1.0, 6.0, 1e-4, 0.0)
    denoising = loss.denoising
    assert (denoising.min_snr, denoising.text_dropout, denoising.content_noise) == (5.0, 0.1, 0.2)
    assert not loss.freeze_text


@pytest.mark.parametrize("preset", PAPER)
def test_the_paper_presets_are_trained_as_the_paper_says(preset: str) -> None:
    for stage in ("autoencoder", "content", "motion"):
        train = recipe(preset, stage).train
        # Adam: AdamW without decay; a constant rate without warm-up
        assert (train.weight_decay, train.warmup, train.final_lr) == (0.0, 0, 1.0)
        assert train.gradient_checkpointing
    train, stage = recipe(preset, "autoencoder")
    assert (train.lr, train.betas, train.batch) == (1e-5, (0.5, 0.9), 24)
    assert (train.ema, train.clip_norm) == (0.0, math.inf)
    # the squared error alone
    assert stage.autoencoder == AutoencoderLoss(0.0, 0.0, 0.0, 0.0)
    for name in ("content", "motion"):
        train, stage = recipe(preset, name)
        assert (train.lr, train.betas, train.batch) == (1e-4, (0.9, 0.999), 256)
        assert train.ema == 0.999
        assert train.steps == pytest.approx(3 * 10_727_607 / 256, rel=1e-3)
        assert (stage.denoising.min_snr, stage.denoising.content_noise) == (0.0, 0.0)
        assert stage.denoising.text_dropout == 0.1
    assert recipe(preset, "content").stage.freeze_text


def test_decays_are_checked() -> None:
    with pytest.raises(ValueError, match=r"betas 1\.5 is not at least 0 and below 1"):
        replace(TrainConfig(), betas=(0.9, 1.5))
