"""Figures, their verdicts, and the two forms of the report."""

import json
import math
import subprocess
import sys

import pytest

from cmdgen.evaluation.report import Figure, Report


@pytest.mark.parametrize(
    ("value", "target", "at", "met"),
    [
        (30.0, 30.0, "least", True),
        (29.99, 30.0, "least", False),
        (math.inf, 30.0, "least", True),
        (math.nan, 30.0, "least", False),
        (0.5, 0.5, "most", True),
        (0.51, 0.5, "most", False),
        (math.nan, 0.5, "most", False),
    ],
)
def test_a_target_is_met_on_its_side_only(value: float, target: float, at: str, met: bool) -> None:
    assert Figure("f", "figure", value, "", {}, target, at).met is met


def test_json_has_every_figure_and_no_infinity() -> None:
    figures = [
        Figure("a", "first", math.inf, "dB", {"mean": math.nan}, 30),
        Figure("b", "second", 3.0, "", {}, 4, "most"),
    ]
    text = json.dumps(Report("title", figures, ["note"], {"seed": 1}).to_dict(), allow_nan=False)
    data = json.loads(text)
    assert data["seed"] == 1
    assert data["figures"]["a"] == {
        **{"value": None, "unit": "dB", "beside": {"mean": None}},
        **{"target": 30, "at": "least", "met": True},
    }
    assert data["figures"]["b"]["met"] is True


def test_table_lines_up_and_says_what_was_missed() -> None:
    figures = [
        Figure("a", "subject", 71.25, "%", {"real": 99.5}, 70),
        Figure("b", "distance", 12.0, "", {"frozen": 20.0}, 10.0, "most", "half of frozen"),
    ]
    lines = Report("title", figures).to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert "71.2 % | real 99.5 " in table[2] and "| ≥ 70.0 % " in table[2] and "| met " in table[2]
    assert "≤ 10.00 (half of frozen) | missed |" in table[3]


def test_neither_the_command_nor_the_cost_imports_torch() -> None:
    code = "import sys, cmdgen.cli.evaluate, cmdgen.evaluation.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
