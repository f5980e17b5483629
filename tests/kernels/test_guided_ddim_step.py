from functools import partial

import pytest
import torch

from cmdgen_kernels import guided_ddim_step
from cmdgen_kernels.guided_ddim_step import guided_ddim_step_obstacle, guided_ddim_step_reference

STEP = {"guidance": 7.5, "keep": 1.03, "move": -0.21}


def inputs(shape, dtype, device, *, channels=None, seed=0):
    """A sample in float32, and a network's output in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(shape, generator=generator)
    output = torch.randn(2 * shape[0], channels or shape[1], *shape[2:], generator=generator)
    return sample.to(device), output.to(device, dtype)


def op(sample, output, **step):
    """The op, which has to take the kernel."""
    assert guided_ddim_step_obstacle(sample, output) is None
    return guided_ddim_step(sample, output, **step)


@pytest.fixture
def check(assert_parity):
    """The op gives what the reference gives for these inputs."""
    reference = partial(guided_ddim_step_reference, **STEP)
    return partial(assert_parity, partial(op, **STEP), reference, gradients=False)


@pytest.mark.parametrize("shape", [(1, 4, 8, 16), (5, 8, 16, 33), (2, 3, 7, 5), (1, 1, 1, 1), (2, 4, 3, 5, 7), (3, 6)])
@pytest.mark.parametrize("doubled", [False, True])
def test_guided_ddim_step_matches_the_reference(shape, doubled, dtype, device, check):
    channels = 2 * shape[1] if doubled else None
    check(*inputs(shape, dtype, device, channels=channels))


@pytest.mark.parametrize("channels", [6, 12])
def test_strided_inputs(channels, dtype, device, check):
    sample, output = inputs((2, 6, 9, 11), dtype, device, channels=channels)
    last = output.contiguous(memory_format=torch.channels_last)
    check(sample, last)
    check(sample[..., 1:8], last[..., 1:8])
    check(sample.mT, output.mT)


def test_the_next_sample_lies_in_memory_as_the_output_does(device):
    sample, output = inputs((2, 4, 6, 10), torch.float16, device)
    after = op(sample, output.contiguous(memory_format=torch.channels_last), **STEP)
    assert after.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(after, op(sample, output, **STEP))


def test_guidance_chooses_and_extrapolates_branches(device):
    sample, output = inputs((2, 4, 6, 10), torch.float32, device)
    step = {"keep": 0.0, "move": 1.0}
    negative, positive = output.chunk(2)
    assert torch.equal(op(sample, output, guidance=0.0, **step), negative)
    torch.testing.assert_close(op(sample, output, guidance=1.0, **step), positive)
    twice = op(sample, output, guidance=2.0, **step)
    torch.testing.assert_close(twice, 2 * positive - negative)
    assert torch.equal(op(sample, output, guidance=3.0, keep=1.0, move=0.0), sample)


def test_the_sample_sets_the_precision(device):
    sample, output = inputs((1, 2, 4, 4), torch.float16, device)
    after = op(sample, output, **STEP)
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, op(sample, output.float(), **STEP), rtol=0, atol=0)
    assert op(sample.half(), output, **STEP).dtype == torch.float16
    assert guided_ddim_step(sample.double(), output, **STEP).dtype == torch.float64


def test_the_reference_runs_where_a_gradient_is_wanted(device):
    sample, output = inputs((1, 2, 4, 4), torch.float32, device)
    output.requires_grad_()
    assert "gradient" in (guided_ddim_step_obstacle(sample, output) or "")
    guided_ddim_step(sample, output, **STEP).sum().backward()
    expected = STEP["move"] * torch.tensor([1 - STEP["guidance"], STEP["guidance"]])
    torch.testing.assert_close(output.grad[:, 0, 0, 0].cpu(), expected)


def test_shapes_that_do_not_agree_are_refused(device):
    sample, output = inputs((2, 4, 6, 6), torch.float32, device)
    message = r"sample \(2, 4, 6, 6\) and output \({}\) are not \(B, C, ...\)"
    for wrong, shape in ((output[:3], "3, 4, 6, 6"), (output[:, :3], "4, 3, 6, 6"), (output[..., :5], "4, 4, 6, 5")):
        with pytest.raises(ValueError, match=message.format(shape)):
            guided_ddim_step(sample, wrong, **STEP)
