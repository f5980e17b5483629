"""The gate of a feed-forward layer: half of the values, times the GELU of the other half.

    out[r, d] = x[r, d] gelu(x[r, D + d]),  gelu(g) = g (1 + erf(g / sqrt(2))) / 2

GEGLU of Shazeer 2020 (arXiv:2002.05202). PyTorch reads strided halves in two passes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.language import power_of_two, program, tl, triton


def geglu_reference(x: Tensor) -> Tensor:
    """(..., 2 D) -> (..., D): the definition."""
    value, gate = x.chunk(2, dim=-1)
    gate = F.gelu(gate)
    # in place, a third of a feed-forward's memory, where no gradient needs what was there
    return gate * value if torch.is_grad_enabled() else gate.mul_(value)


@triton.jit
def _normal_cdf(x):
    # (1 + erf(x / sqrt(2))) / 2. The tail beyond |x| is a power of two; its exponent is a polynomial that we fitted so
    # that the tail errs by at most 7e-8. tl.erf takes twice as many instructions
    z = tl.abs(x)
    b_log = z * (z * (-2.7721948e-6 * z + 3.8622232e-5) - 1.8255359e-4) - 1.4585798e-4
    b_log = z * (z * (z * (z * b_log + 7.0754585e-3) - 5.2505021e-2) - 4.5920491e-1) - 1.1511057
    tail = tl.exp2(z * b_log - 1.0)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _geglu_fwd_kernel(x_ptr, out_ptr, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    # one program: BLOCK_D of the D results of BLOCK_N of N rows
    i_row, o_d = program(D, BLOCK_D)
    o_n = i_row * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    mask = (o_n < N) & (o_d < D)[None, :]
    x_ptr += o_n * 2 * D + o_d[None, :]
    b_x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(x_ptr + D, mask=mask, other=0.0).to(tl.float32)
    b_x *= b_gate * _normal_cdf(b_gate)
    tl.store(out_ptr + o_n * D + o_d[None, :], b_x.to(out_ptr.dtype.element_ty), mask=mask)


def geglu_obstacle(x: Tensor) -> str | None:
    """Say why `geglu` runs the reference for this tensor; None where it does not."""
    return inference_obstacle(x)


def geglu(x: Tensor) -> Tensor:
    """(..., 2 D) -> (..., D).

    The kernel is for inference: where the input requires a gradient the reference runs. Raises
    ValueError for odd widths.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"width {x.shape[-1]} is odd")
    if geglu_obstacle(x) is not None:
        return geglu_reference(x)
    x, width = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    if out.numel():
        # 16 bytes of half precision for each of 128 threads; a block of 256 divides the models' widths
        rows, block = out.numel() // width, min(256, power_of_two(width))
        block_n = 1024 // block
        programs = triton.cdiv(rows, block_n) * triton.cdiv(width, block)
        _geglu_fwd_kernel[(programs,)](x, out, rows, width, BLOCK_N=block_n, BLOCK_D=block, num_warps=4)
    return out
