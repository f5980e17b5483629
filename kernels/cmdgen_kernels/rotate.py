"""Rotary positions: each pair of channels turns by an angle of its position.

    out[s, r, 2 i] + i out[s, r, 2 i + 1] = rotation[s, r, i] (x[s, r, 2 i] + i x[s, r, 2 i + 1])

Su et al. 2021 (arXiv:2104.09864). As complex numbers PyTorch has them in float32 alone: three passes
over twice the bytes where x is in half precision.
"""

import torch
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.language import power_of_two, program, tl, triton


def rotate_reference(x: Tensor, rotation: Tensor) -> Tensor:
    """(..., D), complex (..., D / 2) -> (..., D): the definition, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


@triton.jit
def _rotate_fwd_kernel(x_ptr, rotation_ptr, out_ptr, R, D, x_s, x_r, rotation_s, rotation_r, BLOCK: tl.constexpr):
    # one program: BLOCK of the D values of one row
    i_row, o_d = program(D, BLOCK)
    m_d = o_d < D
    i_s, i_r = i_row // R, i_row % R
    b_x = tl.load(x_ptr + i_s * x_s + i_r * x_r + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_turn = tl.load(rotation_ptr + i_s * rotation_s + i_r * rotation_r + o_d, mask=m_d, other=0.0)
    b_real, b_imag = tl.split(tl.reshape(b_x, (BLOCK // 2, 2)))
    b_cos, b_sin = tl.split(tl.reshape(b_turn, (BLOCK // 2, 2)))
    b_out = tl.join(b_real * b_cos - b_imag * b_sin, b_real * b_sin + b_imag * b_cos)
    tl.store(out_ptr + i_row * D + o_d, tl.reshape(b_out, (BLOCK,)).to(out_ptr.dtype.element_ty), mask=m_d)


def rotate_obstacle(x: Tensor, rotation: Tensor) -> str | None:
    """Say why `rotate` runs the reference for these tensors; None where it does not."""
    if x.dim() != 3 or x.stride(2) != 1 or rotation.stride(-1) != 1:
        return "x is not (S, R, D) of rows that lie one after another"
    return inference_obstacle(x, torch.view_as_real(rotation))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """(S, R, D), complex broadcasting to (S, R, D / 2) -> (S, R, D): turn pairs of channels.

    The kernel is for inference: where an input requires a gradient the reference runs. Raises
    ValueError where the rotation has another width.
    """
    if 2 * rotation.shape[-1] != x.shape[-1]:
        raise ValueError(f"rotation {tuple(rotation.shape)} does not have half the width of x {tuple(x.shape)}")
    if rotate_obstacle(x, rotation) is not None:
        return rotate_reference(x, rotation)
    turn = torch.view_as_real(rotation).flatten(-2).expand(x.shape)
    out = x.new_empty(x.shape)
    if out.numel():
        block = min(1024, max(power_of_two(x.shape[2]), 2))
        programs = x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], block)
        sizes = x.shape[1], x.shape[2], *x.stride()[:2], *turn.stride()[:2]
        # 16 bytes of half precision for each thread
        _rotate_fwd_kernel[(programs,)](x, turn, out, *sizes, BLOCK=block, num_warps=max(block // 256, 1))
    return out
