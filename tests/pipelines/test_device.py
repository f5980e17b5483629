"""Devices by name. None of these machines has Apple's: what asks for a GPU's kind is asked here."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmdgen.acceleration.compiled import check_compiler
from cmdgen.acceleration.graphs import fastest_libraries
from cmdgen.acceleration.memory import Work, choose_slices
from cmdgen.acceleration.overlap import fetch
from cmdgen.config import ANIMATEDIFF, SAMPLERS, SVD, ModelConfig
from cmdgen.evaluation import memory
from cmdgen.evaluation.memory import measure_memory
from cmdgen.evaluation.profile import Stopwatch, device_name
from cmdgen.pipelines import base
from cmdgen.pipelines.clip import Inputs
from cmdgen.pipelines.device import choose_device, choose_dtype
from cmdgen.pipelines.video_unet import MotionPipeline, PicturePipeline
from cmdgen.request import Request
from cmdgen.store.create import create_model
from cmdgen.store.parts import PARTS, network_configs
from cmdgen.weights import build_empty
from tests.video_unets import tiny

MPS = torch.device("mps")


def test_mps_is_a_name_where_torch_has_it_and_never_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device 'mps' is not one of auto, cpu"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == MPS and choose_device("auto").type != "mps"


def test_a_gpu_computes_in_half_precision_and_a_cpu_does_not() -> None:
    assert choose_dtype("auto", MPS) == choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


class _NoCuda(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert "cuda" not in getattr(function, "__name__", ""), function
        return function(*args, **(kwargs or {}))


def test_nothing_of_cuda_is_asked_for_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("CUDA is asked for")

    for name in ("Stream", "Event", "device", "current_stream", "graph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    for kind, model in ((MotionPipeline, ANIMATEDIFF), (PicturePipeline, SVD)):
        pipeline = kind(Path("nowhere"), model, MPS, torch.float16)
        assert not pipeline.uses_graphs and pipeline.side_stream is None
        function = object()
        assert pipeline.graphed("content", function) is function
        assert choose_slices(Work(model, torch.float16), MPS).strips == 1
    with _NoCuda(), fastest_libraries(MPS):
        # as of a device that is neither CPU nor CUDA
        parts = [torch.empty(2, device="meta")]
        monkeypatch.setattr(torch.Tensor, "cpu", lambda part: torch.zeros(2))
        assert [part.tolist() for part in fetch(parts)] == [[0.0, 0.0]]


def test_time_and_memory_of_mps_are_not_taken_for_a_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(time.perf_counter()))
    watch = Stopwatch(MPS)
    with watch.stage("content"):
        begun = time.perf_counter()
    assert waits[0] <= begun <= waits[1] and len(waits) == 2 and watch.seconds["content"] >= 0
    assert device_name(MPS) == "mps" and device_name(torch.device("cpu")).startswith("cpu, ")
    # what is not CUDA has the machine's own memory
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert measure_memory(MPS).total == measure_memory(torch.device("cpu")).total > 0


@pytest.mark.skipif(sys.platform != "linux", reason="groups are Linux's")
def test_memory_that_holds_files_is_free_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    limit, used = 2**24, {"anon": 2**20, "inactive_file": 2**21, "active_file": 2**22}
    files = {"max": limit, "current": sum(used.values()), "stat": "\n".join(f"{k} {v}" for k, v in used.items())}
    for name, value in files.items():
        (tmp_path / f"memory.{name}").write_text(f"{value}\n")
    assert measure_memory(torch.device("cpu")) == (limit, limit - used["anon"])


def test_a_compiler_that_fails_on_mps_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> object:
        raise RuntimeError("no Metal")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ValueError, match=r"torch\.compile fails on mps: no Metal; it needs a PyTorch that has Metal"):
        check_compiler(MPS)


META = torch.device("meta")


class _OneDevice(TorchDispatchMode):
    """What runs on the meta device, which is neither a CPU nor CUDA, reads nothing of the CPU, and no float64."""

    ran = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        there = [each for each in tensors if each.device == META]
        self.ran += bool(there)
        assert all(each.dtype != torch.float64 for each in there), func
        # numbers may lie anywhere
        here = [each for each in tensors if each.device != META and each.ndim]
        moves = any(word in str(func) for word in ("copy", "aten.to.", "lift_fresh"))
        assert not (there and here) or moves, func
        return result


@pytest.mark.parametrize("model", [ANIMATEDIFF, SVD], ids=["animatediff", "svd"])
def test_clips_are_made_on_one_device_without_float64(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Apple's there is no float64: a device without values stands for it."""
    model = tiny(model)
    create_model(model, tmp_path / "model")

    def build(folder: Path, name: str, *, dtype: torch.dtype, device: torch.device) -> Any:
        return build_empty(PARTS[name].network, network_configs(model)[name]).to(device, dtype)

    monkeypatch.setattr(base, "load_part", build)
    leave = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else leave(x))
    monkeypatch.setattr(base.Pipeline, "check_finite", lambda pipeline, sample, part: sample)
    kind = MotionPipeline if model.vision is None else PicturePipeline
    pipeline = kind(tmp_path / "model", model, META, choose_dtype("auto", MPS))
    picture = None if model.vision is None else np.zeros((70, 50, 3), np.uint8)
    prompt = "a dog" if model.vision is None else None
    requests = [Request(prompt, seed=1, steps=2, sampler=sampler) for sampler in SAMPLERS]
    batches = [[pipeline.plan(request, batch=2)] * 2 for request in requests]
    # in the smallest slices, with the weights of one stage at a time
    limit = Work.of(batches[0][0], pipeline.dtype, 2).least
    batches.append([pipeline.plan(replace(requests[0], max_memory=limit), batch=2)] * 2)
    assert batches[-1][0].slices.staged
    for plans in batches:
        with _OneDevice() as device:
            clips = pipeline.run(plans, inputs=Inputs(image=picture))
        assert len(clips) == 2 and clips[0].frames.shape == (4, 64, 64, 3) and device.ran > 1000
