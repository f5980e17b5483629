import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from cmdgen.cli import profile as command
from cmdgen.cli.app import main
from cmdgen.evaluation import decoding
from cmdgen.evaluation import profile as profiling
from cmdgen.evaluation.flops import Work, count_work
from cmdgen.evaluation.profile import Limits, describe_stage
from cmdgen.pipelines.load import load_pipeline
from cmdgen.request import Request
from cmdgen.store.parts import read_index

STAGES = ["load", "text", "content", "motion", "frame decode", "VAE decode", "video encode"]
# what reads `--json` relies on
SETTINGS_KEYS = {
    *("model", "frames", "height", "width", "sampler", "steps", "guidance", "batch", "runs"),
    *("device", "dtype", "torch", "compile", "motion_steps", "motion_guidance"),
    *("matmul_flops_per_second", "copy_bytes_per_second"),
}
RUN_KEYS = SETTINGS_KEYS | {"stages", "total", "capture_seconds"}
SUITE_KEYS = SETTINGS_KEYS | {"rows", "unet_step"}
STAGE_KEYS = {
    *("parameters", "weight_bytes", "forwards", "flops", "bytes_read", "seconds"),
    *("flops_per_second", "share_of_matmul", "bytes_per_second", "share_of_copy", "memory_bytes"),
}
ROW_KEYS = STAGE_KEYS | {
    *("full_steps", "full_motion_steps", "guidance", "motion_guidance", "content_step_seconds"),
    *("stages", "capture_seconds"),
}
SECONDS_KEYS = {"median", "fastest", "slowest"}
ROWS = ["paper", "clip", "rehash_half", "rehash_quarter"]


@pytest.fixture
def profile(capsys, monkeypatch):
    """Runs the command in this process: its exit code, stdout and stderr."""
    # what the limits are is of no matter here, and takes seconds
    monkeypatch.setitem(profiling.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(profiling.COPY_BYTES, "cpu", 2**16)

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
    assert ["50 steps", "46.8", "46.79", "-0.03%", "298.2"] in cells
    assert ["100 steps", "92.1", "92.03", "-0.08%", "507.3"] in cells
    assert ["cmd-sd21-vdmini", "1", "64x128", "477,961,604", "55.2%", "1,266.8", "68.5%"] in cells


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
    assert report.keys() == RUN_KEYS
    matmul, copy = report["matmul_flops_per_second"], report["copy_bytes_per_second"]
    assert list(report["stages"]) == STAGES
    for stage in (*report["stages"].values(), report["total"]):
        seconds = stage["seconds"]
        assert (stage.keys(), seconds.keys()) == (STAGE_KEYS, SECONDS_KEYS)
        assert set(stage["memory_bytes"]) <= {"resident"}
        assert 0 < seconds["fastest"] <= seconds["median"] <= seconds["slowest"]
        assert stage["flops_per_second"] == pytest.approx(stage["flops"] / seconds["median"])
        assert stage["bytes_per_second"] == pytest.approx(stage["bytes_read"] / seconds["median"])
        assert stage["share_of_matmul"] == pytest.approx(stage["flops_per_second"] / matmul)
        assert stage["share_of_copy"] == pytest.approx(stage["bytes_per_second"] / copy)
    total = report["total"]
    assert total["seconds"]["slowest"] > sum(s["seconds"]["fastest"] for s in report["stages"].values())

    pipeline = load_pipeline(tiny_model)
    plan = pipeline.plan(Request(steps=3, motion_steps=3, size=(16, 32)), batch=2)
    stages = report["stages"]
    for name, work in count_work(plan, torch.float32, batch=2).items():
        assert {key: stages[name][key] for key in vars(work)} == vars(work)
    parts = [pipeline.part(name) for name in ("text_encoder", "unet", "motion", "autoencoder", "vae")]
    everything, buffers = (
        sum(tensor.numel() for part in parts for tensor in getattr(part, kind)()) for kind in ("parameters", "buffers")
    )
    for entry in (stages["load"], total):
        assert (entry["parameters"], entry["weight_bytes"]) == (everything, 4 * (everything + buffers))
    assert stages["load"]["bytes_read"] == 4 * (everything + buffers)
    # two clips of four frames
    assert stages["video encode"]["bytes_read"] == 2 * 4 * 16 * 32 * 3 / 2
    for key in ("forwards", "flops", "bytes_read"):
        assert total[key] == sum(stage[key] for stage in stages.values())

    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["name"] for event in events}
    steps = {f"{stage} step {i}" for stage in ("content", "motion") for i in (1, 2, 3)}
    assert {*STAGES, *steps} <= names
    assert "content step 4" not in names
    spans = {event["name"]: event for event in events if event.get("ph") == "X"}
    content, step = spans["content"], spans["content step 3"]
    assert content["ts"] <= step["ts"] and step["dur"] <= content["dur"]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_every_key_of_the_json_is_in_the_help(profile):
    code, out, _ = profile("--help")
    words = out.replace(",", " ").replace("{", " ").replace("}", " ").split()
    documented = {*STAGE_KEYS, *RUN_KEYS, *SECONDS_KEYS, "resident", "allocated", "reserved"}
    documented |= {*SUITE_KEYS, *ROW_KEYS, *ROWS}
    assert code == 0
    assert documented <= set(words)
    for name in STAGES:
        assert name in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_still_has_neither_motion_nor_frame_decode(profile, tiny_model, tmp_path):
    # what diffusers writes: the parts of Stable Diffusion alone
    folder = tmp_path / "stable"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("autoencoder", "motion"))
    index = read_index(folder)
    del index["cmdgen"]
    (folder / "model_index.json").write_text(json.dumps(index))
    arguments = ("--model", folder, "--steps", 2, "--size", "32x16", "--runs", 1)
    code, out, _ = profile(*arguments, "--json")
    report = json.loads(out)
    assert code == 0
    assert report.keys() == RUN_KEYS
    assert (report["frames"], report["steps"]) == (1, 2)
    assert (report["motion_steps"], report["motion_guidance"]) == (None, None)
    assert list(report["stages"]) == ["load", "text", "content", "VAE decode", "video encode"]
    forwards = {name: stage["forwards"] for name, stage in report["stages"].items()}
    assert forwards == {"load": 0, "text": 1, "content": 2, "VAE decode": 1, "video encode": 0}
    assert report["total"]["bytes_read"] == sum(s["bytes_read"] for s in report["stages"].values())
    assert report["stages"]["video encode"]["bytes_read"] == 16 * 32 * 3

    code, out, _ = profile(*arguments)
    assert code == 0
    assert "a still of 32x16, ddim 2 steps" in out.splitlines()[0]
    assert "motion" not in out


def cells(lines):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]


LIMITS = Limits(700e12, 4e12)
LARGE = {
    **{"model": "cmd-sd21", "frames": 16, "height": 512, "width": 1024, "runs": 3, "batch": 1},
    **{"device": "NVIDIA H200", "dtype": "bfloat16", "torch": "2.13.0"},
    **{"guidance": 7.5, "motion_guidance": 1.0},
    **{"matmul_flops_per_second": 700e12, "copy_bytes_per_second": 4e12},
}


def test_the_tables_of_a_large_model_fit_a_screen(profile, tiny_model, monkeypatch):
    def stage(parameters, forwards, flops, seconds):
        return describe_stage(
            Work(parameters, 2 * parameters, forwards, flops, 2 * parameters * forwards),
            (0.9 * seconds, seconds, 1.1 * seconds),
            {"allocated": int(41.5e9), "reserved": int(60e9)},
            LIMITS,
        )

    content = stage(865_910_724, 1000, 184_951_200_000_000, 100.0)
    decode = stage(49_490_199, 17, 86_661_886_000_000, 25.0)
    total = stage(1_634_000_000, 2117, 271_613_086_000_000, 130.0)
    record = LARGE | {
        **{"sampler": "dpm++", "steps": 1000, "motion_steps": 1000, "compile": False},
        "rows": {"clip": total | {"capture_seconds": 0.0, "stages": {"content": content, "VAE decode": decode}}},
    }
    monkeypatch.setattr(profiling, "profile", lambda *_, **__: record)
    code, out, _ = profile("--model", tiny_model)
    lines = out.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 120
    assert lines[2] == "measured limits: matmul 700.0 TFLOP/s, copy 4000.0 GB/s"
    rows = cells(lines)
    assert rows[0][:-1] == [*("stage", "seconds", "fastest-slowest", "share", "allocated GB", "reserved GB")]
    assert [rows[2][:-1], rows[4][:-1]] == [
        ["content", "100.0000", "90.0000-110.0000", "76.9%", "41.50", "60.00"],
        ["total", "130.0000", "117.0000-143.0000", "100.0%", "41.50", "60.00"],
    ]
    # a quarter of the longest bar
    assert [len(row[-1]) for row in rows[2:5]] == [25, 6, 0]
    assert [row[1:] for row in (rows[5], rows[7], rows[8])] == [
        [*("parameters M", "weights MB", "forwards", "TFLOP", "GFLOP/s", "of matmul"), *("read GB", "GB/s", "of copy")],
        # two bytes for each parameter and forward: 1731.8 GB in 100 s, of 4 TB/s
        ["865.9", "1731.8", "1000", "185.0", "1849.5", "0.3%", "1731.8", "17.32", "0.4%"],
        ["49.5", "99.0", "17", "86.7", "3466.5", "0.5%", "1.7", "0.07", "0.0%"],
    ]


def test_the_longest_stage_has_the_longest_bar(profile, tiny_model):
    code, out, _ = profile("--model", tiny_model, "--runs", 1, "--device", "cpu")
    assert code == 0
    rows = cells(out.splitlines())[2 : 2 + len(STAGES)]
    seconds = {row[0]: float(row[1]) for row in rows}
    bars = {row[0]: len(row[-1]) for row in rows}
    assert list(seconds) == STAGES
    assert bars[max(seconds, key=seconds.__getitem__)] == 25 == max(bars.values())


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
        (("--suite", "--batch", 2), "--suite measures ways to make one clip: --batch has no use"),
        (("--suite", "--trace", "trace.json"), "--trace has no use there"),
        (("--paper", "--suite"), "--suite has no use there"),
        (("--compile",), "--compile has a use with --suite alone"),
        (("--decoding", "--suite"), "--suite has no use there"),
        (("--suite", "--steps", 2), "steps 2 is not at least 3"),
        (("--suite", "--steps", 1001), "steps 1001 is not between 1 and 1000"),
        (("--suite", "--runs", 0), "runs 0 is not between 1 and 1000"),
        (("--suite", "--size", "63x64"), "both sides must be multiples"),
        (("--runs", 0), "runs 0 is not between 1 and 1000"),
        (("--batch", 0), "batch 0 is not between 1 and 1000"),
        (("--size", "63x64"), "both sides must be multiples"),
        (("--steps", 0), "steps 0 is not at least 1"),
        (("--device", "tpu"), "device 'tpu' is not one of"),
        (("--trace", "."), ".: not the name of a file"),
        (("--trace", "no/such/folder/trace.json"), "not the name of a file"),
    ],
)
def test_what_is_impossible_is_one_line_before_anything_runs(profile, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = profile(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_ways_to_decode_stand_side_by_side(profile, monkeypatch):
    paper = command.CMD_SD21
    small = replace(
        paper,
        vae=replace(paper.vae, block_out_channels=(64, 8, 8, 8), norm_num_groups=4),
        autoencoder=replace(paper.autoencoder, width=48, heads=2, depth=1),
    )
    monkeypatch.setattr(command, "CMD_SD21", small)
    # of so small a model, what it decodes is a large part
    monkeypatch.setattr(decoding, "TARGET", 0.75)
    code, out, err = profile("--decoding", "--size", "128x128", "--runs", 2, "--json")
    assert code == 0, err
    whole, default, least = json.loads(out)
    assert whole["slices"] is None and default["slices"]["strips"] == 1
    assert least["slices"]["strips"] > 1
    assert least["memory"]["live"] <= least["predicted"] <= 0.75 * whole["memory"]["live"]
    assert default["memory"]["live"] <= whole["memory"]["live"]
    assert all(0 < way["clip_seconds"] < way["seconds"] for way in (whole, default, least))
    code, out, _ = profile("--decoding", "--size", "128x128")
    assert code == 0 and out.startswith("cmd-sd21, 16 frames of 128x128\n")
    code, _, err = profile("--decoding", "--steps", 3)
    assert (code, err) == (2, "error: --decoding decodes with the paper's own model: --steps has no use there\n")


def test_ways_to_make_a_clip_stand_side_by_side(profile, tiny_model):
    arguments = ("--suite", "--model", tiny_model, "--steps", 4, "--runs", 1, "--size", "32x16")
    code, out, err = profile(*arguments, "--device", "cpu", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert (report.keys(), list(report["rows"])) == (SUITE_KEYS, ROWS)
    assert (report["steps"], report["motion_steps"], report["runs"]) == (4, 4, 1)
    assert (report["width"], report["height"], report["sampler"]) == (32, 16, "ddim")
    limit, rows = report["matmul_flops_per_second"], report["rows"]
    for row in rows.values():
        assert (row.keys(), row["seconds"].keys()) == (ROW_KEYS, SECONDS_KEYS)
        assert set(row["memory_bytes"]) <= {"resident"}
        assert row["flops"] == sum(stage["flops"] for stage in row["stages"].values())
        rate = row["flops"] / row["seconds"]["median"]
        assert row["flops_per_second"] == pytest.approx(rate)
        assert row["share_of_matmul"] == pytest.approx(rate / limit)
        content = row["stages"]["content"]["seconds"]
        assert row["content_step_seconds"] == pytest.approx(content["median"] / 4)
        parts = sum(stage["seconds"]["fastest"] for stage in row["stages"].values())
        assert row["seconds"]["slowest"] >= parts
    full = {name: (row["full_steps"], row["full_motion_steps"]) for name, row in rows.items()}
    assert full == dict(zip(ROWS, [(4, 4), (4, 4), (2, 2), (2, 2)], strict=True))
    step, clip = report["unet_step"], rows["clip"]
    assert step["seconds"] == clip["content_step_seconds"]
    counted = clip["stages"]["content"]["flops"] / 4
    assert step["flops_per_second"] == pytest.approx(counted / step["seconds"])
    assert step["share_of_matmul"] == pytest.approx(step["flops_per_second"] / limit)

    code, out, _ = profile(*arguments)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "tiny, 4 frames of 32x16, ddim 4 + 4 steps"
    assert [row[:2] for row in cells(lines)] == [
        ["clip", "full"],
        ["-" * len(lines[5].split("|")[1]), "-" * len(lines[5].split("|")[2])],
        ["the paper's count", "4 + 4"],
        ["prompt to file", "4 + 4"],
        ["rehash 2", "2 + 2"],
        ["rehash 2", "2 + 2"],
    ]
    (step_line,) = (line for line in lines if line.startswith("UNet step, guidance 3, of prompt"))
    assert re.search(r": \d+\.\d\d ms, [\d.]+ [MG]FLOP/s, [\d.]+% of matmul$", step_line)


def test_the_table_of_ways_fits_a_screen(profile, tiny_model, monkeypatch):
    memory = {"allocated": int(12.5e9), "reserved": int(15e9)}

    def row(full, step, seconds):
        spread = (0.9 * seconds, seconds, 1.1 * seconds)
        content = describe_stage(Work(flops=int(92e12)), (50 * step,) * 3, memory, LIMITS)
        decode = describe_stage(Work(flops=int(43e12)), (0.3,) * 3, memory, LIMITS)
        return describe_stage(Work(flops=int(135e12)), spread, memory, LIMITS) | {
            **{"full_steps": full, "full_motion_steps": full, "content_step_seconds": step, "capture_seconds": 0.0},
            "stages": {"content": content, "VAE decode": decode},
        }

    rows = {"paper": row(50, 0.005, 0.6), "clip": row(50, 0.008, 1.2)}
    rows |= {"rehash_half": row(25, 0.005, 0.8), "rehash_quarter": row(13, 0.003, 0.5)}
    settings = {"sampler": "ddim", "steps": 50, "motion_steps": 50, "compile": True}
    record = LARGE | settings | {"rows": rows}
    given = []
    monkeypatch.setattr(profiling, "profile", lambda load, *_, **__: given.append(load()) or record)
    monkeypatch.setattr("cmdgen.pipelines.load.check_compiler", lambda device: None)
    code, out, _ = profile("--suite", "--compile", "--model", tiny_model)
    lines = out.splitlines()
    assert code == 0
    assert given[0].uses_compiler
    assert max(map(len, lines)) <= 120
    assert lines[1] == "bfloat16 on NVIDIA H200, torch 2.13.0, compiled"
    assert lines[2] == "measured limit: matmul 700.0 TFLOP/s"
    header, _, *found = cells(lines)
    assert header == [
        *("clip", "full", "seconds", "fastest-slowest", "ms/step", "TFLOP/s", "of matmul"),
        *("allocated GB", "reserved GB"),
    ]
    # 135 TFLOP in 1.2 s
    assert found[1] == [
        *("prompt to file", "50 + 50", "1.200", "1.080-1.320", "8.00", "112.5", "16.1%"),
        *("12.50", "15.00"),
    ]
    assert found[2][:5] == ["rehash 25", "25 + 25", "0.800", "0.720-0.880", "5.00"]
    # 92 TFLOP in 50 steps of 8 ms
    assert "UNet step, guidance 7.5, of prompt to file: 8.00 ms, 230.0 TFLOP/s, 32.9% of matmul" in lines
