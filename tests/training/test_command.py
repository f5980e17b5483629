"""`cmdgen train` from the shell: what it prints, how it ends, what it refuses."""

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from cmdgen.config import PRESETS
from cmdgen.files import hold_folder
from cmdgen.training.vae import VaeStage
from tests.conftest import tiny_config

FEW = ("--batch", 2, "--accumulate", 1, "--steps", 2, "--clips", 4, "--held-out", 2)


@pytest.fixture
def train(cmdgen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command, where two presets are small enough to train on a few clips."""
    for name in ("mini", "cmd-sd15"):
        monkeypatch.setitem(PRESETS, name, replace(tiny_config(), name=name))

    def run(stage: str, *arguments: object):
        # of an option given twice the last one counts
        data = () if (tmp_path / "run").exists() else ("--data", "shapes")
        return cmdgen("train", stage, "-o", tmp_path / "run", *FEW, *data, *arguments)

    return run


def test_stages_continue_with_what_the_run_began_with(train, videos: Path, tmp_path: Path) -> None:
    done = train("vae", "--preset", "cmd-sd15", "--data", videos)
    assert (done.code, done.out) == (0, f"{tmp_path / 'run'}\n"), done.err
    assert "vae: 2 of 2 steps" in done.err
    # preset and data are the run's own now
    assert train("autoencoder").code == 0
    assert (tmp_path / "run/autoencoder/config.json").exists()
    other = train("autoencoder", "--preset", "mini")
    assert other.code == 2
    assert "was started with preset cmd-sd15, not mini" in other.err


def test_a_run_goes_on_from_anywhere_and_says_what_it_leaves_out(
    train, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(videos, tmp_path / "d")
    (tmp_path / "d" / "short.mp4").write_bytes(b"\0" * 99)
    (tmp_path / "d" / "short.txt").write_text("a dog\n")
    monkeypatch.chdir(tmp_path)
    first = train("vae", "--data", "d", "--steps", 1)
    assert first.code == 0 and "1 of 6 clips left out, the first: " in first.err, first.err
    again = train("vae", "--data", "./d/../d", "--steps", 2)
    assert again.code == 0, again.err
    monkeypatch.chdir(tmp_path / "run")
    assert train("vae", "--steps", 3).code == 0


def test_a_stage_trained_again_says_what_learned_from_the_last_one(train, videos: Path) -> None:
    assert "learned from another" not in train("vae", "--data", videos, "--steps", 1).err
    train("autoencoder", "--steps", 1)
    assert "learned from another" not in train("vae", "--steps", 1).err
    again = train("vae", "--steps", 2, "--json")
    assert "note: autoencoder learned from another vae: train them again with --restart" in again.err
    assert json.loads(again.out)["steps"] == 2


def test_a_decoder_learns_from_neither_content_nor_motion(train, tmp_path: Path) -> None:
    for stage in ("vae", "autoencoder"):
        assert train(stage).code == 0
    for stage in ("motion", "decoder"):
        (tmp_path / "run/training" / stage).mkdir()
    assert "note: motion learned from another content: train them again" in train("content", "--steps", 1).err


def test_a_gated_run_is_gated_in_all_its_parts(train, tmp_path: Path) -> None:
    gate = ("--attention", "gated", "--attention-threshold", 0, "--attention-features", 8)
    assert train("vae", *gate, "--steps", 1).code == 0
    for stage, part in {"autoencoder": "autoencoder", "content": "unet"}.items():
        assert train(stage, "--steps", 1).code == 0
        config = json.loads((tmp_path / "run" / part / "config.json").read_text())
        assert [config[f"attention{key}"] for key in ("", "_threshold", "_features")] == [*("gated", 0, 8)]
    other = train("content", "--attention", "softmax")
    assert other.code == 2
    assert "was started with attention gated, not softmax" in other.err
    given = train("content", "--restart", "--init", tmp_path / "run", "--attention-threshold", 1.5)
    assert given.code == 2
    assert "unet brings its own attention threshold" in given.err


def test_later_stages_keep_the_size_that_the_first_one_had(train) -> None:
    assert train("vae").code == 0
    assert "was started with the preset's size, not 64x64" in train("autoencoder", "--size", "64x64").err
    # that of the preset may be said
    assert train("autoencoder", "--size", "48x32").code == 0
    # no clip is encoded before a former stage is known to be there
    motion = train("motion")
    assert motion.code == 2 and motion.err.startswith("error: ") and "no text_encoder/ yet" in motion.err
    assert train("content", "--steps", 1).code == 0
    assert train("motion", "--steps", 1).code == train("decoder", "--steps", 1).code == 0
    again = train("content").err
    assert "note: motion learned from another content: " in again


def test_a_run_is_a_folder(train, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    result = train("vae", "--data", "shapes")
    assert (result.code, result.err) == (2, f"error: {tmp_path / 'run'} is a file: give a folder\n")


def test_first_signal_ends_after_the_step_with_a_checkpoint(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = VaeStage.batch

    def interrupted(stage: VaeStage, step: int):
        signal.raise_signal(signal.SIGTERM)
        return batch(stage, step)

    monkeypatch.setattr(VaeStage, "batch", interrupted)
    stopped = train("vae")
    assert stopped.code == 128 + signal.SIGTERM
    assert "vae: 1 of 2 steps" in stopped.err
    assert (tmp_path / "run/training/vae/checkpoint.safetensors").exists()


def test_a_signal_that_is_ignored_stops_nothing(train, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = VaeStage.batch

    def interrupted(stage: VaeStage, step: int):
        # as a terminal sends it to what a script runs behind &
        signal.raise_signal(signal.SIGINT)
        return batch(stage, step)

    monkeypatch.setattr(VaeStage, "batch", interrupted)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = train("vae")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (done.code, "stopping" in done.err) == (0, False) and "vae: 2 of 2 steps" in done.err


def test_time_is_up_during_encoding_too(train, tmp_path: Path) -> None:
    assert train("vae").code == 0
    stopped = train("autoencoder", "--minutes", 1e-9, "--json")
    assert stopped.code == 0
    assert "stopped with 0 of" in stopped.err
    record = json.loads(stopped.out)
    assert record == {"output": str(tmp_path / "run"), "stage": "autoencoder", "encoded": 0, "of": record["of"]}
    assert not (tmp_path / "run/autoencoder").exists()
    assert train("autoencoder").code == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("vae", "--preset", "huge"), "preset 'huge' is not one of"),
        (("vae", "--size", "wide"), "is not WIDTHxHEIGHT"),
        (("vae", "--size", "50x50"), "both sides must be multiples of"),
        (("vae", "--frames", 1), "nothing moves in a clip of one frame"),
        (("vae", "--batch", 3), "batch 3 is not a multiple of the 2 frames of a clip"),
        (("vae", "--accumulate", "3"), "not a multiple of accumulate 3"),
        (("vae", "--attention", "fast"), "attention 'fast' is not one of softmax, gated"),
        (("vae", "--attention-threshold", -1), "--attention-threshold -1.0 is not at least 0"),
        (("vae", "--lr", 0), "lr 0.0 is not between 0 and 1"),
        (("vae", "--ema", 1), "ema 1.0 is not at least 0 and below 1"),
        (("vae", "--minutes", 0), "minutes 0.0 is not above 0"),
        (("vae", "--precision", "fp8"), "precision 'fp8' is not one of"),
        (("content", "--mask", 2), "No such option: --mask"),
        (("vae", "--text-dropout", 0), "No such option: --text-dropout"),
        (("vae", "--steps", 0), "steps 0 is not at least 1"),
        (("vae", "--lr", 2), "lr 2.0 is not between 0 and 1"),
        (("content", "--text-dropout", 2), "--text-dropout 2.0 is not between 0 and 1"),
        (("motion",), "no vae/ yet: first run `cmdgen train vae"),
        (("vae", "--latents", "none"), "--latents has no effect on vae, which learns from frames"),
        (("vae", "--init", "."), ". has no part to start mini from: none of "),
        (("vae", "--attention-features", 8), "--attention-features has no effect without --attention gated"),
        (("vae", "--attention", "softmax", "--attention-threshold", 1.5), "-threshold has no effect without"),
    ],
)
def test_impossible_requests_are_one_line_and_leave_nothing(
    train, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    result = train(*arguments)
    assert result.code == 2
    assert reason in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_export_of_half_a_run_names_what_is_missing(cmdgen, tmp_path: Path) -> None:
    result = cmdgen("train", "export", tmp_path, tmp_path / "model")
    assert result.code == 2
    assert "model_index.json" in result.err


def test_diverged_training_fails_and_says_how_to_go_on(train, monkeypatch) -> None:
    batch = VaeStage.batch

    def burst(stage: VaeStage, step: int):
        return {name: tensor * float("inf") for name, tensor in batch(stage, step).items()}

    monkeypatch.setattr(VaeStage, "batch", burst)
    result = train("vae")
    assert result.code == 1, result.err
    assert re.fullmatch("error: .* is not finite .*lower --lr.*\n", result.err.splitlines(True)[-1])


def test_a_run_cut_short_by_the_clock_says_where_the_learning_rate_is(train) -> None:
    cut = ("--final-lr", 0.1, "--minutes", 1e-9)
    result = train("vae", "--steps", 900, *cut)
    assert result.code == 0
    assert re.search(r"note: the learning rate, [\d.e-]+ by now, falls until step 900: the same", result.err)
    quiet = train("vae", "--quiet", "--steps", 901, *cut)
    assert (quiet.code, quiet.err) == (0, "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "[] is not a JSON object"),
        ("null", "None is not a JSON object"),
        ("\ufffe", "not readable as JSON"),
        ("[" * 100_000, "JSON is nested too deeply"),
        ('{"size": 5}', "size 5 is not valid"),
        ('{"size": {}}', "size {} is not valid"),
        ('{"size": "9"}', "size '9' is not WIDTHxHEIGHT"),
        ('{"preset": []}', "preset [] is not text"),
        ('{"preset": "none"}', "preset 'none' is not one of"),
        ('{"frames": "2"}', "frames '2' is not a whole number"),
        ('{"frames": true}', "frames True is not a whole number"),
        ('{"frames": 4294967296}', "frames 4294967296 is not between 1 and 65536"),
        ('{"latents": 7}', "latents 7 is not text"),
        ('{"attention_threshold": -1}', "attention threshold -1.0 is not at least 0"),
    ],
)
def test_a_damaged_run_is_one_line_that_names_its_file(train, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run/training/run.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    result = train("vae")
    assert result.code == 2
    assert result.err.startswith(f"error: {path}: ") and says in result.err and result.err.count("\n") == 1


def test_a_run_is_trained_by_one_process(train, tmp_path: Path) -> None:
    with hold_folder(tmp_path / "run"):
        result = train("vae", "--data", "shapes")
    assert result.code == 1
    assert (
        result.err
        == f"error: {tmp_path / 'run'} is in use by another cmdgen: wait for its end, or give another folder\n"
    )


def test_a_stage_does_not_go_on_after_another_vae(train) -> None:
    for stage in ("vae", "autoencoder"):
        assert train(stage, "--steps", 1).code == 0
    assert train("autoencoder", "--steps", 2).code == 0
    assert train("vae", "--steps", 2).code == 0
    result = train("autoencoder", "--steps", 3)
    assert result.code == 2
    assert "autoencoder/checkpoint.safetensors was trained with another vae: " in result.err
    assert train("autoencoder", "--restart").code == 0


def test_a_run_of_an_earlier_version_goes_on(train, tmp_path: Path) -> None:
    shared = {"preset": "cmd-sd15", "data": "shapes", "size": "48x32", "frames": 4}
    path = tmp_path / "run/training/run.json"
    path.parent.mkdir(parents=True)
    # before settings were dataclasses
    path.write_text(json.dumps(shared, indent=2) + "\n")
    assert train("vae").code == 0
    assert json.loads(path.read_text()) == shared
    refused = train("vae", "--size", "64x64")
    assert refused.code == 2 and "was started with size 48x32, not 64x64" in refused.err
    assert train("vae", "--size", "48x32").code == 0
