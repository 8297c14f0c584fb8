"""Tables of the demo's stories, printed and for documents: scores of runs over seeds, and trends held against them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from . import demo_report

if TYPE_CHECKING:
    from .demo_runs import Trend

Columns = Mapping[str, tuple[str, str]]  # score -> (what the table calls it, format)
Scores = Mapping[str, Sequence[Mapping[str, float]]]  # run -> its scores from each seed, or from the first seeds


def measured(columns: Columns, scores: Scores) -> Columns:
    """The columns that all runs have a number for."""
    every = [one for of_seeds in scores.values() for one in of_seeds]
    return {key: column for key, column in columns.items() if all(key in one for one in every)}


def line(columns: Columns, scores: Mapping[str, float]) -> str:
    """The scores of one run."""
    return ", ".join(f"{label} {form.format(scores[key])}" for key, (label, form) in columns.items() if key in scores)


def show_scores(title: str, columns: Columns, labels: Mapping[str, str], scores: Scores, seeds: Sequence[int]) -> None:
    """Prints, for each run, the mean over the seeds, and each seed."""
    columns = measured(columns, scores)
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for label, _ in columns.values():
        table.add_column(label.replace(" ", "\n", 1), justify="right")
    for name, label in labels.items():
        of_seeds = scores[name]
        shown = [(label, {key: statistics.mean(one[key] for one in of_seeds) for key in columns}, "bold")]
        if len(of_seeds) > 1:
            shown += [(f"  seed {seed}", one, "dim") for seed, one in zip(seeds, of_seeds, strict=False)]
        for row, one, style in shown:
            table.add_row(row, *(form.format(one[key]) for key, (_, form) in columns.items()), style=style)
        table.add_section()
    demo_report.say("")
    demo_report._console.print(table)


def show_trends(trends: Sequence[Trend], columns: Columns) -> None:
    """Prints what was expected, and whether it holds."""
    table = Table(title="Expected, and what these runs show", title_justify="left", show_header=False)
    for trend in trends:
        table.add_row(trend.expected, against(trend, columns), trend.verdict)
    demo_report.say("")
    demo_report._console.print(table)


def markdown_scores(corner: str, columns: Columns, labels: Mapping[str, str], scores: Scores) -> str:
    """The same for a document: means, and in brackets each seed."""
    columns = measured(columns, scores)
    lines = [[corner, *(label for label, _ in columns.values())], ["---"] * (1 + len(columns))]
    for name, label in labels.items():
        cells = (_cell([one[key] for one in scores[name]], form) for key, (_, form) in columns.items())
        lines.append([label, *cells])
    return _table(lines)


def markdown_trends(trends: Sequence[Trend], columns: Columns) -> str:
    lines = [["expected", "mean, against", "found"], ["---"] * 3]
    return _table(lines + [[trend.expected, against(trend, columns), trend.verdict] for trend in trends])


def against(trend: Trend, columns: Columns) -> str:
    """The two means that a trend compares."""
    form = columns[trend.score][1]
    return f"{form.format(trend.mean)} against {form.format(trend.other_mean)}"


def _cell(values: Sequence[float], form: str) -> str:
    shown = list(map(form.format, values))
    each = f" ({', '.join(shown)})" if len(set(shown)) > 1 else ""
    return form.format(statistics.mean(values)) + each


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
