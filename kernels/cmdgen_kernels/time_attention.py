"""Softmax attention over time: each position of a clip attends to itself at all times.

    out[b, t, p, n] = sum_s softmax_s(q[b, t, p, n] . k[b, s, p, n] / sqrt(D)) v[b, s, p, n]

These are B P N problems of T rows each. Libraries compute tiles of 64 to 128 rows for each, and their
results need a copy back into the order of the map. Here a program takes several positions of one head,
which it reads and writes where they lie: every number of q, k, v and out moves once.
"""

import torch
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.gated_attention import softmax_attention
from cmdgen_kernels.language import power_of_two, tl, triton

LOG2E = 1.4426950408889634
# a warp holds all scores of a position
MOST_FRAMES = 32
# rows of attention over time in one call of a library: CUDA's attention kernels fail from 65,536 on, and
# their gradient counts in 32 bits the bytes of 8 heads
MOST_ROWS = 2**15


def time_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, P, N, D) x 3 -> (B, T, P, N, D): the definition."""
    # fused attention takes four axes: positions of one clip are a batch without a copy
    clips = zip(*(x.permute(0, 2, 3, 1, 4) for x in (q, k, v)), strict=True)  # (P, N, T, D) x 3 each
    parts = [part for clip in clips for part in zip(*(x.split(MOST_ROWS) for x in clip), strict=True)]
    out = torch.cat([softmax_attention(*part) for part in parts])  # (B P, N, T, D)
    return out.unflatten(0, (len(q), -1)).permute(0, 3, 1, 2, 4).contiguous()


@triton.jit
def _time_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    T,
    P,
    N,
    q_row,
    k_row,
    v_row,
    scale,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: a head at BLOCK_P positions of a clip. The heads of a position, side by side in memory, are
    # programs that run together. `scale` makes powers of two of scores
    i_n, i_row = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    n_blocks = tl.cdiv(P, BLOCK_P)
    o_p = i_row % n_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    o_t = tl.arange(0, BLOCK_T)
    m_x = (o_p < P)[:, None, None] & (o_t < T)[None, :, None]
    i_x = ((i_row // n_blocks * T + o_t[None, :]) * P + o_p[:, None])[:, :, None]

    b_s = tl.zeros((BLOCK_P, BLOCK_T, BLOCK_T), tl.float32)
    for i_d in tl.static_range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)[None, None, :]
        b_q = tl.load(q_ptr + i_x * q_row + i_n * D + o_d, mask=m_x & (o_d < D), other=0.0)
        b_k = tl.load(k_ptr + i_x * k_row + i_n * D + o_d, mask=m_x & (o_d < D), other=0.0)
        b_s = tl.dot(b_q, tl.permute(b_k, (0, 2, 1)), b_s, input_precision="ieee")
    b_s = tl.where((o_t < T)[None, None, :], b_s * scale, float("-inf"))
    b_p = tl.exp2(b_s - tl.max(b_s, axis=2)[:, :, None])
    b_p = (b_p / tl.sum(b_p, axis=2)[:, :, None]).to(v_ptr.dtype.element_ty)
    for i_d in tl.static_range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)[None, None, :]
        b_v = tl.load(v_ptr + i_x * v_row + i_n * D + o_d, mask=m_x & (o_d < D), other=0.0)
        b_out = tl.dot(b_p, b_v, input_precision="ieee")
        tl.store(out_ptr + (i_x * N + i_n) * D + o_d, b_out.to(out_ptr.dtype.element_ty), mask=m_x & (o_d < D))


def _rows(x: Tensor) -> Tensor:
    """(B, T, P, N, D) -> (B T P, N D), where it lies if rows lie one after another, as parts of a product do."""
    rows = x.flatten(3).flatten(0, 2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, frames, positions, heads, width = q.shape
    rows = [_rows(each) for each in (q, k, v)]
    # wide heads in parts, which pads them less. A warp has a position, half of one where no tensor core multiplies
    block_p, block_d = (2, 16) if q.dtype == torch.float32 else (4, 64 if width <= 64 else 32)
    _time_attention_fwd_kernel[(batch * heads * triton.cdiv(positions, block_p),)](
        *(*rows, out, frames, positions, heads),
        *(*(each.stride(0) for each in rows), LOG2E * width**-0.5),
        D=width,
        BLOCK_P=block_p,
        BLOCK_T=max(power_of_two(frames), 16),
        BLOCK_D=min(block_d, max(power_of_two(width), 16)),
        num_warps=4,
    )
    return out


def time_attention_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why `time_attention` runs the reference for these tensors; None where it does not."""
    if q.shape[1] > MOST_FRAMES:
        return f"{q.shape[1]} frames are more than {MOST_FRAMES}"
    return inference_obstacle(q, k, v)


def time_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, P, N, D) x 3 -> (B, T, P, N, D), contiguous: attention of each position and head over T.

    The kernel is for inference: where an input requires a gradient the reference runs. Raises
    ValueError where the shapes are not these.
    """
    if q.dim() != 5 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (q, k, v))
        raise ValueError(f"q, k and v of {shapes} are not all (B, T, P, N, D)")
    if time_attention_obstacle(q, k, v) is not None or q.numel() == 0:
        return time_attention_reference(q, k, v)
    return _launch(q, k, v)
