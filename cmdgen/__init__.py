"""Text to video by content-frame motion-latent decomposition."""

import os

# what type checkers take for True: to import typing takes longer than all else here
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cmdgen.pipelines.base import Pipeline

__version__ = "0.1.0"


def load(
    model: str | os.PathLike[str] = "mini", *, device: str = "auto", dtype: str = "auto", lora: "Sequence[str]" = ()
) -> "Pipeline":
    """Return the pipeline of a model, ready for `pipeline.sample(prompt, **options)`.

    `model` is a packaged name, a folder, or what `cmdgen models pull` brought; `lora` are files that
    change its weights. Raises ValueError or FileNotFoundError, saying what is possible.
    """
    from cmdgen.pipelines.load import open_pipeline

    return open_pipeline(model, device=device, dtype=dtype, lora=lora)
