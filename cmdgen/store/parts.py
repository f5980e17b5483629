"""The parts of a model: one table, which everything that handles whole models reads.

A model is a folder in diffusers' layout. Its parts are folders, each with a configuration and most
with weights; model_index.json lists them and says how the model is sampled by default. A new family
of models is a row. Never imports torch before it builds or reads a network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmdgen.config import (
    ANIMATEDIFF,
    SVD,
    AutoencoderConfig,
    DiTConfig,
    EvdmConfig,
    ModelConfig,
    MotionConfig,
    NoiseConfig,
    TextConfig,
    UNetConfig,
    VaeConfig,
    VisionConfig,
)
from cmdgen.files import blame, read_json, write_json
from cmdgen.schema import Folder, check_fields, check_value, class_name, read_config, read_written, write_config

if TYPE_CHECKING:
    import torch

    from cmdgen.models.pretrained import Pretrained


@dataclass(frozen=True)
class Part:
    """One folder of a model."""

    name: str
    # field of ModelConfig, and the class of its value, if it has a configuration
    field: str = ""
    config: type | None = None
    # class of the network, in cmdgen.models; None where the folder holds no weights
    module: str | None = None
    # stage of training that makes it
    stage: str | None = None
    # library and class that open it, as model_index.json lists them
    opens: str | None = None

    @property
    def filename(self) -> str:
        """The file of the weights: each library has a name for all of its own."""
        theirs = (self.opens or "").startswith("transformers.")
        return "model.safetensors" if theirs else "diffusion_pytorch_model.safetensors"

    @property
    def network(self) -> "type[Pretrained[Any]]":
        """The class of the network."""
        module, _, name = (self.module or "").rpartition(".")
        network: type[Pretrained[Any]] = getattr(import_module(f"cmdgen.models.{module}"), name)
        return network


_ROWS = (
    Part("scheduler", "noise", NoiseConfig, opens="diffusers.DDIMScheduler"),
    # the schedule of stills, where another one is that of videos
    Part("still_scheduler", "still_noise", NoiseConfig),
    Part("tokenizer", stage="content", opens="transformers.CLIPTokenizer"),
    Part("text_encoder", "text", TextConfig, "text.ClipTextModel", "content", "transformers.CLIPTextModel"),
    Part("unet", "content", UNetConfig, "unet.UNet", "content", "diffusers.UNet2DConditionModel"),
    Part("motion_adapter", "adapter", MotionConfig, "temporal.MotionAdapter", opens="diffusers.MotionAdapter"),
    Part("transformer", "content", DiTConfig, "dit.DiT"),
    Part(
        *("image_encoder", "vision", VisionConfig, "vision.ClipVisionModel"),
        opens="transformers.CLIPVisionModelWithProjection",
    ),
    Part("feature_extractor", opens="transformers.CLIPImageProcessor"),
    Part("evdm", "content", EvdmConfig, "evdm.Evdm", "evdm"),
    Part("vae", "vae", VaeConfig, "vae.KlVae", "vae", "diffusers.AutoencoderKL"),
    Part("autoencoder", "autoencoder", AutoencoderConfig, "autoencoder.CmdAutoencoder", "autoencoder"),
    Part("motion", "motion", DiTConfig, "dit.DiT", "motion"),
)
PARTS = {part.name: part for part in _ROWS}
# the parts with weights
NETWORKS = {part.name: part for part in _ROWS if part.module is not None}
# fields of configurations that must be equal where a model has both parts
_EQUAL = (
    ("unet.in_channels", "unet.out_channels"),
    ("unet.in_channels", "vae.latent_channels"),
    ("unet.in_channels", "autoencoder.channels"),
    ("unet.cross_attention_dim", "text_encoder.hidden_size"),
    ("unet.cross_attention_dim", "image_encoder.projection_dim"),
    ("transformer.in_channels", "vae.latent_channels"),
    ("transformer.in_channels", "autoencoder.channels"),
    ("vae.latent_channels", "autoencoder.channels"),
    ("motion.in_channels", "autoencoder.motion_channels"),
    ("motion.context_channels", "autoencoder.channels"),
    ("motion.text_width", "text_encoder.hidden_size"),
)
# those of motion modules, which no training changes
_ADAPTED = (("motion_adapter.block_out_channels", "unet.block_out_channels"), ("motion_adapter.layers", "unet.layers"))
# frames that AnimateDiff's first motion modules know; later ones know 32
_FIRST_LENGTH = 24
# what a pruned model says of itself, whatever it makes
_PRUNED = {"dropped", "pruned_from"}
# fields of ModelConfig that model_index.json keeps under "cmdgen"
_SAMPLING = [
    field.name
    for field in fields(ModelConfig)
    if field.name not in {"guidance_interval"} | {part.field for part in _ROWS}
]


def load_part(
    folder: Folder, name: str, *, dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu"
) -> Any:
    """Read one network of a model; ValueError names the file that is wrong."""
    weights = weights_folder(Path(folder), name)
    return PARTS[name].network.from_pretrained(Path(folder) / name, weights=weights, dtype=dtype, device=device)


def weights_folder(folder: Path, name: str) -> Path:
    """Return the folder that holds the weights of one network of a model."""
    if name == "motion_adapter" and _read_class(folder / "unet") == "UNetMotionModel":
        # the UNet's file has them as they were last used
        return folder / "unet"
    return folder / name


def _read_class(place: Path) -> str:
    return str(read_json(place / "config.json").get("_class_name"))


@lru_cache(maxsize=16)
def build_part(name: str, config: Any) -> Any:
    """Build one network of a model on the meta device."""
    from cmdgen.weights import build_empty

    return build_empty(PARTS[name].network, config)


def hash_weights(folder: Folder, *names: str) -> str:
    """Return the hash that tells the weights of a model, or of these parts, from others, wherever they are."""
    from cmdgen import weights

    files = {name: NETWORKS[name].filename for name in names or NETWORKS}
    return weights.hash_weights(Path(folder), files)


def network_configs(model: ModelConfig) -> dict[str, Any]:
    """Return the configurations of a model's networks, by folder."""
    configs = {name: getattr(model, part.field) for name, part in NETWORKS.items()}
    return {name: config for name, config in configs.items() if type(config) is PARTS[name].config}


def shared_fields(name: str) -> set[str]:
    """Return the fields of a part's configuration that must equal those of other parts."""
    sides = [side.partition(".") for equation in _EQUAL for side in equation]
    return {key for part, _, key in sides if part == name}


def read_index(folder: Folder) -> dict[str, Any]:
    """Read model_index.json."""
    return read_json(Path(folder) / "model_index.json")


def read_model(folder: Folder) -> ModelConfig:
    """Read what a whole model is from model_index.json and the config.json of its parts.

    The content model is a UNet in unet/, a class-conditional DiT in transformer/, or an EVDM in
    evdm/, which is a model alone. motion_adapter/ is AnimateDiff's, image_encoder/ with a UNet that
    looks along time Stable Video Diffusion's. A folder that is not ours, without autoencoder/ and
    motion/, is Stable Diffusion: a model of stills.
    """
    folder = Path(folder)
    index = read_index(folder)
    with blame(folder / "model_index.json"):
        sampling = check_value(index.get("cmdgen", {}), dict, "cmdgen")
        sampling = check_fields(ModelConfig, {key: value for key, value in sampling.items() if key in _SAMPLING})
    names = {name for name in PARTS if (folder / name).is_dir()}
    # reading a part that is missing says so
    alone = bool(names & {"transformer", "evdm"})
    names |= {"scheduler"} if alone else {"scheduler", "unet"}
    kind = "" if alone else _read_class(folder / "unet")
    adapts, blends = (
        "motion_adapter" in names or kind == "UNetMotionModel",
        kind == "UNetSpatioTemporalConditionModel",
    )
    if adapts or blends:
        # Stable Diffusion's folder may have an image encoder, for its safety checker
        names |= {"motion_adapter"} if adapts else {"image_encoder", "vae"}
    else:
        names -= {"image_encoder"}
        # of stills, a pruned one has no more than this
        ours = "cmdgen" in index and not {*sampling} <= _PRUNED
        if "evdm" not in names and (ours or names & {"autoencoder", "motion"}):
            names |= {"autoencoder", "motion"}
    values: dict[str, Any] = {part.field: None for part in NETWORKS.values()}
    configs: dict[str, Any] = {}
    for name, part in PARTS.items():
        if name in names and part.config is not None:
            configs[name] = values[part.field] = read_config(folder / name, part.config)
    values["name"] = folder.resolve().name
    if not names & {"autoencoder", "motion", "evdm"}:
        values |= _describe_public(folder.absolute(), values)
    check_agreement(folder, configs)
    model = ModelConfig(**values | sampling)
    kind = model.noise.prediction_type
    if isinstance(model.content, EvdmConfig) and model.content.mask and kind != "sample":
        raise ValueError(f"{folder}: evdm/ has a mask, for prediction_type sample; scheduler/ has {kind}")
    return model


def check_agreement(folder: Folder, configs: Mapping[str, Any]) -> None:
    """Raise ValueError where two parts of a model do not fit together."""
    unet = configs.get("unet")
    if unet is not None and unet.temporal == "blend":
        # the picture that is animated has half of the channels
        configs = {**configs, "unet": replace(unet, in_channels=unet.in_channels // 2)}
    for equation in (*_EQUAL, *_ADAPTED):
        (name, _, key), (other, _, other_key) = (side.partition(".") for side in equation)
        got = getattr(configs.get(name), key, None)
        expected = getattr(configs.get(other), other_key, None)
        if None not in (got, expected) and got != expected:
            raise ValueError(f"{folder}: {key} of {name}/ is {got}, but {other_key} of {other}/ is {expected}")
    if "motion_adapter" in configs and unet is not None and unet.use_linear_projection:
        raise ValueError(f"{folder}: unet/ is Stable Diffusion 2's, motion_adapter/ is for Stable Diffusion 1")


def write_model_index(folder: Folder, model: ModelConfig) -> None:
    """Write model_index.json and the scheduler's configuration; the parts write themselves."""
    opened = {part.name: part.opens.split(".") for part in _ROWS if part.opens and _has(model, part)}
    for name, (library, _) in opened.items():
        if kind := class_name(getattr(model, PARTS[name].field or "name")):
            opened[name] = [library, kind]
    data: dict[str, Any] = {"_class_name": "EvdmPipeline" if isinstance(model.content, EvdmConfig) else "CmdPipeline"}
    if model.vision is not None:
        data = {"_class_name": "StableVideoDiffusionPipeline", **opened}
        write_json(Path(folder) / "feature_extractor" / "preprocessor_config.json", read_written("CLIPImageProcessor"))
    elif model.adapter is not None:
        data = {"_class_name": "AnimateDiffPipeline", **opened}
        if model.still_noise is not None:
            write_config(model.still_noise, Path(folder) / "still_scheduler")
    elif isinstance(model.content, UNetConfig):
        data = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            **opened,
        }
    # without it, a folder is Stable Diffusion's own
    keys = _SAMPLING if model.moves or not isinstance(model.content, UNetConfig) else sorted(_PRUNED)
    if sampling := {key: value for key in keys if (value := getattr(model, key)) not in (None, ())}:
        data["cmdgen"] = sampling
    write_config(model.noise, Path(folder) / "scheduler")
    write_json(Path(folder) / "model_index.json", data)


def _has(model: ModelConfig, part: Part) -> bool:
    if part.config is None:
        return (model.text if part.name == "tokenizer" else model.vision) is not None
    return type(getattr(model, part.field)) is part.config


def _describe_public(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what folders that are not ours do not say: how they are sampled, by default."""
    content, vae, noise = values["content"], values["vae"], values["noise"]
    # a snapshot in the hub's cache lies in the folder of its repository
    repository = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name
    described: dict[str, Any] = {"name": repository.rpartition("--")[2]}
    if values["vision"] is not None:
        described |= {key: getattr(SVD, key) for key in _SAMPLING if key != "name"}
        return described | ({"frames": content.num_frames} if content.num_frames else {})
    side = content.sample_size if isinstance(content, UNetConfig) else 0
    side *= 1 if vae is None else vae.stride
    described |= {"height": side, "width": side}
    if values["adapter"] is None:
        return described | {"frames": 1}
    described |= {key: getattr(ANIMATEDIFF, key) for key in ("frames", "steps", "guidance", "fps")}
    if noise.beta_schedule != ANIMATEDIFF.noise.beta_schedule or noise.timestep_spacing == "linspace":
        # the base model's: motion modules were trained on another one
        described |= {"noise": ANIMATEDIFF.noise, "still_noise": noise}
    return described


def list_notes(model: ModelConfig) -> list[str]:
    """List what may surprise who puts a model with motion modules together."""
    notes, noise, still = [], model.noise, model.still_noise
    if model.adapter is not None and still is not None:
        notes.append(
            f"{model.name} is sampled as motion modules were trained, on {noise.beta_schedule} betas with "
            f"{noise.timestep_spacing} timesteps; its base model's schedule ({still.beta_schedule}, "
            f"{still.timestep_spacing}) is for stills alone"
        )
    if model.adapter is not None and model.adapter.motion_max_seq_length == _FIRST_LENGTH:
        notes.append(
            f"the motion modules of {model.name} know {_FIRST_LENGTH} frames: they are of AnimateDiff's first version, "
            "which often draws the watermark of its training videos; animatediff has newer ones"
        )
    return notes
