"""additive_attention to a test: example calls of one step and of many, and its Triton launches at real shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcap import functional

from .operation import Case, Operation

# Of a captioner over a 14 x 14 map: width of attention 512; 512 channels of VGG-16, 2,048 of ResNet-101
B, L, A = 32, 196, 512
CHANNELS = (512, 2048)
STEPS = 20


def make_locations(B: int, L: int, A: int, D: int, *, T: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """keys, query ([T, B, A] with T), v and values by name, float64. As in a captioner the keys are a projection of the
    values: were they not related, the gradient of the query would be a sum of terms that cancel."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    values, query = normal(B, L, D), normal(B, A) if T is None else normal(T, B, A)
    return {"keys": values @ normal(D, A) / D**0.5, "query": query, "v": normal(A) * (2 / A**0.5), "values": values}


def make_mask(B: int, L: int, *, seed: int = 0) -> Tensor:
    """[B, L] bool: no location in the first row, one (the last) in the second, some in the others."""
    mask = torch.rand(B, L, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:2] = False
    mask[1:, -1] = True
    return mask


def run_steps(
    keys: Tensor,
    query: Tensor,
    v: Tensor,
    values: Tensor,
    *,
    rows: tuple[int, ...] | None = None,
    unused: int = 0,
    activation: str = "tanh",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(contexts [T, B, D], alphas [T, B, L]) of the T queries [T, B, A]; with `rows`, step t is of the first rows[t]
    captions, and the others have zeros."""
    T, B = query.shape[:2]
    attend = functional.additive_attention_steps(keys, v, values, steps=T + unused, activation=activation, mask=mask)
    contexts, alphas = [], []
    for t in range(T):
        n = B if rows is None else rows[t]
        context, alpha = attend(query[t, :n])
        contexts.append(F.pad(context, (0, 0, 0, B - n)))
        alphas.append(F.pad(alpha, (0, 0, 0, B - n)))
    return torch.stack(contexts), torch.stack(alphas)


def _cases() -> list[Case]:
    cases: list[Case] = []

    def add(name: str, *sizes: int, **given: Any) -> None:
        cases.append(Case(name, {**make_locations(*sizes, seed=len(cases)), **given}))

    small = (4, 5, 6, 3)
    mask, relu = make_mask(*small[:2]), {"activation": "relu"}
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(small[:2], dtype=torch.float64, generator=generator)
    one_hot = F.one_hot(torch.tensor([4, 0, 2, 2]), small[1]).double()
    add("tanh", *small)
    add("relu", *small, **relu)
    add("mask", *small, mask=mask)
    add("relu-mask", *small, **relu, mask=mask)
    add("alpha", *small, alpha=weights)
    add("alpha-mask", *small, mask=mask, alpha=weights * mask)
    add("alpha-one-hot", *small, **relu, alpha=one_hot)
    add("one-caption", 1, 7, 3, 5)
    add("one-location", 3, 1, 4, 2)
    add("one-feature", 3, 6, 1, 4)
    add("one-value", 2, 4, 5, 1, **relu)
    # where kernels change their way: blocks with a tail in every dimension, several of them, sums over blocks of rows
    add("tails", 3, 37, 19, 21, mask=make_mask(3, 37, seed=2))
    add("wide", 2, 1031, 5, 9, mask=make_mask(2, 1031, seed=3) | torch.arange(2)[:, None].eq(0))
    add("wide-rows", 2, 67, 131, 521, **relu)
    return cases


def _steps_cases() -> list[Case]:
    cases: list[Case] = []

    def add(name: str, *sizes: int, T: int, **given: Any) -> None:
        cases.append(Case(name, {**make_locations(*sizes, T=T, seed=50 + len(cases)), **given}))

    small = (3, 5, 4, 3)
    mask, relu = make_mask(*small[:2]), {"activation": "relu"}
    add("steps", *small, T=4)
    add("steps-relu", *small, T=3, **relu)
    add("steps-mask", *small, T=3, mask=mask)
    add("rows-leave", *small, T=4, rows=(3, 3, 2, 1), unused=2)
    add("rows-leave-mask", *small, T=3, rows=(3, 3, 2), mask=mask, **relu)
    add("one-step", *small, T=1)
    add("ones", 1, 1, 1, 1, T=2, **relu)
    add("tails", 3, 37, 19, 21, T=3, rows=(3, 2, 2))
    add("wide", 2, 263, 5, 9, T=3, mask=make_mask(2, 263, seed=3) | torch.arange(2)[:, None].eq(0))
    add("wide-rows", 2, 20, 131, 9, T=2)
    add("many-steps", 2, 3, 2, 2, T=34)
    return cases


# Launches --------------------------------------------------------------------------------------------------------------


def plan_additive_attention(
    B: int,
    L: int,
    A: int,
    D: int,
    dtype: torch.dtype,
    *,
    activation: str = "tanh",
    mask: bool = False,
    steps: int = 0,
    backward: bool = True,
) -> list[Any]:
    """The Triton launches of one forward, and its backward, or of one step and then the backward of all `steps`."""
    from fastcap.kernels import additive_attention as kernels
    from fastcap.ops import additive_attention as story

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    keys, values = empty(B, L, A, dtype=dtype), empty(B, L, D, dtype=dtype)
    query, v, alpha, context = empty(B, A), empty(A), empty(B, L), empty(B, D)
    where = empty(B, L, dtype=torch.bool) if mask else None
    whole = not steps
    of_weights = (alpha, alpha, keys, query, v, activation, whole)
    of_context = (context, alpha, values, True, whole)
    launches = [
        *kernels.plan_additive_attention_weights_fwd(keys, query, v, where, activation, alpha),
        *kernels.plan_additive_attention_context_fwd(alpha, values, context),
    ]
    if not backward:
        return launches
    launches += [
        *kernels.plan_additive_attention_context_bwd(*of_context, *story._context_bwd_outputs(*of_context, "triton")),
        *kernels.plan_additive_attention_weights_bwd(*of_weights, *story._weights_bwd_outputs(*of_weights, "triton")),
    ]
    if steps:
        message = empty(steps, B, L + A)  # as the steps report it
        of_memory = (message[..., :L], message[..., L:], keys, v, activation)
        outputs = story._memory_bwd_outputs(*of_memory, "triton")
        launches += kernels.plan_additive_attention_memory_bwd(*of_memory, *outputs)
    return launches


def _launches() -> Iterator[tuple[str, list[Any]]]:
    for D in CHANNELS:
        yield f"tanh-{D}-float32", plan_additive_attention(B, L, A, D, torch.float32)
        yield f"tanh-mask-{D}-bfloat16", plan_additive_attention(B, L, A, D, torch.bfloat16, mask=True)
    yield "relu-mask-float32", plan_additive_attention(B, L, A, CHANNELS[1], torch.float32, activation="relu", mask=True)
    yield "many-locations-float16", plan_additive_attention(2, 100_000, A, CHANNELS[0], torch.float16)
    # Triton makes arguments that equal 1 into constants: another program
    yield "ones-float32", plan_additive_attention(1, 1, 1, 1, torch.float32, mask=True)


def _steps_launches() -> Iterator[tuple[str, list[Any]]]:
    yield "steps-float32", plan_additive_attention(B, L, A, CHANNELS[0], torch.float32, steps=STEPS)
    yield "steps-mask-bfloat16", plan_additive_attention(B, L, A, CHANNELS[1], torch.bfloat16, mask=True, steps=STEPS)
    yield "steps-relu-float32", plan_additive_attention(B, L, A, CHANNELS[1], torch.float32, activation="relu", steps=STEPS)
    yield "steps-ones-float32", plan_additive_attention(1, 1, 1, 1, torch.float32, steps=1)


WEIGHTS = ("additive_attention_weights_fwd", "additive_attention_weights_bwd")
CONTEXT = ("additive_attention_context_fwd", "additive_attention_context_bwd")

ADDITIVE_ATTENTION = Operation(
    function=functional.additive_attention,
    cases=_cases,
    empty=Case("empty", make_locations(0, 3, 4, 2)),
    inputs=("keys", "query", "v", "values", "alpha"),
    operators=WEIGHTS + CONTEXT,
    launches=_launches,
    backends=("reference", "cpp", "triton"),
)

ADDITIVE_ATTENTION_STEPS = Operation(
    function=run_steps,
    cases=_steps_cases,
    empty=Case("empty", make_locations(0, 3, 4, 2, T=2)),
    inputs=("keys", "query", "v", "values"),
    operators=(*WEIGHTS, *CONTEXT, "additive_attention_memory_bwd"),
    launches=_steps_launches,
    backends=("reference", "cpp", "triton"),
    stem="additive_attention",
)
