"""`cmdgen sample --like FILE`: the request that a file's metadata records. Files are untrusted."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from cmdgen import __version__
from cmdgen.cli.jobs import STILL
from cmdgen.files import blame
from cmdgen.metadata import FIELDS, INPUT_FIELDS, read_json
from cmdgen.request import Request
from cmdgen.video.formats import choose_encoding

if TYPE_CHECKING:
    from cmdgen.pipelines.base import Pipeline

# options that --like does not reset to their defaults: where and how the new file is written
_KEPT = {"output", "format", "sidecar", "no_metadata", "lora", "decoder", "quality", *INPUT_FIELDS}
# options of the encoding, which hold for the same format only
_ENCODING = {"format", "crf", "codec", "loop"}
# how the full steps were chosen: the metadata lists the steps themselves
_CHOICE = {"rehash_policy", "rehash_threshold"}
# fields that are taken from metadata: never names of files
_RECORDED = {*FIELDS} - _CHOICE - (_KEPT - _ENCODING) - {"rehash_file", "rehash_protect"}
# keys of metadata beside the fields of a request
_OTHER = {"cmdgen", "weights", "width", "height", "encoding", "lora", "decoder", *INPUT_FIELDS, *_CHOICE}
# of predict and interpolate
_OTHER |= {"given", "only_new"}


def read_recorded(path: Path) -> Mapping[str, Any]:
    """Return a file's metadata. Raises ValueError for a file that is not ours."""
    from cmdgen.video.read import read_metadata

    metadata = read_metadata(path)
    if not isinstance(metadata.get("cmdgen"), str) or not {"prompt", "seed"} & metadata.keys():
        raise ValueError(f"{path} does not say how cmdgen made it")
    return metadata


def recall(path: Path, metadata: Mapping[str, Any], request: Request, flags: set[str]) -> Request:
    """Return the request that metadata record, with the flags' values of `request` in place.

    `flags` names the options on the command line. Options that are not recorded have their
    defaults, whatever the user's settings say. Raises ValueError for wrong values, and for models
    other than packaged ones: paths in metadata are never followed.
    """
    from cmdgen.config import packaged_models
    from cmdgen.pipelines.device import choose_device

    target = None
    if request.output is not None:
        target = choose_encoding(request.output, format=request.format).format
    with blame(path):
        values, dropped = _translate(metadata), set(flags)
        # seeds that are the clip's own follow --seed
        dropped |= {name for name in ("content_seed", "motion_seed") if values.get(name) == values.get("seed")}
        if values.get("format") != target:
            dropped |= _ENCODING
        # a picture shows one frame of its clip
        if target == STILL or (path.suffix.lower() == f".{STILL}" and values.get("frames") == 1):
            dropped.add("frames")
        # the options of step rehash are one choice
        if any(name.startswith("rehash") for name in flags):
            dropped.add("rehash")
        names = _RECORDED.intersection(values) - dropped
        values = {name: read_json(name, values[name]) for name in names}
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
        return Request(**({name: getattr(request, name) for name in flags | _KEPT} | values))


def compare(path: Path, metadata: Mapping[str, Any], pipeline: "Pipeline", *, chosen: bool) -> Iterator[str]:
    """Yield a note for each difference from when the file was made.

    Raises ValueError for other weights, unless the user has `chosen` the model.
    """
    made = f"note: {path} was made"
    if metadata["cmdgen"] != __version__:
        yield f"{made} by cmdgen {short(metadata['cmdgen'])}"
    if metadata.get("weights") != pipeline.weights_hash:
        other = f"with other weights than those of {pipeline.config.name}"
        if not chosen:
            raise ValueError(f"{path} was made {other}: give its model with --model")
        yield f"{made} {other}"
    if metadata.get("device") != pipeline.device.type:
        yield f"{made} on {short(metadata.get('device'))}, which rounds differently"
    if unknown := [key for key in metadata if key not in _RECORDED | _OTHER]:
        yield f"note: unknown metadata of {path}: {', '.join(map(short, unknown[:8]))}"


def _translate(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata in today's form: at first, some values were not as options are written.

    A value that is not valid becomes a text that `read_json` refuses.
    """
    values = dict(metadata)
    if "width" in values or "height" in values:
        values["size"] = f"{values.get('width')!r}x{values.get('height')!r}"
    if isinstance(interval := values.get("guidance_interval"), list):
        values["guidance_interval"] = "-".join(map(repr, interval))
    if type(values.get("max_memory")) is int:
        values["max_memory"] = f"{values['max_memory']}B"
    if isinstance(rehash := values.get("rehash"), dict):
        parts = (str(rehash.get(part, [0])) for part in ("content", "motion"))
        values["rehash"] = "+".join(part.strip("[]").replace(" ", "") for part in parts)
    if isinstance(values.get("encoding"), dict):
        values |= values.pop("encoding")
    return values
