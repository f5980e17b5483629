"""From a model's name to its pipeline."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from cmdgen.acceleration.compiled import check_compiler
from cmdgen.config import EvdmConfig, ModelConfig, TinyConfig, UNetConfig, VaeConfig
from cmdgen.pipelines.base import Pipeline
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.device import choose_device, choose_dtype
from cmdgen.pipelines.evdm import EvdmPipeline
from cmdgen.pipelines.still import StillPipeline
from cmdgen.pipelines.video_unet import MotionPipeline, PicturePipeline
from cmdgen.schema import read_config
from cmdgen.store.find import find_model
from cmdgen.store.lora import find_lora
from cmdgen.store.parts import read_model

P = TypeVar("P", bound=Pipeline)


def load_as(
    kind: type[P],
    model: str | os.PathLike[str] = "mini",
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    lora: Sequence[str] = (),
    decoder: str | os.PathLike[str] | None = None,
) -> P:
    """Return the pipeline that a model calls for, if it is of a `kind`; reads its configuration, no weights.

    `model` is a packaged name, a folder, or OWNER/NAME that `cmdgen models pull` brought; "auto" is
    a GPU if there is one, and float16 on it. With `compile` the denoisers go through torch's
    compiler, which takes minutes for the first clip of a size. `lora` names files, or OWNER/NAME that
    was pulled, each with :SCALE or not, which change its weights. `decoder` is the folder of a small
    VAE that decodes in place of the model's, or a model whose VAE does. Raises ValueError, saying
    what is possible.
    """
    folder = find_model(os.fspath(model))
    config, decoding = read_model(folder), None
    if decoder is not None and (Path(decoder) / "config.json").exists():
        decoding = find_decoder(Path(decoder), config)
    elif decoder is not None:
        decoding = find_model(os.fspath(decoder))
        config = _change_vae(config, decoding)
    pipeline: type[Pipeline] = StillPipeline if config.motion is None else CmdPipeline
    reads = config.text is not None or config.vision is not None
    if isinstance(config.content, EvdmConfig):
        pipeline = EvdmPipeline
    elif not reads or config.vae is None or not isinstance(config.content, UNetConfig):
        raise ValueError(f"{folder} makes no video from text: it needs text_encoder, unet, vae")
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    if compile:
        check_compiler(place)
    if config.looks_along_time:
        pipeline = MotionPipeline if config.vision is None else PicturePipeline
    if not issubclass(pipeline, kind):
        makes = "videos from text: to continue one takes a model with evdm/"
        if pipeline is EvdmPipeline:
            makes = "no video from text: it continues clips, with cmdgen predict"
        raise ValueError(f"{folder} makes {makes}")
    if pipeline is EvdmPipeline and lora:
        raise ValueError(f"lora has no effect with {config.name}: a LoRA changes unet/ and text_encoder/")
    loras = [find_lora(f"{folder / 'lora' / Path(name).name}") for name in config.loras]
    loras = [*loras, *map(find_lora, lora)]
    return pipeline(*(folder, config, place, number), compile=compile, loras=loras, decoder=decoding)


def find_decoder(folder: Path, model: ModelConfig) -> Path:
    """Return the folder of a small VAE; ValueError where its latents are not the model's."""
    tiny = read_config(folder, TinyConfig)
    for name in ("latent_channels", "stride"):
        if (got := getattr(tiny, name)) != (expected := getattr(model.vae, name, None)):
            raise ValueError(f"{folder}: {name} is {got}, the VAE of {model.name} has {expected}")
    return folder


def _change_vae(config: ModelConfig, place: Path) -> ModelConfig:
    """Return a model with the VAE of another; ValueError where its latents are others."""
    if config.adapter is None or config.vae is None:
        raise ValueError(f"decoder has no effect with {config.name}: that of a model is for clips of AnimateDiff")
    vae = read_config(place / "vae", VaeConfig)
    for name in ("latent_channels", "scaling_factor", "stride"):
        got, expected = getattr(vae, name), getattr(config.vae, name)
        if got != expected:
            raise ValueError(f"decoder {place.name}: {name} {got} of its vae/ is not that of {config.name}, {expected}")
    return replace(config, vae=vae)


# of any kind; of a kind that makes clips or stills from text; of one that continues and fills in clips
open_pipeline = partial(load_as, Pipeline)  # type: ignore[type-abstract]
load_pipeline = partial(load_as, StillPipeline)
load_predictor = partial(load_as, EvdmPipeline)
