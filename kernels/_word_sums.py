"""Sums over tokens by word: rows of equal id are added, in the order of the tokens. What the gradient of a head needs.

`add_rows`: one program a word and a block of features; it looks through the tokens in order, so that the sum has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcap.kernels._common import Launch, block_of, run

MAX_COMPARED = 16_384  # ids; all pairs of more are more work than a sort


@triton.jit
def _first_kernel(ids_ptr, first_ptr, distinct_ptr, M, V, BLOCK_M: tl.constexpr):
    """first[j]: whether no earlier id equals ids[j]. All pairs are compared: for the few thousand ids of a batch less than a
    sort."""
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


@triton.jit
def _rank_kernel(ids_ptr, first_ptr, group_ptr, distinct_ptr, M, V, BLOCK_M: tl.constexpr):
    """group[j]: how many distinct ids are smaller than ids[j]; distinct[group[j]] = ids[j]."""
    o_j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = tl.load(ids_ptr + o_j, mask=o_j < M, other=-1)
    rank = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, M, BLOCK_M):
        o_i = start + tl.arange(0, BLOCK_M)
        others = tl.load(ids_ptr + o_i, mask=o_i < M, other=-1)
        first = tl.load(first_ptr + o_i, mask=o_i < M, other=0) != 0
        rank += tl.sum((first[None, :] & (others[None, :] < ids[:, None])).to(tl.int32), 1)
    known = (ids >= 0) & (ids < V)
    tl.store(group_ptr + o_j, tl.where(known, rank, -1).to(tl.int64), mask=o_j < M)
    mine = tl.load(first_ptr + o_j, mask=o_j < M, other=0) != 0
    tl.store(distinct_ptr + rank, ids, mask=mine & (o_j < M))


@triton.jit
def _add_rows_kernel(
    values_ptr, group_ptr, factor_ptr, source_ptr, M, H, share, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    """values[u] += sum of the source rows whose group is u, in order; rows of other groups are not read."""
    i_u = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    total = tl.load(values_ptr + i_u * H + o_h, mask=m_h, other=0.0)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        mine = tl.load(group_ptr + o_m, mask=o_m < M, other=-1) == i_u
        if tl.sum(mine.to(tl.int32), 0) > 0:
            p_m = source_ptr + (o_m // share).to(tl.int64)[:, None] * H + o_h[None, :]
            x = tl.load(p_m, mask=mine[:, None] & m_h[None, :], other=0.0).to(total.dtype)
            if factor_ptr is not None:
                x *= tl.load(factor_ptr + o_m, mask=mine, other=0.0)[:, None]
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
        """(the place of each id among the distinct ones, those in order, then -1); -1 is none. As many as there are ids."""
        M = ids.shape[0]
        if M > MAX_COMPARED:
            return self._group_by_sorting(ids)
        group, distinct = torch.empty_like(ids), torch.empty_like(ids)
        first = torch.empty(M, dtype=torch.int32, device=ids.device)
        arguments = {"ids_ptr": ids, "first_ptr": first, "M": M, "V": self.V, "BLOCK_M": 64}
        grid = (triton.cdiv(M, 64),)
        self._launch(_first_kernel, grid, 4, dict(distinct_ptr=distinct, **arguments))
        self._launch(_rank_kernel, grid, 4, dict(group_ptr=group, distinct_ptr=distinct, **arguments))
        return group, distinct

    def _group_by_sorting(self, ids):
        values, order = ids.masked_fill((ids < 0) | (ids >= self.V), -1).sort(stable=True)
        new = values >= 0
        new[1:] &= values[1:] != values[:-1]
        place = new.cumsum(0) - 1
        group = torch.empty_like(ids).scatter_(0, order, place.masked_fill(values < 0, -1))
        distinct = torch.full((len(ids) + 1,), -1, dtype=torch.int64, device=ids.device)
        distinct.scatter_(0, torch.where(new, place, len(ids)), values)  # what is no first occurrence goes to the end
        return group, distinct[:-1]

    def add_rows(self, values, group, factor, source, share):
        (U, H), M = values.shape, group.shape[0]
        block = block_of(H, 256)
        self._launch(_add_rows_kernel, (U, triton.cdiv(H, block)), 4, dict(
            values_ptr=values, group_ptr=group, factor_ptr=factor, source_ptr=source, M=M, H=H, share=share,
            BLOCK_M=16, BLOCK_H=block,
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
