"""What the demo's story of distinctive captions prints, writes and draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastcap import data
from fastcap.data.batching import stack_images

from . import demo_report, demo_tables, embedders
from .attention_pictures import DPI
from .demo_figures import LINE, facts_true, picture, wrapped, write

if TYPE_CHECKING:
    from .demo_distinctive import DistinctiveResult, Plan

# score -> (column of the tables, format)
_SAID = {
    "mean_length": ("words", "{:.1f}"),
    "unique_share": ("unique", "{:.0%}"),
    "word_precision": ("words in a reference", "{:.0%}"),
    "fact_precision": ("precision", "{:.3f}"),
    "fact_recall": ("recall", "{:.3f}"),
    "oracle_r1": ("oracle R@1", "{:.3f}"),
}
_FOUND = {
    "t2i_r1": ("t2i R@1", "{:.3f}"),
    "t2i_r5": ("t2i R@5", "{:.3f}"),
    "t2i_mean_rank": ("t2i mean rank", "{:.1f}"),
    "i2t_r1": ("i2t R@1", "{:.3f}"),
    "i2t_r5": ("i2t R@5", "{:.3f}"),
    "i2t_mean_rank": ("i2t mean rank", "{:.1f}"),
    "clip_score": ("CLIPScore", "{:.3f}"),
}
_COLUMNS = {**_SAID, **_FOUND}
_LINE = ("mean_length", "word_precision", "fact_precision", "oracle_r1", "t2i_r1", "i2t_r1")
_NOTE = (
    "Of greedy captions of test pictures. t2i: does a caption find its image among all images; i2t: does an image find its "
    "caption among all captions; by the CLIP that judges, which has rewarded none."
)
_KNOWN = " Precision, recall and oracle R@1: by what is known of the scenes."
DRAWN, NEAREST = 5, 4
_COLOURS = {"mle": "0.45", "smile": "tab:blue", "one-way": "tab:blue", "two-way": "tab:red"}  # the runs that are drawn
_TILE, _SMALL, _TEXT, _GAP, _EDGE, _HEAD = 1.55, 0.98, 4.6, 0.09, 0.12, 0.3  # inches
_LETTERS = 62  # of a line of a caption


def introduce(dataset: str, plan: Plan, steps: dict[str, int], seeds: list[int]) -> None:
    """What will be trained."""
    demo_report.say(
        f"{dataset.capitalize()}, seeds {', '.join(map(str, seeds))}; for each two CLIPs of {steps['clip']} steps, a "
        f"captioner of {steps['base']} steps of MLE, and from there {steps['rl']} steps each of "
        f"{'; '.join(labels_of(plan, seeds).values())}. The same command goes on where it was stopped."
    )


def labels_of(plan: Plan, seeds: list[int]) -> dict[str, str]:
    """What the tables call each variant; one of the first seed only says so."""
    once = f" (seed {seeds[0]})" if len(seeds) > 1 else ""
    return {name: label + (once if name in plan.once else "") for name, (label, _) in plan.variants.items()}


def line(scores: dict[str, float]) -> str:
    """The most telling scores of one run."""
    return demo_tables.line({key: _COLUMNS[key] for key in _LINE}, scores)


def compare(made: DistinctiveResult, labels: dict[str, str]) -> None:
    """For each run the mean over the seeds, and each seed; then the trends, held or not."""
    for title, wanted in ((_title(made), _SAID), ("Retrieval and CLIPScore, by the CLIP that judges", _FOUND)):
        demo_tables.show_scores(title, wanted, labels, made.scores, made.seeds)
    demo_report.say(_note(made))
    demo_tables.show_trends(made.trends, _COLUMNS)
    demo_report.say(f"{made.seconds:.0f} s in all.")


def markdown(made: DistinctiveResult, labels: dict[str, str]) -> str:
    """The same as `compare` prints, for a document: means, and in brackets each seed."""
    parts = [f"{_title(made)}. {_note(made)}"]
    for corner, wanted in (("captions", _SAID), ("retrieval", _FOUND)):
        parts.append(demo_tables.markdown_scores(corner, wanted, labels, made.scores))
    parts.append(demo_tables.markdown_trends(made.trends, _COLUMNS))
    return "\n\n".join(parts) + "\n"


def _title(made: DistinctiveResult) -> str:
    steps = f"{made.steps['base']} steps of MLE, then {made.steps['rl']}"
    return f"Distinctive captions of {made.dataset}: {steps}; seeds {', '.join(map(str, made.seeds))}"


def _note(made: DistinctiveResult) -> str:
    return _NOTE + (_KNOWN if made.dataset == "scenes" else "")


def drawn(labels: dict[str, str]) -> dict[str, str]:
    """Of all runs those that the picture shows."""
    return {name: label for name, label in labels.items() if name in _COLOURS}


def draw(path: Path, folder: Path, judge: Path, labels: dict[str, str], told: dict[str, list[dict[str, Any]]]) -> None:
    """Some test pictures, what each run says of them, and the pictures most like them in the eyes of the CLIP that judges.

    Args:
        path: the picture to write.
        folder: the data whose test split was captioned.
        judge: the CLIP's run.
        labels: of each run that is drawn, what the picture calls it.
        told: of each such run the captions of all test pictures in order, with their ranks: `per_image` of `evaluate`.
    """
    embedder = embedders.load(str(judge), torch.device("cpu"))
    view = data.KarpathyDataset(folder, split="test", image_size=embedder.image_size).images()
    items = [view[i] for i in range(len(view))]
    rows = [i * len(items) // min(DRAWN, len(items)) for i in range(min(DRAWN, len(items)))]  # spread evenly, not chosen
    with torch.no_grad():
        parts = stack_images([item["image"] for item in items]).split(64)
        image = normalize(torch.cat([embedder.images(part).float() for part in parts]), dim=1)
        said = [told[name][i]["caption"] for name in labels for i in rows]
        text = normalize(embedder.texts(said).float(), dim=1).view(len(labels), len(rows), -1)
    figure(items, rows, labels, told, image, text).savefig(path, dpi=DPI)


def figure(
    items: list[dict], rows: list[int], labels: dict[str, str], told: dict[str, list[dict]], image: Tensor, text: Tensor
) -> Any:
    """The figure of `draw`: image [N, D] and text [runs, rows, D] are of unit length."""
    from matplotlib.figure import Figure

    width = 2 * _EDGE + _TILE + _TEXT + NEAREST * (_SMALL + _GAP) + 2 * _GAP
    lines = [[1 + len(wrapped(told[name][i]["caption"], _LETTERS)) for name in labels] for i in rows]
    tall = [max(_TILE, sum(LINE * count + 0.05 for count in counts)) for counts in lines]
    height = 2 * _EDGE + 2 * _HEAD + sum(tall) + 2 * _GAP * len(rows)
    made = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    middle = _EDGE + _TILE + 2 * _GAP  # where the captions begin
    right = middle + _TEXT + _GAP  # and the neighbours
    for x, head in ((_EDGE, "picture"), (middle, "what is said of it"), (right, "what it is to be told from")):
        write(made, x, _EDGE + 0.05, head, fontsize=10, color="0.4", style="italic")
    for place, i in enumerate(rows):
        top = _EDGE + _HEAD + sum(tall[:place]) + 2 * _GAP * place
        picture(made, items[i]["image"], _EDGE, top, _TILE)
        captions = {name: told[name][i] for name in labels}
        _captions(made, captions, labels, items[i]["extras"].get("facts"), len(items), middle, top)
        fits = text[:, place] @ image.T
        near = (image @ image[i]).index_fill(0, torch.tensor(i), -2).topk(min(NEAREST, len(items) - 1)).indices
        for k, other in enumerate(near.tolist()):
            x = right + k * (_SMALL + _GAP)
            picture(made, items[other]["image"], x, top, _SMALL)
            better = [name for name, fit in zip(captions, fits, strict=True) if fit[other] > fit[i]]
            for j, name in enumerate(better):
                at = x + _SMALL / 2 + (j - (len(better) - 1) / 2) * 0.17
                write(made, at, top + _SMALL + 0.06, "\N{BLACK CIRCLE}", color=_COLOURS[name], fontsize=9, ha="center")
    key = "A dot: the caption of that colour fits the picture above it better than its own."
    write(made, width - _EDGE, height - _EDGE - 0.2, key, fontsize=8.5, color="0.5", ha="right")
    return made


def _captions(
    figure: Any, captions: dict[str, dict], labels: dict[str, str], facts: dict | None, pictures: int, x: float, y: float
) -> None:
    for name, one in captions.items():
        told = f"rank {one['t2i_rank']:g} of {pictures}"
        if facts is not None:
            told += f", {facts_true(one['caption'], facts)}"
        write(figure, x, y, labels[name], fontsize=8.5, color=_COLOURS[name], weight="bold")
        write(figure, x + _TEXT - 0.15, y, told, fontsize=8.5, color="0.5", ha="right")
        for part in wrapped(one["caption"], _LETTERS):
            y += LINE
            write(figure, x, y, part, fontsize=10, color="black")
        y += LINE + 0.05
