"""Layers in whose place their shortcut stands: what a network is worth without them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae


def list_layers(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the layers of a UNet, and those of a VAE's decoder, by name: what has a shortcut."""
    by_name: dict[str, list[nn.Module]] = {}
    if isinstance(network, UNet):
        stages: dict[str, Any] = {"down": network.down_blocks, "up": network.up_blocks}
        for name, stage in _number(stages):
            for j in range(len(stage.resnets)):
                kinds = [getattr(stage, kind, None) for kind in ("resnets", "attentions", "motion_modules")]
                by_name[f"{name}.{j}"] = [kind[j] for kind in kinds if kind is not None]
    elif isinstance(network, KlVae):
        mid, blocks = network.decoder.mid_block, _number({"decoder.up": network.decoder.up_blocks})
        middle = _number({"decoder.mid.resnets": mid.resnets, "decoder.mid.attentions": mid.attentions})
        by_name["decoder.mid"] = [layer for _, layer in middle]
        layers = [*middle, *(pair for name, block in blocks for pair in _number({name: block.resnets}))]
        by_name |= {name: [layer] for name, layer in layers}
    return by_name


def _number(lists: Mapping[str, Iterable[Any]]) -> list[tuple[str, Any]]:
    return [(f"{name}.{i}", item) for name, items in lists.items() for i, item in enumerate(items)]


def list_vdmini(vae: KlVae) -> list[nn.Module]:
    """Return what VDMini takes out of a VAE's decoder: the mid block, and the last block's layers but the first."""
    layers, last = list_layers(vae), len(vae.decoder.up_blocks) - 1
    others = [layer for name, layer in layers.items() if name.startswith(f"decoder.up.{last}.")][1:]
    return [layer for group in (layers["decoder.mid"], *others) for layer in group]


@contextmanager
def skipped(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let these layers be their shortcuts for the length of a block."""
    layers = set(layers)
    for layer in layers:
        # of a blended block, the one of each frame has it
        inner = getattr(layer, "spatial_res_block", layer)
        vars(layer)["forward"] = partial(_pass, getattr(inner, "conv_shortcut", None))
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _pass(shortcut: nn.Module | None, x: Tensor, *_: Any) -> Tensor:
    """(B, C, H, W) -> (B, C', H, W)."""
    result: Tensor = x if shortcut is None else shortcut(x)
    return result
