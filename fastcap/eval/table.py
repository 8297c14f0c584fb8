"""The numbers of several captioners side by side, as aligned Markdown, which a terminal shows as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastcap.eval.captioned import Column, NotMeasured
from fastcap.eval.metrics import METRICS

_NONE = "-"
_INTERVAL = "95 %"


class Row(NamedTuple):
    """One captioner: its name, what was measured, what was not, and the intervals of scores that have one."""

    name: str
    scores: dict[str, float]
    not_measured: dict[str, NotMeasured]
    intervals: dict[str, tuple[float, float]] = {}


def table(rows: Sequence[Row], head: str = "") -> str:
    """A table for each kind of metric, a row each; below, what was not measured and how to get it.

    head: the text above the tables. A kind that no row has is left out, a number that one row lacks is a dash. Confidence
    intervals stand in a line of their own below the row, so that the table is no wider than they are.

    >>> print(table([Row("mle", {"clip_score": 0.75, "ref_clip_score": 0.8}, {})]))
    | CLIP | CLIPScore | RefCLIPScore |
    | :--- | --------: | -----------: |
    | mle  |     0.750 |        0.800 |
    """
    parts = []
    for group, columns in _groups():
        if any(column.key in row.scores for row in rows for column in columns):
            lines = [[group, *(column.head for column in columns)]]
            for row in rows:
                lines.append([_cell(row.name), *(_number(row, column) for column in columns)])
                if any(column.key in row.intervals for column in columns):
                    lines.append([_INTERVAL, *(_interval(row, column) for column in columns)])
            parts.append("\n".join(_aligned(lines)))
    notes = [_note(names, why, rows) for why, names in _reasons(rows).items()]
    return "\n\n".join(([head] if head else []) + parts + (["\n".join(notes)] if notes else []))


def _groups() -> Iterator[tuple[str, list[Column]]]:
    groups: dict[str, list[Column]] = {}
    for metric in METRICS.values():
        for column in metric.columns:
            groups.setdefault(column.group, []).append(column)
    return iter(groups.items())


def _number(row: Row, column: Column) -> str:
    return column.form.format(row.scores[column.key]) if column.key in row.scores else _NONE


def _interval(row: Row, column: Column) -> str:
    """Low and high, or nothing where there is none."""
    return "–".join(map(column.form.format, row.intervals[column.key])) if column.key in row.intervals else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _aligned(lines: list[list[str]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    made = []
    for line in [lines[0], rule, *lines[1:]]:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        made.append(f"| {' | '.join(cells)} |")
    return made


def _reasons(rows: Sequence[Row]) -> dict[NotMeasured, dict[str, list[str]]]:
    """For each reason the metrics that it kept from being measured, and the rows."""
    reasons: dict[NotMeasured, dict[str, list[str]]] = {}
    for row in rows:
        for metric, why in row.not_measured.items():
            reasons.setdefault(why, {}).setdefault(metric, []).append(row.name)
    return reasons


def _note(names: dict[str, list[str]], why: NotMeasured, rows: Sequence[Row]) -> str:
    concerned = {name for found in names.values() for name in found}
    of = "" if len(concerned) == len(rows) else f" of {', '.join(sorted(concerned))}"
    return f"Not measured{of}: {', '.join(names)} ({why.reason}; {why.remedy})."
