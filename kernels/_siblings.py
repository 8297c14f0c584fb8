"""The other texts of the same image, for contrastive_reward, and numbers as integers in their order.

A program takes an image. Its texts lie side by side in an order by image, made on the device: two passes over them, no
atomics, nothing waits. With i1 the text that scores highest, m1, and m2 the second highest score,

  value_p  = m1 + log(1 + S1 - exp(s_p - m1)),  S1 the sum of exp(s_i - m1) over i != i1      p != i1
  value_i1 = m2 + log(sum of exp(s_i - m2) over i != i1)
  down_p   = exp(s_p - m1) (A - g_p exp(m1 - value_p)) + g_i1 exp(s_p - value_i1)             p != i1
  down_i1  = A,  the sum of g_i exp(m1 - value_i) over i != i1                                g is dvalue

so that a text leaves its group's sum and nothing cancels: 1 + S1 holds what is taken away, which is at most 1, twice.

Floor, bytes: 20 P read and 4 P written. What takes time is the order: torch's sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcap.kernels._common import Launch, acc_of, block_of, run


@triton.jit
def sort_key(x, KEY: tl.constexpr):
    """Integers in the order of x, int32 of float32 and int64 of float64: -0 and 0 are alike, NaN is above all. The smallest
    integer is no number's."""
    MOST: tl.constexpr = 2**31 - 1 if KEY == tl.int32 else 2**63 - 1
    bits = tl.where(x == 0, 0.0, x).to(KEY, bitcast=True)
    return tl.where(x != x, MOST, tl.where(bits < 0, bits ^ MOST, bits))


@triton.jit
def number_of(key, ACC: tl.constexpr):
    """What has this key; -inf for the smallest integer."""
    MOST: tl.constexpr = 2**63 - 1 if ACC == tl.float64 else 2**31 - 1
    x = tl.where(key < 0, key ^ MOST, key).to(ACC, bitcast=True)
    return tl.where(key == -MOST - 1, float("-inf"), x)


@triton.jit
def _two_highest(own_ptr, order_ptr, begin, end, KEY: tl.constexpr, BLOCK: tl.constexpr):
    """The texts that score highest and second highest among places begin to end of the order, of equals the first; -1 for
    none. NaN is highest."""
    NONE: tl.constexpr = -(2**31) if KEY == tl.int32 else -(2**63)
    BEHIND: tl.constexpr = 2**31 - 1
    k1, k2 = tl.full((), NONE, KEY), tl.full((), NONE, KEY)
    i1, i2 = tl.full((), -1, tl.int64), tl.full((), -1, tl.int64)
    o = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        m = start + o < end
        p = tl.load(order_ptr + start + o, mask=m, other=0)
        key = tl.where(m, sort_key(tl.load(own_ptr + p, mask=m, other=0.0), KEY), NONE)
        high = tl.max(key, 0)
        at = tl.min(tl.where(key == high, o, BEHIND), 0)
        rest = tl.where(o == at, NONE, key)
        low = tl.max(rest, 0)
        low_at = tl.min(tl.where(rest == low, o, BEHIND), 0)
        first = tl.load(order_ptr + start + at)
        second = tl.load(order_ptr + start + low_at, mask=low != NONE, other=-1)
        is_new = high > k1
        i2 = tl.where(is_new, tl.where(low > k1, second, i1), tl.where(high > k2, first, i2))
        k2 = tl.where(is_new, tl.maximum(k1, low), tl.maximum(k2, high))
        k1, i1 = tl.where(is_new, high, k1), tl.where(is_new, first, i1)
    return i1, i2


@triton.jit
def _contrastive_reward_others_fwd_kernel(
    own_ptr, order_ptr, bounds_ptr, value_ptr, index_ptr, KEY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_q = tl.program_id(0)
    begin, end = tl.load(bounds_ptr + i_q), tl.load(bounds_ptr + i_q + 1)
    i1, i2 = _two_highest(own_ptr, order_ptr, begin, end, KEY, BLOCK)
    m1 = tl.load(own_ptr + i1, mask=i1 >= 0, other=float("-inf"))
    m2 = tl.load(own_ptr + i2, mask=i2 >= 0, other=float("-inf"))
    shift1, shift2 = tl.where(m1 == float("-inf"), 0.0, m1), tl.where(m2 == float("-inf"), 0.0, m2)
    o = tl.arange(0, BLOCK)
    s1, s2 = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    if index_ptr is None:
        for start in range(begin, end, BLOCK):
            m = start + o < end
            p = tl.load(order_ptr + start + o, mask=m, other=0)
            s = tl.load(own_ptr + p, mask=m, other=0.0)
            other = m & (p != i1)
            s1 += tl.where(other, tl.exp(s - shift1), 0.0)
            s2 += tl.where(other, tl.exp(s - shift2), 0.0)
    sum1, sum2 = tl.sum(s1, 0), tl.sum(s2, 0)
    for start in range(begin, end, BLOCK):
        m = start + o < end
        p = tl.load(order_ptr + start + o, mask=m, other=0)
        is_first = p == i1
        if index_ptr is None:
            s = tl.load(own_ptr + p, mask=m & (p != i1), other=float("-inf"))
            value = m1 + tl.log(1 + (sum1 - tl.exp(s - shift1)))
            value = tl.where(is_first, m2 + tl.log(tl.where(i2 >= 0, sum2, 1.0)), value)
            top = tl.where(is_first, m2, m1)
            value = tl.where(top == float("inf"), top, value)  # differences of infinite scores are no numbers
        else:
            value = tl.where(is_first, m2, m1)
            tl.store(index_ptr + p, tl.where(is_first, i2, i1), mask=m)
        tl.store(value_ptr + p, value, mask=m)


@triton.jit
def _contrastive_reward_others_bwd_kernel(
    dvalue_ptr, value_ptr, own_ptr, order_ptr, bounds_ptr, down_ptr,
    KEY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(0)
    begin, end = tl.load(bounds_ptr + i_q), tl.load(bounds_ptr + i_q + 1)
    i1, i2 = _two_highest(own_ptr, order_ptr, begin, end, KEY, BLOCK)
    some = i2 >= 0
    m1 = tl.load(own_ptr + i1, mask=some, other=0.0)
    g1, value1 = tl.load(dvalue_ptr + i1, mask=some, other=0.0), tl.load(value_ptr + i1, mask=some, other=0.0)
    o = tl.arange(0, BLOCK)
    a = tl.zeros((BLOCK,), ACC)
    for start in range(begin, end, BLOCK):
        m = start + o < end
        p = tl.load(order_ptr + start + o, mask=m, other=0)
        m = m & (p != i1)
        g, value = tl.load(dvalue_ptr + p, mask=m, other=0.0), tl.load(value_ptr + p, mask=m, other=0.0)
        a += tl.where(m, g * tl.exp(m1 - value), 0.0)
    total = tl.sum(a, 0)
    for start in range(begin, end, BLOCK):
        m = start + o < end
        p = tl.load(order_ptr + start + o, mask=m, other=0)
        other = m & (p != i1)
        s, value = tl.load(own_ptr + p, mask=other, other=0.0), tl.load(value_ptr + p, mask=other, other=0.0)
        g = tl.load(dvalue_ptr + p, mask=other, other=0.0)
        down = tl.exp(s - m1) * (total - g * tl.exp(m1 - value)) + g1 * tl.exp(s - value1)
        tl.store(down_ptr + p, tl.where(other, down, total), mask=m)


# Launchers -------------------------------------------------------------------------------------------------------------


def _groups(own, positive, Q) -> dict[str, object]:
    """The texts in an order by image, [P], where each image's begin in it, [Q + 1], and how kernels go through them."""
    if positive.device.type == "meta":
        order, bounds = torch.empty_like(positive), positive.new_empty(Q + 1)
    else:
        by_image, order = torch.sort(positive, stable=True)
        bounds = torch.searchsorted(by_image, torch.arange(Q + 1, device=positive.device))
    block = block_of(2 * triton.cdiv(positive.shape[0], Q), 1024)
    key = tl.int64 if own.dtype == torch.float64 else tl.int32
    return dict(order_ptr=order, bounds_ptr=bounds, KEY=key, ACC=acc_of(own), BLOCK=block)


def _warps(groups) -> int:
    return max(1, groups["BLOCK"] // 256)


def plan_contrastive_reward_others_fwd(own, positive, Q, value, index) -> list[Launch]:
    groups = _groups(own, positive, Q)
    return [Launch(_contrastive_reward_others_fwd_kernel, (Q,), dict(
        **groups, own_ptr=own.contiguous(), value_ptr=value, index_ptr=index if index.numel() else None,
    ), num_warps=_warps(groups))]  # fmt: skip


def plan_contrastive_reward_others_bwd(dvalue, value, own, positive, Q, down) -> list[Launch]:
    groups = _groups(own, positive, Q)
    return [Launch(_contrastive_reward_others_bwd_kernel, (Q,), dict(
        **groups, dvalue_ptr=dvalue.contiguous(), value_ptr=value.contiguous(), own_ptr=own.contiguous(), down_ptr=down,
    ), num_warps=_warps(groups))]  # fmt: skip


def contrastive_reward_others_fwd(own, positive, Q, value, index) -> None:
    """Writes the outputs of torch.ops.fastcap.contrastive_reward_others_fwd."""
    value.fill_(-torch.inf)  # a text whose image is none of the Q has no others
    index.fill_(-1)
    if own.numel() and Q:
        run(plan_contrastive_reward_others_fwd(own, positive, Q, value, index), own)


def contrastive_reward_others_bwd(dvalue, value, own, positive, Q, down) -> None:
    """Writes the output of torch.ops.fastcap.contrastive_reward_others_bwd."""
    down.zero_()
    if own.numel() and Q:
        run(plan_contrastive_reward_others_bwd(dvalue, value, own, positive, Q, down), own)
