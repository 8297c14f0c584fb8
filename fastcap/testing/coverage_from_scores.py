"""attention_coverage_from_scores to a test: its example calls, and its Triton launches at the shapes of real captioners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastcap import functional

from .operation import Case, Operation

OP = "attention_coverage_from_scores"


def make_query_and_key(*outer: int, T: int, L: int, E: int, seed: int = 0) -> dict[str, Tensor]:
    """query [*outer, T, E] and key [*outer, L, E] by name, float64: scores of a few units, so that weights differ."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(*outer, n, E, dtype=torch.float64, generator=generator) for n in (T, L))
    return {"query": 2 * query, "key": key}


def make_key_mask(B: int, L: int, *, seed: int = 0) -> Tensor:
    """[B, L] bool: no location for the first caption, one for the second, some for the others."""
    key_mask = torch.rand(B, L, generator=torch.Generator().manual_seed(seed)) < 0.6
    key_mask[:2] = False
    key_mask[1:, -1] = True
    return key_mask


def _cases() -> list[Case]:
    B, T, L, E = 3, 6, 11, 5
    plain, heads = make_query_and_key(B, T=T, L=L, E=E), make_query_and_key(B, 2, T=T, L=L, E=E, seed=1)
    here = make_key_mask(B, L)
    lengths = torch.tensor([6, 0, 4])
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    tau = torch.tensor([0.5, 1.25, -0.75], dtype=torch.float64)
    options = {
        "mean": {},
        "none": {"reduction": "none", "target": tau},
        "batchmean-lengths": {"lengths": lengths, "reduction": "batchmean", "scale": 0.7},
        "sum-mask": {"mask": mask, "reduction": "sum"},
        "key-mask": {"key_mask": here, "target": "length"},
        "none-key-mask-lengths": {"key_mask": here, "reduction": "none", "lengths": lengths, "target": "length"},
        "key-mask-mask": {"key_mask": here, "mask": mask, "target": tau, "scale": -0.4},
        "target-of-all": {"target": 0.3, "lengths": lengths.int(), "reduction": "batchmean"},
        "even": {"scale": 0.0, "target": 0.4},
    }
    cases = [Case(name, {**plain, **given}) for name, given in options.items()]
    cases += [Case(f"heads-{name}", {**heads, **given}) for name, given in options.items()]

    def add(name: str, *outer: int, T: int, L: int, E: int, **given: Any) -> None:
        cases.append(Case(name, {**make_query_and_key(*outer, T=T, L=L, E=E, seed=len(cases)), **given}))

    # where kernels change their way: one of each size, several blocks of steps, locations and features and a tail
    add("ones", 1, T=1, L=1, E=1, target=0.25)
    add("one-step", 2, T=1, L=5, E=3, reduction="none")
    add("one-location", 2, 2, T=4, L=1, E=3, reduction="batchmean", target=0.5)
    add("long", 1, T=77, L=3, E=2, mask=torch.arange(77).remainder(5).ne(2)[None], reduction="none")
    # a small scale: the log-sum-exp of many large scores has the rounding of a number of its size, and weights inherit it
    add(
        "many-locations",
        1,
        T=3,
        L=133,
        E=2,
        scale=0.3,
        key_mask=torch.arange(133).remainder(7).ne(2)[None],
        reduction="none",
    )
    add("many-features", 2, 1, T=2, L=5, E=83, lengths=torch.tensor([2, 1]))
    add("blocks", 1, T=35, L=37, E=34, reduction="sum", key_mask=torch.arange(37).lt(36)[None], target="length")
    return cases


# Launches --------------------------------------------------------------------------------------------------------------

# B, heads, T, L, E: GLIED's regions, a 14 x 14 map under one wide head, and the 577 patches of BLIP.
GLIED_SHAPE, SAT_SHAPE, BLIP_SHAPE = (32, 8, 20, 36, 64), (32, 1, 52, 196, 512), (32, 12, 20, 577, 64)


def plan_attention_coverage_from_scores(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    masked: bool = False,
    valid: bool = False,
    reduction: str = "mean",
    needed: tuple[bool, bool] = (True, True),
    backward: bool = True,
) -> list[Any]:
    """The Triton launches of one forward, and its backward, planned on meta tensors: nothing is allocated or launched.

    masked: with every mask there is, and a target for each caption; valid: with that of the steps alone.
    """
    from fastcap.kernels import attention_coverage_from_scores as kernels
    from fastcap.ops.attention_coverage_from_scores import _bwd_outputs, _fwd_outputs

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    B, heads, T, L, E = shape
    query = empty(B, T, heads, E).transpose(1, 2)  # as a projection leaves it
    key = empty(B, L, heads, E).transpose(1, 2)
    key_mask = empty(B, L, dtype=torch.bool) if masked else None
    steps = empty(B, T, dtype=torch.bool) if masked or valid else None
    out, residual, lse = _fwd_outputs(query, key, reduction, backward)
    tau = empty(B, dtype=out.dtype) if masked else None
    scale = E**-0.5
    launches = kernels.plan_attention_coverage_from_scores_fwd(
        query, key, key_mask, steps, tau, out, residual, lse, scale, 1.0, reduction
    )
    if backward:
        launches += kernels.plan_attention_coverage_from_scores_bwd(
            torch.empty_like(out), residual, lse, query, key, key_mask, scale, reduction, *_bwd_outputs(query, key, *needed)
        )
    return launches


def _launches() -> Iterator[tuple[str, list[Any]]]:
    plan = plan_attention_coverage_from_scores
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)):
        yield f"glied-{name}", plan(GLIED_SHAPE, dtype)
        yield f"glied-masked-{name}", plan(GLIED_SHAPE, dtype, masked=True)
    yield "blip-float16", plan(BLIP_SHAPE, torch.float16)
    yield "blip-each-masked-float16", plan(BLIP_SHAPE, torch.float16, masked=True, reduction="none")
    yield "sat-float32", plan(SAT_SHAPE, torch.float32)
    yield "sat-each-masked-bfloat16", plan(SAT_SHAPE, torch.bfloat16, masked=True, reduction="none")
    yield "sat-query-only-float32", plan(SAT_SHAPE, torch.float32, needed=(True, False))
    # Triton makes arguments that equal 1 into constants: another program
    yield "ones-float32", plan((1, 1, 1, 1, 1), torch.float32, masked=True)


ATTENTION_COVERAGE_FROM_SCORES = Operation(
    function=functional.attention_coverage_from_scores,
    cases=_cases,
    empty=Case("empty", make_query_and_key(0, 2, T=4, L=7, E=5)),
    inputs=("query", "key"),
    operators=(f"{OP}_fwd", f"{OP}_bwd"),
    launches=_launches,
    backends=("reference", "cpp", "triton"),
    autocasts=True,
)
