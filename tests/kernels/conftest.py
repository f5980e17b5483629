import os
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from cmdgen_kernels import dispatch
from cmdgen_kernels.samples import compare, full_float32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter computes neither products nor roundings of bfloat16
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest fixture: workers that run out of tests take others' last ones."""
    items.sort(key=lambda item: item.path.name != "test_ahead_of_time.py")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Kernels run: on a GPU, in full float32, or else in Triton's interpreter; memory starts out as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if DEVICE == "cuda":
        with full_float32():
            yield
    else:
        # there is none for macOS and Windows
        pytest.importorskip("triton")
        assert os.environ["TRITON_INTERPRET"] == "1"
        with patch.object(dispatch, "_interpreting", True):
            yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def approximate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's float32 functions err as far as PTX allows ex2.approx, div.full and sqrt.approx."""
    if DEVICE == "cuda":
        pytest.skip("CUDA's own functions are approximate")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    log2e, ulp = np.float32(np.log2(np.e)), 2.0**-23
    # not all in one direction, which would cancel in x / (1 + exp(-x))
    functions = {
        "exp": (lambda x: np.exp2(x * log2e), 2 * ulp),
        "exp2": (np.exp2, 2 * ulp),
        "sqrt": (np.sqrt, -ulp),
        "fdiv": (np.divide, -2 * ulp),
    }
    for name, (function, error) in functions.items():

        def run(self, *operands, function=function, error=error):
            values = function(*(x.data for x in operands))
            if values.dtype == np.float32:
                values = values * np.float32(1 + error)
            return interpreter.TensorHandle(values, operands[0].dtype)

        monkeypatch.setattr(interpreter.InterpreterBuilder, f"create_{name}", run)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def assert_parity() -> Callable[..., None]:
    """`op(*inputs)` and its gradients err at most twice as much as the reference in that dtype.

    Both against the reference in float64; `samples.Error` tells what is allowed in any case.
    """

    def check(
        op: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor, gradients: bool = True
    ) -> None:
        results = compare(op, reference, inputs, leaves=len(inputs) if gradients else 0)
        for i, error in enumerate(results):
            assert error.agrees, f"result {i}: {error}"

    return check
