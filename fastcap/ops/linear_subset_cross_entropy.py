"""Softmax cross-entropy over a subset of the vocabulary, fused with the language-model head: the logits never exist.

The story, top to bottom: what is computed (`reference`, plain torch), the operators, the autograd.Function, and the public
function. `_head.py` holds the matrix products and the plans between which they choose; docs/math/linear_subset_cross_entropy.md
the maths, the gradients and the costs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcap.errors import bad
from fastcap.ops import _backend, _checks, _subset
from fastcap.ops._subset import Options

OP = "linear_subset_cross_entropy"
GRAD_WEIGHTS = ("dense", "sparse", "accumulate")
DEFAULT_BUDGET = 256 << 20


class _AsGradWeight(torch.autograd.Function):
    """The weight itself; its gradient comes back row-sparse, or is added into the parameter and does not come back."""

    @staticmethod
    def forward(ctx, linear_weight, grad_weight):
        ctx.linear_weight, ctx.grad_weight = linear_weight, grad_weight
        return linear_weight.view_as(linear_weight)

    @staticmethod
    def backward(ctx, dweight):
        if ctx.grad_weight == "sparse":
            return dweight.to_sparse(1), None
        into = accumulator(ctx.linear_weight)
        into += dweight.to(into.dtype)
        return None, None


def accumulator(linear_weight: Tensor) -> Tensor:
    """Where "accumulate" adds: the parameter's `main_grad` if it carries one, else its `.grad`, made if it is None."""
    main_grad = getattr(linear_weight, "main_grad", None)
    if main_grad is not None:
        return main_grad
    if linear_weight.grad is None:
        linear_weight.grad = torch.zeros_like(linear_weight)
    return linear_weight.grad


def reference(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    ids: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    grad_weight: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """The logits, and the masked formulation on them, in plain torch, on any device. O(B T V) memory."""
    if grad_weight != "dense" and linear_weight.requires_grad and torch.is_grad_enabled():
        linear_weight = _AsGradWeight.apply(linear_weight, grad_weight)
    logits = F.linear(input, linear_weight, linear_bias)
    return _subset.masked_loss(logits, target, ids, weight, token_weight, options).to(out_dtype)


# Public function -------------------------------------------------------------------------------------------------------


def linear_subset_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    subset: str | Tensor = "caption",
    first_token: str = "full",
    mle_weight: float = 0.0,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    num_random: int = 10,
    seed: int | None = None,
    reduction: str = "mean",
    grad_weight: str = "dense",
    memory_budget: int | None = None,
) -> Tensor:
    """`subset_cross_entropy` of the logits `input @ linear_weight.T + linear_bias`, which are never made whole."""
    _checks.check_tensor(OP, "input", input, "pass the hidden states before the head")
    _checks.check_dtype(OP, "input", input, _checks.FLOATS, "convert the hidden states")
    _checks.check_tensor(OP, "linear_weight", linear_weight, "pass the head's weight, head.weight")
    flat = input.dim() == 2
    if flat:
        input, target, token_weight = (x.unsqueeze(0) if isinstance(x, Tensor) else x for x in (input, target, token_weight))
    if input.dim() != 3 or input.shape[2] < 1:
        raise bad(
            OP, "input", "have shape [B, T, H] or [N, H], H >= 1", list(input.shape), "pass hidden states, features last"
        )
    V = linear_weight.shape[0]
    ids, weight, token_weight, options = _subset.prepare(
        OP, input, target, V, subset=subset, first_token=first_token, mle_weight=mle_weight, weight=weight,
        token_weight=token_weight, ignore_index=ignore_index, label_smoothing=label_smoothing, logit_softcap=logit_softcap,
        z_loss=z_loss, num_random=num_random, seed=seed, reduction=reduction,
    )  # fmt: skip
    _subset.check_values(OP, target, ids, V, options)
    out = reference(input, linear_weight, linear_bias, target, ids, weight, token_weight, options, grad_weight, input.dtype)
    return out.squeeze(0) if flat and reduction == "none" else out
