"""A small classifier that tells what a clip shows; its penultimate layer is the Frechet feature.

It learns from rendered training clips only, blurred, noisy and shifted in brightness, so that it
judges what a generated clip shows and not how cleanly it is drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from cmdgen.models.pretrained import Pretrained
from cmdgen.world.world import World

# the probe of the small world, which ships with the default model
PACKAGED = Path(__file__).parents[1] / "assets" / "mini" / "probe"
HEADS = ("subject", "motion", "scene")


@dataclass(frozen=True)
class ProbeConfig:
    """What the probe can name, and its sizes."""

    subject: tuple[str, ...] = ()
    motion: tuple[str, ...] = ()
    scene: tuple[str, ...] = ()
    # clips of any other size are resized to it
    size: int = 64
    width: int = 96
    features: int = 128


@dataclass(frozen=True)
class ProbeTraining:
    """How the probe learns; the defaults take twenty minutes of one CPU core."""

    steps: int = 3200
    batch: int = 24
    # of the frames that it reads
    size: int = ProbeConfig.size
    lr: float = 4e-3
    weight_decay: float = 0.02
    seed: int = 0


def _block(layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> list[nn.Module]:
    """Return a layer with what normalises and rectifies its output."""
    norm = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
    return [layer, norm(layer.weight.shape[0]), nn.ReLU()]


class Probe(Pretrained[ProbeConfig]):
    """Frames one by one, then their features over time, then three linear heads."""

    config_type = ProbeConfig
    filename = "model.safetensors"

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        width, features = config.width, config.features
        frames = partial(nn.Conv2d, bias=False)
        times = partial(nn.Conv1d, width, width, 3, padding=1, bias=False)
        self.trunk = nn.Sequential(
            # every frame beside its change to the next
            *_block(frames(6, width // 2, 4, 4)),
            *_block(frames(width // 2, width, 3, 2, padding=1)),
            *_block(frames(width, width, 3, padding=1)),
            *_block(frames(width, width, 3, 2, padding=1)),
        )
        # keeps where things are: motion is a change of place
        self.place = nn.Sequential(*_block(frames(width, width // 4, 1)))
        cells = width // 4 * (config.size // 16) ** 2
        self.time = nn.Sequential(*_block(nn.Conv1d(cells, width, 1, bias=False)), *_block(times()), *_block(times()))
        self.features = nn.Sequential(*_block(nn.Linear(4 * width, features)))
        self.heads = nn.ModuleDict({head: nn.Linear(features, len(getattr(config, head))) for head in HEADS})

    def forward(self, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, 3, H, W) in [0, 1] -> features (B, D), logits (B, classes) by head."""
        count, size = frames.shape[1], (self.config.size, self.config.size)
        flat = rearrange(frames, "b t c h w -> (b t) c h w")
        if flat.shape[2:] != size:
            flat = F.interpolate(flat, size, mode="area")
        x = rearrange(flat - 0.5, "(b t) c h w -> b t c h w", t=count)
        change = F.pad(x.diff(dim=1), (0, 0, 0, 0, 0, 0, 0, 1))
        x = rearrange(torch.cat([x, 2 * change], dim=2), "b t c h w -> (b t) c h w")
        x = self.trunk(x.contiguous(memory_format=torch.channels_last))  # (B T, C, 4, 4)
        looks = reduce(x, "(b t) c h w -> b t c", "max", t=count)
        places = self.time(rearrange(self.place(x), "(b t) c h w -> b (c h w) t", t=count))
        pooled = [looks.mean(1), looks.amax(1), places.mean(2), places.amax(2)]
        features = self.features(torch.cat(pooled, dim=1))
        return features, {head: linear(features) for head, linear in self.heads.items()}

    @torch.no_grad()
    def read(self, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, 3, H, W) uint8 -> features (B, D) float32, class numbers (B,) by head."""
        device = next(self.parameters()).device
        features, logits = self(frames.to(device).float() / 255)
        return features.float().cpu(), {name: row.argmax(1).cpu() for name, row in logits.items()}


def degrade(frames: Tensor, generator: torch.Generator) -> Tensor:
    """(B, T, 3, H, W) in [0, 1] -> the same: blur, brightness, noise, drawn for each clip."""

    def draw(low: float, high: float) -> Tensor:
        rows = torch.rand(len(frames), 1, 1, 1, 1, generator=generator)
        return (low + (high - low) * rows).to(frames.device)

    def coarse(factor: int) -> Tensor:
        flat = rearrange(frames, "b t c h w -> (b t) c h w")
        small = F.avg_pool2d(flat, factor)
        return F.interpolate(small, flat.shape[2:], mode="bilinear").view_as(frames)

    # a quarter of the clips stay sharp, the blurriest are half way to a quarter of the resolution
    blur = draw(-0.5, 1.5).clamp(min=0)
    half, quarter = coarse(2), coarse(4)
    frames = frames.lerp(half, blur.clamp(max=1)).lerp(quarter, (blur - 1).clamp(min=0))
    noise = torch.randn(frames.shape, generator=generator).to(frames.device)
    frames = frames * draw(0.85, 1.15) + draw(-0.08, 0.08) + noise * draw(-0.02, 0.05).clamp(min=0)
    return frames.clamp(0, 1)


def train_probe(
    world: World,
    config: ProbeTraining = ProbeTraining(),
    *,
    device: torch.device,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> Probe:
    """Learn from `steps * batch` clips of the training split, each seen once."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    probe = Probe(ProbeConfig(world.subjects, world.motions, world.scenes, config.size))
    probe = probe.to(device).train()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps, pct_start=0.2)
    indices = world.indices("train", config.steps * config.batch)
    for step, rows in enumerate(indices.split(config.batch)):
        clips = world.render(rows, (config.size, config.size), device=str(device))
        _, logits = probe(degrade(clips.frames.float() / 255, generator))
        losses = [F.cross_entropy(logits[head], clips.labels[head], label_smoothing=0.05) for head in HEADS]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        on_step(step + 1, config.steps)
    return probe.eval()
