"""`cmdgen doctor`: what this machine has, and which ops run as kernels on it."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from subprocess import SubprocessError
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen import __version__
from cmdgen.cli.errors import Failure, describe

if TYPE_CHECKING:
    import torch

    from cmdgen_kernels.samples import Op


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
) -> None:
    """Say which ops run as kernels here, and why the others do not.

    Where an op runs as a kernel, it is tried against its definition in plain PyTorch.
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
        "devices": _devices(),
        "device": str(chosen),
        "ops": {op.name: _examine(op, chosen) for op in samples.OPS},
    }
    typer.echo(json.dumps(report, indent=2) if as_json else "\n".join(_lines(report)))
    wrong = [name for name, op in report["ops"].items() if op["agrees"] is False]
    if wrong:
        raise Failure(f"not what the definition gives, on {chosen}: {', '.join(wrong)}")


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """All devices that `--device` takes; of GPUs with memory in GiB and compute capability."""
    import torch

    devices: list[dict[str, Any]] = [{"device": "cpu", "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": gpu.name,
                "memory": round(gpu.total_memory / 2**30, 1),
                "capability": f"{gpu.major}.{gpu.minor}",
            }
        )
    return devices


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
    lines = [f"{name:18}{report[name]}" for name in ("cmdgen", "python", "torch")]
    lines.append(f"{'triton':18}{report['triton'] or 'not installed'}")
    for device in report["devices"]:
        if "name" in device:
            text = "{name}, {memory} GiB, compute capability {capability}".format(**device)
        else:
            text = f"{device['threads']} threads"
        lines.append(f"{device['device']:18}{text}")
    for name, op in report["ops"].items():
        if op["agrees"] is None:
            text = f"reference: {op['reason']}"
        elif "error" not in op:
            text = f"kernel, fails: {op['reason']}"
        else:
            verdict = "agrees" if op["agrees"] else "does not agree"
            text = f"kernel, {verdict} with the reference (error {op['error']:.1e})"
        lines.append(f"{name:18}{text}")
    return lines
