import json
from dataclasses import replace

import pytest
import torch

from cmdgen.cli.app import main
from cmdgen_kernels import samples
from cmdgen_kernels.dispatch import interpreted

NAMES = [op.name for op in samples.OPS]


@pytest.fixture
def doctor(capsys):
    """Runs the command in this process: its exit code, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["doctor", *arguments])
        return end.value.code or 0, *capsys.readouterr()

    return run


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
def test_kernels_are_tried_against_their_definitions(doctor):
    pytest.importorskip("triton")
    with interpreted():
        code, out, _ = doctor("--device", "cpu")
    assert code == 0
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


@pytest.mark.gpu
def test_all_kernels_run_and_agree_on_a_gpu(doctor):
    code, out, _ = doctor("--device", "cuda")
    assert code == 0, out
    assert out.count("kernel, agrees") == len(NAMES)


def test_a_device_that_is_not_there_is_refused(doctor):
    code, out, err = doctor("--device", "tpu")
    assert (code, out) == (2, "")
    assert err.startswith("error: device 'tpu' is not one of auto, cpu")
