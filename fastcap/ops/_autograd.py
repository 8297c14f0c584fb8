"""What the operations' autograd functions share."""

from __future__ import annotations

import torch


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, op):
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            f"fastcap.{ctx.op}: the gradient must not be differentiated again, got a double backward; "
            "use `with fastcap.backend('reference'):`, which supports it"
        )


def once(op: str, gradient: torch.Tensor) -> torch.Tensor:
    """`gradient`, made to raise a clear error if it is differentiated (only under create_graph=True is grad mode on here).

    torch's once_differentiable lets a gradient through as a constant when the upstream gradient needs none: silently wrong.
    """
    if not torch.is_grad_enabled():
        return gradient
    return _NoDoubleBackward.apply(gradient.detach().requires_grad_(), op)
