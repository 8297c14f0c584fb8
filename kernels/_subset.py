"""Device functions of the losses over a subset of the vocabulary. Maths and names: csrc/subset_cross_entropy/*.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge(m, s, z):
    """The running max m and sum s of exp(. - m) [BLOCK], lane by lane, after a block z. -inf adds nothing."""
    m_new = tl.maximum(m, z)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, s * tl.exp(m - shift) + tl.exp(z - shift)


@triton.jit
def finish(m, s):
    """log sum exp of the lanes."""
    top = tl.max(m, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.sum(s * tl.exp(m - shift), 0))


@triton.jit
def part_of(lse, z_y, w_y, n, sum_w, sum_wz, smoothing, z_loss):
    """One part's loss and the coefficients (A, S, D) of its gradient."""
    d = (1 - smoothing) * w_y
    s = smoothing / n
    loss = d * (lse - z_y) + z_loss * w_y * lse * lse
    loss += tl.where(smoothing > 0, s * (sum_w * lse - sum_wz), 0.0)
    return loss, d + s * sum_w + 2 * z_loss * w_y * lse, s, d


@triton.jit
def load_ids(p_ids, ids_strides, start, K, y, IDS_PAD: tl.constexpr, UNIQUE: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of a token's ids, and which of them are candidates beside the target: no pad, no repeat, not the target."""
    o_k = start + tl.arange(0, BLOCK_K)
    ids = tl.load(p_ids + o_k * ids_strides[2], mask=o_k < K, other=IDS_PAD)
    m_k = (ids != IDS_PAD) & (ids != y) & (o_k < K)
    if not UNIQUE:  # then K <= BLOCK_K, and this is the only block
        o_j = tl.arange(0, BLOCK_K)
        others = tl.load(p_ids + o_j * ids_strides[2], mask=o_j < K, other=IDS_PAD)
        repeats = (ids[:, None] == others[None, :]) & (o_j[None, :] < o_k[:, None])
        m_k &= tl.sum(repeats.to(tl.int32), 1) == 0
    return ids, m_k


@triton.jit
def dense_gradient(
    z, o_v, y, gone, weight_ptr, V,
    lse_f, a_f, s_f, d_f, lse_r, a_r, s_r, d_r,
    CAP: tl.constexpr, IS_REVERSE: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """The dense parts' d loss / d x at columns o_v whose capped logits are z."""
    is_y = o_v == y
    dz = tl.where(a_f != 0, a_f * tl.exp(z - lse_f), 0.0) - tl.where(is_y, d_f, 0.0)
    if SMOOTH:
        if weight_ptr is None:
            w = 1.0
        else:
            w = tl.load(weight_ptr + o_v, mask=(o_v >= 0) & (o_v < V), other=0.0)
        dz -= s_f * w
    if IS_REVERSE:
        kept = (gone == 0) | is_y
        rest = tl.where(a_r != 0, a_r * tl.exp(z - lse_r), 0.0) - tl.where(is_y, d_r, 0.0)
        if SMOOTH:
            rest -= s_r * w
        dz += tl.where(kept, rest, 0.0)
    if CAP > 0:
        dz *= 1 - (z / CAP) * (z / CAP)
    return dz
