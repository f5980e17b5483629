"""What a model consists of.

Configurations and the headers of weight files are read, weights never are. Imports torch only where
a network is built, to compare it with its files.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cmdgen.config import PRESETS, PUBLIC, ModelConfig
from cmdgen.files import blame
from cmdgen.headers import FLOATS, open_weights, weight_paths
from cmdgen.schema import read_config, read_counts
from cmdgen.store.parts import NETWORKS, PARTS, build_part, load_part, network_configs, read_index, read_model

# fields of the data or of older files, not of the network: they may differ from a preset's
_FREE = ("sample_size", "scaling_factor", "eos_token_id", "motion_mean", "motion_std")
# bytes of a weight
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Network:
    """One network of a model: what it weighs."""

    name: str
    parameters: int
    bytes: int
    dtype: str
    # names of the presets that have a part of this configuration
    presets: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A model folder, or a preset: no folder, counted as `create_model` writes it."""

    name: str
    folder: Path | None
    licence: str | None
    parts: tuple[Network, ...]

    @property
    def parameters(self) -> int:
        """Sum of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """Sum of all weights."""
        return sum(part.bytes for part in self.parts)

    @property
    def presets(self) -> tuple[str, ...]:
        """Names of the presets that all parts fit."""
        return tuple(name for name in PRESETS if all(name in part.presets for part in self.parts))


def describe_preset(model: ModelConfig, *, dtype: str = "float16") -> Model:
    """Describe the parts of a preset; those of any other configuration are counted on the meta device."""
    counts, parts = read_counts() if (PRESETS | PUBLIC).get(model.name) == model else {}, []
    for name, config in network_configs(model).items():
        count = counts[model.name][name] if counts else count_part(name, config)
        parts.append(Network(name, count, count * SIZES[dtype], dtype, _presets(name, config)))
    return Model(model.name, None, None, tuple(parts))


def describe_folder(folder: Path, name: str) -> Model:
    """Describe the parts of a model in a folder by their headers; ValueError names a file that is wrong."""
    parts = [_describe_network(folder / part, part, config) for part, config in _read_configs(folder).items()]
    return Model(name, folder, read_licence(folder), tuple(parts))


def check_folder(folder: Path, *, weights: bool = False) -> None:
    """Build the networks of a folder on the meta device; with `weights`, compare them with their files.

    ValueError names a file that is missing or wrong, or that describes a network that we cannot build.
    """
    for name, config in _read_configs(folder).items():
        with blame(folder / name / "config.json"):
            network = build_part(name, config)
        if weights:
            from cmdgen.weights import match_weights

            match_weights(network.state_dict(), folder / name, network.filename, network.rename_stored)


def check_prediction(folder: Path) -> None:
    """Raise ValueError where the UNet of a folder predicts something else than its scheduler says.

    It runs once, for what others wrote: sampling does not ask.
    """
    model = read_model(folder)
    expected, predicts = (model.still_noise or model.noise).prediction_type, recognise(folder, model)
    if predicts not in (expected, None):
        path = folder / "scheduler" / "scheduler_config.json"
        raise ValueError(f"{path}: prediction_type is {expected}, but unet/ predicts {predicts}: correct it")


def recognise(folder: Path, model: ModelConfig) -> str | None:
    """Tell what the UNet of a folder predicts, by one run of it; see `recognise_prediction`."""
    import torch

    from cmdgen.diffusion.parametrisation import recognise_prediction
    from cmdgen.models.tokenizer import Tokenizer

    unet, text = (load_part(folder, name, dtype=torch.float32) for name in ("unet", "text_encoder"))
    ids = Tokenizer.from_pretrained(folder / "tokenizer")([""], text.config.max_position_embeddings)
    # a few positions tell what is predicted of noise
    side = 2 ** len(unet.config.block_out_channels)
    noise = torch.randn(1, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = text(ids).last_hidden_state
        return recognise_prediction(
            lambda x, t: unet(x, t, states.expand(len(x), -1, -1)), noise, model.still_noise or model.noise
        )


def verify_folder(folder: Path) -> tuple[int, int]:
    """Read all weights of a folder; return how many files are what they were by their digests, and how many there are.

    ValueError names one that is damaged.
    """
    from cmdgen.weights import verify_weights

    paths = [path for name in _read_configs(folder) for path in weight_paths(folder / name, NETWORKS[name].filename)]
    return sum(map(verify_weights, paths)), len(paths)


def _read_configs(folder: Path) -> dict[str, Any]:
    """Return the configurations of the networks in a folder, whose weights may be missing."""
    index = read_index(folder)
    configs: dict[str, Any] = {}
    for name, part in PARTS.items():
        listed = index.get(name)
        if not (folder / name).is_dir():
            if isinstance(listed, list) and any(listed):
                raise ValueError(f"{folder}: {name}/ is missing, model_index.json lists it")
        elif part.config is not None:
            configs[name] = read_config(folder / name, part.config)
    networks = {name: config for name, config in configs.items() if name in NETWORKS}
    if not networks:
        raise ValueError(f"{folder} has none of the parts {', '.join(NETWORKS)}")
    return networks


def read_licence(folder: Path) -> str | None:
    """Read the licence in the header of the model card, README.md, if it has one."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            start = file.read(100_000)
    except OSError:
        return None
    header = re.match(r"---\s*\n(.*?)\n---", start, re.DOTALL)
    lines = re.findall(r"^(license(?:_name)?):(.*)", header[1] if header else "", re.MULTILINE)
    values = {key: value.strip().strip("\"'") for key, value in lines}
    licence = values.get("license", "")
    if licence == "other":
        licence = values.get("license_name", licence)
    # it goes to a terminal as it is
    return "".join(letter for letter in licence if letter.isprintable())[:200] or None


def _describe_network(place: Path, name: str, config: Any) -> Network:
    paths, count, dtypes = weight_paths(place, PARTS[name].filename), 0, set()
    for path in paths:
        with open_weights(path) as file:
            # integers are buffers of old files
            tensors = [part for key in file.keys() if (part := file.get_slice(key)).get_dtype() in FLOATS]  # noqa: SIM118
            count += sum(math.prod(part.get_shape()) for part in tensors)
            dtypes |= {FLOATS[part.get_dtype()] for part in tensors}
    size = sum(path.stat().st_size for path in paths)
    return Network(name, count, size, ", ".join(sorted(dtypes)), _presets(name, config))


def count_part(name: str, config: Any) -> int:
    """Return the number of parameters of one network, counted on the meta device."""
    return sum(tensor.numel() for tensor in build_part(name, config).state_dict().values())


def _presets(name: str, config: Any) -> tuple[str, ...]:
    """Return the presets that have a part of this configuration."""
    others = {preset: network_configs(model).get(name) for preset, model in PRESETS.items()}
    free = [key for key in _FREE if hasattr(config, key)]
    return tuple(
        preset
        for preset, other in others.items()
        if other and replace(config, **{key: getattr(other, key) for key in free}) == other
    )
