"""A convolution of channels_last maps; its bias and a residual are added in one pass.

    out[b, c, p] = (weight * x)[b, c, p] + bias[c] + residual[b, c, p]

cuDNN's convolution adds no bias: PyTorch adds it in a pass of its own, and the residual in another.
The convolution stays cuDNN's. The pass keeps the result's moments with
it, for the GroupNorm that often follows (`moments.py`).

After nearest-neighbour doubling a 3x3 convolution sees each position at most twice along each axis:
an even row of its result is a sum over two rows with weights (w0, w1 + w2), an odd one with
(w0 + w1, w2). So it is four convolutions of 2x2 on the map as it was, one for each phase of the
result: 16 products in place of 36, and no doubled map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.moments import add


def convolution_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
) -> Tensor:
    """(B, C, H, W), (C', C, K, K), (C'), (B, C', H', W') -> (B, C', H', W'): the definition."""
    out = F.conv2d(x, weight, bias, stride, padding)
    # in place: no gradient needs what was there
    return out if residual is None else out.add_(residual)


def convolution_obstacle(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> str | None:
    """Say why `convolution` runs the reference for these tensors; None where it does not."""
    reason = inference_obstacle(x, weight, bias, x if residual is None else residual)
    if reason is None and not x.is_contiguous(memory_format=torch.channels_last):
        return "the input is not channels_last"
    return reason


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
) -> Tensor:
    """(B, C, H, W), (C', C, K, K), (C'), (B, C', H', W') -> (B, C', H', W'): convolution + residual.

    The kernel is for inference: where an input requires a gradient the reference runs. Raises
    ValueError where the residual has another shape.
    """
    if convolution_obstacle(x, weight, bias, residual) is not None:
        return convolution_reference(x, weight, bias, residual, stride=stride, padding=padding)
    out = F.conv2d(x, weight, None, stride, padding)
    if residual is not None and residual.shape != out.shape:
        raise ValueError(f"residual {tuple(residual.shape)} is not {tuple(out.shape)}, as the convolution's result")
    return add(out, bias, residual)


def fold_doubling(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (4 C', C, 2, 2): the weights of the four phases, summed in float32 at least."""
    # of one axis: phase, tap of 2, tap of 3
    sums = weight.new_tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.promote_types(weight.dtype, torch.float32)
    )
    folded = torch.einsum("aik,bjl,ockl->abocij", sums, sums, weight.to(sums.dtype)).flatten(0, 2)
    return folded.to(weight.dtype, memory_format=torch.channels_last)


def doubled_convolution_reference(x: Tensor, folded: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W), (4 C', C, 2, 2), (C') -> (B, C', 2 H, 2 W): the definition."""
    phases = F.conv2d(x, folded, None, padding=1).unflatten(1, (2, 2, -1))  # (B, 2, 2, C', H + 1, W + 1)
    height, width = x.shape[2:]
    rows = [[phases[:, a, b, :, a : a + height, b : b + width] for b in range(2)] for a in range(2)]
    out = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-3)  # (B, C', H, 2, W, 2)
    out = out.flatten(2, 3).flatten(3, 4) + bias[:, None, None]
    return out.contiguous(memory_format=torch.channels_last)


def doubled_convolution_obstacle(x: Tensor, folded: Tensor, bias: Tensor) -> str | None:
    """Say why `doubled_convolution` runs the reference for these tensors; None where it does not."""
    return convolution_obstacle(x, folded, bias)


def doubled_convolution(x: Tensor, folded: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W), (4 C', C, 2, 2), (C') -> (B, C', 2 H, 2 W): the 3x3 convolution of x doubled.

    `folded` is what `fold_doubling` makes of its weight. The kernel is for inference.
    """
    if doubled_convolution_obstacle(x, folded, bias) is not None:
        return doubled_convolution_reference(x, folded, bias)
    return add(F.conv2d(x, folded, None, padding=1), bias, None, phases=True)
