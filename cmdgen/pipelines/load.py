"""From a model's name to its pipeline."""

import os

from cmdgen.acceleration.compiled import check_compiler
from cmdgen.config import UNetConfig
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.device import choose_device, choose_dtype
from cmdgen.pipelines.still import StillPipeline
from cmdgen.store.find import find_model
from cmdgen.store.parts import read_model


def load_pipeline(
    model: str | os.PathLike[str] = "mini", *, device: str = "auto", dtype: str = "auto", compile: bool = False
) -> StillPipeline:
    """Return the pipeline that a model calls for; reads its configuration, no weights.

    `model` is a packaged name, a folder, or OWNER/NAME that `cmdgen models pull` brought; "auto" is
    a GPU if there is one, and bfloat16 on it. With `compile` the denoisers go through torch's
    compiler, which takes minutes for the first clip of a size. Raises ValueError, saying what is
    possible.
    """
    folder = find_model(os.fspath(model))
    config = read_model(folder)
    if config.text is None or config.vae is None or not isinstance(config.content, UNetConfig):
        raise ValueError(f"{folder} makes no video from text: it needs text_encoder, unet, vae")
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    if compile:
        check_compiler(place)
    kind = StillPipeline if config.motion is None else CmdPipeline
    return kind(folder, config, place, number, compile=compile)
