import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from cmdgen import config
from cmdgen.evaluation.memory import measure_memory
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen_kernels import dispatch, samples

NAMES = [op.name for op in samples.OPS]


@pytest.fixture
def doctor(cmdgen):
    """Runs the command in this process: its exit code, stdout and stderr."""
    return lambda *arguments, before=(): cmdgen(*before, "doctor", *arguments)


def test_every_op_has_a_line_that_says_what_it_runs_as(doctor):
    code, out, err = doctor("--device", "cpu")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[2].split() == ["torch", torch.__version__]
    for name, line in zip(NAMES, lines[-len(NAMES) :], strict=True):
        assert line.split() == f"{name} reference: the tensors are on cpu, not on a GPU".split()


def test_json_holds_what_the_lines_say(doctor):
    code, out, _ = doctor("--device", "cpu", "--json")
    report = json.loads(out)
    assert code == 0
    assert list(report["ops"]) == NAMES
    assert {op["runs"] for op in report["ops"].values()} == {"reference"}
    assert report["devices"][0]["device"] == report["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run on the GPU")
def test_kernels_are_tried_against_their_definitions(doctor, monkeypatch):
    pytest.importorskip("triton")
    # minutes in the interpreter
    monkeypatch.setattr("cmdgen.cli.doctor._check_model", lambda record, device: "not tried")
    monkeypatch.setattr(dispatch, "_interpreting", True)
    code, out, err = doctor("--device", "cpu")
    assert (code, err) == (0, "")
    for line in out.splitlines()[-len(NAMES) :]:
        assert "kernel, agrees with the reference (error " in line


def test_a_kernel_that_is_wrong_is_named_and_fails(doctor, monkeypatch):
    def wrong(frames, logits):
        return frames.mean(dim=2)

    def broken(frames, logits):
        raise RuntimeError("no kernel image\nfor this device")

    op = replace(samples.OPS[0], obstacle=lambda *inputs: None)
    ops = (op, replace(op, name="wrong", run=wrong), replace(op, name="broken", run=broken))
    monkeypatch.setattr(samples, "OPS", ops)
    code, out, err = doctor("--device", "cpu")
    assert code == 1
    assert err == "error: not what the definition gives, on cpu: wrong, broken\n"
    right, other, none = out.splitlines()[-3:]
    assert "kernel, agrees" in right
    assert "kernel, does not agree" in other
    assert "kernel, fails: no kernel image for this device" in none


def test_kernels_are_compared_in_full_float32(doctor, monkeypatch):
    # what cuDNN's convolutions may be rounded to on a GPU would hide errors
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    def run(frames, logits):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return samples.OPS[0].reference(frames, logits)

    monkeypatch.setattr(samples, "OPS", (replace(samples.OPS[0], obstacle=lambda *inputs: None, run=run),))
    code, _, err = doctor("--device", "cpu")
    assert (code, err) == (0, "")
    assert seen == [(False, False)]
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
def test_all_kernels_run_and_agree_on_a_gpu(doctor):
    code, out, _ = doctor("--device", "cuda")
    assert code == 0, out
    assert out.count("kernel, agrees") == len(NAMES)


def test_a_device_that_is_not_there_is_refused(doctor):
    code, out, err = doctor("--device", "tpu")
    assert (code, out) == (2, "")
    assert err.startswith("error: --device 'tpu' is not one of auto, cpu")


def test_what_the_machine_has_is_said(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    blob = tmp_path / "models--acme--video" / "blobs" / "1"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x" * 2**20)
    code, out, err = doctor("--device", "cpu", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    memory = report["devices"][0]
    assert 0 < memory["free"] <= memory["memory"] < 2**14
    assert set(report["ffmpeg"]["codecs"]) == {"h264", "hevc", "av1", "vp9", "ffv1"}
    assert report["ffmpeg"]["codecs"]["h264"]
    assert re.match(r"n?\d+\.\d+", report["ffmpeg"]["version"])
    assert report["cache"] == {"folder": str(tmp_path), "models": 0, "bytes": 2**20}
    assert report["config"]["exists"] is False and "error" not in report["config"]
    assert report["model"]["name"] == "mini" and report["model"]["seconds"] > 0


def test_a_model_that_is_broken_is_named_and_fails(doctor, monkeypatch, tmp_path):
    folder = tmp_path / "mini"
    shutil.copytree(config.packaged_models()["mini"], folder)
    (weights,) = (folder / "motion").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr(config, "packaged_models", lambda: {"mini": folder})
    code, out, err = doctor("--device", "cpu")
    assert code == 1
    assert err == "error: broken: model\n"
    assert re.search(rf"^model +broken: {weights}: ", out, re.MULTILINE)
    monkeypatch.setattr(config, "packaged_models", dict)
    assert json.loads(doctor("--json")[1])["model"]["error"].startswith("it does not ship")


def test_an_encoder_that_is_broken_is_named_and_fails(doctor, monkeypatch, tmp_path):
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho 'ffmpeg version 1.2 of ours'\necho ' V....D libx265 HEVC'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    code, out, err = doctor("--device", "cpu", "--json")
    found = json.loads(out)["ffmpeg"]
    assert (code, err) == (1, "error: broken: ffmpeg\n")
    assert (found["version"], found["error"]) == ("1.2", "it cannot encode h264")
    assert [name for name, there in found["codecs"].items() if there] == ["hevc"]
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    code, out, _ = doctor("--device", "cpu")
    assert code == 1 and re.search("^ffmpeg +broken: .*No such file", out, re.MULTILINE)


def test_a_config_file_that_is_wrong_is_named_and_fails(doctor, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[sample]\nstepz = 3\n")
    code, out, err = doctor("--device", "cpu", before=("--config", str(path)))
    assert (code, err) == (1, "error: broken: config\n")
    assert f"{path}: [sample] has no option 'stepz'" in out
    path.write_text("[doctor]\njson = true\n")
    code, out, _ = doctor("--device", "cpu", before=("--config", str(path)))
    assert code == 0
    assert json.loads(out)["config"] == {"path": str(path), "exists": True}


def test_a_clip_that_is_of_one_colour_is_no_clip(doctor, monkeypatch):
    sample = CmdPipeline.sample

    def grey(self, *arguments, **options):
        clip = sample(self, *arguments, **options)
        return replace(clip, frames=np.full_like(clip.frames, 128))

    monkeypatch.setattr(CmdPipeline, "sample", grey)
    code, out, _ = doctor("--device", "cpu")
    assert code == 1 and "its clip is of one colour" in out


def test_memory_of_a_container_is_what_it_may_take(monkeypatch):
    def read(path, *arguments, **options):
        return {
            "/proc/meminfo": "MemTotal: 8192 kB\nMemFree: 1024 kB\nMemAvailable: 4096 kB\n",
            "/sys/fs/cgroup/memory.max": limit,
            "/sys/fs/cgroup/memory.current": "1048576\n",
            "/sys/fs/cgroup/memory.stat": "anon 1048576\n",
        }[str(path)]

    monkeypatch.setattr("pathlib.Path.read_text", read)
    limit = "max\n"
    assert measure_memory(torch.device("cpu")) == (8 * 2**20, 4 * 2**20)
    limit = f"{3 * 2**20}\n"
    assert measure_memory(torch.device("cpu")) == (3 * 2**20, 2 * 2**20)
