"""The loss of a run: its objective, through the model's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastcap.objectives import OBJECTIVES

from .config import TrainConfig

__all__ = ["OBJECTIVES", "LossFunction", "make_loss", "through_head"]

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, T, V], target [B, T] with -100 where there is no word) -> the mean over valid tokens, a scalar."""


def make_loss(config: TrainConfig, head: nn.Linear) -> LossFunction:
    """The loss of a run: `loss(hidden [B, T, H], target)`, where `head` makes the logits, which it never builds.

    Label smoothing is part of MLE alone (`TrainConfig` refuses it elsewhere), so a mixture is one pass over the vocabulary.
    """
    options = dict(OBJECTIVES[config.objective])
    if config.objective == "mle":
        options["label_smoothing"] = config.label_smoothing or 0.0
    if config.objective == "smile+mle":
        options["mle_weight"] = config.mle_weight
    return through_head(head, **options)


def through_head(head: nn.Linear, **options: Any) -> LossFunction:
    """`linear_subset_cross_entropy` with the weight and bias of `head`."""
    from fastcap.functional import linear_subset_cross_entropy

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return linear_subset_cross_entropy(hidden, head.weight, target, linear_bias=head.bias, **options)

    return loss
