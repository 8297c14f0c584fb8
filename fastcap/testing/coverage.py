"""attention_coverage: its example calls, and the Triton launches of real captioners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastcap import functional

from .operation import Case, Operation


def make_alpha(*shape: int, seed: int = 0, sharpness: float = 2.0) -> Tensor:
    """Attention weights of `shape`, locations last, in float64: softmaxes of random scores."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, dtype=torch.float64, generator=generator)).softmax(-1)


def attention_coverage_cases() -> list[Case]:
    B, T, L = 3, 6, 11
    alpha, heads = make_alpha(B, T, L), make_alpha(B, 2, T, L, seed=1)
    lengths = torch.tensor([6, 0, 4])
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    tau = torch.tensor([0.5, 1.25, -0.75], dtype=torch.float64)
    options = {
        "mean": {},
        "batchmean-lengths": {"lengths": lengths, "reduction": "batchmean"},
        "sum-mask": {"mask": mask, "reduction": "sum"},
        "none": {"reduction": "none", "target": tau},
        "none-lengths": {"reduction": "none", "lengths": lengths, "target": "length"},
        "length": {"target": "length"},
        "length-mask": {"target": "length", "mask": mask},
        "target-of-each-lengths": {"target": tau, "lengths": lengths.int()},
        "target-of-all-mask": {"target": 0.3, "mask": mask, "reduction": "none"},
    }
    cases = [Case(name, {"alpha": alpha, **given}) for name, given in options.items()]
    for name in ("mean", "batchmean-lengths", "none-lengths", "target-of-all-mask", "none"):
        cases.append(Case(f"heads-{name}", {"alpha": heads, **options[name]}))

    def add(name: str, *shape: int, **given: Any) -> None:
        cases.append(Case(name, {"alpha": make_alpha(*shape, seed=len(cases)), **given}))

    # where kernels change their way: one step, one location, whole packs of 16 bytes, several blocks of steps and locations
    # and a tail, more steps than are summed in a row
    add("one-step", 2, 1, 5, reduction="none")
    add("one-location", 2, 4, 1, reduction="batchmean")
    add("packs", 2, 5, 16, lengths=torch.tensor([2, 5]))
    add("packs-heads", 2, 3, 4, 32, reduction="sum", mask=torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.bool))
    add("long", 1, 77, 3, mask=torch.arange(77).remainder(5).ne(2)[None], reduction="none")
    add("longer", 1, 150, 5)
    add("wide", 2, 3, 1029, reduction="none")
    add("wide-lengths", 1, 2, 2, 1040, lengths=torch.tensor([1]))
    return cases


# Launches --------------------------------------------------------------------------------------------------------------

# Of Show, Attend and Tell's own attention, and of a transformer's cross-attention.
SAT_SHAPE, HEADS_SHAPE = (32, 52, 196), (32, 8, 20, 577)


def plan_attention_coverage(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    masked: bool = False,
    per_caption: bool = False,
    reduction: str = "mean",
    backward: bool = True,
) -> list[Any]:
    """The Triton launches of one forward, and its backward, planned on meta tensors: nothing is allocated or launched."""
    from fastcap.kernels import attention_coverage as kernels
    from fastcap.ops.attention_coverage import _bwd_output, _fwd_outputs

    alpha = torch.empty(shape, dtype=dtype, device="meta")
    valid = torch.empty(shape[0], shape[-2], dtype=torch.bool, device="meta") if masked else None
    out, residual = _fwd_outputs(alpha, reduction, backward)
    tau = torch.empty(shape[0], dtype=out.dtype, device="meta") if per_caption else None
    launches = kernels.plan_attention_coverage_fwd(alpha, valid, tau, out, residual, 1.0, reduction)
    if backward:
        dalpha = _bwd_output(residual, valid, dtype)
        launches += kernels.plan_attention_coverage_bwd(torch.empty_like(out), residual, valid, dalpha, reduction)
    return launches


def attention_coverage_launches() -> Iterator[tuple[str, list[Any]]]:
    each = {"reduction": "none", "per_caption": True}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)):
        yield f"sat-{name}", plan_attention_coverage(SAT_SHAPE, dtype)
        yield f"sat-masked-{name}", plan_attention_coverage(SAT_SHAPE, dtype, masked=True)
    yield "sat-each-masked-float16", plan_attention_coverage(SAT_SHAPE, torch.float16, masked=True, **each)
    yield "heads-float32", plan_attention_coverage(HEADS_SHAPE, torch.float32, **each)  # rows of no whole packs
    yield "heads-masked-float16", plan_attention_coverage(HEADS_SHAPE, torch.float16, masked=True)
    # Triton makes arguments that equal 1 into constants: another program
    yield "ones-float32", plan_attention_coverage((1, 1, 1), torch.float32, masked=True, per_caption=True)


ATTENTION_COVERAGE = Operation(
    function=functional.attention_coverage,
    cases=attention_coverage_cases,
    empty=Case("empty", {"alpha": torch.zeros(0, 4, 7, dtype=torch.float64)}),
    inputs=("alpha",),
    operators=("attention_coverage_fwd", "attention_coverage_bwd"),
    launches=attention_coverage_launches,
)
