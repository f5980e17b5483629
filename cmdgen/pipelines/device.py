"""Names of devices and dtypes."""

import os

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is an NVIDIA GPU if there is one, under torchrun the process's own.

    ValueError lists the names.
    """
    possible = ["cpu"]
    if torch.cuda.is_available():
        possible += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        possible.append("mps")
    if name == "auto":
        # torchrun starts a process for each GPU
        local = os.environ.get("LOCAL_RANK")
        name = "cpu" if "cuda" not in possible else "cuda" if local is None else f"cuda:{local}"
    if name not in possible:
        raise ValueError(f"device {name!r} is not one of auto, {', '.join(possible)}")
    return torch.device(name)


def use_device(name: str) -> torch.device:
    """Return the device of a name, for what runs outside of pipelines: kernels are launched on the current GPU."""
    device = choose_device(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name. ValueError lists the names.

    "auto" on a GPU is float16: as fast as bfloat16 and 8 times finer. What overflows in it is found.
    """
    if name == "auto":
        name = "float32" if device.type == "cpu" else "float16"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]
