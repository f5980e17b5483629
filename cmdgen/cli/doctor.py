"""`cmdgen doctor`: what this machine has, what runs on it and how, and whether it works."""

import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cmdgen import __version__
from cmdgen.cli.command import Device
from cmdgen.cli.errors import Failure, shorten
from cmdgen.cli.progress import AsJson
from cmdgen.cli.settings import config_path, read_settings
from cmdgen.video.formats import CODECS

if TYPE_CHECKING:
    import torch

    from cmdgen_kernels.samples import Op

MODEL, PROMPT = "mini", "a dog swimming in the ocean"
# mean difference of pixel values, 0-255, that rounding may make between two devices
TOLERANCE = 2.0
# behind the values of a record, in the text
_UNITS = {"memory": " GiB", "free": " GiB", "seconds": " s", "apart": " of 255 from the CPU's clip"}


def doctor(context: typer.Context, machine: Device, say: AsJson) -> None:
    """Check devices, ffmpeg, kernels and the default model.

    Where an op runs as a kernel, its result is compared with its definition in plain PyTorch. The
    model makes a clip in one step, on a GPU compared with the CPU's. Exits with 1 if something is
    broken.

    Examples:
        cmdgen doctor
        cmdgen doctor --device cpu --json > report.json
    """
    # --help does without
    from importlib.metadata import distributions

    import torch

    from cmdgen.pipelines.device import use_device
    from cmdgen_kernels import samples

    device = use_device(machine.device)
    facts = {
        "cmdgen": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: next((each.version for each in distributions(name=name)), None) for name in ("triton", "av")},
        "system": platform.platform(),
    }
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices = {str(each): _describe_device(each) for each in (torch.device("cpu"), *gpus)}
    checks = {
        "ffmpeg": _try(_check_ffmpeg),
        "config": _try(_check_config, context),
        "cache": _try(_check_cache),
        "model": _try(_check_model, device),
    }
    ops = {op.name: _check_op(op, device) for op in samples.OPS}
    rows = {**facts, **devices, "runs on": str(device), **checks}
    lines = {name: _show(value) for name, value in rows.items()} | {name: _show_op(op) for name, op in ops.items()}
    listed = [{"device": name, **record} for name, record in devices.items()]
    report = {**facts, "devices": listed, "device": str(device), **checks, "ops": ops}
    width = max(map(len, lines)) + 2
    say.result("\n".join(f"{name:{width}}{line}" for name, line in lines.items()), report)
    faults = {
        "broken": [name for name, record in checks.items() if "error" in record],
        f"not what the definition gives, on {device}": [name for name, op in ops.items() if op["agrees"] is False],
    }
    if any(faults.values()):
        raise Failure("; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names))


def _show(value: Any) -> str:
    """Return a fact, or a record of facts, as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, dict):
        return "none" if value is None else str(value)
    if "error" in value:
        return f"broken: {value['error']}"
    return ", ".join(f"{name} {_show(fact)}{_UNITS.get(name, '')}" for name, fact in value.items())


def _show_op(op: dict[str, Any]) -> str:
    if op["agrees"] is None:
        return f"reference: {op['reason']}"
    if "reason" in op:
        return f"kernel, fails: {op['reason']}"
    return f"kernel, {'agrees' if op['agrees'] else 'does not agree'} with the reference (error {op['error']:.1e})"


def _describe_device(device: "torch.device") -> dict[str, Any]:
    """Return memory in GiB, and threads or the GPU's name and compute capability."""
    import torch

    from cmdgen.evaluation.memory import measure_memory

    record: dict[str, Any] = {"threads": torch.get_num_threads()}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        record = {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"}
    total, free = measure_memory(device)
    return record | {"memory": round(total / 2**30, 1), "free": None if free is None else round(free / 2**30, 1)}


def _try(check: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """Return the record of a check, which fills it in as far as it comes."""
    record: dict[str, Any] = {}
    try:
        check(record, *arguments)
    except (RuntimeError, OSError, ValueError, MemoryError, subprocess.SubprocessError) as error:
        record["error"] = shorten(str(error))
    return record


def _check_ffmpeg(record: dict[str, Any]) -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    def ask(*arguments: str) -> str:
        command = [path, "-hide_banner", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    record["path"] = path = get_ffmpeg_exe()
    record["version"] = ask("-version").split()[2]
    encoders = set(re.findall(r"^ V\S{5} (\S+)", ask("-encoders"), re.MULTILINE))
    # a codec's first two arguments are -c:v and its encoder
    record["codecs"] = {name: codec.arguments[1] in encoders for name, codec in CODECS.items()}
    if not record["codecs"]["h264"]:
        raise ValueError("it cannot encode h264")


def _check_config(record: dict[str, Any], context: typer.Context) -> None:
    root = context.find_root()
    name = root.params["config"] or config_path()
    record |= {"path": name and str(name), "exists": False}
    # without a home directory there is none
    if name is not None and Path(name).exists():
        record["exists"] = True
        if not root.params["no_config"]:
            read_settings(Path(name), root.command)


def _check_cache(record: dict[str, Any]) -> None:
    """Count the models in the hub's cache, and the bytes of all that is in it."""
    from huggingface_hub import constants

    from cmdgen.store.hub import find_cached

    folder = Path(constants.HF_HUB_CACHE)
    size = sum(file.stat().st_size for file in folder.glob("*/blobs/*") if file.is_file())
    record |= {"folder": str(folder), "models": len(find_cached()), "bytes": size}


def _check_model(record: dict[str, Any], device: "torch.device") -> None:
    """Make a clip in one step of each model, on a GPU also on the CPU."""
    import numpy as np

    from cmdgen.config import packaged_models
    from cmdgen.pipelines.load import load_pipeline

    def sample(place: str) -> np.ndarray:
        pipeline = load_pipeline(str(folder), device=place)
        return pipeline.sample(PROMPT, seed=0, steps=1, motion_steps=1).frames

    record["name"] = MODEL
    if MODEL not in packaged_models():
        raise ValueError("it does not ship with this installation")
    folder = packaged_models()[MODEL]
    record["folder"] = str(folder)
    start = time.monotonic()
    frames = sample(str(device))
    record["seconds"] = round(time.monotonic() - start, 2)
    if not frames.std():
        raise ValueError("its clip is of one colour")
    if device.type != "cpu":
        difference = float(np.abs(frames.astype(float) - sample("cpu")).mean())
        record["apart"] = round(difference, 3)
        if difference > TOLERANCE:
            raise ValueError(f"its clip is {difference:.1f} of 255 from the CPU's")


def _check_op(op: "Op", device: "torch.device") -> dict[str, Any]:
    """Find out what an op runs as, why not as a kernel, and whether the kernel is right."""
    import torch

    from cmdgen_kernels.samples import errors

    # the same inputs, whatever is checked before
    torch.manual_seed(0)
    inputs = op.inputs(op.small, torch.float32, device)
    reason = op.obstacle(*inputs)
    if reason is not None:
        return {"runs": "reference", "reason": reason, "agrees": None}
    try:
        (error,) = errors(op, inputs)
    except (RuntimeError, OSError, subprocess.SubprocessError) as failure:
        return {"runs": "kernel", "reason": shorten(str(failure)), "agrees": False}
    return {"runs": "kernel", "error": error.size, "allowed": error.allowed, "agrees": error.agrees}
