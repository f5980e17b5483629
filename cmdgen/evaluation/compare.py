"""Two folders of videos: how alike their clips are as sets and, where names pair them, one by one."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from cmdgen.evaluation.metrics import frechet_distance, kernel_distance
from cmdgen.evaluation.prediction import clip_psnr, clip_ssim
from cmdgen.evaluation.probe import PACKAGED, Probe
from cmdgen.evaluation.profile import Show
from cmdgen.evaluation.report import table
from cmdgen.evaluation.settings import Evaluation
from cmdgen.video.pixels import to_unit
from cmdgen.video.read import read_clip

_SUFFIXES = (".mp4", ".m4v", ".webm", ".mov", ".mkv", ".avi", ".gif", ".apng", ".webp")
# clips that the probe reads at a time
_BATCH = 32


def compare_folders(options: Evaluation, show: Show) -> tuple[list[str], dict[str, object]]:
    """Return the lines of a report, and the same for JSON.

    Raises ValueError, naming the file or folder, where there is too little to compare.
    """
    assert options.real is not None and options.generated is not None
    real, generated = (_list(folder) for folder in (options.real, options.generated))
    # two sets of this size are real, one is generated
    count = min(len(real) // 2, len(generated))
    if count < 2:
        raise ValueError(f"{len(real)} real and {len(generated)} generated videos: at least 4 and 2 are needed")
    pairs = _pair(real, generated) if options.pairs else {}
    done, total = 0, len(real) + len(generated)

    def read(files: Iterable[Path]) -> list[Tensor]:
        nonlocal done
        clips = []
        for file in files:
            clip, source = read_clip(file, frames=options.frames, size=options.size, fps=None)
            if source.held:
                raise ValueError(f"{file} has {options.frames - source.held} frames, {options.frames} are compared")
            clips.append(torch.from_numpy(clip).permute(0, 3, 1, 2))  # (T, 3, H, W)
            show("read", done := done + 1, total)
        return clips

    clips = dict(zip(real, read(real), strict=True)), dict(zip(generated, read(generated), strict=True))
    probe = Probe.from_pretrained(options.probe or PACKAGED)
    features = [torch.cat([probe.read(torch.stack(part))[0] for part in _split(list(each.values()))]) for each in clips]
    first, second, made = features[0][:count], features[0][count : 2 * count], features[1][:count]
    record: dict[str, object] = {"n": count, "real": len(real), "generated": len(generated)}
    rows = [("figure", "generated", "real against real")]
    for name, distance in (("Frechet distance", frechet_distance), ("kernel distance", kernel_distance)):
        values = distance(first, made), distance(first, second)
        record[name.lower().replace(" ", "_")] = {"generated": values[0], "real": values[1]}
        rows.append((f"{name} (probe)", f"{values[0]:.4g}", f"{values[1]:.4g}"))
    lines = [f"{count} clips of each set, {options.frames} frames", "", *table(rows)]
    if pairs:
        best = defaultdict[str, list[float]](list)
        for target, trajectories in pairs.items():
            shown = to_unit(clips[0][target]).transpose(0, 1)[None]
            made_clips = [to_unit(clips[1][file]).transpose(0, 1)[None] for file in trajectories]
            for metric, measure in (("psnr", clip_psnr), ("ssim", clip_ssim)):
                best[metric].append(max(float(measure(clip, shown)) for clip in made_clips))
        means = {metric: sum(values) / len(values) for metric, values in best.items()}
        trajectories_of_each = max(map(len, pairs.values()))
        record["pairs"] = {"clips": len(pairs), "trajectories": trajectories_of_each, **means}
        lines += [
            "",
            f"{len(pairs)} pairs, the best of up to {trajectories_of_each}: "
            f"PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f}",
        ]
    return lines, record


def _list(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)


def _pair(real: list[Path], generated: list[Path]) -> dict[Path, list[Path]]:
    """Return the generated files of each real NAME: NAME, or NAME-0, NAME-1 and so on."""
    names: dict[str, Path] = {}
    for file in real:
        if (other := names.setdefault(file.stem, file)) is not file:
            raise ValueError(f"{other} and {file} have one name: let names differ, for --pairs")
    pairs = defaultdict[Path, list[Path]](list)
    for file in generated:
        stem, _, number = file.stem.rpartition("-")
        target = names.get(file.stem) or (names.get(stem) if number.isdecimal() else None)
        if target is None:
            raise ValueError(f"{file} is named as no real video, nor as one with -0, -1 and so on after it")
        pairs[target].append(file)
    return pairs


def _split(clips: list[Tensor]) -> list[list[Tensor]]:
    return [clips[start : start + _BATCH] for start in range(0, len(clips), _BATCH)]
