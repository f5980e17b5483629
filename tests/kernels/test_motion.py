from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from cmdgen_kernels import motion_latents, motion_tokens
from cmdgen_kernels.motion import (
    motion_latents_obstacle,
    motion_latents_reference,
    motion_tokens_obstacle,
    motion_tokens_reference,
)

# (B, T, H, W, D, K): mini's tokens, every tail at once, one of everything, one frame, many narrow
# frames, frames wider than a block, one column of as many channels as the kernels hold
SHAPES = [
    (1, 2, 8, 8, 160, 8),
    (2, 2, 5, 9, 50, 3),
    (1, 1, 1, 1, 1, 1),
    (2, 1, 6, 4, 32, 8),
    (1, 19, 3, 2, 16, 5),
    (1, 2, 9, 66, 16, 2),
    (1, 2, 9, 1, 40, 16),
]


def randoms(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def latents_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    *size, d, k = shape
    inputs = randoms((*size, d), (k, d), (k,), (k, d), (k,))
    # tanh neither saturated nor linear
    inputs[1:] = [x * scale for x, scale in zip(inputs[1:], (d**-0.5, 0.3) * 2, strict=True)]
    return [x.to(device, dtype) for x in inputs]


def tokens_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    b, t, h, w, d, k = shape
    inputs = randoms((b, h, w, d), (b, k, t, w + h), (d, k), (d,), (d, k), (d,))
    return [x.to(device, dtype) for x in inputs]


def with_activation(activation: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return (partial(motion_latents, activation=activation), partial(motion_latents_reference, activation=activation))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["tanh", "linear"])
def test_motion_latents_and_gradients_match_the_reference(shape, activation, dtype, device, assert_parity):
    assert_parity(*with_activation(activation), *latents_inputs(shape, dtype, device))


@pytest.mark.parametrize("shape", SHAPES)
def test_motion_tokens_and_gradients_match_the_reference(shape, dtype, device, assert_parity):
    assert_parity(motion_tokens, motion_tokens_reference, *tokens_inputs(shape, dtype, device))


def test_motion_latents_are_the_same_where_no_gradient_is_asked_for(dtype, device):
    inputs = latents_inputs((2, 3, 4, 5, 16, 4), dtype, device)
    trained = motion_latents(inputs[0].clone().requires_grad_(), *inputs[1:])
    torch.testing.assert_close(motion_latents(*inputs), trained.detach(), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_strided_inputs(dtype, device, assert_parity):
    u, *projections = latents_inputs((2, 3, 4, 5, 16, 4), dtype, device)
    # time first, as the autoencoder keeps them; channels first; a crop; one frame for all times
    by_time = u.transpose(0, 1).contiguous().transpose(0, 1)
    by_channel = u.movedim(-1, 1).contiguous().movedim(1, -1)
    still = u[:, :1].expand(-1, 3, -1, -1, -1)
    for strided in (by_time, by_channel, u[:, :, 1:, :3], still):
        assert_parity(motion_latents, motion_latents_reference, strided, *projections)
    content, motion, *projections = tokens_inputs((2, 3, 4, 5, 16, 4), dtype, device)
    projections[0] = projections[0].T.contiguous().T
    for strided in (content.transpose(1, 2).contiguous().transpose(1, 2), content.mT.clone().mT):
        by_time = motion.movedim(2, 0).contiguous().movedim(0, 2)
        assert_parity(motion_tokens, motion_tokens_reference, strided, by_time, *projections)


def test_small_weights_beside_wide_tokens_keep_their_dtypes(device):
    # what autocast hands over: tokens of 16 bits, parameters and motion of 32
    u, *projections = latents_inputs((1, 2, 3, 4, 16, 2), torch.float32, device)
    inputs = [x.requires_grad_() for x in (u.half(), *projections)]
    motion = motion_latents(*inputs)
    exact = motion_latents_reference(*(x.double() for x in inputs))
    torch.testing.assert_close(motion.double(), exact, rtol=0, atol=torch.finfo(torch.half).eps)
    grads = torch.autograd.grad(motion.sum(), inputs)
    assert [grad.dtype for grad in grads] == [torch.float16] + [torch.float32] * 4
    content, *others = tokens_inputs((1, 2, 3, 4, 16, 2), torch.float32, device)
    inputs = [x.requires_grad_() for x in (content.half(), *others)]
    tokens = motion_tokens(*inputs)
    exact = motion_tokens_reference(*(x.double() for x in inputs))
    torch.testing.assert_close(tokens.double(), exact, rtol=torch.finfo(torch.half).eps, atol=1e-3)
    grads = torch.autograd.grad(tokens.sum(), inputs)
    assert [grad.dtype for grad in grads] == [torch.float16] + [torch.float32] * 5


def test_only_the_gradients_asked_for_are_computed(device):
    for op, inputs in (
        (motion_latents, latents_inputs((1, 2, 3, 4, 16, 2), torch.float32, device)),
        (motion_tokens, tokens_inputs((1, 2, 3, 4, 16, 2), torch.float32, device)),
    ):
        leaves = [x.requires_grad_() for x in inputs]
        together = torch.autograd.grad(op(*leaves).square().sum(), leaves)
        for i, expected in enumerate(together):
            alone = [x.detach().requires_grad_(j == i) for j, x in enumerate(inputs)]
            (grad,) = torch.autograd.grad(op(*alone).square().sum(), alone[i])
            torch.testing.assert_close(grad, expected)


def test_latents_of_one_bright_token_are_found_in_its_row_and_its_column(device):
    u = torch.zeros(1, 2, 3, 5, 16, device=device)
    u[0, 1, 2, 3] = 15.0
    ones, zeros = torch.ones(1, 16, device=device), torch.zeros(1, device=device)
    motion = motion_latents(u, ones, zeros, ones, zeros, activation="linear")
    expected = torch.zeros(1, 1, 2, 5 + 3, device=device)
    expected[0, 0, 1, 3] = 15 * 16 / 3
    expected[0, 0, 1, 5 + 2] = 15 * 16 / 5
    torch.testing.assert_close(motion, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_large_and_small_latents_are_finite_and_exact(device):
    u, _, bias, _, _ = latents_inputs((1, 1, 4, 4, 16, 4), torch.float32, device)
    weight = torch.zeros(4, 16, device=device)
    for scale in (1e-30, 1e-6, 0.5, 3.0, 1e4, 1e30):
        motion = motion_latents(u, weight, scale * bias, weight, -scale * bias)
        exact = torch.tanh(scale * bias.double())
        for part, sign in ((motion[0, :, 0, 0], 1), (motion[0, :, 0, -1], -1)):
            torch.testing.assert_close(part.double(), sign * exact, rtol=5e-7, atol=0)


def test_the_ops_without_biases_and_content_are_adjoint(device):
    u, weight_w, _, weight_h, _ = latents_inputs((2, 3, 4, 5, 24, 4), torch.float32, device)
    (motion,) = randoms((2, 4, 3, 9), seed=1)
    motion = motion.to(device)
    zeros, still = torch.zeros(24, device=device), torch.zeros(2, 4, 5, 24, device=device)
    latents = motion_latents(u, 4 * weight_w, zeros[:4], 5 * weight_h, zeros[:4], activation="linear")
    tokens = motion_tokens(still, motion, weight_w.T, zeros, weight_h.T, zeros)
    torch.testing.assert_close((latents * motion).sum(), (u * tokens).sum(), rtol=1e-5, atol=1e-3)


def test_tokens_lie_in_memory_with_time_first(device):
    tokens = motion_tokens(*tokens_inputs((2, 3, 4, 5, 16, 4), torch.float32, device))
    assert tokens.transpose(0, 1).is_contiguous()
    again = motion_tokens_reference(*tokens_inputs((2, 3, 4, 5, 16, 4), torch.float32, device))
    assert again.transpose(0, 1).is_contiguous()


def test_more_channels_than_the_kernels_hold_take_the_reference(device, assert_parity):
    latents = latents_inputs((1, 2, 3, 4, 16, 17), torch.float32, device)
    tokens = tokens_inputs((1, 2, 3, 4, 16, 17), torch.float32, device)
    assert motion_latents_obstacle(*latents) == "17 latent channels are more than 16"
    assert motion_tokens_obstacle(*tokens) == "17 latent channels are more than 16"
    assert_parity(motion_latents, motion_latents_reference, *latents)
    assert_parity(motion_tokens, motion_tokens_reference, *tokens)


def test_an_empty_batch_gives_an_empty_result(device):
    assert motion_latents(*latents_inputs((0, 2, 3, 4, 16, 2), torch.float32, device)).shape == (*(0, 2, 2, 7),)
    assert motion_tokens(*tokens_inputs((0, 2, 3, 4, 16, 2), torch.float32, device)).shape == (*(0, 2, 3, 4, 16),)


def test_inputs_that_do_not_fit_are_refused(device):
    u, weight_w, bias_w, weight_h, bias_h = latents_inputs((1, 2, 3, 4, 16, 2), torch.float32, device)
    with pytest.raises(ValueError, match="activation 'relu' is not one of tanh, linear"):
        motion_latents(u, weight_w, bias_w, weight_h, bias_h, activation="relu")
    with pytest.raises(ValueError, match=r"u \(2, 3, 4, 16\) is not \(B, T, H, W, D\)"):
        motion_latents(u[0], weight_w, bias_w, weight_h, bias_h)
    with pytest.raises(ValueError, match=r"weight_h \(2, 15\) is not \(2, 16\): .* \(K, D\)"):
        motion_latents(u, weight_w, bias_w, weight_h[:, :15], bias_h)
    content, motion, *projections = tokens_inputs((1, 2, 3, 4, 16, 2), torch.float32, device)
    with pytest.raises(ValueError, match=r"motion .* expected \(1, K, T, 4 \+ 3\)"):
        motion_tokens(content, motion[..., :6], *projections)
    with pytest.raises(ValueError, match=r"bias_w \(15,\) is not \(16,\): weights are \(D, K\)"):
        motion_tokens(content, motion, projections[0], projections[1][:15], *projections[2:])
