"""Sample inputs of every op, for the benchmark, the tests and `cmdgen doctor`."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cmdgen_kernels as ops
from cmdgen_kernels.convolution import fold_doubling
from cmdgen_kernels.gated_attention import orthogonal_features

Sizes = tuple[int, ...]
Noise = Callable[..., Tensor]
Draw = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Op:
    """An op, its definition, its predicate, and a way to draw inputs for all three."""

    name: str
    # of the same arguments: a tensor, or several of one shape
    run: Callable[..., Any]
    reference: Callable[..., Any]
    obstacle: Callable[..., str | None]
    # takes what makes noise of a shape, then sizes
    draw: Draw
    # sizes for `draw` that no block divides and that take a moment
    small: Sizes
    # how many of the inputs, from the first, a kernel has a gradient for
    leaves: int = 0

    def inputs(self, sizes: Sizes, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """`sizes` as `draw` takes them -> tensors of torch's global random numbers."""
        return self.draw(lambda *shape: torch.empty(shape, dtype=dtype, device=device).normal_(), *sizes)


# units in the last place of the largest value that a float32 result may always err by: plain PyTorch's
# error alone is luck, which differs by processor. The sum of n terms in another order errs by sqrt(n) / 2
# (Higham & Mary 2019, doi:10.1137/18M1226312), PTX's ex2.approx and div.full by 2 each
LONGEST_SUM = 576
FLOAT32_ULPS = 2 + 2 + math.sqrt(LONGEST_SUM) / 2


class Error(NamedTuple):
    """The largest distance of a result from the reference in float64, and the allowed one.

    Allowed is twice the reference's own error in that dtype, or one unit in the last place of the
    largest value; in float32, `FLOAT32_ULPS` of them.
    """

    size: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the result is finite and near enough."""
        return math.isfinite(self.size) and self.size <= self.allowed


def _op(function: Callable[..., Any], draw: Draw, small: Sizes, *, leaves: int = 0, **settings: float) -> Op:
    """Find `x_reference` and `x_obstacle` beside an op `x`; bind its `settings`."""
    name, beside = function.__name__, vars(sys.modules[function.__module__])
    run, reference = (partial(f, **settings) for f in (function, beside[f"{name}_reference"]))
    obstacle = beside[f"{name}_obstacle"]
    if "threshold" in settings:
        # the one setting that an obstacle depends on
        obstacle = partial(obstacle, threshold=settings["threshold"])
    return Op(name, run, reference, obstacle, draw, small, leaves)


def _content_frame(noise: Noise, *sizes: int) -> tuple[Tensor, ...]:
    """B, C, T, H, W -> frames, logits."""
    return noise(*sizes), noise(*sizes)


def _projections(noise: Noise, rows: int, columns: int) -> tuple[Tensor, ...]:
    """() -> weight_w, bias_w, weight_h, bias_h."""
    weights = (noise(rows, columns) / columns**0.5 for _ in range(2))
    return tuple(tensor for weight in weights for tensor in (weight, noise(rows)))


def _motion_latents(noise: Noise, b: int, t: int, h: int, w: int, d: int, k: int) -> tuple[Tensor, ...]:
    """B, T, H, W, D, K -> u, time first in memory as the autoencoder has it; projections."""
    return noise(t, b, h, w, d).transpose(0, 1), *_projections(noise, k, d)


def _motion_tokens(noise: Noise, b: int, t: int, h: int, w: int, d: int, k: int) -> tuple[Tensor, ...]:
    """B, T, H, W, D, K -> content, motion, projections."""
    return noise(b, h, w, d), noise(b, k, t, w + h), *_projections(noise, d, k)


def _gated_attention(noise: Noise, b: int, n: int, length: int, d: int, m: int) -> tuple[Tensor, ...]:
    """B, N, L, D, M -> q and k, small as random features want them, v; the projection."""
    # in memory as a linear layer leaves them
    q, k, v = (noise(b, length, n, d).transpose(1, 2) for _ in range(3))
    return q / 2, k / 2, v, orthogonal_features(m, d).to(q)


def _group_norm_silu(noise: Noise, b: int, c: int, h: int, w: int) -> tuple[Tensor, ...]:
    """B, C, H, W -> x in channels_last, weight, bias, shift."""
    return noise(b, c, h, w).contiguous(memory_format=torch.channels_last), noise(c), noise(c), noise(b, c)


def _convolution(noise: Noise, b: int, c: int, *sizes: int) -> tuple[Tensor, ...]:
    """B, C, H, W -> x in channels_last, the weight of a 1x1 convolution, bias, residual in channels_last."""
    x, residual = (noise(b, c, *sizes).contiguous(memory_format=torch.channels_last) for _ in range(2))
    return x, noise(c, c, 1, 1) / c**0.5, noise(c), residual


def _doubled_convolution(noise: Noise, b: int, c: int, *sizes: int) -> tuple[Tensor, ...]:
    """B, C, H, W -> x in channels_last, folded weight, bias."""
    x = noise(b, c, *sizes).contiguous(memory_format=torch.channels_last)
    return x, fold_doubling(noise(c, c, 3, 3) / (3 * c**0.5)), noise(c)


def _layer_norm(noise: Noise, b: int, length: int, d: int) -> tuple[Tensor, ...]:
    """B, L, D -> x, a condition's weight and bias, branch, the condition's gate."""
    weight, bias, gate = noise(b, 1, 3 * d).chunk(3, dim=-1)
    return noise(b, length, d), weight, bias, noise(b, length, d), gate


def _geglu(noise: Noise, b: int, length: int, d: int) -> tuple[Tensor, ...]:
    """B, L, D -> x, twice as wide."""
    return (noise(b, length, 2 * d),)


def _wide_attention(noise: Noise, b: int, length: int, d: int) -> tuple[Tensor, ...]:
    """B, L, D -> q, k and v, in memory as a linear layer leaves them."""
    return tuple(noise(b, length, 1, d).transpose(1, 2) for _ in range(3))


def _time_attention(noise: Noise, b: int, *sizes: int) -> tuple[Tensor, ...]:
    """B, T, P, N, D -> q, k and v."""
    return noise(b, *sizes), noise(b, *sizes), noise(b, *sizes)


def _rotate(noise: Noise, s: int, r: int, d: int) -> tuple[Tensor, ...]:
    """S, R, D -> x, a rotation of each r."""
    rotation = torch.view_as_complex(noise(r, d // 2, 2).to(torch.float32))
    return noise(s, r, 3 * d // 2)[..., :d], rotation


def _yuv420p(noise: Noise, b: int, h: int, w: int) -> tuple[Tensor, ...]:
    """B, H, W -> pixels in channels_last, most of them in [-1, 1]."""
    return ((noise(b, 3, h, w) / 2).contiguous(memory_format=torch.channels_last),)


OPS = (
    _op(ops.content_frame, _content_frame, (2, 3, 5, 9, 7), leaves=2),
    _op(ops.motion_latents, _motion_latents, (2, 3, 5, 9, 40, 4), leaves=5),
    _op(ops.motion_tokens, _motion_tokens, (2, 3, 5, 9, 40, 4), leaves=6),
    # always through the random features
    _op(ops.gated_attention, _gated_attention, (2, 3, 77, 24, 48), leaves=3, threshold=0),
    _op(ops.group_norm_silu, _group_norm_silu, (1, 96, 111, 99), leaves=4, groups=32, eps=1e-5),
    _op(ops.convolution, _convolution, (2, 72, 9, 7)),
    _op(ops.doubled_convolution, _doubled_convolution, (2, 72, 5, 7)),
    _op(ops.layer_norm, _layer_norm, (2, 7, 72), eps=1e-6),
    _op(ops.geglu, _geglu, (2, 7, 1080)),
    _op(ops.wide_attention, _wide_attention, (2, 77, 264)),
    _op(ops.time_attention, _time_attention, (2, 5, 7, 3, 40)),
    _op(ops.rotate, _rotate, (2, 7, 72)),
    _op(ops.yuv420p, _yuv420p, (2, 10, 22)),
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Within, a GPU's float32 is float32: cuDNN's convolutions round theirs to TF32 by default."""
    places: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


def errors(op: Op, inputs: tuple[Tensor, ...], *, backward: bool = False) -> list[Error]:
    """Compare the output and, with `backward`, the gradients of an op with its reference."""
    return compare(op.run, op.reference, inputs, leaves=op.leaves if backward else 0)


def compare(
    run: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: tuple[Tensor, ...], *, leaves: int
) -> list[Error]:
    """Compute the errors of the output and of the gradients of the first `leaves` inputs."""
    with full_float32():
        plain = results(reference, inputs, leaves)
        ours = results(run, inputs, leaves, dtype=plain[0].dtype)
    precise = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in inputs)
    exact = results(reference, tuple(precise), leaves, dtype=plain[0].dtype)
    found = []
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        size, reference_error = (float((part - z.double()).abs().max()) for part in (x, y))
        # of whole numbers, one
        floor = torch.finfo(x.dtype).eps * float(z.abs().max()) if x.is_floating_point() else 1.0
        if x.dtype == torch.float32:
            floor *= FLOAT32_ULPS
        found.append(Error(size, max(2 * reference_error, floor)))
    return found


def results(
    run: Callable[..., Tensor], inputs: tuple[Tensor, ...], leaves: int, *, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return the output, then the gradients of its product with noise in the first `leaves` inputs.

    The noise is the same for all dtypes of the inputs: rounded to `dtype`, the one that is tested,
    or else the output's.
    """
    inputs = tuple(x.detach().requires_grad_(i < leaves) for i, x in enumerate(inputs))
    output = run(*inputs)
    # those of equal shape
    output = torch.stack(output) if isinstance(output, tuple) else output
    if not leaves:
        return [output]
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    upstream = upstream.to(dtype or output.dtype).to(output)
    return [output.detach(), *torch.autograd.grad(output, inputs[:leaves], upstream)]
