"""What attention adds to the loss of a step: the doubly stochastic penalty, and the estimator of hard attention.

Both are for a part of a step's captions, divided by numbers of the whole step, so that the parts of a step add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.functional import attention_coverage, attention_coverage_from_scores

REINFORCE, ENTROPY = 0.1, 0.002  # the weights of Show, Attend and Tell
BASELINE = 0.9  # what the moving baseline keeps at each step


def hard_attention_loss(
    losses: Tensor,
    log_probs: Tensor,
    entropy: Tensor,
    lengths: Tensor,
    baseline: Tensor,
    tokens: int,
    *,
    reinforce: float = REINFORCE,
    entropy_weight: float = ENTROPY,
) -> Tensor:
    """What is added to the cross-entropy `losses.sum() / tokens`, so that its gradient reaches where the model looked.

    Equivalent to::

        surplus = losses.sum(1).detach() - baseline * lengths                  # of each caption
        (reinforce * (surplus * log_probs.sum(1)).sum() - entropy_weight * entropy.sum()) / tokens

    With `reinforce=1`, `entropy_weight=0` and every location sampled, the gradient of the sum is in expectation that of the
    expected cross-entropy (REINFORCE), whatever the baseline, which only lowers its variance. The paper's weights trade that
    for less noise. The baseline is of a token, for the captions of a batch differ in length: against one number for all of
    them the surplus would tell how long a caption is (std 7.4 nats on scenes, 1.6 so).

    Args:
        losses: [B, T], of each token; zero where there is none.
        log_probs, entropy: [B, T], of `Decoded`.
        lengths: [B], the tokens of each caption.
        baseline: [], about what a token costs.
        tokens: of all captions of the step.
    """
    surplus = losses.detach().sum(1) - baseline * lengths.to(losses.device, losses.dtype, non_blocking=True)
    estimate = (surplus * log_probs.sum(1)).sum()
    return (reinforce * estimate - entropy_weight * entropy.sum()) / tokens


def update_baseline(baseline: Tensor, cost: Tensor) -> None:
    """Moves the baseline, in place, towards the mean `cost` of the tokens of a step."""
    baseline.mul_(BASELINE).add_(cost.to(baseline.dtype), alpha=1 - BASELINE)


def coverage_penalty(
    alphas: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    *,
    captions: int,
    locations: Tensor | None = None,
    target: str = "1",
    reduction: str = "mean",
) -> Tensor:
    """The doubly stochastic penalty R_b = sum_l (target - sum_t alpha_btl)^2 of some captions of a step, reduced.

    Args:
        alphas: [B, T, L], zero at steps that do not count.
        lengths: [B], the steps that count.
        mask: [B, L] bool, False for locations that do not count; None: all do.
        captions: of the whole step.
        locations: [], how many count in the whole step, where there is a mask.
        target: "length" for the steps of a caption over its locations, or a number.
        reduction: of the whole step: "mean" over captions and locations, "batchmean" over captions, "sum", or "theano", the
            sum over captions of the mean over locations, as the original code has it.
    """
    L = alphas.shape[2]
    tau = _target(target, lengths, mask, L, alphas)
    if mask is None:
        divisor = {"mean": captions * L, "batchmean": captions, "sum": 1, "theano": L}[reduction]
        return attention_coverage(alphas, target=tau, reduction="sum") / divisor
    return _reduced(attention_coverage(alphas, target=tau, reduction="none"), mask, captions, locations, reduction)


def coverage_penalty_of_heads(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    *,
    captions: int,
    locations: Tensor | None = None,
    target: str = "1",
    reduction: str = "mean",
) -> Tensor:
    """`coverage_penalty` of scaled dot-product attention, the mean over its heads; no attention weights are kept.

    Args:
        query, key: [B, heads, T, E] and [B, heads, L, E], projected.
        lengths, mask, captions, locations, target, reduction: as there.
    """
    L = key.shape[2]
    options = {"key_mask": mask, "lengths": lengths, "target": _target(target, lengths, mask, L, query), "reduction": "none"}
    penalty = attention_coverage_from_scores(query, key, **options).mean(1)
    if mask is None:
        mask, locations = torch.ones_like(penalty, dtype=torch.bool), captions * L
    return _reduced(penalty, mask, captions, locations, reduction)


def _target(target: str, lengths: Tensor, mask: Tensor | None, L: int, like: Tensor) -> float | Tensor:
    """tau, or [B]: a caption's steps over its locations."""
    if target != "length":
        return float(target)
    counted = L if mask is None else mask.sum(1).clamp(min=1)
    return lengths.to(like.device, torch.promote_types(like.dtype, torch.float32), non_blocking=True) / counted


def _reduced(penalty: Tensor, mask: Tensor, captions: int, locations: Tensor | int | None, reduction: str) -> Tensor:
    """Of the penalties [B, L] of locations, those that mask [B, L] says count."""
    residuals = penalty.masked_fill(~mask, 0).sum(1)
    if reduction == "theano":
        return (residuals / mask.sum(1).clamp(min=1)).sum()
    return residuals.sum() / {"mean": locations, "batchmean": captions, "sum": 1}[reduction]
