"""The objectives by name: each is one setting of `fastcap.functional.subset_cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .config import TrainConfig

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, T, V], target [B, T] with -100 where there is no word) -> the mean over valid tokens, a scalar."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "mle": {"subset": "full"},  # every word of the vocabulary competes
    "smile": {"subset": "caption"},  # only the words of the caption itself: rewards detail
    "smile+mle": {"subset": "caption"},  # with `mle_weight` of MLE: keeps rare wrong words down
    "resmile": {"subset": "reverse"},  # only the words that the caption does not hold: rewards brevity
}


def make_loss(config: TrainConfig) -> LossFunction:
    """The loss of a run, `loss(logits, target)`."""
    from fastcap.functional import subset_cross_entropy

    options = dict(OBJECTIVES[config.objective], label_smoothing=config.label_smoothing)
    if config.objective == "smile+mle":
        options["mle_weight"] = config.mle_weight

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return subset_cross_entropy(logits, target, **options)

    return loss
