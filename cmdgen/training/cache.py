"""Encoded clips on disk: shards written once, whole or not at all, and read back into memory.

One mechanism for both encodings, frames -> latents by the VAE and latents -> (content, motion) by
the CMD autoencoder. A cache is named after everything that it depends on, so one of other weights,
data or size is another cache; the outdated ones of the same kind are removed.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmdgen.training.loop import Report
from cmdgen.weights import replace_with

SHARD = 256


def fingerprint(module: nn.Module, *more: str) -> str:
    """Hex digest of weights and whatever else an encoding depends on."""
    digest = hashlib.blake2b("\n".join(more).encode(), digest_size=8)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cached(
    folder: Path,
    kind: str,
    key: str,
    count: int,
    encode: Callable[[range], dict[str, Tensor]],
    report: Report,
    *,
    shard: int = SHARD,
) -> dict[str, Tensor]:
    """Rows 0 .. count - 1 of every tensor of an encoding, in float16.

    `encode` gives the rows of a range; what is on disk is not encoded again. All shards but the
    last are whole, so that a larger count later reuses them.
    """
    place = folder / f"{kind}-{key}"
    for other in folder.glob(f"{kind}-*"):
        if other != place:
            shutil.rmtree(other)
    place.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, count, shard):
        rows = range(start, min(start + shard, count))
        report(f"encode {kind}", start, count, {})
        shards.append(_shard(place / f"{rows.start:07d}-{rows.stop:07d}.safetensors", rows, encode))
    report(f"encode {kind}", count, count, {})
    return {name: torch.cat([part[name] for part in shards]) for name in shards[0]}


def _shard(
    path: Path, rows: range, encode: Callable[[range], dict[str, Tensor]]
) -> dict[str, Tensor]:
    if path.exists():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not readable: remove it, and it is made again") from error
    tensors = {name: t.to("cpu", torch.float16).contiguous() for name, t in encode(rows).items()}
    with replace_with(path) as temporary:
        save_file(tensors, temporary)
    return tensors
