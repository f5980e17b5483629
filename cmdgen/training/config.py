"""How a stage is trained. Never imports torch: the command line reads its defaults here."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

STAGES = ("vae", "autoencoder", "content", "motion")
PAPER = ("cmd-sd15", "cmd-sd21", "cmd-ucf")
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class TrainConfig:
    """What the loop is asked for."""

    steps: int = 20_000
    # of one update; `accumulate` parts of it go through the model one after another
    batch: int = 32
    accumulate: int = 1
    lr: float = 4e-4
    warmup: int = 200
    # fraction of lr that a cosine reaches at the last step; 1 keeps it constant
    final_lr: float = 1.0
    weight_decay: float = 0.01
    # decays of AdamW's two moments
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.999
    clip_norm: float = 1.0
    # blocks keep their inputs alone, and are computed again in the backward pass
    gradient_checkpointing: bool = False
    precision: str = "auto"
    seed: int = 0
    minutes: float | None = None
    save_seconds: float = 300.0
    log_steps: int = 20
    evaluate_steps: int = 500
    # clips that training never sees, to evaluate on
    held_out: int = 32

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_steps", "evaluate_steps", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name.replace('_', ' ')} {getattr(self, name)} is not at least 1"
                )
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch {self.batch} is not a multiple of accumulate {self.accumulate}"
            )
        if not 0 < self.lr < 1:
            raise ValueError(f"lr {self.lr} is not between 0 and 1")
        if self.warmup < 0:
            raise ValueError(f"warmup {self.warmup} is negative")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final lr {self.final_lr} is not a fraction from 0 to 1")
        for name, decays in {"betas": self.betas, "ema": (self.ema,)}.items():
            for decay in decays:
                if not 0 <= decay < 1:
                    raise ValueError(f"{name} {decay} is not at least 0 and below 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes {self.minutes} is not above 0")


@dataclass(frozen=True)
class VaeLoss:
    """Weights of the VAE's objective."""

    # a pixel of the subject counts 1 + mask times
    mask: float = 3.0
    edges: float = 1.0
    # on the KL in nats of a whole frame, beside a reconstruction term that is a mean over pixels
    kl: float = 1e-6


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of the CMD autoencoder's objective, beside a squared error of weight 1."""

    # on the absolute error
    l1: float = 1.0
    # a value counts 1 + moving times its distance from the clip's mean frame
    moving: float = 6.0
    # on the mean square of an unbounded z
    motion_l2: float = 1e-4
    # on the squared distance of the content frame from the clip's middle frame
    content_pull: float = 0.0


@dataclass(frozen=True)
class DenoisingLoss:
    """How the content and the motion model learn to denoise."""

    # gamma of min-SNR weights; 0: a plain mean over timesteps
    min_snr: float = 5.0
    # share of captions that are replaced by the empty one, for guidance
    text_dropout: float = 0.1
    # motion: content frames get noise of up to this deviation, as at sampling they are not real
    content_noise: float = 0.2

    def __post_init__(self) -> None:
        if self.min_snr < 0:
            raise ValueError(f"min snr {self.min_snr} is negative")
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"text dropout {self.text_dropout} is not between 0 and 1")
        if self.content_noise < 0:
            raise ValueError(f"content noise {self.content_noise} is negative")


@dataclass(frozen=True)
class StageConfig:
    """What one stage takes beside the model, the data and TrainConfig."""

    # a model folder whose parts are the starting point
    init: Path | None = None
    restart: bool = False
    # content: train the UNet alone, as CMD does from Stable Diffusion
    freeze_text: bool = False
    vae: VaeLoss = VaeLoss()
    autoencoder: AutoencoderLoss = AutoencoderLoss()
    denoising: DenoisingLoss = DenoisingLoss()


class Recipe(NamedTuple):
    """The settings of a stage, unless told otherwise."""

    train: TrainConfig = TrainConfig()
    stage: StageConfig = StageConfig()


# App. B.3 and Tables 6 and 7 of Yu et al. 2024 (arXiv:2403.14148). Ours, since the paper does not
# say: the parts of a batch, sized for one GPU of 40 GB, where the paper had up to 64; gradient
# clipping, which its code has for the motion model alone; all that is about saving and evaluation
_PAPER = TrainConfig(
    batch=256,
    lr=1e-4,
    warmup=0,
    weight_decay=0.0,
    betas=(0.9, 0.999),
    ema=0.999,
    gradient_checkpointing=True,
    # three epochs of the paper's 10,727,607 clips
    steps=125_700,
    save_seconds=1800.0,
    evaluate_steps=1000,
    held_out=8,
)
# eps-MSE or, of a learned variance, MSE and bound; a share of dropped texts is DiT's, of classes
_PAPER_DENOISING = DenoisingLoss(min_snr=0.0, text_dropout=0.1, content_noise=0.0)
_PAPER_RECIPES = {
    "autoencoder": Recipe(
        # as many steps as PVDM's, its ancestor; the paper says no more than a week on eight GPUs
        replace(
            _PAPER,
            steps=250_000,
            batch=24,
            accumulate=12,
            lr=1e-5,
            betas=(0.5, 0.9),
            ema=0.0,
            clip_norm=math.inf,
        ),
        StageConfig(autoencoder=AutoencoderLoss(l1=0.0, moving=0.0, motion_l2=0.0)),
    ),
    "content": Recipe(
        replace(_PAPER, accumulate=64),
        StageConfig(freeze_text=True, denoising=_PAPER_DENOISING),
    ),
    "motion": Recipe(replace(_PAPER, accumulate=16), StageConfig(denoising=_PAPER_DENOISING)),
}


def recipe(preset: str, stage: str) -> Recipe:
    """The settings of a stage of a preset: CMD's for the paper's presets, else ours."""
    return _PAPER_RECIPES.get(stage, Recipe()) if preset in PAPER else Recipe()
