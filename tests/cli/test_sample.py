import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from cmdgen.cli import batch
from cmdgen.cli.inputs import InputFiles
from cmdgen.cli.jobs import Batching, Entry, Job, make_jobs, read_entries
from cmdgen.cli.progress import Say
from cmdgen.config import TinyConfig
from cmdgen.evaluation.profile import Limits
from cmdgen.models.tiny_vae import TinyVae
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.load import load_pipeline
from cmdgen.request import Request
from cmdgen.video import write
from cmdgen.video.read import read_metadata, read_video
from tests.cli.conftest import PROMPT


@pytest.fixture
def refused(cmdgen, broken_model):
    """Runs `cmdgen sample` with weights that cannot be read: had they been, that were the error."""
    return lambda *arguments: cmdgen("sample", "--model", broken_model, *arguments)


@pytest.fixture
def jobs(tmp_path):
    """Writes the lines of a file of jobs."""

    def write_lines(*lines: str):
        path = tmp_path / "jobs.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write_lines


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def broken_model(tiny_model, tmp_path_factory):
    """The tiny model with weights that are not."""
    folder = tmp_path_factory.mktemp("broken") / "tiny"
    shutil.copytree(tiny_model, folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"\xff" * 100)
    return folder


def test_video_is_written_with_its_path_on_stdout_and_all_else_on_stderr(sample, tmp_path):
    path = tmp_path / "out.mp4"
    result = sample(PROMPT, "-o", path, "--seed", 7)
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


def test_a_png_gets_the_content_frame_with_its_settings(sample, tiny_model, tmp_path):
    path = tmp_path / "still.png"
    result = sample(PROMPT, "-o", path, "--seed", 7)
    assert (result.code, result.out) == (0, f"{path}\n")
    clip = load_pipeline(tiny_model).sample(PROMPT, seed=7)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), clip.content)
    metadata = read_metadata(path)
    assert (metadata["prompt"], metadata["content_seed"], metadata["frames"]) == (PROMPT, 7, 1)
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    result = sample(PROMPT, "-o", path, "--frames", 4)
    assert result.code == 2
    assert "still.png holds one frame, not 4: give the name of a video" in result.err


def test_options_reach_the_video(sample, tmp_path):
    path = tmp_path / "out.mp4"
    options = {
        **{"seed": 1, "content-seed": 2, "motion-seed": 3, "steps": 3, "motion-steps": 4},
        **{"sampler": "ddim", "guidance": 2.5, "motion-guidance": 1.5, "negative": "a car"},
        **{"frames": 6, "size": "32x16", "fps": 12, "dtype": "bfloat16", "device": "cpu"},
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = sample(PROMPT, "-o", path, *flags)
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


def test_little_memory_gives_the_same_video(sample, tmp_path):
    options = (PROMPT, "--seed", 7, "-o")
    assert sample(*options, tmp_path / "a.mp4").code == 0
    # less than whole frames take: 0.4 MB
    assert sample(*options, tmp_path / "b.mp4", "--max-memory", "0.2MiB").code == 0
    videos = [read_video(tmp_path / name)[0].astype(int) for name in ("a.mp4", "b.mp4")]
    # frames differ by a level here and there: the encoder may then choose another way for a block
    assert np.abs(videos[0] - videos[1]).mean() < 1
    whole, sliced = (read_metadata(tmp_path / name) for name in ("a.mp4", "b.mp4"))
    assert sliced == whole | {"max_memory": "209715B"}


def test_reported_random_seed_gives_the_same_frames_again(sample, tmp_path):
    options = (PROMPT, "-o")
    first = sample(*options, tmp_path / "a.mp4")
    seed = re.search(r"^seed (\d+)$", first.err, re.MULTILINE)[1]
    sample(*options, tmp_path / "b.mp4", "--seed", seed)
    other = sample(*options, tmp_path / "c.mp4")
    videos = [read_video(tmp_path / f"{name}.mp4")[0] for name in "abc"]
    assert np.array_equal(videos[0], videos[1])
    assert f"seed {seed}\n" not in other.err
    assert not np.array_equal(videos[0], videos[2])


def test_words_never_seen_and_a_prompt_too_long_are_noted_in_a_line_each(sample, tmp_path):
    assert "note" not in sample("-o", tmp_path / "a.mp4", PROMPT).err
    result = sample("-o", tmp_path / "b.mp4", "a Zebra, a dog and a zebra")
    assert "note: unknown words for tiny: zebra, and\n" in result.err
    result = sample("-o", tmp_path / "c.mp4", "a dog " * 20)
    assert "reads only the start of this long prompt" in result.err
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
        (["a dog", "--steps", "many"], "steps 'many' is not a whole number"),
        (["a dog", "--motion-steps", "2000"], "not between 1 and 1000"),
        (["a dog", "--guidance", "nan"], "guidance nan is not between 0 and 100"),
        (["a dog", "--fps", "0"], "fps 0 is not at least 1"),
        (["a dog", "--seed", "-1"], "seed -1 is not between 0 and"),
        (["a dog", "--sampler", "euler"], "not one of ddim, ddpm, dpm++"),
        (["a dog", "--device", "tpu"], "not one of auto, cpu"),
        (["a dog", "--dtype", "int8"], "not one of auto, float32"),
        (["a dog", "-o", "out.avi"], "must end in .mp4"),
        (["a dog", "-o", "none/out.mp4"], "there is no folder"),
        (["a dog", "-o", "folder.mp4"], "is a folder"),
        (["a dog", "-o", "a" * 300 + ".mp4"], "too long"),
        (["a dog", "--max-memory", "4"], "'4' is not a number of MB, MiB, GB or GiB"),
        (["a dog", "--max-memory", "0GB"], "--max-memory 0 is not at least 1"),
        (["a dog", "--max-memory", "0.01MB"], "4 frames of 48x32 takes at least 1 MB"),
        (["a dog", "--speed", "9"], "--speed"),
        (["a dog", "in the sky"], "in the sky"),
        ([], "PROMPT"),
    ],
)
def test_bad_input_is_one_line_before_any_weights_load(cmdgen, broken_model, tmp_path, arguments, says):
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
    assert names(tmp_path) == ["folder.mp4"]


def test_missing_output_is_one_line(cmdgen):
    result = cmdgen("sample", "a dog")
    assert result.code == 2
    assert re.fullmatch(r"error: .*--output.*\n", result.err)


def test_output_that_may_not_be_written_is_refused(refused):
    result = refused(PROMPT, "-o", "/proc/out.mp4")
    assert (result.code, result.out) == (2, "")


def test_unreadable_weights_are_one_line_and_leave_no_file(refused, tmp_path):
    result = refused(PROMPT, "-o", tmp_path / "out.mp4")
    assert result.code == 1
    assert result.out == ""
    error = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "model.safetensors" in error[0]
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.mp4", "out.safetensors"])
def test_full_disk_is_one_line_and_leaves_no_file(sample, tmp_path, name):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        result = sample(PROMPT, "-o", tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.code == 5
    assert result.out == ""
    assert "was not written" in result.err
    assert not list(tmp_path.iterdir())


def start(tiny_model, *arguments: object, **pipes) -> subprocess.Popen:
    """Run `cmdgen sample` in another process."""
    command = [sys.executable, "-m", "cmdgen", "sample", "--model", tiny_model, *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(argument) for argument in command], **streams, **pipes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_run_ends_at_once_and_leaves_no_file(sample, tmp_path, monkeypatch, number, code):
    monkeypatch.setattr(CmdPipeline, "sample_motion", lambda *_: os.kill(os.getpid(), number))
    handlers = {name: signal.signal(name, signal.SIG_DFL) for name in (number, signal.SIGINT)}
    try:
        result = sample(PROMPT, "-o", tmp_path / "a.mp4")
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert (result.code, result.out) == (code, "")
    assert "content 2/2" in result.err and "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


def test_interrupted_process_ends_at_once_and_leaves_no_file(tiny_model, tmp_path):
    many = ("--steps", 1000, "--motion-steps", 1000)
    with start(tiny_model, PROMPT, "-o", tmp_path / "a.mp4", *many) as process:
        assert process.stderr.readline().startswith(b"seed ")
        time.sleep(0.5)
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, b""), err
    assert b"Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def known_speed(monkeypatch):
    """A machine whose speed takes no time to measure."""
    limits = Limits(flops_per_second=1e9, bytes_per_second=1e9)
    monkeypatch.setattr("cmdgen.evaluation.profile.measure_limits", lambda *_: limits)


@pytest.fixture
def stdin(tmp_path):
    """Gives a command bytes on its standard input."""
    saved = os.dup(0)

    def give(data: bytes) -> None:
        path = tmp_path / ".stdin"
        path.write_bytes(data)
        with path.open("rb") as file:
            os.dup2(file.fileno(), 0)
        path.unlink()

    yield give
    os.dup2(saved, 0)
    os.close(saved)


def raw(path) -> np.ndarray:
    """A file of raw frames of the tiny model."""
    return np.fromfile(path, np.uint8).reshape(-1, 32, 48, 3)


def test_lines_of_a_file_are_made_in_order_and_those_that_cannot_be_are_named(jobs, sample, tmp_path):
    file = jobs(
        *("# three of them", "a dog swimming", '{"prompt": "a car", "steps": "1"}', ""),
        '{"prompt": "a red car driving", "steps": 1, "seed": 5, "output": "car.mp4"}',
        *('{"prompt": "a dog", "size": "33x32"}', "two birds"),
    )
    output = tmp_path / "{index:02d}-{slug}-{seed}.mp4"
    result = sample("-f", file, "-o", output, "--seed", 3, "--json")
    assert result.code == 6
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [(record["index"], record["line"]) for record in records] == [*((1, 2), (2, 3), (3, 5), (4, 6), (5, 7))]
    files = ["01-a-dog-swimming-3.mp4", "car.mp4", "05-two-birds-3.mp4"]
    made = [record for record in records if "error" not in record]
    assert [record["output"] for record in made] == [str(tmp_path / name) for name in files]
    assert names(tmp_path) == sorted([*files, "jobs.txt"])
    first, _, second, _, _ = records
    seconds = first.pop("seconds")
    assert seconds > 0
    assert first == {
        **{"index": 1, "line": 2, "prompt": "a dog swimming", "seed": 3},
        **{"output": made[0]["output"], "frames": 4, "width": 48, "height": 32, "fps": 8},
    }
    assert (read_metadata(tmp_path / "car.mp4")["steps"], second["seed"]) == (1, 5)
    assert records[1]["error"] == "steps '1' is not a whole number"
    # what is wrong is said before anything is made, in a line each
    errors = [line for line in result.err.splitlines() if line.startswith("error")]
    assert errors[0] == "error: line 3: steps '1' is not a whole number"
    assert errors[1].startswith("error: line 6: size 33x32")
    assert errors[2] == "error: 2 of 5 clips were not made"
    assert result.err.index("error: line 6") < result.err.index("load")


def test_fail_fast_ends_with_the_first_that_cannot_be_made(jobs, refused, tmp_path):
    file = jobs("a dog", '{"prompt": "a cat", "steps": 0}')
    options = ("-f", file, "-o", tmp_path / "{index}.mp4")
    result = refused(*options, "--fail-fast")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: line 2: steps 0 is not at least 1\n"
    # of weights that no job can do without, each would say the same
    result = refused(*options)
    assert (result.code, result.out) == (1, "")
    assert names(tmp_path) == ["jobs.txt"]


def test_clips_of_a_batch_are_as_they_would_be_alone(jobs, sample, tmp_path):
    file = jobs("a dog swimming", "a red car", '{"prompt": "two birds", "steps": 1}', "a dog")
    options = ("-f", file, "--seed", 4, "--num", 2)
    assert sample(*options, "-o", tmp_path / "alone-{index}.rgb").code == 0
    calls = []
    run = CmdPipeline.run

    def watch(self, plans, *rest, **options):
        calls.append(len(plans))
        return run(self, plans, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CmdPipeline, "run", watch)
        assert sample(*options, "-o", tmp_path / "batch-{index}.rgb", "--batch", 3).code == 0
    # in order, so those that differ in steps part the others
    assert calls == [3, 1, 2, 2]
    for index in range(1, 9):
        alone, together = (raw(tmp_path / f"{how}-{index}.rgb").astype(int) for how in ("alone", "batch"))
        # rounding of larger matrix products
        assert np.abs(alone - together).max() <= 1
        if index % 2:
            assert not np.array_equal(alone, raw(tmp_path / f"alone-{index + 1}.rgb"))


def test_a_piped_prompt_is_one(sample, stdin, tmp_path):
    stdin(b"a dog swimming\n")
    result = sample("-o", tmp_path / "a.mp4", "--seed", 1)
    assert (result.code, result.out) == (0, f"{tmp_path / 'a.mp4'}\n")
    assert read_metadata(tmp_path / "a.mp4")["prompt"] == "a dog swimming"
    stdin(b"\n")
    result = sample("-o", tmp_path / "b.mp4")
    assert result.code == 2
    assert "no prompt: give PROMPT, pipe it in" in result.err
    stdin(b"a\x1bdog")
    result = sample("-o", tmp_path / "b.mp4")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: the prompt holds the control character U+001B\n"


def test_a_pipe_of_several_prompts_starts_at_once(tiny_model, tmp_path):
    few = ("--steps", 1, "--motion-steps", 1, "--seed", 1)
    with start(tiny_model, "-o", tmp_path / "{line}.gif", *few, stdin=subprocess.PIPE) as process:
        process.stdin.write(b"a dog\n")
        process.stdin.flush()
        # stdin is open: there may be more
        assert process.stdout.readline() == f"{tmp_path / '1.gif'}\n".encode()
        out, _ = process.communicate(b"a car\n", timeout=60)
    assert (process.returncode, out) == (0, f"{tmp_path / '2.gif'}\n".encode())


def test_an_endless_pipe_takes_no_more_memory_with_time(model, monkeypatch):
    monkeypatch.setattr(batch, "_MAX_NAMES", 50)
    monkeypatch.setattr("cmdgen.pipelines.base._MAX_PLANS", 20)
    request, say = Request(output="{index}.mp4", steps=1), Say(quiet=True)
    entries = (Entry(line, {"prompt": "a dog", "fps": line % 200 + 1}) for line in range(1, 1000))
    made = batch.Batch(model, Batching(), say, InputFiles(request), alone=False, total=None)
    checked = list(made.check(make_jobs(entries, request, num=1)))
    assert all(isinstance(job, Job) for job in checked) and len(checked) == 999
    assert len(made.targets) <= 50 and len(model._plans) <= 20


def test_many_prompts_take_few_calls_each_and_folders_are_looked_at_once(model, tmp_path, monkeypatch):
    asked, calls = [], Counter()
    real = write.tempfile.TemporaryFile
    monkeypatch.setattr(write.tempfile, "TemporaryFile", lambda **at: asked.append(at["dir"]) or real(**at))
    count, request = 200, Request(output=str(tmp_path / "{index:05d}-{slug}.mp4"), seed=1)

    def check(count):
        lines = b"".join(b"a red dog swims in the ocean %d\n" % number for number in range(count))
        made = batch.Batch(model, Batching(), Say(quiet=True), InputFiles(request), alone=False, total=count)
        return made.check(make_jobs(read_entries(io.BytesIO(lines)), request, num=1))

    # what is made once
    check(2)
    sys.setprofile(lambda frame, event, _: calls.update([event]))
    try:
        checked = check(count)
    finally:
        sys.setprofile(None)
    # twice what it takes
    assert calls["call"] < 220 * count
    assert len(checked) == count and all(isinstance(job, Job) for job in checked)
    assert asked == [tmp_path]


def test_two_clips_of_one_name_are_refused_before_any_is_made(jobs, refused, tmp_path):
    file = jobs("a dog", "a car", "a dog")
    options = ("-f", file, "-o")
    result = refused(*options, tmp_path / "{slug}.mp4")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: line 3: .*a-dog\.mp4 is the name of a clip of line 1 already: .*\n", result.err)
    result = refused("a dog", "--num", 2, "-o", "a.mp4")
    assert (result.code, result.out) == (2, "")


def test_what_is_there_is_kept_and_may_be_skipped(jobs, sample, tmp_path):
    file = jobs("a dog", "a car")
    (tmp_path / "a-dog.rgb").write_bytes(b"mine")
    options = ("-f", file, "-o", tmp_path / "{slug}.rgb")
    result = sample(*options)
    assert (result.code, result.out) == (6, f"{tmp_path / 'a-car.rgb'}\n")
    assert "line 1: " in result.err and "exists: give another name" in result.err
    (tmp_path / "a-car.rgb").unlink()
    result = sample(*options, "--skip-existing", "--json")
    assert result.code == 0
    skipped, made = (json.loads(line) for line in result.out.splitlines())
    assert skipped["skipped"] is True and "skipped" not in made
    assert (tmp_path / "a-dog.rgb").read_bytes() == b"mine"
    again = sample(*options, "--skip-existing")
    assert again.out == "".join(f"{tmp_path / name}.rgb\n" for name in ("a-dog", "a-car"))
    assert "load" not in again.err
    assert sample(*options, "--overwrite").code == 0
    assert raw(tmp_path / "a-dog.rgb").shape == (4, 32, 48, 3)
    result = sample(*options[:-1], tmp_path / "{seed}.mp4", "--skip-existing")
    assert result.code == 2
    assert "finds nothing: give --seed" in result.err
    result = sample(*options, "--overwrite", "--skip-existing")
    assert result.code == 2
    # what a sidecar tells of is not there
    (tmp_path / "a-dog.rgb").rename(tmp_path / "a-dog.rgb.json")
    result = sample(*options, "--skip-existing", "--sidecar")
    assert (result.code, result.out) == (6, f"{tmp_path / 'a-car.rgb'}\n")
    assert "a-dog.rgb.json exists: give another name" in result.err


def test_a_sequence_is_there_when_all_its_frames_are(jobs, sample, tmp_path):
    options = ("-f", jobs("a dog"), "-o", tmp_path / "o/f%02d.png", "--skip-existing", "--seed", 1, "--sidecar")
    assert sample(*options).code == 0
    folder = tmp_path / "o"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) == 5
    for gone in (("f03.png",), ("f01.png", "f02.png", "f04.png"), ("f%02d.png.json",), ("f01.png", "f%02d.png.json")):
        for name in gone:
            (folder / name).unlink()
        # of another clip: never beside new frames
        (folder / "f09.png").write_bytes(b"old")
        result = sample(*options)
        assert (result.code, "exists already" in result.err) == (0, False)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    result = sample(*options)
    assert (result.code, "exists already" in result.err) == (0, True)


@pytest.mark.parametrize("suffix", ["gif", "png", "safetensors", "rgb"])
def test_every_format_has_a_sidecar_that_is_made_anew_with_the_clip(sample, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    for seed in (1, 2):
        assert sample(PROMPT, "-o", path, "--seed", seed, "--sidecar", "--overwrite").code == 0
        sidecar = json.loads(path.with_name(f"a.{suffix}.json").read_text())
        assert sidecar["seed"] == seed
        assert sidecar == read_metadata(path)


def test_a_clip_with_a_sidecar_is_there_when_both_are(jobs, sample, tmp_path):
    clip, sidecar = tmp_path / "1.gif", tmp_path / "1.gif.json"
    options = ("-f", jobs("a dog"), "-o", tmp_path / "{index}.gif", "--skip-existing")
    assert sample(*options).code == 0
    made = clip.read_bytes()
    # from what the clip holds: its seed was random
    assert sample(*options, "--sidecar").code == 0
    assert clip.read_bytes() == made
    assert json.loads(sidecar.read_text()) == read_metadata(clip)
    clip.unlink()
    assert sample(*options, "--sidecar").code == 0
    assert json.loads(sidecar.read_text()) == read_metadata(clip)
    sidecar.unlink()
    # these are none of ours
    clip.write_bytes(b"GIF89a mine")
    result = sample(*options, "--sidecar")
    assert result.code == 6 and "1.gif exists: give another name" in result.err
    assert (clip.read_bytes(), sidecar.exists()) == (b"GIF89a mine", False)


@pytest.mark.parametrize("suffix", ["gif", "png", "safetensors"])
def test_a_file_that_another_process_made_meanwhile_is_kept(jobs, sample, tmp_path, monkeypatch, suffix):
    def made_meanwhile(*_):
        (tmp_path / f"1.{suffix}").write_bytes(b"theirs")

    monkeypatch.setattr(batch.Batch, "_note", made_meanwhile)
    options = ("-f", jobs("a dog", "a car"), "-o", tmp_path / f"{{index}}.{suffix}", "--seed", 1)
    result = sample(*options, "--skip-existing")
    assert result.code == 0 and f"1.{suffix} exists already" in result.err
    assert result.out == "".join(f"{tmp_path / str(index)}.{suffix}\n" for index in (1, 2))
    assert (tmp_path / f"1.{suffix}").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    "outputs",
    [
        ("f%d.png", "f%01d.png"),
        ("f%02d.png", "f03.png"),
        ("f1%d.png", "f%02d.png"),
        ("a.gif", "./a.gif"),
        ("real/a.gif", "linked/a.gif"),
        ("real/a.gif", "alias.gif"),
        ("linked/f%d.png", "real/f2.png"),
    ],
)
def test_two_names_of_one_file_are_refused_with_the_line(jobs, refused, tmp_path, outputs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    (tmp_path / "alias.gif").symlink_to("real/a.gif")
    frames = [{"frames": 12} if "%" in name else {} for name in outputs]
    lines = [
        json.dumps({"prompt": "a dog", "output": name, **more}) for name, more in zip(outputs, frames, strict=True)
    ]
    result = refused("-f", jobs(*lines), "-o", "x.gif", "--overwrite")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: line 2: .* is the name of a clip of line 1 already: .*\n", result.err)


def test_the_output_of_a_line_is_never_stdout(jobs, refused):
    result = refused("-f", jobs("a dog", '{"prompt": "a dog", "output": "-"}'), "-o", "x.gif", "--json", "--dry-run")
    assert result.code == 6
    assert "error: line 2: output '-' of a job is not a relative path" in result.err


def test_a_template_that_is_none_is_refused_once(jobs, refused, tmp_path):
    file = jobs("a dog", "a car")
    result = refused("-f", file, "-o", tmp_path / "{x}.mp4")
    assert result.code == 2
    assert result.err.count("{x} is none of {index}") == 1


def test_names_from_prompts_stay_in_their_folder(jobs, sample, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    prompts = ["../../dog", "/etc/passwd", "a" * 400, "..", "con", "the {seed}", "a\\b:c*d"]
    file = jobs(*prompts)
    result = sample("-f", file, "-o", folder / "{slug}.rgb")
    assert result.code == 0
    assert names(folder) == sorted(
        f"{name}.rgb" for name in ("dog", "etc-passwd", "a" * 60, "clip", "con-", "the-seed", "a-b-c-d")
    )
    assert names(tmp_path) == ["in", "jobs.txt"]


@pytest.mark.parametrize("name", [b"\xff.mp4", b"\x1b[31m.gif", b"a\nb.webp", b"\xff%d.png"])
def test_a_name_of_any_bytes_comes_out_as_it_went_in(streamed, tiny_model, tmp_path, name):
    path = os.fsencode(tmp_path) + b"/" + name
    arguments = ("sample", PROMPT, "-o", os.fsdecode(path), "--model", tiny_model)
    assert streamed(*arguments)[:2] == (0, path + b"\n")
    code, out, _ = streamed(*arguments, "--overwrite", "--json")
    assert code == 0
    output = json.loads(out.decode())["output"]
    assert output.encode("utf-8", "surrogateescape") == path
    code, _, err = streamed(*arguments)
    assert code == 1 and all(letter.isprintable() for letter in err.replace("\n", ""))


def test_a_link_to_itself_is_no_name(refused, tmp_path):
    loop = tmp_path / "loop.mp4"
    loop.symlink_to(loop)
    kept = refused(PROMPT, "-o", loop)
    assert (kept.code, kept.err.count("\n")) == (1, 1)
    inside = refused(PROMPT, "-o", loop / "a.mp4")
    assert inside.code == 2 and "there is no folder" in inside.err


def test_a_calibration_that_never_ends_is_refused(refused, stdin, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    jobs = [{"prompt": "x", "rehash": 1, "rehash_file": file} for file in ("/dev/zero", "PIPE")]
    text = "\n".join(map(json.dumps, jobs)).replace("PIPE", str(tmp_path / "pipe.json"))
    stdin(text.encode())
    result = refused("-f", "-", "-o", tmp_path / "{line}.mp4")
    assert result.code == 6
    assert result.err.count(" is not a file\n") == 2


@pytest.mark.usefixtures("known_speed")
def test_folders_of_several_clips_are_made(jobs, sample, tmp_path):
    file = jobs(PROMPT, json.dumps({"prompt": PROMPT, "output": "own/b.rgb"}))
    options = ("-f", file, "-o", tmp_path / "new/clips/{line}.rgb")
    assert sample(*options, "--dry-run").code == 0
    assert not (tmp_path / "new").exists()
    assert sample(*options).code == 0
    clips = tmp_path / "new/clips"
    assert sorted(clips.rglob("*.rgb")) == [clips / "1.rgb", clips / "own/b.rgb"]
    # a file is no folder
    result = sample("-f", file, "-o", file / "new/{line}.rgb")
    assert result.code == 6
    assert "there is no folder" in result.err


def test_a_clip_that_cannot_be_written_harms_no_other(jobs, sample, tmp_path, monkeypatch):
    opened = write.open_video

    @contextmanager
    def fail_for_some(output):
        with opened(output) as put:

            def full(frames):
                raise write.EncoderError(f"{output.target} was not written: the disk is full")

            yield full if "car" in output.target else put

    monkeypatch.setattr("cmdgen.cli.batch.open_video", fail_for_some)
    file = jobs("a dog", "a car", "two birds")
    options = ("-f", file, "-o", tmp_path / "{slug}.rgb")
    result = sample(*options, "--batch", 3)
    assert result.code == 6
    assert "error: line 2: " in result.err and "the disk is full" in result.err
    assert result.out == "".join(f"{tmp_path / name}.rgb\n" for name in ("a-dog", "two-birds"))
    assert names(tmp_path) == ["a-dog.rgb", "jobs.txt", "two-birds.rgb"]


def test_a_batch_that_needs_too_much_memory_is_made_in_halves(sample, tmp_path, monkeypatch):
    run, calls = CmdPipeline.run, []

    def of_one(self, plans, *rest, **options):
        calls.append(len(plans))
        if len(plans) > 1:
            raise MemoryError
        return run(self, plans, *rest, **options)

    monkeypatch.setattr(CmdPipeline, "run", of_one)
    options = ("a dog", "--num", 3, "--batch", 3)
    result = sample(*options, "-o", tmp_path / "{index}.rgb")
    assert (result.code, calls) == (0, [3, 1, 2, 1, 1])
    assert names(tmp_path) == ["1.rgb", "2.rgb", "3.rgb"]


def test_clips_on_stdout_follow_one_another(jobs, streamed, tiny_model, tmp_path):
    file = jobs("a dog", "a car", '{"prompt": "a cat", "size": "32x32"}', "two birds")
    sample = ("sample", "-f", file, "--model", tiny_model, "--seed", 2, "--batch", 2, "-o")
    code, out, err = streamed(*sample, "-")
    assert code == 6
    assert "line 3: not as the first clip on stdout, 48x32 at 8 frames a second" in err
    header, _, rest = out.partition(b"\n")
    assert header.startswith(b"YUV4MPEG2 W48 H32 F8:1 ")
    assert len(rest) == 12 * (len(b"FRAME\n") + 48 * 32 * 3 // 2)
    code, out, err = streamed(*sample, "-", "--format", "raw", "-q")
    assert err.count("\n") == 2
    code, _, _ = streamed(*sample, tmp_path / "{line}.rgb")
    files = b"".join((tmp_path / f"{line}.rgb").read_bytes() for line in (1, 2, 4))
    assert out == files
    code, out, err = streamed(*sample, "-", "--format", "gif")
    assert (code, out) == (6, b"")
    assert "several clips cannot go to stdout as gif: use y4m, raw, mp4" in err


@pytest.mark.usefixtures("known_speed")
def test_stdout_is_the_video_alone(streamed, tiny_model):
    sample = ("sample", PROMPT, "--model", tiny_model, "--seed", 1, "-o", "-")
    code, out, err = streamed(*sample, "--format", "gif", "-v")
    assert (code, out[:6], err[:4]) == (0, b"GIF89a", "tiny")
    code, out, err = streamed(*sample, "--dry-run")
    assert (code, out) == (0, b"") and "seed 1" in err
    code, out, err = streamed(*sample, "--json")
    assert (code, out) == (2, b"")
    assert "--json and -o - both need stdout" in err


def test_jobs_of_a_pipe_start_before_it_ends_and_a_closed_stdout_ends_quietly(tiny_model):
    with start(tiny_model, "-f", "-", "-o", "-", stdin=subprocess.PIPE) as process:
        process.stdin.write(b"a dog\n")
        process.stdin.flush()
        # stdin is open, and the whole of a clip is there
        size = len(process.stdout.readline()) and 4 * (6 + 48 * 32 * 3 // 2)
        assert len(process.stdout.read(size)) == size
        process.stdin.write(b"a car\n")
        process.stdin.flush()
        assert process.stdout.read(6) == b"FRAME\n"
        process.stdout.close()
        process.stdin.write(b"a dog\n" * 100)
        process.stdin.close()
        err = process.stderr.read().decode()
        assert process.wait(60) == 141
    assert "Error" not in err and "error" not in err and "Exception" not in err


def test_like_makes_it_again_and_flags_win(sample, tmp_path):
    first, again = tmp_path / "first.mkv", tmp_path / "again.mkv"
    options = (
        "--seed 7 --motion-seed 8 --steps 4 --guidance 2.5 --size 32x32 --frames 6 --fps 12 "
        "--guidance-interval 0.1-1 --rehash 3 --rehash-policy uniform --max-memory 0.5MiB "
        "--codec ffv1 --sampler ddim --dtype float32"
    )
    assert sample(PROMPT, "-o", first, *options.split(), "--negative", "a car").code == 0
    like = ("--like", first, "-o")
    result = sample(*like, again)
    assert result.code == 0
    assert "note: " + str(first) not in result.err
    assert np.array_equal(read_video(first)[0], read_video(again)[0])
    before, after = read_metadata(first), read_metadata(again)
    assert (before["format"], before["codec"]) == ("mkv", "ffv1")
    assert (before.pop("rehash_policy"), after.pop("rehash_policy")) == ("uniform", "listed")
    assert before == after
    changed = sample(*like, tmp_path / "c.mp4", "--seed", 9, "--rehash", "off", "--fps", 6)
    assert changed.code == 0
    other = read_metadata(tmp_path / "c.mp4")
    assert (other["seed"], other["content_seed"], other["motion_seed"]) == (9, 9, 8)
    assert (other["fps"], other["steps"], "rehash" in other) == (6, 4, False)
    assert sample(*like, tmp_path / "d.png").code == 0
    assert read_metadata(tmp_path / "d.png")["frames"] == 1


def test_what_a_file_does_not_say_was_the_default_whatever_the_users_file_says(cmdgen, jobs, tiny_model, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        '[sample]\nseed = 5\ncontent_seed = 6\nnegative = "a car"\nguidance_interval = "0.1-1"\n'
        f'rehash = 1\nrehash_policy = "uniform"\ncrf = 40\nmodel = "{tiny_model}"\nsidecar = true\n'
    )
    first, again = tmp_path / "first.mp4", tmp_path / "again.mp4"
    sample = ("sample", "--model", tiny_model)
    assert cmdgen(*sample, PROMPT, "-o", first, "--seed", 7).code == 0
    sample = ("--config", config, *sample)
    result = cmdgen(*sample, "--like", first, "-o", again)
    assert result.code == 0, result.err
    assert again.read_bytes() == first.read_bytes()
    # what is no part of the clip is as the user likes it
    assert (tmp_path / "again.mp4.json").exists()


def test_like_knows_the_format_by_its_name_too(sample, tmp_path):
    first, again = tmp_path / "first.mp4", tmp_path / "again"
    assert sample(PROMPT, "-o", first, "--crf", 40).code == 0
    result = sample("--like", first, "-o", again, "--format", "mp4")
    assert result.code == 0, result.err
    assert again.read_bytes() == first.read_bytes()


def test_a_still_becomes_the_clip_that_it_is_of(sample, tmp_path):
    still, clip, both = (tmp_path / name for name in ("a.png", "a.mkv", "b.mkv"))
    assert sample("-o", still, PROMPT, "--seed", 7).code == 0
    assert sample("-o", clip, "--like", still).code == 0
    assert sample("-o", both, PROMPT, "--seed", 7).code == 0
    assert clip.read_bytes() == both.read_bytes()


FOREIGN = {"cmdgen": "9.9", "model": "mini", "prompt": "a dog", "seed": 1}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"prompt": "a dog"}, "does not say how cmdgen made it"),
        ({"cmdgen": 1, "prompt": "a dog"}, "does not say how cmdgen made it"),
        ({**FOREIGN, "model": "/etc"}, "was made by '/etc', which is not one of evdm, evdm-world, mini"),
        ({**FOREIGN, "model": ["mini"]}, "model ['mini'] is not text"),
        ({**FOREIGN, "steps": "5"}, "steps '5' is not a whole number"),
        ({**FOREIGN, "steps": 10**30}, "is not between"),
        ({**FOREIGN, "width": "64", "height": 64}, "size \"'64'x64\" is not WIDTHxHEIGHT"),
        ({**FOREIGN, "height": 64}, "size 'Nonex64' is not WIDTHxHEIGHT"),
        ({**FOREIGN, "guidance_interval": ["0", 1]}, "is not LOW-HIGH"),
        ({**FOREIGN, "rehash": [1]}, "rehash [1] is not text"),
        ({**FOREIGN, "rehash": {"content": ["/etc"]}}, "is neither off nor a number of steps"),
        ({**FOREIGN, "rehash": {"content": [0, 99], "cut": "layer"}}, "lists step 99 of content"),
        ({**FOREIGN, "prompt": "a\x00dog"}, "control character U+0000"),
        ({**FOREIGN, "negative": {"a": []}}, "negative {'a': []} is not text"),
        ({**FOREIGN, "dtype": "int8"}, "dtype 'int8' is not one of"),
    ],
)
def test_metadata_of_strangers_is_checked_as_flags_are(cmdgen, tmp_path, metadata, says):
    write.write_still(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), metadata)
    result = cmdgen("sample", "--like", tmp_path / "a.png", "-o", tmp_path / "b.mp4")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: .+\n", result.err)
    assert says in result.err
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.usefixtures("known_speed")
def test_what_differs_from_when_a_file_was_made_is_said(sample, cmdgen, tmp_path):
    strange = {**FOREIGN, "weights": "0", "device": "tpu", "rehash_file": "/etc/passwd", "x": 1}
    write.write_still(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), strange)
    options = ("--like", tmp_path / "a.png", "--dry-run")
    result = sample(*options, "-o", tmp_path / "b.mp4")
    assert result.code == 0
    assert "a.png was made by cmdgen '9.9'\n" in result.err
    assert "a.png was made with other weights than those of tiny\n" in result.err
    assert "a.png was made on 'tpu', which rounds differently\n" in result.err
    assert "unknown metadata of " in result.err and ": 'rehash_file', 'x'\n" in result.err
    # of other weights than its model's: the user must choose the model, or it would be another clip
    result = cmdgen("sample", *options, "-o", tmp_path / "b.mp4")
    assert (result.code, result.out) == (2, "")
    assert "with other weights than those of mini: give its model with --model" in result.err
    result = cmdgen("sample", "--like", tmp_path / "none.mp4", "-o", tmp_path / "b.mp4")
    assert result.code == 3


def test_preview_is_rewritten_while_sampling(sample, tiny_model, tmp_path, monkeypatch):
    seen = []
    write_still = write.write_still

    def watch(target, frame, *rest, **options):
        seen.append(frame)
        write_still(target, frame, *rest, **options)

    monkeypatch.setattr("cmdgen.cli.batch.write_still", watch)
    monkeypatch.setattr("cmdgen.cli.batch.PREVIEW_SHARE", float("inf"))
    preview = tmp_path / "preview.png"
    options = (PROMPT, "--steps", 4, "--seed", 3, "-o")
    assert sample(*options, tmp_path / "a.mp4", "--preview", preview).code == 0
    clip = load_pipeline(tiny_model).sample(PROMPT, seed=3, steps=4)
    assert len(seen) == 5
    with Image.open(preview) as image:
        assert np.array_equal(np.asarray(image), clip.content)
    # it nears what it becomes
    errors = [np.abs(picture.astype(int) - clip.content).mean() for picture in seen]
    assert errors[0] > errors[-2] >= errors[-1] == 0
    result = sample(*options, tmp_path / "b.png", "--preview", tmp_path / "b.png")
    assert result.code == 2
    assert "is the preview's name" in result.err
    result = sample(*options, tmp_path / "b.png", "--preview", tmp_path / "b.mp4")
    assert result.code == 2


@pytest.mark.usefixtures("known_speed")
def test_dry_run_says_what_would_be_made_and_reads_no_weights(jobs, refused, tmp_path):
    file = jobs("a dog", "a car")
    options = ("-f", file, "-o", tmp_path / "{line}.mp4")
    options += ("--seed", 5, "--dry-run", "--batch", 2, "--rehash", 2, "--rehash-policy", "uniform")
    result = refused(*options)
    assert (result.code, result.err) == (0, "")
    first, full, second, _, total = result.out.splitlines()
    assert first == (f"{tmp_path / '1.mp4'}  seed 5, 4 x 48x32, 8 frames a second, 2 + 2 steps of dpm++")
    assert second.startswith(f"{tmp_path / '2.mp4'}  ")
    assert full.strip() == "rehash: 2 + 2 of them in full"
    assert re.match(r"tiny on cpu in float32: about [\d,]+ MB of weights and activations", total)
    file = jobs("a dog", "a\0car")
    result = refused(*options, "--json")
    assert result.code == 6
    report = json.loads(result.out)
    assert {"model", "jobs", "memory_bytes", "seconds", "flops"} <= set(report)
    dog, car = report["jobs"]
    assert (dog["seed"], dog["rehash"]["content"]) == (5, [0, 1])
    assert "control character" in car["error"]
    assert names(tmp_path) == ["jobs.txt"]


def test_a_killed_process_leaves_nothing_under_the_names_of_clips(tiny_model, tmp_path):
    size = ("--steps", 1, "--motion-steps", 1, "--frames", 32, "--size", "256x256", "--batch", 2)
    target = ("-f", "-", "-o", tmp_path / "{line}.mp4")
    with start(tiny_model, *target, *size, stdin=subprocess.PIPE) as process:
        process.stdin.write(b"a dog\na car\n")
        process.stdin.flush()
        deadline = time.monotonic() + 60
        # the encoders' files are there: it is in the midst of it
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    left = names(tmp_path)
    assert left and all(name.startswith(".cmdgen-") for name in left)


def test_help_names_every_option_and_exit_code(cmdgen):
    result = cmdgen("sample", "--help")
    assert result.code == 0
    for option in ("--motion-steps", "--content-seed", "--negative", "--dtype"):
        assert option in result.out
    assert "Exit codes" in result.out
    assert cmdgen("--version").out.startswith("cmdgen ")


def test_threads_are_as_many_as_asked_for(sample, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    assert sample(PROMPT, "-o", tmp_path / "a.mp4", "--threads", 3).code == 0
    assert chosen == [3]


def test_weights_of_words_are_said_to_be_words(sample, tmp_path):
    result = sample("a (dog:1.3) swimming (in the ocean: 0.5)", "-o", tmp_path / "a.mp4")
    assert "note: weights are read as words: (dog:1.3), (in the ocean: 0.5)\n" in result.err
    assert "weights" not in sample("a dog (at 12:30) swimming", "-o", tmp_path / "b.mp4").err


def test_a_dry_run_names_unknown_words(sample):
    assert "note: unknown words for tiny: zebra" in sample("a zebra", "-o", "a.mp4", "--dry-run").err


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_a_seed_that_other_tools_take_is_refused_with_what_to_do(refused, seed):
    result = refused(PROMPT, "-o", "a.mp4", "--seed", seed)
    assert result.code == 2
    assert result.err == f"error: --seed {seed} is not between 0 and 2^63 - 1: leave it out for a random one\n"


def test_a_small_decoder_takes_the_place_of_the_vae_and_is_recorded(sample, tmp_path):
    shape = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    shape |= {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    for name, channels in (("tiny", 8), ("other", 4)):
        TinyVae(TinyConfig(latent_channels=channels, **shape)).save_pretrained(tmp_path / name)
    clips = {}
    for name, options in (("whole", ()), ("small", ("--decoder", tmp_path / "tiny"))):
        target = tmp_path / f"{name}.png"
        done = sample("a dog", "-o", target, "--seed", 1, *options)
        assert done.code == 0, done.err
        clips[name] = np.asarray(Image.open(target)), read_metadata(target)
    (whole, about), (small, recorded) = clips["whole"], clips["small"]
    assert whole.shape == small.shape and not np.array_equal(whole, small)
    assert recorded["decoder"] == "tiny" and recorded["weights"] != about["weights"]
    refused = sample("a dog", "-o", tmp_path / "b.png", "--decoder", tmp_path / "other")
    assert "latent_channels is 4, the VAE of tiny has 8" in refused.err
    refused = sample("a dog", "-o", tmp_path / "b.png", "--decoder", tmp_path / "tiny", "--max-memory", "1GB")
    assert "leave --decoder out" in refused.err
