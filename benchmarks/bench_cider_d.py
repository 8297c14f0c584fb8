"""CiderD against pycocoevalcap's Cider, after tokenisation.

"corpus" is an evaluation: document frequencies of N images with R references each, then a candidate for each of them; what
`Cider.compute_score` does. "batch" is a step of self-critical training: candidates against references whose document
frequencies and vectors are there. pycocoevalcap has no such thing: there it scores the batch alone, among its own images,
other numbers and less work than the batch asks for, so it is timed and not checked.

The floor is to read the text once. No reward comes near it: n-grams must be found in a table, four for each word.
"""

from __future__ import annotations

import importlib.util
import random
from typing import Any, NamedTuple

import torch
from fastcap.benchmarks import captions, floors, harness
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings
from fastcap.benchmarks.plain import MODES

import fastcap
from fastcap.rewards import CiderD

OPERATION = "cider_d"
FORWARD = MODES[0]


class Shape(NamedTuple):
    """C candidates, of N images with R references each."""

    C: int
    N: int
    R: int


SHAPES = {"tiny": Shape(8, 8, 4), "batch160": Shape(160, 5_000, 5), "coco5k": Shape(5_000, 5_000, 5)}
PEER = "pycocoevalcap"


def goals(shape: str) -> tuple[Goal, ...]:
    """Fifty times faster over a corpus; a batch within the time of a decoding step."""
    if shape == "tiny":
        return ()
    return (Goal("cpp", 0.02, PEER),) if shape == "coco5k" else (Goal("cpp", 2e-3),)


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile: on the CPU alone."""
    if settings.device.startswith("cuda"):
        return []
    wanted = settings.shapes or (("tiny",) if settings.profile == "tiny" else ("coco5k", "batch160"))
    return [
        Case(
            OPERATION, shape, "{:,} candidates, {:,} x {} references".format(*SHAPES[shape]), "fp64",
            "batch" if shape.startswith("batch") else "corpus", FORWARD, ("cpp", "reference", PEER),
            lambda shape=shape: build(shape), goals=goals(shape),
        )
        for shape in SHAPES if shape in wanted
    ]  # fmt: skip


def texts(shape: Shape) -> tuple[list[str], list[list[str]]]:
    """Candidates, each a reference of its image without every tenth word or so; and references: COCO's captions where they
    are, else captions of our own with words left out alike."""
    known = [" ".join(words) for words in captions.load().words]
    drawn = random.Random(0)

    def shortened(caption: str) -> str:
        return " ".join(word for word in caption.split() if drawn.random() < 0.9)

    while len(known) < shape.N * shape.R:
        known.append(shortened(known[drawn.randrange(len(known))]))
    files = [known[r * shape.N : (r + 1) * shape.N] for r in range(shape.R)]  # caption i of each is of image i
    references = [list(group) for group in zip(*files, strict=True)]
    return [shortened(group[0]) for group in references[: shape.C]], references


def build(name: str) -> Problem:
    """Captions and providers."""
    shape = SHAPES[name]
    candidates, references = texts(shape)
    rows = list(range(shape.C))
    batch = name.startswith("batch")

    def ours(backend: str) -> Any:
        with fastcap.backend(backend):
            scorer = CiderD(references) if batch else None

        def run(upstream: torch.Tensor | None = None) -> tuple:
            if scorer is not None:
                return (scorer(candidates, rows=rows),)
            with fastcap.backend(backend):
                return (CiderD(references)(candidates, rows=rows),)

        return run

    def peer(upstream: torch.Tensor | None = None) -> tuple:
        from pycocoevalcap.cider.cider import Cider

        gts, res = dict(zip(rows, references, strict=False)), {row: [candidates[row]] for row in rows}
        return (torch.tensor(Cider().compute_score(gts, res)[1]),)

    providers = {}
    for backend in ("cpp", "reference"):
        why = harness.cannot_run(backend, "cpu")
        kind = "ours" if backend == "cpp" else "reference"
        providers[backend] = Provider(None if why else ours(backend), kind, why, auto=backend == "cpp")
    why = "" if importlib.util.find_spec(PEER) else "pycocoevalcap is not installed; pip install pycocoevalcap"
    providers[PEER] = Provider(None if why else peer, "scale" if batch else "peer", why)
    text = candidates + ([] if batch else [caption for each in references for caption in each])
    traffic = floors.cider_d(sum(map(len, text)), sum(len(caption.split()) for caption in text))
    return Problem(providers, ours("reference"), traffic)


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_cider_d(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
