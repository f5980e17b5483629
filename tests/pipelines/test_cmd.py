import json
import shutil
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch

from cmdgen.acceleration.graphs import GraphedNetwork
from cmdgen.acceleration.overlap import Pending
from cmdgen.acceleration.rehash import CutDiT, CutUNet, Rehash
from cmdgen.config import SAMPLERS, packaged_models
from cmdgen.diffusion import samplers
from cmdgen.diffusion.guidance import guide
from cmdgen.models.dit import DiT
from cmdgen.pipelines import base, decode
from cmdgen.pipelines.base import seeded
from cmdgen.pipelines.clip import Inputs, Task
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.load import load_pipeline
from cmdgen.pipelines.observer import Observer
from cmdgen.request import Request
from cmdgen.store.catalogue import check_prediction
from cmdgen.video.pixels import to_unit, to_yuv420p

PROMPT = "a dog swimming in the ocean"


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_pipeline(tiny_model)


class Watch(Observer):
    """Calls functions instead of methods."""

    def __init__(self, **functions):
        vars(self).update(functions)


def plan(model, **options):
    return model.plan(Request(prompt=PROMPT, **options))


def make(model, prompts, seeds, observer=None, *, inputs=None, pixels="rgb24", **options):
    """One batch of clips."""
    plans = [
        model.plan(Request(prompt=prompt, **({"seed": seed} | options)), batch=len(prompts))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return model.run(plans, observer, inputs=inputs, pixels=pixels)


def test_clip_has_the_size_and_rate_of_the_model(model):
    clip = model.sample(PROMPT)
    assert clip.frames.shape == (4, 32, 48, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.fps == 8
    assert clip.metadata["prompt"] == PROMPT
    assert clip.metadata["steps"] == 2


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 16, 16), (6, 48, 32)])
def test_clip_has_the_requested_size(model, frames, height, width):
    clip = model.sample(PROMPT, frames=frames, size=(height, width))
    assert clip.frames.shape == (frames, height, width, 3)


def test_one_frame_is_the_content_frame_and_runs_no_motion(model):
    seen: dict[str, int] = {}
    watch = Watch(step=lambda stage, done, total: seen.update({stage: total}))
    [still] = make(model, [PROMPT], [5], watch, frames=1)
    assert still.frames.shape == (1, 32, 48, 3)
    assert np.array_equal(still.frames[0], model.sample(PROMPT, seed=5).content)
    assert not any("motion" in name for name in (*still.metadata, *seen))


REASONS = [("float32", "damaged"), ("float16", "damaged or need --dtype bfloat16")]


@pytest.mark.parametrize(("dtype", "reason"), [*REASONS, ("bfloat16", "damaged or need --dtype float32")])
def test_a_picture_that_is_no_number_is_not_shown(tiny_model, dtype, reason):
    model = load_pipeline(tiny_model, dtype=dtype)
    with torch.no_grad():
        model.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(ValueError, match=rf"unet overflows in {dtype}: its weights are {reason}$"):
        model.sample(PROMPT)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("part", ["vae", "autoencoder"])
def test_frames_that_are_no_numbers_are_not_shown(tiny_model, part, frames):
    model = load_pipeline(tiny_model)
    with torch.no_grad():
        parameters = dict(getattr(model, part).named_parameters())
        parameters = {name: value for name, value in parameters.items() if "decoder" in name}
        next(reversed(parameters.values()))[:] = torch.nan
    if (part, frames) == ("autoencoder", 1):
        assert len(model.sample(PROMPT, frames=frames).frames) == 1
    else:
        with pytest.raises(ValueError, match=rf"{part} overflows in float32"):
            model.sample(PROMPT, frames=frames)


@pytest.mark.parametrize("said", ["epsilon", "v_prediction"])
def test_a_unet_that_predicts_otherwise_than_its_schedule_says_is_refused(tmp_path, said):
    shutil.copytree(packaged_models()["mini"], tmp_path / "mini")
    path = tmp_path / "mini" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": said}))
    if said == "v_prediction":
        check_prediction(tmp_path / "mini")
    else:
        with pytest.raises(ValueError) as error:
            check_prediction(tmp_path / "mini")
        assert str(error.value) == (f"{path}: prediction_type is epsilon, but unet/ predicts v_prediction: correct it")


def test_same_seed_gives_the_same_frames_and_another_seed_others(model, tiny_model):
    clip = model.sample(PROMPT, seed=5)
    again = load_pipeline(tiny_model).sample(PROMPT, seed=5)
    other = model.sample(PROMPT, seed=6)
    assert np.array_equal(clip.frames, again.frames)
    assert not np.array_equal(clip.frames, other.frames)


def test_content_and_motion_seeds_vary_one_half_alone(model):
    # the content model never sees the motion: the two halves are told apart by what they draw
    base = model.sample(PROMPT, seed=5)
    explicit = model.sample(PROMPT, seed=9, content_seed=5, motion_seed=5)
    content = model.sample(PROMPT, seed=5, content_seed=6)
    motion = model.sample(PROMPT, seed=5, motion_seed=6)
    assert np.array_equal(base.frames, explicit.frames)
    for clip in (content, motion):
        assert not np.array_equal(base.frames, clip.frames)


def test_parts_draw_different_noise_and_all_bits_of_a_seed_count():
    draws = [
        torch.randn(4, generator=seeded(part, seed)).tolist()
        for part in ("content", "motion")
        for seed in (0, 1, 2**32, 2**62)
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_batch_of_two_is_two_batches_of_one(model, sampler):
    options = {"sampler": sampler, "steps": 3, "motion_steps": 3}
    prompts, seeds = [PROMPT, "a red car driving"], [1, 2]
    both = make(model, prompts, seeds, **options)
    for clip, prompt, seed in zip(both, prompts, seeds, strict=True):
        alone = model.sample(prompt, seed=seed, **options)
        assert clip.metadata == alone.metadata
        # rounding of larger matrix products
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1


def test_prompt_and_negative_prompt_matter(model):
    base = model.sample(PROMPT)
    for prompt, options in (
        ("a red car driving", {}),
        (PROMPT, {"negative": "a red car driving"}),
        (PROMPT, {"guidance": 1}),
        (PROMPT, {"motion_guidance": 4}),
    ):
        assert not np.array_equal(base.frames, model.sample(prompt, **options).frames)


def test_guidance_may_be_on_in_an_interval_alone(model):
    def frames(**options):
        # a schedule of 1000: steps at 999, 749, 499, 249
        return model.sample(PROMPT, **({"steps": 4, "motion_guidance": 2.0} | options)).frames

    assert np.array_equal(frames(), frames(guidance_interval=(0.0, 1.0)))
    between = frames(guidance_interval=(0.4, 0.6))
    assert not np.array_equal(between, frames())
    plain = {"steps": 4, "guidance": 1.0, "motion_guidance": 1.0}
    assert not np.array_equal(between, model.sample(PROMPT, **plain).frames)
    nowhere = model.sample(PROMPT, **(plain | {"guidance": None, "guidance_interval": (0.3, 0.4)}))
    assert np.array_equal(nowhere.frames, model.sample(PROMPT, **plain).frames)
    assert nowhere.metadata["guidance_interval"] == "0.3-0.4"
    assert "guidance_interval" not in model.sample(PROMPT, **plain).metadata


@pytest.fixture(scope="module")
def exact(tiny_model):
    """A model in float64, from noise to sample."""
    config = load_pipeline(tiny_model).config
    model = CmdPipeline(tiny_model, config, torch.device("cpu"), torch.float64)

    def noise(part, shape, seeds, **settings):
        start, generators = CmdPipeline.noise(model, part, shape, seeds, **settings)
        return start.double(), generators

    model.noise = noise
    return model


def full(network, plan):
    """One way to run a network at each step: all of it where nothing is planned."""
    return Rehash(network, range(9) if plan is None else plan)


GUIDED = {"guidance": 3.0, "motion_guidance": 2.0}


@pytest.mark.parametrize("text_pool", ["mean", "none", "whitened"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "asked",
    [
        GUIDED,
        {"guidance": 1.0, "motion_guidance": 1.0},
        GUIDED | {"guidance_interval": (0.3, 0.8)},
        GUIDED | {"rehash": 4, "rehash_policy": "uniform", "guidance_interval": (0.3, 1.0)},
    ],
)
def test_what_is_made_once_for_a_clip_is_what_each_step_would_make(exact, monkeypatch, sampler, asked, text_pool):
    # the timesteps come in two parts
    monkeypatch.setattr(base, "TIMESTEPS_TOGETHER", 5)
    unet, dit = exact.unet, exact.motion
    if text_pool != "mean":
        torch.manual_seed(0)
        changes = {"text_width": None} if text_pool == "none" else {"text_whitened": True}
        dit = DiT(replace(dit.config, **changes)).double()
        for parameter in dit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        monkeypatch.setitem(exact._parts, "motion", dit)
    options = {"sampler": sampler, "steps": 9, "motion_steps": 9, "negative": "a car", **asked}
    plans = [
        exact.plan(Request(prompt=prompt, seed=seed, **options)) for prompt, seed in ((PROMPT, 1), ("two birds", 2))
    ]
    own, plan = plans[0].model, plans[0].key_steps
    seeds = [1, 2]

    def content_way(x, t, text):
        return x, unet.project_time(t), *unet.project_text(text)

    def motion_way(x, t, text, context):
        text = None if text_pool == "none" else text
        ground = dit.place(*x.shape[-2:], context=context, split=6)
        return x, dit.modulations(t, text=text), ground

    def slowly(part, cut, way, steps, shape, scale, noise, positive, negative):
        network = GraphedNetwork(
            run=lambda *given: cut.run(*way(*given)), resume=lambda feature, *given: cut.resume(feature, *way(*given))
        )
        interval = own.guidance_interval and tuple(1000 * end for end in own.guidance_interval)
        start, generators = exact.noise(part, shape, seeds)
        return samplers.SAMPLERS[sampler](
            guide(full(network, steps), scale, positive, negative, interval=interval),
            *(start, samplers.Sampling(noise, 9, generators)),
        )

    with torch.inference_mode():
        states = exact.encode_text(plans)
        assert states.shape == (3, 16, 16)
        content = exact.sample_content(Task(plans), states)
        motion = exact.sample_motion(Task(plans), states, content)
        text, negative = states[:2], states[2:].expand(2, -1, -1)
        expected = slowly(
            *("content", CutUNet(unet), content_way, plan and plan.content),
            *((8, 8, 12), own.guidance, own.noise, (text,), (negative,)),
        )
        expected_motion = slowly(
            *("motion", CutDiT(dit), motion_way, plan and plan.motion),
            *((8, 4, 10), own.motion_guidance, own.motion.noise),
            *((text, content), (negative, content)),
        )
    assert content.dtype == motion.dtype == torch.float64
    torch.testing.assert_close(content, expected, rtol=1e-12, atol=1e-12)
    expected_motion = exact.autoencoder.destandardise(expected_motion)
    torch.testing.assert_close(motion, expected_motion, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("asked", [{}, {"rehash": 3, "rehash_policy": "uniform"}])
def test_text_timesteps_and_content_frame_are_projected_once_for_a_clip(model, asked):
    unet, dit = model.unet, model.motion
    once = {
        **{"time": unet.time_embedding, "shift": unet.mid_block.resnets[0].time_emb_proj},
        "keys": unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k,
        **{"motion time": dit.embed_time, "text": dit.embed_text, "context": dit.embed_context},
        **{"modulation": dit.blocks[0].modulation, "last": dit.final_modulation},
    }
    calls = {name: [] for name in once}
    handles = [
        part.register_forward_hook(lambda *given, name=name: calls[name].append(len(given[1][0])))
        for name, part in once.items()
    ]
    steps = {"steps": 6, "motion_steps": 5}
    make(model, [PROMPT, "two birds"], [1, 2], motion_guidance=2.0, **steps, **asked)
    for handle in handles:
        handle.remove()
    # of the two texts and the negative one
    assert calls == {
        **{"time": [6], "shift": [6], "keys": [3], "context": [2]},
        **{name: [5 * 3] for name in ("motion time", "text", "modulation", "last")},
    }


def test_progress_reaches_the_end_of_every_stage(model):
    seen: dict[str, list[tuple[int, int]]] = {}
    watch = Watch(step=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    make(model, [PROMPT], [0], watch, steps=3)
    assert list(seen) == ["load", "content", "motion", "decode"]
    assert [steps[-1] for steps in seen.values()] == [(1, 1), (3, 3), (2, 2), (4, 4)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": (32, 50)}, "multiples of 16, such as 48x32"),
        ({"size": (9000, 48)}, "multiples of 16"),
        ({"frames": 5}, "frames 5 is neither 1 nor a multiple of 2"),
        ({"steps": 1001}, "steps 1001 is not between 1 and 1000"),
        ({"motion_steps": 1001}, "motion steps 1001 is not between 1 and 1000"),
        ({"fps": 1000}, "fps 1000 is not between 1 and 240"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_weights_load(tiny_model, options, says):
    model = load_pipeline(tiny_model)
    with pytest.raises(ValueError, match=says):
        model.sample(PROMPT, **options)
    assert not model._parts


@pytest.mark.parametrize("name", ["image", "content_from", "motion_from"])
def test_a_file_that_only_the_command_line_reads_is_refused(model, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} has no effect here: give what it holds to `run`, as inputs"):
        model.sample("a dog", **{name: tmp_path / "a.png"})


def test_load_says_what_is_possible(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"unknown model 'nano'"):
        load_pipeline("nano")
    with pytest.raises(ValueError, match="device 'tpu' is not one of auto, cpu"):
        load_pipeline(tiny_model, device="tpu")
    with pytest.raises(ValueError, match="dtype 'int8' is not one of auto, float32"):
        load_pipeline(tiny_model, dtype="int8")
    shutil.copytree(tiny_model, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "text_encoder")
    with pytest.raises(ValueError, match="makes no video from text"):
        load_pipeline(tmp_path / "tiny")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_frames_are_handed_on_as_they_are_decoded(model, sampler):
    options = {"sampler": sampler, "frames": 6, "max_memory": 300_000}
    assert model.plan(Request(**options), batch=2).slices.pictures < 6
    events: list[tuple[str, int]] = []
    parts: dict[int, list[np.ndarray]] = {}
    watch = Watch(
        step=lambda stage, done, total: events.append((stage, done)),
        frames=lambda clip, frames: (events.append(("frames", clip)), parts.setdefault(clip, []).append(frames.copy())),
    )
    clips = make(model, [PROMPT, "a red car driving"], [1, 2], watch, **options)
    for i, clip in enumerate(clips):
        assert len(parts[i]) > 1
        assert np.array_equal(np.concatenate(parts[i]), clip.frames)
    # the first frames are there before the last are made
    assert events.index(("frames", 0)) < events.index(("decode", 6))


def test_a_still_is_handed_on_too(model):
    parts: list[np.ndarray] = []
    watch = Watch(content=lambda clip, picture: parts.append(picture), frames=lambda clip, frames: parts.append(frames))
    [still] = make(model, [PROMPT], [0], watch, frames=1)
    assert len(parts) == 2
    assert np.array_equal(parts[0], still.content) and np.array_equal(parts[1], still.frames)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_content_is_shown_before_the_motion_is_sampled(model, sampler):
    events: list[object] = []
    pictures: dict[int, np.ndarray] = {}
    watch = Watch(
        step=lambda stage, done, total: events.append(stage),
        content=lambda clip, picture: (events.append(clip), pictures.setdefault(clip, picture.copy())),
    )
    clips = make(model, [PROMPT, "a red car driving"], [1, 2], watch, sampler=sampler)
    order = ["load", "content", 0, 1, "motion", "decode"]
    assert [event for event, _ in groupby(events)] == order
    for i, clip in enumerate(clips):
        assert pictures[i].dtype == np.uint8 and pictures[i].shape == (32, 48, 3)
        assert np.array_equal(pictures[i], clip.content)


class Event:
    """Of a GPU that is done when it is asked for the nth time, or waited for."""

    def __init__(self, asked: int) -> None:
        self.asked = asked

    def query(self) -> bool:
        self.asked -= 1
        return self.asked <= 0

    def synchronize(self) -> None:
        self.asked = 0


@pytest.mark.parametrize(("asked", "shown_after"), [(1, 0), (2, 1), (9, 2)])
def test_content_that_is_late_is_shown_once_and_before_its_frames(model, monkeypatch, asked, shown_after):
    expected = model.sample(PROMPT)

    def start_late(make, given, on_ready, *, stream):
        return Pending(make(given), Event(asked), on_ready)

    monkeypatch.setattr(decode, "start", start_late)
    events: list[str] = []
    watch = Watch(
        step=lambda stage, done, total: events.append(stage),
        content=lambda _, picture: events.append("picture"),
        frames=lambda _, frames: events.append("frames"),
    )
    [clip] = make(model, [PROMPT], [0], watch)
    assert np.array_equal(clip.frames, expected.frames)
    assert np.array_equal(clip.content, expected.content)
    assert events.count("picture") == 1
    assert events[: events.index("picture")].count("motion") == shown_after
    assert events.index("picture") < events.index("frames")


@pytest.mark.parametrize("max_memory", [None, 300_000])
def test_who_is_short_of_memory_gets_one_thing_after_another(model, monkeypatch, max_memory):
    streams = []

    def start(make, given, on_ready, *, stream):
        streams.append(stream)
        return Pending(make(given), None, on_ready)

    monkeypatch.setattr(decode, "start", start)
    monkeypatch.setitem(vars(model), "side_stream", "a stream")
    model.sample(PROMPT, max_memory=max_memory)
    assert streams == ["a stream" if max_memory is None else None]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("frames", [4, 1])
def test_frames_are_planes_where_these_are_asked_for(model, sampler, frames):
    options = {"sampler": sampler, "frames": frames}
    prompts, seeds = [PROMPT, "a red car driving"], [1, 2]
    parts: dict[int, list[np.ndarray]] = {0: [], 1: []}
    watch = Watch(frames=lambda clip, frames: parts[clip].append(frames.copy()))
    clips = make(model, prompts, seeds, watch, pixels="yuv420p", **options)
    for i, (clip, rgb) in enumerate(zip(clips, make(model, prompts, seeds, **options), strict=True)):
        assert (clip.pixels, rgb.pixels) == ("yuv420p", "rgb24")
        assert clip.frames.shape == (frames, 48, 48) and clip.frames.dtype == np.uint8
        assert np.array_equal(np.concatenate(parts[i]), clip.frames)
        assert np.array_equal(clip.content, rgb.content)
        assert clip.metadata == rgb.metadata
        levels = torch.from_numpy(rgb.frames).permute(0, 3, 1, 2)
        rounded_first = to_yuv420p(to_unit(levels)).numpy()
        assert np.abs(clip.frames.astype(int) - rounded_first).max() <= 1


def test_pixels_that_nobody_makes_are_refused(model):
    with pytest.raises(ValueError, match=r"^pixels 'nv12' is not one of rgb24, yuv420p$"):
        make(model, [PROMPT], [0], pixels="nv12")


@pytest.mark.parametrize("options", [{"seed": 3, "motion_seed": 4}, {"frames": 1}])
def test_metadata_is_known_before_anything_is_made(tiny_model, options):
    model = load_pipeline(tiny_model)
    metadata = model.describe(plan(model, **options))
    assert not model._parts
    assert model.sample(PROMPT, **options).metadata == metadata


@pytest.mark.parametrize("batch", [1, 2])
def test_little_memory_gives_the_same_frames(model, batch):
    prompts, seeds = [PROMPT] * batch, range(batch)
    whole = make(model, prompts, seeds)
    with pytest.raises(ValueError, match=r"max memory 0\.001 MB: .* takes at least 1 MB"):
        make(model, prompts, seeds, max_memory=1000)
    memory = 200_000 if batch == 1 else 250_000
    assert model.plan(Request(max_memory=memory), batch=batch).slices.strips > 1
    for clip, other in zip(whole, make(model, prompts, seeds, max_memory=memory), strict=True):
        assert np.abs(clip.frames.astype(int) - other.frames).max() <= 1
        assert other.metadata == clip.metadata | {"max_memory": f"{memory}B"}


def test_prompt_longer_than_the_text_encoder_is_noticed(model):
    words = 14  # beside the two tokens that begin and end a text of at most 16
    assert model.fits(" ".join(["dog"] * words))
    assert not model.fits(" ".join(["dog"] * (words + 1)))


@pytest.fixture(scope="module")
def clip(model):
    return model.sample(PROMPT, seed=5)


def test_latents_of_a_clip_decode_to_its_frames(model, clip):
    assert clip.latents.metadata == clip.metadata
    parts: list[np.ndarray] = []
    watch = Watch(frames=lambda _, frames: parts.append(frames.copy()))
    again = model.decode(clip.latents, plan(model), watch)
    assert np.array_equal(again.frames, clip.frames)
    assert np.array_equal(np.concatenate(parts), clip.frames)
    assert np.array_equal(again.content, clip.content)
    assert np.array_equal(model.decode_still(clip.latents.content), clip.content)
    assert (again.fps, again.metadata) == (clip.fps, clip.metadata)


def test_both_halves_given_are_the_clip_whatever_the_seed(model, clip):
    inputs = Inputs(clip.latents.content, clip.latents.motion)
    [again] = make(model, ["a red car driving"], [6], inputs=inputs)
    assert np.array_equal(again.frames, clip.frames)
    assert not {"content_seed", "motion_seed", "steps", "motion_steps"} & set(again.metadata)


def test_a_content_frame_given_is_kept_and_motion_is_drawn(model, clip):
    inputs = Inputs(content=clip.latents.content, origin={"content_from": "a"})
    # the clip's own motion seed draws its motion again
    [again] = make(model, [PROMPT], [9], inputs=inputs, motion_seed=5)
    assert np.array_equal(again.frames, clip.frames)
    others = make(model, [PROMPT, PROMPT], [6, 7], inputs=inputs)
    motions = [other.latents.motion for other in (clip, *others)]
    for other in others:
        assert torch.equal(other.latents.content, clip.latents.content)
        assert other.metadata["content_from"] == "a"
        assert not {"content_seed", "steps", "guidance"} & set(other.metadata)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(motions[i], motions[j])
    assert others[0].metadata == model.describe(plan(model, seed=6), inputs)


@pytest.mark.parametrize("sampler", ["dpm++", "ddpm"])
def test_motion_given_is_kept_and_content_is_drawn(model, clip, sampler):
    inputs = Inputs(motion=clip.latents.motion)
    others = make(model, [PROMPT] * 2, [6, 7], inputs=inputs, sampler=sampler)
    [again] = make(model, [PROMPT], [0], inputs=inputs, content_seed=5, sampler=sampler)
    if sampler == "dpm++":
        assert np.array_equal(again.frames, clip.frames)
    contents = [other.latents.content for other in (again, *others)]
    for other in (again, *others):
        assert torch.equal(other.latents.motion, clip.latents.motion)
        assert not {"motion_seed", "motion_steps", "motion_guidance"} & set(other.metadata)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(contents[i], contents[j])


def test_what_is_given_must_have_the_size_asked_for(tiny_model, clip):
    model = load_pipeline(tiny_model)
    for options in ({"frames": 6}, {"size": (32, 64)}):
        with pytest.raises(ValueError, match="the motion given is of shape"):
            make(model, [PROMPT], [0], inputs=Inputs(motion=clip.latents.motion), **options)
    assert not model.loaded


def test_a_still_of_a_content_frame_given_is_its_picture(model, clip):
    inputs = Inputs(content=clip.latents.content)
    [still] = make(model, [PROMPT], [0], inputs=inputs, frames=1)
    assert np.array_equal(still.frames[0], clip.content)
    assert still.latents is None


def test_encoding_is_the_vae_and_the_autoencoder_and_reads_nothing_else(tiny_model, clip):
    model = load_pipeline(tiny_model)
    latents = model.encode(clip.frames, plan(model, fps=12), origin={"source": "b"})
    assert set(model._parts) == {"vae", "autoencoder"}
    unit = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        seen = model.vae.to_latents(unit).permute(1, 0, 2, 3)[None]
        content, motion = model.autoencoder.encode(seen)
    torch.testing.assert_close(latents.content, content[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents.motion, motion[0], rtol=1e-4, atol=1e-5)
    about = {"model": "tiny", "frames": 4, "size": "48x32", "fps": 12, "source": "b"}
    assert about.items() <= latents.metadata.items()
    assert model.decode(latents, plan(model)).frames.shape == clip.frames.shape
    assert set(model._parts) == {"vae", "autoencoder"}


def test_content_frame_of_a_clip_at_rest_is_the_still(model, clip):
    # a weighted mean of equal latents
    rest = np.broadcast_to(clip.frames[:1], clip.frames.shape)
    still = model.encode_still(clip.frames[0])
    torch.testing.assert_close(model.encode(rest, plan(model)).content, still, rtol=1e-4, atol=1e-5)


def test_little_memory_encodes_the_same(model, clip):
    whole = model.encode(clip.frames, plan(model))
    sliced = model.encode(clip.frames, plan(model, max_memory=300_000))
    torch.testing.assert_close(whole.content, sliced.content, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.motion, sliced.motion, rtol=1e-4, atol=1e-5)


def test_a_still_is_not_encoded_as_a_clip(model, clip):
    with pytest.raises(ValueError, match="motion of 1 frame"):
        model.encode(clip.frames[:1], plan(model, frames=1))


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_a_model_of_stills_is_refused_where_motion_is_needed(stills, tmp_path, clip, cmdgen, verb):
    source = tmp_path / f"clip.{'mp4' if verb == 'encode' else 'safetensors'}"
    output = tmp_path / f"out.{'mp4' if verb == 'decode' else 'safetensors'}"
    clip.save(source)
    result = cmdgen(verb, source, "-o", output, "--model", stills)
    assert (result.code, result.out) == (2, "")
    assert result.err == ("error: still has no autoencoder: it makes stills and knows no motion\n")
