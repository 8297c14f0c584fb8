"""The matrix products of contrastive_reward on the CPU: blocks of similarities, made in a scratch, go through one of the row
kernels of csrc/contrastive_reward, and are used up before the next block's are made. The launcher that the operators call
for the backend "cpp".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcap.ops import _backend
from fastcap.ops._native import CPU

# 2 MiB of float32 scores: they stay in the second-level cache between product and row kernel, and the products are large
# enough to run at the speed of whole ones (8,192 x 8,192 x 512 in such blocks: 0.38 s, in one product 0.45 s).
BLOCK_ROWS, BLOCK_COLS = 512, 1024


class _Scores:
    """The products of text and image, block by block, in the dtype of sums."""

    def __init__(self, text: Tensor, image: Tensor, acc: torch.dtype) -> None:
        self.text, self.image = (x.to(acc).contiguous() for x in (text, image))
        self._scratch = self.text.new_empty(min(BLOCK_ROWS, text.shape[0]) * min(BLOCK_COLS, image.shape[0]))

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        P, Q = self.text.shape[0], self.image.shape[0]
        for p in range(0, P, BLOCK_ROWS):
            for q in range(0, Q, BLOCK_COLS):
                yield slice(p, min(p + BLOCK_ROWS, P)), slice(q, min(q + BLOCK_COLS, Q))

    def of(self, rows: slice, cols: slice) -> Tensor:
        """[R, C], overwritten by the next block's."""
        R, C = rows.stop - rows.start, cols.stop - cols.start
        out = self._scratch[: R * C].view(R, C)
        with torch.autocast("cpu", enabled=False):
            return torch.mm(self.text[rows], self.image[cols].T, out=out)


def _running(like: Tensor, indices: bool) -> tuple[Tensor | None, ...]:
    """(top, sum, index) before the first block, for as many as `like`; nothing where that is empty."""
    n = like.shape[0]
    if n == 0:
        return None, None, None
    top = like.new_full((n,), -torch.inf)
    if indices:
        return top, None, torch.full((n,), -1, dtype=torch.int64)
    return top, torch.zeros(n, dtype=torch.float64), None


def _finish(top: Tensor | None, total: Tensor | None, index: Tensor | None, out: Tensor, out_index: Tensor) -> None:
    if top is None:
        return
    if total is None:
        out.copy_(top)
        out_index.copy_(index)
    else:  # sums are relative to the largest score, or to 0 where that is infinite
        out.copy_(total.log_().add_(top.masked_fill(top.isinf(), 0.0)))


def _part(x: Tensor | None, where: slice) -> Tensor | None:
    return None if x is None else x[where]


def contrastive_reward_fwd(
    text, image, positive, row_factor, col_factor, own, row, row_index, col, col_index, baseline, precision
):  # fmt: skip
    """Writes the outputs of torch.ops.fastcap.contrastive_reward_fwd."""
    own.fill_(torch.nan)
    rows_state, cols_state = _running(row, baseline == "max"), _running(col, baseline == "max")
    scores = _Scores(text, image, own.dtype)
    for rows, cols in scores.blocks():
        CPU.contrastive_reward_block_fwd(
            scores.of(rows, cols), positive[rows], row_factor[rows], col_factor[cols], own[rows],
            *(_part(x, rows) for x in rows_state), *(_part(x, cols) for x in cols_state), rows.start, cols.start,
        )  # fmt: skip
    _finish(*rows_state, row, row_index)
    _finish(*cols_state, col, col_index)


def contrastive_reward_bwd(
    down, drow, dcol, text, image, positive, row_factor, col_factor, row, col, dtext, dimage, precision
):  # fmt: skip
    """Writes the outputs of torch.ops.fastcap.contrastive_reward_bwd; empty ones are not wanted."""
    for gradient in (dtext, dimage):  # fresh memory is page faults
        _backend.extension().advise_huge_pages(gradient)
        if 0 in (text.shape[0], image.shape[0]):
            gradient.zero_()
    down, drow, dcol = (x.contiguous() for x in (down, drow, dcol))
    given_rows = (row, drow) if row.numel() else (None, None)
    given_cols = (col, dcol) if col.numel() else (None, None)
    scores = _Scores(text, image, row_factor.dtype)
    for rows, cols in scores.blocks():
        weights = scores.of(rows, cols)
        CPU.contrastive_reward_block_bwd(
            weights, positive[rows], row_factor[rows], col_factor[cols], down[rows],
            *(_part(x, rows) for x in given_rows), *(_part(x, cols) for x in given_cols), cols.start,
        )  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            if dtext.shape[0]:
                _add_product(dtext[rows], weights, scores.image[cols], first=cols.start == 0)
            if dimage.shape[0]:
                _add_product(dimage[cols], weights.T, scores.text[rows], first=rows.start == 0)


def _add_product(out: Tensor, x: Tensor, y: Tensor, first: bool) -> None:
    """out += x y, or the first of these products, into memory that nothing has been written to."""
    if first:
        torch.mm(x, y, out=out)
    else:
        out.addmm_(x, y)


def contrastive_reward_others_fwd(own, positive, Q, value, index):
    """Writes the outputs of torch.ops.fastcap.contrastive_reward_others_fwd."""
    CPU.contrastive_reward_others_fwd(own.contiguous(), positive.contiguous(), Q, value, index)


def contrastive_reward_others_bwd(dvalue, value, own, positive, Q, down):
    """Writes the output of torch.ops.fastcap.contrastive_reward_others_bwd."""
    CPU.contrastive_reward_others_bwd(dvalue.contiguous(), value, own.contiguous(), positive.contiguous(), Q, down)
