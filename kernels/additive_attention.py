"""Additive attention: scores, softmax and context, and their gradients. Maths and names: csrc/additive_attention/*.h.

A batch of 32 captions is fewer programs than a GPU has processors, so each kernel cuts a caption further: by locations where
the sums run over the width (scores, the gradient of values), by columns where they run over locations (the context, the
gradient of the query). Then no program adds to what another wrote, and no atomic is needed; only dv, a sum over captions,
takes partial sums [., A] and a second launch that adds them in one order. Rows of weight 0 are not loaded.

Bytes, for n captions of L locations, i bytes an element, but for terms in n (L + A + D) alone:

  weights  forward  i n L A read             two launches, scores and softmax; scores [n, L] stay in L2
           backward i n L A read             as much written where keys need a gradient
  context  forward  i n L D read
           backward i n L D read             as much written where values need a gradient
  memory   backward i B L A read and written, of T steps together; T B L A tanh, which cost more time than the bytes

Tiles hold 8 elements a thread where two running sums are kept, 16 or 32 where one is: at most 101 registers, so that sixteen
warps or more fit a processor, which then has some 30 kB of loads in flight, enough for its share of HBM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcap.kernels._activations import activate, slope
from fastcap.kernels._common import Launch, acc_of, block_of, counting, run
from fastcap.kernels._subset import merge


@triton.jit
def _tile(x_ptr, x_strides, i_b, o_l, o_a, m_l, m_a, ACC: tl.constexpr):
    """x[i_b, o_l, o_a] for the locations m_l and columns m_a, 0 elsewhere."""
    p_row = x_ptr + i_b * x_strides[0] + o_l.to(tl.int64)[:, None] * x_strides[1]
    p = p_row + o_a.to(tl.int64)[None, :] * x_strides[2]
    return tl.load(p, mask=m_l[:, None] & m_a[None, :], other=0.0).to(ACC)


@triton.jit
def _scores_kernel(
    keys_ptr, query_ptr, v_ptr, mask_ptr, alpha_ptr,
    keys_strides, query_strides, mask_strides,
    L, A, NUM_BLOCKS,
    TANH: tl.constexpr, ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """The scores of BLOCK_L locations, written where alpha will be."""
    i_b = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    o_l = tl.program_id(0) % NUM_BLOCKS * BLOCK_L + tl.arange(0, BLOCK_L)
    counts = counting(mask_ptr, mask_strides, i_b, o_l, L)
    parts = tl.zeros((BLOCK_L, BLOCK_A), ACC)
    for start in range(0, A, BLOCK_A):
        o_a = start + tl.arange(0, BLOCK_A)
        m_a = o_a < A
        k = _tile(keys_ptr, keys_strides, i_b, o_l, o_a, counts, m_a, ACC)
        q = tl.load(query_ptr + i_b * query_strides[0] + o_a.to(tl.int64) * query_strides[1], mask=m_a, other=0.0)
        v = tl.load(v_ptr + o_a, mask=m_a, other=0.0)
        parts += v[None, :] * activate(k + q[None, :], TANH)
    tl.store(alpha_ptr + i_b * L + o_l, tl.sum(parts, 1), mask=counts)


@triton.jit
def _softmax_kernel(mask_ptr, alpha_ptr, mask_strides, L, ACC: tl.constexpr, BLOCK_L: tl.constexpr):
    """Scores into weights, in place: a program a caption. Where a location does not count there is no score to read."""
    i_b = tl.program_id(0).to(tl.int64)
    tops, sums = tl.full((BLOCK_L,), float("-inf"), ACC), tl.zeros((BLOCK_L,), ACC)
    for start in range(0, L, BLOCK_L):
        o_l = start + tl.arange(0, BLOCK_L)
        counts = counting(mask_ptr, mask_strides, i_b, o_l, L)
        tops, sums = merge(tops, sums, tl.load(alpha_ptr + i_b * L + o_l, mask=counts, other=float("-inf")))
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp(tops - tl.where(top == float("-inf"), 0.0, top)), 0)
    for start in range(0, L, BLOCK_L):
        o_l = start + tl.arange(0, BLOCK_L)
        counts = counting(mask_ptr, mask_strides, i_b, o_l, L)
        score = tl.load(alpha_ptr + i_b * L + o_l, mask=counts, other=0.0)
        tl.store(alpha_ptr + i_b * L + o_l, tl.where(counts, tl.exp(score - top) / total, 0.0), mask=o_l < L)


@triton.jit
def _context_kernel(
    weights_ptr, values_ptr, context_ptr,
    weights_strides, values_strides,
    L, D, NUM_BLOCKS,
    ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    o_d = tl.program_id(0) % NUM_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_weights = weights_ptr + i_b * weights_strides[0]
    parts = tl.zeros((BLOCK_L, BLOCK_D), ACC)
    o_l = tl.arange(0, BLOCK_L)
    w = tl.load(p_weights + o_l.to(tl.int64) * weights_strides[1], mask=o_l < L, other=0.0)
    for start in range(0, L, BLOCK_L):
        x = _tile(values_ptr, values_strides, i_b, start + o_l, o_d, w != 0, m_d, ACC)
        # the next weights come while these values do: the mask of the next loads waits for them
        o_next = start + BLOCK_L + o_l
        w_next = tl.load(p_weights + o_next.to(tl.int64) * weights_strides[1], mask=o_next < L, other=0.0)
        parts += w[:, None] * x
        w = w_next
    tl.store(context_ptr + i_b * D + o_d, tl.sum(parts, 0), mask=m_d)


@triton.jit
def _context_bwd_kernel(
    dcontext_ptr, weights_ptr, values_ptr, dweights_ptr, dvalues_ptr,
    dcontext_strides, weights_strides, values_strides,
    L, D, NUM_BLOCKS,
    ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dweights and dvalues of BLOCK_L locations, in one pass; either may be absent."""
    i_b = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    o_l = tl.program_id(0) % NUM_BLOCKS * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < L
    w = tl.load(weights_ptr + i_b * weights_strides[0] + o_l.to(tl.int64) * weights_strides[1], mask=m_l, other=0.0)
    p_out = dvalues_ptr
    if dvalues_ptr is not None:
        p_out = dvalues_ptr + (i_b * L + o_l)[:, None] * D
    parts = tl.zeros((BLOCK_L, BLOCK_D), ACC)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        p_dc = dcontext_ptr + i_b * dcontext_strides[0] + o_d.to(tl.int64) * dcontext_strides[1]
        dc = tl.load(p_dc, mask=m_d, other=0.0)[None, :]
        if dweights_ptr is not None:
            parts += dc * _tile(values_ptr, values_strides, i_b, o_l, o_d, m_l, m_d, ACC)
        if dvalues_ptr is not None:
            dx = tl.where(w[:, None] != 0, w[:, None] * dc, 0.0).to(dvalues_ptr.dtype.element_ty)
            tl.store(p_out + o_d[None, :], dx, mask=m_l[:, None] & m_d[None, :])
    if dweights_ptr is not None:
        tl.store(dweights_ptr + i_b * L + o_l, tl.sum(parts, 1), mask=m_l)


@triton.jit
def _weights_bwd_kernel(
    dalpha_ptr, alpha_ptr, keys_ptr, query_ptr, v_ptr, dscore_ptr, dquery_ptr, dv_ptr, dkeys_ptr,
    dalpha_strides, alpha_strides, keys_strides, query_strides,
    L, A, NUM_BLOCKS,
    TANH: tl.constexpr, ACC: tl.constexpr, BLOCK_ALL: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """BLOCK_A columns of dquery, of a caption's share of dv and, where there is one, of dkeys; and, the first, dscore."""
    i_b = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    i_a = tl.program_id(0) % NUM_BLOCKS
    o_a = i_a * BLOCK_A + tl.arange(0, BLOCK_A)
    m_a = o_a < A
    p_alpha, p_dalpha = alpha_ptr + i_b * alpha_strides[0], dalpha_ptr + i_b * dalpha_strides[0]
    # What all programs of a caption need, each works out: [L] from L2 is less than another launch.
    means = tl.zeros((BLOCK_ALL,), ACC)
    for start in range(0, L, BLOCK_ALL):
        o_l = (start + tl.arange(0, BLOCK_ALL)).to(tl.int64)
        w = tl.load(p_alpha + o_l * alpha_strides[1], mask=o_l < L, other=0.0)
        dw = tl.load(p_dalpha + o_l * dalpha_strides[1], mask=o_l < L, other=0.0)
        means += tl.where(w != 0, w * dw, 0.0)
    mean = tl.sum(means, 0)

    q = tl.load(query_ptr + i_b * query_strides[0] + o_a.to(tl.int64) * query_strides[1], mask=m_a, other=0.0)
    v = tl.load(v_ptr + o_a, mask=m_a, other=0.0)
    slopes, heights = tl.zeros((BLOCK_L, BLOCK_A), ACC), tl.zeros((BLOCK_L, BLOCK_A), ACC)
    for start in range(0, L, BLOCK_L):
        o_l = start + tl.arange(0, BLOCK_L)
        m_l, o_wide = o_l < L, o_l.to(tl.int64)
        w = tl.load(p_alpha + o_wide * alpha_strides[1], mask=m_l, other=0.0)
        dw = tl.load(p_dalpha + o_wide * dalpha_strides[1], mask=m_l, other=0.0)
        live = w != 0
        de = tl.where(live, w * (dw - mean), 0.0)
        if i_a == 0:
            tl.store(dscore_ptr + i_b * L + o_l, de, mask=m_l)
        k = _tile(keys_ptr, keys_strides, i_b, o_l, o_a, live, m_a, ACC)
        y = activate(tl.where(live[:, None], k + q[None, :], 0.0), TANH)
        g = de[:, None] * slope(y, TANH)
        slopes += g
        if dkeys_ptr is not None:
            heights += de[:, None] * y
            p_out = dkeys_ptr + (i_b * L + o_l)[:, None] * A + o_a[None, :]
            tl.store(p_out, (g * v[None, :]).to(dkeys_ptr.dtype.element_ty), mask=m_l[:, None] & m_a[None, :])
    tl.store(dquery_ptr + i_b * A + o_a, v * tl.sum(slopes, 0), mask=m_a)
    if dkeys_ptr is not None:
        tl.store(dv_ptr + i_b * A + o_a, tl.sum(heights, 0), mask=m_a)


@triton.jit
def _memory_bwd_kernel(
    dscores_ptr, queries_ptr, keys_ptr, v_ptr, dv_ptr, dkeys_ptr,
    dscores_strides, queries_strides, keys_strides,
    T, L, A, NUM_LOCATIONS, NUM_COLUMNS,
    TANH: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """dkeys of a block of locations and columns, of all T steps: its keys stay in registers. And its share of dv."""
    i_row = tl.program_id(0).to(tl.int64) // NUM_COLUMNS
    i_b = i_row // NUM_LOCATIONS
    o_l = (i_row % NUM_LOCATIONS).to(tl.int32) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_a = tl.program_id(0) % NUM_COLUMNS * BLOCK_A + tl.arange(0, BLOCK_A)
    m_l, m_a = o_l < L, o_a < A
    p_de = dscores_ptr + i_b * dscores_strides[1] + o_l.to(tl.int64) * dscores_strides[2]
    p_q = queries_ptr + i_b * queries_strides[1] + o_a.to(tl.int64) * queries_strides[2]

    # The number of steps up to the last that used a location: 0 where none did, and then its keys are not read. A caption
    # that ends early has nothing to do in the steps after it.
    used = tl.zeros((BLOCK_L,), tl.int32)
    for start in range(0, T, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        p_steps = p_de[None, :] + o_t.to(tl.int64)[:, None] * dscores_strides[0]
        de = tl.load(p_steps, mask=(o_t < T)[:, None] & m_l[None, :], other=0.0)
        used = tl.maximum(used, tl.max(tl.where(de != 0, o_t[:, None] + 1, 0), 0))

    k = _tile(keys_ptr, keys_strides, i_b, o_l, o_a, used > 0, m_a, ACC)
    slopes, heights = tl.zeros((BLOCK_L, BLOCK_A), ACC), tl.zeros((BLOCK_L, BLOCK_A), ACC)
    for _ in range(0, tl.max(used, 0)):
        de = tl.load(p_de, mask=m_l, other=0.0)[:, None]
        y = activate(k + tl.load(p_q, mask=m_a, other=0.0)[None, :], TANH)
        slopes += de * slope(y, TANH)
        heights += de * y
        p_de += dscores_strides[0]
        p_q += queries_strides[0]
    v = tl.load(v_ptr + o_a, mask=m_a, other=0.0)
    p_out = dkeys_ptr + (i_b * L + o_l)[:, None] * A + o_a[None, :]
    tl.store(p_out, (slopes * v[None, :]).to(dkeys_ptr.dtype.element_ty), mask=m_l[:, None] & m_a[None, :])
    tl.store(dv_ptr + i_row * A + o_a, tl.sum(heights, 0), mask=m_a)


@triton.jit
def _sum_rows_kernel(parts_ptr, out_ptr, N, A, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr):
    """out [A] = the sum of parts [N, A] over its rows."""
    o_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    sums = tl.zeros((BLOCK_N, BLOCK_A), parts_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        p = parts_ptr + o_n.to(tl.int64)[:, None] * A + o_a[None, :]
        sums += tl.load(p, mask=(o_n < N)[:, None] & (o_a < A)[None, :], other=0.0)
    tl.store(out_ptr + o_a, tl.sum(sums, 0), mask=o_a < A)


# Launchers -------------------------------------------------------------------------------------------------------------


def _strides(tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor is not None else (0, 0, 0)


def _line(tensor, n: int) -> int:
    """A block of columns that is a line of cache (128 bytes) of `tensor`, or less where there are fewer."""
    return block_of(n, 128 // tensor.element_size())


# fmt: off
def _sum_rows(parts, out) -> Launch:
    N, A = parts.shape
    return Launch(_sum_rows_kernel, (triton.cdiv(A, 32),), dict(
        parts_ptr=parts, out_ptr=out, N=N, A=A, BLOCK_N=block_of(N, 64), BLOCK_A=32,
    ))


def plan_additive_attention_weights_fwd(keys, query, v, mask, activation, alpha) -> list[Launch]:
    n, (_, L, A) = query.shape[0], keys.shape
    mask = None if mask is None else mask.view(torch.uint8)
    block_l, whole = 16, block_of(L, 1024)
    num_blocks = triton.cdiv(L, block_l)
    scores = Launch(_scores_kernel, (n * num_blocks,), dict(
        keys_ptr=keys, query_ptr=query, v_ptr=v, mask_ptr=mask, alpha_ptr=alpha,
        keys_strides=keys.stride(), query_strides=query.stride(), mask_strides=_strides(mask),
        L=L, A=A, NUM_BLOCKS=num_blocks,
        TANH=activation == "tanh", ACC=acc_of(keys), BLOCK_L=block_l, BLOCK_A=block_of(A, 128),
    ))
    return [scores, Launch(_softmax_kernel, (n,), dict(
        mask_ptr=mask, alpha_ptr=alpha, mask_strides=_strides(mask), L=L, ACC=acc_of(keys), BLOCK_L=whole,
    ), num_warps=max(1, whole // 256))]


def plan_additive_attention_weights_bwd(
    dalpha, alpha, keys, query, v, activation, need_keys, dscore, dquery, dv, dkeys
) -> list[Launch]:
    n, (_, L, A) = query.shape[0], keys.shape
    block_a = _line(keys, A)
    num_blocks = triton.cdiv(A, block_a)
    parts = query.new_empty(n, A) if need_keys else None
    backward = Launch(_weights_bwd_kernel, (n * num_blocks,), dict(
        dalpha_ptr=dalpha, alpha_ptr=alpha, keys_ptr=keys, query_ptr=query, v_ptr=v,
        dscore_ptr=dscore, dquery_ptr=dquery, dv_ptr=parts, dkeys_ptr=dkeys if need_keys else None,
        dalpha_strides=dalpha.stride(), alpha_strides=alpha.stride(), keys_strides=keys.stride(),
        query_strides=query.stride(), L=L, A=A, NUM_BLOCKS=num_blocks,
        TANH=activation == "tanh", ACC=acc_of(keys),
        BLOCK_ALL=block_of(L, 1024), BLOCK_L=block_of(L, 2048 // block_a), BLOCK_A=block_a,
    ), num_warps=8)
    return [backward, _sum_rows(parts, dv)] if need_keys else [backward]


def plan_additive_attention_context_fwd(weights, values, context) -> list[Launch]:
    n, (_, L, D) = weights.shape[0], values.shape
    block_d = block_of(D, 64)
    num_blocks = triton.cdiv(D, block_d)
    return [Launch(_context_kernel, (n * num_blocks,), dict(
        weights_ptr=weights, values_ptr=values, context_ptr=context,
        weights_strides=weights.stride(), values_strides=values.stride(),
        L=L, D=D, NUM_BLOCKS=num_blocks, ACC=acc_of(values), BLOCK_L=block_of(L, 64), BLOCK_D=block_d,
    ))]


def plan_additive_attention_context_bwd(
    dcontext, weights, values, need_weights, need_values, dweights, dvalues
) -> list[Launch]:
    n, (_, L, D) = weights.shape[0], values.shape
    block_l = 8
    num_blocks = triton.cdiv(L, block_l)
    return [Launch(_context_bwd_kernel, (n * num_blocks,), dict(
        dcontext_ptr=dcontext, weights_ptr=weights, values_ptr=values if need_weights else None,
        dweights_ptr=dweights if need_weights else None, dvalues_ptr=dvalues if need_values else None,
        dcontext_strides=dcontext.stride(), weights_strides=weights.stride(), values_strides=values.stride(),
        L=L, D=D, NUM_BLOCKS=num_blocks, ACC=acc_of(values), BLOCK_L=block_l, BLOCK_D=block_of(D, 512),
    ))]


def plan_additive_attention_memory_bwd(dscores, queries, keys, v, activation, dv, dkeys) -> list[Launch]:
    T, (B, L, A) = dscores.shape[0], keys.shape
    block_l, block_a = 8, block_of(A, 128)
    num_locations, num_columns = triton.cdiv(L, block_l), triton.cdiv(A, block_a)
    parts = dv.new_empty(B * num_locations, A)
    return [Launch(_memory_bwd_kernel, (B * num_locations * num_columns,), dict(
        dscores_ptr=dscores, queries_ptr=queries, keys_ptr=keys, v_ptr=v, dv_ptr=parts, dkeys_ptr=dkeys,
        dscores_strides=dscores.stride(), queries_strides=queries.stride(), keys_strides=keys.stride(),
        T=T, L=L, A=A, NUM_LOCATIONS=num_locations, NUM_COLUMNS=num_columns,
        TANH=activation == "tanh", ACC=acc_of(keys), BLOCK_T=block_of(T, 32), BLOCK_L=block_l, BLOCK_A=block_a,
    )), _sum_rows(parts, dv)]
# fmt: on


def additive_attention_weights_fwd(keys, query, v, mask, activation, alpha) -> None:
    """Writes alpha, the output of torch.ops.fastcap.additive_attention_weights_fwd."""
    if alpha.numel() > 0:
        run(plan_additive_attention_weights_fwd(keys, query, v, mask, activation, alpha), keys)


def additive_attention_weights_bwd(dalpha, *rest) -> None:
    """Writes dscore, dquery and, with `need_keys`, dv and dkeys."""
    *_, dv, _ = rest
    if dalpha.numel() > 0:
        run(plan_additive_attention_weights_bwd(dalpha, *rest), dalpha)
    else:
        dv.zero_()


def additive_attention_context_fwd(weights, values, context) -> None:
    """Writes the context."""
    if context.numel() > 0:
        run(plan_additive_attention_context_fwd(weights, values, context), values)


def additive_attention_context_bwd(dcontext, weights, values, need_weights, need_values, dweights, dvalues) -> None:
    """Writes dweights and dvalues, where they are needed."""
    if weights.numel() > 0 and (need_weights or need_values):
        plan = plan_additive_attention_context_bwd(dcontext, weights, values, need_weights, need_values, dweights, dvalues)
        run(plan, values)


def additive_attention_memory_bwd(dscores, queries, keys, v, activation, dv, dkeys) -> None:
    """Writes dv and dkeys."""
    if dkeys.numel() > 0:
        run(plan_additive_attention_memory_bwd(dscores, queries, keys, v, activation, dv, dkeys), keys)
    else:
        dv.zero_()
