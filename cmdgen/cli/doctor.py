"""`cmdgen doctor`: what this machine has, what runs on it and how, and whether it works."""

import json
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen import __version__
from cmdgen.cli.command import Only
from cmdgen.cli.errors import Failure, describe
from cmdgen.cli.progress import Say
from cmdgen.cli.settings import config_path, read_settings
from cmdgen.request import Request
from cmdgen.video.formats import CODECS

if TYPE_CHECKING:
    import torch

    from cmdgen_kernels.samples import Op

MODEL, PROMPT = "mini", "a dog swimming in the ocean"
# mean difference of pixel values, 0-255, that rounding may make between two devices
TOLERANCE = 2.0

# a record of the report, and its line
Result = tuple[dict[str, Any], str]


def doctor(
    context: typer.Context, machine: Annotated[Request, Only(("device",))], say: Annotated[Say, Only(("as_json",))]
) -> None:
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

    from cmdgen.pipelines.device import choose_device
    from cmdgen_kernels import samples

    device = choose_device(machine.device)
    if device.index is not None:
        # kernels are launched on the current GPU
        torch.cuda.set_device(device)
    facts = {
        "cmdgen": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": next((each.version for each in distributions(name="triton")), None),
        "system": platform.platform(),
    }
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    devices = {name: _describe_device(torch.device(name)) for name in names}
    checks = {
        "ffmpeg": _try(_check_ffmpeg),
        "config": _try(_check_config, context),
        "cache": _try(_check_cache),
        "model": _try(_check_model, device),
    }
    ops = {op.name: _check_op(op, device) for op in samples.OPS}
    if say.as_json:
        report: dict[str, Any] = dict(facts)
        report["devices"] = [record for record, _ in devices.values()]
        report["device"] = str(device)
        report |= {name: record for name, (record, _) in checks.items()}
        report["ops"] = {name: record for name, (record, _) in ops.items()}
        typer.echo(json.dumps(report, indent=2))
    else:
        lines = {name: fact or "not installed" for name, fact in facts.items()}
        lines |= {name: line for name, (_, line) in devices.items()}
        lines["runs on"] = str(device)
        lines |= {name: line for name, (_, line) in {**checks, **ops}.items()}
        typer.echo("\n".join(f"{name:18}{line}" for name, line in lines.items()))
    broken = ", ".join(name for name, (record, _) in checks.items() if "error" in record)
    wrong = ", ".join(name for name, (record, _) in ops.items() if record["agrees"] is False)
    faults = [f"broken: {broken}"] if broken else []
    if wrong:
        faults.append(f"not what the definition gives, on {device}: {wrong}")
    if faults:
        raise Failure("; ".join(faults))


def _describe_device(device: "torch.device") -> Result:
    """Return memory in GiB, and threads or the GPU's name and compute capability."""
    import torch

    from cmdgen.evaluation.memory import measure_memory

    record: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        record.update(name=gpu.name, capability=f"{gpu.major}.{gpu.minor}")
        kind = f"{gpu.name}, compute capability {record['capability']}"
    else:
        record["threads"] = torch.get_num_threads()
        kind = f"{record['threads']} threads"
    total, free = measure_memory(device)
    record["memory"] = round(total / 2**30, 1)
    record["free"] = None if free is None else round(free / 2**30, 1)
    line = f"{kind}, {record['memory']} GiB"
    return record, line if free is None else f"{line}, {record['free']} free"


def _try(check: Callable[..., str], *arguments: Any) -> Result:
    """Run a check, which fills in its record and returns its line."""
    record: dict[str, Any] = {}
    try:
        return record, check(record, *arguments)
    except (RuntimeError, OSError, ValueError, MemoryError, subprocess.SubprocessError) as error:
        record["error"] = describe(error)
        return record, f"broken: {record['error']}"


def _check_ffmpeg(record: dict[str, Any]) -> str:
    from imageio_ffmpeg import get_ffmpeg_exe

    def ask(*arguments: str) -> str:
        command = [path, "-hide_banner", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    record["path"] = path = get_ffmpeg_exe()
    record["version"] = version = ask("-version").split()[2]
    encoders = set(re.findall(r"^ V\S{5} (\S+)", ask("-encoders"), re.MULTILINE))
    # a codec's first two arguments are -c:v and its encoder
    codecs = {name: codec.arguments[1] in encoders for name, codec in CODECS.items()}
    record["codecs"] = codecs
    if not codecs["h264"]:
        raise ValueError("it cannot encode h264")
    missing = [name for name in codecs if not codecs[name]]
    without = f", without {', '.join(missing)}" if missing else ""
    return f"{version} with {', '.join(name for name in codecs if codecs[name])}{without}; {path}"


def _check_config(record: dict[str, Any], context: typer.Context) -> str:
    root = context.find_root()
    name = root.params["config"] or config_path()
    if name is None:
        record.update(path=None, exists=False)
        return "no home directory"
    path = Path(name)
    record.update(path=str(path), exists=path.exists())
    if not record["exists"]:
        return f"{path} (there is none)"
    if not root.params["no_config"]:
        read_settings(path, root.command)
    return str(path)


def _check_cache(record: dict[str, Any]) -> str:
    """Count the models in the hub's cache, and the bytes of all that is in it."""
    from huggingface_hub import constants

    from cmdgen.store.hub import find_cached

    folder = Path(constants.HF_HUB_CACHE)
    size = sum(file.stat().st_size for file in folder.glob("*/blobs/*") if file.is_file())
    record.update(folder=str(folder), models=len(find_cached()), bytes=size)
    return f"{folder} ({record['models']} models, {size / 2**30:.1f} GiB)"


def _check_model(record: dict[str, Any], device: "torch.device") -> str:
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
    line = f"{MODEL} makes a clip in one step, {record['seconds']} s"
    if not frames.std():
        raise ValueError("its clip is of one colour")
    if device.type == "cpu":
        return line
    difference = float(np.abs(frames.astype(float) - sample("cpu")).mean())
    record["apart"] = round(difference, 3)
    if difference > TOLERANCE:
        raise ValueError(f"its clip is {difference:.1f} of 255 from the CPU's")
    return f"{line}, {record['apart']:g} of 255 from the CPU's clip"


def _check_op(op: "Op", device: "torch.device") -> Result:
    """Find out what an op runs as, why not as a kernel, and whether the kernel is right."""
    import torch

    from cmdgen_kernels.samples import errors

    # the same inputs, whatever is checked before
    torch.manual_seed(0)
    inputs = op.inputs(op.small, torch.float32, device)
    reason = op.obstacle(*inputs)
    if reason is not None:
        return {"runs": "reference", "reason": reason, "agrees": None}, f"reference: {reason}"
    record: dict[str, Any] = {"runs": "kernel"}
    try:
        (error,) = errors(op, inputs)
    except (RuntimeError, OSError, subprocess.SubprocessError) as failure:
        record.update(reason=describe(failure), agrees=False)
        return record, f"kernel, fails: {record['reason']}"
    record.update(error=error.size, allowed=error.allowed, agrees=error.agrees)
    verdict = "agrees" if error.agrees else "does not agree"
    return record, f"kernel, {verdict} with the reference (error {error.size:.1e})"
