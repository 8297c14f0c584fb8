"""What the operations' autograd functions share."""

from __future__ import annotations

import torch
from torch import Tensor


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, op, remedy, *of):
        ctx.op, ctx.remedy = op, remedy
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            f"fastcap.{ctx.op}: the gradient must not be differentiated again, got a double backward; {ctx.remedy}"
        )


_REMEDY = "use `with fastcap.backend('reference'):`, which supports it"


def once(op: str, gradient: Tensor, *of: Tensor | None, remedy: str = _REMEDY) -> Tensor:
    """`gradient`, made to raise a clear error if it is differentiated (only under create_graph=True is grad mode on here).

    of: what it is a function of and is linked to the graph: the upstream gradient, saved inputs, or a saved output. Without
    such a link autograd would take the gradient for a constant on every path that matters, and be silently wrong; as does
    torch's once_differentiable where the upstream gradient needs none.
    """
    if not torch.is_grad_enabled():
        return gradient
    return _NoDoubleBackward.apply(gradient.detach(), op, remedy, *(x for x in of if x is not None and x.requires_grad))
