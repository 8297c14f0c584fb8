"""Softmax cross-entropy over a subset of the vocabulary, fused with the language-model head: the logits never exist.

The story, top to bottom: what is computed (`reference`, plain torch), the operators, the autograd.Function, and the
public function. `_head.py` holds the matrix products and the plans between which they choose. The maths, the gradients and
the costs are in docs/math/linear_subset_cross_entropy.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcap.errors import bad
from fastcap.ops import _backend, _checks, _dtypes, _grad_weight, _head, _plans, _subset
from fastcap.ops._autograd import once
from fastcap.ops._subset import Options

OP = "linear_subset_cross_entropy"
DEFAULT_BUDGET = 256 << 20


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
        linear_weight = _grad_weight.AsGradWeight.apply(linear_weight, grad_weight)
    if linear_weight.dtype != input.dtype:  # autocast leaves float64 alone, and its head too
        linear_weight = linear_weight.to(input.dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(input.dtype)
    logits = F.linear(input, linear_weight, linear_bias)
    return _subset.masked_loss(logits, target, ids, weight, token_weight, options).to(out_dtype)


# Operators -------------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastcap", "FRAGMENT")
_SCHEMA = f"{_subset.SCHEMA}, bool need_input, bool need_weight, bool need_bias, str plan, int budget, str backend"
_library.define(
    f"{OP}_fwd(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? ids, Tensor? weight, "
    f"Tensor? token_weight, {_SCHEMA}) -> (Tensor out, Tensor inv_denom, Tensor rows, Tensor dset, Tensor cols, "
    "Tensor stats, Tensor dlogits, Tensor dinput, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"{OP}_bwd(Tensor grad_out, Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? ids, "
    "Tensor? weight, Tensor inv_denom, Tensor rows, Tensor dset, Tensor cols, Tensor stats, Tensor dlogits, Tensor dinput, "
    f"Tensor dweight, Tensor dbias, {_SCHEMA}) -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class _Call(NamedTuple):
    """What the operators take beside tensors and options, in the order of their schema."""

    need_input: bool
    need_weight: bool
    need_bias: bool
    plan: str
    budget: int
    backend: str

    @property
    def need_grad(self) -> bool:
        return self.need_input or self.need_weight or self.need_bias


def _fwd_outputs(input, linear_weight, target, ids, options: Options, call: _Call) -> tuple[Tensor, _head.Kept]:
    """`out` and what is kept, unwritten: see _head.Kept."""
    (B, T), (V, H), acc = target.shape, linear_weight.shape, _dtypes.acc_of(input)
    n = _plans.dense_rows(options, B, T)
    K = 0 if options.kind != "set" else T if ids is None else ids.shape[2]

    def empty(*size, dtype=acc, when=True):
        return input.new_empty(size if when else (0,), dtype=dtype)

    panels, blocks = call.plan == "panels" and call.need_grad, call.plan == "rows"
    picked = panels and options.kind == "set" and options.mle_weight > 0
    if picked:
        dset = empty(n, K + 1)
    else:
        dset = empty(B, T, K + (ids is not None), when=_plans.has_set(options) and call.need_grad)
    kept = _head.Kept(
        inv_denom=empty(),
        rows=empty(n, dtype=torch.int64),
        dset=dset,
        cols=empty(n, K + 1, dtype=torch.int32, when=picked),
        stats=empty(_head.NUM_STATS, n, when=panels),
        dlogits=empty(n, V, dtype=input.dtype, when=call.plan == "keep" and call.need_grad),
        dinput=empty(n, H, dtype=input.dtype, when=blocks and call.need_input),
        dweight=empty(V, H, when=blocks and call.need_weight),
        dbias=empty(V, when=blocks and call.need_bias),
    )
    return input.new_empty((B, T) if options.reduction == "none" else (), dtype=acc), kept


@torch.no_grad()
def _fwd(input, linear_weight, linear_bias, target, ids, weight, token_weight, *rest):
    options, call = Options(*rest[:-6]), _Call(*rest[-6:])
    out, kept = _fwd_outputs(input, linear_weight, target, ids, options, call)
    head = _make_head(input, linear_weight, linear_bias, target, ids, weight, token_weight, options, call)
    whole = _plans.has_set(options) and head.kernels.fuses(head.x)  # its kernel writes a loss for every token
    loss = target.new_empty(target.shape, dtype=out.dtype) if whole else target.new_zeros(target.shape, dtype=out.dtype)
    rows = head.kernels.find_rows(kept.rows, kept.inv_denom)
    if target.numel() == 0:
        for tensor in (kept.dweight, kept.dbias):
            tensor.zero_()
    else:
        if _plans.has_set(options):
            _head.set_forward(head, loss, kept.dset if call.need_grad else None)
        if call.plan != "none":
            _head.dense_forward(head, call.plan, rows, loss, kept, call.need_grad)
    if options.reduction == "none":
        out.copy_(loss)
    else:
        head.kernels.reduce(loss, kept.inv_denom, out)
    return out, *kept


def _fwd_meta(input, linear_weight, linear_bias, target, ids, weight, token_weight, *rest):
    out, kept = _fwd_outputs(input, linear_weight, target, ids, Options(*rest[:-6]), _Call(*rest[-6:]))
    return out, *kept


@torch.no_grad()
def _bwd(grad_out, input, linear_weight, linear_bias, target, ids, weight, *rest):
    kept, options, call = _head.Kept(*rest[:9]), Options(*rest[9:-6]), _Call(*rest[-6:])
    head = _make_head(input, linear_weight, linear_bias, target, ids, weight, None, options, call)
    dinput, dweight, dbias = _head.backward(
        head, call.plan, kept, grad_out, call.need_input, call.need_weight, call.need_bias, None, False, False
    )
    none = input.new_empty(0)
    return (
        dinput.view(input.shape) if call.need_input else none,
        dweight if call.need_weight else none.to(linear_weight.dtype),
        dbias if call.need_bias else none.to(_dtypes.acc_of(input)),
    )


def _bwd_meta(grad_out, input, linear_weight, linear_bias, target, ids, weight, *rest):
    call, none = _Call(*rest[-6:]), (0,)
    return (
        input.new_empty(input.shape if call.need_input else none),
        linear_weight.new_empty(linear_weight.shape if call.need_weight else none),
        input.new_empty(linear_weight.shape[:1] if call.need_bias else none, dtype=_dtypes.acc_of(input)),
    )


def _make_head(input, linear_weight, linear_bias, target, ids, weight, token_weight, options, call) -> _head.Head:
    if call.backend == "triton":
        from fastcap.kernels.linear_subset_cross_entropy import LinearKernels
    else:
        from fastcap.ops._native import LinearKernels
    bias = None if linear_bias is None else linear_bias.to(_dtypes.acc_of(input)).contiguous()
    kernels = LinearKernels(target, ids, weight, token_weight, bias, linear_weight.shape[0], options)
    x = input.reshape(-1, input.shape[2]).contiguous()
    return _head.Head(kernels, x, linear_weight, target, ids, options, call.budget)


for _key in ("CPU", "CUDA"):
    _library.impl(f"{OP}_fwd", _fwd, _key)
    _library.impl(f"{OP}_bwd", _bwd, _key)
_library.impl(f"{OP}_fwd", _fwd_meta, "Meta")
_library.impl(f"{OP}_bwd", _bwd_meta, "Meta")


class _LinearSubsetCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        input,
        linear_weight,
        linear_bias,
        target,
        ids,
        weight,
        token_weight,
        options,
        budget,
        grad_weight,
        backend,
        wanted,
    ):
        need = tuple(wanted and needed for needed in ctx.needs_input_grad[:3])  # these say True under no_grad too
        gradients = "none" if not any(need) else "input" if not need[1] else grad_weight
        sizes = _plans.sizes_of(input, linear_weight, options, *target.shape)
        early = options.reduction != "none" and input.dtype != torch.float16
        plan = _plans.choose(sizes, budget, input.device.type, early=early, gradients=gradients)
        call = _Call(*need, plan, budget, backend)
        out, *kept = torch.ops.fastcap.linear_subset_cross_entropy_fwd(
            input, linear_weight, linear_bias, target, ids, weight, token_weight, *options, *call
        )
        if any(need):
            ctx.save_for_backward(input, linear_weight, linear_bias, target, ids, weight, *kept)
            ctx.options, ctx.call, ctx.grad_weight = options, call, grad_weight
            ctx.bias_dtype = None if linear_bias is None else linear_bias.dtype
            ctx.parameter = linear_weight if grad_weight == "accumulate" and need[1] else None
        return out

    @staticmethod
    def backward(ctx, grad_out):
        # Taken before the backward, which may write over what was saved where nothing can be differentiated again
        of = (grad_out, *ctx.saved_tensors[:3]) if torch.is_grad_enabled() else ()
        dinput, dweight, dbias = _backward(ctx, grad_out)
        return (
            once(OP, dinput, *of) if ctx.call.need_input else None,
            once(OP, dweight, *of) if dweight is not None else None,
            once(OP, dbias.to(ctx.bias_dtype), *of) if ctx.call.need_bias else None,
            *(None,) * 9,
        )


def _backward(ctx, grad_out):
    """The gradients, by the operator where a tracer may look on; else directly, which may write in place."""
    tensors, call = ctx.saved_tensors, ctx.call
    traced = torch.compiler.is_compiling() or type(grad_out) is not Tensor
    if ctx.grad_weight == "dense" and (call.plan != "rows" or traced or _keeps_graph()):
        dinput, dweight, dbias = torch.ops.fastcap.linear_subset_cross_entropy_bwd(grad_out, *tensors, *ctx.options, *call)
        return dinput, dweight if call.need_weight else None, dbias
    input, linear_weight, linear_bias, target, ids, weight, *kept = tensors
    head = _make_head(input, linear_weight, linear_bias, target, ids, weight, None, ctx.options, call)
    into, need_weight = None, call.need_weight
    if ctx.parameter is not None:
        need_weight = _grad_weight.is_asked_for(ctx.parameter)
        into = _grad_weight.accumulator(ctx.parameter) if need_weight else None
    with torch.no_grad():
        dx, dweight, dbias = _head.backward(
            head,
            call.plan,
            _head.Kept(*kept),
            grad_out,
            call.need_input,
            need_weight,
            call.need_bias,
            into,
            ctx.grad_weight == "sparse",
            True,
        )
    return None if dx is None else dx.view(input.shape), dweight, dbias


def _keeps_graph() -> bool:
    """Whether this backward may run again (retain_graph), so that what the forward kept must stay as it is."""
    return torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()


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
    """Cross-entropy over a subset of the vocabulary from hidden states, fused with the head: SMILE by default.

    Equivalent to::

        subset_cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)

    but a token that chooses among few words multiplies with their rows of the head only: there are no logits [B, T, V], and
    neither time nor memory grow with V. Tokens that need all words (first tokens, `mle_weight`, "full", "reverse") share
    blocks of logits within `memory_budget` bytes, one pass serving all parts of the loss.

    Args:
        input: hidden states [B, T, H], float32, float64, float16 or bfloat16, any strides. [N, H] is one caption of N
            tokens. A PackedSequence is padded first.
        linear_weight: the head's weight [V, H], in the dtype of `input` (under autocast, any); may be tied to an embedding.
        target: [B, T] (or [N]) int64, each in [0, V) or `ignore_index`; packed where input is.
        linear_bias: the head's bias [V], or None. Its gradient is always dense.
        subset, first_token, mle_weight, weight, token_weight, ignore_index, label_smoothing, logit_softcap, z_loss,
            num_random, seed, reduction: as in `subset_cross_entropy`. With subset="full" the function is
            `torch.nn.functional.linear_cross_entropy` of class indices.
        grad_weight: how the gradient of `linear_weight` comes.
            "dense": [V, H], as from torch.
            "sparse": a coalesced sparse tensor of the rows of the batch's words, for torch.optim.SparseAdam or SGD. Only
            where no token uses the whole vocabulary. Tied to an nn.Embedding, it is sparse if that has sparse=True.
            "accumulate": added in place into `linear_weight.main_grad` if the parameter carries one, else into
            `linear_weight.grad` (made of zeros if it is None); autograd itself gets none, and tensor hooks of the
            parameter see None. Keep `.grad` between steps: zero_grad(set_to_none=False), or zero the rows in use.
        memory_budget: bytes of scratch for the tokens that use the whole vocabulary; None is 256 MiB, 0 the smallest blocks
            (1 MiB or 256 columns, whichever is more). Logits' gradients are kept for the backward where they fit.

    Returns:
        A scalar, or [B, T] (or [N]) for "none", 0 at ignored tokens. In the dtype of `input`, float32 under autocast.

    Raises:
        FastcapError: an argument breaks its rule; the message names it. On a CUDA device a target or id out of range gives
            a NaN loss, never a wrong read; FASTCAP_CHECK=1 turns that into the error, at the price of a synchronisation.
        RuntimeError: in a double backward or under a torch.func transform, which only the reference backend supports.

    Deterministic. Products run in the dtype of `input`, sums in float32 (float64 for float64 input). Between forward and
    backward it keeps 4 bytes a candidate and token (8 in a mixture), and for tokens that use the whole vocabulary their
    logits' gradient (if it fits the budget), or the gradients of input and weight, or 32 bytes a token: docs/math says when.

    Source: Yue et al., Learning Descriptive Image Captioning via Semipermeable Maximum Likelihood Estimation
    (arXiv:2306.13460), section 3.2.

    >>> import torch
    >>> head = torch.nn.Linear(16, 1000)
    >>> hidden = torch.randn(2, 5, 16, requires_grad=True)
    >>> loss = linear_subset_cross_entropy(hidden, head.weight, torch.randint(1000, (2, 5)), linear_bias=head.bias)
    >>> loss.backward()
    >>> hidden.grad.shape, head.weight.grad.shape
    (torch.Size([2, 5, 16]), torch.Size([1000, 16]))
    """
    input, target, token_weight, flat = _subset.shape_input(
        OP, input, target, token_weight, ignore_index, "H", "hidden states"
    )
    budget = _check_head(input, linear_weight, linear_bias, memory_budget)
    V, device = linear_weight.shape[0], input.device.type
    out_dtype = _dtypes.result_of(input)
    if _dtypes.widens(input):  # as torch's own linear
        input = input.to(torch.get_autocast_dtype(device))
    ids, weight, token_weight, options = _subset.prepare(
        OP, input, target, V, subset=subset, first_token=first_token, mle_weight=mle_weight, weight=weight,
        token_weight=token_weight, ignore_index=ignore_index, label_smoothing=label_smoothing, logit_softcap=logit_softcap,
        z_loss=z_loss, num_random=num_random, seed=seed, reduction=reduction,
    )  # fmt: skip
    _grad_weight.check(OP, linear_weight, grad_weight, options)
    backend = _backend.select(OP, device, _backend.NO_CUDA)
    if backend != "cpp":  # which checks values itself
        _subset.check_values(OP, target, ids, V, options)
    if backend == "reference":
        out = reference(
            input, linear_weight, linear_bias, target, ids, weight, token_weight, options, grad_weight, out_dtype
        )
    else:
        own = subset == "caption" and options.kind == "set"  # the candidates of a token are its caption's targets
        out = _LinearSubsetCrossEntropy.apply(
            input, linear_weight, linear_bias, target, None if own else ids, weight, token_weight, options, budget,
            grad_weight, backend, torch.is_grad_enabled(),
        ).to(out_dtype)  # fmt: skip
    return out.squeeze(0) if flat and reduction == "none" else out


def _check_head(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, budget: int | None) -> int:
    """Raises for a bad argument; returns the budget in bytes."""
    _checks.check_tensor(OP, "linear_weight", linear_weight, "pass the head's weight, head.weight")
    _checks.check_dtype(OP, "linear_weight", linear_weight, _checks.FLOATS, "convert the head")
    _checks.check_dense(OP, "linear_weight", linear_weight)
    if linear_weight.dim() != 2 or linear_weight.shape[0] < 1 or linear_weight.shape[1] != input.shape[2]:
        rule = f"have shape [V, H] with V >= 1 and H = {input.shape[2]}"
        raise bad(OP, "linear_weight", rule, list(linear_weight.shape), "pass head.weight, a row for each word")
    _subset.check_words(OP, "linear_weight", linear_weight.shape[0])
    _checks.check_device(OP, "linear_weight", linear_weight, input)
    autocast = input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
    if linear_bias is not None:
        _checks.check_tensor(OP, "linear_bias", linear_bias, "pass head.bias or None")
        _checks.check_dtype(OP, "linear_bias", linear_bias, _checks.FLOATS, "convert the head")
        _checks.check_shape(OP, "linear_bias", linear_bias, linear_weight.shape[:1], "[V]", "pass head.bias")
        _checks.check_device(OP, "linear_bias", linear_bias, input)
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype and not autocast:
            rule = f"have the dtype of input, {str(input.dtype).removeprefix('torch.')}"
            got = str(tensor.dtype).removeprefix("torch.")
            raise bad(OP, name, rule, got, "convert one of them, or run under torch.autocast")
    if budget is None:
        return DEFAULT_BUDGET
    if not isinstance(budget, int) or isinstance(budget, bool) or not 0 <= budget < 2**63:
        raise bad(
            OP, "memory_budget", "be None or a number of bytes, an int of at least 0", budget, "pass 32 << 20 for 32 MiB"
        )
    return budget
