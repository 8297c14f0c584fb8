"""Candidate ids made ready for GPU kernels, Triton's or CUDA's. Plain torch: no data-dependent shape, no synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

# Kernels mask repeats by comparing all pairs of up to this many ids; more are sorted here first.
MAX_PAIRED_IDS = 64


def without_repeats(ids: Tensor, pad: int) -> Tensor:
    """`ids` [B, T, K] with every repeat replaced by `pad`, sorted; unchanged up to MAX_PAIRED_IDS."""
    if ids.shape[2] <= MAX_PAIRED_IDS:
        return ids
    kept = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in ids.stride()[:2])  # what is there, not its copies
    values = ids[kept].sort(dim=-1).values
    repeats = torch.zeros_like(values, dtype=torch.bool)
    repeats[..., 1:] = values[..., 1:] == values[..., :-1]
    return values.masked_fill(repeats, pad).expand(ids.shape)


def repeats_as_pads(ids: Tensor, pad: int) -> Tensor:
    """`ids` [B or 1, T or 1, K] with every repeat replaced by `pad`, in their places; unchanged up to MAX_PAIRED_IDS."""
    if ids.shape[2] <= MAX_PAIRED_IDS:
        return ids
    values, order = ids.sort(dim=-1, stable=True)
    repeats = torch.zeros_like(values, dtype=torch.bool)
    repeats[..., 1:] = values[..., 1:] == values[..., :-1]
    return ids.masked_fill(torch.zeros_like(repeats).scatter_(-1, order, repeats), pad)


def excluded_marks(ids: Tensor, pad: int, V: int) -> Tensor:
    """[B, V] uint8: 1 for the ids [B, 1, K] of each caption, beside whose T * V logits it is small.

    Ids out of range are left out: the loss of the token that has one reports it.
    """
    ids, B = ids.squeeze(1), ids.shape[0]
    nowhere = (ids < 0) | (ids >= V) | (ids == pad)
    places = ids + torch.arange(0, B * V, V, device=ids.device).unsqueeze(1)
    marks = torch.zeros(B * V + 1, dtype=torch.uint8, device=ids.device)  # the last is nowhere, and cut off
    marks.scatter_(0, places.masked_fill(nowhere, B * V).flatten(), 1)
    return marks[:-1].view(B, V)
