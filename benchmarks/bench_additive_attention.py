"""additive_attention against the plain formulation, eager and compiled, at one step and over a caption's T steps.

Bytes and FLOPs: see floors.additive_attention. "step" is one call, as a decoder makes it without a plan for the sequence;
"caption" is T calls to the same keys and values whose gradients are then summed: eager by autograd, step after step, ours by
additive_attention_steps, once. Their queries are given, so the steps could run side by side; in a decoder they cannot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from fastcap.benchmarks import floors, harness, peers
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings, Skip
from fastcap.benchmarks.plain import MODES, attend
from torch import Tensor

import fastcap
from fastcap import functional as F_cap
from fastcap import memory
from fastcap.ops import _backend

OPERATION = "additive_attention"
FORWARD, BACKWARD = MODES


class Shape(NamedTuple):
    """B images of L locations; attention width A, annotations of width D, captions of T words."""

    B: int
    L: int
    A: int
    D: int
    T: int = 20


SHAPES = {
    "tiny": Shape(4, 9, 24, 17, 3),  # for tests
    "sat": Shape(32, 196, 512, 2_048),  # a ResNet's 14 x 14 x 2,048
    "vgg": Shape(32, 196, 512, 512),  # the original's 14 x 14 x 512
    "regions": Shape(64, 36, 512, 2_048),  # bottom-up features
    "beam": Shape(3, 196, 512, 2_048, 1),  # one picture, beam 3: decoding
}
GOALS = {
    ("cpu", "sat", "step"): (Goal("cpp", 1 / 1.5, "eager"), Goal("cpp", 1 / 1.2, "compile")),
}


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile on a device."""
    return [
        Case(
            OPERATION, shape, " x ".join(f"{n:,}" for n in SHAPES[shape]), dtype, variant, mode,
            names(compiles, settings.profile),
            lambda key=(shape, dtype, variant, mode), compiles=compiles: build(*key, settings, compiles),
            goals=GOALS.get((settings.device.split(":")[0], shape, variant), ()) if mode == BACKWARD else (),
        )
        for shape, dtypes, variants, modes, compiles in plan(settings)
        for dtype in dtypes
        for variant in variants
        for mode in modes
    ]  # fmt: skip


def plan(settings: Settings) -> list[tuple[str, tuple, tuple, tuple, bool]]:
    """(shape, dtypes, variants, modes, whether to compile) of each shape to run, what matters most first."""
    gpu = settings.device.startswith("cuda")
    dtypes, both = ("fp32", "bf16") if gpu else ("fp32",), ("step", "caption")
    if settings.shapes:
        return [(name, dtypes, both, MODES, False) for name in SHAPES if name in settings.shapes]
    if settings.profile == "tiny":
        return [("tiny", ("fp32",), both, MODES, False)]
    if settings.profile == "quick":
        return [("sat", dtypes, ("step",), (BACKWARD,), False)]
    rest = [("regions", dtypes, both, (BACKWARD,), False), ("beam", dtypes, ("step",), (FORWARD,), False)]
    return [("sat", dtypes, ("step",), MODES, True), ("vgg", dtypes, ("caption", "step"), (BACKWARD,), False), *rest]


def names(compiles: bool, profile: str) -> tuple[str, ...]:
    """The providers, ours first. The reference is eager's own formulation: in the whole run only."""
    ours = ("cpp", "triton", *(("reference",) if profile in ("tiny", "all") else ()))
    return (*ours, "eager", *(("compile",) if compiles else ()))


def build(shape: str, dtype: str, variant: str, mode: str, settings: Settings, compiles: bool) -> Problem:
    """Inputs and providers; raises Skip where the device has too little memory."""
    device, kind = settings.device, harness.DTYPES[dtype]
    B, L, A, D, T = SHAPES[shape]
    T = T if variant == "caption" else 1
    need, free = 8 * B * L * (3 * A * T + 4 * D), memory.available(device)  # the check in float64
    if free is not None and need > 0.8 * free:
        raise Skip(f"needs {need / 1e9:.0f} GB for the check in float64, {free / 1e9:.0f} GB are free")
    backward = mode == BACKWARD
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(kind)

    inputs = draw(B, L, A), draw(T, B, A), draw(A, scale=A**-0.5), draw(B, L, D)
    of_context, of_alpha = draw(T, B, D).double(), draw(T, B, L).double()  # the loss is linear in all that comes out

    def step(attend_all, inputs: tuple[Tensor, ...] = inputs):
        weights = of_context.to(inputs[0].dtype), of_alpha.to(inputs[0].dtype)

        def loss_of() -> Tensor:
            contexts, alphas = attend_all(*inputs)
            return torch.sum(contexts * weights[0]) + torch.sum(alphas * weights[1])

        def run(upstream: Tensor | None = None) -> tuple:
            if not backward:
                with torch.no_grad():
                    return (loss_of(),)
            loss = loss_of()
            return (loss.detach(), *torch.autograd.grad(loss, inputs, None if upstream is None else upstream.to(loss.dtype)))

        for x in inputs:
            x.requires_grad_(backward)
        return run

    def eager(keys, queries, v, values):
        return stacked([attend(keys, query, v, values) for query in queries.unbind(0)])

    def ours(backend: str):
        def attend_all(keys, queries, v, values):
            with fastcap.backend(backend):
                if T == 1:
                    return stacked([F_cap.additive_attention(keys, queries[0], v, values)])
                one = F_cap.additive_attention_steps(keys, v, values, steps=T)
                return stacked([one(query) for query in queries.unbind(0)])

        return step(attend_all)

    providers = {}
    chosen = _backend.select(OPERATION, torch.device(device).type, _backend.NO_CUDA)
    for name in names(compiles, settings.profile):
        if name == "eager":
            providers[name] = Provider(step(eager))
        elif name == "compile":
            providers[name] = Provider(step(peers.compiled(eager).call))
        else:
            why = harness.cannot_run(name, device)
            kind_of = "reference" if name == "reference" else "ours"
            providers[name] = Provider(None if why else ours(name), kind_of, why, auto=name == chosen)
    exact = step(eager, tuple(x.detach().double() for x in inputs))
    itemsize = harness.DTYPES[dtype].itemsize
    traffic = floors.additive_attention(B, L, A, D, itemsize, steps=T, backward=backward)
    upstream = torch.tensor(0.37, dtype=torch.float64, device=device) if backward else None
    return Problem(providers, exact, traffic, upstream)


def stacked(steps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Contexts [T, B, D] and alphas [T, B, L]."""
    contexts, alphas = zip(*steps, strict=True)
    return torch.stack(contexts), torch.stack(alphas)


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_additive_attention(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
