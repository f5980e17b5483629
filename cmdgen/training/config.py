"""How a stage is trained: settings that the command line makes its options from.

Never imports torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from cmdgen.config import ATTENTIONS, PRESETS, EvdmConfig, ModelConfig, UNetConfig
from cmdgen.options import SIZE, Options, Size, option, write_size
from cmdgen.request import MAX_FRAMES, MAX_SEED, Request, resolve, threads_option
from cmdgen.store.find import find_model
from cmdgen.store.parts import hash_weights, read_model
from cmdgen.world.config import WORLDS

OWN = ("mini", "mini-gpu", "evdm-small", "evdm-world")
PRECISIONS = ("auto", "bf16", "fp32")
# where nobody chose; a world has no end
PRESET, DATA, CLIPS = "mini", "world", 12_000
# the stage that is a model of its own, and its preset where nobody chose
EVDM, EVDM_PRESET = "evdm", "evdm-small"

CLIPS_OF = (
    f"A rendered world ({', '.join(WORLDS)}), a folder of videos or WebDataset tars, a tar, or digits:FOLDER of MNIST."
)

# groups of options
LEARNING, KEEPING, OBJECTIVE = "Learning", "Checkpoints and logs", "What is learned"

_none = partial(option, None)
_learning = partial(option, group=LEARNING)
_keeping = partial(option, group=KEEPING)
_weight = partial(option, group=OBJECTIVE, low=0)

# phase, how much is done, of how much, latest figures
Report = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Start(Options):
    """Where a stage is trained, and what it starts from."""

    folder: Path = option(MISSING, "Folder of the run, for all stages.", flags=("--output", "-o"))
    clips: int | None = _none("Clips to learn from.", low=1, shown=f"all of a folder, {CLIPS} of a world")
    init: Path | None = _none("Model folder to start from, such as a Stable Diffusion.")
    teacher: str | None = _none(
        "Whole model that a pruned one in the folder learns from; of decoder: for which a small one is made.",
        metavar="MODEL",
        complete="model",
    )
    restart: bool = option(False, "Forget this stage's checkpoint.", flags=("--restart/--no-restart",))
    threads: int | None = threads_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is not None and not self.init.is_dir():
            raise FileNotFoundError(f"init {self.init} is not a folder")


@dataclass(frozen=True)
class Shared(Options):
    """What all stages of a run share; None leaves it to the first stage or to the default."""

    preset: str | None = _none("Model to build.", choices=tuple(PRESETS), shown=f"{PRESET}; {EVDM_PRESET} for {EVDM}")
    data: str | None = _none(CLIPS_OF, complete="world", shown=DATA)
    size: Size | None = _none("Frame size.", shown="the preset's", **SIZE)
    frames: int | None = _none("Frames of a clip.", low=1, high=MAX_FRAMES, shown="the preset's")
    fps: int | None = _none("Frames per second that clips are read at.", low=1, shown="the preset's")
    latents: Path | None = _none("Latents of `cmdgen data precompute` for these clips and VAE.")
    attention: str | None = _none(
        "softmax, or gated: linear where tokens > threshold * head width.", choices=ATTENTIONS, shown="the preset's"
    )
    attention_threshold: float | None = _none("Threshold of gated attention; 0: always linear.", low=0, shown="2.0")
    attention_features: int | None = _none("Features of gated attention.", low=1, shown="the preset's")

    def to_json(self) -> dict[str, Any]:
        """Return the values that are not None, as run.json holds them."""
        values = vars(self) | {
            "size": self.size and write_size(self.size),
            # a run goes on from anywhere
            "data": self.data and resolve_data(self.data),
            "latents": self.latents and str(self.latents.resolve()),
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def gate(self) -> dict[str, Any]:
        """Return the settings of attention that are not left to the model."""
        values = self.to_json()
        return {name: values[name] for name in values if name.startswith("attention")}


def presets_of(stage: str) -> tuple[str, ...]:
    """Return the names of the presets with a part that this stage trains."""
    return tuple(name for name, model in PRESETS.items() if isinstance(model.content, EvdmConfig) == (stage == EVDM))


# stages in which a teacher is of use
TAUGHT = ("content", "motion", "decoder")


def read_student(start: Start, shared: Shared, stage: str) -> ModelConfig:
    """Return the model that learns from a teacher: the one in the folder or, of decoder, the teacher itself.

    ValueError where there is nothing to learn, or what is shared is the model's own.
    """
    assert start.teacher is not None
    if stage not in TAUGHT:
        raise ValueError(f"--teacher has no effect on {stage}: it is for {', '.join(TAUGHT)}")
    refused = shared.to_json().keys() - {"preset", "data", "latents"}
    if refused or start.init is not None:
        name = min(refused, default="init").replace("_", " ")
        raise ValueError(f"{name} has no effect with --teacher: the model is there already")
    teacher = find_model(start.teacher)
    if stage == "decoder":
        return read_model(teacher)
    if not (start.folder / "model_index.json").is_file():
        raise ValueError(
            f"{start.folder} is no model: cmdgen compress prune {start.teacher} -o {start.folder} makes one"
        )
    student = read_model(start.folder)
    if student.pruned_from != hash_weights(teacher):
        raise ValueError(f"{start.folder} was not pruned from {start.teacher}, whose weights are others")
    return student


def resolve_data(name: str) -> str:
    """Return a source of clips, with the whole path of its folder if it has one."""
    kind, colon, folder = name.rpartition(":") if name.startswith("digits:") else ("", "", name)
    return f"{kind}{colon}{Path(folder).resolve()}" if name not in WORLDS and Path(folder).exists() else name


def build_model(shared: Shared) -> ModelConfig:
    """Return the model that a run trains: its preset, at its size, with its attention."""
    request = Request(frames=shared.frames, size=shared.size, fps=shared.fps)
    model = resolve(request, PRESETS[shared.preset or PRESET]).model
    if model.frames == 1:
        raise ValueError("frames 1: nothing moves in a clip of one frame")
    gated = model.content if isinstance(model.content, EvdmConfig) else model.autoencoder
    assert gated is not None
    idle = [name for name in shared.gate if name != "attention"]
    if idle and (shared.attention or gated.attention) != "gated":
        raise ValueError(f"{idle[0].replace('_', ' ')} has no effect without --attention gated")
    if isinstance(model.content, EvdmConfig):
        if model.frames != model.content.frames:
            raise ValueError(f"frames {model.frames}: {model.name} learns from clips of {model.content.frames}")
        return replace(model, content=replace(model.content, **shared.gate))
    side = min(model.height, model.width)
    vae = model.vae and replace(model.vae, sample_size=side)
    content = model.content
    if isinstance(content, UNetConfig):
        stride = 1 if vae is None else vae.stride
        content = replace(content, sample_size=side // stride, **shared.gate)
    assert model.autoencoder is not None
    autoencoder = replace(model.autoencoder, **shared.gate)
    return replace(model, vae=vae, content=content, autoencoder=autoencoder)


@dataclass(frozen=True)
class TrainConfig(Options):
    """Settings of the training loop."""

    steps: int = _learning(20_000, "Updates in all.", low=1)
    minutes: float | None = _learning(
        None, "Stop cleanly within this time; the learning rate still goes by --steps.", low=0
    )
    batch: int = _learning(32, "Clips (vae: frames) of an update.", low=1)
    accumulate: int = _learning(1, "Parts that a batch is computed in.", low=1)
    lr: float = _learning(4e-4, "Learning rate.", low=0, high=1)
    warmup: int = _learning(200, "Steps of linear warm-up.", low=0)
    final_lr: float = _learning(1.0, "Share of lr at the cosine's end; 1: constant.", low=0, high=1)
    weight_decay: float = _learning(0.01, "Weight decay of matrices; 0: Adam.", low=0)
    betas: tuple[float, float] = _learning((0.9, 0.99), "Decays of Adam's two moments.")
    ema: float = _learning(0.999, "Decay of the averaged weights.", low=0, high=1)
    clip_norm: float = 1.0
    gradient_checkpointing: bool = _learning(
        False,
        "Compute activations again in the backward pass: slower, much less memory.",
        flags=("--gradient-checkpointing/--no-gradient-checkpointing",),
    )
    reduce: str = _learning("fp32", "Type of gradients between processes.", choices=PRECISIONS[1:])
    precision: str = _learning("auto", "auto (bf16 on a GPU), bf16 or fp32.", choices=PRECISIONS)
    seed: int = _learning(0, "Seed of weights, order and noise.", low=0, high=MAX_SEED)
    save_seconds: float = _keeping(300.0, "Seconds between checkpoints.", low=0, flags=("--save-every",))
    log_steps: int = _keeping(20, "Steps between log lines.", low=1, flags=("--log-every",))
    evaluate_steps: int = _keeping(
        500, "Steps between evaluations and sample sheets.", low=1, flags=("--evaluate-every",)
    )
    held_out: int = _keeping(32, "Clips to evaluate on, never trained on.", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is not a multiple of accumulate {self.accumulate}")
        for name, decays in {"betas": self.betas, "ema": (self.ema,)}.items():
            for decay in decays:
                if not 0 <= decay < 1:
                    raise ValueError(f"{name} {decay} is not at least 0 and below 1")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr {self.lr} is not between 0 and 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes {self.minutes} is not above 0")

    def uses_bf16(self, device_type: str) -> bool:
        """Return whether forward passes run in bfloat16 autocast; by default on GPUs alone."""
        return self.precision == "bf16" or (self.precision == "auto" and device_type == "cuda")


@dataclass(frozen=True)
class Loss(Options):
    """Settings of a stage's objective."""


@dataclass(frozen=True)
class DecoderLoss(Loss):
    """Weights of the objective of the VAE's decoder, beside a squared error of weight 1."""

    mask: float = _weight(3.0, "Extra weight of the subject's pixels.")
    l1: float = _weight(0.2, "Weight of the absolute error beside the squared one.")
    edges: float = _weight(0.2, "Weight of image gradients.")


@dataclass(frozen=True)
class VaeLoss(DecoderLoss):
    """Weights of the VAE's objective."""

    l1: float = _weight(1.0, "Weight of the absolute error beside the squared one.")
    edges: float = _weight(1.0, "Weight of image gradients.")
    # the reconstruction term beside it is a mean over pixels
    kl: float = _weight(1e-6, "Weight of the KL, in nats, of a whole frame.")


@dataclass(frozen=True)
class AutoencoderLoss(Loss):
    """Weights of the CMD autoencoder's objective, beside a squared error of weight 1."""

    l1: float = _weight(1.0, "Weight of the absolute error beside the squared one.")
    moving: float = _weight(6.0, "Extra weight of a value's distance from the clip's mean frame.")
    motion_l2: float = _weight(1e-4, "Weight of the mean square of unbounded motion latents.")
    content_pull: float = _weight(0.0, "Weight of the content frame's distance from the clip's middle frame.")


@dataclass(frozen=True)
class DenoisingLoss(Loss):
    """Settings of a denoiser's objective."""

    min_snr: float = _weight(5.0, "Gamma of min-SNR weights, unless a variance is learned; 0: plain mean.")
    timestep_shift: float = option(
        1.0, "1: all timesteps alike; above it noisy ones more often.", group=OBJECTIVE, low=1
    )


@dataclass(frozen=True)
class CaptionedLoss(DenoisingLoss):
    """Settings of the objective of a denoiser that reads text."""

    text_dropout: float = _weight(0.1, "Share of captions left empty, for guidance.", high=1)
    # beside a --teacher. VDMini's weight of the critic is 1.0, of a gradient that is not scaled; ours is
    icd: float = _weight(0.1, "Weight of the distance of features from the teacher's.")
    mca: float = _weight(
        0.1, "Pull of a critic, which tells clips of student and teacher apart; 1: as strong as the task's."
    )


@dataclass(frozen=True)
class ContentLoss(CaptionedLoss):
    """Settings of the content model's objective."""

    freeze_text: bool = option(
        False,
        "Train the UNet alone, as CMD does from Stable Diffusion.",
        group=OBJECTIVE,
        flags=("--freeze-text/--no-freeze-text",),
    )


@dataclass(frozen=True)
class MotionLoss(CaptionedLoss):
    """Settings of the motion model's objective."""

    # at sampling the content frame is not real
    content_noise: float = _weight(0.2, "Largest deviation of noise on the content frame.")


@dataclass(frozen=True)
class EvdmLoss(DenoisingLoss):
    """Settings of EVDM's objective: which frames it is given while it learns."""

    past_dropout: float = _weight(0.5, "Share of clips without past frames.", high=1)
    future_dropout: float = _weight(0.5, "Share of clips without future frames.", high=1)
    partial: float = _weight(0.0, "Share of the others with some of the nearest frames alone.", high=1)
    nearness: float = _weight(0.0, "A frame counts as its distance from the nearest known one to the power of -X.")


LOSSES: Mapping[str, type[Loss]] = {
    "vae": VaeLoss,
    "autoencoder": AutoencoderLoss,
    "content": ContentLoss,
    "motion": MotionLoss,
    "decoder": DecoderLoss,
    "evdm": EvdmLoss,
}


class Recipe(NamedTuple):
    """The settings of one stage."""

    train: TrainConfig
    loss: Loss

    def replaced(self, values: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with those of `values`, by field name, that are not None."""
        train, loss = ({name: value for name in vars(part) if (value := values.get(name)) is not None} for part in self)
        return Recipe(replace(self.train, **train), replace(self.loss, **loss))


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
_PAPER_RECIPES = {
    # as many steps as PVDM's, its ancestor; the paper says no more than a week on eight GPUs
    "autoencoder": Recipe(
        replace(_PAPER, steps=250_000, batch=24, accumulate=12, lr=1e-5, betas=(0.5, 0.9), ema=0.0, clip_norm=math.inf),
        AutoencoderLoss(l1=0.0, moving=0.0, motion_l2=0.0),
    ),
    # eps-MSE or, of a learned variance, MSE and bound; a share of dropped texts is DiT's of classes
    "content": Recipe(replace(_PAPER, accumulate=64), ContentLoss(min_snr=0.0, freeze_text=True)),
    "motion": Recipe(replace(_PAPER, accumulate=16), MotionLoss(min_snr=0.0, content_noise=0.0)),
    # MCVD's, which EVDM takes over; as many steps as it had for SM-MNIST
    "evdm": Recipe(
        replace(_PAPER, batch=64, lr=2e-4, warmup=5000, steps=700_000, gradient_checkpointing=False, held_out=32),
        EvdmLoss(min_snr=0.0),
    ),
}
# where ours are not the defaults. What moves how is decided while there is little but noise
_OWN_RECIPES = {
    "evdm": Recipe(
        TrainConfig(batch=16, lr=2e-3, final_lr=0.05, weight_decay=0.0, steps=50_000, evaluate_steps=2000),
        EvdmLoss(min_snr=0.0, timestep_shift=16.0, past_dropout=0.1, partial=0.1, nearness=2.0),
    )
}


# for a day of one or two CPU cores. The motion stage has flat weights of the velocity and noisy
# timesteps more often: with min-SNR weights the motion model did not read the verb
_MINI = TrainConfig(warmup=150, final_lr=0.02, batch=32)
_MINI_RECIPES = {
    "vae": Recipe(replace(_MINI, steps=3000, batch=16, lr=2e-3, ema=0.995), VaeLoss()),
    "autoencoder": Recipe(replace(_MINI, steps=10_000, batch=8, lr=8e-4), AutoencoderLoss(content_pull=1.0)),
    "content": Recipe(replace(_MINI, steps=12_000, lr=1e-3), ContentLoss()),
    "motion": Recipe(replace(_MINI, steps=20_000, lr=6e-4, ema=0.998), MotionLoss(min_snr=0.0, timestep_shift=4.0)),
    "decoder": Recipe(replace(_MINI, steps=1000, batch=16, lr=5e-4, ema=0.99), DecoderLoss()),
}
# for about ten minutes of one H100: steps, batch, learning rate
_GPU = {
    "vae": (3000, 64, 2e-3),
    "autoencoder": (3000, 32, 6e-4),
    "content": (3400, 256, 1e-3),
    "motion": (4000, 256, 8e-4),
    "decoder": (500, 64, 5e-4),
}
_GPU_RECIPES = {
    stage: Recipe(
        # the average reaches over a twelfth of the steps
        replace(_MINI_RECIPES[stage].train, steps=steps, batch=batch, lr=lr, ema=1 - 12 / steps),
        _MINI_RECIPES[stage].loss,
    )
    for stage, (steps, batch, lr) in _GPU.items()
}
_RECIPES = {"mini": _MINI_RECIPES, "mini-gpu": _GPU_RECIPES}


@cache
def recipe(preset: str, stage: str) -> Recipe:
    """Return the settings of a stage: CMD's for the paper's presets, else ours."""
    recipes = _RECIPES.get(preset) or (_OWN_RECIPES if preset in OWN else _PAPER_RECIPES)
    return recipes.get(stage) or Recipe(TrainConfig(), LOSSES[stage]())
