"""Device functions of the losses over a subset of the vocabulary. Maths and names: csrc/common/subset.h."""

from __future__ import annotations

import triton
import triton.language as tl
from fastcap.kernels._common import softcap

# enum Stat in the C++ header
LSE_F, A_F, S_F, D_F, LSE_S, A_S, S_S, D_S = (tl.constexpr(i) for i in range(8))
NUM_STATS = 8


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
def add_to_state(p_state, m, s, n, w, wz):
    """The lanes' sums, merged into the five of a row's part."""
    top = tl.max(m, 0)
    m_old = tl.load(p_state)
    m_new = tl.maximum(top, m_old)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    total = tl.load(p_state + 1) * tl.exp(m_old - shift) + tl.sum(s * tl.exp(m - shift), 0)
    n_new = tl.load(p_state + 2) + tl.sum(n, 0)
    w_new = tl.load(p_state + 3) + tl.sum(w, 0)
    wz_new = tl.load(p_state + 4) + tl.sum(wz, 0)
    tl.debug_barrier()
    tl.store(p_state, m_new)
    tl.store(p_state + 1, total)
    tl.store(p_state + 2, n_new)
    tl.store(p_state + 3, w_new)
    tl.store(p_state + 4, wz_new)


@triton.jit
def part_of(lse, z_y, w_y, n, sum_w, sum_wz, smoothing, z_loss):
    """One part's loss and the coefficients (A, S, D) of its gradient."""
    d = (1 - smoothing) * w_y
    s = smoothing / n
    loss = d * (lse - z_y) + z_loss * w_y * lse * lse
    loss += tl.where(smoothing > 0, s * (sum_w * lse - sum_wz), 0.0)
    return loss, d + s * sum_w + 2 * z_loss * w_y * lse, s, d


@triton.jit
def token_of(
    target_ptr, target_strides, token_weight_ptr, token_weight_strides, weight_ptr, i_b, i_t, V, mle_weight,
    IGNORE_INDEX: tl.constexpr, IS_FULL: tl.constexpr, FIRST_FULL: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A token's target (0 where it has none), whether it has one, its class weight, the share of part F, and the factor of
    its loss: its token weight, NaN where the target is no word."""
    y = tl.load(target_ptr + i_b * target_strides[0] + i_t * target_strides[1])
    valid = y != IGNORE_INDEX
    wrong = valid & ((y < 0) | (y >= V))
    y = tl.where(valid & (y >= 0) & (y < V), y, 0)
    of_full = tl.full((), 1.0, ACC) if IS_FULL else mle_weight
    if FIRST_FULL:
        earlier = tl.zeros((), tl.int32)
        for past in range(0, i_t, BLOCK_T):
            o_t = past + tl.arange(0, BLOCK_T).to(tl.int64)
            labels = tl.load(
                target_ptr + i_b * target_strides[0] + o_t * target_strides[1], mask=o_t < i_t, other=IGNORE_INDEX
            )
            earlier += tl.sum((labels != IGNORE_INDEX).to(tl.int32), 0)
        of_full = tl.where(earlier == 0, 1.0, of_full).to(ACC)
    if weight_ptr is None:
        w_y = tl.full((), 1.0, ACC)
    else:
        w_y = tl.load(weight_ptr + y)
    scale = tl.where(valid, 1.0, 0.0).to(ACC)
    if token_weight_ptr is not None:
        scale *= tl.load(token_weight_ptr + i_b * token_weight_strides[0] + i_t * token_weight_strides[1])
    scale = tl.where(wrong, float("nan"), scale).to(ACC)  # loud, and never a wrong read
    return y, valid, w_y, of_full, scale


@triton.jit
def load_ids(p_ids, ids_strides, start, K, y, IDS_PAD: tl.constexpr, UNIQUE: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of a token's ids, and which of them are candidates beside the target: no pad, no repeat, not the target."""
    o_k = start + tl.arange(0, BLOCK_K)
    ids = tl.load(p_ids + o_k.to(tl.int64) * ids_strides[2], mask=o_k < K, other=IDS_PAD)
    m_k = (ids != IDS_PAD) & (ids != y) & (o_k < K)
    if not UNIQUE:  # then K <= BLOCK_K, and this is the only block
        o_j = tl.arange(0, BLOCK_K)
        others = tl.load(p_ids + o_j.to(tl.int64) * ids_strides[2], mask=o_j < K, other=IDS_PAD)
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


@triton.jit
def _load_scores(
    p_scores, score_stride, bias_ptr, ids, o_k, m_k, CAP: tl.constexpr, GATHER: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """A block of a token's candidates' logits, with bias and cap."""
    place = ids if GATHER else o_k
    z = tl.load(p_scores + place * score_stride, mask=m_k, other=0.0).to(ACC)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + ids, mask=m_k, other=0.0)
    return softcap(z, CAP)


@triton.jit
def set_part(
    p_scores, score_stride, bias_ptr, p_ids, ids_strides, weight_ptr, p_cols, p_dset,
    V, K, y, z_y, w_y, wanted, of_rest, scale, own, smoothing, z_loss,
    IDS_PAD: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr, UNIQUE: tl.constexpr, NEED_GRAD: tl.constexpr,
    GATHER: tl.constexpr, HAS_OWN: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token's loss over its target and its ids that are neither pads nor repeats nor the target, times `of_rest`, and
    `scale`, NaN where an id is no word. Nothing where not `wanted`.

    The score of the k-th id lies at its own place (`GATHER`: by id; else by k). d loss / d x is written behind the target's
    own, [K + 1], with the columns; with `HAS_OWN` the target is the own-th of the K ids, and no columns are.
    """
    limit = tl.where(wanted, K, 0)  # a row without a set part has no ids
    m_s = tl.full((BLOCK_K,), float("-inf"), ACC)
    s_s = tl.zeros((BLOCK_K,), ACC)
    n = tl.full((), 1.0, ACC)
    sum_w = w_y
    sum_wz = w_y * z_y
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        ids, m_k = load_ids(p_ids, ids_strides, start, limit, y, IDS_PAD, UNIQUE, BLOCK_K)
        bad = m_k & ((ids < 0) | (ids >= V))
        scale = tl.where(tl.sum(bad.to(tl.int32), 0) > 0, float("nan"), scale).to(ACC)
        m_k &= (ids >= 0) & (ids < V)
        z = _load_scores(p_scores, score_stride, bias_ptr, ids, o_k, m_k, CAP, GATHER, ACC)
        m_s, s_s = merge(m_s, s_s, tl.where(m_k, z, float("-inf")))
        n += tl.sum(m_k.to(ACC), 0)
        if SMOOTH:
            if weight_ptr is None:
                w = tl.full((BLOCK_K,), 1.0, ACC)
            else:
                w = tl.load(weight_ptr + ids, mask=m_k, other=0.0)
            sum_w += tl.sum(tl.where(m_k, w, 0.0), 0)
            sum_wz += tl.sum(tl.where(m_k, w * z, 0.0), 0)
    top = tl.maximum(tl.max(m_s, 0), z_y)
    shift = tl.where(top == float("-inf"), 0.0, top)
    lse = top + tl.log(tl.sum(s_s * tl.exp(m_s - shift), 0) + tl.exp(z_y - shift))
    part, a, s, d = part_of(lse, z_y, w_y, n, sum_w, sum_wz, smoothing, z_loss)
    if NEED_GRAD:
        factor = tl.where(wanted, scale * of_rest, 0.0)
        if CAP > 0:
            chain_y = 1 - (z_y / CAP) * (z_y / CAP)
        else:
            chain_y = 1.0
        dz_y = (a * tl.exp(z_y - lse) - s * w_y - d) * chain_y
        dz_y = tl.where(wanted, factor * dz_y, 0.0)
        if not HAS_OWN:
            tl.store(p_dset, dz_y)
            if p_cols is not None:
                tl.store(p_cols, tl.where(wanted, y, -1).to(tl.int32))
        for start in range(0, K, BLOCK_K):
            o_k = start + tl.arange(0, BLOCK_K)
            ids, m_k = load_ids(p_ids, ids_strides, start, limit, y, IDS_PAD, UNIQUE, BLOCK_K)
            m_k &= (ids >= 0) & (ids < V)
            z = _load_scores(p_scores, score_stride, bias_ptr, ids, o_k, m_k, CAP, GATHER, ACC)
            dz = a * tl.exp(z - lse)
            if SMOOTH:
                if weight_ptr is None:
                    dz -= s
                else:
                    dz -= s * tl.load(weight_ptr + ids, mask=m_k, other=0.0)
            if CAP > 0:
                dz *= 1 - (z / CAP) * (z / CAP)
            dz = tl.where(m_k, factor * dz, 0.0)
            if HAS_OWN:
                tl.store(p_dset + o_k, tl.where(o_k == own, dz_y, dz), mask=o_k < K)
            else:
                tl.store(p_dset + 1 + o_k, dz, mask=o_k < K)
                if p_cols is not None:
                    tl.store(p_cols + 1 + o_k, tl.where(m_k, ids, -1).to(tl.int32), mask=o_k < K)
    return tl.where(wanted, of_rest * part, 0.0), scale
