"""Clips of UNets that look along time within a limit of memory: the same clips."""

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdgen.acceleration.calibration import read_calibrations, write_calibrations
from cmdgen.acceleration.keysteps import by_similarity
from cmdgen.acceleration.memory import WAYS, Work
from cmdgen.config import ANIMATEDIFF, SVD
from cmdgen.evaluation.rehash import calibrate
from cmdgen.evaluation.settings import Calibrating
from cmdgen.pipelines.clip import Clip, Inputs
from cmdgen.pipelines.load import load_pipeline
from cmdgen.pipelines.observer import Observer
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Request, Slices
from cmdgen.store.create import create_model
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
