"""What models there are and what they consist of; and whole models with random weights.

Configurations and the headers of weight files are read, weights never are.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmdgen.config import (
    PRESETS,
    AutoencoderConfig,
    DiTConfig,
    ModelConfig,
    NoiseConfig,
    TextConfig,
    UNetConfig,
    VaeConfig,
)
from cmdgen.files import create_folder
from cmdgen.models import autoencoder, dit, text, unet, vae
from cmdgen.weights import (
    FLOATS,
    build_empty,
    load_model_index,
    open_weights,
    read_config,
    weight_paths,
    write_model_index,
)
from cmdgen.world.config import WORLD
from cmdgen.world.world import World

# folder of a part -> its configuration, what it builds, the file of its weights
PARTS: dict[str, tuple[type, Callable[[Any], nn.Module], str]] = {
    "text_encoder": (TextConfig, text.ClipTextModel, text.FILENAME),
    "unet": (UNetConfig, unet.UNet, unet.FILENAME),
    "transformer": (DiTConfig, dit.DiT, dit.FILENAME),
    "vae": (VaeConfig, vae.KlVae, vae.FILENAME),
    "autoencoder": (AutoencoderConfig, autoencoder.CmdAutoencoder, autoencoder.FILENAME),
    "motion": (DiTConfig, dit.DiT, dit.FILENAME),
}
# of the data or of older files, not of the network: they may differ from a preset's
_FREE = ("sample_size", "scaling_factor", "eos_token_id", "motion_mean", "motion_std")
# captions that the tokenizer of a random model learns from, each in so many wordings
_CAPTIONS, _WORDINGS = 2048, 2


@dataclass(frozen=True)
class Part:
    """One network of a model."""

    name: str
    parameters: int
    bytes: int
    dtype: str
    # names of the presets that it is a part of
    presets: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A model folder, or a preset: no folder, counted as `create_model` writes it."""

    name: str
    folder: Path | None
    licence: str | None
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """Of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(part.bytes for part in self.parts)

    @property
    def presets(self) -> tuple[str, ...]:
        """Names of the presets that all parts are of."""
        return tuple(name for name in PRESETS if all(name in part.presets for part in self.parts))


def configurations(model: ModelConfig) -> dict[str, Any]:
    """The configurations of a model's networks, by folder."""
    content = "unet" if isinstance(model.content, UNetConfig) else "transformer"
    configs = {
        "text_encoder": model.text,
        content: model.content,
        "vae": model.vae,
        "autoencoder": model.autoencoder,
        "motion": model.motion,
    }
    return {name: config for name, config in configs.items() if config is not None}


def describe_preset(model: ModelConfig, *, dtype: torch.dtype = torch.float16) -> Model:
    """The parts of a preset, counted on the meta device."""
    counts = {name: _count(name, config) for name, config in configurations(model).items()}
    parts = [
        Part(name, n, n * dtype.itemsize, _name(dtype), _presets(name, configurations(model)[name]))
        for name, n in counts.items()
    ]
    return Model(model.name, None, None, tuple(parts))


def describe_folder(folder: Path, name: str) -> Model:
    """The parts of a model in a folder; ValueError names a file that is wrong or missing."""
    configs = read_configurations(folder)
    parts = [_describe_part(folder / part, part, config) for part, config in configs.items()]
    return Model(name, folder, read_licence(folder), tuple(parts))


def read_configurations(folder: Path) -> dict[str, Any]:
    """The configurations of the networks in a folder, its weights there or not.

    ValueError names a file that is missing, or that asks for what we cannot build.
    """
    index = load_model_index(folder)
    for part in ("scheduler", "tokenizer", *PARTS):
        listed = index.get(part)
        if isinstance(listed, list) and any(listed) and not (folder / part).is_dir():
            raise ValueError(f"{folder}: {part}/ is missing, model_index.json lists it")
    if (folder / "scheduler").is_dir():
        read_config(folder / "scheduler", NoiseConfig)
    configs: dict[str, Any] = {
        part: read_config(folder / part, cls)
        for part, (cls, _, _) in PARTS.items()
        if (folder / part).is_dir()
    }
    if not configs:
        raise ValueError(f"{folder} has none of the parts {', '.join(PARTS)}")
    for part, config in configs.items():
        try:
            _count(part, config)
        except ValueError as error:
            raise ValueError(f"{folder / part / 'config.json'}: {error}") from error
    return configs


def read_licence(folder: Path) -> str | None:
    """What the model card, README.md, says in its header; None where it does not."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    header = re.match(r"---\s*\n(.*?)\n---", card[:100_000], re.DOTALL)
    lines = header.group(1).splitlines() if header else []
    found = dict(line.split(":", 1) for line in lines if re.match(r"license(_name)?:", line))
    values = {key: value.strip().strip("\"'") for key, value in found.items()}
    licence = values.get("license")
    if licence == "other":
        licence = values.get("license_name", licence)
    # goes to a terminal as it is
    shown = "".join(letter for letter in licence or "" if letter.isprintable())
    return shown[:80] or None


def create_model(
    model: ModelConfig, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16
) -> None:
    """Write a whole model folder with random weights, those that training starts from.

    Parts are drawn in float32 and written one after the other: `dtype` changes precision alone,
    and memory holds one part. The tokenizer is a byte-pair one of our own, learned from the
    rendered world's captions; CLIP's is not ours to write. ValueError where `folder` is taken.
    """
    with create_folder(folder) as target:
        for name, config in configurations(model).items():
            _, build, _ = PARTS[name]
            digest = hashlib.blake2b(f"{name}/{seed}".encode(), digest_size=8).digest()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(digest, "big", signed=True))
                part: Any = build(config)
            # in place, tensor by tensor: a cast while saving would hold both copies
            part.to(dtype).save_pretrained(target / name)
            del part
        if model.text is not None:
            tokenizer = _train_tokenizer(model.text)
            tokenizer.save_pretrained(
                target / "tokenizer", length=model.text.max_position_embeddings
            )
        write_model_index(target, model)
        (target / "README.md").write_text(_card(model, seed, dtype), encoding="utf-8")


def _describe_part(place: Path, name: str, config: Any) -> Part:
    filename, expected = PARTS[name][2], _count(name, config)
    paths = weight_paths(place, filename)
    if not paths[0].is_file() and any(place.glob("*.bin")):
        raise ValueError(
            f"{place}: the weights are pickled, and reading those could run any code: "
            f"expected {filename}"
        )
    count, dtypes = 0, set()
    for path in paths:
        for kind, shape in _read_header(path):
            # old text encoders keep their positions, whole numbers, among the weights
            if kind in FLOATS:
                count += torch.Size(shape).numel()
                dtypes.add(FLOATS[kind])
    if count != expected:
        raise ValueError(
            f"{paths[0]}: {count:,} parameters, {place / 'config.json'} means {expected:,}"
        )
    size = sum(path.stat().st_size for path in paths)
    return Part(name, count, size, ", ".join(sorted(dtypes)), _presets(name, config))


def _read_header(path: Path) -> list[tuple[str, list[int]]]:
    """Type and shape of each tensor in a safetensors file."""
    with open_weights(path) as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        return [(part.get_dtype(), part.get_shape()) for part in slices]


@cache
def _count(name: str, config: Any) -> int:
    _, build, _ = PARTS[name]
    return sum(tensor.numel() for tensor in build_empty(build, config).state_dict().values())


def _presets(name: str, config: Any) -> tuple[str, ...]:
    """The presets that a part of this configuration is of."""
    known = {preset: configurations(PRESETS[preset]).get(name) for preset in PRESETS}
    return tuple(
        preset for preset, other in known.items() if other and _bound(other) == _bound(config)
    )


def _bound(config: Any) -> Any:
    """A configuration without what may differ."""
    defaults = type(config)()
    free = {key: getattr(defaults, key) for key in _FREE if hasattr(defaults, key)}
    return replace(config, **free)


def _train_tokenizer(config: TextConfig) -> text.Tokenizer:
    """A tokenizer whose special tokens have the ids that the text encoder expects."""
    world = World(WORLD)
    indices = world.indices("train", _CAPTIONS)
    captions = [
        caption for wording in range(_WORDINGS) for caption in world.captions(indices, wording)
    ]
    learned = text.Tokenizer.train(captions, config.vocab_size)
    first, last = learned.bos_id, learned.eos_id
    shift = config.eos_token_id - last
    moved = {first: first + shift, last: last + shift}
    vocab = {token: moved.get(number, number) for token, number in learned.vocab.items()}
    assert len(set(vocab.values())) == len(vocab), "two tokens of one id"
    # without a record of words: these weights have seen none
    return text.Tokenizer(vocab, learned.merges)


def _card(model: ModelConfig, seed: int, dtype: torch.dtype) -> str:
    lines = [
        f"# {model.name} with random weights",
        "",
        "Never trained: what it makes is noise. It takes the time and memory of a trained model.",
        f"Written by `cmdgen models init {model.name} --seed {seed} --dtype {_name(dtype)}`.",
    ]
    if model.text is not None:
        lines.append("The tokenizer is cmdgen's own, learned from its rendered world's captions.")
    return "\n".join(lines) + "\n"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
