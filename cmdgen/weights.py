"""Model folders in diffusers' layout: config.json files, safetensors, model_index.json.

What is read comes from strangers: every value is checked, and whatever is wrong is one line of
ValueError that names the file. What is written appears whole or not at all.
"""

import hashlib
import json
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from cmdgen import config as configurations
from cmdgen.config import (
    AutoencoderConfig,
    DiTConfig,
    ModelConfig,
    NoiseConfig,
    TextConfig,
    UNetConfig,
    VaeConfig,
    packaged_models,
)
from cmdgen.files import check_file, read_json, replace_with, write_json

Folder = str | os.PathLike[str]
# what weights are stored in
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# tensors that are copied before their file is mapped anew
_AT_ONCE = 8
# bytes of a hash of weights, and of so few weights that hashing them takes a moment
_DIGEST, _HASHED_AT_ONCE = 16, 2**26
C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

# what diffusers and transformers can vary and we cannot: written so, and refused otherwise
_FIXED: dict[type, dict[str, Any]] = {
    UNetConfig: {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": None,
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": 1,
    },
    VaeConfig: {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": "DownEncoderBlock2D",
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "shift_factor": None,
        "up_block_types": "UpDecoderBlock2D",
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    TextConfig: {"model_type": "clip_text_model"},
    NoiseConfig: {"rescale_betas_zero_snr": False, "thresholding": False, "trained_betas": None},
    AutoencoderConfig: {"_class_name": "CmdAutoencoder"},
    DiTConfig: {"_class_name": "DiT"},
}
# written for diffusers and transformers, never read
_WRITTEN: dict[type, dict[str, Any]] = {
    TextConfig: {"architectures": ["CLIPTextModel"], "bos_token_id": None, "pad_token_id": None},
    NoiseConfig: {"_class_name": "DDIMScheduler", "clip_sample": False},
}
# ours alone: written only where they are used, so that diffusers need not warn of them
_GATE = ("attention", "attention_features", "attention_threshold")
_CHOICES = {
    "attention": configurations.ATTENTIONS,
    "beta_schedule": ("linear", "scaled_linear"),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "hidden_act": ("quick_gelu", "gelu"),
    "importance": ("pixel", "patch"),
    "motion_activation": ("tanh", "linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "sampler": configurations.SAMPLERS,
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# smallest and largest value; other integers lie in 1 .. 2^20, other numbers in -10^6 .. 10^6
_RANGES = {
    "attention_features": (1, 2**14),
    "attention_threshold": (0, 1e6),
    "beta_end": (1e-9, 0.999),
    "beta_start": (1e-9, 0.999),
    "depth": (1, 256),
    "eos_token_id": (0, 2**20),
    "guidance": (0, 100),
    "layer_norm_eps": (1e-12, 1),
    "layers_per_block": (1, 256),
    "motion_guidance": (0, 100),
    "motion_std": (1e-6, 1e6),
    "num_hidden_layers": (1, 256),
    "scaling_factor": (1e-6, 1e6),
    "steps_offset": (0, 1000),
}
# the part of ModelConfig that model_index.json keeps under "cmdgen"
_OURS = (
    *("name", "frames", "height", "width", "fps"),
    *("sampler", "steps", "motion_steps", "guidance", "motion_guidance"),
)


def read_config(folder: Folder, cls: type[C]) -> C:
    """Read the configuration of one part of a model.

    Keys that we do not know are ignored; a value that we do not support is a ValueError.
    """
    path = Path(folder) / _config_name(cls)
    # schedulers of diffusers have infinities that we do not read
    data = read_json(path, finite=False)
    for key, only in _FIXED.get(cls, {}).items():
        values = data[key] if isinstance(data.get(key), list) else [data.get(key, only)]
        if any(
            value != only or isinstance(value, bool) != isinstance(only, bool) for value in values
        ):
            raise ValueError(f"{path}: {key} {short(data[key])} is not supported, only {only!r} is")
    return _parse(cls, data, path)


def write_config(config: object, folder: Folder) -> None:
    """Write the configuration of one part of a model, as diffusers or transformers would."""
    cls = type(config)
    data = {**_FIXED.get(cls, {}), **_WRITTEN.get(cls, {}), **asdict(config)}  # type: ignore[call-overload]
    if data.get("attention") == "softmax":
        data = {key: value for key, value in data.items() if key not in _GATE}
    if isinstance(config, VaeConfig):
        for key in ("down_block_types", "up_block_types"):
            data[key] = [data[key]] * len(config.block_out_channels)
    write_json(Path(folder) / _config_name(cls), data)


def load_weights(
    module: nn.Module,
    folder: Folder,
    filename: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rename: Callable[[str], str | None] | None = None,
) -> None:
    """Replace all tensors of a module, maybe on the meta device, by those of a safetensors file.

    `dtype` None keeps the module's own; filters of convolutions become channels-last. On a CPU what
    is stored as wanted is not read but mapped, and only what differs is copied. `rename` maps a
    stored name to the module's, or to None where the tensor is not wanted. A file named as
    diffusers' "fp16" variant, or in shards, is found too.
    """
    expected = module.state_dict()
    state: dict[str, torch.Tensor] = {}
    paths = weight_paths(Path(folder), filename)
    for path in paths:
        names = _match(path, expected, rename or str)
        dtypes = {stored: dtype or expected[name].dtype for stored, name in names.items()}
        for stored, tensor in _read_tensors(path, dtypes, device):
            state[names[stored]] = tensor
    missing = [name for name in expected if name not in state]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{paths[0]}: tensor {missing[0]}{more} is missing")
    module.load_state_dict(state, assign=True)
    assert not any(buffer.is_meta for buffer in module.buffers()), (
        "a buffer was left without values"
    )


@contextmanager
def open_weights(path: Path, device: torch.device | str = "cpu") -> Iterator[safe_open]:
    """Give an open safetensors file; ValueError names one that is missing or damaged."""
    check_file(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"{path}: No such file or directory") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _match(
    path: Path, expected: dict[str, torch.Tensor], rename: Callable[[str], str | None]
) -> dict[str, str]:
    """The names of a file's tensors to those of the module's, which have their shapes."""
    names = {}
    with open_weights(path) as file:
        for stored in file.keys():  # noqa: SIM118
            name = rename(stored)
            if name is None:
                continue
            if name not in expected:
                raise ValueError(f"{path}: tensor {short(stored)} is not part of the model")
            got, wanted = file.get_slice(stored).get_shape(), list(expected[name].shape)
            if got != wanted:
                raise ValueError(f"{path}: {name} has shape {got}, expected {wanted}")
            kind = file.get_slice(stored).get_dtype()
            if kind not in FLOATS and expected[name].is_floating_point():
                raise ValueError(f"{path}: {name} has type {kind}, not one of {', '.join(FLOATS)}")
            names[stored] = name
    return names


def _read_tensors(
    path: Path, dtypes: dict[str, torch.dtype], device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file in the types asked for, filters channels-last."""
    names = list(dtypes)
    with open_weights(path) as mapped:
        for start in range(0, len(names), _AT_ONCE):
            # closing it unmaps what was copied from it
            with open_weights(path, device) as file:
                for name in names[start : start + _AT_ONCE]:
                    read = file.get_tensor(name)
                    layout = torch.channels_last if read.ndim == 4 else torch.preserve_format
                    tensor = read.to(dtypes[name], memory_format=layout)
                    stays = tensor is read and read.device.type == "cpu"
                    yield name, mapped.get_tensor(name) if stays else tensor


def save_weights(
    module: nn.Module, folder: Folder, filename: str, dtype: torch.dtype | None = None
) -> None:
    """Write all tensors of a module, floating ones cast to `dtype`, to a safetensors file."""
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in module.state_dict().items()
    }
    path = Path(folder) / filename
    with replace_with(path) as temporary:
        try:
            save_file(state, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error


class _NoInitialisation(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device its `normal_` would import torch's compiler first."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build_empty(build: Callable[[C], M], config: C) -> M:
    """Build a module on the meta device: its names and shapes, no values and no memory."""
    with torch.device("meta"), _NoInitialisation():
        return build(config)


def load_model(
    build: Callable[[C], M],
    config_type: type[C],
    folder: Folder,
    filename: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rename: Callable[[str], str | None] | None = None,
) -> M:
    """Build a module from its folder, in evaluation mode; nothing is initialised first."""
    config = read_config(folder, config_type)
    try:
        model = build_empty(build, config)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / _config_name(config_type)}: {error}") from error
    load_weights(model, folder, filename, dtype=dtype, device=device, rename=rename)
    return model.eval()


def save_model(
    model: nn.Module,
    config: object,
    folder: Folder,
    filename: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the folder that `load_model` reads."""
    save_weights(model, folder, filename, dtype)
    write_config(config, folder)


def resolve_model(name: Folder) -> Path:
    """The folder of a model given by the name of a packaged one or by its path."""
    packaged = packaged_models()
    folder = packaged.get(str(name), Path(name))
    if not (folder / "model_index.json").is_file():
        known = ", ".join(packaged) or "no packaged model"
        raise ValueError(
            f"unknown model {str(name)!r}: expected {known} or a folder with model_index.json"
        )
    return folder


def load_model_index(folder: Folder) -> dict[str, Any]:
    """The contents of model_index.json."""
    return read_json(Path(folder) / "model_index.json")


def read_model(folder: Folder) -> ModelConfig:
    """Read what a whole model is from model_index.json and the config.json of its parts.

    The content model is a UNet in unet/, or a class-conditional DiT in transformer/. A folder that
    is not ours, without autoencoder/ and motion/, is Stable Diffusion: a model of stills.
    """
    folder = Path(folder)
    path = folder / "model_index.json"
    index = load_model_index(folder)
    ours = index.get("cmdgen", {})
    if not isinstance(ours, dict):
        raise ValueError(f"{path}: cmdgen {short(ours)} is not an object")
    moves = "cmdgen" in index or any((folder / part).is_dir() for part in ("autoencoder", "motion"))
    content: UNetConfig | DiTConfig
    if (folder / "transformer").is_dir():
        content = read_config(folder / "transformer", DiTConfig)
    else:
        content = read_config(folder / "unet", UNetConfig)
    has_text, has_vae = (folder / "text_encoder").is_dir(), (folder / "vae").is_dir()
    vae = read_config(folder / "vae", VaeConfig) if has_vae else None
    parts: dict[str, Any] = {
        "name": folder.resolve().name,
        "text": read_config(folder / "text_encoder", TextConfig) if has_text else None,
        "content": content,
        "vae": vae,
        "autoencoder": read_config(folder / "autoencoder", AutoencoderConfig) if moves else None,
        "motion": read_config(folder / "motion", DiTConfig) if moves else None,
        "noise": read_config(folder / "scheduler", NoiseConfig),
    }
    if not moves:
        # the size that it was trained at; a snapshot of the hub's cache lies in its repository
        side = content.sample_size if isinstance(content, UNetConfig) else 0
        side *= 1 if vae is None else vae.stride
        place = folder.absolute()
        repository = place.parent.parent.name if place.parent.name == "snapshots" else place.name
        name = repository.rpartition("--")[2]
        parts |= {"name": name, "frames": 1, "height": side, "width": side}
    hints = get_type_hints(ModelConfig)
    parts |= {key: _check(ours[key], hints[key], key, path) for key in _OURS if key in ours}
    model = ModelConfig(**parts)
    _check_fit(model, folder)
    return model


def write_model_index(folder: Folder, model: ModelConfig) -> None:
    """Write model_index.json and the scheduler's configuration; the parts write themselves."""
    data: dict[str, Any] = {"_class_name": "CmdPipeline"}
    if isinstance(model.content, UNetConfig):
        data = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
    data["cmdgen"] = {key: getattr(model, key) for key in _OURS}
    write_config(model.noise, Path(folder) / "scheduler")
    write_json(Path(folder) / "model_index.json", data)


def _config_name(cls: type) -> str:
    return "scheduler_config.json" if cls is NoiseConfig else "config.json"


def weight_paths(folder: Path, filename: str) -> list[Path]:
    """The files that hold a part's weights: one, its "fp16" variant or its shards.

    Without any of them the one that is missing.
    """
    variant = f"{filename.removesuffix('.safetensors')}.fp16.safetensors"
    for path in (folder / filename, folder / variant):
        if path.is_file():
            return [path]
    # the index of a variant has been named either way
    indices = (f"{filename}.index.json", f"{filename}.index.fp16.json", f"{variant}.index.json")
    index = next((path for name in indices if (path := folder / name).is_file()), None)
    if index is None:
        return [folder / filename]
    shards = read_json(index).get("weight_map")
    names = shards.values() if isinstance(shards, dict) else [None]
    if not all(isinstance(name, str) and name and name == Path(name).name for name in names):
        raise ValueError(
            f"{index}: weight_map does not map tensors to names of files in the folder"
        )
    return [folder / name for name in sorted(set(names))] or [folder / filename]


def hash_weights(folder: Folder, files: Mapping[str, str]) -> str:
    """BLAKE2b of weights: of the parts of a folder and their files, in the order of their names.

    Of more than a moment's reading, what was found is kept in the user's cache, for as long as the
    files have their sizes and times. ValueError names a file that cannot be read.
    """
    folder = Path(folder).resolve()
    paths = [
        path
        for part in sorted(files)
        if (folder / part).is_dir()
        for path in weight_paths(folder / part, files[part])
    ]
    for path in paths:
        check_file(path)
    try:
        state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        note = None
        if sum(size for _, size, _ in state) >= _HASHED_AT_ONCE:
            from platformdirs import user_cache_path

            key = hashlib.blake2b(json.dumps(state).encode(), digest_size=16).hexdigest()
            note = user_cache_path("cmdgen") / "weights" / key
        if note is not None and note.is_file():
            kept = note.read_text(errors="replace")
            if re.fullmatch(f"[0-9a-f]{{{2 * _DIGEST}}}", kept):
                return kept
        total = hashlib.blake2b(digest_size=_DIGEST)
        for path in paths:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST))
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + digest.digest())
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    if note is not None:
        # a cache that cannot be written is none
        with suppress(OSError), replace_with(note) as temporary:
            temporary.write_text(total.hexdigest())
    return total.hexdigest()


def _parse(cls: type[C], data: dict[str, Any], path: Path) -> C:
    """An instance of a configuration class from the keys of `data` that it knows."""
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls) if field.name in data]  # type: ignore[arg-type]
    return cls(**{name: _check(data[name], hints[name], name, path) for name in names})


def _check(value: Any, hint: Any, key: str, path: Path) -> Any:
    """`value` as the type that `hint` names, or a ValueError; JSON's lists become tuples."""
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not types.NoneType]
        if value is None and len(options) < len(get_args(hint)):
            return None
        # the tuple form of `int | tuple[int, ...]` is meant by a list, else the plain one
        hint = next(
            (o for o in options if (get_origin(o) is tuple) == isinstance(value, list)), options[0]
        )
    if get_origin(hint) is tuple and isinstance(value, list) and value:
        item = get_args(hint)[0]
        # names alone build nothing; anything else may be a layer each
        most = 4096 if item is str and key not in _CHOICES else 64
        if len(value) > most:
            raise ValueError(f"{path}: {key} has {len(value)} entries, at most {most} are read")
        return tuple(_check(each, item, key, path) for each in value)
    if is_dataclass(hint) and isinstance(value, dict):
        return _parse(hint, value, path)  # type: ignore[arg-type]
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    wanted = expected.get(hint, "a list" if get_origin(hint) is tuple else "an object")
    if hint is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not hint:
        raise ValueError(f"{path}: {key} {short(value)} is not {wanted}")
    if key in _CHOICES and value not in _CHOICES[key]:
        known = ", ".join(_CHOICES[key])
        raise ValueError(f"{path}: {key} {short(value)} is not supported, expected one of {known}")
    if hint in (int, float):
        low, high = _RANGES.get(key, (1, 2**20) if hint is int else (-1e6, 1e6))
        # neither an infinity nor what is no number
        if not low <= value <= high:
            raise ValueError(f"{path}: {key} {short(value)} is not between {low} and {high}")
    return value


def _check_fit(model: ModelConfig, folder: Path) -> None:
    """The parts of a model agree where they meet."""
    text, vae, content, motion = model.text, model.vae, model.content, model.motion
    # what takes so many channels, how many, whose, how many those are
    facts: list[tuple[str, int | None, str, int]] = []
    if (autoencoder := model.autoencoder) is not None:
        facts += [("content", content.in_channels, "autoencoder's channels", autoencoder.channels)]
        if vae is not None:
            facts += [("vae", vae.latent_channels, "autoencoder's channels", autoencoder.channels)]
        if motion is not None:
            between = autoencoder.motion_channels, autoencoder.channels
            facts += [
                ("motion", motion.in_channels, "autoencoder's motion_channels", between[0]),
                ("motion context", motion.context_channels, "autoencoder's channels", between[1]),
            ]
    elif vae is not None:
        facts += [("content", content.in_channels, "vae's latent_channels", vae.latent_channels)]
    if isinstance(content, UNetConfig):
        facts += [("content", content.in_channels, "its out_channels", content.out_channels)]
    if text is not None:
        if isinstance(content, UNetConfig):
            facts += [
                ("content", content.cross_attention_dim, "text hidden_size", text.hidden_size)
            ]
        if motion is not None:
            facts += [("motion", motion.text_width, "text hidden_size", text.hidden_size)]
    for part, got, other, expected in facts:
        if got not in (expected, None):
            raise ValueError(f"{folder}: {part} takes {got} channels, {other} is {expected}")
