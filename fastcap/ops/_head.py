"""The matrix products of a loss fused with its head, and the plans between which they choose.

A token whose candidates are few multiplies its hidden state with their rows of the head, gathered (`set_*`). A token that
needs all V logits is a dense row; n of them go through one of three plans, each a loop over products with a row kernel
between them (`kernels`, the C++ or Triton functions of csrc/linear_subset_cross_entropy):

  keep    one product makes the [n, V] logits, the kernel turns them into their gradient in place, and that is kept
  rows    blocks of rows; each block's gradients are formed in the forward and added up: no logits are kept, but the head's
          gradient is rewritten once a block, and one number must be enough to scale it (a scalar loss)
  panels  blocks of the vocabulary, twice: the forward absorbs each panel's logits into running sums, the backward makes them
          again; the head's gradient is written exactly once

The gradient of a row's logits is linear in the row's upstream gradient, so the logits' gradients are kept without it, and it
scales the rows of the hidden states instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.ops._plans import Sizes, block_rows, has_set, panel_columns, sizes_of
from fastcap.ops._subset import Options

GATHERED = 8 << 20  # bytes of the head's rows that are gathered at once
MAX_BATCH = 65_535  # matrices of a batched product: what a library may put in the z of its grid
NUM_STATS = 8  # enum Stat in csrc/common/subset.h


class Kept(NamedTuple):
    """What a forward keeps for its backward, by plan; empty tensors where there is nothing."""

    inv_denom: Tensor  # []
    rows: Tensor  # [n] int64: the dense rows' tokens; fewer are used on the CPU, -1 behind them
    dset: Tensor  # set: [B, T, K] or [B, T, K + 1]; panels of a mixture: [n, K + 1]
    cols: Tensor  # panels of a mixture: [n, K + 1] int32
    stats: Tensor  # panels: [8, n]
    dlogits: Tensor  # keep: [n, V]
    dinput: Tensor  # rows: [n, H], times inv_denom
    dweight: Tensor  # rows: [V, H], summed in float32, times inv_denom
    dbias: Tensor  # rows: [V]


class Head(NamedTuple):
    """One call: its tensors, and the kernels that run on them. Hidden states are [N, H]."""

    kernels: object
    x: Tensor
    linear_weight: Tensor
    target: Tensor
    ids: Tensor | None
    options: Options
    budget: int

    @property
    def sizes(self) -> Sizes:
        B, T = self.target.shape
        return sizes_of(self.x, self.linear_weight, self.options, B, T)

    def words(self, begin: int, end: int) -> Tensor:
        """[end - begin, H] rows of the head, in the dtype of the products."""
        return self.linear_weight[begin:end].to(self.x.dtype)

    def gather(self, ids: Tensor) -> Tensor:
        """[..., H] rows of the head by id; what is no id gets some row, which counts for nothing."""
        safe = ids.masked_fill((ids < 0) | (ids >= self.linear_weight.shape[0]), 0)
        return self.linear_weight.index_select(0, safe.flatten()).to(self.x.dtype).view(*ids.shape, self.x.shape[1])


# Few candidates --------------------------------------------------------------------------------------------------------


def _groups(head: Head) -> tuple[Tensor, Tensor]:
    """The hidden states as G groups of R tokens that share their candidates, [G, R, H], and their ids [G, K]."""
    B, T = head.target.shape
    if head.ids is None:
        ids, (G, R) = head.target, (B, T)
    else:
        G = 1 if head.ids.shape[:2] == (1, 1) else B if head.ids.shape[1] == 1 else B * T
        ids, R = head.ids.reshape(G, -1), B * T // G
    return head.x.view(G, R, -1), ids


def _chunks(x: Tensor, ids: Tensor, H: int):
    """Ranges of groups whose rows of the head, gathered, take GATHERED bytes."""
    size = max(1, min(MAX_BATCH, GATHERED // max(1, ids.shape[1] * H * x.element_size())))
    return [(begin, min(begin + size, ids.shape[0])) for begin in range(0, ids.shape[0], size)]


def set_forward(head: Head, loss: Tensor, dset: Tensor | None) -> None:
    """Losses of the tokens that choose among few words, and d loss / d score."""
    if head.kernels.fuses(head.x):
        head.kernels.caption_forward(head.x, head.linear_weight, loss, dset)
        return
    x, ids = _groups(head)
    B, T = head.target.shape
    scores = x.new_empty(*x.shape[:2], ids.shape[1])
    for begin, end in _chunks(x, ids, head.x.shape[1]):
        torch.bmm(x[begin:end], head.gather(ids[begin:end]).mT, out=scores[begin:end])
    score_y = None
    if head.ids is not None:
        score_y, y = x.new_empty(B, T), head.target.reshape(-1, 1)
        for begin, end in _chunks(head.x, y, head.x.shape[1]):
            out = score_y.view(-1, 1, 1)[begin:end]
            torch.bmm(head.x[begin:end].unsqueeze(1), head.gather(y[begin:end]).mT, out=out)
    head.kernels.set(scores.view(B, T, -1), score_y, loss, dset)


def set_backward(
    head: Head, kept: Kept, grad_out: Tensor, dx: Tensor | None, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Writes dx [N, H]; returns (distinct ids [U], d weight [U, H] of their rows, d bias [U, 1]), or None."""
    x, ids = _groups(head)
    (G, R, H), K, N = x.shape, ids.shape[1], head.target.numel()
    M = G * K
    own = by_place = None
    if head.kernels.fuses(head.x):
        by_place = head.kernels.caption_backward(
            head.x, head.linear_weight, kept.dset, grad_out, kept.inv_denom, dx, need_weight or need_bias
        )
    else:
        dset = kept.dset * (grad_out * kept.inv_denom).unsqueeze(-1)
        if head.ids is not None:
            own, dset = dset[..., 0].reshape(N, 1).contiguous(), dset[..., 1:]
        dset = dset.reshape(G, R, K).contiguous()
        low = dset.to(x.dtype)
        if dx is not None:
            for begin, end in _chunks(x, ids, H):
                torch.bmm(low[begin:end], head.gather(ids[begin:end]), out=dx.view(G, R, H)[begin:end])
            if own is not None:
                y = head.target.reshape(-1, 1)
                for begin, end in _chunks(head.x, y, H):
                    dx[begin:end] += own[begin:end].to(x.dtype) * head.gather(y[begin:end, 0])
    if not (need_weight or need_bias):
        return None
    every = _marked(ids.flatten(), head.options.ids_pad)
    if own is not None:
        every = torch.cat([every, _marked(head.target.flatten(), head.options.ignore_index)])
    words, add_rows = head.kernels.group(every), head.kernels.add_rows
    dweight = kept.dset.new_zeros(len(words.distinct), H) if need_weight else None
    dbias = kept.dset.new_zeros(len(words.distinct), 1) if need_bias else None
    if need_weight:
        if by_place:
            add_rows(dweight, words, 0, M, None, by_place[0], 1)
        elif R == 1 and K > 0:
            add_rows(dweight, words, 0, M, dset.flatten(), head.x, K)
        elif K > 0:
            for begin, end in _chunks(x, ids, H):
                sums = torch.bmm(low[begin:end].mT, x[begin:end]).view(-1, H)
                add_rows(dweight, words, begin * K, end * K, None, sums, 1)
        if own is not None:
            add_rows(dweight, words, M, M + N, own.flatten(), head.x, 1)
    if need_bias:
        if K > 0:
            add_rows(dbias, words, 0, M, None, by_place[1] if by_place else dset.sum(1).view(-1, 1), 1)
        if own is not None:
            add_rows(dbias, words, M, M + N, None, own, 1)
    return words.distinct, dweight, dbias


def _marked(ids: Tensor, pad: int) -> Tensor:
    """`ids` [M] with -1 for `pad`, contiguous: flattening may have left them far apart."""
    return ids.contiguous() if pad == -1 else ids.masked_fill(ids == pad, -1)


# The whole vocabulary --------------------------------------------------------------------------------------------------


def _add_product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a @ b, or out + a @ b. `out` may be wider than the factors: sums over blocks are kept in float32."""
    if out.dtype == a.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    step = max(1, GATHERED // max(1, b.shape[1] * b.element_size()))
    for begin in range(0, out.shape[0], step):
        part = a[begin : begin + step] @ b
        if add:
            out[begin : begin + step] += part
        else:
            out[begin : begin + step] = part


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Rows of x times their factor, [n, 1] or []."""
    return (x * factor).to(x.dtype)


def _column_sums(logits: Tensor, factor: Tensor) -> Tensor:
    """[P]: the sum of the rows times their factor, in the dtype of the factor."""
    if logits.dtype == torch.float16:  # whose sums overflow, and whose small factors vanish
        size = -(-logits.shape[1] // 8)  # of columns, which are made wider, twice
        return torch.cat([(part.to(factor.dtype) * factor).sum(0) for part in logits.split(size, 1)])
    if factor.dim() == 0:
        return (logits.new_ones(1, logits.shape[0]) @ logits).view(-1).to(factor.dtype) * factor
    return (factor.to(logits.dtype).T @ logits).view(-1).to(factor.dtype)


def _factor(g: Tensor, rows: Tensor | None) -> Tensor:
    """The upstream gradient of each dense row, [n, 1], or of all, []."""
    if g.dim() == 0:
        return g
    g = g.reshape(-1, 1)
    return g if rows is None else g.index_select(0, rows)


def _select(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None or rows.shape[0] == x.shape[0] else x.index_select(0, rows)


def _panels(V: int, size: int):
    return [(begin, min(begin + size, V)) for begin in range(0, V, size)]


def dense_forward(head: Head, plan: str, rows: Tensor | None, loss: Tensor, kept: Kept, gradients: bool) -> None:
    """Losses of the dense rows, and what their backward needs."""
    x = _select(head.x, rows)
    n, V = x.shape[0], head.linear_weight.shape[0]
    if n == 0:
        kept.dweight.zero_()
        kept.dbias.zero_()
        return
    kernels = head.kernels
    if plan == "keep":
        logits = kept.dlogits[:n] if gradients else x.new_empty(n, V)
        kernels.advise(logits)
        torch.mm(x, head.words(0, V).T, out=logits)
        kernels.rows(logits, rows, loss, gradients)
    elif plan == "rows":
        size = block_rows(head.sizes, head.budget, kept.dweight.numel() > 0)
        scratch = x.new_empty(min(n, size), V)
        kernels.advise(scratch)
        weight = head.words(0, V)
        scaled = _scaled(x, kept.inv_denom)
        for begin in range(0, n, size):
            end = min(begin + size, n)
            logits = scratch[: end - begin]
            torch.mm(x[begin:end], weight.T, out=logits)
            kernels.rows(logits, kept.rows[begin:end], loss, gradients)
            if kept.dinput.numel():
                torch.mm(logits, weight, out=kept.dinput[begin:end])
            if kept.dweight.numel():
                kernels.advise(kept.dweight)
                _add_product(kept.dweight, logits.T, scaled[begin:end], add=begin > 0)
            if kept.dbias.numel():
                total = _column_sums(logits, kept.inv_denom)
                kept.dbias.copy_(kept.dbias + total if begin > 0 else total)
        if kept.dinput.numel():
            kept.dinput[:n].mul_(kept.inv_denom)
    else:
        size = panel_columns(head.sizes, head.budget)
        scratch = x.new_empty(n * size)
        running = kernels.start(n, loss)
        for begin, end in _panels(V, size):
            logits = scratch[: n * (end - begin)].view(n, end - begin)
            torch.mm(x, head.words(begin, end).T, out=logits)
            kernels.absorb(logits, begin, rows, running)
        kernels.finish(rows, running, loss, kept.stats, kept.cols, kept.dset)


def dense_backward(
    head: Head, plan: str, rows: Tensor | None, kept: Kept, grad_out: Tensor, need_x: bool, need_bias: bool,
    dweight: Tensor | None, add: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dx [n, H] of the dense rows, d bias [V]), each or None, in the plans "keep" and "panels".

    The head's gradient goes into `dweight`, where there is one: added to what is there where `add`.
    """
    x = _select(head.x, rows)
    n, V = x.shape[0], head.linear_weight.shape[0]
    factor = _factor(grad_out * kept.inv_denom, rows)
    scaled = None if dweight is None else _scaled(x, factor)
    if plan == "keep":
        dlogits = kept.dlogits[:n]
        dx = _scaled(dlogits @ head.words(0, V), factor) if need_x else None
        if dweight is not None:
            _add_product(dweight, dlogits.T, scaled, add)
        return dx, _column_sums(dlogits, factor) if need_bias else None
    sums = x.new_zeros(x.shape, dtype=kept.inv_denom.dtype) if need_x else None
    dbias = kept.inv_denom.new_zeros(V) if need_bias else None
    size = panel_columns(head.sizes, head.budget)
    scratch = x.new_empty(n * size)
    for begin, end in _panels(V, size):
        words, part = head.words(begin, end), None if dweight is None else dweight[begin:end]
        if n > 0:
            logits = scratch[: n * (end - begin)].view(n, end - begin)
            torch.mm(x, words.T, out=logits)
            head.kernels.emit(logits, begin, rows, kept.stats, kept.cols, kept.dset)
            if need_x:
                _add_product(sums, logits, words, add=True)
            if part is not None:
                _add_product(part, logits.T, scaled, add)
            if need_bias:
                dbias[begin:end] = _column_sums(logits, factor)
        elif part is not None and not add:
            part.zero_()
    return (sums * factor).to(x.dtype) if need_x else None, dbias


def backward(
    head: Head, plan: str, kept: Kept, grad_out: Tensor, need_x: bool, need_weight: bool, need_bias: bool,
    into: Tensor | None, sparse: bool, overwrite: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx [N, H], the head's gradient, d bias [V]), each or None where nobody needs it.

    The head's gradient is added to `into` where there is one, and else returned, row-sparse where `sparse`. `overwrite`:
    what the forward formed may be scaled in place.
    """
    kernels, weight = head.kernels, head.linear_weight
    tokens = head.target.numel() > 0
    if grad_out.dim() > 0:  # what is ignored may have any upstream gradient, NaN too
        grad_out = grad_out.masked_fill(head.target == head.options.ignore_index, 0.0)
    few, many = tokens and has_set(head.options), tokens and plan != "none"
    rows = kernels.kept_rows(kept.rows) if many else None
    dx = dweight = dbias = words = dx_rows = None
    if need_x and few:
        dx = torch.empty_like(head.x)
    if need_weight and into is not None:
        dweight = into
    elif need_weight and not sparse and not (many and plan == "rows"):
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        kernels.advise(dweight)
    if few:
        words = set_backward(head, kept, grad_out, dx, need_weight, need_bias)
    if many and plan == "rows":
        dx_rows = _scaled(kept.dinput if rows is None else kept.dinput[: rows.shape[0]], grad_out) if need_x else None
        dweight = _times(kept.dweight, grad_out, overwrite) if need_weight else None
        dbias = kept.dbias * grad_out if need_bias else None
    elif many:
        dx_rows, dbias = dense_backward(head, plan, rows, kept, grad_out, need_x, need_bias, dweight, add=into is not None)
    if dx_rows is not None and dx_rows.shape == head.x.shape:
        dx = dx_rows
    elif need_x and not few:
        dx = torch.zeros_like(head.x)
    if dx_rows is not None and dx is not dx_rows:
        dx.index_copy_(0, rows, dx_rows)
    if words is not None:
        distinct, dwords, dbias_words = words
        if need_bias:
            clear = dbias is None
            dbias = dbias_words.new_empty(weight.shape[0]) if clear else dbias
            kernels.write_rows(dbias.view(-1, 1), distinct, dbias_words, add=not clear, clear=clear)
        if need_weight and sparse:
            dweight = kernels.sparse_rows(distinct, dwords.to(weight.dtype), weight.shape)
        elif need_weight:
            clear = not many and into is None
            kernels.write_rows(dweight, distinct, dwords, add=not clear, clear=clear)
    elif not tokens:  # an empty batch
        if need_weight and into is None:
            dweight = torch.zeros_like(weight).to_sparse(1) if sparse else dweight.zero_()
        dbias = kept.inv_denom.new_zeros(weight.shape[0]) if need_bias else None
    if dweight is not None and into is None:
        dweight = dweight.to(weight.dtype)
    return dx, dweight if into is None else None, dbias


def _times(tensor: Tensor, factor: Tensor, overwrite: bool) -> Tensor:
    if overwrite and tensor.device.type == "cpu" and factor.item() == 1:
        return tensor
    return tensor.mul_(factor) if overwrite else tensor * factor
