"""Pictures for a person to look at while training runs: frames in rows, written as PNG."""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from cmdgen.files import replace_with


def grid(rows: Tensor, gap: int = 2) -> Tensor:
    """(R, N, 3, H, W) uint8 -> (h, w, 3) uint8: R rows of N frames on white."""
    framed = F.pad(rows, (0, gap, 0, gap), value=255)
    return rearrange(framed.cpu(), "r n c h w -> (r h) (n w) c")


def compare(above: Tensor, below: Tensor, columns: int = 8) -> Tensor:
    """(N, 3, H, W) uint8 x2 -> (h, w, 3) uint8: rows of one, each above its row of the other."""
    columns = min(columns, len(above))
    rows = len(above) // columns
    pairs = torch.stack((above[: rows * columns], below[: rows * columns].to(above.device)))
    return grid(rearrange(pairs, "p (r n) c h w -> (r p) n c h w", r=rows))


def write_png(path: Path, picture: Tensor) -> None:
    """(H, W, 3) uint8 -> a file, whole or not at all."""
    with replace_with(path) as temporary:
        Image.fromarray(picture.numpy()).save(temporary, format="PNG")
