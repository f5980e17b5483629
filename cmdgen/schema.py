"""Untrusted JSON as frozen dataclasses: every value is checked against its type and range.

assets/configs.json has the tables. It lists the keys of diffusers and transformers that have no
field here: "fixed" keys are written with the one value that we support, or a value of a list is
read, and any other is refused; "written" keys are never read. "variants" are other classes of
theirs that a configuration of ours describes, too, by `_class_name`: the values of our fields that
such a class has in its code, other names of keys and of blocks, and what is fixed there. "ranges"
are the smallest and largest values of fields; other integers lie in 1 .. 2^20, other numbers in
-10^6 .. 10^6. "parameters" counts those of each preset, so that listing them builds nothing. Never
imports torch.
"""

import os
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from cmdgen.config import ATTENTIONS, SAMPLERS, SOLVERS, TEMPORAL, NoiseConfig, VaeConfig, each_level
from cmdgen.files import blame, read_json, write_json

Folder = str | os.PathLike[str]
C = TypeVar("C")

# written only where they are not the default, so that diffusers need not warn of them
_OPTIONAL = {
    *("attention", "attention_features", "attention_threshold", "mid_block_type", "num_frames", "sigma_max"),
    *("sigma_min", "solver", "temporal", "timestep_type"),
}
_CHOICES = {
    "activation": ("relu", "silu"),
    "attention": ATTENTIONS,
    "beta_schedule": ("linear", "scaled_linear"),
    "block": ("evdm", "mcvd"),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "hidden_act": ("quick_gelu", "gelu"),
    "importance": ("pixel", "patch"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "modulation": ("full", "half"),
    "motion_activation": ("tanh", "linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "sampler": SAMPLERS,
    "solver": SOLVERS,
    "temporal": TEMPORAL,
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "timestep_type": ("discrete", "continuous"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_BLOCKS = {"down_block_types", "up_block_types"}
# in all blocks of a network, each of which takes time to build: Stable Diffusion has 8
_MOST_LAYERS = 256
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def config_path(folder: Folder, cls: type) -> Path:
    """Return the file that holds the configuration of one part of a model."""
    return Path(folder) / ("scheduler_config.json" if cls is NoiseConfig else "config.json")


def read_config(folder: Folder, cls: type[C]) -> C:
    """Read the configuration of one part of a model.

    Unknown keys are ignored; an unsupported value is a ValueError that names the file.
    """
    path = config_path(folder, cls)
    # schedulers of diffusers hold infinities under keys that we do not read
    data = read_json(path, finite=False)
    variants = _tables()["variants"].get(cls.__name__, {})
    variant = variants.get(str(data.get("_class_name")), {})
    fixed = variant.get("fixed", _tables()["fixed"].get(cls.__name__, {}))
    with blame(path):
        for key, only in fixed.items():
            possible = only if isinstance(only, list) else [only]
            values = data[key] if isinstance(data.get(key), list) else [data.get(key, possible[0])]
            # True equals 1, but is not what is meant
            if any(
                (value, type(value) is bool) not in [(one, type(one) is bool) for one in possible] for value in values
            ):
                expected = ", ".join(map(repr, possible))
                raise ValueError(
                    f"{key} {short(data[key])} is not supported, only {expected} {'are' if possible[1:] else 'is'}"
                )
        config = cls(**check_fields(cls, _read_variant(data, variant)))
        widths, layers = getattr(config, "block_out_channels", ()), getattr(config, "layers_per_block", 1)
        if sum(each_level(layers, widths)) > _MOST_LAYERS:
            raise ValueError(f"{len(widths)} blocks of {layers} layers are more than {_MOST_LAYERS} layers")
        return config


def _read_variant(data: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """Return what a class of theirs says, under the names that it has here."""
    data = {**data, **variant.get("values", {})}
    for ours, theirs in variant.get("renamed", {}).items():
        if theirs in data:
            data[ours] = data[theirs]
    for key in _BLOCKS:
        if "blocks" in variant and isinstance(data.get(key), list):
            data[key] = [str(kind).replace(variant["blocks"], "2D") for kind in data[key]]
    return data


def class_name(config: object) -> str | None:
    """Return the class of theirs that a configuration describes, where its values decide."""
    variants = _tables()["variants"].get(type(config).__name__, {}).items()
    fitting = (
        name
        for name, variant in variants
        if variant["values"] and all(getattr(config, key) == value for key, value in variant["values"].items())
    )
    return next(fitting, None)


def write_config(config: object, folder: Folder) -> None:
    """Write the configuration of one part of a model, as diffusers or transformers would."""
    cls: Any = type(config)
    fixed, written = (_tables()[kind].get(cls.__name__, {}) for kind in ("fixed", "written"))
    unused = {item.name for item in fields(cls) if getattr(config, item.name) == item.default} & _OPTIONAL
    values = {key: value for key, value in asdict(cast(Any, config)).items() if key not in unused}
    name = class_name(config)
    if name is not None:
        variant = _tables()["variants"][cls.__name__][name]
        values = {key: value for key, value in values.items() if key not in variant["values"]}
        values = {variant.get("renamed", {}).get(key, key): value for key, value in values.items()}
        for key in _BLOCKS & values.keys():
            values[key] = [kind.replace("2D", variant["blocks"]) for kind in values[key]]
        fixed, written = variant["fixed"], {"_class_name": name}
    data = {**fixed, **written, **values}
    if isinstance(config, VaeConfig):
        for key in _BLOCKS & data.keys():
            data[key] = [data[key]] * len(config.block_out_channels)
    write_json(config_path(folder, cls), data)


def read_counts() -> dict[str, dict[str, int]]:
    """Return the number of parameters of each part of each preset."""
    return _tables()["parameters"]


def read_written(name: str) -> dict[str, Any]:
    """Return the keys that only libraries read, of a class of ours or of theirs."""
    return _tables()["written"][name]


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return read_json(Path(__file__).parent / "assets" / "configs.json")


def check_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `data` that a dataclass has fields for, each checked."""
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls) if field.name in data]
    return {name: check_value(data[name], hints[name], name) for name in names}


def check_value(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the type `hint`, lists as tuples; ValueError says what `key` may be."""
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not types.NoneType]
        if value is None and len(options) < len(get_args(hint)):
            return None
        # a list means the tuple of `int | tuple[int, ...]`, anything else the plain type
        fitting = [o for o in options if (get_origin(o) is tuple) == isinstance(value, list)]
        hint = (fitting or options)[0]
    if get_origin(hint) is tuple and isinstance(value, list) and value:
        item = get_args(hint)[0]
        # a name builds nothing; anything else may be a layer
        most = 4096 if item is str and key not in _CHOICES else 64
        if len(value) > most:
            raise ValueError(f"{key} has {len(value)} entries, at most {most} are read")
        return tuple(check_value(entry, item, key) for entry in value)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        return hint(**check_fields(hint, value))
    if hint is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not hint:
        kind = _KINDS.get(hint, "a list" if get_origin(hint) is tuple else "an object")
        raise ValueError(f"{key} {short(value)} is not {kind}")
    check_choice(value, key)
    if hint in (int, float):
        low, high = _tables()["ranges"].get(key, (1, 2**20) if hint is int else (-1e6, 1e6))
        # NaN lies in no range
        if not low <= value <= high:
            raise ValueError(f"{key} {short(value)} is not between {low} and {high}")
    return value


def check_choices(config: object) -> None:
    """Raise ValueError for a field that holds none of the values it may have."""
    for key in _CHOICES:
        value = getattr(config, key, ())
        for item in value if isinstance(value, tuple) else (value,):
            # where a configuration may have none
            if item is not None:
                check_choice(item, key)


def check_choice(value: Any, key: str) -> None:
    """Raise ValueError where `value` is none of the values that the field `key` may have."""
    if value not in _CHOICES.get(key, (value,)):
        expected = ", ".join(_CHOICES[key])
        raise ValueError(f"{key} {short(value)} is not supported, expected one of {expected}")
