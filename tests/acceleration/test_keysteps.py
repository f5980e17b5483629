"""Key-step search on maps that are known."""

from itertools import combinations

import pytest
import torch

from cmdgen.acceleration.keysteps import by_similarity, by_threshold, count_protected, minimax, uniform


def falling(steps: int, loss: float) -> list[list[float]]:
    """So much less alike with every step between."""
    return [[1 - loss * abs(i - j) for j in range(steps)] for i in range(steps)]


def random_map(steps: int, seed: int, *, levels: int | None = None) -> list[list[float]]:
    """Symmetric, ones on the diagonal; of few levels it is full of ties."""
    half = torch.rand(steps, steps, generator=torch.Generator().manual_seed(seed))
    if levels is not None:
        half = (half * levels).floor() / levels
    whole = half.triu(1)
    return (whole + whole.T + torch.eye(steps)).tolist()


def random_errors(steps: int, seed: int, *, levels: int | None = None) -> list[list[float]]:
    errors = torch.rand(steps, steps + 1, generator=torch.Generator().manual_seed(seed))
    if levels is not None:
        errors = (errors * levels).floor()
    return errors.triu(2).tolist()


def test_a_step_runs_once_it_is_less_similar_than_the_threshold_to_the_last_that_ran() -> None:
    similarity = falling(10, 0.125)
    # 2 steps on it is 0.75: similar enough still; 3 steps on it is not
    assert by_threshold(similarity, 0.75) == (0, 3, 6, 9)
    assert by_threshold(similarity, 0.7501) == (0, 2, 4, 6, 8, 9)
    assert by_threshold(similarity, -1) == (0, 9)
    assert by_threshold(similarity, 1) == tuple(range(10))
    # the next key is judged by the last protected step
    assert by_threshold(similarity, 0.75, protected=3) == (0, 1, 2, 5, 8, 9)


def test_threshold_compares_with_the_last_step_that_ran_not_with_the_one_before() -> None:
    similarity = falling(5, 0.0)
    similarity[3][0] = similarity[0][3] = 0.1
    similarity[4][3] = similarity[3][4] = 1.0
    assert by_threshold(similarity, 0.5) == (0, 3, 4)
    similarity[2][1] = similarity[1][2] = 0.0
    assert by_threshold(similarity, 0.5) == (0, 3, 4)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("steps", [2, 9, 25])
def test_any_budget_is_met_exactly_on_any_map(steps: int, levels: int | None) -> None:
    for seed in range(5):
        similarity = random_map(steps, seed, levels=levels)
        for protected in {1, min(5, steps)}:
            for budget in range(min(protected + 1, steps), steps + 1):
                keys = by_similarity(similarity, budget, protected=protected)
                assert len(keys) == budget
                assert list(keys) == sorted(set(keys))
                assert keys[:protected] == tuple(range(protected))
                assert keys[-1] == steps - 1


def test_thirteen_of_twenty_five_are_thirteen_by_algorithm_1_where_a_threshold_gives_them() -> None:
    # steps change slowly at first and fast at last
    place = [(step / 24) ** 3 for step in range(25)]
    similarity = [[1 - abs(a - b) for b in place] for a in place]
    keys = by_similarity(similarity, 13)
    gaps = {similarity[i][j] for i in range(25) for j in range(i)}
    assert any(by_threshold(similarity, gap) == keys for gap in gaps)
    assert keys[0] == 0 and keys[1] > 3 and keys[-3:] == (22, 23, 24)


def test_where_all_steps_are_alike_the_earliest_are_added() -> None:
    assert by_similarity(falling(8, 0.0), 4) == (0, 1, 2, 7)


@pytest.mark.parametrize(
    ("steps", "budget", "protected", "keys"),
    [
        (25, 13, 1, tuple(range(0, 25, 2))),
        (25, 9, 1, tuple(range(0, 25, 3))),
        (25, 13, 5, (0, 1, 2, 3, 4, 7, 9, 12, 14, 17, 19, 22, 24)),
        (10, 10, 2, tuple(range(10))),
        (6, 2, 1, (0, 5)),
        (1, 1, 1, (0,)),
    ],
)
def test_uniform_is_even_after_what_is_protected(
    steps: int, budget: int, protected: int, keys: tuple[int, ...]
) -> None:
    assert uniform(steps, budget, protected=protected) == keys


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize(("steps", "protected"), [(6, 1), (7, 2), (8, 1)])
def test_minimax_is_the_best_of_all_schedules(steps: int, protected: int, levels: int | None) -> None:
    def lengths(errors: list[list[float]], keys: tuple[int, ...]) -> list[float]:
        ends = (*keys[1:], steps)
        return sorted((errors[i][j] for i, j in zip(keys, ends, strict=True)), reverse=True)

    for seed in range(5):
        errors = random_errors(steps, seed, levels=levels)
        for budget in range(protected + 1, steps + 1):
            first = tuple(range(protected))
            rest = combinations(range(protected, steps), budget - protected)
            best = min(lengths(errors, first + others) for others in rest)
            keys = minimax(errors, budget, protected=protected)
            assert len(keys) == budget and keys[:protected] == first
            assert lengths(errors, keys) == best


def test_minimax_skips_where_it_costs_nothing() -> None:
    errors = random_errors(9, 0)
    errors[3][6] = errors[6][9] = 0.0
    assert minimax(errors, 5) == (0, 1, 2, 3, 6)


def test_a_budget_that_cannot_be_is_refused() -> None:
    for budget in (0, 3, 11):
        says = f"rehash {budget}: of 10 steps between 4 and 10 can run in full, the first 3 always"
        with pytest.raises(ValueError, match=says):
            uniform(10, budget, protected=3)
        with pytest.raises(ValueError, match=says):
            minimax(random_errors(10, 0), budget, protected=3)
        with pytest.raises(ValueError, match=says):
            by_similarity(falling(10, 0.1), budget, protected=3)


def test_protected_steps_are_rounded_up_and_at_least_one() -> None:
    shares = [(25, 0.2), (26, 0.2), (25, 0.28), (10, 0), (3, 1), (1, 0.2)]
    assert [count_protected("content", *each) for each in shares] == [5, 6, 7, 1, 3, 1]
    assert count_protected("motion", 25, 0.2) == 1
