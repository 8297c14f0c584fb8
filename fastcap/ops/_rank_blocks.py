"""The matrix products of retrieval_ranks on the CPU: blocks of scores, made in a scratch of BLOCK_ROWS x BLOCK_COLS, are
counted by csrc/retrieval_ranks before the next block's are made. The launcher that the operators call for the backend "cpp".
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.ops import _backend, _dtypes
from fastcap.ops._native import CPU

# 2 MiB of float32 scores: they stay in the second-level cache between product and count, and the products are large enough
# to run at the speed of whole ones.
BLOCK_ROWS, BLOCK_COLS = 512, 1024


def _multiplies_in_full() -> bool:
    """Whether torch multiplies float32 on the CPU as float32: told so, oneDNN rounds factors to bfloat16 or TF32 first."""
    return getattr(torch.backends.mkldnn.matmul, "fp32_precision", "none") in ("none", "ieee")


def _factor(x: Tensor, dtype: torch.dtype, scratch: dict[str, Tensor], name: str) -> Tensor:
    """x [N, D] in `dtype`: itself, or a copy in scratch."""
    if x.dtype == dtype:
        return x
    if name not in scratch:
        rows = BLOCK_COLS if name.startswith("image") else BLOCK_ROWS
        scratch[name] = x.new_empty(rows, x.shape[1], dtype=dtype)
    return scratch[name][: x.shape[0]].copy_(x)


def _products(text: Tensor, image: Tensor, dtype: torch.dtype, scratch: dict[str, Tensor]) -> Tensor:
    """text image^T [R, C] in `dtype`, over the last block's."""
    left, right = (_factor(x, dtype, scratch, f"{n} {dtype}") for n, x in (("text", text), ("image", image)))
    name = f"products {dtype}"
    if name not in scratch:
        scratch[name] = text.new_empty(BLOCK_ROWS * BLOCK_COLS, dtype=dtype)
    out = scratch[name][: text.shape[0] * image.shape[0]].view(text.shape[0], image.shape[0])
    with torch.autocast("cpu", enabled=False):
        return torch.mm(left, right.T, out=out)


def retrieval_ranks_own(text, image, positive, normalize, own, text_norm, image_norm, text_same, image_same) -> None:
    """Writes the outputs of torch.ops.fastcap.retrieval_ranks_own."""
    CPU.retrieval_ranks_rows(text, text_norm, text_same)
    CPU.retrieval_ranks_rows(image, image_norm, image_same)
    CPU.retrieval_ranks_own(_pairs(text, image, positive, normalize, own, text_norm, image_norm))


def _pairs(text, image, positive, normalize, own, text_norm, image_norm):
    return _backend.extension().RankPairs(text, image, positive.contiguous(), text_norm, image_norm, own, normalize)


def retrieval_ranks_fwd(
    text, image, positive, normalize, own, text_norm, image_norm, text_same, image_same, order, begin, end, counts
) -> None:  # fmt: skip
    """Writes the outputs of torch.ops.fastcap.retrieval_ranks_fwd: `counts`, over the rows [begin, end)."""
    for x in counts:
        x.zero_()
    Q, acc = image.shape[0], _dtypes.acc_of(text)
    pairs = _pairs(text, image, positive, normalize, own, text_norm, image_norm)
    edges = torch.arange(0, Q + BLOCK_COLS, BLOCK_COLS).clamp_(max=Q)
    slots = torch.searchsorted(positive[order].contiguous(), edges).tolist()
    scratch: dict[str, Tensor] = {}
    fine = acc == torch.float64 or not _multiplies_in_full()
    for p in range(begin, end, BLOCK_ROWS):
        rows = slice(p, min(p + BLOCK_ROWS, end))
        per_row = (x[rows.start - begin : rows.stop - begin] for x in counts[:2])
        targets = (*per_row, *counts[2:])
        for i, q in enumerate(range(0, Q, BLOCK_COLS)):
            cols, texts = slice(q, q + BLOCK_COLS), order[slots[i] : slots[i + 1]]
            for dtype in (torch.float64,) if fine else (acc, torch.float64):
                scores = _products(text[rows], image[cols], dtype, scratch)
                if CPU.retrieval_ranks_block(
                    pairs, scores, p, q, text_same, image_same, texts, targets, dtype == torch.float64
                ):
                    break  # else more lie within the rounding of float32 than can be decided one by one
