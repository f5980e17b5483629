"""Clips made longer and filled in by EVDM (Zhang et al. 2023, ACM MM), and made from nothing.

past frames ─► the next few, given the last past ones ─► and again, until there are enough
two parts of a clip ─► the few frames between them, given those nearest on both sides
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cmdgen.config import EvdmConfig, ModelConfig
from cmdgen.models.evdm import Evdm
from cmdgen.options import write_size
from cmdgen.pipelines.base import Denoising, Pipeline, read_when_needed
from cmdgen.pipelines.clip import Clip, Inputs, Made, Task
from cmdgen.request import Plan, Request, resolve
from cmdgen.video.pixels import CONVERT, to_grey, to_rgb24, to_unit

# what a plan has and an EVDM has not, and what else a request may ask for in vain
_UNUSED = ("prompt", "negative", "content_seed", "motion_seed", "motion_steps", "guidance", "motion_guidance")
_VAIN = (*_UNUSED, "content_from", "motion_from", "image", "quality", "guidance_interval")

# frames that are turned into levels at a time
_TOGETHER = 64


def count_frames(parts: Sequence[int], new: int, *, keep: bool) -> int:
    """Return the length of a clip that has so many new frames after a part, or in each gap between several."""
    return keep * sum(parts) + new * max(1, len(parts) - 1)


def fit_gap(request: Request, model: ModelConfig) -> Request:
    """Return a request with the frames of each gap; ValueError for what the model cannot put between others."""
    shape = model.content
    assert isinstance(shape, EvdmConfig)
    if not shape.future:
        raise ValueError(f"{model.name} reads no future frames: it cannot interpolate")
    if request.frames is not None and request.frames > shape.current:
        raise ValueError(f"frames {request.frames}: {model.name} puts at most {shape.current} between two frames")
    return replace(request, frames=request.frames or shape.current)


class EvdmPipeline(Pipeline):
    """A model folder with an evdm/; the clips that it makes begin with the frames it is given."""

    network: Evdm = read_when_needed("evdm")

    @property
    def shape(self) -> EvdmConfig:
        """Return the network's configuration."""
        assert isinstance(self.config.content, EvdmConfig)
        return self.config.content

    def predict(self, past: np.ndarray | None = None, **options: object) -> Clip:
        """Continue uint8 (T, H, W, 3) by `frames` more; options are fields of `Request`."""
        return self._sample([] if past is None else [past], options)

    def interpolate(self, *parts: np.ndarray, **options: object) -> Clip:
        """Put `frames` between parts of a clip, uint8 (T, H, W, 3) each; options as for `predict`."""
        if len(parts) < 2:
            raise ValueError(f"{len(parts)} parts of a clip: frames are put between two or more")
        return self._sample(parts, options)

    def _sample(self, parts: Sequence[np.ndarray], options: dict[str, object]) -> Clip:
        request = Request(**options)  # type: ignore[arg-type]
        request = fit_gap(request, self.config) if len(parts) > 1 else request
        return self.run([self.plan(request)], inputs=Inputs(given=tuple(map(self.read, parts))))[0]

    def plan(self, request: Request, *, batch: int = 1) -> Plan:
        """Resolve a request for this model; see `Pipeline.plan`."""
        if request.rehashes or request.max_memory is not None or request.slice_streams > 1:
            raise ValueError(f"{self.config.name} has neither steps to rehash nor slices for less memory")
        for name in _VAIN:
            if getattr(request, name) not in (None, ""):
                of = f"{name.replace('_', ' ')} has no effect with {self.config.name}"
                raise ValueError(f"{of}: it continues clips from their frames alone")
        return resolve(request, self.config)

    def read(self, frames: np.ndarray) -> Tensor:
        """uint8 (T, H, W, 3) -> (C, T, H, W) in [-1, 1], grey where the model is; ValueError of other frames."""
        frames = np.ascontiguousarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 (T, H, W, 3)")
        pixels = to_unit(rearrange(torch.tensor(frames), "t h w c -> t c h w"))
        return (to_grey(pixels) if self.shape.channels == 1 else pixels).transpose(0, 1)

    def describe(self, plan: Plan, inputs: Inputs | None = None) -> dict[str, object]:
        """Return the metadata of the clip; `frames` are the new ones, those of each gap."""
        return {name: value for name, value in super().describe(plan, inputs).items() if name not in _UNUSED}

    def make(self, task: Task) -> Made:
        """Make clips; see `Pipeline.make`."""
        model, inputs = task.plan.model, task.inputs
        for part in inputs.given:
            size = part.shape[2], part.shape[3]
            if size != model.size or len(part) != self.shape.channels:
                sizes = " are not as the model's ".join(map(write_size, (size, model.size)))
                raise ValueError(f"frames of {len(part)} channels and {sizes}: resize them, or give their size")
        given = [part.to(self.device, torch.float32).expand(len(task.plans), *part.shape) for part in inputs.given]
        length = count_frames([part.shape[1] for part in inputs.given], model.frames, keep=inputs.keep)
        frames: np.ndarray | None = None
        picture: Tensor | None = None
        done = 0
        for whole, new in self.fill(task, given) if len(given) > 1 else self.extend(task, given):
            picture = whole[:, :, -1] if new else picture
            for piece in whole.split(_TOGETHER, dim=2) if new or inputs.keep else ():
                shown = self._show(piece, task)
                if frames is None:
                    frames = np.empty((len(shown), length, *shown.shape[2:]), np.uint8)
                frames[:, done : done + shown.shape[1]] = shown
                done += shown.shape[1]
        assert picture is not None and frames is not None and done == length
        pictures = to_rgb24(picture.expand(-1, 3, -1, -1)).cpu().numpy()
        return Made(frames, pictures, picture.cpu(), None)

    def _show(self, piece: Tensor, task: Task) -> np.ndarray:
        """(B, C, T, H, W) -> uint8 (B, T, ...) in the task's pixels, handed to its observer."""
        flat = rearrange(piece, "b c t h w -> (b t) c h w").expand(-1, 3, -1, -1)
        frames = CONVERT[task.pixels](flat).unflatten(0, (len(piece), piece.shape[2])).cpu().numpy()
        for i, clip in enumerate(frames):
            task.observer.frames(i, clip)
        return frames

    def extend(self, task: Task, given: Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
        """Yield the given frames, if any, and then new ones, some at a time; True marks new ones."""
        model, shape = task.plan.model, self.shape
        past = given[0] if given else torch.zeros(len(task.plans), shape.channels, 0, *model.size, device=self.device)
        if given:
            yield past, False
        for start in range(0, model.frames, shape.current):
            future = past[:, :, :0]
            new = self.denoise_block(task, past, future, start // shape.current, -(-model.frames // shape.current))
            new = new[:, :, : model.frames - start]
            past = torch.cat([past[:, :, -shape.past :], new], dim=2)
            yield new, True

    def fill(self, task: Task, given: Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
        """Yield the given parts with new frames between them; True marks new ones."""
        count, current = task.plan.model.frames, self.shape.current
        # evenly in time, of those that the network makes
        chosen = [round((i + 1) * (current + 1) / (count + 1)) - 1 for i in range(count)]
        yield given[0], False
        for gap, (past, future) in enumerate(pairwise(given)):
            yield self.denoise_block(task, past, future, gap, len(given) - 1)[:, :, chosen], True
            yield future, False

    def denoise_block(self, task: Task, past: Tensor, future: Tensor, number: int, of: int = 1) -> Tensor:
        """(B, C, T, H, W) x2 -> (B, C, current, H, W) in [-1, 1], from the frames nearest to it.

        `number` tells the blocks of a clip apart, of which there are `of`: each has noise of its own.
        """
        model, shape = task.plan.model, self.shape
        context = past.new_zeros(len(task.plans), shape.channels, shape.past + shape.future, *model.size)
        if known := min(shape.past, past.shape[2]):
            context[:, :, shape.past - known : shape.past] = past[:, :, -known:]
        known = min(shape.future, future.shape[2])
        context[:, :, shape.past : shape.past + known] = future[:, :, :known]
        network = self.graphed("evdm", self.network)

        def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return network(x.to(self.dtype), t, context)

        size, seeds = (shape.channels, shape.current, *model.size), [plan.seed for plan in task.plans]
        part, guidance = f"block {number + 1}", 1.0
        what = Denoising(part, size, seeds, model.noise, model.steps, guidance, number=number, of=of)
        conditions = ((context.to(self.dtype),),) * 2
        sampled = self.denoise(task, what, predict, conditions)
        return self.check_finite(sampled, "evdm").clamp(-1, 1)
