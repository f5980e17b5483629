"""Models from the Hugging Face hub: the files that are downloaded, and the cache they lie in.

huggingface_hub reads HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from cmdgen.config import CALIBRATION
from cmdgen.files import create_folder
from cmdgen.headers import weight_names
from cmdgen.store.catalogue import check_folder
from cmdgen.store.parts import NETWORKS, PARTS

# files beside the parts
_BESIDE = ("model_index.json", "README.md", "LICENSE.md", CALIBRATION)
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Snapshot:
    """One revision of a repository in the local cache."""

    repo: str
    commit: str
    # branches and tags that named this commit when it was pulled
    refs: frozenset[str]
    folder: Path


def parse_name(name: str) -> tuple[str, str]:
    """Split REPO or REPO@REVISION, whose revision is "main" by default; ValueError for others."""
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+(?:@[\w./-]+)?", name, re.ASCII) or ".." in name:
        raise ValueError(f"{name!r} is no repository: expected OWNER/NAME or OWNER/NAME@REVISION")
    repo, _, revision = name.partition("@")
    return repo, revision or "main"


def choose_files(names: Iterable[str], repo: str) -> list[str]:
    """Choose the files of a repository that a model is read from; ValueError if it is none of ours.

    Of weights that is one form: whole, else the fp16 variant, else shards. Pickled files are never
    chosen, nor parts that are not read, such as a safety checker.
    """
    names = sorted(names)
    pickled = [name for name in names if name.endswith(_PICKLED)]
    unsafe = f"{repo}: pickled weights are refused, reading them could run any code"
    if "model_index.json" not in names:
        if pickled and not any(name.endswith(".safetensors") for name in names):
            raise ValueError(f"{unsafe}; it has {pickled[0]} and no safetensors")
        raise ValueError(f"{repo} has no model_index.json: expected a folder in diffusers' layout")
    chosen = [name for name in names if name in _BESIDE]
    for part in PARTS:
        inside = [name[len(part) + 1 :] for name in names if name.startswith(f"{part}/")]
        inside = [name for name in inside if re.fullmatch(r"[\w.-]+", name, re.ASCII)]
        texts = [name for name in inside if name.endswith((".json", ".txt"))]
        files = [name for name in texts if ".safetensors.index" not in name]
        if part in NETWORKS and "config.json" in inside:
            filename = PARTS[part].filename
            weights = _choose_weights(inside, filename)
            if not weights and any(name.endswith(_PICKLED) for name in inside):
                raise ValueError(f"{unsafe}; {part} has no safetensors")
            if not weights:
                raise ValueError(f"{repo}: {part} has no {filename}")
            files += weights
        chosen += [f"{part}/{name}" for name in files]
    return chosen


def find_cached() -> list[Snapshot]:
    """List the revisions in the local cache of models in diffusers' layout, usable or not."""
    try:
        info = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    except (errors.CacheNotFound, RuntimeError):
        # RuntimeError: there is no home directory
        return []
    snapshots = [
        Snapshot(repo.repo_id, revision.commit_hash, revision.refs, revision.snapshot_path)
        for repo in info.repos
        if repo.repo_type == "model"
        for revision in repo.revisions
        if (revision.snapshot_path / "model_index.json").is_file()
    ]
    return sorted(snapshots, key=lambda snapshot: (snapshot.repo, snapshot.commit))


def cached_folder(name: str) -> Path | None:
    """Return the folder of REPO or REPO@REVISION in the local cache, if it is there."""
    try:
        repo, revision = parse_name(name)
    except ValueError:
        return None
    index = huggingface_hub.try_to_load_from_cache(
        repo, "model_index.json", cache_dir=constants.HF_HUB_CACHE, revision=revision
    )
    return Path(index).parent if isinstance(index, str) else None


def pull(name: str) -> Path:
    """Bring REPO or REPO@REVISION into the local cache, unless it is there, and give its folder.

    Where the hub does not answer, that is what the cache has, which may be a part of a model.
    ValueError where we read none of it; FileNotFoundError where there is no such model,
    ConnectionError where network or hub fail, another OSError where token or disk do.
    """
    repo, revision = parse_name(name)
    api = huggingface_hub.HfApi(library_name="cmdgen")
    try:
        info = api.model_info(repo, revision=revision)
    except (errors.HTTPError, OSError) as error:
        reason = _explain(error, repo, revision)
        if not isinstance(reason, ConnectionError):
            raise reason from error
        folder = cached_folder(name)
        if folder is None:
            raise ConnectionError(f"{reason}; {name} is not in the local cache") from error
        return folder
    files = choose_files((file.rfilename for file in info.siblings or []), name)
    # configurations first: a model that we cannot build is refused before its gigabytes come
    small = [name for name in files if not name.endswith(".safetensors")]
    try:
        described = api.snapshot_download(repo, revision=revision, allow_patterns=small)
        check_folder(Path(described))
        return Path(api.snapshot_download(repo, revision=revision, allow_patterns=files))
    except (errors.HTTPError, OSError) as error:
        raise _explain(error, repo, revision) from error


def copy_snapshot(snapshot: Path, folder: Path) -> None:
    """Copy a model out of the cache, whole or not at all; ValueError where `folder` is taken."""
    with create_folder(folder) as target:
        # the cache holds links; the copy holds files
        shutil.copytree(snapshot, target, dirs_exist_ok=True, ignore_dangling_symlinks=False)


def _explain(error: Exception, repo: str, revision: str) -> OSError:
    """Return an error that says what went wrong between us and the hub, and what to do."""
    hub = constants.ENDPOINT
    gated = f"accept its terms at {hub}/{repo}, then set HF_TOKEN to a token of that account"
    private = f"{repo} is not at {hub}, or is private and HF_TOKEN does not open it"
    reasons: dict[type[Exception], OSError] = {
        errors.GatedRepoError: PermissionError(f"{repo} is gated: {gated}"),
        errors.RevisionNotFoundError: FileNotFoundError(f"{repo} has no revision {revision!r}"),
        errors.RepositoryNotFoundError: FileNotFoundError(private),
        errors.OfflineModeIsEnabled: ConnectionError("HF_HUB_OFFLINE is set"),
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return PermissionError(f"HF_TOKEN is not accepted for {repo} (status {status})")
        return ConnectionError(f"{hub} answers with status {status}")
    if isinstance(error, OSError) and error.errno is not None:
        # a full disk, or a cache that is not writable
        return error
    return ConnectionError(f"{hub} cannot be reached ({type(error).__name__})")


def _choose_weights(names: list[str], filename: str) -> list[str]:
    """Choose the files of one part's weights; none where we can read none of them."""
    wholes, indices = weight_names(filename)
    whole = [name for name in wholes if name in names]
    if whole:
        return whole[:1]
    for index in indices:
        stem = wholes[index != indices[0]].removesuffix(".safetensors")
        pattern = rf"{re.escape(stem)}-\d+-of-\d+\.safetensors"
        shards = [name for name in names if re.fullmatch(pattern, name)]
        if index in names and shards:
            return [index, *shards]
    return []
