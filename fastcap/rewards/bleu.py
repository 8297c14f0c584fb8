"""BLEU of single captions, as a reward: the share of their n-grams that people say of the image, of every length.

With m_k the k-grams of a caption, c_k those of them that stand in a reference, each counted at most as often as in the
reference that has it most often, l the words of the caption and r those of the reference closest in length,

    BLEU-n = (prod_{k <= n} c_k / m_k)^(1/n) min(1, exp(1 - r / l))

BLEU was made for whole corpora; of one caption it is 0 wherever no n-gram of the longest kind is right.

Source: Papineni, Roukos, Ward and Zhu, BLEU (ACL 2002), as the `Bleu` of pycocoevalcap computes it for each caption.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcap.errors import bad

from ._cider_d_plain import check_sequence, words_of

_OP = "rewards.Bleu"
_SMALL, _TINY = 1e-9, 1e-15  # pycocoevalcap's, which keep a division by 0 and a logarithm of 0 away

Caption = str | Sequence[str] | Sequence[int]


class Bleu:
    """BLEU-n of candidate captions against references, each caption on its own; no gradient.

    A caption is a string, cut at white space, or a sequence of words, or a sequence of a tokenizer's ids.

    Args:
        n: longest n-grams.

    Raises:
        FastcapError: n is below 1, or in a call, something that is no caption, a caption without references, or rows
            outside them.

    >>> Bleu(2)(["a red bus"], [["a red bus stops", "a bus"]])
    tensor([1.0000], dtype=torch.float64)
    """

    def __init__(self, n: int = 4) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise bad(_OP, "n", "be an integer of at least 1", n, "pass n=4, the published one")
        self.n = n

    def __call__(
        self,
        candidates: Sequence[Caption],
        references: Sequence[Sequence[Caption]],
        rows: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """[C] float64 in [0, 1].

        Args:
            candidates: C captions.
            references: for each image the list of its captions.
            rows: [C], the entry of `references` that each candidate describes; None: candidate i describes entry i.
        """
        check_sequence("candidates", candidates, _OP)
        check_sequence("references", references, _OP)
        rows = range(len(candidates)) if rows is None else _integers(rows)
        if len(rows) != len(candidates):
            raise bad(
                _OP, "rows", f"be one for each of the {len(candidates)} candidates", len(rows), "pass one entry for each"
            )
        counted: dict[int, tuple[list[int], Counter]] = {}
        scores = []
        for c, (row, candidate) in enumerate(zip(rows, candidates, strict=True)):
            if row not in counted:
                counted[row] = self._references(references, row)
            scores.append(self._score(words_of("candidates", (c,), candidate, _OP), *counted[row]))
        return torch.tensor(scores, dtype=torch.float64)

    def _references(self, references: Sequence[Sequence[Caption]], row: int) -> tuple[list[int], Counter]:
        """How long the references of an entry are, and how often an n-gram stands in one of them, at most."""
        if not 0 <= row < len(references):
            raise bad(_OP, "rows", f"lie in [0, {len(references)})", row, "pass references of each candidate")
        check_sequence(f"references[{row}]", references[row], _OP)
        captions = [words_of("references", (row, r), caption, _OP) for r, caption in enumerate(references[row])]
        if not captions:
            raise bad(_OP, f"references[{row}]", "have a caption", "none", "leave that image out")
        most: Counter = Counter()
        for caption in captions:
            most |= self._grams(caption)
        return [len(caption) for caption in captions], most

    def _grams(self, words: Sequence) -> Counter:
        return Counter(tuple(words[i : i + k]) for k in range(1, self.n + 1) for i in range(len(words) - k + 1))

    def _score(self, words: Sequence, lengths: list[int], most: Counter) -> float:
        right = [0] * self.n
        for gram, times in self._grams(words).items():
            right[len(gram) - 1] += min(times, most[gram])
        product = 1.0
        for k, count in enumerate(right, 1):
            product *= (count + _TINY) / (max(0, len(words) - k + 1) + _SMALL)
        closest = min((abs(length - len(words)), length) for length in lengths)[1]
        ratio = (len(words) + _TINY) / (closest + _SMALL)
        return product ** (1 / self.n) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def _integers(rows: Sequence[int] | Tensor) -> list[int]:
    try:
        return [operator.index(row) for row in rows]
    except TypeError as error:
        raise bad(_OP, "rows", "be integers", type(rows).__name__, "pass a list or an int64 tensor") from error
