"""A training step of Show, Attend and Tell against the same in plain torch: loss, gradients of all parameters, AdamW.

The annotations are given, as a frozen encoder makes them, so the step is the decoder's: soft attention over L locations at
each of T words, LSTM, deep output, head, cross-entropy and the doubly stochastic penalty. "plain" is plain_decoder.py, with
the same parameters; what it gives in float64 is what both are checked against, with dropout off.

Bytes: see floors.training_step. The captions of "captions" have the lengths of real ones, those of "full" all have T words.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from fastcap.benchmarks import captions, floors, harness, plain_decoder
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings
from fastcap.benchmarks.plain import IGNORED
from torch import Tensor

import fastcap
from fastcap import functional as F_cap
from fastcap.models import ShowAttendTell, ShowAttendTellConfig
from fastcap.ops import _backend

OPERATION = "training"
MODE = "forward_backward"


class Shape(NamedTuple):
    """B captions of T words over V; L locations of width D; attention width A; embedding and state of width H."""

    B: int
    T: int
    L: int
    A: int
    D: int
    H: int
    V: int


SHAPES = {
    "tiny": Shape(3, 4, 9, 8, 6, 8, 31),  # for tests
    "show_attend_tell": Shape(32, 20, 196, 512, 512, 512, 9_490),  # VGG's 14 x 14 x 512
    "resnet": Shape(32, 20, 196, 512, 2_048, 512, 9_490),
}
GOALS = (Goal("cpp", 1 / 1.4, "plain"), Goal("cpp", 1 / 3, "plain", "memory"))


class Given(torch.nn.Module):
    """An encoder whose pictures are annotations already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.config = width, {"kind": "given"}

    def forward(self, annotations: Tensor) -> Tensor:
        return annotations

    def mask(self, annotations: Tensor) -> None:
        """All locations count."""


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile on a device."""
    if settings.profile == "tiny":
        shapes, variants = ("tiny",), ("full", "captions")
    else:
        shapes = settings.shapes or ("show_attend_tell", *(("resnet",) if settings.profile in ("all",) else ()))
        variants = ("full",) if settings.profile == "quick" else ("full", "captions")
    return [
        Case(
            OPERATION, shape, " x ".join(f"{n:,}" for n in SHAPES[shape]), "fp32", variant, MODE,
            ("cpp", "triton", "plain"), lambda key=(shape, variant): build(*key, settings),
            goals=GOALS if shape == "show_attend_tell" and variant == "full" and settings.device == "cpu" else (),
        )
        for shape in SHAPES if shape in shapes
        for variant in variants
    ]  # fmt: skip


def build(shape: str, variant: str, settings: Settings) -> Problem:
    """The model, a batch, and the two ways to train it."""
    device = settings.device
    B, T, L, A, D, H, V = SHAPES[shape]
    torch.manual_seed(0)
    model = make_model(D, A, H, V).to(device).train()
    # at first attention is nearly the mean: scores of a size that tells whether they are right
    with torch.no_grad():
        model.score.weight.mul_(4)
    generator = torch.Generator(device).manual_seed(0)
    annotations = torch.randn(B, L, D, generator=generator, device=device)
    target = captions.draw_targets(B, T, V, padded=0.0 if variant == "full" else None, ignore_index=IGNORED)
    lengths = (target != IGNORED).sum(1)
    lengths, order = lengths.sort(descending=True)  # as loops over captions do
    target = target[order].to(device)
    inputs = target.roll(1, 1).masked_fill(target == IGNORED, 0).clamp(min=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)  # lr 0: each call starts alike

    def ours(backend: str):
        def loss_of() -> Tensor:
            with fastcap.backend(backend):
                read = model.teacher_forced(annotations, inputs, lengths)
                loss = F_cap.linear_subset_cross_entropy(
                    read.hidden, model.head.weight, target, linear_bias=model.head.bias, subset="full"
                )
                return loss + F_cap.attention_coverage(read.alphas, lengths=lengths.to(device))

        return step(loss_of)

    def step(loss_of):
        def run(upstream: Tensor | None = None) -> tuple:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward(None if upstream is None else upstream.to(loss.dtype))
            optimizer.step()
            return (loss.detach(), *(p.grad for p in parameters))

        return run

    def exact(upstream: Tensor | None) -> tuple:
        double = copy.deepcopy(model).double()
        loss = plain_decoder.loss_of(double, annotations.double(), inputs, target, 1.0)
        gradients = torch.autograd.grad(loss, [p for p in double.parameters() if p.requires_grad], upstream)
        return (loss.detach(), *gradients)

    providers = {}
    chosen = _backend.select("additive_attention", torch.device(device).type, _backend.NO_CUDA)
    for name in ("cpp", "triton"):
        why = harness.cannot_run(name, device)
        providers[name] = Provider(None if why else ours(name), "ours", why, auto=name == chosen)
    providers["plain"] = Provider(step(lambda: plain_decoder.loss_of(model, annotations, inputs, target, 1.0)))
    traffic = floors.training_step(B, T, L, A, D, H, V, sum(p.numel() for p in parameters))
    return Problem(providers, exact, traffic, torch.tensor(0.37, dtype=torch.float64, device=device), products=True)


def make_model(D: int, A: int, H: int, V: int) -> ShowAttendTell:
    encoder = {"kind": "conv", "width": D}
    model = ShowAttendTell(ShowAttendTellConfig(V, encoder, H, H, A, dropout=0.0))
    model.encoder = Given(D)
    return model


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_training(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
