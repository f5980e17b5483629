"""Models from the Hugging Face hub: which files of theirs are read, and the cache they lie in.

huggingface_hub itself reads HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cmdgen.catalogue import PARTS, read_configurations
from cmdgen.config import CALIBRATION
from cmdgen.files import create_folder

# of the whole model
_WHOLE = ("model_index.json", "README.md", "LICENSE.md", CALIBRATION)
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Snapshot:
    """One revision of a repository in the local cache."""

    repo: str
    commit: str
    # branches and tags that meant this commit when it was pulled
    refs: frozenset[str]
    folder: Path


def parse_name(name: str) -> tuple[str, str | None]:
    """REPO or REPO@REVISION -> both; ValueError where it is neither."""
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+(?:@[\w./-]+)?", name, re.ASCII) or ".." in name:
        raise ValueError(f"{name!r} is no repository: expected OWNER/NAME or OWNER/NAME@REVISION")
    repo, _, revision = name.partition("@")
    return repo, revision or None


def choose_files(names: Iterable[str], repo: str) -> list[str]:
    """The files of a repository that a model is read from; ValueError where it is none of ours.

    Of weights one form each: whole, else the fp16 variant, else shards. Never pickled ones, nor
    parts that are not read, such as a safety checker.
    """
    names = sorted(names)
    pickled = [name for name in names if name.endswith(_PICKLED)]
    unsafe = f"{repo}: pickled weights are refused, reading them could run any code"
    if "model_index.json" not in names:
        if pickled and not any(name.endswith(".safetensors") for name in names):
            raise ValueError(f"{unsafe}; it has {pickled[0]} and no safetensors")
        raise ValueError(f"{repo} has no model_index.json: expected a folder in diffusers' layout")
    chosen = [name for name in names if name in _WHOLE]
    for folder in ("scheduler", "tokenizer", *PARTS):
        inside = [
            name.removeprefix(f"{folder}/")
            for name in names
            if re.fullmatch(rf"{folder}/[\w.-]+", name, re.ASCII)
        ]
        keep = [
            name
            for name in inside
            if name.endswith((".json", ".txt")) and ".safetensors.index" not in name
        ]
        if folder in PARTS and "config.json" in inside:
            filename = PARTS[folder][2]
            weights = _choose_weights(inside, filename)
            if not weights and any(name.endswith(_PICKLED) for name in inside):
                raise ValueError(f"{unsafe}; {folder} has no safetensors")
            if not weights:
                raise ValueError(f"{repo}: {folder} has no {filename}")
            keep += weights
        chosen += [f"{folder}/{name}" for name in keep]
    return chosen


def find_cached() -> list[Snapshot]:
    """All revisions of models in diffusers' layout in the local cache, ones we cannot use too."""
    try:
        info = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    found = [
        Snapshot(repo.repo_id, revision.commit_hash, revision.refs, revision.snapshot_path)
        for repo in info.repos
        if repo.repo_type == "model"
        for revision in repo.revisions
        if (revision.snapshot_path / "model_index.json").is_file()
    ]
    return sorted(found, key=lambda snapshot: (snapshot.repo, snapshot.commit))


def cached_folder(repo: str, revision: str | None) -> Path | None:
    """The folder of a revision, "main" unless given, in the local cache."""
    wanted = revision or "main"
    for snapshot in find_cached():
        if snapshot.repo == repo and wanted in (snapshot.commit, *snapshot.refs):
            return snapshot.folder
    return None


def pull(repo: str, revision: str | None = None, *, api: Any = None) -> Path:
    """Bring a model into the local cache, unless it is there already, and give its folder.

    Where the hub cannot be asked, what the cache has is given, which may be a part of a model.
    ValueError where we read none of it; FileNotFoundError where there is no such model,
    ConnectionError where network or hub fail, another OSError where token or disk do.
    """
    api = api or huggingface_hub.HfApi(library_name="cmdgen")
    at = f"{repo}@{revision}" if revision else repo
    try:
        info = api.model_info(repo, revision=revision)
    except (HTTPError, OSError) as error:
        reason = _explain(error, repo, revision)
        if not isinstance(reason, ConnectionError):
            raise reason from error
        folder = cached_folder(repo, revision)
        if folder is None:
            raise ConnectionError(f"{reason}; {at} is not in the local cache") from error
        return folder
    files = choose_files((file.rfilename for file in info.siblings or []), at)
    # configurations first: a model that we cannot build is refused before its gigabytes come
    small = [name for name in files if not name.endswith(".safetensors")]
    try:
        folder = api.snapshot_download(repo, revision=revision, allow_patterns=small)
        read_configurations(Path(folder))
        return Path(api.snapshot_download(repo, revision=revision, allow_patterns=files))
    except (HTTPError, OSError) as error:
        raise _explain(error, repo, revision) from error


def copy_snapshot(snapshot: Path, folder: Path) -> None:
    """Copy a model out of the cache, whole or not at all; ValueError where `folder` is taken."""
    with create_folder(folder) as target:
        # the cache holds links to files: what is written is the files
        shutil.copytree(snapshot, target, dirs_exist_ok=True, ignore_dangling_symlinks=False)


def _explain(error: Exception, repo: str, revision: str | None) -> OSError:
    """What went wrong between us and the hub, and what to do."""
    hub = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{repo} is gated: accept its terms at {hub}/{repo}, then set HF_TOKEN to a token of "
            "that account"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo} has no revision {revision!r}")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{repo} is not at {hub}, or is private and HF_TOKEN does not open it"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError("HF_HUB_OFFLINE is set")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return PermissionError(f"HF_TOKEN is not accepted for {repo} (status {status})")
        return ConnectionError(f"{hub} answers with status {status}")
    if isinstance(error, OSError) and error.errno is not None:
        # a full disk or a cache that cannot be written
        return error
    return ConnectionError(f"{hub} cannot be reached ({type(error).__name__})")


def _choose_weights(names: list[str], filename: str) -> list[str]:
    """The files of one part's weights; none where there are none that we read."""
    stem = filename.removesuffix(".safetensors")
    half = f"{stem}.fp16"
    for name in (filename, f"{half}.safetensors"):
        if name in names:
            return [name]
    for prefix, indices in (
        (stem, [f"{filename}.index.json"]),
        # the index of a variant has been named either way
        (half, [f"{filename}.index.fp16.json", f"{half}.safetensors.index.json"]),
    ):
        index = [name for name in indices if name in names][:1]
        shards = [n for n in names if re.fullmatch(rf"{prefix}-\d+-of-\d+\.safetensors", n)]
        if index and shards:
            return index + shards
    return []
