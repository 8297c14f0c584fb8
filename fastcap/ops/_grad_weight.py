"""How the gradient of a head's weight comes: dense, row-sparse, or added into the parameter in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _checks
from fastcap.ops._subset import Options

GRAD_WEIGHTS = ("dense", "sparse", "accumulate")


class AsGradWeight(torch.autograd.Function):
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


def check(op: str, linear_weight: Tensor, grad_weight: str, options: Options) -> None:
    """Raises where the gradient cannot come so."""
    _checks.check_choice(op, "grad_weight", grad_weight, GRAD_WEIGHTS, "pass grad_weight='dense'")
    if grad_weight == "dense":
        return
    if torch.compiler.is_compiling():
        remedy = "use 'dense' under torch.compile, or leave the loss outside"
        raise bad(op, "grad_weight", "be 'dense' under torch.compile", grad_weight, remedy)
    if grad_weight == "sparse" and options.is_dense:
        rule = "be 'dense' or 'accumulate' where a token uses the whole vocabulary"
        remedy = "pass first_token='subset' with mle_weight=0 and subset='caption', 'random' or ids"
        raise bad(op, "grad_weight", rule, grad_weight, remedy)
    if grad_weight == "accumulate" and linear_weight.requires_grad and not linear_weight.is_leaf:
        remedy = "pass the parameter itself, or grad_weight='dense'"
        raise bad(op, "linear_weight", "be a leaf for grad_weight='accumulate'", "the result of an operation", remedy)
    if grad_weight == "accumulate":
        _check_accumulator(op, linear_weight)


def _check_accumulator(op: str, linear_weight: Tensor) -> None:
    main_grad = getattr(linear_weight, "main_grad", None)
    name, into = (
        ("grad", linear_weight.grad if linear_weight.is_leaf else None) if main_grad is None else ("main_grad", main_grad)
    )
    if into is None:
        return
    fits = isinstance(into, Tensor) and into.shape == linear_weight.shape and into.device == linear_weight.device
    if not fits or into.layout != torch.strided or not into.is_floating_point():
        rule = f"carry a {name} of its shape, {list(linear_weight.shape)}, dense and floating, on its device"
        got = f"{list(into.shape)}, {into.layout}, {into.dtype} on {into.device}" if isinstance(into, Tensor) else into
        raise bad(op, "linear_weight", rule, got, f"set it to None or to torch.zeros_like of the weight (its {name})")
