"""`cmdgen sample --like FILE`: what a file says of how it was made, as options; hostile as any."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from cmdgen import __version__
from cmdgen.cli.given import NAMES as FILES
from cmdgen.cli.jobs import STILL, Options

if TYPE_CHECKING:
    from cmdgen.pipeline import TextToVideo

# written under the names of the options
_SAME = (
    *("prompt", "negative", "seed", "content_seed", "motion_seed", "frames", "fps", "sampler"),
    *("steps", "motion_steps", "guidance", "motion_guidance", "model", "device", "dtype"),
    "compile",
)
# and under others, or for a human
_OTHER = (
    *("cmdgen", "weights", "width", "height", "guidance_interval", "rehash", "max_memory"),
    "encoding",
)
# options of a job that a file does not say
_FREE = {"output", "format", "sidecar", "no_metadata"}
# options of the command that a file may set beside those of a job
OF_COMMAND = ("model", "device", "dtype", "compile", "max_memory")


@dataclass(frozen=True)
class Memory:
    """What a file remembers: values of options, and what cannot be asked for."""

    path: Path
    values: dict[str, Any]
    version: str
    weights: object
    device: object
    # keys that are not known
    ignored: tuple[str, ...]
    # of the files that the clip was made with, what tells them from others
    files: Mapping[str, Any]

    def compare(self, pipeline: "TextToVideo") -> Iterable[str]:
        """What differs from when the file was made, a line each."""
        name = pipeline.config.name
        if self.version != __version__:
            yield f"note: {self.path} was made by cmdgen {short(self.version)}"
        if self.weights != pipeline.weights_hash:
            yield f"note: {self.path} was made with other weights than those of {name}"
        if self.device != pipeline.device.type:
            yield f"note: {self.path} was made on {short(self.device)}, which rounds otherwise"
        if self.ignored:
            yield f"note: not known here, of {self.path}: {', '.join(map(short, self.ignored[:8]))}"


def recall(path: Path, options: Options, given: set[str], target: str | None) -> Memory:
    """What a file remembers, but for what is given; ValueError for a file that is none of ours.

    What it does not say was the default, whatever the user's file says now. `target` is the format
    to be written. Names of files that it may hold are not followed: a model is one that ships with
    cmdgen, or has to be given.
    """
    from cmdgen.config import packaged_models
    from cmdgen.pipeline import choose_device
    from cmdgen.video.read import read_metadata

    metadata = read_metadata(path)
    if not isinstance(metadata.get("cmdgen"), str) or "prompt" not in metadata:
        raise ValueError(f"{path} does not say how cmdgen made it")
    try:
        said = _translate(metadata, target)
        # of a picture, the clip that it is of
        if path.suffix.lower() == f".{STILL}" and said.get("frames") == 1:
            del said["frames"]
        # options of step rehash are one choice
        if any(name.startswith("rehash") for name in given):
            said = {name: value for name, value in said.items() if not name.startswith("rehash")}
        said = {name: value for name, value in said.items() if name not in given}
        plain = options.defaults(options.of_jobs.union(OF_COMMAND) - given - _FREE)
        values = plain | options.check(said, beside=OF_COMMAND)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if "model" in values and values["model"] not in packaged_models():
        raise ValueError(
            f"{path} was made by {short(values['model'])}, which is not one of "
            f"{', '.join(packaged_models())}: give its folder with --model"
        )
    if "device" in values:
        try:
            choose_device(values["device"])
        except ValueError:
            # what is here makes much the same
            values["device"] = "auto"
    ignored = tuple(key for key in metadata if key not in {*_SAME, *_OTHER, *FILES})
    files = {name: metadata[name] for name in FILES if name in metadata}
    weights, device = metadata.get("weights"), metadata.get("device")
    return Memory(path, values, metadata["cmdgen"], weights, device, ignored, files)


def _translate(metadata: Mapping[str, Any], target: str | None) -> dict[str, Any]:
    """Metadata -> options by name, to be checked."""
    said = {name: metadata[name] for name in _SAME if name in metadata}
    for part in ("content_seed", "motion_seed"):
        if part in said and said[part] == said.get("seed"):
            del said[part]
    if target == STILL:
        said.pop("frames", None)
    if "width" in metadata or "height" in metadata:
        said["size"] = "{}x{}".format(*_numbers(metadata, "width", "height"))
    if "guidance_interval" in metadata:
        pair = metadata["guidance_interval"]
        if not isinstance(pair, list) or [type(each) for each in pair] != [float, float]:
            raise ValueError(f"guidance_interval {short(pair)} is not two numbers")
        said["guidance_interval"] = f"{pair[0]}-{pair[1]}"
    if "max_memory" in metadata:
        said["max_memory"] = f"{_numbers(metadata, 'max_memory')[0] / 1e6:.6f}MB"
    if "rehash" in metadata:
        plan = metadata["rehash"]
        if not isinstance(plan, dict):
            raise ValueError(f"rehash {short(plan)} is not an object")
        # a half that was not sampled has none: any do
        listed = [_steps({part: [0], **plan}, part) for part in ("content", "motion")]
        said |= {"rehash": "+".join(listed), "rehash_cut": plan.get("cut")}
    encoding = metadata.get("encoding", {})
    if not isinstance(encoding, dict):
        raise ValueError(f"encoding {short(encoding)} is not an object")
    if encoding.get("format") == target is not None:
        said |= {name: encoding[name] for name in ("crf", "codec", "loop") if name in encoding}
    return said


def _numbers(values: Mapping[str, Any], *names: str) -> list[int]:
    for name in names:
        if type(values.get(name)) is not int:
            raise ValueError(f"{name} {short(values.get(name))} is not a whole number")
    return [values[name] for name in names]


def _steps(plan: Mapping[str, Any], part: str) -> str:
    steps = plan.get(part)
    if not isinstance(steps, list) or any(type(step) is not int for step in steps):
        raise ValueError(f"rehash of {part} {short(steps)} is not a list of steps")
    return ",".join(map(str, steps))
