"""The networks that are left when units are lost: the weights that stay, under their new names."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmdgen.compression.units import origin_of, shrink, shrink_model, units_of
from cmdgen.files import create_folder
from cmdgen.models.pretrained import Pretrained
from cmdgen.schema import write_config
from cmdgen.store import parts
from cmdgen.weights import build_empty, match_weights, read_tensors, save_tensors


def prune_network(network: Pretrained[Any], units: Collection[str]) -> Pretrained[Any]:
    """Return a network without some units; its weights are those of the larger one, not copies."""
    small = build_empty(type(network), shrink(network.config, units))
    state = keep_weights(network.state_dict(), small.state_dict(), network.config, units)
    small.load_state_dict(state, assign=True)
    return small.eval()


def keep_weights(
    weights: Mapping[str, Tensor], small: Mapping[str, Tensor], config: Any, units: Collection[str]
) -> dict[str, Tensor]:
    """Return the weights of a smaller network, whose names and shapes are those of `small`.

    `config` is the larger network's.
    """
    return {name: _cut(weights[origin_of(name, config, units)], like.shape) for name, like in small.items()}


def _cut(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return a weight as it is or, where the level below is gone and was wider, without its last channels.

    What comes from below joins the channels of a skip, which follow: of as many, those of the skip all stay.
    """
    if tensor.shape == shape:
        return tensor
    (dim,) = (dim for dim, (large, small) in enumerate(zip(tensor.shape, shape, strict=True)) if large != small)
    # below, and in the skip, is one width
    half = shape[dim] // 2
    below, skip = tensor.narrow(dim, 0, half), tensor.narrow(dim, tensor.shape[dim] - half, half)
    return torch.cat((below, skip), dim)


def prune_folder(source: Path, target: Path, dropped: list[str]) -> None:
    """Write a model folder without some units, in the precision of the weights.

    ValueError names a unit that the model does not have, or a file that is wrong.
    """
    large = parts.read_model(source)
    if large.loras:
        raise ValueError(f"{source} has LoRA, which changes layers that would be lost: it cannot be pruned")
    model = shrink_model(large, dropped)
    model = replace(model, name=target.name, pruned_from=parts.hash_weights(source))
    configs, small = parts.network_configs(large), parts.network_configs(model)
    with create_folder(target) as folder:
        parts.write_model_index(folder, model)
        for name in parts.PARTS:
            if name not in configs or configs[name] == small[name]:
                if (source / name).is_dir():
                    shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
                continue
            network, place = parts.PARTS[name].network, parts.weights_folder(source, name)
            whole, expected = (parts.build_part(name, each[name]).state_dict() for each in (configs, small))
            weights: dict[str, Tensor] = {}
            for path, names in match_weights(whole, place, network.filename, network.rename_stored).items():
                stored, _ = read_tensors(path, foreign=True)
                weights |= {ours: stored[theirs] for theirs, ours in names.items()}
            state = keep_weights(weights, expected, configs[name], units_of(name, dropped))
            (folder / name).mkdir()
            save_tensors(folder / name / network.filename, state)
            write_config(small[name], folder / name)
