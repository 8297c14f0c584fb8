"""The loss of a run: its objective, through the model's head."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastcap.functional import linear_subset_cross_entropy
from fastcap.objectives import OBJECTIVES

from .config import TrainConfig

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, T, V], target [B, T] with -100 where there is no word) -> the mean over valid tokens, a scalar."""


def make_loss(config: TrainConfig, head: nn.Linear) -> LossFunction:
    """The loss of a run: `loss(hidden [B, T, H], target)`, fused with `head`, the layer that would make logits [B * T, V].

    "smile" needs the whole vocabulary for the first words alone, [B, V]; "mle", "smile+mle" and "resmile" need it for every
    word. The gradient of the logits so needed is kept from the forward to the backward where it fits
    `config.memory_budget`, else logits are made in blocks. (The reference backend, plain torch, makes them all.)

    Label smoothing is part of MLE alone (`recipes.complete` refuses it elsewhere), so a mixture is one pass over the
    vocabulary.
    """
    options = dict(OBJECTIVES[config.objective])
    if config.objective == "mle":
        options["label_smoothing"] = config.label_smoothing or 0.0
    if config.objective == "smile+mle" and config.mle_weight is not None:
        options["mle_weight"] = config.mle_weight
    options["memory_budget"] = int(config.memory_budget * 2**20)

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return linear_subset_cross_entropy(hidden, head.weight, target, linear_bias=head.bias, **options)

    return loss
