"""Compile every kernel for GPUs that are not here, and read the machine code: a table, or JSON.

    python tests/kernels/ahead.py [--architecture 80 90] [--dtype float16 bfloat16] [--json]

The ops run as a model would run them, forward and backward, on tensors without data. Where a kernel
would be launched it is compiled, for those arguments and with those options.
"""

import os

# both are read when Triton is imported. The second is Triton's default, chosen: 3.9 warns otherwise
os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import cmdgen_kernels
from cmdgen_kernels import dispatch
from cmdgen_kernels.samples import OPS, Op

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# of the machine code
PATTERNS = {
    "spills": r"\b(?:STL|LDL)\b",
    "loads": r"\b(?:LDG|LDGSTS)\b",
    "wide_loads": r"\b(?:LDG|LDGSTS)[.\w]*\.128\b",
    "stores": r"\bSTG\b",
    "wide_stores": r"\bSTG[.\w]*\.128\b",
    "mma": r"\bHMMA\b",
    "wgmma": r"\bHGMMA\b",
}
# of cmd-sd21, 16 frames of 512x1024: sizes as `samples.py` has them
SIZES = {
    "content_frame": [(8, 4, 16, 64, 128)],
    "motion_latents": [(8, 16, 32, 64, 384, 8)],
    "motion_tokens": [(8, 16, 32, 64, 384, 8)],
    "gated_attention": [(2, 5, 8192, 64, 256)],
    # a large map, and one whose groups fit in a program
    "group_norm_silu": [(2, 320, 64, 128), (2, 1280, 8, 16)],
    "convolution": [(1, 128, 512, 1024)],
    "doubled_convolution": [(1, 256, 256, 512)],
    # of UNet and motion model
    "layer_norm": [(2, 8192, 320), (1, 512, 1152)],
    "geglu": [(2, 8192, 1280)],
    "wide_attention": [(1, 8192, 512)],
    # AnimateDiff's levels, and SVD's first, of 25 frames
    "time_attention": [(2, 16, 9216, 8, 40), (2, 16, 2304, 8, 80), (2, 16, 576, 8, 160), (2, 25, 9216, 5, 64)],
    "rotate": [(16, 2048, 768)],
    "yuv420p": [(1, 512, 1024)],
}
RAGGED = "no block divides it"


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would be launched: where from, and what its machine code uses."""

    kernel: str
    architecture: int
    dtype: str
    case: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    # bytes of a thread's stack; stores to it and loads from it
    stack: int
    spills: int
    # bytes of shared memory
    shared: int
    loads: int
    # of which 16 bytes at a time; asynchronous copies count
    wide_loads: int
    stores: int
    wide_stores: int
    # tensor cores: instructions of a warp, and of a group of four
    mma: int
    wgmma: int


class Device:
    """A stand-in for Triton's driver: the GPU to compile for."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Pointer(MockTensor):
    """A tensor as a kernel's argument: its dtype, and as much of its address as is known."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.dtype, tuple(tensor.shape))
        self.address = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address


def kernels() -> set[str]:
    """The names of all kernels of the package."""
    found = set()
    for module in pkgutil.iter_modules(cmdgen_kernels.__path__):
        for name, value in vars(importlib.import_module(f"cmdgen_kernels.{module.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found.add(name)
    return found


def read(binary: bytes) -> dict[str, int]:
    """A compiled kernel's machine code -> what it uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(TOOLS / "nvdisasm", "-c", file.name)
    count = {name: len(re.findall(pattern, code)) for name, pattern in PATTERNS.items()}
    for name in ("REG", "STACK"):
        (value,) = re.findall(rf"{name}:(\d+)", usage)
        count[{"REG": "registers", "STACK": "stack"}[name]] = int(value)
    return count


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@contextmanager
def launches() -> Iterator[list[tuple[Any, tuple[int, ...]]]]:
    """Within, a launch compiles and is noted: the kernel as compiled, and the grid."""
    launched = []
    run = JITFunction.run

    def note(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        arguments = tuple(Pointer(x) if isinstance(x, Tensor) else x for x in arguments)
        # "warmup" is Triton's word for all of a launch but the launch
        launched.append((run(kernel, *arguments, grid=grid, warmup=True, **options), tuple(grid)))

    JITFunction.run = note
    try:
        yield launched
    finally:
        JITFunction.run = run


def call(op: Op, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """The op, and its backward where there is a kernel for it, on tensors without data."""
    inputs = op.inputs(sizes, dtype)
    op.run(*inputs)
    if op.leaves:
        for x in inputs[: op.leaves]:
            x.requires_grad_()
        op.run(*inputs).sum().backward()


def compile_all(architecture: int, dtypes: list[str]) -> list[Compiled]:
    """Every op at its sizes of cmd-sd21; in the last dtype also where no block divides them."""
    driver.set_active(Device(architecture))
    # tensors of a CPU take the kernels then
    dispatch._interpreting = True
    results = {}
    with FakeTensorMode(), launches() as launched:
        for dtype, op in product(dtypes, OPS):
            cases = [(sizes, "x".join(map(str, sizes))) for sizes in SIZES[op.name]]
            if dtype == dtypes[-1]:
                cases.append((op.small, RAGGED))
            for sizes, case in cases:
                call(op, sizes, getattr(torch, dtype))
                for built, grid in launched:
                    if built.hash not in results:
                        results[built.hash] = Compiled(
                            built.metadata.name,
                            architecture,
                            dtype,
                            case,
                            grid,
                            built.metadata.num_warps,
                            shared=built.metadata.shared,
                            **read(built.asm["cubin"]),
                        )
                launched.clear()
    return list(results.values())


def table(rows: list[Compiled]) -> str:
    """One line for each compiled kernel."""
    lines = []
    for row in rows:
        tensor = f"{row.wgmma} HGMMA" if row.wgmma else f"{row.mma} HMMA" if row.mma else ""
        lines.append(
            f"sm_{row.architecture} {row.dtype:8} {row.kernel:32} {row.warps:2} warps "
            f"{row.registers:3} registers {row.spills:3} spills {row.shared / 1024:5.1f} KiB "
            f"loads {row.wide_loads}/{row.loads} stores {row.wide_stores}/{row.stores} "
            f"{tensor:9} {row.case}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        rows = [row for arch in asked.architecture for row in compile_all(arch, asked.dtype)]
    if asked.json:
        result = {"kernels": sorted(kernels()), "compiled": [asdict(row) for row in rows]}
        print(json.dumps(result))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
