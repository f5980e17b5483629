"""Models from the Hugging Face hub: the files that are downloaded, and the cache they lie in.

huggingface_hub reads HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from cmdgen.config import CALIBRATION, MotionConfig
from cmdgen.files import create_folder
from cmdgen.headers import weight_names
from cmdgen.schema import read_config
from cmdgen.store.catalogue import check_folder, read_licence
from cmdgen.store.parts import NETWORKS, PARTS

# files beside the parts
_BESIDE = ("model_index.json", "README.md", "LICENSE.md", CALIBRATION)
_MOTION = PARTS["motion_adapter"].filename
# what repositories call a LoRA's file
LORAS = ("pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors")
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


# takes a line for the user
Report = Callable[[str], None]


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
    repo, _, revision = name.partition("@")
    try:
        if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+(?:@[\w./-]+)?", name, re.ASCII) or ".." in name:
            raise ValueError("other characters")
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"{name!r} is no repository: expected OWNER/NAME or OWNER/NAME@REVISION") from error
    return repo, revision or "main"


def choose_files(names: Iterable[str], repo: str, *, full: bool = False) -> list[str]:
    """Choose the files of a repository that a model is read from; ValueError if it is none of ours.

    Of weights that is one form: the fp16 variant, else whole, else shards; with `full` the variant
    comes after the whole. Pickled files are never chosen, nor parts that are not read, such as a
    safety checker.
    """
    names = sorted(names)
    pickled = [name for name in names if name.endswith(PICKLED)]
    unsafe = f"{repo}: pickled weights are refused, reading them could run any code"
    lora = [name for name in LORAS if name in names]
    if lora and not {"model_index.json", "config.json"} & {*names}:
        return [*lora[:1], *({"README.md"} & {*names})]
    if "model_index.json" not in names:
        if pickled and not any(name.endswith(".safetensors") for name in names):
            raise ValueError(f"{unsafe}; it has {pickled[0]} and no safetensors")
        if "config.json" in names or any(name.endswith(".safetensors") for name in names):
            raise ValueError(
                f"{repo} is no whole model: motion modules need --base OWNER/NAME, a Stable Diffusion 1.5 in "
                "diffusers' layout"
            )
        raise ValueError(f"{repo} has no model_index.json: expected a folder in diffusers' layout")
    chosen = [name for name in names if name in _BESIDE]
    for part in PARTS:
        inside = [name[len(part) + 1 :] for name in names if name.startswith(f"{part}/")]
        inside = [name for name in inside if re.fullmatch(r"[\w.-]+", name, re.ASCII)]
        texts = [name for name in inside if name.endswith((".json", ".txt"))]
        files = [name for name in texts if ".safetensors.index" not in name]
        if part in NETWORKS and "config.json" in inside:
            filename = PARTS[part].filename
            weights = _choose_weights(inside, filename, full=full)
            if not weights and any(name.endswith(PICKLED) for name in inside):
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


def choose_adapter(
    names: Iterable[str], repo: str, file: str | None, *, lora: str | None = None, full: bool = False
) -> list[str]:
    """Choose the files of a repository that motion modules are read from; ValueError if it has none."""
    names = sorted(names)
    weights = [file] if file is not None else _choose_weights(names, _MOTION, full=full)
    if not set(weights) <= set(names) or not weights:
        raise ValueError(f"{repo} has no {file or _MOTION}: name a file of it with --file")
    if not weights[0].endswith(".safetensors"):
        raise ValueError(f"{repo}: {weights[0]} is no safetensors file: pickled weights could run any code")
    if lora is not None and lora not in names:
        raise ValueError(f"{repo} has no {lora}")
    return [*(name for name in names if name in ("config.json", lora, *_BESIDE)), *weights]


def cached_folder(name: str, *markers: str) -> Path | None:
    """Return the folder of REPO or REPO@REVISION in the local cache, if it has one of `markers`."""
    try:
        repo, revision = parse_name(name)
    except ValueError:
        return None
    for marker in markers or ("model_index.json",):
        path = huggingface_hub.try_to_load_from_cache(repo, marker, cache_dir=constants.HF_HUB_CACHE, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def pull(name: str, *, full: bool = False, report: Report = lambda _: None) -> Path:
    """Bring REPO or REPO@REVISION into the local cache, unless it is there, and give its folder.

    Before the weights come, `report` gets a line with their size and licence. Where the hub does
    not answer, the folder is what the cache has, which may be a part of a model. ValueError where
    we read none of it; FileNotFoundError where there is no such model, ConnectionError where
    network or hub fail, another OSError where token or disk do.
    """
    choose = partial(choose_files, repo=name, full=full)
    return _pull(name, ("model_index.json", *LORAS), choose, _check_model, report)


def _check_model(folder: Path) -> None:
    # a LoRA has nothing to check
    if (folder / "model_index.json").is_file():
        check_folder(folder)


def pull_adapter(
    name: str, file: str | None, *, lora: str | None = None, full: bool = False, report: Report = lambda _: None
) -> Path:
    """Bring motion modules into the local cache: those of a repository, or of one file in it.

    `lora` is a file beside them.
    """

    def check(folder: Path) -> None:
        if file is None:
            read_config(folder, MotionConfig)

    choose = partial(choose_adapter, repo=name, file=file, lora=lora, full=full)
    return _pull(name, (file or "config.json",), choose, check, report)


def _pull(
    name: str,
    markers: tuple[str, ...],
    choose: Callable[[Iterable[str]], list[str]],
    check: Callable[[Path], object],
    report: Report,
) -> Path:
    repo, revision = parse_name(name)
    api = huggingface_hub.HfApi(library_name="cmdgen")
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
    except (errors.HTTPError, OSError) as error:
        reason = _explain(error, repo, revision)
        if not isinstance(reason, ConnectionError):
            raise reason from error
        folder = cached_folder(name, *markers)
        if folder is None:
            raise ConnectionError(f"{reason}; {name} is not in the local cache") from error
        return folder
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    files = choose(sizes)
    # configurations first: a model that we cannot build is refused before its gigabytes come
    small = [name for name in files if not name.endswith(".safetensors")]
    try:
        described = api.snapshot_download(repo, revision=revision, allow_patterns=small)
        check(Path(described))
        licence = read_licence(Path(described)) or "not stated"
        report(f"{name}: {sum(sizes[file] for file in files) / 1e6:,.0f} MB, licence: {licence}")
        folder = Path(api.snapshot_download(repo, revision=revision, allow_patterns=files))
    except (errors.HTTPError, OSError) as error:
        raise _explain(error, repo, revision) from error
    # it compares sizes alone
    from cmdgen.weights import verify_weights

    for file in set(files) - {*small}:
        try:
            verify_weights(folder / file)
        except ValueError as error:
            raise OSError(str(error)) from error
    return folder


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


def _choose_weights(names: list[str], filename: str, *, full: bool) -> list[str]:
    """Choose the files of one part's weights; none where we can read none of them."""
    wholes, indices = weight_names(filename)
    whole = [name for name in (wholes if full else reversed(wholes)) if name in names]
    if whole:
        return whole[:1]
    for index, weights in indices.items():
        pattern = rf"{re.escape(weights.removesuffix('.safetensors'))}-\d+-of-\d+\.safetensors"
        shards = [name for name in names if re.fullmatch(pattern, name)]
        if index in names and shards:
            return [index, *shards]
    return []
