"""Time the steps of one model's UNet here, in diffusers, and compiled from diffusers.

    python tests/compare_diffusers.py FOLDER [--steps N] [--size WxH] [--compile [MODE]]

All in one process, in turns, from the same weights in the same dtype, one clip, both branches of
guidance in a batch. The sampler is ours for all of them: what differs is the UNet. Ours runs as it
does in `cmdgen sample`. How close the pictures are is in the table: it is the same work.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from cmdgen.diffusion.guidance import guide
from cmdgen.diffusion.samplers import SAMPLERS, Sampling
from cmdgen.evaluation.flops import count, count_work
from cmdgen.evaluation.profile import PROMPT, SAMPLER, STEPS, Stopwatch, device_name, measure_limits
from cmdgen.evaluation.report import table
from cmdgen.evaluation.settings import Profiling
from cmdgen.pipelines.device import dtype_name
from cmdgen.pipelines.load import load_pipeline
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Plan, Request
from cmdgen.video.pixels import to_rgb24

STAGE = "content"
OURS = "cmdgen"
# a way to run all steps under a clock, and the picture that they end in, uint8 (H, W, 3)
Run = Callable[[Stopwatch], np.ndarray]


class Theirs:
    """The same steps, from the same noise and text, with another UNet."""

    def __init__(self, pipeline: StillPipeline, plan: Plan, unet: Callable[..., Any]) -> None:
        self.pipeline, self.plan, self.unet = pipeline, plan, unet
        with torch.inference_mode():
            states = pipeline.encode_text([plan])
        # not of inference: torch.compile guards on such tensors
        self.text, self.empty = states.clone().chunk(2)
        config, model = pipeline.vae.config, plan.model
        size = model.height // config.stride, model.width // config.stride
        shape = (config.latent_channels, *size)
        self.noise = pipeline.noise("content", shape, [plan.content_seed])[0]

    def predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """(B, C, h, w), (B,), (B, L, D) -> (B, C, h, w)."""
        # a no-op but for CUDA graphs of torch.compile: what came before may be overwritten
        torch.compiler.cudagraph_mark_step_begin()
        output: Tensor = self.unet(x.to(self.pipeline.dtype), t, text, return_dict=False)[0]
        return output

    def __call__(self, watch: Stopwatch) -> np.ndarray:
        """A `Run`."""
        model = self.plan.model
        with torch.no_grad():
            with watch.stage(STAGE):
                latent = SAMPLERS[model.sampler](
                    guide(self.predict, model.guidance, (self.text,), (self.empty,)),
                    *(self.noise, Sampling(model.noise, model.steps)),
                )
            pixels = self.pipeline.vae.from_latents(latent.to(self.pipeline.dtype))
        return to_rgb24(pixels)[0].cpu().numpy()


def load_theirs(pipeline: StillPipeline) -> UNet2DConditionModel:
    """Return diffusers' UNet of the same folder."""
    # the other way of loading needs a package more
    how = {"torch_dtype": pipeline.dtype, "low_cpu_mem_usage": False}
    unet = UNet2DConditionModel.from_pretrained(pipeline.folder / "unet", **how)
    return unet.eval().requires_grad_(False).to(pipeline.device)


def count_theirs(theirs: Theirs) -> int:
    """Count the operations of all steps, two for each multiply-add."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(theirs.unet.config)
    # a forward has both branches of guidance
    noise, text = theirs.noise.to("meta"), theirs.text.to("meta")
    given = torch.cat((noise, noise)).float(), torch.zeros(2, device="meta")
    context = torch.cat((text, text)).float()
    return count(lambda: unet(*given, context)).flops * theirs.plan.model.steps


def run_ours(pipeline: StillPipeline, plan: Plan) -> Run:
    """Return a way to make a still by our pipeline."""

    def run(watch: Stopwatch) -> np.ndarray:
        (clip,) = pipeline.run([plan], watch)
        return clip.content

    return run


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """uint8 (H, W, 3) x 2 -> dB."""
    error = float(((a.astype(float) - b.astype(float)) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compare(request: Request, options: argparse.Namespace) -> list[str]:
    """Return the lines of the report."""
    pipeline = load_pipeline(request.model, device=request.device, dtype=request.dtype)
    plan = replace(pipeline.plan(request), prompt=PROMPT)
    model, device = plan.model, pipeline.device
    if model.guidance == 1:
        raise ValueError(f"{model.name} is not guided: say how strictly with --guidance")
    eager = Theirs(pipeline, plan, load_theirs(pipeline))
    runs: dict[str, Run] = {OURS: run_ours(pipeline, plan), "diffusers": eager}
    flops = dict.fromkeys(("diffusers", "diffusers, compiled"), count_theirs(eager))
    flops[OURS] = count_work(plan, pipeline.dtype)[STAGE].flops
    if options.compile is not None:
        # as diffusers' own guide says, a copy of its own: eager runs as it was loaded
        fast = load_theirs(pipeline).to(memory_format=torch.channels_last)
        compiled = torch.compile(fast, mode=options.compile, fullgraph=True)
        runs["diffusers, compiled"] = Theirs(pipeline, plan, compiled)

    # the first run of each reads weights, compiles, captures
    pictures = {name: run(Stopwatch(device)) for name, run in runs.items()}
    limit = measure_limits(device, pipeline.dtype).flops_per_second
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, int] = dict.fromkeys(runs, 0)
    for _ in range(options.runs):
        # in turns: what else the machine does, it does to all of them
        for name, run in runs.items():
            watch, before = Stopwatch(device), _allocated(device)
            run(watch)
            seconds[name].append(watch.seconds[STAGE])
            peak = watch.memory[STAGE].get("allocated", 0) - before
            memory[name] = max(memory[name], peak)

    cuda = device.type == "cuda"
    rows = [
        (
            *("UNet", "seconds", "fastest-slowest", "ms/step", "TFLOP/s", "of matmul"),
            *(("allocated MB",) if cuda else ()),
            *("of ours", f"as {OURS}"),
        )
    ]
    for name, each in seconds.items():
        rate = flops[name] / median(each)
        rows.append(
            (
                name,
                f"{median(each):.3f}",
                f"{min(each):.3f}-{max(each):.3f}",
                f"{1000 * median(each) / model.steps:.2f}",
                f"{rate / 1e12:.3f}",
                f"{rate / limit:.1%}",
                *((f"{memory[name] / 1e6:.0f}",) if cuda else ()),
                f"{median(each) / median(seconds[OURS]):.2f}x",
                "" if name == OURS else f"{psnr(pictures[name], pictures[OURS]):.1f} dB",
            )
        )
    return [
        f"{model.name}, {model.steps} steps of {model.sampler} at {model.width}x{model.height}, "
        f"guidance {model.guidance:g}",
        f"{dtype_name(pipeline.dtype)} on {device_name(device)}, torch {torch.__version__}, "
        f"matmul {limit / 1e12:.3f} TFLOP/s",
        "",
        *table(rows),
        "",
        f"- The median of {options.runs}, in turns, after one to warm up.",
        "- Operations: two for each multiply-add of what each runs.",
        *(["- Allocated: the highest in the steps, beside all weights."] if cuda else []),
    ]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="such as `cmdgen models init mini -o DIR` writes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", type=int, default=Profiling.runs)
    parser.add_argument("--size", help="WxH; the model's own unless given")
    parser.add_argument("--guidance", type=float, help="the model's own unless given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="reduce-overhead",
        choices=("default", "reduce-overhead", "max-autotune"),
        help="compile diffusers' UNet too, which takes minutes; %(const)s if no mode is given",
    )
    options = parser.parse_args()
    try:
        request = Request(
            **{"model": str(options.folder), "device": options.device, "dtype": options.dtype},
            **{"sampler": SAMPLER, "steps": options.steps, "guidance": options.guidance},
            **{"frames": 1, "size": options.size},
        )
        # checks the number of runs
        Profiling(runs=options.runs)
        lines = compare(request, options)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
