"""Attention coverage from queries and keys. Maths and names: csrc/attention_coverage_from_scores/*.h.

No kernel writes a block of scores: each makes those it needs, s = scale q k^T, from tiles of queries and keys.

  rows    a program a block of steps, a loop over locations   lse [B, heads, T], inf where a step does not count
  sums    a program a block of locations, a loop over steps   the residuals and the sum of their squares; `reduce` adds those
  dquery  a program a block of steps and of features          delta_t = sum_l P_tl G_l, dq = scale W k with W = P (G - delta)
  dkey    a program a block of locations and of features      dk = scale W^T q

delta comes by a pass of its own, not as sum P G k - delta sum P k from one pass: that costs the same products, and would
cancel where all residuals are alike. No atomics: each element is one program's, and its sums have one order.

Floor, bytes a caption and head, i bytes a number: forward i E (T + L) read and 4 L written; backward as much read again and
i E (T + L) written. FLOPs: 2 T L E forward and 6 T L E more backward. The kernels spend 4 and 10, where E is one block of
features: they make the scores twice instead of keeping [T, L] weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcap.kernels._common import Launch, acc_of, block_of, counting, factors_of, run
from fastcap.kernels._totals import divisor, scaled_sum_kernel


@triton.jit
def _tile(p_x, x_strides, o_r, m_r, o_e, E, FACTOR: tl.constexpr):
    """Rows o_r and features o_e of a caption's and head's x, 0 where m_r is off."""
    p = p_x + o_r.to(tl.int64)[:, None] * x_strides[2] + o_e.to(tl.int64)[None, :] * x_strides[3]
    return tl.load(p, mask=m_r[:, None] & (o_e < E)[None, :], other=0.0).to(FACTOR)


@triton.jit
def _product(
    p_a, p_b, a_strides, b_strides, o_a, m_a, o_b, m_b, E, scale,
    PRECISION: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """scale a b^T of a block of rows of a and of b, summed over their features."""
    s = tl.zeros((BLOCK_A, BLOCK_B), ACC)
    for start in range(0, E, BLOCK_E):
        o_e = start + tl.arange(0, BLOCK_E)
        a = _tile(p_a, a_strides, o_a, m_a, o_e, E, FACTOR)
        b = _tile(p_b, b_strides, o_b, m_b, o_e, E, FACTOR)
        s += tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)
    return s * scale


@triton.jit
def _scores(
    p_query, p_key, query_strides, key_strides, o_t, m_t, o_l, m_l, E, scale,
    PRECISION: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """scale q k^T of a block, -inf where there is no location."""
    s = _product(
        p_query, p_key, query_strides, key_strides, o_t, m_t, o_l, m_l, E, scale,
        PRECISION, FACTOR, ACC, BLOCK_T, BLOCK_L, BLOCK_E,
    )  # fmt: skip
    return tl.where(m_l[None, :], s, float("-inf"))


@triton.jit
def _pull(residual_ptr, grad_out_ptr, grad_out_strides, i_b, i_h, i_n, o_l, m_l, L, PER_LOCATION: tl.constexpr):
    """The residuals times their upstream gradients, where they have one each; what all share is left to the end."""
    g = tl.load(residual_ptr + i_n * L + o_l, mask=m_l, other=0.0)
    if PER_LOCATION:
        p_grad = grad_out_ptr + i_b * grad_out_strides[0] + i_h * grad_out_strides[1]
        g *= tl.load(p_grad + o_l.to(tl.int64) * grad_out_strides[2], mask=m_l, other=0.0)
    return g


@triton.jit
def _factor_of_all(grad_out_ptr, coefficient, PER_LOCATION: tl.constexpr, ACC: tl.constexpr):
    factor = tl.full((), coefficient, ACC)
    if PER_LOCATION == 0:
        factor *= tl.load(grad_out_ptr)
    return factor


@triton.jit
def _rows_kernel(
    query_ptr, key_ptr, key_mask_ptr, valid_ptr, lse_ptr,
    query_strides, key_strides, key_mask_strides, valid_strides,
    HEADS, T, L, E: tl.constexpr, NUM_BLOCKS, scale: tl.float64,
    PRECISION: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, ACC)
    i_n = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    i_b, i_h = i_n // HEADS, i_n % HEADS
    o_t = tl.program_id(0) % NUM_BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = counting(valid_ptr, valid_strides, i_b, o_t, T)
    p_query = query_ptr + i_b * query_strides[0] + i_h * query_strides[1]
    p_key = key_ptr + i_b * key_strides[0] + i_h * key_strides[1]
    top, total = tl.full((BLOCK_T,), float("-inf"), ACC), tl.zeros((BLOCK_T,), ACC)
    for start in range(0, L, BLOCK_L):
        o_l = start + tl.arange(0, BLOCK_L)
        m_l = counting(key_mask_ptr, key_mask_strides, i_b, o_l, L)
        s = _scores(
            p_query, p_key, query_strides, key_strides, o_t, m_t, o_l, m_l, E, scale,
            PRECISION, FACTOR, ACC, BLOCK_T, BLOCK_L, BLOCK_E,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = higher
    counts = m_t
    if key_mask_ptr is not None:  # a caption may have no location
        some = tl.zeros((BLOCK_L,), tl.int32)
        for start in range(0, L, BLOCK_L):
            o_l = start + tl.arange(0, BLOCK_L)
            some = tl.maximum(some, counting(key_mask_ptr, key_mask_strides, i_b, o_l, L).to(tl.int32))
        counts = counts & (tl.max(some, 0) > 0)
    tl.store(
        lse_ptr + i_n * T + o_t, tl.where(counts, top + tl.log(tl.where(counts, total, 1.0)), float("inf")), mask=o_t < T
    )


@triton.jit
def _sums_kernel(
    query_ptr, key_ptr, key_mask_ptr, lse_ptr, tau_ptr, residual_ptr, out_ptr, part_ptr,
    query_strides, key_strides, key_mask_strides, tau_stride,
    HEADS, T, L, E: tl.constexpr, NUM_BLOCKS, scale: tl.float64, target: tl.float64,
    PRECISION: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, ACC)
    i_n = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    i_b, i_h = i_n // HEADS, i_n % HEADS
    o_l = tl.program_id(0) % NUM_BLOCKS * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = counting(key_mask_ptr, key_mask_strides, i_b, o_l, L)
    p_query = query_ptr + i_b * query_strides[0] + i_h * query_strides[1]
    p_key = key_ptr + i_b * key_strides[0] + i_h * key_strides[1]
    sums = tl.zeros((BLOCK_T, BLOCK_L), ACC)
    for start in range(0, T, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        lse = tl.load(lse_ptr + i_n * T + o_t, mask=o_t < T, other=float("inf"))
        s = _scores(
            p_query, p_key, query_strides, key_strides, o_t, lse != float("inf"), o_l, m_l, E, scale,
            PRECISION, FACTOR, ACC, BLOCK_T, BLOCK_L, BLOCK_E,
        )  # fmt: skip
        sums += tl.exp(s - lse[:, None])
    if tau_ptr is None:
        tau = tl.full((), target, ACC)
    else:
        tau = tl.load(tau_ptr + i_b * tau_stride)
    r = tau - tl.where(m_l, tl.sum(sums, 0), 0.0)
    m_out = o_l < L
    if residual_ptr is not None:
        tl.store(residual_ptr + i_n * L + o_l, r, mask=m_out)
    if out_ptr is not None:
        tl.store(out_ptr + i_n * L + o_l, r * r, mask=m_out)
    if part_ptr is not None:
        tl.store(part_ptr + tl.program_id(0), tl.sum(tl.where(m_out, r * r, 0.0), 0))


@triton.jit
def _dquery_kernel(
    grad_out_ptr, residual_ptr, lse_ptr, query_ptr, key_ptr, key_mask_ptr, delta_ptr, dquery_ptr,
    grad_out_strides, query_strides, key_strides, key_mask_strides,
    HEADS, T, L, E: tl.constexpr, NUM_BLOCKS, scale: tl.float64, coefficient: tl.float64,
    PER_LOCATION: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, PRECISION_W: tl.constexpr,
    FACTOR_W: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """The program's second index is its block of features; each makes the scores for itself."""
    scale = tl.full((), scale, ACC)
    i_n = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    i_b, i_h = i_n // HEADS, i_n % HEADS
    o_t = tl.program_id(0) % NUM_BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
    lse = tl.load(lse_ptr + i_n * T + o_t, mask=o_t < T, other=float("inf"))
    m_t = lse != float("inf")
    p_query = query_ptr + i_b * query_strides[0] + i_h * query_strides[1]
    p_key = key_ptr + i_b * key_strides[0] + i_h * key_strides[1]
    delta = tl.zeros((BLOCK_T,), ACC)
    for start in range(0, L, BLOCK_L):
        o_l = start + tl.arange(0, BLOCK_L)
        m_l = counting(key_mask_ptr, key_mask_strides, i_b, o_l, L)
        s = _scores(
            p_query, p_key, query_strides, key_strides, o_t, m_t, o_l, m_l, E, scale,
            PRECISION, FACTOR, ACC, BLOCK_T, BLOCK_L, BLOCK_E,
        )  # fmt: skip
        g = _pull(residual_ptr, grad_out_ptr, grad_out_strides, i_b, i_h, i_n, o_l, m_l, L, PER_LOCATION)
        delta += tl.sum(tl.exp(s - lse[:, None]) * g[None, :], 1)
    if delta_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(delta_ptr + i_n * T + o_t, delta, mask=o_t < T)
    if dquery_ptr is not None:
        o_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        dq = tl.zeros((BLOCK_T, BLOCK_OUT), ACC)
        for start in range(0, L, BLOCK_L):
            o_l = start + tl.arange(0, BLOCK_L)
            m_l = counting(key_mask_ptr, key_mask_strides, i_b, o_l, L)
            s = _scores(
                p_query, p_key, query_strides, key_strides, o_t, m_t, o_l, m_l, E, scale,
                PRECISION, FACTOR, ACC, BLOCK_T, BLOCK_L, BLOCK_E,
            )  # fmt: skip
            g = _pull(residual_ptr, grad_out_ptr, grad_out_strides, i_b, i_h, i_n, o_l, m_l, L, PER_LOCATION)
            w = tl.exp(s - lse[:, None]) * (g[None, :] - delta[:, None])
            k = _tile(p_key, key_strides, o_l, m_l, o_out, E, FACTOR_W)
            dq += tl.dot(w.to(FACTOR_W), k, input_precision=PRECISION_W, out_dtype=ACC)
        dq *= _factor_of_all(grad_out_ptr, coefficient, PER_LOCATION, ACC)
        p_out = dquery_ptr + (i_n * T + o_t)[:, None] * E + o_out[None, :]
        tl.store(
            p_out, tl.where(m_t[:, None], dq, 0.0).to(dquery_ptr.dtype.element_ty),
            mask=(o_t < T)[:, None] & (o_out < E)[None, :],
        )  # fmt: skip


@triton.jit
def _dkey_kernel(
    grad_out_ptr, residual_ptr, lse_ptr, delta_ptr, query_ptr, key_ptr, key_mask_ptr, dkey_ptr,
    grad_out_strides, query_strides, key_strides, key_mask_strides,
    HEADS, T, L, E: tl.constexpr, NUM_BLOCKS, scale: tl.float64, coefficient: tl.float64,
    PER_LOCATION: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, PRECISION_W: tl.constexpr,
    FACTOR_W: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, ACC)
    i_n = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    i_b, i_h = i_n // HEADS, i_n % HEADS
    o_l = tl.program_id(0) % NUM_BLOCKS * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = counting(key_mask_ptr, key_mask_strides, i_b, o_l, L)
    p_query = query_ptr + i_b * query_strides[0] + i_h * query_strides[1]
    p_key = key_ptr + i_b * key_strides[0] + i_h * key_strides[1]
    g = _pull(residual_ptr, grad_out_ptr, grad_out_strides, i_b, i_h, i_n, o_l, m_l, L, PER_LOCATION)
    o_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dk = tl.zeros((BLOCK_L, BLOCK_OUT), ACC)
    for start in range(0, T, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        lse = tl.load(lse_ptr + i_n * T + o_t, mask=o_t < T, other=float("inf"))
        delta = tl.load(delta_ptr + i_n * T + o_t, mask=o_t < T, other=0.0)
        m_t = lse != float("inf")
        s = _product(  # [locations, steps]: W^T as the next product takes it
            p_key, p_query, key_strides, query_strides, o_l, m_l, o_t, m_t, E, scale,
            PRECISION, FACTOR, ACC, BLOCK_L, BLOCK_T, BLOCK_E,
        )  # fmt: skip
        w = tl.where(m_t[None, :], tl.exp(s - lse[None, :]) * (g[:, None] - delta[None, :]), 0.0)
        q = _tile(p_query, query_strides, o_t, m_t, o_out, E, FACTOR_W)
        dk += tl.dot(w.to(FACTOR_W), q, input_precision=PRECISION_W, out_dtype=ACC)
    dk *= _factor_of_all(grad_out_ptr, coefficient, PER_LOCATION, ACC)
    p_out = dkey_ptr + (i_n * L + o_l)[:, None] * E + o_out[None, :]
    tl.store(
        p_out, tl.where(m_l[:, None], dk, 0.0).to(dkey_ptr.dtype.element_ty),
        mask=(o_l < L)[:, None] & (o_out < E)[None, :],
    )  # fmt: skip


# Launchers -------------------------------------------------------------------------------------------------------------

# By bytes a number, the largest BLOCK_T, BLOCK_L and BLOCK_E; of dkey BLOCK_E and BLOCK_OUT, features that a program writes.
# Full float32 is multiplied by threads, not by tensor cores, out of registers: larger blocks of it, or of float64, spill.
BLOCKS = {2: (64, 64, 64), 4: (32, 32, 32), 8: (16, 16, 32)}
BLOCKS_OF_DKEY = {2: (32, 64), 4: (32, 64), 8: (32, 32)}


def _strides(x) -> list[int]:
    """Of [B, heads, R, E]; 0 for a dimension of one element, which nothing steps over."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


def _flags(mask, like):
    """A mask by numbers as wide as those that it masks: Triton lays factors out by the narrowest number that they depend on,
    which for bytes takes more registers, and cannot be done at all for float64."""
    return None if mask is None else mask.to(torch.int64 if like.element_size() > 4 else torch.int32)


def _common(query, key, key_mask, scale) -> dict[str, object]:
    """What every kernel takes. float32 is multiplied as torch has been told."""
    (_, heads, T, E), L = query.shape, key.shape[2]
    precision, factor = factors_of(query)
    key_mask = _flags(key_mask, query)
    block_t, block_l, block_e = BLOCKS[query.element_size()]
    return dict(
        query_ptr=query, key_ptr=key, key_mask_ptr=key_mask,
        query_strides=tuple(_strides(query)), key_strides=tuple(_strides(key)),
        key_mask_strides=(0, 0) if key_mask is None else key_mask.stride(),
        HEADS=heads, T=T, L=L, E=E, scale=scale,
        PRECISION=precision, FACTOR=factor, ACC=acc_of(query),
        BLOCK_T=block_of(T, block_t), BLOCK_L=block_of(L, block_l), BLOCK_E=block_of(E, block_e),
    )  # fmt: skip


# fmt: off
def plan_attention_coverage_from_scores_fwd(
    query, key, key_mask, valid, tau, out, residual, lse, scale, target, reduction
) -> list[Launch]:
    """The launches of the forward. Scratch is made here; nothing is launched."""
    B, heads, T, _ = query.shape
    L, none, pairs = key.shape[2], reduction == "none", B * heads
    common = _common(query, key, key_mask, scale)
    valid = _flags(valid, query)
    if lse.numel() == 0:
        lse = out.new_empty(B, heads, T)
    blocks_t, blocks_l = triton.cdiv(T, common["BLOCK_T"]), triton.cdiv(L, common["BLOCK_L"])
    parts = None if none else out.new_empty(pairs * blocks_l)
    launches = []
    if T > 0:
        launches.append(Launch(_rows_kernel, (pairs * blocks_t,), dict(
            **common, valid_ptr=valid, lse_ptr=lse,
            valid_strides=(0, 0) if valid is None else valid.stride(), NUM_BLOCKS=blocks_t,
        )))
    launches.append(Launch(_sums_kernel, (pairs * blocks_l,), dict(
        **common, lse_ptr=lse, tau_ptr=tau, residual_ptr=residual if residual.numel() else None,
        out_ptr=out if none else None, part_ptr=parts, tau_stride=0 if tau is None else tau.stride(0),
        NUM_BLOCKS=blocks_l, target=target,
    )))
    if not none:
        launches.append(Launch(scaled_sum_kernel, (1,), dict(
            part_ptr=parts, out_ptr=out, N=pairs * blocks_l, scale=1 / divisor(pairs, L, reduction),
            BLOCK_N=block_of(pairs * blocks_l, 2048),
        ), num_warps=8))
    return launches


def plan_attention_coverage_from_scores_bwd(
    grad_out, residual, lse, query, key, key_mask, scale, reduction, dquery, dkey
) -> list[Launch]:
    """The launches of the backward; empty gradients are not wanted."""
    B, heads, T, E = query.shape
    L, per_location = key.shape[2], reduction == "none"
    common = _common(query, key, key_mask, scale)
    # W's products. A loss scale may carry W out of float16's range: tf32 has as many digits and float32's range.
    low = query.dtype == torch.float16
    common.update(
        grad_out_ptr=grad_out, residual_ptr=residual, lse_ptr=lse,
        grad_out_strides=grad_out.stride() if per_location else (0, 0, 0),
        coefficient=-2 * scale / divisor(B * heads, L, reduction), PER_LOCATION=per_location,
        BLOCK_OUT=common["BLOCK_E"],
        PRECISION_W="tf32" if low else common["PRECISION"], FACTOR_W=tl.float32 if low else common["FACTOR"],
    )
    blocks_t, blocks_l = triton.cdiv(T, common["BLOCK_T"]), triton.cdiv(L, common["BLOCK_L"])
    features = triton.cdiv(E, common["BLOCK_OUT"]) if dquery.numel() else 1
    delta = torch.empty_like(lse) if dkey.numel() else None
    launches = [Launch(_dquery_kernel, (B * heads * blocks_t, features), dict(
        **common, delta_ptr=delta, dquery_ptr=dquery if dquery.numel() else None, NUM_BLOCKS=blocks_t,
    ))] if T > 0 else []
    if dkey.numel():
        block_e, block_out = (block_of(E, most) for most in BLOCKS_OF_DKEY[query.element_size()])
        common.update(BLOCK_E=block_e, BLOCK_OUT=block_out)
        launches.append(Launch(_dkey_kernel, (B * heads * blocks_l, triton.cdiv(E, block_out)), dict(
            **common, delta_ptr=delta, dkey_ptr=dkey, NUM_BLOCKS=blocks_l,
        ), num_warps=8 if query.element_size() == 2 else 4))  # with 4, half precision spills on sm_80
    return launches
# fmt: on


def attention_coverage_from_scores_fwd(
    query, key, key_mask, valid, tau, out, residual, lse, scale, target, reduction
) -> None:  # fmt: skip
    """Writes the outputs of torch.ops.fastcap.attention_coverage_from_scores_fwd."""
    if 0 in query.shape[:2]:  # no captions
        out.zero_()
    else:
        run(plan_attention_coverage_from_scores_fwd(
            query, key, key_mask, valid, tau, out, residual, lse, scale, target, reduction
        ), query)  # fmt: skip


def attention_coverage_from_scores_bwd(
    grad_out, residual, lse, query, key, key_mask, valid, scale, reduction, dquery, dkey
) -> None:  # fmt: skip
    """Writes the outputs of torch.ops.fastcap.attention_coverage_from_scores_bwd."""
    if 0 not in query.shape[:2]:
        run(plan_attention_coverage_from_scores_bwd(
            grad_out, residual, lse, query, key, key_mask, scale, reduction, dquery, dkey
        ), query)  # fmt: skip
