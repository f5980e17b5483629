"""Whole samples are those of diffusers' AnimateDiffPipeline and StableVideoDiffusionPipeline."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableVideoDiffusionPipeline,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cmdgen.config import NoiseConfig
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.pipelines import decode
from cmdgen.pipelines.load import load_pipeline
from cmdgen.pipelines.video_unet import MotionPipeline, PicturePipeline
from cmdgen.request import Request, resolve
from cmdgen.store.parts import list_notes, read_model
from tests import video_unets as video

PROMPT, NEGATIVE = "a dog swimming", "the ocean"
LINEAR = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
BASE = {**LINEAR, "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "clip_sample": False}
SVD = {
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    **{"prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 700.0, "interpolation_type": "linear"},
    **{"timestep_spacing": "leading", "timestep_type": "continuous", "use_karras_sigmas": True},
}
FRAMES, HEIGHT, WIDTH = 5, 64, 128
SIZE = {"size": f"{WIDTH}x{HEIGHT}", "frames": FRAMES}
THEIRS = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    place = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["a dog swimming in the ocean"], 560).save_pretrained(place)
    text = CLIPTextConfig(
        **{"vocab_size": 560, "hidden_size": 16, "intermediate_size": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1},
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
    )
    return {
        "text_encoder": video.randomise(CLIPTextModel(text)),
        "tokenizer": CLIPTokenizer.from_pretrained(place),
        "vae": video.randomise(vae),
    }


def animatediff(parts: dict, scheduler: object, *, mid: bool = True) -> AnimateDiffPipeline:
    # a pipeline changes what it is given
    unet, adapter = video.still(), video.adapter(mid=mid)
    pipeline = AnimateDiffPipeline(**parts, unet=unet, motion_adapter=adapter, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def base(parts: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Stable Diffusion folder that motion modules are put into."""
    folder = tmp_path_factory.mktemp("models") / "base"
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts, unet=video.still(), scheduler=DDIMScheduler(**BASE), **others)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def composed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a folder of motion modules, by hand."""
    folder = tmp_path_factory.mktemp("models") / "composed"
    shutil.copytree(base, folder)
    video.adapter().save_pretrained(folder / "motion_adapter")
    return folder


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "svd"
    vision = CLIPVisionConfig(
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"patch_size": 32, "projection_dim": 16, "hidden_act": "gelu"},
    )
    vae = {**video.VAE, "down_block_types": ("DownEncoderBlock2D",) * 4, "block_out_channels": (32, 32, 64, 64)}
    pipeline = StableVideoDiffusionPipeline(
        vae=video.randomise(video.AutoencoderKLTemporalDecoder(**vae, layers_per_block=1)),
        image_encoder=video.randomise(CLIPVisionModelWithProjection(vision)),
        unet=video.blend(),
        scheduler=EulerDiscreteScheduler(**SVD),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # of the size of the video: what is cropped there, is squeezed in diffusers
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).random((HEIGHT, WIDTH, 3)) * 255
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def watch(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is decoded from now on; of AnimateDiff, the middle frame alone comes first."""
    latents: list[torch.Tensor] = []
    decode_pictures = decode.decode_pictures

    def keep(vae: object, some: torch.Tensor, strips: int) -> torch.Tensor:
        latents.append(some.clone())
        return decode_pictures(vae, some, strips)

    monkeypatch.setattr(decode, "decode_pictures", keep)
    return latents


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, frames: np.ndarray, expected: np.ndarray) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    assert ours.std() > 0.1
    # theirs is rounded when it becomes a picture
    assert np.abs(frames - 255 * expected).max() < 0.51


@pytest.mark.parametrize(
    ("scheduler", "settings", "mid"),
    [
        (DDIMScheduler(**LINEAR, clip_sample=False), {"guidance": 7.5, "steps": 5}, False),
        (EulerDiscreteScheduler(**LINEAR, timestep_spacing="trailing"), {"guidance": 1.0, "steps": 4}, True),
    ],
    ids=["animatediff", "lightning"],
)
def test_a_clip_is_that_of_diffusers_from_the_same_noise(
    parts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: object, settings: dict, mid: bool
) -> None:
    peer = animatediff(parts, scheduler, mid=mid)
    peer.save_pretrained(tmp_path)
    model = load_pipeline(tmp_path)
    assert type(model) is MotionPipeline
    latents = watch(monkeypatch)
    clip = model.sample(PROMPT, seed=3, negative=NEGATIVE, **SIZE, **settings)
    noise = model.noise("content", (4, 8, 16), [3], frames=FRAMES)[0].transpose(0, 1)[None]
    theirs, expected = (
        peer(
            **{"prompt": PROMPT, "negative_prompt": NEGATIVE, **THEIRS, "latents": noise.clone()},
            **{"num_inference_steps": settings["steps"], "guidance_scale": settings["guidance"]},
            output_type=kind,
        ).frames[0]
        for kind in ("latent", "np")
    )
    assert_same(torch.cat(latents[1:]), theirs.transpose(0, 1), clip.frames, expected)
    assert clip.frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.array_equal(clip.content, clip.frames[FRAMES // 2]) and clip.latents is None


def test_a_clip_of_a_consistency_model_is_that_of_diffusers(parts: dict, tmp_path: Path, monkeypatch) -> None:
    peer = animatediff(parts, LCMScheduler(**LINEAR))
    peer.save_pretrained(tmp_path)
    model = load_pipeline(tmp_path)
    latents = watch(monkeypatch)
    model.sample(PROMPT, seed=3, steps=4, guidance=2.0, sampler="lcm", **SIZE)
    noise, generators = model.noise("content", (4, 8, 16), [3], frames=FRAMES)

    def draw(shape: tuple[int, ...], **settings: object) -> torch.Tensor:
        rows = [torch.randn(shape[1], *shape[3:], generator=generator) for generator in generators]
        return torch.stack(rows, dim=1)[None]

    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", draw)
    theirs = peer(
        **{"prompt": PROMPT, **THEIRS, "latents": noise.transpose(0, 1)[None]},
        **{"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"},
    ).frames[0]
    ours = torch.cat(latents[1:])
    torch.testing.assert_close(ours, theirs.transpose(0, 1), rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_one_frame_is_the_still_of_the_base_model_to_the_bit(base: Path, composed: Path) -> None:
    settings = {"seed": 3, "steps": 3, "size": SIZE["size"], "frames": 1}
    still, clip = (load_pipeline(folder).sample(PROMPT, **settings) for folder in (base, composed))
    assert np.array_equal(still.frames, clip.frames)


def test_the_schedule_is_the_one_that_motion_modules_were_trained_on(composed: Path) -> None:
    model = read_model(composed)
    assert model.noise == NoiseConfig(beta_schedule="linear", set_alpha_to_one=True)
    assert model.still_noise == NoiseConfig(set_alpha_to_one=False)
    assert (model.frames, model.height, model.steps, model.guidance, model.fps) == (16, 128, 25, 7.5, 8)


def test_a_spacing_that_motion_modules_were_not_trained_on_is_for_stills_alone(composed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "spaced"
    shutil.copytree(composed, folder)
    for spacing, used, still in (("linspace", "leading", "linspace"), ("trailing", "trailing", None)):
        DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing=spacing).save_pretrained(folder / "scheduler")
        model = read_model(folder)
        assert (model.noise.beta_schedule, model.noise.timestep_spacing) == ("linear", used)
        assert (model.still_noise and model.still_noise.timestep_spacing) == still
        assert len(list_notes(model)) == (still is not None)


def test_a_longer_clip_starts_from_the_noise_of_a_shorter_one(composed: Path) -> None:
    model = load_pipeline(composed)
    shape = 4, 8, 16
    still, short, long = (model.noise("content", shape, [3, 4], frames=n)[0].unflatten(0, (2, n)) for n in (1, 3, 5))
    assert torch.equal(long[:, :3], short) and torch.equal(long[:, :1], still)
    assert long.flatten(0, 1).flatten(1).corrcoef().triu(1).abs().max() < 0.2


def test_a_batch_is_its_clips_one_by_one(composed: Path) -> None:
    model = load_pipeline(composed)
    requests = [Request(prompt, seed=seed, steps=2, **SIZE) for prompt, seed in ((PROMPT, 1), (NEGATIVE, 2))]
    plans = [model.plan(request) for request in requests]
    together = model.run(plans)
    for plan, clip in zip(plans, together, strict=True):
        (alone,) = model.run([plan])
        assert np.abs(alone.frames.astype(int) - clip.frames).max() <= 1
    assert np.abs(together[0].frames.astype(int) - together[1].frames).mean() > 10


def test_a_picture_moves_as_in_diffusers(svd: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_pipeline(svd)
    assert type(model) is PicturePipeline
    latents = watch(monkeypatch)
    clip = model.sample(image=picture, seed=3, steps=6, motion_amount=100, image_noise=0, **SIZE)
    noise, _ = model.noise("content", (4, 8, 16), [3], frames=FRAMES)
    peer = StableVideoDiffusionPipeline.from_pretrained(svd)
    peer.set_progress_bar_config(disable=True)
    theirs, expected = (
        peer(
            **{"image": Image.open(picture), **THEIRS, "latents": noise[None].clone(), "num_inference_steps": 6},
            **{"motion_bucket_id": 100, "noise_aug_strength": 0.0, "output_type": kind},
        ).frames[0]
        for kind in ("latent", "np")
    )
    (ours,) = latents
    assert_same(ours, theirs, clip.frames, expected)
    assert np.array_equal(clip.content, clip.frames[FRAMES // 2])
    about = {"guidance": 3.0, "guidance_first": 1.0, "motion_amount": 100, "image_noise": 0.0, "steps": 6, "fps": 7}
    assert clip.metadata.items() >= about.items()
    assert not clip.metadata.keys() & {"motion_steps", "motion_seed", "content_seed", "motion_guidance"}


def test_pictures_are_noised_from_the_seed_and_what_is_asked_changes_the_clip(svd: Path, picture: Path) -> None:
    model = load_pipeline(svd)

    def sample(**options: object) -> np.ndarray:
        return model.sample(image=picture, **{"seed": 3, "steps": 2, **SIZE, **options}).frames.astype(int)

    first = sample()
    assert np.array_equal(first, sample(image_noise=0.02, motion_amount=127, guidance=3, guidance_first=1))
    for options in ({"image_noise": 0.3}, {"motion_amount": 1}, {"guidance": 9}, {"guidance_first": 3}, {"seed": 4}):
        assert not np.array_equal(first, sample(**options)), options
    # the rate of the file is not that of the conditions
    assert np.array_equal(first, sample(fps=12))


def test_the_steps_within_a_guidance_interval_are_guided(svd: Path, picture: Path) -> None:
    model = load_pipeline(svd)

    def sample(**options: object) -> np.ndarray:
        return model.sample(image=picture, seed=3, steps=4, **SIZE, **options).frames

    everywhere, nowhere = sample(guidance_interval="0-1"), sample(guidance=1)
    assert np.array_equal(everywhere, sample())
    assert not np.array_equal(sample(guidance_interval="0-0.5"), everywhere)
    assert not np.array_equal(sample(guidance_interval="0-0.5"), nowhere)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("composed", {"frames": 64, "window": 33}, "window 33: the motion modules of composed know at most 32"),
        ("composed", {"frames": 64, "overlap": 16}, "overlap 16 is not less than the window, 16"),
        ("composed", {"seamless": True}, "16 frames are one window of 16: nothing overlaps"),
        ("svd", {"window": 8}, "window has no effect with svd: it has no motion modules"),
        ("composed", {"motion_steps": 3}, "motion steps has no effect with composed: content and motion are one"),
        ("composed", {"image": "x.png"}, "image has no effect with composed: it makes videos from text alone"),
        ("composed", {"motion_amount": 3}, "motion amount has no effect with composed: it animates no picture"),
        ("base", {"image_noise": 0.1}, "image noise has no effect with base: it animates no picture"),
        ("svd", {"prompt": "a dog"}, "prompt has no effect with svd: it reads no text, it animates --image"),
        ("svd", {"frames": 1}, "frames 1: svd animates a picture, it makes no stills"),
        ("svd", {"content_seed": 1}, "content seed has no effect with svd"),
    ],
)
def test_what_does_not_apply_is_refused(request: pytest.FixtureRequest, kind: str, options: dict, message: str) -> None:
    model = read_model(request.getfixturevalue(kind))
    with pytest.raises(ValueError, match=message):
        resolve(Request(**options), model)


def test_parts_that_do_not_go_together_are_refused(composed: Path, svd: Path, tmp_path: Path) -> None:
    def broken(folder: Path, part: str, **changes: object) -> Path:
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, place)
        path = place / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return place

    for folder, message in (
        (broken(composed, "motion_adapter", block_out_channels=[32, 64]), r"block_out_channels of motion_adapter/ is"),
        (broken(composed, "motion_adapter", conv_in_channels=9), "conv_in_channels 9 is not supported"),
        (broken(composed, "unet", use_linear_projection=True), "unet/ is Stable Diffusion 2's, motion_adapter/ is for"),
        (broken(svd, "image_encoder", projection_dim=99), "cross_attention_dim of unet/ is 16, but projection_dim of"),
        (broken(svd, "unet", in_channels=4), "in_channels of unet/ is 2, but out_channels of unet/ is 4"),
    ):
        with pytest.raises(ValueError, match=message):
            read_model(folder)
    place = broken(svd, "unet")
    shutil.rmtree(place / "image_encoder")
    with pytest.raises(ValueError, match=r"image_encoder/config\.json: No such file"):
        read_model(place)


def test_half_precision_encodes_the_picture_in_full(svd: Path, picture: Path) -> None:
    full, half = (load_pipeline(svd, dtype=dtype) for dtype in ("float32", "bfloat16"))
    pixels = torch.rand(1, 3, HEIGHT, WIDTH)
    with torch.inference_mode():
        expected, got = (model.encode_exactly(pixels) for model in (full, half))
    # what is lost is the weights' own
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert got.dtype == torch.float32 and half.vae.encoder.conv_in.weight.dtype == torch.bfloat16
    clip = half.sample(image=picture, seed=1, steps=1, **SIZE)
    assert clip.frames.std() > 0


@pytest.mark.parametrize(
    ("kind", "part"),
    [("composed", "unet"), ("composed", "vae"), ("svd", "unet"), ("svd", "vae"), ("svd", "image_encoder")],
)
def test_numbers_that_overflow_in_half_precision_are_one_line(
    request: pytest.FixtureRequest, picture: Path, kind: str, part: str
) -> None:
    model = load_pipeline(request.getfixturevalue(kind), dtype="float16")
    weights = [value for name, value in model.part(part).named_parameters() if "encoder" not in name or part[0] == "i"]
    with torch.no_grad():
        # 65504 is the largest number there is
        next(value for value in weights if value.ndim > 1).fill_(6e4)
    what = {"image": picture} if kind == "svd" else {"prompt": PROMPT}
    with pytest.raises(ValueError) as error:
        model.sample(**what, seed=1, steps=2, **SIZE)
    assert str(error.value).endswith(f"{part} overflows in float16: its weights are damaged or need --dtype bfloat16")
