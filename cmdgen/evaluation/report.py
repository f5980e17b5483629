"""Figures beside their targets: one Markdown table, or JSON. Never imports torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_HEADER = ("figure", "value", "beside", "target", "")


@dataclass(frozen=True)
class Figure:
    """One measured number, what it is compared with, and its target."""

    key: str
    label: str
    value: float
    # dB, %, s, MB, or nothing
    unit: str
    beside: dict[str, float]
    target: float
    # "least" or "most": the side of the target on which the value should be
    at: str = "least"
    # where the target comes from
    reason: str = ""

    @property
    def met(self) -> bool:
        """Return whether the target is reached; NaN misses it."""
        return self.value >= self.target if self.at == "least" else self.value <= self.target

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the key, for JSON."""
        beside = {name: _finite(value) for name, value in self.beside.items()}
        return {
            **{"value": _finite(self.value), "unit": self.unit, "beside": beside},
            **{"target": _finite(self.target), "at": self.at, "met": self.met},
        }

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        target = f"{'≥' if self.at == 'least' else '≤'} {_number(self.target, self.unit)}"
        if self.reason:
            target += f" ({self.reason})"
        beside = ", ".join(f"{name} {_number(value, self.unit).split()[0]}" for name, value in self.beside.items())
        verdict = "met" if self.met else "missed"
        return self.label, _number(self.value, self.unit), beside, target, verdict


@dataclass(frozen=True)
class Report:
    """All figures of one measurement, how they were taken, and anything finer than the table."""

    title: str
    figures: list[Figure]
    # one sentence each
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "title": self.title,
            **self.settings,
            "figures": {figure.key: figure.to_dict() for figure in self.figures},
            "details": self.details,
            "notes": self.notes,
        }

    def to_markdown(self) -> str:
        """Return a title, a table that is readable as plain text too, and the notes."""
        lines = table([_HEADER, *(figure.cells() for figure in self.figures)])
        return "\n".join([self.title, "", *lines, "", *(f"- {note}" for note in self.notes)])


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, the first row its header, aligned to read as it is.

    Columns of numbers, but for the first, are aligned on the right.
    """
    columns = []
    for i, (header, *cells) in enumerate(zip(*rows, strict=True)):
        width = max(map(len, (header, *cells)))
        numbers = i > 0 and any(cells) and all(cell[:1] in "+-0123456789" for cell in cells)
        align = str.rjust if numbers else str.ljust
        columns.append([align(cell, width) for cell in (header, "-" * width, *cells)])
    lines = ["| " + " | ".join(row) + " |" for row in zip(*columns, strict=True)]
    return [lines[0], lines[1].replace(" ", "-"), *lines[2:]]


def column(name: str, unit: str, values: Sequence[float]) -> list[str]:
    """Return a header and its cells, all in the unit of the largest value; zeros are left out."""
    factor, prefix = scale(max(values))
    digits = 1 if max(values) >= 100 * factor else 2
    cells = [f"{value / factor:.{digits}f}" if value else "" for value in values]
    return [f"{name} {prefix}{unit}".strip(), *cells]


def scale(value: float) -> tuple[float, str]:
    """Return the unit in which a column's largest value has up to four digits before the point.

    One step finer than usual: the smallest value is often a thousandth of it.
    """
    scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
    return next((unit for unit in scales if value >= 10 * unit[0]), scales[-1])


def _number(value: float, unit: str) -> str:
    digits = 1 if unit == "%" or abs(value) >= 100 else 2
    return f"{value:.{digits}f} {unit}".rstrip()


def _finite(value: float) -> float | None:
    """Return a number that JSON has; None for infinity and NaN."""
    return round(value, 6) if math.isfinite(value) else None
