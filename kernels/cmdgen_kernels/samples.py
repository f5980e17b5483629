"""Sample inputs of every op: what the benchmark times, the tests compile and `doctor` tries."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cmdgen_kernels.content_frame import (
    content_frame,
    content_frame_obstacle,
    content_frame_reference,
)
from cmdgen_kernels.gated_attention import (
    gated_attention,
    gated_attention_obstacle,
    gated_attention_reference,
    orthogonal_features,
)
from cmdgen_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_obstacle,
    group_norm_silu_reference,
)
from cmdgen_kernels.guided_ddim_step import (
    guided_ddim_step,
    guided_ddim_step_obstacle,
    guided_ddim_step_reference,
)
from cmdgen_kernels.motion import (
    motion_latents,
    motion_latents_obstacle,
    motion_latents_reference,
    motion_tokens,
    motion_tokens_obstacle,
    motion_tokens_reference,
)

Sizes = tuple[int, ...]
# the step of a text-to-image model halfway through
GUIDANCE, KEEP, MOVE = 7.5, 1.02, -0.05


@dataclass(frozen=True)
class Op:
    """An op with its definition, its predicate, and a way to draw inputs for all three."""

    name: str
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    obstacle: Callable[..., str | None]
    # sizes, and a tensor for its dtype and device
    draw: Callable[[Sizes, Tensor], tuple[Tensor, ...]]
    # of `draw`, for a moment's work that no block divides
    small: Sizes
    # how many of the inputs, from the first, a kernel has a gradient for
    leaves: int = 0

    def inputs(
        self, sizes: Sizes, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, ...]:
        """`sizes` as `draw` takes them -> tensors of torch's global random numbers."""
        return self.draw(sizes, torch.empty(0, dtype=dtype, device=device))


class Error(NamedTuple):
    """How far a result is from the reference in float64, at most, and how far it may be.

    That is twice as far as the reference in the same dtype, or one unit in the last place.
    """

    size: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the result is a right one."""
        return self.size <= self.allowed


def _noise(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape).normal_()


def _content_frame(sizes: Sizes, like: Tensor) -> tuple[Tensor, ...]:
    """(B, C, T, H, W) -> frames, logits."""
    return _noise(like, *sizes), _noise(like, *sizes)


def _projections(rows: int, columns: int, like: Tensor) -> tuple[Tensor, ...]:
    """() -> weight_w, bias_w, weight_h, bias_h."""
    weights = (_noise(like, rows, columns) / columns**0.5 for _ in range(2))
    return tuple(tensor for weight in weights for tensor in (weight, _noise(like, rows)))


def _motion_latents(sizes: Sizes, like: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, W, D, K) -> u, time first in memory as the autoencoder has it; projections."""
    batch, frames, height, width, channels, latents = sizes
    u = _noise(like, frames, batch, height, width, channels).transpose(0, 1)
    return u, *_projections(latents, channels, like)


def _motion_tokens(sizes: Sizes, like: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, W, D, K) -> content, motion, projections."""
    batch, frames, height, width, channels, latents = sizes
    content = _noise(like, batch, height, width, channels)
    motion = _noise(like, batch, latents, frames, width + height)
    return content, motion, *_projections(channels, latents, like)


def _gated_attention(sizes: Sizes, like: Tensor) -> tuple[Tensor, ...]:
    """(B, N, L, D, M) -> q and k, small as random features want them, v; the projection."""
    batch, heads, length, width, features = sizes
    # in memory as a linear layer leaves them
    q, k, v = (_noise(like, batch, length, heads, width).transpose(1, 2) for _ in range(3))
    return q / 2, k / 2, v, orthogonal_features(features, width).to(like)


def _group_norm_silu(sizes: Sizes, like: Tensor) -> tuple[Tensor, ...]:
    """(B, C, H, W) -> x in channels_last, weight, bias, shift."""
    x = _noise(like, *sizes).contiguous(memory_format=torch.channels_last)
    channels = sizes[1]
    return x, _noise(like, channels), _noise(like, channels), _noise(like, *sizes[:2])


def _guided_ddim_step(sizes: Sizes, like: Tensor) -> tuple[Tensor, ...]:
    """(B, C, H, W) -> the sample, in float32 at least; the network's output, in channels_last."""
    output = _noise(like, 2 * sizes[0], *sizes[1:]).contiguous(memory_format=torch.channels_last)
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.randn_like(output[: sizes[0]], dtype=wide), output


def _normalised(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`group_norm_silu` or its reference, of 32 groups, as a function of tensors alone."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return op(x, weight, bias, 32, 1e-5, shift=shift)

    return run


def _normalised_obstacle(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> str | None:
    return group_norm_silu_obstacle(x, weight, bias, shift=shift)


OPS = (
    Op(
        "content_frame",
        content_frame,
        content_frame_reference,
        content_frame_obstacle,
        _content_frame,
        small=(2, 3, 5, 9, 7),
        leaves=2,
    ),
    Op(
        "motion_latents",
        motion_latents,
        motion_latents_reference,
        motion_latents_obstacle,
        _motion_latents,
        small=(2, 3, 5, 9, 40, 4),
        leaves=5,
    ),
    Op(
        "motion_tokens",
        motion_tokens,
        motion_tokens_reference,
        motion_tokens_obstacle,
        _motion_tokens,
        small=(2, 3, 5, 9, 40, 4),
        leaves=6,
    ),
    Op(
        "gated_attention",
        partial(gated_attention, mode="linear"),
        partial(gated_attention_reference, mode="linear"),
        partial(gated_attention_obstacle, mode="linear"),
        _gated_attention,
        small=(2, 3, 77, 24, 48),
        leaves=3,
    ),
    Op(
        "group_norm_silu",
        _normalised(group_norm_silu),
        _normalised(group_norm_silu_reference),
        _normalised_obstacle,
        _group_norm_silu,
        small=(1, 96, 111, 99),
    ),
    Op(
        "guided_ddim_step",
        partial(guided_ddim_step, guidance=GUIDANCE, keep=KEEP, move=MOVE),
        partial(guided_ddim_step_reference, guidance=GUIDANCE, keep=KEEP, move=MOVE),
        guided_ddim_step_obstacle,
        _guided_ddim_step,
        small=(3, 4, 9, 7),
    ),
)


def errors(op: Op, inputs: tuple[Tensor, ...], *, backward: bool = False) -> list[Error]:
    """One for the output and, with `backward`, one for the gradient of each input that has one."""
    wide = tuple(x.double() for x in inputs)
    ours, plain, exact = (
        results(op, run, tensors, backward=backward, dtype=inputs[0].dtype)
        for run, tensors in ((op.run, inputs), (op.reference, inputs), (op.reference, wide))
    )
    found = []
    for x, y, z in zip(ours, plain, exact, strict=True):
        # a NaN or an infinity anywhere makes an error that nothing allows
        size, reference = (float((part - z).abs().max()) for part in (x, y))
        ulp = torch.finfo(x.dtype).eps * float(z.abs().max())
        found.append(Error(size, max(2 * reference, ulp)))
    return found


def results(
    op: Op,
    run: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *,
    backward: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The output of `run` and, with `backward`, the gradients of its product with noise.

    The noise is the same for all dtypes of the inputs: rounded to `dtype`, the one that is tested.
    """
    if not backward:
        with torch.no_grad():
            return [run(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs[: op.leaves]]
    output = run(*leaves, *inputs[op.leaves :])
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output))]
