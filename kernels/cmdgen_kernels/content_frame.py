"""The content frame: a weighted sum of a video's frames, the weights a softmax over time.

    content[b, c, h, w] = sum_t softmax_t(logits[b, c, t, h, w]) frames[b, c, t, h, w]

Eq. 3 of Yu et al. 2024 (arXiv:2403.14148). Forward reads both inputs once and keeps T out of
memory: the maximum and the sum of the softmax are carried along while the frames pass by. Backward
needs one more read, because with the weights w recomputed from the saved maximum and sum

    d frames_t = w_t d content        d logits_t = w_t (frames_t - content) d content
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmdgen_kernels.dispatch import obstacle
from cmdgen_kernels.language import power_of_two, program, tl, triton


def content_frame_reference(frames: Tensor, logits: Tensor) -> Tensor:
    """(B, C, T, H, W) x 2 -> (B, C, H, W): the definition, in float32 at least."""
    wide = torch.promote_types(frames.dtype, torch.float32)
    weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=2)
    return (frames.to(wide) * weights).sum(dim=2).to(frames.dtype)


@triton.jit
def _content_frame_fwd_kernel(
    frames_ptr,
    logits_ptr,
    content_ptr,
    mean_ptr,
    max_ptr,
    sum_ptr,
    C,
    P,
    frames_b,
    frames_c,
    frames_t,
    logits_b,
    logits_c,
    logits_t,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SAVE: tl.constexpr,
):
    # one program: BLOCK_P pixels of one plane (b, c), all frames
    i_plane, o_p = program(P, BLOCK_P)
    m_p = o_p < P
    frames_ptr += i_plane // C * frames_b + i_plane % C * frames_c
    logits_ptr += i_plane // C * logits_b + i_plane % C * logits_c

    b_max = tl.full([BLOCK_P], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_P], tl.float32)
    b_mean = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, T, BLOCK_T):
        o_t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mask = (o_t < T) & m_p[None, :]
        b_logits = tl.load(logits_ptr + o_t * logits_t + o_p, mask=mask, other=float("-inf"))
        b_frames = tl.load(frames_ptr + o_t * frames_t + o_p, mask=mask, other=0.0)
        b_logits = b_logits.to(tl.float32)
        b_new = tl.maximum(b_max, tl.max(b_logits, axis=0))
        # while every logit so far is -inf there is nothing to subtract
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weights = tl.exp(b_logits - b_shift[None, :])
        b_scale = tl.exp(b_max - b_shift)
        b_sum = b_sum * b_scale + tl.sum(b_weights, axis=0)
        b_mean = b_mean * b_scale + tl.sum(b_weights * b_frames.to(tl.float32), axis=0)
        b_max = b_new
    b_mean /= tl.where(m_p, b_sum, 1.0)

    o_out = i_plane * P + o_p
    tl.store(content_ptr + o_out, b_mean.to(content_ptr.dtype.element_ty), mask=m_p)
    if SAVE:
        tl.store(mean_ptr + o_out, b_mean, mask=m_p)
        tl.store(max_ptr + o_out, b_max, mask=m_p)
        tl.store(sum_ptr + o_out, b_sum, mask=m_p)


@triton.jit
def _content_frame_bwd_kernel(
    frames_ptr,
    logits_ptr,
    grad_ptr,
    mean_ptr,
    max_ptr,
    sum_ptr,
    grad_frames_ptr,
    grad_logits_ptr,
    C,
    P,
    frames_b,
    frames_c,
    frames_t,
    logits_b,
    logits_c,
    logits_t,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # one program: BLOCK_T frames of BLOCK_P pixels of one plane (b, c)
    i_plane, o_p = program(P, BLOCK_P)
    o_t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    m_p = o_p < P
    mask = (o_t < T) & m_p[None, :]
    frames_ptr += i_plane // C * frames_b + i_plane % C * frames_c
    logits_ptr += i_plane // C * logits_b + i_plane % C * logits_c

    b_logits = tl.load(logits_ptr + o_t * logits_t + o_p, mask=mask, other=float("-inf"))
    b_frames = tl.load(frames_ptr + o_t * frames_t + o_p, mask=mask, other=0.0)
    b_grad = tl.load(grad_ptr + i_plane * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_mean = tl.load(mean_ptr + i_plane * P + o_p, mask=m_p, other=0.0)
    b_max = tl.load(max_ptr + i_plane * P + o_p, mask=m_p, other=0.0)
    b_sum = tl.load(sum_ptr + i_plane * P + o_p, mask=m_p, other=1.0)
    b_weights = tl.exp(b_logits.to(tl.float32) - b_max[None, :]) / b_sum[None, :]
    b_share = b_weights * b_grad[None, :]

    o_out = i_plane * T * P + o_t * P + o_p
    tl.store(grad_frames_ptr + o_out, b_share.to(grad_frames_ptr.dtype.element_ty), mask=mask)
    b_share *= b_frames.to(tl.float32) - b_mean[None, :]
    tl.store(grad_logits_ptr + o_out, b_share.to(grad_logits_ptr.dtype.element_ty), mask=mask)


def _planes(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T, P): a view where each frame's pixels lie one after another."""
    if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]:
        return x.flatten(3)
    return x.contiguous().flatten(3)


def _arguments(frames: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, list[int], int, dict[str, int]]:
    """(B, C, T, H, W) x 2 -> their planes, sizes and strides, number of blocks, launch options.

    Each thread holds 16 bytes of every frame in a block, so that T stays in registers.
    """
    batch, channels, count, height, width = frames.shape
    frames, logits = _planes(frames), _planes(logits)
    planes, pixels = batch * channels, height * width
    warp = 32 * 16 // frames.element_size()
    # four blocks for each of some 130 multiprocessors; smaller blocks where there are too few
    warps = 4 if planes * triton.cdiv(pixels, 4 * warp) >= 512 else 1
    block = min(warp * warps, max(16, power_of_two(pixels)))
    sizes = [channels, pixels, *frames.stride()[:3], *logits.stride()[:3]]
    options = {"T": count, "BLOCK_T": min(power_of_two(count), 8)}
    options |= {"BLOCK_P": block, "num_warps": warps}
    return frames, logits, sizes, planes * triton.cdiv(pixels, block), options


class ContentFrame(torch.autograd.Function):
    """`_content_frame_fwd_kernel` and `_content_frame_bwd_kernel`."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, logits: Tensor, grad_enabled: bool) -> Tensor:
        """(B, C, T, H, W) x 2 -> (B, C, H, W)."""
        # an input may require a gradient where autograd records none
        save = grad_enabled and any(ctx.needs_input_grad)
        content = frames.new_empty(*frames.shape[:2], *frames.shape[3:])
        # the content, and the maximum and the sum of the softmax
        saved = content.new_empty((3, *content.shape) if save else (3, 0), dtype=torch.float32)
        if save:
            ctx.save_for_backward(frames, logits, saved)
        if content.numel():
            frames, logits, sizes, blocks, options = _arguments(frames, logits)
            _content_frame_fwd_kernel[(blocks,)](frames, logits, content, *saved, *sizes, SAVE=save, **options)
        return content

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """(B, C, H, W) -> (B, C, T, H, W) x 2."""
        frames, logits, saved = ctx.saved_tensors
        grad = grad.contiguous()
        grad_frames, grad_logits = frames.new_empty(frames.shape), logits.new_empty(logits.shape)
        if grad.numel():
            frames, logits, sizes, blocks, options = _arguments(frames, logits)
            _content_frame_bwd_kernel[(blocks, triton.cdiv(options["T"], options["BLOCK_T"]))](
                frames, logits, grad, *saved, grad_frames, grad_logits, *sizes, **options
            )
        return grad_frames, grad_logits, None


def content_frame_obstacle(frames: Tensor, logits: Tensor) -> str | None:
    """Say why `content_frame` runs the reference for these tensors; None where it does not."""
    return obstacle(frames, logits)


def content_frame(frames: Tensor, logits: Tensor) -> Tensor:
    """(B, C, T, H, W) x 2 -> (B, C, H, W): softmax of the logits over T, weighted sum of frames.

    Differentiable in both. Pixels need one finite logit each, as softmax does. Raises ValueError
    where the shapes differ.
    """
    if frames.dim() != 5 or frames.shape != logits.shape:
        raise ValueError(f"frames {tuple(frames.shape)} and logits {tuple(logits.shape)} are not both (B, C, T, H, W)")
    if content_frame_obstacle(frames, logits) is not None:
        return content_frame_reference(frames, logits)
    return ContentFrame.apply(frames, logits, torch.is_grad_enabled())
