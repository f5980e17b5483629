"""Launches and bytes of the models' parts at cmd-sd21's size, by references and by kernels."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from cmdgen.config import PRESETS
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.layers import ResnetBlock, Upsample, fuse_weights
from cmdgen.models.temporal import TimeAttention
from cmdgen.models.transformer import Conditions, TransformerBlock
from cmdgen.models.vae import SpatialAttention
from cmdgen.video.pixels import CONVERT
from tests.kernels.counting import count, feature_map, inference

CMD_SD21 = PRESETS["cmd-sd21"]
Run = Callable[[], object]


@pytest.fixture(autouse=True)
def kernels() -> None:
    """In place of the interpreter."""


def training() -> Run:
    """A residual block of the UNet, forward and backward, under autocast."""
    block, x, shift = ResnetBlock(320, 320, 32, 1e-5), feature_map(8, 320, 64, 64), feature_map(8, 320, 1, 1)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x.requires_grad_(), shift.flatten(1))
        torch.autograd.grad(y, [x, *block.parameters()], torch.empty_like(y), allow_unused=True)

    return run


def decoding() -> Run:
    """A picture's last level of the VAE: two residual blocks, one of which changes the channels."""
    blocks = inference(lambda: nn.Sequential(*(ResnetBlock(channels, 128, 32, 1e-6) for channels in (256, 128))))
    x = feature_map(1, 256, 512, 1024)
    return lambda: blocks(x)


def doubling() -> Run:
    """A picture's last doubling in the VAE."""
    layer = inference(lambda: Upsample(256))
    fuse_weights(layer)
    x = feature_map(1, 256, 256, 512)
    return lambda: layer(x)


def middle() -> Run:
    """The attention of the VAE's middle, of a picture."""
    attention = inference(lambda: SpatialAttention(512, groups=32))
    x = feature_map(1, 512, 64, 128)
    return lambda: attention(x)


def motion() -> Run:
    """A block of the motion model and its last layer, a step of one clip."""
    dit = inference(lambda: DiT(replace(CMD_SD21.motion, depth=1)))
    tokens, modulations = (torch.empty(1, *size, dtype=torch.bfloat16) for size in ((512, 1152), (8 * 1152,)))
    return lambda: dit.finish(dit.trunk(tokens, modulations), modulations, 16, 96)


def transformer() -> Run:
    """A transformer block of the UNet where it attends first, guidance's two branches."""
    block = inference(lambda: TransformerBlock(320, 5, CMD_SD21.content))
    text = tuple(torch.empty(2, 5, 77, 64, dtype=torch.bfloat16) for _ in range(2))
    conditions = Conditions(clips=2, shifts={}, text={block.attn2: text})
    tokens = torch.empty(2, 8192, 320, dtype=torch.bfloat16)
    return lambda: block(tokens, conditions)


def time() -> Run:
    """AnimateDiff's first attention over time, 16 frames of 576x1024, guidance's two branches."""
    attention = inference(lambda: TimeAttention(320, 8))
    tokens = torch.empty(2, 16, 9216, 320, dtype=torch.bfloat16)
    return lambda: attention(tokens)


def decoder() -> Run:
    """A block of the CMD decoder, of a clip."""
    model = inference(lambda: CmdAutoencoder(replace(CMD_SD21.autoencoder, depth=1)))
    tokens = torch.empty(16, 1, 2048, 384, dtype=torch.bfloat16)
    rotations = model.rotations(tokens, 32)
    return lambda: model.decoder[0](tokens, *rotations)


def planes() -> Run:
    """A decoded frame for the encoder."""
    pixels = feature_map(1, 3, 512, 1024)
    return lambda: CONVERT["yuv420p"](pixels)


FOLDED = ("group_norm_silu of cmdgen.models.layers", "convolution of cmdgen.models.layers")
# what is turned off before; launches and megabytes without and with them, and products
CASES = [
    (training, ("group_norm_silu", *FOLDED), (36, 1825, 4), (24, 549, 4)),
    (decoding, ("convolution", *FOLDED), (19, 4162, 5), (14, 2686, 5)),
    (doubling, ("doubled_convolution",), (5, 2147, 1), (1, 538, 1)),
    # more launches, and bytes for the scores, at the rate of products
    (middle, ("wide_attention",), (4, 50, 5), (9, 470, 12)),
    (motion, ("layer_norm", "obstacle of cmdgen.models.dit"), (18, 40, 6), (6, 21, 6)),
    (transformer, ("layer_norm",), (7, 283, 10), (5, 262, 10)),
    (transformer, ("geglu",), (6, 346, 10), (5, 262, 10)),
    # before, the copies of what two calls of a library attend to: as many bytes as the kernel moves in all
    (time, ("time_attention",), (2, 754, 6), (1, 754, 4)),
    (decoder, ("rotate", "geglu", "layer_norm", "time_attention"), (18, 1994, 8), (9, 962, 7)),
    (planes, ("yuv420p",), (34, 139, 0), (1, 3, 0)),
]


@pytest.mark.parametrize(("make", "ops", "before", "after"), CASES)
def test_kernels_launch_and_move_less(
    make: Callable[[], Run], ops: tuple[str, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    assert (count(make, without=ops).summary, count(make).summary) == (before, after)
