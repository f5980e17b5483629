"""Memory that runs out: exit code 4, with what would fit."""

import re
from dataclasses import replace

import pytest
import torch

from cmdgen.acceleration.memory import LiveBytes, count_peak
from cmdgen.cli import advice
from cmdgen.cli.app import main
from cmdgen.evaluation import memory as memories
from cmdgen.evaluation.estimate import estimate_activations, find_fitting
from cmdgen.evaluation.memory import Memory
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.load import load_pipeline
from cmdgen.request import Request

PROMPT = "a dog swimming in the ocean"


@pytest.fixture
def short(monkeypatch):
    """Makes forwards of more than so many clips run out of memory, where so much of it is free."""

    def fail(most: int, free: int | None) -> None:
        sample = CmdPipeline.run

        def run(self, plans, *arguments, **options):
            if len(plans) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return sample(self, plans, *arguments, **options)

        monkeypatch.setattr(CmdPipeline, "run", run)
        monkeypatch.setattr(memories, "measure_memory", lambda device: Memory(2**40, free))

    return fail


@pytest.fixture
def sample(capsys, tiny_model, tmp_path):
    def run(*arguments: object) -> tuple[int, str, str]:
        command = ["sample", PROMPT, "--model", tiny_model, "-o", tmp_path / "{seed}.mp4"]
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in (*command, "--seed", 1, *arguments)])
        return end.value.code or 0, *capsys.readouterr()

    return run


def needs(model, request: Request, batch: int = 1) -> int:
    return estimate_activations(model.plan(request, batch=batch), model.dtype, batch=batch)


def test_what_would_fit_is_said_and_does(sample, short, tiny_model, tmp_path) -> None:
    needed = needs(load_pipeline(tiny_model), Request(frames=8, size=(64, 96)))
    short(0, needed // 3)
    code, out, err = sample("--frames", 8, "--size", "96x64", "--quiet")
    assert (code, out) == (4, "")
    assert err.count("\n") == 1
    found = re.fullmatch(
        rf"error: not enough memory: about {needed / 1e6:,.0f} MB beside the weights for 8 frames "
        rf"of 96x64, {needed // 3 / 1e6:,.0f} MB free: (.+) should fit\n",
        err,
    )
    assert found is not None, err
    assert not list(tmp_path.glob("*.mp4"))
    options = found[1].split()
    assert "--max-memory" in options


def test_the_largest_that_fits_is_found(tiny_model) -> None:
    model = load_pipeline(tiny_model)
    request = Request(frames=8, size=(64, 96))
    needed = needs(model, request)
    # slices do, where nearly all of it is there
    assert find_fitting(model, request, needed) == replace(request, max_memory=needed)
    before = None
    for share in (2, 4, 8, 16):
        fitting = find_fitting(model, request, needed // share)
        if fitting is None:
            break
        assert needs(model, fitting) <= needed // share
        size = fitting.frames * fitting.size[0] * fitting.size[1]
        assert before is None or size <= before
        before = size
    assert before is not None and before < 8 * 64 * 96
    assert find_fitting(model, request, 1000) is None


def test_what_fits_of_thousands_of_frames_is_counted_as_fast_as_that_of_hundreds(tiny_model, monkeypatch) -> None:
    model, steps = load_pipeline(tiny_model), []
    evaluate = LiveBytes.__torch_dispatch__
    monkeypatch.setattr(LiveBytes, "__torch_dispatch__", lambda *arguments: (steps.append(1), evaluate(*arguments))[1])

    def count(frames: int) -> int:
        count_peak.cache_clear()
        steps.clear()
        request = Request(frames=frames, size=(64, 96))
        assert find_fitting(model, request, needs(model, request) // 3) is not None
        return len(steps)

    assert count(4096) < min(1.25 * count(512), 10_000)


def test_clips_at_a_time_come_first(tiny_model, short) -> None:
    model = load_pipeline(tiny_model)
    model.load()
    needed = needs(model, Request(), batch=8)
    short(0, needed // 2)
    assert advice.advise(model, Request(), 8).endswith("MB free: ask for --batch 4")
    # where it cannot be told what is free, it is less than what was asked for
    short(0, None)
    said = advice.advise(model, Request(), 1)
    assert "free" not in said and said.endswith("should fit")


def test_weights_that_do_not_fit_are_told_apart(tiny_model) -> None:
    said = advice.advise(load_pipeline(tiny_model), Request(), 1)
    assert said == "the weights of tiny do not fit: try --dtype bfloat16"


def test_a_forward_of_several_that_runs_out_of_memory_is_halved(sample, short, tmp_path) -> None:
    short(1, 10**9)
    code, _, err = sample("--num", 2, "--batch", 2)
    assert code == 0, err
    assert "note: not enough memory for 2 clips at a time" in err
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["1.mp4", "2.mp4"]


def test_far_too_much_is_refused_before_any_work(sample, monkeypatch, tmp_path) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(CmdPipeline, "run", run)
    monkeypatch.setattr(memories, "measure_memory", lambda device: Memory(2**30, 2**21))
    code, out, err = sample("--frames", 64, "--size", "96x64", "--quiet")
    assert (code, out, list(tmp_path.iterdir())) == (4, "", [])
    assert re.fullmatch(r"error: not enough memory: about .* 2 MB free: .* should fit\n", err)
