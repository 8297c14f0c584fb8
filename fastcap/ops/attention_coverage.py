"""Attention coverage: the doubly stochastic penalty of Show, Attend and Tell, which asks that attention, summed over the
steps of a caption, reach every location.

The story, top to bottom: what is computed (`reference`, plain torch), the operators
`torch.ops.fastcap.attention_coverage_{fwd,bwd}` with their CPU, CUDA and Meta implementations, the autograd.Function, the
public function, and the conversion of its weight between the normalisations in use. The maths, the bytes and the table of
normalisations are in docs/math/attention_coverage.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _backend, _checks, _coverage, _dtypes, _native
from fastcap.ops._autograd import once

OP = "attention_coverage"


def reference(
    alpha: Tensor, valid: Tensor | None, target: float, tau: Tensor | None, reduction: str, out_dtype: torch.dtype
) -> Tensor:
    """The penalty in plain torch, on any device, differentiable any number of times."""
    if valid is not None:  # what does not count may hold anything, NaN too, and gets a gradient of 0
        invalid = ~valid.unsqueeze(-1)
        alpha = alpha.masked_fill(invalid if alpha.dim() == 3 else invalid.unsqueeze(1), 0.0)
    S = alpha.sum(-2, dtype=_dtypes.acc_of(alpha))
    return _coverage.penalty(S, target, tau, reduction).to(out_dtype)


# Operators -------------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastcap", "FRAGMENT")
_library.define(
    f"{OP}_fwd(Tensor alpha, Tensor? valid, Tensor? tau, float target, str reduction, bool need_grad, str backend) "
    "-> (Tensor out, Tensor residual)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"{OP}_bwd(Tensor grad_out, Tensor residual, Tensor? valid, ScalarType dtype, str reduction, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fwd_outputs(alpha: Tensor, reduction: str, need_grad: bool) -> tuple[Tensor, Tensor]:
    """out [] or [B, (heads,) L], and the residual tau - S [B, (heads,) L], empty where no gradient is wanted; unwritten."""
    acc = _dtypes.acc_of(alpha)
    sums = (*alpha.shape[:-2], alpha.shape[-1])
    return (
        alpha.new_empty(sums if reduction == "none" else (), dtype=acc),
        alpha.new_empty(sums if need_grad else (0,), dtype=acc),
    )


def _fwd(alpha, valid, tau, target, reduction, need_grad, backend):
    out, residual = _fwd_outputs(alpha, reduction, need_grad)
    _launcher(backend).attention_coverage_fwd(alpha, valid, tau, out, residual, target, reduction)
    return out, residual


def _fwd_meta(alpha, valid, tau, target, reduction, need_grad, backend):
    return _fwd_outputs(alpha, reduction, need_grad)


def _bwd_output(residual: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dalpha [B, (heads,) T, L], or one row for all steps, [B, (heads,) 1, L], where all count; unwritten."""
    steps = 1 if valid is None else valid.shape[1]
    return residual.new_empty((*residual.shape[:-1], steps, residual.shape[-1]), dtype=dtype)


def _bwd(grad_out, residual, valid, dtype, reduction, backend):
    dalpha = _bwd_output(residual, valid, dtype)
    _launcher(backend).attention_coverage_bwd(grad_out, residual, valid, dalpha, reduction)
    return dalpha


def _bwd_meta(grad_out, residual, valid, dtype, reduction, backend):
    return _bwd_output(residual, valid, dtype)


def _launcher(backend: str):
    """What runs a backend. Triton is reached here, inside a function, so that importing fastcap does not import it."""
    if backend == "triton":
        from fastcap.kernels import attention_coverage as triton_launcher

        return triton_launcher
    if backend not in ("cpp", "cuda"):
        raise bad(OP, "backend", "be 'cpp', 'triton' or 'cuda'", backend, "call the public function")
    return _native.CPU if backend == "cpp" else _native.CUDA


for _key in ("CPU", "CUDA"):
    _library.impl(f"{OP}_fwd", _fwd, _key)
    _library.impl(f"{OP}_bwd", _bwd, _key)
_library.impl(f"{OP}_fwd", _fwd_meta, "Meta")
_library.impl(f"{OP}_bwd", _bwd_meta, "Meta")


class _AttentionCoverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, alpha, valid, tau, options):
        target, reduction, backend, wanted = options
        need_grad = wanted and ctx.needs_input_grad[0]  # which says True under no_grad too
        run = _fwd if _coverage.unwatched(alpha) else torch.ops.fastcap.attention_coverage_fwd
        out, residual = run(alpha, valid, tau, target, reduction, need_grad, backend)
        if not need_grad:
            return out, None
        link = out.new_empty(0)  # an output, so linked to the graph; the penalty itself may be changed in place
        ctx.save_for_backward(residual, valid, link)
        ctx.set_materialize_grads(False)  # of the link, which nothing uses
        ctx.call = alpha.shape, alpha.dtype, reduction, backend
        return out, link

    @staticmethod
    def backward(ctx, grad_out, _):
        if grad_out is None:
            return None, None, None, None
        residual, valid, link = ctx.saved_tensors
        shape, *options = ctx.call
        run = _bwd if _coverage.unwatched(grad_out) else torch.ops.fastcap.attention_coverage_bwd
        dalpha = run(grad_out, residual, valid, *options)
        # One row serves all steps where all of them count: a view, and nothing of the size of alpha is written.
        dalpha = dalpha.expand(shape) if valid is None else dalpha
        return once(OP, dalpha, grad_out, link), None, None, None


# Public function -------------------------------------------------------------------------------------------------------


def attention_coverage(
    alpha: Tensor,
    *,
    lengths: Tensor | list[int] | None = None,
    mask: Tensor | None = None,
    target: float | str | Tensor = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """How unevenly attention covers the locations of a picture over a caption: Show, Attend and Tell's penalty.

    Equivalent, without lengths and mask, to::

        ((target - alpha.sum(dim=-2)) ** 2).mean()

    but only the [B, L] residual is kept for the backward, and alpha's gradient, the same for all steps, is written for one
    and expanded. Add it to the loss times a weight; what weight depends on the reduction: see `convert_coverage_weight`.

    Args:
        alpha: attention weights [B, T, L], or [B, heads, T, L], each step's over L locations; float32, float64, float16
            or bfloat16, any strides.
        lengths: [B], how many steps of each caption count, each in [0, T]: an integer tensor on alpha's device or the CPU,
            or a list of ints (a training loop's `decode_lengths`); a CUDA graph captures the first only. None: all.
        mask: [B, T] bool, True where a step counts; instead of lengths. Heads share it. At other steps alpha may hold
            anything, NaN too, and gets a gradient of exactly 0.
        target: what the attention of a location should sum to: 1.0 (the paper's experiments), "length" for T_b / L with T_b
            the valid steps of caption b (which even attention reaches), any finite number, or a tensor [B].
        reduction: "mean" over captions, heads and locations (the widely copied tutorial); "batchmean", the mean over
            captions (and heads) of the sum over locations (the paper's formula); "sum"; or "none".

    Returns:
        A scalar, or [B, L] ([B, heads, L]) for "none". In the dtype of `alpha`, float32 under autocast.

    Raises:
        FastcapError: an argument breaks its rule; the message names it. On a CUDA device a length out of range counts as
            0 or T, never a wrong read; FASTCAP_CHECK=1 turns that into the error, at the price of a synchronisation.
        RuntimeError: in a double backward or under a torch.func transform, which only the reference backend supports.

    Deterministic. Sums run in float32 (float64 for float64 alpha). Between forward and backward it keeps 4 bytes a caption,
    head and location (8 in float64); with lengths or a mask the gradient is written once, else it is an expanded view.

    Source: Xu et al., Show, Attend and Tell: Neural Image Caption Generation with Visual Attention (arXiv:1502.03044),
    equation 14.

    >>> import torch
    >>> alpha = torch.full((1, 3, 4), 0.25, requires_grad=True)  # three even steps over four locations: each gets 3/4
    >>> attention_coverage(alpha, reduction="batchmean").item()
    0.25
    >>> attention_coverage(alpha, target="length").item()
    0.0
    """
    valid, target, tau = _coverage.prepare(OP, alpha, lengths, mask, target, reduction)
    out_dtype = _dtypes.result_of(alpha)
    backend = _backend.select(OP, alpha.device.type)
    if backend == "reference":
        return reference(alpha, valid, target, tau, reduction, out_dtype)
    out, _ = _AttentionCoverage.apply(alpha, valid, tau, (target, reduction, backend, torch.is_grad_enabled()))
    return out if out.dtype == out_dtype else out.to(out_dtype)


# Its weight ------------------------------------------------------------------------------------------------------------

NORMALISATIONS = ("mean", "batchmean", "sum", "theano")


def convert_coverage_weight(weight: float, source: str, to: str, *, batch: int, locations: int, heads: int = 1) -> float:
    """The weight of the penalty under another normalisation: weight x penalty(source) = result x penalty(to).

    Args:
        weight: lambda, the factor of the penalty in the loss.
        source, to: what the sum of squares is divided by: "mean" by batch x heads x locations (the PyTorch tutorial),
            "batchmean" by batch x heads (the paper's formula), "sum" by 1, "theano" by locations alone (the authors' code
            sums over captions and takes the mean over locations).
        batch: B, captions in a batch. locations: L. heads: 1, if attention has none.

    Returns:
        The weight to use with `to`. It holds for any `target`, for that is inside the square.

    Raises:
        FastcapError: an argument breaks its rule.

    >>> convert_coverage_weight(1.0, "mean", "batchmean", batch=32, locations=196) == 1 / 196
    True
    >>> convert_coverage_weight(1.0, "theano", "mean", batch=32, locations=196)
    32.0
    """
    op = "convert_coverage_weight"
    weight = _checks.check_number(op, "weight", weight, -1e300, 1e300, "pass the factor of the penalty")
    for name, value in (("source", source), ("to", to)):
        _checks.check_choice(op, name, value, NORMALISATIONS, "see docs/math/attention_coverage.md")
    for name, value in (("batch", batch), ("locations", locations), ("heads", heads)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise bad(op, name, "be an int of at least 1", value, "pass the size of the batches that you train on")
    divisors = {"mean": batch * heads * locations, "batchmean": batch * heads, "sum": 1, "theano": locations}
    return weight * (divisors[to] / divisors[source])
