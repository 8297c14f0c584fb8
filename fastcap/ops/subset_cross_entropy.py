"""Softmax cross-entropy over a subset of the vocabulary, from logits: SMILE, ReSMILE, MLE and their mixtures.

The story, top to bottom: what is computed (`reference`, plain torch; `_subset.candidates` says which ids a row chooses
from), the operators `torch.ops.fastcap.subset_cross_entropy_{fwd,bwd}` with their CPU, CUDA and Meta implementations, the
autograd.Function, and the public function. The maths and what the operators keep between forward and backward are written
out in docs/math/subset_cross_entropy.md and csrc/subset_cross_entropy/subset_cross_entropy.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.ops import _backend, _dtypes, _subset
from fastcap.ops._autograd import once
from fastcap.ops._subset import Options

OP = "subset_cross_entropy"
NUM_STATS = 8  # enum Stat in csrc/subset_cross_entropy/subset_cross_entropy.h


def reference(
    input: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    out_dtype: torch.dtype,
) -> Tensor:
    """The masked formulation in plain torch, on any device, differentiable any number of times. O(B T V) memory."""
    return _subset.masked_loss(input, target, ids, weight, token_weight, options).to(out_dtype)


# Operators -------------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastcap", "FRAGMENT")
_library.define(
    f"{OP}_fwd(Tensor input, Tensor target, Tensor? ids, Tensor? weight, Tensor? token_weight, {_subset.SCHEMA}, "
    "bool need_grad, str backend) -> (Tensor out, Tensor inv_denom, Tensor stats, Tensor cols, Tensor dset)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"{OP}_bwd(Tensor grad_out, Tensor inv_denom, Tensor? input, Tensor target, Tensor? ids, Tensor? weight, Tensor stats, "
    f"Tensor cols, Tensor dset, {_subset.SCHEMA}, SymInt[] size, ScalarType dtype, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fwd_outputs(input: Tensor, ids: Tensor | None, options: Options, need_grad: bool) -> tuple[Tensor, ...]:
    """What the forward returns, unwritten: out [] or [B, T]; inv_denom []; and, where a gradient is wanted, stats
    [8, B, T] for rows with a dense part, cols and dset [B, T, K + 1] for the set part; else empty."""
    B, T, _ = input.shape
    acc = _dtypes.acc_of(input)
    C = ids.shape[2] + 1 if need_grad and options.kind == "set" else 0
    return (
        input.new_empty((B, T) if options.reduction == "none" else (), dtype=acc),
        input.new_empty((), dtype=acc),
        input.new_empty((NUM_STATS, B, T) if need_grad and options.is_dense else (0,), dtype=acc),
        input.new_empty((B, T, C) if C else (0,), dtype=torch.int32),
        input.new_empty((B, T, C) if C else (0,), dtype=acc),
    )


def _fwd(input, target, ids, weight, token_weight, *rest):
    *options, need_grad, backend = rest
    options = Options(*options)
    outputs = _fwd_outputs(input, ids, options, need_grad)
    _launcher(backend).subset_cross_entropy_fwd(input, target, ids, weight, token_weight, *outputs, options)
    return outputs


def _fwd_meta(input, target, ids, weight, token_weight, *rest):
    *options, need_grad, _ = rest
    return _fwd_outputs(input, ids, Options(*options), need_grad)


def _bwd(grad_out, inv_denom, input, target, ids, weight, stats, cols, dset, *rest):
    *options, size, dtype, backend = rest
    dinput = grad_out.new_empty(size, dtype=dtype)
    _launcher(backend).subset_cross_entropy_bwd(
        grad_out, inv_denom, input, target, ids, weight, stats, cols, dset, dinput, Options(*options)
    )
    return dinput


def _bwd_meta(grad_out, inv_denom, input, target, ids, weight, stats, cols, dset, *rest):
    *_, size, dtype, _ = rest
    return grad_out.new_empty(size, dtype=dtype)


def _launcher(backend: str):
    """The module that runs a backend; reached here, inside a function, so that importing fastcap imports neither."""
    if backend == "triton":
        from fastcap.kernels import subset_cross_entropy as triton_launcher

        return triton_launcher
    from fastcap.ops import _native

    return _native.CPU if backend == "cpp" else _native.CUDA


for _key in ("CPU", "CUDA"):
    _library.impl(f"{OP}_fwd", _fwd, _key)
    _library.impl(f"{OP}_bwd", _bwd, _key)
_library.impl(f"{OP}_fwd", _fwd_meta, "Meta")
_library.impl(f"{OP}_bwd", _bwd_meta, "Meta")


class _SubsetCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, ids, weight, token_weight, options, backend, wanted):
        need_grad = wanted and ctx.needs_input_grad[0]  # which says True under no_grad too
        out, *saved = torch.ops.fastcap.subset_cross_entropy_fwd(
            input, target, ids, weight, token_weight, *options, need_grad, backend
        )
        if need_grad:
            # Without a dense part the backward needs no logits: they can be freed before their gradient is made.
            logits = input if options.is_dense else None
            link = out.new_empty(
                0
            )  # an output, so linked to the graph; the loss itself may be changed in place: loss += ...
            ctx.set_materialize_grads(False)  # of the link, which nothing uses
            ctx.save_for_backward(link, logits, target, ids if options.kind == "reverse" else None, weight, *saved)
            ctx.size, ctx.dtype, ctx.options, ctx.backend = input.shape, input.dtype, options, backend
            return out, link
        return out, None

    @staticmethod
    def backward(ctx, grad_out, _):
        if grad_out is None:
            return (None,) * 8
        link, input, target, ids, weight, inv_denom, stats, cols, dset = ctx.saved_tensors
        dinput = torch.ops.fastcap.subset_cross_entropy_bwd(
            grad_out,
            inv_denom,
            input,
            target,
            ids,
            weight,
            stats,
            cols,
            dset,
            *ctx.options,
            ctx.size,
            ctx.dtype,
            ctx.backend,
        )
        return once(OP, dinput, grad_out, link), *(None,) * 7


# Public function -------------------------------------------------------------------------------------------------------


def subset_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
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
) -> Tensor:
    """Cross-entropy with the softmax over a subset of the vocabulary: SMILE by default.

    Equivalent, for subset="caption" and first_token="subset", to::

        allowed = torch.zeros(B, V + 1, dtype=torch.bool).scatter(1, target.where(target >= 0, V), True)[:, None, :V]
        loss = F.cross_entropy(input.masked_fill(~allowed, -inf).flatten(0, 1), target.flatten())

    (first_token="full" allows all of V to the first valid token of each caption), but the logits outside the subset are
    never read, and nothing of size [B, T, V] is made except the gradient.

    Args:
        input: logits [B, T, V], float32, float64, float16 or bfloat16, any strides. [N, V] is one caption of N tokens: a
            batch flattened to [B * T, V] would share one set of words, so keep its shape (`subset="full"` does not care). A
            PackedSequence is padded first, which copies it.
        target: [B, T] (or [N]) int64, each in [0, V) or `ignore_index`; packed where input is.
        subset: the candidates a token chooses from; its own target is always one of them, and repeats count once.
            "caption": the valid targets of its caption (SMILE). "full": the whole vocabulary; the function then is
            `torch.nn.functional.cross_entropy` of class indices over the last dimension (and 0 where all are ignored).
            "reverse": all words but the caption's (ReSMILE).
            "random": `num_random` ids drawn per token. A tensor of ids, [K] for all or [B, K] per caption, padded with -1.
        first_token: "full" (as the authors' training code): the first valid token of each caption uses the whole
            vocabulary; "subset": no exception (the paper's formula).
        mle_weight: m in [0, 1]: `m * MLE + (1 - m) * subset loss`. The authors' second checkpoint used 0.01.
        weight: class weights [V]; "mean" then divides by the sum of the valid targets' weights.
        token_weight: a factor per token [B, T] or caption [B, 1] (rewards, importance); "mean" does not divide by it.
        ignore_index: a target with this value is left out: no loss, a gradient of 0, and not part of its caption's words.
        label_smoothing: in [0, 1], spread uniformly over the candidates, never over masked words.
        logit_softcap: s > 0: logits become `s * tanh(logits / s)` first (Gemma).
        z_loss: c >= 0 adds `c * logsumexp**2` per token (times its class weight), over the candidates in force.
        num_random: how many ids "random" draws, with replacement.
        seed: of "random"; None draws one from torch's generator.
        reduction: "mean" over the valid tokens (0 if there are none), "sum", or "none".

    Returns:
        A scalar, or [B, T] (or [N]) for "none", 0 at ignored tokens. In the dtype of `input`, float32 under autocast.

    Raises:
        FastcapError: an argument breaks its rule; the message names it. On a CUDA device a target or id out of range gives
            a NaN loss, never a wrong read; FASTCAP_CHECK=1 turns that into the error, at the price of a synchronisation.
        RuntimeError: in a double backward or under a torch.func transform, which only the reference backend supports.

    Deterministic. Sums run in float32 (float64 for float64 input). Between forward and backward it keeps 8 bytes a
    candidate and token (12 in float64), and, only where the whole vocabulary takes part (first tokens,
    `mle_weight`, "full", "reverse"), 32 bytes a token and the logits themselves.

    Source: Yue et al., Learning Descriptive Image Captioning via Semipermeable Maximum Likelihood Estimation
    (arXiv:2306.13460), section 3.2.

    >>> import torch
    >>> logits = torch.zeros(1, 3, 8, requires_grad=True)
    >>> loss = subset_cross_entropy(logits, torch.tensor([[4, 2, 4]]), first_token="subset")
    >>> print(f"{loss:.4f}")  # two candidates, 4 and 2: log 2
    0.6931
    """
    input, target, token_weight, flat = _subset.shape_input(OP, input, target, token_weight, ignore_index, "V", "logits")
    V = input.shape[2]
    _subset.check_words(OP, "input", V)
    ids, weight, token_weight, options = _subset.prepare(
        OP, input, target, V, subset=subset, first_token=first_token, mle_weight=mle_weight, weight=weight,
        token_weight=token_weight, ignore_index=ignore_index, label_smoothing=label_smoothing, logit_softcap=logit_softcap,
        z_loss=z_loss, num_random=num_random, seed=seed, reduction=reduction,
    )  # fmt: skip
    device = input.device.type
    out_dtype = _dtypes.result_of(input)
    if options.kind == "set":
        ids = ids.expand(*target.shape, -1)  # strides of 0: nothing is copied
    backend = _backend.select(OP, device)
    if backend != "cpp":  # which checks values as it reads them
        _subset.check_values(OP, target, ids, V, options)
    if backend == "reference":
        out = reference(input, target, ids, weight, token_weight, options, out_dtype)
    else:
        out, _ = _SubsetCrossEntropy.apply(
            input, target, ids, weight, token_weight, options, backend, torch.is_grad_enabled()
        )
        out = out.to(out_dtype)
    return out.squeeze(0) if flat and reduction == "none" else out
