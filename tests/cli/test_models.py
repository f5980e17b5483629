"""`cmdgen models` from the shell: what is printed, and how it ends."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from cmdgen.cli.app import main
from cmdgen.config import PRESETS, PUBLIC, packaged_models


@pytest.fixture
def models(capsys, monkeypatch, tmp_path):
    """Runs the command in this process: its exit code, stdout and stderr."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["models", *map(str, arguments)])
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_list_names_what_can_be_used_and_what_can_be_made(models) -> None:
    code, out, err = models("list")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [
        ["packaged", "evdm"],
        ["packaged", "evdm-world"],
        ["packaged", "mini"],
        *(["preset", name] for name in PRESETS),
        *(["public", name] for name in PUBLIC),
    ]
    (large,) = [row for row in rows if row[1] == "cmd-sd21"]
    assert large[2:6] == ["2012.5", "M", "3,838.6", "MiB"]
    code, out, _ = models("list", "--json")
    assert code == 0
    assert [row["kind"] for row in json.loads(out)] == [row[0] for row in rows]


def test_show_counts_the_parts_of_a_preset(models) -> None:
    code, out, err = models("show", "cmd-sd21")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "865,910,724" in lines["unet"]
    assert "cmd-sd15, cmd-sd21" in lines["autoencoder"]
    assert lines["licence"].endswith("none: no weights")
    _, out, _ = models("show", "cmd-sd21", "--json")
    report = json.loads(out)
    assert report["folder"] is None
    assert report["parameters"] == sum(part["parameters"] for part in report["parts"])


def test_init_writes_a_folder_once_that_show_knows(models, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    code, out, err = models("init", "mini", "-o", folder)
    assert (code, out) == (0, f"{folder}\n")
    assert "random weights" in err and "tokenizer" in err
    code, out, _ = models("show", folder, "--json")
    assert code == 0
    assert json.loads(out)["presets"] == ["mini"]
    weights = folder / "motion" / "diffusion_pytorch_model.safetensors"
    assert "digests         5 of 5 files match theirs" in models("show", folder, "--verify")[1]
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    code, out, err = models("show", folder, "--verify")
    assert (code, out, err) == (1, "", f"error: {weights} is damaged: its digest is another one\n")
    code, out, err = models("init", "mini", "-o", folder)
    assert (code, out) == (2, "")
    assert err == f"error: {folder} exists already: give another folder\n"


def test_show_tries_out_what_the_unet_of_others_predicts(models, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(packaged_models()["mini"], folder)
    # what is left is a Stable Diffusion folder
    for name in ("autoencoder", "motion"):
        shutil.rmtree(folder / name)
    index, scheduler = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "cmdgen"}))
    assert models("show", folder)[0] == 0
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "epsilon"}))
    code, out, err = models("show", folder)
    assert (code, out) == (1, "")
    assert err == f"error: {scheduler}: prediction_type is epsilon, but unet/ predicts v_prediction: correct it\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init", "maxi", "-o", "x"), "preset 'maxi' is not one of mini, mini-gpu, cmd-sd15"),
        (("init", "mini", "-o", "x", "--dtype", "int8"), "--dtype 'int8' is not one of float32"),
        (("init", "mini", "-o", "no/x"), "folder "),
        (("init", "mini", "-o", "x", "--seed", str(2**63)), "--seed 9223372036854775808 is not"),
        (("pull", "../x"), "'../x' is no repository: expected OWNER/NAME"),
    ],
)
def test_what_is_impossible_is_one_line(models, monkeypatch, tmp_path, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = models(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_wrong_fails_by_its_own_fault(models, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    code, out, err = models("show", tmp_path / "model")
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path / 'model' / 'model_index.json'}: No such file or directory\n"
