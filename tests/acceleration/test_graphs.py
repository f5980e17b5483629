"""Captured functions give what the functions give; capture itself needs a GPU."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from cmdgen.acceleration import graphs
from cmdgen.acceleration.graphs import Graphed
from cmdgen.config import SAMPLERS
from cmdgen.pipelines.load import load_pipeline

POOLS: dict[object, Tensor] = {}


def capture_on_cpu(
    function: Callable[..., object], inputs: list[Tensor], pool: object, generation: object = None
) -> Callable[[], object]:
    """As a graph does at worst: it reads the same inputs, and overwrites all of its pool."""
    memory = POOLS.setdefault(pool, torch.empty(10**6))

    def replay() -> object:
        outputs = function(*inputs)
        memory.fill_(torch.nan)
        if isinstance(outputs, Tensor):
            return write(outputs, 0)
        first, second = outputs
        return write(first, 0), write(second, first.numel())

    def write(output: Tensor, start: int) -> Tensor:
        # in the same order of memory
        return memory.as_strided(output.shape, output.stride(), start).copy_(output)

    return replay


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"guidance": 1.0},
        {"motion_guidance": 3.0, "guidance_interval": (0.3, 0.8)},
        {"rehash": 3, "rehash_policy": "uniform"},
        {"rehash": 3, "rehash_policy": "uniform", "guidance_interval": (0.3, 1.0)},
    ],
)
def test_clips_are_the_same_and_graphs_are_reused(
    monkeypatch, tiny_model, sampler: str, asked: dict[str, object]
) -> None:
    monkeypatch.setattr(graphs, "capture", capture_on_cpu)
    options = {"sampler": sampler, "steps": 6, "motion_steps": 4, **asked}
    plain, graphed = load_pipeline(tiny_model), load_pipeline(tiny_model)
    assert not plain.uses_graphs
    graphed.uses_graphs = True
    captures = None
    for prompt, seed in (("a dog", 1), ("a red car", 2)):
        expected = plain.sample(prompt, seed=seed, **options).frames
        assert np.array_equal(graphed.sample(prompt, seed=seed, **options).frames, expected)
        count = sum(len(each.captures) for each in graphed.prepared.values())
        assert count == (captures or count) > 0
        captures = count


def test_every_call_has_its_own_inputs_and_every_shape_its_own_graph(monkeypatch) -> None:
    captured = []

    def capture(function, inputs, pool, generation):
        captured.append([tensor.shape for tensor in inputs])
        return capture_on_cpu(function, inputs, pool)

    monkeypatch.setattr(graphs, "capture", capture)
    graphed = Graphed(lambda x, t: (x.sin() + t, x * t), "a pool")
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


def test_no_graph_runs_after_another_of_its_stream_has_gone(monkeypatch) -> None:
    captured: list[tuple[str, int]] = []

    def capture(function, inputs, pool, generation):
        assert generation.whole
        captured.append((function.__name__, len(inputs[0])))
        replay = capture_on_cpu(function, inputs, pool)

        def run() -> object:
            # as it would write where nobody has kept its memory
            assert generation.whole
            return replay()

        return run

    monkeypatch.setattr(graphs, "capture", capture)
    sin, cos = Graphed(torch.sin, "a pool"), Graphed(torch.cos, "a pool")
    for size in (1, 2, 3, 4, 1, 4):
        sin(torch.ones(size))
        cos(torch.ones(1))
    assert captured == [("sin", 1), ("cos", 1), ("sin", 2), ("sin", 3), ("sin", 4)]
    # more than four are not kept: both start anew, once
    captured.clear()
    for size in (5, 1, 5):
        sin(torch.ones(size))
        cos(torch.ones(1))
    assert captured == [("sin", 5), ("cos", 1), ("sin", 1)] and len(sin.captures) == 2
    # a pipeline that goes takes its graphs with it
    captured.clear()
    del sin
    for _ in range(2):
        assert torch.equal(cos(torch.ones(1)), torch.ones(1).cos())
    assert captured == [("cos", 1)]


def test_an_error_in_a_capture_is_not_hidden_by_the_end_of_the_capture(monkeypatch) -> None:
    @contextmanager
    def graph(*_, **__):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"), graphs.record(None, None, None):
        raise torch.OutOfMemoryError("CUDA out of memory")
    # nor by what else fails on the way there
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"), graphs.record(None, None, None):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    with pytest.raises(RuntimeError, match="previous error"), graphs.record(None, None, None):
        pass


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("asked", [{}, {"guidance": 1.0}, {"rehash": 3, "rehash_policy": "uniform"}])
def test_inputs_have_one_order_in_memory_so_that_they_are_one_copy(
    monkeypatch, tiny_model, sampler: str, asked: dict[str, object]
) -> None:
    copied: list[int] = []

    def copy(inputs: list[Tensor], given: list[Tensor]) -> None:
        # what torch asks for, or else it launches a copy for each tensor
        assert [each.stride() for each in inputs] == [each.stride() for each in given]
        assert len({each.dtype for each in given}) == 1
        for target, source in zip(inputs, given, strict=True):
            target.copy_(source)
        copied.append(len(given))

    monkeypatch.setattr(graphs, "capture", capture_on_cpu)
    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    model = load_pipeline(tiny_model)
    model.uses_graphs = True
    model.sample("a dog", sampler=sampler, steps=5, motion_steps=4, **asked)
    # of the text encoder, the networks, the CMD decoder and the VAE
    assert len(copied) == 1 + 5 + 4 + 1 + 1


@pytest.mark.gpu
def test_graphs_outlive_others_of_their_stream_on_a_gpu() -> None:
    layer, pool = torch.nn.Linear(1024, 1024, device="cuda", dtype=torch.float16), cache(torch.cuda.graph_pool_handle)
    kept = Graphed(layer, pool)
    with torch.inference_mode():
        x = torch.randn(512, 1024, device="cuda", dtype=torch.float16)
        expected = layer(x)
        assert torch.equal(kept(x), expected)
        for rows in range(1, 8):
            other = Graphed(lambda x: layer(layer(x)), pool)
            other(x[: 64 * rows])
            del other
            torch.cuda.empty_cache()
            busy = [torch.zeros(2**20, device="cuda") for _ in range(64)]
            assert torch.equal(kept(x), expected)
            assert not any(each.any() for each in busy)


@pytest.mark.gpu
def test_replays_equal_the_function_on_a_gpu() -> None:
    layer = torch.nn.Linear(64, 64, device="cuda")
    pool = cache(torch.cuda.graph_pool_handle)
    graphed = Graphed(lambda x, t: layer(x).sin() + t, pool)
    other = Graphed(lambda x: layer(layer(x).cos()), pool)
    with torch.inference_mode():
        for batch in (4, 8, 4):
            for _ in range(3):
                x, t = torch.randn(batch, 64, device="cuda"), torch.randn(batch, 1, device="cuda")
                first, second = graphed(x, t), other(x)
                graphed(t * x, t)
                assert torch.equal(first, layer(x).sin() + t)
                assert torch.equal(second, layer(layer(x).cos()))
