"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank changes of weights, merged when these are read.

    W += scale (alpha / r) up down

Three ways to name them are read: of diffusers' attention processors (AnimateDiff's motion LoRAs), of
PEFT, and of kohya's scripts, whose names have _ for every dot. Files are untrusted: whatever is wrong
is one line of ValueError that names the file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor, nn

from cmdgen.headers import open_weights

# parts of a model that can be changed, by the names that files have for them
_PARTS = {"unet": "unet", "text_encoder": "text_encoder", "te": "text_encoder", "te1": "text_encoder"}
_PROCESSOR = re.compile(r"(?:(unet|text_encoder)\.)?(.+)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
_PEFT = re.compile(
    r"(?:(unet|text_encoder)\.)?(?:base_model\.model\.)?(.+)\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)"
    r"(?:\.default)?\.weight"
)
_KOHYA = re.compile(r"lora_(unet|te1?)_(.+)\.lora_(down|up)\.weight")
# what follows the name of a weight, and is another one for its alpha
_SIDE = re.compile(r"\.(?:lora_|lora\.|lora_linear_layer\.)(?:A|B|down|up)(?:\.default)?\.weight")
# relatives that are not read, by what their tensors are called
_OTHERS = {"dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon by Tucker", "oft_": "OFT"}


@dataclass(frozen=True)
class Lora:
    """A file and how much of it counts."""

    path: Path
    scale: float = 1.0


def parse_lora(text: str) -> tuple[str, float]:
    """Return the name and the scale of NAME or NAME:SCALE."""
    match = re.fullmatch(r"(.+?)(?::(-?\d{1,3}(?:\.\d{1,9})?))?", text)
    assert match is not None
    return match[1], float(match[2] or 1)


def find_lora(text: str) -> Lora:
    """Return FILE[:SCALE], or OWNER/NAME[:SCALE] in the hub's cache; FileNotFoundError for others."""
    name, scale = parse_lora(text)
    if Path(name).is_file():
        return Lora(Path(name), scale)
    from cmdgen.store.hub import LORAS, cached_folder

    for filename in LORAS:
        if (folder := cached_folder(name, filename)) is not None:
            return Lora(folder / filename, scale)
    raise FileNotFoundError(f"no LoRA {name!r}: expected a safetensors file, or OWNER/NAME that models pull brought")


def merge_lora(module: nn.Module, part: str, lora: Lora) -> int:
    """Change a part's weights by what a file has for it; return how many were changed."""
    weights = {
        name.removesuffix(".weight"): value for name, value in module.named_parameters() if name.endswith(".weight")
    }
    pairs = _read_pairs(lora.path, part, weights)
    for target, (down, up, alpha) in pairs.items():
        weight = weights[target]
        shape = [len(up), *down.shape[1:]]
        if len(up) != len(weight) or up[:, 0].numel() * down[0].numel() != weight.numel():
            raise ValueError(f"{lora.path}: {target} is changed by {shape}, the model has {list(weight.shape)}")
        scale = lora.scale * (1.0 if alpha is None else float(alpha) / len(down))
        change = up.flatten(1).float() @ down.flatten(1).float()
        # a new tensor: the old one may be the file itself
        precise = torch.promote_types(weight.dtype, torch.float32)
        changed = weight.detach().to(precise) + scale * change.to(weight.device, precise).view(weight.shape)
        weight.data = changed.to(weight.dtype)
    return len(pairs)


def _read_pairs(path: Path, part: str, weights: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Return down, up and alpha of each weight of a part that a file changes."""
    flat = {name.replace(".", "_"): name for name in weights}
    pairs: dict[str, dict[str, Tensor]] = {}
    with open_weights(path, "cpu") as file:
        names = set(file.keys())
        for name in sorted(names):
            for mark, kind in _OTHERS.items():
                if mark in name:
                    raise ValueError(f"{path} is a {kind}: of its kind, LoRA alone is read")
            if name.endswith(".alpha"):
                continue
            place, target, side = _parse_key(path, name)
            if place != part:
                continue
            target = flat.get(target.replace(".", "_"), target)
            if target not in weights:
                raise ValueError(f"{path}: {short(target)} is no weight of {part}/: it is of another model")
            both = pairs.setdefault(target, {})
            both[side] = file.get_tensor(name)
            alpha = f"{_SIDE.sub('', name)}.alpha"
            if alpha in names:
                both["alpha"] = file.get_tensor(alpha)
    for target, both in pairs.items():
        down, up, scale = (both.get(key) for key in ("down", "up", "alpha"))
        if down is None or up is None or not _fit(down, up) or (scale is not None and scale.numel() != 1):
            raise ValueError(f"{path}: {short(target)} lacks one of two matrices that fit")
    return {target: (both["down"], both["up"], both.get("alpha")) for target, both in pairs.items()}


def _fit(down: Tensor, up: Tensor) -> bool:
    """Return whether two matrices, or filters, have one rank between them."""
    if min(down.ndim, up.ndim) < 2 or 0 in (*down.shape, *up.shape):
        return False
    return up[0].numel() == len(down) and down.is_floating_point() and up.is_floating_point()


def _parse_key(path: Path, name: str) -> tuple[str, str, str]:
    """Return the part, the weight and the side of a tensor's name."""
    if match := _PROCESSOR.fullmatch(name):
        target = f"{match[2]}.{match[3]}{'.0' * (match[3] == 'to_out')}"
        return _PARTS[match[1] or "unet"], target, match[4]
    if match := _KOHYA.fullmatch(name):
        return _PARTS[match[1]], match[2], match[3]
    if match := _PEFT.fullmatch(name):
        return _PARTS[match[1] or "unet"], match[2], {"A": "down", "B": "up"}.get(match[3], match[3])
    raise ValueError(f"{path}: {short(name)} is no tensor of a LoRA")
