"""A plain Stable Diffusion folder, as diffusers writes it, is a model of stills."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cmdgen.cli.app import main
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.pipelines.load import load_pipeline
from cmdgen.request import Request, resolve
from cmdgen.store.parts import read_model

PROMPT = "a dog swimming in the ocean"
# Stable Diffusion's schedule, as its folders have it
SCHEDULE = {
    **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    **{"set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5's shape, narrow, from diffusers' own hands."""
    place = tmp_path_factory.mktemp("hub") / "models--someone--tiny-diffusion" / "snapshots" / "1a"
    Tokenizer.train([PROMPT], 560).save_pretrained(place.parent / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextConfig(
            **{"vocab_size": 560, "hidden_size": 16, "intermediate_size": 32},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16},
            **{"bos_token_id": 0, "eos_token_id": 1},
        )
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(4, 8, 8, 8),
                norm_num_groups=4,
                layers_per_block=2,
                latent_channels=4,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=CLIPTokenizer.from_pretrained(place.parent / "tokenizer"),
            unet=UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(8, 16, 16, 16),
                norm_num_groups=4,
                cross_attention_dim=16,
                attention_head_dim=2,
            ),
            scheduler=PNDMScheduler(**SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(place)
    return place


@pytest.mark.parametrize(("sampler", "scheduler"), [("ddim", DDIMScheduler), ("dpm++", DPMSolverMultistepScheduler)])
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_a_sample_is_that_of_diffusers_from_the_same_latents(
    folder: Path, sampler: str, scheduler: type, guidance: float
) -> None:
    model = load_pipeline(folder)
    latents: list[torch.Tensor] = []
    decode = model.vae.from_latents
    model.vae.from_latents = lambda x: decode(latents.append(x) or x)
    clip = model.sample(
        PROMPT,
        **{"seed": 3, "steps": 6, "guidance": guidance, "sampler": sampler},
        **{"negative": "a car", "size": "128x64"},
    )
    (ours,) = latents

    peer = StableDiffusionPipeline.from_pretrained(folder)
    # of Stable Diffusion's own folders; diffusers' default for DDIM is to clip
    peer.scheduler = scheduler.from_config({**peer.scheduler.config, "clip_sample": False})
    peer.set_progress_bar_config(disable=True)
    noise, _ = model.noise("content", (4, 8, 16), [3])
    theirs, image = (
        peer(
            PROMPT,
            **{"negative_prompt": "a car", "num_inference_steps": 6, "guidance_scale": guidance},
            **{"height": 64, "width": 128, "latents": noise, "output_type": kind},
        ).images
        for kind in ("latent", "np")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.1
    # theirs is rounded when it becomes a picture
    assert np.abs(clip.frames[0] - 255 * image[0]).max() < 0.51
    assert np.array_equal(clip.frames[0], clip.content) and clip.frames.shape == (1, 64, 128, 3)


def test_what_it_is_is_read_from_the_folder(folder: Path) -> None:
    model = read_model(folder)
    assert model.name == "tiny-diffusion"
    assert (model.frames, model.height, model.width) == (1, 128, 128)
    assert model.motion is None and model.autoencoder is None
    assert model.noise.prediction_type == "epsilon" and model.noise.timestep_spacing == "leading"
    assert (model.sampler, model.steps, model.guidance) == ("ddim", 50, 7.5)
    with pytest.raises(ValueError, match="frames 16: tiny-diffusion has no motion model, it makes"):
        resolve(Request(frames=16), model)


def test_a_folder_of_ours_that_lacks_its_motion_is_not_taken_for_one(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "motion")
    with pytest.raises(ValueError, match=r"motion/config\.json: No such file"):
        read_model(tmp_path / "tiny")
    index = tmp_path / "tiny" / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match=r"motion/config\.json: No such file"):
        read_model(tmp_path / "tiny")


def test_what_is_measured_on_videos_is_refused(folder: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["eval", str(folder)])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: tiny-diffusion makes stills: videos alone are measured\n")
