"""What the demo's story of GLIED prints, writes and draws."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcap import data

from . import demo_glied, demo_report, demo_tables
from .attention_pictures import DPI
from .demo_figures import LINE, facts_true, picture, wrapped, write
from .demo_runs import spread

if TYPE_CHECKING:
    from .demo_glied import GliedResult

_LEARNT = {
    "parameters": ("parameters", "{:,.0f}"),
    "val_ce": ("validation CE", "{:.3f}"),
    "cider": ("CIDEr", "{:.3f}"),
    "bleu_4": ("BLEU-4", "{:.3f}"),
    "captions_per_s": ("captions/s", "{:.0f}"),
}
_SAID = {
    "fact_precision": ("precision", "{:.3f}"),
    "mean_length": ("words", "{:.1f}"),
    "fact_recall": ("recall", "{:.3f}"),
    "oracle_r1": ("oracle R@1", "{:.3f}"),
    "unique_share": ("unique", "{:.1%}"),
}
_COLUMNS = {**_LEARNT, **_SAID}
_REWARDED = {name: _COLUMNS[name] for name in ("cider", "bleu_4", "val_ce", *_SAID)}
_LINE = ("val_ce", "cider", "fact_precision", "mean_length", "unique_share")
_PLOTTED = ("val_ce", "cider", "fact_precision", "mean_length")
_NOTE = (
    "Validation CE: cross-entropy per word with the words before given. The rest of greedy captions of all test pictures: "
    "CIDEr and BLEU-4 against five references, precision and recall of what is known of the scenes. Captions/s: batches of "
    "64, reading included, on the machine as busy as it was. The last table's captions are others: its CIDEr and loss are "
    "not to be compared with those above."
)
DRAWN = 4
_COLOURS = {  # of the runs whose captions are drawn
    "base": "0.5",
    "wide": "tab:orange",
    "glied": "tab:blue",
    "before": "tab:green",
    "new-scst": "tab:red",
}
_TILE, _TEXT, _GAP, _EDGE, _HEAD, _NAMES = 1.55, 7.6, 0.12, 0.14, 0.3, 2.3  # inches
_PLOT, _BETWEEN, _OWN = 1.9, 0.3, 1.3
_LETTERS = 100  # of a line of a caption


def introduce(out: Path, steps: dict[str, int], seeds: list[int]) -> None:
    """What will be trained, on what."""
    thorough, own = (labels_of(of) for of in (demo_glied.MLE, demo_glied.RL))
    demo_report.say(
        f"Scenes in {out}, nine regions and twelve attribute words each; seeds {', '.join(map(str, seeds))}. For each, on "
        f"captions that mention all there is, {steps['mle']} steps: {'; '.join(thorough.values())}. On the scenes' own "
        f"captions: {'; '.join(own.values())}, {steps['before']} steps and {steps['after']} each of what follows. The same "
        "command goes on where it was stopped."
    )


def labels_of(variants: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    return {name: label for name, (label, _) in variants.items()}


def line(scores: dict[str, float]) -> str:
    """The most telling scores of one run."""
    return demo_tables.line({key: _COLUMNS[key] for key in _LINE}, scores)


def _tables(made: GliedResult) -> list[tuple[str, str, demo_tables.Columns, dict[str, str]]]:
    """Of each its title, its upper left corner in a document, its columns and its rows."""
    thorough, own = labels_of(demo_glied.MLE), labels_of(demo_glied.RL)
    return [
        (_title(made), "captions of everything", _LEARNT, thorough),
        ("What their captions say", "what they say", _SAID, thorough),
        ("On the scenes' own captions, with CIDEr as reward", "the scenes' own captions", _REWARDED, own),
    ]


def compare(made: GliedResult) -> None:
    """For each run the mean over the seeds, and each seed; then the trends, held or not."""
    for title, _, columns, labels in _tables(made):
        demo_tables.show_scores(title, columns, labels, made.scores, made.seeds)
    demo_report.say(_NOTE)
    demo_tables.show_trends(made.trends, _COLUMNS)
    demo_report.say(f"{made.seconds:.0f} s in all.")


def markdown(made: GliedResult) -> str:
    """The same as `compare` prints, for a document: means, and in brackets each seed."""
    parts = [f"{_title(made)}. {_NOTE}"]
    parts += [demo_tables.markdown_scores(corner, columns, rows, made.scores) for _, corner, columns, rows in _tables(made)]
    return "\n\n".join([*parts, demo_tables.markdown_trends(made.trends, _COLUMNS)]) + "\n"


def _title(made: GliedResult) -> str:
    steps = f"{made.steps['mle']} steps of cross-entropy; by reward {made.steps['after']} after {made.steps['before']}"
    return f"GLIED on scenes: {steps}; seeds {', '.join(map(str, made.seeds))}"


def draw(path: Path, folder: Path, made: GliedResult, said: dict[str, list[str]]) -> None:
    """The scores of all runs, and what some of them say of some test pictures.

    Args:
        path: the picture to write.
        folder: the data whose test pictures were captioned.
        made: the scores.
        said: of each run from the first seed the captions of all test pictures in order.
    """
    view = data.KarpathyDataset(folder, split="test").images()
    items = [view[i] for i in spread(len(view), DRAWN)]  # spread evenly, not chosen
    shown = {name: [said[name][i] for i in spread(len(view), DRAWN)] for name in _COLOURS}
    thorough, own = labels_of(demo_glied.MLE), labels_of(demo_glied.RL)
    figure(items, shown, made.scores, thorough, own).savefig(path, dpi=DPI)


def figure(
    items: list[dict],
    said: dict[str, list[str]],
    scores: dict[str, list[dict[str, float]]],
    thorough: dict[str, str],
    own: dict[str, str],
) -> Any:
    """The figure of `draw`, of the pictures `items` and what each run that is drawn says of them; the runs' labels by the
    captions that they learn from."""
    from matplotlib.figure import Figure

    labels = thorough | own

    width = 2 * _EDGE + _TILE + _GAP + _TEXT
    lines = [[1 + len(wrapped(said[name][row], _LETTERS)) for name in said] for row in range(len(items))]
    tall = [max(_TILE, sum(LINE * count + 0.05 for count in counts)) for counts in lines]
    height = 2 * _EDGE + 2 * _HEAD + _PLOT + _BETWEEN + _OWN + 0.4 + sum(tall) + _GAP * len(items)
    made = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    _plot(made, scores, thorough, _EDGE + _HEAD, _PLOT)
    _plot(made, scores, own, _EDGE + 2 * _HEAD + _PLOT + _BETWEEN, _OWN)
    top = _EDGE + 2 * _HEAD + _PLOT + _BETWEEN + _OWN + 0.4
    for row, item in enumerate(items):
        picture(made, item["image"], _EDGE, top, _TILE)
        y, x = top, _EDGE + _TILE + _GAP
        for name, captions in said.items():
            write(made, x, y, labels[name], fontsize=8.5, color=_COLOURS[name], weight="bold")
            told = facts_true(captions[row], item["extras"]["facts"])
            write(made, width - _EDGE, y, told, fontsize=8.5, color="0.5", ha="right")
            for part in wrapped(captions[row], _LETTERS):
                y += LINE
                write(made, x, y, part, fontsize=10, color="black")
            y += LINE + 0.05
        top += tall[row] + _GAP
    return made


def _plot(
    made: Any, scores: dict[str, list[dict[str, float]]], labels: dict[str, str], top: float, tall: float
) -> None:  # fmt: skip
    """One panel a score, one line a run: a point for each seed, a bar at their mean; so many inches from the upper edge."""
    width, height = made.get_size_inches()
    each = (width - 2 * _EDGE - _NAMES) / len(_PLOTTED)
    for place, key in enumerate(_PLOTTED):
        left, bottom = _EDGE + _NAMES + place * each, height - top - tall
        axes = made.add_axes((left / width, bottom / height, (each - 0.2) / width, tall / height))
        for y, name in enumerate(labels):
            values, colour = [one[key] for one in scores[name]], _COLOURS.get(name, "0.3")
            axes.plot(values, [y] * len(values), "o", color=colour, markersize=4, alpha=0.6)
            axes.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], "-", color=colour, linewidth=2)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), list(labels.values()) if place == 0 else [""] * len(labels), fontsize=8)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(_COLUMNS[key][0], fontsize=9.5)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
