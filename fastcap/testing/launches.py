"""The Triton launches of each operation at the shapes of real captioners, planned on meta tensors: nothing is allocated or
launched. What the tests compile for GPUs that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastcap.ops import _head, _plans, _subset

# Those of BLIP with BERT's words, and of a Gemma-sized vocabulary with captions too long to compare all pairs of words.
BLIP_SHAPE, GEMMA_SHAPE = (32, 20, 30_522), (8, 100, 262_144)

DEFAULTS = {
    "subset": "caption", "first_token": "full", "mle_weight": 0.0, "weight": None, "token_weight": None,
    "ignore_index": -100, "label_smoothing": 0.0, "logit_softcap": None, "z_loss": 0.0, "num_random": 10, "seed": None,
    "reduction": "mean",
}  # fmt: skip


def plan_subset_cross_entropy(
    B: int, T: int, V: int, dtype: torch.dtype, *, backward: bool = True, **options: Any
) -> list[Any]:
    """The Triton launches of one forward, and its backward, planned on meta tensors: nothing is allocated or launched."""
    from fastcap.kernels import subset_cross_entropy as kernels
    from fastcap.ops.subset_cross_entropy import _fwd_outputs

    input = torch.empty(B, T, V, dtype=dtype, device="meta")
    target = torch.empty(B, T, dtype=torch.int64, device="meta")
    ids, weight, token_weight, options = _subset.prepare("subset_cross_entropy", input, target, V, **{**DEFAULTS, **options})
    ids = ids.expand(B, T, -1) if options.kind == "set" else ids
    out, inv_denom, stats, cols, dset = _fwd_outputs(input, ids, options, backward)
    forward = kernels.plan_subset_cross_entropy_fwd(
        input, target, ids, weight, token_weight, out, inv_denom, stats, cols, dset, options
    )
    if not backward:
        return forward
    return forward + kernels.plan_subset_cross_entropy_bwd(
        torch.empty_like(out), inv_denom, input if options.is_dense else None, target,
        ids if options.kind == "reverse" else None, weight, stats, cols, dset, torch.empty_like(input), options,
    )  # fmt: skip


def subset_cross_entropy() -> Iterator[tuple[str, list[Any]]]:
    B, T, V = BLIP_SHAPE
    weights = {"weight": torch.empty(V, device="meta"), "token_weight": torch.empty(B, 1, device="meta")}
    smoothed = {"label_smoothing": 0.1}  # BLIP's own recipe
    options = {
        "caption": {},
        "caption-first-in-subset": {"first_token": "subset"},
        "caption-mixture": {"mle_weight": 0.01},
        "caption-smoothed": smoothed,
        "caption-weighted": {**smoothed, **weights, "logit_softcap": 30.0, "z_loss": 1e-4, "reduction": "none"},
        "reverse": {"subset": "reverse"},
        "reverse-smoothed": {"subset": "reverse", **smoothed},
        "random": {"subset": "random"},
        "ids": {"subset": torch.empty(1000, dtype=torch.int64, device="meta")},
        "full-smoothed": {"subset": "full", **smoothed},
    }
    for name, given in options.items():
        yield f"{name}-float32", plan_subset_cross_entropy(B, T, V, torch.float32, **given)
    for name in ("caption", "caption-first-in-subset", "reverse", "full-smoothed"):
        yield f"{name}-bfloat16", plan_subset_cross_entropy(B, T, V, torch.bfloat16, **options[name])
    yield "long-captions-float16", plan_subset_cross_entropy(*GEMMA_SHAPE, torch.float16, logit_softcap=30.0)
    # Triton makes arguments that equal 1 into constants: another program
    yield "ones-float32", plan_subset_cross_entropy(1, 1, 1, torch.float32, mle_weight=0.5)


def plan_linear_subset_cross_entropy(
    B: int,
    T: int,
    V: int,
    H: int,
    dtype: torch.dtype,
    plan: str = "keep",
    bias: bool = True,
    *,
    backward: bool = True,
    budget: int | None = 8 << 20,
    grad_weight: str = "dense",
    **options: Any,
) -> list[Any]:
    """One forward, and its backward, in a plan of _head.py for tokens that need all logits: "auto" is what a GPU chooses
    within `budget` bytes (None: the operation's own)."""
    from fastcap.kernels.linear_subset_cross_entropy import LinearKernels
    from fastcap.ops.linear_subset_cross_entropy import DEFAULT_BUDGET, _Call, _fwd_outputs

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    given = {**DEFAULTS, **options}
    input, linear_weight, target = empty(B, T, H), empty(V, H), empty(B, T, dtype=torch.int64)
    ids, weight, token_weight, options = _subset.prepare("linear_subset_cross_entropy", input, target, V, **given)
    if given["subset"] == "caption" and options.kind == "set":
        ids = None
    budget = DEFAULT_BUDGET if budget is None else budget
    if plan == "auto":
        early, gradients = options.reduction != "none" and dtype != torch.float16, grad_weight if backward else "none"
        sizes = _plans.sizes_of(input, linear_weight, options, B, T)
        plan = _plans.choose(sizes, budget, "cuda", early=early, gradients=gradients)
    plan = plan if _plans.dense_rows(options, B, T) else "none"
    call = _Call(backward, backward, bias and backward, plan, budget, "triton")
    launches: list[Any] = []
    linear_bias = empty(V, dtype=torch.float32) if bias else None
    kernels = LinearKernels(target, ids, weight, token_weight, linear_bias, V, options, plan=launches)
    head = _head.Head(kernels, input.view(B * T, H), linear_weight, target, ids, options, call.budget)
    out, kept = _fwd_outputs(input, linear_weight, target, ids, options, call)
    loss = empty(B, T, dtype=out.dtype)
    rows = kernels.find_rows(kept.rows, kept.inv_denom)
    if _plans.has_set(options):
        _head.set_forward(head, loss, kept.dset if backward else None)
    if plan != "none":
        _head.dense_forward(head, plan, rows, loss, kept, backward)
    kernels.reduce(loss, kept.inv_denom, out)
    if backward:
        into = empty(V, H, dtype=out.dtype) if grad_weight == "accumulate" else None
        kernels.sparse_rows = lambda ids, values, shape: values  # the real one waits for a device, and launches nothing
        _head.backward(head, plan, kept, torch.empty_like(out), *call[:3], into, grad_weight == "sparse", overwrite=False)
    return launches


def linear_subset_cross_entropy() -> Iterator[tuple[str, list[Any]]]:
    shape, H = BLIP_SHAPE, 768
    V = shape[2]
    weights = {"weight": torch.empty(V, device="meta"), "token_weight": torch.empty(shape[0], 1, device="meta")}
    options = {
        "caption": {},
        "caption-first-in-subset": {"first_token": "subset"},
        "mixture": {"mle_weight": 0.01},
        "mixture-weighted": {
            **weights, "mle_weight": 0.01, "label_smoothing": 0.1, "logit_softcap": 30.0, "z_loss": 1e-4,
            "reduction": "none",
        },
        "reverse-smoothed": {"subset": "reverse", "label_smoothing": 0.1},
        "random": {"subset": "random"},
        "ids": {"subset": torch.empty(1000, dtype=torch.int64, device="meta")},
        "full-smoothed": {"subset": "full", "label_smoothing": 0.1},
    }  # fmt: skip
    for name, given in options.items():
        yield f"{name}-bfloat16", plan_linear_subset_cross_entropy(*shape, H, torch.bfloat16, **given)
    for name in ("caption-first-in-subset", "mixture", "full-smoothed"):
        yield f"{name}-panels-float32", plan_linear_subset_cross_entropy(*shape, H, torch.float32, "panels", **options[name])
    yield "long-captions-float16", plan_linear_subset_cross_entropy(*GEMMA_SHAPE, 2304, torch.float16, logit_softcap=30.0)
    yield "ones-float32", plan_linear_subset_cross_entropy(1, 1, 1, 1, torch.float32, mle_weight=0.5, bias=False)
