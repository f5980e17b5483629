"""A finished run as the model folder that is shipped: only its parts, in half precision.

Its calibration of step rehash goes along if there is one.
"""

import shutil
from pathlib import Path

import torch

from cmdgen.config import CALIBRATION
from cmdgen.files import create_folder
from cmdgen.store.parts import PARTS, read_model
from cmdgen.weights import read_tensors, save_tensors


def export_model(run: Path, target: Path, dtype: torch.dtype, *, overwrite: bool = False) -> dict[str, int]:
    """Copy a model folder, floating weights cast to `dtype`, whole or not at all; return bytes by file.

    Raises ValueError where the run is no whole model yet, or `target` exists: with `overwrite`, where
    that is no other model; FileNotFoundError where there is no run.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a folder")
    read_model(run)
    is_run = target.resolve() in (run.resolve(), *run.resolve().parents)
    if overwrite and target.exists() and (is_run or not (target / "model_index.json").is_file()):
        raise ValueError(f"{target} is not another model, and is not replaced: give another folder")
    parts = [path for part in PARTS for path in sorted((run / part).glob("*"))]
    sizes = {}
    with create_folder(target, overwrite=overwrite) as folder:
        for source in (run / "model_index.json", run / CALIBRATION, *parts):
            if not source.is_file():
                continue
            copy = folder / source.relative_to(run)
            copy.parent.mkdir(exist_ok=True)
            if source.suffix == ".safetensors":
                save_tensors(copy, read_tensors(source, foreign=True)[0], dtype)
            else:
                shutil.copyfile(source, copy)
            sizes[str(source.relative_to(run))] = copy.stat().st_size
    return sizes
