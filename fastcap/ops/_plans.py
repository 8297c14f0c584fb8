"""Which plan serves the tokens that need all V logits, within how much memory. See _head.py for what the plans do."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastcap.ops._subset import Options

SMALLEST = 1 << 20, 256  # of a panel: bytes, columns
# FLOPs that a device does in the time in which it moves a byte.
BALANCE = {"cpu": 20, "cuda": 180}


class Sizes(NamedTuple):
    """n dense rows (at most), V words, H features, bytes of a logit, and of what the plans "keep" and "rows" need besides:
    a copy of the head in the dtype of the products, and float32 sums of its gradient where that is narrower."""

    n: int
    V: int
    H: int
    itemsize: int
    copy: int
    sums: int


def sizes_of(x: Tensor, linear_weight: Tensor, options: Options, B: int, T: int) -> Sizes:
    """Of hidden states x [..., H] and a head [V, H]."""
    V, H = linear_weight.shape
    copy = 0 if x.dtype == linear_weight.dtype else V * H * x.element_size()
    sums = 4 * V * H if linear_weight.element_size() < 4 else 0
    return Sizes(dense_rows(options, B, T), V, H, x.element_size(), copy, sums)


def dense_rows(options: Options, B: int, T: int) -> int:
    """How many tokens may need all V logits; where nobody may wait for the device, so many are computed."""
    if options.kind != "set" or options.mle_weight > 0:
        return B * T
    return B if options.first_full else 0


def has_set(options: Options) -> bool:
    """Whether some token's scores are gathered; a mixture picks them from all logits instead."""
    return options.kind == "set" and options.mle_weight == 0


def block_rows(sizes: Sizes, budget: int, gradients: bool) -> int:
    """Rows of a block in the plan "rows"; 0 where not one fits. `gradients`: of the head too."""
    budget -= sizes.copy + (sizes.sums if gradients else 0)
    return max(0, min(sizes.n, budget // (sizes.V * sizes.itemsize)))


def panel_columns(sizes: Sizes, budget: int) -> int:
    """Columns of a panel, and of the head if that is copied: what the budget holds, at least the smallest, never all."""
    smallest, columns = SMALLEST
    column = sizes.n * sizes.itemsize + sizes.copy // sizes.V
    columns = max(columns, max(budget, smallest) // max(1, column))
    return max(1, min(columns // 64 * 64, (sizes.V + 1) // 2))


def choose(sizes: Sizes, budget: int, device: str, *, early: bool, gradients: str) -> str:
    """The plan that is expected to be fastest within `budget` bytes of scratch.

    `early`: whether gradients may be formed before the upstream gradient is known: by a scalar loss, and not in float16,
    where they would vanish or overflow before a loss scale comes. `gradients`: "none", "input" (of the hidden states only),
    "dense" or "accumulate" (of the weight too).
    """
    n, V, H = sizes[:3]
    if n == 0:
        return "none"
    if n * V * sizes.itemsize + sizes.copy <= budget:
        return "keep"
    size = block_rows(sizes, budget, gradients == "dense")
    # "accumulate" would need a second gradient of the head's size, to hold until the upstream gradient is known
    if size == 0 or gradients == "accumulate" or (gradients != "none" and not early):
        return "panels"
    blocks, panels = -(-n // size), -(-V // panel_columns(sizes, budget))
    rows_flops, panels_flops = (2, 2) if gradients == "none" else (4, 6) if gradients == "input" else (6, 8)
    head = blocks * V * H * sizes.itemsize * (1 if gradients == "none" else 2)
    head += (2 * blocks - 1) * V * H * 4 if gradients == "dense" else 0
    states = 0 if gradients == "none" else 2 * panels * n * H * 4
    rows_cost = rows_flops * n * V * H + BALANCE.get(device, 20) * head
    panels_cost = panels_flops * n * V * H + BALANCE.get(device, 20) * states
    return "rows" if rows_cost <= panels_cost else "panels"
