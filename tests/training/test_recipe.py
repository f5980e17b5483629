"""The settings that a preset is trained with, against the paper's numbers."""

import math
from dataclasses import replace

import pytest

from cmdgen.config import PRESETS
from cmdgen.training.config import LOSSES, OWN, AutoencoderLoss, TrainConfig, VaeLoss, presets_of, recipe

PAPER = [name for name in presets_of("vae") if name not in OWN]


@pytest.mark.parametrize("stage", [stage for stage in LOSSES if "mini" in presets_of(stage)])
def test_the_defaults_are_those_that_recipes_are_written_beside(stage: str) -> None:
    train, loss = TrainConfig(), LOSSES[stage]()
    values = (train.steps, train.batch, train.accumulate, train.lr, train.warmup, train.final_lr)
    assert values == (20_000, 32, 1, 4e-4, 200, 1.0)
    assert (train.weight_decay, train.betas, train.ema) == (0.01, (0.9, 0.99), 0.999)
    assert (train.clip_norm, train.gradient_checkpointing, train.held_out) == (1.0, False, 32)
    expected = {
        "vae": {"mask": 3.0, "l1": 1.0, "edges": 1.0, "kl": 1e-6},
        "decoder": {"mask": 3.0, "l1": 0.2, "edges": 0.2},
        "autoencoder": {"l1": 1.0, "moving": 6.0, "motion_l2": 1e-4, "content_pull": 0.0},
        "content": {"min_snr": 5.0, "timestep_shift": 1.0, "text_dropout": 0.1, "freeze_text": False},
        "motion": {"min_snr": 5.0, "timestep_shift": 1.0, "text_dropout": 0.1, "content_noise": 0.2},
    }
    # of a --teacher alone
    learned = {"icd": 0.1, "mca": 0.1} if stage in ("content", "motion") else {}
    assert vars(loss) == expected[stage] | learned


@pytest.mark.parametrize("preset", PAPER)
def test_the_paper_presets_are_trained_as_the_paper_says(preset: str) -> None:
    for stage in ("autoencoder", "content", "motion"):
        train = recipe(preset, stage).train
        # Adam: AdamW without decay; a constant rate without warm-up
        assert (train.weight_decay, train.warmup, train.final_lr) == (0.0, 0, 1.0)
        assert train.gradient_checkpointing
    assert recipe(preset, "vae") == (TrainConfig(), VaeLoss())
    train, loss = recipe(preset, "autoencoder")
    assert (train.lr, train.betas, train.batch) == (1e-5, (0.5, 0.9), 24)
    assert (train.ema, train.clip_norm) == (0.0, math.inf)
    # the squared error alone
    assert loss == AutoencoderLoss(0.0, 0.0, 0.0, 0.0)
    for name in ("content", "motion"):
        train, loss = recipe(preset, name)
        assert (train.lr, train.betas, train.batch) == (1e-4, (0.9, 0.999), 256)
        assert train.ema == 0.999
        assert train.steps == pytest.approx(3 * 10_727_607 / 256, rel=1e-3)
        assert (loss.min_snr, loss.text_dropout) == (0.0, 0.1)
    assert recipe(preset, "motion").loss.content_noise == 0.0
    assert recipe(preset, "content").loss.freeze_text


def test_only_values_that_are_given_replace_a_recipes() -> None:
    ours = recipe("mini", "motion")
    told = {"steps": 3, "lr": None, "text_dropout": 0.5, "mask": None}
    train, loss = ours.replaced(told)
    assert train == replace(ours.train, steps=3)
    assert loss == replace(ours.loss, text_dropout=0.5)


def test_decays_are_checked() -> None:
    with pytest.raises(ValueError, match=r"betas 1\.5 is not at least 0 and below 1"):
        replace(TrainConfig(), betas=(0.9, 1.5))


def test_evdm_is_trained_as_mcvd_where_a_preset_is_the_papers() -> None:
    assert set(presets_of("evdm")) | set(presets_of("vae")) == set(PRESETS)
    train, loss = recipe("evdm-kth", "evdm")
    assert (train.batch, train.lr, train.warmup, train.ema, train.weight_decay) == (64, 2e-4, 5000, 0.999, 0.0)
    assert vars(loss) == {
        "min_snr": 0.0,
        "timestep_shift": 1.0,
        "past_dropout": 0.5,
        "future_dropout": 0.5,
        "partial": 0.0,
        "nearness": 0.0,
    }
    assert recipe("evdm-small", "evdm") != recipe("evdm-kth", "evdm")
