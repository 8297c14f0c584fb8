"""What `additive_attention` accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _checks, _dtypes

OP = "additive_attention"
ACTIVATIONS = ("tanh", "relu")
# operator -> what has a row for each of what, where the gradient of the latter is asked for, and their places
WHOLE = {"weights_bwd": ("query", 3, "keys", 2), "context_bwd": ("weights", 1, "values", 2)}


def _check_float(name: str, x: object, remedy: str) -> None:
    _checks.check_tensor(OP, name, x, remedy)
    _checks.check_dtype(OP, name, x, _checks.FLOATS, f"call {name}.float()")
    _checks.check_dense(OP, name, x)


def check_memory(keys: Tensor, v: Tensor, values: Tensor, activation: str, mask: Tensor | None) -> None:
    _check_float("keys", keys, "pass the projected locations [B, L, A]")
    if keys.dim() != 3 or 0 in keys.shape[1:]:
        raise bad(OP, "keys", "have shape [B, L, A], L and A >= 1", list(keys.shape), "project the locations first")
    B, L, A = keys.shape
    _check_float("v", v, "pass the weight of the score [A]")
    _checks.check_shape(OP, "v", v, (A,), "[A]", "pass for example score.weight[0] of a Linear(A, 1)")
    _checks.check_device(OP, "v", v, keys)
    _check_float("values", values, "pass what the context is made of [B, L, D]")
    if values.dim() != 3 or values.shape[:2] != keys.shape[:2] or values.shape[2] < 1:
        rule = f"have shape [B, L, D] = [{B}, {L}, D], D >= 1"
        raise bad(OP, "values", rule, list(values.shape), "pass as many locations as keys")
    _checks.check_device(OP, "values", values, keys)
    if (values.dtype == torch.float64) != (keys.dtype == torch.float64):
        raise bad(OP, "values", f"have float64 where keys have it ({keys.dtype})", values.dtype, "convert one of them")
    _checks.check_choice(OP, "activation", activation, ACTIVATIONS, "pass activation='tanh'")
    if mask is not None:
        _checks.check_tensor(OP, "mask", mask, "pass None where all locations count")
        _checks.check_dtype(OP, "mask", mask, (torch.bool,), "call mask.bool(): True where there is a location")
        _checks.check_shape(OP, "mask", mask, (B, L), "[B, L]", "pass one value a location")
        _checks.check_device(OP, "mask", mask, keys)


def check_operator(name: str, given: list, backend: str) -> None:
    """The options of an operator that is called by itself, and that it can fill what it returns: the public functions pass
    nothing else."""
    if backend not in ("cpp", "triton"):
        raise bad(OP, "backend", "be 'cpp' or 'triton'", backend, "call the public function")
    for activation in (value for value in given if isinstance(value, str)):
        _checks.check_choice(OP, "activation", activation, ACTIVATIONS, "call the public function")
    if name in WHOLE and given[-1]:
        one, i, other, j = WHOLE[name]
        if given[i].shape[0] != given[j].shape[0]:
            rule = f"have a row for each of {other}, {given[j].shape[0]}, whose gradient is asked for"
            raise bad(OP, one, rule, given[i].shape[0], "call the public function")


def check_query(query: Tensor, keys: Tensor, rows: tuple[int] | None) -> None:
    """`rows`: how many there must be; None: up to those of keys."""
    _check_float("query", query, "pass the projected state [B, A]")
    B, _, A = keys.shape
    fits = query.dim() == 2 and query.shape[1] == A and (query.shape[0] == B if rows else query.shape[0] <= B)
    if not fits:
        rule = f"have shape [B, A] = {[B, A]}" if rows else f"have shape [n, A], n <= {B}, A = {A}"
        raise bad(OP, "query", rule, list(query.shape), "project the state of the decoder to the width of keys")
    _checks.check_device(OP, "query", query, keys)


def check_weights(alpha: Tensor, keys: Tensor, rows: int | None, mask: Tensor | None) -> Tensor:
    """The weights in the dtype of sums, 0 where a location does not count."""
    _check_float("alpha", alpha, "pass weights [B, L] or None")
    B, L, _ = keys.shape
    fits = alpha.dim() == 2 and alpha.shape[1] == L and (alpha.shape[0] <= B if rows is None else alpha.shape[0] == rows)
    if not fits:
        rule = f"have shape [B, L] = {[B, L]}" if rows is not None else f"have shape [n, L], n <= {B}, L = {L}"
        raise bad(OP, "alpha", rule, list(alpha.shape), "pass one weight a location")
    _checks.check_device(OP, "alpha", alpha, keys)
    if mask is not None:
        alpha = alpha.masked_fill(~mask[: len(alpha)], 0.0)
    return alpha.to(_dtypes.acc_of(keys)).contiguous()
