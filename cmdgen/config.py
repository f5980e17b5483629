"""What a model is and what is asked of it: frozen dataclasses and their presets; nothing runs.

Fields of the text, UNet, VAE and noise configurations carry the names of transformers' and
diffusers' `config.json`, so a stock Stable Diffusion folder is read without translation. Never
imports torch.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

SOLVERS = ("ddim", "euler", "lcm")
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
class VisionConfig:
    """CLIP vision transformer; the defaults are ViT-H/14's (Stable Video Diffusion)."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 1024
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5


def each_level(layers: int | tuple[int, ...], widths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the layers of each level, of which a configuration may give one number for all."""
    layers = (layers,) * len(widths) if isinstance(layers, int) else layers
    if len(layers) != len(widths):
        raise ValueError(f"layers_per_block has {len(layers)} entries, block_out_channels {len(widths)}")
    return layers


# layers along time inside of a network: none, or beside those of a frame, as in SVD
TEMPORAL = ("none", "blend")


@dataclass(frozen=True)
class AttentionConfig:
    """How tokens attend to one another."""

    # one of ATTENTIONS; gated, with this threshold and so many random features
    attention: str = "softmax"
    attention_threshold: float = 2.0
    attention_features: int | None = 256


@dataclass(frozen=True)
class UNetConfig(AttentionConfig):
    """Stable Diffusion UNet; the defaults are SD 1.5's."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    # of a down block, for all levels or for each; an up block has one more
    layers_per_block: int | tuple[int, ...] = 2
    # None: without one, as pruned UNets are
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    cross_attention_dim: int = 768
    # diffusers' historical name: this is the number of heads, one for all blocks or one for each
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    # one of TEMPORAL; frames that it was trained on
    temporal: str = "none"
    num_frames: int | None = None
    # of numbers that join the timestep: the width of each, and of all
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers of each down block."""
        return each_level(self.layers_per_block, self.block_out_channels)


@dataclass(frozen=True)
class MotionConfig:
    """AnimateDiff's motion modules, of a UNet that stays as it is; the defaults are version 2's."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    motion_layers_per_block: int | tuple[int, ...] = 2
    motion_max_seq_length: int = 32
    motion_norm_num_groups: int = 32
    motion_num_attention_heads: int = 8
    use_motion_mid_block: bool = True

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers of each down block."""
        return each_level(self.motion_layers_per_block, self.block_out_channels)


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
    # one of TEMPORAL; it is the decoder's
    temporal: str = "none"

    @property
    def stride(self) -> int:
        """Pixels along one side of a latent position."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TinyConfig:
    """A VAE that is small by design, for latents of another; the defaults are TAESD's, for Stable Diffusion's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0

    @property
    def stride(self) -> int:
        """Pixels along one side of a latent position."""
        return 2 ** (len(self.num_decoder_blocks) - 1)


@dataclass(frozen=True)
class NoiseConfig:
    """Diffusion noise schedule and parametrisation; the defaults are Stable Diffusion's.

    All but `set_alpha_to_one`, which its folders give: absent, it is diffusers' default for DDIM.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    # whether a sampler's clean samples are clipped to [-1, 1]: where they are pixels
    clip_sample: bool = False
    # where DDIM's last step leads: to the clean sample, or to the little noise of timestep 0
    set_alpha_to_one: bool = True
    # one of SOLVERS, whose scheduler of diffusers a folder has. Euler's way ends on the clean
    # sample, and begins, where it does so at the noisiest timestep, on the share of noise there is
    solver: str = "ddim"
    # "continuous": times are a quarter of log sigma, spaced between these as Karras et al. do
    timestep_type: str = "discrete"
    sigma_min: float | None = None
    sigma_max: float | None = None


# that of Ho et al. 2020 (arXiv:2006.11239)
DDPM_NOISE = NoiseConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps_offset=0)


@dataclass(frozen=True)
class AutoencoderConfig(AttentionConfig):
    """CMD autoencoder; the defaults are the paper's (8+8 blocks, width 384; arXiv:2403.14148)."""

    channels: int = 4
    patch: int = 2
    width: int = 384
    heads: int = 8
    # blocks of the encoder; of the decoder too, unless it says otherwise
    depth: int = 8
    decoder_depth: int | None = None
    motion_channels: int = 8
    # "pixel": weights per pixel and channel, the paper's; "patch": one smooth map for all channels
    importance: str = "pixel"
    # "tanh": the paper's bounded z; "linear": unbounded, held by a small L2 in training
    motion_activation: str = "tanh"
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
    # by what was measured on training captions: directions in which texts differ little count as much
    text_whitened: bool = False
    num_classes: int | None = None
    context_channels: int | None = 4
    context_patch: int = 8
    learned_sigma: bool = True
    noise: NoiseConfig = DDPM_NOISE


@dataclass(frozen=True)
class EvdmConfig(AttentionConfig):
    """Predictor of frames in pixels; the defaults are EVDM's for SM-MNIST (Zhang et al. 2023, ACM MM).

    It denoises `current` frames, given `past` frames before and `future` frames after them.
    """

    channels: int = 1
    past: int = 5
    current: int = 5
    future: int = 0
    # pixels along one side of what the network sees as a position
    patch: int = 1
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    layers_per_block: int = 2
    # "evdm": bottleneck residual pathway; "mcvd": the baseline's two 3x3 convolutions
    block: str = "evdm"
    reduction: int = 4
    # EVDM-L: half of the channels pass by, shortcuts are grouped and shuffled
    split: bool = False
    # of a block's normalisation by the time: "full" scale and shift, or "half" of it, the shift
    modulation: str = "full"
    # "relu": before the bottleneck, as printed; "silu": before and after it
    activation: str = "relu"
    dropout: float = 0.1
    # attention is at all levels but the first, in heads as wide as the first level; None: as many
    # random features as a head is wide
    attention_features: int | None = None
    # whether clean frames (prediction_type "sample") are the nearest known ones where a mask, learned too, says so
    mask: bool = False
    # with a mask: pixels a frame that what stays may move, as it did in the two nearest known frames; 0: it rests
    reach: int = 0

    @property
    def frames(self) -> int:
        """Return the length of the clips that it learns from."""
        return self.past + self.current + self.future


@dataclass(frozen=True)
class ModelConfig:
    """One text-to-video model: its parts, the clip it makes, how it is sampled by default.

    CMD has an autoencoder and a motion model; AnimateDiff an adapter, motion modules of its UNet;
    Stable Video Diffusion a vision encoder in place of text; EVDM is a content model alone, which
    continues and fills in clips. A model without any of these makes stills, clips of one frame; so
    do the first two, without what moves them.
    """

    name: str
    content: UNetConfig | DiTConfig | EvdmConfig
    text: TextConfig | None = None
    vae: VaeConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    motion: DiTConfig | None = None
    noise: NoiseConfig = NoiseConfig(set_alpha_to_one=False)
    adapter: MotionConfig | None = None
    vision: VisionConfig | None = None
    # of an adapter's base model, for stills
    still_noise: NoiseConfig | None = None
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
    # of a picture that is animated: guidance of the first frame, from which it rises evenly to the
    # last; how much is to move; the deviation of the noise that is added to the picture
    guidance_first: float | None = None
    motion_amount: int | None = None
    image_noise: float | None = None
    # files of lora/ that change the weights, each FILE:SCALE
    loras: tuple[str, ...] = ()
    # of a pruned model: what it lost, and the hash of the weights before
    dropped: tuple[str, ...] = ()
    pruned_from: str | None = None

    @property
    def moves(self) -> bool:
        """Return whether it can make videos."""
        return self.motion is not None or self.looks_along_time

    @property
    def decodes_clips(self) -> bool:
        """Return whether all frames of a clip go through its VAE's decoder together."""
        return self.vae is not None and self.vae.temporal == "blend"

    @property
    def looks_along_time(self) -> bool:
        """Return whether all frames of a video go through its UNet together."""
        return self.adapter is not None or self.vision is not None

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width)."""
        return self.height, self.width

    @property
    def stride(self) -> int:
        """Pixels along one side of a latent position; 1 without a VAE."""
        return 1 if self.vae is None else self.vae.stride

    @property
    def latent_size(self) -> tuple[int, int]:
        """Return (height, width) of the latents."""
        return self.height // self.stride, self.width // self.stride

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of, for every patch and stride on the way."""
        if isinstance(self.content, DiTConfig):
            content = self.content.patch
        elif isinstance(self.content, EvdmConfig):
            content = self.content.patch * 2 ** (len(self.content.multipliers) - 1)
        else:
            content = 2 ** (len(self.content.block_out_channels) - 1)
        latent = content
        if self.autoencoder is not None and self.motion is not None:
            motion = self.autoencoder.patch * self.motion.patch
            latent = math.lcm(content, motion, self.motion.context_patch)
        return latent * self.stride


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
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    ),
    content=UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    vae=VaeConfig(sample_size=768),
    motion=DiTConfig(),
    width=1024,
)

CMD_UCF = ModelConfig(
    name="cmd-ucf",
    content=DiTConfig(in_channels=3, text_width=None, num_classes=101, context_channels=None, depth=28, width=1152),
    autoencoder=AutoencoderConfig(channels=3),
    motion=DiTConfig(depth=24, width=1024, heads=16, text_width=None, context_channels=3, context_patch=4),
    height=64,
    width=64,
    guidance=4.0,
)

_MINI_CONTENT = UNetConfig(
    sample_size=24,
    in_channels=8,
    out_channels=8,
    block_out_channels=(64, 96, 128),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=128,
    attention_head_dim=4,
    use_linear_projection=True,
)
_MINI_VAE = VaeConfig(
    latent_channels=8, block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8, sample_size=96
)
_MINI_AUTOENCODER = AutoencoderConfig(
    channels=8, width=160, heads=5, patch=3, depth=4, decoder_depth=6, importance="patch", motion_activation="linear"
)
_MINI_MOTION = DiTConfig(
    width=256,
    depth=5,
    heads=4,
    text_width=128,
    text_whitened=True,
    context_channels=8,
    context_patch=6,
    learned_sigma=False,
    noise=NoiseConfig(prediction_type="v_prediction", timestep_spacing="trailing"),
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
    content=_MINI_CONTENT,
    vae=_MINI_VAE,
    autoencoder=_MINI_AUTOENCODER,
    motion=_MINI_MOTION,
    noise=NoiseConfig(prediction_type="v_prediction", timestep_spacing="trailing"),
    height=96,
    width=96,
    sampler="dpm++",
    steps=25,
    motion_steps=25,
    guidance=3.0,
    motion_guidance=1.5,
)

# larger frames, where a GPU trains
MINI_GPU = replace(
    MINI,
    name="mini-gpu",
    content=replace(_MINI_CONTENT, sample_size=32),
    vae=replace(_MINI_VAE, block_out_channels=(32, 64, 128), sample_size=128),
    autoencoder=replace(_MINI_AUTOENCODER, patch=2, depth=3, decoder_depth=5),
    motion=replace(_MINI_MOTION, context_patch=4),
    height=128,
    width=128,
)

# by data set, what sets its networks apart: channels, past frames, frames made at once, width
_EVDM_DATA = {"sm": (1, 5, 5, 64), "kth": (1, 10, 5, 96), "bair": (3, 2, 5, 192), "ucf": (3, 4, 4, 288)}
_EVDM_KINDS = {
    "evdm": EvdmConfig(attention="gated"),
    "evdm-l": EvdmConfig(attention="gated", reduction=8, split=True),
    "mcvd": EvdmConfig(block="mcvd"),
}


def _evdm(name: str, content: EvdmConfig, noise: NoiseConfig, steps: int) -> ModelConfig:
    return ModelConfig(
        name, content, noise=noise, frames=content.frames, height=64, width=64, steps=steps, guidance=1.0
    )


_EVDM_NOISE = replace(DDPM_NOISE, clip_sample=True)
_EVDM_PAPER = [
    _evdm(f"{kind}-{data}", replace(base, channels=c, past=past, current=current, width=width), _EVDM_NOISE, steps=100)
    for kind, base in _EVDM_KINDS.items()
    for data, (c, past, current, width) in _EVDM_DATA.items()
]
# a wide first level without the squeeze learns motion fastest (docs/evdm.md). It predicts clean frames: the
# 64 channels of a position cannot carry the 80 values of noise that velocity needs
_SMALL = EvdmConfig(
    future=5,
    patch=4,
    width=64,
    multipliers=(1, 1),
    reduction=1,
    activation="silu",
    dropout=0.0,
    mask=True,
    # of a digit at 64x64
    reach=4,
)
_SMALL_NOISE = replace(MINI.noise, prediction_type="sample", clip_sample=True)
EVDM_SMALL = _evdm("evdm-small", _SMALL, _SMALL_NOISE, steps=2)
# most of a picture stays where it is
_WORLD = replace(_SMALL, channels=3, modulation="half", reach=0)
EVDM_WORLD = _evdm("evdm-world", _WORLD, _SMALL_NOISE, steps=10)

ANIMATEDIFF = ModelConfig(
    name="animatediff",
    text=TextConfig(),
    content=UNetConfig(),
    vae=VaeConfig(),
    adapter=MotionConfig(use_motion_mid_block=False),
    noise=NoiseConfig(beta_schedule="linear"),
    still_noise=NoiseConfig(set_alpha_to_one=False),
    steps=25,
)

ANIMATEDIFF_LIGHTNING = replace(
    ANIMATEDIFF,
    name="animatediff-lightning",
    adapter=MotionConfig(),
    noise=NoiseConfig(beta_schedule="linear", timestep_spacing="trailing", solver="euler"),
    steps=4,
    guidance=1.0,
)

ANIMATELCM = replace(
    ANIMATEDIFF,
    name="animatelcm",
    adapter=MotionConfig(),
    noise=NoiseConfig(beta_schedule="linear", solver="lcm"),
    sampler="lcm",
    steps=6,
    guidance=2.0,
)

_SVD_UNET = UNetConfig(
    sample_size=96,
    in_channels=8,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
    temporal="blend",
    num_frames=14,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=768,
)

SVD = ModelConfig(
    name="svd",
    content=_SVD_UNET,
    vae=VaeConfig(sample_size=768, temporal="blend"),
    vision=VisionConfig(),
    noise=NoiseConfig(
        prediction_type="v_prediction", solver="euler", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
    ),
    frames=14,
    height=576,
    width=1024,
    fps=7,
    steps=25,
    guidance=3.0,
    guidance_first=1.0,
    motion_amount=127,
    image_noise=0.02,
)

SVD_XT = replace(SVD, name="svd-xt", content=replace(_SVD_UNET, num_frames=25), frames=25)

# models that `cmdgen train` makes
_OURS = (MINI, MINI_GPU, CMD_SD15, CMD_SD21, CMD_UCF, EVDM_SMALL, EVDM_WORLD)
PRESETS = {preset.name: preset for preset in (*_OURS, *_EVDM_PAPER)}
# models of others, with public weights
PUBLIC = {preset.name: preset for preset in (ANIMATEDIFF, ANIMATEDIFF_LIGHTNING, ANIMATELCM, SVD, SVD_XT)}

SAMPLERS = ("ddim", "ddpm", "dpm++", "lcm")
# the steps of the sampler that latent consistency models are distilled from: lcm has no more
LCM_STEPS = 50

# what step rehash has measured of a model, in its folder
CALIBRATION = "rehash.json"
# what its blocks are worth
IMPORTANCE = "importance.json"
# of models that look along time, which are distilled to so few: too few to skip any
FEW_STEPS = 8
# what a UNet's last layer has done when step rehash keeps its feature: nothing; then each of its operators
CUTS = ("layer", "resnet", "attention", "motion")
# how step rehash chooses the steps that run
POLICIES = ("similarity", "uniform", "minimax")


def packaged_models() -> dict[str, Path]:
    """The folders of the models that ship with cmdgen, by name."""
    assets = Path(__file__).parent / "assets"
    return {path.parent.name: path.parent for path in sorted(assets.glob("*/model_index.json"))}
