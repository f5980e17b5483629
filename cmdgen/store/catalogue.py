"""What a model consists of; and whole models with random weights.

Configurations and the headers of weight files are read, weights never are.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from cmdgen.config import PRESETS, ModelConfig, TextConfig
from cmdgen.files import create_folder
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.schema import read_config
from cmdgen.store.parts import NETWORKS, PARTS, build_part, network_configs, read_index, write_model_index
from cmdgen.weights import FLOATS, match_weights, open_weights, weight_paths
from cmdgen.world.config import WORLD
from cmdgen.world.world import World

# fields of the data or of older files, not of the network: they may differ from a preset's
_FREE = ("sample_size", "scaling_factor", "eos_token_id", "motion_mean", "motion_std")
# captions that the tokenizer of a random model learns from, and wordings of each
_CAPTIONS, _WORDINGS = 2048, 2


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


def describe_preset(model: ModelConfig, *, dtype: torch.dtype = torch.float16) -> Model:
    """Describe the parts of a preset, counted on the meta device."""
    parts = []
    for name, config in network_configs(model).items():
        count = _count(build_part(name, config))
        size = count * dtype.itemsize
        parts.append(Network(name, count, size, _name(dtype), _presets(name, config)))
    return Model(model.name, None, None, tuple(parts))


def describe_folder(folder: Path, name: str) -> Model:
    """Describe the parts of a model in a folder; ValueError names a file that is wrong."""
    configs = check_folder(folder)
    parts = [_describe_network(folder / part, part, config) for part, config in configs.items()]
    return Model(name, folder, read_licence(folder), tuple(parts))


def check_folder(folder: Path) -> dict[str, Any]:
    """Return the configurations of the networks in a folder, whose weights may be missing.

    ValueError names a file that is missing, or that describes a network that we cannot build.
    """
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
    for name, config in networks.items():
        try:
            build_part(name, config)
        except ValueError as error:
            raise ValueError(f"{folder / name / 'config.json'}: {error}") from error
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
    return "".join(letter for letter in licence if letter.isprintable())[:80] or None


def create_model(model: ModelConfig, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16) -> None:
    """Write a whole model folder with random weights, those that training starts from.

    Parts are drawn in float32 and written one after the other: `dtype` changes precision alone,
    and memory holds one part. The tokenizer is a byte-pair one of our own, learned from the
    rendered world's captions; CLIP's is not ours to write. ValueError where `folder` exists.
    """
    with create_folder(folder) as target:
        for name, config in network_configs(model).items():
            digest = hashlib.blake2b(f"{name}/{seed}".encode(), digest_size=8).digest()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(digest, "big", signed=True))
                network = PARTS[name].network(config)
            # in place, tensor by tensor: a cast while saving would hold both copies
            network.to(dtype).save_pretrained(target / name)
            del network
        card = _CARD.format(name=model.name, seed=seed, dtype=_name(dtype))
        if model.text is not None:
            length = model.text.max_position_embeddings
            _train_tokenizer(model.text).save_pretrained(target / "tokenizer", length=length)
            card += "The tokenizer is cmdgen's own, learned from its rendered world's captions.\n"
        write_model_index(target, model)
        (target / "README.md").write_text(card, encoding="utf-8")


_CARD = """# {name} with random weights

Never trained: its videos are noise. It takes the time and memory of a trained model.
Written by `cmdgen models init {name} --seed {seed} --dtype {dtype}`.
"""


def _describe_network(place: Path, name: str, config: Any) -> Network:
    network, expected = PARTS[name].network, build_part(name, config)
    paths = weight_paths(place, network.filename)
    if not paths[0].is_file() and any(place.glob("*.bin")):
        raise ValueError(
            f"{place}: the weights are pickled, and reading those could run any code: expected {network.filename}"
        )
    matched = match_weights(expected.state_dict(), place, network.filename, network.rename_stored)
    dtypes = set()
    for path, names in matched.items():
        with open_weights(path) as file:
            dtypes |= {FLOATS.get(file.get_slice(key).get_dtype(), "") for key in names}
    size = sum(path.stat().st_size for path in matched)
    dtype = ", ".join(sorted(dtypes - {""}))
    return Network(name, _count(expected), size, dtype, _presets(name, config))


def _count(network: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in network.state_dict().values())


def _presets(name: str, config: Any) -> tuple[str, ...]:
    """Return the presets that have a part of this configuration."""
    others = {preset: network_configs(model).get(name) for preset, model in PRESETS.items()}
    free = [key for key in _FREE if hasattr(config, key)]
    return tuple(
        preset
        for preset, other in others.items()
        if other and replace(config, **{key: getattr(other, key) for key in free}) == other
    )


def _train_tokenizer(config: TextConfig) -> Tokenizer:
    """Train a tokenizer whose special tokens have the ids that the text encoder expects."""
    world = World(WORLD)
    indices = world.indices("train", _CAPTIONS)
    wordings = [world.captions(indices, wording) for wording in range(_WORDINGS)]
    learned = Tokenizer.train(chain.from_iterable(wordings), config.vocab_size)
    shift = config.eos_token_id - learned.eos_id
    special = learned.bos_id, learned.eos_id
    vocab = {token: number + shift if number in special else number for token, number in learned.vocab.items()}
    assert len(set(vocab.values())) == len(vocab), "two tokens have one id"
    # no record of words: these weights have seen none
    return Tokenizer(vocab, learned.merges)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
