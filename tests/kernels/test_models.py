"""What models do where their ops have kernels is what they do elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from cmdgen.config import MINI, MotionConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.layers import ResnetBlock
from cmdgen.models.temporal import FrameBlock, MotionBlock
from cmdgen.models.transformer import Conditions, TransformerBlock
from cmdgen.models.vae import KlVae
from cmdgen_kernels import dispatch

Run = Callable[[], Tensor]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def vae() -> tuple[nn.Module, Run]:
    """Two levels, the first as wide as the attention that is done by products."""
    assert MINI.vae is not None
    model = KlVae(replace(MINI.vae, block_out_channels=(32, 288), layers_per_block=1))
    z = noise(1, model.config.latent_channels, 3, 5)
    return model, lambda: model.decode(z)


def dit() -> tuple[nn.Module, Run]:
    assert MINI.motion is not None
    model = DiT(replace(MINI.motion, depth=2))
    for parameter in model.parameters():
        # modulations start at zero
        nn.init.normal_(parameter, std=0.1)
    modulations, ground = noise(2, (6 * 2 + 2) * model.config.width), noise(2, 9, model.config.width)
    return model, lambda: model.denoise(noise(2, 8, 4, 6), modulations, ground)


def transformer() -> tuple[nn.Module, Run]:
    block = TransformerBlock(48, 3, MINI.content)  # type: ignore[arg-type]
    conditions = Conditions(clips=2, shifts={}, text={block.attn2: (noise(2, 3, 7, 16), noise(2, 3, 7, 16))})
    return block, lambda: block(noise(2, 10, 48), conditions)


def motion() -> tuple[nn.Module, Run]:
    """Attention over time, twice, of what is not in one piece."""
    block = MotionBlock(48, MotionConfig(motion_num_attention_heads=2))
    return block, lambda: block(noise(2, 5, 9, 48)[:, :, 2:])


def frame_block() -> tuple[nn.Module, Run]:
    block = FrameBlock(48, 3, MINI.content)  # type: ignore[arg-type]
    return block, lambda: block(noise(2, 3, 7, 48), noise(2, 1, 48))


def decoder() -> tuple[nn.Module, Run]:
    assert MINI.autoencoder is not None
    model = CmdAutoencoder(replace(MINI.autoencoder, patch=2, depth=1, decoder_depth=1))
    return model, lambda: model.decode(noise(2, 8, 6, 8), noise(2, 8, 3, 7))


def results(block: nn.Module, run: Run, *, training: bool) -> list[Tensor]:
    output = run()
    if not training:
        return [output]
    block.zero_grad()
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in block.parameters() if parameter.grad is not None)]


def resnet(channels: int) -> tuple[nn.Module, Run]:
    """A residual block with a time shift that is a row of a wider tensor."""
    block = ResnetBlock(channels, 48, 8, 1e-5)
    x, shift = noise(2, channels, 5, 7).contiguous(memory_format=torch.channels_last), noise(2, 96)[:, 48:]
    # PyTorch 2.13 crashes on a CPU where a channels_last map needs no gradient and its norm's weight does
    x.requires_grad_()
    return block, lambda: block(x, shift)


BY_REFERENCES = (vae, dit, transformer, motion, frame_block, decoder)
MAKERS = (*BY_REFERENCES, lambda: resnet(48), lambda: resnet(24))
NAMES = ["vae", "dit", "transformer", "motion", "frames", "decoder", "resnet", "shortcut"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_kernels_change_nothing(make: Callable[[], tuple[nn.Module, Run]], training: bool) -> None:
    if torch.cuda.is_available():
        pytest.skip("the tests of whole clips compare a GPU's with a CPU's")
    if training and make in BY_REFERENCES:
        pytest.skip("they train by references")
    torch.manual_seed(0)
    block, run = make()
    with torch.set_grad_enabled(training):
        ours = results(block, run, training=training)
        with patch.object(dispatch, "_interpreting", False):
            plain = results(block, run, training=training)
    assert not torch.equal(ours[0], plain[0])
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
