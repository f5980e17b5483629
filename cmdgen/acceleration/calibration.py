"""Calibrations of step rehash: what skipped steps change, and the steps that run in full.

A calibration is measured once for a model, a sampler and its number of steps. A file holds any
number of them. Files are untrusted: every value is checked.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import chain, count
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen.acceleration import keysteps
from cmdgen.acceleration.rehash import Network
from cmdgen.config import CALIBRATION, CUTS, FEW_STEPS, SAMPLERS, ModelConfig
from cmdgen.files import blame, read_json, replace_with
from cmdgen.options import Options, option
from cmdgen.request import KeySteps, Request, Steps

PARTS = ("content", "motion")
# a map has the square of it
MAX_STEPS = 250
MAX_ERROR = 1e6
# where a number of steps is given
DEFAULT_POLICY = "minimax"
_SIMILARITY_DIGITS, _ERROR_DIGITS = 4, 3

# a network's whole forward: samples (B, C, ...), timesteps (B,), conditions -> its output
Predict = Callable[..., Tensor]
Rows = list[list[float]]


@dataclass(frozen=True)
class Calibration(Options):
    """One network under one sampler in so many steps; ValueError says what is not valid."""

    part: str = option(MISSING, "The network.", choices=PARTS)
    sampler: str = option(MISSING, "The sampler.", choices=SAMPLERS)
    steps: int = option(MISSING, "K, the steps of the sampler.", low=2, high=MAX_STEPS)
    prompts: int = option(MISSING, "Prompts that were measured.", low=1, high=2**20)
    protected: int = option(MISSING, "P, the first steps, which run.", low=1, high=MAX_STEPS)
    # row i has, for each later step j, the mean cosine of the features of steps i and j
    similarity: Rows = field(default_factory=list)
    # row i is of step P - 1 + i. For each j at least 2 later it has the squared error of the final
    # sample, relative to its squared mean, where the step's feature is reused up to j and all other
    # steps run; j = K reuses it to the end. Empty where similarity alone was measured
    errors: Rows = field(default_factory=list)
    cut: str = option("layer", "What the UNet's last layer has done of a feature.", choices=CUTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protected > self.steps:
            raise ValueError(f"protected {self.protected} is not between 1 and {self.steps}")
        _check_triangle("similarity", self.similarity, self.steps - 1, (-1, 1))
        if self.errors:
            _check_triangle("errors", self.errors, self.steps - self.protected, (0, MAX_ERROR))

    @property
    def key(self) -> tuple[str, str, int, str]:
        """Return what no two of one file share."""
        return self.part, self.sampler, self.steps, self.cut

    def similarity_map(self) -> Rows:
        """Return (K, K), symmetric."""
        above = [[0.0] * (i + 1) + row for i, row in enumerate([*self.similarity, []])]
        steps = range(self.steps)
        return [[1.0 if i == j else above[min(i, j)][max(i, j)] for j in steps] for i in steps]

    def error_map(self) -> Rows:
        """Return (K, K + 1), with zeros where no step is skipped and where nothing is known."""
        rows: Rows = [*[[]] * (self.protected - 1), *self.errors, []]
        return [[0.0] * (self.steps + 1 - len(row)) + row for row in rows]


def _check_triangle(name: str, rows: Any, size: int, bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{name} is not a list of lists")
    if [len(row) for row in rows] != list(range(size, 0, -1)):
        raise ValueError(f"{name} has not {size} rows, of {size} numbers down to 1")
    for value in chain(*rows):
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"{name} {short(value)} is not a number between {low} and {high:g}")


class Measurement:
    """Sums over prompts, from which a `Calibration` is made."""

    def __init__(self, steps: int, protected: int, *, replays: bool = True) -> None:
        self.steps, self.protected, self.replays = steps, protected, replays
        self.similarity = torch.zeros(steps, steps, dtype=torch.float64)
        self.errors = torch.zeros(steps, steps + 1, dtype=torch.float64)
        self.rows, self.power = 0, 0.0

    def add(
        self, network: Network, sample: Callable[[Predict], Tensor], on_run: Callable[[], object] = lambda: None
    ) -> Tensor:
        """`sample` runs the sampler on a predictor, from the same noise each time -> (B, C, ...).

        It runs once in full, whose result is returned, and, if it `replays`, once for each pair of steps
        with others between them, with the whole network from the second of the two on.
        """
        runs: list[tuple[Tensor, Tensor]] = []

        def record(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
            runs.append(network.run(x, t, *conditions))
            return runs[-1][0]

        final = sample(record)
        assert len(runs) == self.steps, f"{len(runs)} calls in {self.steps} steps"
        # (K, rows, D): a row is one branch of one prompt
        flat = torch.stack([feature.flatten(1) for _, feature in runs])
        unit = F.normalize(flat.float(), dim=-1)
        self.similarity += torch.einsum("knd,lnd->kl", unit, unit).double().cpu()
        self.rows += unit.shape[1]
        del flat, unit
        self.power += float(final.double().square().sum())
        on_run()
        for i in range(self.protected - 1, self.steps - 1) if self.replays else ():
            for j in range(i + 2, self.steps + 1):
                changed = sample(_replay(network, runs, i, j))
                self.errors[i, j] += float((changed - final).double().square().sum())
                on_run()
        return final

    @property
    def runs(self) -> int:
        """Return how often `add` runs the sampler."""
        left = self.steps - self.protected
        return 1 + self.replays * left * (left + 1) // 2

    def finish(self, part: str, sampler: str, prompts: int, cut: str = "layer") -> Calibration:
        """Return the means, rounded as a file holds them; ValueError where they are not valid."""
        if not self.errors.max() <= MAX_ERROR * self.power or not self.power:
            raise ValueError(f"skipped steps of {part} change the sample beyond all measure")
        similarity = (self.similarity / self.rows).clamp(-1, 1)
        errors = (self.errors / self.power)[self.protected - 1 :]
        return Calibration(
            *(part, sampler, self.steps, prompts, self.protected),
            similarity=_round_above(similarity, 1, _SIMILARITY_DIGITS),
            errors=_round_above(errors, self.protected + 1, _ERROR_DIGITS) if self.replays else [],
            cut=cut,
        )


def _round_above(values: Tensor, start: int, digits: int) -> Rows:
    """Return each row of a map from one column on, the first from `start`, to so many digits."""
    rows = [row[i:] for i, row in enumerate(values[:-1].tolist(), start)]
    return [[float(f"{value:.{digits}g}") for value in row] for row in rows]


def _replay(network: Network, runs: list[tuple[Tensor, Tensor]], i: int, j: int) -> Predict:
    """Repeat a run up to step i, which is no work; reuse its feature until j; then run in full."""
    steps = count()

    def predict(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        step = next(steps)
        if step <= i:
            return runs[step][0]
        if step < j:
            return network.resume(runs[i][1], x, t, *conditions)
        return network.run(x, t, *conditions)[0]

    return predict


def write_calibrations(path: Path, model: str, calibrations: Sequence[Calibration]) -> None:
    """Write a file; one of this model that exists keeps its other calibrations."""
    kept = {each.key: each for each in read_calibrations(path, model)} if path.exists() else {}
    kept |= {each.key: each for each in calibrations}
    # a line each: a file that is replaced in part differs in part
    lines = ",\n".join(
        json.dumps(asdict(kept[key]), separators=(",", ":"))
        for key in sorted(kept, key=lambda key: tuple(map(str, key)))
    )
    with replace_with(path) as temporary:
        temporary.write_text(f'{{"model":{json.dumps(model)},"calibrations":[\n{lines}\n]}}\n')


def read_calibrations(path: Path, model: str) -> list[Calibration]:
    """Return the calibrations of a model; ValueError names the file and what is wrong in it."""
    data = read_json(path)
    if data.get("model") != model:
        raise ValueError(f"{path}: model {short(data.get('model'))} is not {model}")
    entries = data.get("calibrations")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: calibrations {short(entries)} is not a list of objects")
    names = [item.name for item in fields(Calibration)]
    with blame(path):
        return [
            Calibration(**{name: entry.get(name) for name in names} | {"cut": entry.get("cut") or CUTS[0]})
            for entry in entries
        ]


def choose_key_steps(request: Request, model: ModelConfig, folder: Path) -> KeySteps | None:
    """Return the steps that run in full, of a model with the clip's steps and sampler in place.

    None without step rehash. Raises ValueError where the request cannot be met, or where it needs a
    calibration that neither it nor the model's folder has; FileNotFoundError where its file is missing.
    """
    if not request.rehashes:
        return None
    if model.looks_along_time and model.steps <= FEW_STEPS:
        raise ValueError(f"rehash of {model.steps} steps: in {FEW_STEPS} or fewer no step is like the one before it")
    moves = model.frames > 1 and model.motion is not None
    totals = {"content": model.steps} | ({"motion": model.motion_steps} if moves else {})
    if isinstance(request.rehash, tuple):
        return _check_listed(request.rehash, totals)
    budgets: dict[str, int | None] = {"content": None, "motion": None}
    if request.rehash is not None:
        if not 1 <= request.rehash <= model.steps:
            raise ValueError(f"rehash {request.rehash} is not between 1 and the {model.steps} steps")
        # halves are rounded up; the first step and the last one run
        share = (2 * request.rehash * model.motion_steps + model.steps) // (2 * model.steps)
        budgets |= {"content": request.rehash, "motion": min(max(share, 2), model.motion_steps)}
    policy = request.rehash_policy or ("similarity" if request.rehash is None else DEFAULT_POLICY)
    path = request.rehash_file or folder / CALIBRATION
    calibrations: dict[object, Calibration] = {}
    if request.rehash_file is not None and not path.exists():
        raise FileNotFoundError(f"{path}: No such file or directory")
    if policy != "uniform" and (request.rehash_file is not None or path.is_file()):
        calibrations = {each.key: each for each in read_calibrations(path, model.name)}

    def choose(part: str, steps: int) -> tuple[int, ...]:
        budget = budgets[part]
        protected = keysteps.count_protected(part, steps, request.rehash_protect)
        if steps == 1 or budget == steps:
            return tuple(range(steps))
        if policy == "uniform" and budget is not None:
            return keysteps.uniform(steps, budget, protected=protected)
        cut = request.rehash_cut if part == "content" else CUTS[0]
        calibration = calibrations.get((part, model.sampler, steps, cut))
        if calibration is None:
            raise ValueError(
                f"no calibration of {model.name}'s {part} for {steps} steps of {model.sampler}: "
                "make one by cmdgen rehash calibrate, or ask for policy uniform"
            )
        if budget is None:
            assert request.rehash_threshold is not None
            threshold = request.rehash_threshold
            return keysteps.by_threshold(calibration.similarity_map(), threshold, protected=protected)
        if policy == "similarity":
            return keysteps.by_similarity(calibration.similarity_map(), budget, protected=protected)
        if not calibration.errors:
            raise ValueError(f"{path} has measured similarity alone: ask for --rehash-policy similarity")
        if protected < calibration.protected:
            raise ValueError(
                f"{path} was measured with the first {calibration.protected} of {steps} steps protected: "
                "protect as many, or measure again by cmdgen rehash calibrate --protect"
            )
        return keysteps.minimax(calibration.error_map(), budget, protected=protected)

    chosen = {part: choose(part, steps) for part, steps in totals.items()}
    return KeySteps(policy, chosen["content"], chosen.get("motion", ()), request.rehash_threshold)


def _check_listed(listed: Steps, totals: dict[str, int]) -> KeySteps:
    """Return steps that were listed; ValueError where the model takes fewer, or other, steps."""
    chosen = {part: steps for part, steps in zip(PARTS, listed, strict=True) if part in totals}
    for part, steps in chosen.items():
        if not steps:
            raise ValueError(f"rehash lists no steps of {part}: as in 0,1,4+0,2, after the +")
        if steps[-1] >= totals[part]:
            total = totals[part]
            raise ValueError(f"rehash lists step {steps[-1]} of {part}, which has {total} from 0")
    return KeySteps("listed", chosen["content"], chosen.get("motion", ()))
