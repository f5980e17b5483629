"""What a user asks for, `Request`, and the same resolved against one model, `Plan`.

    flags, JSONL line, TOML table, metadata ──► Request ──resolve(request, model)──► Plan

One field of `Request` is one option of `cmdgen sample`, one key of a line of a batch file, one key
of a clip's metadata and one keyword of `pipeline.sample`. Defaults live here once. Never imports
torch.
"""

import re
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

from cmdgen.config import CUTS, FEW_STEPS, LCM_STEPS, POLICIES, SAMPLERS, EvdmConfig, ModelConfig, UNetConfig
from cmdgen.options import SIZE, Options, Size, option, parse_memory, parse_output, with_values, write_size

# groups of options
WHAT, INPUTS, HOW = "What is made", "Inputs instead of samples", "How it is sampled"
FASTER, FILE, MACHINE = "Faster (changes the result)", "The file", "Model and machine"

QUALITIES = ("draft", "normal", "best")
# help of a default that each model has
MODELS_OWN = "the model's own"
MAX_SEED, MAX_FPS = 2**63 - 1, 240
# two hours at 8 frames a second: what is listed by frames has an end, whatever memory there is
MAX_FRAMES = 2**16

# steps that run in full: of the content model, of the motion model
Steps = tuple[tuple[int, ...], tuple[int, ...]]


def parse_interval(text: str) -> tuple[float, float]:
    """Return the two shares of LOW-HIGH."""
    match = re.fullmatch(r"([01](?:\.\d{1,17})?)-([01](?:\.\d{1,17})?)", text)
    if match is None:
        raise ValueError(f"guidance interval {short(text)} is not LOW-HIGH, such as 0.1-0.8")
    low, high = float(match[1]), float(match[2])
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance interval {low}-{high} is not within 0-1, lower end first")
    return low, high


def parse_rehash(text: str) -> int | Steps | None:
    """Return how many steps run in full, or which: of content and, after a +, of motion."""
    if text == "off":
        return None
    if re.fullmatch(r"[0-9]{1,6}", text):
        return int(text)
    if len(text) > 2**13 or not re.fullmatch(r"0(,[0-9]{1,4})*(\+0(,[0-9]{1,4})*)?", text):
        raise ValueError(
            f"rehash {short(text)} is neither off nor a number of steps, such as 13, nor the steps "
            "themselves, such as 0,1,4+0,2"
        )
    content, _, motion = text.partition("+")
    both = tuple(tuple(map(int, part.split(","))) if part else () for part in (content, motion))
    for part in both:
        if any(a >= b for a, b in pairwise(part)):
            raise ValueError(f"rehash steps {short(part)} do not rise from 0, which always runs")
    return both[0], both[1]


def write_rehash(value: int | Steps | None) -> str:
    """Return what `parse_rehash` reads."""
    if value is None or isinstance(value, int):
        return "off" if value is None else str(value)
    # a part that was not sampled has no steps: its first step stands for any
    return "+".join(",".join(map(str, steps or (0,))) for steps in value)


_what = partial(option, group=WHAT, per_job=True)
_seed = partial(_what, None, low=0, high=MAX_SEED)
_input = partial(option, None, group=INPUTS, metavar="FILE", complete="file")
_how = partial(option, None, group=HOW, per_job=True, shown=MODELS_OWN)
_faster = partial(option, group=FASTER, per_job=True)
_file = partial(option, group=FILE, per_job=True)
_machine = partial(option, group=MACHINE)
_INTERVAL = {"read": parse_interval, "write": "{0[0]}-{0[1]}".format, "metavar": "LOW-HIGH"}
_REHASH = {"read": parse_rehash, "write": write_rehash, "metavar": "N|STEPS|off"}
_MEMORY = {"read": parse_memory, "write": "{}B".format, "metavar": "SIZE"}
# of commands that compute
threads_option = partial(option, None, "CPU threads.", low=1, group=MACHINE)
_NAME = {"flags": ("--output", "-o"), "metavar": "NAME", "complete": "file", "read": parse_output}


@dataclass(frozen=True)
class Request(Options):
    """One clip as a user asks for it; None means the model's own value.

    Every field is read and checked alone when a request is made, whether it is given as text or as
    a value. `resolve` checks the fields together, against a model. Raises ValueError in one line.
    """

    prompt: str | None = _what(None, "What the video shows; read from stdin if missing.", argument=True)
    output: str | None = _what(
        None,
        "File to write. Its suffix chooses the format; .png is a still; - is stdout. {index}, "
        "{line}, {seed} and {slug} are replaced.",
        **_NAME,
    )
    seed: int | None = _seed("The same seed gives the same frames.", shown="random")
    content_seed: int | None = _seed("Seed of the content frame.", shown="--seed")
    motion_seed: int | None = _seed("Seed of the motion.", shown="--seed")
    negative: str = _what("", "Negative prompt: guidance leads away from it.", shown="none")
    frames: int | None = _what(
        None, "Length of the video. 1 is a still, the content frame.", low=1, high=MAX_FRAMES, shown=MODELS_OWN
    )
    size: Size | None = _what(None, "Size of the video.", shown=MODELS_OWN, **SIZE)
    fps: int | None = _what(None, "Frames per second.", low=1, shown=MODELS_OWN)
    seamless: bool = _what(False, "Let the end of a clip lead to its start, where it is made in windows.")

    content_from: Path | None = _input(
        "Take the content frame from a video, or latents of `cmdgen encode`; sample the motion."
    )
    motion_from: Path | None = _input("Take the motion from a video, or latents; sample the content frame.")
    image: Path | None = _input("Animate a picture of any size: of CMD, it becomes the content frame.")

    steps: int | None = _how("Sampling steps of the content frame.", low=1)
    motion_steps: int | None = _how("Sampling steps of the motion.", low=1)
    sampler: str | None = _how("How noise becomes a sample.", choices=SAMPLERS)
    guidance: float | None = _how("How closely the content frame follows the prompt; 1 is off.", low=0, high=100)
    motion_guidance: float | None = _how("How closely the motion follows the prompt; 1 is off.", low=0, high=100)

    guidance_first: float | None = _how(
        "Guidance of the first frame, where a picture is animated; --guidance is the last one's.", low=0, high=100
    )
    motion_amount: int | None = _how("How much moves, where a picture is animated.", low=0, high=1023)
    image_noise: float | None = _how(
        "Noise that is added to a picture that is animated: with more, less of it stays.", low=0, high=10
    )

    window: int | None = _how("Frames that motion modules see at once; a longer clip is made in windows.", low=2)
    overlap: int | None = _how("Frames that neighbouring windows share; their predictions are averaged.", low=0)

    quality: str | None = _faster(
        None, "Settings by name; what it switches on is printed.", choices=QUALITIES, shown="normal"
    )
    guidance_interval: tuple[float, float] | None = _faster(
        None, "Guide only between these shares of the noise schedule, such as 0.1-0.8.", **_INTERVAL
    )
    rehash: int | Steps | None = _faster(
        None,
        "Run N steps in full, reuse features in others; or list them: 0,1,4+0,2 (content+motion).",
        shown="off",
        **_REHASH,
    )
    rehash_policy: str | None = _faster(
        None, "How steps are chosen; uniform needs no calibration.", choices=POLICIES, shown="minimax"
    )
    rehash_threshold: float | None = _faster(
        None, "Instead of N: least similarity that skips a step.", metavar="G", low=-1, high=1
    )
    rehash_protect: float = _faster(
        0.1, "Share of the content steps, from the first, that always run in full.", low=0, high=1
    )
    rehash_cut: str = _faster(
        "layer",
        "What the UNet's last layer has done of the feature that is reused: nothing, or its operators up to this one.",
        choices=CUTS,
    )
    rehash_file: Path | None = _faster(
        None, "Calibration of `cmdgen rehash calibrate`.", shown=MODELS_OWN, complete="file"
    )
    decoder: Path | None = option(
        None,
        "Decode with a small VAE, the folder of an AutoencoderTiny; AnimateDiff's clips also with that of a "
        "model, such as svd.",
        group=FASTER,
        metavar="DIR",
        shown=MODELS_OWN,
    )

    format: str | None = _file(None, "Format of the file.", shown="by the suffix; y4m on stdout", complete="format")
    crf: int | None = _file(None, "Quality; 0 is best.", shown="the codec's own")
    codec: str | None = _file(None, "Video codec.", shown="the format's own", complete="codec")
    loop: int | None = _file(None, "How often a gif, webp or apng plays.", shown="0, for ever")
    sidecar: bool = _file(False, "Also write the metadata to NAME.json.")
    no_metadata: bool = _file(False, "Write no metadata into the file.")

    model: str = _machine(
        "mini",
        "Packaged model, folder, .safetensors checkpoint, or what `cmdgen models pull` brought.",
        complete="model",
    )
    lora: tuple[str, ...] = _machine(
        (), "LoRA that changes the weights: a safetensors file, or OWNER/NAME; repeatable.", metavar="NAME[:SCALE]"
    )
    max_memory: int | None = _machine(
        None,
        "Memory limit, such as 4GB; same result. Of AnimateDiff and SVD it counts weights, too.",
        shown="none",
        **_MEMORY,
    )
    slice_streams: int = _machine(
        1, "Streams of a GPU that share the slices of --max-memory, of AnimateDiff and SVD; same result.", low=1, high=4
    )
    device: str = _machine("auto", "auto, cpu, cuda, cuda:N or mps.", complete="device")
    dtype: str = _machine(
        "auto", "auto (float32 on a CPU, else float16), float32, float16, bfloat16.", complete="dtype"
    )
    compile: bool = _machine(False, "Compile the networks with torch.compile. The first clip of a size takes minutes.")

    @property
    def loading(self) -> dict[str, Any]:
        """Return what `load_pipeline` takes, in any process."""
        return {name: getattr(self, name) for name in ("model", "device", "dtype", "compile", "lora", "decoder")}

    @property
    def rehashes(self) -> bool:
        """Return whether step rehash is on."""
        return self.rehash is not None or self.rehash_threshold is not None


@dataclass(frozen=True)
class Slices:
    """How much goes through a group of operators at a time; no result depends on it."""

    # frames through the autoencoder's spatial groups, of all clips together
    frames: int
    # positions through its temporal groups, each at all times, of all clips together
    positions: int
    # frames through the VAE, of all clips together
    pictures: int
    # parts into which the VAE cuts the rows of a frame, at most one for each row of a latent
    strips: int = 1
    # of a UNet that looks along time: bytes of a slice of the widest map that a group of its operators
    # reads, None for no slices, and the streams of a GPU that share them; whether clips and branches of
    # guidance go through it one by one; and whether weights are there for their stage alone
    bytes: int | None = None
    streams: int = 1
    in_turn: bool = False
    staged: bool = False


@dataclass(frozen=True)
class KeySteps:
    """The steps of one clip that run in full under step rehash; the others reuse features."""

    policy: str
    content: tuple[int, ...]
    # empty for stills
    motion: tuple[int, ...]
    threshold: float | None = None


@dataclass(frozen=True)
class Plan:
    """A request resolved against one model: every value is filled in and checked."""

    # with the clip's size, length, rate, sampler, steps and guidance in place of its defaults
    model: ModelConfig
    prompt: str
    negative: str
    seed: int
    content_seed: int
    motion_seed: int
    # bytes, of a UNet that looks along time with the weights, else beside them; None: no limit
    max_memory: int | None = None
    # None: every step runs in full
    key_steps: KeySteps | None = None
    # of CUTS; None where every step runs in full
    rehash_cut: str | None = None
    # frames of one window and those that two share, and whether the last window leads to the first;
    # None: all frames are seen at once
    window: int | None = None
    overlap: int | None = None
    seamless: bool | None = None
    # the smallest, until a pipeline, which knows dtype and device, has chosen them
    slices: Slices = Slices(frames=1, positions=1, pictures=1)

    @property
    def moves(self) -> bool:
        """Return whether the clip is a video, not a still."""
        return self.model.frames > 1

    @property
    def samples_motion(self) -> bool:
        """Return whether the clip's motion is a part of its own, as in CMD."""
        return self.moves and self.model.motion is not None

    @property
    def rows(self) -> int:
        """Return how many rows of a UNet's batch one clip is."""
        return self.model.frames if self.model.looks_along_time else 1

    @property
    def windows(self) -> list[list[int]]:
        """Return the frames of each window, which start so far apart, the last flush with the end."""
        frames, window = self.rows, self.window or self.rows
        if window == frames:
            return [list(range(frames))]
        stride = window - (self.overlap or 0)
        if self.seamless:
            # evenly around
            count = -(-frames // stride)
            starts = [frames * i // count for i in range(count)]
        else:
            starts = [min(start, frames - window) for start in range(0, frames - window + stride, stride)]
        return [[(start + i) % frames for i in range(window)] for start in starts]


Values = TypeVar("Values", Request, Plan)


def shared_settings(values: Values) -> Values:
    """Return what clips of one batch have in common: everything except prompt and seeds."""
    return with_values(values, {"prompt": "", "seed": 0, "content_seed": 0, "motion_seed": 0})


def with_prompt(plan: Plan, request: Request) -> Plan:
    """Return the plan with a request's prompt and seeds, the only values that clips of a batch do not share."""
    seed = request.seed or 0
    content, motion = (seed if value is None else value for value in (request.content_seed, request.motion_seed))
    seeds = {"seed": seed, "content_seed": content, "motion_seed": motion}
    return with_values(plan, {"prompt": request.prompt or "", **seeds})


# fields of `Request` that replace a model's default of the same name
_DEFAULTS = {field.name for field in fields(Request)} & {field.name for field in fields(ModelConfig)}
# fields that say nothing to a model without CMD's two parts; without text; without a picture
_CMD_ONLY = ("content_seed", "motion_seed", "motion_steps", "motion_guidance", "content_from", "motion_from")
_TEXT_ONLY, _PICTURE_ONLY = ("prompt", "negative"), ("guidance_first", "motion_amount", "image_noise")


def resolve(request: Request, model: ModelConfig) -> Plan:
    """Fill in what `request` leaves to the model, and check all of it together.

    `Pipeline.plan` calls this and adds key steps and slices. Raises ValueError, saying what is
    possible, where this model cannot make the clip.
    """
    check_applies(request, model)
    request, trained = apply_quality(request, model), model.frames
    values = {name: getattr(request, name) for name in _DEFAULTS}
    if request.size is not None:
        values["height"], values["width"] = request.size
    model = replace(model, **{name: value for name, value in values.items() if value is not None})
    _check_clip(model)
    _check_rehash(request, model)
    plan = Plan(model, "", request.negative, 0, content_seed=0, motion_seed=0, max_memory=request.max_memory)
    plan = replace(
        plan, rehash_cut=request.rehash_cut if request.rehashes else None, **_choose_windows(request, model, trained)
    )
    return with_prompt(plan, request)


# by quality, settings in place of a model's own: of CMD and stills; of UNets that look along time,
# where the paper of step rehash measured half of the steps; of consistency models
_QUALITY: dict[str, dict[str, dict[str, Any]]] = {
    "draft": {
        "cmd": {"steps": 10, "motion_steps": 10, "sampler": "dpm++"},
        "video": {"rehash": 13, "rehash_policy": "uniform", "sampler": "dpm++"},
        "lcm": {"steps": 4},
    },
    "normal": {},
    "best": {"cmd": {"steps": 50, "motion_steps": 50}, "video": {"steps": 50}, "lcm": {"steps": 8}},
}


def quality_settings(request: Request, model: ModelConfig) -> dict[str, Any]:
    """Return what the quality of a request switches on, by field: nothing that the request gives itself.

    Raises ValueError for a model that is distilled to its few steps.
    """
    kind = "lcm" if model.noise.solver == "lcm" else "video" if model.looks_along_time else "cmd"
    named = _QUALITY[request.quality or "normal"]
    if named and kind == "video" and model.steps <= FEW_STEPS:
        raise ValueError(f"quality has no effect with {model.name}: it is made for {model.steps} steps")
    return {
        name: value
        for name, value in named.get(kind, {}).items()
        if getattr(request, name) is None and not (name == "motion_steps" and model.motion is None)
    }


def apply_quality(request: Request, model: ModelConfig) -> Request:
    """Return the request with the settings that its quality stands for."""
    return with_values(request, quality_settings(request, model))


def _choose_windows(request: Request, model: ModelConfig, trained: int) -> dict[str, Any]:
    """Return the window, the overlap and whether it leads around; none where all frames are seen at once."""
    if model.adapter is None:
        return {}
    longest, seamless = model.adapter.motion_max_seq_length, request.seamless
    wants_windows = request.window is not None or request.overlap is not None or seamless
    window = request.window or min(trained, longest)
    if window > longest:
        raise ValueError(f"window {window}: the motion modules of {model.name} know at most {longest}")
    if window >= model.frames or not (wants_windows or model.frames > longest):
        if seamless or request.overlap is not None:
            raise ValueError(f"{model.frames} frames are one window of {window}: nothing overlaps")
        return {}
    overlap = window // 4 if request.overlap is None else request.overlap
    if overlap >= window:
        raise ValueError(f"overlap {overlap} is not less than the window, {window}")
    return {"window": window, "overlap": overlap, "seamless": seamless or None}


def check_applies(request: Request, model: ModelConfig) -> None:
    """Raise ValueError for an option, a prompt among them, that says nothing to this model."""
    refused: dict[str, str] = {}
    if model.looks_along_time:
        refused |= dict.fromkeys(_CMD_ONLY, "content and motion are one")
    if model.vision is None:
        refused |= dict.fromkeys(_PICTURE_ONLY, "it animates no picture")
    else:
        refused |= dict.fromkeys(_TEXT_ONLY, "it reads no text, it animates --image")
    if model.adapter is not None:
        refused["image"] = "it makes videos from text alone"
    else:
        refused |= dict.fromkeys(("window", "overlap", "seamless"), "it has no motion modules")
    for name, reason in refused.items():
        value = getattr(request, name)
        # an empty text says nothing
        if value is not None and value is not False and value != "":
            raise ValueError(f"{name.replace('_', ' ')} has no effect with {model.name}: {reason}")


def _check_clip(model: ModelConfig) -> None:
    multiple = model.size_multiple
    if model.height % multiple or model.width % multiple:
        nearest = [max(1, round(side / multiple)) * multiple for side in model.size]
        raise ValueError(
            f"size {model.width}x{model.height}: both sides must be multiples of {multiple}, such "
            f"as {write_size((nearest[0], nearest[1]))}"
        )
    if model.frames == 1 and model.vision is None and model.decodes_clips:
        raise ValueError("frames 1: a decoder that looks along time is for clips")
    if model.frames == 1 and model.vision is not None:
        raise ValueError(f"frames 1: {model.name} animates a picture, it makes no stills")
    if model.frames > 1 and not model.moves and not isinstance(model.content, EvdmConfig):
        raise ValueError(f"frames {model.frames}: {model.name} has no motion model, it makes stills of 1")
    if model.frames > 1 and model.motion is not None and model.frames % model.motion.patch:
        patch = model.motion.patch
        raise ValueError(f"frames {model.frames} is neither 1 nor a multiple of {patch}")
    noises = {"steps": model.noise, "motion_steps": (model.motion or model).noise}
    for name, noise in noises.items():
        if getattr(model, name) > noise.num_train_timesteps:
            raise ValueError(
                f"{name.replace('_', ' ')} {getattr(model, name)} is not between 1 and {noise.num_train_timesteps}"
            )
    if model.sampler == "lcm" and model.steps > LCM_STEPS:
        raise ValueError(f"steps {model.steps} of lcm is not between 1 and {LCM_STEPS}")
    if model.fps > MAX_FPS:
        raise ValueError(f"fps {model.fps} is not between 1 and {MAX_FPS}")


def check_cut(cut: str, model: ModelConfig) -> None:
    """Raise ValueError where the last layer of a model's UNet has no such operator."""
    has = {"layer", "resnet"}
    if isinstance(model.content, UNetConfig) and model.content.up_block_types[-1].startswith("CrossAttn"):
        has |= {"attention"}
    if model.adapter is not None and model.frames > 1:
        has |= {"motion"}
    if cut not in has:
        raise ValueError(f"rehash cut {cut}: the last layer of {model.name} has no {cut}")


def _check_rehash(request: Request, model: ModelConfig) -> None:
    policy, threshold = request.rehash_policy, request.rehash_threshold
    if not request.rehashes:
        names = ("rehash_policy", "rehash_protect", "rehash_cut", "rehash_file")
        if any(getattr(request, name) != getattr(Request, name) for name in names):
            raise ValueError("nothing is rehashed: say how many steps run in full with --rehash N")
        return
    check_cut(request.rehash_cut, model)
    if isinstance(request.rehash, tuple) and (policy, threshold) != (None, None):
        raise ValueError("rehash lists the steps that run: nothing is left to choose")
    if model.guidance_interval is not None and model.guidance_interval[1] < 1:
        raise ValueError(
            "where guidance comes on midway there is nothing to reuse: with rehash, a guidance "
            "interval must reach up to 1"
        )
    if threshold is not None and request.rehash is not None:
        raise ValueError("a rehash threshold decides how many steps run: leave out the number")
    if threshold is not None and policy not in (None, "similarity"):
        raise ValueError(f"rehash policy {policy} has no threshold, similarity has")
