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
        if is_asked_for(ctx.linear_weight):
            into = accumulator(ctx.linear_weight)
            into += dweight.to(into.dtype)
        return None, None


def is_asked_for(parameter: Tensor) -> bool:
    """Whether the backward that runs is to reach `parameter`: autograd.grad and backward(inputs=...) may leave it out."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:  # torch.autograd.grad of the parameter itself
        rule = "be 'dense' or 'sparse' for torch.autograd.grad of the weight"
        raise bad("linear_subset_cross_entropy", "grad_weight", rule, "accumulate", "or call backward()") from error


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
    if not fits or into.layout != torch.strided or into.dtype not in _checks.FLOATS or _overlaps(into):
        shape = list(linear_weight.shape)
        rule = f"carry a {name} of its shape, {shape}, dense, of memory of its own, float16 to float64, on its device"
        got = f"{list(into.shape)}, {into.layout}, {into.dtype} on {into.device}" if isinstance(into, Tensor) else into
        raise bad(op, "linear_weight", rule, got, f"set it to None or to torch.zeros_like of the weight (its {name})")


def _overlaps(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
