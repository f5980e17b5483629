import sys

import pytest
import torch
from torch import nn

from cmdgen.models.layers import Conv2d, ResnetBlock, Upsample, normalise
from cmdgen_kernels import group_norm_silu, moments
from cmdgen_kernels.convolution import convolution, convolution_obstacle


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """Groups in a few parts of several tiles each."""
    monkeypatch.setattr(sys.modules[group_norm_silu.__module__], "LARGEST_WHOLE", 0)
    monkeypatch.setattr(moments, "PROGRAMS", 6)


@pytest.fixture
def launched(monkeypatch):
    """Whether each launch of the kernel wrote a map."""
    launches, launch = [], moments._launch

    def note(x, bias, residual, out):
        launches.append(out is not None)
        return launch(x, bias, residual, out)

    monkeypatch.setattr(moments, "_launch", note)
    return launches


def tensors(dtype, device):
    """x in channels_last, weight, bias, residual."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 40, 17, 19), (40, 40, 3, 3), (40,), (2, 40, 17, 19)
    x, weight, bias, residual = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return x.contiguous(memory_format=torch.channels_last), weight / 19, bias, residual + 5


def test_the_moments_kept_are_the_maps(dtype, device, launched):
    inputs = tensors(dtype, device)
    assert convolution_obstacle(*inputs) is None
    out = convolution(*inputs, padding=(1, 1))
    kept = moments.moments(out)
    assert launched == [True]
    # all parts together
    x = out.double().flatten(2)
    size = torch.tensor([kept.part] * (kept.mean.shape[1] - 1) + [x.shape[2] % kept.part or kept.part], device=device)
    mean = (kept.mean * size[:, None]).sum(1) / x.shape[2]
    torch.testing.assert_close(mean.double(), x.mean(2), rtol=1e-5, atol=1e-5)
    square = (kept.square + size[:, None] * (kept.mean - mean[:, None]) ** 2).sum(1)
    torch.testing.assert_close(square.double(), x.var(2, correction=0) * x.shape[2], rtol=1e-5, atol=1e-5)


def test_a_map_that_was_written_to_has_its_moments_taken_again(device, launched):
    out = convolution(*tensors(torch.float32, device), padding=(1, 1))
    out += 1
    changed = moments.moments(out)
    assert launched == [True, False]
    assert torch.equal(changed.mean, moments.moments(out.clone()).mean)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_norm_after_a_residual_block_reads_its_map_once(mode, device, launched):
    with mode():
        net = nn.Sequential(Conv2d(8, 32, 3, padding=1), ResnetBlock(32, 32, 4, 1e-6), ResnetBlock(32, 48, 4, 1e-6))
        norm = nn.GroupNorm(4, 48, eps=1e-6)
        upsample = Upsample(48)
        for module in (net, norm, upsample):
            module.to(device).requires_grad_(False)
        x = torch.randn(1, 8, 12, 10, device=device).contiguous(memory_format=torch.channels_last)

        def run():
            return normalise(norm, upsample(net(x)))

        out = run()
        # the first convolution, conv2 of each block and the last one keep theirs; conv1's are taken
        assert launched == [True, False, True, False, True, True]
        launched.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moments, "_version", lambda x: object())
            again = run()
        assert launched == [True, False, False, True, False, False, True, True, False]
        # sums of other parts
        torch.testing.assert_close(out, again, rtol=1e-4, atol=1e-4)
