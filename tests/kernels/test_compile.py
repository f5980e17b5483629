import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmdgen.config import AutoencoderConfig, UNetConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.unet import UNet
from cmdgen_kernels import dispatch
from cmdgen_kernels.samples import OPS

# both attentions are in it: 4x6 tokens are more than twice a head's width, 2x3 are not
UNET = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
    attention="gated",
    attention_features=24,
)
AUTOENCODER = AutoencoderConfig(channels=3, width=16, heads=2, depth=1, attention="gated", attention_features=24)


@pytest.fixture(autouse=True)
def kernels():
    """The path of models on a CPU, in place of the interpreter."""


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_the_unet_compiles_to_one_graph():
    torch.manual_seed(0)
    model = UNet(UNET)
    inputs = torch.randn(2, 4, 4, 6), torch.tensor([3, 900]), torch.randn(2, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(*inputs), model(*inputs))


@pytest.mark.parametrize("training", [False, True])
def test_the_autoencoder_compiles_to_one_graph(training):
    torch.manual_seed(0)
    model = CmdAutoencoder(AUTOENCODER)
    frames = torch.randn(1, 3, 3, 6, 8, requires_grad=training)

    def there_and_back(frames):
        return model.decode(*model.encode(frames))

    with torch.set_grad_enabled(training):
        ours, plain = compiled(there_and_back)(frames), there_and_back(frames)
    torch.testing.assert_close(ours, plain)
    if training:
        (ours,) = torch.autograd.grad(ours.square().sum(), frames)
        (plain,) = torch.autograd.grad(plain.square().sum(), frames)
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_compiles_to_one_graph(op):
    torch.manual_seed(0)
    inputs = op.inputs(op.small, torch.float32)
    torch.testing.assert_close(compiled(op.run)(*inputs), op.run(*inputs))


def test_a_gpus_generation_is_a_constant_of_the_graph(monkeypatch):
    monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))
    x = torch.ones(3)
    assert torch.equal(compiled(lambda x: x + 1 if dispatch.since_hopper(x.device) else x)(x), x + 1)


def test_no_kernel_breaks_the_graph_on_a_gpu():
    pytest.importorskip("triton")
    command = [sys.executable, Path(__file__).parent / "trace.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    traced = {kernel for op in result["traced"].values() for graph in op.values() for kernel in graph}
    assert set(result["kernels"]) == traced
