"""Measures a whole model on the held-out combinations of its world: what `cmdgen eval` prints.

No weight of the models or of the probe is fitted to the test split; training renders a few of its
clips to watch itself.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from cmdgen.acceleration.slicer import decode_clip, encode_clip
from cmdgen.config import SampleConfig
from cmdgen.evaluation.metrics import SquaredError, frechet_distance
from cmdgen.evaluation.probe import HEADS, Probe
from cmdgen.evaluation.report import Figure, Report
from cmdgen.pipeline import TextToVideo
from cmdgen.world.world import World

# targets: decibels, and per cent of generated clips
_VAE_TARGETS = (30.0, 24.0)
_AUTOENCODER_TARGET = 27.0
_ABOVE_MEAN_FRAME = 5.0
_NAMED_TARGETS = {"subject": 70.0, "motion": 60.0, "scene": 85.0}
# what "well below frozen" is taken to mean
_OF_FROZEN = 0.5

# stage, how much of it is done, of how much
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvaluationConfig:
    """How much is measured."""

    # generated, and in each of two sets of real clips; 0 measures reconstruction alone
    clips: int = 500
    # rendered, encoded and decoded
    reconstructed: int = 256
    batch: int = 32
    # of the first generated clip; every next one has the next
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clips < 0 or self.clips == 1:
            raise ValueError(f"clips {self.clips} is neither 0 nor at least 2")
        for name in ("reconstructed", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 1")


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
        """Per cent named correctly."""
        return 100 * float(torch.cat(self._hits[head]).double().mean())

    def by_name(self, head: str) -> dict[str, float]:
        """Per cent named correctly of each class that occurs."""
        hits, labels = torch.cat(self._hits[head]).double(), torch.cat(self._labels[head])
        names = getattr(self.probe.config, head)
        return {
            names[label]: 100 * float(hits[labels == label].mean()) for label in labels.unique()
        }


@torch.inference_mode()
def evaluate(
    model: TextToVideo,
    world: World,
    probe: Probe,
    config: EvaluationConfig,
    *,
    on_progress: OnProgress,
) -> Report:
    """Every figure; ValueError for stills and where the probe was trained for another world."""
    if model.config.motion is None:
        raise ValueError(f"{model.config.name} makes stills: videos alone are evaluated")
    for head, names in zip(HEADS, (world.subjects, world.motions, world.scenes), strict=True):
        if getattr(probe.config, head) != names:
            raise ValueError(f"the probe knows {head}s of another world: train it again")
    figures, rebuilt = _measure_reconstruction(model, world, probe, config, on_progress)
    notes = [
        f"PSNR: of the mean squared error over all values of {config.reconstructed} held-out clips,"
        " pixels in [0, 1]; in the subject: over its mask. Mean frame: the clip's mean over time,"
        " repeated.",
        "All clips, and the captions that clips are generated from, are of combinations of subject,"
        " motion and scene that no weight was fitted to; training only watches some of them.",
    ]
    details: dict[str, object] = {}
    if config.clips:
        more, details = _measure_generation(model, world, probe, rebuilt, config, on_progress)
        figures += more
        notes += [
            f"Named: by a classifier of rendered training clips, on {config.clips} generated clips;"
            " beside: on rendered clips, and on those after the CMD autoencoder.",
            f"Frechet distance of its features: two sets of {config.clips}; generated and frozen"
            " (the generated content frame, repeated) against the real set whose captions they do"
            " not share; real: that set against the other.",
        ]
    settings = {
        **{"model": model.config.name, "split": "test", "clips": config.clips},
        **{"reconstructed": config.reconstructed, "batch": config.batch},
        "seeds": [config.seed, config.seed + config.clips - 1] if config.clips else None,
        "device": model.device.type,
    }
    title = f"{model.config.name}: {config.clips} generated clips, first seed {config.seed}"
    return Report(title, figures, notes, settings, details)


def _measure_reconstruction(
    model: TextToVideo,
    world: World,
    probe: Probe,
    config: EvaluationConfig,
    on_progress: OnProgress,
) -> tuple[list[Figure], Readings]:
    """PSNR of VAE, CMD autoencoder and mean frame; what the probe sees after CMD."""
    asked, parts = model.config, model.parts
    whole: dict[str, SquaredError] = defaultdict(SquaredError)
    subject: dict[str, SquaredError] = defaultdict(SquaredError)
    rebuilt = Readings(probe)
    indices = world.indices("test", config.reconstructed)
    done = 0
    for rows in indices.split(config.batch):
        clips = world.render(rows, (asked.height, asked.width), asked.frames)
        assert clips.mask is not None
        real = clips.frames.float() / 255
        pixels = rearrange(real, "b t c h w -> (b t) c h w").to(model.device, model.dtype)
        latents = parts.vae.to_latents(pixels * 2 - 1)
        by_clip = rearrange(latents, "(b t) c h w -> b c t h w", b=len(rows))
        assert parts.autoencoder is not None
        slices = model.plan_decoding(SampleConfig(), batch=len(rows))
        content, motion = encode_clip(parts.autoencoder, by_clip, slices)
        decoded = decode_clip(parts.autoencoder, content, motion, slices)
        predictions = {
            "vae": _pixels(model, latents).view_as(real),
            "autoencoder": _pixels(model, rearrange(decoded, "b c t h w -> (b t) c h w")).view_as(
                real
            ),
            "mean": real.mean(1, keepdim=True).expand_as(real),
        }
        for name, prediction in predictions.items():
            whole[name].add(prediction, real)
            subject[name].add(prediction, real, clips.mask)
        rebuilt.add((predictions["autoencoder"] * 255).round().to(torch.uint8), clips.labels)
        done += len(rows)
        on_progress("rebuild", done, len(indices))

    figures = []
    for name, label in (("vae", "VAE"), ("autoencoder", "CMD autoencoder")):
        for suffix, where, errors in (("", "", whole), ("_subject", " in the subject", subject)):
            value, mean = errors[name].psnr(), errors["mean"].psnr()
            beside, reason = {}, ""
            target = _VAE_TARGETS[errors is subject]
            if name == "autoencoder":
                beside = {"mean frame": mean, "VAE": errors["vae"].psnr()}
                target = _AUTOENCODER_TARGET
                if errors is subject:
                    target, reason = mean + _ABOVE_MEAN_FRAME, f"mean frame + {_ABOVE_MEAN_FRAME:g}"
            figures.append(
                Figure(
                    f"{name}_psnr{suffix}",
                    f"{label} PSNR{where}",
                    value,
                    "dB",
                    beside,
                    target,
                    reason=reason,
                )
            )
    return figures, rebuilt


def _measure_generation(
    model: TextToVideo,
    world: World,
    probe: Probe,
    rebuilt: Readings,
    config: EvaluationConfig,
    on_progress: OnProgress,
) -> tuple[list[Figure], dict[str, object]]:
    """What the probe names, and how far its features are from those of real clips."""
    asked, count = model.config, config.clips
    indices = world.indices("test", 2 * count)
    real = Readings(probe), Readings(probe)
    generated, frozen = Readings(probe), Readings(probe)
    done = 0
    for readings, half in zip(real, indices.split(count), strict=True):
        for rows in half.split(config.batch):
            clips = world.render(rows, (asked.height, asked.width), asked.frames)
            readings.add(clips.frames, clips.labels)
            done += len(rows)
            on_progress("render", done, 2 * count)
    done = 0
    for rows in indices[:count].split(config.batch):
        specs = world.specs(rows)
        labels = {"subject": specs.subject, "motion": specs.motion, "scene": specs.scene}
        seeds = list(range(config.seed + done, config.seed + done + len(rows)))
        made = model.sample_batch(world.captions(rows), SampleConfig(), seeds)
        frames = torch.stack([torch.from_numpy(clip.frames) for clip in made])
        generated.add(rearrange(frames, "b t h w c -> b t c h w"), labels)
        content = torch.stack([torch.from_numpy(clip.content) for clip in made])
        frozen.add(repeat(content, "b h w c -> b t c h w", t=asked.frames), labels)
        done += len(rows)
        on_progress("generate", done, count)

    figures = [
        Figure(
            f"named_{head}",
            f"{head} named correctly",
            generated.accuracy(head),
            "%",
            {"real": real[0].accuracy(head), "autoencoder": rebuilt.accuracy(head)},
            _NAMED_TARGETS[head],
        )
        for head in HEADS
    ]
    reference = real[1].features()
    distances = {
        name: frechet_distance(readings.features(), reference)
        for name, readings in (("generated", generated), ("real", real[0]), ("frozen", frozen))
    }
    figures.append(
        Figure(
            "frechet",
            "Frechet distance to real",
            distances.pop("generated"),
            "",
            distances,
            _OF_FROZEN * distances["frozen"],
            "most",
            f"{_OF_FROZEN:g} of frozen",
        )
    )
    return figures, {
        "named_by_class": {head: generated.by_name(head) for head in HEADS},
        "named_of_frozen": {head: frozen.accuracy(head) for head in HEADS},
    }


def _pixels(model: TextToVideo, latents: Tensor) -> Tensor:
    """(N, c, h, w) scaled -> (N, 3, H, W) float32 in [0, 1], on the CPU."""
    pixels = model.parts.vae.from_latents(latents).float().cpu()
    return ((pixels + 1) / 2).clamp(0, 1)
