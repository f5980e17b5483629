"""A finished run as the model folder that is shipped: parts alone, in half precision.

Its calibration of step rehash goes along where there is one.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cmdgen.config import CALIBRATION
from cmdgen.files import replace_with
from cmdgen.store.parts import read_model

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PARTS = ("vae", "autoencoder", "unet", "text_encoder", "tokenizer", "scheduler", "motion")


def export_model(run: Path, target: Path, dtype: torch.dtype) -> dict[str, int]:
    """Copies a model folder, floating weights cast to `dtype`; returns bytes by file.

    Raises ValueError where the run is no whole model yet. Other files in the target stay.
    """
    read_model(run)
    if target.resolve() == run.resolve():
        raise ValueError(f"{target} is the run itself: give another folder")
    parts = [run / part for part in PARTS if (run / part).is_dir()]
    whole = [run / name for name in ("model_index.json", CALIBRATION)]
    sources = [
        *(path for path in whole if path.is_file()),
        *(path for part in parts for path in sorted(part.iterdir())),
    ]
    sizes = {}
    for source in sources:
        name = source.relative_to(run)
        with replace_with(target / name) as temporary:
            if source.suffix == ".safetensors":
                tensors = load_file(source)
                save_file(
                    {
                        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                        for key, tensor in tensors.items()
                    },
                    temporary,
                    metadata={"format": "pt"},
                )
            else:
                shutil.copyfile(source, temporary)
        sizes[str(name)] = (target / name).stat().st_size
    return sizes
