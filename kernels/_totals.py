"""Totals over a batch, each by one program, so that the sum has one order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def denominator_kernel(
    target_ptr, weight_ptr, inv_denom_ptr, target_strides, N, T, V,
    IGNORE_INDEX: tl.constexpr, IS_MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """1 / the sum of the valid tokens' class weights, 0 where that is 0; 1 where it is no mean."""
    total = tl.zeros((BLOCK_N,), ACC)
    if IS_MEAN:
        for start in range(0, N, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            p_y = target_ptr + (o_n // T).to(tl.int64) * target_strides[0] + (o_n % T).to(tl.int64) * target_strides[1]
            y = tl.load(p_y, mask=o_n < N, other=IGNORE_INDEX)
            w = tl.where(y != IGNORE_INDEX, 1.0, 0.0).to(ACC)
            if weight_ptr is not None:
                w *= tl.load(weight_ptr + y, mask=(y >= 0) & (y < V) & (y != IGNORE_INDEX), other=0.0)
            total += w
        denom = tl.sum(total, 0)
    else:
        denom = tl.full((), 1.0, ACC)
    some = denom != 0
    tl.store(inv_denom_ptr, tl.where(some, 1 / tl.where(some, denom, 1.0), 0.0))


@triton.jit
def reduce_kernel(loss_ptr, inv_denom_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_N,), loss_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        total += tl.load(loss_ptr + o_n, mask=o_n < N, other=0.0)
    factor = tl.load(inv_denom_ptr)
    tl.store(out_ptr, tl.where(factor == 0, 0.0, tl.sum(total, 0) * factor))


@triton.jit
def scaled_sum_kernel(part_ptr, out_ptr, N, scale: tl.float64, BLOCK_N: tl.constexpr):
    """The sum of N parts, times `scale`."""
    total = tl.zeros((BLOCK_N,), part_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        total += tl.load(part_ptr + o_n, mask=o_n < N, other=0.0)
    tl.store(out_ptr, tl.sum(total, 0) * tl.full((), scale, part_ptr.dtype.element_ty))


def divisor(pairs: int, L: int, reduction: str) -> int:
    """What the sum over captions and heads, `pairs` of them, and L locations is divided by."""
    return {"mean": pairs * L, "batchmean": pairs}.get(reduction, 1)
