"""The whole evaluation on a tiny random model and a world that needs no font."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cmdgen.cli.app import app
from cmdgen.evaluation import measure
from cmdgen.evaluation.probe import HEADS, Probe, ProbeConfig
from cmdgen.evaluation.settings import Evaluation
from cmdgen.world.config import WORLDS, WorldConfig

WORLD = WorldConfig(
    subjects=("dog", "fish", "car"),
    motions=("growing", "shrinking"),
    scenes=("grass", "space"),
    **{"pairs": 0.0, "adjectives": False, "flips": False, "sprites": "shapes", "held_out": 0.3},
)
KEYS = {
    *("vae_psnr", "vae_psnr_subject", "autoencoder_psnr", "autoencoder_psnr_subject"),
    *("named_subject", "named_motion", "named_scene", "frechet", "time_variance", "text_shift"),
}


@pytest.fixture
def probe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(WORLDS, "mini", WORLD)
    monkeypatch.setattr(measure, "SWAP_SEARCHED", 16)
    torch.manual_seed(0)
    Probe(ProbeConfig(WORLD.subjects, WORLD.motions, WORLD.scenes)).save_pretrained(tmp_path)
    return tmp_path


def test_eval_prints_every_figure_as_json(tiny_model: Path, probe_folder: Path) -> None:
    small = ["--clips", "3", "--reconstructed", "3", "--batch", "2", "--seed", "7"]
    arguments = ["eval", str(tiny_model), *small, "--probe", str(probe_folder), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    data = json.loads(result.stdout)
    assert set(data["figures"]) == KEYS
    assert data["seeds"] == [7, 9] and data["split"] == "test"
    assert set(data["details"]["named_by_class"]) == set(HEADS)
    for figure in data["figures"].values():
        assert isinstance(figure["met"], bool) and figure["value"] is not None
    subject = data["figures"]["autoencoder_psnr_subject"]
    assert subject["target"] == pytest.approx(subject["beside"]["mean frame"] + 5)
    assert "real content" in data["figures"]["named_motion"]["beside"]
    # random weights do not read
    assert abs(data["figures"]["text_shift"]["value"]) < 0.1
    frechet = data["figures"]["frechet"]
    assert frechet["target"] == pytest.approx(0.5 * frechet["beside"]["frozen"], abs=1e-6)


def test_eval_without_generated_clips_measures_reconstruction(tiny_model: Path, probe_folder: Path) -> None:
    arguments = ["eval", str(tiny_model), "--clips", "0", "--reconstructed", "2"]
    result = CliRunner().invoke(app, [*arguments, "--probe", str(probe_folder)])
    rows = [line for line in result.stdout.splitlines() if "PSNR" in line and line[0] == "|"]
    assert len(rows) == 4
    assert "named" not in result.stdout


def test_a_probe_of_another_world_is_refused(tiny_model: Path, probe_folder: Path) -> None:
    Probe(ProbeConfig(("cat",), WORLD.motions, WORLD.scenes)).save_pretrained(probe_folder)
    result = CliRunner().invoke(app, ["eval", str(tiny_model), "--probe", str(probe_folder)])
    assert isinstance(result.exception, ValueError)
    assert "another world" in str(result.exception)


@pytest.mark.parametrize(("name", "value"), [("clips", -1), ("clips", 1), ("batch", 0)])
def test_impossible_counts_are_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} {value} is"):
        Evaluation(**{name: value})
