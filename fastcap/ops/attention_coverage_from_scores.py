"""Attention coverage for a model that attends by scaled dot products and returns no weights: from its queries and keys.

The story, top to bottom: what is computed (`reference`, plain torch), the operators
`torch.ops.fastcap.attention_coverage_from_scores_{fwd,bwd}` with their CPU, CUDA and Meta implementations, the
autograd.Function, and the public function. `_score_blocks.py` holds the CPU's loop over blocks of scores. The maths and the
costs are in docs/math/attention_coverage_from_scores.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _backend, _checks, _coverage, _dtypes
from fastcap.ops._autograd import once

OP = "attention_coverage_from_scores"


def reference(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    valid: Tensor | None,
    scale: float,
    target: float,
    tau: Tensor | None,
    reduction: str,
) -> Tensor:
    """The penalty in plain torch, in the dtype of sums, differentiable any number of times. O(B heads T L) memory."""
    if valid is not None:  # what does not count may hold anything, NaN too
        query = query.masked_fill(~valid[:, None, :, None], 0.0)
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
    acc = _dtypes.acc_of(query)
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(acc) @ key.to(acc).mT) * scale
    if key_mask is not None:
        here = key_mask[:, None, None, :]
        scores = scores.masked_fill(~here, -torch.inf).masked_fill(~here.any(-1, keepdim=True), 0.0)
    alpha = scores.softmax(-1)
    if key_mask is not None:
        alpha = alpha.masked_fill(~here, 0.0)
    if valid is not None:
        alpha = alpha.masked_fill(~valid[:, None, :, None], 0.0)
    return _coverage.penalty(alpha.sum(2), target, tau, reduction)


# Operators -------------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastcap", "FRAGMENT")
_library.define(
    f"{OP}_fwd(Tensor query, Tensor key, Tensor? key_mask, Tensor? valid, Tensor? tau, float scale, float target, "
    "str reduction, bool need_grad, str backend) -> (Tensor out, Tensor residual, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"{OP}_bwd(Tensor grad_out, Tensor residual, Tensor lse, Tensor query, Tensor key, Tensor? key_mask, Tensor? valid, "
    "float scale, str reduction, bool need_query, bool need_key, str backend) -> (Tensor dquery, Tensor dkey)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fwd_outputs(query: Tensor, key: Tensor, reduction: str, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out [] or [B, heads, L]; the residual tau - S [B, heads, L] and the log-sum-exp of each step's scores [B, heads, T],
    both empty where no gradient is wanted; unwritten."""
    acc = _dtypes.acc_of(query)
    sums, rows = (*query.shape[:2], key.shape[2]), query.shape[:3]
    return (
        query.new_empty(sums if reduction == "none" else (), dtype=acc),
        query.new_empty(sums if need_grad else (0,), dtype=acc),
        query.new_empty(rows if need_grad else (0,), dtype=acc),
    )


@torch.no_grad()
def _fwd(query, key, key_mask, valid, tau, scale, target, reduction, need_grad, backend):
    outputs = _fwd_outputs(query, key, reduction, need_grad)
    _launcher(backend).attention_coverage_from_scores_fwd(
        query, key, key_mask, valid, tau, *outputs, scale, target, reduction
    )
    return outputs


def _fwd_meta(query, key, key_mask, valid, tau, scale, target, reduction, need_grad, backend):
    return _fwd_outputs(query, key, reduction, need_grad)


def _bwd_outputs(query: Tensor, key: Tensor, need_query: bool, need_key: bool) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape if need_query else (0,)), key.new_empty(key.shape if need_key else (0,))


@torch.no_grad()  # under create_graph=True grad mode is on, and products are written into memory that is there
def _bwd(grad_out, residual, lse, query, key, key_mask, valid, scale, reduction, need_query, need_key, backend):
    outputs = _bwd_outputs(query, key, need_query, need_key)
    _launcher(backend).attention_coverage_from_scores_bwd(
        grad_out, residual, lse, query, key, key_mask, valid, scale, reduction, *outputs
    )
    return outputs


def _bwd_meta(grad_out, residual, lse, query, key, key_mask, valid, scale, reduction, need_query, need_key, backend):
    return _bwd_outputs(query, key, need_query, need_key)


def _launcher(backend: str):
    """The module that runs a backend; reached here, inside a function, so that importing fastcap imports neither."""
    if backend == "triton":
        from fastcap.kernels import attention_coverage_from_scores as triton_launcher

        return triton_launcher
    if backend != "cpp":
        raise bad(OP, "backend", "be 'cpp' or 'triton'", backend, "call the public function")
    from fastcap.ops import _score_blocks

    return _score_blocks


for _key in ("CPU", "CUDA"):
    _library.impl(f"{OP}_fwd", _fwd, _key)
    _library.impl(f"{OP}_bwd", _bwd, _key)
_library.impl(f"{OP}_fwd", _fwd_meta, "Meta")
_library.impl(f"{OP}_bwd", _bwd_meta, "Meta")


class _AttentionCoverageFromScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, key_mask, valid, tau, scale, target, reduction, backend, wanted):
        need_grad = wanted and any(ctx.needs_input_grad[:2])  # which say True under no_grad too
        out, residual, lse = torch.ops.fastcap.attention_coverage_from_scores_fwd(
            query, key, key_mask, valid, tau, scale, target, reduction, need_grad, backend
        )
        if need_grad:
            ctx.save_for_backward(residual, lse, query, key, key_mask, valid)
            ctx.options = scale, reduction, *ctx.needs_input_grad[:2], backend
        return out

    @staticmethod
    def backward(ctx, grad_out):
        saved = ctx.saved_tensors
        gradients = torch.ops.fastcap.attention_coverage_from_scores_bwd(grad_out, *saved, *ctx.options)
        needed = zip(gradients, ctx.needs_input_grad[:2], strict=True)
        return *(once(OP, gradient, grad_out, *saved[2:4]) if need else None for gradient, need in needed), *(None,) * 8


# Public function -------------------------------------------------------------------------------------------------------


def attention_coverage_from_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    lengths: Tensor | list[int] | None = None,
    mask: Tensor | None = None,
    target: float | str | Tensor = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """`attention_coverage` of scaled dot-product attention, from its queries and keys: for models that never return weights.

    Equivalent to::

        alpha = torch.softmax(scale * query @ key.mT, dim=-1)        # [B, heads, T, L]; -inf where key_mask is False
        attention_coverage(alpha, lengths=lengths, mask=mask, target=target, reduction=reduction)

    with the weights that `torch.nn.functional.scaled_dot_product_attention(query, key, value)` gives the values, but they
    are not kept: forward and backward make them block by block.

    Args:
        query: [B, heads, T, E], or [B, T, E]: the projected queries of a caption's T steps; float32, float64, float16 or
            bfloat16, any strides.
        key: [B, heads, L, E], or [B, L, E]: the projected keys of L locations, in the dtype of `query`. Fewer heads than the
            query's, as in grouped attention: repeat or expand them.
        scale: a finite factor of the scores. None: 1 / sqrt(E), as there.
        key_mask: [B, L] bool, False where there is no location: `key` may hold anything there, NaN too, and gets a gradient
            of exactly 0. Such a location gets no attention and still counts in the penalty, with a sum of 0; a caption with
            no location has no attention at all.
        lengths: [B], how many steps of each caption count, as in `attention_coverage`. None: all.
        mask: [B, T] bool, True where a step counts; instead of lengths. At other steps `query` may hold anything, NaN too,
            and gets a gradient of exactly 0.
        target: what the attention of a location should sum to: 1.0, "length" for T_b / L, a finite number, or a tensor [B].
        reduction: "mean", "batchmean", "sum" or "none", as in `attention_coverage`.

    Returns:
        A scalar, or [B, heads, L] ([B, L]) for "none". In the dtype of `query`, float32 under autocast, which casts query
        and key as it does for scaled_dot_product_attention.

    Raises:
        FastcapError: an argument breaks its rule; the message names it. On a CUDA device a length out of range counts as
            0 or T, never a wrong read; FASTCAP_CHECK=1 turns that into the error, at the price of a synchronisation.
        RuntimeError: in a double backward or under a torch.func transform, which only the reference backend supports.

    Deterministic. Scores, softmax and sums run in float32 (float64 for float64 queries). Between forward and backward it
    keeps query and key, and 4 bytes a caption, head and location or step (8 in float64). Its scratch is some MiB on the CPU,
    and no more than what it keeps on a GPU. Attention with a mask or a bias of its own per step (causal) is not covered.

    Source: Xu et al., Show, Attend and Tell (arXiv:1502.03044), equation 14; Vaswani et al., Attention Is All You Need
    (arXiv:1706.03762), equation 1.

    >>> import torch
    >>> query, key = torch.zeros(1, 3, 8), torch.randn(1, 4, 8)  # queries of 0 attend evenly: each location gets 3/4
    >>> attention_coverage_from_scores(query, key, reduction="batchmean").item()
    0.25
    """
    for name, tensor in (("query", query), ("key", key)):
        _checks.check_tensor(OP, name, tensor, f"pass the projected {name} of the attention")
        _checks.check_dtype(OP, name, tensor, _checks.FLOATS, f"convert the {name}")
        _checks.check_dense(OP, name, tensor)
    B, *heads, E, L = _sizes(query, key)
    _checks.check_device(OP, "key", key, query)
    query, key = _cast(query, key)
    scale = _scale(scale, E)
    if key_mask is not None:
        _checks.check_tensor(OP, "key_mask", key_mask, "pass a bool tensor, True where there is a location")
        _checks.check_dtype(OP, "key_mask", key_mask, (torch.bool,), "pass key_mask != 0, True where there is a location")
        _checks.check_shape(OP, "key_mask", key_mask, (B, L), "[B, L]", "one value a caption and location, heads share it")
        _checks.check_device(OP, "key_mask", key_mask, query)
    _checks.check_choice(OP, "reduction", reduction, _coverage.REDUCTIONS, "pass reduction='mean'")
    valid = _coverage.valid_steps(OP, lengths, mask, query)
    target, tau = _coverage.target_sums(OP, target, valid, query, L)
    if not heads:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    backend = _backend.select(OP, query.device.type, _backend.NO_CUDA)
    if backend == "reference":
        out = reference(query, key, key_mask, valid, scale, target, tau, reduction)
    else:
        out = _AttentionCoverageFromScores.apply(
            query, key, key_mask, valid, tau, scale, target, reduction, backend, torch.is_grad_enabled()
        )
    return (out.squeeze(1) if reduction == "none" and not heads else out).to(_dtypes.result_of(query))


def _sizes(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """(B, heads, E, L), or (B, E, L) without heads. Checks the shapes."""
    if query.dim() not in (3, 4) or query.shape[-1] < 1:
        rule = "have shape [B, heads, T, E] or [B, T, E], E >= 1"
        raise bad(OP, "query", rule, list(query.shape), "pass it as scaled_dot_product_attention takes it")
    *outer, _, E = query.shape
    if key.dim() != query.dim() or list(key.shape[:-2]) != outer or key.shape[-1] != E or key.shape[-2] < 1:
        letters = "[B, heads, L, E]" if len(outer) == 2 else "[B, L, E]"
        rule = f"have shape {letters}, L >= 1, to query's {list(query.shape)}"
        raise bad(OP, "key", rule, list(key.shape), "expand the heads of grouped attention")
    return *outer, E, key.shape[-2]


def _scale(scale: float | None, E: int) -> float:
    if scale is None:
        return 1 / math.sqrt(E)
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not is_number or not -math.inf < scale < math.inf:
        raise bad(OP, "scale", "be None or a finite number", scale, "pass None for 1 / sqrt(E)")
    return float(scale)


def _cast(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both, cast as autocast does for scaled_dot_product_attention: to its dtype, but float64. Checks that dtypes agree."""
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key))
    if query.dtype != key.dtype:
        names = [str(x.dtype).removeprefix("torch.") for x in (query, key)]
        raise bad(OP, "key", f"have the dtype of query, {names[0]}", names[1], "convert one of them")
    return query, key
