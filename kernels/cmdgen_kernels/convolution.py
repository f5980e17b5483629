"""A convolution of channels_last maps; its bias and a residual are added in one pass.

    out[b, c, p] = (weight * x)[b, c, p] + bias[c] + residual[b, c, p]

cuDNN's convolution adds no bias: PyTorch adds it in a pass of its own, and the residual in another.
The convolution stays cuDNN's. The pass keeps the result's moments with
it, for the GroupNorm that often follows (`moments.py`).
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
