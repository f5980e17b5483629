"""Softmax attention of one head too wide for flash attention: two products, a softmax between them.

    out = softmax(q k^T / sqrt(D)) v

Flash and cuDNN attention take heads of at most 256. What PyTorch has for wider ones does not reach the
rate of matrix products on Hopper, which these do. The scores stay in float32 up to the softmax, a part
of the rows at a time: what they take is less than one of the maps that a VAE makes afterwards.
"""

import torch
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.gated_attention import softmax_attention
from cmdgen_kernels.language import power_of_two, tl, triton

LOG2E = 1.4426950408889634
# of fused attention; and of a row that a program holds in registers, 32 values a thread
WIDEST_FUSED = 256
LONGEST_ROW = 16384
# whose scores are in memory together: 64 MiB at L = 8192
ROWS = 2048


def wide_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, 1, L, D) x 3 -> (B, 1, L, D): the definition."""
    return softmax_attention(q, k, v)


@triton.jit
def _wide_attention_softmax_kernel(scores_ptr, out_ptr, L, scale, BLOCK: tl.constexpr):
    # one program: a row of scores; `scale` makes powers of two of them
    i_row = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, BLOCK)
    m_l = o_l < L
    b_s = tl.load(scores_ptr + i_row * L + o_l, mask=m_l, other=float("-inf")) * scale
    b_p = tl.exp2(b_s - tl.max(b_s))
    tl.store(out_ptr + i_row * L + o_l, (b_p / tl.sum(b_p)).to(out_ptr.dtype.element_ty), mask=m_l)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(B, M, D), (B, L, D) -> (B, M, L) in float32, of products in the dtype of q."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)
    return q.float() @ k.float().mT


def _launch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, D) x 3 -> (B, L, D)."""
    length, width = q.shape[1:]
    block, parts = power_of_two(length), []
    for rows in q.split(ROWS, dim=1):
        scores = _scores(rows, k)
        weights = torch.empty_like(scores, dtype=q.dtype)
        _wide_attention_softmax_kernel[(scores.numel() // length,)](
            scores, weights, length, LOG2E * width**-0.5, BLOCK=block, num_warps=min(max(block // 512, 1), 16)
        )
        del scores
        parts.append(weights @ v)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def wide_attention_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why `wide_attention` runs the reference for these tensors; None where it does not."""
    if q.shape[3] <= WIDEST_FUSED:
        return f"fused attention takes heads of width {q.shape[3]}"
    if q.shape[2] > LONGEST_ROW:
        return f"rows of {q.shape[2]} scores are longer than {LONGEST_ROW}"
    if not hasattr(torch.ops.aten.bmm, "dtype"):
        return "only PyTorch 2.8 and later multiplies half precision to float32"
    return inference_obstacle(q, k, v)


def wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, 1, L, D) x 3 -> (B, 1, L, D): attention of one wide head.

    The kernel is for inference: where an input requires a gradient the reference runs. Raises
    ValueError where the shapes are not these.
    """
    if q.dim() != 4 or q.shape[1] != 1 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (q, k, v))
        raise ValueError(f"q, k and v of {shapes} are not all (B, 1, L, D)")
    if wide_attention_obstacle(q, k, v) is not None or q.numel() == 0:
        return wide_attention_reference(q, k, v)
    return _launch(q[:, 0], k[:, 0], v[:, 0])[:, None]
