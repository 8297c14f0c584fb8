"""attention_coverage_from_scores against the softmax kept and summed: by plain torch, compiled, and by attention_coverage.

Bytes and FLOPs: see floors.attention_coverage_from_scores. What it is for is the memory: the [B, heads, T, L] weights, which
scaled_dot_product_attention never makes, are not made here either. The price is a product more, for scores are made again.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from fastcap.benchmarks import floors, harness, peers
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings, Skip
from fastcap.benchmarks.plain import MODES
from torch import Tensor

import fastcap
from fastcap import functional as F_cap
from fastcap import memory
from fastcap.ops import _backend

OPERATION = "attention_coverage_from_scores"
FORWARD, BACKWARD = MODES


class Shape(NamedTuple):
    """B captions, heads, T steps that attend to L locations by queries and keys of width E."""

    B: int
    heads: int
    T: int
    L: int
    E: int

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.B * self.heads * self.T * self.L


SHAPES = {
    "tiny": Shape(3, 2, 5, 9, 7),  # for tests
    "glied": Shape(32, 8, 20, 36, 64),  # 36 regions
    "sat": Shape(32, 8, 52, 196, 64),  # a 14 x 14 map
    "blip": Shape(32, 12, 20, 577, 64),  # the patches of a 384 x 384 picture
    "long": Shape(4, 8, 512, 1_024, 64),  # paragraphs on a fine map
}
VARIANTS = ("all", "lengths")  # whether all steps count, or captions end early


def goals(shape: str, device: str, itemsize: int) -> tuple[Goal, ...]:
    """Scratch below half of one copy of the weights, of which eager torch makes several, where that is much."""
    if shape not in ("sat", "blip", "long"):
        return ()
    return (Goal("cpp" if device == "cpu" else "triton", 0.5 * itemsize * SHAPES[shape].weights, quantity="scratch"),)


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile on a device."""
    device = settings.device.split(":")[0]
    return [
        Case(
            OPERATION, shape, " x ".join(f"{n:,}" for n in SHAPES[shape]), dtype, variant, mode,
            names(compiles, settings.profile),
            lambda key=(shape, dtype, variant, mode), compiles=compiles: build(*key, settings, compiles),
            goals=goals(shape, device, harness.DTYPES[dtype].itemsize),
        )
        for shape, dtypes, variants, modes, compiles in plan(settings)
        for dtype in dtypes
        for variant in variants
        for mode in modes
    ]  # fmt: skip


def plan(settings: Settings) -> list[tuple[str, tuple, tuple, tuple, bool]]:
    """(shape, dtypes, variants, modes, whether to compile) of each shape to run, what matters most first."""
    dtypes = ("fp32", "bf16") if settings.device.startswith("cuda") else ("fp32",)
    if settings.shapes:
        return [(name, dtypes, VARIANTS, MODES, False) for name in SHAPES if name in settings.shapes]
    if settings.profile == "tiny":
        return [("tiny", ("fp32",), VARIANTS, MODES, False)]
    if settings.profile == "quick":
        return [("glied", dtypes, ("all",), (BACKWARD,), False)]
    some = [(name, dtypes, ("all",), (BACKWARD,), name == "sat") for name in ("sat", "blip", "long")]
    return [("glied", dtypes, VARIANTS, MODES, True), *some]


def names(compiles: bool, profile: str) -> tuple[str, ...]:
    """The providers, ours first. The reference is eager's own formulation: in the whole run only."""
    ours = ("cpp", "triton", *(("reference",) if profile in ("tiny", "all") else ()))
    return (*ours, "softmax", "eager", *(("compile",) if compiles else ()))


def eager(query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
    """The penalty of the softmax, as a training loop would write it."""
    alpha = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)
    if valid is not None:
        alpha = alpha * valid[:, None, :, None]
    return ((1.0 - alpha.sum(2)) ** 2).mean()


def build(shape: str, dtype: str, variant: str, mode: str, settings: Settings, compiles: bool) -> Problem:
    """Inputs and providers; raises Skip where the device has too little memory."""
    device, kind = settings.device, harness.DTYPES[dtype]
    sizes = SHAPES[shape]
    B, heads, T, L, E = sizes
    need, free = 8 * 6 * sizes.weights, memory.available(device)  # the check in float64
    if free is not None and need > 0.8 * free:
        raise Skip(f"needs {need / 1e9:.0f} GB for the check in float64, {free / 1e9:.0f} GB are free")
    backward = mode == BACKWARD
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int) -> Tensor:
        """[B, heads, rows, E], as a projection leaves it: heads side by side in memory."""
        return torch.randn(B, rows, heads, E, generator=generator, device=device).to(kind).transpose(1, 2)

    inputs, lengths, valid = (draw(T), draw(L)), None, None
    if variant == "lengths":
        lengths = (T - torch.arange(B) % (T // 2 + 1)).to(device)
        valid = torch.arange(T, device=device) < lengths[:, None]

    def step(loss_of, inputs: tuple[Tensor, ...] = inputs):
        def run(upstream: Tensor | None = None) -> tuple:
            if not backward:
                with torch.no_grad():
                    return (loss_of(*inputs),)
            loss = loss_of(*inputs)
            return (loss.detach(), *torch.autograd.grad(loss, inputs, None if upstream is None else upstream.to(loss.dtype)))

        for x in inputs:
            x.requires_grad_(backward)
        return run

    def ours(backend: str):
        def loss_of(query, key):
            with fastcap.backend(backend):
                return F_cap.attention_coverage_from_scores(query, key, lengths=lengths)

        return step(loss_of)

    def softmax(query, key):
        alpha = torch.softmax(query @ key.mT * E**-0.5, -1)
        return F_cap.attention_coverage(alpha, lengths=lengths)

    providers = {}
    chosen = _backend.select(OPERATION, device.split(":")[0], _backend.NO_CUDA)
    for name in names(compiles, settings.profile):
        if name == "eager":
            providers[name] = Provider(step(partial(eager, valid=valid)))
        elif name == "softmax":
            providers[name] = Provider(step(softmax))
        elif name == "compile":
            providers[name] = Provider(step(partial(peers.compiled(eager).call, valid=valid)))
        else:
            why = harness.cannot_run(name, device)
            kind_of = "reference" if name == "reference" else "ours"
            providers[name] = Provider(None if why else ours(name), kind_of, why, auto=name == chosen)
    exact = step(partial(eager, valid=valid), tuple(x.detach().double() for x in inputs))
    traffic = floors.attention_coverage_from_scores(*sizes, kind.itemsize, backward=backward)
    upstream = torch.tensor(0.37, dtype=torch.float64, device=device) if backward else None
    return Problem(providers, exact, traffic, upstream, products=True)


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_attention_coverage_from_scores(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
