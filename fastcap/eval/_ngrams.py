"""n-grams as integers: counting them is then sorting, in numpy, and no Python object is made for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Corpus:
    """Captions as word numbers, one after the other, each word a number of its own.

    words [S]: the word at each place of all captions; of [S]: its caption; left [S]: how many words its caption has from
    there on; lengths [C]: words of each caption.
    """

    def __init__(self, captions: Sequence[Sequence[str]]) -> None:
        number: dict[str, int] = {}
        flat = [number.setdefault(word, len(number)) for caption in captions for word in caption]
        self.words = np.array(flat, np.int64)
        self.lengths = np.array([len(caption) for caption in captions], np.int64)
        self.of = np.repeat(np.arange(len(captions)), self.lengths)
        ends = np.cumsum(self.lengths)
        self.left = ends[self.of] - np.arange(len(flat))

    def grams(self, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For k = 1 .. n the k-grams [M] as numbers, equal for equal k-grams and dense from 0, and the caption of each."""
        found = []
        ids, places = self.words, np.arange(len(self.words))
        for k in range(1, n + 1):
            if k > 1:  # a k-gram is the (k-1)-gram at its place and the word behind, renumbered so that pairs fit 64 bits
                kept = self.left[places] >= k
                places = places[kept]
                pairs = ids[kept] * (len(self.words) + 1) + self.words[places + k - 1]
                ids = np.unique(pairs, return_inverse=True)[1].reshape(-1)
            found.append((ids, self.of[places]))
        return found


def counted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers, ascending, and how often each stands there."""
    return np.unique(keys, return_counts=True)
