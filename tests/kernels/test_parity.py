"""The rule of parity lets rounding pass, and nothing else."""

from dataclasses import replace

import pytest
import torch

from cmdgen_kernels.samples import OPS, Op, errors


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_wrong_constant_is_no_rounding(op: Op, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    inputs = op.inputs(op.small, dtype, torch.device(device))
    # one part in 5,000 in float32, in half precision more than it rounds
    scale = 1 + 2**-12 if dtype == torch.float32 else 1 + 2**-5
    wrong = replace(op, run=lambda *inputs: op.run(*inputs) * scale)
    assert all(error.agrees for error in errors(op, inputs))
    assert not any(error.agrees for error in errors(wrong, inputs))
