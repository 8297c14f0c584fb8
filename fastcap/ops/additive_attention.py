"""Additive attention over the locations of an image: the soft (and hard) attention of Show, Attend and Tell.

The story, top to bottom: what is computed (`reference`, plain torch); the operators of `torch.ops.fastcap`, two pairs of
forward and backward, for the weights (which read keys) and for the context (which reads values), and one for the gradient of
keys that many steps share; the autograd.Functions; the public function; and `additive_attention_steps`, for a decoder that
attends to the same locations at every word. The maths is in docs/math/additive_attention.md and csrc/additive_attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _additive, _backend, _dtypes
from fastcap.ops._additive import OP
from fastcap.ops._autograd import once


def reference(
    keys: Tensor,
    query: Tensor,
    v: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    activation: str,
) -> tuple[Tensor | None, Tensor]:
    """(context, alpha) in plain torch, in the dtype of sums, differentiable any number of times. O(B L A) memory a call."""
    acc = query.dtype
    if mask is not None:  # what does not count may hold anything, NaN too
        keys = keys.masked_fill(~mask.unsqueeze(2), 0.0)
        values = None if values is None else values.masked_fill(~mask.unsqueeze(2), 0.0)
    hidden = keys.to(acc) + query.unsqueeze(1)
    # Products element by element: autocast, in whose dtype matrices would multiply, may be on in the backward too
    scores = ((torch.tanh(hidden) if activation == "tanh" else torch.relu(hidden)) * v).sum(2)
    if mask is not None:
        some = mask.any(1, keepdim=True)
        scores = scores.masked_fill(~mask, -torch.inf).masked_fill(~some, 0.0)
    alpha = torch.softmax(scores, dim=1)
    if mask is not None:
        alpha = alpha.masked_fill(~mask, 0.0)
    if values is None:
        return None, alpha
    return _context(alpha if weights is None else weights, values), alpha


def _context(weights: Tensor, values: Tensor) -> Tensor:
    return (weights.unsqueeze(2) * values.to(weights.dtype)).sum(1)


# Operators -------------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastcap", "FRAGMENT")
for _schema in (
    "weights_fwd(Tensor keys, Tensor query, Tensor v, Tensor? mask, str activation, str backend) -> Tensor",
    "weights_bwd(Tensor dalpha, Tensor alpha, Tensor keys, Tensor query, Tensor v, str activation, bool need_keys, "
    "str backend) -> (Tensor dscore, Tensor dquery, Tensor dv, Tensor dkeys)",
    "context_fwd(Tensor weights, Tensor values, str backend) -> Tensor",
    "context_bwd(Tensor dcontext, Tensor weights, Tensor values, bool need_weights, bool need_values, str backend) "
    "-> (Tensor dweights, Tensor dvalues)",
    "memory_bwd(Tensor dscores, Tensor queries, Tensor keys, Tensor v, str activation, str backend) "
    "-> (Tensor dv, Tensor dkeys)",
):
    _library.define(f"{OP}_{_schema}", tags=(torch.Tag.pt2_compliant_tag,))


def _weights_fwd_outputs(keys, query, v, mask, activation, backend):
    return query.new_empty(query.shape[0], keys.shape[1])


def _weights_bwd_outputs(dalpha, alpha, keys, query, v, activation, need_keys, backend):
    return (
        alpha.new_empty(alpha.shape),
        query.new_empty(query.shape),
        query.new_empty(v.shape if need_keys else (0,)),
        keys.new_empty(keys.shape if need_keys else (0,)),
    )


def _context_fwd_outputs(weights, values, backend):
    return weights.new_empty(weights.shape[0], values.shape[2])


def _context_bwd_outputs(dcontext, weights, values, need_weights, need_values, backend):
    return (
        weights.new_empty(weights.shape if need_weights else (0,)),
        values.new_empty(values.shape if need_values else (0,)),
    )


def _memory_bwd_outputs(dscores, queries, keys, v, activation, backend):
    return v.new_empty(v.shape), keys.new_empty(keys.shape)


def _register(name: str, outputs_of) -> None:
    """`name` with outputs made by `outputs_of`, and written by the backend's launcher of that name."""

    def run(*args):
        *given, backend = args
        _additive.check_operator(name, given, backend)
        outputs = outputs_of(*args)
        made = outputs if isinstance(outputs, tuple) else (outputs,)
        getattr(_launcher(backend), f"{OP}_{name}")(*given, *made)
        return outputs

    for key in ("CPU", "CUDA"):
        _library.impl(f"{OP}_{name}", run, key)
    _library.impl(f"{OP}_{name}", outputs_of, "Meta")


def _launcher(backend: str):
    """The module that runs a backend; reached here, inside a function, so that importing fastcap imports neither."""
    if backend == "triton":
        from fastcap.kernels import additive_attention as triton_launcher

        return triton_launcher
    from fastcap.ops import _native

    return _native.CPU


_register("weights_fwd", _weights_fwd_outputs)
_register("weights_bwd", _weights_bwd_outputs)
_register("context_fwd", _context_fwd_outputs)
_register("context_bwd", _context_bwd_outputs)
_register("memory_bwd", _memory_bwd_outputs)


# Autograd --------------------------------------------------------------------------------------------------------------


class _Weights(torch.autograd.Function):
    """alpha [n, L]. With `token` [B, L + A], of which nothing is read, the gradient of keys and v is left to `_Memory`."""

    @staticmethod
    def forward(ctx, keys, query, v, mask, token, activation, backend):
        alpha = torch.ops.fastcap.additive_attention_weights_fwd(keys, query, v, mask, activation, backend)
        ctx.save_for_backward(keys, query, v, alpha)
        ctx.activation, ctx.backend = activation, backend
        return alpha

    @staticmethod
    def backward(ctx, dalpha):
        keys, query, v, alpha = ctx.saved_tensors
        need_keys = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        dscore, dquery, dv, dkeys = torch.ops.fastcap.additive_attention_weights_bwd(
            dalpha.contiguous(), alpha, keys, query, v, ctx.activation, need_keys, ctx.backend
        )
        if not need_keys:
            dv = dkeys = None
        dtoken = _message(keys.shape[0], dscore, query) if ctx.needs_input_grad[4] else None
        of = dalpha, alpha  # of which alpha, an output, is a function of all that came in
        return *_each_once((dkeys, dquery, dv), *of), None, dtoken, None, None


class _Context(torch.autograd.Function):
    """context [n, D] of weights [n, L]. With `token` [B, L + D] the gradient of values is left to `_Memory`."""

    @staticmethod
    def forward(ctx, weights, values, token, backend):
        ctx.save_for_backward(weights, values)
        ctx.backend = backend
        return torch.ops.fastcap.additive_attention_context_fwd(weights, values, backend)

    @staticmethod
    def backward(ctx, dcontext):
        weights, values = ctx.saved_tensors
        need_weights, need_values, need_token, _ = ctx.needs_input_grad
        dcontext, dweights, dvalues = dcontext.contiguous(), None, None
        if need_weights or need_values:
            dweights, dvalues = torch.ops.fastcap.additive_attention_context_bwd(
                dcontext, weights, values, need_weights, need_values, ctx.backend
            )
        dtoken = _message(values.shape[0], weights, dcontext) if need_token else None
        gradients = dweights if need_weights else None, dvalues if need_values else None
        return *_each_once(gradients, dcontext, weights, values), dtoken, None


class _Memory(torch.autograd.Function):
    """One token a step, for weights [T, B, L + A] and for contexts [T, B, L + D]: zeros that take no memory, never read.

    Their gradient is how the steps report: (de, query) of the weights, (weights, dcontext) of the contexts. Autograd runs
    this backward after the last of them, so that the gradients of keys and values are formed once, from all steps together.
    """

    @staticmethod
    def forward(ctx, keys, v, values, mask, T, activation, backend):
        ctx.save_for_backward(keys, v, mask)
        ctx.values_dtype, ctx.activation, ctx.backend = values.dtype, activation, backend
        ctx.set_materialize_grads(False)
        B, L, A = keys.shape
        return v.new_zeros(()).expand(T, B, L + A), v.new_zeros(()).expand(T, B, L + values.shape[2])

    @staticmethod
    def backward(ctx, of_weights, of_contexts):
        keys, v, mask = ctx.saved_tensors
        need_keys, need_v, need_values = ctx.needs_input_grad[:3]
        L = keys.shape[1]
        dkeys = dv = dvalues = None
        if of_weights is not None and (need_keys or need_v):
            dv, dkeys = torch.ops.fastcap.additive_attention_memory_bwd(
                of_weights[..., :L], of_weights[..., L:], keys, v, ctx.activation, ctx.backend
            )
        if of_contexts is not None and need_values:
            weights, dcontexts = of_contexts[..., :L], of_contexts[..., L:]
            with torch.autocast(weights.device.type, enabled=False):  # a backward may run inside it
                dvalues = torch.bmm(weights.permute(1, 2, 0), dcontexts.transpose(0, 1)).to(ctx.values_dtype)
            if mask is not None:  # where an upstream gradient overflowed, 0 times it
                dvalues.masked_fill_(~mask.unsqueeze(2), 0.0)
        return *_each_once((dkeys, dv, dvalues), of_weights, of_contexts, keys, v), None, None, None, None


def _message(B: int, left: Tensor, right: Tensor) -> Tensor:
    """[B, *]: left [n, .] and right [n, .] side by side, and below them zeros."""
    message = torch.cat((left, right), dim=1)
    return message if len(message) == B else torch.nn.functional.pad(message, (0, 0, 0, B - len(message)))


def _each_once(gradients: tuple[Tensor | None, ...], *of: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else once(OP, gradient, *of) for gradient in gradients)


# Public functions ------------------------------------------------------------------------------------------------------


def additive_attention(
    keys: Tensor,
    query: Tensor,
    v: Tensor,
    values: Tensor,
    *,
    activation: str = "tanh",
    mask: Tensor | None = None,
    alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Additive attention: a softmax over the locations of an image, and the weighted sum of what lies there.

    Equivalent to::

        scores = torch.tanh(keys + query[:, None]) @ v               # [B, L]; relu with activation="relu"
        alpha = scores.masked_fill(~mask, -inf).softmax(1)           # mask may be None
        context = (alpha[:, None] @ values).squeeze(1)               # [B, D]

    but the [B, L, A] activation is never stored: the backward makes it again, row by row.

    Args:
        keys: [B, L, A], the locations projected to the attention's width ("U a"); float32, float64, float16 or bfloat16, any
            strides.
        query: [B, A], the decoder's state projected ("W h"), with the biases of both projections.
        v: [A], what turns the activation into a score. A bias of the score would change nothing: the softmax cancels it.
        values: [B, L, D], what the context is made of; often the annotations themselves.
        activation: "tanh" (Bahdanau et al., Xu et al.) or "relu" (the widely used PyTorch tutorial).
        mask: [B, L] bool, False where there is no location: those may hold anything, get a weight of 0 and no gradient.
        alpha: [B, L] weights of your own, which the context then uses in place of the softmax's: the one-hot samples of hard
            attention, or weights to be imitated. They may require a gradient. The softmax is returned all the same.

    Returns:
        (context [B, D], alpha [B, L]), alpha being the softmax's. An image with no location that counts has zeros in both.
        In the dtypes of values and keys, float32 under autocast.

    Raises:
        FastcapError: an argument breaks its rule; the message names it.
        RuntimeError: in a double backward or under a torch.func transform, which only the reference backend supports.

    Deterministic. Sums run in float32 (float64 for float64 keys). Between forward and backward it keeps alpha, query, and
    the tensors it was given. The kernels do not read a location of weight exactly 0 for the context: NaN there does
    not reach it.
    For a decoder that attends at each of T words to the same image, see `additive_attention_steps`.

    Source: Xu et al., Show, Attend and Tell (arXiv:1502.03044), section 3.1.2 and equations 4 to 6.

    >>> import torch
    >>> keys, values = torch.zeros(1, 4, 8), torch.arange(4.0).view(1, 4, 1)
    >>> context, alpha = additive_attention(keys, torch.zeros(1, 8), torch.ones(8), values)
    >>> context.item(), alpha.tolist()
    (1.5, [[0.25, 0.25, 0.25, 0.25]])
    """
    _additive.check_memory(keys, v, values, activation, mask)
    backend = _backend.select(OP, keys.device.type, _backend.NO_CUDA)
    _additive.check_query(query, keys, keys.shape[:1])
    acc = _dtypes.acc_of(keys)
    query, v = query.to(acc).contiguous(), v.to(acc).contiguous()
    weights = None if alpha is None else _additive.check_weights(alpha, keys, keys.shape[0], mask)
    if backend == "reference":
        context, alpha = reference(keys, query, v, values, mask, weights, activation)
    else:
        alpha = _Weights.apply(keys, query, v, mask, None, activation, backend)
        context = _Context.apply(alpha if weights is None else weights, values, None, backend)
    return context.to(_dtypes.result_of(values)), alpha.to(_dtypes.result_of(keys))


def additive_attention_steps(
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    *,
    steps: int,
    activation: str = "tanh",
    mask: Tensor | None = None,
) -> AdditiveAttentionSteps:
    """`additive_attention` at each of T steps of a decoder to the same locations, with their gradients formed once.

    `attend = additive_attention_steps(keys, v, values, steps=T)`, then at most T times `context, alpha = attend(query)`:
    what `additive_attention(keys, query, v, values)` returns, with the same gradients. But where T calls of that write the
    gradients of keys and values T times and add them up, here each step keeps its query, its weights and their gradients,
    O(B T (L + A + D)) in all, and the gradients of keys, v and values are written once, after the backward of all steps.

    Args:
        keys, v, values, activation, mask: as of `additive_attention`.
        steps: how many calls there will be at most. One that does not come costs 4 B (2 L + A + D) bytes while the backward
            runs.

    Returns:
        A callable. Each call takes query [n, A] for the first n <= B rows (captions sorted by length leave the batch as they
        end) and returns (context [n, D], alpha [n, L]). Its methods `weights(query)` -> alpha and `context(alpha)` are the
        two halves of a step, for hard attention, which samples in between. Every call counts, also one that activation
        checkpointing repeats. Made under no_grad, it gives keys and values no gradient.

    Raises:
        FastcapError: an argument breaks its rule, or there are more than `steps` calls.
        RuntimeError: in a double backward or under a torch.func transform, which only the reference backend supports.

    >>> import torch
    >>> attend = additive_attention_steps(torch.zeros(2, 4, 8), torch.ones(8), torch.ones(2, 4, 3), steps=5)
    >>> context, alpha = attend(torch.zeros(1, 8))  # of the first image only
    >>> context.tolist()
    [[1.0, 1.0, 1.0]]
    """
    _additive.check_memory(keys, v, values, activation, mask)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise bad(OP, "steps", "be an int of at least 1", steps, "pass the most words of a caption")
    return AdditiveAttentionSteps(keys, v, values, steps, activation, mask)


class AdditiveAttentionSteps:
    """What `additive_attention_steps` returns."""

    def __init__(self, keys: Tensor, v: Tensor, values: Tensor, steps: int, activation: str, mask: Tensor | None) -> None:
        self._backend, self._activation, self._steps = (
            _backend.select(OP, keys.device.type, _backend.NO_CUDA),
            activation,
            steps,
        )
        self._of_weights = self._of_contexts = None
        self._called = {"weights": 0, "context": 0}
        v = v.to(_dtypes.acc_of(keys)).contiguous()
        if self._backend != "reference":
            if torch.is_grad_enabled() and any(x.requires_grad for x in (keys, v, values)):
                of_weights, of_contexts = _Memory.apply(keys, v, values, mask, steps, activation, self._backend)
                self._of_weights = of_weights.unbind(0) if keys.requires_grad or v.requires_grad else None
                self._of_contexts = of_contexts.unbind(0) if values.requires_grad else None
            keys, v, values = keys.detach(), v.detach(), values.detach()
        self._keys, self._v, self._values, self._mask = keys, v, values, mask

    def __call__(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(context [n, D], alpha [n, L]) of query [n, A]."""
        alpha = self._alpha(query)
        return self._context(alpha).to(_dtypes.result_of(self._values)), alpha.to(_dtypes.result_of(self._keys))

    def weights(self, query: Tensor) -> Tensor:
        """alpha [n, L] of query [n, A]."""
        return self._alpha(query).to(_dtypes.result_of(self._keys))

    def context(self, alpha: Tensor) -> Tensor:
        """The context [n, D] of weights [n, L], which may require a gradient."""
        weights = _additive.check_weights(alpha, self._keys, None, self._mask)
        return self._context(weights).to(_dtypes.result_of(self._values))

    def _alpha(self, query: Tensor) -> Tensor:
        _additive.check_query(query, self._keys, None)
        t = self._step("weights")
        n, query = query.shape[0], query.to(_dtypes.acc_of(self._keys)).contiguous()
        mask = None if self._mask is None else self._mask[:n]
        if self._backend == "reference":
            return reference(self._keys[:n], query, self._v, None, mask, None, self._activation)[1]
        token = None if self._of_weights is None else self._of_weights[t]
        return _Weights.apply(self._keys, query, self._v, mask, token, self._activation, self._backend)

    def _context(self, weights: Tensor) -> Tensor:
        t = self._step("context")
        if self._backend == "reference":
            values = self._values[: len(weights)]
            if self._mask is not None:
                values = values.masked_fill(~self._mask[: len(weights)].unsqueeze(2), 0.0)
            return _context(weights, values)
        return _Context.apply(
            weights, self._values, None if self._of_contexts is None else self._of_contexts[t], self._backend
        )

    def _step(self, kind: str) -> int:
        t = self._called[kind]
        if t == self._steps:
            raise bad(OP, "steps", "be at least the number of calls", self._steps, "pass the most words of a caption")
        self._called[kind] += 1
        return t
