"""Models that are put together from repositories of the hub: where their parts lie, how they are sampled.

A composed model is a folder of links into the hub's cache: the parts of a base model, motion modules
beside them, and our model_index.json and scheduler/. It is a model folder like any other.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cmdgen.config import PUBLIC, ModelConfig, MotionConfig, UNetConfig
from cmdgen.files import create_folder
from cmdgen.headers import open_weights, weight_paths
from cmdgen.schema import read_config, write_config
from cmdgen.store import hub
from cmdgen.store.catalogue import read_licence
from cmdgen.store.find import composed_models
from cmdgen.store.lora import Lora, parse_lora
from cmdgen.store.parts import PARTS, list_notes, read_model, write_model_index

# Stable Diffusion 1.5, as AnimateDiff's authors use it
_BASE = "emilianJR/epiCRealism"
_MOTION = PARTS["motion_adapter"].filename
# of each level, in diffusers' names and in their authors'
_PROJECTION = re.compile(r"down_blocks\.(\d{1,2})\.motion_modules\.\d{1,2}\.(?:temporal_transformer\.)?proj_in\.weight")


@dataclass(frozen=True)
class Recipe:
    """What a model is composed of; `model` says how it is sampled."""

    model: ModelConfig
    # repositories: of the model, or of the base model and of its motion modules
    base: str
    adapter: str | None = None
    # one file of the adapter's repository, which then needs no configuration
    file: str | None = None
    # FILE:SCALE, also of the adapter's repository
    lora: str | None = None


_STABILITY = "stabilityai/stable-video-diffusion-img2vid"
RECIPES = {
    "animatediff": Recipe(PUBLIC["animatediff"], _BASE, "guoyww/animatediff-motion-adapter-v1-5-3"),
    # the one that has motion LoRAs
    "animatediff-v2": Recipe(PUBLIC["animatediff"], _BASE, "guoyww/animatediff-motion-adapter-v1-5-2"),
    "animatediff-lightning": Recipe(
        *(PUBLIC["animatediff-lightning"], _BASE, "ByteDance/AnimateDiff-Lightning"),
        file="animatediff_lightning_4step_diffusers.safetensors",
    ),
    "animatelcm": Recipe(
        *(PUBLIC["animatelcm"], _BASE, "wangfuyun/AnimateLCM"), lora="AnimateLCM_sd15_t2v_lora.safetensors:0.8"
    ),
    "svd": Recipe(PUBLIC["svd"], _STABILITY),
    "svd-xt": Recipe(PUBLIC["svd-xt"], f"{_STABILITY}-xt"),
    "svd-xt-1.1": Recipe(PUBLIC["svd-xt"], f"{_STABILITY}-xt-1-1"),
}


def pull_recipe(
    name: str, recipe: Recipe, *, loras: Sequence[str] = (), full: bool, report: Callable[[str], None]
) -> Path:
    """Bring the parts of a recipe into the hub's cache, and give the folder that composes them.

    It is in the user's data, where `find_model` finds it. `loras` are files or repositories, each
    with :SCALE or not. Raises as `hub.pull`, and ValueError where the parts do not fit.
    """
    base = hub.pull(recipe.base, full=full, report=report)
    licences = [f"{read_licence(base) or 'not stated'} ({recipe.base})"]
    modules, changes = None, []
    for text in loras:
        source, scale = parse_lora(text)
        file = Path(source)
        changes.append(Lora(file if file.is_file() else _find_file(hub.pull(source, report=report)), scale))
    if recipe.adapter is not None:
        beside, scale = parse_lora(recipe.lora) if recipe.lora else (None, 1.0)
        place = hub.pull_adapter(recipe.adapter, recipe.file, lora=beside, full=full, report=report)
        if beside is not None:
            changes.append(Lora(place / beside, scale))
        licences.append(f"{read_licence(place) or 'not stated'} ({recipe.adapter})")
        modules = place / recipe.file if recipe.file else weight_paths(place, _MOTION)[0]
    place = composed_models() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    # one that was pulled before gives way to a new one that is whole
    with create_folder(place, overwrite=True) as target:
        (target / "lora").mkdir()
        names = tuple(f"{i}.safetensors:{lora.scale:.15g}" for i, lora in enumerate(changes))
        for i, lora in enumerate(changes):
            link(lora.path, target / "lora" / f"{i}.safetensors")
        compose(replace(recipe.model, name=name, loras=names), base, modules, target)
        card = f"---\nlicense: {' and '.join(licences)}\n---\n\n# {name}\n\nLinks into the cache of the hub.\n"
        (target / "README.md").write_text(card, encoding="utf-8")
    for note in list_notes(read_model(place)):
        report(f"note: {note}")
    return place


def _find_file(folder: Path) -> Path:
    files = [folder / name for name in hub.LORAS if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder} holds no LoRA")
    return files[0]


def compose(model: ModelConfig, base: Path, modules: Path | None, target: Path) -> None:
    """Fill a folder with links to a base model, and to a file of motion modules.

    Raises ValueError where either is not what it should be.
    """
    content = read_config(base / "unet", UNetConfig)
    if modules is not None:
        adapter = describe_modules(modules)
        if content.use_linear_projection:
            raise ValueError(f"{base} is Stable Diffusion 2: motion modules need a Stable Diffusion 1.5")
        if adapter.block_out_channels != content.block_out_channels:
            raise ValueError(
                f"{modules} is for a UNet of {adapter.block_out_channels}, {base} has {content.block_out_channels}: "
                "take motion modules of Stable Diffusion 1.5"
            )
        side = 8 * content.sample_size
        model = replace(model, adapter=adapter, height=side, width=side)
        write_config(adapter, target / "motion_adapter")
        link(modules, target / "motion_adapter" / _MOTION)
        link(base / "scheduler", target / "still_scheduler")
    # ours: motion modules are sampled on another schedule
    write_model_index(target, replace(model, still_noise=None))
    for name in PARTS:
        if (base / name).is_dir() and not (target / name).exists():
            link(base / name, target / name)


def link(source: Path, target: Path) -> None:
    """Make `target` a link, or, where there are none, a copy."""
    try:
        # a snapshot's file is a link itself: through it, as the blob has no suffix
        target.symlink_to(source.absolute(), target_is_directory=source.is_dir())
    except OSError:
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


def describe_modules(path: Path) -> MotionConfig:
    """Read from the header of a file of motion modules what they are; ValueError if it has none."""
    with open_weights(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    lengths = {shape[1] for name, shape in shapes.items() if name.endswith(".pe") and len(shape) == 3}
    widths = {
        int(match[1]): shape[0]
        for name, shape in shapes.items()
        if (match := _PROJECTION.fullmatch(name)) and len(shape) == 2
    }
    if len(lengths) != 1 or not widths:
        raise ValueError(f"{path} holds no motion modules of AnimateDiff")
    if "conv_in.weight" in shapes:
        raise ValueError(f"{path} has a first convolution of its own, as PIA: take AnimateDiff's motion modules")
    return MotionConfig(
        block_out_channels=tuple(width for _, width in sorted(widths.items())),
        motion_max_seq_length=lengths.pop(),
        use_motion_mid_block=any(name.startswith("mid_block.") for name in shapes),
    )
