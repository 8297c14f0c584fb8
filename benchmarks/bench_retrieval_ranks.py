"""retrieval_ranks against plain torch, which makes all similarities, and against the product text @ image.T alone.

Bytes and FLOPs: see floors.retrieval_ranks. The floor that is measured is that product ("product"). "float64" is plain torch
in the dtype in which ranks are exact, and the peer that is checked. "eager" is the same in the embeddings' own dtype, as
evaluations usually do it: where two scores differ by a rounding its ranks may be off, so it is timed, not checked.

The embeddings are like a trained CLIP's: pairs at a cosine of about 0.3, others around 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastcap.benchmarks import floors, harness
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings, Skip
from fastcap.benchmarks.plain import MODES
from torch import Tensor

import fastcap
from fastcap import functional as F_cap
from fastcap import memory
from fastcap.ops import _backend

OPERATION = "retrieval_ranks"
FORWARD = MODES[0]


class Shape(NamedTuple):
    """P texts, `texts` an image, and Q images of D numbers."""

    P: int
    Q: int
    D: int
    texts: int = 1


SHAPES = {
    "tiny": Shape(9, 11, 7),  # for tests
    "tiny_shared": Shape(12, 4, 7, 3),
    "coco1k": Shape(5_000, 1_000, 512, 5),  # the two test sets that papers report
    "coco5k": Shape(25_000, 5_000, 512, 5),
    "b8192": Shape(8_192, 8_192, 512),
}


def goals(shape: str, device: str) -> tuple[Goal, ...]:
    """Scratch that does not grow with P Q, and little beside the product where that is most of the work."""
    if shape.startswith("tiny"):
        return ()
    ours = "cpp" if device == "cpu" else "triton"
    promised = [Goal(ours, 64e6, quantity="scratch"), Goal(ours, 1.0, "float64")]
    return (*promised, Goal(ours, 1.5, "product")) if (shape, device) == ("b8192", "cpu") else tuple(promised)


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile on a device."""
    device = settings.device.split(":")[0]
    return [
        Case(
            OPERATION, shape, f"{SHAPES[shape].P:,} x {SHAPES[shape].Q:,} x {SHAPES[shape].D}", dtype, "both", FORWARD,
            names(settings.profile), lambda key=(shape, dtype): build(*key, settings), goals=goals(shape, device),
        )
        for shape, dtypes in plan(settings)
        for dtype in dtypes
    ]  # fmt: skip


def plan(settings: Settings) -> list[tuple[str, tuple[str, ...]]]:
    """(shape, dtypes) of each shape to run, what matters most first."""
    dtypes = ("fp32", "bf16") if settings.device.startswith("cuda") else ("fp32",)
    if settings.shapes:
        return [(name, dtypes) for name in SHAPES if name in settings.shapes]
    if settings.profile == "tiny":
        return [(name, ("fp32",)) for name in ("tiny", "tiny_shared")]
    if settings.profile == "quick":
        return [("coco1k", dtypes)]
    return [("b8192", dtypes), ("coco1k", dtypes), ("coco5k", dtypes)]


def names(profile: str) -> tuple[str, ...]:
    """The providers, ours first. The reference makes all similarities twice over: in the whole run only."""
    return ("cpp", "triton", *(("reference",) if profile in ("tiny", "all") else ()), "product", "float64", "eager")


def ranks(text: Tensor, image: Tensor, positive: Tensor, dtype: torch.dtype, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Both ranks [P] in plain torch, from scores in `dtype`, some texts at a time."""
    t, v = (F.normalize(x.to(dtype), dim=1) for x in (text, image))
    own = torch.cat(
        [(t[i : i + rows] @ v.T).gather(1, positive[i : i + rows, None]).squeeze(1) for i in range(0, len(t), rows)]
    )
    over_images, over_texts = (torch.full((len(t),), 0.5, dtype=torch.float64, device=t.device) for _ in range(2))
    for i in range(0, len(t), rows):
        s = t[i : i + rows] @ v.T
        mine = own[i : i + rows, None]
        over_images[i : i + rows] += (s > mine).sum(1) + (s == mine).sum(1) / 2
        s = s[:, positive]
        over_texts += (s > own).sum(0) + (s == own).sum(0) / 2
    return over_images, over_texts


def build(shape: str, dtype: str, settings: Settings) -> Problem:
    """Inputs and providers; raises Skip where the device has too little memory."""
    device, kind, sizes = settings.device, harness.DTYPES[dtype], SHAPES[shape]
    P, Q, D, texts = sizes
    need, free = 3 * 4 * P * Q + 3 * 8 * 1024 * P, memory.available(device)
    if free is not None and need > 0.8 * free:
        raise Skip(f"needs {need / 1e9:.0f} GB for plain torch, {free / 1e9:.0f} GB are free")
    generator = torch.Generator(device).manual_seed(0)
    images, noise = (torch.randn(n, D, generator=generator, device=device) for n in (Q, P))
    positive = torch.arange(P, device=device) // texts
    text, image = (0.3 * images[positive] + 0.95 * noise).to(kind), images.to(kind)

    def ours(backend: str):
        def run(upstream: Tensor | None = None) -> tuple:
            with fastcap.backend(backend):
                return F_cap.retrieval_ranks(text, image, positive=positive)

        return run

    providers = {}
    chosen = _backend.select(OPERATION, device.split(":")[0], _backend.NO_CUDA)
    for name in names(settings.profile):
        if name == "product":
            providers[name] = Provider(lambda upstream: (text @ image.T,), "floor")
        elif name == "eager":
            providers[name] = Provider(lambda upstream: ranks(text, image, positive, kind), "scale")
        elif name == "float64":
            providers[name] = Provider(lambda upstream: ranks(text, image, positive, torch.float64))
        else:
            why = harness.cannot_run(name, device)
            kind_of = "reference" if name == "reference" else "ours"
            providers[name] = Provider(None if why else ours(name), kind_of, why, auto=name == chosen)
    traffic = floors.retrieval_ranks(P, Q, D, kind.itemsize)
    exact = providers["float64"].run
    return Problem(providers, lambda upstream: exact(upstream), traffic, None, products=True)


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_retrieval_ranks(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
