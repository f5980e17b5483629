"""EVDM's Tables 1 and 2 (Zhang et al. 2023, ACM MM), counted on the meta device as the paper did.

Its counter took a multiply-add for one operation, four or five for each value that is normalised,
and none for linear layers of the time, activations, resampling and sums. What it took attention for
differs between rows: softmax, linear where the gate opens, or linear everywhere.
"""

from collections import defaultdict
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cmdgen.config import PRESETS, EvdmConfig
from cmdgen.models.evdm import AdaptiveNorm, Evdm, Layer, Pointwise, SelfAttention
from cmdgen.store.parts import build_part

GIGA = 10**9
ACCOUNTINGS = ("softmax", "gate", "linear")
# Table 1, of KTH: by model and level 10^6 parameters and 10^9 operations of its blocks, 10^9 of its
# attention. The paper's sum of EVDM-L's operations, 66.6, is not that of its column, 62.78
TABLE_1 = {
    "mcvd-kth": ((2.59, 8.23, 16.86, 31.14), (334.33, 483.53, 274.08, 139.67), (0, 106.49, 23.63, 10.5)),
    "evdm-kth": ((1.66, 4.07, 6.99, 11.4), (59.78, 95.7, 53.9, 26.82), (0, 36.5, 19.12, 10.92)),
    "evdm-l-kth": ((1.36, 2.99, 4.72, 7.26), (16.77, 25.22, 13.93, 6.86), (0, 36.5, 19.12, 10.92)),
}
# Table 2: 10^6 parameters and 10^9 operations. MCVD's row of UCF is of its variant with SPATIN,
# which is not built; half of the modulation fits the parameters of two rows of EVDM-L
TABLE_2 = {
    "mcvd-sm": (27.9, 631.91),
    "evdm-sm": (12.5, 189.66),
    "evdm-l-sm": (5.92, 60.64),
    "mcvd-kth": (62.8, 1376.87),
    "evdm-kth": (28.1, 307.41),
    "evdm-l-kth": (20.4, 133.99),
    "mcvd-bair": (251.2, 5328.15),
    "evdm-bair": (112.4, 1219.60),
    "evdm-l-bair": (53.0, 526.48),
    "evdm-ucf": (252.7, 1362.88),
    "evdm-l-ucf": (182.7, 583.38),
}


class _Counter:
    """Parameters and operations of one forward, by level of the network."""

    def __init__(self) -> None:
        self.parameters = defaultdict[int, int](int)
        self.blocks = defaultdict[int, float](float)
        self.projections = defaultdict[int, float](float)
        # (level, positions, channels, width of a head) of each attention
        self.attentions: list[tuple[int, int, int, int]] = []

    def watch(self, network: Evdm) -> None:
        """Count what the modules of a network compute."""
        level, last = 0, len(network.config.multipliers) - 1
        for layer in network.down:
            self._watch(layer, level)
            level += isinstance(layer, Layer) and layer.how == "down"
        for layer in network.mid:
            self._watch(layer, last)
        for layer in network.up:
            self._watch(layer, level)
            level -= isinstance(layer, Layer) and layer.how == "up"
        for module in (network.conv_in, network.norm_out, network.conv_out):
            module.register_forward_hook(lambda module, _, out: self._add(self.blocks, -1, module, out))

    def _watch(self, layer: nn.Module, level: int) -> None:
        assert isinstance(layer, Layer)
        self.parameters[level] += sum(parameter.numel() for parameter in layer.block.parameters())
        for name, module in layer.named_modules():
            counts = self.projections if name.startswith("attention") else self.blocks
            module.register_forward_hook(lambda module, _, out, counts=counts: self._add(counts, level, module, out))

    def _add(self, counts: dict[int, float], level: int, module: nn.Module, out: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            counts[level] += out.numel() * module.weight[0].numel()
        elif isinstance(module, Pointwise) or (isinstance(module, nn.Linear) and counts is self.projections):
            counts[level] += out.numel() * module.in_features
        elif isinstance(module, AdaptiveNorm):
            counts[level] += 4 * out.numel()
        elif isinstance(module, nn.GroupNorm):
            counts[level] += 5 * out.numel()
        elif isinstance(module, SelfAttention):
            channels, positions = out.shape[1], out[0, 0].numel()
            self.attentions.append((level, positions, channels, channels // module.attention.heads))

    def attention(self, accounting: str) -> dict[int, float]:
        """Return the operations of attention by level, with projections and normalisation."""
        counts = defaultdict[int, float](float, self.projections)
        for level, length, channels, width in self.attentions:
            linear = accounting == "linear" or (accounting == "gate" and length > 2 * width)
            counts[level] += channels * length * (2 * width + 2 if linear else 2 * length)
        return counts


@cache
def _count(name: str) -> tuple[Evdm, _Counter]:
    config = PRESETS[name].content
    assert isinstance(config, EvdmConfig)
    network, counter = build_part("evdm", config), _Counter()
    counter.watch(network)
    height, width = PRESETS[name].size
    frames = torch.empty(1, config.channels, config.frames, height, width, device="meta")
    with torch.no_grad():
        network(frames[:, :, : config.current], torch.empty(1, device="meta"), frames[:, :, config.current :])
    return network, counter


def compare_with_evdm() -> dict[str, Any]:
    """Return Tables 1 and 2 beside our counts: 10^6 parameters, 10^9 operations of a batch.

    That is 64 clips, of UCF 32. Table 2 has a count for each accounting, and which is the nearest.
    """
    first = []
    for name, columns in TABLE_1.items():
        _, counter = _count(name)
        attention = counter.attention("softmax" if name.startswith("mcvd") else "linear")
        for level, (params, blocks, attended) in enumerate(zip(*columns, strict=True)):
            ours = counter.parameters[level] / 10**6, 64 * counter.blocks[level] / GIGA, 64 * attention[level] / GIGA
            first.append({"model": name, "level": level + 1, "published": (params, blocks, attended), "ours": ours})
    second = []
    for name, (params, published) in TABLE_2.items():
        network, counter = _count(name)
        batch, blocks = 32 if name.endswith("ucf") else 64, sum(counter.blocks.values())
        counts = {each: batch * (blocks + sum(counter.attention(each).values())) / GIGA for each in ACCOUNTINGS}
        nearest = min(counts, key=lambda each: abs(counts[each] - published))
        size = sum(parameter.numel() for parameter in network.parameters())
        second.append(
            {"model": name, "published": (params, published), "parameters": size, **counts, "nearest": nearest}
        )
    return {"table_1": first, "table_2": second}
