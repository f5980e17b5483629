import hashlib
import json
import shutil
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from cmdgen.evaluation.metrics import compare_frames
from cmdgen.latents import read_latents, save_latents
from cmdgen.pipelines.load import load_pipeline
from cmdgen.video.read import read_metadata, read_video
from tests.cli.conftest import PROMPT


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """One second of a test picture, of odd sides and rate, with sound."""
    path = tmp_path_factory.mktemp("videos") / "clip.mkv"
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"),
        *("-f", "lavfi", "-i", "testsrc2=size=333x241:rate=30000/1001:duration=1,format=yuv444p"),
        *("-f", "lavfi", "-i", "sine=duration=1", "-c:v", "ffv1", str(path)),
    ]
    subprocess.run(command, check=True)
    return path


def frames_of(path):
    """The frames of an apng, which loses nothing."""
    with Image.open(path) as image:
        shown = []
        for i in range(image.n_frames):
            image.seek(i)
            shown.append(np.asarray(image.convert("RGB")))
    return np.stack(shown)


def test_a_video_is_taken_apart_and_put_together(cmdgen, tiny_model, video, tmp_path):
    file, still, again = (tmp_path / name for name in ("a.safetensors", "a.png", "a.apng"))
    result = cmdgen("encode", video, "-o", file, "--content", still, "--model", tiny_model)
    assert (result.code, result.out) == (0, f"{file}\n"), result.err
    # what was done to it, for a human
    assert "333x241" in result.err and "29.97" in result.err and "48x32" in result.err
    written = read_latents(file)
    model = load_pipeline(tiny_model)
    assert written.fps == 8
    assert written.metadata["source"] == {"file": "clip.mkv", "sha256": hashlib.sha256(video.read_bytes()).hexdigest()}
    with Image.open(still) as image:
        assert np.array_equal(np.asarray(image), model.decode_still(written.content))
    assert read_metadata(still) == written.metadata
    result = cmdgen("decode", file, "-o", again, "--model", tiny_model)
    assert (result.code, result.out) == (0, f"{again}\n"), result.err
    assert np.array_equal(frames_of(again), model.decode(written).frames)
    assert read_metadata(again) == written.metadata
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.png", "a.apng"}


def test_size_length_and_rate_are_as_asked(cmdgen, tiny_model, video, tmp_path):
    file = tmp_path / "a.safetensors"
    options = ("--size", "32x64", "--frames", 6, "--fps", 12)
    result = cmdgen("encode", video, "-o", file, "--model", tiny_model, *options, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["output"] == str(file)
    assert report["tensors"] == {"content": [8, 16, 8], "motion": [8, 6, 12]}
    about = {"frames": 6, "size": "32x64", "fps": 12, "model": "tiny"}
    assert about.items() <= report["metadata"].items()
    assert read_latents(file).motion.shape == (8, 6, 12)


def test_reconstruction_says_how_close_it_is(cmdgen, tiny_model, video, tmp_path):
    path, beside = tmp_path / "a.mp4", tmp_path / "b.apng"
    reconstruct = ("reconstruct", video, "--model", tiny_model, "-o")
    result = cmdgen(*reconstruct, path)
    assert (result.code, result.out) == (0, f"{path}\n"), result.err
    result = cmdgen(*reconstruct, beside, "--side-by-side", "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)["metadata"]
    before, content, after = np.split(frames_of(beside), 3, axis=2)
    assert before.shape == (4, 32, 48, 3)
    assert (content == content[0]).all()
    likeness = compare_frames(after, before)
    assert report["psnr"] == round(likeness.psnr, 2)
    assert report["ssim"] == round(likeness.ssim, 4)
    told_psnr = f"PSNR {likeness.psnr:.2f} dB, SSIM {likeness.ssim:.4f}\n"
    assert told_psnr in cmdgen(*reconstruct, path, "--overwrite").err


def test_files_are_kept_unless_told_otherwise(cmdgen, tiny_model, video, latents, tmp_path):
    taken = [tmp_path / name for name in ("a.safetensors", "a.png", "a.mp4")]
    for path in taken:
        path.write_text("mine")
    file, still, movie = taken
    other = tmp_path / "b.safetensors"
    for command in (
        ("encode", video, "-o", file),
        ("encode", video, "-o", other, "--content", still),
        ("decode", latents, "-o", movie),
        ("reconstruct", video, "-o", movie),
    ):
        result = cmdgen(*command, "--model", tiny_model)
        assert result.code == 1 and result.out == ""
        assert "exists: give another name" in result.err and result.err.count("\n") == 1
    assert not other.exists()
    assert {path.read_text() for path in taken} == {"mine"}
    assert cmdgen("decode", latents, "-o", movie, "--model", tiny_model, "--overwrite").code == 0
    assert read_video(movie)[0].shape == (4, 32, 48, 3)


def test_what_cannot_be_is_one_line(cmdgen, tiny_model, stills, video, latents, tmp_path):
    no, out, mp4 = tmp_path / "no.mp4", tmp_path / "a.safetensors", tmp_path / "a.mp4"
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(latents.read_bytes()[:-1])
    on = ("--model", tiny_model)
    for command, code, says in (
        (("encode", no, "-o", out, *on), 3, "no.mp4"),
        (("encode", text, "-o", out, *on), 1, "text.mp4"),
        (("encode", video, "-o", mp4, *on), 2, "must end in .safetensors"),
        (("encode", video, "-o", out, "--content", "a.jpg", *on), 2, "must end in .png"),
        (("encode", video, "-o", out, "--size", "50x50", *on), 2, "multiples of 16"),
        (("encode", video, "-o", out, "--frames", 1, *on), 2, "a clip has 2 or more"),
        (("encode", video, "-o", out, "--max-memory", "0.01MB", *on), 2, "takes at least"),
        (("decode", latents, "-o", mp4, "--max-memory", "0.01MB", *on), 2, "takes at least"),
        (("decode", latents, "-o", "-", "--json", *on), 2, "both need stdout"),
        (("encode", video, "-o", out, "--model", stills), 2, "still has no autoencoder: it makes"),
        (("decode", latents, "-o", mp4, "--model", stills), 2, "still has no autoencoder"),
        (("decode", no, "-o", mp4, *on), 3, "no.mp4"),
        (("decode", cut, "-o", mp4, *on), 1, "cut.safetensors: not a readable safetensors file"),
        (("decode", latents, "-o", tmp_path / "a.txt", *on), 2, "a.txt"),
        (("decode", video, "-o", mp4, *on), 1, "clip.mkv: not latents of cmdgen"),
        (("reconstruct", video, "-o", out, *on), 2, "safetensors is no video"),
        (("inspect", text), 1, "text.mp4 holds no metadata of cmdgen"),
        (("inspect", cut), 1, "cut.safetensors: not a readable safetensors file"),
        (("inspect", no), 3, "no.mp4"),
    ):
        result = cmdgen(*command)
        assert (result.code, result.out) == (code, ""), (command, result)
        assert says in result.err and result.err.count("\n") == 1, (command, result.err)
    assert not out.exists() and not mp4.exists()


def test_a_vae_that_cannot_encode_is_named(cmdgen, tiny_model, video, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tiny"
    shutil.copytree(tiny_model, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if not k.startswith("encoder.")}, weights)
    result = cmdgen("encode", video, "-o", tmp_path / "a.safetensors", "--model", folder)
    assert result.code == 1
    assert f"{weights}: tensor encoder." in result.err and "is missing" in result.err


def test_latents_of_other_weights_are_noted(cmdgen, tiny_model, latents, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    model = load_pipeline(tiny_model)
    with torch.no_grad():
        model.autoencoder.embed_content.weight.mul_(2)
    model.autoencoder.save_pretrained(other / "autoencoder")
    decode = ("decode", latents, "--overwrite", "-o", tmp_path / "a.mp4", "--model")
    result = cmdgen(*decode, other)
    assert result.code == 0
    assert f"note: {latents} was made with other weights, of 'tiny'\n" in result.err
    assert "other weights" not in cmdgen(*decode, tiny_model).err


def test_inspect_prints_what_files_say(cmdgen, tiny_model, latents, tmp_path):
    path = tmp_path / "a.mp4"
    cmdgen("decode", latents, "-o", path, "--model", tiny_model)
    for file in (path, latents):
        report = cmdgen("inspect", file, "--json")
        assert (report.code, report.err) == (0, "")
        written = json.loads(report.out)
        tensors = written.pop("tensors", None)
        assert written == read_latents(latents).metadata
        lines = cmdgen("inspect", file).out.splitlines()
        assert f"prompt {PROMPT}" in [" ".join(line.split()) for line in lines]
    assert tensors == {"content": [8, 8, 12], "motion": [8, 4, 10], "dtype": "float32"}


def test_a_stranger_s_metadata_does_not_reach_the_terminal_as_it_is(cmdgen, tmp_path):
    from cmdgen.latents import Latents

    path = tmp_path / "a.safetensors"
    evil = {"prompt": "\x1b]0;owned\x07\u202e", "\x1b[2J": 1}
    # a file's JSON may escape what is no Unicode
    save_latents(path, Latents(torch.zeros(8, 2, 4), torch.zeros(8, 2, 4), 8, {"evil": "EVIL"}))
    content = path.read_bytes()
    escaped = json.dumps(evil).encode().replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    old = json.dumps({"evil": "EVIL", "fps": 8}).encode().replace(b'"', b'\\"')
    assert old in content
    new = content.replace(old, escaped[:-1] + b', \\"fps\\": 8}')
    length = int.from_bytes(content[:8], "little") + len(new) - len(content)
    path.write_bytes(length.to_bytes(8, "little") + new[8:])
    result = cmdgen("inspect", path)
    assert result.code == 0
    assert r"\x1b]0;owned\x07\u202e" in result.out and r"\x1b[2J" in result.out
    assert all(letter.isprintable() for letter in result.out.replace("\n", ""))
    assert json.loads(cmdgen("inspect", path, "--json").out)["prompt"] == evil["prompt"]


def test_stdout_gets_the_video_and_nothing_else(streamed, tiny_model, latents, tmp_path):
    path = tmp_path / "a.y4m"
    decode = ("decode", latents, "--model", tiny_model, "-o")
    code, out, _ = streamed(*decode, "-")
    assert code == 0
    assert streamed(*decode, path)[:2] == (0, f"{path}\n".encode())
    assert out == path.read_bytes()
    assert read_video(path)[0].shape == (4, 32, 48, 3)
