"""What each block of a model is worth, and smaller models beside the whole one, on the same seeds."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from cmdgen.compression.importance import FAILED, Importance, Row
from cmdgen.compression.prune import prune_network
from cmdgen.compression.shortcuts import list_layers, list_vdmini, pick_layers, skip_layers
from cmdgen.compression.units import list_units
from cmdgen.evaluation.measure import Evaluator, Readings, load_evaluator, to_levels
from cmdgen.evaluation.metrics import frechet_distance
from cmdgen.evaluation.probe import HEADS
from cmdgen.evaluation.profile import Show, in_turn, vary
from cmdgen.evaluation.report import table
from cmdgen.evaluation.settings import Contest, Weighing
from cmdgen.latents import latent_shapes
from cmdgen.pipelines.clip import Task
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.request import Plan, Request

# parts that have blocks, in the order in which they run
PARTS = ("unet", "motion", "autoencoder", "vae")
# the rule's decoder, which is not of a folder
VDMINI = "VDMini's decoder"
# in which the whole network and the smaller one are timed in turn
ROUNDS = 25


@dataclass
class Clips:
    """Clips of held-out captions, batch by batch, and what the probe reads in them."""

    readings: Readings
    content: list[Tensor] = field(default_factory=list)  # (B, C, h, w)
    motion: list[Tensor] = field(default_factory=list)  # (B, K, T, W' + H')
    frames: list[Tensor] = field(default_factory=list)  # uint8 (B, T, 3, H, W)

    def likeness(self, whole: "Clips") -> dict[str, Any]:
        """Return decibels to the whole model's clips: of all, of the median clip; and clips that are others."""
        pairs = zip(torch.cat(self.frames), torch.cat(whole.frames), strict=True)
        errors = torch.tensor([float(((a.double() - b.double()) / 255).square().mean()) for a, b in pairs])
        failed = int((errors > 10 ** (-FAILED / 10)).sum())
        return {"psnr": _decibels(errors.mean()), "median": _decibels(errors.median()), "failed": failed}


def _decibels(error: Tensor) -> float | None:
    return -10 * math.log10(float(error)) if error > 0 else None


def make_clips(
    evaluator: Evaluator, plan: Plan, options: Weighing | Contest, given: Clips | None = None, *, since: str = "unet"
) -> Clips:
    """Make clips of held-out captions; what runs before the part `since` is taken from `given`."""
    pipeline, made, done = evaluator.pipeline, Clips(Readings(evaluator.probe)), 0
    first = PARTS.index(since)
    assert first == 0 or given is not None
    for i, rows in enumerate(evaluator.world.indices("test", options.clips).split(options.batch)):
        captions = evaluator.world.captions(rows)
        plans = [vary(plan, caption, options.seed + done + j) for j, caption in enumerate(captions)]
        text = pipeline.encode_text(plans) if first < 2 else torch.empty(0)
        content = given.content[i] if given and first > 0 else pipeline.sample_content(Task(plans), text)
        motion = given.motion[i] if given and first > 1 else pipeline.sample_motion(Task(plans), text, content)
        halves = (half.to(pipeline.dtype) for half in (content, motion))
        frames = to_levels(evaluator.decode(evaluator.rebuild(*halves)))
        for kept, tensor in ((made.content, content), (made.motion, motion), (made.frames, frames)):
            kept.append(tensor)
        made.readings.add(frames, evaluator.labels(rows))
        done += len(rows)
    return made


def list_runs(pipeline: CmdPipeline, plan: Plan) -> dict[str, tuple[int, Callable[[Any], object]]]:
    """Return how often each part runs for one clip, and such a run of a network, on random values."""
    model = plan.model
    draw = partial(torch.randn, device=pipeline.device, dtype=pipeline.dtype)
    assert model.text is not None
    content, motion = (draw(1, *shape) for shape in latent_shapes(model))
    branches = [1 + (guidance != 1) for guidance in (model.guidance, model.motion_guidance)]
    states = [draw(count, pipeline.text_length, model.text.hidden_size) for count in branches]
    times = [torch.full((count,), 500.0, device=pipeline.device) for count in branches]
    still, moving, context = (
        half.expand(count, *half.shape[1:])
        for half, count in zip((content, motion, content), (*branches, branches[1]), strict=True)
    )
    ground = {"context": context, "split": content.shape[-1] // pipeline.autoencoder.config.patch}
    frames = draw(model.frames, *content.shape[1:])
    return {
        "unet": (model.steps, lambda unet: unet(still, times[0], states[0])),
        "motion": (model.motion_steps, lambda dit: dit(moving, times[1], text=states[1], **ground)),
        "autoencoder": (1, lambda autoencoder: autoencoder.decode(content, motion)),
        "vae": (1, lambda vae: vae.from_latents(frames)),
    }


def measure_seconds(pipeline: CmdPipeline, plan: Plan, part: str, whole: Any, small: Any) -> tuple[float, float]:
    """Return the seconds of one part for one clip, and a smaller network's share; of a CPU, those of this thread.

    Both run in each round, and medians count: the fastest rounds of the two, as benchmarks take them, can
    be of different minutes of a busy machine.
    """
    count, run = list_runs(pipeline, plan)[part]
    clock = time.perf_counter if pipeline.device.type == "cuda" else time.thread_time
    rounds = in_turn((partial(run, whole), partial(run, small)), pipeline.device, clock, ROUNDS)
    return count * median(first for first, _ in rounds), median(second / first for first, second in rounds)


def shorten(network: Any, unit: str) -> tuple[Any, int]:
    """Return a network without one block, and the parameters that are gone."""
    if unit in list_layers(network):
        return skip_layers(network, [unit]), sum(map(_count, pick_layers(network, [unit])))
    small = prune_network(network, [unit])
    return small, _count(network) - _count(small)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.inference_mode()
def measure_importance(evaluator: Evaluator, options: Weighing, path: Path) -> Importance:
    """Make the same clips without each block in turn, and write what was measured after each one.

    What a file holds already is not measured again.
    """
    pipeline, show = evaluator.pipeline, evaluator.show
    plan = pipeline.plan(Request(steps=options.steps, motion_steps=options.steps), batch=options.batch)
    about = pipeline.config.name, pipeline.weights_hash, options.data, options.clips, plan.model.steps, options.seed
    importance = Importance(*about).resume(path)
    units = [
        (part, unit)
        for part in PARTS
        if options.part in (None, part)
        for unit in (*list_units(part, pipeline.part(part).config), *list_layers(pipeline.part(part)))
    ]
    measured = {row.unit for row in importance.rows}
    # the first clips of a process are slow
    show("importance", 0, len(units))
    whole = make_clips(evaluator, plan, options)
    features = whole.readings.features()
    for done, (part, unit) in enumerate(units, 1):
        if f"{part}.{unit}" not in measured:
            network = pipeline.part(part)
            small, parameters = shorten(network, unit)
            with pipeline.swapped(part, small):
                made = make_clips(evaluator, plan, options, whole, since=part)
                seconds, share = measure_seconds(pipeline, plan, part, network, small)
            apart = (made.readings.features() - features).square().sum(1).mean() / features.var(0).sum()
            named: dict[str, Any] = {head: made.readings.accuracy(head) for head in HEADS}
            likeness = made.likeness(whole)
            row = Row(
                f"{part}.{unit}", parameters, seconds, seconds * (1 - share), **likeness, distance=float(apart), **named
            )
            importance = replace(importance, rows=(*importance.rows, row))
            importance.write(path)
        show("importance", done, len(units))
    return importance


def list_importance(importance: Importance) -> list[str]:
    """Return a title and a table; the time saved is a share of the part's."""
    header = ("block", "parameters", "time saved", "PSNR", "median", f"< {FAILED:g} dB", "distance", *HEADS)
    rows: list[tuple[str, ...]] = [header]
    for row in importance.rows:
        cells = f"{row.parameters:,}", f"{100 * row.share:.1f} %", _show(row.psnr), _show(row.median), str(row.failed)
        named = (f"{getattr(row, head):.1f} %" for head in HEADS)
        rows.append((row.unit, *cells, f"{row.distance:.3f}", *named))
    title = f"{importance.model}: {importance.clips} clips of {importance.steps} steps, without each block"
    return [title, "", *table(rows)]


def _show(decibels: float | None) -> str:
    return "inf" if decibels is None else f"{decibels:.2f}"


@torch.inference_mode()
def compare_models(options: Contest, device: str, show: Show) -> dict[str, Any]:
    """Make the same clips with each model; the first is the whole one, and decodes with each small decoder too.

    Returns settings, and under "rows" a record of each. ValueError where a model makes other clips.
    """
    name, *others = options.models
    ways = [(name, None), (name, VDMINI), *((name, folder) for folder in options.decoder)]
    ways += [(other, None) for other in others]
    whole: Clips | None = None
    rows: list[dict[str, Any]] = []
    for done, (model, decoder) in enumerate(ways):
        show("compare", done, len(ways))
        folder = None if decoder == VDMINI else decoder
        evaluator = load_evaluator(model, device, options.probe, options.data, decoder=folder, show=_silent)
        pipeline, dropped = evaluator.pipeline, 0
        plan = pipeline.plan(Request(steps=options.steps, motion_steps=options.steps), batch=options.batch)
        vae = pipeline.decoding_vae
        if decoder == VDMINI:
            names = list_vdmini(pipeline.vae)
            vae, dropped = skip_layers(vae, names), sum(map(_count, pick_layers(vae, names)))
        with pipeline.swapped("vae", vae):
            made = make_clips(evaluator, plan, options, whole, since="vae" if decoder else "unet")
        networks = {part: pipeline.part(part) for part in PARTS} | {"vae": vae}
        if whole is None:
            whole, first, real = made, networks, _read_real(evaluator, options)
        if made.frames[0].shape != whole.frames[0].shape:
            raise ValueError(f"{model} makes clips of another size or length than {name}")
        timed = {part: measure_seconds(pipeline, plan, part, first[part], networks[part]) for part in PARTS}
        likeness = made.likeness(whole) if made is not whole else {"psnr": None, "median": None, "failed": 0}
        parameters = {part: _count(net) for part, net in (networks | {"vae": vae.decoder}).items()}
        rows.append(
            {
                **{"model": model if decoder is None else f"{model}, {decoder}"},
                "parameters": parameters | {"vae": parameters["vae"] - dropped},
                "seconds": {part: seconds * share for part, (seconds, share) in timed.items()},
                # of the first model's, which ran in turn with it
                "share": {part: share for part, (_, share) in timed.items()},
                **likeness,
                "named": {head: made.readings.accuracy(head) for head in HEADS},
                "frechet": frechet_distance(made.readings.features(), real),
            }
        )
    show("compare", len(ways), len(ways))
    shared = {key: getattr(options, key) for key in ("clips", "steps", "seed", "batch")}
    return {**shared, "device": device, "threads": torch.get_num_threads(), "rows": rows}


def _silent(stage: str, done: int, total: int) -> None: ...


def _read_real(evaluator: Evaluator, options: Contest) -> Tensor:
    """Return the features (N, D) of as many real clips, of other captions."""
    model, readings = evaluator.pipeline.config, Readings(evaluator.probe)
    for rows in evaluator.world.indices("test", 2 * options.clips)[options.clips :].split(options.batch):
        clips = evaluator.world.render(rows, model.size, model.frames)
        readings.add(clips.frames, clips.labels)
    return readings.features()


def list_comparison(comparison: dict[str, Any]) -> list[str]:
    """Return a title and a table: parameters of the two samplers and two decoders, milliseconds of a clip.

    "Sampler" and "decoders" are shares of the first model's time: of each part as measured in turn with
    it, weighted by the seconds of the first row.
    """
    times = ("ms: content", "motion", "frame decode", "VAE decode", "sampler", "decoders")
    rows: list[tuple[str, ...]] = [
        ("model", "10^6 parameters", *times, "PSNR", "median", f"< {FAILED:g} dB", *HEADS, "Frechet")
    ]
    whole = comparison["rows"][0]["seconds"]
    for i, row in enumerate(comparison["rows"]):
        cells = "/".join(f"{count / 1e6:.2f}" for count in row["parameters"].values())
        near = (_show(row["psnr"]), _show(row["median"]), str(row["failed"])) if i else ("", "", "")
        named = (f"{row['named'][head]:.1f} %" for head in HEADS)
        seconds = (f"{1e3 * row['seconds'][part]:.0f}" for part in PARTS)
        shares = []
        for half in (PARTS[:2], PARTS[2:]):
            left = sum(row["share"][part] * whole[part] for part in half)
            shares.append(f"{left / sum(whole[part] for part in half):.2f}")
        rows.append((row["model"], cells, *seconds, *shares, *near, *named, f"{row['frechet']:.2f}"))
    return [f"{comparison['clips']} clips of held-out captions, first seed {comparison['seed']}", "", *table(rows)]
