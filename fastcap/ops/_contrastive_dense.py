"""The operators of contrastive_reward in plain torch, for embeddings on several processes and the reference backend: what
the texts of a process and the images that visit it amount to. A dense [P, Q] for each visit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.ops import _contrastive
from fastcap.ops._contrastive import Statistics


def _scores(text: Tensor, image: Tensor, row_factor: Tensor, col_factor: Tensor) -> Tensor:
    with torch.autocast(text.device.type, enabled=False):
        return text.to(row_factor.dtype) @ image.to(row_factor.dtype).T * row_factor[:, None] * col_factor


def fwd(text, image, positive, row_factor, col_factor, rows, cols, baseline, precision) -> Statistics:
    own = torch.empty_like(row_factor)
    _contrastive.own_scores(text, image, positive, row_factor, col_factor, own)
    nothing, no_index = own.new_empty(0), positive.new_empty(0)
    found = []
    if rows or cols:
        s = _scores(text, image, row_factor, col_factor)
        s = s.masked_fill(torch.arange(image.shape[0], device=s.device) == positive[:, None], -torch.inf)
    for dim, wanted in ((1, rows), (0, cols)):
        if wanted:
            found += s.max(dim) if baseline == "max" else (s.logsumexp(dim), no_index)
        else:
            found += nothing, no_index
    return Statistics(own, *found)


def bwd(
    down, drow, dcol, text, image, positive, row_factor, col_factor, row, row_index, col, col_index, need_text, need_image,
    baseline, precision,
):  # fmt: skip
    dtext = row_factor.new_empty(text.shape if need_text else (0, text.shape[1]))
    dimage = row_factor.new_empty(image.shape if need_image else (0, image.shape[1]))
    if baseline == "max" or (row.numel() == 0 and col.numel() == 0):
        of = text, image, positive, row_factor, col_factor, row_index, col_index
        _contrastive.sparse_bwd(down, drow, dcol, *of, dtext, dimage)
        return dtext, dimage
    pair = torch.arange(image.shape[0], device=text.device) == positive[:, None]
    s = _scores(text, image, row_factor, col_factor)
    ds = torch.zeros_like(s)
    if row.numel():
        ds += drow[:, None] * (s - row[:, None]).exp()
    if col.numel():
        ds += dcol * (s - col).exp()
    ds = down[:, None].where(pair, ds) * row_factor[:, None] * col_factor
    with torch.autocast(text.device.type, enabled=False):
        if need_text:
            dtext = ds @ image.to(ds.dtype)
        if need_image:
            dimage = ds.T @ text.to(ds.dtype)
    return dtext, dimage


def others(own: Tensor, positive: Tensor, texts: slice, baseline: str) -> tuple[Tensor, Tensor]:
    """contrastive_reward.others for the texts of a slice, in plain torch. O(P^2 / W) memory."""
    p = torch.arange(own.shape[0], device=own.device)
    counts = (positive == positive[texts, None]) & (p != p[texts, None])
    some = counts.any(1)
    s = own.expand(counts.shape).masked_fill(~counts & some[:, None], -torch.inf)
    if baseline == "max":
        value, index = s.max(1)
        return value.where(some, -torch.inf), index.where(some, -1)
    return s.logsumexp(1).where(some, -torch.inf), positive.new_empty(0)
