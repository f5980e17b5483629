"""Decide which tensors go through a Triton kernel, and say why the others do not."""

import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cmdgen_kernels.language import INSTALLED, LOADED

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)

# whether kernels take tensors of a CPU: only tests set it, with TRITON_INTERPRET=1 before the import,
# as Triton's interpreter is thousands of times slower than PyTorch
_interpreting = False


def obstacle(*tensors: Tensor) -> str | None:
    """Say in a few words why no kernel can take these tensors; None where one can."""
    device = tensors[0].device
    # first, as a CPU asks before every operator
    if device.type != "cuda" and not (_interpreting and device.type == "cpu"):
        return f"the tensors are on {device.type}, not on a GPU"
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"no kernel computes in {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.device != device:
            return "tensors on several devices"
    return machine_obstacle(device) if device.type == "cuda" else None


def inference_obstacle(*tensors: Tensor) -> str | None:
    """Do the same for an op that has no kernel for its gradient."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a gradient is wanted, for which there is no kernel"
    return obstacle(*tensors)


def machine_obstacle(device: torch.device) -> str | None:
    """Say why Triton cannot launch on this GPU; None where it can."""
    if not INSTALLED:
        return "Triton is not installed"
    if not LOADED or torch.version.hip is not None:
        return "this PyTorch is not built with CUDA"
    current = torch.cuda.current_device()
    index = current if device.index is None else device.index
    if index != current:
        return f"Triton launches on the current device, cuda:{current}, not on cuda:{index}"
    if capability(device) < OLDEST:
        return "compute capability {}.{} is below {}.{}".format(*capability(device), *OLDEST)
    if not _compiler():
        return "no C compiler or no Python.h, which Triton needs: install gcc and python3-dev"
    return None


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one block of threads may have on this GPU."""
    gpu = torch.cuda.get_device_properties(device)
    return int(gpu.shared_memory_per_block_optin)  # type: ignore[attr-defined]


_capabilities: dict[int, tuple[int, int]] = {}


def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability; each query costs microseconds, so the answer is kept."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


def since_hopper(device: torch.device) -> bool:
    """Return whether a GPU's compute capability is 9.0 or later."""
    return capability(device) >= (9, 0)


@cache
def _compiler() -> bool:
    """Return whether Triton will find a C compiler and Python's header; looks once."""
    names = (os.environ.get("CC"), "gcc", "clang")
    header = Path(sysconfig.get_paths(scheme="posix_prefix")["include"], "Python.h")
    return any(name and shutil.which(name) for name in names) and header.exists()


for _function in (machine_obstacle, shared_memory, since_hopper):
    # to dynamo a constant: like torch.compiler.assume_constant_result, which would import Triton and all of dynamo
    _function.__dict__["_dynamo_marked_constant"] = True
