"""linear_subset_cross_entropy: worked numbers, equality with the loss of the logits, each kind of gradient, memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastcap
from fastcap import functional as F_cap
from fastcap import nn
from fastcap.errors import FastcapError
from fastcap.ops import _plans, _subset
from fastcap.testing import OPERATIONS, assert_close_to_float64, evaluate, make_hidden, upstream

INPUTS = ("input", "linear_weight", "linear_bias")
NARROW = {"first_token": "subset"}
BUDGETS = (None, 0, 3000)
MODES = ("dense", "sparse", "accumulate")
# Between them every way through the vocabulary: first tokens, no full row, all but some, all, and mixtures
WAYS = {
    "caption": {},
    "caption-first-in-subset": NARROW,
    "mixture": {"mle_weight": 0.3, "label_smoothing": 0.1},
    "mixture-first-in-subset": {**NARROW, "mle_weight": 0.01},
    "reverse": {"subset": "reverse"},
    "full": {"subset": "full", "label_smoothing": 0.1},
}
# and every way to a few candidates, for three captions over 61 words
SETS = {
    "caption": {},
    "shared-ids": {"subset": torch.tensor([40, 3, -1, 3, 0])},
    "own-ids": {"subset": torch.tensor([[1, 1, 60], [-1, -1, -1], [7, 8, 9]])},
    "random": {"subset": "random", "num_random": 4, "seed": 3},
}
every_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
every_budget = pytest.mark.parametrize("memory_budget", BUDGETS)
every_mode = pytest.mark.parametrize("grad_weight", MODES)


class Place(NamedTuple):
    """As conftest's Target."""

    device: str
    backend: str


@pytest.fixture(params=["cpu-reference", "cpu-cpp", pytest.param("cuda-triton", marks=pytest.mark.gpu)])
def place(request) -> Place:
    """`target` without Triton's interpreter, which needs 10 ms a token: for what is decided above the kernels."""
    where = Place(*request.param.split("-"))
    status = fastcap.backends()[where.backend]
    if not status:
        pytest.skip(f"backend {where.backend}: {status.reason}")
    return where


def on(where, call):
    return {k: v.detach().to(where.device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def result(where, call, grad=None, **options):
    """(loss, its gradients of input, linear_weight and, where it is given, linear_bias), on the CPU.

    `grad` is the upstream gradient, by default no two elements alike.
    """
    call = on(where, {**call, **options})
    leaves = {name: call[name].requires_grad_() for name in INPUTS if call.get(name) is not None}
    with fastcap.backend(where.backend):
        loss = F_cap.linear_subset_cross_entropy(**call)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream(loss) if grad is None else grad.to(loss))
    return loss.detach().cpu(), *(g.cpu() for g in gradients)


def by_logits(call, grad=None, **options):
    """The same by plain torch in float64: the logits made whole, and `subset_cross_entropy` of them."""
    call = {**call, **options}
    call = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}
    leaves = [call.pop(name).detach().requires_grad_() for name in INPUTS if call.get(name) is not None]
    for name in ("linear_bias", "memory_budget", "grad_weight"):
        call.pop(name, None)
    with fastcap.backend("reference"):
        loss = F_cap.subset_cross_entropy(F.linear(*leaves), call.pop("target"), **call)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream(loss) if grad is None else grad.to(loss))


def close(actual, expected, rtol=1e-10):
    """Equal in float64, up to the rounding of sums of terms of some hundreds."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=rtol, atol=1e-10)


def without_bias(call):
    return {name: value for name, value in call.items() if name != "linear_bias"}


# Worked by hand --------------------------------------------------------------------------------------------------------

LOG = math.log
# Hidden states (1, 0), (0, 1), (1, 1); the head is made of logs, so that exp(logit) of the three tokens is a c, b c, a b c
A, B_, C = ([1.0, 2.0, 3.0, 4.0, 2.0], [2.0, 1.0, 1.0, 3.0, 5.0], [1.0, 3.0, 2.0, 1.0, 1.0])
HAND = {
    "input": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64),
    "linear_weight": torch.tensor([A, B_], dtype=torch.float64).log().T,
    "linear_bias": torch.tensor(C, dtype=torch.float64).log(),
    "target": torch.tensor([[3, 1, 3]]),  # its words: {1, 3}
}
# so exp(logit) is 1 6 6 4 2 (sum 19); 2 3 2 3 5 (sum 15); 2 6 6 12 10 (sum 36)
WORKED = {
    # candidates {1, 3}: 4 of 6 + 4; 3 of 3 + 3; 12 of 6 + 12
    "caption": (NARROW, [LOG(10 / 4), LOG(6 / 3), LOG(18 / 12)]),
    "first token full": ({}, [LOG(19 / 4), LOG(6 / 3), LOG(18 / 12)]),
    "full": ({"subset": "full"}, [LOG(19 / 4), LOG(15 / 3), LOG(36 / 12)]),
    # all but {1, 3}, and the target: 4 of 1 + 6 + 2 + 4; 3 of 2 + 2 + 5 + 3; 12 of 2 + 6 + 10 + 12
    "reverse": ({**NARROW, "subset": "reverse"}, [LOG(13 / 4), LOG(12 / 3), LOG(30 / 12)]),
    # ids {0, 4} and the target: 4 of 1 + 2 + 4; 3 of 2 + 5 + 3; 12 of 2 + 10 + 12
    "ids": ({**NARROW, "subset": torch.tensor([0, -1, 4, 0])}, [LOG(7 / 4), LOG(10 / 3), LOG(24 / 12)]),
    "mixture": (
        {**NARROW, "mle_weight": 0.25},
        [0.25 * LOG(19 / 4) + 0.75 * LOG(10 / 4), 0.25 * LOG(5) + 0.75 * LOG(2), 0.25 * LOG(3) + 0.75 * LOG(3 / 2)],
    ),
    "z-loss": (
        {**NARROW, "z_loss": 0.5},
        [LOG(10 / 4) + 0.5 * LOG(10) ** 2, LOG(2) + 0.5 * LOG(6) ** 2, LOG(3 / 2) + 0.5 * LOG(18) ** 2],
    ),
    "class weights": (
        {**NARROW, "weight": torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0])},
        [3 * LOG(10 / 4), 2 * LOG(2), 3 * LOG(3 / 2)],
    ),
    "token weights": ({**NARROW, "token_weight": torch.tensor([[2.0, -1.0, 0.0]])}, [2 * LOG(10 / 4), -LOG(2), 0.0]),
}


@every_budget
@pytest.mark.parametrize("name", WORKED)
def test_worked_example(name, memory_budget, target):
    options, expected = WORKED[name]
    options = {**options, "memory_budget": memory_budget}
    loss, *_ = result(target, HAND, reduction="none", **options)
    torch.testing.assert_close(loss, torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=1e-15)
    total, *_ = result(target, HAND, reduction="sum", **options)
    assert total.item() == pytest.approx(sum(expected), rel=1e-13)
    mean, *_ = result(target, HAND, **options)
    assert mean.item() == pytest.approx(sum(expected) / (3 + 2 + 3 if name == "class weights" else 3), rel=1e-13)


def test_worked_gradients(target):
    """d loss / d logits is p - 1 at the target and p at the other candidate, times each token's own upstream gradient:
    (.6, -.6), (-5, 5) and (-1, 1) at the words 1 and 3."""
    grad = torch.tensor([[1.0, 10.0, -3.0]])
    _, dh, dweight, dbias = result(target, HAND, grad, reduction="none", **NARROW)
    zeros = [0.0, 0.0]
    expected = (
        [[[-0.6 * LOG(2), -0.6 * LOG(3)], [5 * LOG(2), 5 * LOG(3)], [LOG(2), LOG(3)]]],
        [zeros, [0.6 - 1, -5 - 1], zeros, [1 - 0.6, 5 + 1], zeros],
        [0.0, 0.6 - 5 - 1, 0.0, -0.6 + 5 + 1, 0.0],
    )
    for a, e in zip((dh, dweight, dbias), expected, strict=True):
        torch.testing.assert_close(a, torch.tensor(e, dtype=torch.float64), rtol=1e-13, atol=1e-14)


# Equal to the loss of the logits ---------------------------------------------------------------------------------------


def draw_call(draw, st):
    B, T = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 3, 6, 20]))
    V, H = draw(st.integers(1, 24)), draw(st.sampled_from([1, 2, 5, 17]))
    seed, ignore_index = draw(st.integers(0, 999)), draw(st.sampled_from([-100, -1, 0, 2]))
    generator = torch.Generator().manual_seed(seed)
    call = make_hidden(B, T, V, H, seed=seed, bias=draw(st.sampled_from([0.1, 30.0])))
    y = torch.randint(max(1, min(V, draw(st.integers(1, 24)))), (T, B), generator=generator).t()
    call["target"] = y.masked_fill(torch.rand(B, T, generator=generator) < draw(st.sampled_from([0, 0.3, 1])), ignore_index)
    if not draw(st.booleans()):
        call = without_bias(call)
    if draw(st.booleans()):
        call["input"] = call["input"].transpose(0, 1).contiguous().transpose(0, 1)
    if draw(st.booleans()):
        call["linear_weight"] = call["linear_weight"].T.contiguous().T
    subset = draw(st.sampled_from(["caption", "full", "reverse", "random", "shared ids", "own ids"]))
    if subset.endswith("ids"):
        K = draw(st.integers(0, 70))
        subset = torch.randint(-1, V, (B, K) if subset == "own ids" else (K,), generator=generator)
    weight = draw(st.sampled_from([None, torch.rand(V, generator=generator, dtype=torch.float64) + 0.1]))
    factor = draw(st.sampled_from([None, (B, T), (B, 1)]))
    return call, {
        "subset": subset, "ignore_index": ignore_index, "seed": seed, "weight": weight,
        "token_weight": None if factor is None else torch.randn(factor, generator=generator, dtype=torch.float64),
        "num_random": draw(st.integers(1, 12)), "first_token": draw(st.sampled_from(["full", "subset"])),
        "mle_weight": draw(st.sampled_from([0.0, 0.25, 1.0])), "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "logit_softcap": draw(st.sampled_from([None, 2.0])), "z_loss": draw(st.sampled_from([0.0, 0.1])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "memory_budget": draw(st.sampled_from([None, 0, 1, B * T * V * 8 // 3, B * T * V * 4, 1 << 40])),
    }  # fmt: skip


def fuzz(where, examples, **settings):
    hypothesis = pytest.importorskip("hypothesis")
    quiet, phases = list(hypothesis.HealthCheck), list(hypothesis.Phase)
    if where == ("cpu", "triton"):
        phases.remove(hypothesis.Phase.shrink)  # minutes in the interpreter; cpp, which shares the options, shrinks

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=quiet, phases=phases, **settings
    )
    @hypothesis.given(hypothesis.strategies.composite(lambda draw: draw_call(draw, hypothesis.strategies))())
    def holds(drawn):
        call, options = drawn
        close(result(where, call, **options), by_logits(call, **options))

    holds()


def test_any_call_equals_the_loss_of_the_logits(fused):
    fuzz(fused, 7 if fused == ("cpu", "triton") else 200, derandomize=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
def test_the_cases_of_the_contract_take_every_plan(dtype, cpp, monkeypatch):
    """Guards tests/test_all_ops.py: its inputs are small, and a plan that none of them takes would go untested."""
    plans, choose = set(), _plans.choose

    def noted(*arguments, **options):
        plans.add(choose(*arguments, **options))
        return choose(*arguments, **options)

    monkeypatch.setattr(_plans, "choose", noted)
    for case in OPERATIONS["linear_subset_cross_entropy"].cases():
        evaluate(OPERATIONS["linear_subset_cross_entropy"], case.to(dtype), "cpp")
    assert plans == {"none", "keep", "rows", "panels"}


@pytest.mark.slow
def test_very_many_calls_equal_the_loss_of_the_logits(fused):
    fuzz(fused, 3000)


@every_way
@pytest.mark.parametrize("memory_budget", [None, 0, 10_000, 200_000])
def test_sizes_that_are_no_multiple_of_a_block(options, memory_budget, compiled):
    """531 tokens in captions of unequal length, 1021 words, 19 features; the first and the last word among the targets."""
    call = make_hidden(3, 177, 1021, 19, seed=5)
    call["target"][0, 3], call["target"][0, 9], call["target"][1, 7] = 0, 1020, 1020
    expected = by_logits(call, reduction="none", **options)
    assert expected[2][0].abs().max() > 0 and expected[2][1020].abs().max() > 0
    close(result(compiled, call, reduction="none", memory_budget=memory_budget, **options), expected)


@every_way
def test_few_tokens_against_a_vocabulary_of_several_blocks(options, compiled):
    """Block after block is absorbed into running sums, though a block of three tokens may be wide."""
    call = make_hidden(3, 2, 100_003, 3, prompt=0)
    call["target"][0, 1], call["target"][1, 0], call["target"][2, 1] = 0, 100_002, 50_000
    close(result(compiled, call, memory_budget=0, **options), by_logits(call, **options))


@pytest.mark.parametrize("options", [NARROW, {}, {"mle_weight": 0.3}], ids=["caption-first-in-subset", "caption", "mixture"])
@pytest.mark.parametrize("ids", [torch.zeros(0).long(), torch.full((3, 2), -1)], ids=["none", "pads"])
def test_without_any_id_the_target_alone_is_chosen_from(options, ids, target):
    call = make_hidden(3, 4, 9, 3)
    loss, *gradients = result(target, call, subset=ids, reduction="none", **options)
    close((loss, *gradients), by_logits(call, subset=ids, reduction="none", **options))
    if options is NARROW:
        assert all((value == 0).all() for value in (loss, *gradients))


@every_way
@pytest.mark.parametrize(("B", "T"), [(0, 4), (3, 0), (0, 0)])
def test_no_tokens_give_a_loss_and_gradients_of_zero(options, B, T, target):
    for reduction in ("mean", "sum", "none"):
        loss, *gradients = result(target, make_hidden(B, T, 7, 5), reduction=reduction, **options)
        assert loss.shape == ((B, T) if reduction == "none" else ()) and (loss == 0).all()
        assert [list(g.shape) for g in gradients] == [[B, T, 5], [7, 5], [7]]
        assert all((g == 0).all() for g in gradients)


@every_way
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_one_caption_longer_than_a_block(options, memory_budget, compiled):
    call = make_hidden(1, 261, 307, 7, seed=6)
    call["target"][0, 40:200] = torch.arange(160) + 147  # more different words than are compared pairwise; the last is V - 1
    call["target"][0, 240:] = 0
    close(result(compiled, call, memory_budget=memory_budget, **options), by_logits(call, **options))


@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 511, 513, 1025, 2049])
@pytest.mark.parametrize("options", [{}, {"subset": "reverse", "label_smoothing": 0.1}], ids=["caption", "reverse"])
def test_vocabularies_at_the_edge_of_a_block(V, options, compiled):
    call = make_hidden(2, 5, V, 3, seed=V, prompt=0)
    call["target"][0, 1], call["target"][0, 2] = 0, V - 1
    for memory_budget in (None, 0):
        close(result(compiled, call, memory_budget=memory_budget, **options), by_logits(call, **options))


@every_way
@every_budget
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.interpreted_share(5)
def test_a_large_bias_has_the_right_gradient(options, memory_budget, dtype, fused, reference):
    """A bias of 0.01 hides a wrong gradient (ml-cross-entropy #52)."""
    call = make_hidden(2, 5, 33, 6, bias=100.0)
    call = {k: v.to(dtype) if v.is_floating_point() else v for k, v in call.items()}
    exact, plain = by_logits(call, **options), result(reference, call, **options)
    assert exact[3].abs().max() > 0.1
    actual = result(fused, call, memory_budget=memory_budget, **options)
    for what, a, e, p in zip(("loss", *INPUTS), actual, exact, plain, strict=True):
        assert_close_to_float64(a, e, p, what, size=500.0 if what == "loss" else 0.0)


@every_way
@every_budget
def test_ignored_captions_and_tokens_cost_nothing(options, memory_budget, place):
    call = make_hidden(3, 5, 12, 4, seed=2)
    some = {**call, "target": call["target"].clone()}
    some["target"][1] = -100
    loss, dh, dweight, dbias = result(place, some, reduction="sum", memory_budget=memory_budget, **options)
    assert (dh[1:] == 0).all() and (dh[0] != 0).any()
    first = {**call, "input": call["input"][:1], "target": call["target"][:1]}
    alone = by_logits(first, upstream(loss), reduction="sum", **options)
    close((loss, dh[:1], dweight, dbias), alone)
    nothing = {**call, "target": torch.full_like(call["target"], -100)}
    for reduction in ("mean", "sum", "none"):
        for value in result(place, nothing, reduction=reduction, memory_budget=memory_budget, **options):
            assert (value == 0).all()  # torch's cross_entropy gives NaN for "mean"


JUNK = {**WAYS, **{f"{name}-first-in-subset": {**NARROW, **options} for name, options in SETS.items() if name != "caption"}}


def with_junk(grad, target):
    """`grad`, but NaN and infinities at the ignored tokens."""
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(target.numel())[: target.numel()].view(target.shape)
    return torch.where(target == -100, junk, grad.cpu())


@pytest.mark.parametrize(
    ("options", "memory_budget"),
    # without a full row there is nothing to budget
    [pytest.param(way, b, id=f"{n}-{b}") for n, way in JUNK.items() for b in (None, 0) if b is None or n in WAYS],
)
@pytest.mark.interpreted_share(3)
def test_the_upstream_gradient_of_an_ignored_token_may_be_anything(options, memory_budget, target):
    """torch.where(valid, loss / count, 0) has one of 0 / 0 where the count is 0."""
    call = make_hidden(3, 4, 61, 5)  # each caption begins with an ignored token, and the last has no other
    grad = upstream(call["target"].double())
    clean = by_logits(call, grad, reduction="none", **options)
    grad = with_junk(grad, call["target"])
    assert grad.isnan().any() and grad.isinf().any()
    close(result(target, call, grad, reduction="none", memory_budget=memory_budget, **options), clean)


@every_mode
@pytest.mark.parametrize("options", SETS.values(), ids=SETS)
def test_junk_upstream_of_ignored_tokens_reaches_no_kind_of_gradient(grad_weight, options, place):
    call, options = without_bias(make_hidden(3, 9, 61, 5)), {**NARROW, **options, "reduction": "none"}
    grad, head = upstream(call["target"].double()), head_of(place, call)
    given = on(place, {**call, **options})
    given["input"].requires_grad_()
    with fastcap.backend(place.backend):
        loss = F_cap.linear_subset_cross_entropy(**{**given, "linear_weight": head}, grad_weight=grad_weight)
    loss.backward(with_junk(grad, call["target"]).to(loss))
    gradient = head.grad.to_dense() if head.grad.is_sparse else head.grad
    close((loss.detach().cpu(), given["input"].grad.cpu(), gradient.cpu()), by_logits(call, grad, **options))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch.nn.functional.linear_cross_entropy is not there")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("label_smoothing", "weighted", "ignore_index"),
    [(0.0, False, -100), (0.1, False, 3), (1.0, False, -100), (0.0, True, -1), (0.1, True, -100)],
)
def test_full_subset_is_torchs_linear_cross_entropy(reduction, label_smoothing, weighted, ignore_index, place):
    call = make_hidden(2, 4, 17, 5, ignore_index=ignore_index)
    weight = torch.linspace(0.0, 2.0, 17, dtype=torch.float64) if weighted else None  # a weight of 0 is torch's too
    options = dict(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    for given in (call, without_bias(call)):
        h, linear_weight, *bias = leaves = [given[name].clone().requires_grad_() for name in INPUTS if name in given]
        exact = F.linear_cross_entropy(
            h.flatten(0, 1), linear_weight, given["target"].flatten(), linear_bias=bias[0] if bias else None, **options
        )
        exact = exact.view(2, 4) if reduction == "none" else exact
        expected = (exact.detach(), *torch.autograd.grad(exact, leaves, upstream(exact)))
        for ours in ({"subset": "full"}, {"subset": "full", "memory_budget": 0}, {"mle_weight": 1.0}):
            close(result(place, given, **ours, **options), expected)
        flat = {**given, "input": given["input"].flatten(0, 1), "target": given["target"].flatten()}
        loss, dh, *rest = result(place, flat, subset="full", **options)
        close((loss.view(exact.shape), dh.view(2, 4, 5), *rest), expected)


# Gradients of the weight, in three kinds -------------------------------------------------------------------------------


def head_of(where, call, dtype=None):
    return torch.nn.Parameter(call["linear_weight"].to(where.device, dtype, copy=True))


def backward(where, call, head, scale=1.0, **options):
    """Adds the gradient of `scale` times the loss to `head`, as a training loop does; returns the loss."""
    call = on(where, {**without_bias(call), **options})
    call["input"] = call["input"].to(head.dtype)
    with fastcap.backend(where.backend):
        loss = F_cap.linear_subset_cross_entropy(**{**call, "linear_weight": head})
    (scale * loss).backward()
    return loss.detach()


def dense_gradient(call, grad=1.0, **options):
    return by_logits(without_bias(call), torch.tensor(grad, dtype=torch.float64), **options)[2]


@pytest.mark.parametrize("options", SETS.values(), ids=SETS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.interpreted_share(3)
def test_a_sparse_gradient_has_the_rows_of_the_ids_in_the_batch(options, reduction, target):
    V = 61
    call, options = make_hidden(3, 9, V, 5), {**NARROW, **options, "reduction": reduction}
    grad = torch.tensor(1.0)
    _, _, gradient = result(target, without_bias(call), grad, grad_weight="sparse", **options)
    dense = dense_gradient(call, **options)
    assert gradient.is_sparse and gradient.is_coalesced()
    assert gradient.sparse_dim() == 1 and gradient.dense_dim() == 1 and gradient.shape == dense.shape
    (ids,) = gradient.indices()
    assert (ids[1:] > ids[:-1]).all()  # sorted, and each once
    close((gradient.to_dense(),), (dense,))
    valid = call["target"] != -100
    words = set(call["target"][valid].tolist())
    subset = options.get("subset", "caption")
    draws = _subset.random_ids(3, 9, 4, V, 3, torch.device("cpu")) if subset == "random" else subset
    allowed = words | (set() if subset == "caption" else set(draws.flatten().tolist()) - {-1})
    assert {v for v in range(V) if (dense[v] != 0).any()} <= set(ids.tolist()) <= allowed
    if subset == "caption":
        assert set(ids.tolist()) == words
    head = head_of(target, call)
    for _ in range(2):  # torch's own accumulation of sparse gradients
        backward(target, call, head, grad_weight="sparse", **options)
    assert head.grad.is_sparse
    close((head.grad.to_dense().cpu(),), (2 * dense,))


def test_a_sparse_gradient_of_nothing_is_zero(place):
    call = make_hidden(2, 4, 9, 3)
    call["target"] = torch.full_like(call["target"], -100)
    head = head_of(place, call)
    assert backward(place, call, head, grad_weight="sparse", **NARROW) == 0
    assert head.grad.is_sparse and head.grad.shape == head.shape and (head.grad.to_dense() == 0).all()


@pytest.mark.parametrize(
    ("sparse", "dense", "options"),
    [
        (torch.optim.SparseAdam, torch.optim.Adam, {"eps": 1e-30}),  # which the two add in different places
        (torch.optim.SGD, torch.optim.SGD, {}),
    ],
    ids=["SparseAdam", "SGD"],
)
def test_a_sparse_gradient_steps_an_optimiser_as_the_dense_one_does(sparse, dense, options, place):
    """One step: from the second on Adam moves the rows that had a gradient before, which SparseAdam leaves."""
    call = make_hidden(3, 9, 61, 5)
    ours, plain = head_of(place, call), head_of(place, call)
    backward(place, call, ours, grad_weight="sparse", **NARROW)
    plain.grad = dense_gradient(call, **NARROW).to(place.device)
    before = ours.detach().clone()
    sparse([ours], lr=0.1, **options).step()
    dense([plain], lr=0.1, **options).step()
    assert (ours != before).any()
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {**NARROW, "mle_weight": 0.1}, {**NARROW, "subset": "full"}, {**NARROW, "subset": "reverse"}], ids=str
)
def test_a_sparse_gradient_where_a_token_uses_the_whole_vocabulary_is_an_error(options, place):
    call = make_hidden(2, 4, 9, 3)
    with pytest.raises(FastcapError, match=r"^fastcap\.linear_subset_cross_entropy: grad_weight must .*first_token"):
        backward(place, call, head_of(place, call), grad_weight="sparse", **options)


@every_way
@every_budget
def test_accumulate_adds_into_the_gradient_in_place(options, memory_budget, place):
    call, options = make_hidden(3, 6, 23, 5), {**options, "memory_budget": memory_budget, "grad_weight": "accumulate"}
    head, expected = head_of(place, call), dense_gradient(call, **options)
    backward(place, call, head, **options)
    made = head.grad
    close((made.cpu(),), (expected,))
    there = torch.randn(23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(place.device)
    head.grad = there.clone()
    kept, pointer = head.grad, head.grad.data_ptr()
    for times in (1, 2):
        backward(place, call, head, **options)
        assert head.grad is kept and head.grad.data_ptr() == pointer
        close((head.grad.cpu() - there.cpu(),), (times * expected,))


@pytest.mark.parametrize("strided", [False, True])
def test_accumulate_adds_into_a_gradient_of_any_strides(strided, place):
    call = make_hidden(3, 6, 23, 5)
    head = head_of(place, call)
    memory = torch.ones(5, 23, dtype=torch.float64, device=place.device)
    head.grad = memory.T if strided else torch.ones(23, 5, dtype=torch.float64, device=place.device)
    for options in (NARROW, {}):
        head.grad.fill_(1.0)
        backward(place, call, head, grad_weight="accumulate", **options)
        close((head.grad.cpu() - 1,), (dense_gradient(call, **options),))


@every_way
@every_budget
def test_accumulate_adds_into_main_grad_in_float32(options, memory_budget, place, reference):
    """In bfloat16 next to 1 a step is 0.008: none of these gradients would be seen."""
    call = make_hidden(3, 6, 23, 5)
    call = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call.items()}
    head = head_of(place, call)
    head.main_grad = torch.ones(23, 5, device=place.device)
    memory, exact = head.main_grad, dense_gradient(call, 1e-3, **options)
    assert 0 < exact.abs().max() < 2**-8
    plain = result(reference, without_bias(call), torch.tensor(1e-3), **options)[2]
    for times in (1, 2):
        backward(place, call, head, 1e-3, grad_weight="accumulate", memory_budget=memory_budget, **options)
        assert head.grad is None and head.main_grad is memory and memory.dtype == torch.float32
        added = memory.cpu().double() - 1
        # the gradient as plain torch has it in bfloat16, and the rounding of two sums of about 1
        allowed = times * (2 * (plain.double() - exact).abs().max() + 4 * 2**-8 * exact.abs().max()) + 4 * 2**-24
        assert (added - times * exact).abs().max() <= allowed


@pytest.mark.parametrize("options", [NARROW, {}, {"subset": "full"}], ids=["caption-first-in-subset", "caption", "full"])
@pytest.mark.parametrize("memory_budget", [None, 0])
@pytest.mark.parametrize("memory", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_accumulate_adds_into_main_grad_of_any_dtype(options, memory_budget, memory, dtype, place):
    call = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make_hidden(3, 6, 23, 5).items()}
    head, exact = head_of(place, call), dense_gradient(call, **options)
    head.main_grad = torch.ones(23, 5, dtype=memory, device=place.device)
    backward(place, call, head, grad_weight="accumulate", memory_budget=memory_budget, **options)
    step = max(torch.finfo(memory).eps, torch.finfo(dtype).eps if dtype != torch.float64 else 0.0)
    assert head.grad is None and head.main_grad.dtype == memory and exact.abs().max() > 0.05
    assert (head.main_grad.cpu().double() - 1 - exact).abs().max() <= 4 * step


@pytest.mark.parametrize("options", [NARROW, {}, {"mle_weight": 0.3}], ids=["caption-first-in-subset", "caption", "mixture"])
@pytest.mark.parametrize("memory_budget", [None, 0])
@pytest.mark.parametrize("carried", ["nothing", "grad", "main_grad"])
def test_accumulate_adds_only_in_a_backward_that_reaches_the_weight(options, memory_budget, carried, place):
    """torch.autograd.grad(loss, [h]) and loss.backward(inputs=[h]) leave other parameters alone; a penalty, a probe of the
    hidden states' gradients or GradNorm would else move the head."""
    call = without_bias(make_hidden(3, 6, 23, 5))
    head, given = head_of(place, call), on(place, call)
    h = given["input"].requires_grad_()
    _, dh, dweight = by_logits(call, torch.tensor(1.0), **options)
    there = torch.randn(23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if carried != "nothing":
        setattr(head, carried, there.to(place.device, copy=True))

    def added():
        memory = head.main_grad if carried == "main_grad" else head.grad
        return None if memory is None else memory.cpu() - (there if carried != "nothing" else 0)

    with fastcap.backend(place.backend):
        loss = F_cap.linear_subset_cross_entropy(
            h, head, given["target"], grad_weight="accumulate", memory_budget=memory_budget, **options
        )
    close([g.cpu() for g in torch.autograd.grad(loss, [h], retain_graph=True)], [dh])
    assert h.grad is None
    loss.backward(inputs=[h], retain_graph=True)
    close([h.grad.cpu()], [dh])
    assert added() is None if carried == "nothing" else (added() == 0).all()
    loss.backward(inputs=[h, head], retain_graph=True)
    close([h.grad.cpu(), added()], [2 * dh, dweight])
    loss.backward(inputs=[head], retain_graph=True)
    close([h.grad.cpu(), added()], [2 * dh, 2 * dweight])
    loss.backward()
    close([h.grad.cpu(), added()], [3 * dh, 3 * dweight])
    assert carried != "main_grad" or head.grad is None


@pytest.mark.parametrize("options", [NARROW, {}], ids=["caption-first-in-subset", "caption"])
def test_accumulate_gives_autograd_no_gradient_of_the_weight(options, place):
    """Whoever asks for it by name is told so, and nothing is added in passing."""
    call = without_bias(make_hidden(3, 6, 23, 5))
    head, given = head_of(place, call), on(place, call)
    h = given["input"].requires_grad_()
    with fastcap.backend(place.backend):
        loss = F_cap.linear_subset_cross_entropy(h, head, given["target"], grad_weight="accumulate", **options)
    for inputs in ([head], [h, head]):
        with pytest.raises((RuntimeError, FastcapError)):
            torch.autograd.grad(loss, inputs, retain_graph=True)
    assert head.grad is None and h.grad is None


def test_accumulate_into_a_weight_that_is_no_leaf_is_an_error(place):
    call = make_hidden(2, 4, 9, 3)
    with pytest.raises(
        FastcapError, match=r"^fastcap\.linear_subset_cross_entropy: (linear_weight|grad_weight) must .*leaf"
    ):
        backward(place, call, head_of(place, call) * 1.0, grad_weight="accumulate", **NARROW)


@pytest.mark.parametrize("grad_weight", ["sparse", "accumulate"])
def test_sparse_and_accumulated_gradients_are_eager_only(grad_weight, cpp):
    torch._dynamo.reset()
    call = make_hidden(2, 4, 9, 3)
    compiled = torch.compile(F_cap.linear_subset_cross_entropy, fullgraph=True, backend="aot_eager")
    with fastcap.backend("cpp"), pytest.raises(Exception, match=r"linear_subset_cross_entropy: grad_weight must"):
        compiled(call["input"], head_of(cpp, call), call["target"], grad_weight=grad_weight, **NARROW)


@every_mode
@pytest.mark.parametrize("sparse_embedding", [False, True])
def test_tied_weights_get_the_sum_of_both_gradients(grad_weight, sparse_embedding, place):
    """One parameter as the embedding of the words read and as the head of the words written."""
    call = make_hidden(3, 6, 23, 5)
    read = call["target"].clamp(min=0).to(place.device)
    plain = torch.nn.Parameter(call["linear_weight"].clone())
    with fastcap.backend("reference"):
        logits = F.linear(torch.tanh(F.embedding(read.cpu(), plain)), plain)
        F_cap.subset_cross_entropy(logits, call["target"], **NARROW).backward()
    tied = head_of(place, call)
    with fastcap.backend(place.backend):
        h = torch.tanh(F.embedding(read, tied, sparse=sparse_embedding))
        F_cap.linear_subset_cross_entropy(
            h, tied, call["target"].to(place.device), grad_weight=grad_weight, **NARROW
        ).backward()
    close(((tied.grad.to_dense() if tied.grad.is_sparse else tied.grad).cpu(),), (plain.grad,))


@every_mode
@every_budget
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_scale_of_the_loss_scales_every_gradient(grad_weight, memory_budget, reduction, place):
    """Gradients formed in the forward must still wait for the upstream gradient; two micro-batches add up."""
    call = make_hidden(3, 6, 23, 5)
    ways = (NARROW,) if grad_weight == "sparse" else ({}, NARROW, {"subset": "reverse"}, {"mle_weight": 0.2})
    for way in ways:
        options = {**way, "reduction": reduction, "memory_budget": memory_budget}
        head = head_of(place, call)
        for scale in (0.37, -2.0):
            backward(place, call, head, scale, grad_weight=grad_weight, **options)
        gradient = head.grad.to_dense() if head.grad.is_sparse else head.grad
        close((gradient.cpu(),), (dense_gradient(call, 0.37 - 2.0, **options),))


@every_way
@every_budget
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_through_the_same_graph_gives_the_same(options, memory_budget, reduction, place):
    call = on(place, make_hidden(3, 6, 23, 5))
    leaves = [call[name].requires_grad_() for name in INPUTS]
    with fastcap.backend(place.backend):
        loss = F_cap.linear_subset_cross_entropy(**call, reduction=reduction, memory_budget=memory_budget, **options)
    first = torch.autograd.grad(loss, leaves, upstream(loss), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    doubled = torch.autograd.grad(loss, leaves, 2 * upstream(loss), retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream(loss))
    for a, b, twice, c in zip(first, kept, doubled, again, strict=True):
        assert torch.equal(a, b)  # what the first call returned is not written to by the others
        assert torch.equal(b, c)
        torch.testing.assert_close(twice, 2 * b, rtol=1e-12, atol=1e-14)


@every_mode
def test_a_second_backward_adds_the_same_again(grad_weight, place):
    call, head = make_hidden(3, 6, 23, 5), None
    head = head_of(place, call)
    given = on(place, without_bias(call))
    with fastcap.backend(place.backend):
        loss = F_cap.linear_subset_cross_entropy(**{**given, "linear_weight": head}, grad_weight=grad_weight, **NARROW)
    loss.backward(retain_graph=True)
    loss.backward()
    gradient = head.grad.to_dense() if head.grad.is_sparse else head.grad
    close((gradient.cpu(),), (dense_gradient(call, 2.0, **NARROW),))


@every_way
@pytest.mark.parametrize("wanted", INPUTS)
@pytest.mark.interpreted_share(5)
def test_double_backward_is_a_clear_error(options, wanted, fused):
    call = on(fused, make_hidden(2, 4, 9, 3))
    leaves = [call[name].requires_grad_() for name in INPUTS]
    with fastcap.backend(fused.backend):
        loss = F_cap.linear_subset_cross_entropy(**call, **options)
    gradients = dict(zip(INPUTS, torch.autograd.grad(loss, leaves, create_graph=True), strict=True))
    message = r"fastcap\.linear_subset_cross_entropy: the gradient must not be differentiated again"
    with pytest.raises(RuntimeError, match=message):
        gradients[wanted].square().sum().backward()


def test_double_backward_works_on_the_reference():
    call = make_hidden(1, 3, 4, 2, bias=1.0)
    target = call.pop("target")

    def loss(*values):
        return F_cap.linear_subset_cross_entropy(*values[:2], target, linear_bias=values[2], label_smoothing=0.1)

    with fastcap.backend("reference"):
        assert torch.autograd.gradgradcheck(loss, tuple(call[name].requires_grad_() for name in INPUTS))


@every_way
@every_budget
@pytest.mark.parametrize(
    "trained", [("input",), ("linear_weight",), ("linear_bias",), ("input", "linear_bias"), ()], ids=str
)
def test_frozen_inputs_get_no_gradient(options, memory_budget, trained, place):
    call = make_hidden(3, 6, 23, 5)
    expected = dict(zip(("loss", *INPUTS), by_logits(call, **options), strict=True))
    given = on(place, call)
    leaves = [given[name].requires_grad_() for name in trained]
    with fastcap.backend(place.backend):
        loss = F_cap.linear_subset_cross_entropy(**given, memory_budget=memory_budget, **options)
    close((loss.detach().cpu(),), (expected["loss"],))
    assert loss.requires_grad == bool(trained)
    if trained:
        gradients = torch.autograd.grad(loss, leaves, upstream(loss))
        close([g.cpu() for g in gradients], [expected[name] for name in trained])


@every_mode
def test_a_frozen_weight_gets_none_of_any_kind(grad_weight, place):
    call = make_hidden(3, 6, 23, 5)
    head = head_of(place, call).requires_grad_(False)
    given = on(place, without_bias(call))
    h = given["input"].requires_grad_()
    with fastcap.backend(place.backend):
        F_cap.linear_subset_cross_entropy(h, head, given["target"], grad_weight=grad_weight, **NARROW).backward()
    assert head.grad is None and not hasattr(head, "main_grad")
    close((h.grad.cpu(),), (by_logits(without_bias(call), torch.tensor(1.0), **NARROW)[1],))


# The same bits ---------------------------------------------------------------------------------------------------------


def frequent(dtype=torch.float32):
    """Captions that share their words: one id in every caption, several times, as "a" and the end of a sentence."""
    call = make_hidden(16, 12, 5003, 40, seed=1)
    call["target"][:, ::3] = 7
    call["target"][:, -1] = 5002
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in call.items()}


@every_way
@every_budget
def test_frequent_ids_give_the_same_bits_in_every_run(options, memory_budget, compiled, reference):
    call = frequent()
    runs = [result(compiled, call, memory_budget=memory_budget, **options) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    plain = result(reference, call, **options)
    for what, a, e, p in zip(("loss", *INPUTS), runs[0], by_logits(call, **options), plain, strict=True):
        assert_close_to_float64(a, e, p, what, size=200.0 if what == "loss" else 0.0)


@every_mode
@pytest.mark.parametrize("options", [{}, {"subset": "random", "seed": 1}], ids=["caption", "random"])
def test_subset_losses_give_the_same_bits_with_any_number_of_threads(grad_weight, options, cpp):
    """Ids that all share are one product over all tokens, whose bits torch lets depend on its threads."""
    before, call, results = torch.get_num_threads(), frequent(), []
    try:
        for threads in (1, 2, 1, 3):
            torch.set_num_threads(threads)
            head = head_of(cpp, call)
            loss = backward(cpp, call, head, grad_weight=grad_weight, **NARROW, **options)
            results.append([loss, head.grad.to_dense() if head.grad.is_sparse else head.grad])
            results[-1] += result(cpp, call, reduction="none", **NARROW, **options)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_kinds_of_gradient_agree_to_the_bit(cpp):
    call, gradients = frequent(), []
    for grad_weight in MODES:
        head = head_of(cpp, call)
        backward(cpp, call, head, grad_weight=grad_weight, **NARROW)
        gradients.append(head.grad.to_dense() if head.grad.is_sparse else head.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


# Strides ---------------------------------------------------------------------------------------------------------------


def rows_of(x):
    """The same values as rows in the middle of a larger tensor of NaN."""
    return torch.full((x.shape[0] + 8, *x.shape[1:]), torch.nan, dtype=x.dtype)[5 : 5 + x.shape[0]].copy_(x)


def columns_of(x):
    return torch.full((*x.shape[:-1], x.shape[-1] + 7), torch.nan, dtype=x.dtype)[..., 3 : 3 + x.shape[-1]].copy_(x)


def turned(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(x):
    return torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)[..., ::2].copy_(x)


@every_way
@every_budget
@pytest.mark.parametrize("layout", [rows_of, columns_of, turned, every_second])
def test_any_strides_will_do(options, memory_budget, layout, compiled):
    call = make_hidden(3, 6, 37, 6)
    laid = {name: layout(value) if value.is_floating_point() else turned(value) for name, value in call.items()}
    assert layout in (rows_of,) or not laid["linear_weight"].is_contiguous()
    close(result(compiled, laid, memory_budget=memory_budget, **options), by_logits(call, **options))


@every_way
def test_expanded_tensors_get_the_gradient_of_their_copies(options, place):
    """One hidden state for all captions, one row for all words, one number as bias: strides of 0."""
    call = make_hidden(3, 6, 11, 5)
    single = {
        "input": call["input"][:1, :1].expand(3, 6, 5),
        "linear_weight": call["linear_weight"][:1].expand(11, 5),
        "linear_bias": call["linear_bias"][:1].expand(11),
    }
    for name, expanded in single.items():
        laid = {**call, name: expanded}
        close(result(place, laid, reduction="none", **options), by_logits(laid, reduction="none", **options))


@every_mode
@pytest.mark.parametrize("layout", [rows_of, turned, every_second])
def test_every_kind_of_gradient_of_a_strided_weight(grad_weight, layout, place):
    call = make_hidden(3, 6, 23, 5)
    head = torch.nn.Parameter(layout(call["linear_weight"]).to(place.device))
    backward(place, call, head, grad_weight=grad_weight, **NARROW)
    gradient = head.grad.to_dense() if head.grad.is_sparse else head.grad
    close((gradient.cpu(),), (dense_gradient(call, **NARROW),))


# Autocast --------------------------------------------------------------------------------------------------------------


@every_budget
@every_mode
def test_under_autocast_a_float32_head_meets_bfloat16_hidden_states(grad_weight, memory_budget, place, reference):
    """As in F.linear: products in bfloat16, the loss in float32, each gradient in the dtype of its own tensor."""
    call = without_bias(make_hidden(3, 6, 23, 5))
    call = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call.items()}
    options = {**NARROW, "reduction": "sum"}
    exact, plain = by_logits(call, torch.tensor(1.0), **options), result(reference, call, torch.tensor(1.0), **options)
    given = on(place, call)
    h, head = given["input"].requires_grad_(), head_of(place, call, torch.float32)
    with fastcap.backend(place.backend), torch.autocast(place.device, dtype=torch.bfloat16):
        loss = F_cap.linear_subset_cross_entropy(
            h, head, given["target"], grad_weight=grad_weight, memory_budget=memory_budget, **options
        )
    loss.backward()
    gradient = head.grad.to_dense() if head.grad.is_sparse else head.grad
    assert loss.dtype == torch.float32 and h.grad.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    # bfloat16 logits of up to 10: steps of 1/32 in each of some 20 terms
    assert loss.item() == pytest.approx(exact[0].item(), rel=2**-7)
    assert_close_to_float64(h.grad, exact[1], plain[1], "input")
    assert_close_to_float64(gradient.bfloat16(), exact[2], plain[2], "linear_weight")


def float16_gradients(where, call, budget, scale):
    """Of the mean over `call` under autocast to float16, with a loss scale that is then taken off again."""
    leaves = [call[name].float().to(where.device).requires_grad_() for name in INPUTS]
    with fastcap.backend(where.backend), torch.autocast(where.device, dtype=torch.float16):
        loss = F_cap.linear_subset_cross_entropy(
            *leaves[:2], call["target"].to(where.device), linear_bias=leaves[2], subset="full", memory_budget=budget
        )
    return [gradient.cpu() / scale for gradient in torch.autograd.grad(scale * loss, leaves)]


# All logits, blocks of rows (a copy of the head, sums of its gradient, 512 or 3000 rows of logits), the smallest panels
FLOAT16_BUDGETS = [None, 6 * 32 * 8 + 512 * 2 * 32, 6 * 32 * 8 + 3000 * 2 * 32, 0]


@pytest.mark.parametrize("memory_budget", FLOAT16_BUDGETS)
@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_float16_gradients_survive_a_mean_over_many_tokens(size, memory_budget, place, reference):
    """1 / 4096 of a gradient is below what float16 holds; the loss scale, which lifts it, comes with the backward."""
    call = make_hidden(1, 4096, 32, 8, bias=0.1, prompt=0)
    call = {k: (v * (size if k == "input" else 1)).half() if v.is_floating_point() else v for k, v in call.items()}
    _, *exact = by_logits(call, torch.tensor(1.0), subset="full")

    def errors(where):
        gradients = float16_gradients(where, call, memory_budget, 65536.0)
        return [((g - e).norm() / e.norm()).item() for g, e in zip(gradients, exact, strict=True)]

    for ours, plain in zip(errors(place), errors(reference), strict=True):
        assert ours < 2 * plain + 2**-12, (ours, plain)


@pytest.mark.parametrize("memory_budget", FLOAT16_BUDGETS)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_float16_sums_over_many_tokens_of_large_states_are_finite(scale, memory_budget, place):
    """One feature of 100, as real models have, and few words: the sum over thousands of tokens is beyond float16, their
    mean is not. A loss scaler would lower its scale for ever and never find one that helps."""
    call = make_hidden(1, 4096, 32, 8, bias=0.0, prompt=0)
    call["target"] %= 4
    call["input"][..., 3], call["linear_weight"][:, 3] = 100.0, 0.0
    call = {k: v.half() if v.is_floating_point() else v for k, v in call.items()}
    _, *exact = by_logits(call, torch.tensor(1.0), subset="full")
    assert exact[1].abs().max() < 65504 / 1024 < 65504 < 4096 * exact[1].abs().max()
    for gradient, e in zip(float16_gradients(place, call, memory_budget, scale), exact, strict=True):
        assert gradient.isfinite().all() and (scale == 1 or (gradient - e).norm() < 2**-7 * e.norm())


# Memory ----------------------------------------------------------------------------------------------------------------


class Inside(TorchDispatchMode):
    """Sees what operations make, also inside fastcap's operators, whose names and results it keeps."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastcap":
            key = next(a for a in args if isinstance(a, torch.Tensor)).device.type.upper()
            with self:  # what its implementation calls is seen as well
                out = func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
            self.operators.append((func._schema.name, out))
            return out
        out = func(*args, **kwargs)
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.layout == torch.strided:
                self.made(func, x)
        return out


class Allocated(Inside):
    """The tensors of `numel` elements or more that an operation makes; those of the weight's shape (the weight, its
    gradient) and views of them do not count."""

    def __init__(self, weight, numel):
        super().__init__()
        self.shape, self.numel, self.found = tuple(weight.shape), numel, []
        self.known = {weight.untyped_storage().data_ptr(): weight.untyped_storage()}  # kept, lest its address is given anew

    def made(self, func, x):
        memory = x.untyped_storage().data_ptr()
        if tuple(x.shape) == self.shape:
            self.known[memory] = x.untyped_storage()
        elif memory not in self.known and x.untyped_storage().nbytes() // x.element_size() >= self.numel:
            self.found.append((str(func), tuple(x.shape)))


class WeightsMade(Inside):
    """The tensors of the weight's shape that are not the weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.found = weight, []

    def made(self, func, x):
        if x.shape == self.weight.shape and x.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr():
            self.found.append((str(func), x.dtype))


def allocations(where, numel, H=24, autocast=False, **options):
    call = make_hidden(4, 20, 50_003, H, seed=4)
    call = on(where, {k: v.float() if v.is_floating_point() else v for k, v in call.items()})
    h, bias = call["input"].requires_grad_(), call["linear_bias"].requires_grad_()
    head = head_of(where, call)
    lower = torch.autocast(where.device, dtype=torch.bfloat16, enabled=autocast)
    with fastcap.backend(where.backend), Allocated(head, numel) as allocated:
        with lower:
            loss = F_cap.linear_subset_cross_entropy(h, head, call["target"], linear_bias=bias, **options)
        loss.backward(torch.ones_like(loss))
    assert head.grad is not None and loss.isfinite().all()
    assert allocated.operators  # the backward of some gradients runs outside an operator
    return allocated.found


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "options",
    [{**NARROW, "grad_weight": mode, "memory_budget": budget} for mode in MODES for budget in (None, 0)]
    + [{**way, "memory_budget": 0} for way in WAYS.values()]
    + [{"grad_weight": "accumulate", "memory_budget": 0, "mle_weight": 0.1}],
    ids=str,
)
def test_no_tensor_of_16_rows_by_the_vocabulary_is_made(options, reduction, compiled):
    assert allocations(compiled, 16 * 50_003, reduction=reduction, **options) == []


@every_way
def test_scratch_keeps_to_its_budget(options, compiled):
    """80 tokens' logits are 16 MB; no tensor beyond the budget of 4 MB."""
    assert allocations(compiled, (4 << 20) // 4 + 1, memory_budget=4 << 20, **options) == []


@pytest.mark.parametrize("options", [{}, {"subset": "full"}, {"mle_weight": 0.1}], ids=["caption", "full", "mixture"])
@pytest.mark.parametrize("grad_weight", ["dense", "accumulate"])
def test_under_autocast_the_head_is_converted_in_parts(options, grad_weight, compiled):
    """For four rows a panel's logits are few however wide it is; its rows of the head, in bfloat16, are not."""
    found = allocations(compiled, 50_003 * 96 // 4, H=96, autocast=True, memory_budget=0, grad_weight=grad_weight, **options)
    assert found == []


@every_way
@every_budget
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_prepared(options, memory_budget, off, compiled):
    """Though the parameters require them: an evaluation inside a training loop."""
    call = {k: v.float() if v.is_floating_point() else v for k, v in make_hidden(3, 6, 23, 5).items()}
    given = on(compiled, call)
    for name in INPUTS:
        given[name].requires_grad_()
    with fastcap.backend(compiled.backend), off(), WeightsMade(given["linear_weight"]) as watch:
        loss = F_cap.linear_subset_cross_entropy(**given, memory_budget=memory_budget, **options)
    [(name, (_, inv_denom, rows, *kept))] = watch.operators
    assert name == "fastcap::linear_subset_cross_entropy_fwd" and inv_denom.numel() == 1 and rows.numel() <= 18
    assert [tensor.numel() for tensor in kept] == [0] * 7
    assert watch.found == [] and not loss.requires_grad
    torch.testing.assert_close(loss.cpu(), by_logits(call, **options)[0].float(), rtol=1e-5, atol=1e-5)


def test_with_gradients_some_are_prepared(compiled):
    """Guards the test above: its watch sees them."""
    call = on(compiled, make_hidden(3, 6, 23, 5))
    for name in INPUTS:
        call[name].requires_grad_()
    with fastcap.backend(compiled.backend), WeightsMade(call["linear_weight"]) as watch:
        F_cap.linear_subset_cross_entropy(**call, subset="full").backward()
    [(_, kept), _] = watch.operators
    assert max(tensor.numel() for tensor in kept) == 18 * 23 and watch.found


MEASURE = """
import sys, torch, fastcap
from fastcap import functional as F_cap
from fastcap import nn
def high_water(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024
torch.set_num_threads(1)
B, T, V, H = 32, 20, 30_522, 64
h = torch.randn(B, T, H, requires_grad=True)
y = torch.randint(V, (B, T))
for options in eval(sys.argv[1]):
    with fastcap.backend("cpp"):
        head = torch.nn.Parameter(torch.randn(500, H))
        F_cap.linear_subset_cross_entropy(h, head, y % 500, **options).backward()  # the libraries' own scratch
        head = torch.nn.Parameter(torch.randn(V, H) / 8)
        if options.get("grad_weight") == "accumulate":
            head.grad = torch.ones(V, H)
        before = high_water(reset=True)
        F_cap.linear_subset_cross_entropy(h, head, y, **options).backward()
        print(high_water() - before)
"""
GRADIENT, LOGITS = 30_522 * 64 * 4, 640 * 30_522 * 4
MOST = [
    ({**NARROW, "grad_weight": "sparse"}, 10e6),
    ({**NARROW, "grad_weight": "accumulate"}, 10e6),
    (NARROW, GRADIENT + 10e6),
    ({"memory_budget": 0}, GRADIENT + 10e6),
    ({"subset": "full", "memory_budget": 0}, GRADIENT + 10e6),
    ({"mle_weight": 0.01, "memory_budget": 16 << 20}, GRADIENT + (16 << 20) + 10e6),
    ({"subset": "full", "memory_budget": 0, "grad_weight": "accumulate"}, 10e6),
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark of Linux's /proc")
def test_memory_is_the_gradient_the_budget_and_little_more(cpp):
    """640 tokens of BLIP's vocabulary, whose logits are 78 MB."""
    command = [sys.executable, "-c", MEASURE, repr([options for options, _ in MOST])]
    run = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__))
    assert run.returncode == 0, run.stderr
    used = [int(line) for line in run.stdout.split()]
    for (options, most), bytes_ in zip(MOST, used, strict=True):
        assert bytes_ < most < LOGITS / 2, (options, used)


# Of Triton's kernels alone ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request) -> str:
    status = fastcap.backends()["triton"]
    if not status:
        pytest.skip(f"backend triton: {status.reason}")
    return request.param


@pytest.mark.parametrize("sort", [False, True], ids=["compared", "sorted"])
def test_words_take_no_more_places_than_there_are_words(sort, triton_device, monkeypatch):
    """300 ids of 20 words: their sums are 20 rows of the head, not 300."""
    from fastcap.kernels import _word_sums

    class Sums(_word_sums.WordSums):
        V, plan, on = 20, None, torch.zeros(1, device=triton_device)

    monkeypatch.setattr(_word_sums, "MAX_COMPARED", 0 if sort else 300)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 22, (300,), generator=generator)  # 20 and 21 are no words
    source = torch.randn(100, 3, dtype=torch.float64, generator=generator)
    for given in (ids, ids.where(ids % 2 == 0, -1), torch.full_like(ids, -1)):
        sums = Sums()
        words = sums.group(given.to(triton_device))
        expected = sorted({*given.tolist()} - {-1, 20, 21})
        assert words.distinct.tolist() == expected + [-1] * (20 - len(expected))
        values = torch.zeros(20, 3, dtype=torch.float64, device=triton_device)
        sums.add_rows(values, words, 0, 300, None, source.to(triton_device), 3)
        exact = torch.stack([source.repeat_interleave(3, 0)[given == word].sum(0) for word in expected or [-2]])
        torch.testing.assert_close(values[: len(exact)].cpu(), exact, rtol=1e-12, atol=1e-12)
        assert (values[len(expected) :] == 0).all()


def precisions(*settings):
    """How float16, float32 and float64 are multiplied after these settings of torch.backends.cuda.matmul, one by one."""
    from fastcap.kernels._captions import _tiles

    for name, value in settings:
        setattr(torch.backends.cuda.matmul, name, value)
    y = torch.zeros(1, 2).long()
    return [_tiles(torch.zeros(2, 8, dtype=d), y)["PRECISION"] for d in (torch.float16, torch.float32, torch.float64)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], "ieee"),
        ([("allow_tf32", True)], "tf32"),
        ([("allow_tf32", False)], "ieee"),
        ([("fp32_precision", "tf32")], "tf32"),
        ([("fp32_precision", "ieee")], "ieee"),
        ([("allow_tf32", True), ("fp32_precision", "ieee")], "ieee"),
    ],
    ids=str,
)
def test_float32_is_multiplied_as_torch_has_been_told_in_either_way(settings, expected):
    """torch raises where the old setting is read after the new one was written; what was written cannot be taken back, so
    this runs in a process of its own."""
    pytest.importorskip("triton")
    if any(not hasattr(torch.backends.cuda.matmul, name) for name, _ in settings):
        pytest.skip("this torch does not know that setting")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(precisions, settings).get(30) == ["ieee", expected, "ieee"]


# Past 2^31 elements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_weight", ["sparse", "accumulate"])
def test_rows_past_two_to_the_31_elements_are_read_where_they_lie(grad_weight, cpp):
    """A weight of 2^31 elements and more, in memory that is reserved and, but for the caption's rows, never touched."""
    assert hasattr(torch.ops.fastcap, "linear_subset_cross_entropy_fwd")  # plain torch would touch all of it
    H = 4099
    V = 2**31 // H + 1000
    try:
        memory = torch.empty(V, H, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"4.3 GB of address space cannot be reserved: {error}")
    words = torch.tensor([V - 1, 5, V - 400, 2**31 // H + 3])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, H, generator=generator) / 64
    memory[words] = rows.bfloat16()
    head = torch.nn.Parameter(memory)
    h = torch.randn(1, 5, H, generator=generator).bfloat16()
    y = torch.tensor([[0, 2, 3, -100, 1]])
    target = words[y.clamp(min=0)].masked_fill(y < 0, -100)
    small = {"input": h, "linear_weight": memory[words], "target": y}
    exact = by_logits(small, torch.tensor(1.0), **NARROW)
    used = words
    if grad_weight == "accumulate":
        try:
            head.main_grad = torch.empty(V, H)
        except RuntimeError as error:
            pytest.skip(f"8.6 GB of address space cannot be reserved: {error}")
        head.main_grad[words] = 0.0
    with fastcap.backend("cpp"):
        x = h.clone().requires_grad_()
        loss = F_cap.linear_subset_cross_entropy(x, head, target, grad_weight=grad_weight, **NARROW)
        loss.backward()
    if grad_weight == "sparse":
        gradient, used = head.grad.coalesce().values(), words.sort().values
        assert head.grad.coalesce().indices()[0].tolist() == used.tolist()
    else:
        gradient = head.main_grad[words]
    order = torch.stack([(words == word).nonzero()[0, 0] for word in used])
    for what, a, e in (("loss", loss, exact[0]), ("input", x.grad, exact[1]), ("weight", gradient, exact[2][order])):
        assert_close_to_float64(a.detach().bfloat16(), e, e.bfloat16(), what)


def test_shapes_past_two_to_the_31_elements_are_traced(cpp):
    with FakeTensorMode():
        h = torch.empty(8, 1024, 2048, dtype=torch.bfloat16, requires_grad=True)
        head = torch.empty(2**21, 2048, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(2**21, dtype=torch.bfloat16, requires_grad=True)
        with fastcap.backend("cpp"):
            loss = F_cap.linear_subset_cross_entropy(
                h, head, torch.zeros(8, 1024).long(), linear_bias=bias, reduction="none"
            )
        gradients = torch.autograd.grad(loss, (h, head, bias), torch.ones_like(loss))
    assert loss.shape == (8, 1024)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in (h, head, bias)]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"subset": "full"}], ids=["caption", "full"])
def test_more_than_two_to_the_31_logits_and_weights_on_a_gpu(options, gpu):
    B, T, V, H = 4, 2200, 262_144, 8208
    free, _ = torch.cuda.mem_get_info()
    if free < 40e9:
        pytest.skip(f"needs 40 GB of GPU memory, {free / 1e9:.0f} GB are free")
    if gpu.backend == "cuda":
        pytest.skip("linear_subset_cross_entropy has no backend cuda")
    assert B * T * V > 2**31 and V * H > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    h = torch.empty(B, T, H, dtype=torch.bfloat16, device="cuda").normal_(generator=generator).requires_grad_()
    head = torch.empty(V, H, dtype=torch.bfloat16, device="cuda").normal_(std=0.02, generator=generator).requires_grad_()
    y = torch.randint(V, (B, T), device="cuda", generator=generator)
    with fastcap.backend(gpu.backend):
        loss = F_cap.linear_subset_cross_entropy(h, head, y, reduction="none", **options)
    dh, dweight = torch.autograd.grad(loss, (h, head), torch.ones_like(loss))
    assert dweight.isfinite().all()
    for b, t in ((0, 0), (0, 1), (3, 0), (3, T - 1)):
        words = torch.arange(V, device="cuda") if t == 0 or options else y[b].unique()
        row = h[b, t].detach().float().requires_grad_()
        logits = torch.cat([head.detach()[part].float() @ row for part in words.split(16_384)])
        exact = logits.logsumexp(0) - row @ head.detach()[y[b, t]].float()
        (d_row,) = torch.autograd.grad(exact, row)
        assert loss[b, t].item() == pytest.approx(exact.item(), rel=2**-7)
        torch.testing.assert_close(dh[b, t].float(), d_row, rtol=2**-5, atol=2**-7 * d_row.abs().max().item())


def test_the_module_keeps_its_options_and_calls_the_function():
    hidden, weight, bias = torch.randn(2, 5, 8), torch.randn(40, 8), torch.randn(40)
    target, factor = torch.randint(40, (2, 5)), torch.rand(2, 5)
    options = {"mle_weight": 0.2, "label_smoothing": 0.1, "reduction": "none", "memory_budget": 0}
    module = nn.LinearSubsetCrossEntropyLoss(subset=torch.tensor([3, 4]), weight=torch.rand(40), **options)
    expected = F_cap.linear_subset_cross_entropy(
        hidden, weight, target, linear_bias=bias, subset=torch.tensor([3, 4]), weight=module.weight, token_weight=factor,
        **options,
    )  # fmt: skip
    torch.testing.assert_close(module(hidden, weight, target, bias, factor), expected, rtol=0, atol=0)
    assert set(module.state_dict()) == {"subset_ids", "weight"} and "memory_budget=0" in repr(module)
    with pytest.raises(TypeError, match="smoothing"):
        nn.LinearSubsetCrossEntropyLoss(smoothing=0.1)
