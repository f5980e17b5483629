"""What a network can lose, by name, and the configuration of what is left. Never imports torch.

    unet.mid                 the mid block
    unet.level               the innermost level, down and up, and the mid block
    unet.layers.I.J          layer J of down block I, and of the up block of that level
    unet.attentions.down.I   attention of a down block; attentions.up.I of an up block
    motion.blocks.I          a block of the motion DiT
    autoencoder.decoder.I    a block of the CMD decoder

Each leaves a network that a configuration can say: diffusers opens a pruned UNet. VDMini (Wu et al. 2024,
arXiv:2411.18375) prunes UNets of video; BK-SDM (Kim et al. 2023, arXiv:2305.15798) those of stills.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from cmdgen.config import PRESETS, PUBLIC, AutoencoderConfig, DiTConfig, ModelConfig, MotionConfig, UNetConfig

_LAYER = re.compile(r"(down|up)_blocks\.(\d+)(?:\.(resnets|attentions|motion_modules)\.(\d+))?(.*)")
_BLOCK = re.compile(r"(blocks|decoder)\.(\d+)(.*)")


class Kept(NamedTuple):
    """What is left of a UNet's levels: layers of each down block and up block, by level; blocks that are not."""

    down: list[list[int]]
    up: list[list[int]]
    # levels that are gone
    lost: int

    def origin(self, name: str) -> str:
        """Return the name that a weight of the smaller UNet has in the larger one."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return name
        side, block, kind, layer, rest = match.groups()
        i = int(block) + (self.lost if side == "up" else 0)
        level = i if side == "down" else len(self.up) - 1 - i
        middle = "" if kind is None else f".{kind}.{getattr(self, side)[level][int(layer)]}"
        return f"{side}_blocks.{i}{middle}{rest}"


def kept_layers(layers: Sequence[int], dropped: Collection[str]) -> Kept:
    """Return what is left of levels of so many layers."""
    gone = [{j for j in range(count) if f"layers.{i}.{j}" in dropped} for i, count in enumerate(layers)]
    down, up = (
        [[j for j in range(count + more) if j not in gone[i]] for i, count in enumerate(layers)] for more in (0, 1)
    )
    return Kept(down, up, int("level" in dropped))


def list_units(part: str, config: Any) -> list[str]:
    """Return all that one part can lose, without the part's name."""
    if isinstance(config, UNetConfig):
        layers = [f"layers.{i}.{j}" for i, count in enumerate(config.layers) for j in range(1, count)]
        sides = {"down": config.down_block_types, "up": config.up_block_types}
        attentions = [
            f"attentions.{side}.{i}"
            for side, kinds in sides.items()
            for i, kind in enumerate(kinds)
            if kind.startswith("CrossAttn")
        ]
        middle = ["mid"] if config.mid_block_type else []
        return [*middle, *["level"][: len(config.layers) - 1], *layers, *attentions]
    kind = {"motion": "blocks", "autoencoder": "decoder"}.get(part)
    depth = 1 if kind is None else _depth(config)
    # the only one cannot go
    return [f"{kind}.{i}" for i in range(depth)] if depth > 1 else []


def list_rule(config: UNetConfig) -> list[str]:
    """Return what VDMini takes out of a UNet: what lies deepest, and all but one layer except in the level above it.

    The published list is cut short; of all readings this one alone gives the published size and time.
    """
    second_last = len(config.layers) - 2
    return [
        unit
        for unit in list_units("unet", config)
        if unit in ("mid", "level") or (unit.startswith("layers.") and int(unit.split(".")[1]) != second_last)
    ]


def shrink(config: Any, dropped: Collection[str]) -> Any:
    """Return the configuration of one part without some units; ValueError where nothing would be left."""
    if isinstance(config, DiTConfig):
        return replace(config, depth=_left("blocks", config.depth, dropped))
    if isinstance(config, AutoencoderConfig):
        depth = _left("decoder", _depth(config), dropped)
        return replace(config, decoder_depth=None if depth == config.depth else depth)
    assert isinstance(config, UNetConfig | MotionConfig)
    kept = kept_layers(config.layers, dropped)
    levels = len(config.layers) - kept.lost
    counts = [len(layers) for layers in kept.down[:levels]]
    layers, loses_mid = counts[0] if len(set(counts)) == 1 else tuple(counts), bool({"mid", "level"} & {*dropped})
    widths = config.block_out_channels[:levels]
    if isinstance(config, MotionConfig):
        mid = config.use_motion_mid_block and not loses_mid
        return replace(config, block_out_channels=widths, motion_layers_per_block=layers, use_motion_mid_block=mid)
    heads = config.attention_head_dim
    down, up = (
        tuple(kind.removeprefix("CrossAttn") if f"attentions.{side}.{i}" in dropped else kind for i, kind in kinds)
        for side, kinds in (
            ("down", list(enumerate(config.down_block_types))[:levels]),
            ("up", list(enumerate(config.up_block_types))[kept.lost :]),
        )
    )
    changed: dict[str, Any] = {
        **{"block_out_channels": widths, "layers_per_block": layers},
        **{"down_block_types": down, "up_block_types": up},
        "attention_head_dim": heads if isinstance(heads, int) else heads[:levels],
        "mid_block_type": None if loses_mid else config.mid_block_type,
    }
    return replace(config, **changed)


def units_of(part: str, dropped: Iterable[str]) -> list[str]:
    """Return the units of one part, without its name; motion modules go with the UNet's layers."""
    part = {"motion_adapter": "unet"}.get(part, part)
    return [name.partition(".")[2] for name in dropped if name.startswith(f"{part}.")]


def origin_of(name: str, config: Any, dropped: Collection[str]) -> str:
    """Return the name that a weight of a smaller part has in the larger one, of this configuration."""
    if isinstance(config, UNetConfig | MotionConfig):
        return kept_layers(config.layers, dropped).origin(name)
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    kind, block, rest = match.groups()
    return f"{kind}.{kept_blocks(kind, _depth(config), dropped)[int(block)]}{rest}"


def kept_blocks(kind: str, depth: int, dropped: Collection[str]) -> list[int]:
    """Return which blocks of a list are left."""
    return [i for i in range(depth) if f"{kind}.{i}" not in dropped]


def shrink_model(model: ModelConfig, dropped: Sequence[str]) -> ModelConfig:
    """Return a model without some units of its parts; ValueError names one that it does not have."""
    fields = {"unet": "content", "motion_adapter": "adapter", "motion": "motion", "autoencoder": "autoencoder"}
    possible = [
        f"{part}.{unit}"
        for part, field in fields.items()
        if part != "motion_adapter" and (config := getattr(model, field)) is not None
        for unit in list_units(part, config)
    ]
    if unknown := [name for name in dropped if name not in possible]:
        raise ValueError(f"{model.name} has no {unknown[0]} to lose: it has {', '.join(possible)}")
    small = {
        field: shrink(config, units)
        for part, field in fields.items()
        if (units := units_of(part, dropped)) and (config := getattr(model, field)) is not None
    }
    return replace(model, dropped=tuple(dropped), **small)


def overlaps(unit: str, model: ModelConfig) -> list[str]:
    """Return the units that go with one, without it being said: those of the innermost level."""
    if unit != "unet.level" or not isinstance(model.content, UNetConfig):
        return []
    last = len(model.content.layers) - 1
    inside = ("mid", f"attentions.down.{last}", "attentions.up.0")
    layers = (f"layers.{last}.{j}" for j in range(model.content.layers[-1]))
    return [f"unet.{name}" for name in (*inside, *layers)]


def _depth(config: DiTConfig | AutoencoderConfig) -> int:
    if isinstance(config, DiTConfig):
        return config.depth
    return config.depth if config.decoder_depth is None else config.decoder_depth


def _left(kind: str, depth: int, dropped: Collection[str]) -> int:
    left = len(kept_blocks(kind, depth, dropped))
    if not left:
        raise ValueError(f"all {depth} of {kind} would be lost: keep one")
    return left


def _prune_preset(model: ModelConfig) -> ModelConfig:
    assert isinstance(model.content, UNetConfig)
    rule = [f"unet.{unit}" for unit in list_rule(model.content)]
    return replace(shrink_model(model, rule), name=f"{model.name}-vdmini")


# presets as VDMini's rule leaves them
_ALL = PRESETS | PUBLIC
_PRUNED = [_prune_preset(_ALL[name]) for name in ("cmd-sd15", "cmd-sd21", "animatelcm", "svd")]
PRUNED = {model.name: model for model in _PRUNED}
