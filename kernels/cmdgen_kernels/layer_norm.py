"""Layer normalisation of tokens, with or without a residual added before it.

    y[b, l] = x[b, l] + gate[b] branch[b, l]
    out[b, l] = (y[b, l] - mean) / deviation * weight + bias

where mean and deviation are of the D values of y[b, l] (Ba et al. 2016, arXiv:1607.06450). Weight and
bias are the layer's, or those of a condition: adaLN of Peebles & Xie 2023 (arXiv:2212.09748) has
1 + weight[b] and bias[b]. One program holds whole rows in registers and writes out, and y where it is not x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.language import power_of_two, row, tl, triton


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None = None, gate: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, L, D), (D) or (B, 1, D) x 2, (B, L, D), (B, 1, D) -> y, out, (B, L, D) x 2: the definition."""
    if branch is not None:
        x = x + (branch if gate is None else gate * branch)
    if weight.dim() == 1:
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x, F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + weight) + bias


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    branch_ptr,
    gate_ptr,
    sum_ptr,
    out_ptr,
    N,
    L,
    D,
    x_b,
    weight_b,
    gate_b,
    eps,
    MODULATED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_R of the N = B L rows
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    i_b = (o_r // L)[:, None]
    m_d = o_d < D
    mask = (o_r < N)[:, None] & m_d[None, :]
    o_out = o_r[:, None] * D + o_d[None, :]
    b_x = tl.load(x_ptr + i_b * x_b + (o_r % L)[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        b_branch = tl.load(branch_ptr + o_out, mask=mask, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            b_branch *= tl.load(gate_ptr + i_b * gate_b + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x += b_branch
        tl.store(sum_ptr + o_out, b_x.to(sum_ptr.dtype.element_ty), mask=mask)

    b_x = tl.where(mask, b_x - (tl.sum(b_x, axis=1) / D)[:, None], 0.0)
    b_x /= tl.sqrt(tl.sum(b_x * b_x, axis=1) / D + eps)[:, None]
    if MODULATED:
        o_w = i_b * weight_b + o_d[None, :]
        b_x *= 1.0 + tl.load(weight_ptr + o_w, mask=mask, other=0.0).to(tl.float32)
        b_x += tl.load(bias_ptr + o_w, mask=mask, other=0.0).to(tl.float32)
    else:
        b_x = b_x * row(weight_ptr, o_d, m_d) + row(bias_ptr, o_d, m_d)
    tl.store(out_ptr + o_out, b_x.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = None if branch is None else torch.empty_like(out)
    batch, length, width = x.shape
    if weight.stride() != bias.stride():
        weight, bias = weight.contiguous(), bias.contiguous()
    if out.numel():
        block_d = power_of_two(width)
        # each of 128 threads holds at least two times 16 bytes of half precision
        block_r = max(1, 2048 // block_d)
        options = {"MODULATED": weight.dim() > 1, "BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": 4}
        strides = x.stride(0), weight.stride(0), 0 if gate is None else gate.stride(0)
        branch = None if branch is None else branch.contiguous()
        sizes = batch * length, length, width
        _layer_norm_fwd_kernel[(triton.cdiv(batch * length, block_r),)](
            x, weight, bias, branch, gate, y, out, *sizes, *strides, eps, **options
        )
    return x if y is None else y, out


def layer_norm_obstacle(
    x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None = None, gate: Tensor | None = None
) -> str | None:
    """Say why `layer_norm` runs the reference for these tensors; None where it does not."""
    tensors = [each for each in (x, weight, bias, branch, gate) if each is not None]
    reason = inference_obstacle(*tensors)
    if reason is None and x.stride(1) != x.shape[2]:
        return "the rows of x do not lie one after another"
    if reason is None and any(each.stride(-1) != 1 for each in tensors):
        return "the values of a row do not lie one after another"
    return reason


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None = None, gate: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, L, D), (D) or (B, 1, D) x 2, (B, L, D), (B, 1, D) -> y, out, (B, L, D) x 2.

    y is x + gate * branch, or x without a branch; out is its norm, times `weight` (D) plus `bias`
    or, of (B, 1, D), times 1 + `weight`. The kernel is for inference: where an input requires a
    gradient the reference runs. Raises ValueError where shapes do not fit the kernel.
    """
    if layer_norm_obstacle(x, weight, bias, branch, gate) is not None:
        return layer_norm_reference(x, weight, bias, branch, gate, eps=eps)
    batch, _, width = x.shape
    for name, tensor, shapes in (
        ("weight", weight, {(width,), (batch, 1, width)}),
        ("bias", bias, {weight.shape}),
        ("branch", branch, {x.shape}),
        ("gate", gate, {(batch, 1, width)}),
    ):
        if tensor is not None and tensor.shape not in shapes:
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit x {tuple(x.shape)}")
    return _launch(x, weight, bias, branch, gate, eps)
