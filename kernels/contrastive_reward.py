"""Contrastive rewards: how the kernels of _similarity_tiles.py and _siblings.py are run. What they compute is told there.

The forward is two launches: rectangles of tiles, and their partial results. The backward goes through blocks of the scores:
one launch writes a block's weights into a scratch, two matrix products use it up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastcap.kernels._common import TYPES, Launch, acc_of, block_of, run
from fastcap.kernels._siblings import (
    contrastive_reward_others_bwd,
    contrastive_reward_others_fwd,
    plan_contrastive_reward_others_bwd,
    plan_contrastive_reward_others_fwd,
)  # fmt: skip
from fastcap.kernels._similarity_tiles import (
    contrastive_reward_finish_kernel,
    contrastive_reward_statistics_kernel,
    contrastive_reward_weights_kernel,
)  # fmt: skip

__all__ = [
    "contrastive_reward_bwd",
    "contrastive_reward_fwd",
    "contrastive_reward_others_bwd",
    "contrastive_reward_others_fwd",
    "plan_contrastive_reward_bwd",
    "plan_contrastive_reward_fwd",
    "plan_contrastive_reward_others_bwd",
    "plan_contrastive_reward_others_fwd",
]


class Device(NamedTuple):
    """What a plan is made for."""

    major: int  # of its compute capability; 0 for any
    processors: int
    shared: int  # bytes of shared memory that a program may take


class Tile(NamedTuple):
    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    programs: int  # that run at once on a processor
    majors: tuple[int, ...] = ()  # the compute capabilities that it is for, in numbers of their first digit; empty: any
    shared: int = 48 << 10  # bytes of shared memory that a device must have


@dataclasses.dataclass(frozen=True)
class Block:
    """Scores of a backward: where they lie, a scratch for their weights, and the launch that fills it."""

    rows: slice
    cols: slice
    weights: torch.Tensor
    launch: Launch


# How products are made -> tiles from the largest to the smallest. An H100 reads some 30 bytes a clock and processor from its
# second-level cache and multiplies and adds 2,048 pairs of bfloat16 numbers: 256 x 128 is what keeps both busy. 128 columns
# and not 256, for what costs most beside the product are the columns' sums, across threads; in small steps of depth, which
# leave registers to them. Full float32 is multiplied by threads, not by tensor cores, out of registers: larger tiles of it,
# or of float64, spill, as do larger ones for "max" or weights.
_THREADS = {
    "float32": (Tile(64, 64, 16, 4, 2, 2),),
    "float64": (Tile(32, 32, 16, 4, 2, 3), Tile(16, 16, 16, 4, 2, 5)),
}
_HOPPER, _AMPERE_ON = Tile(256, 128, 32, 8, 4, 1, (9,), 99 << 10), Tile(128, 128, 32, 8, 4, 1, (8, 9), 99 << 10)
_ANY = Tile(128, 64, 32, 8, 2, 1), Tile(64, 64, 64, 4, 2, 2)


def _tiles(*half: Tile) -> dict[str, tuple[Tile, ...]]:
    return {"half": half, "tf32": tuple(tile._replace(depth=tile.depth // 2) for tile in half), **_THREADS}


TILES = _tiles(_HOPPER, _AMPERE_ON, *_ANY)
TILES_OF_ONE_DIRECTION = _tiles(_HOPPER, _AMPERE_ON, Tile(128, 64, 32, 4, 2, 2), Tile(64, 64, 32, 4, 2, 3))
TILES_OF_MAX = _tiles(*_ANY)
TILES_OF_WEIGHTS = _tiles(_AMPERE_ON, *_ANY)
SCRATCH_BYTES = 64 << 20
LEAST = 1e-28  # a sum that is smaller, beside terms of up to exp(32), may lack digits that were below float32's range


def _device_of(x) -> Device:
    """On meta and in the interpreter, a GPU as small as any."""
    if not x.is_cuda:
        return Device(0, 132, 48 << 10)
    properties = torch.cuda.get_device_properties(x.device)
    if torch.version.hip:
        return Device(0, properties.multi_processor_count, 48 << 10)
    return Device(properties.major, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def _tile_of(tiles: tuple[Tile, ...], P: int, Q: int, device: Device) -> Tile:
    """The largest tile that is for the device and is one of as many as occupy three quarters of it."""
    fitting = [tile for tile in tiles if device.major in (tile.majors or (device.major,)) and tile.shared <= device.shared]
    for tile in fitting:
        if 4 * triton.cdiv(P, tile.rows) * triton.cdiv(Q, tile.cols) >= 3 * device.processors:
            return tile
    return fitting[-1]


@functools.lru_cache(maxsize=256)
def _rectangle(row_blocks: int, col_blocks: int, programs: int) -> tuple[int, int]:
    """How many blocks of rows and of columns a program takes: of all ways with at most `programs`, the one that is over
    first, and of those the one with the fewest partial results."""

    def cost(groups: int) -> tuple[int, int, int, int]:
        rows, cols = triton.cdiv(row_blocks, max(1, programs // groups)), triton.cdiv(col_blocks, groups)
        kept = triton.cdiv(row_blocks, rows) * col_blocks + triton.cdiv(col_blocks, cols) * row_blocks
        return rows * cols, kept, rows, cols

    return min(cost(groups) for groups in range(1, min(col_blocks, programs) + 1))[2:]


def _factors(text, image, precision):
    """(text, image, how tl.dot multiplies them). For "medium" copies in bfloat16: a cast in the kernel would go through
    registers, and read twice the bytes for every tile."""
    if text.dtype == torch.float32 and precision == "medium":
        text, image = text.bfloat16(), image.bfloat16()
    return text, image, "tf32" if text.dtype == torch.float32 and precision == "high" else "ieee"


def _even(x, depth: int):
    """x, or a copy of it whose rows begin at multiples of 16 numbers, which are read by 16 bytes; others would come number
    by number through registers, and overflow these. Rows of no whole 16 numbers end with zeros up to a whole block."""
    D = x.shape[1]
    begins = x.storage_offset() * x.element_size() % 16 == 0
    if begins and x.stride(1) == 1 and x.stride(0) % 16 == 0 and D % 16 == 0:
        return x
    copy = x.new_zeros(x.shape[0], D if D % 16 == 0 else triton.cdiv(D, depth) * depth)
    copy[:, :D] = x
    return copy


def _run_as(tile: Tile) -> dict[str, object]:
    return dict(num_warps=tile.warps, num_stages=tile.stages, majors=tile.majors, shared=tile.shared)


def _common(tiles, text, image, positive, row_factor, col_factor, precision, device) -> tuple[dict[str, object], Tile]:
    """What both kernels of tiles take."""
    P, Q = text.shape[0], image.shape[0]
    kinds = {torch.float32: "tf32" if precision == "tf32" else "float32", torch.float64: "float64"}
    tile = _tile_of(tiles[kinds.get(text.dtype, "half")], P, Q, device)
    factor = TYPES[text.dtype]
    if factor == tl.bfloat16 and text.device.type == "cpu":
        factor = tl.float32  # Triton's interpreter multiplies the bits of bfloat16
    depth, block_p, block_q = block_of(text.shape[1], tile.depth), block_of(P, tile.rows), block_of(Q, tile.cols)
    text, image = _even(text, depth), _even(image, depth)
    D = text.shape[1]  # image's too: both are filled up, or neither
    reach = (n * x.stride(0) + depth * x.stride(1) for x, n in ((text, block_p), (image, block_q)))
    return dict(
        text_ptr=text, image_ptr=image, positive_ptr=positive.contiguous(),
        row_factor_ptr=row_factor.contiguous(), col_factor_ptr=col_factor.contiguous(),
        text_strides=text.stride(), image_strides=image.stride(), P=P, Q=Q, D=D,
        EVEN=D % depth == 0, WIDE=max(reach) >= 2**31, PRECISION=precision, FACTOR=factor, ACC=acc_of(text),
        BLOCK_P=block_p, BLOCK_Q=block_q, BLOCK_D=depth,
    ), tile  # fmt: skip


# fmt: off
def plan_contrastive_reward_fwd(
    text, image, positive, row_factor, col_factor, own, row, row_index, col, col_index, baseline, precision, device=None
) -> list[Launch]:
    """The launches of the forward. Scratch is made here; nothing is launched."""
    P, Q = text.shape[0], image.shape[0]
    device = device or _device_of(text)
    text, image, precision = _factors(text, image, precision)
    rows, cols, largest = row.numel() > 0, col.numel() > 0, baseline == "max"
    tiles = TILES_OF_MAX if largest else TILES if rows and cols else TILES_OF_ONE_DIRECTION
    common, tile = _common(tiles, text, image, positive, row_factor, col_factor, precision, device)
    blocks = triton.cdiv(P, common["BLOCK_P"]), triton.cdiv(Q, common["BLOCK_Q"])
    each = _rectangle(*blocks, device.processors * tile.programs)
    groups_p, groups_q = triton.cdiv(blocks[0], each[0]), triton.cdiv(blocks[1], each[1])
    key = torch.int64 if own.dtype == torch.float64 else torch.int32
    first, second = (key, torch.int32) if largest else (own.dtype, own.dtype)
    parts = dict(
        row_first_ptr=own.new_empty(groups_q, P, dtype=first) if rows else None,
        row_second_ptr=own.new_empty(groups_q, P, dtype=second) if rows else None,
        col_first_ptr=own.new_empty(groups_p, Q, dtype=first) if cols else None,
        col_second_ptr=own.new_empty(groups_p, Q, dtype=second) if cols else None,
    )
    key = tl.int64 if own.dtype == torch.float64 else tl.int32
    programs = [triton.cdiv(n, 256) for n in (row.numel(), col.numel())]
    return [
        Launch(contrastive_reward_statistics_kernel, (groups_p * groups_q,), dict(
            **common, **parts, own_ptr=own, GROUPS=groups_q, ROW_BLOCKS=each[0], COL_BLOCKS=each[1],
            MAX=largest, ROWS=rows, COLS=cols, LEAST=LEAST, KEY=key,
        ), **_run_as(tile)),
        Launch(contrastive_reward_finish_kernel, (sum(programs),), dict(
            **parts, row_ptr=row if rows else None, row_index_ptr=row_index if rows and largest else None,
            col_ptr=col if cols else None, col_index_ptr=col_index if cols and largest else None,
            P=P, Q=Q, ROW_PROGRAMS=programs[0], GROUPS_P=groups_p, GROUPS_Q=groups_q,
            ACC=common["ACC"], KEY=key, BLOCK=256,
        )),
    ]


def plan_contrastive_reward_bwd(
    down, drow, dcol, text, image, positive, row_factor, col_factor, row, col, precision, device=None
) -> Iterator[Block]:
    """The blocks of a backward, which share one scratch; `text`, `image` and `precision` as _factors leaves them."""
    P, Q = text.shape[0], image.shape[0]
    low = text.dtype == torch.bfloat16 and text.device.type != "cpu"
    dtype = torch.bfloat16 if low else row_factor.dtype
    rows, cols = _block_of_scores(P, Q, SCRATCH_BYTES // dtype.itemsize)
    scratch = text.new_empty(rows, cols, dtype=dtype)
    device = device or _device_of(text)
    common, tile = _common(TILES_OF_WEIGHTS, text, image, positive, row_factor, col_factor, precision, device)
    common.update(down_ptr=down.contiguous(), weights_ptr=scratch, WIDTH=cols)
    for name, value, gradient in (("row", row, drow), ("col", col, dcol)):
        given = value.numel() > 0
        common.update({f"{name}_ptr": value if given else None, f"d{name}_ptr": gradient.contiguous() if given else None})
    for first_p in range(0, P, rows):
        for first_q in range(0, Q, cols):
            p, q = slice(first_p, min(first_p + rows, P)), slice(first_q, min(first_q + cols, Q))
            weights = scratch[: p.stop - first_p, : q.stop - first_q]
            row_blocks = triton.cdiv(weights.shape[0], common["BLOCK_P"])
            col_blocks = triton.cdiv(weights.shape[1], common["BLOCK_Q"])
            # P and Q end at the block: what lies past it, a tile leaves alone
            yield Block(p, q, weights, Launch(contrastive_reward_weights_kernel, (row_blocks * col_blocks,), dict(
                **{**common, "P": p.stop, "Q": q.stop}, FIRST_P=first_p, FIRST_Q=first_q, ROW_BLOCKS=row_blocks,
            ), **_run_as(tile)))
# fmt: on


# Launchers -------------------------------------------------------------------------------------------------------------


def contrastive_reward_fwd(
    text, image, positive, row_factor, col_factor, own, row, row_index, col, col_index, baseline, precision
) -> None:  # fmt: skip
    """Writes the outputs of torch.ops.fastcap.contrastive_reward_fwd."""
    if text.shape[0] and image.shape[0]:
        given = text, image, positive, row_factor, col_factor
        run(plan_contrastive_reward_fwd(*given, own, row, row_index, col, col_index, baseline, precision), text)
        return
    own.fill_(torch.nan)
    for value, index in ((row, row_index), (col, col_index)):
        value.fill_(-torch.inf)
        index.fill_(-1)


def contrastive_reward_bwd(
    down, drow, dcol, text, image, positive, row_factor, col_factor, row, col, dtext, dimage, precision
) -> None:  # fmt: skip
    """Writes the outputs of torch.ops.fastcap.contrastive_reward_bwd; empty ones are not wanted."""
    P, Q = text.shape[0], image.shape[0]
    if P == 0 or Q == 0:
        dtext.zero_()
        dimage.zero_()
    if dtext.numel() == 0 and dimage.numel() == 0 or P == 0 or Q == 0:
        return
    # Weights of bfloat16 embeddings are rounded to bfloat16, as those of attention are, and products of these summed in
    # float32, which torch does on a GPU only. In float16 the weights of a large batch would vanish: they stay float32 and
    # are multiplied in TF32, which has float16's digits and float32's range.
    half = text.dtype == torch.float16
    text, image, precision = _factors(text, image, precision)
    given = down, drow, dcol, text, image, positive, row_factor, col_factor, row, col
    with _float32_products(text, half or precision == "tf32"):
        for block in plan_contrastive_reward_bwd(*given, precision):
            run([block.launch], text)
            if dtext.shape[0]:
                _add_product(dtext[block.rows], block.weights, image[block.cols], block.cols.start == 0)
            if dimage.shape[0]:
                _add_product(dimage[block.cols], block.weights.T, text[block.rows], block.rows.start == 0)


def _block_of_scores(P: int, Q: int, most: int) -> tuple[int, int]:
    """Rows and columns of a block of at most `most` scores, about twice as wide as high: each row of it reads and writes
    dtext again, and each column dimage."""
    side = 256 if most >= 1 << 20 else 16  # whole tiles
    cols = min(Q, max(side, math.isqrt(2 * most) // side * side))
    rows = min(P, max(side, most // cols // side * side))
    return rows, min(Q, max(side, most // rows // side * side))


@contextlib.contextmanager
def _float32_products(x, tf32: bool) -> Iterator[None]:
    """torch.mm of float32 on a GPU in TF32, or not: the caller's choice, and not that which the process has made."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if not x.is_cuda or x.dtype == torch.float64 or (before == "tf32") == tf32:
        yield
        return
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# torch before 2.11 adds a product of bfloat16 to nothing but bfloat16
_ADDS_TO_FLOAT32 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


def _add_product(out, a, b, is_first: bool) -> None:
    """out = a b, or out += a b. Always with out=: autocast casts a product that returns one."""
    if a.dtype != out.dtype:
        if is_first:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        elif _ADDS_TO_FLOAT32:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            out.add_(torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=torch.empty_like(out)))
    elif is_first:
        torch.mm(a, b.to(a.dtype), out=out)
    else:
        torch.addmm(out, a, b.to(a.dtype), out=out)
