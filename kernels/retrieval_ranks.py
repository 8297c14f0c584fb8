"""Ranks among similarities. Maths and names: csrc/retrieval_ranks/retrieval_ranks.h.

No kernel writes a matrix of scores: a tile of s_pq = (<text_p, image_q> r_p) c_q is made by tl.dot, compared, and gone.

  own     a program a block of texts: the tile of these and of their images, of which it keeps the diagonal
  counts  a program a block of texts and COL_BLOCKS blocks of columns: a text's counts over images stay in registers, those
          of a column's text over texts are added up for each tile

Both make a score by the same operations, so that equal dot products have equal bits; equal embeddings are known beforehand
by `same` (the first row that equals each) and tie whatever the bits are. A column has one text to compare with: an image of
several texts has as many columns, of which one counts for the rows. With the images of no text that is at most P + Q, and a
tile of none is skipped. Counts are added by atomics on integers, whose order is of no consequence.

Floor: 2 P Q D FLOPs and i D (P + Q) bytes, i bytes a number. Texts of one image cost their products again: 2 P max(P, Q) D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcap.kernels._common import TYPES, Launch, acc_of, block_of, run

EPS = 1e-12  # norms below it count as it
COL_BLOCKS = 32


@triton.jit
def _tile(x_ptr, x_strides, o, m, o_d, D, FACTOR: tl.constexpr):
    """Rows o and features o_d of x, 0 where m is off."""
    p = x_ptr + o.to(tl.int64)[:, None] * x_strides[0] + o_d.to(tl.int64)[None, :] * x_strides[1]
    return tl.load(p, mask=m[:, None] & (o_d < D)[None, :], other=0.0).to(FACTOR)


@triton.jit
def _scores(
    text_ptr, image_ptr, row_factor_ptr, col_factor_ptr, text_strides, image_strides, o_p, m_p, o_q, m_q, D,
    FACTOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s of the texts o_p and the images o_q."""
    s = tl.zeros((BLOCK, BLOCK), ACC)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        text = _tile(text_ptr, text_strides, o_p, m_p, o_d, D, FACTOR)
        image = _tile(image_ptr, image_strides, o_q, m_q, o_d, D, FACTOR)
        s = tl.dot(text, tl.trans(image), s, input_precision="ieee", out_dtype=ACC)
    r = tl.load(row_factor_ptr + o_p, mask=m_p, other=0.0)
    c = tl.load(col_factor_ptr + o_q, mask=m_q, other=0.0)
    return s * r[:, None] * c[None, :]


@triton.jit
def _own_kernel(
    text_ptr, image_ptr, positive_ptr, row_factor_ptr, col_factor_ptr, own_ptr, text_strides, image_strides, P, Q, D,
    FACTOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, BLOCK)
    o_p = tl.program_id(0) * BLOCK + o
    positive = tl.load(positive_ptr + o_p, mask=o_p < P, other=-1)
    m_q = (positive >= 0) & (positive < Q)
    s = _scores(
        text_ptr, image_ptr, row_factor_ptr, col_factor_ptr, text_strides, image_strides, o_p, o_p < P, positive, m_q, D,
        FACTOR, ACC, BLOCK, BLOCK_D,
    )  # fmt: skip
    own = tl.sum(tl.where(o[:, None] == o[None, :], s, 0.0), 1)
    tl.store(own_ptr + o_p, tl.where(m_q, own, float("nan")).to(tl.float64), mask=o_p < P)


@triton.jit
def _counts_kernel(
    text_ptr, image_ptr, row_factor_ptr, col_factor_ptr, own_ptr, positive_ptr, positive_same_ptr, text_same_ptr,
    image_same_ptr, col_image_ptr, col_text_ptr, col_counts_ptr, col_own_ptr, col_same_ptr,
    above_images_ptr, tied_images_ptr, above_texts_ptr, tied_texts_ptr, text_strides, image_strides,
    BEGIN, END, D, V, GROUPS,
    COL_BLOCKS: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows are those from BEGIN to END, the columns V."""
    o_p = BEGIN + tl.program_id(0) // GROUPS * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < END
    own = tl.load(own_ptr + o_p, mask=m_p, other=float("nan")).to(ACC)
    positive = tl.load(positive_ptr + o_p, mask=m_p, other=-1)
    positive_same = tl.load(positive_same_ptr + o_p, mask=m_p, other=-1)
    text_same = tl.load(text_same_ptr + o_p, mask=m_p, other=-1)
    above_images, tied_images = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0) % GROUPS * COL_BLOCKS * BLOCK
    for start in range(first, tl.minimum(first + COL_BLOCKS * BLOCK, V), BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        col_counts = tl.load(col_counts_ptr + o_v, mask=o_v < V, other=0)
        col_text = tl.load(col_text_ptr + o_v, mask=o_v < V, other=-1)
        if tl.max(tl.maximum(col_counts, col_text + 1), 0) > 0:
            o_q = tl.load(col_image_ptr + o_v, mask=o_v < V, other=0)
            s = _scores(
                text_ptr, image_ptr, row_factor_ptr, col_factor_ptr, text_strides, image_strides, o_p, m_p, o_q, o_v < V, D,
                FACTOR, ACC, BLOCK, BLOCK_D,
            )  # fmt: skip
            image_same = tl.load(image_same_ptr + o_q, mask=o_v < V, other=-2)
            same = positive_same[:, None] == image_same[None, :]
            here = (col_counts > 0)[None, :] & (own == own)[:, None] & (positive[:, None] != o_q[None, :])
            above_images += tl.sum((here & (s > own[:, None]) & ~same).to(tl.int32), 1)
            tied_images += tl.sum((here & ((s == own[:, None]) | same)).to(tl.int32), 1)
            col_own = tl.load(col_own_ptr + o_v, mask=o_v < V, other=float("nan")).to(ACC)
            col_same = tl.load(col_same_ptr + o_v, mask=o_v < V, other=-2)
            same = text_same[:, None] == col_same[None, :]
            here = m_p[:, None] & (col_own == col_own)[None, :] & (o_p[:, None] != col_text[None, :])
            above = tl.sum((here & (s > col_own[None, :]) & ~same).to(tl.int32), 0)
            tied = tl.sum((here & ((s == col_own[None, :]) | same)).to(tl.int32), 0)
            tl.atomic_add(above_texts_ptr + col_text, above.to(tl.int64), mask=(col_text >= 0) & (above > 0))
            tl.atomic_add(tied_texts_ptr + col_text, tied.to(tl.int64), mask=(col_text >= 0) & (tied > 0))
    tl.atomic_add(above_images_ptr + o_p - BEGIN, above_images.to(tl.int64), mask=m_p & (above_images > 0))
    tl.atomic_add(tied_images_ptr + o_p - BEGIN, tied_images.to(tl.int64), mask=m_p & (tied_images > 0))


# Launchers -------------------------------------------------------------------------------------------------------------

# By bytes a number: BLOCK, BLOCK_D and warps. Full float32 is multiplied by threads, not by tensor cores, out of registers.
BLOCKS = {2: (64, 64, 8), 4: (64, 16, 8), 8: (32, 16, 8)}


def _factors(norm, normalize, like):
    """What rows are multiplied by, in the dtype of sums."""
    factor = norm.clamp_min(EPS).reciprocal() if normalize else torch.ones_like(norm)
    return factor.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _common(text, image, normalize, text_norm, image_norm) -> dict[str, object]:
    """What both kernels take. Matrix precision is always full: ranks are about small differences."""
    factor = TYPES[text.dtype]
    if not text.is_cuda and text.device.type != "meta" and factor == tl.bfloat16:
        factor = tl.float32  # Triton's interpreter multiplies the bits of bfloat16
    block, block_d, _ = BLOCKS[text.element_size()]
    return dict(
        text_ptr=text, image_ptr=image,
        row_factor_ptr=_factors(text_norm, normalize, text), col_factor_ptr=_factors(image_norm, normalize, text),
        text_strides=text.stride(), image_strides=image.stride(), D=text.shape[1],
        FACTOR=factor, ACC=acc_of(text), BLOCK=block_of(max(text.shape[0], image.shape[0]), block), BLOCK_D=block_d,
    )  # fmt: skip


def plan_retrieval_ranks_own(text, image, positive, normalize, own, text_norm, image_norm) -> list[Launch]:
    """The launches that make the own scores; nothing is launched."""
    common, (P, Q) = _common(text, image, normalize, text_norm, image_norm), (text.shape[0], image.shape[0])
    args = dict(**common, positive_ptr=positive.contiguous(), own_ptr=own, P=P, Q=Q)
    return [Launch(_own_kernel, (triton.cdiv(P, common["BLOCK"]),), args, num_warps=BLOCKS[text.element_size()][2])]


def _columns(positive, own, text_same, order, Q) -> dict[str, object]:
    """V = P + Q columns: the texts in the order of their images, then the images of no text, then some that are none.

    col_image: where it lies in image. col_text: its text, -1 for none. col_counts: whether it counts for the rows: the first
    of each image. col_own, col_same: own and text_same of its text.
    """
    q = positive[order]
    mine = (q >= 0) & (q < Q)
    first = mine & torch.cat([mine[:1], q[1:] != q[:-1]])
    q = q.clamp(0, Q - 1)
    has_text = torch.zeros(Q, dtype=torch.int32, device=q.device).scatter_reduce(0, q, mine.int(), "amax")
    rest = has_text.argsort(stable=True)
    none = torch.full_like(rest, -1)
    col_own = torch.cat([own[order].where(mine, torch.nan), own.new_full((Q,), torch.nan)])
    return dict(
        col_image_ptr=torch.cat([q, rest]), col_text_ptr=torch.cat([order.where(mine, -1), none]),
        col_counts_ptr=torch.cat([first.long(), 1 - has_text[rest].long()]), col_own_ptr=col_own,
        col_same_ptr=torch.cat([text_same[order], none - 1]),
    )  # fmt: skip


def plan_retrieval_ranks_fwd(
    text, image, positive, normalize, own, text_norm, image_norm, text_same, image_same, order, begin, end, counts
) -> list[Launch]:  # fmt: skip
    """The launches that add the counts of the rows [begin, end); nothing is launched."""
    common, Q = _common(text, image, normalize, text_norm, image_norm), image.shape[0]
    names = ("above_images_ptr", "tied_images_ptr", "above_texts_ptr", "tied_texts_ptr")
    V, block = text.shape[0] + Q, common["BLOCK"]
    row_blocks, col_blocks = triton.cdiv(end - begin, block), COL_BLOCKS
    while row_blocks * triton.cdiv(V, block * col_blocks) >= 2**31:  # more programs than a GPU launches
        col_blocks *= 2
    groups = triton.cdiv(V, block * col_blocks)
    return [Launch(_counts_kernel, (row_blocks * groups,), dict(
        **common, **_columns(positive, own, text_same, order, Q), **dict(zip(names, counts, strict=True)),
        own_ptr=own, positive_ptr=positive.contiguous(), positive_same_ptr=image_same[positive.clamp(0, Q - 1)],
        text_same_ptr=text_same, image_same_ptr=image_same,
        BEGIN=begin, END=end, V=V, GROUPS=groups, COL_BLOCKS=col_blocks,
    ), num_warps=BLOCKS[text.element_size()][2])]  # fmt: skip


def retrieval_ranks_own(text, image, positive, normalize, own, text_norm, image_norm, text_same, image_same) -> None:
    """Writes own, of the outputs of torch.ops.fastcap.retrieval_ranks_own; the others are given."""
    if 0 in (text.shape[0], image.shape[0]):
        own.fill_(torch.nan)
    else:
        run(plan_retrieval_ranks_own(text, image, positive, normalize, own, text_norm, image_norm), text)


def retrieval_ranks_fwd(
    text, image, positive, normalize, own, text_norm, image_norm, text_same, image_same, order, begin, end, counts
) -> None:  # fmt: skip
    """Writes the outputs of torch.ops.fastcap.retrieval_ranks_fwd: `counts`, over the rows [begin, end)."""
    for x in counts:
        x.zero_()
    if end > begin and image.shape[0] > 0:
        run(plan_retrieval_ranks_fwd(
            text, image, positive, normalize, own, text_norm, image_norm, text_same, image_same, order, begin, end, counts
        ), text)  # fmt: skip
