"""The rule of parity lets rounding pass, and nothing else."""

import sys
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


@pytest.mark.parametrize(("name", "constant", "value"), MUTATIONS)
def test_a_wrong_constant_in_a_kernel_is_no_rounding(
    name: str, constant: str, value: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    language: Any = pytest.importorskip("triton.language")
    (op,) = (op for op in OPS if op.name == name)
    module = sys.modules[vars(cmdgen_kernels)[name].__module__]
    drawn = inputs(op, torch.float32, device)
    assert all(error.agrees for error in errors(op, drawn))
    monkeypatch.setattr(module, constant, language.constexpr(value))
    assert not any(error.agrees for error in errors(op, drawn))
