"""`cmdgen sample --like FILE`: the request that a file's metadata records. Files are untrusted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from cmdgen import __version__
from cmdgen.cli.jobs import STILL
from cmdgen.request import FIELDS, INPUT_FIELDS, Request, read_json
from cmdgen.video.formats import choose_encoding

if TYPE_CHECKING:
    from cmdgen.pipelines.still import StillPipeline

# options that --like does not reset to their defaults: where and how the new file is written
_KEPT = {"output", "format", "sidecar", "no_metadata", *INPUT_FIELDS}
# options of the encoding, which hold for the same format only
_ENCODING = {"format", "crf", "codec", "loop"}
# how the full steps were chosen: the metadata lists the steps themselves
_CHOICE = {"rehash_policy", "rehash_threshold"}
# fields that are taken from metadata: never names of files
_RECORDED = {*FIELDS} - _CHOICE - (_KEPT - _ENCODING) - {"rehash_file", "rehash_protect"}
# keys of metadata beside the fields of a request
_OTHER = {"cmdgen", "weights", "width", "height", "encoding", *INPUT_FIELDS, *_CHOICE}


@dataclass(frozen=True)
class Recalled:
    """A request that a file records, and what to compare with the present."""

    path: Path
    request: Request
    metadata: Mapping[str, Any]

    def compare(self, pipeline: "StillPipeline") -> Iterator[str]:
        """Yield a note for each difference from when the file was made."""
        name, metadata = pipeline.config.name, self.metadata
        made = f"note: {self.path} was made"
        if metadata["cmdgen"] != __version__:
            yield f"{made} by cmdgen {short(metadata['cmdgen'])}"
        if metadata.get("weights") != pipeline.weights_hash:
            yield f"{made} with other weights than those of {name}"
        if metadata.get("device") != pipeline.device.type:
            yield f"{made} on {short(metadata.get('device'))}, which rounds differently"
        if unknown := [key for key in metadata if key not in _RECORDED | _OTHER]:
            yield f"note: unknown metadata of {self.path}: {', '.join(map(short, unknown[:8]))}"


def recall(path: Path, request: Request, flags: set[str]) -> Recalled:
    """Return the request that a file records, with the flags' values of `request` in place.

    `flags` names the options on the command line. Options that the file does not record have their
    defaults, whatever the user's settings say. Raises ValueError for a file that is not ours, and
    for models other than packaged ones: paths in metadata are never followed.
    """
    from cmdgen.config import packaged_models
    from cmdgen.pipelines.base import choose_device
    from cmdgen.video.read import read_metadata

    target = None
    if request.output is not None:
        target = choose_encoding(request.output, format=request.format).format
    metadata = read_metadata(path)
    if not isinstance(metadata.get("cmdgen"), str) or "prompt" not in metadata:
        raise ValueError(f"{path} does not say how cmdgen made it")
    try:
        values = _read(metadata)
        dropped = set(flags)
        if values.get("format") != target:
            dropped |= _ENCODING
        # a picture shows one frame of its clip
        if target == STILL or (path.suffix.lower() == f".{STILL}" and values.get("frames") == 1):
            dropped.add("frames")
        # the options of step rehash are one choice
        if any(name.startswith("rehash") for name in flags):
            dropped.add("rehash")
        values = {name: value for name, value in values.items() if name not in dropped}
        if "model" in values and values["model"] not in packaged_models():
            raise ValueError(
                f"it was made by {short(values['model'])}, which is not one of "
                f"{', '.join(packaged_models())}: give its folder with --model"
            )
        if "device" in values:
            try:
                choose_device(values["device"])
            except ValueError:
                # another device makes nearly the same clip
                values["device"] = "auto"
        kept = {name: getattr(request, name) for name in flags | _KEPT}
        return Recalled(path, Request(**(kept | values)), metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the typed values of a request's fields; ignores unknown keys."""
    values = _translate(metadata)
    # seeds that are the clip's own follow --seed
    for name in ("content_seed", "motion_seed"):
        if values.get(name) == values.get("seed"):
            values.pop(name, None)
    return {name: read_json(name, value) for name, value in values.items() if name in _RECORDED}


def _translate(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata in today's form: at first, some values were not as options are written."""
    values = dict(metadata)
    if "width" in values or "height" in values:
        sides = {name: values.get(name) for name in ("width", "height")}
        for name, side in sides.items():
            if type(side) is not int:
                raise ValueError(f"{name} {short(side)} is not a whole number")
        values["size"] = "{width}x{height}".format(**sides)
    interval = values.get("guidance_interval")
    if isinstance(interval, list):
        if [type(share) for share in interval] != [float, float]:
            raise ValueError(f"guidance_interval {short(interval)} is not two numbers")
        values["guidance_interval"] = f"{interval[0]}-{interval[1]}"
    if type(values.get("max_memory")) is int:
        values["max_memory"] = f"{values['max_memory']}B"
    if isinstance(values.get("rehash"), dict):
        steps = [values["rehash"].get(part, [0]) for part in ("content", "motion")]
        for listed in steps:
            if not isinstance(listed, list) or any(type(step) is not int for step in listed):
                raise ValueError(f"rehash {short(listed)} is not a list of steps")
        values["rehash"] = "+".join(",".join(map(str, listed)) for listed in steps)
    if isinstance(values.get("encoding"), dict):
        values |= values.pop("encoding")
    return values
