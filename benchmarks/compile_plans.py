"""What `compile_report` compiles: the launches of every benchmark on a GPU, planned on meta tensors.

Shapes, dtypes, variants and options are the benchmarks' own: each provider of theirs that is Triton's is planned as `auto`
would run it on the target. Kernels that no benchmark reaches come from the launches that fastcap.testing has for tests.
Nothing is allocated or launched.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from fastcap.benchmarks import captions, floors, harness
from fastcap.benchmarks.plain import DENSE_ROWS, GATHERS, IGNORED, MODES, VARIANTS

from fastcap.testing import OPERATIONS, additive, contrastive, coverage, coverage_from_scores, launches, ranks

# (backend, architecture, threads of a warp) as triton.compile takes them.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# What contrastive_reward's choice of tiles asks of a device: the first digit of the capability, processors, and bytes of
# shared memory a program may take, of an A100, an H200 and a B200. What it sees of an AMD GPU is in its _device_of.
DEVICES = {
    "sm_80": (8, 108, 163 << 10),
    "sm_90": (9, 132, 227 << 10),
    "sm_100": (10, 148, 227 << 10),
    "gfx942": (0, 304, 48 << 10),
}
# What is not among a benchmark's own cases, and budgets that are not the default: other panels of the same kernels.
NOT_ASKED = ("-blip", "-mle", "-32MB", "-4GB", "-0")
BY_TARGET = ("contrastive_reward",)  # the operations that run otherwise on another target
BACKWARD = MODES[1]


class Planned(NamedTuple):
    """The launches of one call, or of one call and its backward."""

    operation: str
    name: str  # "blip bf16 subset forward", and what is asked of the provider
    launches: list[tuple[Any, int]]  # and how often each runs
    floor: floors.Traffic | None = None
    counts: floors.Counts | None = None  # of the targets, where there are such
    rows: str = "all"  # which of them need the whole vocabulary: "none", "first" or "all"
    whole: bool = False  # whether the launches are all that a call does: no products or fills of the library beside them


class Given(NamedTuple):
    """A benchmark's case for one provider."""

    sizes: Any  # the entry of its SHAPES
    dtype: torch.dtype
    variant: str
    backward: bool
    form: str  # what is asked of the provider, behind its "triton": "", "-high", "-sparse"
    target: str


# The operations --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _counts(B: int, T: int, V: int, padded: float | None) -> tuple[torch.Tensor, floors.Counts]:
    target = captions.draw_targets(B, T, V, padded=padded, ignore_index=IGNORED)
    return target, floors.count(target)


def _subset_cross_entropy(of: Given) -> dict[str, Any]:
    B, T, V, padded = of.sizes
    target, counts = _counts(B, T, V, padded)
    floor = floors.subset_cross_entropy(
        target, V, of.dtype.itemsize, rows=DENSE_ROWS[of.variant], gathers=of.variant in GATHERS, backward=of.backward,
        sector=floors.SECTOR["cuda"],
    )  # fmt: skip
    plan = launches.plan_subset_cross_entropy(B, T, V, of.dtype, backward=of.backward, **VARIANTS[of.variant])
    return dict(launches=plan, floor=floor, counts=counts, rows=DENSE_ROWS[of.variant], whole=of.variant != "reverse")


def _linear_subset_cross_entropy(of: Given) -> dict[str, Any]:
    from fastcap.benchmarks.bench_linear_subset_cross_entropy import FORMS

    B, T, V, H, padded = of.sizes
    target, counts = _counts(B, T, V, padded)
    options = FORMS[of.form]
    grad_weight = options.get("grad_weight", "dense")
    floor = floors.linear_subset_cross_entropy(
        target, V, H, of.dtype.itemsize, rows=DENSE_ROWS[of.variant], gathers=of.variant in GATHERS, backward=of.backward,
        grad_weight=grad_weight,
    )  # fmt: skip
    plan = launches.plan_linear_subset_cross_entropy(
        B, T, V, H, of.dtype, "auto", bias=False, backward=of.backward, budget=options.get("memory_budget"),
        grad_weight=grad_weight, **VARIANTS[of.variant],
    )  # fmt: skip
    whole = of.variant == "subset" and not of.backward
    return dict(launches=plan, floor=floor, counts=counts, rows=DENSE_ROWS[of.variant], whole=whole)


def _attention_coverage(of: Given) -> dict[str, Any]:
    B, heads, T, L = of.sizes
    valid = None
    if of.variant == "lengths":  # of real captions
        valid = _counts(B, T, 9_490, None)[1].valid
    shape = (B, heads, T, L) if heads else (B, T, L)
    plan = coverage.plan_attention_coverage(shape, of.dtype, masked=valid is not None, backward=of.backward)
    floor = floors.attention_coverage(B, max(heads, 1), T, L, of.dtype.itemsize, valid=valid, backward=of.backward)
    return dict(launches=plan, floor=floor, whole=valid is None)


def _attention_coverage_from_scores(of: Given) -> dict[str, Any]:
    plan = coverage_from_scores.plan_attention_coverage_from_scores(
        tuple(of.sizes), of.dtype, valid=of.variant == "lengths", backward=of.backward
    )
    floor = floors.attention_coverage_from_scores(*of.sizes, of.dtype.itemsize, backward=of.backward)
    return dict(launches=plan, floor=floor, whole=True)


def _additive_attention(of: Given) -> dict[str, Any]:
    B, L, A, D, T = of.sizes
    steps = T if of.variant == "caption" else 0
    plan = additive.plan_additive_attention(B, L, A, D, of.dtype, steps=steps, backward=of.backward)
    once = 2 if steps and of.backward else 0  # the last two serve all steps
    times = [(launch, max(steps, 1) if i < len(plan) - once else 1) for i, launch in enumerate(plan)]
    floor = floors.additive_attention(B, L, A, D, of.dtype.itemsize, steps=max(steps, 1), backward=of.backward)
    return dict(launches=times, floor=floor, whole=not (steps and of.backward))


def _contrastive_reward(of: Given) -> dict[str, Any]:
    from fastcap.kernels.contrastive_reward import Device

    P, Q, D, _ = of.sizes
    ways = ((True, True),) if of.variant == "reward" else ((True, False), (False, True))
    plan = [
        launch
        for rows, cols in ways
        for launch in contrastive.plan_contrastive_reward(
            (P, Q, D), of.dtype, precision="high" if of.form == "-high" else "highest", rows=rows, cols=cols,
            others=False, backward=of.backward, device=Device(*DEVICES[of.target]),
        )
    ]  # fmt: skip
    floor = floors.contrastive_reward(P, Q, D, of.dtype.itemsize, backward=of.backward)
    return dict(launches=plan, floor=floor, whole=of.variant == "reward" and not of.backward)


def _retrieval_ranks(of: Given) -> dict[str, Any]:
    P, Q, D, _ = of.sizes
    plan = ranks.plan_retrieval_ranks(P, Q, D, of.dtype)
    return dict(launches=plan, floor=floors.retrieval_ranks(P, Q, D, of.dtype.itemsize))


PLANNERS: dict[str, Callable[[Given], dict[str, Any]]] = {
    "subset_cross_entropy": _subset_cross_entropy,
    "linear_subset_cross_entropy": _linear_subset_cross_entropy,
    "attention_coverage": _attention_coverage,
    "attention_coverage_from_scores": _attention_coverage_from_scores,
    "additive_attention": _additive_attention,
    "contrastive_reward": _contrastive_reward,
    "retrieval_ranks": _retrieval_ranks,
}


def planned(target: str, only: tuple[str, ...] = ()) -> Iterator[Planned]:
    """What runs on a target: the benchmarks' cases, then the kernels that none of these reaches. only: operations."""
    chosen = [name for name in PLANNERS if not only or name in only]
    reached = set()
    for operation in chosen:
        for case in _of_benchmark(operation, target if operation in BY_TARGET else ""):
            reached |= {launch.kernel.fn.__name__ for launch, _ in case.launches}
            yield case
    for case in _of_tests(chosen, target):
        missing = [entry for entry in case.launches if entry[0].kernel.fn.__name__ not in reached]
        if missing:
            yield case._replace(launches=missing)


@cache
def _of_benchmark(operation: str, target: str) -> tuple[Planned, ...]:
    module = importlib.import_module(f"fastcap.benchmarks.bench_{operation}")
    met: dict[str, Planned] = {}
    for case in module.cases(harness.Settings(profile="all", device="cuda")):
        for provider in case.providers:
            if not provider.startswith("triton") or provider.endswith(NOT_ASKED):
                continue
            form = provider.removeprefix("triton")
            name = f"{case.shape} {case.dtype} {case.variant} {case.mode}{' ' + form[1:] if form else ''}"
            if name in met:
                continue
            sizes, dtype = module.SHAPES[case.shape], harness.DTYPES[case.dtype]
            found = PLANNERS[operation](Given(sizes, dtype, case.variant, case.mode == BACKWARD, form, target))
            plan = [entry if type(entry) is tuple else (entry, 1) for entry in found.pop("launches")]
            met[name] = Planned(operation, name, _folded(plan), **found)
    return tuple(met.values())


def _folded(plan: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Launches of one program to tensors of one layout as one, with how often they run: there may be thousands of panels."""
    found: dict[Any, tuple[Any, int]] = {}
    for launch, times in plan:
        layouts = tuple((x.shape, x.stride()) for x in launch.args.values() if isinstance(x, torch.Tensor))
        key = identity(launch), layouts
        first, before = found.get(key, (launch, 0))
        found[key] = first, before + times
    return list(found.values())


def _of_tests(chosen: list[str], target: str) -> Iterator[Planned]:
    for name, operation in OPERATIONS.items():
        stem = operation.stem or name
        for case, plan in operation.launches() if stem in chosen else ():
            fits = [(launch, 1) for launch in plan if not launch.majors or DEVICES[target][0] in launch.majors]
            yield Planned(stem, f"test {case}", fits)


# What is the same program ----------------------------------------------------------------------------------------------


def specialisation(launch) -> str:
    """What makes a launch's program, beside the kernel's code: equal for two launches that are compiled to the same."""
    from fastcap.kernels._common import source_of

    source = source_of(launch)
    divisible = sorted(place for place, said in source.attrs.items() if said)
    constants = sorted((place, str(value)) for place, value in source.constants.items())
    return f"warps={launch.num_warps} stages={launch.num_stages} {source.signature} {constants} {divisible}"


def identity(launch) -> str:
    """A short name of a launch's program: the kernel's, and a hash of its specialisation. The kernel's code is no part of
    it, so that the name stays when the code changes."""
    return f"{launch.kernel.fn.__name__}-{hashlib.sha256(specialisation(launch).encode()).hexdigest()[:8]}"


def pointers(launch) -> list[str]:
    """The names of the arguments that are tensors, in order."""
    names = (param.name for param in launch.kernel.params if not param.is_constexpr)
    return [name for name in names if isinstance(launch.args[name], torch.Tensor)]
