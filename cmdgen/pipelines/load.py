"""From a model's name to its pipeline."""

import os

from cmdgen.acceleration.compiled import check_compiler
from cmdgen.config import EvdmConfig, UNetConfig
from cmdgen.pipelines.base import Pipeline
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.device import choose_device, choose_dtype
from cmdgen.pipelines.evdm import EvdmPipeline
from cmdgen.pipelines.still import StillPipeline
from cmdgen.store.find import find_model
from cmdgen.store.parts import read_model


def open_pipeline(
    model: str | os.PathLike[str] = "mini", *, device: str = "auto", dtype: str = "auto", compile: bool = False
) -> Pipeline:
    """Return the pipeline that a model calls for; reads its configuration, no weights.

    `model` is a packaged name, a folder, or OWNER/NAME that `cmdgen models pull` brought; "auto" is
    a GPU if there is one, and bfloat16 on it. With `compile` the denoisers go through torch's
    compiler, which takes minutes for the first clip of a size. Raises ValueError, saying what is
    possible.
    """
    folder = find_model(os.fspath(model))
    config = read_model(folder)
    kind: type[Pipeline] = StillPipeline if config.motion is None else CmdPipeline
    if isinstance(config.content, EvdmConfig):
        kind = EvdmPipeline
    elif config.text is None or config.vae is None or not isinstance(config.content, UNetConfig):
        raise ValueError(f"{folder} makes no video from text: it needs text_encoder, unet, vae")
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    if compile:
        check_compiler(place)
    return kind(folder, config, place, number, compile=compile)


def load_pipeline(
    model: str | os.PathLike[str] = "mini", *, device: str = "auto", dtype: str = "auto", compile: bool = False
) -> StillPipeline:
    """Return the pipeline of a model that makes clips or stills from text; see `open_pipeline`."""
    pipeline = open_pipeline(model, device=device, dtype=dtype, compile=compile)
    if not isinstance(pipeline, StillPipeline):
        raise ValueError(f"{pipeline.folder} makes no video from text: it continues clips, with cmdgen predict")
    return pipeline


def load_predictor(
    model: str | os.PathLike[str] = "evdm", *, device: str = "auto", dtype: str = "auto", compile: bool = False
) -> EvdmPipeline:
    """Return the pipeline of a model that continues and fills in clips; see `open_pipeline`."""
    pipeline = open_pipeline(model, device=device, dtype=dtype, compile=compile)
    if not isinstance(pipeline, EvdmPipeline):
        raise ValueError(f"{pipeline.folder} makes videos from text: to continue one takes a model with evdm/")
    return pipeline
