"""Devices by name. None of these machines has Apple's: what asks for a GPU's kind is asked here."""

from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cmdgen.acceleration.graphs import fastest_libraries
from cmdgen.acceleration.memory import Work, choose_slices
from cmdgen.acceleration.overlap import fetch
from cmdgen.config import ANIMATEDIFF, SVD
from cmdgen.pipelines.device import choose_device, choose_dtype
from cmdgen.pipelines.video_unet import MotionPipeline, PicturePipeline

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
