"""Document frequencies as plain arrays: what files hold, and what passes between Python and C++."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad

OP = "rewards.CiderD"


class Table(NamedTuple):
    """Document frequencies as a tree of n-grams: n-gram i is n-gram `parent[i]` (-1: none), which stands before it, with
    word `word[i]` behind, and is in `count[i]` images (0: only a part of others). Words are UTF-8 in `text`, word j ends at
    `ends[j]`, or where `text` is empty the ids themselves, in `ends`."""

    text: Tensor
    ends: Tensor
    is_ids: Tensor
    parent: Tensor
    word: Tensor
    count: Tensor

    @classmethod
    def of_scorer(cls, scorer: Any) -> Table:
        words, text, grams = scorer.table_sizes()
        made = cls(
            torch.empty(text, dtype=torch.uint8),
            torch.empty(words, dtype=torch.int64),
            torch.empty(1, dtype=torch.int64),
            *(torch.empty(grams, dtype=torch.int64) for _ in range(3)),
        )
        scorer.write_table(*made)
        return made

    @classmethod
    def of_counts(cls, frequencies: Mapping[tuple, int], n: int) -> Table:
        remedy = "pass n-grams as tuples of words, or of ids, with how many images have them"
        place: dict[Any, int] = {}
        words: dict[Any, int] = {}
        parent, word, count = [], [], []
        for gram, images in frequencies.items():
            sound = isinstance(gram, tuple) and gram and (all_are(gram, str) or all(map(_is_id, gram)))
            if not sound or isinstance(gram[0], str) != isinstance(next(iter(words), gram[0]), str):
                raise bad(OP, "frequencies", "have n-grams of words, or all of ids, as keys", gram, remedy)
            if isinstance(images, bool) or not isinstance(images, (int, float)) or not 0 <= images < 2**63 or images % 1:
                raise bad(OP, f"frequencies[{gram!r}]", "be a count", images, remedy)
            if len(gram) > n:
                continue
            for k in range(1, len(gram) + 1):
                if gram[:k] not in place:
                    place[gram[:k]] = len(parent)
                    parent.append(place[gram[: k - 1]] if k > 1 else -1)
                    word.append(words.setdefault(gram[k - 1], len(words)))
                    count.append(0)
            count[place[gram]] = int(images)
        is_ids = not isinstance(next(iter(words), ""), str)
        return cls.of_lists(list(words), is_ids, parent, word, count)

    @classmethod
    def of_lists(cls, words: list, is_ids: bool, parent: list[int], word: list[int], count: list[int]) -> Table:
        if is_ids:
            text, ends = b"", list(words)
        else:
            encoded = [each.encode("utf-8", "surrogatepass") for each in words]
            text, ends = b"".join(encoded), torch.tensor([len(each) for each in encoded]).cumsum(0).tolist()
        made = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        columns = (torch.tensor(column, dtype=torch.int64) for column in (ends, [int(is_ids)], parent, word, count))
        return cls(made, *columns)

    def check(self) -> None:
        """Raises ValueError for what no scorer wrote."""
        wanted = (torch.uint8, *[torch.int64] * 5)
        if any(x.dtype != dtype or x.dim() != 1 for x, dtype in zip(self, wanted, strict=True)) or len(self.is_ids) != 1:
            raise ValueError("arrays of other types")
        grams, ends = len(self.parent), self.ends
        if not grams == len(self.word) == len(self.count):
            raise ValueError("columns of different lengths")
        if grams and (
            bool((self.parent >= torch.arange(grams)).any() or (self.parent < -1).any())
            or bool((self.word < 0).any() or (self.word >= len(ends)).any())
            or bool((self.count < 0).any())
        ):
            raise ValueError("an n-gram that leads nowhere")
        if len(((self.parent + 1) * max(1, len(ends)) + self.word).unique()) < grams:
            raise ValueError("an n-gram twice")
        if not int(self.is_ids):
            steps = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
            if bool((steps < 0).any()) or (int(ends[-1]) if len(ends) else 0) != len(self.text):
                raise ValueError("words that end nowhere")
        if len({*self.words()}) < len(ends):
            raise ValueError("a word twice")

    def words(self) -> list:
        if int(self.is_ids):
            return self.ends.tolist()
        text, ends = bytes(self.text.tolist()), self.ends.tolist()
        return [text[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends, strict=False)]


def all_are(values: Iterable, kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63
