"""What metrics measure and what they answer: captions with all that is known of them, numbers, and reasons for none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastcap.errors import bad
from fastcap.eval import _embeddings
from fastcap.eval._java import Unavailable
from fastcap.eval.ptb import ptb_tokenize, ptb_tokenize_java

_OP = "eval.measure"
Progress = Callable[[int, int], None]
Resampled = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Of a metric: counts [R, N], how often each resample holds each image -> scores [R] by name."""


class Embedded(NamedTuple):
    """Embeddings by one CLIP: text [N, D] of the captions, image [N, D] of their images, reference [R, D] of all
    references in the order of `Captioned.references`."""

    text: Tensor
    image: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Captioned:
    """N images with a caption each, and what is known of them.

    captions: of the captioner that is evaluated.
    references: of each image, the captions that people gave it; may be empty.
    facts: of each image its facts, as `dataset_scenes.json` has them, or None where the data have none.
    embedded: by the CLIP that judges, or None without one.
    """

    captions: Sequence[str]
    references: Sequence[Sequence[str]]
    facts: Sequence[dict] | None = None
    embedded: Embedded | None = None

    def __post_init__(self) -> None:
        N = len(self.captions)
        if isinstance(self.captions, str) or N == 0:
            raise bad(_OP, "captions", "be a list of at least one caption", self.captions, "pass one per image")
        for name in ("references", "facts"):
            value = getattr(self, name)
            if value is not None and len(value) != N:
                raise bad(_OP, name, f"have an entry for each caption, {N}", len(value), "pass one per image")
        if self.embedded is not None:
            sizes = (N, N, sum(len(each) for each in self.references))
            for name, value, count in zip(Embedded._fields, self.embedded, sizes, strict=True):
                _embeddings.check(_OP, f"embedded.{name}", value, self.embedded.text)
                if len(value) != count:
                    raise bad(_OP, f"embedded.{name}", f"have {count} rows", len(value), "embed all of them, in order")


class Found(NamedTuple):
    """What a metric measured: numbers of the set, numbers of each image where it has them, [N] each, and how the numbers
    of the set follow from a resample of the images, None where they do not."""

    scores: dict[str, float]
    each: dict[str, list[float]] = {}
    resampled: Resampled | None = None


class NotMeasured(NamedTuple):
    """Why a metric could not be measured, and what to do about it."""

    reason: str
    remedy: str


class Column(NamedTuple):
    """One of a metric's numbers in the table: its name in the scores, the part of the table, its head and its format."""

    key: str
    group: str
    head: str
    form: str


class Tokens(NamedTuple):
    """The captions and the references of each image as words."""

    captions: list[list[str]]
    references: list[list[list[str]]]


@dataclass(frozen=True)
class Task:
    """What one metric is given: the captions, cut into words at most once for all metrics, and a callback or None."""

    captioned: Captioned
    tokenizer: str = "fastcap"
    progress: Progress | None = None

    @cached_property
    def tokens(self) -> Tokens | NotMeasured:
        """By the tokenizer that was chosen; NotMeasured where it cannot run."""
        captioned = self.captioned
        flat = [*captioned.captions, *(text for references in captioned.references for text in references)]
        try:
            cut = (ptb_tokenize if self.tokenizer == "fastcap" else ptb_tokenize_java)(flat)
        except Unavailable as error:
            return NotMeasured(error.reason, error.remedy)
        rest = iter(cut[len(captioned.captions) :])
        return Tokens(cut[: len(captioned.captions)], [[next(rest) for _ in each] for each in captioned.references])

    def without_references(self) -> NotMeasured | None:
        """The reason where an image has no reference to compare with."""
        counts = [len(references) for references in self.captioned.references]
        if 0 not in counts:
            return None
        return NotMeasured(f"image {counts.index(0)} has no reference", "give every image a reference caption")


class Metric(NamedTuple):
    """columns: what the table shows of it. measure: how it is found."""

    columns: tuple[Column, ...]
    measure: Callable[[Task], Found | NotMeasured]
