"""attention_coverage against the two lines of plain torch that training loops have, and torch.compile of them.

Traffic: see floors.attention_coverage. The floor is one read of the attention weights, measured among the rest as torch's
sum of as many as are valid, in the order in which they lie; with lengths the backward also writes a gradient of their size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from fastcap.benchmarks import captions, floors, harness, peers
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings, Skip
from torch import Tensor

import fastcap
from fastcap import functional as F_cap
from fastcap import memory
from fastcap.ops import _backend

OPERATION = "attention_coverage"


class Shape(NamedTuple):
    """B captions of T steps over L locations; heads is 0 where attention has none."""

    B: int
    heads: int
    T: int
    L: int


SHAPES = {
    "tiny": Shape(3, 0, 5, 7),  # for tests
    "sat": Shape(32, 0, 52, 196),  # Show, Attend and Tell: 14 x 14 locations, captions of at most 50 words
    "sat_large": Shape(256, 0, 52, 196),
    "sat_huge": Shape(1024, 0, 52, 196),  # more than caches hold
    "heads": Shape(32, 8, 20, 196),
    "blip": Shape(32, 12, 20, 577),  # one layer of BLIP's cross-attention: 24 x 24 patches and a class token
}
VARIANTS = ("plain", "lengths")
FORWARD, BACKWARD = MODES = ("forward", "forward_backward")
BACKENDS = ("cpp", "triton", "cuda", "reference")

# What is promised of the forward and backward in float32 without lengths, by (device, shape).
LARGE = (Goal("cpp", 1 / 1.5, "eager"), Goal("cpp", 1.0, "compile"))
GOALS = {
    ("cpu", "sat"): (Goal("cpp", 1.0, "eager"), Goal("cpp", 1.0, "compile")),
    ("cpu", "sat_large"): LARGE,
    ("cpu", "sat_huge"): LARGE,
}


# The cases -------------------------------------------------------------------------------------------------------------


def plan(settings: Settings) -> list[tuple[str, tuple, tuple, tuple, bool]]:
    """(shape, dtypes, variants, modes, whether to compile) of each shape to run, what matters most first."""
    gpu = settings.device.startswith("cuda")
    dtypes = ("fp32", "bf16") if gpu else ("fp32",)
    if settings.shapes:
        chosen = [name for name in SHAPES if name in settings.shapes]
        return [(name, dtypes, VARIANTS, MODES, settings.profile in ("default", "all")) for name in chosen]
    if settings.profile == "tiny":
        return [("tiny", ("fp32",), VARIANTS, MODES, False)]
    if settings.profile == "quick":
        return [("sat", dtypes, VARIANTS, (BACKWARD,), False)]
    main = [(name, dtypes, VARIANTS, (BACKWARD,), True) for name in ("sat", "sat_large", "sat_huge")]
    rest = [(name, dtypes, VARIANTS, (BACKWARD,), False) for name in ("heads", "blip")]
    if settings.profile == "all":
        rest += [(name, dtypes, VARIANTS, (FORWARD,), False) for name in SHAPES if name != "tiny"]
        rest += [("sat_large", ("bf16",), VARIANTS, (BACKWARD,), False)] * (not gpu)
    return main + rest


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile on a device."""
    found = []
    for shape, dtypes, variants, modes, compiles in plan(settings):
        for dtype, variant, mode in ((d, v, m) for d in dtypes for v in variants for m in modes):
            providers = names(compiles and dtype == "fp32", settings.profile)
            sizes = " x ".join(f"{n:,}" for n in SHAPES[shape] if n)
            promised = compiles and (dtype, variant, mode) == ("fp32", "plain", BACKWARD)
            goals = GOALS.get((torch.device(settings.device).type, shape), ()) if promised else ()
            key = (shape, dtype, variant, mode)
            found.append(
                Case(
                    OPERATION, shape, sizes, dtype, variant, mode, providers,
                    lambda key=key, providers=providers: build(*key, providers, settings.device), goals=goals,
                )
            )  # fmt: skip
    return found


def names(compiles: bool, profile: str) -> tuple[str, ...]:
    """The providers of a case: ours, plain torch, the floor."""
    ours = BACKENDS if profile in ("tiny", "all") else BACKENDS[:-1]
    return (*ours, "eager", *(("compile",) if compiles else ()), "sum")


def eager(alpha: Tensor, mask: Tensor | None) -> Tensor:
    """The lines of training loops; mask [B, 1, T, 1] or [B, T, 1], 1 where a step counts."""
    if mask is not None:
        alpha = alpha * mask
    return ((1.0 - alpha.sum(dim=-2)) ** 2).mean()


def build(shape: str, dtype: str, variant: str, mode: str, providers: tuple[str, ...], device: str) -> Problem:
    """Inputs and providers; raises Skip where the device has too little memory."""
    B, heads, T, L = SHAPES[shape]
    elements = B * max(heads, 1) * T * L
    need, free = 8 * elements * 6, memory.available(device)  # float64 and its temporaries
    if free is not None and need > 0.8 * free:
        raise Skip(f"needs {need / 1e9:.1f} GB for the check in float64, {free / 1e9:.1f} GB are free")
    backward, kind = mode == BACKWARD, harness.DTYPES[dtype]
    generator = torch.Generator(device).manual_seed(0)
    size = (B, heads, T, L) if heads else (B, T, L)
    alpha = (2 * torch.randn(*size, generator=generator, device=device)).softmax(-1).to(kind)
    lengths = mask = None
    valid = B * T
    if variant == "lengths":  # of real captions
        lengths = (captions.draw_targets(B, T, 9_490) != -100).sum(1)
        valid = int(lengths.sum())
        lengths = lengths.to(device)
        mask = (torch.arange(T, device=device) < lengths[:, None]).to(kind).view(B, *(1,) * (alpha.dim() - 3), T, 1)

    def step(loss_of, alpha: Tensor = alpha):
        def run(upstream: Tensor | None = None) -> tuple:
            if not backward:
                with torch.no_grad():
                    return (loss_of(alpha),)
            loss = loss_of(alpha)
            return (loss.detach(), *torch.autograd.grad(loss, alpha, None if upstream is None else upstream.to(loss.dtype)))

        alpha.requires_grad_(backward)
        return run

    def exact(upstream: Tensor | None) -> tuple:
        of = None if mask is None else mask.double()
        return step(lambda a: eager(a, of), alpha.detach().double())(upstream)

    def ours(backend: str):
        def loss_of(alpha: Tensor) -> Tensor:
            with fastcap.backend(backend):
                return F_cap.attention_coverage(alpha, lengths=lengths)

        # What runs by itself is timed as it is called: the block costs 4 us, of some 100 at the smallest shape
        return step((lambda a: F_cap.attention_coverage(a, lengths=lengths)) if backend == chosen else loss_of)

    def floor(upstream: Tensor | None = None) -> tuple:
        with torch.no_grad():
            total = read.sum()
            return (total, torch.zeros_like(alpha)) if backward and lengths is not None else (total,)

    read = alpha.detach().flatten()[: elements * valid // (B * T)]
    chosen = _backend.select(OPERATION, device)
    found = {}
    for name in providers:
        if name in BACKENDS:
            why = harness.cannot_run(name, device)
            kind_of = "reference" if name == "reference" else "ours"
            found[name] = Provider(None if why else ours(name), kind_of, why, auto=name == chosen)
        elif name == "eager":
            found[name] = Provider(step(lambda a: eager(a, mask)))
        elif name == "compile":
            found[name] = Provider(step(peers.compiled(lambda a: eager(a, mask)).call))
        else:
            found[name] = Provider(floor, "floor")
    upstream = torch.tensor(0.37, dtype=torch.float64, device=device) if backward else None
    counted = None if lengths is None else valid
    traffic = floors.attention_coverage(B, max(heads, 1), T, L, kind.itemsize, valid=counted, backward=backward)
    return Problem(found, exact, traffic, upstream)


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_attention_coverage(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
