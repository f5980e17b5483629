"""Ways to make clips run what they say, count what they run, and time what they name."""

import runpy
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdgen.acceleration import graphs
from cmdgen.evaluation import profile as profiling
from cmdgen.evaluation.flops import count_work
from cmdgen.evaluation.profile import Stopwatch, Way, full_steps, measure_limits, plan_suite, profile, smooth_clip
from cmdgen.pipelines.load import load_pipeline
from cmdgen.pipelines.observer import Observer
from cmdgen.request import Request
from cmdgen.video.read import read_metadata, read_video

STEPS, RUNS = 4, 2
SMALL = Request(size=(16, 32), steps=STEPS)
CLIP_STAGES = ["text", "content", "motion", "frame decode", "VAE decode"]


@contextmanager
def count_calls(pipeline) -> Iterator[dict[str, Counter[int]]]:
    """Give how often parts of the networks ran, by the batch they ran on."""
    unet, dit = pipeline.unet, pipeline.motion
    parts = {
        # at every step, and where nothing is skipped
        **{"content": unet.conv_in, "content in full": unet.mid_block},
        **{"motion": dit.final, "motion in full": dit.blocks[0]},
    }
    calls: dict[str, Counter[int]] = {name: Counter() for name in parts}

    def hook(name: str):
        return lambda _, given: calls[name].update([len(given[0])])

    handles = [part.register_forward_pre_hook(hook(name)) for name, part in parts.items()]
    yield calls
    for handle in handles:
        handle.remove()


# 4 + 4 steps: guidance of the content is 3, of the motion off
@pytest.mark.parametrize(
    ("name", "branches", "full"), [("paper", 1, 4), ("clip", 2, 4), ("rehash_half", 2, 2), ("rehash_quarter", 2, 2)]
)
def test_a_row_runs_its_steps_and_branches(pipeline, name, branches, full):
    way = plan_suite(pipeline, SMALL)[name]
    with count_calls(pipeline) as calls:
        pipeline.run(way.clips(0))
    assert calls == {
        "content": {branches: 4},
        "content in full": {branches: full},
        "motion": {1: 4},
        "motion in full": {1: full},
    }


@pytest.mark.parametrize(("steps", "full"), [(3, [2, 2]), (4, [2, 2]), (20, [10, 5]), (None, [25, 13])])
def test_as_many_steps_are_full_in_proportion(pipeline, steps, full):
    ways = plan_suite(pipeline, Request(steps=steps))
    found = [full_steps(ways[name].plan) for name in ("rehash_half", "rehash_quarter")]
    assert found == [(number, number) for number in full]


@pytest.mark.parametrize("name", ["paper", "clip", "rehash_half", "rehash_quarter"])
def test_what_is_counted_is_what_runs(pipeline, flop_counter, name):
    plan = plan_suite(pipeline, SMALL)[name].plan
    if name != "paper":
        # both networks guided
        plan = replace(plan, model=replace(plan.model, motion_guidance=2.0))
    ran: dict[str, int] = {}

    class Watch(Observer):
        @contextmanager
        def stage(self, name: str) -> Iterator[None]:
            before = flop_counter.get_total_flops()
            yield
            # the content frame's picture is decoded before the motion is sampled
            ran[name] = ran.get(name, 0) + flop_counter.get_total_flops() - before

    with flop_counter:
        pipeline.run([plan], Watch())
    counted = {stage: work.flops for stage, work in count_work(plan, torch.float32).items()}
    assert {stage: ran.get(stage, 0) for stage in counted} == counted


def test_the_paper_counts_its_stages_and_a_user_waits_for_the_file(pipeline, monkeypatch):
    ticks = iter(range(10**6))
    # a second from each look at the clock to the next
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(profiling, "measure_limits", lambda *_: profiling.Limits(100.0, 1.0))
    done = []
    with count_calls(pipeline) as calls:
        record = profile(
            lambda: pipeline, plan_suite(pipeline, SMALL), runs=RUNS, show=lambda _, *some: done.append(some)
        )
    assert done == [(i, 4 * (1 + RUNS)) for i in range(4 * (1 + RUNS) + 1)]
    # one run more than is measured
    assert calls["motion"] == {1: STEPS * 4 * (1 + RUNS)}
    assert calls["content"] == {1: STEPS * (1 + RUNS), 2: STEPS * 3 * (1 + RUNS)}
    paper, *clips = record["rows"].values()
    assert list(paper["stages"]) == CLIP_STAGES[:-1]
    # a second each, and no more
    assert paper["seconds"] == dict.fromkeys(("median", "fastest", "slowest"), 4.0)
    assert (paper["guidance"], paper["motion_guidance"]) == (1.0, 1.0)
    for row in clips:
        assert list(row["stages"]) == CLIP_STAGES
        # five stages, one of them twice, and load, as many gaps between them and one more
        assert row["seconds"] == dict.fromkeys(("median", "fastest", "slowest"), 15.0)
        assert (row["guidance"], row["motion_guidance"]) == (3.0, 1.0)
    clip = record["rows"]["clip"]
    assert clip["content_step_seconds"] == 1 / STEPS
    content = clip["stages"]["content"]
    assert content["flops_per_second"] == content["flops"] > 0
    assert content["share_of_matmul"] == content["flops"] / 100


def test_a_clip_that_captures_is_not_the_one_that_is_timed(tiny_model, monkeypatch, quick_limits):
    captured = []

    def capture(function, inputs, pool, generation):
        captured.append(len(inputs))
        # what a capture takes, many times over
        time.sleep(0.1)
        return lambda: function(*inputs)

    monkeypatch.setattr(graphs, "capture", capture)

    def load():
        loaded = load_pipeline(tiny_model, device="cpu")
        loaded.uses_graphs = True
        return loaded

    way = Way(load().plan(SMALL))
    row = profile(load, {"clip": way}, runs=1, show=lambda *_: None)["rows"]["clip"]
    # text encoder, UNet, motion model, CMD decoder and frames of two pipelines
    assert len(captured) == 10
    assert row["capture_seconds"] > 0.15
    assert sum(stage["seconds"]["median"] for stage in row["stages"].values()) <= row["seconds"]["median"]


def test_a_smooth_clip_has_the_sizes_of_the_frames(pipeline):
    model = replace(pipeline.config, frames=5, height=32, width=48)
    frames = smooth_clip(model)
    assert frames.shape == (5, 48, 48) and frames.dtype == np.uint8
    assert np.abs(np.diff(frames[:, :32].astype(int), axis=2)).max() < 40 < np.ptp(frames[:, :32])


def test_the_file_that_is_waited_for_is_the_clip(pipeline, tmp_path):
    way = plan_suite(pipeline, SMALL)["rehash_half"]
    watch, started = Stopwatch(pipeline.device), time.perf_counter()
    way.make(pipeline, watch, tmp_path / "clip", 3)
    assert time.perf_counter() - started > sum(watch.seconds.values())
    frames, fps = read_video(tmp_path / "clip.mp4")
    assert (frames.shape, fps) == ((4, 16, 32, 3), 8)
    metadata = read_metadata(tmp_path / "clip.mp4")
    assert (metadata["seed"], metadata["sampler"], metadata["steps"]) == (3, "ddim", STEPS)
    assert metadata["rehash_policy"] == "uniform"


def test_a_model_of_stills_is_refused(pipeline, monkeypatch):
    stills = replace(pipeline.config, motion=None, autoencoder=None, frames=1)
    monkeypatch.setattr(pipeline, "config", stills)
    with pytest.raises(ValueError, match=r"^tiny makes stills: the suite measures videos$"):
        plan_suite(pipeline, Request())


def test_the_limits_are_of_two_operations_and_of_bytes_read_and_written(monkeypatch):
    ticks = iter(range(1000))
    # a second for whatever is timed
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setitem(profiling.MATMUL_SIZE, "cpu", 10)
    monkeypatch.setitem(profiling.COPY_BYTES, "cpu", 1000)
    assert measure_limits(torch.device("cpu"), torch.float32) == (2 * 10**3, 2 * 1000)


def test_profiling_that_is_off_looks_at_no_clock(pipeline, monkeypatch):
    def refuse(*_):
        raise AssertionError("somebody asked")

    monkeypatch.setattr(time, "perf_counter", refuse)
    pipeline.run([pipeline.plan(Request())])
    with pytest.raises(AssertionError, match="somebody asked"):
        pipeline.run([pipeline.plan(Request())], Stopwatch(pipeline.device))


def test_a_stage_that_is_entered_again_adds_its_time_and_keeps_its_peak():
    watch = Stopwatch(torch.device("cpu"))
    with watch.stage("text"):
        block = torch.ones(2**24)
    first, peak = watch.seconds["text"], watch.memory["text"]
    del block
    with watch.stage("text"):
        pass
    assert watch.seconds["text"] > first
    assert watch.memory["text"] == peak


def test_the_steps_of_diffusers_beside_ours_are_the_same_work(tiny_model, quick_limits):
    script = runpy.run_path(str(Path(__file__).parents[1] / "compare_diffusers.py"))
    request = Request(model=str(tiny_model), device="cpu", sampler="ddim", steps=3, frames=1)
    title, _, _, header, _, *rows, _, _, _ = script["compare"](request, Namespace(runs=2, compile=None))
    assert title == "tiny, 3 steps of ddim at 48x32, guidance 3"
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (header, *rows)]
    ours, theirs = (dict(zip(cells[0], row, strict=True)) for row in cells[1:])
    assert (ours["UNet"], theirs["UNet"]) == ("cmdgen", "diffusers")
    assert (ours["of ours"], ours["as cmdgen"]) == ("1.00x", "")
    # but for rounding
    assert float(theirs["as cmdgen"].removesuffix(" dB")) > 60
    ratio = float(theirs["ms/step"]) / float(ours["ms/step"])
    assert float(theirs["of ours"].removesuffix("x")) == pytest.approx(ratio, rel=0.02)
