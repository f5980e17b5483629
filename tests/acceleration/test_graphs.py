"""Captured functions give what the functions give; capture itself needs a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cmdgen.acceleration import graphs
from cmdgen.acceleration.graphs import Graphed


def capture_on_cpu(function: Callable[..., object], inputs: list[Tensor]) -> Callable[[], object]:
    """As a graph does: reads the same inputs and writes the same output again."""
    outputs = function(*inputs)

    def replay() -> object:
        for old, new in zip(outputs, function(*inputs), strict=True):
            old.copy_(new)
        return outputs

    return replay


def test_every_call_has_its_own_inputs_and_every_shape_its_own_graph(monkeypatch) -> None:
    captured = []

    def capture(function, inputs):
        captured.append([tensor.shape for tensor in inputs])
        return capture_on_cpu(function, inputs)

    monkeypatch.setattr(graphs, "capture", capture)
    graphed = Graphed(lambda x, t: (x.sin() + t, x * t))
    for size in (3, 5, 3, 5):
        for _ in range(2):
            x, t = torch.randn(2, size), torch.randn(2, 1)
            before = x.clone()
            out, product = graphed(x, t)
            assert torch.equal(out, x.sin() + t) and torch.equal(product, x * t)
            assert torch.equal(x, before)
    assert [shapes[0] for shapes in captured] == [(2, 3), (2, 5)]
    graphed(torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 1))
    assert len(captured) == 3


@pytest.mark.gpu
def test_replays_equal_the_function_on_a_gpu() -> None:
    layer = torch.nn.Linear(64, 64, device="cuda")
    graphed = Graphed(lambda x, t: layer(x).sin() + t)
    with torch.inference_mode():
        for batch in (4, 8, 4):
            for _ in range(3):
                x, t = torch.randn(batch, 64, device="cuda"), torch.randn(batch, 1, device="cuda")
                assert torch.equal(graphed(x, t), layer(x).sin() + t)
