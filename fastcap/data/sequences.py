"""Lengths of captions, as masks and labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcap.data.batching import IGNORE_INDEX
from fastcap.errors import bad

_OP = "data.ignore_padding"


def ignore_padding(target: Tensor, lengths: Tensor | Sequence[int], ignore_index: int = IGNORE_INDEX) -> Tensor:
    """`target` [B, T] int64 with `ignore_index` from each caption's length on; a copy.

    Args:
        target: ids, padded with anything.
        lengths: [B], how many targets of each caption count: 0 to T.

    Raises:
        FastcapError: the shapes do not fit, or a length is negative or more than T.

    >>> ignore_padding(torch.tensor([[5, 6, 0], [7, 0, 0]]), [2, 1]).tolist()
    [[5, 6, -100], [7, -100, -100]]
    """
    if not isinstance(target, Tensor) or target.dim() != 2 or target.dtype != torch.int64:
        got = f"{target.dtype} {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise bad(_OP, "target", "be an int64 tensor [B, T]", got, "pass the padded ids")
    B, T = target.shape
    lengths = torch.as_tensor(lengths, device=target.device)
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise bad(_OP, "lengths", f"be {B} integers", f"{lengths.dtype} {list(lengths.shape)}", "pass one a caption")
    if not target.is_cuda and bool(((lengths < 0) | (lengths > T)).any()):
        raise bad(_OP, "lengths", f"lie in [0, {T}]", lengths.tolist(), "count the targets, not the inputs")
    steps = torch.arange(T, device=target.device)
    return target.masked_fill(steps >= lengths.unsqueeze(1), ignore_index)
