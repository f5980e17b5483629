"""One pipeline of the tiny model for all tests of measuring."""

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cmdgen.evaluation import profile as profiling
from cmdgen.pipelines.load import load_pipeline


@pytest.fixture(scope="session")
def pipeline(tiny_model):
    loaded = load_pipeline(tiny_model, device="cpu")
    # reading the weights tries them out
    loaded.load()
    return loaded


@pytest.fixture
def quick_limits(monkeypatch):
    """Measures the machine's limits, which are of no matter here and take seconds, in a moment."""
    monkeypatch.setitem(profiling.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(profiling.COPY_BYTES, "cpu", 2**16)


@pytest.fixture
def flop_counter():
    """PyTorch's counter, which does not know the fused attention of its CPUs."""

    def count(q, k, v, *_, out_shape=None, **__):
        return 2 * prod(q[:-1]) * k[-2] * (k[-1] + v[-1])

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: count})
