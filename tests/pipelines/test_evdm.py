"""EVDM's pipeline: frames after others, between others, and from nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdgen.config import PRESETS, EvdmConfig
from cmdgen.models.evdm import Evdm
from cmdgen.pipelines.clip import Inputs
from cmdgen.pipelines.evdm import EvdmPipeline
from cmdgen.pipelines.load import load_pipeline, load_predictor, open_pipeline
from cmdgen.pipelines.observer import Observer
from cmdgen.request import Request
from cmdgen.store.parts import write_model_index


def write_model(folder: Path, size: tuple[int, int] = (16, 24), **changes: object) -> Path:
    """A model with random weights, whose output depends on all of its input."""
    shape = EvdmConfig(past=2, current=3, future=2, patch=2, width=8, multipliers=(1, 2))
    content = replace(shape, **changes)
    model = replace(
        PRESETS["evdm-small"], name="tiny", content=content, frames=4, height=size[0], width=size[1], steps=2
    )
    torch.manual_seed(0)
    network = Evdm(content)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder / "evdm")
    write_model_index(folder, model)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EvdmPipeline:
    folder = write_model(tmp_path_factory.mktemp("evdm") / "tiny")
    return load_predictor(folder, device="cpu", dtype="float32")


def frames(count: int, seed: int = 0) -> np.ndarray:
    grey = np.random.default_rng(seed).integers(0, 256, (count, 16, 24, 1), np.uint8)
    return grey.repeat(3, axis=3)


def test_a_clip_continues_with_itself_first(model: EvdmPipeline) -> None:
    past = frames(5)
    clip = model.predict(past, frames=7, seed=3)
    assert clip.frames.shape == (12, 16, 24, 3)
    assert np.array_equal(clip.frames[:5], past)
    assert np.array_equal(clip.content, clip.frames[-1])
    assert clip.metadata["frames"] == 7 and clip.metadata["seed"] == 3
    assert "prompt" not in clip.metadata and "motion_steps" not in clip.metadata
    # more frames are the same ones and others after them, and another seed makes others
    assert np.array_equal(model.predict(past, frames=4, seed=3).frames, clip.frames[:9])
    assert not np.array_equal(model.predict(past, frames=4, seed=4).frames, clip.frames[:9])


def test_blocks_know_the_last_frames_alone(model: EvdmPipeline) -> None:
    long, short = frames(6), frames(6)[4:]
    assert np.array_equal(model.predict(long, frames=3).frames[6:], model.predict(short, frames=3).frames[2:])
    # block two reads what block one made, through its last frames, and nothing earlier
    six = model.predict(short, frames=6).frames[2:]
    assert not np.array_equal(six[3:], model.predict(frames(2, seed=9), frames=6).frames[5:])
    assert not np.array_equal(six[:3], six[3:])


def test_all_blocks_are_one_stage_of_progress(model: EvdmPipeline) -> None:
    observer = Observer()
    shown: list[tuple[str, int, int]] = []
    observer.step = lambda *step: shown.append(step)
    model.run([model.plan(Request(frames=8))], observer)
    assert [step for step in shown if step[0] != "load"] == [("steps", done, 6) for done in range(1, 7)]


def test_one_past_frame_and_none_are_other_clips(model: EvdmPipeline) -> None:
    still, free = model.predict(frames(1), frames=3), model.predict(frames=3)
    assert (len(still.frames), len(free.frames)) == (4, 3)
    assert not np.array_equal(still.frames[1:], free.frames)


def test_frames_are_put_between_parts(model: EvdmPipeline) -> None:
    a, b = frames(2, 1), frames(3, 2)
    clip = model.interpolate(a, b)
    assert len(clip.frames) == 2 + 3 + 3
    assert np.array_equal(clip.frames[:2], a) and np.array_equal(clip.frames[5:], b)
    # of three in the middle, one is the second, two are the first and the third
    for count, chosen in ((1, [1]), (2, [0, 2])):
        fewer = model.interpolate(a, b, frames=count).frames
        assert np.array_equal(fewer[2:-3], clip.frames[2:5][chosen])
    several = model.interpolate(a[:1], a[1:], b, frames=1)
    assert len(several.frames) == 1 + 1 + 1 + 1 + 3


def test_a_batch_is_its_clips_one_by_one(model: EvdmPipeline) -> None:
    inputs = Inputs(given=(model.read(frames(1, 1)), model.read(frames(1, 2))), keep=False)
    plans = [model.plan(Request(frames=3, seed=seed)) for seed in (1, 2)]
    both = model.run(plans, inputs=inputs)
    for plan, clip in zip(plans, both, strict=True):
        alone = model.run([plan], inputs=inputs)[0]
        assert len(clip.frames) == 3
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1


def test_yuv_frames_are_those_of_the_picture(model: EvdmPipeline) -> None:
    plan = model.plan(Request(frames=3))
    rgb, yuv = (model.run([plan], pixels=pixels)[0].frames for pixels in ("rgb24", "yuv420p"))
    assert yuv.shape == (3, 24, 24)
    # grey: luma is the level in limited range
    assert np.abs(yuv[:, :16] - (rgb[..., 0] / 255 * 219 + 16)).max() <= 1.01
    assert (yuv[:, 16:] == 128).all()


def test_colour_models_keep_colours(tmp_path: Path) -> None:
    model = load_predictor(write_model(tmp_path, channels=3), device="cpu")
    past = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    assert np.array_equal(model.predict(past, frames=1).frames[:2], past)


def test_what_a_model_cannot_do_is_one_line(model: EvdmPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frames 4: tiny puts at most 3 between two frames"):
        model.interpolate(frames(1), frames(1), frames=4)
    with pytest.raises(ValueError, match="are not as the model's"):
        model.run([model.plan(Request())], inputs=Inputs(given=(torch.zeros(1, 2, 8, 8),)))
    for refused in ({"rehash": 1}, {"max_memory": 10**9}, {"slice_streams": 2}):
        with pytest.raises(ValueError, match="neither steps to rehash nor slices"):
            model.plan(Request(**refused))
    with pytest.raises(ValueError, match="24x8 are not as the model's 24x16: resize them, or give their size"):
        model.predict(frames(2)[:, :8])
    with pytest.raises(ValueError, match="1 parts of a clip"):
        model.interpolate(frames(2))
    with pytest.raises(ValueError, match="multiples of 4"):
        model.plan(Request(size=(18, 24)))
    past_only = load_predictor(write_model(tmp_path, future=0), device="cpu")
    with pytest.raises(ValueError, match="reads no future frames"):
        past_only.interpolate(frames(1), frames(1))


@pytest.mark.parametrize(
    "wrong", [frames(2) / 255, frames(2)[0], frames(2)[..., :1], frames(2).transpose(0, 3, 1, 2), frames(0)]
)
def test_other_than_frames_of_levels_are_refused(model: EvdmPipeline, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^frames are \w+ \([\d, ]+\), expected uint8 \(T, H, W, 3\)$"):
        model.predict(wrong, frames=1)
    mirrored = frames(2)[:, :, ::-1]
    assert np.array_equal(model.predict(mirrored, frames=1).frames[:2], mirrored)


@pytest.mark.parametrize(
    "vain", [{"prompt": "a dog"}, {"guidance": 3.0}, {"quality": "draft"}, {"image": "a.png"}, {"motion_seed": 1}]
)
def test_what_says_nothing_to_a_predictor_is_refused(model: EvdmPipeline, vain: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="has no effect with tiny"):
        model.predict(frames(2), **vain)


def test_a_folder_says_which_pipeline_it_is(model: EvdmPipeline, tiny_model: Path) -> None:
    assert isinstance(open_pipeline(model.folder), EvdmPipeline)
    with pytest.raises(ValueError, match="makes no video from text: it continues clips"):
        load_pipeline(model.folder)
    with pytest.raises(ValueError, match="takes a model with evdm/"):
        load_predictor(tiny_model)
    with pytest.raises(ValueError, match="lora has no effect with tiny"):
        load_predictor(model.folder, lora=["some.safetensors"])


def decibels(made: np.ndarray, target: np.ndarray) -> float:
    return float(-10 * np.log10(np.square((made.astype(float) - target) / 255).mean()))


def test_the_shipped_one_in_colour_sees_how_a_disc_moves() -> None:
    y, x = np.mgrid[:64, :64]
    sky = np.stack([120 + y, 180 + y / 2, np.full_like(y, 230)], axis=-1)
    inside = [(np.hypot(y - 24 - t, x - 14 - 3 * t) < 9)[..., None] for t in range(10)]
    real = np.stack([np.where(where, (220, 60, 40), sky) for where in inside]).astype(np.uint8)
    evdm = load_predictor("evdm-world", device="cpu", dtype="float32")
    new = evdm.predict(real[:5], frames=5, seed=0).frames[5:]
    assert decibels(new[:1], real[5:6]) > decibels(real[4:5], real[5:6]) + 3
    assert decibels(new, real[5:]) > decibels(real[4:5], real[5:]) + 2


def test_the_shipped_one_sees_how_a_ring_and_a_stroke_move() -> None:
    y, x = np.mgrid[:64, :64]
    clip = []
    for t in range(15):
        ring = 2.5 - abs(np.hypot(y - 16 - 2 * t, x - 20 - t) - 7)
        stroke = np.minimum(2.5 - abs(x - 50 + 2 * t), 12 - abs(y - 44 + t))
        clip.append(np.maximum(ring, stroke).clip(0, 1) * 255)
    real = np.stack(clip).round().astype(np.uint8)[..., None].repeat(3, axis=3)
    evdm = load_predictor("evdm", device="cpu", dtype="float32")
    new = evdm.predict(real[:5], frames=5, seed=0).frames[5:]
    between = evdm.interpolate(real[:5], real[10:], seed=0).frames[5:10]
    shares = np.linspace(0, 1, 7)[1:-1, None, None, None]
    blended = (1 - shares) * real[4] + shares * real[10]
    assert decibels(new[:1], real[5:6]) > decibels(real[4:5], real[5:6]) + 10
    assert decibels(new, real[5:10]) > decibels(real[4:5], real[5:10]) + 8
    assert decibels(between, real[5:10]) > decibels(blended, real[5:10]) + 7


def test_a_mask_is_of_clean_frames_alone(tmp_path: Path) -> None:
    folder = write_model(tmp_path, mask=True)
    assert load_predictor(folder, device="cpu").predict(frames(2), frames=3).frames.shape == (5, 16, 24, 3)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"sample"', '"epsilon"'))
    with pytest.raises(ValueError, match=r"evdm/ has a mask, for prediction_type sample; scheduler/ has epsilon$"):
        load_predictor(folder, device="cpu")
