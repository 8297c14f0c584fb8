"""Captioners side by side, at the sizes of COCO: a training step, and captions by greedy and beam search.

An LSTM that is told the picture once (show-and-tell), soft attention (show-attend-tell), GLIED and its Base, all of width d,
on R regions given as a detector leaves them; GLIED and Base also on M given attribute words. "cpp" trains with fastcap's
losses and attention, "plain" with the same in plain torch (the backend "reference"): the vocabulary is where they differ.
Decoding GLIED and Base with the keys and values of earlier words kept ("cached") stands against "recomputed", which runs
the parallel pass over all words so far at each step, and "all recomputed", which reads the images again as well. What is
given in float64 is what all are checked against, with dropout off. `fastcap.benchmarks.table_captioners` trains the same
four to a fixed validation loss.

Bytes: AdamW's in a training step, which reads a parameter, its gradient and two moments, and writes it and the moments; in
decoding the parameters once a step. FLOPs: 2 for each parameter but embeddings and each position, and three times that in
a training step; positions are words and regions, as if each met all of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from fastcap.benchmarks import captions, harness
from fastcap.benchmarks.floors import Traffic
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings
from fastcap.benchmarks.plain import IGNORED
from torch import Tensor, nn

import fastcap
from fastcap import functional as F_cap
from fastcap import models
from fastcap.data import Attributed
from fastcap.ops import _backend

OPERATION = "captioners"
BEAM, WORDS = 3, 20  # words of a caption, at most and, with random weights, always
PEAKED = 8  # times the head's weights in decoding: words as far apart in probability as a trained model's, not nearly tied


class Shape(NamedTuple):
    """B captions of T words over V; R regions of width D; M attributes; d wide."""

    B: int
    T: int
    R: int
    M: int
    D: int
    d: int
    V: int


SHAPES = {
    "tiny": Shape(3, 4, 5, 3, 6, 8, 31),  # for tests
    "coco": Shape(32, 12, 36, 49, 2_048, 512, 9_490),  # Faster R-CNN's regions, Karpathy's vocabulary
}
MODELS = ("lstm", "soft-attention", "base", "glied")
DECODING = ("greedy", f"beam-{BEAM}")
ATTENTIVE = ("base", "glied")  # to attributes too, and decode from what they keep of earlier words


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile on a device."""
    if settings.profile == "tiny":
        shapes, chosen = ("tiny",), MODELS
    else:
        shapes = settings.shapes or ("coco",)
        chosen = ("lstm", "glied") if settings.profile == "quick" else MODELS
    found = []
    for shape in (name for name in SHAPES if name in shapes):
        sizes = " x ".join(f"{n:,}" for n in SHAPES[shape])
        for model in chosen:
            names = ("cpp", "triton", "plain")
            make = functools.partial(training, shape, model, settings)
            found.append(Case(OPERATION, shape, sizes, "fp32", model, "forward_backward", names, make))
            for search in DECODING:
                names = ("cached", "recomputed", "all recomputed") if model in ATTENTIVE else ("cpp", "triton", "plain")
                make = functools.partial(decoding, shape, model, search, settings)
                least = (Goal("cached", 1 / 3, "recomputed"),) if model == "glied" and search != "greedy" else ()
                goals = least if shape == "coco" and settings.device == "cpu" else ()
                found.append(Case(OPERATION, shape, sizes, "fp32", f"{model} {search}", "forward", names, make, goals=goals))
    return found


def make_model(name: str, shape: Shape, device: str = "cpu") -> nn.Module:
    """One of `MODELS`, at these sizes, without dropout."""
    torch.manual_seed(0)
    B, T, R, M, D, d, V = shape
    encoder = {"kind": "features", "width_in": D, "width": d}
    if name in ATTENTIVE:
        steps = dict.fromkeys(("visual_distilling", "attribute_distilling", "local_distilling"), name == "glied")
        made = models.build(
            "glied", vocab_size=V, encoder=encoder, width=d, heads=8 if d % 8 == 0 else 1, dropout=0.0, **steps
        )
    else:
        options = {} if name == "lstm" else {"attention_width": d}
        kind = "show-and-tell" if name == "lstm" else "show-attend-tell"
        widths = {"embed_width": d, "hidden_width": d}
        made = models.build(kind, vocab_size=V, encoder=encoder, dropout=0.0, **widths, **options)
    return made.to(device)


def make_images(name: str, shape: Shape, device: str = "cpu") -> Tensor | Attributed:
    """Regions of random numbers, and random words as attributes where the model reads them."""
    generator = torch.Generator().manual_seed(0)
    B, T, R, M, D, d, V = shape
    regions = torch.randn(B, R, D, generator=generator)
    if name in ATTENTIVE:
        return Attributed(regions, torch.randint(3, V, (B, M), generator=generator)).to(device)
    return regions.to(device)


def training(shape: str, model: str, settings: Settings) -> Problem:
    """A step of cross-entropy: loss, gradients of all parameters, AdamW."""
    device, sizes = settings.device, SHAPES[shape]
    made, images = make_model(model, sizes, device).train(), make_images(model, sizes, device)
    target = captions.draw_targets(sizes.B, sizes.T, sizes.V, padded=0.0, ignore_index=IGNORED).to(device)
    inputs = target.roll(1, 1)
    lengths = torch.full((sizes.B,), sizes.T)
    parameters = list(made.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)  # lr 0: each call starts alike

    def loss_of(model: nn.Module, images: Any) -> Tensor:
        hidden = model.hidden_states(images, inputs, lengths)
        return F_cap.linear_subset_cross_entropy(
            hidden, model.head.weight, target, linear_bias=model.head.bias, subset="full"
        )

    def step(backend: str):
        def run(upstream: Tensor | None = None) -> tuple:
            optimizer.zero_grad()
            with fastcap.backend(backend):
                loss = loss_of(made, images)
                loss.backward(None if upstream is None else upstream.to(loss.dtype))
            optimizer.step()
            return (loss.detach(), *(p.grad for p in parameters))

        return run

    def exact(upstream: Tensor | None) -> tuple:
        double = copy.deepcopy(made).double()
        with fastcap.backend("reference"):
            loss = loss_of(double, images.double())
            return (loss.detach(), *torch.autograd.grad(loss, list(double.parameters()), upstream))

    providers = {name: _ours(name, device, step) for name in ("cpp", "triton")}
    providers["plain"] = Provider(step("reference"))
    every = sum(p.numel() for p in parameters)
    positions = sizes.B * (sizes.T + sizes.R)
    traffic = Traffic(28 * every, 6 * _multiplied(made) * positions)
    return Problem(providers, exact, traffic, torch.tensor(0.37, dtype=torch.float64, device=device), products=True)


def decoding(shape: str, model: str, search: str, settings: Settings) -> Problem:
    """Captions of B images, `WORDS` words each: a model with random weights does not end before."""
    device, sizes = settings.device, SHAPES[shape]
    made, images = make_model(model, sizes, device).eval(), make_images(model, sizes, device)
    with torch.no_grad():
        made.head.weight.mul_(PEAKED)

    rows = 1 if search == "greedy" else BEAM  # of an image

    def run_of(model: Any, images: Any, backend: str | None):
        def run(upstream: Tensor | None = None) -> tuple:
            with fastcap.backend(backend) if backend else contextlib.nullcontext():
                if search == "greedy":
                    found = models.greedy(model, images, max_length=WORDS)
                else:
                    found = models.beam_search(model, images, beam_size=BEAM, max_length=WORDS)
            return found.scores, found.tokens.double()

        return run

    if model in ATTENTIVE:
        providers = {
            "cached": Provider(run_of(made, images, None), "ours", auto=True),
            "recomputed": Provider(run_of(Recomputing(made, rows, images=False), images, None)),
            "all recomputed": Provider(run_of(Recomputing(made, rows, images=True), images, None)),
        }
    else:
        providers = {name: _ours(name, device, lambda backend: run_of(made, images, backend)) for name in ("cpp", "triton")}
        providers["plain"] = Provider(run_of(made, images, "reference"))

    def exact(upstream: Tensor | None) -> tuple:
        return run_of(copy.deepcopy(made).double(), images.double(), "reference")()

    every = sum(p.numel() for p in made.parameters())
    traffic = Traffic(4 * WORDS * every, 2 * _multiplied(made) * sizes.B * (rows * WORDS + sizes.R))
    return Problem(providers, exact, traffic, products=True)


class Recomputing:
    """Decodes GLIED by the parallel pass over all words so far, as code without a cache does. A row's state is its words.

    Args:
        model: a `Glied`.
        rows: of an image.
        images: whether its keys and values are made again at each step, too; else they are made, and repeated for its rows,
            once.
    """

    def __init__(self, model: nn.Module, rows: int, images: bool) -> None:
        self._model, self._rows, self._images = model, rows, images
        self._kept = copy.copy(model)
        self._kept.encode = lambda memory: memory

    def encode(self, images: Any) -> Any:
        self._of = torch.arange(len(images), device=images.device).repeat_interleave(self._rows)
        return SimpleNamespace(images=images) if self._images else self._model.encode(images).rows(self._of)

    def start(self, memory: Any) -> None:
        return None

    def step(self, token: Tensor, state: Tensor | None, memory: Any) -> tuple[Tensor, Tensor]:
        words = token.unsqueeze(1) if state is None else torch.cat((state, token.unsqueeze(1)), 1)
        if self._images:
            hidden = self._model.hidden_states(memory.images, words, rows=self._of)
        else:
            hidden = self._kept.hidden_states(memory, words)
        return self._model.head(hidden[:, -1]), words


def _ours(name: str, device: str, make: Any) -> Provider:
    why = harness.cannot_run(name, device)
    chosen = _backend.select("linear_subset_cross_entropy", torch.device(device).type, _backend.NO_CUDA)
    return Provider(None if why else make(name), "ours", why, auto=name == chosen)


def _multiplied(model: nn.Module) -> int:
    """The parameters that every position meets: all but embeddings."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embed"))


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_captioners(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
