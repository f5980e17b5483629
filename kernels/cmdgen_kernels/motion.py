"""Motion latents of a video's tokens, by columns and by rows, and the tokens of motion latents.

    motion_latents   y[b, k, t, w]     = f(weight_w mean_h u[b, t, h, w, :] + bias_w)
                     y[b, k, t, W + h] = f(weight_h mean_w u[b, t, h, w, :] + bias_h)
    motion_tokens    u[b, t, h, w, :]  = content[b, h, w, :]
                                       + weight_w z[b, :, t, w] + bias_w
                                       + weight_h z[b, :, t, W + h] + bias_h

Eq. 4 (f = tanh) and Eq. 6 of Yu et al. 2024 (arXiv:2403.14148). But for f, constants and content
each is the other's adjoint, so one file holds both: the backward of each is a launch of the other's
kernel, with the weights transposed.

`motion_latents` reads u once. A program adds up some rows of one frame, for a block of D, into
column sums and row sums. A projection is linear, so it projects these unfinished sums at once and
writes K numbers for each in place of D; a second, small kernel adds them in a fixed order.

`motion_tokens` writes u once. A first, small kernel projects the latents to lines, one of D numbers
for each column and row of a frame. The second adds: a thread keeps the content of some tokens in
registers and goes through the frames. A line serves a whole column or row: to project it again in
each program that adds it takes longer than to read it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmdgen_kernels.dispatch import obstacle
from cmdgen_kernels.language import power_of_two, program, tl, triton

LOG2E = tl.constexpr(1.4426950408889634)

# enough to occupy a GPU to the end: some thirty for each of some 130 multiprocessors
WARPS = 4096
# rows or frames that a program takes: with fewer, what it does once would dominate
LEAST_STEPS = 4
# consecutive bytes of one token's channels: a line of the cache
LINE = 128
# `_motion_sums_kernel` holds the rows' weights in registers
MOST_CHANNELS = 16


def motion_latents_reference(
    u: Tensor, weight_w: Tensor, bias_w: Tensor, weight_h: Tensor, bias_h: Tensor, *, activation: str = "tanh"
) -> Tensor:
    """(B, T, H, W, D), (K, D), (K,), (K, D), (K,) -> (B, K, T, W + H): the definition."""
    wide = torch.promote_types(u.dtype, torch.float32)
    means = u.mean(dim=2, dtype=wide), u.mean(dim=3, dtype=wide)
    across = F.linear(means[0], weight_w.to(wide), bias_w.to(wide))  # (B, T, W, K)
    down = F.linear(means[1], weight_h.to(wide), bias_h.to(wide))  # (B, T, H, K)
    motion = torch.cat((across, down), dim=2)
    if activation == "tanh":
        motion = motion.tanh()
    return motion.permute(0, 3, 1, 2).to(u.dtype)


def motion_tokens_reference(
    content: Tensor, motion: Tensor, weight_w: Tensor, bias_w: Tensor, weight_h: Tensor, bias_h: Tensor
) -> Tensor:
    """(B, H, W, D), (B, K, T, W + H), (D, K), (D,), (D, K), (D,) -> (B, T, H, W, D)."""
    wide = torch.promote_types(content.dtype, torch.float32)
    height, width = content.shape[1:3]
    latents = motion.to(wide).permute(2, 0, 3, 1)  # (T, B, W + H, K)
    across, down = latents.split((width, height), dim=2)
    # autocast may have its way with the small products; the sums are wide
    across = F.linear(across, weight_w.to(wide), bias_w.to(wide)).to(wide)  # (T, B, W, D)
    down = F.linear(down, weight_h.to(wide), bias_h.to(wide)).to(wide)  # (T, B, H, D)
    tokens = across[:, :, None] + content.to(wide)
    tokens += down[:, :, :, None]
    return tokens.to(content.dtype).transpose(0, 1)


@triton.jit
def _tanh(x):
    # both as a main term less a small one, whose roundings do not count: near zero by five steps of
    # Lambert's continued fraction, elsewhere by the exponential, which would cancel near zero
    z = x * x
    near = x - x * (z * (315.0 + 14.0 * z) / (945.0 + z * (420.0 + 15.0 * z)))
    b_exp = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - 2.0 * b_exp / (1.0 + b_exp))
    return tl.where(z < 0.5, near, far)


@triton.jit
def _motion_sums_kernel(
    u_ptr,
    weight_w_ptr,
    weight_h_ptr,
    partial_ptr,
    columns_ptr,
    rows_ptr,
    T,
    H,
    W,
    D,
    u_b,
    u_t,
    u_h,
    u_w,
    ROWS,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SAVE: tl.constexpr,
):
    # one program: ROWS rows by BLOCK_W columns of one frame (b, t), BLOCK_D of D
    n_d, n_w = tl.cdiv(D, BLOCK_D), tl.cdiv(W, BLOCK_W)
    i_d = tl.program_id(0) % n_d
    i_w = tl.program_id(0) // n_d % n_w
    i_frame = (tl.program_id(0) // (n_d * n_w)).to(tl.int64)
    i_split, n_splits = tl.program_id(1), tl.num_programs(1)
    n_frames = tl.num_programs(0) // (n_d * n_w)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    o_k = tl.arange(0, BLOCK_K)
    m_d, m_w, m_k = o_d < D, o_w < W, o_k < K
    u_ptr += i_frame // T * u_b + i_frame % T * u_t + (i_split * ROWS).to(tl.int64) * u_h
    o_u = o_w.to(tl.int64)[:, None] * u_w + o_d[None, :]
    m_u = m_w[:, None] & m_d[None, :]

    # partial sums are (parts, B, K, T, W + H): column w of part p, row h of part q
    o_partial = (i_frame // T * K * T + i_frame % T) * (W + H)
    part = n_frames * K * (W + H)
    column_ptr = partial_ptr + (i_d * n_splits + i_split).to(tl.int64) * part + o_partial
    row_ptr = partial_ptr + (i_d * n_w + i_w).to(tl.int64) * part + o_partial + W
    o_weight, m_weight = o_k[:, None] * D + o_d[None, :], m_k[:, None] & m_d[None, :]
    b_weight_h = tl.load(weight_h_ptr + o_weight, mask=m_weight, other=0.0).to(tl.float32)

    b_columns = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    for h in range(i_split * ROWS, tl.minimum((i_split + 1) * ROWS, H)):
        b_u = tl.load(u_ptr + o_u, mask=m_u, other=0.0).to(tl.float32)
        b_columns += b_u
        b_row = tl.sum(b_u, axis=0)
        b_down = tl.sum(b_row[None, :] * b_weight_h, axis=1)
        tl.store(row_ptr + o_k * (T * (W + H)) + h, b_down, mask=m_k)
        if SAVE:
            o_row = ((i_w * n_frames + i_frame) * H + h) * D
            tl.store(rows_ptr + o_row + o_d, b_row, mask=m_d)
        u_ptr += u_h

    for k in range(K):
        b_weight = tl.load(weight_w_ptr + k * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_across = tl.sum(b_columns * b_weight[None, :], axis=1)
        tl.store(column_ptr + k * (T * (W + H)) + o_w, b_across, mask=m_w)
    if SAVE:
        o_columns = ((i_split * n_frames + i_frame) * W + o_w[:, None]) * D + o_d[None, :]
        tl.store(columns_ptr + o_columns, b_columns, mask=m_u)


@triton.jit
def _motion_combine_kernel(
    partial_ptr,
    bias_w_ptr,
    bias_h_ptr,
    motion_ptr,
    N,
    T,
    W,
    S,
    count_w,
    count_h,
    parts_w,
    parts_h,
    K: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program: BLOCK_N of the N = B K T S latents
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_k = o_n // (T * S) % K
    m_across = o_n % S < W
    n_parts = tl.where(m_across, parts_w, parts_h)
    b_motion = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, tl.maximum(parts_w, parts_h), BLOCK_P):
        o_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        mask = (o_p < n_parts[None, :]) & m_n[None, :]
        b_part = tl.load(partial_ptr + o_p * N + o_n[None, :], mask=mask, other=0.0)
        b_motion += tl.sum(b_part, axis=0)
    b_motion /= tl.where(m_across, count_w, count_h)
    if bias_w_ptr is not None:
        b_bias_w = tl.load(bias_w_ptr + o_k, mask=m_n & m_across, other=0.0).to(tl.float32)
        b_bias_h = tl.load(bias_h_ptr + o_k, mask=m_n & ~m_across, other=0.0).to(tl.float32)
        b_motion += b_bias_w + b_bias_h
    if TANH:
        b_motion = _tanh(b_motion)
    tl.store(motion_ptr + o_n, b_motion.to(motion_ptr.dtype.element_ty), mask=m_n)


@triton.jit
def _motion_lines_kernel(
    motion_ptr,
    weight_w_ptr,
    weight_h_ptr,
    bias_w_ptr,
    bias_h_ptr,
    lines_ptr,
    B,
    T,
    W,
    S,
    D,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_S of the W columns, or of the rows, of one frame (t, b), BLOCK_D of D
    i_row, o_d = program(D, BLOCK_D)
    n_w = tl.cdiv(W, BLOCK_S)
    n_s = n_w + tl.cdiv(S - W, BLOCK_S)
    i_s, i_frame = (i_row % n_s).to(tl.int32), i_row // n_s
    across = i_s < n_w
    o_s = tl.where(across, i_s * BLOCK_S, W + (i_s - n_w) * BLOCK_S) + tl.arange(0, BLOCK_S)
    m_s, m_d = o_s < tl.where(across, W, S), o_d < D
    m_w, m_h = o_d < tl.where(across, D, 0), o_d < tl.where(across, 0, D)
    motion_ptr += (i_frame % B * K * T + i_frame // B) * S + o_s
    # the columns hold both biases
    b_bias = tl.load(bias_w_ptr + o_d, mask=m_w, other=0.0).to(tl.float32)
    b_bias += tl.load(bias_h_ptr + o_d, mask=m_w, other=0.0).to(tl.float32)
    b_lines = tl.zeros([BLOCK_S, BLOCK_D], tl.float32) + b_bias[None, :]
    for k in range(K):
        b_weight = tl.load(weight_w_ptr + o_d * K + k, mask=m_w, other=0.0).to(tl.float32)
        b_weight += tl.load(weight_h_ptr + o_d * K + k, mask=m_h, other=0.0).to(tl.float32)
        b_latent = tl.load(motion_ptr + k * T * S, mask=m_s, other=0.0).to(tl.float32)
        b_lines += b_latent[:, None] * b_weight[None, :]
    o_lines = (i_frame * S + o_s[:, None]) * D + o_d[None, :]
    tl.store(lines_ptr + o_lines, b_lines, mask=m_s[:, None] & m_d[None, :])


@triton.jit
def _motion_tokens_kernel(
    content_ptr,
    lines_ptr,
    tokens_ptr,
    B,
    T,
    H,
    W,
    D,
    content_b,
    content_h,
    content_w,
    FRAMES,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: ROWS rows by BLOCK_W columns of FRAMES frames, BLOCK_D of D
    n_d, n_w, n_t, n_h = tl.cdiv(D, BLOCK_D), tl.cdiv(W, BLOCK_W), tl.cdiv(T, FRAMES), tl.cdiv(H, ROWS)
    i_d = tl.program_id(0) % n_d
    i_w = tl.program_id(0) // n_d % n_w
    i_t = tl.program_id(0) // (n_d * n_w) % n_t * FRAMES
    i_h = tl.program_id(0) // (n_d * n_w * n_t) % n_h * ROWS
    i_b = (tl.program_id(0) // (n_d * n_w * n_t * n_h)).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    content_ptr += i_b * content_b + i_h.to(tl.int64) * content_h
    o_content = o_w[:, None].to(tl.int64) * content_w + o_d[None, :]
    # tuples of tiles, one for each row: the layout of a tile with a third dimension differs between versions of Triton
    m_tokens = ()
    b_content = ()
    for i in tl.static_range(ROWS):
        m_row = (o_w < W)[:, None] & (o_d < tl.where(i_h + i < H, D, 0))[None, :]
        b_row = tl.load(content_ptr + i * content_h + o_content, mask=m_row, other=0.0).to(tl.float32)
        m_tokens += (m_row,)  # type: ignore[assignment]
        b_content += (b_row,)  # type: ignore[assignment]

    i_frame, next_frame = i_t * B + i_b, tl.cast(B, tl.int64) * D
    lines_ptr += i_frame * (W + H) * D
    tokens_ptr += (i_frame * H + i_h) * W * D
    o_tokens = o_w[:, None] * D + o_d[None, :]
    # every column reads the row's line: in the tokens' layout, without a passage through shared memory
    o_down = (W + i_h) * D + tl.broadcast_to(o_d[None, :], [BLOCK_W, BLOCK_D])
    for _ in range(i_t, tl.minimum(i_t + FRAMES, T)):
        b_across = tl.load(lines_ptr + o_tokens, mask=m_tokens[0], other=0.0)  # type: ignore[misc]
        # all loads before the first store, which no load may pass
        b_down = ()
        for i in tl.static_range(ROWS):
            b_down += (tl.load(lines_ptr + i * D + o_down, mask=m_tokens[i], other=0.0),)  # type: ignore[assignment]
        for i in tl.static_range(ROWS):
            b_tokens = (b_content[i] + b_across + b_down[i]).to(tokens_ptr.dtype.element_ty)
            tl.store(tokens_ptr + i * W * D + o_tokens, b_tokens, mask=m_tokens[i])
        lines_ptr += next_frame * (W + H)
        tokens_ptr += next_frame * H * W


def _steps_per_program(steps: int, warps: int) -> int:
    """Choose a power of two; `warps` is how many would run if each program took all steps."""
    share, taken = max(LEAST_STEPS, steps * warps // WARPS), 1
    while 2 * taken <= share:
        taken *= 2
    return min(taken, power_of_two(steps))


def _block_of_channels(width: int, itemsize: int) -> int:
    return min(LINE // itemsize, max(16, power_of_two(width)))


def _sums_options(frames: int, size: tuple[int, int, int], itemsize: int) -> dict[str, int]:
    """Choose rows in which each thread has up to four loads of 16 bytes in flight."""
    height, width, channels = size
    block_d = _block_of_channels(channels, itemsize)
    block_w = min(power_of_two(width), 64)
    warps = max(1, block_w * block_d * itemsize // (4 * 32 * 16))
    programs = frames * triton.cdiv(width, block_w) * triton.cdiv(channels, block_d)
    rows = _steps_per_program(height, programs * warps)
    return {"ROWS": rows, "BLOCK_W": block_w, "BLOCK_D": block_d, "num_warps": warps}


def _latents(
    u: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    *,
    counts: tuple[int, int] = (1, 1),
    tanh: bool = False,
    save: bool = False,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H, W, D), (K, D) x 2 -> (B, K, T, W + H), column sums, row sums.

    f(weight sum(u) / count + bias). Saved sums are (parts, B, T, W or H, D) in float32, to be added
    over the parts.
    """
    batch, frames, height, width, channels = u.shape
    latents, length = weights[0].shape[0], width + height
    u = u if u.stride(-1) == 1 else u.contiguous()
    options = _sums_options(batch * frames, (height, width, channels), u.element_size())
    n_d, n_w, splits = (
        triton.cdiv(size, options[block])
        for size, block in ((channels, "BLOCK_D"), (width, "BLOCK_W"), (height, "ROWS"))
    )
    motion = u.new_empty((batch, latents, frames, length), dtype=dtype)
    partial = motion.new_empty((n_d * max(splits, n_w), *motion.shape), dtype=torch.float32)
    columns, rows = (
        partial.new_empty((parts, batch, frames, side, channels) if save else 0)
        for parts, side in ((splits, width), (n_w, height))
    )
    if count := motion.numel():
        weight_w, weight_h = (weight.contiguous() for weight in weights)
        sizes = frames, height, width, channels, *u.stride()[:4]
        options |= {"K": latents, "BLOCK_K": power_of_two(latents), "SAVE": save}
        _motion_sums_kernel[(batch * frames * n_w * n_d, splits)](
            u, weight_w, weight_h, partial, columns, rows, *sizes, **options
        )
        sizes = count, frames, width, length, *counts, n_d * splits, n_d * n_w
        block_p = min(16, power_of_two(n_d * max(splits, n_w)))
        options = {"K": latents, "TANH": tanh, "BLOCK_P": block_p, "BLOCK_N": 64, "num_warps": 2}
        _motion_combine_kernel[(triton.cdiv(count, 64),)](partial, *biases, motion, *sizes, **options)
    return motion, columns, rows


def _tokens(content: Tensor, motion: Tensor, weights: tuple[Tensor, Tensor], biases: tuple[Tensor, Tensor]) -> Tensor:
    """(B, H, W, D), (B, K, T, W + H), (D, K) x 2, (D,) x 2 -> (B, T, H, W, D).

    A view of memory in which time comes first.
    """
    batch, height, width, channels = content.shape
    latents, frames, length = motion.shape[1:]
    motion = motion.contiguous()
    content = content if content.stride(-1) == 1 else content.contiguous()
    lines = content.new_empty((frames, batch, length, channels), dtype=torch.float32)
    tokens = content.new_empty((frames, batch, height, width, channels))
    if tokens.numel():
        block_d, block_s, rows = _block_of_channels(channels, tokens.element_size()), 32, min(power_of_two(height), 4)
        n_d = triton.cdiv(channels, block_d)
        programs = frames * batch * (triton.cdiv(width, block_s) + triton.cdiv(height, block_s)) * n_d
        weight_w, weight_h = (weight.contiguous() for weight in weights)
        options = {"K": latents, "BLOCK_S": block_s, "BLOCK_D": block_d, "num_warps": 2}
        _motion_lines_kernel[(programs,)](
            motion, weight_w, weight_h, *biases, lines, batch, frames, width, length, channels, **options
        )
        # each thread has 16 bytes of each row
        block_w = min(power_of_two(width), 16)
        warps = max(1, block_w * block_d * tokens.element_size() // (32 * 16))
        programs = batch * triton.cdiv(height, rows) * triton.cdiv(width, block_w) * n_d
        taken = _steps_per_program(frames, programs * warps)
        sizes = batch, frames, height, width, channels, *content.stride()[:3], taken
        options = {"ROWS": rows, "BLOCK_W": block_w, "BLOCK_D": block_d, "num_warps": warps}
        _motion_tokens_kernel[(programs * triton.cdiv(frames, taken),)](content, lines, tokens, *sizes, **options)
    return tokens.transpose(0, 1)


def _weight_gradients(motion: Tensor, columns: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, K, T, W + H), sums as `_latents` saves them -> (K, D) x 2."""
    columns, rows = columns.sum(dim=0), rows.sum(dim=0)
    across, down = motion.float().split((columns.shape[2], rows.shape[2]), dim=3)
    return (
        torch.einsum("bkts,btsd->kd", across, columns).to(dtype),
        torch.einsum("bkts,btsd->kd", down, rows).to(dtype),
    )


class MotionLatents(torch.autograd.Function):
    """The kernels of sums; backward, those of lines and tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight_w: Tensor,
        bias_w: Tensor,
        weight_h: Tensor,
        bias_h: Tensor,
        tanh: bool,
        grad_enabled: bool,
    ) -> Tensor:
        """(B, T, H, W, D), (K, D), (K,), (K, D), (K,) -> (B, K, T, W + H)."""
        height, width = u.shape[2:4]
        # an input may require a gradient where autograd records none
        trained = grad_enabled and any(ctx.needs_input_grad)
        motion, columns, rows = _latents(
            u,
            (weight_w, weight_h),
            (bias_w.contiguous(), bias_h.contiguous()),
            counts=(height, width),
            # backward takes the derivative where tanh was taken: 1 - tanh^2 would cancel
            tanh=tanh and not trained,
            save=trained and (ctx.needs_input_grad[1] or ctx.needs_input_grad[3]),
            dtype=torch.float32 if trained else u.dtype,
        )
        if trained:
            ctx.save_for_backward(weight_w, weight_h, columns, rows, motion)
            ctx.tanh, ctx.size = tanh, (height, width)
            ctx.dtypes = u.dtype, bias_w.dtype, bias_h.dtype
            motion = motion.tanh() if tanh else motion
        return motion.to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(B, K, T, W + H) -> a gradient for each input."""
        weight_w, weight_h, columns, rows, motion = ctx.saved_tensors
        height, width = ctx.size
        u_dtype, bias_w_dtype, bias_h_dtype = ctx.dtypes
        # these are few numbers: float64 makes them as good as exact
        grad = grad.double()
        if ctx.tanh:
            grad = grad / motion.double().cosh().square()
        grad_bias_w, grad_bias_h = (part.sum(dim=(0, 2, 3)) for part in grad.split((width, height), dim=3))
        # the mean of a column is over its height, that of a row over its width
        counts = grad.new_full((width + height,), width)
        counts[:width] = height
        grad = (grad / counts).float()
        grad_u = grad_weight_w = grad_weight_h = None
        if ctx.needs_input_grad[0]:
            # one row of zeros, which is cached, instead of a second kernel that adds no content
            zeros = grad.new_zeros(weight_w.shape[1], dtype=u_dtype)
            still = zeros.expand(grad.shape[0], height, width, -1)
            grad_u = _tokens(still, grad, (weight_w.T, weight_h.T), (zeros, zeros))
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            grad_weight_w, grad_weight_h = _weight_gradients(grad, columns, rows, weight_w.dtype)
        grad_bias_w, grad_bias_h = grad_bias_w.to(bias_w_dtype), grad_bias_h.to(bias_h_dtype)
        return grad_u, grad_weight_w, grad_bias_w, grad_weight_h, grad_bias_h, None, None


class MotionTokens(torch.autograd.Function):
    """The kernels of lines and tokens; backward, those of sums."""

    @staticmethod
    def forward(
        ctx: Any, content: Tensor, motion: Tensor, weight_w: Tensor, bias_w: Tensor, weight_h: Tensor, bias_h: Tensor
    ) -> Tensor:
        """(B, H, W, D), (B, K, T, W + H), (D, K), (D,), (D, K), (D,) -> (B, T, H, W, D)."""
        ctx.save_for_backward(motion, weight_w, weight_h)
        ctx.dtypes = content.dtype, bias_w.dtype, bias_h.dtype
        biases = bias_w.contiguous(), bias_h.contiguous()
        return _tokens(content, motion, (weight_w, weight_h), biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(B, T, H, W, D) -> a gradient for each input."""
        motion, weight_w, weight_h = ctx.saved_tensors
        grad_content = None
        content_dtype, bias_w_dtype, bias_h_dtype = ctx.dtypes
        if ctx.needs_input_grad[0]:
            grad_content = grad.sum(dim=1, dtype=torch.float32).to(content_dtype)
        if not any(ctx.needs_input_grad[1:]):
            return grad_content, None, None, None, None, None
        trained = any(ctx.needs_input_grad[2:])
        weights = weight_w.T, weight_h.T
        grad_motion, columns, rows = _latents(grad, weights, (None, None), save=trained, dtype=motion.dtype)
        if not trained:
            return grad_content, grad_motion, None, None, None, None
        grad_w, grad_h = _weight_gradients(motion, columns, rows, weight_w.dtype)
        grad_bias = columns.sum(dim=(0, 1, 2, 3))
        grad_bias_w, grad_bias_h = grad_bias.to(bias_w_dtype), grad_bias.to(bias_h_dtype)
        return grad_content, grad_motion, grad_w.T, grad_bias_w, grad_h.T, grad_bias_h


def motion_latents_obstacle(u: Tensor, weight_w: Tensor, *others: Tensor) -> str | None:
    """Say why `motion_latents` runs the reference for these tensors; None where it does not."""
    if weight_w.shape[0] > MOST_CHANNELS:
        return f"{weight_w.shape[0]} latent channels are more than {MOST_CHANNELS}"
    return obstacle(u, weight_w, *others)


def motion_latents(
    u: Tensor, weight_w: Tensor, bias_w: Tensor, weight_h: Tensor, bias_h: Tensor, *, activation: str = "tanh"
) -> Tensor:
    """(B, T, H, W, D), (K, D), (K,), (K, D), (K,) -> (B, K, T, W + H): the columns, then the rows.

    `activation` is "tanh" or "linear", which is none. Differentiable in all; in the dtype of u,
    computed in float32 at least. Raises ValueError where the shapes do not fit.
    """
    if activation not in ("tanh", "linear"):
        raise ValueError(f"activation {activation!r} is not one of tanh, linear")
    if u.dim() != 5:
        raise ValueError(f"u {tuple(u.shape)} is not (B, T, H, W, D)")
    latents = weight_w.shape[0]
    _check_projections((weight_w, bias_w, weight_h, bias_h), (latents, u.shape[-1]), "(K, D)")
    if motion_latents_obstacle(u, weight_w, bias_w, weight_h, bias_h) is not None:
        return motion_latents_reference(u, weight_w, bias_w, weight_h, bias_h, activation=activation)
    tanh, grad_enabled = activation == "tanh", torch.is_grad_enabled()
    return MotionLatents.apply(u, weight_w, bias_w, weight_h, bias_h, tanh, grad_enabled)


def motion_tokens_obstacle(content: Tensor, motion: Tensor, *others: Tensor) -> str | None:
    """Say why `motion_tokens` runs the reference for these tensors; None where it does not."""
    if motion.shape[1] > MOST_CHANNELS:
        return f"{motion.shape[1]} latent channels are more than {MOST_CHANNELS}"
    return obstacle(content, motion, *others)


def motion_tokens(
    content: Tensor, motion: Tensor, weight_w: Tensor, bias_w: Tensor, weight_h: Tensor, bias_h: Tensor
) -> Tensor:
    """(B, H, W, D), (B, K, T, W + H), (D, K), (D,), (D, K), (D,) -> (B, T, H, W, D).

    Content + projected columns + projected rows. Differentiable in all; in the dtype of the
    content, computed in float32 at least; in memory time comes first. Raises ValueError where the
    shapes do not fit.
    """
    if content.dim() != 4 or motion.dim() != 4:
        raise ValueError(
            f"content {tuple(content.shape)} and motion {tuple(motion.shape)} are not (B, H, W, D) and (B, K, T, W + H)"
        )
    batch, height, width, channels = content.shape
    if motion.shape[0] != batch or motion.shape[3] != width + height:
        raise ValueError(
            f"motion {tuple(motion.shape)} does not fit content {tuple(content.shape)}: "
            f"expected ({batch}, K, T, {width} + {height})"
        )
    _check_projections((weight_w, bias_w, weight_h, bias_h), (channels, motion.shape[1]), "(D, K)")
    if motion_tokens_obstacle(content, motion, weight_w, bias_w, weight_h, bias_h) is not None:
        return motion_tokens_reference(content, motion, weight_w, bias_w, weight_h, bias_h)
    return MotionTokens.apply(content, motion, weight_w, bias_w, weight_h, bias_h)


def _check_projections(tensors: tuple[Tensor, ...], shape: tuple[int, int], letters: str) -> None:
    for name, tensor in zip(("weight_w", "bias_w", "weight_h", "bias_h"), tensors, strict=True):
        expected = shape if name.startswith("weight") else shape[:1]
        if tensor.shape != expected:
            raise ValueError(f"{name} {tuple(tensor.shape)} is not {expected}: weights are {letters}")
