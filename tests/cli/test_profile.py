import json
import shutil

import pytest
import torch

from cmdgen.cli.app import main
from cmdgen.config import SampleConfig
from cmdgen.evaluation.flops import count_sampling
from cmdgen.evaluation.profile import STAGES, Stopwatch
from cmdgen.pipeline import TextToVideo


@pytest.fixture
def profile(capsys):
    """Runs the command in this process: its exit code, stdout and stderr."""

    def run(*arguments: object):
        with pytest.raises(SystemExit) as end:
            main(["profile", *map(str, arguments)])
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_the_papers_figures_stand_beside_ours(profile):
    code, out, err = profile("--paper")
    assert (code, err) == (0, "")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert ["content", "0.34", "0.339", "-0.26%", "0.80"] in cells
    assert ["50 steps", "46.8", "46.79", "-0.03%", "298.6"] in cells
    assert ["100 steps", "92.1", "92.03", "-0.08%", "508.1"] in cells


def test_the_papers_figures_as_json(profile):
    code, out, _ = profile("--paper", "--json")
    tables = json.loads(out)
    assert code == 0
    assert [entry["published"] for entry in tables["table_9"]] == [46.8, 92.1]
    assert list(tables["stages"]) == ["text", "content", "motion", "frame decode", "VAE decode"]


def test_every_stage_and_the_total_are_measured(profile, tiny_model, tmp_path):
    trace = tmp_path / "trace.json"
    code, out, _ = profile(
        *("--model", tiny_model, "--runs", 2, "--batch", 2, "--steps", 3, "--size", "32x16"),
        *("--device", "cpu", "--json", "--trace", trace),
    )
    report = json.loads(out)
    assert code == 0
    assert (report["steps"], report["motion_steps"], report["batch"]) == (3, 3, 2)
    assert (report["height"], report["width"], report["dtype"]) == (16, 32, "float32")
    assert report["matmul_flops_per_second"] > 0
    assert list(report["stages"]) == list(STAGES)
    for stage in (*report["stages"].values(), report["total"]):
        seconds = stage["seconds"]
        assert 0 < seconds["fastest"] <= seconds["median"] <= seconds["slowest"]
        assert stage["flops_per_second"] == pytest.approx(stage["flops"] / seconds["median"])
    total = report["total"]
    assert total["seconds"]["slowest"] > sum(
        s["seconds"]["fastest"] for s in report["stages"].values()
    )

    model = TextToVideo.load(tiny_model)
    asked = SampleConfig(steps=3, motion_steps=3, height=16, width=32).apply(model.config)
    for name, products in count_sampling(asked, batch=2).items():
        assert report["stages"][name]["flops"] == products.flops
    sizes = {
        name: sum(parameter.numel() for parameter in getattr(model.parts, name).parameters())
        for name in ("text", "content", "motion", "autoencoder", "vae")
    }
    assert report["stages"]["frame decode"]["parameters"] == sizes["autoencoder"]
    assert report["stages"]["load"]["parameters"] == total["parameters"] == sum(sizes.values())
    assert total["weight_bytes"] >= 4 * total["parameters"]

    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["name"] for event in events}
    steps = {f"{stage} step {i}" for stage in ("content", "motion") for i in (1, 2, 3)}
    assert {*STAGES, *steps} <= names
    assert "content step 4" not in names
    spans = {event["name"]: event for event in events if event.get("ph") == "X"}
    content, step = spans["content"], spans["content step 3"]
    assert content["ts"] <= step["ts"] and step["dur"] <= content["dur"]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_the_longest_stage_has_the_longest_bar(profile, tiny_model):
    code, out, _ = profile("--model", tiny_model, "--runs", 1, "--device", "cpu")
    assert code == 0
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    seconds = {row[0]: float(row[4]) for row in rows[2:]}
    bars = {row[0]: len(row[-1]) for row in rows[2:]}
    assert list(seconds) == [*STAGES, "total"]
    del seconds["total"]
    longest = max(seconds, key=seconds.__getitem__)
    assert bars[longest] == 30 == max(bars.values())


def test_a_stage_that_is_entered_again_adds_its_time_and_keeps_its_peak():
    watch = Stopwatch(torch.device("cpu"))
    with watch("text"):
        block = torch.ones(2**24)
    first, peak = watch.seconds["text"], watch.memory["text"]
    del block
    with watch("text"):
        pass
    assert watch.seconds["text"] > first
    assert watch.memory["text"] == peak


def test_a_damaged_model_fails_in_one_line_that_names_the_file(profile, tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    (path,) = (folder / "motion").glob("*.safetensors")
    path.write_bytes(b"\xff" * 100)
    trace = tmp_path / "trace.json"
    code, out, err = profile("--model", folder, "--device", "cpu", "--trace", trace)
    assert (code, out) == (1, "")
    assert str(path) in err.splitlines()[-1]
    assert not trace.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--paper", "--model", "mini"), "--model has no use there"),
        (("--paper", "--runs", 5), "--runs has no use there"),
        (("--runs", 0), "runs 0 is not between 1 and 1000"),
        (("--batch", 0), "batch 0 is not between 1 and 1000"),
        (("--size", "63x64"), "both sides must be multiples"),
        (("--steps", 0), "steps 0 is not at least 1"),
        (("--model", "maxi"), "unknown model 'maxi'"),
        (("--device", "tpu"), "device 'tpu' is not one of"),
        (("--trace", "."), ".: not the name of a file"),
        (("--trace", "no/such/folder/trace.json"), "not the name of a file"),
    ],
)
def test_what_is_impossible_is_one_line_before_anything_runs(
    profile, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = profile(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())
