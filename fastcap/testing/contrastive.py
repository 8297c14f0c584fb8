"""contrastive_reward and decoupled_contrastive_loss to a test: example calls, and Triton launches at real shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastcap import functional

from .operation import Case, Operation

OP = "contrastive_reward"
SCALE = 5.0  # softmaxes of a small batch that are neither flat nor one-hot


def make_pairs(P: int, Q: int, D: int, *, seed: int = 0) -> dict[str, Tensor]:
    """text [P, D] and image [Q, D] by name, float64, of any length; a text lies near the image of its row, modulo Q."""
    generator = torch.Generator().manual_seed(seed)
    text, image = (torch.randn(n, D, dtype=torch.float64, generator=generator) for n in (P, Q))
    if P and Q:
        text = text + image[torch.arange(P) % Q]
    lengths = [0.5 + torch.rand(n, 1, dtype=torch.float64, generator=generator) for n in (P, Q)]
    return {"text": text * lengths[0], "image": image * lengths[1]}


def make_positive(P: int, Q: int) -> Tensor:
    """[P] int64: images of several texts, of one and of none, in no order."""
    return (torch.arange(P) % Q).square() % max(Q - 1, 1)


def _cases(**every: Any) -> list[Case]:
    """Calls that between them use every option; what `every` says is said in all."""
    cases: list[Case] = []

    def add(name: str, P: int, Q: int, D: int, **given: Any) -> None:
        inputs: dict[str, Any] = make_pairs(P, Q, D, seed=len(cases))
        if given.pop("several", P > Q):
            inputs["positive"] = make_positive(P, Q)
        given = {"logit_scale": SCALE, **every, **given}
        if not given.get("normalize", True):
            given["logit_scale"] = 1.0
        # what cancels: the score of a pair and what the others amount to
        scores = given["logit_scale"] * (inputs["text"] @ inputs["image"].T).abs().max().item()
        size = scores if not given.get("normalize", True) else float(given["logit_scale"])
        cases.append(Case(name, {**inputs, **given}, size=size / (given["logit_scale"] if "reduction" not in every else 1)))

    small, several = (6, 7, 5), (9, 4, 5)
    for baseline in ("logsumexp", "max", "mean", "none"):
        add(f"several-{baseline}", *several, baseline=baseline)  # the first case calls every operator
        add(baseline, *small, baseline=baseline)
        add(f"several-group-{baseline}", *several, baseline=baseline, exclude="group")
    for direction in ("text_to_image", "image_to_text"):
        for baseline in ("logsumexp", "max"):
            add(f"{direction}-{baseline}", *several, direction=direction, baseline=baseline)
    add("raw", *several, normalize=False)
    add("raw-max", *small, normalize=False, baseline="max")
    add("clamp", *several, clamp=(-1.0, 1.5))
    add("clamp-above", *small, clamp=(None, 0.5), direction="image_to_text", exclude="group")
    add("int32", *several, several=False, positive=make_positive(9, 4).int(), logit_scale=100.0)
    # where kernels change their way: one of each, all texts of one image, blocks with tails
    add("ones", 1, 1, 3, normalize=False)
    add("one-image", 7, 1, 3, normalize=False)
    add("one-text", 1, 7, 3, normalize=False)
    add("one-feature", 5, 6, 1, normalize=False)
    add("many-texts-of-few", 150, 3, 4)
    add("blocks", 70, 67, 35)
    add("blocks-max", 67, 70, 35, baseline="max")
    return cases


# Launches --------------------------------------------------------------------------------------------------------------

# P, Q, D: three texts an image and two neighbours of 256, a batch for a CLIP, and the most that is benchmarked
REWARD_SHAPE, BATCH_SHAPE, LARGE_SHAPE = (768, 768, 512), (8192, 8192, 512), (65_536, 65_536, 512)


def plan_contrastive_reward(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    baseline: str = "logsumexp",
    precision: str = "highest",
    rows: bool = True,
    cols: bool = True,
    others: bool = True,
    backward: bool = True,
    device: Any = None,
) -> list[Any]:
    """The Triton launches of one forward, and of one block of its backward, planned on meta tensors: nothing is allocated
    or launched.

    others: with those for exclude="group". device: a `fastcap.kernels.contrastive_reward.Device`; None is a GPU as small as
    any.
    """
    from fastcap.kernels import contrastive_reward as kernels
    from fastcap.ops.contrastive_reward import _fwd_outputs, _others_outputs

    P, Q, D = shape
    text, image = (torch.empty(n, D, dtype=dtype, device="meta") for n in (P, Q))
    positive = torch.empty(P, dtype=torch.int64, device="meta")
    found = _fwd_outputs(text, image, rows, cols, baseline)
    own, row, _, col, _ = found
    factors = torch.empty_like(own), own.new_empty(Q)
    value, index = _others_outputs(own, positive, baseline)
    launches = kernels.plan_contrastive_reward_fwd(text, image, positive, *factors, *found, baseline, precision, device)
    if others:
        launches += kernels.plan_contrastive_reward_others_fwd(own, positive, Q, value, index)
    if backward and baseline == "logsumexp":
        upstreams = own, torch.empty_like(row), torch.empty_like(col)
        text, image, precision = kernels._factors(text, image, precision)
        given = *upstreams, text, image, positive, *factors, row, col, precision
        launches.append(next(kernels.plan_contrastive_reward_bwd(*given, device)).launch)
        if others:
            launches += kernels.plan_contrastive_reward_others_bwd(own, value, own, positive, Q, torch.empty_like(own))
    return launches


def _launches() -> Iterator[tuple[str, list[Any]]]:
    from fastcap.kernels.contrastive_reward import Device

    plan = plan_contrastive_reward
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)):
        yield f"batch-{name}", plan(BATCH_SHAPE, dtype)
        yield f"batch-max-{name}", plan(BATCH_SHAPE, dtype, baseline="max")
    yield "batch-high-float32", plan(BATCH_SHAPE, torch.float32, precision="high")
    yield "batch-high-max-float32", plan(BATCH_SHAPE, torch.float32, precision="high", baseline="max")
    yield "batch-rows-bfloat16", plan(BATCH_SHAPE, torch.bfloat16, cols=False)
    yield "batch-cols-bfloat16", plan(BATCH_SHAPE, torch.bfloat16, rows=False)
    yield "reward-float16", plan(REWARD_SHAPE, torch.float16)
    yield "reward-max-float16", plan(REWARD_SHAPE, torch.float16, baseline="max")
    yield "reward-cols-high-float32", plan(REWARD_SHAPE, torch.float32, precision="high", rows=False)
    yield "small-float64", plan((100, 200, 500), torch.float64)
    hopper, ampere = Device(9, 132, 227 << 10), Device(8, 108, 163 << 10)
    yield "large-hopper-bfloat16", plan(LARGE_SHAPE, torch.bfloat16, device=hopper)
    yield "large-hopper-cols-bfloat16", plan(LARGE_SHAPE, torch.bfloat16, rows=False, device=hopper)
    yield "large-hopper-high-float32", plan(LARGE_SHAPE, torch.float32, precision="high", device=hopper)
    yield "large-ampere-float16", plan((*LARGE_SHAPE[:2], 500), torch.float16, device=ampere)
    # Triton makes arguments that equal 1 into constants: another program
    yield "ones-float32", plan((1, 1, 1), torch.float32)


def _operation(function: Any, launches: Any, step: int = 1, **every: Any) -> Operation:
    """step: of the cases, every so many; the first is among them, and calls every operator."""
    return Operation(
        function=function,
        cases=lambda: _cases(**every)[::step],
        empty=Case("empty", {**make_pairs(0, 4, 5), **every}),
        inputs=("text", "image"),
        operators=tuple(f"{OP}_{name}" for name in ("fwd", "bwd", "others_fwd", "others_bwd")),
        launches=launches,
        backends=("reference", "cpp", "triton"),
        autocasts=True,  # of the reference, whose backward runs in it too; the fused: test_autocast_changes_nothing
        stem=OP,
        sums=True,
    )


CONTRASTIVE_REWARD = _operation(functional.contrastive_reward, _launches)
# The same operators, which the reward's cases go through with every option: a few suffice.
DECOUPLED_CONTRASTIVE_LOSS = _operation(functional.decoupled_contrastive_loss, lambda: iter(()), step=4, reduction="sum")
