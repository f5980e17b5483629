"""The parts of a model: one table, which everything that handles whole models reads.

A model is a folder in diffusers' layout. Its parts are folders, each with a configuration and most
with weights; model_index.json lists them and says how the model is sampled by default. A new family
of models is a row. Never imports torch before it builds or reads a network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmdgen.config import (
    AutoencoderConfig,
    DiTConfig,
    EvdmConfig,
    ModelConfig,
    NoiseConfig,
    TextConfig,
    UNetConfig,
    VaeConfig,
)
from cmdgen.files import read_json, write_json
from cmdgen.schema import Folder, check_fields, check_value, read_config, write_config

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
    filename: str = "diffusion_pytorch_model.safetensors"

    @property
    def network(self) -> "type[Pretrained[Any]]":
        """The class of the network."""
        module, _, name = (self.module or "").rpartition(".")
        network: type[Pretrained[Any]] = getattr(import_module(f"cmdgen.models.{module}"), name)
        return network


_ROWS = (
    Part("scheduler", "noise", NoiseConfig, opens="diffusers.DDIMScheduler"),
    Part("tokenizer", stage="content", opens="transformers.CLIPTokenizer"),
    Part(
        "text_encoder",
        "text",
        TextConfig,
        "text.ClipTextModel",
        "content",
        "transformers.CLIPTextModel",
        "model.safetensors",
    ),
    Part("unet", "content", UNetConfig, "unet.UNet", "content", "diffusers.UNet2DConditionModel"),
    Part("transformer", "content", DiTConfig, "dit.DiT"),
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
    ("transformer.in_channels", "vae.latent_channels"),
    ("transformer.in_channels", "autoencoder.channels"),
    ("vae.latent_channels", "autoencoder.channels"),
    ("motion.in_channels", "autoencoder.motion_channels"),
    ("motion.context_channels", "autoencoder.channels"),
    ("motion.text_width", "text_encoder.hidden_size"),
)
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
    return PARTS[name].network.from_pretrained(Path(folder) / name, dtype=dtype, device=device)


@lru_cache(maxsize=16)
def build_part(name: str, config: Any) -> Any:
    """Build one network of a model on the meta device."""
    from cmdgen.weights import build_empty

    return build_empty(PARTS[name].network, config)


def hash_weights(folder: Folder) -> str:
    """Return the hash that tells the weights of a model from others, wherever they are."""
    from cmdgen import weights

    files = {name: part.filename for name, part in NETWORKS.items()}
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
    evdm/, which is a model alone. A folder that is not ours, without autoencoder/ and motion/, is
    Stable Diffusion: a model of stills.
    """
    folder = Path(folder)
    index = read_index(folder)
    names = {name for name in PARTS if (folder / name).is_dir()}
    moves = "cmdgen" in index or bool(names & {"autoencoder", "motion"})
    # reading a part that is missing says so
    names |= {"scheduler"} if names & {"transformer", "evdm"} else {"scheduler", "unet"}
    names |= {"autoencoder", "motion"} if moves and "evdm" not in names else set()
    values: dict[str, Any] = {part.field: None for part in NETWORKS.values()}
    configs: dict[str, Any] = {}
    for name, part in PARTS.items():
        if name in names and part.config is not None:
            configs[name] = values[part.field] = read_config(folder / name, part.config)
    values["name"] = folder.resolve().name
    if not moves:
        values |= _describe_stills(folder.absolute(), values["content"], values["vae"])
    try:
        sampling = check_value(index.get("cmdgen", {}), dict, "cmdgen")
        sampling = {key: value for key, value in sampling.items() if key in _SAMPLING}
        values |= check_fields(ModelConfig, sampling)
    except ValueError as error:
        raise ValueError(f"{folder / 'model_index.json'}: {error}") from error
    check_agreement(folder, configs)
    return ModelConfig(**values)


def check_agreement(folder: Folder, configs: Mapping[str, Any]) -> None:
    """Raise ValueError where two parts of a model do not fit together."""
    for equation in _EQUAL:
        (name, _, key), (other, _, other_key) = (side.partition(".") for side in equation)
        got = getattr(configs.get(name), key, None)
        expected = getattr(configs.get(other), other_key, None)
        if None not in (got, expected) and got != expected:
            raise ValueError(f"{folder}: {key} of {name}/ is {got}, but {other_key} of {other}/ is {expected}")


def write_model_index(folder: Folder, model: ModelConfig) -> None:
    """Write model_index.json and the scheduler's configuration; the parts write themselves."""
    data: dict[str, Any] = {"_class_name": "EvdmPipeline" if isinstance(model.content, EvdmConfig) else "CmdPipeline"}
    if isinstance(model.content, UNetConfig):
        data = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            **{part.name: part.opens.split(".") for part in _ROWS if part.opens},
        }
    data["cmdgen"] = {key: getattr(model, key) for key in _SAMPLING}
    write_config(model.noise, Path(folder) / "scheduler")
    write_json(Path(folder) / "model_index.json", data)


def _describe_stills(
    folder: Path, content: UNetConfig | DiTConfig | EvdmConfig, vae: VaeConfig | None
) -> dict[str, Any]:
    """Return what Stable Diffusion's folder does not say: one frame, of the size of training."""
    side = content.sample_size if isinstance(content, UNetConfig) else 0
    side *= 1 if vae is None else vae.stride
    # a snapshot in the hub's cache lies in the folder of its repository
    repository = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name
    return {"name": repository.rpartition("--")[2], "frames": 1, "height": side, "width": side}
