"""The cost of commands in fresh processes."""

from pathlib import Path

import pytest

from cmdgen.evaluation import cost
from cmdgen.evaluation.cost import measure_cost, report_cost


def test_cost_of_help_is_measured() -> None:
    helped = measure_cost("--help")
    assert 0 < helped.seconds < 60 and 0 < helped.cpu < 30
    assert helped.megabytes > 5


def test_cost_of_a_command_that_fails_is_its_error() -> None:
    with pytest.raises(ValueError, match="cmdgen sample: error: the prompt is empty"):
        measure_cost("sample", "", "-o", "out.mp4")


def test_cost_report_has_all_figures(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "HELP_RUNS", 1)
    report = report_cost(str(tiny_model))
    keys = {figure.key for figure in report.figures}
    assert keys == {"sample_seconds", "sample_cpu", "sample_memory", "help_seconds"}
    assert all(figure.value > 0 for figure in report.figures)
