"""Several rewards of a caption as one: their weighted sum, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad

from .bleu import Bleu, Caption
from .cider_d import CiderD

_OP = "rewards.CombinedReward"
REWARDS = ("cider-d", "bleu-4", "similarity")


def parse_rewards(text: str, op: str = _OP) -> dict[str, float]:
    """Weights by name of a text such as "cider-d=1,bleu-4=0.5"; a name alone has weight 1.

    Args:
        text: names of `REWARDS`, separated by commas.
        op: who speaks in an error.

    Raises:
        FastcapError: an unknown name, one that stands twice, none, or a weight that is not above 0 and finite.

    >>> parse_rewards("cider-d, similarity=0.2")
    {'cider-d': 1.0, 'similarity': 0.2}
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in REWARDS:
            rule = f"name rewards among {', '.join(map(repr, REWARDS))}"
            raise bad(op, "rewards", rule, part.strip() or text, "pass for example cider-d=1,bleu-4=0.5")
        if name in weights:
            raise bad(op, "rewards", f"name {name!r} once", text, "add its weights up")
        try:
            weight = float(value) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise bad(op, "rewards", "have weights above 0 and finite", part.strip(), f"pass {name}=1, or leave it out")
        weights[name] = weight
    return weights


class Combined(NamedTuple):
    """total [C], the weighted sum, and by name the rewards [C] that it is of, not weighted; float64 on the CPU."""

    total: Tensor
    parts: dict[str, Tensor]


class CombinedReward:
    """The weighted sum of what captions earn by name: "cider-d", in [0, 10]; "bleu-4", in [0, 1]; "similarity", a cosine.

    Captions are words or a tokenizer's ids, candidates and references alike. For training by reinforcement let both end with
    the token of the end: what is not compared is not learnt, and without it captions learn to stop in mid-sentence (Hu,
    Cavicchioli and Capotondi, arXiv:2305.12254).

    `cider` is the scorer of "cider-d", None where that has no weight.

    Args:
        weights: by name, as `parse_rewards` gives them.
        references: for each image the list of its captions.
        cider: in place of document frequencies from these references.

    Raises:
        FastcapError: a weight or a name that `parse_rewards` refuses, or references that `CiderD` refuses.

    >>> reward = CombinedReward({"cider-d": 1.0, "bleu-4": 2.0}, [["a red bus ."], ["a cat on a mat .", "a cat sits ."]])
    >>> reward(["a red bus ."], [0]).total
    tensor([12.0000], dtype=torch.float64)
    """

    def __init__(
        self, weights: Mapping[str, float], references: Sequence[Sequence[Caption]], cider: CiderD | None = None
    ) -> None:
        self.weights = parse_rewards(",".join(f"{name}={weight}" for name, weight in weights.items()))
        self._references, self._bleu, self.cider, self._prepared = references, Bleu(4), None, None
        if "cider-d" in self.weights:
            self.cider = cider or CiderD(references)
            self._prepared = None if cider is None else cider.prepare(references)

    def __call__(self, candidates: Sequence[Caption], rows: Tensor, *, similarity: Tensor | None = None) -> Combined:
        """What each of C captions earns.

        Args:
            candidates: C captions.
            rows: [C] int64, the entry of `references` that each describes.
            similarity: [C], of each caption and its image, where it is among the rewards.
        """
        if ("similarity" in self.weights) != (similarity is not None):
            rule = "be given where it has a weight" if similarity is None else "be left out where it has no weight"
            got = None if similarity is None else list(similarity.shape)
            raise bad(_OP, "similarity", rule, got, "see fastcap.rewards.SimilarityReward")
        parts = {}
        for name in self.weights:
            if name == "cider-d":
                parts[name] = self.cider(candidates, self._prepared, rows)
            elif name == "bleu-4":
                parts[name] = self._bleu(candidates, self._references, rows)
            else:
                parts[name] = similarity.detach().double().cpu()
        total = torch.zeros(len(candidates), dtype=torch.float64)
        for name, weight in self.weights.items():
            total = total + weight * parts[name]
        return Combined(total, parts)
