"""What a model is and what is asked of it: frozen dataclasses and their presets; nothing runs.

Fields of the text, UNet, VAE and noise configurations carry the names of transformers' and
diffusers' `config.json`, so a stock Stable Diffusion folder is read without translation. Never
imports torch.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short

# of tokens among themselves: everywhere softmax, or FAVOR+ where L > threshold * head width
ATTENTIONS = ("softmax", "gated")


@dataclass(frozen=True)
class TextConfig:
    """CLIP text transformer; the defaults are ViT-L/14's text half (Stable Diffusion 1.x)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclass(frozen=True)
class UNetConfig:
    """Stable Diffusion UNet; the defaults are SD 1.5's."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    # diffusers' historical name: this is the number of heads, one for all blocks or one for each
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    # one of ATTENTIONS; gated, with this threshold and so many random features
    attention: str = "softmax"
    attention_threshold: float = 2.0
    attention_features: int = 256


@dataclass(frozen=True)
class VaeConfig:
    """KL autoencoder; the defaults are Stable Diffusion's f8 with four channels."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215

    @property
    def stride(self) -> int:
        """Pixels along one side of a latent position."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class NoiseConfig:
    """Diffusion noise schedule and parametrisation; the defaults are Stable Diffusion's.

    All but the last, which its folders give: absent, it is diffusers' own default for DDIM.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    # where DDIM's last step leads: to the clean sample, or to the little noise of timestep 0
    set_alpha_to_one: bool = True


@dataclass(frozen=True)
class AutoencoderConfig:
    """CMD autoencoder; the defaults are the paper's (8+8 blocks, width 384; arXiv:2403.14148)."""

    channels: int = 4
    patch: int = 2
    width: int = 384
    heads: int = 8
    depth: int = 8
    motion_channels: int = 8
    # "pixel": weights per pixel and channel, the paper's; "patch": one smooth map for all channels
    importance: str = "pixel"
    # "tanh": the paper's bounded z; "linear": unbounded, held by a small L2 in training
    motion_activation: str = "tanh"
    # one of ATTENTIONS; gated, with this threshold and so many random features
    attention: str = "softmax"
    attention_threshold: float = 2.0
    attention_features: int = 256
    # per channel, measured on training data; z is standardised by them before diffusion
    motion_mean: tuple[float, ...] | None = None
    motion_std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class DiTConfig:
    """adaLN-Zero DiT; the defaults are CMD's motion DiT-XL/2 at content patch 8.

    With `context_channels` the content frame joins as tokens; with `num_classes` it is
    class-conditional; with `text_width` mean-pooled text joins the timestep embedding.
    """

    in_channels: int = 8
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    text_width: int | None = 1024
    num_classes: int | None = None
    context_channels: int | None = 4
    context_patch: int = 8
    learned_sigma: bool = True
    noise: NoiseConfig = field(
        default=NoiseConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps_offset=0)
    )


@dataclass(frozen=True)
class ModelConfig:
    """One text-to-video model: its parts, the clip it makes, how it is sampled by default.

    Without autoencoder and motion model it makes stills, clips of one frame, as Stable Diffusion
    does; every other model makes them too, of the content frame alone.
    """

    name: str
    text: TextConfig | None
    content: UNetConfig | DiTConfig
    vae: VaeConfig | None
    autoencoder: AutoencoderConfig | None
    motion: DiTConfig | None
    noise: NoiseConfig = NoiseConfig(set_alpha_to_one=False)
    frames: int = 16
    height: int = 512
    width: int = 512
    fps: int = 8
    sampler: str = "ddim"
    steps: int = 50
    motion_steps: int = 100
    guidance: float = 7.5
    motion_guidance: float = 1.0
    # where on the noise schedule guidance is on, from 0, clean, to 1, noise; None: everywhere
    guidance_interval: tuple[float, float] | None = None

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of, for every patch and stride on the way."""
        if isinstance(self.content, DiTConfig):
            content = self.content.patch
        else:
            content = 2 ** (len(self.content.block_out_channels) - 1)
        latent = content
        if self.autoencoder is not None and self.motion is not None:
            motion = self.autoencoder.patch * self.motion.patch
            latent = math.lcm(content, motion, self.motion.context_patch)
        return latent * (1 if self.vae is None else self.vae.stride)


CMD_SD15 = ModelConfig(
    name="cmd-sd15",
    text=TextConfig(),
    content=UNetConfig(),
    vae=VaeConfig(),
    autoencoder=AutoencoderConfig(),
    motion=DiTConfig(text_width=768, context_patch=4),
)

CMD_SD21 = replace(
    CMD_SD15,
    name="cmd-sd21",
    text=TextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
    ),
    content=UNetConfig(
        cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    vae=VaeConfig(sample_size=768),
    motion=DiTConfig(),
    width=1024,
)

CMD_UCF = ModelConfig(
    name="cmd-ucf",
    text=None,
    content=DiTConfig(
        in_channels=3, text_width=None, num_classes=101, context_channels=None, depth=28, width=1152
    ),
    vae=None,
    autoencoder=AutoencoderConfig(channels=3),
    motion=DiTConfig(
        depth=24, width=1024, heads=16, text_width=None, context_channels=3, context_patch=4
    ),
    height=64,
    width=64,
    guidance=4.0,
)

MINI = ModelConfig(
    name="mini",
    text=TextConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        eos_token_id=1,
    ),
    content=UNetConfig(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        use_linear_projection=True,
    ),
    vae=VaeConfig(
        latent_channels=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    ),
    autoencoder=AutoencoderConfig(
        channels=8, width=160, heads=5, depth=4, importance="patch", motion_activation="linear"
    ),
    motion=DiTConfig(
        width=256,
        depth=6,
        heads=4,
        text_width=128,
        context_channels=8,
        context_patch=4,
        learned_sigma=False,
        noise=NoiseConfig(prediction_type="v_prediction", timestep_spacing="trailing"),
    ),
    noise=NoiseConfig(prediction_type="v_prediction", timestep_spacing="trailing"),
    height=64,
    width=64,
    sampler="dpm++",
    steps=25,
    motion_steps=25,
    guidance=3.0,
)

PRESETS = {preset.name: preset for preset in (MINI, CMD_SD15, CMD_SD21, CMD_UCF)}

SAMPLERS = ("ddim", "ddpm", "dpm++")

# where the last up stage of a UNet can be cut for step rehash: before its last layer, after that
# layer's residual block, after its attention; without attention the last two are one place
CUTS = ("layer", "resnet", "attention")
# what step rehash has measured of a model, in its folder
CALIBRATION = "rehash.json"
# how step rehash chooses the steps that run
POLICIES = ("similarity", "uniform", "minimax")


@dataclass(frozen=True)
class SampleConfig:
    """What is asked of one sampling run; None means the model's own default."""

    seed: int = 0
    content_seed: int | None = None
    motion_seed: int | None = None
    steps: int | None = None
    motion_steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    motion_guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    negative: str = ""
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: int | None = None
    # step rehash: how many of the content model's steps run in full, the motion model's in
    # proportion; or the threshold of the similarity below which a step runs
    rehash: int | None = None
    rehash_threshold: float | None = None
    # or those steps themselves, of content and of motion
    rehash_steps: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    rehash_policy: str | None = None
    rehash_cut: str = CUTS[0]
    # share of the content model's steps, the first ones, that always run
    rehash_protect: float = 0.1
    # of a calibration; None: the model's own
    rehash_file: str | None = None
    # bytes of tensors, beside the weights, that decoding may hold at once
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        for name in ("steps", "motion_steps", "frames", "height", "width", "fps", "max_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} {value} is not at least 1")
        for name in ("guidance", "motion_guidance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"{name.replace('_', ' ')} {value} is not between 0 and 100")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low <= high <= 1:
                raise ValueError(
                    f"guidance interval {low}-{high} is not within 0-1, lower end first"
                )
        for name in ("seed", "content_seed", "motion_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**63:
                raise ValueError(f"{name.replace('_', ' ')} {value} is not between 0 and 2^63 - 1")
        self._check_rehash()

    def _check_rehash(self) -> None:
        policy, threshold = self.rehash_policy, self.rehash_threshold
        if policy is not None and policy not in POLICIES:
            raise ValueError(f"rehash policy {policy!r} is not one of {', '.join(POLICIES)}")
        if self.rehash_cut not in CUTS:
            raise ValueError(f"rehash cut {self.rehash_cut!r} is not one of {', '.join(CUTS)}")
        for name, low in (("rehash_threshold", -1), ("rehash_protect", 0)):
            value = getattr(self, name)
            if value is not None and not low <= value <= 1:
                raise ValueError(f"{name.replace('_', ' ')} {value} is not between {low} and 1")
        if self.rehash_steps is not None:
            self._check_rehash_steps(self.rehash_steps)
        if self.rehashes and self.guidance_interval is not None and self.guidance_interval[1] < 1:
            raise ValueError(
                "where guidance comes on midway there is nothing to reuse: with rehash, a guidance "
                "interval must reach up to 1"
            )
        if threshold is not None and self.rehash is not None:
            raise ValueError("a rehash threshold says how many steps run: it takes no number")
        if policy is not None and not self.rehashes:
            raise ValueError(f"rehash policy {policy} chooses nothing: say how many steps run")
        if threshold is not None and policy not in (None, "similarity"):
            raise ValueError(f"rehash policy {policy} has no threshold, similarity has")

    def _check_rehash_steps(self, steps: tuple[tuple[int, ...], ...]) -> None:
        if (self.rehash, self.rehash_threshold, self.rehash_policy) != (None, None, None):
            raise ValueError("rehash lists the steps that run: nothing is left to choose")
        for of in steps:
            if of and (of[0] != 0 or any(a >= b for a, b in pairwise(of))):
                raise ValueError(f"rehash steps {short(of)} do not rise from 0, which always runs")

    @property
    def rehashes(self) -> bool:
        """Whether step rehash is asked for."""
        asked = self.rehash, self.rehash_threshold, self.rehash_steps
        return any(each is not None for each in asked)

    def apply(self, model: ModelConfig) -> ModelConfig:
        """`model` with what is asked for in place of its own; ValueError where it cannot."""
        names = (
            *("sampler", "steps", "motion_steps", "guidance", "motion_guidance"),
            *("guidance_interval", "frames", "height", "width", "fps"),
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        model = replace(model, **given)
        multiple = model.size_multiple
        if model.height % multiple or model.width % multiple:
            sides = (model.width, model.height)
            nearest = [max(1, round(side / multiple)) * multiple for side in sides]
            raise ValueError(
                f"size {model.width}x{model.height}: both sides must be multiples of {multiple}, "
                f"such as {nearest[0]}x{nearest[1]}"
            )
        if model.frames > 1 and model.motion is None:
            raise ValueError(
                f"frames {model.frames}: {model.name} has no motion model, it makes stills of 1"
            )
        if model.frames > 1 and model.motion is not None and model.frames % model.motion.patch:
            raise ValueError(
                f"frames {model.frames} is neither 1 nor a multiple of {model.motion.patch}"
            )
        noises = {"steps": model.noise, "motion_steps": (model.motion or model).noise}
        for name, noise in noises.items():
            if getattr(model, name) > noise.num_train_timesteps:
                raise ValueError(
                    f"{name.replace('_', ' ')} {getattr(model, name)} is not between 1 and "
                    f"{noise.num_train_timesteps}"
                )
        if model.fps > 240:
            raise ValueError(f"fps {model.fps} is not between 1 and 240")
        return model


@dataclass(frozen=True)
class ProfileConfig:
    """What `cmdgen profile` measures: `runs` times `batch` clips, after one run to warm up."""

    runs: int = 5
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("runs", "batch"):
            if not 1 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} {getattr(self, name)} is not between 1 and 1000")


@dataclass(frozen=True)
class SuiteConfig:
    """What `cmdgen profile --suite` measures: `runs` clips of each row, after one to warm up."""

    # of both models
    steps: int = 50
    runs: int = ProfileConfig.runs
    # None: the model's own
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 3:
            raise ValueError(f"steps {self.steps} is not at least 3: some are skipped")
        ProfileConfig(runs=self.runs)


def packaged_models() -> dict[str, Path]:
    """The folders of the models that ship with cmdgen, by name."""
    assets = Path(__file__).parent / "assets"
    return {path.parent.name: path.parent for path in sorted(assets.glob("*/model_index.json"))}
