"""How varied captions are: a model that has learnt only the common caption says it of every image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastcap.data.text import words
from fastcap.errors import bad
from fastcap.eval._ngrams import Corpus, counted
from fastcap.eval.coco_scores import N, bleu_of


def diversity(captions: Sequence[str]) -> dict[str, float]:
    """Length and variety of one caption per image; words as `fastcap.data.words` cuts them.

    Returned: `mean_length` (words), `unique_share` (distinct captions / captions), `vocabulary` (distinct words),
    `distinct_1` and `distinct_2` (distinct words and pairs of neighbours / all of them, over all captions together; 0.0
    where there are none). Raises FastcapError for an empty list or a caption that is no string.

    >>> diversity(["a red circle", "a red circle", "a square", "a"])["unique_share"]
    0.75
    """
    if isinstance(captions, str) or not len(captions):
        raise bad("eval.diversity", "captions", "be a list of at least one caption", captions, "pass one per image")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise bad("eval.diversity", f"captions[{i}]", "be a string", caption, "pass captions as text")
    cut = [tuple(words(caption)) for caption in captions]
    singles = [word for caption in cut for word in caption]
    pairs = [pair for caption in cut for pair in zip(caption, caption[1:], strict=False)]
    return {
        "mean_length": len(singles) / len(cut),
        "unique_share": len(set(cut)) / len(cut),
        "vocabulary": len(set(singles)),
        "distinct_1": len(set(singles)) / len(singles) if singles else 0.0,
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0,
    }


def self_bleu(captions: Sequence[Sequence[str]]) -> np.ndarray:
    """BLEU-4 of each caption with all the other captions of the set as its references: how much of it others say too.

    Equivalent to, for caption i, the `Bleu` of pycocoevalcap on one image whose references are `captions[:i] +
    captions[i + 1:]`; found exactly, not from a sample, in the time it takes to sort the n-grams: of the counts of an
    n-gram only the highest and the second matter.

    Args:
        captions: N lists of words, N >= 2; equal captions count each.

    Returns:
        [N] float64 in [0, 1]; what is reported is the mean, 1 where all say the same.

    Raises:
        FastcapError: fewer than two captions, or one that is no list of words.

    Source: Zhu et al., Texygen (arXiv:1802.01886), section 3.2, with the BLEU of pycocoevalcap.

    >>> self_bleu([["a", "red", "car", "stops"], ["a", "red", "car", "stops"], ["two", "dogs"]]).round(3).tolist()
    [1.0, 1.0, 0.0]
    """
    if isinstance(captions, str) or len(captions) < 2:
        got = captions if isinstance(captions, str) else len(captions)
        raise bad("eval.self_bleu", "captions", "be a list of at least two captions", got, "pass lists of words")
    for i, caption in enumerate(captions):
        if isinstance(caption, str) or not all(isinstance(word, str) for word in caption):
            raise bad("eval.self_bleu", f"captions[{i}]", "be a list of words", caption, "pass ptb_tokenize(captions)")
    corpus = Corpus(captions)
    made = np.zeros((len(captions), 2 * N + 2))
    for k, (ids, of) in enumerate(corpus.grams(N), 1):
        made[:, k - 1] = _clipped_by_others(ids, of, len(captions))
        made[:, N + k - 1] = np.maximum(corpus.lengths - k + 1, 0)
    made[:, -2], made[:, -1] = corpus.lengths, _closest_other(corpus.lengths)
    return bleu_of(made)[f"bleu_{N}"]


def _clipped_by_others(ids: np.ndarray, of: np.ndarray, captions: int) -> np.ndarray:
    """[N]: n-grams of each caption, each at most as often as in the other caption that has it most often."""
    if not len(ids):
        return np.zeros(captions)
    key, times = counted(ids * captions + of)
    gram, caption = key // captions, key % captions
    order = np.lexsort((-times, gram))
    gram, caption, times = gram[order], caption[order], times[order]
    first = np.flatnonzero(np.diff(gram, prepend=-1))
    place = np.searchsorted(first, np.arange(len(gram)), side="right") - 1  # of each row's n-gram
    second = np.minimum(first + 1, len(gram) - 1)
    of_second = np.where((second > first) & (gram[second] == gram[first]), times[second], 0)
    most = np.where(np.arange(len(gram)) == first[place], of_second[place], times[first][place])
    return np.bincount(caption, weights=np.minimum(times, most), minlength=captions)


def _closest_other(lengths: np.ndarray) -> np.ndarray:
    """[N]: of the lengths of the other captions the closest, of two the shorter."""
    distinct, which, count = np.unique(lengths, return_inverse=True, return_counts=True)
    distance = np.abs(distinct[:, None] - distinct) * (int(distinct[-1]) + 1) + distinct
    alone = count == 1
    distance[alone, np.flatnonzero(alone)] = np.iinfo(np.int64).max
    return distinct[distance.argmin(1)][which]
