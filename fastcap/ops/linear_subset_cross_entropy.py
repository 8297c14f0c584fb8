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
from fastcap.ops import _backend, _checks, _head, _subset
from fastcap.ops._autograd import once
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


def _acc(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _fwd_outputs(input, linear_weight, target, ids, options: Options, call: _Call) -> tuple[Tensor, _head.Kept]:
    """`out` and what is kept, unwritten: see _head.Kept."""
    (B, T), (V, H), acc = target.shape, linear_weight.shape, _acc(input)
    n = _head.dense_rows(options, B, T)
    K = 0 if options.kind != "set" else T if ids is None else ids.shape[2]

    def empty(*size, dtype=acc, when=True):
        return input.new_empty(size if when else (0,), dtype=dtype)

    panels, blocks = call.plan == "panels" and call.need_grad, call.plan == "rows"
    picked = panels and options.kind == "set" and options.mle_weight > 0
    if picked:
        dset = empty(n, K + 1)
    else:
        dset = empty(B, T, K + (ids is not None), when=_head.has_set(options) and call.need_grad)
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


def _fwd(input, linear_weight, linear_bias, target, ids, weight, token_weight, *rest):
    options, call = Options(*rest[:-6]), _Call(*rest[-6:])
    out, kept = _fwd_outputs(input, linear_weight, target, ids, options, call)
    loss = torch.zeros_like(target, dtype=out.dtype, memory_format=torch.contiguous_format)
    head = _make_head(input, linear_weight, linear_bias, target, ids, weight, token_weight, options, call)
    rows = head.kernels.find_rows(kept.rows, kept.inv_denom)
    if target.numel() == 0:
        for tensor in (kept.dweight, kept.dbias):
            tensor.zero_()
    else:
        if _head.has_set(options):
            _head.set_forward(head, loss, kept.dset if call.need_grad else None)
        if call.plan != "none":
            _head.dense_forward(head, call.plan, rows, loss, kept, call.need_grad)
    out.copy_(loss if options.reduction == "none" else _head.summed(loss, kept.inv_denom))
    return out, *kept


def _fwd_meta(input, linear_weight, linear_bias, target, ids, weight, token_weight, *rest):
    out, kept = _fwd_outputs(input, linear_weight, target, ids, Options(*rest[:-6]), _Call(*rest[-6:]))
    return out, *kept


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
        dbias if call.need_bias else none.to(_acc(input)),
    )


def _bwd_meta(grad_out, input, linear_weight, linear_bias, target, ids, weight, *rest):
    call, none = _Call(*rest[-6:]), (0,)
    return (
        input.new_empty(input.shape if call.need_input else none),
        linear_weight.new_empty(linear_weight.shape if call.need_weight else none),
        input.new_empty(linear_weight.shape[:1] if call.need_bias else none, dtype=_acc(input)),
    )


def _make_head(input, linear_weight, linear_bias, target, ids, weight, token_weight, options, call) -> _head.Head:
    if call.backend == "triton":
        from fastcap.kernels.linear_subset_cross_entropy import LinearKernels
    else:
        from fastcap.ops._native import LinearKernels
    bias = None if linear_bias is None else linear_bias.to(_acc(input)).contiguous()
    kernels = LinearKernels(target, ids, weight, token_weight, bias, linear_weight.shape[0], options)
    x = input.reshape(-1, input.shape[2])
    return _head.Head(kernels, x, linear_weight, target, ids, options, call.budget)


for _key in ("CPU", "CUDA"):
    _library.impl(f"{OP}_fwd", _fwd, _key)
    _library.impl(f"{OP}_bwd", _bwd, _key)
_library.impl(f"{OP}_fwd", _fwd_meta, "Meta")
_library.impl(f"{OP}_bwd", _bwd_meta, "Meta")


class _LinearSubsetCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, linear_weight, linear_bias, target, ids, weight, token_weight, options, budget, grad_weight, backend
    ):
        need = ctx.needs_input_grad[:3]
        gradients = "none" if not any(need) else "input" if not need[1] else grad_weight
        B, T = target.shape
        sizes = _head.Sizes(_head.dense_rows(options, B, T), *linear_weight.shape, input.element_size())
        plan = _head.choose(sizes, budget, input.device.type, scalar=options.reduction != "none", gradients=gradients)
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
        dinput, dweight, dbias = _backward(ctx, grad_out)
        return (
            once(OP, dinput) if ctx.call.need_input else None,
            once(OP, dweight) if dweight is not None else None,
            once(OP, dbias.to(ctx.bias_dtype)) if ctx.call.need_bias else None,
            *(None,) * 8,
        )


def _backward(ctx, grad_out):
    """The gradients, by the operator where autograd's graph is traced; else directly, which may write in place."""
    tensors, call = ctx.saved_tensors, ctx.call
    if ctx.grad_weight == "dense" and (call.plan != "rows" or torch.compiler.is_compiling() or _keeps_graph()):
        dinput, dweight, dbias = torch.ops.fastcap.linear_subset_cross_entropy_bwd(grad_out, *tensors, *ctx.options, *call)
        return dinput, dweight if call.need_weight else None, dbias
    input, linear_weight, linear_bias, target, ids, weight, *kept = tensors
    head = _make_head(input, linear_weight, linear_bias, target, ids, weight, None, ctx.options, call)
    into = None if ctx.parameter is None else accumulator(ctx.parameter)
    with torch.no_grad():
        dx, dweight, dbias = _head.backward(
            head, call.plan, _head.Kept(*kept), grad_out, *call[:3], into, ctx.grad_weight == "sparse", True
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
    """`subset_cross_entropy` of the logits `input @ linear_weight.T + linear_bias`, which are never made whole."""
    _checks.check_tensor(OP, "input", input, "pass the hidden states before the head")
    _checks.check_dtype(OP, "input", input, _checks.FLOATS, "convert the hidden states")
    flat = input.dim() == 2
    if flat:
        input, target, token_weight = (x.unsqueeze(0) if isinstance(x, Tensor) else x for x in (input, target, token_weight))
    if input.dim() != 3 or input.shape[2] < 1:
        raise bad(
            OP, "input", "have shape [B, T, H] or [N, H], H >= 1", list(input.shape), "pass hidden states, features last"
        )
    budget = _check_head(input, linear_weight, linear_bias, grad_weight, memory_budget)
    V, device = linear_weight.shape[0], input.device.type
    widened = device != "meta" and torch.is_autocast_enabled(device) and input.dtype != torch.float64
    out_dtype = torch.float32 if widened else input.dtype
    if widened:  # as torch's own linear
        input = input.to(torch.get_autocast_dtype(device))
    ids, weight, token_weight, options = _subset.prepare(
        OP, input, target, V, subset=subset, first_token=first_token, mle_weight=mle_weight, weight=weight,
        token_weight=token_weight, ignore_index=ignore_index, label_smoothing=label_smoothing, logit_softcap=logit_softcap,
        z_loss=z_loss, num_random=num_random, seed=seed, reduction=reduction,
    )  # fmt: skip
    _check_grad_weight(linear_weight, grad_weight, options)
    backend = _backend.select(OP, device)
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
            grad_weight, backend,
        ).to(out_dtype)  # fmt: skip
    return out.squeeze(0) if flat and reduction == "none" else out


def _check_head(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, grad_weight: str, budget: int | None
) -> int:
    """Raises for a bad argument; returns the budget in bytes."""
    _checks.check_tensor(OP, "linear_weight", linear_weight, "pass the head's weight, head.weight")
    _checks.check_dtype(OP, "linear_weight", linear_weight, _checks.FLOATS, "convert the head")
    if linear_weight.dim() != 2 or linear_weight.shape[0] < 1 or linear_weight.shape[1] != input.shape[2]:
        rule = f"have shape [V, H] with V >= 1 and H = {input.shape[2]}"
        raise bad(OP, "linear_weight", rule, list(linear_weight.shape), "pass head.weight, a row for each word")
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
    _checks.check_choice(OP, "grad_weight", grad_weight, GRAD_WEIGHTS, "pass grad_weight='dense'")
    if budget is None:
        return DEFAULT_BUDGET
    if not isinstance(budget, int) or isinstance(budget, bool) or not 0 <= budget < 2**63:
        raise bad(
            OP, "memory_budget", "be None or a number of bytes, an int of at least 0", budget, "pass 32 << 20 for 32 MiB"
        )
    return budget


def _check_grad_weight(linear_weight: Tensor, grad_weight: str, options: Options) -> None:
    if grad_weight == "dense":
        return
    if torch.compiler.is_compiling():
        remedy = "use 'dense' under torch.compile, or leave the loss outside"
        raise bad(OP, "grad_weight", "be 'dense' under torch.compile", grad_weight, remedy)
    if grad_weight == "sparse" and options.is_dense:
        rule = "be 'dense' or 'accumulate' where a token uses the whole vocabulary"
        remedy = "pass first_token='subset' with mle_weight=0 and subset='caption', 'random' or ids"
        raise bad(OP, "grad_weight", rule, grad_weight, remedy)
    if grad_weight == "accumulate" and linear_weight.requires_grad and not linear_weight.is_leaf:
        remedy = "pass the parameter itself, or grad_weight='dense'"
        raise bad(OP, "linear_weight", "be a leaf for grad_weight='accumulate'", "the result of an operation", remedy)
