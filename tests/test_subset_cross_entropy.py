"""subset_cross_entropy: worked numbers, laws, edges, and the paper's masked formulation written out again."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastcap
from fastcap import functional as F_cap
from fastcap import nn
from fastcap.ops import _subset
from fastcap.testing import OPERATIONS, assert_close_to_float64, make_captions, upstream

CASES = OPERATIONS["subset_cross_entropy"].cases()
DENSE = {"first_token": "full"}
NARROW = {"first_token": "subset"}
SUBSETS = ("caption", "reverse", "random", "full")


def loss_and_gradient(where, input, target, grad=None, **options):
    """Loss and d loss / d input on the CPU; `grad` is the upstream gradient, by default no two elements alike."""
    x = input.detach().to(where.device).requires_grad_()
    options = {k: v.to(where.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with fastcap.backend(where.backend):
        loss = F_cap.subset_cross_entropy(x, target.to(where.device), **options)
    (dx,) = torch.autograd.grad(loss, x, upstream(loss) if grad is None else grad.to(loss))
    return loss.detach().cpu(), dx.cpu()


def same(actual, expected, steps=64):
    """Equal up to `steps` roundings of the dtype, relative to the largest expected element."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        largest = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 0.0
        torch.testing.assert_close(a, e, rtol=0, atol=steps * torch.finfo(e.dtype).eps * largest, equal_nan=True)


# Worked by hand --------------------------------------------------------------------------------------------------------

# Logits are logs, so that softmaxes are fractions. One caption over five words; exp(z) of its three tokens:
EXP = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 10.0], [5.0, 1.0, 1.0, 2.0, 1.0], [2.0, 6.0, 1.0, 3.0, 8.0]]], dtype=torch.float64)
WORDS = torch.tensor([[3, 1, 3]])  # its words: {1, 3}
LOG = math.log
WORKED = {
    # candidates {1, 3}: 4 of 2 + 4; 1 of 1 + 2; 3 of 6 + 3
    "caption": (NARROW, [LOG(6 / 4), LOG(3 / 1), LOG(9 / 3)]),
    # the first token has all five words: 4 of 20
    "first token full": (DENSE, [LOG(20 / 4), LOG(3 / 1), LOG(9 / 3)]),
    # all but {1, 3}, and the target: 4 of 1 + 3 + 10 + 4; 1 of 5 + 1 + 1 + 1; 3 of 2 + 1 + 8 + 3
    "reverse": ({**NARROW, "subset": "reverse"}, [LOG(18 / 4), LOG(8 / 1), LOG(14 / 3)]),
    # ids {0, 4} and the target; -1 is no id, and 0 twice is 0 once: 4 of 1 + 10 + 4; 1 of 5 + 1 + 1; 3 of 2 + 8 + 3
    "ids": ({**NARROW, "subset": torch.tensor([0, -1, 4, 0])}, [LOG(15 / 4), LOG(7 / 1), LOG(13 / 3)]),
    # a quarter of log(sum / z_y) over all five words (sums 20, 10, 20) and three quarters of "caption"
    "mixture": (
        {**NARROW, "mle_weight": 0.25},
        [0.25 * LOG(20 / 4) + 0.75 * LOG(6 / 4), 0.25 * LOG(10) + 0.75 * LOG(3), 0.25 * LOG(20 / 3) + 0.75 * LOG(3)],
    ),
    # 0.8 of the target's and 0.2 of the mean over both candidates: log(6/4) and log(6/2); log 3 and log(3/2); ...
    "smoothing": (
        {**NARROW, "label_smoothing": 0.2},
        [
            0.8 * LOG(6 / 4) + 0.1 * (LOG(6 / 4) + LOG(6 / 2)),
            0.8 * LOG(3 / 1) + 0.1 * (LOG(3 / 1) + LOG(3 / 2)),
            0.8 * LOG(9 / 3) + 0.1 * (LOG(9 / 3) + LOG(9 / 6)),
        ],
    ),
    # plus half the square of the log of the candidates' sum: 6, 3, 9
    "z-loss": (
        {**NARROW, "z_loss": 0.5},
        [LOG(6 / 4) + 0.5 * LOG(6) ** 2, LOG(3) + 0.5 * LOG(3) ** 2, LOG(3) + 0.5 * LOG(9) ** 2],
    ),
    # class weights 2 for word 1, 3 for word 3 multiply the token's loss
    "class weights": (
        {**NARROW, "weight": torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0])},
        [3 * LOG(6 / 4), 2 * LOG(3), 3 * LOG(3)],
    ),
    "token weights": ({**NARROW, "token_weight": torch.tensor([[2.0, -1.0, 0.0]])}, [2 * LOG(6 / 4), -LOG(3), 0.0]),
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_example(name, target):
    options, expected = WORKED[name]
    loss, _ = loss_and_gradient(target, EXP.log(), WORDS, reduction="none", **options)
    torch.testing.assert_close(loss, torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=1e-15)
    total, _ = loss_and_gradient(target, EXP.log(), WORDS, reduction="sum", **options)
    assert total.item() == pytest.approx(sum(expected), rel=1e-13)
    mean, _ = loss_and_gradient(target, EXP.log(), WORDS, reduction="mean", **options)
    denominator = 3 + 2 + 3 if name == "class weights" else 3  # the sum of the targets' weights; token weights do not count
    assert mean.item() == pytest.approx(sum(expected) / denominator, rel=1e-13)


def test_worked_gradient(target):
    """p - 1 at the target and p at the other candidate, times each token's own upstream gradient; 0 elsewhere."""
    grad = torch.tensor([[1.0, 10.0, -3.0]], dtype=torch.float64)
    _, dx = loss_and_gradient(target, EXP.log(), WORDS, grad, reduction="none", **NARROW)
    expected = torch.tensor(
        [[[0, 2 / 6, 0, 4 / 6 - 1, 0], [0, 10 * (1 / 3 - 1), 0, 10 * 2 / 3, 0], [0, -3 * 6 / 9, 0, -3 * (3 / 9 - 1), 0]]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(dx, expected, rtol=1e-14, atol=1e-15)


# The masked formulation, written out -----------------------------------------------------------------------------------


def words_of(row, ignore_index):
    return {int(y) for y in row if int(y) != ignore_index}


def masked_formulation(
    x, target, *, subset="caption", first_token="full", mle_weight=0.0, weight=None, token_weight=None, ignore_index=-100,
    label_smoothing=0.0, logit_softcap=None, z_loss=0.0, num_random=10, seed=None, reduction="mean",
):  # fmt: skip
    """The paper's: a boolean mask made in Python loops, -inf outside it, log_softmax. Shares nothing with fastcap."""
    if x.dim() == 2:
        given = None if token_weight is None else token_weight[None]
        options = dict(
            subset=subset, first_token=first_token, mle_weight=mle_weight, weight=weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, logit_softcap=logit_softcap, z_loss=z_loss, num_random=num_random, seed=seed,
        )  # fmt: skip
        loss = masked_formulation(x[None], target[None], token_weight=given, reduction=reduction, **options)
        return loss[0] if reduction == "none" else loss
    B, T, V = x.shape
    z = x if logit_softcap is None else logit_softcap * (x / logit_softcap).tanh()
    w = torch.ones(V, dtype=x.dtype) if weight is None else weight
    everything = set(range(V))
    draws = (
        _subset.random_ids(B, T, num_random, V, seed, x.device) if isinstance(subset, str) and subset == "random" else None
    )

    def part(row, y, chosen):
        mask = torch.zeros(V, dtype=torch.bool)
        mask[list(chosen)] = True
        log_p = F.log_softmax(row.masked_fill(~mask, -torch.inf), -1)
        lse = row[mask].logsumexp(-1)
        smooth = -(w * log_p)[mask].sum() / len(chosen) if label_smoothing else 0.0
        return (1 - label_smoothing) * w[y] * -log_p[y] + label_smoothing * smooth + z_loss * w[y] * lse**2

    losses, denominator = [], 0.0
    for b in range(B):
        words, first = words_of(target[b], ignore_index), True
        for t in range(T):
            y = int(target[b, t])
            if y == ignore_index:
                losses.append(x.new_zeros(()))
                continue
            if isinstance(subset, torch.Tensor):
                chosen = {int(k) for k in (subset if subset.dim() == 1 else subset[b])} - {-1}
            elif subset == "random":
                chosen = {int(k) for k in draws[b, t]}
            else:
                chosen = {"caption": words, "reverse": everything - words, "full": everything}[subset]
            m = 1.0 if first and first_token == "full" else mle_weight
            loss = (m * part(z[b, t], y, everything) if m > 0 else 0.0) + (
                (1 - m) * part(z[b, t], y, chosen | {y}) if m < 1 else 0.0
            )
            if token_weight is not None:
                loss = loss * token_weight[b, t if token_weight.shape[1] > 1 else 0]
            losses.append(loss)
            denominator += float(w[y])
            first = False
    losses = torch.stack(losses).view(B, T) if losses else x.new_zeros(B, T)
    losses = losses + 0.0 * x.masked_fill(~x.isfinite(), 0.0).sum()  # keeps a graph where nothing is valid
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / denominator if denominator else 0.0 * total


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_equals_the_masked_formulation(case, target):
    x = case.arguments["input"].detach().requires_grad_()
    options = {k: v for k, v in case.arguments.items() if k not in ("input", "target")}
    exact = masked_formulation(x, case.arguments["target"], **options)
    (dx,) = torch.autograd.grad(exact, x, upstream(exact))
    loss, gradient = loss_and_gradient(target, **case.arguments)
    same((loss, gradient), (exact.detach(), dx))


# Equal to torch's cross entropy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("label_smoothing", "weighted", "ignore_index"),
    [(0.0, False, -100), (0.1, False, 3), (1.0, False, -100), (0.0, True, -1), (0.1, True, -100), (1.0, True, 3)],
)
def test_full_subset_is_torchs_cross_entropy(reduction, label_smoothing, weighted, ignore_index, target):
    x, y = make_captions(2, 3, 17, ignore_index=ignore_index)
    weight = torch.linspace(0.0, 2.0, 17, dtype=torch.float64) if weighted else None  # a weight of 0 is torch's too
    options = dict(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    leaf = x.clone().requires_grad_()
    exact = F.cross_entropy(leaf.flatten(0, 1), y.flatten(), **options)
    exact = exact.view(2, 3) if reduction == "none" else exact
    (dx,) = torch.autograd.grad(exact, leaf, upstream(exact))
    exact = exact.detach()
    for ours in ({"subset": "full"}, {"subset": "full", "first_token": "subset"}, {"mle_weight": 1.0}):
        same(loss_and_gradient(target, x, y, **ours, **options), (exact, dx))
    flat = loss_and_gradient(target, x.flatten(0, 1), y.flatten(), subset="full", **options)
    same(flat, (exact.flatten() if reduction == "none" else exact, dx.flatten(0, 1)))


def test_full_subset_takes_infinite_logits_as_torch_does(target):
    """-inf is a word that cannot be; as a target it costs infinity; a row of nothing else is NaN."""
    x = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[1, 2, 3, 4]])
    x[0, 0, [0, 5]] = -torch.inf
    x[0, 1, 2] = -torch.inf
    x[0, 2] = -torch.inf
    exact = F.cross_entropy(x[0], y[0], reduction="none")
    assert exact[1] == torch.inf and exact[2].isnan()
    loss, dx = loss_and_gradient(target, x, y, subset="full", reduction="none")
    same((loss[0],), (exact,))
    assert dx[0, 0].isfinite().all() and (dx[0, 0, [0, 5]] == 0).all() and dx[0, 3].isfinite().all()


@pytest.mark.parametrize("subset", ["full", "reverse"])
def test_whole_blocks_of_infinite_logits_add_nothing(subset, target):
    """A running maximum that is still -inf after a block must not turn exp(-inf - -inf) into NaN."""
    x = torch.randn(1, 2, 6200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[6150, 6199]])
    few = loss_and_gradient(target, x[..., 6100:], y - 6100, subset=subset, reduction="none", **NARROW)
    x[..., :6100] = -torch.inf
    loss, dx = loss_and_gradient(target, x, y, subset=subset, reduction="none", **NARROW)
    same((loss, dx[..., 6100:]), few)
    assert (dx[..., :6100] == 0).all() and loss.isfinite().all()


# Which words take part -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [NARROW, DENSE, {**NARROW, "label_smoothing": 0.3}], ids=["subset", "full", "smoothed"])
def test_duplicate_ids_count_once(options, target):
    """A caption's words said twice, and given ids said twice, are the same set."""
    x, _ = make_captions(1, 4, 9, prompt=0)
    twice = loss_and_gradient(target, x, torch.tensor([[5, 2, 5, 2]]), reduction="none", **options)
    given = loss_and_gradient(
        target, x, torch.tensor([[5, 2, 5, 2]]), subset=torch.tensor([2, 5, 5, 5, 2]), reduction="none", **options
    )
    once = loss_and_gradient(
        target, x, torch.tensor([[5, 2, 5, 2]]), subset=torch.tensor([5, 2]), reduction="none", **options
    )
    same(twice, once)
    same(given, once)


def test_pad_equal_to_end_of_sentence_is_told_apart_by_the_ignore_mask_alone(target):
    """GPT-2 pads with its end-of-sentence word: the one valid 7 is a candidate, the ignored positions are not read."""
    x = torch.randn(1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[3, 1, 7, -100, -100]])
    loss, dx = loss_and_gradient(target, x, y, reduction="none", **NARROW)
    log_p = F.log_softmax(x[0, :3][:, [1, 3, 7]], -1)
    same((loss[0, :3],), (-log_p[torch.arange(3), [1, 0, 2]],))
    assert (loss[0, 3:] == 0).all() and (dx[0, 3:] == 0).all()
    assert (dx[0, :3, 7] != 0).all()


def test_prompt_words_are_no_candidates_and_the_first_valid_token_is_the_full_one(target):
    x, _ = make_captions(2, 5, 12, prompt=0)
    y = torch.tensor([[-100, -100, 4, 6, 4], [-100, 9, 8, -100, 9]])
    loss, dx = loss_and_gradient(target, x, y, reduction="none")
    dense = [[False, False, True, False, False], [False, True, False, False, False]]
    words = [{4, 6}, {8, 9}]
    for b in range(2):
        for t in range(5):
            used = {v for v in range(12) if dx[b, t, v] != 0}
            assert used == (set() if y[b, t] == -100 else set(range(12)) if dense[b][t] else words[b])
    same((loss[0, 2],), (F.cross_entropy(x[0, 2], y[0, 2]),))


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_caption_of_ignored_tokens_gives_zero_loss_and_gradient(subset, reduction, target):
    x, y = make_captions(2, 4, 9)
    y[1] = -100
    options = dict(subset=subset, seed=1, mle_weight=0.2, label_smoothing=0.1, z_loss=0.1, reduction=reduction)
    loss, dx = loss_and_gradient(target, x, y, **options)
    alone, dx_alone = loss_and_gradient(target, x[:1], y[:1], upstream(loss)[:1] if reduction == "none" else None, **options)
    same((loss[:1] if reduction == "none" else loss, dx[:1]), (alone, dx_alone))
    assert (dx[1] == 0).all()
    nothing, dx = loss_and_gradient(target, x, torch.full_like(y, -100), **options)
    assert (nothing == 0).all() and (dx == 0).all()  # torch's cross_entropy gives NaN for "mean"


@pytest.mark.parametrize("options", [DENSE, NARROW, {"subset": "reverse"}, {"subset": "full"}], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("junk", [torch.nan, -torch.inf])
def test_ignored_rows_may_hold_anything(options, softcap, junk, target):
    x, y = make_captions(2, 4, 11)
    clean = loss_and_gradient(target, x, y, logit_softcap=softcap, label_smoothing=0.1, **options)
    dirty = loss_and_gradient(
        target, x.masked_fill((y == -100)[..., None], junk), y, logit_softcap=softcap, label_smoothing=0.1, **options
    )
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("first_token", ["full", "subset"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_logits_outside_the_candidates_may_be_anything(first_token, softcap, label_smoothing, junk, target):
    x, _ = make_captions(1, 4, 9, prompt=0)
    y = torch.tensor([[2, 5, 5, 3]])
    options = dict(first_token=first_token, logit_softcap=softcap, label_smoothing=label_smoothing, reduction="none")
    clean = loss_and_gradient(target, x, y, **options)
    rows = slice(1 if first_token == "full" else 0, None)  # a full row reads them all
    x[0, rows, [0, 1, 4, 6, 7, 8]] = junk
    dirty = loss_and_gradient(target, x, y, **options)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_random_ids_are_those_of_the_seed_and_uniform():
    first, again = (_subset.random_ids(2, 3, 5, 1000, 3, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (2, 3, 5)
    assert not torch.equal(first, _subset.random_ids(2, 3, 5, 1000, 4, torch.device("cpu")))
    many = _subset.random_ids(10, 100, 100, 10, 0, torch.device("cpu"))
    counts = many.flatten().bincount(minlength=10).double()
    assert counts.numel() == 10 and many.min() >= 0
    assert (((counts - 10_000) ** 2 / 10_000).sum() < 33.7).item()  # chi-square of 9 degrees at 1e-4
    wide = _subset.random_ids(10, 100, 100, 262_144, 0, torch.device("cpu")).flatten()
    assert 0 <= wide.min() < 40 and 262_144 - 40 < wide.max() < 262_144
    assert wide.unique().numel() > 80_000  # of 100,000 draws about 83,000 differ
    torch.manual_seed(5)
    unseeded = _subset.random_ids(1, 2, 9, 10**6, None, torch.device("cpu"))
    assert not torch.equal(unseeded, _subset.random_ids(1, 2, 9, 10**6, None, torch.device("cpu")))
    torch.manual_seed(5)
    assert torch.equal(unseeded, _subset.random_ids(1, 2, 9, 10**6, None, torch.device("cpu")))


def test_random_ids_are_drawn_anew_at_each_call_compiled_or_not(target):
    torch._dynamo.reset()
    x, y = torch.randn(2, 6, 50).to(target.device), torch.randint(50, (2, 6)).to(target.device)

    def call(x):
        return F_cap.subset_cross_entropy(x, y, subset="random", num_random=3, reduction="sum")

    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        with fastcap.backend(target.backend):
            assert len({function(x).item() for _ in range(4)}) == 4


@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_candidate_costs_exactly_nothing(softcap, dtype, target):
    """The log-sum-exp over one word is its logit: also where the two come from different loops over capped logits."""
    x, _ = make_captions(1, 5, 40, prompt=0)
    x, y = x.to(dtype), torch.full((1, 5), 7)
    loss, dx = loss_and_gradient(target, x, y, logit_softcap=softcap, reduction="none", **NARROW)
    assert (loss == 0).all() and (dx == 0).all()
    one = x[..., 7:8]
    loss, dx = loss_and_gradient(target, one, torch.zeros_like(y), logit_softcap=softcap, subset="full", reduction="none")
    assert (loss == 0).all() and (dx == 0).all()


# Laws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [DENSE, {**NARROW, "mle_weight": 0.3}, {"subset": "reverse"}], ids=str)
def test_permuting_captions_permutes_losses(options, target):
    x, y = make_captions(4, 6, 19)
    order = torch.tensor([2, 0, 3, 1])
    loss, dx = loss_and_gradient(target, x, y, torch.ones(4, 6), reduction="none", **options)
    permuted, dx_permuted = loss_and_gradient(target, x[order], y[order], torch.ones(4, 6), reduction="none", **options)
    assert torch.equal(permuted, loss[order]) and torch.equal(dx_permuted, dx[order])


@pytest.mark.parametrize("subset", SUBSETS)
def test_adding_a_constant_to_a_row_changes_nothing_and_gradient_rows_sum_to_zero(subset, target):
    x, y = make_captions(2, 6, 19)
    options = dict(subset=subset, seed=2, mle_weight=0.2, label_smoothing=0.1, reduction="none")
    loss, dx = loss_and_gradient(target, x, y, **options)
    shift = torch.linspace(-40, 90, 12, dtype=torch.float64).view(2, 6, 1)
    same(loss_and_gradient(target, x + shift, y, **options), (loss, dx), steps=500)  # the shift's own rounding
    assert dx.abs().max() > 0.1
    assert (dx.sum(-1).abs() < 1e-14).all()


def test_per_token_gradients_keep_their_own_upstream_gradient(target):
    """Each row alone, scaled by its own upstream gradient: not by the first row's (Liger-Kernel #968, #1298)."""
    x, y = make_captions(2, 5, 9)
    for options in (DENSE, NARROW, {"subset": "reverse"}, {"subset": "full"}):
        _, ones = loss_and_gradient(target, x, y, torch.ones(2, 5), reduction="none", **options)
        grad = torch.tensor([[0.0, 3.0, -1.0, 0.5, 9.0], [2.0, 0.0, 7.0, -4.0, 1.0]], dtype=torch.float64)
        _, dx = loss_and_gradient(target, x, y, grad, reduction="none", **options)
        same((dx,), (ones * grad[..., None],))
        _, summed = loss_and_gradient(target, x, y, torch.tensor(-2.5), reduction="sum", **options)
        same((summed,), (ones * -2.5,))


@pytest.mark.parametrize("shape", ["token", "caption"])
@pytest.mark.parametrize("options", [DENSE, {"subset": "reverse", "mle_weight": 0.3}], ids=str)
def test_token_weight_multiplies_each_loss_and_mean_divides_by_the_number_of_tokens(shape, options, target):
    x, y = make_captions(3, 5, 9)
    factor = torch.tensor([[2.0], [-1.5], [1.0]], dtype=torch.float64)
    if shape == "token":
        factor = factor * torch.tensor([1.0, 0.0, -3.0, 0.25, 4.0], dtype=torch.float64)
    loss, dx = loss_and_gradient(target, x, y, torch.ones(3, 5), reduction="none", **options)
    weighted, dx_weighted = loss_and_gradient(
        target, x, y, torch.ones(3, 5), reduction="none", token_weight=factor, **options
    )
    same((weighted, dx_weighted), (loss * factor, dx * factor[..., None]))
    mean, dx_mean = loss_and_gradient(target, x, y, torch.tensor(1.0), token_weight=factor, **options)
    n = (y != -100).sum()
    same((mean, dx_mean), ((loss * factor).sum() / n, dx * factor[..., None] / n))


def test_class_weights_that_cancel_keep_the_smoothing_gradient(target):
    """A row whose target weighs 0 and whose weights sum to 0 still has a gradient, as in torch."""
    x = torch.randn(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, weight = torch.tensor([[0, 0]]), torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    exact = F.cross_entropy(x[0], y[0], weight=weight, label_smoothing=0.3, reduction="sum")
    (dx,) = torch.autograd.grad(exact, x)
    assert dx.abs().max() > 0.05
    result = loss_and_gradient(
        target, x, y, torch.tensor(1.0), subset="full", weight=weight, label_smoothing=0.3, reduction="sum"
    )
    same(result, (exact.detach(), dx))


# Numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("subset", ["caption", "full", "reverse"])
def test_large_logits_neither_overflow_nor_lose_the_loss(dtype, subset, target, reference):
    """Logits of +-20,000 (finite in float16): exp overflows without a running maximum, -1e9 would not fit."""
    x, y = make_captions(2, 4, 9, scale=6000.0)
    x = x.clamp(-20_000, 20_000).to(dtype)
    exact = loss_and_gradient(reference, x.double(), y, subset=subset)
    loss, dx = loss_and_gradient(target, x, y, subset=subset)
    assert loss.isfinite() and dx.isfinite().all()
    assert_close_to_float64(loss, exact[0], exact[0].to(dtype), "loss")
    assert_close_to_float64(dx, exact[1], exact[1].to(dtype), "gradient")


def test_half_precision_gradients_are_the_float32_ones_rounded(cpp):
    """Every float16 is read right, and every kind of float32 (subnormal halves, ties, overflow) is rounded right.

    With one word p = 1, so with z_loss c the loss is c z^2 and its gradient 2 c z: halves in, chosen floats out.
    """
    for dtype in (torch.float16, torch.bfloat16):
        z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        z = z[z.isfinite()]
        with fastcap.backend(cpp.backend), torch.autocast("cpu", dtype=torch.bfloat16):  # autocast: the loss stays float32
            x = z.view(1, -1, 1).clone().requires_grad_()
            target = torch.zeros(1, z.numel(), dtype=torch.int64)
            loss = F_cap.subset_cross_entropy(x, target, subset="full", z_loss=0.5, reduction="none")
        assert loss.dtype == torch.float32
        assert torch.equal(loss.detach().flatten(), 0.5 * z.float() * z.float())
        x = torch.ones(1, z.numel(), 1, dtype=dtype, requires_grad=True)
        with fastcap.backend(cpp.backend), torch.autocast("cpu", dtype=torch.bfloat16):
            for subset in ("full", torch.tensor([0])):  # dense rows are written in blocks, set rows one by one
                loss = F_cap.subset_cross_entropy(
                    x, target, subset=subset, first_token="subset", z_loss=0.5, reduction="none"
                )
                bits = torch.randint(-(2**31), 2**31, loss.shape, generator=torch.Generator().manual_seed(0))
                grad = bits.to(torch.int32).view(torch.float32)
                ties = torch.arange(loss.numel()).view(loss.shape) * 2.0**-26  # halves' subnormals and their midpoints
                if isinstance(subset, str):  # a dense row's gradient is 2 g - g
                    grad = grad.where(grad.abs() < 1.7e38, 0.0)
                for g in (grad, ties):
                    (dx,) = torch.autograd.grad(loss, x, g, retain_graph=True)
                    torch.testing.assert_close(dx.flatten(), g.to(dtype).flatten(), rtol=0, atol=0, equal_nan=True)


def test_loss_in_half_precision_is_summed_in_float32(compiled):
    """4,096 tokens of log 2: a bfloat16 sum would stop growing at 256."""
    x = torch.zeros(64, 64, 3, dtype=torch.bfloat16)
    y = (torch.arange(64) % 2).expand(64, 64)
    loss, _ = loss_and_gradient(compiled, x, y, reduction="sum", **NARROW)
    assert loss.item() == pytest.approx(4096 * LOG(2), rel=2**-8)


@pytest.mark.parametrize("V", [2047, 2048, 2049, 4096, 4097])
def test_vocabularies_at_the_edge_of_a_block(V, fused, reference):
    x, y = make_captions(1, 3, V, seed=V, prompt=0)
    y[0, 2] = V - 1
    for options in (DENSE, {"subset": "reverse", "label_smoothing": 0.1}):
        exact = loss_and_gradient(reference, x, y, reduction="none", **options)
        same(loss_and_gradient(fused, x, y, reduction="none", **options), exact)


def test_long_captions_and_large_ids(compiled):
    """More words in a caption than are compared pairwise, and ids beyond 16 bits."""
    V = 200_001
    x = torch.randn(2, 80, V, generator=torch.Generator().manual_seed(0))
    y = torch.randint(V - 60, V, (2, 80), generator=torch.Generator().manual_seed(1))
    y[1, 70:] = -100
    loss, dx = loss_and_gradient(compiled, x, y, reduction="none", **NARROW)
    exact = masked_formulation(
        x[..., V - 60 :].double().requires_grad_(), (y - (V - 60)).masked_fill(y == -100, -100), reduction="none", **NARROW
    )  # no other word takes part
    assert_close_to_float64(loss, exact.detach(), exact.detach().float(), "loss")
    assert (dx[..., : V - 60] == 0).all() and (dx[0, :, V - 60 :] != 0).any(-1).all()


def test_the_result_does_not_depend_on_the_number_of_threads(cpp):
    before = torch.get_num_threads()
    x, y = make_captions(8, 12, 5003)
    x = x.float()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for options in (DENSE, NARROW, {"subset": "reverse", "mle_weight": 0.1}):
                results.append(loss_and_gradient(cpp, x, y, **options))
    finally:
        torch.set_num_threads(before)
    for i, (loss, dx) in enumerate(results):
        assert torch.equal(loss, results[i % 3][0]) and torch.equal(dx, results[i % 3][1])


# Autograd and memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [DENSE, NARROW], ids=str)
def test_double_backward_is_a_clear_error(options, fused):
    x, y = make_captions(2, 4, 9)
    x = x.to(fused.device).requires_grad_()
    with fastcap.backend(fused.backend):
        loss = F_cap.subset_cross_entropy(x, y.to(fused.device), **options)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastcap\.subset_cross_entropy: the gradient must not be differentiated again"):
        dx.square().sum().backward()


def test_double_backward_works_on_the_reference():
    x, y = make_captions(2, 3, 5)
    with fastcap.backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda z: F_cap.subset_cross_entropy(z, y, label_smoothing=0.1), x.requires_grad_()
        )


def test_the_logits_are_freed_after_a_forward_that_needs_them_no_more(fused):
    """With first_token="subset" and no mixture the backward writes from saved pairs alone; with a full row it keeps them."""
    x, y = make_captions(2, 5, 300)
    for options, kept in ((NARROW, False), ({**NARROW, "subset": "random"}, False), (DENSE, True)):
        leaf = x.to(fused.device).requires_grad_()
        logits = leaf * 1.0
        alive = weakref.ref(logits)
        with fastcap.backend(fused.backend):
            loss = F_cap.subset_cross_entropy(logits, y.to(fused.device), **options)
        saved = [t for t in loss.grad_fn.saved_tensors if t is not None]
        assert any(t.data_ptr() == logits.data_ptr() for t in saved) == kept
        assert (max(t.numel() for t in saved) >= x.numel()) == kept
        del logits, saved
        assert kept or alive() is None
        loss.backward()
        assert leaf.grad.isfinite().all() and (leaf.grad != 0).any()


class Results(TorchDispatchMode):
    """What fastcap's operators return."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastcap":
            self.found.append(out)
        return out


@pytest.mark.parametrize("options", [DENSE, NARROW, {"mle_weight": 0.1}], ids=str)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_without_gradients_none_are_prepared(options, off, fused):
    """Though the logits require them: an evaluation of what is being trained."""
    x, y = make_captions(2, 3, 9)
    x = x.to(fused.device).requires_grad_()
    with fastcap.backend(fused.backend), off(), Results() as results:
        loss = F_cap.subset_cross_entropy(x, y.to(fused.device), **options)
    [(_, _, *kept)] = results.found
    wanted = off is contextlib.nullcontext
    assert loss.requires_grad == wanted and any(tensor.numel() > 0 for tensor in kept) == wanted


MEASURE = """
import sys, torch, fastcap
from fastcap import functional as F_cap
def high_water(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024
B, T, V = 32, 20, 30_522
options = eval(sys.argv[1])
x = torch.randn(B, T, V, requires_grad=True)
y = torch.randint(V, (B, T))
small = torch.randn(2, 3, 50, requires_grad=True)
F_cap.subset_cross_entropy(small, y[:2, :3] % 50, **options).backward()
with fastcap.backend("cpp"):
    before = high_water(reset=True)
    loss = F_cap.subset_cross_entropy(x, y, **options)
    forward = high_water() - before
    torch.autograd.grad(loss, x)
print(forward, high_water() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark of Linux's /proc")
@pytest.mark.parametrize(
    "options", [DENSE, NARROW, {"subset": "reverse"}, {"mle_weight": 0.01, "label_smoothing": 0.1}], ids=str
)
def test_memory_is_the_gradient_and_little_more(options, cpp):
    """BLIP's shape: the masked formulation needs several tensors of 78 MB; ours the gradient, with at most one 2 MiB page
    of rounding at its ends, and 2 MB."""
    command = [sys.executable, "-c", MEASURE, repr(options)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__))
    assert result.returncode == 0, result.stderr
    forward, both = map(int, result.stdout.split())
    gradient = 32 * 20 * 30_522 * 4
    assert forward < 2e6
    assert gradient * 0.9 < both < gradient + 2 * 2**20 + 2e6


# The module ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subset": "random", "seed": 3, "num_random": 4, "reduction": "none"},
        {"subset": torch.tensor([1, 2, -1]), "mle_weight": 0.3, "first_token": "subset", "reduction": "sum"},
        {"subset": "full", "weight": torch.linspace(0.5, 2, 9), "label_smoothing": 0.1, "ignore_index": 2},
        {"subset": "reverse", "logit_softcap": 5.0, "z_loss": 0.1},
    ],
    ids=str,
)
def test_the_module_is_the_function(options):
    x, y = make_captions(2, 4, 9)
    x, factor = x.float(), torch.tensor([[2.0], [-1.0]])
    y = y.masked_fill(y == -100, options.get("ignore_index", -100))
    module = nn.SubsetCrossEntropyLoss(**options)
    assert torch.equal(module(x, y), F_cap.subset_cross_entropy(x, y, **options))
    weighted = F_cap.subset_cross_entropy(x, y, token_weight=factor, **options)
    assert torch.equal(module(x, y, factor), weighted)
    assert torch.equal(module(x, y, token_weight=factor), weighted)


def test_the_module_moves_and_saves_its_buffers():
    module = nn.SubsetCrossEntropyLoss(subset=torch.tensor([1, 4]), weight=torch.rand(9), mle_weight=0.25)
    assert set(module.state_dict()) == {"subset_ids", "weight"} and not list(module.parameters())
    other = nn.SubsetCrossEntropyLoss(subset=torch.tensor([0, 0]), weight=torch.zeros(9), mle_weight=0.25)
    other.load_state_dict(module.state_dict())
    x, y = make_captions(2, 4, 9)
    assert torch.equal(module(x, y), other(x, y))
    module.double()
    assert module.weight.dtype == torch.float64 and module.subset_ids.dtype == torch.int64
    module.to("meta")
    assert module.weight.is_meta and module.subset_ids.is_meta
    assert nn.SubsetCrossEntropyLoss().state_dict() == {}
    shown = repr(nn.SubsetCrossEntropyLoss(mle_weight=0.25)) + repr(module)
    assert "subset='caption'" in shown and "mle_weight=0.25" in shown and "ids [2]" in shown


def test_the_modules_defaults_are_the_functions():
    import inspect

    ours = inspect.signature(nn.SubsetCrossEntropyLoss.__init__).parameters
    theirs = inspect.signature(F_cap.subset_cross_entropy).parameters
    shared = [name for name in theirs if name not in ("input", "target", "token_weight")]
    assert [name for name in ours if name != "self"] == shared
    assert all(ours[name].default == theirs[name].default for name in shared)


# Any shape, stride, dtype and option -----------------------------------------------------------------------------------


def draw_call(draw, st):
    """Arguments of one call, and whether float64 can check it without rounding."""
    B, T, V = draw(st.integers(0, 3)), draw(st.integers(0, 6)), draw(st.integers(1, 24))
    seed, ignore_index = draw(st.integers(0, 999)), draw(st.sampled_from([-100, -1, 0, 2]))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    order = draw(st.permutations([0, 1, 2]))
    step = draw(st.sampled_from([1, 2]))
    shape = [B, T, V]
    x = torch.randn([shape[i] * step for i in order], generator=generator, dtype=torch.float64) * draw(
        st.sampled_from([0.1, 3.0])
    )
    x = x.to(dtype)[tuple(slice(None, None, step) for _ in order)].permute([order.index(i) for i in range(3)])
    y = torch.randint(max(1, min(V, draw(st.integers(1, 24)))), (T, B), generator=generator).t()
    y = y.masked_fill(torch.rand(B, T, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0])), ignore_index)
    kind = draw(st.sampled_from(["caption", "full", "reverse", "random", "shared ids", "own ids"]))
    subset = kind
    if kind.endswith("ids"):
        K = draw(st.integers(0, 70))
        subset = torch.randint(-1, V, (B, K) if kind == "own ids" else (K,), generator=generator)
    weight = draw(st.sampled_from([None, torch.rand(V, generator=generator, dtype=torch.float64) + 0.1]))
    factor = draw(st.sampled_from([None, (B, T), (B, 1)]))
    return {
        "input": x, "target": y, "subset": subset, "ignore_index": ignore_index, "seed": seed,
        "weight": None if weight is None else weight.to(dtype),
        "token_weight": None if factor is None else torch.randn(factor, generator=generator).to(dtype),
        "num_random": draw(st.integers(1, 12)), "first_token": draw(st.sampled_from(["full", "subset"])),
        "mle_weight": draw(st.sampled_from([0.0, 0.25, 1.0])), "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "logit_softcap": draw(st.sampled_from([None, 2.0])), "z_loss": draw(st.sampled_from([0.0, 0.1])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }  # fmt: skip


def fuzz(where, reference, examples, **settings):
    hypothesis = pytest.importorskip("hypothesis")
    quiet, phases = list(hypothesis.HealthCheck), list(hypothesis.Phase)
    if where == ("cpu", "triton"):
        phases.remove(hypothesis.Phase.shrink)  # minutes in the interpreter; cpp, which shares the options, shrinks

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=quiet, phases=phases, **settings
    )
    @hypothesis.given(hypothesis.strategies.composite(lambda draw: draw_call(draw, hypothesis.strategies))())
    def holds(arguments):
        dtype = arguments["input"].dtype
        wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
        leaf = wide.pop("input").detach().requires_grad_()
        exact = masked_formulation(leaf, wide.pop("target"), **wide)
        (dx,) = torch.autograd.grad(exact, leaf, upstream(exact.to(dtype)).double())
        plain = loss_and_gradient(reference, **arguments)
        for a, e, p in zip(loss_and_gradient(where, **arguments), (exact.detach(), dx), plain, strict=True):
            assert a.dtype == dtype
            assert_close_to_float64(a, e, p, size=max(1.0, leaf.detach().abs().max().item() if leaf.numel() else 0.0))

    holds()


def test_any_call_agrees_with_the_masked_formulation(fused, reference):
    fuzz(fused, reference, 20 if fused.device == "cpu" and fused.backend == "triton" else 200, derandomize=True)


@pytest.mark.slow
def test_very_many_calls_agree_with_the_masked_formulation(fused, reference):
    fuzz(fused, reference, 3000)


# On a GPU only ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", [DENSE, NARROW], ids=str)
def test_forward_and_backward_are_at_most_three_launches(options, gpu):
    B, T, V = 32, 20, 30_522
    x = torch.randn(B, T, V, device="cuda", requires_grad=True)
    y, grad = torch.randint(V, (B, T), device="cuda"), torch.ones((), device="cuda")

    def step():
        with fastcap.backend(gpu.backend):
            torch.autograd.grad(F_cap.subset_cross_entropy(x, y, **options), x, grad)

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(launched) <= 3, launched


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(gpu):
    B, T, V = 4, 2200, 262_144
    free, _ = torch.cuda.mem_get_info()
    if free < 14e9:
        pytest.skip(f"needs 14 GB of GPU memory, {free / 1e9:.0f} GB are free")
    assert B * T * V > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(B, T, V, dtype=torch.bfloat16, device="cuda").normal_(generator=generator).requires_grad_()
    y = torch.randint(V, (B, T), device="cuda", generator=generator)
    with fastcap.backend(gpu.backend):
        loss = F_cap.subset_cross_entropy(x, y, reduction="none")
    (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    for b, t in ((0, 0), (0, 1), (3, 0), (3, 1), (3, T - 1)):
        row = x[b, t].detach().double().requires_grad_()
        words = torch.arange(V, device="cuda") if t == 0 else y[b].unique()
        exact = row[words].logsumexp(0) - row[y[b, t]]
        (d_row,) = torch.autograd.grad(exact, row)
        assert_close_to_float64(loss[b, t], exact.detach(), exact.detach().bfloat16(), f"loss {b, t}")
        assert_close_to_float64(dx[b, t], d_row, d_row.bfloat16(), f"gradient {b, t}")
    assert (dx[3, T - 1] != 0).sum() <= y[3].unique().numel()


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", [-1, 9, 2**40, -(2**62)])
@pytest.mark.parametrize("subset", SUBSETS)
def test_a_target_out_of_range_gives_nan_and_no_wrong_read(wrong, subset, gpu, monkeypatch):
    monkeypatch.delenv("FASTCAP_CHECK", raising=False)
    x, y = make_captions(3, 5, 9, prompt=0)
    y[1, 2] = wrong
    loss, dx = loss_and_gradient(gpu, x, y, subset=subset, reduction="none", **NARROW)
    assert loss[1, 2].isnan()
    assert loss[0].isfinite().all() and dx[0].isfinite().all()
    total, _ = loss_and_gradient(gpu, x, y, subset=subset, **NARROW)
    assert total.isnan()
    torch.cuda.synchronize()  # an illegal access would raise here


@pytest.mark.gpu
def test_ids_out_of_range_give_nan_and_fastcap_check_names_them(gpu, monkeypatch):
    x, y = make_captions(2, 5, 9, prompt=0)
    for wrong in (9, -2, 2**40):
        ids = torch.tensor([1, wrong])
        monkeypatch.delenv("FASTCAP_CHECK", raising=False)
        assert loss_and_gradient(gpu, x, y, subset=ids, **NARROW)[0].isnan()
        monkeypatch.setenv("FASTCAP_CHECK", "1")
        with pytest.raises(fastcap.FastcapError, match=f"subset must lie in .* got {wrong}"):
            loss_and_gradient(gpu, x, y, subset=ids, **NARROW)
    y[1, 1] = 9
    with pytest.raises(fastcap.FastcapError, match="target must lie in .* got 9"):
        loss_and_gradient(gpu, x, y)
