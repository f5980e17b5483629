"""Layers in whose place their shortcut stands: what a network is worth without them."""

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae

N = TypeVar("N", bound=nn.Module)


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


def list_vdmini(vae: KlVae) -> list[str]:
    """Return what VDMini takes out of a VAE's decoder: the mid block, and the last block's layers but the first."""
    last = f"decoder.up.{len(vae.decoder.up_blocks) - 1}."
    return ["decoder.mid", *[name for name in list_layers(vae) if name.startswith(last)][1:]]


def skip_layers(network: N, names: Iterable[str]) -> N:
    """Return a network with the same weights, not copies, in which the shortcuts of some layers stand for these."""
    weights = (*network.parameters(), *network.buffers())
    network = copy.deepcopy(network, {id(tensor): tensor for tensor in weights})
    for layer in pick_layers(network, names):
        # of a blended block, the one of each frame has it
        inner = getattr(layer, "spatial_res_block", layer)
        vars(layer)["forward"] = partial(_pass, getattr(inner, "conv_shortcut", None))
    return network


def pick_layers(network: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Return the layers of these names."""
    layers = list_layers(network)
    return [layer for name in names for layer in layers[name]]


def _pass(shortcut: nn.Module | None, x: Tensor, *_: Any) -> Tensor:
    """(B, C, H, W) -> (B, C', H, W)."""
    result: Tensor = x if shortcut is None else shortcut(x)
    return result
