"""Sums over tokens by word: rows of equal id are added, in the order of the tokens. What the gradient of a head needs.

`group` puts the tokens in the order of their ids; `add_rows`: one program a word and a block of features reads that word's
tokens, in order, so that the sum has one order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastcap.kernels._common import Launch, block_of, run
from torch import Tensor

MAX_COMPARED = 16_384  # ids; all pairs of more are more work than a sort


class Words(NamedTuple):
    """M tokens by their ids. U slots for distinct ids, as many as there may be; those that are too many have the id -1."""

    distinct: Tensor  # [U], ascending
    order: Tensor  # [M]: the tokens by id, equal ones in order; those without an id are nowhere or in front
    starts: Tensor  # [M]: where a distinct id's tokens begin in `order`
    counts: Tensor  # [M]: how many they are


@triton.jit
def _first_kernel(ids_ptr, first_ptr, distinct_ptr, counts_ptr, M, V, BLOCK_M: tl.constexpr):
    """first[j]: whether no earlier id equals ids[j]. All pairs are compared: for the few thousand ids of a batch less than a
    sort. Clears what the next kernel may leave unwritten."""
    o_j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = tl.load(ids_ptr + o_j, mask=o_j < M, other=-1)
    before = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, tl.program_id(0) * BLOCK_M + BLOCK_M, BLOCK_M):
        o_i = start + tl.arange(0, BLOCK_M)
        others = tl.load(ids_ptr + o_i, mask=o_i < M, other=-1)
        same = (ids[:, None] == others[None, :]) & (o_i[None, :] < o_j[:, None])
        before += tl.sum(same.to(tl.int32), 1)
    first = (before == 0) & (ids >= 0) & (ids < V)
    tl.store(first_ptr + o_j, first.to(tl.int32), mask=o_j < M)
    tl.store(distinct_ptr + o_j, tl.full((BLOCK_M,), -1, tl.int64), mask=o_j < M)
    tl.store(counts_ptr + o_j, tl.zeros((BLOCK_M,), tl.int32), mask=o_j < M)


@triton.jit
def _rank_kernel(
    ids_ptr, first_ptr, distinct_ptr, order_ptr, starts_ptr, counts_ptr, M, V, BLOCK_M: tl.constexpr
):  # fmt: skip
    """How many distinct ids, and how many ids, are smaller than ids[j]: the places of the id and of the token."""
    o_j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = tl.load(ids_ptr + o_j, mask=o_j < M, other=-1)
    rank = tl.zeros((BLOCK_M,), tl.int32)
    below = tl.zeros((BLOCK_M,), tl.int32)
    earlier = tl.zeros((BLOCK_M,), tl.int32)
    equal = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, M, BLOCK_M):
        o_i = start + tl.arange(0, BLOCK_M)
        others = tl.load(ids_ptr + o_i, mask=o_i < M, other=-1)
        first = tl.load(first_ptr + o_i, mask=o_i < M, other=0)
        less = ((others >= 0)[None, :] & (others[None, :] < ids[:, None])).to(tl.int32)
        same = (others[None, :] == ids[:, None]).to(tl.int32)
        rank += tl.sum(less * first[None, :], 1)
        below += tl.sum(less, 1)
        equal += tl.sum(same, 1)
        earlier += tl.sum(same * (o_i[None, :] < o_j[:, None]).to(tl.int32), 1)
    known = (ids >= 0) & (ids < V) & (o_j < M)
    tl.store(order_ptr + below + earlier, o_j, mask=known)
    mine = known & (earlier == 0)
    tl.store(distinct_ptr + rank, ids, mask=mine)
    tl.store(starts_ptr + rank, below, mask=mine)
    tl.store(counts_ptr + rank, equal, mask=mine)


@triton.jit
def _add_rows_kernel(
    values_ptr, order_ptr, starts_ptr, counts_ptr, factor_ptr, source_ptr, begin, end, H, share,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """values[u] += sum over u's tokens j in [begin, end), in order, of the source row (j - begin) / share."""
    i_u = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    total = tl.load(values_ptr + i_u * H + o_h, mask=m_h, other=0.0)
    n = tl.load(counts_ptr + i_u)
    start = tl.load(starts_ptr + i_u, mask=n > 0, other=0)
    for past in range(0, n, BLOCK_M):
        o_m = past + tl.arange(0, BLOCK_M)
        j = tl.load(order_ptr + start + o_m, mask=o_m < n, other=-1)
        mine = (o_m < n) & (j >= begin) & (j < end)
        row = tl.where(mine, (j - begin) // share, 0).to(tl.int64)
        x = tl.load(source_ptr + row[:, None] * H + o_h[None, :], mask=mine[:, None] & m_h[None, :], other=0.0)
        x = x.to(total.dtype)
        if factor_ptr is not None:
            x *= tl.load(factor_ptr + (j - begin), mask=mine, other=0.0)[:, None]
        total += tl.sum(x, 0)
    tl.store(values_ptr + i_u * H + o_h, total, mask=m_h)


@triton.jit
def _write_rows_kernel(out_ptr, ids_ptr, values_ptr, out_strides, H, ADD: tl.constexpr, BLOCK_H: tl.constexpr):
    """out[ids[u]] = values[u], or += ; -1 is no row."""
    i_u = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.load(ids_ptr + i_u)
    m_h = (o_h < H) & (row >= 0)
    x = tl.load(values_ptr + i_u * H + o_h, mask=m_h, other=0.0)
    p_out = out_ptr + row * out_strides[0] + o_h.to(tl.int64) * out_strides[1]
    if ADD:
        x += tl.load(p_out, mask=m_h, other=0.0).to(x.dtype)
    tl.store(p_out, x.to(out_ptr.dtype.element_ty), mask=m_h)


class WordSums:
    """What fastcap.ops._native.LinearKernels has of these on the CPU.

    `V`: how many words there are; `on`: a tensor on the device; `plan`: a list that takes the launches instead of running
    them.
    """

    def group(self, ids):
        """The tokens by their ids [M]; -1 is none."""
        M, U = ids.shape[0], min(ids.shape[0], self.V)
        if M > MAX_COMPARED:
            return self._group_by_sorting(ids)
        distinct = torch.empty_like(ids)
        first, order, starts, counts = torch.empty((4, M), dtype=torch.int32, device=ids.device)
        grid = (triton.cdiv(M, 64),)
        arguments = dict(ids_ptr=ids, first_ptr=first, distinct_ptr=distinct, counts_ptr=counts, M=M, V=self.V, BLOCK_M=64)
        self._launch(_first_kernel, grid, 4, arguments)
        self._launch(_rank_kernel, grid, 4, dict(order_ptr=order, starts_ptr=starts, **arguments))
        return Words(distinct[:U], order, starts, counts)

    def _group_by_sorting(self, ids):
        M = len(ids)
        values, order = ids.masked_fill((ids < 0) | (ids >= self.V), -1).sort(stable=True)
        new = values >= 0
        new[1:] &= values[1:] != values[:-1]
        place = torch.where(values >= 0, new.cumsum(0) - 1, M)  # what has no id goes to the end, which is cut off
        first = torch.where(new, place, M)
        distinct = torch.full((M + 1,), -1, device=ids.device).scatter_(0, first, values)
        starts = torch.zeros_like(distinct).scatter_(0, first, torch.arange(M, device=ids.device))
        counts = torch.zeros_like(distinct).scatter_add_(0, place, torch.ones_like(place))
        counts[M:].zero_()
        return Words(distinct[: min(M, self.V)], order, starts, counts)

    def add_rows(self, values, words, begin, end, factor, source, share):
        """values [U, H] += the source rows of the tokens [begin, end), times their factor, by word."""
        (U, H) = values.shape
        block = block_of(H, 128)
        self._launch(_add_rows_kernel, (U, triton.cdiv(H, block)), 4, dict(
            values_ptr=values, order_ptr=words.order, starts_ptr=words.starts, counts_ptr=words.counts, factor_ptr=factor,
            source_ptr=source, begin=begin, end=end, H=H, share=share, BLOCK_M=16, BLOCK_H=block,
        ))  # fmt: skip

    def write_rows(self, out, ids, values, add, clear):
        if clear:
            out.zero_()
        block = block_of(values.shape[1], 1024)
        self._launch(_write_rows_kernel, (len(ids), triton.cdiv(values.shape[1], block)), 4, dict(
            out_ptr=out, ids_ptr=ids, values_ptr=values, out_strides=out.stride(), H=values.shape[1], ADD=add, BLOCK_H=block,
        ))  # fmt: skip

    def sparse_rows(self, ids, values, shape):
        """Coalesced, so the number of rows must be known: the one place that waits for the device."""
        U = int((ids >= 0).sum())
        return torch.sparse_coo_tensor(ids[None, :U], values[:U], shape, is_coalesced=True, check_invariants=False)

    def _launch(self, kernel, grid, num_warps, args):
        launch = Launch(kernel, grid, args, num_warps)
        if self.plan is not None:
            self.plan.append(launch)
        elif all(grid):
            run([launch], self.on)
