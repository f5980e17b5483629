"""`cmdgen doctor`: what this machine has, what runs on it and how, and whether it works."""

import json
import platform
import re
import subprocess
import time
from pathlib import Path
from subprocess import SubprocessError
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from cmdgen import __version__
from cmdgen.cli.errors import Failure, describe
from cmdgen.cli.options import AsJson, Device
from cmdgen.cli.settings import config_path, read_settings
from cmdgen.config import SampleConfig
from cmdgen.video.formats import CODECS

if TYPE_CHECKING:
    import torch

    from cmdgen_kernels.samples import Op

# the model that is tried, and with what
MODEL, PROMPT = "mini", "a dog swimming in the ocean"
# of pixel values, 0-255: what rounding may make of one step on different devices, on average
APART = 2.0


def doctor(context: typer.Context, device: Device = "auto", as_json: AsJson = False) -> None:
    """Say what this machine has, which ops run as kernels, and whether the default model works.

    Where an op runs as a kernel, it is tried against its definition in plain PyTorch; the model
    makes a clip in one step, on a GPU compared with the same on the CPU. Exits with 1 where
    something is broken.

    Examples:
        cmdgen doctor
        cmdgen doctor --device cpu --json > report.json
    """
    import torch

    from cmdgen.pipeline import choose_device
    from cmdgen_kernels import samples

    chosen = choose_device(device)
    if chosen.index is not None:
        # kernels are launched on the current GPU
        torch.cuda.set_device(chosen)
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "cmdgen": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "system": platform.platform(),
        "devices": _devices(),
        "device": str(chosen),
        "ffmpeg": _ffmpeg(),
        "config": _config(context),
        "cache": _cache(),
        "model": _try_model(chosen),
        "ops": {op.name: _examine(op, chosen) for op in samples.OPS},
    }
    typer.echo(json.dumps(report, indent=2) if as_json else "\n".join(_lines(report)))
    broken = [name for name in ("ffmpeg", "config", "model") if "error" in report[name]]
    wrong = [name for name, op in report["ops"].items() if op["agrees"] is False]
    faults = [f"broken: {', '.join(broken)}"] if broken else []
    if wrong:
        faults.append(f"not what the definition gives, on {chosen}: {', '.join(wrong)}")
    if faults:
        raise Failure("; ".join(faults))


def _triton() -> str | None:
    # help does without
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """All devices that `--device` takes, with memory in GiB; of GPUs compute capability."""
    import torch

    from cmdgen.evaluation.memory import measure_memory

    def in_gib(place: torch.device) -> dict[str, float | None]:
        memory = measure_memory(place)
        free = None if memory.free is None else round(memory.free / 2**30, 1)
        return {"memory": round(memory.total / 2**30, 1), "free": free}

    cpu = torch.device("cpu")
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "threads": torch.get_num_threads(), **in_gib(cpu)}
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": gpu.name,
                **in_gib(torch.device("cuda", index)),
                "capability": f"{gpu.major}.{gpu.minor}",
            }
        )
    return devices


def _ffmpeg() -> dict[str, Any]:
    """The encoder that is used, its version, and which codecs of ours it has."""
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        path = get_ffmpeg_exe()
        first, *_ = _ask(path, "-version").splitlines()
        listed = _ask(path, "-hide_banner", "-encoders")
    except (RuntimeError, OSError, SubprocessError, ValueError) as error:
        return {"error": describe(error)}
    encoders = set(re.findall(r"^ V\S{5} (\S+)", listed, re.MULTILINE))
    # of a codec's arguments the first two are -c:v and its encoder
    codecs = {name: codec.arguments[1] in encoders for name, codec in CODECS.items()}
    found = {"path": path, "version": first.split()[2], "codecs": codecs}
    # what an mp4 is made with, unless another is asked for
    return found if codecs["h264"] else {**found, "error": "it cannot encode h264"}


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _config(context: typer.Context) -> dict[str, Any]:
    """The file of defaults, and what is wrong with it."""
    root = context.find_root()
    path = root.params["config"] or config_path()
    found = {"path": str(path), "exists": path.exists()}
    if not found["exists"] or root.params["no_config"]:
        return found
    assert isinstance(root.command, TyperGroup)
    try:
        read_settings(path, root.command)
    except ValueError as error:
        return {**found, "error": describe(error)}
    return found


def _cache() -> dict[str, Any]:
    """The hub's cache: how many models we can see there, and bytes of all that is in it."""
    from huggingface_hub import constants

    from cmdgen.store.hub import find_cached

    folder = Path(constants.HF_HUB_CACHE)
    size = sum(file.stat().st_size for file in folder.glob("*/blobs/*") if file.is_file())
    return {"folder": str(folder), "models": len(find_cached()), "bytes": size}


def _try_model(device: "torch.device") -> dict[str, Any]:
    """Whether the default model can be read and makes a clip, in one step each."""
    import numpy as np

    from cmdgen.config import packaged_models
    from cmdgen.pipeline import TextToVideo

    def run(place: str) -> np.ndarray:
        config = SampleConfig(seed=0, steps=1, motion_steps=1)
        return TextToVideo.load(folder, device=place).sample(PROMPT, config).frames

    if MODEL not in packaged_models():
        return {"name": MODEL, "error": "it does not ship with this installation"}
    folder = packaged_models()[MODEL]
    found: dict[str, Any] = {"name": MODEL, "folder": str(folder)}
    started = time.monotonic()
    try:
        frames = run(str(device))
        found["seconds"] = round(time.monotonic() - started, 2)
        if not frames.std():
            return {**found, "error": "its clip is of one colour"}
        if device.type != "cpu":
            apart = np.abs(frames.astype(float) - run("cpu")).mean()
            found["apart"] = round(float(apart), 3)
            if apart > APART:
                return {**found, "error": f"its clip is {apart:.1f} of 255 from the CPU's"}
    except (RuntimeError, OSError, ValueError, MemoryError) as error:
        return {**found, "error": describe(error)}
    return found


def _examine(op: "Op", device: "torch.device") -> dict[str, Any]:
    """What an op runs as, why not as a kernel, and whether the kernel is right."""
    import torch

    from cmdgen_kernels.samples import errors

    inputs = op.inputs(op.small, torch.float32, device)
    reason = op.obstacle(*inputs)
    if reason is not None:
        return {"runs": "reference", "reason": reason, "agrees": None}
    try:
        (error,) = errors(op, inputs)
    except (RuntimeError, OSError, SubprocessError) as failure:
        return {"runs": "kernel", "reason": describe(failure), "agrees": False}
    return {"runs": "kernel", "error": error.size, "allowed": error.allowed, "agrees": error.agrees}


def _lines(report: dict[str, Any]) -> list[str]:
    shown = {name: report[name] for name in ("cmdgen", "python", "torch")}
    shown["triton"] = report["triton"] or "not installed"
    shown["system"] = report["system"]
    for device in report["devices"]:
        if "name" in device:
            text = "{name}, compute capability {capability}, {memory} GiB".format(**device)
        else:
            text = "{threads} threads, {memory} GiB".format(**device)
        shown[device["device"]] = text + (
            "" if device["free"] is None else f", {device['free']} free"
        )
    shown["runs on"] = report["device"]
    ffmpeg, config, cache, model = (report[name] for name in ("ffmpeg", "config", "cache", "model"))
    codecs = [name for name, there in ffmpeg.get("codecs", {}).items() if there]
    missing = [name for name, there in ffmpeg.get("codecs", {}).items() if not there]
    if "path" in ffmpeg:
        without = f", without {', '.join(missing)}" if missing else ""
        shown["ffmpeg"] = f"{ffmpeg['version']} with {', '.join(codecs)}{without}; {ffmpeg['path']}"
    shown["config"] = config["path"] + ("" if config["exists"] else " (there is none)")
    shown["hub's cache"] = f"{cache['folder']} ({cache['models']} models, {_size(cache['bytes'])})"
    if "seconds" in model:
        apart = f", {model['apart']:g} of 255 from the CPU's clip" if "apart" in model else ""
        shown["model"] = f"{model['name']} makes a clip in one step, {model['seconds']} s{apart}"
    for name in ("ffmpeg", "config", "model"):
        if "error" in report[name]:
            shown[name] = f"broken: {report[name]['error']}"
    for name, op in report["ops"].items():
        if op["agrees"] is None:
            text = f"reference: {op['reason']}"
        elif "error" not in op:
            text = f"kernel, fails: {op['reason']}"
        else:
            verdict = "agrees" if op["agrees"] else "does not agree"
            text = f"kernel, {verdict} with the reference (error {op['error']:.1e})"
        shown[name] = text
    return [f"{name:18}{text}" for name, text in shown.items()]


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
