"""Group normalisation of a channels_last map, with an addition before it and an activation after.

    y[b, c, p] = x[b, c, p] + shift[b, c]
    out[b, c, p] = act(weight[c] (y[b, c, p] - mean[b, g]) / deviation[b, g] + bias[c])

where mean and deviation are of y, of the channels of group g at all positions p (Wu & He 2018,
arXiv:1803.08494). Where a group fits in one program's registers, one kernel does it all. Elsewhere
three do, with enough programs to fill a GPU and no atomics:

    partial   each channel's mean and sum of squared deviations in each of S parts of the positions
    combine   these of a group, by Chan et al. 1979's rule, to a scale and an offset per channel
    apply     act(scale x + offset)

Deviations are from a mean, never a difference of sums: a large mean does not cancel them. `shift`
moves a channel's mean and not its deviations, so that only `combine` sees it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.language import power_of_two, program, tl, triton

ACTIVATIONS = ("silu", "none")
LOG2E = tl.constexpr(1.4426950408889634)

# the elements of a group that one program may hold: 64 for each of 512 threads, more would spill
LARGEST_WHOLE = 32768
# to fill a GPU: four for each of some 130 multiprocessors
PROGRAMS = 512


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
    return F.silu(x) if activation == "silu" else x


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
    C,
    P,
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
        b_shift = tl.load(shift_ptr + i_b * C + o_c, mask=m_g, other=0.0).to(tl.float32)
        b_x = tl.where(mask, b_x + b_shift[None, :], 0.0)

    b_x = tl.where(mask, b_x - tl.sum(b_x) / (P * GROUP), 0.0)
    # once more: of a large mean the rounding is left, which a small deviation would magnify
    b_x = tl.where(mask, b_x - tl.sum(b_x) / (P * GROUP), 0.0)
    deviation = tl.sqrt(tl.sum(b_x * b_x) / (P * GROUP) + eps)
    b_scale = tl.load(weight_ptr + o_c, mask=m_g, other=0.0).to(tl.float32) / deviation
    b_bias = tl.load(bias_ptr + o_c, mask=m_g, other=0.0).to(tl.float32)
    b_x = b_x * b_scale[None, :] + b_bias[None, :]
    if SILU:
        b_x = _silu(b_x)
    tl.store(out_ptr + i_b * P * C + o_x, b_x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_silu_partial_kernel(
    x_ptr, mean_ptr, square_ptr, C, P, part, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    # one program: BLOCK_C channels of one sample, at the positions of one part
    i_row, o_c = program(C, BLOCK_C)
    i_b = i_row // parts
    first = (i_row % parts) * part
    last = tl.minimum(first + part, P)
    o_p = tl.arange(0, BLOCK_P)
    m_c = o_c < C
    x_ptr += i_b * P * C

    # Welford's recurrence in each place of the tile, so that the loop needs no exchange of threads
    b_mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_count = tl.zeros([BLOCK_P, 1], tl.float32)
    n_tiles = 0.0
    for start in range(first, last, BLOCK_P):
        n_tiles += 1.0
        m_p = (start + o_p < last)[:, None]
        b_x = tl.load(x_ptr + (start + o_p)[:, None] * C + o_c[None, :], mask=m_p & m_c[None, :], other=0.0).to(
            tl.float32
        )
        b_delta = tl.where(m_p, b_x - b_mean, 0.0)
        b_mean += b_delta * (1.0 / n_tiles)
        b_square += b_delta * (b_x - b_mean)
        b_count += tl.where(m_p, 1.0, 0.0)

    # then the places of each channel, by the same rule as `combine`
    b_channel = tl.sum(b_count * b_mean, axis=0) / (last - first)
    b_delta = b_mean - b_channel[None, :]
    b_square = tl.sum(b_square + b_count * b_delta * b_delta, axis=0)
    tl.store(mean_ptr + i_row * C + o_c, b_channel, mask=m_c)
    tl.store(square_ptr + i_row * C + o_c, b_square, mask=m_c)


@triton.jit
def _group_norm_silu_combine_kernel(
    mean_ptr,
    square_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    scale_ptr,
    offset_ptr,
    C,
    P,
    part,
    parts,
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
        b_shift = tl.load(shift_ptr + i_b * C + o_c, mask=m_g, other=0.0).to(tl.float32)

    b_sum = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, parts, BLOCK_S):
        mask = (start + o_s < parts)[:, None] & m_g[None, :]
        o_part = (start + o_s)[:, None] * C + o_c[None, :]
        b_count = tl.where(mask, tl.minimum(part, P - (start + o_s) * part)[:, None], 0)
        b_mean = tl.load(mean_ptr + o_part, mask=mask, other=0.0) + b_shift[None, :]
        b_sum += b_count.to(tl.float32) * b_mean
    mean = tl.sum(b_sum) / (P * GROUP)

    b_sum = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, parts, BLOCK_S):
        mask = (start + o_s < parts)[:, None] & m_g[None, :]
        o_part = (start + o_s)[:, None] * C + o_c[None, :]
        b_count = tl.where(mask, tl.minimum(part, P - (start + o_s) * part)[:, None], 0)
        b_delta = tl.load(mean_ptr + o_part, mask=mask, other=0.0) + b_shift[None, :] - mean
        b_sum += tl.load(square_ptr + o_part, mask=mask, other=0.0)
        b_sum += b_count.to(tl.float32) * b_delta * b_delta
    # CUDA's approximate 1 / 1 in Welford's first step may leave a little less than nothing
    deviation = tl.sqrt(tl.maximum(tl.sum(b_sum), 0.0) / (P * GROUP) + eps)

    b_scale = tl.load(weight_ptr + o_c, mask=m_g, other=0.0).to(tl.float32) / deviation
    b_offset = tl.load(bias_ptr + o_c, mask=m_g, other=0.0).to(tl.float32)
    tl.store(scale_ptr + i_b * C + o_c, b_scale, mask=m_g)
    tl.store(offset_ptr + i_b * C + o_c, b_offset + (b_shift - mean) * b_scale, mask=m_g)


@triton.jit
def _group_norm_silu_apply_kernel(
    x_ptr, scale_ptr, offset_ptr, out_ptr, C, P, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    # one program: BLOCK_P positions of BLOCK_C channels of one sample
    i_row, o_c = program(C, BLOCK_C)
    n_tiles = tl.cdiv(P, BLOCK_P)
    i_b, o_p = i_row // n_tiles, i_row % n_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = o_c < C
    mask = (o_p < P)[:, None] & m_c[None, :]
    o_x = i_b * P * C + o_p[:, None] * C + o_c[None, :]
    b_x = tl.load(x_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
    b_scale = tl.load(scale_ptr + i_b * C + o_c, mask=m_c, other=0.0)
    b_offset = tl.load(offset_ptr + i_b * C + o_c, mask=m_c, other=0.0)
    b_x = b_x * b_scale[None, :] + b_offset[None, :]
    if SILU:
        b_x = _silu(b_x)
    tl.store(out_ptr + o_x, b_x.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, *, groups: int, eps: float, silu: bool
) -> Tensor:
    """(B, C, H, W), (C), (C), (B, C) -> (B, C, H, W), both channels_last."""
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    batch, channels = x.shape[:2]
    positions, group = x.shape[2] * x.shape[3], channels // groups
    weight, bias = weight.contiguous(), bias.contiguous()
    shift = None if shift is None else shift.contiguous()

    block_p, block_g = power_of_two(positions), power_of_two(group)
    # a group narrower than 8 channels takes more accesses, and wastes what they read beside it
    if block_p * max(block_g, 8) <= LARGEST_WHOLE:
        warps = min(max(block_p * block_g // 512, 1), 16)
        options = {"GROUP": group, "SILU": silu, "BLOCK_P": block_p, "BLOCK_G": block_g}
        _group_norm_silu_whole_kernel[(batch, groups)](
            x, weight, bias, shift, out, channels, positions, eps, num_warps=warps, **options
        )
        return out

    # tiles in which each of 128 threads holds four times 16 bytes, at most 64 channels wide
    block_c = min(64, power_of_two(channels))
    block_p = 128 * 4 * 16 // x.element_size() // block_c
    tile = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4}
    blocks, tiles = triton.cdiv(channels, block_c), triton.cdiv(positions, block_p)
    # the positions of one part, a multiple of the tile's, and the number of parts
    part = triton.cdiv(triton.cdiv(positions, triton.cdiv(PROGRAMS, batch * blocks)), block_p)
    part *= block_p
    parts = triton.cdiv(positions, part)
    mean, square = x.new_empty((2, batch, parts, channels), dtype=torch.float32)
    scale, offset = x.new_empty((2, batch, channels), dtype=torch.float32)
    _group_norm_silu_partial_kernel[(batch * parts * blocks,)](
        x, mean, square, channels, positions, part, parts, **tile
    )
    block_s = min(max(2048 // block_g, 1), power_of_two(parts))
    sizes = channels, positions, part, parts, eps
    options = {"GROUP": group, "BLOCK_S": block_s, "BLOCK_G": block_g, "num_warps": 4}
    _group_norm_silu_combine_kernel[(batch, groups)](
        mean, square, weight, bias, shift, scale, offset, *sizes, **options
    )
    _group_norm_silu_apply_kernel[(batch * tiles * blocks,)](
        x, scale, offset, out, channels, positions, SILU=silu, **tile
    )
    return out


def group_norm_silu_obstacle(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> str | None:
    """Say why `group_norm_silu` runs the reference for these tensors; None where it does not."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the input is not channels_last"
    return inference_obstacle(x, weight, bias, *(() if shift is None else (shift,)))


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

    `activation` is "silu" or "none". The kernels take channels_last inputs and are for inference:
    where an input requires a gradient the reference runs. Raises ValueError where shapes do not
    agree.
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
        return _launch(x, weight, bias, shift, groups=groups, eps=eps, silu=silu)
    return group_norm_silu_reference(x, weight, bias, shift, groups=groups, eps=eps, activation=activation)
