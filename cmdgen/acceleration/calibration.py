"""What key-step search goes by: measured once for a model, a sampler and its number of steps.

A file holds any number of such measurements. It comes from strangers: every value is checked.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen.acceleration import keysteps
from cmdgen.acceleration.rehash import Network
from cmdgen.config import CALIBRATION, CUTS, SAMPLERS, ModelConfig, SampleConfig
from cmdgen.files import read_json, replace_with

PARTS = ("content", "motion")
# a map has the square of it
MOST_STEPS = 250
MOST_ERROR = 1e6
# where a number of steps is asked for
DEFAULT_POLICY = "minimax"
_SIMILARITY_DIGITS, _ERROR_DIGITS = 4, 3

# a network's whole forward: samples (B, C, ...), timesteps (B,), conditions -> its output
Predict = Callable[..., Tensor]
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Calibration:
    """One network under one sampler in so many steps."""

    part: str
    sampler: str
    steps: int
    # of the UNet, one of CUTS; the motion model has no choice
    cut: str | None
    prompts: int
    # of the first steps, which always run, no errors are known but the last one's
    protected: int
    # (K, K): mean cosine of the features of two steps
    similarity: Rows
    # (K, K + 1): i, j: squared error of the final sample, relative to its squared mean, where step
    # i's feature is reused up to j and all other steps run
    errors: Rows

    @property
    def key(self) -> tuple[object, ...]:
        """What no two of one file share."""
        return self.part, self.sampler, self.steps, self.cut


@dataclass(frozen=True)
class Plan:
    """The steps of one clip that run in full."""

    policy: str
    cut: str
    content: tuple[int, ...]
    # of stills: none
    motion: tuple[int, ...]
    threshold: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For metadata."""
        kept = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value for name, value in kept.items() if value != ()}


@dataclass
class Measurement:
    """Sums over prompts, from which a `Calibration` is made."""

    steps: int
    protected: int
    similarity: Tensor = field(init=False)
    errors: Tensor = field(init=False)
    rows: int = 0
    power: float = 0.0

    def __post_init__(self) -> None:
        self.similarity = torch.zeros(self.steps, self.steps, dtype=torch.float64)
        self.errors = torch.zeros(self.steps, self.steps + 1, dtype=torch.float64)

    def add(
        self,
        network: Network,
        sample: Callable[[Predict], Tensor],
        on_run: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """`sample` runs the sampler on a predictor, from the same noise each time -> (B, C, ...).

        It runs once in full, whose result is returned, and once for each pair of steps with others
        between them, with the whole network from the second of the two on.
        """
        outputs: list[Tensor] = []
        features: list[Tensor] = []

        def record(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
            output, feature = network.run(x, t, *conditions)
            outputs.append(output)
            features.append(feature)
            return output

        final = sample(record)
        assert len(outputs) == self.steps, f"{len(outputs)} calls in {self.steps} steps"
        # (K, rows, D): a row is one branch of one prompt
        flat = torch.stack([feature.flatten(1) for feature in features])
        unit = F.normalize(flat.float(), dim=-1)
        self.similarity += torch.einsum("knd,lnd->kl", unit, unit).double().cpu()
        self.rows += unit.shape[1]
        del flat, unit
        self.power += float(final.double().square().sum())
        on_run()
        for i in range(self.protected - 1, self.steps - 1):
            for j in range(i + 2, self.steps + 1):
                changed = sample(_replay(network, outputs, features, i, j))
                self.errors[i, j] += float((changed - final).double().square().sum())
                on_run()
        return final

    @property
    def runs(self) -> int:
        """How often `add` runs the sampler."""
        left = self.steps - self.protected
        return 1 + left * (left + 1) // 2

    def finish(self, part: str, sampler: str, cut: str | None, prompts: int) -> Calibration:
        """The means, rounded as a file holds them; ValueError where they are out of its bounds."""
        if not self.errors.max() <= MOST_ERROR * self.power or not self.power:
            raise ValueError(f"skipped steps of {part} change the sample beyond all measure")
        similarity = (self.similarity / self.rows).clamp(-1, 1).tolist()
        errors = (self.errors / self.power).tolist()
        return Calibration(
            *(part, sampler, self.steps, cut, prompts, self.protected),
            _mirror([[round(x, _SIMILARITY_DIGITS) for x in row] for row in similarity]),
            tuple(tuple(float(f"{x:.{_ERROR_DIGITS}g}") for x in row) for row in errors),
        )


def _replay(
    network: Network, outputs: list[Tensor], features: list[Tensor], i: int, j: int
) -> Predict:
    """Up to step i what was recorded, which is no work; its feature until j; then full steps."""
    step = -1

    def predict(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        nonlocal step
        step += 1
        if step <= i:
            return outputs[step]
        if step < j:
            return network.resume(features[i], x, t, *conditions)
        return network.run(x, t, *conditions)[0]

    return predict


def write_calibrations(path: Path, model: str, calibrations: Sequence[Calibration]) -> None:
    """Write a file, or, where one of this model is there, replace what it measured likewise."""
    kept = {each.key: each for each in read_calibrations(path, model)} if path.exists() else {}
    kept |= {each.key: each for each in calibrations}
    entries = []
    for each in sorted(kept.values(), key=lambda each: tuple(map(str, each.key))):
        # above the diagonal is all there is to know
        above = {
            "similarity": [row[i + 1 :] for i, row in enumerate(each.similarity[:-1])],
            "errors": [row[i + 2 :] for i, row in enumerate(each.errors)][each.protected - 1 : -1],
        }
        entries.append(json.dumps(asdict(each) | above, separators=(",", ":")))
    with replace_with(path) as temporary:
        # a line each: a file that is replaced in part differs in part
        lines = ",\n".join(entries)
        temporary.write_text(f'{{"model":{json.dumps(model)},"calibrations":[\n{lines}\n]}}\n')


def read_calibrations(path: Path, model: str) -> list[Calibration]:
    """What a file measured of a model; ValueError names the file and what is wrong in it."""
    data = read_json(path)
    if data.get("model") != model:
        raise ValueError(f"{path}: model {short(data.get('model'))} is not {model}")
    entries = data.get("calibrations")
    if not isinstance(entries, list):
        raise ValueError(f"{path}: calibrations {short(entries)} is not a list")
    return [_parse(entry, path) for entry in entries]


def _parse(entry: Any, path: Path) -> Calibration:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {short(entry)} is not an object")
    choices: dict[str, tuple[str | None, ...]] = {"part": PARTS, "sampler": SAMPLERS}
    choices["cut"] = CUTS if entry.get("part") == "content" else (None,)
    for key, known in choices.items():
        if entry.get(key) not in known:
            raise ValueError(f"{path}: {key} {short(entry.get(key))} is not one of {known}")
    steps = _whole(entry, "steps", 2, MOST_STEPS, path)
    prompts = _whole(entry, "prompts", 1, 2**20, path)
    protected = _whole(entry, "protected", 1, steps, path)
    above = _triangle(entry, "similarity", steps - 1, -1.0, 1.0, path)
    errors = _triangle(entry, "errors", steps - protected, 0.0, MOST_ERROR, path)
    unknown: list[list[float]] = [[]] * (protected - 1)
    return Calibration(
        *(entry["part"], entry["sampler"], steps, entry.get("cut"), prompts, protected),
        similarity=_mirror([[0.0] * (i + 1) + row for i, row in enumerate([*above, []])]),
        errors=tuple(
            tuple([0.0] * (steps + 1 - len(row)) + [*row]) for row in (*unknown, *errors, [])
        ),
    )


def _whole(entry: dict[str, Any], key: str, low: int, high: int, path: Path) -> int:
    value = entry.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{path}: {key} {short(value)} is not between {low} and {high}")
    return value


def _triangle(
    entry: dict[str, Any], key: str, size: int, low: float, high: float, path: Path
) -> list[list[float]]:
    """Rows of `size`, `size` - 1, ... 1 numbers."""
    rows = entry.get(key)
    if not isinstance(rows, list) or len(rows) != size:
        raise ValueError(f"{path}: {key} is not a list of {size} rows")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != size - i:
            raise ValueError(f"{path}: row {i} of {key} is not a list of {size - i} numbers")
        for value in row:
            if type(value) not in (int, float) or not low <= value <= high:
                raise ValueError(
                    f"{path}: {key} has {short(value)}, which is no number of {low:g} to {high:g}"
                )
    return [[float(value) for value in row] for row in rows]


def _mirror(rows: Sequence[Sequence[float]]) -> Rows:
    """(K, K) known above the diagonal -> (K, K), symmetric, with ones on it."""
    steps = range(len(rows))
    return tuple(tuple(1.0 if i == j else rows[min(i, j)][max(i, j)] for j in steps) for i in steps)


def plan_rehash(config: SampleConfig, model: ModelConfig, folder: Path) -> Plan | None:
    """The steps that `config` asks for of a model that has been asked for all else.

    None where it asks for no rehash. Raises ValueError where it cannot be, or where a calibration
    is needed that neither `config` nor the model's folder has.
    """
    if not config.rehashes:
        return None
    if config.rehash_steps is not None:
        return _given_plan(config.rehash_cut, *config.rehash_steps, model)
    policy = config.rehash_policy or ("similarity" if config.rehash is None else DEFAULT_POLICY)
    known: list[Calibration] = []
    path = folder / CALIBRATION if config.rehash_file is None else Path(config.rehash_file)
    if policy != "uniform" and (config.rehash_file is not None or path.is_file()):
        known = read_calibrations(path, model.name)

    def choose(part: str, steps: int, cut: str | None, budget: int | None) -> tuple[int, ...]:
        protected = keysteps.count_protected(part, steps, config.rehash_protect)
        if steps == 1 or budget == steps:
            return tuple(range(steps))
        if policy == "uniform":
            assert budget is not None
            return keysteps.uniform(steps, budget, protected=protected)
        key = (part, model.sampler, steps, cut)
        found = next((each for each in known if each.key == key), None)
        if found is None:
            raise ValueError(
                f"no calibration of {model.name}'s {part} for {steps} steps of {model.sampler}"
                f"{'' if cut is None else f' with cut {cut}'}: "
                "make one by cmdgen rehash calibrate, or ask for policy uniform"
            )
        if budget is None:
            assert config.rehash_threshold is not None
            threshold = config.rehash_threshold
            return keysteps.by_threshold(found.similarity, threshold, protected=protected)
        if policy == "similarity":
            return keysteps.by_similarity(found.similarity, budget, protected=protected)
        if protected < found.protected:
            raise ValueError(
                f"{path} was measured with the first {found.protected} of {steps} steps protected: "
                "protect as many, or measure again by cmdgen rehash calibrate --protect"
            )
        return keysteps.minimax(found.errors, budget, protected=protected)

    budget = more = config.rehash
    if budget is not None:
        if not 1 <= budget <= model.steps:
            raise ValueError(f"rehash {budget} is not between 1 and the {model.steps} steps")
        # halves are rounded up; the first step and the last one run
        share = (2 * budget * model.motion_steps + model.steps) // (2 * model.steps)
        more = min(max(share, 2), model.motion_steps)
    content = choose("content", model.steps, config.rehash_cut, budget)
    motion = choose("motion", model.motion_steps, None, more) if model.frames > 1 else ()
    return Plan(policy, config.rehash_cut, content, motion, config.rehash_threshold)


def _given_plan(
    cut: str, content: tuple[int, ...], motion: tuple[int, ...], model: ModelConfig
) -> Plan:
    """A plan whose steps are known; ValueError where the model takes fewer, or other, steps."""
    motion = motion if model.frames > 1 else ()
    taken = {"content": (content, model.steps)}
    if model.frames > 1:
        taken["motion"] = (motion, model.motion_steps)
    for part, (steps, total) in taken.items():
        if not steps:
            raise ValueError(f"rehash lists no steps of {part}: as in 0,1,4+0,2, after the +")
        if steps[-1] >= total:
            raise ValueError(f"rehash lists step {steps[-1]} of {part}, which has {total} from 0")
    return Plan("listed", cut, content, motion)
