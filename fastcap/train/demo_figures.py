"""Pictures and text at places of a figure, in inches from its upper left corner: what the demo's stories draw with."""

from __future__ import annotations

import textwrap
from typing import Any

from torch import Tensor

from fastcap import data

LINE = 0.168  # inches


def write(figure: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Text whose upper left corner lies at (x, y)."""
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, va="top", parse_math=False, **style)


def picture(figure: Any, image: Tensor, x: float, top: float, side: float) -> None:
    """The picture [3, S, S] in [-1, 1] with its left and upper edges there."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, 1 - (top + side) / height, side / width, side / height))
    axes.imshow((image.permute(1, 2, 0).numpy() * 0.5 + 0.5).clip(0, 1), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.8", linewidth=0.8)


def wrapped(caption: str, letters: int) -> list[str]:
    """The lines of a caption."""
    return textwrap.wrap(caption, letters) or ["(nothing)"]


def facts_true(caption: str, facts: dict) -> str:
    """Of what a caption says of a scene, how much is true: "7 of 8 facts true"."""
    scores = data.score_captions([caption], [facts])
    claims = round(scores["facts_per_caption"])
    return f"{round(scores['fact_precision'] * claims)} of {claims} facts true"
