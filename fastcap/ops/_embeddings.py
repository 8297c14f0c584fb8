"""What the operations on pairs of text and image embeddings share: their checks, the images of the texts, the norms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _checks, _dtypes

PRECISIONS = ("highest", "high", "medium")
EPS = 1e-12  # norms below it count as it, as in torch.nn.functional.normalize


class Embeddings(NamedTuple):
    """text [P, D] and image [Q, D], and positive [P] int64, the image of each text."""

    text: Tensor
    image: Tensor
    positive: Tensor
    distinct: bool  # no two texts have the same image, and that is known without a look at the values


def prepare(
    op: str, text: Tensor, image: Tensor, positive: Tensor | None, precision: str, *, sharded: bool = False
) -> Embeddings:
    """Checks the embeddings; `positive`, if not given, counts up from 0.

    sharded: `image` is not all there are, and the caller checks what `positive` names.
    """
    for name, tensor in (("text", text), ("image", image)):
        _checks.check_tensor(op, name, tensor, "pass embeddings, one a row")
        _checks.check_dtype(op, name, tensor, _checks.FLOATS, f"convert the {name} embeddings")
        _checks.check_dense(op, name, tensor)
        if tensor.dim() != 2 or tensor.shape[1] < 1:
            letters = "[P, D]" if name == "text" else "[Q, D]"
            raise bad(op, name, f"have shape {letters}, D >= 1", list(tensor.shape), "pass one embedding a row")
    if image.shape[1] != text.shape[1]:
        rule = f"have the width of text, {text.shape[1]}"
        raise bad(op, "image", rule, image.shape[1], "embed both with one model, after its projections")
    if image.dtype != text.dtype:
        names = [str(x.dtype).removeprefix("torch.") for x in (text, image)]
        raise bad(op, "image", f"have the dtype of text, {names[0]}", names[1], "convert one of them")
    _checks.check_device(op, "image", image, text)
    _checks.check_choice(op, "precision", precision, PRECISIONS, "pass precision='highest'")
    P, Q = text.shape[0], image.shape[0]
    if positive is None:
        if P > Q:
            rule = f"be given where there are more texts than images, {P} and {Q}"
            raise bad(op, "positive", rule, None, "pass the row in image of each text's image, [P] int64")
        return Embeddings(text, image, torch.arange(P, device=text.device), True)
    _checks.check_tensor(op, "positive", positive, "pass the row in image of each text's image, [P] int64")
    _checks.check_dtype(op, "positive", positive, (torch.int64, torch.int32), "pass indices of rows of image: .long()")
    _checks.check_shape(op, "positive", positive, (P,), "[P]", "pass one index a text")
    _checks.check_device(op, "positive", positive, text)
    if not sharded and _checks.checks_values(positive):
        outside = (positive < 0) | (positive >= Q)
        if bool(outside.any()):
            rule = f"lie in [0, {Q}), the rows of image"
            raise bad(op, "positive", rule, int(positive[outside][0]), "pass the row of each text's image")
    return Embeddings(text, image, positive.long().contiguous(), False)


def inverse_norms(x: Tensor, normalize: bool) -> Tensor:
    """[N] factors that make the rows of x of unit length, or 1; in the dtype of sums."""
    acc = _dtypes.acc_of(x)
    if not normalize:
        return torch.ones(x.shape[0], dtype=acc, device=x.device)
    return torch.linalg.vector_norm(x.detach(), dim=1, dtype=acc).clamp_min(EPS).reciprocal()


def normalized(x: Tensor, normalize: bool) -> Tensor:
    """x in the dtype of sums, its rows of unit length where wanted. Differentiable; the reference's way.

    EPS is torch's default here. Passed on, it would be a symbol under torch.compile(dynamic=True), which fails where an
    autograd.Function of the same graph has met it before (torch 2.13).
    """
    x = x.to(_dtypes.acc_of(x))
    return torch.nn.functional.normalize(x, dim=1) if normalize else x
