"""The rule of parity lets rounding pass, and nothing else."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import cmdgen_kernels
from cmdgen_kernels.samples import OPS, Op, errors

# a constant in a kernel, and what it is mistaken for
MUTATIONS = [("group_norm_silu", "LOG2E", 1.443), ("motion_latents", "LOG2E", 1.443)]


def inputs(op: Op, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return op.inputs(op.small, dtype, torch.device(device))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_wrong_factor_is_no_rounding(op: Op, dtype: torch.dtype, device: str) -> None:
    drawn = inputs(op, dtype, device)
    result = tree_leaves(op.run(*drawn))[0].dtype
    # one part in 65,000 in float32, in half precision and of 256 levels more than is rounded
    scale = 1 + 2**-16 if result == torch.float32 else 1 + 2**-5
    wrong = replace(op, run=lambda *inputs: tree_map(lambda x: (x * scale).to(x.dtype), op.run(*inputs)))
    assert all(error.agrees for error in errors(op, drawn))
    assert not any(error.agrees for error in errors(wrong, drawn))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_error_that_ptx_allows_is_rounding(op: Op, device: str, approximate: None) -> None:
    found = errors(op, inputs(op, torch.float32, device), backward=op.leaves > 0)
    assert all(error.agrees for error in found), found


def forget() -> None:
    """Drop what was compiled: Triton finds it by the arguments, whatever the constants are by then."""
    for name, module in sys.modules.items():
        if name.startswith("cmdgen_kernels."):
            for function in vars(module).values():
                # the interpreter's have none
                if hasattr(function, "device_caches"):
                    function.device_caches.clear()
                    # of its source, and of the constants that it and what it calls read
                    function.hash, function.used_global_vals = None, {}


@pytest.fixture
def recompile() -> Iterator[Callable[[], None]]:
    """Give `forget`, and do it afterwards."""
    yield forget
    forget()


@pytest.mark.parametrize(("name", "constant", "value"), MUTATIONS)
def test_a_wrong_constant_in_a_kernel_is_no_rounding(
    name: str, constant: str, value: float, device: str, recompile: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    language: Any = pytest.importorskip("triton.language")
    (op,) = (op for op in OPS if op.name == name)
    module = sys.modules[vars(cmdgen_kernels)[name].__module__]
    drawn = inputs(op, torch.float32, device)
    assert all(error.agrees for error in errors(op, drawn))
    monkeypatch.setattr(module, constant, language.constexpr(value))
    recompile()
    assert not any(error.agrees for error in errors(op, drawn))
