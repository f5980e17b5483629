"""Compiled networks give what they give as they are; torch's own backend is tried on a small one.

Everything else goes through a backend that traces alike and leaves out what takes minutes.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from cmdgen.acceleration import graphs
from cmdgen.acceleration.compiled import Compiled
from cmdgen.models.layers import ResnetBlock
from cmdgen.models.unet import UNet
from cmdgen.pipelines import base
from cmdgen.pipelines.load import load_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forget():
    """Programs of other tests count towards torch's limits."""
    torch._dynamo.reset()


def test_compiled_clips_are_those_of_the_networks(monkeypatch, tiny_model: Path) -> None:
    plain = load_pipeline(tiny_model, device="cpu")
    place = plain.folder, plain.config, plain.device, plain.dtype
    ours = type(plain)(*place, compile=True)
    # tracing takes time for each layer
    small = replace(
        plain.config.content,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    unet = UNet(small).eval()
    for model in (plain, ours):
        monkeypatch.setitem(model._parts, "unet", unet)
    made: list[Compiled] = []

    def prepare(function):
        made.append(Compiled(function))
        return made[-1]

    monkeypatch.setattr(base, "Compiled", prepare)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(graphs, "capture", lambda run, inputs, *_: lambda: run(*inputs))
    options = {
        **{"sampler": "ddim", "steps": 3, "motion_steps": 4, "guidance": 1.0},
        **{"motion_guidance": 3.0, "guidance_interval": "0.4-1.0", "seed": 0},
    }
    skipping = {**options, "rehash": 2, "rehash_policy": "uniform"}
    # the batches that content and motion are compiled for, guidance being two; with step rehash
    # each of them in full, then skipped
    shapes = [{1}, {2, 1}, {1}, {1}, {2, 1}, {2}]
    for asked, count in ((options, 2), (skipping, 6), (options, 6)):
        expected, clip = plain.sample("a dog", **asked), ours.sample("a dog", **asked)
        assert np.abs(clip.frames.astype(int) - expected.frames).max() <= 1
        assert clip.metadata == {**expected.metadata, "compile": True}
        # of what is made, the whole networks are not run where steps are skipped
        found = [{key[0][0][0] for key in each.shapes} for each in made if each.shapes]
        assert found == shapes[:count]
        # from here on graphs, of what was compiled
        ours.uses_graphs = True


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_torchs_compiler_gives_what_the_blocks_give() -> None:
    torch.manual_seed(0)
    block = ResnetBlock(4, 8, groups=2, eps=1e-5, time_width=8)

    def run(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        y = block(x.contiguous(memory_format=torch.channels_last), time)
        return y, y.mean(dim=1)

    with torch.inference_mode():
        x, time = torch.randn(2, 4, 6, 5), torch.randn(2, 8)
        torch.testing.assert_close(Compiled(run)(x, time), run(x, time))


def test_every_set_of_shapes_is_compiled_once_whatever_the_order_in_memory() -> None:
    compiled: list[torch.Size] = []

    def backend(graph, inputs):
        compiled.extend(each.shape for each in inputs)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        double = Compiled(lambda x: x + x)
        # torch alone stops at the ninth
        for _ in range(2):
            for size in range(2, 14):
                for x in (torch.randn(size, 3), torch.randn(3, size).T):
                    assert torch.equal(double(x), 2 * x)
    assert compiled == [(size, 3) for size in range(2, 14)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CppCompileError: C++ compile error\n\nOutput:\na.h:1: error: b.h: no file\nmore", "b.h"),
        ("backend='inductor' raised:\nInvalidCxxCompiler: none found.\n\nSet X", "none found;"),
        ("", "TorchDynamoException;"),
    ],
)
def test_what_the_compiler_says_is_one_line(monkeypatch, text: str, reason: str) -> None:
    def refuse(*_: object, **__: object):
        raise TorchDynamoException(text)

    monkeypatch.setattr(torch, "compile", lambda function, **_: refuse)
    with pytest.raises(ValueError, match=r"^torch.compile fails on cpu: ") as caught:
        Compiled(torch.sin)(torch.ones(2))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_compiler_the_command_says_so_in_one_line(tiny_model: Path, tmp_path) -> None:
    environment = {
        **{"PATH": str(tmp_path), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        **{"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path)},
    }
    command = [
        *(sys.executable, "-m", "cmdgen", "sample", "a dog", "-o", tmp_path / "dog.mp4"),
        *("--model", tiny_model, "--device", "cpu", "--compile"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch.compile fails on cpu: ")
    assert "needs a C++ compiler (g++, or that of CXX)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "dog.mp4").exists()
