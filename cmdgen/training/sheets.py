"""Pictures for a person to look at while training runs: frames in rows, written as PNG."""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from cmdgen.files import replace_with

# stills in a row, and pixels between pictures
COLUMNS, GAP = 8, 2


def compare(above: Tensor, below: Tensor) -> Tensor:
    """(N, T, 3, H, W) uint8 x2 -> (h, w, 3) uint8: a row for each clip, above that of the other.

    Stills, T = 1, come eight in a row.
    """
    columns = above.shape[1] if above.shape[1] > 1 else min(COLUMNS, len(above))
    rows = above.shape[0] * above.shape[1] // columns
    pairs = torch.stack((above, below.to(above.device))).flatten(1, 2)[:, : rows * columns]
    framed = F.pad(pairs.cpu(), (0, GAP, 0, GAP), value=255)
    return rearrange(framed, "p (r n) c h w -> (r p h) (n w) c", r=rows)


def write_png(path: Path, picture: Tensor) -> None:
    """Write (H, W, 3) uint8 to a file, whole or not at all."""
    with replace_with(path) as temporary:
        Image.fromarray(picture.numpy()).save(temporary, format="PNG")
