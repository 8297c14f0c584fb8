"""subset_cross_entropy against the paper's own formulation, the best plain torch and others, from logits.

Traffic: see floors.subset_cross_entropy. What training needs at least is the dense gradient, so the floor of
forward_backward is torch.zeros_like(input), measured among the rest.

On a CPU that floor can be beaten: a fresh gradient is mostly page faults, and cpp asks the kernel for 2 MiB pages where
torch does so only under THP_MEM_ALLOC_ENABLE=1, which helps every provider: `fastcap bench --huge-pages`. That is the
comparison of the kernels alone; without it a ratio holds what the pages save, too. Results say which: `torch_huge_pages`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from fastcap.benchmarks import captions, floors, harness, peers
from fastcap.benchmarks.harness import Case, Problem, Provider, Settings, Skip
from fastcap.benchmarks.plain import DENSE_ROWS, GATHERS, IGNORED, MODES, VARIANTS, gather, masked
from torch import Tensor

import fastcap
from fastcap import functional as F_cap
from fastcap import memory
from fastcap.ops import _backend

OPERATION = "subset_cross_entropy"


class Shape(NamedTuple):
    """B captions of T tokens over V words; `padded`: the share of ignored positions, None for what the captions leave."""

    B: int
    T: int
    V: int
    padded: float | None = None


SHAPES = {
    "tiny": Shape(4, 6, 97),  # for tests
    "show_attend_tell": Shape(32, 52, 9_490),
    "blip": Shape(32, 20, 30_522, padded=0.25),
    "gpt2": Shape(32, 20, 50_257),
    "qwen": Shape(32, 20, 151_936),
    "gemma": Shape(32, 20, 262_144),
}


# The cases -------------------------------------------------------------------------------------------------------------


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile on a device."""
    return [
        Case(
            OPERATION, shape, " x ".join(f"{n:,}" for n in SHAPES[shape][:3]), dtype, variant, mode,
            names(variant, compiles and dtype == "fp32", settings.profile),
            lambda key=(shape, dtype, variant, mode), compiles=compiles: build(*key, settings, compiles),
        )
        for shape, dtypes, variants, compiles in plan(settings)
        for dtype in dtypes
        for variant in variants
        for mode in MODES
    ]  # fmt: skip


def plan(settings: Settings) -> list[tuple[str, tuple, tuple, bool]]:
    """(shape, dtypes, variants, whether to compile) of each shape to run."""
    gpu, main = settings.device.startswith("cuda"), ("subset", "first_full")
    dtypes = ("fp32", "bf16") if gpu else ("fp32",)
    if settings.shapes:
        chosen = [name for name in SHAPES if name in settings.shapes]
        return [(name, dtypes, (*main, "full"), settings.profile in ("default", "all")) for name in chosen]
    if settings.profile == "tiny":
        return [("tiny", ("fp32",), tuple(VARIANTS), False)]
    if settings.profile == "quick":
        return [("blip", dtypes, main, False)]
    if settings.profile == "all" or gpu:
        # What matters most first: a run may be out of time before its end.
        order = ("blip", "gpt2", "show_attend_tell", "qwen", "gemma")
        first = [(name, dtypes, (*main, "full"), name == "blip") for name in order]
        return first + [(name, dtypes, ("mixture", "reverse"), False) for name in order]
    return [
        ("blip", dtypes, main, True),
        ("blip", dtypes, ("mixture", "full", "reverse"), False),
        ("blip", ("bf16",), main, False),
        ("show_attend_tell", dtypes, (*main, "full"), False),
        ("gpt2", dtypes, main, False),
    ]


def names(variant: str, compiles: bool, profile: str) -> tuple[str, ...]:
    """The providers of a variant, ours first, the floor last. The reference, slow and large, is in the whole run only."""
    ours = ("cpp", "triton", "cuda", *(("reference",) if profile in ("tiny", "all") else ()))
    plain = ("cross_entropy", "liger_kernel") if variant == "full" else ("masked", "gather")
    return (*ours, *plain, *(("compile",) if compiles else ()), "zeros_like")


def build(shape: str, dtype: str, variant: str, mode: str, settings: Settings, compiles: bool) -> Problem:
    """Inputs and providers; raises Skip where the device has too little memory."""
    device = settings.device
    B, T, V, padded = SHAPES[shape]
    need, free = 8 * B * T * V * 8, memory.available(device)  # float64 and its temporaries
    if free is not None and need > 0.8 * free:
        raise Skip(f"needs {need / 1e9:.0f} GB for the check in float64, {free / 1e9:.0f} GB are free")
    backward = mode == "forward_backward"
    target = captions.draw_targets(B, T, V, padded=padded, ignore_index=IGNORED)
    traffic = floors.subset_cross_entropy(
        target,
        V,
        harness.DTYPES[dtype].itemsize,
        rows=DENSE_ROWS[variant],
        gathers=variant in GATHERS,
        backward=backward,
        sector=floors.SECTOR[device],
    )
    generator = torch.Generator(device).manual_seed(0)
    input = (3 * torch.randn(B, T, V, generator=generator, device=device)).to(harness.DTYPES[dtype])
    target = target.to(device)

    def step(loss_of, input: Tensor = input):
        def run(upstream: Tensor | None = None) -> tuple:
            if not backward:
                with torch.no_grad():
                    return (loss_of(input),)
            loss = loss_of(input)
            return (loss.detach(), *torch.autograd.grad(loss, input, None if upstream is None else upstream.to(loss.dtype)))

        input.requires_grad_(backward)
        return run

    def exact(upstream: Tensor | None) -> tuple:
        return step(lambda z: masked(z, target, variant, fill=-torch.inf), input.detach().double())(upstream)

    def ours(backend: str):
        def loss_of(input: Tensor) -> Tensor:
            with fastcap.backend(backend):
                return F_cap.subset_cross_entropy(input, target, **VARIANTS[variant])

        return step(loss_of)

    providers = {}
    chosen = _backend.select(OPERATION, device)
    for name in names(variant, compiles and dtype == "fp32", settings.profile):
        if name in ("cpp", "triton", "cuda", "reference"):
            why = harness.cannot_run(name, device)
            kind = "reference" if name == "reference" else "ours"
            providers[name] = Provider(None if why else ours(name), kind, why, auto=name == chosen)
        elif name == "masked":
            providers[name] = Provider(step(lambda z: masked(z, target, variant)))
        elif name == "gather":
            providers[name] = Provider(step(lambda z: gather(z, target, variant)))
        elif name == "cross_entropy":
            providers[name] = Provider(step(lambda z: masked(z, target, "full")))
        elif name == "compile":
            plain = masked if variant == "full" else gather
            providers[name] = Provider(step(peers.compiled(lambda z, plain=plain: plain(z, target, variant)).call))
        elif name == "zeros_like":
            providers[name] = Provider(lambda upstream=None: (torch.zeros_like(input),), "floor")
        else:
            providers[name] = liger(input, target, step, device)
    if not backward:
        providers["zeros_like"] = Provider(None, "floor", "a forward writes no gradient")
    upstream = torch.tensor(0.37, dtype=torch.float64, device=device) if backward else None
    return Problem(providers, exact, traffic, upstream)


def liger(input: Tensor, target: Tensor, step, device: str) -> Provider:
    """Liger-Kernel, on logits of its own: it writes the gradient over them."""
    peer = peers.liger_cross_entropy(device)
    if peer.call is None:
        return Provider(None, missing=peer.reason)
    own = input.detach().clone()
    run = step(lambda z: peer.call(z.flatten(0, 1), target.flatten()), own)
    return Provider(run, setup=lambda: own.data.copy_(input.detach()))


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_subset_cross_entropy(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
