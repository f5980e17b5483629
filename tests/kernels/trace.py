"""Trace every op's kernels with torch.compile for a GPU that is not here: a JSON object of names.

The graphs are made, forward and backward, down to where Inductor would take over. None is run: what
one would return is blank.
"""

import os

# read when Triton is imported
os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._triton
from ahead import Device, kernels
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch.fx import GraphModule
from triton.runtime import Autotuner, driver

from cmdgen_kernels import dispatch
from cmdgen_kernels.samples import OPS, Op

# beside the small ones: groups that fit in a program
MORE = {"group_norm_silu": [(2, 64, 3, 5)]}


def trace(op: Op, inputs: Sequence[Tensor]) -> list[str]:
    """The kernels in the graph of the op and, where inputs ask for one, of its backward."""
    found: list[str] = []

    def capture(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if "kernel_idx" in node.kwargs:
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                # dynamo makes launch options a choice of one
                kernel = kernel.fn if isinstance(kernel, Autotuner) else kernel
                found.append(kernel.__name__)
        results = graph.graph.output_node().args[0]
        return make_boxed_func(lambda *_: [node and _blank(node.meta["val"]) for node in results])

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=capture, bw_compiler=capture)
    output = torch.compile(op.run, fullgraph=True, backend=backend)(*inputs)
    if any(x.requires_grad for x in inputs):
        output.sum().backward()
    return found


def _blank(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def main() -> None:
    driver.set_active(Device(90))
    # what dynamo asks before it takes a kernel for one, and what the ops ask
    torch.utils._triton.has_triton = lambda: True
    dispatch._interpreting = True
    traced = {}
    for op in OPS:
        for sizes in (op.small, *MORE.get(op.name, ())):
            inputs = op.inputs(sizes, torch.float16)
            found = traced.setdefault(op.name, {"inference": [], "training": []})
            found["inference"] += trace(op, inputs)
            if op.leaves:
                for x in inputs[: op.leaves]:
                    x.requires_grad_()
                found["training"] += trace(op, inputs)
    print(json.dumps({"kernels": sorted(kernels()), "traced": traced}))


if __name__ == "__main__":
    main()
