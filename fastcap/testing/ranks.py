"""retrieval_ranks to a test: its example calls, and its Triton launches at the shapes of real evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastcap import functional

from .operation import Case, Operation

OP = "retrieval_ranks"


def make_embeddings(P: int, Q: int, D: int, *, seed: int = 0, copies: bool = True) -> dict[str, Tensor]:
    """text [P, D] and image [Q, D] by name, float64: whole numbers of a few units, so that scores tie often and dot products
    are exact in every dtype. With `copies`, every third row repeats an earlier one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, n in (("text", P), ("image", Q)):
        x = torch.randint(-3, 4, (n, D), generator=generator)
        x[:, 0] += 4  # no row is 0, and scores lean to one side
        if copies:
            x[2::3] = x[torch.arange(n)[2::3] // 2]
        made[name] = x.double()
    return made


def make_positive(P: int, Q: int, *, seed: int = 0) -> Tensor:
    """[P] int64: images of many texts, of one and of none, in no order."""
    return torch.randint(Q, (P,), generator=torch.Generator().manual_seed(seed + 1)).square() % Q


def _cases() -> list[Case]:
    def case(name: str, P: int, Q: int, D: int, *, positive: bool = False, **given: Any) -> Case:
        inputs: dict[str, Any] = make_embeddings(P, Q, D, seed=len(name))
        if positive:
            inputs["positive"] = make_positive(P, Q, seed=len(name))
        return Case(name, {**inputs, **given})

    return [
        case("square", 9, 9, 5),
        case("more-images", 7, 19, 5, normalize=False),
        case("more-texts", 23, 6, 4, positive=True),
        case("more-texts-raw", 23, 6, 4, positive=True, normalize=False),
        case("one-feature", 6, 8, 1),
        # where kernels change their way: one of each, all texts of one image, blocks with tails
        case("ones", 1, 1, 3),
        case("one-image", 17, 1, 3, positive=True),
        case("one-text", 1, 17, 3, positive=True),
        case("blocks", 140, 150, 37, normalize=False),
        case("blocks-of-few-images", 140, 5, 3, positive=True, normalize=False),
    ]


# Launches --------------------------------------------------------------------------------------------------------------


def plan_retrieval_ranks(P: int, Q: int, D: int, dtype: torch.dtype, *, normalize: bool = True) -> list[Any]:
    """The Triton launches of one call, planned on meta tensors: nothing is allocated or launched."""
    from fastcap.kernels import retrieval_ranks as kernels
    from fastcap.ops.retrieval_ranks import _fwd_outputs, _own_outputs

    text, image = (torch.empty(n, D, dtype=dtype, device="meta") for n in (P, Q))
    positive = torch.empty(P, dtype=torch.int64, device="meta")
    own, text_norm, image_norm, *indices = _own_outputs(text, image)
    given = text, image, positive, normalize, own, text_norm, image_norm
    counts = _fwd_outputs(text, 0, P)
    return [
        *kernels.plan_retrieval_ranks_own(*given),
        *kernels.plan_retrieval_ranks_fwd(*given, *indices, 0, P, counts),
    ]


def _launches() -> Iterator[tuple[str, list[Any]]]:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)):
        yield f"coco-{name}", plan_retrieval_ranks(25_000, 5_000, 512, dtype)
    yield "scenes-float16", plan_retrieval_ranks(200_000, 200_000, 64, torch.float16)
    # Triton makes arguments that equal 1 into constants: another program
    yield "ones-float32", plan_retrieval_ranks(1, 1, 1, torch.float32, normalize=False)


RETRIEVAL_RANKS = Operation(
    function=functional.retrieval_ranks,
    cases=_cases,
    empty=Case("empty", make_embeddings(0, 7, 5)),
    inputs=("text", "image"),
    operators=(f"{OP}_own", f"{OP}_fwd"),
    launches=_launches,
    backends=("reference", "cpp", "triton"),
    differentiable=False,
    result=torch.float64,
)
