"""Checks of the embeddings that metrics are given, and the cosines of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.errors import bad

_BLOCK = 8192  # pairs at a time: the float64 copies of a block are all the scratch there is


def check(op: str, name: str, value: object, text: Tensor | None = None) -> None:
    """Raises unless `value` is a dense float tensor [N, D] without NaN or infinity, of the width and device of `text`."""
    if not isinstance(value, Tensor):
        raise bad(op, name, "be a torch.Tensor", type(value).__name__, "pass embeddings, one a row")
    if not value.is_floating_point() or value.layout != torch.strided:
        got = str(value.dtype) if value.layout == torch.strided else value.layout
        raise bad(op, name, "be a dense tensor of floating point numbers", got, "pass embeddings, one a row")
    if value.dim() != 2 or value.shape[1] < 1:
        raise bad(op, name, "have shape [N, D], D >= 1", list(value.shape), "pass one embedding a row")
    if text is not None and value.shape[1] != text.shape[1]:
        rule = f"have the width of text, {text.shape[1]}"
        raise bad(op, name, rule, value.shape[1], "embed both with one model, after its projections")
    if text is not None and value.device != text.device:
        raise bad(op, name, f"be on the device of text, {text.device}", str(value.device), f"call {name}.to(text.device)")
    unsound = ~torch.isfinite(value).all(1)
    if bool(unsound.any()):
        row = int(unsound.nonzero()[0])
        remedy = "check the model that made it: a score of it would mean nothing"
        raise bad(op, name, "be finite", f"NaN or infinity in row {row}", remedy)


def check_rows(op: str, name: str, value: object, count: int, text: Tensor) -> None:
    """Raises unless `value` is an integer tensor [count] of rows of `text`, on its device."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32) or value.shape != (count,):
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise bad(op, name, f"be an int64 tensor [{count}]", got, "pass one row of text for each")
    if value.device != text.device:
        raise bad(op, name, f"be on the device of text, {text.device}", str(value.device), f"call {name}.to(text.device)")
    outside = (value < 0) | (value >= len(text))
    if bool(outside.any()):
        got = int(value[outside][0])
        raise bad(op, name, f"lie in [0, {len(text)}), the rows of text", got, "pass rows of text")


def pair_cosines(a: Tensor, b: Tensor, rows: Tensor | None = None) -> Tensor:
    """The cosine of each row of b with that of a, or with row `rows[i]` of a: [N] float64 in [-1, 1]; of zeros it is 0."""
    found = []
    for first in range(0, len(b), _BLOCK):
        other = b[first : first + _BLOCK]
        one = a[first : first + _BLOCK] if rows is None else a[rows[first : first + _BLOCK].long()]
        one, other = (torch.nn.functional.normalize(x.double(), dim=1) for x in (one, other))
        found.append((one * other).sum(1))
    return torch.cat(found).clamp(-1, 1) if found else b.new_zeros(0, dtype=torch.float64)
