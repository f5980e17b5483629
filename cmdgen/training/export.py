"""A finished run as the model folder that is shipped: only its parts, in half precision.

Its calibration of step rehash goes along if there is one.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from cmdgen.config import CALIBRATION
from cmdgen.files import replace_with
from cmdgen.store.parts import PARTS, read_model
from cmdgen.weights import save_tensors


def export_model(run: Path, target: Path, dtype: torch.dtype) -> dict[str, int]:
    """Copy a model folder, floating weights cast to `dtype`; return bytes by file.

    Raises ValueError where the run is no whole model yet. Other files in the target stay.
    """
    read_model(run)
    if target.resolve() == run.resolve():
        raise ValueError(f"{target} is the run itself: give another folder")
    parts = [path for part in PARTS for path in sorted((run / part).glob("*"))]
    sizes = {}
    for source in (run / "model_index.json", run / CALIBRATION, *parts):
        if not source.is_file():
            continue
        copy = target / source.relative_to(run)
        if source.suffix == ".safetensors":
            save_tensors(copy, load_file(source), dtype)
        else:
            with replace_with(copy) as temporary:
                shutil.copyfile(source, temporary)
        sizes[str(source.relative_to(run))] = copy.stat().st_size
    return sizes
