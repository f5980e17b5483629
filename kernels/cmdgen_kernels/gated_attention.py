"""Threshold-gated attention: linear in the length L where L > threshold * D, softmax elsewhere.

The gate is eq. 14 of EVDM (ACM MM 2023), on shapes alone. The linear attention is FAVOR+
(Choromanski et al. 2021, arXiv:2009.14794): with positive features
phi_m(x) = exp(w_m . x' - |x'|^2 / 2) of x' = x / D^(1/4),

    out_l = sum_m phi_m(q_l) (sum_j phi_m(k_j) v_j) / sum_m phi_m(q_l) (sum_j phi_m(k_j))

estimates softmax(q k / sqrt(D)) v without bias in numerator and denominator. Both sums over m are
the same expectation under weights phi_m(q_l) z_m, z_m = sum_j phi_m(k_j), so the fraction is two
softmax attentions, through M features in the middle:

    u_m = softmax_j(w_m . k'_j - |k'_j|^2 / 2) v        the features attend over the tokens
    out_l = softmax_m(w_m . q'_l + log z_m) u           the tokens attend over the features

|q'|^2 cancels. In this form, which is exact, each softmax subtracts its own maximum: nothing
overflows, no denominator is below 1, and the stabilising epsilon of other implementations, which
mixes in the mean of v, is not needed.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmdgen_kernels.dispatch import obstacle, shared_memory, since_hopper
from cmdgen_kernels.language import power_of_two, program, tl, triton

# wider heads do not fit the registers
WIDEST = 256
# bytes of shared memory for heads wider than 128: compute capabilities 8.0 and 9.0 have them
WIDE_ROOM = 160 * 1024
# on a GPU, the first that can: cuDNN's is not among them, see `pays_cudnn`
ATTENTION_LIBRARIES = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# operations from which cuDNN's attention is worth its plan, and the widest heads whose plan takes no second.
# Measured on an H100 in float16, flash against cuDNN: 587:351 us for 2x5x8192x64 over as many, 20:15 over 77,
# 17:12 for 1x16x512x72, 280:136 for 32x8x4096x40 over 77; but 5.5:6.0 for 2x20x128x64, 7.7:8.5 for 2x20x512x64 over 77
CUDNN_OPERATIONS, CUDNN_WIDTH = 1e9, 128


def orthogonal_features(features: int, width: int, *, generator: torch.Generator | None = None) -> Tensor:
    """() -> (M, D) float32: rows as long as Gaussian ones, orthogonal in blocks of D.

    Sec. 2.4 of arXiv:2009.14794. The sign of R's diagonal makes Q uniform among rotations.
    """
    blocks = math.ceil(features / width)
    q, r = torch.linalg.qr(torch.randn(blocks, width, width, generator=generator))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    lengths = torch.randn(features, width, generator=generator).norm(dim=1, keepdim=True)
    return q.flatten(0, 1)[:features] * lengths


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, L, D), (B, N, M, D) x 2 -> (B, N, L, D): softmax of the scaled scores over M."""
    # on a CPU the fused kernel loses on short rows. Forward and backward, fused against plain:
    # float32 30:13 ms at L = 16, 29:29 at 64, 115:202 at 512; bfloat16 141:14, 88:20, 111:111
    if q.device.type == "cpu" and is_short(q):
        return plain_attention(q, k, v)
    if pays_cudnn(q, k):
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *ATTENTION_LIBRARIES], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def pays_cudnn(q: Tensor, k: Tensor) -> bool:
    """Return whether cuDNN's attention pays on a GPU: from Hopper on, where there is much to do.

    It makes a plan for each shape, which takes 40 ms in every process. Gradients are left to flash
    attention: NaN has been reported of cuDNN's.
    """
    if q.device.type != "cuda" or q.shape[-1] > CUDNN_WIDTH or torch.is_grad_enabled():
        return False
    return 4 * q.numel() * k.shape[-2] >= CUDNN_OPERATIONS and since_hopper(q.device)


def is_short(q: Tensor) -> bool:
    """Return whether a CPU holds all scores of these queries (B, N, L, D)."""
    return q.shape[-2] <= (256 if q.dtype.itemsize == 2 else 32)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, L, D), (B, N, M, D) x 2 -> (B, N, L, D), by scores that are in memory all at once."""
    scores = q @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1).to(v.dtype) @ v


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """(B, N, L, D) x 3, (M, D) -> (B, N, L, D): FAVOR+ as two softmax attentions.

    Products in the dtype of q, everything between them in float32 at least.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.25
    features = projection.to(q.dtype).T
    length = (k.to(wide) * scale).square().sum(dim=-1, keepdim=True) / 2
    # in place: at (B, N, L, M) what costs most on a CPU is memory that was never touched
    scores = (k @ features).to(wide).mul_(scale).sub_(length)
    u = scores.softmax(dim=-2).to(v.dtype).transpose(-1, -2) @ v  # (B, N, M, D)
    log_z = scores.logsumexp(dim=-2, keepdim=True)  # (B, N, 1, M)
    scores = (q @ features).to(wide).mul_(scale).add_(log_z)
    return scores.softmax(dim=-1).to(v.dtype) @ u


@triton.jit
def _tokens(i_h, o_l, o_d, N, L, D):
    # the offsets of one head's tokens and their mask: (B, L, N, D) in memory, as a linear layer leaves it
    m_x = (o_l < L)[:, None] & (o_d < D)[None, :]
    o_l = (i_h // N * L + o_l).to(tl.int64)
    return (o_l * N + i_h % N)[:, None] * D + o_d[None, :], m_x


@triton.jit
def _features(projection_ptr, u_ptr, i_h, o_m, o_d, M, D):
    # some features: their masks, their rows of the projection, and what they hold of one head
    m_m = o_m < M
    m_w = m_m[:, None] & (o_d < D)[None, :]
    o_w = o_m[:, None] * D + o_d[None, :]
    b_w = tl.load(projection_ptr + o_w, mask=m_w, other=0.0)
    return m_m, m_w, b_w, tl.load(u_ptr + i_h * M * D + o_w, mask=m_w, other=0.0)


@triton.jit
def _log_z(z_max_ptr, z_sum_ptr, o_m, m_m):
    b_max = tl.load(z_max_ptr + o_m, mask=m_m, other=float("-inf"))
    return b_max + tl.log(tl.load(z_sum_ptr + o_m, mask=m_m, other=1.0))


@triton.jit
def _attend(b_s, b_v, b_max, b_sum, b_acc):
    # one block of scores and values: its softmax continues those of the blocks before it
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_p = tl.exp(b_s - b_new[:, None])
    b_scale = tl.exp(b_max - b_new)
    b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
    b_acc *= b_scale[:, None]
    return b_new, b_sum, tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")


@triton.jit
def _summary_fwd_kernel(
    k_ptr,
    v_ptr,
    projection_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    N,
    L,
    SPLIT,
    scale,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M features of one head attend over SPLIT tokens
    i_h, o_m = program(M, BLOCK_M)
    i_s = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < M
    m_w = m_m[:, None] & (o_d < D)[None, :]
    b_w = tl.load(projection_ptr + o_m[:, None] * D + o_d[None, :], mask=m_w, other=0.0)

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(i_s * SPLIT, tl.minimum((i_s + 1) * SPLIT, L), BLOCK_L):
        o_l = start + tl.arange(0, BLOCK_L)
        o_x, m_x = _tokens(i_h, o_l, o_d, N, L, D)
        b_k = tl.load(k_ptr + o_x, mask=m_x, other=0.0)
        b_v = tl.load(v_ptr + o_x, mask=m_x, other=0.0)
        b_wide = b_k.to(tl.float32) * scale
        b_length = tl.sum(b_wide * b_wide, axis=1) / 2
        b_s = tl.dot(b_w, tl.trans(b_k), input_precision="ieee") * scale - b_length[None, :]
        b_s = tl.where((o_l < L)[None, :], b_s, float("-inf"))
        b_max, b_sum, b_acc = _attend(b_s, b_v, b_max, b_sum, b_acc)

    o_out = (i_h * tl.num_programs(1) + i_s) * M + o_m
    tl.store(partial_ptr + o_out[:, None] * D + o_d[None, :], b_acc, mask=m_w)
    tl.store(max_ptr + o_out, b_max, mask=m_m)
    tl.store(sum_ptr + o_out, b_sum, mask=m_m)


@triton.jit
def _summary_combine_kernel(
    partial_ptr,
    max_ptr,
    sum_ptr,
    u_ptr,
    wide_ptr,
    z_max_ptr,
    z_sum_ptr,
    SPLITS,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_M features of one head, their splits in order
    i_h, o_m = program(M, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < M
    m_w = m_m[:, None] & (o_d < D)[None, :]

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_s in range(0, SPLITS):
        o_in = (i_h * SPLITS + i_s) * M + o_m
        b_part = tl.load(partial_ptr + o_in[:, None] * D + o_d[None, :], mask=m_w, other=0.0)
        b_part_max = tl.load(max_ptr + o_in, mask=m_m, other=0.0)
        b_new = tl.maximum(b_max, b_part_max)
        b_old, b_scale = tl.exp(b_max - b_new), tl.exp(b_part_max - b_new)
        b_sum = b_sum * b_old + tl.load(sum_ptr + o_in, mask=m_m, other=1.0) * b_scale
        b_acc = b_acc * b_old[:, None] + b_part * b_scale[:, None]
        b_max = b_new
    b_acc /= b_sum[:, None]

    o_out = i_h * M + o_m
    o_u = o_out[:, None] * D + o_d[None, :]
    tl.store(u_ptr + o_u, b_acc.to(u_ptr.dtype.element_ty), mask=m_w)
    if wide_ptr is not None:
        tl.store(wide_ptr + o_u, b_acc, mask=m_w)
    tl.store(z_max_ptr + o_out, b_max, mask=m_m)
    tl.store(z_sum_ptr + o_out, b_sum, mask=m_m)


@triton.jit
def _readout_fwd_kernel(
    q_ptr,
    projection_ptr,
    u_ptr,
    z_max_ptr,
    z_sum_ptr,
    out_ptr,
    wide_ptr,
    max_ptr,
    sum_ptr,
    N,
    L,
    scale,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SAVE: tl.constexpr,
):
    # one program: BLOCK_L tokens of one head attend over the features
    i_h, o_l = program(L, BLOCK_L)
    o_d = tl.arange(0, BLOCK_D)
    o_x, m_x = _tokens(i_h, o_l, o_d, N, L, D)
    b_q = tl.load(q_ptr + o_x, mask=m_x, other=0.0)

    b_max = tl.full([BLOCK_L], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_L], tl.float32)
    b_acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m, _, b_w, b_u = _features(projection_ptr, u_ptr, i_h, o_m, o_d, M, D)
        b_log_z = _log_z(z_max_ptr, z_sum_ptr, i_h * M + o_m, m_m)
        b_s = tl.dot(b_q, tl.trans(b_w), input_precision="ieee") * scale + b_log_z[None, :]
        b_max, b_sum, b_acc = _attend(b_s, b_u, b_max, b_sum, b_acc)
    b_acc /= b_sum[:, None]

    # (B, N, L, D) in memory: offsets like those of q would stay in registers through the loop
    o_out = (i_h * L + o_l)[:, None] * D + o_d[None, :]
    tl.store(out_ptr + o_out, b_acc.to(out_ptr.dtype.element_ty), mask=m_x)
    if wide_ptr is not None:
        tl.store(wide_ptr + o_out, b_acc, mask=m_x)
    if SAVE:
        tl.store(max_ptr + i_h * L + o_l, b_max, mask=o_l < L)
        tl.store(sum_ptr + i_h * L + o_l, b_sum, mask=o_l < L)


@triton.jit
def _readout_bwd_kernel(
    q_ptr,
    projection_ptr,
    u_ptr,
    z_max_ptr,
    z_sum_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    grad_ptr,
    grad_q_ptr,
    delta_ptr,
    N,
    L,
    scale,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: d q of BLOCK_L tokens of one head, and their delta = out . d out
    i_h, o_l = program(L, BLOCK_L)
    o_d = tl.arange(0, BLOCK_D)
    m_l = o_l < L
    o_x, m_x = _tokens(i_h, o_l, o_d, N, L, D)
    b_q = tl.load(q_ptr + o_x, mask=m_x, other=0.0)
    b_grad = tl.load(grad_ptr + o_x, mask=m_x, other=0.0)
    o_out = (i_h * L + o_l)[:, None] * D + o_d[None, :]
    b_out = tl.load(out_ptr + o_out, mask=m_x, other=0.0)
    b_max = tl.load(max_ptr + i_h * L + o_l, mask=m_l, other=0.0)
    b_sum = tl.load(sum_ptr + i_h * L + o_l, mask=m_l, other=1.0)
    b_delta = tl.sum(b_out * b_grad.to(tl.float32), axis=1)
    tl.store(delta_ptr + i_h * L + o_l, b_delta, mask=m_l)

    b_acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m, _, b_w, b_u = _features(projection_ptr, u_ptr, i_h, o_m, o_d, M, D)
        b_log_z = _log_z(z_max_ptr, z_sum_ptr, i_h * M + o_m, m_m)
        b_s = tl.dot(b_q, tl.trans(b_w), input_precision="ieee") * scale + b_log_z[None, :]
        b_p = tl.exp(b_s - b_max[:, None]) / b_sum[:, None]
        b_ds = tl.dot(b_grad, tl.trans(b_u), input_precision="ieee") - b_delta[:, None]
        b_ds *= b_p
        b_acc = tl.dot(b_ds.to(b_w.dtype), b_w, b_acc, input_precision="ieee")
    tl.store(grad_q_ptr + o_x, (b_acc * scale).to(grad_q_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def _summary_bwd_kernel(
    q_ptr,
    projection_ptr,
    u_ptr,
    z_max_ptr,
    z_sum_ptr,
    max_ptr,
    sum_ptr,
    delta_ptr,
    grad_ptr,
    grad_u_ptr,
    grad_log_z_ptr,
    N,
    L,
    SPLIT,
    scale,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: d u and d log z of BLOCK_M features of one head, by SPLIT tokens
    i_h, o_m = program(M, BLOCK_M)
    i_s = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    m_m, m_w, b_w, b_u = _features(projection_ptr, u_ptr, i_h, o_m, o_d, M, D)
    b_log_z = _log_z(z_max_ptr, z_sum_ptr, i_h * M + o_m, m_m)

    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_grad_log_z = tl.zeros([BLOCK_M], tl.float32)
    for start in range(i_s * SPLIT, tl.minimum((i_s + 1) * SPLIT, L), BLOCK_L):
        o_l = start + tl.arange(0, BLOCK_L)
        m_l = o_l < L
        o_x, m_x = _tokens(i_h, o_l, o_d, N, L, D)
        b_q = tl.load(q_ptr + o_x, mask=m_x, other=0.0)
        b_grad = tl.load(grad_ptr + o_x, mask=m_x, other=0.0)
        # past the end every weight is zero
        b_max = tl.load(max_ptr + i_h * L + o_l, mask=m_l, other=float("inf"))
        b_sum = tl.load(sum_ptr + i_h * L + o_l, mask=m_l, other=1.0)
        b_delta = tl.load(delta_ptr + i_h * L + o_l, mask=m_l, other=0.0)
        b_s = tl.dot(b_w, tl.trans(b_q), input_precision="ieee") * scale + b_log_z[:, None]
        b_p = tl.exp(b_s - b_max[None, :]) / b_sum[None, :]
        b_acc = tl.dot(b_p.to(b_grad.dtype), b_grad, b_acc, input_precision="ieee")
        b_ds = tl.dot(b_u, tl.trans(b_grad), input_precision="ieee") - b_delta[None, :]
        b_grad_log_z += tl.sum(b_p * b_ds, axis=1)

    o_out = (i_h * tl.num_programs(1) + i_s) * M + o_m
    tl.store(grad_u_ptr + o_out[:, None] * D + o_d[None, :], b_acc, mask=m_w)
    tl.store(grad_log_z_ptr + o_out, b_grad_log_z, mask=m_m)


@triton.jit
def _tokens_bwd_kernel(
    k_ptr,
    v_ptr,
    projection_ptr,
    z_max_ptr,
    z_sum_ptr,
    grad_u_ptr,
    shift_ptr,
    grad_k_ptr,
    grad_v_ptr,
    N,
    L,
    RAISE,
    scale,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: d k and d v of BLOCK_L tokens of one head, by all features. Weights are RAISE
    # times too large, and what they multiply as much too small: float16's subnormals are coarse
    i_h, o_l = program(L, BLOCK_L)
    o_d = tl.arange(0, BLOCK_D)
    o_x, m_x = _tokens(i_h, o_l, o_d, N, L, D)
    b_k = tl.load(k_ptr + o_x, mask=m_x, other=0.0)
    b_v = tl.load(v_ptr + o_x, mask=m_x, other=0.0)
    b_wide = b_k.to(tl.float32) * scale
    b_length = tl.sum(b_wide * b_wide, axis=1) / 2

    b_grad_k = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    b_grad_v = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m, _, b_w, b_grad_u = _features(projection_ptr, grad_u_ptr, i_h, o_m, o_d, M, D)
        # past the end every weight is zero
        b_max = tl.load(z_max_ptr + i_h * M + o_m, mask=m_m, other=float("inf"))
        b_mean = tl.load(z_sum_ptr + i_h * M + o_m, mask=m_m, other=1.0) / RAISE
        b_shift = tl.load(shift_ptr + i_h * M + o_m, mask=m_m, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_w), input_precision="ieee") * scale - b_length[:, None]
        b_p = tl.exp(b_s - b_max[None, :]) / b_mean[None, :]
        b_grad_v = tl.dot(b_p.to(b_v.dtype), b_grad_u, b_grad_v, input_precision="ieee")
        b_ds = tl.dot(b_v, tl.trans(b_grad_u), input_precision="ieee") + b_shift[None, :]
        b_ds *= b_p
        b_sum += tl.sum(b_ds, axis=1)
        b_grad_k = tl.dot(b_ds.to(b_w.dtype), b_w, b_grad_k, input_precision="ieee")

    # the score is w . k' - |k'|^2 / 2: its gradient is w - k'
    b_grad_k = (b_grad_k - b_wide * b_sum[:, None]) * scale
    tl.store(grad_k_ptr + o_x, b_grad_k.to(grad_k_ptr.dtype.element_ty), mask=m_x)
    tl.store(grad_v_ptr + o_x, b_grad_v.to(grad_v_ptr.dtype.element_ty), mask=m_x)


# by BLOCK_D: features and tokens of a block, warps, stages. Chosen by compiling ahead of time: more
# of anything spills registers on sm_80 or sm_90; 256 features at once spill at any width
_SUMMARY_FWD = {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)}
_SUMMARY_COMBINE = {64: (64, 1, 8, 1), 128: (64, 1, 8, 1), 256: (32, 1, 8, 1)}
_READOUT_FWD = {64: (64, 128, 4, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)}
_READOUT_BWD = {64: (64, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)}
_SUMMARY_BWD = {64: (64, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 64, 8, 2)}
_TOKENS_BWD = {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)}
# in float32, which has no tensor cores
_FLOAT32 = {64: (32, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)}


def _options(table: dict[int, tuple[int, int, int, int]], projection: Tensor) -> dict[str, int]:
    """(M, D) -> how one of the kernels is launched."""
    features, width = projection.shape
    if projection.dtype == torch.float32 and table is not _SUMMARY_COMBINE:
        table = _FLOAT32
    block_d = max(16, power_of_two(width))
    block_m, block_l, warps, stages = table[max(64, block_d)]
    return {
        "M": features,
        "D": width,
        "BLOCK_M": min(block_m, max(16, power_of_two(features))),
        "BLOCK_L": block_l,
        "BLOCK_D": block_d,
        "num_warps": warps,
        "num_stages": stages,
    }


def _split(length: int, programs: int, block: int) -> tuple[int, int]:
    """Tokens that one program walks, and how many programs: some 500 in all, 4 blocks at least."""
    splits = max(1, min(512 // programs, length // (4 * block)))
    tokens = triton.cdiv(triton.cdiv(length, splits), block) * block
    return tokens, triton.cdiv(length, tokens)


def _wide(x: Tensor, save: bool) -> Tensor | None:
    """Return room for what is in float32 before it is rounded to `x`, where a gradient wants it.

    A softmax's gradient subtracts the product of its result and that result's gradient. Of a
    rounded one, what is left after the weights' products cancel is wrong by as much for all.
    """
    return x.new_empty(x.shape, dtype=torch.float32) if save and x.dtype != torch.float32 else None


class LinearAttention(torch.autograd.Function):
    """FAVOR+: in the summary the features attend over the tokens, in the readout the reverse.

    Inputs and gradients are (B, L, N, D) in memory, as linear layers read and write them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, grad_enabled: bool) -> Tensor:
        """(B, N, L, D) x 3, (M, D) -> (B, N, L, D)."""
        batch, heads, length, width = q.shape
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        projection = projection.to(q.dtype).contiguous()
        features, rows, scale = projection.shape[0], batch * heads, width**-0.25
        # an input may require a gradient where autograd records none
        save = grad_enabled and any(ctx.needs_input_grad)

        options = _options(_SUMMARY_FWD, projection)
        programs = rows * triton.cdiv(features, options["BLOCK_M"])
        split, splits = _split(length, programs, options["BLOCK_L"])
        partial = q.new_empty(rows, splits, features, width, dtype=torch.float32)
        partial_z = q.new_empty(2, rows, splits, features, dtype=torch.float32)
        _summary_fwd_kernel[(programs, splits)](
            k, v, projection, partial, *partial_z, heads, length, split, scale, **options
        )
        u = q.new_empty(rows, features, width)
        wide_u = _wide(u, save)
        z = q.new_empty(2, rows, features, dtype=torch.float32)
        options = _options(_SUMMARY_COMBINE, projection)
        _summary_combine_kernel[(rows * triton.cdiv(features, options["BLOCK_M"]),)](
            partial, *partial_z, u, wide_u, *z, splits, **options
        )
        out = q.new_empty(batch, heads, length, width)
        wide = _wide(out, save)
        saved = q.new_empty((2, rows, length) if save else (2, 0), dtype=torch.float32)
        options = _options(_READOUT_FWD, projection)
        _readout_fwd_kernel[(rows * triton.cdiv(length, options["BLOCK_L"]),)](
            q, projection, u, *z, out, wide, *saved, heads, length, scale, SAVE=save, **options
        )
        if save:
            wide_u, wide = u if wide_u is None else wide_u, out if wide is None else wide
            ctx.save_for_backward(q, k, v, projection, u, wide_u, z, wide, saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(B, N, L, D) -> (B, N, L, D) x 3, nothing for the others."""
        q, k, v, projection, u, wide_u, z, out, saved = ctx.saved_tensors
        batch, length, heads, width = q.shape
        grad = grad.transpose(1, 2).contiguous()
        features, rows, scale = projection.shape[0], batch * heads, width**-0.25

        grad_q, grad_k, grad_v = (torch.empty_like(q) for _ in range(3))
        delta = torch.empty_like(saved[0])
        options = _options(_READOUT_BWD, projection)
        _readout_bwd_kernel[(rows * triton.cdiv(length, options["BLOCK_L"]),)](
            q, projection, u, *z, *saved, out, grad, grad_q, delta, heads, length, scale, **options
        )
        options = _options(_SUMMARY_BWD, projection)
        programs = rows * triton.cdiv(features, options["BLOCK_M"])
        split, splits = _split(length, programs, options["BLOCK_L"])
        grad_u = q.new_empty(rows, splits, features, width, dtype=torch.float32)
        grad_log_z = q.new_empty(rows, splits, features, dtype=torch.float32)
        sizes = heads, length, split, scale
        _summary_bwd_kernel[(programs, splits)](
            q, projection, u, *z, *saved, delta, grad, grad_u, grad_log_z, *sizes, **options
        )
        # u and log z are the value and the normaliser of one softmax: both gradients meet in it
        raised = min(length, 2**14)
        # rounded as the kernel multiplies it
        grad_u = (grad_u.sum(dim=1) / raised).to(q.dtype)
        shift = grad_log_z.sum(dim=1) / raised - (grad_u * wide_u).sum(dim=-1)
        sizes = heads, length, raised, scale
        options = _options(_TOKENS_BWD, projection)
        _tokens_bwd_kernel[(rows * triton.cdiv(length, options["BLOCK_L"]),)](
            k, v, projection, *z, grad_u, shift, grad_k, grad_v, *sizes, **options
        )
        return *(x.transpose(1, 2) for x in (grad_q, grad_k, grad_v)), None, None


def gated_attention_reference(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, threshold: float = 2.0) -> Tensor:
    """(B, N, L, D) x 3, (M, D) -> (B, N, L, D): the definition of `gated_attention`."""
    if q.shape[2] > threshold * q.shape[3]:
        return linear_attention_reference(q, k, v, projection)
    return softmax_attention(q, k, v)


def gated_attention_obstacle(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, threshold: float = 2.0
) -> str | None:
    """Say why `gated_attention` runs no kernel of ours for these tensors; None where it does."""
    if q.shape[2] <= threshold * q.shape[3]:
        return "softmax attention is PyTorch's"
    if not q.dtype == k.dtype == v.dtype:
        return "q, k and v differ in dtype"
    if q.shape[-1] > WIDEST:
        return f"heads of width {q.shape[-1]} are wider than {WIDEST}"
    if q.numel() == 0:
        return "there is nothing to attend to"
    reason = obstacle(q, k, v, projection)
    if reason is None and q.is_cuda and q.shape[-1] > 128 and shared_memory(q.device) < WIDE_ROOM:
        return f"heads of width {q.shape[-1]} need more shared memory than this GPU has"
    return reason


def gated_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, *, threshold: float = 2.0) -> Tensor:
    """(B, N, L, D) x 3, (M, D) -> (B, N, L, D): FAVOR+ where L > threshold * D, else softmax.

    Self-attention, not causal; differentiable in q, k and v. `projection` is `orthogonal_features`,
    kept with the weights. Raises ValueError where shapes do not agree.
    """
    if q.dim() != 4 or not q.shape == k.shape == v.shape or projection.shape[1:] != q.shape[3:]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and projection "
            f"{tuple(projection.shape)} are not (B, N, L, D) x 3 and (M, D)"
        )
    if gated_attention_obstacle(q, k, v, projection, threshold=threshold) is None:
        return LinearAttention.apply(q, k, v, projection, torch.is_grad_enabled())
    return gated_attention_reference(q, k, v, projection, threshold=threshold)
