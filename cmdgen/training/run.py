"""Run one stage: check it, build it, record what the stages share, and train."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cmdgen.acceleration.graphs import fastest_libraries
from cmdgen.config import ModelConfig, NoiseConfig
from cmdgen.files import blame, hold_folder, read_json, write_json
from cmdgen.options import options_of
from cmdgen.schema import config_path, read_config
from cmdgen.store.parts import network_configs, shared_fields, write_model_index
from cmdgen.training.autoencoder import AutoencoderStage
from cmdgen.training.config import DATA, EVDM, EVDM_PRESET, PRESET, Shared, build_model, presets_of
from cmdgen.training.context import Run
from cmdgen.training.denoising import ContentStage, MotionStage
from cmdgen.training.distributed import shard
from cmdgen.training.evdm import EvdmStage
from cmdgen.training.loop import Stage, train
from cmdgen.training.recompute import recompute_blocks
from cmdgen.training.vae import DecoderStage, TinyStage, VaeStage

BUILD: dict[str, Callable[[Run], Stage]] = {
    "vae": VaeStage,
    "autoencoder": AutoencoderStage,
    "content": ContentStage,
    "motion": MotionStage,
    "decoder": DecoderStage,
    "evdm": EvdmStage,
}


def settle(folder: Path, shared: Shared, stage: str) -> Shared:
    """Return what the stages of a run share: values of this command, of the run, or defaults.

    Raises ValueError where a value differs from the run's, or where this stage trains no part of
    the preset.
    """
    path = folder / "training" / "run.json"
    previous: dict[str, Any] = {}
    if path.exists():
        read = read_json(path)
        with blame(path):
            previous = Shared(**{name: read[name] for name in options_of(Shared) if name in read}).to_json()
    values = shared.to_json()
    for name, value in values.items():
        if previous.get(name, value) != value:
            raise ValueError(f"{folder} was started with {name} {previous[name]}, not {value}: use another folder")
    preset = EVDM_PRESET if stage == EVDM else PRESET
    settled = Shared(**({"preset": preset, "data": DATA} | previous | values))
    if settled.preset not in (possible := presets_of(stage)):
        raise ValueError(f"preset {settled.preset} has no stage {stage}, which is of {', '.join(possible)}")
    for name in ("size", "frames", "fps"):
        late = bool(previous) and name in values.keys() - previous.keys()
        if late and build_model(settled) != build_model(replace(settled, **{name: None})):
            raise ValueError(f"{folder} was started with the preset's {name}, not {values[name]}: use another folder")
    return settled


def run_stage(run: Run) -> int:
    """Train one stage from wherever it stands; return the number of steps done.

    Raises ValueError where a former stage is missing, or a part of `init` does not fit, OSError where
    another process trains in the folder.
    """
    config, ranks = run.config, run.ranks
    if config.batch % (parts := config.accumulate * ranks.world):
        raise ValueError(f"batch {config.batch} is not a multiple of {ranks.world} processes and accumulate, {parts}")
    with hold_folder(run.folder) if ranks.leads else nullcontext():
        with ranks.in_turn():
            # what the first has made is on the disk
            stage, run = _build(run if ranks.leads else replace(run, start=replace(run.start, restart=False)))
        if ranks.world > 1:
            reduce = torch.bfloat16 if config.reduce == "bf16" else torch.float32
            for module in stage.modules.values():
                shard(module, ranks, reduce)
        with fastest_libraries(run.device):
            return train(stage, run)


def _build(run: Run) -> tuple[Stage, Run]:
    """Return a stage and its run, of the `init` it starts from; all that it writes is on the disk."""
    init = run.start.init
    if init is not None:
        if init.resolve() == run.folder.resolve():
            raise ValueError(f"{run.folder} cannot start from itself: leave --init out")
        _check_init(init, run.model)
    if run.start.restart:
        shutil.rmtree(run.state, ignore_errors=True)
    # of a model with motion modules, the UNet's own
    scheduler = run.initial("still_scheduler") or run.initial("scheduler") or run.folder / "scheduler"
    # a kill may have left the folder empty
    if config_path(scheduler, NoiseConfig).exists():
        noise = read_config(scheduler, NoiseConfig)
        run = replace(run, model=replace(run.model, noise=noise))
    # fresh weights follow from the seed
    torch.manual_seed(run.config.seed)
    with fastest_libraries(run.device):
        stage = (TinyStage if run.stage == "decoder" and run.start.teacher is not None else BUILD[run.stage])(run)
    if run.ranks.leads:
        write_json(run.folder / "training" / "run.json", run.shared.to_json())
        if run.start.teacher is None:
            write_model_index(run.folder, run.model)
    if run.config.gradient_checkpointing:
        for module in stage.modules.values():
            recompute_blocks(module)
    return stage, run


def _check_init(init: Path, model: ModelConfig) -> None:
    if (init / "unet").is_dir() and not (init / "scheduler").is_dir():
        raise ValueError(
            f"{init} has unet/ but no scheduler/: whether its UNet predicts noise or velocity is"
            " written there and nowhere else"
        )
    configs = network_configs(model)
    if not any((init / part).is_dir() for part in configs):
        raise ValueError(f"{init} has no part to start {model.name} from: none of {', '.join(configs)}")
    for part, config in configs.items():
        if not (init / part).is_dir():
            continue
        initial = read_config(init / part, type(config))
        for name in sorted(shared_fields(part)):
            got, expected = getattr(initial, name), getattr(config, name)
            if got != expected:
                raise ValueError(f"{init / part}: {name} is {got}, preset {model.name} has {expected}")
