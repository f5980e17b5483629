"""Where a model lies: packaged, in a folder, or in the local cache of the hub."""

from pathlib import Path

from cmdgen.config import PRESETS, PUBLIC, packaged_models
from cmdgen.files import user_folder


def composed_models() -> Path:
    """Return the folder of the models that `cmdgen models pull NAME` put together."""
    return user_folder("data") / "models"


def find_model(name: str) -> Path:
    """Return the folder of a packaged model, of a path, of a name that was pulled, or of OWNER/NAME.

    A checkpoint in one file becomes a folder first. Raises ValueError for a preset without weights,
    FileNotFoundError for an unknown name.
    """
    packaged = packaged_models()
    if name in packaged:
        return packaged[name]
    if Path(name).is_dir():
        return Path(name)
    if (composed := composed_models() / name).is_dir():
        return composed
    if name in PUBLIC:
        raise ValueError(f"{name} is not here yet: cmdgen models pull {name}")
    if name in PRESETS:
        raise ValueError(f"{name} is a preset, its weights are random: cmdgen models init {name} -o DIR")
    # after the cheap answers: they import torch, and the hub's client
    if Path(name).is_file():
        from cmdgen.store.single import find_imported

        return find_imported(Path(name))
    from cmdgen.store.hub import cached_folder

    folder = cached_folder(name)
    if folder is None:
        raise FileNotFoundError(
            f"unknown model {name!r}: expected a folder, OWNER/NAME that was pulled, or one of cmdgen models list"
        )
    return folder
