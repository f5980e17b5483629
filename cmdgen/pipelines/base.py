"""What all pipelines share: the clip, the device, noise per clip, graphs, one sampling loop."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from cmdgen import __version__
from cmdgen.acceleration.calibration import choose_key_steps
from cmdgen.acceleration.compiled import Compiled
from cmdgen.acceleration.graphs import Graphed, Out, fastest_libraries
from cmdgen.acceleration.memory import Work, choose_slices
from cmdgen.config import ModelConfig, NoiseConfig
from cmdgen.diffusion.guidance import guide
from cmdgen.diffusion.samplers import SAMPLERS, VISITED, Sampling
from cmdgen.diffusion.windows import order_noise
from cmdgen.latents import Latents, check_fit
from cmdgen.metadata import INPUT_FIELDS, describe_plan
from cmdgen.models.tiny_vae import TinyVae
from cmdgen.models.vae import KlVae
from cmdgen.pipelines.clip import Clip, Inputs, Made, Task
from cmdgen.pipelines.device import dtype_name
from cmdgen.pipelines.observer import Observer
from cmdgen.request import Plan, Request, apply_quality, check_applies, resolve, shared_settings, with_prompt
from cmdgen.store.lora import Lora, merge_lora
from cmdgen.store.parts import hash_weights, load_part, network_configs
from cmdgen.video.formats import Pixels, describe_origin
from cmdgen.video.pixels import CONVERT
from cmdgen.weights import hash_weights as hash_files

# timesteps that are projected at once: all of them, except for very long schedules
TIMESTEPS_TOGETHER = 64
# of guidance: what the positive and what the negative branch reads
Branches = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
Look = Callable[[Tensor], None] | None
# plans that are kept: a batch may come from a pipe that never ends
_MAX_PLANS = 1000


@dataclass(frozen=True)
class Denoising:
    """One part of a batch of clips that a sampler makes from noise."""

    part: str
    shape: tuple[int, ...]  # of one clip
    seeds: Sequence[int]
    schedule: NoiseConfig
    steps: int
    # of all rows, or of each, (B, 1, ...)
    guidance: float | Tensor
    # rows of one clip; where it is made in windows, those of one and those that two share
    frames: int = 1
    window: int | None = None
    overlap: int | None = None
    # where several blocks are made in turn, which are shown as one stage: which, and how many
    number: int = 0
    of: int = 1


def read_when_needed(part: str) -> Any:
    """Return a property: one part of a pipeline's model; reading it raises ValueError, naming the file at fault."""
    return property(lambda pipeline: pipeline.part(part))


class Pipeline(ABC):
    """A model folder, ready to sample; its weights are read when first needed."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compile: bool = False,
        loras: Sequence[Lora] = (),
        decoder: Path | None = None,
    ) -> None:
        self.folder, self.config = folder, config
        self.device, self.dtype = device, dtype
        self.uses_compiler = compile
        # on a GPU, launching kernels takes longer than running them
        self.uses_graphs = device.type == "cuda"
        # compiled and captured functions, and the memory of the captured ones
        self.prepared: dict[object, Callable[..., Any]] = {}
        self.pool = cache(torch.cuda.graph_pool_handle)
        self._parts: dict[str, Any] = {}
        # folder of a small VAE that decodes in place of the model's, or of a model whose VAE does
        self.loras, self.decoder_folder = tuple(loras), decoder
        self._hash: str | None = None
        self._hashing = Lock()
        # searching for key steps and slices takes time
        self._plans: dict[object, Plan] = {}

    def sample(self, prompt: str, **options: Any) -> Clip:
        """Make one clip; options are fields of `Request`, such as seed, steps and size.

        Raises ValueError, saying what is possible, where this model cannot do it.
        """
        request = Request(prompt=prompt, **options)
        if files := [name for name in INPUT_FIELDS if getattr(request, name) is not None]:
            raise ValueError(f"{files[0]} has no effect here: give what it holds to `run`, as inputs")
        return self.run([self.plan(request)])[0]

    @torch.inference_mode()
    def run(
        self,
        plans: Sequence[Plan],
        observer: Observer | None = None,
        *,
        pixels: Pixels = "rgb24",
        inputs: Inputs | None = None,
    ) -> list[Clip]:
        """Make a batch of clips whose plans differ in prompt and seeds only.

        Each clip is what it would be alone, except for rounding. `pixels` is the form of the
        frames; the content frame's picture is always RGB. `inputs` are not sampled: ValueError
        where they do not fit the plans.
        """
        task = Task(plans, observer or Observer(), pixels, inputs or Inputs())
        self._check(task)
        if not task.plan.slices.staged:
            self.load(task.observer)
        with fastest_libraries(self.device):
            made = self.make(task)
        clips = []
        for i, plan in enumerate(plans):
            about, fps, latents = self.describe(plan, task.inputs), plan.model.fps, None
            if made.motion is not None:
                latents = Latents(made.content[i], made.motion[i], fps, about)
            clips.append(Clip(made.frames[i], pixels, made.pictures[i], fps, about, latents))
        return clips

    @abstractmethod
    def make(self, task: Task) -> Made:
        """Sample and decode a batch; all weights are loaded, unless the plan has them staged."""

    def plan(self, request: Request, *, batch: int = 1) -> Plan:
        """Resolve a request for this model: all values, key steps, slices for a batch of clips.

        Reads no weights. Raises ValueError, saying what is possible, where it cannot be made.
        """
        check_applies(request, self.config)
        if request.max_memory is not None and self.decoder_folder is not None and not self.takes_vae:
            raise ValueError("max memory is that of the model's own decoder: leave --decoder out")
        on_gpu = self.device.type == "cuda" and self.config.looks_along_time
        if request.slice_streams > 1 and not (on_gpu and request.max_memory is not None):
            raise ValueError("slice streams above 1 need --max-memory, a CUDA GPU, and AnimateDiff or SVD")
        # prompt and seeds do not matter for all else that is checked and chosen
        key = batch, shared_settings(request)
        if key not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = resolve(request, self.config)
            request = apply_quality(request, self.config)
            plan = replace(plan, key_steps=choose_key_steps(request, plan.model, self.folder))
            slices = choose_slices(Work.of(plan, self.dtype, batch), self.device, plan.max_memory)
            if self.uses_compiler and slices.bytes is not None:
                raise ValueError("max memory: a UNet in slices is not compiled: leave --compile or --max-memory out")
            self._plans[key] = replace(plan, slices=replace(slices, streams=request.slice_streams))
        return with_prompt(self._plans[key], request)

    def part(self, name: str) -> Any:
        """Return one part of the model, read when first needed.

        Raises ValueError, naming the file at fault.
        """
        if not self.has(name):
            self._parts[name] = self.read_part(name)
        return self._parts[name]

    @contextmanager
    def swapped(self, name: str, part: Any) -> Iterator[None]:
        """Put another network in the place of a part for the length of a block."""
        original = self.part(name)
        self._parts[name] = part
        # what was captured or compiled of the other
        self.prepared.clear()
        try:
            yield
        finally:
            self._parts[name] = original
            self.prepared.clear()

    def read_part(self, name: str) -> Any:
        """Read one part of the model."""
        place = self.decoder_folder if name == "vae" and self.takes_vae else self.folder
        assert place is not None
        return self.change(name, load_part(place, name, dtype=self.dtype, device=self.device))

    def change(self, name: str, part: Any) -> Any:
        """Return a part with what LoRA changes of its weights."""
        for lora in self.loras if name in ("unet", "text_encoder") else ():
            merge_lora(part, name, lora)
        return part

    @property
    def takes_vae(self) -> bool:
        """Return whether another model's VAE is this one's."""
        return self.decoder_folder is not None and (self.decoder_folder / "vae").is_dir()

    def has(self, name: str) -> bool:
        """Return whether a part has been read."""
        return name in self._parts

    @property
    def loaded(self) -> bool:
        """Return whether all weights have been read."""
        return all(self.has(name) for name in network_configs(self.config))

    def load(self, observer: Observer | None = None, *names: str) -> None:
        """Read the weights that are not read yet, of all parts unless some are named.

        Raises ValueError, naming the file at fault.
        """
        observer = observer or Observer()
        observer.step("load", 0, 1)
        with observer.stage("load"):
            for name in names or network_configs(self.config):
                self.part(name)
        observer.step("load", 1, 1)

    @contextmanager
    def stage(self, task: Task, title: str, *names: str) -> Iterator[None]:
        """Enter a stage that reads the weights of some parts, which stay unless the plan has them staged."""
        staged = task.plan.slices.staged
        if staged:
            self._free()
            self.load(task.observer, *names)
        with task.observer.stage(title):
            yield
        if staged:
            self._free()

    def _free(self) -> None:
        """Let go of all weights, and of what was prepared with them."""
        self._parts.clear()
        self.prepared.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, task: Task) -> None:
        if task.pixels not in CONVERT:
            raise ValueError(f"pixels {task.pixels!r} is not one of {', '.join(CONVERT)}")
        first, *others = map(shared_settings, task.plans)
        assert all(other == first for other in others)
        halves = task.inputs.content, task.inputs.motion
        if any(half is not None for half in halves):
            shapes = (None if half is None else tuple(half.shape) for half in halves)
            check_fit(first.model, *shapes)

    def describe(self, plan: Plan, inputs: Inputs | None = None) -> dict[str, Any]:
        """Return the metadata of the clip that `run` would make; reads no weights."""
        inputs = inputs or Inputs()
        return {
            **self.identity,
            **describe_plan(plan, content=inputs.content is None, motion=inputs.motion is None),
            **inputs.origin,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Return what tells this pipeline from others in metadata."""
        about = {"cmdgen": __version__, "model": self.config.name, "weights": self.weights_hash}
        about |= {"dtype": dtype_name(self.dtype), "device": self.device.type}
        if self.loras:
            about["lora"] = ", ".join(f"{lora.path.name}:{lora.scale:.15g}" for lora in self.loras)
        if self.decoder_folder is not None:
            about["decoder"] = self.decoder_folder.resolve().name
        # compiled code rounds differently
        return about | ({"compile": True} if self.uses_compiler else {})

    @property
    def weights_hash(self) -> str:
        """Return a hash of the weights, wherever they lie; a thread may ask for it early."""
        with self._hashing:
            if self._hash is None:
                self._hash = hash_weights(self.folder)
                changes: list[Any] = [(describe_origin(lora.path)["sha256"], lora.scale) for lora in self.loras]
                if self.decoder_folder is not None:
                    files = {"vae": KlVae.filename} if self.takes_vae else {"": TinyVae.filename}
                    changes += [hash_files(self.decoder_folder, files)]
                if changes:
                    self._hash = hashlib.blake2b(repr((self._hash, changes)).encode(), digest_size=16).hexdigest()
        return self._hash

    def denoise(
        self, task: Task, what: Denoising, predict: Callable[..., Tensor], conditions: Branches, look: Look = None
    ) -> Tensor:
        """(B, *shape) of each row's noise -> (B, *shape), float32, by the plan's sampler.

        `look` gets the clean sample that each step is heading for.
        """
        noise, generators = self.noise(what.part, what.shape, what.seeds, frames=what.frames)
        if what.window is not None:
            stride = what.window - (what.overlap or 0)
            orders = [order_noise(what.frames, what.window, stride, seeded("windows", seed)) for seed in what.seeds]
            clips = noise.unflatten(0, (len(orders), -1))
            noise = torch.cat([clip[order] for clip, order in zip(clips, orders, strict=True)])
        model, interval = task.plan.model, task.plan.model.guidance_interval
        if interval is not None:
            low, high = (share * what.schedule.num_train_timesteps for share in interval)
            if what.schedule.timestep_type == "continuous":
                # shares of the steps
                visited = VISITED[model.sampler](what.schedule, what.steps)
                low, high = (float(visited.quantile(share)) for share in interval)
            interval = low, high
        guided = guide(predict, what.guidance, *conditions, interval=interval)
        stage = what.part if what.of == 1 else "steps"

        def show(done: int, total: int) -> None:
            task.observer.step(stage, what.number * total + done, what.of * total)

        how = Sampling(what.schedule, what.steps, generators, show, look)
        return SAMPLERS[model.sampler](guided, noise, how)

    def noise(
        self, part: str, shape: tuple[int, ...], seeds: Sequence[int], *, frames: int = 1
    ) -> tuple[Tensor, list[torch.Generator]]:
        """() -> (B, *shape) float32, each row from a generator of its own, and the generators.

        A row is a frame of a clip, which has one seed: its noise depends on the frame's index, not
        on how many there are.
        """
        parts = [f"{part}/{i}" if i else part for i in range(frames)]
        generators = [seeded(name, seed) for seed in seeds for name in parts]
        noise = torch.stack([torch.randn(shape, generator=each) for each in generators])
        return noise.to(self.device), generators

    def project_times(
        self, project: Callable[[Tensor], Tensor], plan: Plan, schedule: NoiseConfig, steps: int
    ) -> Iterator[Tensor]:
        """(S,) -> (S, ...) of all timesteps of the sampler, then (...) of each one in turn.

        A network's weights for timesteps are read once for a clip, not at each step. A sampler
        calls its denoiser once for each timestep: nothing is looked up on the device.
        """
        visited = VISITED[plan.model.sampler](schedule, steps)
        # not all devices have float64
        visited = (visited.float() if visited.is_floating_point() else visited).to(self.device)
        for some in visited.split(TIMESTEPS_TOGETHER):
            yield from project(some)

    def graphed(self, key: object, function: Callable[..., Out], *, compiles: bool = True) -> Callable[..., Out]:
        """Return a function compiled if asked for, where it `compiles`, and as CUDA graphs where they pay.

        Compiled and captured functions of earlier clips serve again.
        """
        compiles &= self.uses_compiler
        if not (compiles or self.uses_graphs):
            return function
        if key not in self.prepared:
            if compiles:
                function = Compiled(function)
            # the first calls, before a capture, compile
            self.prepared[key] = Graphed(function, self.pool) if self.uses_graphs else function
        return self.prepared[key]

    @cached_property
    def side_stream(self) -> torch.cuda.Stream | None:
        """Return the one stream for work beside larger work: libraries keep memory for each."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def check_finite(self, sample: Tensor, part: str) -> Tensor:
        """(...) -> the same; ValueError, naming the part's folder, where it has NaN or inf."""
        if not sample.isfinite().all():
            wider = {torch.float16: " or need --dtype bfloat16", torch.bfloat16: " or need --dtype float32"}
            raise ValueError(
                f"{self.folder / part} overflows in {dtype_name(self.dtype)}: its weights are "
                f"damaged{wider.get(self.dtype, '')}"
            )
        return sample


def seeded(part: str, seed: int) -> torch.Generator:
    """Return a CPU generator for one part of one clip.

    torch keeps 32 bits of a seed: all of ours is hashed into them.
    """
    digest = hashlib.blake2b(f"{part}/{seed}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
