"""additive_attention: worked numbers, laws, edges, many steps against separate calls, what is kept, and errors."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import sys
import traceback

import pytest
import torch

import fastcap
from fastcap import functional as F_cap
from fastcap.errors import FastcapError
from fastcap.testing import OPERATIONS, Allocations, assert_close_to_float64, upstream
from fastcap.testing.additive import make_locations, make_mask, plan_additive_attention

OPERATION = OPERATIONS["additive_attention"]
INPUTS = ("keys", "query", "v", "values")
LOG = math.log
nan, inf = float("nan"), float("inf")
interpreting = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@pytest.fixture
def target(target):
    if target.backend not in OPERATION.backends:
        pytest.skip(f"additive_attention has no backend {target.backend}")
    return target


@pytest.fixture
def fused(fused):
    if fused.backend not in OPERATION.backends:
        pytest.skip(f"additive_attention has no backend {fused.backend}")
    return fused


@pytest.fixture
def compiled(compiled):
    if compiled.backend not in OPERATION.backends:
        pytest.skip(f"additive_attention has no backend {compiled.backend}")
    return compiled


def on(where, tensors, dtype=None):
    """The tensors on a target's device, the floating ones in `dtype` and leaves that require a gradient."""
    moved = {}
    for name, tensor in tensors.items():
        moved[name] = tensor.detach().to(where.device, dtype if tensor.is_floating_point() else None, copy=True)
        if tensor.is_floating_point():
            moved[name].requires_grad_()
    return moved


def attention(where, given, **options):
    with fastcap.backend(where.backend):
        return F_cap.additive_attention(**given, **options)


def gradients(outputs, leaves, upstreams=None):
    outputs = list(outputs)
    upstreams = [upstream(o) for o in outputs] if upstreams is None else upstreams
    return torch.autograd.grad(outputs, list(leaves), upstreams)


def same(actual, expected, steps=64):
    """Equal up to `steps` roundings of the dtype, relative to the largest expected element."""
    for a, e in zip(actual, expected, strict=True):
        e = e.to(a)
        assert a.shape == e.shape
        largest = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(a.detach(), e.detach(), rtol=0, atol=steps * torch.finfo(e.dtype).eps * largest)


# Worked by hand --------------------------------------------------------------------------------------------------------

# Scores are logs of whole numbers, so that weights are fractions.
WORKED = {
    # relu(keys + query): (0, 0), (log 2, 0), (log 2, log 5/2); scores log 1, log 2, log 5. The context's gradient (1, 2)
    # times the values: 8, 16, -8, whose mean under alpha is 0; so the scores' gradient is 8/8, 16 2/8, -8 5/8 = 1, 4, -5.
    "relu": {
        "keys": [[-1.0, 1.0], [LOG(2) - 1, 0.0], [LOG(2) - 1, 1 + LOG(2.5)]], "query": [1.0, -1.0], "v": [1.0, 1.0],
        "values": [[8.0, 0.0], [0.0, 8.0], [8.0, -8.0]], "dcontext": [1.0, 2.0],
        "alpha": [1 / 8, 2 / 8, 5 / 8], "context": [6.0, -3.0],
        "dkeys": [[0.0, 0.0], [4.0, 0.0], [-5.0, -5.0]], "dquery": [-1.0, -5.0],
        "dv": [4 * LOG(2) - 5 * LOG(2), -5 * LOG(2.5)],
        "dvalues": [[1 / 8, 2 / 8], [2 / 8, 4 / 8], [5 / 8, 10 / 8]],
    },
    # tanh(keys + query): 0, 1/4, 1/2, times 4 log 2: scores log 1, log 2, log 4. The values times 1: 7, 14, -7, of mean 1;
    # the scores' gradient is 6 1/7, 13 2/7, -8 4/7, and the slopes of tanh are 1, 15/16, 3/4.
    "tanh": {
        "keys": [[0.5], [0.5 + math.atanh(0.25)], [0.5 + math.atanh(0.5)]], "query": [-0.5], "v": [4 * LOG(2)],
        "values": [[7.0], [14.0], [-7.0]], "dcontext": [1.0],
        "alpha": [1 / 7, 2 / 7, 4 / 7], "context": [1.0],
        "dkeys": [[4 * LOG(2) * 6 / 7], [4 * LOG(2) * 26 / 7 * 15 / 16], [4 * LOG(2) * -32 / 7 * 3 / 4]],
        "dquery": [4 * LOG(2) * (6 / 7 + 26 / 7 * 15 / 16 - 32 / 7 * 3 / 4)], "dv": [26 / 7 / 4 - 32 / 7 / 2],
        "dvalues": [[1 / 7], [2 / 7], [4 / 7]],
    },
}  # fmt: skip


@pytest.mark.parametrize("activation", WORKED)
def test_worked_numbers(activation, target):
    row = {name: torch.tensor(value, dtype=torch.float64) for name, value in WORKED[activation].items()}
    given = on(target, {name: row[name] if name == "v" else row[name][None] for name in INPUTS})
    context, alpha = attention(target, given, activation=activation)
    torch.testing.assert_close(context[0].detach().cpu(), row["context"])
    torch.testing.assert_close(alpha[0].detach().cpu(), row["alpha"])
    dkeys, dquery, dv, dvalues = torch.autograd.grad(context, given.values(), row["dcontext"][None].to(context))
    for actual, name in ((dkeys[0], "dkeys"), (dquery[0], "dquery"), (dv, "dv"), (dvalues[0], "dvalues")):
        torch.testing.assert_close(actual.cpu(), row[name], msg=lambda m, name=name: f"{name}: {m}")


# Against plain torch ---------------------------------------------------------------------------------------------------


def plain(keys, query, v, values, activation="tanh", mask=None):
    """The documented formula: NaN where no location counts."""
    scores = (torch.tanh if activation == "tanh" else torch.relu)(keys + query[:, None]) @ v
    alpha = (scores if mask is None else scores.masked_fill(~mask, -inf)).softmax(1)
    return (alpha[:, None] @ values).squeeze(1), alpha


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("locations", ["one", "some", "all"])
def test_equals_the_documented_formula(activation, locations, target):
    B, L = 5, 9
    given = on(target, make_locations(B, L, 7, 6, seed=3))
    mask = {
        "one": torch.arange(L) == torch.tensor([0, 8, 3, 3, 5])[:, None],
        "some": make_mask(B, L, seed=1).index_fill(0, torch.tensor([0]), True),
        "all": torch.ones(B, L, dtype=torch.bool),
    }[locations].to(target.device)
    expected = plain(**given, activation=activation, mask=mask)
    actual = attention(target, given, activation=activation, mask=mask)
    same(actual, expected)
    same(gradients(actual, given.values()), gradients(expected, given.values()))
    if locations == "one":
        assert torch.equal(actual[1], mask.double())


def test_any_shapes_and_strides_equal_the_documented_formula(fused):
    draw = random.Random(0)
    for seed in range(8 if fused == ("cpu", "triton") else 60):
        B, L, A, D = draw.randint(1, 5), draw.randint(1, 70), draw.randint(1, 40), draw.randint(1, 90)
        dtype = draw.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16))
        activation = draw.choice(("tanh", "relu"))
        tensors = make_locations(B, L, A, D, seed=seed)
        mask = make_mask(B, L, seed=seed) if draw.random() < 0.5 else None
        rounded = on(fused, tensors, dtype)
        given = dict(rounded)
        if draw.random() < 0.5:
            given["keys"] = given["keys"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        if draw.random() < 0.5:
            given["values"] = given["values"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        where = None if mask is None else mask.to(fused.device)
        results = {}
        for kind, leaves in (("exact", on(fused, rounded, torch.float64)), ("plain", rounded), ("actual", given)):
            backend = fused.backend if kind == "actual" else "reference"
            with fastcap.backend(backend):
                outputs = F_cap.additive_attention(**leaves, activation=activation, mask=where)
            results[kind] = [*outputs, *gradients(outputs, leaves.values())]
        for i, (a, e, p) in enumerate(zip(results["actual"], results["exact"], results["plain"], strict=True)):
            what = f"result {i} of seed {seed} {(B, L, A, D)} {dtype} {activation}"
            # of a sum over locations whose terms cancel, the steps of float32 at the largest term are allowed besides
            assert_close_to_float64(a, e, p, what, size=2.0 if dtype != torch.float64 else 8.0)


def test_permuting_locations_permutes_the_weights_and_nothing_else(target):
    given = on(target, make_locations(3, 11, 5, 4))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(target.device)
    moved = {**given, "keys": given["keys"][:, order], "values": given["values"][:, order]}
    context, alpha = attention(target, given)
    other, other_alpha = attention(target, moved)
    same([other, other_alpha], [context, alpha[:, order]])


def test_equal_keys_weigh_all_locations_that_count_alike(target):
    given = on(target, make_locations(2, 6, 3, 4))
    given["keys"] = given["keys"][:, :1].expand(2, 6, 3)
    mask = torch.tensor([[1, 1, 0, 0, 1, 0], [1] * 6], dtype=torch.bool, device=target.device)
    _, alpha = attention(target, given, mask=mask)
    torch.testing.assert_close(alpha, mask / mask.sum(1, keepdim=True).double())


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_large_scores_do_not_overflow(scale, target):
    given = on(target, make_locations(2, 6, 3, 4), torch.float32)
    given["v"] = (given["v"] * scale).detach().requires_grad_()
    context, alpha = attention(target, given)
    best = plain(*given.values())[1].argmax(1)
    assert alpha.isfinite().all() and torch.equal(alpha.argmax(1), best)
    assert all(g.isfinite().all() for g in gradients((context, alpha), given.values()))


# What does not count ---------------------------------------------------------------------------------------------------


def with_nothing_in(tensors, mask, value):
    """keys and values that hold `value` where the mask is off."""
    spoilt = {name: tensors[name].masked_fill(~mask[..., None], value) for name in ("keys", "values")}
    return {**tensors, **spoilt}


@pytest.mark.parametrize("rubbish", [nan, inf, -inf])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_what_lies_at_masked_locations_is_harmless(rubbish, activation, target):
    tensors, mask = make_locations(4, 7, 5, 3), make_mask(4, 7)
    clean, spoilt = on(target, tensors), on(target, with_nothing_in(tensors, mask, rubbish))
    mask = mask.to(target.device)
    expected, actual = (attention(target, given, activation=activation, mask=mask) for given in (clean, spoilt))
    same(actual, expected, steps=0)
    wanted, found = gradients(expected, clean.values()), gradients(actual, spoilt.values())
    same(found, wanted, steps=0)
    assert (found[0][~mask] == 0).all() and (found[3][~mask] == 0).all()


def test_an_image_without_locations_gives_zeros(target):
    given = on(target, make_locations(3, 5, 4, 2))
    mask = torch.tensor([[1] * 5, [0] * 5, [1, 0, 0, 0, 0]], dtype=torch.bool, device=target.device)
    context, alpha = attention(target, given, mask=mask)
    assert (context[1] == 0).all() and (alpha[1] == 0).all()
    dkeys, dquery, dv, dvalues = gradients((context, alpha), given.values())
    assert (dkeys[1] == 0).all() and (dquery[1] == 0).all() and (dvalues[1] == 0).all()
    assert all(g.isfinite().all() for g in (dkeys, dquery, dv, dvalues))
    assert (dkeys[2] == 0).all() and (dquery[2] == 0).all()  # a softmax over one location is constant
    with fastcap.backend(target.backend):  # nor does a batch of nothing else
        none = F_cap.additive_attention(**given, mask=torch.zeros_like(mask))
    assert not any(o.any() for o in none) and not any(g.any() for g in gradients(none, given.values()))


def test_nan_at_a_location_that_counts_stays_in_its_caption(target):
    tensors = make_locations(3, 5, 4, 2)
    tensors["keys"][1, 3, 2] = nan
    for activation in ("tanh", "relu"):
        context, alpha = attention(target, on(target, tensors), activation=activation)
        assert context[1].isnan().all() and alpha[1].isnan().all()
        assert context[[0, 2]].isfinite().all() and alpha[[0, 2]].isfinite().all()


# Given weights ---------------------------------------------------------------------------------------------------------


def test_given_weights_make_the_context_and_the_softmax_is_returned_all_the_same(target):
    given = on(target, make_locations(3, 5, 4, 2))
    weights = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(target.device)
    weights.requires_grad_()
    context, alpha = attention(target, given, alpha=weights)
    same([context, alpha], [torch.einsum("bl,bld->bd", weights, given["values"]), attention(target, given)[1]])
    dcontext = upstream(context)
    dweights, dvalues = torch.autograd.grad(context, (weights, given["values"]), dcontext, retain_graph=True)
    same([dweights], [torch.einsum("bd,bld->bl", dcontext, given["values"])])
    same([dvalues], [weights[..., None] * dcontext[:, None]])


def test_keys_get_a_gradient_only_through_the_returned_weights(target):
    given = on(target, make_locations(3, 5, 4, 2))
    weights = torch.full((3, 5), 0.2, dtype=torch.float64, device=target.device)
    context, alpha = attention(target, given, alpha=weights)
    of_scores = [given[name] for name in ("keys", "query", "v")]
    through_context = torch.autograd.grad(context.sum(), of_scores, allow_unused=True, retain_graph=True)
    assert all(g is None or (g == 0).all() for g in through_context)
    actual = torch.autograd.grad(alpha, of_scores, upstream(alpha))
    expected = plain(**given)[1]
    same(actual, torch.autograd.grad(expected, of_scores, upstream(expected)))


def test_one_hot_weights_pick_a_row_and_read_no_other(fused):
    tensors = {name: x.float() for name, x in make_locations(3, 5, 4, 2).items()}
    picked = torch.tensor([4, 0, 2])
    one_hot = torch.nn.functional.one_hot(picked, 5).float()
    rows = tensors["values"][torch.arange(3), picked]
    tensors["values"] = torch.where(one_hot[..., None] > 0, tensors["values"], nan)
    context, _ = attention(fused, on(fused, tensors), alpha=one_hot.to(fused.device))
    assert torch.equal(context.detach().cpu(), rows)


def test_given_weights_at_masked_locations_count_nothing_and_get_no_gradient(target):
    """Values that are not there have no share, whatever weight a caller gives them."""
    tensors, mask = make_locations(4, 6, 3, 2), make_mask(4, 6)
    given = on(target, with_nothing_in(tensors, mask, nan))
    mask = mask.to(target.device)
    weights = torch.full((4, 6), 0.25, dtype=torch.float64, device=target.device, requires_grad=True)
    context, _ = attention(target, given, mask=mask, alpha=weights)
    share = weights.detach() * mask
    same([context], [torch.einsum("bl,bld->bd", share, tensors["values"].to(target.device))])
    (dweights,) = torch.autograd.grad(context, weights, upstream(context))
    assert dweights.isfinite().all() and (dweights[~mask] == 0).all() and (dweights[mask] != 0).all()
    with fastcap.backend(target.backend):
        attend = F_cap.additive_attention_steps(given["keys"], given["v"], given["values"], steps=1, mask=mask)
        same([attend.context(weights)], [context])


# Many steps ------------------------------------------------------------------------------------------------------------

ROWS = (4, 3, 1, 0)


def separately(where, given, rows=ROWS, **options):
    """What the steps are held to: a call for each."""
    mask, outputs = options.pop("mask", None), []
    for t, n in enumerate(rows):
        some = {name: given[name][:n] for name in ("keys", "values")}
        masked = None if mask is None else mask[:n]
        outputs.append(attention(where, {**some, "query": given["query"][t, :n], "v": given["v"]}, mask=masked, **options))
    return [x for pair in outputs for x in pair]


def steps(where, given, rows=ROWS, unused=0, **options):
    with fastcap.backend(where.backend):
        attend = F_cap.additive_attention_steps(
            given["keys"], given["v"], given["values"], steps=len(rows) + unused, **options
        )
        return [x for t, n in enumerate(rows) for x in attend(given["query"][t, :n])]


@pytest.mark.parametrize("unused", [0, 3])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_equal_separate_calls(unused, activation, masked, target):
    given = on(target, make_locations(4, 6, 5, 3, T=4))
    mask = make_mask(4, 6).to(target.device) if masked else None
    expected = separately(target, given, activation=activation, mask=mask)
    actual = steps(target, given, unused=unused, activation=activation, mask=mask)
    same(actual, expected, steps=0)
    same(gradients(actual, given.values()), gradients(expected, given.values()))


@pytest.mark.parametrize(
    "required", [("keys",), ("values",), ("query",), ("v",), ("keys", "values"), ("query", "v")], ids="-".join
)
def test_steps_give_the_gradients_that_are_asked_for(required, target):
    given = {name: x.detach() for name, x in on(target, make_locations(4, 6, 5, 3, T=4)).items()}
    leaves = [given[name].requires_grad_() for name in required]
    expected, actual = separately(target, given), steps(target, given)
    depends = [i for i, x in enumerate(expected) if x.requires_grad]  # no weight depends on the values
    assert all(x.requires_grad for x in (actual[i] for i in depends))
    wanted = gradients([expected[i] for i in depends], leaves)
    same(gradients([actual[i] for i in depends], leaves), wanted)


def test_steps_of_which_only_some_reach_the_loss_give_their_gradients(target):
    given = on(target, make_locations(4, 6, 5, 3, T=4))
    expected, actual = separately(target, given), steps(target, given)
    for chosen in ([0], [3], [2, 5], [7], [0, 1, 6]):  # contexts are even, weights odd
        wanted = torch.autograd.grad(
            [expected[i] for i in chosen], given.values(), [upstream(expected[i]) for i in chosen],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        found = torch.autograd.grad(
            [actual[i] for i in chosen], given.values(), [upstream(actual[i]) for i in chosen],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        zeros = [torch.zeros_like(x) for x in given.values()]
        same(
            [z if f is None else f for f, z in zip(found, zeros, strict=True)],
            [z if w is None else w for w, z in zip(wanted, zeros, strict=True)],
        )


def test_two_losses_of_the_same_steps_may_be_differentiated_apart(target):
    given = on(target, make_locations(4, 6, 5, 3, T=4))
    actual = steps(target, given)
    once = gradients(actual, given.values(), [upstream(x) for x in actual])
    actual = steps(target, given)
    torch.autograd.backward(actual[:3], [upstream(x) for x in actual[:3]], retain_graph=True)
    torch.autograd.backward(actual[3:], [upstream(x) for x in actual[3:]])
    same([x.grad for x in given.values()], once)


def test_a_recurrent_decoder_gets_the_gradients_of_separate_calls(target):
    """Each query depends on the context before it, so that the steps' backwards run one after the other."""
    tensors = make_locations(3, 6, 4, 4)

    def decode(given, call):
        query, outputs = given["query"], []
        for _ in range(5):
            context, alpha = call(query)
            query = torch.tanh(query + 0.7 * context)
            outputs += [context, alpha]
        return outputs

    with fastcap.backend(target.backend):
        given = on(target, tensors)
        expected = decode(given, lambda q: F_cap.additive_attention(given["keys"], q, given["v"], given["values"]))
        wanted = gradients(expected, given.values())
        attend = F_cap.additive_attention_steps(given["keys"], given["v"], given["values"], steps=5)
        actual = decode(given, attend)
    same(actual, expected, steps=0)
    same(gradients(actual, given.values()), wanted)


def test_the_two_halves_of_a_step_equal_the_step(target):
    given = on(target, make_locations(4, 6, 5, 3, T=2))
    mask = make_mask(4, 6).to(target.device)
    whole = steps(target, given, rows=(4, 2), mask=mask)
    with fastcap.backend(target.backend):
        attend = F_cap.additive_attention_steps(given["keys"], given["v"], given["values"], steps=2, mask=mask)
        halves = []
        for t, n in enumerate((4, 2)):
            alpha = attend.weights(given["query"][t, :n])
            halves += [attend.context(alpha), alpha]
    same(halves, whole, steps=0)
    same(gradients(halves, given.values()), gradients(whole, given.values()))


def test_hard_attention_samples_between_the_halves(target):
    """A one-hot sample makes the context; the weights that it was drawn from get their gradient by its log-likelihood."""
    given = on(target, make_locations(4, 6, 5, 3))
    with fastcap.backend(target.backend):
        attend = F_cap.additive_attention_steps(given["keys"], given["v"], given["values"], steps=1)
        alpha = attend.weights(given["query"])
        drawn = torch.multinomial(alpha.detach(), 1, generator=torch.Generator(target.device).manual_seed(0))
        sample = torch.zeros_like(alpha).scatter(1, drawn, 1.0)
        context = attend.context(sample)
        loss = (context * upstream(context)).sum() + (alpha.gather(1, drawn).log() * upstream(drawn.double())).sum()
        found = torch.autograd.grad(loss, given.values())
        context, alpha = F_cap.additive_attention(**given, alpha=sample)
        loss = (context * upstream(context)).sum() + (alpha.gather(1, drawn).log() * upstream(drawn.double())).sum()
        wanted = torch.autograd.grad(loss, given.values())
    same(found, wanted)


def test_more_calls_than_steps_is_an_error(target):
    given = on(target, make_locations(2, 3, 4, 2))
    with fastcap.backend(target.backend):
        attend = F_cap.additive_attention_steps(given["keys"], given["v"], given["values"], steps=2)
        _, alpha = attend(given["query"])
        attend(given["query"])
        for call in (attend, attend.weights, lambda _: attend.context(alpha)):
            with pytest.raises(
                FastcapError, match=r"^fastcap\.additive_attention: steps must be at least the number of call"
            ):
                call(given["query"])


# What is kept ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kept_for_backward(but):
    """Collects the bytes of the distinct storages that autograd saves, those of the tensors `but` left out."""
    inputs, found = {x.untyped_storage().data_ptr() for x in but}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in inputs:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


@pytest.mark.parametrize("T", [1, 12])
def test_nothing_of_all_locations_times_the_width_is_kept(T, cpp):
    B, L, A, D = 3, 50, 64, 24
    given = {name: x.float().requires_grad_() for name, x in make_locations(B, L, A, D, T=T).items()}
    with fastcap.backend("cpp"), kept_for_backward(given.values()) as kept:
        if T == 1:
            outputs = F_cap.additive_attention(**{**given, "query": given["query"][0]})
        else:
            outputs = steps(cpp, given, rows=(B,) * T)
    assert kept and max(kept.values()) <= 4 * B * max(L, A, D) < 4 * B * L * A
    assert sum(kept.values()) <= 4 * T * B * (L + A + D)
    gradients(outputs, given.values())


def test_plain_torch_keeps_what_the_kernels_do_not():
    """Guards the test above: the same hooks see the [B, L, A] activation where there is one."""
    given = {name: x.float().requires_grad_() for name, x in make_locations(3, 50, 64, 24).items()}
    with kept_for_backward(given.values()) as kept:
        plain(**given)
    assert max(kept.values()) >= 4 * 3 * 50 * 64


def test_no_step_allocates_an_activation(cpp):
    """Forward: nothing of the size of keys. Backward of T steps: the gradients and the steps' messages, no activation."""
    B, L, A, D, T = 2, 50, 64, 8, 12
    tensors = {name: x.float() for name, x in make_locations(B, L, A, D, T=T).items()}
    with fastcap.backend("cpp"):
        one = {**tensors, "query": tensors["query"][0].clone()}
        with Allocations() as forward:
            F_cap.additive_attention(**one)
        given = {name: x.requires_grad_() for name, x in tensors.items()}
        outputs = steps(cpp, given, rows=(B,) * T)
        with Allocations() as backward:
            gradients(outputs, given.values())
    assert 0 < forward.largest <= 4 * B * max(L, A, D)
    assert 0 < backward.largest <= 4 * max(B * L * A, T * B * (L + A)) < 4 * T * B * L * A


# Derivatives of derivatives, dtypes, threads ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["one call", "steps"])
def test_a_double_backward_is_a_clear_error(what, fused):
    given = on(fused, make_locations(2, 5, 4, 3, T=2))
    if what == "steps":
        outputs = steps(fused, given, rows=(2, 1))
    else:
        outputs = attention(fused, {**given, "query": given["query"][0]})
    first = torch.autograd.grad([o.square().sum() for o in outputs], given.values(), create_graph=True)
    for gradient in first:
        with pytest.raises(
            RuntimeError, match=r"fastcap\.additive_attention: the gradient must not be differentiated again"
        ):
            gradient.sum().backward(retain_graph=True)


def test_the_reference_differentiates_twice(reference):
    given = on(reference, make_locations(2, 3, 2, 2))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)

    def call(*tensors):
        return attention(reference, dict(zip(given, tensors, strict=True)), mask=mask)

    assert torch.autograd.gradgradcheck(call, tuple(given.values()), fast_mode=True)


def test_dtypes_may_be_mixed(target):
    """keys in bfloat16 and values in float32, as a projection under autocast makes them; each result in its own dtype."""
    tensors = make_locations(3, 9, 5, 4)
    given = on(target, tensors, torch.float32)
    given["keys"] = given["keys"].detach().bfloat16().requires_grad_()
    exact = on(target, {name: x.detach().double() for name, x in given.items()})
    context, alpha = attention(target, given)
    assert context.dtype == torch.float32 and alpha.dtype == torch.bfloat16
    same([context], [plain(**exact)[0]])
    found = gradients((context,), given.values())
    assert [g.dtype for g in found] == [x.dtype for x in given.values()]
    same(found, gradients((plain(**exact)[0],), exact.values()))


@pytest.mark.parametrize("what", ["one call", "steps"])
def test_autocast_widens_the_results_and_changes_no_bit(what, fused):
    """Projections under autocast hand over bfloat16; the sums of the operation, backward too, stay in float32."""
    tensors = make_locations(3, 9, 5, 4, T=2)
    given = on(fused, tensors, torch.float32)
    given["keys"] = given["keys"].detach().bfloat16().requires_grad_()

    def run():
        outputs = steps(fused, given, (3, 2)) if what == "steps" else attention(fused, {**given, "query": given["query"][0]})
        return outputs, gradients(outputs, given.values(), [upstream(o).float().to(o.dtype) for o in outputs])

    plain_outputs, plain_gradients = run()
    with torch.autocast(fused.device, dtype=torch.bfloat16):
        outputs, found = run()
    assert all(o.dtype == torch.float32 for o in outputs)
    same([o.to(p.dtype) for o, p in zip(outputs, plain_outputs, strict=True)], plain_outputs, steps=0)
    assert [g.dtype for g in found] == [x.dtype for x in given.values()]
    # upstream gradients of weights in bfloat16 are rounded without autocast: what depends on them alone is compared so
    same(found[3:], plain_gradients[3:], steps=0)


@pytest.mark.parametrize("T", [0, 3])
def test_the_number_of_threads_changes_no_bit(T, cpp):
    tensors = make_locations(5, 70, 33, 1100, T=T or None)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            given = on(cpp, tensors, torch.float32)
            outputs = steps(cpp, given, rows=(5, 4, 2)) if T else attention(cpp, given)
            found = list(gradients(outputs, given.values()))
            if T:  # torch's own product: its bits are torch's affair
                found.pop()
            results.append([*outputs, *found])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Errors ----------------------------------------------------------------------------------------------------------------

B, L, A, D = 2, 3, 4, 5
DTYPES = "float32 or float64 or float16 or bfloat16"
PROJECT = "; project the state of the decoder to the width of keys"


def good():
    return {name: x.float() for name, x in make_locations(B, L, A, D).items()}


BAD = [
    ({"keys": [1.0]}, "keys must be a torch.Tensor, got 'list'; pass the projected locations [B, L, A]"),
    ({"keys": torch.zeros(B, L, A, dtype=torch.int64)}, f"keys must be {DTYPES}, got 'int64'; call keys.float()"),
    ({"keys": torch.zeros(B, A)}, "keys must have shape [B, L, A], L and A >= 1, got [2, 4]; project the locations first"),
    ({"keys": torch.zeros(B, 0, A)}, "keys must have shape [B, L, A], L and A >= 1, got [2, 0, 4]; project the locations "
     "first"),
    ({"keys": torch.zeros(B, L, A).to_sparse()}, "keys must be dense, got torch.sparse_coo; call keys.to_dense()"),
    ({"v": torch.zeros(1, A)}, "v must have shape [A] = [4], got [1, 4]; pass for example score.weight[0] of a "
     "Linear(A, 1)"),
    ({"v": None}, "v must be a torch.Tensor, got 'NoneType'; pass the weight of the score [A]"),
    ({"values": torch.zeros(B, L + 1, D)}, "values must have shape [B, L, D] = [2, 3, D], D >= 1, got [2, 4, 5]; "
     "pass as many locations as keys"),
    ({"values": torch.zeros(B, L, 0)}, "values must have shape [B, L, D] = [2, 3, D], D >= 1, got [2, 3, 0]; "
     "pass as many locations as keys"),
    ({"values": torch.zeros(B, L, D, dtype=torch.float64)}, "values must have float64 where keys have it (torch.float32), "
     "got torch.float64; convert one of them"),
    ({"values": torch.zeros(B, L, D, device="meta")}, "values must be on the device of input, cpu, got 'meta'; "
     "call values.to(input.device)"),
    ({"activation": "gelu"}, "activation must be one of 'tanh', 'relu', got 'gelu'; pass activation='tanh'"),
    ({"mask": torch.ones(B, L)}, "mask must be bool, got 'float32'; call mask.bool(): True where there is a location"),
    ({"mask": torch.ones(L, B, dtype=torch.bool)}, "mask must have shape [B, L] = [2, 3], got [3, 2]; pass one value a "
     "location"),
    ({"query": torch.zeros(1, A)}, "query must have shape [B, A] = [2, 4], got [1, 4]" + PROJECT),
    ({"query": torch.zeros(B, A + 1)}, "query must have shape [B, A] = [2, 4], got [2, 5]" + PROJECT),
    ({"query": torch.zeros(A)}, "query must have shape [B, A] = [2, 4], got [4]" + PROJECT),
    ({"alpha": torch.zeros(B, L, 1)}, "alpha must have shape [B, L] = [2, 3], got [2, 3, 1]; pass one weight a location"),
    ({"alpha": torch.zeros(B, L, dtype=torch.int64)}, f"alpha must be {DTYPES}, got 'int64'; call alpha.float()"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[f"{next(iter(w))}-{i}" for i, (w, _) in enumerate(BAD)])
def test_bad_arguments_are_named(wrong, message):
    with pytest.raises(FastcapError) as error:
        F_cap.additive_attention(**{**good(), **wrong})
    assert str(error.value) == f"fastcap.additive_attention: {message}"
    if next(iter(wrong)) in ("keys", "v", "values", "activation", "mask"):
        given = {**good(), **wrong}
        del given["query"]
        with pytest.raises(FastcapError) as error:
            F_cap.additive_attention_steps(**given, steps=2)
        assert str(error.value) == f"fastcap.additive_attention: {message}"


@pytest.mark.parametrize("count", [0, -1, True, 2.0, None])
def test_steps_must_be_a_whole_number(count):
    given = good()
    with pytest.raises(FastcapError, match=r"additive_attention: steps must be an int of at least 1, got "):
        F_cap.additive_attention_steps(given["keys"], given["v"], given["values"], steps=count)


def test_a_step_names_what_does_not_fit():
    given = good()
    attend = F_cap.additive_attention_steps(given["keys"], given["v"], given["values"], steps=9)
    with pytest.raises(FastcapError, match=r"query must have shape \[n, A\], n <= 2, A = 4, got \[3, 4\]"):
        attend(torch.zeros(3, A))
    with pytest.raises(FastcapError, match=r"alpha must have shape \[n, L\], n <= 2, L = 3, got \[2, 4\]"):
        attend.context(torch.zeros(B, L + 1))


def test_there_is_no_cuda_backend_and_it_says_so():
    from fastcap.ops import _backend

    assert "cuda" not in OPERATION.backends
    with pytest.raises(FastcapError):
        with fastcap.backend("cuda"):
            F_cap.additive_attention(**good())
    assert _backend.NO_CUDA == OPERATION.backends


# The raw extension -----------------------------------------------------------------------------------------------------


def raw_calls():
    """name -> (the launcher of the extension, its arguments in order)."""
    from fastcap import _C

    x = {name: value.contiguous() for name, value in good().items()}
    alpha, context = torch.full((B, L), 1 / L), torch.zeros(B, D)
    mask = torch.ones(B, L, dtype=torch.uint8)
    dkeys, dvalues = torch.zeros(B, L, A), torch.zeros(B, L, D)
    return {
        "weights_fwd": (
            _C.additive_attention_weights_fwd_cpu,
            {"keys": x["keys"], "query": x["query"], "v": x["v"], "mask": mask, "alpha": alpha},
            (False, 1),
        ),
        "weights_bwd": (
            _C.additive_attention_weights_bwd_cpu,
            {"dalpha": alpha.clone(), "alpha": alpha, "keys": x["keys"], "query": x["query"], "v": x["v"],
             "dscore": alpha.clone(), "dquery": torch.zeros(B, A), "dv": torch.zeros(A), "dkeys": dkeys},
            (True, 1),
        ),
        "context_fwd": (
            _C.additive_attention_context_fwd_cpu, {"weights": alpha, "values": x["values"], "context": context}, (1,)
        ),
        "context_bwd": (
            _C.additive_attention_context_bwd_cpu,
            {"dcontext": context, "weights": alpha, "values": x["values"], "dweights": alpha.clone(), "dvalues": dvalues},
            (1,),
        ),
        "memory_bwd": (
            _C.additive_attention_memory_bwd_cpu,
            {"dscores": torch.ones(6, B, L), "queries": torch.ones(6, B, A), "keys": x["keys"], "v": x["v"],
             "dv": torch.zeros(A), "dkeys": dkeys},
            (False, 1),
        ),
    }  # fmt: skip


FAULTS = {
    "a row short": lambda x: x[1:].contiguous(),
    "a row more": lambda x: torch.cat((x, x[:1])),
    "a column short": lambda x: x[..., 1:].contiguous(),
    "a column more": lambda x: torch.cat((x, x[..., :1]), -1),
    "a dimension short": lambda x: x[0].contiguous(),
    "a dimension more": lambda x: x[None],
    "empty": lambda x: x[..., :0],
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "int32": lambda x: x.int(),
    "absent": lambda x: None,
    "elsewhere": lambda x: x.to("meta"),
    "every second": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "transposed": lambda x: x.transpose(0, -1),
}
ARGUMENTS = {
    "weights_fwd": ("keys", "query", "v", "mask", "alpha"),
    "weights_bwd": ("dalpha", "alpha", "keys", "query", "v", "dscore", "dquery", "dv", "dkeys"),
    "context_fwd": ("weights", "values", "context"),
    "context_bwd": ("dcontext", "weights", "values", "dweights", "dvalues"),
    "memory_bwd": ("dscores", "queries", "keys", "v", "dv", "dkeys"),
}
# What is no fault: inputs of any strides; more rows than queries, n <= B; another dtype where nothing else has to have it;
# what may be absent, as tensors without memory are too
ALLOWED = {
    "keys": ("every second", "expanded", "a row more", "float16"),
    "values": ("every second", "expanded", "a row more", "float16"),
    "dscores": ("expanded",), "queries": ("expanded",), "v": ("transposed",), "dv": ("transposed",),
    "mask": ("absent", "empty", "elsewhere", "a row more"),
    "dweights": ("absent", "empty", "elsewhere"), "dvalues": ("absent", "empty", "elsewhere"),
}  # fmt: skip


def in_a_child(action) -> str:
    """What `action` does in a process of its own: "ok", "raises <type>: <message>" or "dies of signal <n>"."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            signal.alarm(30)  # a child that hangs is killed, and reported as such
            try:
                action()
                outcome = "ok"
            except Exception as error:
                outcome = f"raises {type(error).__name__}: {error}"
            os.write(write, outcome.encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        outcome = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return f"dies of signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else outcome


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name, them in ARGUMENTS.items() for argument in them])
def test_the_extension_raises_on_what_does_not_fit_and_never_crashes(name, argument, cpp):
    def action():
        for fault, spoil in FAULTS.items():
            launch, arguments, rest = raw_calls()[name]
            assert tuple(arguments) == ARGUMENTS[name]
            arguments[argument] = spoil(arguments[argument])
            outcome = "ok"
            try:
                launch(*arguments.values(), *rest)
            except (FastcapError, TypeError) as error:
                outcome = f"{type(error).__name__}: {error}"
            named = outcome.startswith(("FastcapError: fastcap.additive_attention: ", "TypeError: "))
            assert named or fault in ALLOWED.get(argument, ()), (fault, outcome)

    assert in_a_child(action) == "ok"


def test_the_extensions_good_calls_run(cpp):
    """Guards the test above: it is the fault that raises."""
    for name, (launch, arguments, rest) in raw_calls().items():
        assert in_a_child(lambda a=arguments, launch=launch, rest=rest: launch(*a.values(), *rest)) == "ok", name


# Triton ----------------------------------------------------------------------------------------------------------------


def test_tanh_is_exact_to_three_steps(fused):
    """One location, one step, a query of 0 and a score's gradient of 1: then dv is tanh of the keys."""
    if fused.backend != "triton":
        pytest.skip("of the kernels' own tanh")
    x = torch.cat((torch.linspace(0, 12, 2_401), torch.logspace(-12, 1, 1_201), torch.tensor([0.625, 90.0, 1e30, inf])))
    for dtype in (torch.float32, torch.float64):
        keys = torch.cat((x, -x, torch.tensor([nan]))).to(fused.device, dtype)[None, None]
        zeros = torch.zeros_like(keys)
        dv, dkeys = torch.ops.fastcap.additive_attention_memory_bwd(
            torch.ones_like(keys[..., :1]), zeros, keys, 1 + zeros[0, 0], "tanh", fused.backend
        )
        exact = torch.tanh(keys.double())[0, 0]
        assert dv[-1].isnan() and dkeys[0, 0, -1].isnan()
        error = (dv.double() - exact)[:-1].abs()
        assert (error <= 3 * torch.finfo(dtype).eps * exact[:-1].abs()).all(), (dtype, error.max())


@pytest.mark.skipif(interpreting, reason="nothing can be compiled in the interpreter's process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_keys_and_values_are_read_and_their_gradients_written_by_16_bytes(dtype):
    """With scalar loads a thread would need four times the instructions for the bytes that are the cost."""
    pytest.importorskip("triton")
    from fastcap.kernels._common import compile_for

    found = {}
    for steps_, launches in ((0, plan_additive_attention(4, 196, 512, 2048, dtype)),
                             (3, plan_additive_attention(4, 196, 512, 2048, dtype, steps=3))):  # fmt: skip
        for launch in launches:
            ptx = compile_for(launch, "cuda", 90, 32).asm["ptx"]
            found[steps_, launch.kernel.fn.__name__] = ("ld.global.v4" in ptx, "st.global.v4" in ptx)
    for name in ("_scores_kernel", "_context_kernel", "_context_bwd_kernel", "_weights_bwd_kernel"):
        assert found[0, name][0], name
    assert found[3, "_memory_bwd_kernel"] == (True, True)
    assert found[0, "_context_bwd_kernel"][1] and found[0, "_weights_bwd_kernel"][1]


def test_no_grid_is_longer_than_a_gpu_allows():
    """Only the first dimension of a grid may pass 65,535: two million locations, or a hundred thousand captions."""
    pytest.importorskip("triton")
    for sizes in ((1, 2_000_000, 4, 4), (100_000, 3, 4, 4), (2, 3, 300_000, 70_000)):
        for launch in plan_additive_attention(*sizes, torch.float32, steps=2) + plan_additive_attention(
            *sizes, torch.float16
        ):
            assert len(launch.grid) == 1 and launch.grid[0] < 2**31
