"""Group normalisation of a channels_last map, with an addition before it and an activation after.

    y[b, c, p] = x[b, c, p] + shift[b, c]
    out[b, c, p] = act(weight[c] (y[b, c, p] - mean[b, g]) / deviation[b, g] + bias[c])

where mean and deviation are of y, of the channels of group g at all positions p (Wu & He 2018,
arXiv:1803.08494). Where a group fits in one program's registers, one kernel does it all. Elsewhere
three do, with enough programs to fill a GPU and no atomics:

    moments   each channel's mean and sum of squared deviations in each of S parts of the positions;
              not where the convolution that made x kept them
    combine   these of a group, by Chan et al. 1979's rule
    apply     act(weight (x - centre) / deviation + bias), where centre[b, c] is mean - shift

Deviations are from a mean, never a difference of sums: a large mean does not cancel them. `shift`
moves a channel's mean and not its deviations, so that only `combine` sees it. The backward pass is
three kernels alike. With n = (y - mean) / deviation and g the gradient of weight n + bias, they take
the sums of g, g n and n over the positions, these of a group, and

    dx = (weight g - mean(weight g) - n mean(weight g n)) / deviation
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmdgen_kernels.dispatch import obstacle
from cmdgen_kernels.language import power_of_two, program, row, tile, tl, triton
from cmdgen_kernels.moments import moments, share

ACTIVATIONS = ("silu", "none")
LOG2E = tl.constexpr(1.4426950408889634)

# the elements of a group that one program may hold: 64 for each of 512 threads, more would spill
LARGEST_WHOLE = 32768


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    *,
    groups: int,
    eps: float,
    activation: str = "silu",
) -> Tensor:
    """(B, C, H, W), (C), (C), (B, C) -> (B, C, H, W): the definition; moments in float32 at least.

    torch takes them so; between its operations values are rounded to the dtype of `x`.
    """
    if shift is not None:
        x = x + shift[:, :, None, None]
    x = F.group_norm(x, groups, weight, bias, eps)
    # in place where no gradient needs what was there
    return F.silu(x, inplace=not torch.is_grad_enabled()) if activation == "silu" else x


@triton.jit
def _silu(b_x):
    return b_x / (1.0 + tl.exp2(-b_x * LOG2E))


@triton.jit
def _group_norm_silu_whole_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    out_ptr,
    centre_ptr,
    inverse_ptr,
    C,
    P,
    shift_b,
    eps,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # one program: the GROUP channels of one group of one sample, at all positions
    i_b = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < GROUP
    mask = (o_p < P)[:, None] & m_g[None, :]
    o_c = tl.program_id(1) * GROUP + o_g
    # what fits in registers has 32-bit offsets
    o_x = o_p[:, None] * C + o_c[None, :]
    b_x = tl.load(x_ptr + i_b * P * C + o_x, mask=mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        b_shift = tl.load(shift_ptr + i_b * shift_b + o_c, mask=m_g, other=0.0).to(tl.float32)
        b_x = tl.where(mask, b_x + b_shift[None, :], 0.0)

    mean = tl.sum(b_x) / (P * GROUP)
    b_x = tl.where(mask, b_x - mean, 0.0)
    # once more: of a large mean the rounding is left, which a small deviation would magnify
    rest = tl.sum(b_x) / (P * GROUP)
    b_x = tl.where(mask, b_x - rest, 0.0)
    deviation = tl.sqrt(tl.sum(b_x * b_x) / (P * GROUP) + eps)
    if centre_ptr is not None:
        b_centre = tl.zeros([BLOCK_G], tl.float32) + (mean + rest)
        if shift_ptr is not None:
            b_centre -= b_shift
        tl.store(centre_ptr + i_b * C + o_c, b_centre, mask=m_g)
        tl.store(inverse_ptr + i_b * C + o_c, tl.zeros([BLOCK_G], tl.float32) + 1.0 / deviation, mask=m_g)
    b_scale = tl.load(weight_ptr + o_c, mask=m_g, other=0.0).to(tl.float32) / deviation
    b_bias = tl.load(bias_ptr + o_c, mask=m_g, other=0.0).to(tl.float32)
    b_x = b_x * b_scale[None, :] + b_bias[None, :]
    if SILU:
        b_x = _silu(b_x)
    tl.store(out_ptr + i_b * P * C + o_x, b_x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_silu_combine_kernel(
    mean_ptr,
    square_ptr,
    shift_ptr,
    centre_ptr,
    inverse_ptr,
    C,
    P,
    part,
    parts,
    shift_b,
    eps,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # one program: all parts of the GROUP channels of one group of one sample
    i_b = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < GROUP
    o_c = tl.program_id(1) * GROUP + o_g
    mean_ptr += i_b * parts * C
    square_ptr += i_b * parts * C
    b_shift = tl.zeros([BLOCK_G], tl.float32)
    if shift_ptr is not None:
        b_shift = tl.load(shift_ptr + i_b * shift_b + o_c, mask=m_g, other=0.0).to(tl.float32)
    # relative to the first mean: where all are equal nothing is rounded
    first = tl.load(mean_ptr + tl.program_id(1) * GROUP)
    if shift_ptr is not None:
        first += tl.load(shift_ptr + i_b * shift_b + tl.program_id(1) * GROUP).to(tl.float32)

    b_sum = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, parts, BLOCK_S):
        mask = (start + o_s < parts)[:, None] & m_g[None, :]
        o_part = (start + o_s)[:, None] * C + o_c[None, :]
        b_count = tl.where(mask, tl.minimum(part, P - (start + o_s) * part)[:, None], 0)
        b_delta = tl.load(mean_ptr + o_part, mask=mask, other=0.0) + b_shift[None, :] - first
        b_sum += b_count.to(tl.float32) * b_delta
    rest = tl.sum(b_sum) / (P * GROUP)

    b_sum = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, parts, BLOCK_S):
        mask = (start + o_s < parts)[:, None] & m_g[None, :]
        o_part = (start + o_s)[:, None] * C + o_c[None, :]
        b_count = tl.where(mask, tl.minimum(part, P - (start + o_s) * part)[:, None], 0)
        b_delta = tl.load(mean_ptr + o_part, mask=mask, other=0.0) + b_shift[None, :] - first - rest
        b_sum += tl.load(square_ptr + o_part, mask=mask, other=0.0)
        b_sum += b_count.to(tl.float32) * b_delta * b_delta
    deviation = tl.sqrt(tl.sum(b_sum) / (P * GROUP) + eps)
    tl.store(centre_ptr + i_b * C + o_c, first + rest - b_shift, mask=m_g)
    tl.store(inverse_ptr + i_b * C + o_c, tl.zeros([BLOCK_G], tl.float32) + 1.0 / deviation, mask=m_g)


@triton.jit
def _group_norm_silu_apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    centre_ptr,
    inverse_ptr,
    out_ptr,
    C,
    P,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program: BLOCK_P positions of BLOCK_C channels of one sample
    i_b, o_c, m_c, o_x, mask = tile(C, P, BLOCK_P, BLOCK_C)
    b_x = tl.load(x_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    b_scale = row(weight_ptr, o_c, m_c) * row(inverse_ptr + i_b * C, o_c, m_c)
    b_x = (b_x - row(centre_ptr + i_b * C, o_c, m_c)) * b_scale + row(bias_ptr, o_c, m_c)
    if SILU:
        b_x = _silu(b_x)
    tl.store(out_ptr + o_x, b_x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(b_grad, b_n, b_weight, b_bias, SILU: tl.constexpr):
    """() -> the gradient of weight n + bias from that of its activation."""
    if SILU:
        b_y = b_weight * b_n + b_bias
        b_share = 1.0 / (1.0 + tl.exp2(-b_y * LOG2E))
        b_grad *= b_share * (1.0 + b_y * (1.0 - b_share))
    return b_grad


@triton.jit
def _group_norm_silu_bwd_partial_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    bias_ptr,
    centre_ptr,
    inverse_ptr,
    sums_ptr,
    C,
    P,
    part,
    parts,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program: BLOCK_C channels of one sample, at the positions of one part
    i_row, o_c = program(C, BLOCK_C)
    i_b = i_row // parts
    first = (i_row % parts) * part
    last = tl.minimum(first + part, P)
    o_p = tl.arange(0, BLOCK_P)
    m_c = o_c < C
    b_weight, b_bias = row(weight_ptr, o_c, m_c), row(bias_ptr, o_c, m_c)
    b_centre, b_inverse = row(centre_ptr + i_b * C, o_c, m_c), row(inverse_ptr + i_b * C, o_c, m_c)

    b_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_gn = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_P):
        mask = (start + o_p < last)[:, None] & m_c[None, :]
        o_x = i_b * P * C + (start + o_p)[:, None] * C + o_c[None, :]
        b_x = tl.load(x_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
        b_grad = tl.load(grad_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
        b_n = tl.where(mask, (b_x - b_centre) * b_inverse, 0.0)
        b_grad = _gradient(b_grad, b_n, b_weight, b_bias, SILU)
        b_g += b_grad
        b_gn += b_grad * b_n
        b_sum += b_n
    # (B, S, 3, C)
    sums_ptr += i_row * 3 * C + o_c
    tl.store(sums_ptr, tl.sum(b_g, axis=0), mask=m_c)
    tl.store(sums_ptr + C, tl.sum(b_gn, axis=0), mask=m_c)
    tl.store(sums_ptr + 2 * C, tl.sum(b_sum, axis=0), mask=m_c)


@triton.jit
def _group_norm_silu_bwd_combine_kernel(
    sums_ptr,
    weight_ptr,
    inverse_ptr,
    means_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_shift_ptr,
    B,
    C,
    P,
    parts,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # one program: all parts of the GROUP channels of one group of all samples, one after another
    o_s = tl.arange(0, BLOCK_S)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < GROUP
    o_c = tl.program_id(0) * GROUP + o_g
    b_weight = tl.load(weight_ptr + o_c, mask=m_g, other=0.0).to(tl.float32)
    b_grad_weight = tl.zeros([BLOCK_G], tl.float32)
    b_grad_bias = tl.zeros([BLOCK_G], tl.float32)
    for i_b in range(B):
        b_g = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
        b_gn = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
        b_n = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
        for start in range(0, parts, BLOCK_S):
            mask = (start + o_s < parts)[:, None] & m_g[None, :]
            o_part = (i_b * parts + start + o_s)[:, None] * (3 * C) + o_c[None, :]
            b_g += tl.load(sums_ptr + o_part, mask=mask, other=0.0)
            b_gn += tl.load(sums_ptr + C + o_part, mask=mask, other=0.0)
            b_n += tl.load(sums_ptr + 2 * C + o_part, mask=mask, other=0.0)
        b_sum, b_product = tl.sum(b_g, axis=0), tl.sum(b_gn, axis=0)
        b_grad_bias += b_sum
        b_grad_weight += b_product
        mean = tl.sum(b_weight * b_sum) / (P * GROUP)
        mean_product = tl.sum(b_weight * b_product) / (P * GROUP)
        # (B, 2, C)
        o_mean = means_ptr + i_b * 2 * C + o_c
        tl.store(o_mean, tl.zeros([BLOCK_G], tl.float32) + mean, mask=m_g)
        tl.store(o_mean + C, tl.zeros([BLOCK_G], tl.float32) + mean_product, mask=m_g)
        if grad_shift_ptr is not None:
            b_inverse = tl.load(inverse_ptr + i_b * C + o_c, mask=m_g, other=0.0)
            b_shift = (b_weight * b_sum - P * mean - tl.sum(b_n, axis=0) * mean_product) * b_inverse
            tl.store(grad_shift_ptr + i_b * C + o_c, b_shift.to(grad_shift_ptr.dtype.element_ty), mask=m_g)
    tl.store(grad_weight_ptr + o_c, b_grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=m_g)
    tl.store(grad_bias_ptr + o_c, b_grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=m_g)


@triton.jit
def _group_norm_silu_bwd_apply_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    bias_ptr,
    centre_ptr,
    inverse_ptr,
    means_ptr,
    grad_x_ptr,
    C,
    P,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program: BLOCK_P positions of BLOCK_C channels of one sample
    i_b, o_c, m_c, o_x, mask = tile(C, P, BLOCK_P, BLOCK_C)
    b_x = tl.load(x_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    b_grad = tl.load(grad_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    b_weight, b_inverse = row(weight_ptr, o_c, m_c), row(inverse_ptr + i_b * C, o_c, m_c)
    b_n = (b_x - row(centre_ptr + i_b * C, o_c, m_c)) * b_inverse
    b_grad = _gradient(b_grad, b_n, b_weight, row(bias_ptr, o_c, m_c), SILU)
    b_mean, b_product = row(means_ptr + i_b * 2 * C, o_c, m_c), row(means_ptr + (i_b * 2 + 1) * C, o_c, m_c)
    b_grad = (b_weight * b_grad - b_mean - b_n * b_product) * b_inverse
    tl.store(grad_x_ptr + o_x, b_grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _combine_options(group: int, parts: int) -> dict[str, int]:
    block_g = power_of_two(group)
    block_s = min(max(2048 // block_g, 1), power_of_two(parts))
    return {"GROUP": group, "BLOCK_S": block_s, "BLOCK_G": block_g, "num_warps": 4}


class GroupNormSilu(torch.autograd.Function):
    """The kernels, forward and backward, all of channels_last maps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
        grad_enabled: bool,
    ) -> Tensor:
        """(B, C, H, W), (C), (C), (B, C) -> (B, C, H, W)."""
        # an input may require a gradient where autograd records none
        save = grad_enabled and any(ctx.needs_input_grad)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        batch, channels = x.shape[:2]
        positions, group = x.shape[2] * x.shape[3], channels // groups
        weight, bias = weight.contiguous(), bias.contiguous()
        if shift is not None and shift.stride(1) != 1:
            shift = shift.contiguous()
        shift_b = 0 if shift is None else shift.stride(0)
        block_p, block_g = power_of_two(positions), power_of_two(group)
        # a group narrower than 8 channels takes more accesses, and wastes what they read beside it
        whole = block_p * max(block_g, 8) <= LARGEST_WHOLE
        statistics = x.new_empty((2, batch, channels) if save or not whole else (2, 0), dtype=torch.float32)
        if save:
            ctx.save_for_backward(x, weight, bias, statistics)
            ctx.groups, ctx.silu, ctx.shift_dtype = groups, silu, None if shift is None else shift.dtype
        if out.numel() == 0:
            return out
        if whole:
            warps = min(max(block_p * block_g // 512, 1), 16)
            options = {"GROUP": group, "SILU": silu, "BLOCK_P": block_p, "BLOCK_G": block_g, "num_warps": warps}
            kept = statistics if save else (None, None)
            _group_norm_silu_whole_kernel[(batch, groups)](
                x, weight, bias, shift, out, *kept, channels, positions, shift_b, eps, **options
            )
            return out

        mean, square, part = moments(x)
        tiles, parts = share(x, 4), mean.shape[1]
        sizes = channels, positions, part, parts
        _group_norm_silu_combine_kernel[(batch, groups)](
            mean, square, shift, *statistics, *sizes, shift_b, eps, **_combine_options(group, parts)
        )
        _group_norm_silu_apply_kernel[(batch * tiles.tiles * tiles.blocks,)](
            x, weight, bias, *statistics, out, channels, positions, SILU=silu, **tiles.options
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(B, C, H, W) -> (B, C, H, W), (C), (C), (B, C)."""
        x, weight, bias, statistics = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        batch, channels = x.shape[:2]
        make = torch.empty_like if grad.numel() else torch.zeros_like
        grad_x, grad_weight, grad_bias = make(x, memory_format=torch.channels_last), make(weight), make(bias)
        grad_shift = None if ctx.shift_dtype is None else make(statistics[0], dtype=ctx.shift_dtype)
        if grad.numel():
            tiles, positions = share(x, 2), x.shape[2] * x.shape[3]
            sums = x.new_empty((batch, tiles.parts, 3, channels), dtype=torch.float32)
            means = x.new_empty((batch, 2, channels), dtype=torch.float32)
            saved = x, grad, weight, bias, *statistics
            _group_norm_silu_bwd_partial_kernel[(batch * tiles.parts * tiles.blocks,)](
                *saved, sums, channels, positions, tiles.part, tiles.parts, SILU=ctx.silu, **tiles.options
            )
            _group_norm_silu_bwd_combine_kernel[(ctx.groups,)](
                *(sums, weight, statistics[1], means, grad_weight, grad_bias, grad_shift),
                *(batch, channels, positions, tiles.parts),
                **_combine_options(channels // ctx.groups, tiles.parts),
            )
            _group_norm_silu_bwd_apply_kernel[(batch * tiles.tiles * tiles.blocks,)](
                *saved, means, grad_x, channels, positions, SILU=ctx.silu, **tiles.options
            )
        return grad_x, grad_weight, grad_bias, grad_shift, None, None, None, None


def group_norm_silu_obstacle(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> str | None:
    """Say why `group_norm_silu` runs the reference for these tensors; None where it does not."""
    reason = obstacle(x, weight, bias, x if shift is None else shift)
    if reason is None and not x.is_contiguous(memory_format=torch.channels_last):
        return "the input is not channels_last"
    return reason


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    *,
    groups: int,
    eps: float,
    activation: str = "silu",
) -> Tensor:
    """(B, C, H, W), (C), (C), (B, C) -> (B, C, H, W): the activation of GroupNorm(x + shift).

    `activation` is "silu" or "none". Differentiable in all tensors. The kernels take channels_last
    inputs; they compute in float32 and return the dtype of `x`, under autocast too. Raises
    ValueError where shapes do not agree.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 4 or not weight.shape == bias.shape == x.shape[1:2]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} are "
            "not (B, C, H, W), (C) and (C)"
        )
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(f"shift {tuple(shift.shape)} is not (B, C) of x {tuple(x.shape)}")
    if x.shape[1] % groups:
        raise ValueError(f"channels {x.shape[1]} are not a multiple of groups {groups}")
    if group_norm_silu_obstacle(x, weight, bias, shift) is None:
        silu = activation == "silu"
        return GroupNormSilu.apply(x, weight, bias, shift, groups, eps, silu, torch.is_grad_enabled())
    return group_norm_silu_reference(x, weight, bias, shift, groups=groups, eps=eps, activation=activation)
