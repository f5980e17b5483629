"""Which sampling steps run in full: pure functions of maps that were measured. Never imports torch.

Steps count from 0; the first `protected` of them always run, and so does step 0. A budget is the
number of steps that run.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Sequence

Map = Sequence[Sequence[float]]


def count_protected(part: str, steps: int, share: float) -> int:
    """Return how many first steps are never skipped: `share` of them, rounded up, at least 1.

    Of the motion model 1: its first steps have the features that are most alike, and the more of
    them run, the further is the result from that of all steps.
    """
    # 0.28 * 25 is a little more than 7
    return 1 if part == "motion" else max(1, min(steps, math.ceil(round(share * steps, 9))))


def by_threshold(similarity: Map, threshold: float, *, protected: int = 1) -> tuple[int, ...]:
    """(K, K) -> the steps that run: Algorithm 1 of Zhan et al. 2024 (arXiv:2411.01171).

    A step is skipped while it is at least so similar to the last one that ran; the last step runs.
    """
    steps = len(similarity)
    keys = list(range(protected))
    for step in range(protected, steps):
        if similarity[step][keys[-1]] < threshold:
            keys.append(step)
    if keys[-1] != steps - 1:
        keys.append(steps - 1)
    return tuple(keys)


def by_similarity(similarity: Map, budget: int, *, protected: int = 1) -> tuple[int, ...]:
    """(K, K) -> `budget` steps: Algorithm 1 at the threshold that leaves so many.

    The threshold is bisected over the similarities that occur. Where the number of steps jumps over
    the budget between two of them, because of ties or because a map need not be monotone, the
    lower one's steps are taken, and then, one at a time, the skipped step that is least like the
    step whose feature it would reuse; the earlier of two alike.
    """
    steps = len(similarity)
    _check_budget(steps, budget, protected)
    # below all that occur, a threshold leaves the fewest steps
    values = sorted({-math.inf, *(similarity[i][j] for i in range(steps) for j in range(i))})

    def choose(threshold: float) -> list[int]:
        return list(by_threshold(similarity, threshold, protected=protected))

    above = bisect_right(values, budget, 1, key=lambda threshold: len(choose(threshold)))
    keys = choose(values[above - 1])
    assert len(keys) <= budget
    while len(keys) < budget:
        skipped = [
            (similarity[step][key], step)
            for key, end in zip(keys, [*keys[1:], steps], strict=True)
            for step in range(key + 1, end)
        ]
        insort(keys, min(skipped)[1])
    return tuple(keys)


def uniform(steps: int, budget: int, *, protected: int = 1) -> tuple[int, ...]:
    """() -> `budget` of `steps` steps: the protected ones, then evenly to the last."""
    _check_budget(steps, budget, protected)
    more, left = budget - protected, steps - protected
    # halves are rounded up
    return (*range(protected), *(protected - 1 + (2 * i * left + more) // (2 * more) for i in range(1, more + 1)))


def minimax(errors: Map, budget: int, *, protected: int = 1) -> tuple[int, ...]:
    """(K, K + 1) -> the `budget` steps whose largest error is smallest, then the next largest.

    `errors[i][j]` is that of the final sample where step i runs, those up to j are skipped and all
    others run; j = K skips to the end. Running steps are the nodes of a path from 0 to K, errors
    the lengths of its edges, as in LeMiCa (2025, arXiv:2511.00090); of all paths with so
    many nodes dynamic programming finds the one whose sorted errors come first.
    """
    steps = len(errors)
    _check_budget(steps, budget, protected)
    # the errors so far, largest first, and the steps; adding one edge keeps the order of two paths
    paths = {protected - 1: ((0.0,) * (protected - 1), tuple(range(protected)))}
    for _ in range(budget - protected):
        longer: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {}
        for step in range(protected, steps):
            before = [i for i in paths if i < step]
            if before:
                longer[step] = min((_insert(paths[i][0], errors[i][step]), (*paths[i][1], step)) for i in before)
        paths = longer
    return min((_insert(path[0], errors[i][steps]), path[1]) for i, path in paths.items())[1]


def _insert(errors: tuple[float, ...], error: float) -> tuple[float, ...]:
    return tuple(sorted((*errors, error), reverse=True))


def _check_budget(steps: int, budget: int, protected: int) -> None:
    least = min(protected + 1, steps)
    if not least <= budget <= steps:
        raise ValueError(
            f"rehash {budget}: of {steps} steps between {least} and {steps} can run in full, "
            f"the first {protected} always do"
        )
