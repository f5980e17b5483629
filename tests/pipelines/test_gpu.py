"""Clips of a GPU are those of the CPU, with graphs and without."""

import numpy as np
import pytest
import torch

from cmdgen.acceleration.graphs import Graphed, fastest_libraries
from cmdgen.config import CMD_SD21, SAMPLERS, UNetConfig
from cmdgen.evaluation.metrics import psnr
from cmdgen.models.unet import UNet
from cmdgen.pipelines.clip import Clip
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.load import load_pipeline
from cmdgen.request import Request

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PROMPT = "a dog jumping in the snow"


def load(dtype: str, *, graphs: bool = True) -> CmdPipeline:
    pipeline = load_pipeline("mini", device=DEVICE, dtype=dtype)
    assert isinstance(pipeline, CmdPipeline)
    pipeline.uses_graphs &= graphs
    return pipeline


def decibels(one: Clip, other: Clip) -> float:
    first, second = (torch.from_numpy(clip.frames / 255).permute(0, 3, 1, 2) for clip in (one, other))
    return psnr(first, second)


@pytest.fixture(scope="module")
def expected() -> Clip:
    return load_pipeline("mini", device="cpu", dtype="float32").sample(PROMPT, seed=1)


# bfloat16 has 8 bits; a decoded clip shows about as many decibels less as the sampler takes steps
@pytest.mark.parametrize(("dtype", "least"), [("float32", 50), ("float16", 32), ("bfloat16", 25)])
def test_a_clip_is_the_cpus(expected: Clip, dtype: str, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert decibels(load(dtype).sample(PROMPT, seed=1), expected) >= least


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 1.0},
        {"motion_guidance": 3.0, "guidance_interval": (0.2, 0.8)},
        {"rehash": 5, "rehash_policy": "uniform", "guidance_interval": (0.3, 1.0)},
        {"size": (96, 128)},
        {"max_memory": 4_000_000},
    ],
)
def test_graphs_change_nothing(sampler: str, options: dict[str, object]) -> None:
    graphed, eager = load("bfloat16"), load("bfloat16", graphs=False)
    asked = {"sampler": sampler, "steps": 10, "motion_steps": 10, "seed": 3, **options}
    first, second = (graphed.sample(PROMPT, **asked) for _ in range(2))
    assert np.array_equal(first.frames, second.frames)
    assert decibels(first, eager.sample(PROMPT, **asked)) > 45


def test_latents_are_the_cpus(expected: Clip) -> None:
    here, there = load("float32"), load_pipeline("mini", device="cpu", dtype="float32")
    assert isinstance(there, CmdPipeline)
    one, other = (model.encode(expected.frames, model.plan(Request())) for model in (here, there))
    for part in ("content", "motion"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=1e-2, atol=1e-2)
    assert decibels(here.decode(other), there.decode(other)) > 40


def test_memory_does_not_grow_from_clip_to_clip() -> None:
    pipeline, reserved = load("bfloat16"), []
    for seed in range(12):
        pipeline.sample(PROMPT, seed=seed)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= 1.02 * reserved[3]


def test_the_papers_unet_is_captured_as_it_runs() -> None:
    assert isinstance(CMD_SD21.content, UNetConfig)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet(CMD_SD21.content).to(torch.bfloat16, memory_format=torch.channels_last)
        x = torch.randn(2, 4, 64, 128).to(torch.bfloat16, memory_format=torch.channels_last)
        text = torch.randn(2, 77, 1024, dtype=torch.bfloat16)
    with torch.inference_mode(), fastest_libraries(torch.device(DEVICE)):
        times, states = unet.project_time(torch.tensor([999.0, 20.0], device=DEVICE)), unet.project_text(text)
        graphed = Graphed(unet.denoise, torch.cuda.graph_pool_handle)
        for _ in range(2):
            assert torch.equal(graphed(x, times, *states), unet.denoise(x, times, *states))
            x = 0.5 * x
