"""Clips of UNets that look along time within a limit of memory: the same clips."""

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdgen.acceleration import graphs
from cmdgen.acceleration.calibration import read_calibrations, write_calibrations
from cmdgen.acceleration.keysteps import by_similarity
from cmdgen.acceleration.memory import WAYS, Work, count_peak, run_unet
from cmdgen.config import ANIMATEDIFF, SVD
from cmdgen.evaluation.rehash import calibrate
from cmdgen.evaluation.settings import Calibrating
from cmdgen.pipelines.clip import Clip, Inputs, Task
from cmdgen.pipelines.load import load_pipeline
from cmdgen.pipelines.observer import Observer
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Request, Slices
from cmdgen.store.create import create_model
from cmdgen.video.pixels import to_rgb24
from tests.acceleration.test_graphs import capture_on_cpu
from tests.video_unets import tiny

PICTURE = (np.random.default_rng(0).random((50, 90, 3)) * 255).astype(np.uint8)


@pytest.fixture(scope="module", params=[ANIMATEDIFF, SVD], ids=["animatediff", "svd"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StillPipeline:
    folder: Path = tmp_path_factory.mktemp("models") / request.param.name
    create_model(tiny(request.param), folder, dtype=torch.float32)
    return load_pipeline(folder)


def make(model: StillPipeline, observer: Observer | None = None, **options: object) -> Clip:
    prompt, inputs = ("a dog", Inputs()) if model.config.vision is None else (None, Inputs(image=PICTURE))
    return model.run([model.plan(Request(prompt, seed=1, **options))], observer, inputs=inputs)[0]


@pytest.mark.parametrize("rehash", [{}, {"steps": 9, "rehash": "0,2,3,8"}], ids=["full", "rehash"])
def test_every_limit_makes_the_same_clip(model: StillPipeline, rehash: dict) -> None:
    whole, plan = make(model, **rehash), model.plan(Request(**rehash))
    work = Work.of(plan, model.dtype)
    seen = set()
    for way in WAYS[::3]:
        for staged in (False, True):
            limit = work.need(Slices(1, 1, 1, **way, staged=staged))
            slices = model.plan(Request(max_memory=limit, **rehash)).slices
            assert work.need(slices) <= limit
            if slices in seen:
                continue
            seen.add(slices)
            clip = make(model, max_memory=limit, **rehash)
            assert np.abs(clip.frames.astype(int) - whole.frames).max() <= 1
            assert clip.metadata == whole.metadata | {"max_memory": f"{limit}B"}
    assert {True, False} <= {slices.staged for slices in seen} and any(slices.in_turn for slices in seen)


@pytest.mark.parametrize("rehash", [{}, {"steps": 9, "rehash": "0,2,3,8"}], ids=["full", "rehash"])
def test_a_step_in_slices_is_captured_as_any_other(model: StillPipeline, monkeypatch, rehash: dict) -> None:
    plain, graphed = (load_pipeline(model.folder) for _ in range(2))
    monkeypatch.setattr(graphs, "capture", capture_on_cpu)
    graphed.uses_graphs = True
    work = Work.of(plain.plan(Request(**rehash)), plain.dtype)
    for way in (WAYS[3], WAYS[4]):
        asked = {"max_memory": work.need(Slices(1, 1, 1, **way)), **rehash}
        assert np.array_equal(make(graphed, **asked).frames, make(plain, **asked).frames)


def test_streams_share_slices_of_a_gpu_alone(model: StillPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Work.of(model.plan(Request()), model.dtype).need(Slices(1, 1, 1, **WAYS[4]))
    asked = Request(max_memory=limit, slice_streams=2)
    with pytest.raises(ValueError, match="slice streams above 1 need --max-memory, a CUDA GPU, and AnimateDiff or"):
        model.plan(asked)
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    assert model.plan(asked).slices == replace(model.plan(replace(asked, slice_streams=1)).slices, streams=2)
    with pytest.raises(ValueError, match="slice streams above 1 need --max-memory"):
        model.plan(replace(asked, max_memory=None))


def test_slices_are_not_compiled(model: StillPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work.of(model.plan(Request()), model.dtype)
    whole, sliced = (Request(max_memory=limit, steps=7) for limit in (work.need(Slices(1, 1, 1)), work.least))
    monkeypatch.setattr(model, "uses_compiler", True)
    assert model.plan(whole).slices.bytes is None
    with pytest.raises(ValueError, match="a UNet in slices is not compiled: leave --compile or --max-memory out"):
        model.plan(sliced)


def test_weights_are_there_for_their_stage_alone(model: StillPipeline) -> None:
    limit = Work.of(model.plan(Request()), model.dtype).least
    held: dict[str, set[str]] = {}
    seen: list[weakref.ref] = []

    class Watch(Observer):
        def step(self, stage: str, done: int, total: int) -> None:
            held[stage] = {name for name in ("text_encoder", "image_encoder", "unet", "vae") if model.has(name)}
            if stage == "content" and done == 1:
                seen.append(weakref.ref(model.unet))
            if stage == "decode":
                # nothing else keeps it, and nothing has to look for it
                assert seen and seen[0]() is None

    make(model, Watch(), max_memory=limit)
    assert held["content"] == {"unet"} and held["decode"] == {"vae"}
    assert not any(map(model.has, ("unet", "vae")))


def test_a_still_too_has_the_weights_of_one_stage_at_a_time(folders: dict[str, Path]) -> None:
    model = load_pipeline(folders["animatediff"])
    limit = Work.of(model.plan(Request(frames=1)), model.dtype).least
    held: dict[str, set[str]] = {}

    class Watch(Observer):
        def step(self, stage: str, done: int, total: int) -> None:
            held[stage] = {name for name in ("text_encoder", "unet", "vae") if model.has(name)}

        def content(self, clip: int, picture: np.ndarray) -> None:
            self.step("decode", clip, 1)

    still = make(model, Watch(), frames=1, max_memory=limit)
    assert model.plan(Request(frames=1, max_memory=limit)).slices.staged
    assert held["content"] == {"unet"} and held["decode"] == {"vae"} and not model.has("vae")
    assert np.abs(still.content.astype(int) - make(model, frames=1).content).max() <= 1


def test_a_calibration_of_similarity_alone_chooses_steps(model: StillPipeline, tmp_path: Path) -> None:
    cut = "resnet" if model.config.vision is not None else "motion"
    plan = replace(model.plan(Request(steps=9)), rehash_cut=cut)
    pictures = [Inputs(image=PICTURE)] if model.config.vision is not None else []
    runs: list[tuple[str, int, int]] = []
    options = Calibrating(policy="similarity")
    (measured,) = calibrate(model, plan, ["a dog"], options, inputs=pictures, show=lambda *run: runs.append(run))
    # one run of nine steps
    assert runs == [("content", 1, 1)] and measured.errors == [] and measured.cut == cut
    file = tmp_path / "rehash.json"
    write_calibrations(file, model.config.name, [measured])
    (read,) = read_calibrations(file, model.config.name)
    asked = {"steps": 9, "rehash": 5, "rehash_file": file, "rehash_cut": cut}
    chosen = model.plan(Request(**asked, rehash_policy="similarity"))
    assert chosen.key_steps.content == by_similarity(read.similarity_map(), 5) and len(chosen.key_steps.content) == 5
    clip = make(model, **asked, rehash_policy="similarity")
    assert clip.metadata["rehash_cut"] == cut and not np.array_equal(clip.frames, make(model, steps=9).frames)
    for refused, message in (
        (asked, "has measured similarity alone"),
        ({**asked, "rehash_cut": "layer", "rehash_policy": "similarity"}, "no calibration of"),
        ({"steps": 8, "rehash": 4, "rehash_policy": "uniform"}, "rehash of 8 steps: in 8 or fewer no step is like"),
    ):
        with pytest.raises(ValueError, match=message):
            model.plan(Request(**refused))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    places = {preset.name: tmp_path_factory.mktemp("models") / preset.name for preset in (ANIMATEDIFF, SVD)}
    for preset in (ANIMATEDIFF, SVD):
        create_model(tiny(preset), places[preset.name], dtype=torch.float32)
    return places


def test_a_long_clip_is_made_in_windows_within_the_memory_of_one(folders: dict[str, Path]) -> None:
    model = load_pipeline(folders["animatediff"])
    short, long = (model.plan(Request("a dog", frames=frames, window=4)) for frames in (4, 13))
    assert [len(plan.windows) for plan in (short, long)] == [1, 4]
    held = [count_peak(run_unet, Work.of(plan, model.dtype), Slices(1, 1, 1)) for plan in (short, long)]
    # more latents
    assert held[0] < held[1] < held[0] + 64 * 13 * 4 * 8 * 8
    clip = make(model, frames=13, window=4, overlap=1)
    assert clip.frames.shape == (13, 64, 64, 3) and clip.metadata.items() >= {"window": 4, "overlap": 1}.items()
    # a limit changes nothing
    limit = Work.of(long, model.dtype).least
    limited = make(model, frames=13, window=4, overlap=1, max_memory=limit)
    assert np.abs(clip.frames.astype(int) - limited.frames).max() <= 1
    around = make(model, frames=13, window=4, overlap=1, seamless=True)
    assert around.metadata["seamless"] is True and not np.array_equal(around.frames, clip.frames)
    # each window has its feature
    asked = {"frames": 13, "window": 4, "overlap": 1, "steps": 9}
    full, skipped = make(model, **asked), make(model, **asked, rehash="0,1,2,3,4,5,6,7,8")
    assert np.abs(full.frames.astype(int) - skipped.frames).max() <= 1
    assert not np.array_equal(full.frames, make(model, **asked, rehash="0,4,8").frames)


def test_a_clip_is_decoded_by_the_vae_of_another_model(folders: dict[str, Path]) -> None:
    own, other = (load_pipeline(folders["animatediff"], decoder=name) for name in (None, str(folders["svd"])))
    clips = [make(model) for model in (own, other)]
    assert clips[1].metadata["decoder"] == "svd" and "decoder" not in clips[0].metadata
    assert clips[0].metadata["weights"] != clips[1].metadata["weights"]
    task = Task([own.plan(Request("a dog", seed=1))])
    with torch.inference_mode():
        latents = own.sample_clips(task)
        frames = to_rgb24(load_pipeline(folders["svd"]).vae.from_latents(latents)).numpy()
    assert np.abs(frames.astype(int) - clips[1].frames).max() <= 1
    assert not np.array_equal(clips[0].frames, clips[1].frames)
    with pytest.raises(ValueError, match="frames 1: a decoder that looks along time is for clips"):
        other.plan(Request("a dog", frames=1))


def test_quality_names_settings_that_are_recorded_and_may_be_changed(model: StillPipeline) -> None:
    model = load_pipeline(model.folder)
    model.config = replace(model.config, steps=25)
    draft, best = (model.plan(Request(quality=quality)) for quality in ("draft", "best"))
    assert model.plan(Request(quality="normal")) == model.plan(Request())
    assert len(draft.key_steps.content) == 13 and draft.key_steps.policy == "uniform"
    assert draft.model.sampler == "dpm++" and best.model.steps == 50 and best.key_steps is None
    assert model.describe(draft).items() >= {"sampler": "dpm++", "steps": 25, "rehash_policy": "uniform"}.items()
    changed = model.plan(Request(quality="draft", rehash=20, sampler="ddim", rehash_policy="uniform"))
    assert len(changed.key_steps.content) == 20 and changed.model.sampler == "ddim"
    model = load_pipeline(model.folder)
    model.config = replace(model.config, steps=4)
    with pytest.raises(ValueError, match=r"quality has no effect with .*: it is made for 4 steps"):
        model.plan(Request(quality="draft"))
