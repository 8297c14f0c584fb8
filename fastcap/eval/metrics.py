"""Every metric of `fastcap evaluate`, measured one by one: what cannot be measured says why, and is never a zero.

Adding a metric is one function of `Captioned` that returns `Found` or `NotMeasured`, and one entry in `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.data.scene_scores import score_captions
from fastcap.data.text import words
from fastcap.errors import bad
from fastcap.eval import _embeddings
from fastcap.eval.clip_score import clip_score, ref_clip_score
from fastcap.eval.diversity import diversity
from fastcap.eval.retrieval import KS, retrieve, summary

_OP = "eval.measure"
Progress = Callable[[int, int], None]


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
    """What a metric measured: numbers of the set, and numbers of each image where it has them, [N] each."""

    scores: dict[str, float]
    each: dict[str, list[float]] = {}


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


class Metric(NamedTuple):
    """columns: what the table shows of it. measure: of captions, with a callback for progress or None."""

    columns: tuple[Column, ...]
    measure: Callable[[Captioned, Progress | None], Found | NotMeasured]


class Measured(NamedTuple):
    """All metrics of one captioner: scores and each by the metrics' own names, and those that were not measured."""

    scores: dict[str, float]
    each: dict[str, list[float]]
    not_measured: dict[str, NotMeasured]


def measure(captioned: Captioned, *, progress: Progress | None = None) -> Measured:
    """Every metric of `METRICS` on one captioner's captions.

    Args:
        captioned: the captions, with references, facts and embeddings as far as there are any.
        progress: called with how much is done and how much there is to do, while captions are ranked.

    >>> found = measure(Captioned(["a red circle", "a dog"], [["a circle"], ["one dog"]]))
    >>> found.scores["mean_length"], found.not_measured["clip_score"].reason
    (2.5, 'no CLIP was given')
    """
    scores: dict[str, float] = {}
    each: dict[str, list[float]] = {}
    without: dict[str, NotMeasured] = {}
    for name, metric in METRICS.items():
        found = metric.measure(captioned, progress)
        if isinstance(found, NotMeasured):
            without[name] = found
            continue
        scores.update(found.scores)
        each.update(found.each)
    return Measured(scores, each, without)


_NO_CLIP = NotMeasured("no CLIP was given", "pass --clip, a run of fastcap train --model clip or a transformers CLIP")


def _retrieval(captioned: Captioned, progress: Progress | None) -> Found | NotMeasured:
    if captioned.embedded is None:
        return _NO_CLIP
    found = retrieve(captioned.embedded.text, captioned.embedded.image, progress=progress)
    each = {"t2i_rank": found.text_to_image.rank().tolist(), "i2t_rank": found.image_to_text.rank().tolist()}
    return Found(summary(found), each)


def _clip_score(captioned: Captioned, progress: Progress | None) -> Found | NotMeasured:
    if captioned.embedded is None:
        return _NO_CLIP
    found = clip_score(captioned.embedded.text, captioned.embedded.image)
    return Found({"clip_score": float(found.mean())}, {"clip_score": found.tolist()})


def _ref_clip_score(captioned: Captioned, progress: Progress | None) -> Found | NotMeasured:
    if captioned.embedded is None:
        return _NO_CLIP
    counts = [len(references) for references in captioned.references]
    if 0 in counts:
        return NotMeasured(f"image {counts.index(0)} has no reference", "give every image a reference caption")
    text, image, reference = captioned.embedded
    of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(text.device)
    found = ref_clip_score(text, image, reference, of)
    return Found({"ref_clip_score": float(found.mean())}, {"ref_clip_score": found.tolist()})


def _diversity(captioned: Captioned, progress: Progress | None) -> Found:
    return Found(diversity(captioned.captions), {"length": [len(words(caption)) for caption in captioned.captions]})


def _facts(captioned: Captioned, progress: Progress | None) -> Found | NotMeasured:
    if captioned.facts is None:
        return NotMeasured("the data hold no facts", "evaluate on scenes: fastcap data scenes")
    return Found(score_captions(captioned.captions, captioned.facts, KS))


def _ranks(prefix: str, group: str) -> tuple[Column, ...]:
    recalls = tuple(Column(f"{prefix}_r{k}", group, f"R@{k}", "{:.3f}") for k in KS)
    mean = Column(f"{prefix}_mean_rank", group, "mean rank", "{:.1f}")
    return (*recalls, mean, Column(f"{prefix}_median_rank", group, "median rank", "{:.1f}"))


_TO_IMAGE, _TO_CAPTION, _CLIP, _TRUE, _SAID = "caption to image", "image to caption", "CLIP", "facts of scenes", "captions"
METRICS: dict[str, Metric] = {
    "retrieval": Metric((*_ranks("t2i", _TO_IMAGE), *_ranks("i2t", _TO_CAPTION)), _retrieval),
    "clip_score": Metric((Column("clip_score", _CLIP, "CLIPScore", "{:.3f}"),), _clip_score),
    "ref_clip_score": Metric((Column("ref_clip_score", _CLIP, "RefCLIPScore", "{:.3f}"),), _ref_clip_score),
    "facts": Metric(
        (
            Column("fact_precision", _TRUE, "precision", "{:.3f}"),
            Column("fact_recall", _TRUE, "recall", "{:.3f}"),
            Column("oracle_r1", _TRUE, "oracle R@1", "{:.3f}"),
        ),
        _facts,
    ),
    "diversity": Metric(
        (
            Column("mean_length", _SAID, "words", "{:.1f}"),
            Column("unique_share", _SAID, "unique", "{:.1%}"),
            Column("vocabulary", _SAID, "vocabulary", "{:.0f}"),
            Column("distinct_1", _SAID, "distinct-1", "{:.3f}"),
            Column("distinct_2", _SAID, "distinct-2", "{:.3f}"),
        ),
        _diversity,
    ),
}
