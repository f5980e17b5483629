"""Measures a whole model on the held-out combinations of its world: what `cmdgen eval` prints.

No weight of the models or of the probe is fitted to the test split; training renders a few of its
clips to watch itself.
"""

import math
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
from cmdgen.evaluation.swap import Swap, find_mirrored
from cmdgen.pipelines.clip import Task
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.load import load_pipeline
from cmdgen.request import Plan, Request, Slices
from cmdgen.video.pixels import to_unit
from cmdgen.world.world import World, open_world

# targets in decibels; of the subject after the autoencoder, so many above the mean frame's
_PSNR_TARGETS = {"vae_psnr": 30.0, "vae_psnr_subject": 24.0, "autoencoder_psnr": 27.0}
_ABOVE_MEAN_FRAME = 5.0
# of whole frames, and of the subject alone
_PLACES = {"": "", "_subject": " in the subject"}
# per cent of generated clips
_NAMED_TARGETS = {"subject": 70.0, "motion": 60.0, "scene": 85.0}
# of rebuilt latents, of real ones; and of the way between the motions of growing and shrinking
_TIME_VARIANCE, _TEXT_SHIFT = 0.9, 0.4
# training clips that are looked through for these motions
SWAP_SEARCHED = 4096
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
    "rendered clips, on those after the CMD autoencoder, and with their motion alone sampled.",
    "Word swap: how far the word shrinking for growing, or growing for shrinking, moves the motion "
    "model's estimate at the noisiest timestep, of the way between the two.",
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
        model = self.pipeline.config
        errors = defaultdict[tuple[str, str], SquaredError](SquaredError)
        rebuilt, variance = Readings(self.probe), torch.zeros(2)
        indices = self.world.indices("test", options.reconstructed)
        for _, rows in self.batches("rebuild", indices, options.batch):
            clips = self.world.render(rows, model.size, model.frames)
            assert clips.mask is not None
            real = clips.frames.float() / 255
            latents, *halves = self.encode(clips.frames)
            rebuilt_latents = self.rebuild(*halves)
            variance += torch.stack([each.float().var(dim=2).mean().cpu() for each in (rebuilt_latents, latents)])
            predictions = {
                "vae": self.decode(latents),
                "autoencoder": self.decode(rebuilt_latents),
                "mean frame": real.mean(1, keepdim=True).expand_as(real),
            }
            for name, prediction in predictions.items():
                for place, mask in zip(_PLACES, (None, clips.mask), strict=True):
                    errors[name, place].add(prediction, real, mask)
            rebuilt.add(to_levels(predictions["autoencoder"]), clips.labels)
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
        share = float(variance[0] / variance[1])
        figures.append(Figure("time_variance", "variance over time, of real", share, "", {}, _TIME_VARIANCE))
        return figures, rebuilt

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3, H, W) uint8 -> latents (B, C, T, h, w), content (B, C, h, w), motion (B, D, T, S)."""
        pipeline = self.pipeline
        pixels = to_unit(rearrange(frames, "b t c h w -> (b t) c h w")).to(pipeline.device, pipeline.dtype)
        latents = pipeline.vae.to_latents(pixels)
        latents = rearrange(latents, "(b t) c h w -> b c t h w", b=len(frames))
        return latents, *encode_clip(pipeline.autoencoder, latents, self._slices(len(frames)))

    def rebuild(self, content: Tensor, motion: Tensor) -> Tensor:
        """(B, C, h, w), (B, D, T, S) -> latents (B, C, T, h, w)."""
        return decode_clip(self.pipeline.autoencoder, content, motion, self._slices(len(content)))

    def _slices(self, batch: int) -> Slices:
        return self.pipeline.plan(Request(), batch=batch).slices

    def animate(self, content: Tensor, rows: Tensor, seed: int) -> Tensor:
        """(B, C, h, w) -> (B, T, 3, H, W) uint8: clips of these content frames, the motion sampled."""
        pipeline = self.pipeline
        plan = pipeline.plan(Request(), batch=len(rows))
        plans = [vary(plan, caption, seed + i) for i, caption in enumerate(self.world.captions(rows))]
        text = pipeline.encode_text(plans)
        motion = pipeline.sample_motion(Task(plans), text, content).to(content)
        return to_levels(self.decode(self.rebuild(content, motion)))

    def text_shift(self, batch: int) -> float:
        """Return the word-swap figure of training clips; NaN where the world has none for it."""
        pipeline, model, indices = self.pipeline, self.pipeline.config, self.world.indices("train", SWAP_SEARCHED)
        rows = find_mirrored(self.world, indices)
        if rows is None or model.motion is None:
            return math.nan
        parts = [
            self.encode(self.world.render(part, model.size, model.frames).frames)[1:]
            for _, part in self.batches("swap", indices[rows.flatten()], batch)
        ]
        content, motion = (torch.cat(part).unflatten(0, rows.shape) for part in zip(*parts, strict=True))
        split = content.shape[-1] // pipeline.autoencoder.config.patch
        standardised = pipeline.autoencoder.standardise(motion.flatten(0, 1)).unflatten(0, rows.shape)

        def predict(x: Tensor, timestep: Tensor, content: Tensor, captions: list[str]) -> Tensor:
            ids = pipeline.tokenizer(captions, pipeline.text_length).to(pipeline.device)
            text = pipeline.text_encoder(ids).last_hidden_state
            return pipeline.motion(x, timestep, text=text, context=content, split=split)

        return Swap(self.world, indices[rows], content, standardised).shift(predict, model.motion.noise)

    def measure_generation(self, options: Evaluation, rebuilt: Readings) -> tuple[list[Figure], dict[str, object]]:
        """Read what the probe names, and how far its features are from those of real clips."""
        model, count = self.pipeline.config, options.clips
        indices = self.world.indices("test", 2 * count)
        real, reference, generated, frozen, animated = (Readings(self.probe) for _ in range(5))
        for readings, half in zip((real, reference), indices.split(count), strict=True):
            for done, rows in self.batches("render", half, options.batch):
                clips = self.world.render(rows, model.size, model.frames)
                readings.add(clips.frames, clips.labels)
                if readings is real:
                    _, content, _ = self.encode(clips.frames)
                    animated.add(self.animate(content, rows, options.seed + done), clips.labels)
        for done, rows in self.batches("generate", indices[:count], options.batch):
            labels, plan = self.labels(rows), self.pipeline.plan(Request(), batch=len(rows))
            frames, content = self.sample(plan, rows, options.seed + done)
            generated.add(frames, labels)
            frozen.add(repeat(content, "b c h w -> b t c h w", t=model.frames), labels)
        figures, sets = [], {"real": real, "autoencoder": rebuilt, "real content": animated}
        for head, target in _NAMED_TARGETS.items():
            beside = {name: readings.accuracy(head) for name, readings in sets.items()}
            value = generated.accuracy(head)
            figures.append(Figure(f"named_{head}", f"{head} named correctly", value, "%", beside, target))
        distances = {
            name: frechet_distance(readings.features(), reference.features())
            for name, readings in (("generated", generated), ("real", real), ("frozen", frozen))
        }
        value, target = distances.pop("generated"), _OF_FROZEN * distances["frozen"]
        reason = f"{_OF_FROZEN:g} of frozen"
        figures.append(Figure("frechet", "Frechet distance to real", value, "", distances, target, "most", reason))
        shift = self.text_shift(options.batch)
        if not math.isnan(shift):
            figures.append(Figure("text_shift", "word swap", shift, "", {}, _TEXT_SHIFT))
        return figures, {
            "named_by_class": {head: generated.by_name(head) for head in HEADS},
            "named_of_real_content": {head: animated.by_name(head) for head in HEADS},
            "named_of_frozen": {head: frozen.accuracy(head) for head in HEADS},
        }

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, T, h, w) scaled -> (B, T, 3, H, W) float32 in [0, 1], on the CPU."""
        pixels = self.pipeline.decoding_vae.from_latents(rearrange(latents, "b c t h w -> (b t) c h w"))
        unit = ((pixels.float().cpu() + 1) / 2).clamp(0, 1)
        return rearrange(unit, "(b t) c h w -> b t c h w", b=len(latents))


def load_evaluator(
    model: str, device: str, probe: Path | None = None, data: str = "mini", *, decoder: str | None = None, show: Show
) -> Evaluator:
    """Return what measures a model by a world; ValueError where that cannot be."""
    pipeline = load_pipeline(model, device=device, decoder=decoder)
    folder = probe or PACKAGED
    if not folder.is_dir():
        raise FileNotFoundError(f"no probe in {folder}: make one by `cmdgen eval --train-probe FOLDER`")
    if not isinstance(pipeline, CmdPipeline):
        what = "knows nothing of the small world" if pipeline.config.moves else "makes stills"
        raise ValueError(f"{pipeline.config.name} {what}: videos alone are measured")
    reader = Probe.from_pretrained(folder).to(pipeline.device)
    return Evaluator(pipeline, open_world(data), reader, show)


def _stack(pictures: Sequence[np.ndarray]) -> Tensor:
    """B x uint8 (..., H, W, 3) -> (B, ..., 3, H, W)."""
    return torch.stack([torch.from_numpy(picture) for picture in pictures]).movedim(-1, -3)


def to_levels(frames: Tensor) -> Tensor:
    """(...) in [0, 1] -> uint8."""
    return (frames * 255).round().to(torch.uint8)
