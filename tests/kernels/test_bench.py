import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cmdgen.config import PRESETS, UNetConfig
from cmdgen_kernels import samples

SCRIPT = Path(__file__).parents[2] / "kernels" / "bench" / "run.py"
spec = importlib.util.spec_from_file_location("bench_run", SCRIPT)
assert spec is not None and spec.loader is not None
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = {
    "content_frame": (2, 3, 4, 5, 6),
    "motion_latents": (2, 3, 4, 5, 16, 4),
    "motion_tokens": (2, 3, 4, 5, 16, 4),
    "gated_attention": (1, 2, 20, 16, 16),
    "group_norm_silu": (2, 64, 3, 5),
    "convolution": (2, 8, 3, 5),
    "doubled_convolution": (2, 8, 3, 5),
    "layer_norm": (2, 5, 16),
    "geglu": (2, 5, 16),
    "wide_attention": (1, 20, 264),
    "time_attention": (2, 5, 3, 2, 16),
    "rotate": (2, 5, 16),
    "yuv420p": (2, 4, 6),
}


def clock(run):
    """A stub: what is called takes ten microseconds each time."""
    run()
    return bench.Time(10.0, 9.0, 12.0)


def make(compile=lambda function: function):
    limits = bench.Limits(copy=4000.0, product=700.0, cache=2**20)
    return bench.Bench(clock, compile, limits, torch.float16, DEVICE)


def measure(name, *, backward=False, **options):
    return bench.measure(make(**options), name, "tiny", "here", TINY[name], backward=backward)


def inputs(name):
    return bench.NAMED[name].inputs(TINY[name], torch.float16)


def test_cases_are_the_presets_own_sizes():
    assert {name for name, *_ in bench.CASES} == set(bench.NAMED) == set(TINY)
    for name, place, *columns in bench.CASES:
        for preset, sizes in zip(bench.PRESETS, columns, strict=True):
            config = PRESETS[preset]
            stride = config.vae.stride
            height, width = config.height // stride, config.width // stride
            tokens = height // config.autoencoder.patch, width // config.autoencoder.patch
            motion = (*(config.frames, *tokens), *(config.autoencoder.width, config.autoencoder.motion_channels))
            channels = config.autoencoder.channels
            assert isinstance(config.content, UNetConfig)
            expected = {
                ("content_frame", "latents"): (channels, config.frames, height, width),
                ("motion_latents", "tokens"): motion,
                ("motion_tokens", "tokens"): motion,
                ("group_norm_silu", "UNet, level 0"): (*(config.content.block_out_channels[0], height, width),),
                ("group_norm_silu", "VAE, last level"): (
                    *(config.vae.block_out_channels[0], config.height, config.width),
                ),
            }
            assert sizes == expected.get((name, place), sizes), (name, place, preset)


@pytest.mark.parametrize(
    ("name", "backward"), [(name, False) for name in TINY] + [(op.name, True) for op in samples.OPS if op.leaves]
)
def test_a_row_holds_parity_times_rate_and_speed_ups(name, backward):
    row = measure(name, backward=backward)
    assert row["parity"] and row["obstacle"] is None
    assert row["over_compiled"] == row["over_reference"] == 1.0
    assert row["percent"] == pytest.approx(100 * row["rate"] / row["limit"])
    json.dumps(row)
    text = bench.line(row)
    assert text.startswith(f"{name} tiny here {'training' if backward else 'forward'}")
    assert "1.00x" in text and "WRONG" not in text


def test_bytes_are_those_of_inputs_and_outputs():
    def moved(name, *, backward=False, cache=2**20):
        op = bench.NAMED[name]
        return bench.bytes_moved(op, inputs(name), backward=backward, cache=cache)

    video, frame = 2 * 3 * 4 * 5 * 6 * 2, 2 * 3 * 5 * 6 * 2
    assert moved("content_frame") == 2 * video + frame
    assert moved("content_frame", backward=True) == 6 * video + 2 * frame
    u, z, weights = 2 * 3 * 4 * 5 * 16 * 2, 2 * 4 * 3 * 9 * 2, 2 * (4 * 16 + 4) * 2
    assert moved("motion_latents") == u + weights + z
    assert moved("motion_latents", backward=True) == 2 * (u + weights + z)
    x, rest = 2 * 64 * 15 * 2, (64 + 64 + 2 * 64) * 2
    assert moved("group_norm_silu") == 2 * x + rest
    # what no cache holds is read once for the mean and once more
    assert moved("group_norm_silu", cache=100) == 3 * x + rest
    assert moved("group_norm_silu", backward=True) == 5 * x + 3 * rest
    assert moved("group_norm_silu", backward=True, cache=100) == 8 * x + 3 * rest
    # x and what is added to it, their sum and its norm; a condition's three rows
    assert moved("layer_norm") == 4 * 2 * 5 * 16 * 2 + 3 * 2 * 16 * 2
    assert moved("time_attention") == 4 * 2 * 5 * 3 * 2 * 16 * 2


def test_rates_follow_from_bytes_operations_and_time():
    assert bench.flops("wide_attention", (2, 8192, 512), backward=False) == 2 * 4 * 8192**2 * 512
    assert bench.flops("gated_attention", (2, 5, 8192, 64, 256), backward=False) == 8 * 2 * 5 * 8192 * 64 * 256
    row = measure("gated_attention")
    assert row["rate"] == pytest.approx(8 * 2 * 20 * 16 * 16 / 10e-6 / 1e12)
    row = measure("content_frame")
    assert row["rate"] == pytest.approx(row["bytes"] / 10e-6 / 1e9)
    limits = bench.measure_limits(clock, size=1000, side=10, cache=7, device="cpu")
    assert limits == bench.Limits(pytest.approx(2000 / 10e-6 / 1e9), pytest.approx(2e-4), 7)


def wrong(*tensors):
    return samples.OPS[0].reference(*tensors) * 1.01


def test_what_is_wrong_gets_no_speed_up(monkeypatch):
    op = samples.OPS[0]
    for changes in ({"run": wrong}, {"obstacle": lambda *tensors: "no luck"}):
        monkeypatch.setitem(bench.NAMED, op.name, replace(op, **changes))
        row = measure(op.name)
        assert row["over_compiled"] is None and row["over_reference"] is None
        assert ("WRONG" if "run" in changes else "no kernel: no luck") in bench.line(row)
        assert "x" not in bench.line(row).split("%", 3)[3]


def test_the_summary_names_what_is_slow_or_wrong():
    row = {"op": "a", "preset": "cmd-sd21", "place": "p", "pass": "forward", "parity": True}
    row |= {"unit": "GB/s", "percent": 85.0, "over_compiled": 2.0}
    slow = row | {"op": "b", "percent": 60.0, "over_compiled": 0.5}
    bad = row | {"op": "c", "parity": False, "over_compiled": None}
    summary = bench.summarise([row, slow, bad, row | {"over_compiled": 1.0}], batch=8)
    assert summary == {
        "geometric_mean_over_compiled": pytest.approx(1.0),
        "wrong": ["c cmd-sd21 p forward"],
        "slower_than_compiled": ["b cmd-sd21 p forward"],
        "below_80_percent_of_copy": ["b cmd-sd21 p forward"],
    }
    assert bench.summarise([slow], batch=1)["below_80_percent_of_copy"] == []


def test_attention_is_set_beside_softmax_attention():
    row = bench.measure_attention(make(), TINY["gated_attention"], backward=False)
    json.dumps(row)
    # a CPU has no cuDNN
    assert "CUDNN_ATTENTION" not in row["softmax"] or DEVICE == "cuda"
    assert bench.attention_line(row).startswith("B=1 N=2 L=20")


def test_a_run_measures_what_is_asked_for_and_says_it(monkeypatch):
    monkeypatch.setattr(bench, "PRESETS", ("mini", "cmd-sd21"))
    monkeypatch.setattr(bench, "CASES", [(name, "here", TINY[name][1:], TINY[name][1:]) for name in TINY])
    monkeypatch.setattr(bench, "LENGTHS", (20, 30))
    monkeypatch.setattr(bench, "ATTENTION", (1, 2, 16, 16))
    said = []
    result = bench.run(make(), op=None, preset=None, batch=1, say=said.append)
    trained = [op.name for op in samples.OPS if op.leaves]
    assert len(result["rows"]) == 2 * len(TINY) + len(trained)
    assert [row["op"] for row in result["rows"] if row["pass"] == "training"] == trained
    assert [row["sizes"][2] for row in result["attention"]] == [20, 20, 30, 30]
    assert len(said) == len(result["rows"]) + 4 + 1
    assert said[-1].startswith("geometric_mean_over_compiled: 1.0")
    json.dumps(result)

    result = bench.run(make(), op="yuv420p", preset=None, batch=1, say=said.append)
    assert (len(result["rows"]), len(result["attention"])) == (2, 0)
    result = bench.run(make(compile=None), op="geglu", preset="mini", batch=1, say=said.append)
    (row,) = result["rows"]
    assert (row["preset"], row["compiled"], row["over_compiled"], row["over_reference"]) == ("mini", None, None, 1.0)
    assert said[-2].count(" - ") == 2 and result["summary"]["geometric_mean_over_compiled"] is None


def test_without_a_gpu_there_is_nothing_to_time():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "there is no GPU here: nothing to time\n"
