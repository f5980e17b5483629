import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from cmdgen.cli.app import main
from cmdgen.config import SampleConfig
from cmdgen.pipeline import TextToVideo
from cmdgen.video.read import read_metadata, read_video

PROMPT = "a dog swimming in the ocean"


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cmdgen(capsys):
    """Runs the command in this process."""

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return Result(end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def broken_model(tiny_model, tmp_path_factory):
    """The tiny model with weights that are not."""
    folder = tmp_path_factory.mktemp("broken") / "tiny"
    shutil.copytree(tiny_model, folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"\xff" * 100)
    return folder


def test_video_is_written_with_its_path_on_stdout_and_all_else_on_stderr(
    cmdgen, tiny_model, tmp_path
):
    path = tmp_path / "out.mp4"
    result = cmdgen("sample", PROMPT, "-o", path, "--model", tiny_model, "--seed", 7)
    assert result.code == 0
    assert result.out == f"{path}\n"
    assert "seed 7\n" in result.err
    frames, fps = read_video(path)
    assert frames.shape == (4, 32, 48, 3)
    assert fps == 8
    metadata = read_metadata(path)
    assert metadata["prompt"] == PROMPT
    assert metadata["seed"] == metadata["content_seed"] == metadata["motion_seed"] == 7
    assert list(tmp_path.iterdir()) == [path]


def test_a_png_gets_the_content_frame_with_its_settings(cmdgen, tiny_model, tmp_path):
    path = tmp_path / "still.png"
    result = cmdgen("sample", PROMPT, "-o", path, "--model", tiny_model, "--seed", 7)
    assert (result.code, result.out) == (0, f"{path}\n")
    clip = TextToVideo.load(tiny_model).sample(PROMPT, SampleConfig(seed=7))
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), clip.content)
    metadata = read_metadata(path)
    assert (metadata["prompt"], metadata["content_seed"], metadata["frames"]) == (PROMPT, 7, 1)
    assert list(tmp_path.iterdir()) == [path]
    result = cmdgen("sample", PROMPT, "-o", path, "--model", tiny_model, "--frames", 4)
    assert result.code == 2
    assert "still.png holds one frame, not 4: give the name of an mp4" in result.err


def test_options_reach_the_video(cmdgen, tiny_model, tmp_path):
    path = tmp_path / "out.mp4"
    options = {
        **{"seed": 1, "content-seed": 2, "motion-seed": 3, "steps": 3, "motion-steps": 4},
        **{"sampler": "ddim", "guidance": 2.5, "motion-guidance": 1.5, "negative": "a car"},
        **{"frames": 6, "size": "32x16", "fps": 12, "dtype": "bfloat16", "device": "cpu"},
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = cmdgen("sample", PROMPT, "-o", path, "--model", tiny_model, *flags)
    assert result.code == 0
    frames, fps = read_video(path)
    assert frames.shape == (6, 16, 32, 3)
    assert fps == 12
    metadata = read_metadata(path)
    expected = {name.replace("-", "_"): value for name, value in options.items()}
    del expected["size"]
    assert {name: metadata[name] for name in expected} == expected
    assert "note: tiny was trained at 48x32" in result.err
    assert "note: tiny was trained on 4 frames" in result.err


def test_little_memory_gives_the_same_video(cmdgen, tiny_model, tmp_path):
    sample = ("sample", PROMPT, "--model", tiny_model, "--seed", 7, "-o")
    assert cmdgen(*sample, tmp_path / "a.mp4").code == 0
    # less than whole frames take: 0.4 MB
    assert cmdgen(*sample, tmp_path / "b.mp4", "--max-memory", "0.2MiB").code == 0
    videos = [read_video(tmp_path / name)[0].astype(int) for name in ("a.mp4", "b.mp4")]
    # frames differ by a level here and there: the encoder may then choose another way for a block
    assert np.abs(videos[0] - videos[1]).mean() < 1
    assert read_metadata(tmp_path / "a.mp4") == read_metadata(tmp_path / "b.mp4")


def test_reported_random_seed_gives_the_same_frames_again(cmdgen, tiny_model, tmp_path):
    sample = ("sample", PROMPT, "--model", tiny_model, "-o")
    first = cmdgen(*sample, tmp_path / "a.mp4")
    seed = re.search(r"^seed (\d+)$", first.err, re.MULTILINE)[1]
    cmdgen(*sample, tmp_path / "b.mp4", "--seed", seed)
    other = cmdgen(*sample, tmp_path / "c.mp4")
    videos = [read_video(tmp_path / f"{name}.mp4")[0] for name in "abc"]
    assert np.array_equal(videos[0], videos[1])
    assert f"seed {seed}\n" not in other.err
    assert not np.array_equal(videos[0], videos[2])


def test_words_never_seen_and_a_prompt_too_long_are_noted_in_a_line_each(
    cmdgen, tiny_model, tmp_path
):
    sample = ("sample", "-o", tmp_path / "a.mp4", "--model", tiny_model)
    assert "note" not in cmdgen(*sample, PROMPT).err
    result = cmdgen(*sample, "a Zebra, a dog and a zebra")
    assert "note: tiny has never seen: zebra, and\n" in result.err
    result = cmdgen(*sample, "a dog " * 20)
    assert "too long" in result.err
    assert result.code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["  "], "the prompt is empty"),
        (["a \udcff dog"], "not valid UTF-8"),
        (["a dog", "--negative", "\udcff"], "not valid UTF-8"),
        (["a dog", "--size", "33x32"], "multiples of 16, such as 32x32"),
        (["a dog", "--size", "0x32"], "width 0 is not at least 1"),
        (["a dog", "--size", "big"], "'big' is not WIDTHxHEIGHT, such as"),
        (["a dog", "--frames", "3"], "frames 3 is neither 1 nor a multiple of 2"),
        (["a dog", "--steps", "0"], "steps 0 is not at least 1"),
        (["a dog", "--guidance-interval", "some"], "'some' is not LOW-HIGH, such as 0.1-0.8"),
        (["a dog", "--guidance-interval", "0.8-0.1"], "0.8-0.1 is not within 0-1"),
        (["a dog", "--steps", "many"], "'--steps'"),
        (["a dog", "--motion-steps", "2000"], "not between 1 and 1000"),
        (["a dog", "--guidance", "nan"], "guidance nan is not between 0 and 100"),
        (["a dog", "--fps", "0"], "fps 0 is not at least 1"),
        (["a dog", "--seed", "-1"], "seed -1 is not between 0 and"),
        (["a dog", "--sampler", "euler"], "not one of ddim, ddpm, dpm++"),
        (["a dog", "--device", "tpu"], "not one of auto, cpu"),
        (["a dog", "--dtype", "int8"], "not one of auto, float32"),
        (["a dog", "--model", "nano"], "unknown model 'nano'"),
        (["a dog", "-o", "out.avi"], "must end in .mp4"),
        (["a dog", "-o", "none/out.mp4"], "there is no folder"),
        (["a dog", "-o", "folder.mp4"], "is a folder"),
        (["a dog", "-o", "a" * 300 + ".mp4"], "too long"),
        (["a dog", "--max-memory", "4"], "'4' is not a number of MB, MiB, GB or GiB"),
        (["a dog", "--max-memory", "0GB"], "max memory 0 is not at least 1"),
        (["a dog", "--max-memory", "0.01MB"], "4 frames of 48x32 takes at least 1 MB"),
        (["a dog", "--speed", "9"], "--speed"),
        (["a dog", "in the sky"], "in the sky"),
        ([], "PROMPT"),
    ],
)
def test_bad_input_is_one_line_before_any_weights_load(
    cmdgen, broken_model, tmp_path, arguments, says
):
    (tmp_path / "folder.mp4").mkdir()
    output = tmp_path / "out.mp4"
    if "-o" in arguments:
        output = tmp_path / arguments.pop()
        arguments.pop()
    # the weights are unreadable: had they been read, that would be the error
    if "--model" not in arguments:
        arguments = [*arguments, "--model", broken_model]
    result = cmdgen("sample", *arguments, "-o", output)
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(r"error: .+\n", result.err)
    assert says in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_missing_output_is_one_line(cmdgen):
    result = cmdgen("sample", "a dog")
    assert result.code == 2
    assert re.fullmatch(r"error: .*--output.*\n", result.err)


def test_output_that_may_not_be_written_is_refused(cmdgen, broken_model):
    result = cmdgen("sample", PROMPT, "-o", "/proc/out.mp4", "--model", broken_model)
    assert (result.code, result.out) == (2, "")


def test_unreadable_weights_are_one_line_and_leave_no_file(cmdgen, broken_model, tmp_path):
    result = cmdgen("sample", PROMPT, "-o", tmp_path / "out.mp4", "--model", broken_model)
    assert result.code == 1
    assert result.out == ""
    error = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "model.safetensors" in error[0]
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_line_and_leaves_no_file(cmdgen, tiny_model, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        result = cmdgen("sample", PROMPT, "-o", tmp_path / "out.mp4", "--model", tiny_model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.code == 1
    assert result.out == ""
    assert "was not written" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_ends_at_once_and_leaves_no_file(tiny_model, tmp_path, number, code):
    command = [sys.executable, "-m", "cmdgen", "sample", PROMPT, "-o", str(tmp_path / "a.mp4")]
    command += ["--model", str(tiny_model), "--steps", "1000", "--motion-steps", "1000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stderr.readline().startswith("seed ")
    time.sleep(0.5)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, ""), err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_help_names_every_option_and_exit_code(cmdgen):
    result = cmdgen("sample", "--help")
    assert result.code == 0
    for option in ("--motion-steps", "--content-seed", "--negative", "--dtype"):
        assert option in result.out
    assert "Exit codes" in result.out
    assert cmdgen("--version").out.startswith("cmdgen ")
