"""Predict what a clip of cmd-sd21 takes on a GPU, from what it launches: a table.

    python tests/kernels/predict.py

16 frames of 512x1024, 50 + 50 steps with guidance, bfloat16. A launch takes as long as its operations
or as its bytes, whichever is longer, and a gap. "Before" is by PyTorch's operators and by the kernels
of GroupNorm, content frame and motion alone. Nothing is measured.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import torch
from torch import Tensor

from cmdgen.acceleration.slicer import decode_clip
from cmdgen.config import CMD_SD21, UNetConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.layers import fuse_weights
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices
from cmdgen.video.pixels import CONVERT
from tests.kernels.counting import Count, count, feature_map, inference

# operations and bytes a second, in 1e12: products as convolutions reach them, cuDNN's attention, what
# PyTorch has for heads of 512, a large copy
LIMITS = {
    "H100": {"product": 600, "attention": 412, "wide attention": 80, "other": 60, "bytes": 3.0},
    "H200": {"product": 600, "attention": 412, "wide attention": 80, "other": 60, "bytes": 4.3},
}
# microseconds from one node of a graph to the next
GAP = 0.6
BEFORE = (
    *("convolution", "layer_norm", "geglu", "wide_attention", "rotate", "yuv420p"),
    *(f"{op} of cmdgen.models.layers" for op in ("group_norm_silu", "convolution")),
    "obstacle of cmdgen.models.dit",
)
Run = Callable[[], object]


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def content() -> Run:
    """A step of the UNet."""
    assert isinstance(CMD_SD21.content, UNetConfig)
    config = CMD_SD21.content
    unet = inference(lambda: UNet(config))
    fuse_weights(unet)
    time = unet.project_time(half(2))
    text = unet.project_text(half(2, 77, config.cross_attention_dim))
    return lambda: unet.denoise(feature_map(2, 4, 64, 128), time, *text)


def motion() -> Run:
    """A step of the motion model, whose guidance is off."""
    assert CMD_SD21.motion is not None
    config = CMD_SD21.motion
    dit = inference(lambda: DiT(config))
    modulations = dit.modulations(half(1), text=half(1, 77, CMD_SD21.text.hidden_size))
    ground = dit.place(16, 96, context=half(1, 4, 64, 128), split=64)
    return lambda: dit.denoise(half(1, 8, 16, 96), modulations, ground)


def decoder() -> Run:
    """The CMD decoder, a clip."""
    assert CMD_SD21.autoencoder is not None
    config = CMD_SD21.autoencoder
    model = inference(lambda: CmdAutoencoder(config))
    slices = Slices(frames=16, positions=2048, pictures=1)
    return lambda: decode_clip(model, half(1, 4, 64, 128), half(1, 8, 16, 96), slices)


def picture() -> Run:
    """A frame through the VAE, to planes."""
    assert CMD_SD21.vae is not None
    config = CMD_SD21.vae
    vae = inference(lambda: KlVae(config))
    fuse_weights(vae)
    return lambda: CONVERT["yuv420p"](vae.from_latents(half(1, 4, 64, 128)))


# what runs how often
PARTS = (
    ("UNet step", content, 50),
    ("motion step", motion, 50),
    ("CMD decoder", decoder, 1),
    ("VAE, a frame", picture, 17),
)
COLUMNS = ("part", "times", "launches", "GB beside products", "10\u00b9\u00b2 operations", *LIMITS, "measured")


def milliseconds(counted: Count, device: str) -> float:
    """Predict how long the launches take, one after another."""
    limits = LIMITS[device]
    seconds = sum(max(each.flops / limits[each.kind], each.bytes / limits["bytes"]) for each in counted) / 1e12
    return 1e3 * seconds + 1e-3 * GAP * len(counted)


def main() -> None:
    """Print the table."""
    for row in (COLUMNS, ["---"] * len(COLUMNS)):
        print("|", " | ".join(row), "|")
    totals = dict.fromkeys(((device, i) for device in LIMITS for i in range(2)), 0.0)
    for name, make, times in PARTS:
        with torch.no_grad():
            ways = count(make, without=BEFORE), count(make)
        launches = " \u2192 ".join(str(len(way)) for way in ways)
        moved = " \u2192 ".join(f"{way.summary[1] / 1e3:.2f}" for way in ways)
        cells = [name, str(times), launches, moved, f"{sum(each.flops for each in ways[1]) / 1e12:.2f}"]
        for device in LIMITS:
            each = [milliseconds(way, device) for way in ways]
            for i, value in enumerate(each):
                totals[device, i] += times * value
            cells.append(" \u2192 ".join(f"{value:.2f}" for value in each))
        print("|", " | ".join(cells), "| |")
    sums = [f"{totals[device, 0]:.0f} \u2192 {totals[device, 1]:.0f}" for device in LIMITS]
    print("| a clip | | | | |", " | ".join(sums), "| |")


if __name__ == "__main__":
    main()
