"""What the coverage penalties share: which steps count, what each location's sum should be, and the penalty of the sums.

The sums S [B, L] or [B, heads, L] are the attention that each location got over the valid steps of a caption, and the
penalty is of their distance from tau [B]: docs/math/attention_coverage.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _checks, _dtypes

REDUCTIONS = ("none", "mean", "batchmean", "sum")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def prepare(
    op: str,
    alpha: Tensor,
    lengths: Tensor | list[int] | None,
    mask: Tensor | None,
    target: float | str | Tensor,
    reduction: str,
) -> tuple[Tensor | None, float, Tensor | None]:
    """Raises for a bad argument of attention_coverage; returns (valid, target, tau) as its operators take them."""
    if not isinstance(alpha, Tensor) or alpha.dtype not in _checks.FLOATS or alpha.layout != torch.strided:
        _checks.check_tensor(op, "alpha", alpha, "pass the attention weights")
        _checks.check_dtype(op, "alpha", alpha, _checks.FLOATS, "convert the attention weights")
        _checks.check_dense(op, "alpha", alpha)
    shape = alpha.shape
    if len(shape) not in (3, 4) or shape[-1] < 1:
        rule = "have shape [B, T, L] or [B, heads, T, L], L >= 1"
        raise bad(op, "alpha", rule, list(shape), "stack the weights of the steps in dimension 1")
    check_reduction(op, reduction)
    valid = None if lengths is None and mask is None else valid_steps(op, lengths, mask, alpha)
    return valid, *target_sums(op, target, valid, alpha, shape[-1])


def check_reduction(op: str, reduction: str) -> None:
    _checks.check_choice(op, "reduction", reduction, REDUCTIONS, "pass reduction='mean'")


def valid_steps(op: str, lengths: Tensor | list[int] | None, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """[B, T] bool on the device of `like` [B, ..., T, X]: the steps that count; None where all do. Checks both arguments."""
    if lengths is None and mask is None:
        return None
    B, T = like.shape[0], like.shape[-2]
    if mask is not None:
        if lengths is not None:
            raise bad(op, "mask", "be None where lengths are given", "both", "pass one of them")
        _checks.check_tensor(op, "mask", mask, "pass a bool tensor, True where a step counts")
        _checks.check_dtype(op, "mask", mask, (torch.bool,), "pass mask != 0, True where a step counts")
        _checks.check_dense(op, "mask", mask)
        _checks.check_shape(op, "mask", mask, (B, T), "[B, T]", "one value a caption and step, heads share it")
        _checks.check_device(op, "mask", mask, like)
        return mask
    if isinstance(lengths, Tensor):
        _checks.check_dtype(op, "lengths", lengths, INTEGERS, "pass the number of steps of each caption")
        _checks.check_dense(op, "lengths", lengths)
    elif isinstance(lengths, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in lengths):
        lengths = torch.tensor(lengths, dtype=torch.int64)
    else:
        raise bad(op, "lengths", "be a tensor or a list of ints", lengths, "pass the number of steps of each caption")
    _checks.check_shape(op, "lengths", lengths, (B,), "[B]", "pass the number of steps of each caption")
    if lengths.device != like.device:
        if lengths.device.type != "cpu":  # lengths of packed sequences are on the CPU, wherever the rest is
            _checks.check_device(op, "lengths", lengths, like)
        _check_lengths(op, lengths, T)
        lengths = lengths.to(like.device, non_blocking=True)
    else:
        _check_lengths(op, lengths, T)
    return torch.arange(T, device=like.device) < lengths.unsqueeze(1)


def _check_lengths(op: str, lengths: Tensor, T: int) -> None:
    if _checks.checks_values(lengths):
        wrong = [n for n in lengths.tolist() if not 0 <= n <= T]
        if wrong:
            raise bad(op, "lengths", f"lie in [0, T] = [0, {T}]", wrong[0], "count the steps that there are")


def target_sums(
    op: str, target: float | str | Tensor, valid: Tensor | None, like: Tensor, L: int
) -> tuple[float, Tensor | None]:
    """(number, None) where all captions have the same tau, else (0, tau [B]) in the dtype of sums. Checks the argument."""
    if isinstance(target, (float, int)) and not isinstance(target, bool) and -math.inf < target < math.inf:
        return float(target), None
    acc = _dtypes.acc_of(like)
    if isinstance(target, Tensor):
        _checks.check_dtype(op, "target", target, _checks.FLOATS, "call target.float()")
        _checks.check_dense(op, "target", target)
        _checks.check_shape(op, "target", target, like.shape[:1], "[B]", "pass one number a caption, or a float for all")
        _checks.check_device(op, "target", target, like)
        if target.requires_grad:
            raise bad(op, "target", "not require a gradient", "requires_grad=True", "pass target.detach()")
        return 0.0, target.to(acc)
    if not isinstance(target, str) or target != "length":
        rule = "be a finite number, 'length' or a tensor [B]"
        raise bad(op, "target", rule, target, "pass 1.0, or 'length' for T_b / L")
    if valid is None:
        return like.shape[-2] / L, None
    return 0.0, valid.sum(1, dtype=acc) / L


def divisor(reduction: str, shape: torch.Size) -> int:
    """What the sum over S [B, L] or [B, heads, L] is divided by; at least 1, for an empty batch's sum is 0."""
    if reduction in ("sum", "none"):
        return 1
    terms = math.prod(shape if reduction == "mean" else shape[:-1])
    return max(terms, 1)


def penalty(S: Tensor, target: float, tau: Tensor | None, reduction: str) -> Tensor:
    """The penalty of the sums S [B, L] or [B, heads, L], in plain torch."""
    wanted = target if tau is None else tau.view(-1, *(1,) * (S.dim() - 1))
    squares = (wanted - S).square()
    return squares if reduction == "none" else squares.sum() / divisor(reduction, S.shape)


_stack_length = getattr(torch._C, "_len_torch_dispatch_stack", None)


def unwatched(x: Tensor) -> bool:
    """Whether the dispatcher would do no more for an operator on `x` than call its implementation: decision 10."""
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not x.is_neg()
    return plain and _stack_length is not None and _stack_length() == 0
