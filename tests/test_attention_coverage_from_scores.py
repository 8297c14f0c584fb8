"""attention_coverage_from_scores: softmax and attention_coverage are its oracle, torch's own attention gives the weights."""

from __future__ import annotations

import math

import pytest
import torch

import fastcap
from fastcap.errors import FastcapError
from fastcap.functional import attention_coverage, attention_coverage_from_scores
from fastcap.ops import _backend, _score_blocks
from fastcap.testing import OPERATIONS, Allocations, assert_close_to_float64, upstream
from fastcap.testing.coverage_from_scores import make_key_mask, make_query_and_key

OP = "attention_coverage_from_scores"
CASES = {case.name: case for case in OPERATIONS[OP].cases()}


def run(place, query, key, dtype=torch.float64, **given):
    """(result, gradients of query and key) at a place, with an upstream gradient that is nowhere the same."""
    given = {k: v.to(place.device) if isinstance(v, torch.Tensor) and k != "lengths" else v for k, v in given.items()}
    leaves = [x.detach().to(place.device, dtype).requires_grad_() for x in (query, key)]
    with fastcap.backend(place.backend):
        out = attention_coverage_from_scores(*leaves, **given)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream(out))


def eager(query, key, dtype=torch.float64, *, scale=None, key_mask=None, **given):
    """The same by the softmax, kept, and attention_coverage in plain torch; scores and weights in float32 at least."""
    leaves = [x.detach().cpu().to(dtype).requires_grad_() for x in (query, key)]
    scores = (leaves[0] @ leaves[1].mT).to(torch.promote_types(dtype, torch.float32))
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if key_mask is not None:
        here = key_mask[:, None] if scores.dim() == 3 else key_mask[:, None, None]
        scores = scores.masked_fill(~here, -torch.inf).masked_fill(~here.any(-1, keepdim=True), 0.0)
    alpha = scores.softmax(-1)
    if key_mask is not None:
        alpha = alpha * here
    if given.get("target", 1.0) is not None and isinstance(given.get("target"), torch.Tensor):
        given["target"] = given["target"].to(alpha.dtype)
    with fastcap.backend("reference"):
        out = attention_coverage(alpha, **given)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream(out))


# What it is ------------------------------------------------------------------------------------------------------------


def test_one_step_by_hand(target):
    """Scores ln 1, ln 3 give weights 1/4 and 3/4; the penalty 9/16 + 1/16. With dw = -2 (1 - w): ds = w (dw - <w, dw>)."""
    query, key = torch.ones(1, 1, 1), torch.tensor([[[0.0], [math.log(3)]]])
    with_gradient = query.to(target.device, torch.float64).requires_grad_()
    with fastcap.backend(target.backend):
        out = attention_coverage_from_scores(
            with_gradient, key.to(target.device, torch.float64), scale=1.0, reduction="batchmean"
        )
    out.backward()
    assert out.item() == pytest.approx(10 / 16)
    # dw = [-3/2, -1/2], <w, dw> = -3/4, ds = [-3/16, 3/16], dq = ds . k
    assert with_gradient.grad.item() == pytest.approx(3 / 16 * math.log(3), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_coverage_of_the_softmax(name, fused):
    case = CASES[name]
    dtypes = (torch.float64,) if _backend.interpreting() else (torch.float64, torch.float32, torch.bfloat16)
    for dtype in dtypes:
        given = case.to(dtype, keep=torch.float64)
        exact, plain = eager(**given), eager(dtype=dtype, **given)
        tau = given.get("target")
        if isinstance(tau, torch.Tensor):
            given["target"] = tau.to(dtype)
        for what, a, e, p in zip(("result", "dquery", "dkey"), run(fused, dtype=dtype, **given), exact, plain, strict=True):
            assert a.dtype == dtype
            # what cancels in a gradient: upstream gradients of up to 2.5 times 2 |r|, times keys or queries of up to 8
            assert_close_to_float64(a, e, p.to(dtype), f"{what} in {dtype}", size=20.0 if what != "result" else 0.0)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_its_weights_are_those_of_scaled_dot_product_attention(scale, target):
    """With the identity as values, torch's attention returns its weights."""
    inputs = make_query_and_key(2, 3, T=4, L=5, E=7)
    query, key = inputs["query"], inputs["key"]
    here = make_key_mask(2, 5)
    here[0, 2:4] = True
    identity = torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)
    alpha = torch.nn.functional.scaled_dot_product_attention(
        query, key, identity, attn_mask=here[:, None, None], scale=scale
    )
    for reduction in ("none", "mean"):
        expected = attention_coverage(alpha, reduction=reduction)
        got, *_ = run(target, query, key, scale=scale, key_mask=here, reduction=reduction)
        torch.testing.assert_close(got.cpu(), expected)


def test_a_scale_of_zero_attends_evenly(target):
    inputs = make_query_and_key(2, 3, T=4, L=8, E=7)
    out, dquery, dkey = run(target, **inputs, scale=0.0, reduction="none")
    torch.testing.assert_close(out.cpu(), torch.full((2, 3, 8), 0.25, dtype=torch.float64))
    assert not dquery.any() and not dkey.any()
    with fastcap.backend(target.backend):
        assert attention_coverage_from_scores(inputs["query"], inputs["key"], scale=0.0, target="length").item() < 1e-30


def test_heads_are_attentions_of_their_own(target):
    inputs = make_query_and_key(2, 3, T=4, L=5, E=7)
    out, dquery, dkey = run(target, **inputs, reduction="none", lengths=[4, 2])
    flat = {name: x.flatten(0, 1) for name, x in inputs.items()}
    expected = run(target, **flat, reduction="none", lengths=[4, 4, 4, 2, 2, 2])
    for got, one in zip((out, dquery, dkey), expected, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), one)


def test_adding_to_all_scores_of_a_step_changes_nothing(target):
    """Softmax ignores what all locations share: a feature that is 1 in every key, whatever the query has there."""
    inputs = make_query_and_key(2, T=4, L=5, E=7)
    key = inputs["key"].clone()
    key[..., 0] = 1.0
    moved = inputs["query"].clone()
    moved[..., 0] += torch.arange(8.0).view(2, 4)
    (out, _, dkey), (other, _, dkey_other) = (run(target, q, key, reduction="none") for q in (inputs["query"], moved))
    torch.testing.assert_close(out, other)
    torch.testing.assert_close(dkey[..., 1:], dkey_other[..., 1:])


def test_large_scores_do_not_overflow(target):
    query, key = torch.tensor([[[300.0], [-300.0]]]), torch.tensor([[[10.0], [-10.0], [0.0]]])
    out, dquery, dkey = run(target, query, key, torch.float32, reduction="none", scale=1.0)
    assert torch.equal(out.cpu(), torch.tensor([[0.0, 0.0, 1.0]]))
    assert not dquery.any() and not dkey.any()


# What does not count ---------------------------------------------------------------------------------------------------


def test_a_masked_location_is_as_if_it_were_not_there(target):
    """But for its own term, tau squared: by slicing."""
    inputs = make_query_and_key(1, 2, T=4, L=6, E=7)
    here = torch.tensor([[True, False, True, True, False, True]])
    masked = run(target, **inputs, key_mask=here, reduction="none", target=0.5)
    sliced = run(target, inputs["query"], inputs["key"][:, :, here[0]], reduction="none", target=0.5)
    where = here[0].to(masked[0].device)
    torch.testing.assert_close(masked[0][..., where], sliced[0])
    assert (masked[0][..., ~where] == 0.25).all()
    masked, sliced = (  # of a sum, whose upstream gradient does not depend on the number of locations
        run(target, inputs["query"], key, target=0.5, reduction="sum", **given)
        for key, given in ((inputs["key"], {"key_mask": here}), (inputs["key"][:, :, here[0]], {}))
    )
    torch.testing.assert_close(masked[1], sliced[1])
    torch.testing.assert_close(masked[2][:, :, where], sliced[2])
    assert not masked[2][:, :, ~where].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_does_not_count_may_hold_anything(dtype, target):
    """At steps and locations that do not count: the same results, and gradients of exactly 0."""
    if target == ("cpu", "triton") and dtype != torch.float32:
        pytest.skip("a second each in the interpreter: float32 stands for all")
    inputs = make_query_and_key(3, 2, T=4, L=6, E=5)
    here, mask = make_key_mask(3, 6), torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    given = {"key_mask": here, "mask": mask, "reduction": "none"}
    clean = run(target, **inputs, dtype=dtype, **given)
    for rubbish in (math.nan, math.inf, -math.inf):
        dirty = {
            "query": inputs["query"].masked_fill(~mask[:, None, :, None], rubbish),
            "key": inputs["key"].masked_fill(~here[:, None, :, None], rubbish),
        }
        found = run(target, **dirty, dtype=dtype, **given)
        for a, b in zip(clean, found, strict=True):
            assert torch.equal(a, b)
    assert not clean[1].masked_fill(mask[:, None, :, None].to(clean[1].device), 0.0).any()
    assert not clean[2].masked_fill(here[:, None, :, None].to(clean[2].device), 0.0).any()


def test_nan_upstream_gradients_of_masked_locations_do_not_spread(target):
    inputs = make_query_and_key(2, T=3, L=5, E=4)
    here = torch.tensor([[True, True, False, True, True], [False] * 5]).to(target.device)
    leaves = [x.to(target.device).requires_grad_() for x in inputs.values()]
    with fastcap.backend(target.backend):
        out = attention_coverage_from_scores(*leaves, key_mask=here, reduction="none")
    clean, dirty = (
        torch.autograd.grad(out, leaves, torch.ones_like(out).masked_fill(~here, g), retain_graph=True)
        for g in (0.0, math.nan)
    )
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a, b)


def test_a_caption_with_no_location_has_no_attention(target):
    inputs = make_query_and_key(2, 2, T=3, L=5, E=4)
    here = torch.tensor([[False] * 5, [True] * 5])
    out, dquery, dkey = run(target, **inputs, key_mask=here, reduction="none", target=0.5)
    assert (out[0] == 0.25).all() and not dquery[0].any() and not dkey[0].any()
    assert dquery[1].any() and dkey[1].any()


def test_lengths_are_a_mask(target):
    inputs = make_query_and_key(3, 2, T=6, L=5, E=4)
    lengths = [6, 0, 4]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    expected = run(target, **inputs, mask=mask, target="length")
    for given in (lengths, torch.tensor(lengths, dtype=torch.int32)):
        for a, b in zip(run(target, **inputs, lengths=given, target="length"), expected, strict=True):
            assert torch.equal(a, b)


def test_a_nan_that_counts_reaches_the_result_as_in_plain_torch(fused, reference):
    inputs = make_query_and_key(2, 2, T=3, L=5, E=4)
    inputs["query"][0, 1, 2, 3] = math.nan
    for a, b in zip(run(fused, **inputs, reduction="none"), run(reference, **inputs, reduction="none"), strict=True):
        assert torch.equal(a.isnan().cpu(), b.isnan())


def test_no_step_at_all_leaves_every_location_at_its_target(target):
    for given in ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, {"lengths": [0, 0]}, {}):
        query, key = torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 5, 4)
        out, dquery, dkey = run(target, query, key, reduction="none", target=0.5, **given)
        assert (out == 0.25).all() and dquery.shape == query.shape and not dkey.any()


# How it runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_that_are_wanted_are_formed(wanted, target):
    inputs = {name: x.to(target.device) for name, x in make_query_and_key(2, 2, T=3, L=5, E=4).items()}
    both = run(target, **inputs)[1:]
    leaves = [x.clone().requires_grad_(want) for x, want in zip(inputs.values(), wanted, strict=True)]
    with fastcap.backend(target.backend):
        out = attention_coverage_from_scores(*leaves)
    out.backward(upstream(out))
    for leaf, want, gradient in zip(leaves, wanted, both, strict=True):
        assert (leaf.grad is None) == (not want)
        if want:
            torch.testing.assert_close(leaf.grad, gradient)


def test_keys_shared_by_heads_may_be_expanded(target):
    """Grouped attention: one key for all heads, by strides of 0."""
    inputs = make_query_and_key(2, 3, T=4, L=5, E=7)
    one = inputs["key"][:, :1].to(target.device).requires_grad_()
    query = inputs["query"].to(target.device)
    with fastcap.backend(target.backend):
        out = attention_coverage_from_scores(query, one.expand(2, 3, 5, 7), reduction="none")
    out.backward(upstream(out))
    _, _, dkey = run(target, query, one.detach().expand(2, 3, 5, 7).contiguous(), reduction="none")
    torch.testing.assert_close(one.grad, dkey.sum(1, keepdim=True))


def test_queries_and_keys_as_projections_leave_them(target):
    """[B, T, heads, E] in memory, seen as [B, heads, T, E]."""
    inputs = make_query_and_key(2, 3, T=4, L=5, E=7)
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    assert not views["query"].is_contiguous()
    for a, b in zip(run(target, **inputs), run(target, **views), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scratch", [1, 40, 700, 3000], ids=lambda n: f"{n}-bytes")
def test_blocks_of_any_size_give_the_same(scratch, cpp, monkeypatch, one_thread):
    """Captions, heads or steps at a time: scratch for less than a row, for some steps, for a head, for a caption."""
    inputs = make_query_and_key(3, 2, T=9, L=10, E=4)
    given = {"key_mask": make_key_mask(3, 10), "lengths": [9, 2, 5], "reduction": "none"}
    for dtype in (torch.float32, torch.float16):
        whole = run(cpp, **inputs, dtype=dtype, **given)
        monkeypatch.setattr(_score_blocks, "SCRATCH", scratch)
        blocks = run(cpp, **inputs, dtype=dtype, **given)
        monkeypatch.undo()
        tight = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(blocks, whole, **tight)


def test_blocks_cover_everything_once_and_fit_the_scratch(monkeypatch):
    monkeypatch.setattr(_score_blocks, "SCRATCH", 400)
    for B, heads, T, L in ((5, 2, 3, 4), (2, 3, 5, 8), (2, 2, 9, 30), (1, 1, 1, 1000), (3, 4, 0, 5), (2, 0, 3, 4)):
        seen = torch.zeros(B, heads, T, L)
        for block in _score_blocks.blocks(B, heads, T, L, 2, 4):
            block.rows(seen).add_(1)
            assert block.rows(seen).numel() * 4 <= max(400, 4 * L)
        assert (seen == 1).all()


def test_results_do_not_depend_on_the_number_of_threads(cpp):
    before = torch.get_num_threads()
    found = []
    inputs = make_query_and_key(4, 4, T=70, L=200, E=16)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(cpp, **inputs, dtype=torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)  # the products are torch's


def test_weights_are_neither_kept_nor_ever_whole(compiled):
    """Of 10.5 MB of weights [B, heads, T, L] nothing is saved; the CPU's scratch is SCRATCH, not more."""
    B, heads, T, L, E = 2, 16, 128, 640, 4
    weights = 4 * B * heads * T * L
    leaves = [
        x.to(compiled.device, torch.float32).requires_grad_() for x in make_query_and_key(B, heads, T=T, L=L, E=E).values()
    ]
    kept = []
    watch = Allocations()
    with (
        fastcap.backend(compiled.backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        with watch:
            out = attention_coverage_from_scores(*leaves)
            out.backward()
    own = {x.data_ptr() for x in leaves}
    rows = [x for x in kept if x.data_ptr() not in own]
    assert kept and sum(x.nbytes for x in rows) <= 4 * B * heads * (T + L)
    largest = max(_score_blocks.SCRATCH, 4 * B * heads * (T + L) * E)  # or a gradient
    assert watch.largest <= largest < weights / 4


def test_nothing_is_kept_without_a_gradient(cpp):
    inputs = make_query_and_key(1, 2, T=3, L=5, E=4)
    with fastcap.backend(cpp.backend):
        _, residual, lse = torch.ops.fastcap.attention_coverage_from_scores_fwd(
            *inputs.values(), None, None, None, 1.0, 1.0, "mean", False, "cpp"
        )
    assert residual.numel() == lse.numel() == 0


def test_autocast_casts_as_it_does_for_scaled_dot_product_attention(target):
    """Query and key are rounded to autocast's dtype, float64 is not; the result is float32 (float64)."""
    inputs = {name: x.to(target.device, torch.float32) for name, x in make_query_and_key(2, 2, T=3, L=5, E=4).items()}
    rounded = {name: x.bfloat16() for name, x in inputs.items()}
    mixed = {"query": inputs["query"].half(), "key": inputs["key"]}  # neither is in autocast's dtype
    with fastcap.backend(target.backend), torch.autocast(target.device, torch.bfloat16):
        out = attention_coverage_from_scores(**inputs, reduction="none")
        expected = attention_coverage_from_scores(**rounded, reduction="none")
        assert torch.equal(out, expected) and out.dtype == torch.float32
        assert attention_coverage_from_scores(**mixed).dtype == torch.float32
        double = {name: x.double() for name, x in inputs.items()}
        assert attention_coverage_from_scores(**double).dtype == torch.float64


def test_products_of_our_own_are_not_cast_again_by_autocast(cpp):
    """Half precision is rounded once, in the arguments: the same bits as without autocast, in forward and backward."""
    inputs = {name: x.bfloat16() for name, x in make_query_and_key(2, 2, T=3, L=5, E=4).items()}
    found = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        with fastcap.backend("cpp"), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attention_coverage_from_scores(*leaves, reduction="none")
            out.backward(torch.ones_like(out))
        found.append((out.to(torch.bfloat16), *(leaf.grad for leaf in leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_float16_gradients_survive_a_loss_scale(reduction, fused):
    """With a loss scale of 30,000 the weights' gradients, 2 r g, are beyond float16's range, not those of query and key."""
    inputs = {name: 0.1 * x for name, x in make_query_and_key(2, 2, T=3, L=5, E=4).items()}
    found = []
    for dtype in (torch.float16, torch.float64):
        leaves = [x.half().to(fused.device, dtype).requires_grad_() for x in inputs.values()]
        with fastcap.backend(fused.backend):
            out = attention_coverage_from_scores(*leaves, reduction=reduction, target=5.0)
        found.append(torch.autograd.grad(out, leaves, torch.full_like(out, 3e4)))
    for half, exact in zip(*found, strict=True):
        assert 1 < exact.abs().max() < 1e4
        torch.testing.assert_close(half.double(), exact, rtol=0.01, atol=0.002 * exact.abs().max().item())


def test_a_double_backward_is_refused_but_by_the_reference(target):
    leaves = [x.to(target.device).requires_grad_() for x in make_query_and_key(1, T=3, L=4, E=2).values()]
    with fastcap.backend(target.backend):
        out = attention_coverage_from_scores(*leaves)
    (gradient,) = torch.autograd.grad(out, leaves[0], create_graph=True)
    if target.backend == "reference":
        assert torch.autograd.grad(gradient.square().sum(), leaves[1])[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.sum().backward()


def test_its_floor_counts_products_and_what_they_read_and_write():
    """By hand: 2 x 3 matrices of (4 + 5) x 7 numbers of 4 bytes; a product of 2 x 4 x 5 x 7 FLOPs each."""
    from fastcap.benchmarks import floors

    forward = floors.attention_coverage_from_scores(2, 3, 4, 5, 7, 4, backward=False)
    assert forward == floors.Traffic(bytes=6 * 63 * 4, flops=6 * 280)
    both = floors.attention_coverage_from_scores(2, 3, 4, 5, 7, 4, backward=True)
    assert both == floors.Traffic(bytes=3 * forward.bytes, flops=4 * forward.flops)


# Errors ----------------------------------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 6, 5)
WRONG = {
    "query must be a torch.Tensor": ([1.0], K, {}),
    "query must be float32 or": (Q.long(), K, {}),
    "query must be dense": (Q.to_sparse(), K, {}),
    "query must have shape [B, heads, T, E] or [B, T, E], E >= 1, got [4, 5]": (Q[0, 0], K, {}),
    "E >= 1, got [2, 3, 4, 0]": (Q[..., :0], K[..., :0], {}),
    "key must have shape [B, heads, L, E], L >= 1, to query's [2, 3, 4, 5], got [2, 1, 6, 5]": (Q, K[:, :1], {}),
    "key must have shape [B, L, E]": (Q[:, 0], K, {}),
    "got [2, 3, 6, 4]": (Q, K[..., :4], {}),
    "got [2, 3, 0, 5]": (Q, K[:, :, :0], {}),
    "key must have the dtype of query, float32, got 'float16'": (Q, K.half(), {}),
    "scale must be None or a finite number, got inf": (Q, K, {"scale": math.inf}),
    "scale must be None or a finite number, got True": (Q, K, {"scale": True}),
    "scale must be None or a finite number, got nan": (Q, K, {"scale": math.nan}),
    "key_mask must be a torch.Tensor": (Q, K, {"key_mask": [True]}),
    "key_mask must be bool": (Q, K, {"key_mask": torch.ones(2, 6)}),
    "key_mask must have shape [B, L] = [2, 6], got [2, 4]": (Q, K, {"key_mask": torch.ones(2, 4, dtype=torch.bool)}),
    "reduction must be one of": (Q, K, {"reduction": "max"}),
    "mask must be None where lengths are given": (Q, K, {"lengths": [1, 2], "mask": torch.ones(2, 4, dtype=torch.bool)}),
    "mask must have shape [B, T] = [2, 4]": (Q, K, {"mask": torch.ones(2, 6, dtype=torch.bool)}),
    "lengths must lie in [0, T] = [0, 4], got 5": (Q, K, {"lengths": [1, 5]}),
    "target must be a finite number": (Q, K, {"target": "L"}),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_arguments_are_named(message):
    query, key, given = WRONG[message]
    with pytest.raises(FastcapError) as raised:
        attention_coverage_from_scores(query, key, **given)
    assert str(raised.value).startswith(f"fastcap.{OP}: ") and message in str(raised.value)


def _forward_arguments(**other):
    given = {
        "scores": torch.zeros(2, 3, 4, 6),
        "key_mask": torch.ones(2, 6, dtype=torch.uint8),
        "valid": torch.ones(2, 4, dtype=torch.uint8),
        "lse": torch.zeros(2, 3, 4),
        "sums": torch.zeros(2, 3, 6),
    }
    return (*{**given, **other}.values(), False, 1)


def _backward_arguments(**other):
    given = {
        "scores": torch.zeros(2, 3, 4, 6),
        "key_mask": torch.ones(2, 6, dtype=torch.uint8),
        "valid": torch.ones(2, 4, dtype=torch.uint8),
        "lse": torch.zeros(2, 3, 4),
        "residual": torch.zeros(2, 3, 6),
        "grad_out": torch.zeros(2, 3, 6),
    }
    return (*{**given, **other}.values(), 1.0, 1)


BAD = {
    "scores": (
        torch.zeros(2, 12, 6), torch.zeros(2, 3, 6, 4).mT, torch.zeros(2, 3, 4, 6).half(), torch.zeros(2, 3, 4, 0), None,
        torch.zeros(2, 3, 4, 6, device="meta"),
    ),
    "key_mask": (torch.ones(2, 5, dtype=torch.uint8), torch.ones(2, 6), torch.ones(6, 2, dtype=torch.uint8).T),
    "valid": (torch.ones(2, 3, dtype=torch.uint8), torch.ones(2, 4)),
    "lse": (torch.zeros(2, 3, 3), torch.zeros(2, 3, 4).double(), torch.zeros(24)),
    "sums": (torch.zeros(2, 3, 5), torch.zeros(2, 3, 6).double(), torch.zeros(2, 3, 12)[..., ::2], None),
    "residual": (torch.zeros(2, 3, 5), torch.zeros(2, 3, 6).double(), None),
    "grad_out": (torch.zeros(2, 3, 5), torch.zeros(2, 3, 6).double(), torch.zeros(6), torch.zeros(()).double(), None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_the_extension_checks_what_it_is_given(name, cpp):
    """Called by hand with wrong shapes, dtypes or layouts it raises: it never follows a pointer too far."""
    extension = _backend.extension()
    made = {"fwd": _forward_arguments, "bwd": _backward_arguments}
    for direction, arguments in made.items():
        call = getattr(extension, f"attention_coverage_from_scores_rows_{direction}_cpu")
        call(*arguments())
        for wrong in BAD[name]:
            try:
                given = arguments(**{name: wrong})
            except TypeError:
                continue
            if len(given) != len(arguments()):  # not one of its arguments
                continue
            with pytest.raises((FastcapError, TypeError, RuntimeError)):
                call(*given)


def test_no_rows_and_no_captions_are_no_error_in_the_extension(cpp):
    extension = _backend.extension()
    sums = torch.full((2, 3, 6), 7.0)
    empty = {"scores": torch.zeros(2, 3, 0, 6), "valid": None, "lse": torch.zeros(2, 3, 0)}
    extension.attention_coverage_from_scores_rows_fwd_cpu(*_forward_arguments(**empty, sums=sums))
    assert not sums.any()
    extension.attention_coverage_from_scores_rows_bwd_cpu(*_backward_arguments(**empty))
