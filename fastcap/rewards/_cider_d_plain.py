"""CIDEr-D in plain Python: what runs without the extension, and the oracle of csrc/cider_d."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcap.errors import bad

from ._cider_d_table import OP, Table, all_are


class Plain:
    """The scorer in plain Python: what csrc/cider_d does, and its oracle."""

    def __init__(self, documents: Sequence, n: int, sigma: float, threads: int) -> None:
        self._n, self._sigma, self._is_ids = n, sigma, None
        self._df: Counter = Counter()
        counted = self._count("documents", documents)
        for captions in counted:
            self._df.update({gram for caption in captions for gram in caption})
        self._log_n = math.log(len(documents))
        self._total = len(documents)
        self._kept = self._weigh(counted)

    @classmethod
    def from_table(
        cls, text: Tensor, ends: Tensor, is_ids: Tensor, parent: Tensor, word: Tensor, count: Tensor, total: int, n: int,
        sigma: float,
    ) -> Plain:  # fmt: skip
        made = cls.__new__(cls)
        words = Table(text, ends, is_ids, parent, word, count).words()
        grams: list[tuple] = []
        for before, last in zip(parent.tolist(), word.tolist(), strict=True):
            grams.append((*(grams[before] if before >= 0 else ()), words[last]))
        made._n, made._sigma, made._total, made._log_n = n, sigma, total, math.log(total)
        made._is_ids = bool(is_ids) if len(words) else None
        made._df = Counter({gram: images for gram, images in zip(grams, count.tolist(), strict=True) if images})
        return made

    def documents(self) -> list:
        return self._kept

    def num_documents(self) -> int:
        return self._total

    def prepare(self, references: Sequence, threads: int) -> list:
        return self._weigh(self._count("references", references))

    def score(self, candidates: Sequence, prepared: list, rows: Tensor, out: Tensor, threads: int) -> None:
        weighed = [self._vector(self._grams("candidates", (c,), caption)) for c, caption in enumerate(candidates)]
        for c, row in enumerate(rows.tolist()):
            scores = [self._similarity(weighed[c], reference) for reference in prepared[row]]
            out[c] = 10 * sum(scores) / len(scores)

    def table_sizes(self) -> tuple[int, int, int]:
        self._table = Table.of_counts(self._df, self._n)
        return len(self._table.ends), len(self._table.text), len(self._table.parent)

    def write_table(self, *out: Tensor) -> None:
        table = self._table._replace(is_ids=torch.tensor([int(bool(self._is_ids))]))
        for mine, theirs in zip(table, out, strict=True):
            theirs.copy_(mine)

    def _count(self, name: str, documents: Sequence) -> list[list[Counter]]:
        made = []
        for d, captions in enumerate(documents):
            check_sequence(f"{name}[{d}]", captions)
            if not len(captions):
                raise bad(OP, f"{name}[{d}]", "have a caption", "none", "leave that image out")
            made.append([self._grams(name, (d, r), caption) for r, caption in enumerate(captions)])
        return made

    def _grams(self, name: str, at: tuple[int, ...], caption: Any) -> Counter:
        words = words_of(name, at, caption)
        if words:
            is_ids = not isinstance(words[0], str)
            if self._is_ids is None:
                self._is_ids = is_ids
            if self._is_ids != is_ids:
                kinds = ("words", "ids") if not self._is_ids else ("ids", "words")
                where = name + "".join(f"[{i}]" for i in at)
                raise bad(OP, where, f"be of {kinds[0]}, as the first caption", kinds[1], "tokenise all captions alike")
        return Counter(tuple(words[i : i + k]) for k in range(1, self._n + 1) for i in range(len(words) - k + 1))

    def _weigh(self, counted: list[list[Counter]]) -> list[list[tuple]]:
        return [[self._vector(grams) for grams in captions] for captions in counted]

    def _vector(self, grams: Counter) -> tuple[list[dict], list[float], int]:
        """For each length of n-grams their weights and the norm of these; and the pairs of neighbours."""
        weights: list[dict] = [{} for _ in range(self._n)]
        for gram, times in grams.items():
            weights[len(gram) - 1][gram] = times * (self._log_n - math.log(max(1, self._df.get(gram, 0))))
        norms = [math.sqrt(sum(weight * weight for weight in each.values())) for each in weights]
        return weights, norms, sum(times for gram, times in grams.items() if len(gram) == 2)

    def _similarity(self, candidate: tuple, reference: tuple) -> float:
        total = 0.0
        for mine, theirs, norm, other in zip(candidate[0], reference[0], candidate[1], reference[1], strict=True):
            if norm and other:
                shared = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in mine.items() if gram in theirs)
                total += shared / (norm * other)
        delta = candidate[2] - reference[2]
        return total / self._n * math.exp(-(delta**2) / (2 * self._sigma**2))


def words_of(name: str, at: tuple[int, ...], caption: Any, op: str = OP) -> list:
    """The words of a caption, or its ids."""
    if isinstance(caption, str):
        return caption.split()
    where = name + "".join(f"[{i}]" for i in at)
    try:
        words = None if isinstance(caption, (bytes, Mapping)) else list(caption)
    except TypeError:
        words = None
    if words is None:
        remedy = "pass strings, or lists of words or of ids"
        raise bad(op, where, "be a caption", type(caption).__name__, remedy)
    if all_are(words, str):
        return words
    try:
        return [_index(word) for word in words]
    except (TypeError, OverflowError):
        remedy = "pass words as strings, or a tokenizer's ids as integers of 64 bits"
        got = ", ".join(sorted({type(word).__name__ for word in words}))
        raise bad(op, where, "hold words, or ids", got, remedy) from None


def _index(value: Any) -> int:
    found = operator.index(value)
    if not -(2**63) <= found < 2**63:
        raise OverflowError
    return found


def check_sequence(name: str, value: object, op: str = OP) -> None:
    """Raises unless `value` is a list of something, and no string and no mapping."""
    if isinstance(value, Mapping):
        raise bad(op, name, "be a list", "a mapping", f"pass list({name.split('[')[0]}.values()), in one order")
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        raise bad(op, name, "be a list", type(value).__name__, "pass a list of captions for each image")
