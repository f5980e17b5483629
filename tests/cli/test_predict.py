"""`cmdgen predict` and `cmdgen interpolate` from the shell."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmdgen.cli import predict
from cmdgen.evaluation.memory import Memory
from cmdgen.video.read import read_metadata, read_video
from tests.pipelines.test_evdm import frames, write_model
from tests.videos import write_video


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("evdm") / "tiny")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_video(tmp_path / "clip.apng", frames(5), 12, None)
    return tmp_path / "clip.apng"


@pytest.fixture
def run(cmdgen, model: Path):
    return lambda *arguments: cmdgen(*arguments, "--model", model)


def test_the_file_holds_the_clip_and_more(run, clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "longer.apng"
    done = run("predict", clip, "-o", target, "--frames", 4, "--seed", 5)
    assert (done.code, done.out) == (0, f"{target}\n"), done.err
    got, fps = read_video(target)
    assert got.shape == (9, 16, 24, 3) and round(fps) == 12
    assert np.array_equal(got[:5], frames(5))
    about = read_metadata(target)
    assert (about["frames"], about["seed"], about["model"]) == (4, 5, "tiny")
    assert about["given"][0]["file"] == "clip.apng"
    new = tmp_path / "new.apng"
    assert run("predict", clip, "-o", new, "--frames", 4, "--seed", 5, "--only-new").code == 0
    assert np.array_equal(read_video(new)[0], got[5:])


def test_a_clip_that_would_be_too_fast_is_refused(run, clip: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "fast.mp4", frames(5), 100, None)
    done = run("interpolate", tmp_path / "fast.mp4", "-o", tmp_path / "between.apng", "--frames", 2)
    says = "as fast as the first video is 300 frames a second, not up to 240: choose --fps"
    assert (done.code, done.err) == (2, f"error: {says}\n")


def test_like_makes_it_again_and_notes_other_files(run, clip: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.apng", tmp_path / "again.apng"
    assert run("predict", clip, "-o", first, "--frames", 2, "--seed", 7).code == 0
    done = run("predict", clip, "--like", first, "-o", again)
    assert done.code == 0, done.err
    assert np.array_equal(read_video(first)[0], read_video(again)[0])
    assert "other contents" not in done.err and "unknown metadata" not in done.err
    none = run("predict", "--like", first, "-o", tmp_path / "other.apng")
    assert (none.code, none.err) == (2, f"error: {first} was made with 'clip.apng': give that, too\n")
    other = run("predict", first, "--like", first, "-o", tmp_path / "other.apng")
    assert f"note: {first} was made with files of other contents, 'clip.apng'" in other.err


def test_like_leaves_out_what_the_file_left_out(run, clip: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.apng", tmp_path / "again.apng"
    assert run("predict", clip, "-o", first, "--frames", 2, "--only-new").code == 0
    done = run("predict", clip, "--like", first, "-o", again)
    assert done.code == 0 and "unknown metadata" not in done.err
    assert np.array_equal(read_video(first)[0], read_video(again)[0])
    assert read_metadata(first) == read_metadata(again)


def test_several_seeds_are_several_files(run, tmp_path: Path) -> None:
    done = run("predict", "-o", tmp_path / "{seed}.gif", "--num", 2, "--seed", 1, "--batch", 2, "--frames", 3, "--json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    drawn = run("predict", "-o", tmp_path / "{seed}.gif", "--num", 2, "--skip-existing")
    assert drawn.code == 2 and "--skip-existing with random seeds in names finds nothing" in drawn.err
    assert [Path(row["output"]).name for row in rows] == ["1.gif", "2.gif"]
    assert not np.array_equal(*(read_video(row["output"])[0] for row in rows))


def test_a_picture_is_the_next_frame(run, clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "next.png"
    assert run("predict", clip, "-o", target, "--seed", 1).code == 0
    assert run("predict", clip, "-o", tmp_path / "two.apng", "--seed", 1, "--frames", 2).code == 0
    assert np.array_equal(np.asarray(Image.open(target)), read_video(tmp_path / "two.apng")[0][5])


def test_all_pictures_of_a_sequence_are_its_files(run, clip: Path, tmp_path: Path) -> None:
    arguments = ("predict", clip, "-o", tmp_path / "%d.png", "--seed", 1, "--frames", 2, "--json", "--skip-existing")
    made = json.loads(run(*arguments).out)
    assert made["frames"] == len(list(tmp_path.glob("*.png"))) == 7
    assert json.loads(run(*arguments).out)["skipped"]
    (tmp_path / "6.png").unlink()
    assert json.loads(run(*arguments).out)["frames"] == 7
    assert (tmp_path / "6.png").exists()


def test_files_are_noted_once_for_all_clips(run, clip: Path, tmp_path: Path) -> None:
    done = run("predict", clip, "-o", tmp_path / "{index}.apng", "--num", 3, "--frames", 1)
    assert done.code == 0 and done.err.count("clip.apng, 24x16") == 1


def test_stdin_is_a_clip(run, clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "piped.apng"

    def pipe(data: bytes, *arguments: object):
        saved, source = os.dup(0), tmp_path / "stdin"
        source.write_bytes(data)
        with source.open("rb") as stdin:
            os.dup2(stdin.fileno(), 0)
            try:
                return run(*arguments)
            finally:
                os.dup2(saved, 0)
                os.close(saved)

    empty = pipe(b"", "predict", "-", "-o", target)
    assert empty.code == 1 and empty.err.startswith("error: - is not a readable video or picture")
    twice = pipe(clip.read_bytes(), "interpolate", "-", "-", "-o", tmp_path / "twice.apng", "--frames", 1)
    assert twice.code == 0 and len(read_video(tmp_path / "twice.apng")[0]) == 19
    done = pipe(clip.read_bytes(), "predict", "-", "-o", target, "--frames", 1)
    assert done.code == 0, done.err
    assert len(read_video(target)[0]) == 6
    assert read_metadata(target)["given"][0]["file"] == "-"


def test_pictures_of_any_size_are_connected(run, tmp_path: Path) -> None:
    for name, colour in (("a", (250, 0, 0)), ("b", (0, 0, 90))):
        Image.new("RGB", (48, 32), colour).save(tmp_path / f"{name}.png")
    target = tmp_path / "between.apng"
    done = run("interpolate", tmp_path / "a.png", tmp_path / "b.png", "-o", target, "--frames", 3)
    assert done.code == 0, done.err
    assert len(read_video(target)[0]) == 5
    assert "turned grey, cropped and resized to 24x16" in done.err
    assert [part["file"] for part in read_metadata(target)["given"]] == ["a.png", "b.png"]


def test_every_gap_of_a_clip_is_filled(run, clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "smooth.apng"
    assert run("interpolate", clip, "-o", target).code == 0
    assert len(read_video(target)[0]) == 5 + 4 * 3
    assert run("interpolate", clip, "-o", target, "--frames", 1, "--overwrite").code == 0
    got, _ = read_video(target)
    assert len(got) == 9
    assert np.array_equal(got[::2], frames(5))
    # it takes as long as before
    assert round(read_video(target)[1]) == 24
    done = run("interpolate", clip, "-o", target, "--frames", 1, "--overwrite", "--fps", 5)
    assert done.code == 0 and round(read_video(target)[1]) == 5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("predict", "no.mp4", "-o", "a.mp4"), "no.mp4"),
        (("predict", "CLIP"), "no output"),
        (("predict", "CLIP", "-o", "a.safetensors"), "tiny has no motion"),
        (("predict", "CLIP", "-o", "a.mp4", "--frames", 0), "--frames 0 is not between 1 and 65536"),
        (("predict", "CLIP", "-o", "a.mp4", "--size", "50x50"), "both sides must be multiples of 4"),
        (("interpolate", "CLIP", "-o", "a.mp4", "--frames", 9), "puts at most 3 between two frames"),
        (("interpolate", "ONE", "-o", "a.mp4"), "there is one frame"),
        (("predict", "TEXT", "-o", "a.mp4"), "is not a readable video or picture"),
    ],
)
def test_impossible_requests_are_one_line(run, clip: Path, tmp_path: Path, monkeypatch, arguments, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32)).save("one.png")
    Path("text.mp4").write_text("no video")
    names = {"CLIP": clip, "ONE": "one.png", "TEXT": "text.mp4"}
    done = run(*(names.get(word, word) if isinstance(word, str) else word for word in arguments))
    assert done.code in (1, 2, 3), done
    assert reason in done.err
    # nothing was read of the model before
    assert "load" not in done.err
    assert not Path("a.mp4").exists()


def test_a_file_of_too_many_frames_is_one_line(run, clip: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(predict, "MOST_BYTES", 4 * 16 * 24 * 3)
    done = run("predict", clip, "-o", tmp_path / "longer.mp4")
    assert "has more than 4 frames of 24x16: cut it first" in done.err


def test_a_clip_far_longer_than_the_models_is_made_where_it_fits(run, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "long.apng"
    assert run("predict", "-o", target, "--frames", 40).code == 0
    assert len(read_video(target)[0]) == 40
    monkeypatch.setattr("cmdgen.evaluation.memory.measure_memory", lambda device: Memory(2**20, 2**10))
    done = run("predict", "-o", tmp_path / "longer.apng", "--frames", 40)
    assert (done.code, done.err.splitlines()[-1]) == (
        4,
        "error: not enough memory: ask for a smaller --size or --batch, or fewer --frames",
    )
