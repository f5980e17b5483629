"""How a stage is trained. Never imports torch: the command line reads its defaults here."""

from dataclasses import dataclass
from pathlib import Path

STAGES = ("vae", "autoencoder", "content", "motion")
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
    ema: float = 0.999
    clip_norm: float = 1.0
    precision: str = "auto"
    seed: int = 0
    minutes: float | None = None
    save_seconds: float = 300.0
    log_steps: int = 20
    evaluate_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_steps", "evaluate_steps"):
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
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema} is not at least 0 and below 1")
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
    """Weights of the CMD autoencoder's objective."""

    # a value counts 1 + moving times its distance from the clip's mean frame
    moving: float = 6.0
    # on the mean square of an unbounded z
    motion: float = 1e-4
    # on the squared distance of the content frame from the clip's middle frame
    content_pull: float = 0.0


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
