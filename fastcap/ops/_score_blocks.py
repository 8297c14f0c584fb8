"""The matrix products of attention_coverage_from_scores on the CPU: blocks of captions, heads and steps, whose scores are
made in a scratch of SCRATCH bytes, go through one of the row kernels of csrc/attention_coverage_from_scores, and are used up
before the next block's are made. The launcher that the operators call for the backend "cpp".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.ops import _backend, _coverage
from fastcap.ops._native import CPU

# Bytes of scores and of their factors at a time: they stay in the second-level cache between products and row kernel.
SCRATCH = 2 << 20


class Block(NamedTuple):
    """Captions, heads and steps, as slices."""

    b: slice
    h: slice
    t: slice

    def rows(self, x: Tensor) -> Tensor:
        """Its part of x [B, heads, T, ...]."""
        return x[self.b, self.h, self.t]

    def pairs(self, x: Tensor) -> Tensor:
        """Its part of x [B, heads, ...]."""
        return x[self.b, self.h]

    def mask(self, key_mask: Tensor | None) -> Tensor | None:
        """Its part of key_mask [B, L]."""
        return None if key_mask is None else key_mask[self.b]

    def valid(self, valid: Tensor | None) -> Tensor | None:
        """Its part of valid [B, T]."""
        return None if valid is None else valid[self.b, self.t]


def _slices(n: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]


def blocks(B: int, heads: int, T: int, L: int, E: int, itemsize: int) -> Iterator[Block]:
    """Captions while one fits the scratch, else heads while one fits, else as many steps of one as have SCRATCH of scores.
    The steps of a caption and head come in order."""
    of_head = (T * L + (T + L) * E) * itemsize
    captions, heads_at_once = (max(1, SCRATCH // n) for n in (max(1, heads) * of_head, of_head))
    steps = T if of_head <= SCRATCH else SCRATCH // (L * itemsize)
    for b in _slices(B, captions):
        for h in _slices(heads, heads_at_once):
            for t in _slices(T, max(1, steps)):
                yield Block(b, h, t)


class _Scores:
    """The scores of one block after another, in scratch that is made for the first, the largest, and used by all: what is
    allocated and freed for each leaves holes in a heap, several times its own size."""

    def __init__(self, query, key, key_mask, valid, scale, acc):
        self.query, self.key, self.scale, self.acc = query, key, scale, acc
        self.mask = None if key_mask is None else key_mask.contiguous()
        self.hidden = None if key_mask is None else ~key_mask
        self.invalid = None if valid is None else ~valid
        self._scratch: dict[str, Tensor] = {}

    def space(self, name: str, *shape: int) -> Tensor:
        """Unwritten memory for one use."""
        n = math.prod(shape)
        if name not in self._scratch:
            self._scratch[name] = self.query.new_empty(n, dtype=self.acc)
        return self._scratch[name][:n].view(shape)

    def _factor(self, name: str, x: Tensor, hidden: Tensor | None) -> Tensor:
        """x [n, m, R, E] as a factor [n m, R, E]: copied where it is in another dtype or has no such view, and where some is
        hidden [n, R] and must be 0, for 0 times a NaN is NaN."""
        n, m, R, E = x.shape
        if x.dtype == self.acc and hidden is None and (n == 1 or m == 1 or x.stride(0) == m * x.stride(1)):
            return x.view(n * m, R, E)
        factor = self.space(name, n, m, R, E).copy_(x)
        if hidden is not None:
            factor.masked_fill_(hidden[:, None, :, None], 0.0)
        return factor.view(n * m, R, E)

    def factors(self, block: Block) -> tuple[Tensor, Tensor]:
        """q [n m, R, E] and k [n m, L, E] of a block, with zeros where there is no step or location."""
        q = self._factor("query", block.rows(self.query), block.valid(self.invalid))
        return q, self._factor("key", block.pairs(self.key), block.mask(self.hidden))

    def of(self, block: Block, q: Tensor, k: Tensor) -> Tensor:
        """scale q k^T [n, m, R, L], over the last block's."""
        scores = self.space("scores", q.shape[0], q.shape[1], k.shape[1])
        torch.baddbmm(scores, q, k.mT, beta=0, alpha=self.scale, out=scores)
        return scores.view(*block.rows(self.query).shape[:3], k.shape[1])

    def product(self, name: str, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out [n, m, ...] = a @ b, of [n m, ...]. Always with out=: autocast casts a product that returns one."""
        whole = out.dtype == a.dtype and out.is_contiguous()
        flat = out.view(-1, *out.shape[2:]) if whole else self.space(name, a.shape[0], *out.shape[2:])
        torch.bmm(a, b, out=flat)
        if not whole:
            out.copy_(flat.view(out.shape))


def attention_coverage_from_scores_fwd(query, key, key_mask, valid, tau, out, residual, lse, scale, target, reduction):
    """Writes the outputs of torch.ops.fastcap.attention_coverage_from_scores_fwd."""
    B, heads, T, _ = query.shape
    L = key.shape[2]
    scores = _Scores(query, key, key_mask, valid, scale, out.dtype)
    S = residual if residual.numel() else out.new_empty(B, heads, L)
    if T == 0:
        S.zero_()
    for block in blocks(*query.shape[:3], L, query.shape[3], out.element_size()):
        CPU.attention_coverage_from_scores_rows_fwd(
            scores.of(block, *scores.factors(block)), block.mask(scores.mask), block.valid(valid),
            block.rows(lse) if lse.numel() else None, block.pairs(S), block.t.start > 0,
        )  # fmt: skip
    torch.sub(target if tau is None else tau.view(-1, 1, 1), S, out=S)
    if reduction == "none":
        torch.mul(S, S, out=out)
    else:
        flat = S.view(-1)
        torch.div(torch.dot(flat, flat), _coverage.divisor(reduction, S.shape), out=out)


def attention_coverage_from_scores_bwd(
    grad_out, residual, lse, query, key, key_mask, valid, scale, reduction, dquery, dkey
):  # fmt: skip
    """Writes the outputs of torch.ops.fastcap.attention_coverage_from_scores_bwd; empty ones are not wanted."""
    B, heads, T, E = query.shape
    L = key.shape[2]
    need_query, need_key = dquery.numel() > 0, dkey.numel() > 0
    scores = _Scores(query, key, key_mask, valid, scale, residual.dtype)
    coefficient = -2 * scale
    if reduction != "none":
        coefficient /= _coverage.divisor(reduction, residual.shape)
    for gradient in (dquery, dkey):  # fresh memory is page faults, in number more costly than the products
        _backend.extension().advise_huge_pages(gradient)
    if T == 0:
        dkey.zero_()
    sums = None
    for block in blocks(B, heads, T, L, E, residual.element_size()):
        q, k = scores.factors(block)
        weights = scores.of(block, q, k)
        CPU.attention_coverage_from_scores_rows_bwd(
            weights, block.mask(scores.mask), block.valid(valid), block.rows(lse), block.pairs(residual),
            block.pairs(grad_out) if grad_out.dim() else grad_out, coefficient,
        )  # fmt: skip
        weights = weights.view(-1, *weights.shape[2:])
        if need_query:
            scores.product("dquery", weights, k, block.rows(dquery))
        if need_key and block.t == slice(0, T):
            scores.product("dkey", weights.mT, q, block.pairs(dkey))
        elif need_key:  # a head's steps in several blocks, one after another: added in the dtype of sums
            if block.t.start == 0:
                sums = q.new_zeros(1, L, E)
            torch.baddbmm(sums, weights.mT, q, out=sums)
            if block.t.stop == T:
                block.pairs(dkey).copy_(sums.view(1, 1, L, E))
