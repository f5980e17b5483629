"""Where a model lies: packaged, in a folder, or in the local cache of the hub."""

from pathlib import Path

from cmdgen.config import PRESETS, packaged_models


def find_model(name: str) -> Path:
    """Return the folder of a packaged model, of a path, or of OWNER/NAME in the local cache.

    Raises ValueError for a preset without weights and for a file, FileNotFoundError for an unknown name.
    """
    packaged = packaged_models()
    if name in packaged:
        return packaged[name]
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise ValueError(
            f"{name} is one file, a model is a folder: diffusers makes it of a checkpoint, by "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if name in PRESETS:
        raise ValueError(f"{name} is a preset, its weights are random: cmdgen models init {name} -o DIR")
    # after the cheap answers: it imports the hub's client
    from cmdgen.store.hub import cached_folder

    folder = cached_folder(name)
    if folder is None:
        raise FileNotFoundError(
            f"unknown model {name!r}: expected a folder, OWNER/NAME that was pulled, or one of cmdgen models list"
        )
    return folder
