"""The gate of a feed-forward layer: half of the values, times the GELU of the other half.

    out[r, d] = x[r, d] gelu(x[r, D + d]),  gelu(g) = g (1 + erf(g / sqrt(2))) / 2

GEGLU of Shazeer 2020 (arXiv:2002.05202). PyTorch reads strided halves in two passes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.language import power_of_two, program, tl, triton

HALF_SQRT = tl.constexpr(0.7071067811865476)


def geglu_reference(x: Tensor) -> Tensor:
    """(..., 2 D) -> (..., D): the definition."""
    value, gate = x.chunk(2, dim=-1)
    gate = F.gelu(gate)
    # in place, a third of a feed-forward's memory, where no gradient needs what was there
    return gate * value if torch.is_grad_enabled() else gate.mul_(value)


@triton.jit
def _geglu_fwd_kernel(x_ptr, out_ptr, D, BLOCK: tl.constexpr):
    # one program: BLOCK of the D results of one row
    i_row, o_d = program(D, BLOCK)
    m_d = o_d < D
    b_x = tl.load(x_ptr + i_row * 2 * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_gate = tl.load(x_ptr + (i_row * 2 + 1) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_x *= 0.5 * b_gate * (1.0 + tl.erf(b_gate * HALF_SQRT))
    tl.store(out_ptr + i_row * D + o_d, b_x.to(out_ptr.dtype.element_ty), mask=m_d)


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
        block = min(1024, power_of_two(width))
        programs = out.numel() // width * triton.cdiv(width, block)
        # 16 bytes of half precision for each thread
        _geglu_fwd_kernel[(programs,)](x, out, width, BLOCK=block, num_warps=max(block // 256, 1))
    return out
