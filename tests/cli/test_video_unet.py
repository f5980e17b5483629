"""The command line with AnimateDiff and Stable Video Diffusion: what it does with any other model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmdgen.cli.models import _SHAPES
from cmdgen.config import ANIMATEDIFF_LIGHTNING, CMD_SD15, SVD
from cmdgen.schema import write_config
from cmdgen.store.create import create_model
from cmdgen.video.read import read_metadata, read_video
from tests.video_unets import tiny


@pytest.fixture(scope="module")
def animatediff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "animatediff"
    create_model(tiny(ANIMATEDIFF_LIGHTNING), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "svd"
    create_model(tiny(SVD), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray((np.random.default_rng(0).random((50, 90, 3)) * 255).astype(np.uint8)).save(path)
    return path


def test_a_prompt_becomes_a_clip_that_is_made_again(cmdgen, animatediff: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "a.mp4", tmp_path / "b.mp4"
    done = cmdgen("sample", "a dog", "--model", animatediff, "-o", first, "--preview", tmp_path / "p.png", "--seed", 3)
    assert (done.code, done.out) == (0, f"{first}\n"), done.err
    frames, _ = read_video(first)
    assert frames.shape == (4, 64, 64, 3) and (tmp_path / "p.png").is_file()
    about = read_metadata(first)
    assert about.items() >= {"frames": 4, "steps": 2, "guidance": 1.0, "sampler": "ddim"}.items()
    assert not about.keys() & {"motion_steps", "content_seed", "motion_seed", "motion_guidance"}
    done = cmdgen("sample", "--like", first, "--model", animatediff, "-o", again)
    assert done.code == 0, done.err
    assert np.array_equal(frames, read_video(again)[0])


def test_a_picture_becomes_a_clip_without_a_prompt(cmdgen, svd: Path, picture: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "a.mp4", tmp_path / "b.mp4"
    options = ("--motion-amount", 40, "--image-noise", 0.1, "--guidance-first", 2, "--guidance", 4)
    done = cmdgen("sample", "--image", picture, "--model", svd, "-o", first, "--seed", 3, *options)
    assert (done.code, done.out) == (0, f"{first}\n"), done.err
    assert f"{picture}, 90x50: cropped and resized to 64x64" in done.err
    about = read_metadata(first)
    assert about["image"]["file"] == "picture.png"
    recorded = {"motion_amount": 40, "image_noise": 0.1, "guidance_first": 2.0, "guidance": 4.0, "fps": 7}
    assert about.items() >= recorded.items()
    done = cmdgen("sample", "--like", first, "--image", picture, "--model", svd, "-o", again)
    assert done.code == 0, done.err
    assert np.array_equal(read_video(first)[0], read_video(again)[0])
    done = cmdgen("sample", "--like", first, "--model", svd, "-o", tmp_path / "c.mp4")
    assert done.code == 2 and "give that file, too" in done.err


def test_a_model_that_others_put_together_says_what_it_is_sampled_on(cmdgen, animatediff: Path, tmp_path: Path) -> None:
    folder = tmp_path / "by-hand"
    shutil.copytree(animatediff, folder)
    shutil.rmtree(folder / "still_scheduler")
    write_config(CMD_SD15.noise, folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    del index["cmdgen"]
    (folder / "model_index.json").write_text(json.dumps(index))
    note = (
        "is sampled as motion modules were trained, on linear betas with leading timesteps; its base model's schedule"
    )
    for model, noted in ((folder, True), (animatediff, False)):
        clip = ("--frames", 2, "--steps", 1, "-o", tmp_path / f"{noted}.mp4")
        done = cmdgen("sample", "a dog", "--model", model, *clip)
        assert done.code == 0 and (f"note: by-hand {note}" in done.err) == noted, done.err
        trained = "by-hand was trained on 16" if noted else "animatediff-lightning was trained on 4"
        assert f"note: {trained} frames: so few may be noise\n" in done.err


def test_prompts_of_a_file_are_one_stream_of_clips(streamed, animatediff: Path, tmp_path: Path) -> None:
    lines = tmp_path / "jobs.jsonl"
    lines.write_text('a dog\n{"prompt": "a cat", "seed": 2}\n')
    code, video, err = streamed("sample", "-f", lines, "--batch", 2, "--model", animatediff, "-o", "-", "--seed", 1)
    assert code == 0, err
    header, *frames = video.split(b"FRAME\n")
    assert header.startswith(b"YUV4MPEG2 W64 H64 F8:1") and len(frames) == 8
    assert frames[0] != frames[4]


def test_a_public_model_with_random_weights_is_sampled_and_inspected(
    cmdgen, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_SHAPES, "svd", tiny(SVD))
    done = cmdgen("models", "init", "svd", "-o", tmp_path / "svd")
    assert (done.code, done.out) == (0, f"{tmp_path / 'svd'}\n"), done.err
    clip = tmp_path / "x.mp4"
    done = cmdgen("sample", "--image", picture, "--model", tmp_path / "svd", "-o", clip, "--seed", 1)
    assert done.code == 0, done.err
    done = cmdgen("inspect", clip, "--json")
    about = json.loads(done.out)
    assert about.items() >= {"model": "svd", "frames": 4, "motion_amount": 127, "guidance_first": 1.0}.items()


def test_lines_of_a_file_are_clips_of_the_picture(cmdgen, svd: Path, picture: Path, tmp_path: Path) -> None:
    lines = tmp_path / "jobs.jsonl"
    lines.write_text('{"seed": 1}\n{"seed": 2, "motion-amount": 5, "steps": 1}\na dog\n')
    done = cmdgen(
        *("sample", "-f", lines, "--image", picture, "--model", svd, "--json"), *("-o", tmp_path / "{index}-{slug}.mp4")
    )
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record.get("output", record.get("error")) for record in records] == [
        str(tmp_path / "1-clip.mp4"),
        str(tmp_path / "2-clip.mp4"),
        "prompt has no effect with svd: it reads no text, it animates --image",
    ]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("svd", ["a dog", "--image", "PICTURE"], "prompt has no effect with svd: it reads no text"),
        ("svd", [], "svd animates a picture: give one with --image"),
        ("svd", ["--image", "PICTURE", "--max-memory", "1MB"], "--max-memory 1 MB: to make 4 frames of 64x64 takes"),
        ("animatediff", ["a dog", "--image", "PICTURE"], "--image has no effect with animatediff"),
        ("animatediff", ["a dog", "--motion-steps", "3"], "--motion-steps has no effect with animatediff"),
        ("animatediff", ["a dog", "--frames", "40", "--window", "40"], "window 40: the motion modules of animatediff"),
        (
            "animatediff",
            ["a dog", "--quality", "draft"],
            "--quality has no effect with animatediff-lightning: it is made for",
        ),
        ("svd", ["--image", "PICTURE", "--decoder", "mini"], "--decoder has no effect with svd: that of a model"),
        ("animatediff", ["a dog", "--decoder", "mini"], "decoder mini: latent_channels 8 of its vae/ is not that of"),
        ("animatediff", ["a dog", "--image-noise", "1"], "--image-noise has no effect with animatediff"),
    ],
)
def test_what_does_not_apply_is_one_line(
    cmdgen, request, picture: Path, tmp_path: Path, model, arguments, message
) -> None:
    words = [str(picture) if word == "PICTURE" else word for word in arguments]
    done = cmdgen("sample", *words, "--model", request.getfixturevalue(model), "-o", tmp_path / "x.mp4")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert message in done.err and not (tmp_path / "x.mp4").exists()


def test_a_dry_run_says_what_it_takes(cmdgen, svd: Path, animatediff: Path, picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.mp4"
    for model, arguments in ((svd, ["--image", picture]), (animatediff, ["a dog"])):
        done = cmdgen("sample", *arguments, "--model", model, "-o", output, "--dry-run", "--json")
        assert done.code == 0, done.err
        report = json.loads(done.out)
        assert report["flops"] > 0 and report["memory_bytes"] > 0
        assert "motion_steps" not in report["jobs"][0] and report["jobs"][0]["frames"] == 4
        # the least that it says is enough, and less is not
        least = report["least_memory_bytes"]
        assert least < report["memory_bytes"]
        limited = ("sample", *arguments, "--model", model, "-o", output, "--dry-run", "--max-memory")
        done = cmdgen(*limited, f"{least}B")
        assert done.code == 0 and f"fits in {least / 1e9:.2f} GB" in done.out, done.err
        assert cmdgen(*limited, f"{least - 10_000}B").code == 2


@pytest.mark.parametrize("kind", ["svd", "animatediff"])
def test_every_stage_is_measured(cmdgen, request, kind: str) -> None:
    done = cmdgen("profile", "--model", request.getfixturevalue(kind), "--steps", 1, "--runs", 1, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    reads = "image" if kind == "svd" else "text"
    assert list(record["stages"]) == ["load", reads, "content", "VAE decode", "video encode"]
    assert all(stage["seconds"]["median"] > 0 for stage in record["stages"].values())
    assert record["motion_steps"] is None and record["stages"]["content"]["flops"] > 0


def test_a_pulled_model_is_inspected_and_shown(cmdgen, svd: Path, animatediff: Path) -> None:
    for folder, parts in ((svd, {"unet", "vae", "image_encoder"}), (animatediff, {"unet", "motion_adapter", "vae"})):
        done = cmdgen("models", "show", folder, "--json")
        assert done.code == 0, done.err
        assert parts <= {part["name"] for part in json.loads(done.out)["parts"]}
