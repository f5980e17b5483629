"""Processes that train together, as torchrun starts them; here they are forked, so that they import nothing.

`python -m tests.training.ranks STAGE -o RUN ...` is one of them, for torchrun itself.
"""

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from cmdgen.config import PRESETS, EvdmConfig
from cmdgen.training import checkpoint, denoising, loop, text
from cmdgen.training.distributed import whole
from cmdgen.world.config import WORLDS
from tests.conftest import tiny_config
from tests.training.conftest import SHAPES

# the smallest models, on drawn shapes; dropout draws from one generator for all rows of a process
FEW = ["--data", "shapes", "--batch", "8", "--clips", "8", "--held-out", "4", "--lr", "4e-4", "--warmup", "2"]
FEW += ["--log-every", "1", "-q"]
EVDM = EvdmConfig(past=2, current=2, future=2, patch=2, width=8, multipliers=(1, 2), dropout=0.0)


def prepare() -> None:
    """Make models and clips small, do not wait for the disk, and log all digits."""
    torch.set_num_threads(1)
    PRESETS["mini"], WORLDS["shapes"] = replace(tiny_config(), name="mini"), SHAPES
    PRESETS["evdm-small"] = replace(PRESETS["evdm-small"], content=EVDM, frames=6, height=32, width=48)
    text.CAPTIONS, denoising.SHEET_STEPS = 20, 2
    os.fsync = lambda _: None

    def write(log: checkpoint.Log, record: dict[str, float]) -> None:
        if log.file is not None:
            log.file.write(json.dumps(record) + "\n")

    checkpoint.Log.write = write  # type: ignore[method-assign]
    load = loop._State._load

    def load_and_hash(state: loop._State, read: checkpoint.Checkpoint) -> None:
        load(state, read)
        bits = {name: whole(tensor).reshape(-1).view(torch.uint8) for name, tensor in state._tensors().items()}
        hashes = {name: hashlib.sha256(part.numpy()).hexdigest() for name, part in bits.items()}
        if state.run.ranks.leads:
            (state.run.state / "loaded.json").write_text(json.dumps([state.step, hashes]))

    loop._State._load = load_and_hash  # type: ignore[method-assign]


def fork(world: int, work: Callable[[int], object], *, nodes: int = 1) -> list[int]:
    """Run `work` in processes of one group, as if on several nodes; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world // nodes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(world):
        if not (child := os.fork()):
            os.environ |= {name: str(value) for name, value in (shared | {"RANK": rank}).items()}
            code = 1
            try:
                work(rank)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train(world: int, stage: str, folder: Path, steps: int, *options: object, nodes: int = 1) -> None:
    """Train a stage by several processes; fail where one of them does."""
    from cmdgen.cli.app import main

    arguments = ["train", stage, "-o", str(folder), *FEW, "--steps", str(steps), *map(str, options)]
    codes = fork(world, lambda _: main(arguments), nodes=nodes)
    assert codes == [0] * world, (stage, codes)


if __name__ == "__main__":
    from cmdgen.cli.app import main

    prepare()
    main(["train", *sys.argv[1:]])
