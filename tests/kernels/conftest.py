from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cmdgen_kernels.dispatch import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter computes neither products nor roundings of bfloat16
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Kernels run: on a GPU, or else in Triton's interpreter; memory starts out as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if DEVICE == "cuda":
        yield
    else:
        # there is none for macOS and Windows
        pytest.importorskip("triton")
        with interpreted():
            yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def device() -> str:
    return DEVICE


def _run(op: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output, then the gradients of its product with noise in every input that has one."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    output = op(*inputs)
    leaves = [x for x in inputs if x.requires_grad] if output.requires_grad else []
    # the same for all dtypes: rounded to the one that is tested
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    upstream = upstream.to(output)
    grads = torch.autograd.grad(output, leaves, upstream, allow_unused=True) if leaves else ()
    return [output.detach(), *(grad for grad in grads if grad is not None)]


@pytest.fixture
def assert_parity() -> Callable[..., None]:
    """`op(*inputs)` and its gradients err at most twice as much as the reference in that dtype.

    Both against the reference in float64; an error of one unit in the last place is always allowed.
    """

    def check(op: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        dtype = reference(*inputs).dtype
        exact = _run(reference, wide, dtype)
        plain = _run(reference, list(inputs), dtype)
        ours = _run(op, list(inputs), dtype)
        assert len(ours) == len(plain) == len(exact)
        for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype, f"result {i}"
            assert a.isfinite().all(), f"result {i} is not finite"
            if a.numel() == 0:
                continue
            error, allowed = (float((x.double() - c).abs().max()) for x in (a, b))
            ulp = torch.finfo(a.dtype).eps * float(c.abs().max())
            assert error <= max(2 * allowed, ulp), (
                f"result {i}: error {error:.3g}, plain PyTorch's {allowed:.3g}, ulp {ulp:.3g}"
            )

    return check
