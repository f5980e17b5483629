"""The rows of the suite run what they say, count what they run, and time what they name."""

import runpy
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cmdgen.config import SampleConfig, SuiteConfig
from cmdgen.evaluation import profile as profiling
from cmdgen.evaluation import suite
from cmdgen.evaluation.suite import count_row, measure_suite, plan_suite
from cmdgen.pipeline import TextToVideo
from cmdgen.video.read import read_metadata, read_video

STEPS, RUNS = 4, 2
CLIP_STAGES = ["text", "content", "motion", "frame decode", "VAE decode"]


@pytest.fixture
def model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> TextToVideo:
    # what the limit is is of no matter here, and takes seconds
    monkeypatch.setitem(profiling.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(profiling.COPY_BYTES, "cpu", 2**16)
    return TextToVideo.load(tiny_model, device="cpu")


@contextmanager
def count_calls(model: TextToVideo) -> Iterator[dict[str, Counter[int]]]:
    """Give how often parts of the networks ran, by the batch they ran on."""
    unet, dit = model.parts.content, model.parts.motion
    assert dit is not None
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
    ("name", "branches", "full"),
    [("paper", 1, 4), ("clip", 2, 4), ("rehash_half", 2, 2), ("rehash_quarter", 2, 2)],
)
def test_a_row_runs_its_steps_and_branches(model, name, branches, full):
    asked = plan_suite(model, SuiteConfig(STEPS))[name]
    with count_calls(model) as calls:
        model.sample_batch(["a dog"], asked, [0])
    assert calls == {
        "content": {branches: 4},
        "content in full": {branches: full},
        "motion": {1: 4},
        "motion in full": {1: full},
    }


@pytest.mark.parametrize(
    ("steps", "full"), [(3, [2, 2]), (4, [2, 2]), (20, [10, 5]), (50, [25, 13])]
)
def test_as_many_steps_are_full_in_proportion(model, steps, full):
    rows = plan_suite(model, SuiteConfig(steps))
    plans = [model.plan_rehash(rows[name]) for name in ("rehash_half", "rehash_quarter")]
    assert [len(plan.content) for plan in plans] == full
    assert [len(plan.motion) for plan in plans] == full


def count_attention(q, k, v, *_, out_shape, **__):
    return 2 * prod(q[:-1]) * k[-2] * (k[-1] + v[-1])


@pytest.mark.parametrize("name", ["paper", "clip", "rehash_half", "rehash_quarter"])
def test_what_is_counted_is_what_runs(model, name):
    asked = plan_suite(model, SuiteConfig(STEPS, height=16, width=32))[name]
    if name != "paper":
        # both networks guided
        asked = replace(asked, motion_guidance=2.0)
    ran: dict[str, int] = {}
    # reading the weights tries them out
    assert model.parts
    # PyTorch's counter does not know the fused attention of its CPUs
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: count_attention}) as counter:

        @contextmanager
        def watch(stage: str) -> Iterator[None]:
            before = counter.get_total_flops()
            yield
            # the content frame's picture is decoded before the motion is sampled
            ran[stage] = ran.get(stage, 0) + counter.get_total_flops() - before

        model.sample_batch(["a dog"], asked, [0], on_stage=watch)
    counted = {stage: products.flops for stage, products in count_row(model, asked).items()}
    assert {stage: ran[stage] for stage in counted} == counted


def test_the_paper_counts_its_stages_and_a_user_waits_for_the_file(model, monkeypatch):
    ticks = iter(range(10**6))
    # a second from each look at the clock to the next
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(suite, "measure_limits", lambda *_: profiling.Limits(100.0, 1.0))
    done = []
    with count_calls(model) as calls:
        measured = measure_suite(
            model, SuiteConfig(STEPS, RUNS, 16, 32), on_progress=lambda _, *some: done.append(some)
        )
    assert done == [(i, 4 * (1 + RUNS)) for i in range(4 * (1 + RUNS) + 1)]
    # one run more than is measured; the first of all reads the weights, which looks at the UNet
    assert calls["motion"] == {1: STEPS * 4 * (1 + RUNS)}
    assert calls["content"][2] == STEPS * 3 * (1 + RUNS)
    paper, *clips = measured.rows.values()
    assert list(paper.stages) == CLIP_STAGES[:-1]
    # a second each, and no more
    assert paper.seconds == (4.0,) * RUNS
    assert (paper.guidance, paper.motion_guidance) == (1.0, 1.0)
    for row in clips:
        assert list(row.stages) == CLIP_STAGES
        # five stages, one of them twice, and load, as many gaps between them and one more
        assert row.seconds == (15.0,) * RUNS
        assert (row.guidance, row.motion_guidance) == (3.0, 1.0)
    assert measured.rows["clip"].step_seconds == 1 / STEPS
    content = measured.rows["clip"].flops["content"]
    assert measured.step == (1 / STEPS, content)
    assert measured.to_dict()["unet_step"]["share_of_matmul"] == content / 100


def test_the_file_that_is_waited_for_is_the_clip(model, monkeypatch, tmp_path):
    asked = replace(plan_suite(model, SuiteConfig(STEPS))["rehash_half"], seed=3)
    path = tmp_path / "clip.mp4"
    watch, seconds = suite._run(model, asked, path)
    frames, fps = read_video(path)
    assert (frames.shape, fps) == ((4, 32, 48, 3), 8)
    metadata = read_metadata(path)
    assert (metadata["seed"], metadata["sampler"], metadata["steps"]) == (3, "ddim", STEPS)
    assert metadata["rehash"]["policy"] == "uniform"
    assert seconds is not None and seconds > sum(watch.seconds.values())


def test_a_model_of_stills_is_refused(model):
    model.config = replace(model.config, motion=None, autoencoder=None, frames=1)
    with pytest.raises(ValueError, match=r"^tiny makes stills: the suite measures videos$"):
        plan_suite(model, SuiteConfig())


def test_the_steps_of_diffusers_beside_ours_are_the_same_work(tiny_model, model):
    script = runpy.run_path(str(Path(__file__).parents[1] / "compare_diffusers.py"))
    asked = SampleConfig(sampler="ddim", steps=3, frames=1)
    options = Namespace(device="cpu", dtype="auto", runs=2, compile=None)
    title, _, _, header, _, *rows, _, _, _ = script["compare"](tiny_model, asked, options)
    assert title == "tiny, 3 steps of ddim at 48x32, guidance 3"
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (header, *rows)]
    ours, theirs = (dict(zip(cells[0], row, strict=True)) for row in cells[1:])
    assert (ours["UNet"], theirs["UNet"]) == ("cmdgen", "diffusers")
    assert (ours["of ours"], ours["as cmdgen"]) == ("1.00x", "")
    # but for rounding
    assert float(theirs["as cmdgen"].removesuffix(" dB")) > 60
    ratio = float(theirs["ms/step"]) / float(ours["ms/step"])
    assert float(theirs["of ours"].removesuffix("x")) == pytest.approx(ratio, rel=0.02)
