"""Confidence intervals by bootstrap over images, and the difference of two captioners on the same images.

A resample draws N of the N images with replacement; what a metric needs of it are the counts, how often each image was
drawn. So no caption is scored twice: sums over images are one product of the counts [R, N] with numbers of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastcap.errors import bad
from fastcap.eval.captioned import Found, Resampled

if TYPE_CHECKING:
    from fastcap.eval.metrics import Measured

LEVEL = 0.95
_BLOCK = 4_000_000  # counts at a time, 32 MB


@dataclass(frozen=True)
class Draws:
    """The images of R resamples: the same ones for equal numbers of images and equal seeds."""

    images: int
    resamples: int
    seed: int

    def scores(self, resampled: Resampled) -> dict[str, np.ndarray]:
        """`resampled` of all counts, by blocks of resamples: [R] by name."""
        rng = np.random.default_rng(self.seed)
        found: dict[str, list[np.ndarray]] = {}
        at_once = max(1, _BLOCK // self.images)
        for first in range(0, self.resamples, at_once):
            R = min(at_once, self.resamples - first)
            drawn = rng.integers(self.images, size=(R, self.images)) + np.arange(R)[:, None] * self.images
            counts = np.bincount(drawn.ravel(), minlength=R * self.images).reshape(R, self.images).astype(float)
            for key, values in resampled(counts).items():
                found.setdefault(key, []).append(values)
        return {key: np.concatenate(values) for key, values in found.items()}


def means(each: Mapping[str, np.ndarray]) -> Resampled:
    """The resampled means of numbers of the images, [N] each."""
    values = np.stack([np.asarray(value, float) for value in each.values()], 1)
    return lambda counts: dict(zip(each, (counts @ values).T / len(values), strict=True))


def medians(each: Mapping[str, np.ndarray]) -> Resampled:
    """The resampled medians; of an even number of images the mean of the two in the middle."""

    def resampled(counts: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for key, values in each.items():
            order = np.argsort(values, kind="stable")
            upto = counts[:, order].cumsum(1)
            # The value at place k, from 0, of a sorted resample: the first with more than k of them up to it.
            low, high = ((upto <= k).sum(1) for k in ((len(values) - 1) // 2, len(values) // 2))
            found[key] = (values[order][low] + values[order][high]) / 2
        return found

    return resampled


def mean_of(key: str, each: np.ndarray) -> Found:
    """A score that is the mean of its numbers of the images."""
    return Found({key: float(np.mean(each))}, {key: each.tolist()}, means({key: each}))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled scores: the percentile interval."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class Difference(NamedTuple):
    """By how much the first captioner's score is higher, with its 95 % interval: one that holds 0 shows no difference."""

    value: float
    low: float
    high: float


def paired_difference(first: Measured, second: Measured) -> dict[str, Difference]:
    """The differences of two captioners on the same images, which are much surer than their intervals side by side.

    Both are measured on the same resamples of the images, so what makes an image easy or hard for both cancels.

    Args:
        first, second: of `measure` with the same images in the same order, `bootstrap` and `seed`.

    Returns:
        `Difference` of each score that both have with an interval.

    Raises:
        FastcapError: measured without resamples, or with different ones.

    Source: the percentile bootstrap of paired differences; Koehn, Statistical Significance Tests for Machine Translation
    Evaluation (2004), for BLEU.

    >>> from fastcap.eval import Captioned, measure
    >>> references = [["a red circle"], ["a blue square"], ["a green star"]]
    >>> options = dict(metrics=["rouge_l"], bootstrap=100)
    >>> good = measure(Captioned(["a red circle", "a blue square", "a star"], references), **options)
    >>> poor = measure(Captioned(["a red circle", "a square", "a thing"], references), **options)
    >>> found = paired_difference(good, poor)["rouge_l"]
    >>> found.value > 0 and found.low >= 0
    True
    """
    op = "eval.paired_difference"
    for name, measured in (("first", first), ("second", second)):
        if measured.draws is None:
            raise bad(op, name, "have resamples", "none", "pass bootstrap=1000 to measure, and two images or more")
    if first.draws != second.draws:
        rule = f"have the resamples of first, {first.draws}"
        raise bad(op, "second", rule, second.draws, "measure both on the same images with one bootstrap and seed")
    found = {}
    for key in first.resampled:
        if key in second.resampled:
            low, high = interval(first.resampled[key] - second.resampled[key])
            found[key] = Difference(first.scores[key] - second.scores[key], low, high)
    return found


def of_sums(each: np.ndarray, make: Callable[[np.ndarray], dict[str, np.ndarray]]) -> Resampled:
    """Scores that follow from sums over images: `make` of the sums [R, S] of numbers of the images, each [N, S]."""
    return lambda counts: make(counts @ each)
