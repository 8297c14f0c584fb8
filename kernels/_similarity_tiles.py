"""Contrastive rewards. Maths and names: csrc/contrastive_reward/contrastive_reward.h; siblings are in _siblings.py.

No kernel writes a matrix of scores: a tile of s_pq = a_p b_q <text_p, image_q> is made by tl.dot and used up in registers.

  statistics  a program a rectangle of tiles: rows' (top, sum) stay in registers over its columns, columns' lie in a partial
              result of its own, which it reads and writes back for each block of rows; for "max" (key, index) in their place
  finish      merges the partial results of G groups: row [P], col [Q]
  weights     a tile of D_pq = ds_pq a_p b_q into a scratch of SCRATCH_BYTES, which products with image and text use up

As many rectangles as programs run at once, so that partial results are O(P + Q): [row groups, Q] and [column groups, P].
A tile gives both directions by one exponential an element. No atomics, and sums have one order.

Floor: 2 P Q D FLOPs forward, 6 P Q D backward; i D (P + Q) bytes read, i bytes a number, and as much again and 4 D (P + Q)
written backward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastcap.kernels._siblings import number_of, sort_key


@triton.jit
def _bounded(x, ACC: tl.constexpr):
    """x, an infinite one as the largest or smallest number, of which differences can be formed."""
    MOST: tl.constexpr = 3e38 if ACC == tl.float32 else 1e308
    return tl.minimum(tl.maximum(x, -MOST), MOST)


@triton.jit
def _merge(top, total, other_top, other_total):
    """Sums of exp(x - top), of two parts as of one; `other_top` is bounded."""
    higher = tl.maximum(top, other_top)
    return higher, total * tl.exp(top - higher) + other_total * tl.exp(other_top - higher)


@triton.jit
def _sums(s, AXIS: tl.constexpr, ACC: tl.constexpr):
    """(top, sum of exp(s - top)) along an axis; the sum is 0 where nothing is left."""
    top = _bounded(tl.max(s, AXIS), ACC)
    return top, tl.sum(tl.exp(s - tl.expand_dims(top, AXIS)), AXIS)


@triton.jit
def _largest(key, o, AXIS: tl.constexpr):
    """(the largest key along an axis, the first place that has it)."""
    top = tl.max(key, AXIS)
    places = tl.where(key == tl.expand_dims(top, AXIS), tl.expand_dims(o, 1 - AXIS), 2**31 - 1)
    return top, tl.min(places, AXIS)


@triton.jit
def _tile(
    x_ptr, x_strides, first, o, N, start, D,
    EVEN: tl.constexpr, WIDE: tl.constexpr, FACTOR: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows first + o of x and a block of features from `start` on; rows past the end repeat the last, which costs no mask,
    features past it are 0. Offsets inside of a tile have 32 bits where these do, for they take registers; its own has 64."""
    o_d = tl.arange(0, BLOCK_D)
    o = tl.minimum(o, N - 1 - first)
    if WIDE:
        o, o_d = o.to(tl.int64), o_d.to(tl.int64)
    p = x_ptr + tl.full((), first, tl.int64) * x_strides[0] + tl.full((), start, tl.int64) * x_strides[1]
    p += o[:, None] * x_strides[0] + o_d[None, :] * x_strides[1]
    if EVEN:
        return tl.load(p).to(FACTOR)
    else:
        return tl.load(p, mask=(start + o_d < D)[None, :], other=0.0).to(FACTOR)


@triton.jit
def _scores(
    text_ptr, image_ptr, col_factor_ptr, text_strides, image_strides, row_factor, first_p, first_q, P, Q, D,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s_pq of a tile, and b_q. What lies past the last row or column is of no meaning."""
    s = tl.zeros((BLOCK_P, BLOCK_Q), ACC)
    for start in range(0, D, BLOCK_D):
        text = _tile(text_ptr, text_strides, first_p, tl.arange(0, BLOCK_P), P, start, D, EVEN, WIDE, FACTOR, BLOCK_D)
        image = _tile(image_ptr, image_strides, first_q, tl.arange(0, BLOCK_Q), Q, start, D, EVEN, WIDE, FACTOR, BLOCK_D)
        s = tl.dot(text, tl.trans(image), s, input_precision=PRECISION, out_dtype=ACC)
    o_q = first_q + tl.arange(0, BLOCK_Q)
    col_factor = tl.load(col_factor_ptr + o_q, mask=o_q < Q, other=0.0)
    return s * row_factor[:, None] * col_factor[None, :], col_factor


@triton.jit
def _pairs_in(positive, first, Q, BLOCK_Q: tl.constexpr):
    """Of each row, the place of its pair in a tile of columns from `first` on; -1 for none."""
    here = (positive >= first) & (positive < first + BLOCK_Q) & (positive < Q)
    return tl.where(here, positive - first, -1).to(tl.int32)


@triton.jit
def contrastive_reward_statistics_kernel(
    text_ptr, image_ptr, positive_ptr, row_factor_ptr, col_factor_ptr, own_ptr,
    row_first_ptr, row_second_ptr, col_first_ptr, col_second_ptr,
    text_strides, image_strides,
    P, Q, D, GROUPS, ROW_BLOCKS, COL_BLOCKS,
    MAX: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LEAST: tl.constexpr, KEY: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rectangle of ROW_BLOCKS x COL_BLOCKS tiles of a group of rows and one of GROUPS groups of columns."""
    NONE: tl.constexpr = -(2**31) if KEY == tl.int32 else -(2**63)
    i_r, i_c = (tl.program_id(0) // GROUPS).to(tl.int64), (tl.program_id(0) % GROUPS).to(tl.int64)
    begin_p = tl.program_id(0) // GROUPS * ROW_BLOCKS * BLOCK_P
    begin_q = tl.program_id(0) % GROUPS * COL_BLOCKS * BLOCK_Q
    end_p, end_q = tl.minimum(begin_p + ROW_BLOCKS * BLOCK_P, P), tl.minimum(begin_q + COL_BLOCKS * BLOCK_Q, Q)
    for start_p in range(begin_p, end_p, BLOCK_P):
        o_p = start_p + tl.arange(0, BLOCK_P)
        m_p = o_p < P
        positive = tl.load(positive_ptr + o_p, mask=m_p, other=-1)
        row_factor = tl.load(row_factor_ptr + o_p, mask=m_p, other=0.0)
        if i_c == 0:
            tl.store(own_ptr + o_p, tl.full((BLOCK_P,), float("nan"), ACC), mask=m_p & ((positive < 0) | (positive >= Q)))
        if MAX:
            row_first, row_second = tl.full((BLOCK_P,), NONE, KEY), tl.full((BLOCK_P,), 2**31 - 1, tl.int32)
        else:
            row_first, row_second = tl.full((BLOCK_P,), float("-inf"), ACC), tl.zeros((BLOCK_P,), ACC)
        for start_q in range(begin_q, end_q, BLOCK_Q):
            o_q = start_q + tl.arange(0, BLOCK_Q)
            m_q = o_q < Q
            s, _ = _scores(
                text_ptr, image_ptr, col_factor_ptr, text_strides, image_strides, row_factor, start_p, start_q, P, Q, D,
                EVEN, WIDE, PRECISION, FACTOR, ACC, BLOCK_P, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
            pair_of = _pairs_in(positive, start_q, Q, BLOCK_Q)
            if (tl.max(pair_of, 0) >= 0) | (start_p + BLOCK_P > P) | (start_q + BLOCK_Q > Q):  # few tiles
                pair = pair_of[:, None] == tl.arange(0, BLOCK_Q)[None, :]
                tl.store(own_ptr + o_p, tl.sum(tl.where(pair, s, 0.0), 1), mask=pair_of >= 0)
                s = tl.where(pair | (o_p >= P)[:, None] | (o_q >= Q)[None, :], float("-inf"), s)
            p_col, m_again = i_r * Q + o_q, m_q & (start_p > begin_p)
            if MAX:
                key = sort_key(s, KEY)
                key = tl.where(s == float("-inf"), NONE, key)
                if ROWS:
                    first, second = _largest(key, o_q, 1)
                    row_second = tl.where(first > row_first, second, row_second)
                    row_first = tl.maximum(first, row_first)
                if COLS:
                    first, second = _largest(key, o_p, 0)
                    before = tl.load(col_first_ptr + p_col, mask=m_again, other=NONE)
                    before_second = tl.load(col_second_ptr + p_col, mask=m_again, other=0)
                    tl.store(col_first_ptr + p_col, tl.maximum(first, before), mask=m_q)
                    tl.store(col_second_ptr + p_col, tl.where(first > before, second, before_second), mask=m_q)
            else:
                if ROWS and COLS:
                    # One exponential for both, relative to a score below the tile's largest. Where a row or a column lies so
                    # far below that digits may be missing, the tile goes the long way.
                    top = _bounded(tl.max(tl.max(s, 1), 0), ACC) - 32
                    e = tl.exp(s - top)
                    row_sum, second = tl.sum(e, 1), tl.sum(e, 0)
                    row_top, first = tl.zeros((BLOCK_P,), ACC) + top, tl.zeros((BLOCK_Q,), ACC) + top
                    if not (tl.minimum(tl.min(row_sum, 0), tl.min(second, 0)) >= LEAST):
                        row_top, row_sum = _sums(s, 1, ACC)
                        first, second = _sums(s, 0, ACC)
                elif ROWS:
                    row_top, row_sum = _sums(s, 1, ACC)
                else:
                    first, second = _sums(s, 0, ACC)
                if ROWS:
                    row_first, row_second = _merge(row_first, row_second, row_top, row_sum)
                if COLS:
                    before = tl.load(col_first_ptr + p_col, mask=m_again, other=float("-inf"))
                    before_second = tl.load(col_second_ptr + p_col, mask=m_again, other=0.0)
                    first, second = _merge(before, before_second, first, second)
                    tl.store(col_first_ptr + p_col, first, mask=m_q)
                    tl.store(col_second_ptr + p_col, second, mask=m_q)
        if ROWS:
            tl.store(row_first_ptr + i_c * P + o_p, row_first, mask=m_p)
            tl.store(row_second_ptr + i_c * P + o_p, row_second, mask=m_p)
        if COLS:
            tl.debug_barrier()  # the next block of rows reads what other threads may have stored


@triton.jit
def _finish(first_ptr, second_ptr, out_ptr, index_ptr, start, N, GROUPS, ACC: tl.constexpr, KEY: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Merges partial results [GROUPS, N] of the elements from `start` on."""
    NONE: tl.constexpr = -(2**31) if KEY == tl.int32 else -(2**63)
    o = start + tl.arange(0, BLOCK)
    m = o < N
    if index_ptr is None:
        top, total = tl.full((BLOCK,), float("-inf"), ACC), tl.zeros((BLOCK,), ACC)
        for i in range(GROUPS):
            p = tl.full((), N, tl.int64) * i + o
            first = tl.load(first_ptr + p, mask=m, other=float("-inf"))
            top, total = _merge(top, total, first, tl.load(second_ptr + p, mask=m, other=0.0))
        tl.store(out_ptr + o, top + tl.log(total), mask=m)
    else:
        best, place = tl.full((BLOCK,), NONE, KEY), tl.full((BLOCK,), -1, tl.int32)
        for i in range(GROUPS):
            p = tl.full((), N, tl.int64) * i + o
            key = tl.load(first_ptr + p, mask=m, other=NONE)
            place = tl.where(key > best, tl.load(second_ptr + p, mask=m, other=-1), place)
            best = tl.maximum(best, key)
        tl.store(out_ptr + o, number_of(best, ACC), mask=m)
        tl.store(index_ptr + o, place.to(tl.int64), mask=m)


@triton.jit
def contrastive_reward_finish_kernel(
    row_first_ptr, row_second_ptr, col_first_ptr, col_second_ptr, row_ptr, row_index_ptr, col_ptr, col_index_ptr,
    P, Q, ROW_PROGRAMS, GROUPS_P, GROUPS_Q, ACC: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first ROW_PROGRAMS programs a block of rows, over the groups of columns; the others one of columns."""
    i = tl.program_id(0)
    if row_ptr is not None:
        if i < ROW_PROGRAMS:
            _finish(row_first_ptr, row_second_ptr, row_ptr, row_index_ptr, i * BLOCK, P, GROUPS_Q, ACC, KEY, BLOCK)
    if col_ptr is not None:
        if i >= ROW_PROGRAMS:
            start = (i - ROW_PROGRAMS) * BLOCK
            _finish(col_first_ptr, col_second_ptr, col_ptr, col_index_ptr, start, Q, GROUPS_P, ACC, KEY, BLOCK)


@triton.jit
def contrastive_reward_weights_kernel(
    down_ptr, drow_ptr, dcol_ptr, text_ptr, image_ptr, positive_ptr, row_factor_ptr, col_factor_ptr, row_ptr, col_ptr,
    weights_ptr, text_strides, image_strides,
    P, Q, D, FIRST_P, FIRST_Q, WIDTH, ROW_BLOCKS,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of D_pq, of the rows from FIRST_P to P and the columns from FIRST_Q to Q; WIDTH numbers lie in a row of the
    scratch. Neighbours share columns, and all ROW_BLOCKS blocks of rows run at about one time."""
    in_p, in_q = tl.program_id(0) % ROW_BLOCKS * BLOCK_P, tl.program_id(0) // ROW_BLOCKS * BLOCK_Q
    o_p, o_q = FIRST_P + in_p + tl.arange(0, BLOCK_P), FIRST_Q + in_q + tl.arange(0, BLOCK_Q)
    m_p, m_q = o_p < P, o_q < Q
    row_factor = tl.load(row_factor_ptr + o_p, mask=m_p, other=0.0)
    s, col_factor = _scores(
        text_ptr, image_ptr, col_factor_ptr, text_strides, image_strides, row_factor, FIRST_P + in_p, FIRST_Q + in_q,
        P, Q, D, EVEN, WIDE, PRECISION, FACTOR, ACC, BLOCK_P, BLOCK_Q, BLOCK_D,
    )  # fmt: skip
    # Where nothing was left, the pair is all there is: exp(s - -inf), which it replaces below, is not to be looked at.
    if row_ptr is None:
        ds = tl.zeros((BLOCK_P, BLOCK_Q), ACC)
    else:
        row = tl.load(row_ptr + o_p, mask=m_p, other=0.0)
        row = tl.where(row == float("-inf"), float("inf"), row)
        ds = tl.load(drow_ptr + o_p, mask=m_p, other=0.0)[:, None] * tl.exp(s - row[:, None])
    if col_ptr is not None:
        col = tl.load(col_ptr + o_q, mask=m_q, other=0.0)
        col = tl.where(col == float("-inf"), float("inf"), col)
        ds += tl.load(dcol_ptr + o_q, mask=m_q, other=0.0)[None, :] * tl.exp(s - col[None, :])
    pair_of = _pairs_in(tl.load(positive_ptr + o_p, mask=m_p, other=-1), FIRST_Q + in_q, Q, BLOCK_Q)
    if tl.max(pair_of, 0) >= 0:
        down = tl.load(down_ptr + o_p, mask=m_p, other=0.0)
        ds = tl.where(pair_of[:, None] == tl.arange(0, BLOCK_Q)[None, :], down[:, None], ds)
    ds *= row_factor[:, None] * col_factor[None, :]
    in_tile = (in_p + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None] * WIDTH + (in_q + tl.arange(0, BLOCK_Q))[None, :]
    tl.store(weights_ptr + in_tile, ds.to(weights_ptr.dtype.element_ty), mask=m_p[:, None] & m_q[None, :])
