"""What each block of a model is worth: measured once, kept in a file, and what to drop by it.

Files are untrusted: every value is checked. Never imports torch.
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from cmdgen.compression.units import overlaps, shrink_model
from cmdgen.config import ModelConfig
from cmdgen.files import read_json, write_json
from cmdgen.options import Options, option

# decibels below which a clip shows something else
FAILED = 25.0
# parts whose networks run at every step of the sampler
SAMPLER = ("unet", "motion")


_count = partial(option, MISSING, low=0)
_measured = partial(option, MISSING)


@dataclass(frozen=True)
class Row(Options):
    """One block: what becomes of the clips without it."""

    unit: str = _measured("A name of `units`, which can be dropped, or of a layer that was its shortcut.")
    parameters: int = _count("Its parameters.")
    seconds: float = _count("Of the whole part, for one clip.")
    saved: float = _measured("Seconds of these.")
    psnr: float | None = _measured("To the whole model's clips: of the mean error of all; None: the same clips.")
    median: float | None = _measured("The same of the median clip.")
    failed: int = _count("Clips that are below FAILED decibels.")
    distance: float = _count("Mean square of the probe's features, in units of their variance.")
    subject: float = _count("Per cent that the probe names right.")
    motion: float = _count("The same.")
    scene: float = _count("The same.")

    @property
    def share(self) -> float:
        """Return how much of the part's time is saved."""
        return self.saved / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Importance(Options):
    """What was measured of one model; ValueError says what is not valid."""

    model: str = _measured("Its name.")
    weights: str = _measured("Their hash.")
    data: str = _measured("World of the captions.")
    clips: int = _count("Clips without each block.")
    steps: int = _count("Steps of both samplers.")
    seed: int = _count("Of the first clip.")
    rows: tuple[Row, ...] = ()

    def resume(self, path: Path) -> "Importance":
        """Return this with the rows of a file; ValueError where that is of another measurement."""
        if not path.exists():
            return self
        read = read_importance(path)
        if replace(read, rows=()) != self:
            raise ValueError(f"{path} is of other weights, captions, clips, steps or another seed: give another file")
        return read

    def write(self, path: Path) -> None:
        """Write a file that `read_importance` reads."""
        write_json(path, asdict(self))


def read_importance(path: Path) -> Importance:
    """Read a file that `Importance.write` wrote; ValueError names it and what is wrong."""
    data = read_json(path)
    try:
        rows = data.pop("rows", None)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("rows is not a list of objects")
        return Importance(**data, rows=tuple(Row(**row) for row in rows))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not of cmdgen compress importance: {error}") from error


def choose_units(importance: Importance, model: ModelConfig, budget: float) -> list[str]:
    """Return what to drop, least harm for the time saved first, until the sampler takes a share of its time.

    The ratio is SnapFusion's (Li et al. 2023, arXiv:2306.00980). Harms are of one block at a time: what
    they are together shows when the pruned model is measured. ValueError where that cannot be reached.
    """
    rows = [row for row in importance.rows if _parts([row]) <= {*SAMPLER}]
    parts = {part: median(row.seconds for row in rows if _parts([row]) == {part}) for part in _parts(rows)}
    whole = sum(parts.values())
    # shares, as a part may have been slower beside one block than beside another; blocks of one kind save the same
    kinds = {kind: median(row.share for row in rows if _kind(row) == kind) for kind in map(_kind, rows)}
    rows = [replace(row, saved=kinds[_kind(row)] * parts[_kind(row)[0]]) for row in rows]
    chosen: list[Row] = []
    for row in sorted((row for row in rows if row.saved > 0), key=lambda row: row.distance / row.saved):
        if not _fits(model, [row.unit]) or any(row.unit in overlaps(other.unit, model) for other in chosen):
            continue
        # what a larger unit contains goes with it
        tried = [other for other in chosen if other.unit not in overlaps(row.unit, model)] + [row]
        if not _fits(model, [other.unit for other in tried]):
            continue
        chosen = tried
        if whole - sum(other.saved for other in chosen) <= budget * whole:
            return [other.unit for other in chosen]
    raise ValueError(f"without all that can go, more than {budget:g} of the time of {', '.join(SAMPLER)} is left")


def _parts(rows: Sequence[Row]) -> set[str]:
    return {row.unit.partition(".")[0] for row in rows}


def _kind(row: Row) -> tuple[str, int]:
    return row.unit.partition(".")[0], row.parameters


def _fits(model: ModelConfig, units: Sequence[str]) -> bool:
    try:
        shrink_model(model, units)
    except ValueError:
        return False
    return True
