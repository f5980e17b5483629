"""The whole job with the model that ships in the package."""

import re
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest

from cmdgen.store.find import find_model
from cmdgen.store.parts import read_model
from cmdgen.video.read import read_metadata, read_video

PROMPTS = ("a corgi swimming", "a rocket flying in space")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A file for each prompt, made by the command and its defaults."""
    folder = tmp_path_factory.mktemp("mini")
    paths = []
    for i, prompt in enumerate(PROMPTS):
        path = folder / f"{i}.mp4"
        command = [sys.executable, "-m", "cmdgen", "sample", prompt, "-o", str(path), "--seed", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
        assert "never seen" not in done.stderr
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def clips(videos):
    return [read_video(path)[0].astype(float) for path in videos]


def test_video_is_sixteen_frames_of_h264_at_the_size_of_the_model(videos, clips):
    mini = read_model(find_model("mini"))
    for path, clip, prompt in zip(videos, clips, PROMPTS, strict=True):
        assert clip.shape == (16, mini.height, mini.width, 3)
        assert read_metadata(path)["prompt"] == prompt
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)]
        about = subprocess.run(command, capture_output=True, text=True).stderr
        assert re.search(rf"Video: h264 .*yuv420p.* {mini.width}x{mini.height}.* {mini.fps} fps", about)


def test_video_moves(clips):
    for clip in clips:
        change = np.abs(clip - clip[:1]).max(axis=3)
        assert (change > 24).mean(axis=(1, 2)).max() > 0.02


def test_video_is_a_picture_and_not_noise(clips):
    for clip in clips:
        assert clip.std(axis=(1, 2)).mean() > 10
        for shifted in (clip[:, 1:] - clip[:, :-1], clip[:, :, 1:] - clip[:, :, :-1]):
            # of independent pixels this ratio is 2
            assert shifted.var() / clip.var(axis=(1, 2)).mean() < 0.3


def test_prompts_make_different_videos(clips):
    assert np.abs(clips[0] - clips[1]).mean() > 15


def test_swimming_happens_in_water_and_space_is_dark(clips):
    swimming, space = (clip.mean(axis=(0, 1, 2)) for clip in clips)
    assert swimming[2] > swimming[0]
    assert space.mean() < swimming.mean()
