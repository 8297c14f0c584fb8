"""Where Show, Attend and Tell looks at each word of a caption: soft, hard or mean attention over the steps of a batch.

Each class is called once a step with the LSTM's state h [n, H] of the first n captions, and returns (context [n, D],
alpha [n, L]).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Query = Callable[[Tensor], Tensor]
"""The projection of the state, h [n, H] -> query [n, A]."""


class Soft:
    """The context is the mean of all locations under alpha, through which the gradient flows.

    `attend` is what `fastcap.functional.additive_attention_steps` returns, or another function of the query [n, A].
    """

    def __init__(self, attend: Any, query: Query) -> None:
        self._attend, self._query = attend, query

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self._attend(self._query(h))


class Hard:
    """The context of a caption whose coin fell on hard is the annotation of one location, sampled from alpha at each step.

    The gradient cannot pass through the sample: it comes from `log_probs`, by REINFORCE. Captions whose coin fell on soft
    use alpha itself, which lowers the variance of that gradient.

    Args:
        attend: what `additive_attention_steps` returns.
        query: as of `Soft`.
        hard: [N, 1] bool, the coins, of each row of each step.
        rows: how many of the N belong to each step.
    """

    def __init__(self, attend: Any, query: Query, hard: Tensor, rows: list[int]) -> None:
        self._attend, self._query, self._hard = attend, query, hard
        self._coins = iter(hard.split(rows))
        self._uniform = iter(torch.rand(len(hard), 1, device=hard.device).split(rows))
        self._places: list[Tensor] = []

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._attend.weights(self._query(h))
        place, one_hot = sample(alpha.detach(), next(self._uniform))
        self._places.append(place)
        return self._attend.context(torch.where(next(self._coins), one_hot, alpha)), alpha

    def log_probs(self, alphas: Tensor) -> Tensor:
        """log alpha [N] of the samples, 0 where the coin fell on soft; alphas [N, L] are those of all steps so far."""
        p = alphas.gather(1, torch.cat(self._places))
        sampled = self._hard & (p > 0)  # an image without a location has no sample
        return torch.where(sampled, p, 1.0).log().squeeze(1)


class Mean:
    """All locations count alike at every step: what attention is worth is what a model with it does better.

    Args:
        context: [B, D], the mean of the annotations.
        alpha: [B, L], the weights, all alike.
    """

    def __init__(self, context: Tensor, alpha: Tensor) -> None:
        self._context, self._alpha = context, alpha

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self._context[: len(h)], self._alpha[: len(h)]


def sample(alpha: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One location of each row of alpha [n, L], by the inverse of its distribution function at `uniform` [n, 1] in [0, 1).

    Returns (place [n, 1], the same as a row of zeros with a one [n, L]; all zeros where alpha is). No location of weight 0
    is taken, and nothing is read back from the device, as torch.multinomial does.
    """
    total = alpha.cumsum(1, dtype=torch.promote_types(alpha.dtype, torch.float32))
    place = (total <= uniform * total[:, -1:]).sum(1, keepdim=True).clamp_(max=alpha.shape[1] - 1)
    some = (alpha.gather(1, place) > 0).to(alpha.dtype)
    return place, torch.zeros_like(alpha).scatter_(1, place, some)


def entropy(alphas: Tensor) -> Tensor:
    """[N], of the rows of alphas [N, L], in nats; the gradient is finite at weights of 0."""
    return -(alphas * alphas.clamp(min=torch.finfo(alphas.dtype).tiny).log()).sum(1)


def uniform_weights(annotations: Tensor, mask: Tensor | None) -> Tensor:
    """[B, L], alike for the locations that count and 0 for the others."""
    B, L, _ = annotations.shape
    if mask is None:
        return annotations.new_full((), 1 / L).expand(B, L)
    return mask.to(annotations.dtype) / mask.sum(1, keepdim=True).clamp(min=1)


def mean_annotation(annotations: Tensor, mask: Tensor | None) -> Tensor:
    """[B, D], the mean of the locations that count; zeros where none does."""
    if mask is None:
        return annotations.mean(1)
    return annotations.masked_fill(~mask.unsqueeze(2), 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
