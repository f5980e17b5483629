"""Halves of clips from files: `cmdgen sample` keeps them and samples the rest."""

import json
import os
import subprocess
from dataclasses import replace
from threading import Thread

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from cmdgen.cli.errors import Failure
from cmdgen.cli.inputs import InputFiles
from cmdgen.cli.progress import Say
from cmdgen.latents import read_latents, save_latents
from cmdgen.request import Request
from cmdgen.video.read import read_clip, read_metadata, read_video
from tests.cli.conftest import PROMPT
from tests.videos import write_video

QUIET = Say(quiet=True)


def files(**paths) -> InputFiles:
    return InputFiles(Request(**paths))


@pytest.fixture(scope="module")
def video(clip, tmp_path_factory):
    """The clip's frames, without loss."""
    path = tmp_path_factory.mktemp("given") / "clip.apng"
    write_video(path, clip.frames, clip.fps, clip.metadata)
    return path


def test_latents_give_their_halves_bit_for_bit(model, clip, latents):
    content = files(content_from=latents).read(model, model.plan(Request()), QUIET)
    motion = files(motion_from=latents).read(model, model.plan(Request()), QUIET)
    assert torch.equal(content.content, clip.latents.content) and content.motion is None
    assert torch.equal(motion.motion, clip.latents.motion) and motion.content is None
    assert set(content.origin) == {"content_from"} and set(motion.origin) == {"motion_from"}
    assert content.origin["content_from"]["file"] == latents.name
    assert files().read(model, model.plan(Request()), QUIET) is None


def test_a_video_gives_what_encoding_it_does(model, clip, video):
    encoded = model.encode(clip.frames, model.plan(Request()))
    inputs = files(content_from=video, motion_from=video)
    parts = inputs.read(model, model.plan(Request()), QUIET)
    assert torch.equal(parts.content, encoded.content)
    assert torch.equal(parts.motion, encoded.motion)
    # of a still asked for, the whole video has the content frame
    still = files(content_from=video).read(model, model.plan(Request(frames=1)), QUIET)
    assert torch.equal(still.content, encoded.content)
    # once read, once encoded
    assert inputs.read(model, model.plan(Request(seed=9)), QUIET) is parts
    longer = inputs.read(model, model.plan(Request(frames=6)), QUIET)
    assert longer.motion.shape[1] == 6


def test_a_picture_is_turned_upright_cropped_and_laid_on_white(model, tmp_path, capsys):
    # wider than the model's clips by half its width, seen from its right side
    wide = np.zeros((64, 144, 4), np.uint8)
    wide[:, :, 3] = 255
    wide[:, 24:72, 0] = 200
    wide[:, 72:, 2] = 255
    # all but the middle is cropped
    wide[:, :24] = wide[:, 120:] = (0, 255, 0, 255)
    wide[:16, :, 3] = 0
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    # to be turned by 90 degrees clockwise
    exif[0x0112] = 6
    Image.fromarray(np.rot90(wide)).save(path, exif=exif)
    expected = wide[:, 24:120, :3].copy()
    expected[:16] = 255
    expected = np.asarray(Image.fromarray(expected).resize((48, 32), Image.Resampling.BICUBIC))
    parts = files(image=path).read(model, model.plan(Request()), Say())
    assert torch.equal(parts.content, model.encode_still(expected))
    assert parts.motion is None and parts.origin["image"]["file"] == "photo.png"
    assert f"{path}, 144x64: cropped and resized to 48x32\n" == capsys.readouterr().err
    assert np.array_equal(read_clip(path, frames=1, size=(32, 48), fps=8)[0][0], expected)


def test_a_clip_keeps_the_picture_that_it_animates(model, tmp_path):
    path = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    Image.fromarray(noise).save(path)
    parts = files(image=path).read(model, model.plan(Request()), QUIET)
    plans = [model.plan(Request(prompt=PROMPT, seed=seed)) for seed in (1, 2)]
    clips = model.run(plans, inputs=parts)
    assert torch.equal(clips[0].latents.content, clips[1].latents.content)
    assert np.array_equal(clips[0].content, clips[1].content)
    assert not torch.equal(clips[0].latents.motion, clips[1].latents.motion)
    assert clips[0].metadata["image"] == parts.origin["image"]


def test_latents_have_the_size_that_is_not_asked_for(model, tmp_path):
    path = tmp_path / "small.safetensors"
    clip = model.sample(PROMPT, frames=6, size=(16, 32))
    save_latents(path, clip.latents)
    plain = Request()
    content = files(content_from=path).fit(plain, model.config)
    motion = files(motion_from=path).fit(plain, model.config)
    assert content == replace(plain, size=(16, 32))
    assert motion == replace(plain, size=(16, 32), frames=6)
    # the content frame may be of a clip of any length
    assert files(content_from=path).fit(Request(frames=2), model.config).frames == 2
    for request in (Request(frames=4), Request(size=(16, 64)), Request(size=(32, 32))):
        with pytest.raises(ValueError, match="given is of shape"):
            files(motion_from=path).fit(request, model.config)


def test_what_cannot_be_given_is_refused(model, tiny_model, latents, video, tmp_path):
    with pytest.raises(ValueError, match="--content-from and --image both give the content frame"):
        files(content_from=video, image=video)
    with pytest.raises(FileNotFoundError):
        files(motion_from=tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="has nothing to move: a still has one frame"):
        files(motion_from=video).fit(Request(frames=1), model.config)
    with pytest.raises(ValueError, match="no autoencoder: it makes stills"):
        files(image=video).fit(Request(), replace(model.config, autoencoder=None))
    weights = tiny_model / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(Failure, match="not latents of cmdgen"):
        files(content_from=weights).fit(Request(), model.config)
    for option in ("content_from", "motion_from", "image"):
        text = tmp_path / "text.mp4"
        text.write_text("not a video")
        with pytest.raises(Failure, match="not a readable video or picture"):
            files(**{option: text}).read(model, model.plan(Request()), QUIET)


def test_a_clip_made_again_needs_the_files_it_was_made_with(model, clip, latents, video, capsys):
    inputs = files(content_from=latents)
    parts = inputs.read(model, model.plan(Request()), QUIET)
    metadata = model.describe(model.plan(Request(prompt=PROMPT)), parts)
    like = latents.with_name("made.mp4")
    inputs.check_like(metadata, like, Say())
    assert capsys.readouterr().err == ""
    files(content_from=video).check_like(metadata, like, Say())
    assert "made.mp4 was made with --content-from of other contents" in capsys.readouterr().err
    says = r"made with --content-from 'clip\.cmd\.safetensors': give that file"
    with pytest.raises(ValueError, match=says):
        files().check_like(metadata, like, QUIET)
    files().check_like(clip.metadata, like, QUIET)


def test_a_phone_s_video_stands_upright(model, tmp_path, capsys):
    upright, turned = tmp_path / "upright.mp4", tmp_path / "turned.mp4"
    ffmpeg = (imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error")
    source = "testsrc2=size=96x144:rate=25:duration=1,format=yuv444p"
    sideways = ("-vf", "transpose=1", "-c:v", "libx264", "-crf", "0")
    subprocess.run([*ffmpeg, "-f", "lavfi", "-i", source, *sideways, upright], check=True)
    # the same with a note to turn it back
    note = ("-display_rotation", "90", "-i", upright, "-c", "copy")
    subprocess.run([*ffmpeg, *note, turned], check=True)
    parts = files(content_from=turned).read(model, model.plan(Request()), Say())
    assert "96x144, 25 fps, 1 s" in capsys.readouterr().err
    other = files(content_from=upright).read(model, model.plan(Request()), Say())
    assert "144x96, 25 fps, 1 s" in capsys.readouterr().err
    assert parts.content.shape == other.content.shape


def test_latents_are_written_and_sampled_around(sample, model, clip, tmp_path):
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    result = sample(PROMPT, "-o", first, "--seed", 5)
    assert (result.code, result.out) == (0, f"{first}\n"), result.err
    written = read_latents(first)
    assert torch.equal(written.content, clip.latents.content)
    assert torch.equal(written.motion, clip.latents.motion)
    assert written.metadata == clip.metadata
    assert sample(PROMPT, "-o", second, "--seed", 6, "--content-from", first).code == 0
    assert sample(PROMPT, "-o", third, "--seed", 6, "--motion-from", first).code == 0
    kept_content, kept_motion = read_latents(second), read_latents(third)
    assert torch.equal(kept_content.content, written.content)
    assert not torch.equal(kept_content.motion, written.motion)
    assert torch.equal(kept_motion.motion, written.motion)
    assert not torch.equal(kept_motion.content, written.content)
    assert kept_content.metadata["content_from"]["file"] == "a.safetensors"
    assert "content_seed" not in kept_content.metadata
    # several seeds around one content frame
    name = tmp_path / "{seed}.safetensors"
    result = sample(PROMPT, "-o", name, "--seed", 6, "--content-from", first, "--num", 2)
    assert result.code == 0, result.err
    motions = [read_latents(tmp_path / f"{seed}.safetensors").motion for seed in (6, 7)]
    assert torch.equal(motions[0], kept_content.motion)
    assert not torch.equal(*motions)
    result = sample(PROMPT, "-o", first, "--frames", 1, "--overwrite")
    assert (result.code, result.out) == (2, "")
    assert "a still has no motion" in result.err


def test_a_picture_moves_and_a_clip_of_it_is_made_again(sample, video, tmp_path):
    photo, path, again = (tmp_path / name for name in ("photo.png", "a.mp4", "b.mp4"))
    noise = np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8)
    Image.fromarray(noise).save(photo)
    result = sample(PROMPT, "-o", path, "--image", photo, "--seed", 3)
    assert (result.code, result.out) == (0, f"{path}\n"), result.err
    assert f"{photo}, 60x80: cropped and resized to 48x32\n" in result.err
    assert read_video(path)[0].shape == (4, 32, 48, 3)
    like = ("--like", path, "-o", again)
    result = sample(*like)
    assert (result.code, result.out) == (2, "")
    assert "a.mp4 was made with --image 'photo.png': give that file, too\n" in result.err
    assert sample(*like, "--image", photo).code == 0
    assert np.array_equal(read_video(path)[0], read_video(again)[0])
    assert read_metadata(path) == read_metadata(again)
    # what is seen may come from elsewhere
    result = sample(*like, "--overwrite", "--content-from", video)
    assert result.code == 0, result.err
    assert "image" not in read_metadata(again)
    # of a file of both halves, neither is sampled
    parts = ("--content-from", video, "--motion-from", video, "--rehash", 2)
    parts += ("--rehash-policy", "uniform")
    assert sample(PROMPT, "-o", path, "--overwrite", *parts).code == 0
    assert sample(*like, "--overwrite", *parts[:4]).code == 0


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--content-from", "V", "--image", "V"), 2, "--content-from and --image both give"),
        (("--content-from", "V", "--content-seed", 1), 2, "--content-seed has no effect"),
        (("--image", "V", "--content-seed", 1), 2, "--content-seed has no effect"),
        (("--motion-from", "V", "--motion-seed", 1), 2, "--motion-seed has no effect"),
        (("--motion-from", "L", "--frames", 6), 2, "motion given is of shape"),
        (("--content-from", "L", "--size", "64x64"), 2, "content given is of shape"),
        (("--content-from", "none.mp4"), 3, "none.mp4"),
        (("--image", "W"), 1, "not a readable video or picture"),
        (("--content-from", "W"), 1, "not latents of cmdgen"),
    ],
)
def test_what_cannot_be_given_is_one_line(sample, video, latents, tiny_model, tmp_path, options, code, says):
    weights = tiny_model / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"V": video, "L": latents, "W": weights}
    path = tmp_path / "a.mp4"
    result = sample(PROMPT, "-o", path, "--quiet", *(names.get(each, each) for each in options))
    assert (result.code, result.out) == (code, "")
    assert says in result.err and result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_given_is_checked_before_anything_is_made(sample, latents, tmp_path):
    path = tmp_path / "a.mp4"
    result = sample(PROMPT, "-o", path, "--motion-from", latents, "--dry-run", "--json")
    assert result.code == 0, result.err
    (job,) = json.loads(result.out)["jobs"]
    assert (job["frames"], job["width"], job["height"]) == (4, 48, 32)
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    result = sample(PROMPT, "-o", path, "--image", broken, "--dry-run")
    assert (result.code, result.out) == (1, "")
    assert "broken.png is not a readable video or picture" in result.err
    assert not path.exists()


@pytest.fixture
def piped(tmp_path):
    """Returns a named pipe that gives a file's bytes once."""

    def make(file):
        pipe = tmp_path / f"pipe{file.suffix}"
        os.mkfifo(pipe)
        Thread(target=lambda: pipe.write_bytes(file.read_bytes()), daemon=True).start()
        return pipe

    return make


def test_a_named_pipe_is_an_input(cmdgen, sample, tiny_model, piped, latents, tmp_path, video):
    made = cmdgen("encode", piped(video), "-o", tmp_path / "a.safetensors", "--model", tiny_model)
    assert made.code == 0, made.err
    cmdgen("encode", video, "-o", tmp_path / "b.safetensors", "--model", tiny_model)
    first, second = (read_latents(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert torch.equal(first.motion, second.motion)
    assert first.metadata["source"]["sha256"] == second.metadata["source"]["sha256"]
    assert sample(PROMPT, "--motion-from", piped(latents), "-o", tmp_path / "a.mp4").code == 0


def test_stdin_is_an_input_where_it_is_no_prompt(sample, tmp_path):
    Image.new("RGB", (48, 32), (9, 200, 90)).save(tmp_path / "a.png")
    stdin = os.dup(0)
    try:
        with (tmp_path / "a.png").open("rb") as file:
            os.dup2(file.fileno(), 0)
            assert sample(PROMPT, "--image", "-", "-o", tmp_path / "a.mp4").code == 0
            for prompts in ([], ["-f", "-"]):
                result = sample(*prompts, "--image", "-", "-o", tmp_path / "b.mp4")
                assert result.code == 2 and "both need stdin" in result.err
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    assert read_metadata(tmp_path / "a.mp4")["image"]["file"] == "-"
