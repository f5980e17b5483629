"""Measures a whole model on the held-out combinations of its world: what `cmdgen eval` prints.

No weight of the models or of the probe is fitted to the test split; training renders a few of its
clips to watch itself.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from cmdgen.acceleration.slicer import decode_clip, encode_clip
from cmdgen.evaluation.metrics import SquaredError, frechet_distance
from cmdgen.evaluation.probe import HEADS, PACKAGED, Probe
from cmdgen.evaluation.profile import Show, Stopwatch, vary
from cmdgen.evaluation.report import Figure, Report
from cmdgen.evaluation.settings import Evaluation
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.load import load_pipeline
from cmdgen.request import Plan, Request
from cmdgen.world.config import MINI_WORLD
from cmdgen.world.world import World

# targets in decibels; of the subject after the autoencoder, so many above the mean frame's
_PSNR_TARGETS = {"vae_psnr": 30.0, "vae_psnr_subject": 24.0, "autoencoder_psnr": 27.0}
_ABOVE_MEAN_FRAME = 5.0
# of whole frames, and of the subject alone
_PLACES = {"": "", "_subject": " in the subject"}
# per cent of generated clips
_NAMED_TARGETS = {"subject": 70.0, "motion": 60.0, "scene": 85.0}
# what "well below frozen" is taken to mean
_OF_FROZEN = 0.5

_RECONSTRUCTION_NOTES = [
    "PSNR: of the mean squared error over all values of {reconstructed} held-out clips, pixels in "
    "[0, 1]; in the subject: over its mask. Mean frame: the clip's mean over time, repeated.",
    "All clips, and the captions that clips are generated from, are of combinations of subject, "
    "motion and scene that no weight was fitted to; training only watches some of them.",
]
_GENERATION_NOTES = [
    "Named: by a classifier of rendered training clips, on {clips} generated clips; beside: on "
    "rendered clips, and on those after the CMD autoencoder.",
    "Frechet distance of its features: two sets of {clips}; generated and frozen (the generated "
    "content frame, repeated) against the real set whose captions they do not share; real: that "
    "set against the other.",
]


class Readings:
    """What the probe saw in one set of clips, batch by batch."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._features: list[Tensor] = []
        self._hits: dict[str, list[Tensor]] = {head: [] for head in HEADS}
        self._labels: dict[str, list[Tensor]] = {head: [] for head in HEADS}

    def add(self, frames: Tensor, labels: dict[str, Tensor]) -> None:
        """(B, T, 3, H, W) uint8, what they should show (B,) by head -> None."""
        features, named = self.probe.read(frames)
        self._features.append(features)
        for head in HEADS:
            self._hits[head].append(named[head] == labels[head].cpu())
            self._labels[head].append(labels[head].cpu())

    def features(self) -> Tensor:
        """() -> (N, D)."""
        return torch.cat(self._features)

    def accuracy(self, head: str) -> float:
        """Return the per cent named correctly."""
        return 100 * float(torch.cat(self._hits[head]).double().mean())

    def by_name(self, head: str) -> dict[str, float]:
        """Return the per cent named correctly of each class that occurs."""
        hits, labels = torch.cat(self._hits[head]).double(), torch.cat(self._labels[head])
        names = getattr(self.probe.config, head)
        return {names[label]: 100 * float(hits[labels == label].mean()) for label in labels.unique()}


@dataclass(frozen=True)
class Evaluator:
    """A model, and the world and the probe that it is measured by.

    Raises ValueError where the probe was trained for another world.
    """

    pipeline: CmdPipeline
    world: World
    probe: Probe
    show: Show

    def __post_init__(self) -> None:
        for head in HEADS:
            if getattr(self.probe.config, head) != getattr(self.world, f"{head}s"):
                raise ValueError(f"the probe knows {head}s of another world: train it again")

    def labels(self, rows: Tensor) -> dict[str, Tensor]:
        """(B,) indices of clips -> what they show, (B,) by head."""
        specs = self.world.specs(rows)
        return {head: getattr(specs, head) for head in HEADS}

    def batches(self, stage: str, indices: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
        """(N,) -> what was done before and the next indices, (B,), in turn; shows progress."""
        done = 0
        for rows in indices.split(size):
            yield done, rows
            done += len(rows)
            self.show(stage, done, len(indices))

    def sample(self, plan: Plan, rows: Tensor, seed: int, watch: Stopwatch | None = None) -> tuple[Tensor, Tensor]:
        """(B,) indices of clips -> uint8 (B, T, 3, H, W), (B, 3, H, W): of their captions."""
        captions = self.world.captions(rows)
        plans = [vary(plan, caption, seed + i) for i, caption in enumerate(captions)]
        clips = self.pipeline.run(plans, watch)
        return _stack([clip.frames for clip in clips]), _stack([clip.content for clip in clips])

    @torch.inference_mode()
    def evaluate(self, options: Evaluation) -> Report:
        """Measure every figure."""
        figures, rebuilt = self.measure_reconstruction(options)
        notes = _RECONSTRUCTION_NOTES
        details: dict[str, object] = {}
        if options.clips:
            more, details = self.measure_generation(options, rebuilt)
            figures, notes = figures + more, notes + _GENERATION_NOTES
        sizes = {name: getattr(options, name) for name in ("clips", "reconstructed", "batch")}
        name, seed = self.pipeline.config.name, options.seed
        settings = {
            **{"model": name, "split": "test", **sizes},
            "seeds": [seed, seed + options.clips - 1] if options.clips else None,
            "device": self.pipeline.device.type,
        }
        title = f"{name}: {options.clips} generated clips, first seed {seed}"
        return Report(title, figures, [note.format(**sizes) for note in notes], settings, details)

    def measure_reconstruction(self, options: Evaluation) -> tuple[list[Figure], Readings]:
        """Measure PSNR of VAE, CMD autoencoder and mean frame; show the probe what CMD rebuilds."""
        pipeline, model = self.pipeline, self.pipeline.config
        errors = defaultdict[tuple[str, str], SquaredError](SquaredError)
        rebuilt = Readings(self.probe)
        indices = self.world.indices("test", options.reconstructed)
        for _, rows in self.batches("rebuild", indices, options.batch):
            clips = self.world.render(rows, (model.height, model.width), model.frames)
            assert clips.mask is not None
            real = clips.frames.float() / 255
            pixels = rearrange(real, "b t c h w -> (b t) c h w").to(pipeline.device, pipeline.dtype)
            latents = pipeline.vae.to_latents(pixels * 2 - 1)
            latents = rearrange(latents, "(b t) c h w -> b c t h w", b=len(rows))
            slices = pipeline.plan(Request(), batch=len(rows)).slices
            halves = encode_clip(pipeline.autoencoder, latents, slices)
            predictions = {
                "vae": self._decode(latents),
                "autoencoder": self._decode(decode_clip(pipeline.autoencoder, *halves, slices)),
                "mean frame": real.mean(1, keepdim=True).expand_as(real),
            }
            for name, prediction in predictions.items():
                for place, mask in zip(_PLACES, (None, clips.mask), strict=True):
                    errors[name, place].add(prediction, real, mask)
            levels = (predictions["autoencoder"] * 255).round().to(torch.uint8)
            rebuilt.add(levels, clips.labels)
        figures = []
        for name, label in (("vae", "VAE"), ("autoencoder", "CMD autoencoder")):
            for place, where in _PLACES.items():
                key, mean = f"{name}_psnr{place}", errors["mean frame", place].psnr()
                target, reason = _PSNR_TARGETS.get(key), ""
                if target is None:
                    target, reason = mean + _ABOVE_MEAN_FRAME, f"mean frame + {_ABOVE_MEAN_FRAME:g}"
                beside = {"mean frame": mean, "VAE": errors["vae", place].psnr()} if name != "vae" else {}
                value = errors[name, place].psnr()
                figures.append(Figure(key, f"{label} PSNR{where}", value, "dB", beside, target, reason=reason))
        return figures, rebuilt

    def measure_generation(self, options: Evaluation, rebuilt: Readings) -> tuple[list[Figure], dict[str, object]]:
        """Read what the probe names, and how far its features are from those of real clips."""
        model, count = self.pipeline.config, options.clips
        indices = self.world.indices("test", 2 * count)
        real, reference, generated, frozen = (Readings(self.probe) for _ in range(4))
        for readings, half in zip((real, reference), indices.split(count), strict=True):
            for _, rows in self.batches("render", half, options.batch):
                clips = self.world.render(rows, (model.height, model.width), model.frames)
                readings.add(clips.frames, clips.labels)
        for done, rows in self.batches("generate", indices[:count], options.batch):
            labels, plan = self.labels(rows), self.pipeline.plan(Request(), batch=len(rows))
            frames, content = self.sample(plan, rows, options.seed + done)
            generated.add(frames, labels)
            frozen.add(repeat(content, "b c h w -> b t c h w", t=model.frames), labels)
        figures = []
        for head, target in _NAMED_TARGETS.items():
            beside = {"real": real.accuracy(head), "autoencoder": rebuilt.accuracy(head)}
            value = generated.accuracy(head)
            figures.append(Figure(f"named_{head}", f"{head} named correctly", value, "%", beside, target))
        distances = {
            name: frechet_distance(readings.features(), reference.features())
            for name, readings in (("generated", generated), ("real", real), ("frozen", frozen))
        }
        value, target = distances.pop("generated"), _OF_FROZEN * distances["frozen"]
        reason = f"{_OF_FROZEN:g} of frozen"
        figures.append(Figure("frechet", "Frechet distance to real", value, "", distances, target, "most", reason))
        return figures, {
            "named_by_class": {head: generated.by_name(head) for head in HEADS},
            "named_of_frozen": {head: frozen.accuracy(head) for head in HEADS},
        }

    def _decode(self, latents: Tensor) -> Tensor:
        """(B, c, T, h, w) scaled -> (B, T, 3, H, W) float32 in [0, 1], on the CPU."""
        pixels = self.pipeline.vae.from_latents(rearrange(latents, "b c t h w -> (b t) c h w"))
        unit = ((pixels.float().cpu() + 1) / 2).clamp(0, 1)
        return rearrange(unit, "(b t) c h w -> b t c h w", b=len(latents))


def load_evaluator(model: str, device: str, probe: Path | None = None, *, show: Show) -> Evaluator:
    """Return what measures a model by the small world; ValueError where that cannot be."""
    pipeline = load_pipeline(model, device=device)
    folder = probe or PACKAGED
    if not folder.is_dir():
        raise FileNotFoundError(f"no probe in {folder}: make one by `cmdgen eval --train-probe FOLDER`")
    if not isinstance(pipeline, CmdPipeline):
        raise ValueError(f"{pipeline.config.name} makes stills: videos alone are measured")
    reader = Probe.from_pretrained(folder).to(pipeline.device)
    return Evaluator(pipeline, World(MINI_WORLD), reader, show)


def _stack(pictures: Sequence[np.ndarray]) -> Tensor:
    """B x uint8 (..., H, W, 3) -> (B, ..., 3, H, W)."""
    return torch.stack([torch.from_numpy(picture) for picture in pictures]).movedim(-1, -3)
