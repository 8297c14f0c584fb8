"""attention_coverage: worked numbers, bounds, the normalisations in use, steps that do not count, memory, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import fastcap
from fastcap import functional as F_cap
from fastcap import nn
from fastcap.errors import FastcapError
from fastcap.ops import _backend, _checks
from fastcap.testing import OPERATIONS, Allocations, assert_close_to_float64, upstream
from fastcap.testing.coverage import make_alpha

OP = "fastcap.attention_coverage: "
REDUCTIONS = ("mean", "batchmean", "sum", "none")
nan, inf = math.nan, math.inf


def call(where, alpha, grad=None, **options):
    """Penalty and gradient on the CPU; `grad` is the upstream gradient, by default no two elements alike."""
    x = alpha.detach().to(where.device).requires_grad_()
    options = {k: v.to(where.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with fastcap.backend(where.backend):
        out = F_cap.attention_coverage(x, **options)
    (dx,) = torch.autograd.grad(out, x, upstream(out) if grad is None else grad.to(out))
    return out.detach().cpu(), dx.cpu()


def on_cpu(name):
    status = fastcap.backends()[name]
    if not status:
        pytest.skip(status.reason)
    return fastcap.backend(name)


# Worked by hand --------------------------------------------------------------------------------------------------------

# Three steps on a 2 x 2 map, [[.1, .4], [.2, .3]] and so on: the locations get .2, .9, .6, 1.3.
STEPS = [[0.1, 0.4, 0.2, 0.3], [0.1, 0.1, 0.1, 0.7], [0.0, 0.4, 0.3, 0.3]]
SAME = [[0.0, 1.0, 0.0, 0.0]] * 3  # the same location three times: 3 - 1 squared, and three locations with none


@pytest.mark.parametrize(("steps", "value"), [(STEPS, 0.9), (SAME, 7.0)], ids=["spread", "the-maximum"])
def test_worked_examples(steps, value, target):
    alpha = torch.tensor([steps], dtype=torch.float64)
    S = alpha.sum(1)
    squares = (1 - S) ** 2
    for reduction, wanted in {"batchmean": value, "sum": value, "mean": value / 4, "none": squares}.items():
        out, dx = call(target, alpha, grad=torch.ones(()) if reduction != "none" else torch.ones(1, 4), reduction=reduction)
        torch.testing.assert_close(out, torch.as_tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=1e-14)
        gradient = (-2 * (1 - S) / (4 if reduction == "mean" else 1))[:, None].expand(1, 3, 4)
        torch.testing.assert_close(dx, gradient, rtol=1e-14, atol=1e-14)


def test_heads_are_averaged_like_captions(target):
    alpha = torch.tensor([[STEPS, SAME]], dtype=torch.float64)
    for reduction, wanted in {"sum": 7.9, "batchmean": 7.9 / 2, "mean": 7.9 / 8}.items():
        out, _ = call(target, alpha, reduction=reduction)
        assert out.item() == pytest.approx(wanted, rel=1e-14)
    flat, dflat = call(target, alpha[0], reduction="none")
    out, dx = call(target, alpha, reduction="none")
    assert torch.equal(out[0], flat) and torch.equal(dx[0], dflat)


# Laws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "L"), [(1, 1), (3, 4), (7, 5), (20, 196)])
def test_the_penalty_keeps_its_bounds(T, L, cpp):
    def penalty(alpha, **options):
        return call(cpp, alpha, reduction="batchmean", **options)[0].item()

    low, high = L * (1 - T / L) ** 2, (T - 1) ** 2 + (L - 1)
    assert penalty(torch.full((2, T, L), 1 / L, dtype=torch.float64)) == pytest.approx(low, abs=1e-9)
    hot = F.one_hot(torch.zeros(2, T, dtype=torch.int64), L).double()
    assert penalty(hot) == pytest.approx(high)
    for seed, sharpness in enumerate((0.1, 1.0, 10.0, 100.0)):
        found = penalty(make_alpha(3, T, L, seed=seed, sharpness=sharpness))
        assert low - 1e-9 <= found <= high + 1e-9
        assert -1e-9 <= penalty(make_alpha(3, T, L, seed=seed), target="length") <= (T - T / L) ** 2 + (L - 1) * (T / L) ** 2
    assert penalty(torch.full((2, T, L), 1 / L, dtype=torch.float64), target="length") == pytest.approx(0, abs=1e-12)


def test_normalisations_are_those_of_the_codes_in_use(target):
    alpha = make_alpha(5, 6, 9, seed=3)
    formula = sum(((1 - alpha[b].sum(0)) ** 2).sum() for b in range(5)) / 5
    tutorial = ((1.0 - alpha.sum(dim=1)) ** 2).mean()
    theano = ((1.0 - alpha.transpose(0, 1).sum(0)) ** 2).sum(0).mean()  # time first there
    for reduction, wanted in {"batchmean": formula, "mean": tutorial, "sum": theano * 9}.items():
        torch.testing.assert_close(call(target, alpha, reduction=reduction)[0], wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("penalty_target", [1.0, "length"])
def test_a_converted_weight_gives_the_same_penalty(heads, penalty_target):
    B, T, L = 3, 4, 6
    alpha = make_alpha(B, heads, T, L)
    values = {r: F_cap.attention_coverage(alpha, reduction=r, target=penalty_target).item() for r in REDUCTIONS[:3]}
    values["theano"] = values["sum"] / L
    for source, value in values.items():
        for to, other in values.items():
            weight = F_cap.convert_coverage_weight(0.7, source, to, batch=B, locations=L, heads=heads)
            assert weight * other == pytest.approx(0.7 * value, rel=1e-12), (source, to)
            back = F_cap.convert_coverage_weight(weight, to, source, batch=B, locations=L, heads=heads)
            assert back == pytest.approx(0.7, rel=1e-14)


def test_the_order_of_steps_does_not_matter_and_that_of_locations_moves_the_result(fused):
    alpha = make_alpha(2, 5, 7, seed=4)
    of_each = {"reduction": "none"}
    out, _ = call(fused, alpha, **of_each)
    torch.testing.assert_close(call(fused, alpha.flip(1), **of_each)[0], out, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(call(fused, alpha.flip(2), **of_each)[0], out.flip(1), rtol=1e-14, atol=1e-14)


# Steps that do not count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("penalty_target", [1.0, "length"])
@pytest.mark.parametrize("heads", [0, 2])
def test_lengths_masks_and_slices_agree(reduction, penalty_target, heads, target):
    B, T, L = 4, 6, 5
    alpha = make_alpha(*((B, heads, T, L) if heads else (B, T, L)), seed=5)
    lengths = [6, 3, 0, 1]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    options = {"reduction": reduction, "target": penalty_target}
    results = [
        call(target, alpha, lengths=torch.tensor(lengths), **options),
        call(target, alpha, lengths=torch.tensor(lengths, dtype=torch.int32), **options),
        call(target, alpha, lengths=lengths, **options),
        call(target, alpha, mask=mask, **options),
    ]
    for out, dx in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(dx, results[0][1])
    leaf = alpha.clone().requires_grad_()
    tau = [n / L if penalty_target == "length" else 1.0 for n in lengths]
    each = torch.stack([(tau[b] - leaf[b, ..., : lengths[b], :].sum(-2)) ** 2 for b in range(B)])  # caption by caption
    divisor = {"mean": each.numel(), "batchmean": each.numel() / L}.get(reduction, 1)
    wanted = each if reduction == "none" else each.sum() / divisor
    (dwanted,) = torch.autograd.grad(wanted, leaf, upstream(wanted))
    torch.testing.assert_close(results[0][0], wanted.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(results[0][1], dwanted, rtol=1e-13, atol=1e-13)


def test_full_lengths_are_as_none(target):
    alpha = make_alpha(3, 4, 5)
    with_lengths, without = call(target, alpha, lengths=[4, 4, 4]), call(target, alpha)
    torch.testing.assert_close(with_lengths, without, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_steps_that_do_not_count_may_hold_anything(reduction, dtype, target):
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    clean = make_alpha(3, 2, 4, 16).to(dtype).masked_fill(~mask[:, None, :, None], 0.0)
    for garbage in (nan, inf, -inf):
        alpha = clean.masked_fill(~mask[:, None, :, None], garbage)
        out, dx = call(target, alpha, mask=mask, reduction=reduction)
        wanted, dwanted = call(target, clean, mask=mask, reduction=reduction)
        assert torch.equal(out, wanted) and torch.equal(dx, dwanted)
        assert (dx.transpose(1, 2)[~mask] == 0).all() and (dx.transpose(1, 2)[mask] != 0).all()


def test_nan_at_a_step_that_counts_is_not_hidden(target):
    alpha = make_alpha(2, 3, 4)
    alpha[1, 2, 3] = nan
    out, dx = call(target, alpha, lengths=[3, 3], reduction="none")
    assert out[1, 3].isnan() and out.isnan().sum() == 1 and dx[1, :, 3].isnan().all() and dx.isnan().sum() == 3
    assert call(target, alpha)[0].isnan()
    assert call(target, alpha, lengths=[3, 2])[0].isfinite()


def test_no_step_leaves_the_target_itself(target):
    alpha = make_alpha(2, 3, 4)
    for options in ({"lengths": [0, 0]}, {"mask": torch.zeros(2, 3, dtype=torch.bool)}):
        out, dx = call(target, alpha, target=0.5, reduction="none", **options)
        assert (out == 0.25).all() and (dx == 0).all()
    out, dx = call(target, alpha[:, :0], reduction="batchmean")  # T = 0
    assert out == 4 and dx.shape == (2, 0, 4)


# Memory ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 30, 50), (2, 3, 30, 50)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_lengths_the_gradient_is_one_row_expanded(shape, reduction, fused):
    alpha = make_alpha(*shape).to(fused.device, torch.float32)
    _, dx = call(fused, alpha, reduction=reduction)
    assert dx.stride(-2) == 0 and dx.stride(-1) == 1 and dx.shape == shape
    assert dx.untyped_storage().nbytes() == 4 * dx.select(-2, 0).numel()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_lengths_nothing_of_the_size_of_alpha_is_made(reduction, cpp):
    alpha = make_alpha(4, 30, 50).float().requires_grad_()
    with fastcap.backend(cpp.backend), Allocations() as seen:
        out = F_cap.attention_coverage(alpha, reduction=reduction)
        torch.autograd.grad(out, alpha, torch.ones_like(out))
    assert seen.largest <= 4 * 50 * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [None, [3, 2]])
def test_the_residual_is_all_that_is_kept(dtype, lengths, cpp):
    alpha = make_alpha(2, 2, 3, 5).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), fastcap.backend("cpp"):
        F_cap.attention_coverage(alpha, lengths=lengths)
    residual, *valid = (x for x in kept if x.numel())  # an empty one links the gradient to the graph
    steps = [3, 3] if lengths is None else lengths
    wanted = 1 - torch.stack([alpha.detach()[b, :, : steps[b]].double().sum(1) for b in range(2)])
    assert residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(residual.double(), wanted, rtol=0, atol=1e-6)
    assert [x.dtype for x in valid] == [torch.bool] * (lengths is not None)


def test_without_a_gradient_nothing_is_kept(cpp):
    alpha = make_alpha(2, 3, 5).requires_grad_()
    with fastcap.backend("cpp"), torch.no_grad():
        out = F_cap.attention_coverage(alpha)
    assert out.grad_fn is None
    out, residual = torch.ops.fastcap.attention_coverage_fwd(alpha.detach(), None, None, 1.0, "mean", False, "cpp")
    assert residual.numel() == 0


# Numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((2, 2000, 33), "more steps than are summed in a row"),
        ((1, 3, 5000), "several blocks of locations"),
        ((3, 52, 196), "a row that is no whole number of vectors"),
        ((2, 4, 9, 577), "heads; an odd row"),
        ((70, 65, 64), "pieces for several threads, and one step after a full run"),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_real_shapes_are_as_near_to_float64_as_torch(shape, why, dtype, compiled, reference):
    alpha = make_alpha(*shape, seed=7).to(dtype)
    lengths = torch.arange(shape[0]) * 37 % (shape[-2] + 1)
    for options in ({"reduction": "none"}, {"reduction": "none", "lengths": lengths}, {"lengths": lengths}):
        exact, plain = call(reference, alpha.double(), **options), call(reference, alpha, **options)
        actual = call(compiled, alpha, **options)
        for a, e, p, what in zip(actual, exact, plain, ("output", "gradient"), strict=True):
            assert_close_to_float64(a, e, p, what)


def test_every_half_precision_number_is_read_right(cpp):
    """All 65,536 bit patterns, by whole vectors and as a tail."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        for L in (65_536, 1):
            alpha = bits.view(dtype).view(65_536 // L, 1, L)
            with fastcap.backend("cpp"):
                out = F_cap.attention_coverage(alpha.requires_grad_(), reduction="none", target=0.0)
            assert torch.equal(out.nan_to_num(nan=-1), alpha[:, 0].float().square().to(dtype).nan_to_num(nan=-1))


def test_results_do_not_depend_on_the_number_of_threads(cpp):
    before, results = torch.get_num_threads(), []
    alpha = make_alpha(64, 60, 130).float()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for options in ({}, {"lengths": torch.arange(64) % 61}):
                results.append(call(cpp, alpha, **options))
    finally:
        torch.set_num_threads(before)
    for i, (out, dx) in enumerate(results):
        assert torch.equal(out, results[i % 2][0]) and torch.equal(dx, results[i % 2][1])


@pytest.mark.parametrize("lengths", [None, [3, 1]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_pass_gradcheck(lengths, reduction, backend):
    alpha = make_alpha(2, 3, 4).requires_grad_()
    with on_cpu(backend):
        assert torch.autograd.gradcheck(
            lambda a: F_cap.attention_coverage(a, lengths=lengths, reduction=reduction, target=0.7), (alpha,)
        )


def test_backward_through_a_softmax_is_that_of_plain_torch(fused):
    """The expanded gradient is taken up by the operation below."""
    scores = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, plain = (scores.to(fused.device).requires_grad_() for _ in range(2))
    with fastcap.backend(fused.backend):
        F_cap.attention_coverage(ours.softmax(-1)).backward()
    ((1 - plain.softmax(-1).sum(1)) ** 2).mean().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-14)


def test_a_double_backward_is_refused_but_by_the_reference(cpp):
    for lengths in (None, [2, 1]):
        alpha = make_alpha(2, 3, 4).requires_grad_()
        with fastcap.backend("cpp"):
            (dx,) = torch.autograd.grad(F_cap.attention_coverage(alpha, lengths=lengths), alpha, create_graph=True)
        with pytest.raises(RuntimeError, match="attention_coverage: the gradient must not be differentiated again"):
            dx.sum().backward()
        with fastcap.backend("reference"):
            (dx,) = torch.autograd.grad(F_cap.attention_coverage(alpha, lengths=lengths), alpha, create_graph=True)
        dx.square().sum().backward()
        assert alpha.grad.abs().sum() > 0


# The module ------------------------------------------------------------------------------------------------------------


def test_the_module_is_the_function():
    alpha, tau = make_alpha(2, 3, 4), torch.tensor([0.5, 0.7], dtype=torch.float64)
    for options in ({}, {"target": "length", "reduction": "sum"}, {"target": tau, "reduction": "none"}):
        module = nn.AttentionCoverage(**options)
        assert torch.equal(module(alpha), F_cap.attention_coverage(alpha, **options))
        assert torch.equal(module(alpha, [1, 3]), F_cap.attention_coverage(alpha, lengths=[1, 3], **options))
        mask = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
        assert torch.equal(module(alpha, mask=mask), F_cap.attention_coverage(alpha, mask=mask, **options))
    assert dict(module.named_buffers()).keys() == {"target_sums"}
    assert repr(module) == "AttentionCoverage(target=tensor [2], reduction='none')"
    assert repr(nn.AttentionCoverage(target=0)) == "AttentionCoverage(target=0, reduction='mean')"


# Errors ----------------------------------------------------------------------------------------------------------------

B, T, L = 2, 3, 5
DTYPES = "float32 or float64 or float16 or bfloat16"
SHAPE = "alpha must have shape [B, T, L] or [B, heads, T, L], L >= 1, got "
STACK = "; stack the weights of the steps in dimension 1"
STEPS_OF = "; pass the number of steps of each caption"
COUNT = "; count the steps that there are"
NUMBERS = "target must be a finite number, 'length' or a tensor [B], got "
INTEGERS = "int64 or int32 or int16 or int8 or uint8"
OTHER = "must be on the device of input, cpu, got 'meta'"
ONE_EACH = "; pass one number a caption, or a float for all"
REQUIRES = "must not require a gradient, got 'requires_grad=True'"
SEE = "; see docs/math/attention_coverage.md"
PASS = "; pass 1.0, or 'length' for T_b / L"
SHARED = "; one value a caption and step, heads share it"
MASK = torch.ones(B, T, dtype=torch.bool)
BAD = [
    ({"alpha": [1.0]}, "alpha must be a torch.Tensor, got 'list'; pass the attention weights"),
    ({"alpha": torch.zeros(B, T, L).long()}, f"alpha must be {DTYPES}, got 'int64'; convert the attention weights"),
    ({"alpha": torch.zeros(B, T, L).to_sparse()}, "alpha must be dense, got torch.sparse_coo; call alpha.to_dense()"),
    ({"alpha": torch.zeros(T, L)}, f"{SHAPE}[3, 5]{STACK}"),
    ({"alpha": torch.zeros(1, 1, 1, 1, 1)}, f"{SHAPE}[1, 1, 1, 1, 1]{STACK}"),
    ({"alpha": torch.zeros(B, T, 0)}, f"{SHAPE}[2, 3, 0]{STACK}"),
    ({"reduction": "avg"}, "reduction must be one of 'none', 'mean', 'batchmean', 'sum', got 'avg'; pass reduction='mean'"),
    ({"reduction": None}, "reduction must be one of 'none', 'mean', 'batchmean', 'sum', got None; pass reduction='mean'"),
    ({"lengths": [1, 2], "mask": MASK}, "mask must be None where lengths are given, got 'both'; pass one of them"),
    ({"mask": [[True]]}, "mask must be a torch.Tensor, got 'list'; pass a bool tensor, True where a step counts"),
    ({"mask": MASK.float()}, "mask must be bool, got 'float32'; pass mask != 0, True where a step counts"),
    ({"mask": MASK[:, 1:]}, f"mask must have shape [B, T] = [2, 3], got [2, 2]{SHARED}"),
    ({"mask": MASK.to("meta")}, f"mask {OTHER}; call mask.to(input.device)"),
    ({"lengths": torch.tensor([1.0, 2.0])}, f"lengths must be {INTEGERS}, got 'float32'{STEPS_OF}"),
    ({"lengths": torch.tensor([1])}, f"lengths must have shape [B] = [2], got [1]{STEPS_OF}"),
    ({"lengths": [1, 2, 3]}, f"lengths must have shape [B] = [2], got [3]{STEPS_OF}"),
    ({"lengths": torch.tensor(3)}, f"lengths must have shape [B] = [2], got []{STEPS_OF}"),
    ({"lengths": 3}, f"lengths must be a tensor or a list of ints, got 3{STEPS_OF}"),
    ({"lengths": [1.0, 2]}, f"lengths must be a tensor or a list of ints, got [1.0, 2]{STEPS_OF}"),
    ({"lengths": [True, 2]}, f"lengths must be a tensor or a list of ints, got [True, 2]{STEPS_OF}"),
    ({"lengths": [4, 2]}, f"lengths must lie in [0, T] = [0, 3], got 4{COUNT}"),
    ({"lengths": torch.tensor([1, -1])}, f"lengths must lie in [0, T] = [0, 3], got -1{COUNT}"),
    ({"lengths": torch.tensor([1, 1]).to("meta")}, f"lengths {OTHER}; call lengths.to(input.device)"),
    ({"target": "mean"}, f"{NUMBERS}'mean'{PASS}"),
    ({"target": True}, f"{NUMBERS}True{PASS}"),
    ({"target": None}, f"{NUMBERS}None{PASS}"),
    ({"target": nan}, f"{NUMBERS}nan{PASS}"),
    ({"target": inf}, f"{NUMBERS}inf{PASS}"),
    ({"target": [1.0, 1.0]}, f"{NUMBERS}[1.0, 1.0]{PASS}"),
    ({"target": torch.ones(B).long()}, f"target must be {DTYPES}, got 'int64'; call target.float()"),
    ({"target": torch.ones(3)}, f"target must have shape [B] = [2], got [3]{ONE_EACH}"),
    ({"target": torch.ones(B, requires_grad=True)}, f"target {REQUIRES}; pass target.detach()"),
    ({"target": torch.ones(B, device="meta")}, f"target {OTHER}; call target.to(input.device)"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_bad_arguments_are_named(wrong, message, backend):
    with on_cpu(backend), pytest.raises(FastcapError) as caught:
        F_cap.attention_coverage(**{"alpha": make_alpha(B, T, L).float(), **wrong})
    assert str(caught.value) == OP + message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": "1"}, "weight must be a number in [-1e+300, 1e+300], got '1'; pass the factor of the penalty"),
        ({"source": "arctic"}, f"source must be one of 'mean', 'batchmean', 'sum', 'theano', got 'arctic'{SEE}"),
        ({"to": "none"}, f"to must be one of 'mean', 'batchmean', 'sum', 'theano', got 'none'{SEE}"),
        ({"batch": 0}, "batch must be an int of at least 1, got 0; pass the size of the batches that you train on"),
        ({"heads": 1.5}, "heads must be an int of at least 1, got 1.5; pass the size of the batches that you train on"),
    ],
)  # fmt: skip
def test_a_bad_conversion_is_named(wrong, message):
    given = {"weight": 1.0, "source": "mean", "to": "sum", "batch": 2, "locations": 3, **wrong}
    with pytest.raises(FastcapError) as caught:
        F_cap.convert_coverage_weight(given.pop("weight"), given.pop("source"), given.pop("to"), **given)
    assert str(caught.value) == f"fastcap.convert_coverage_weight: {message}"


def test_a_length_out_of_range_reads_nothing_out_of_bounds(target, monkeypatch):
    """Where looking at the lengths would cost a synchronisation, one above T counts as T, one below 0 as 0."""
    alpha = make_alpha(2, 3, 5)
    monkeypatch.setattr(_checks, "checks_values", lambda tensor: False)
    out, gradient = call(target, alpha, lengths=torch.tensor([2**40, -7]), reduction="none")
    wanted, its_gradient = call(target, alpha, lengths=torch.tensor([3, 0]), reduction="none")
    assert torch.equal(out, wanted) and (out[1] == 1).all()
    assert torch.equal(gradient, its_gradient) and (gradient[1] == 0).all()


def test_a_pending_negation_is_resolved(target):
    """The imaginary part of a conjugate is a view with torch's negative bit: only the dispatcher sees to it."""
    alpha = torch.randn(2, 3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).to(target.device)
    view = alpha.conj().imag
    assert view.is_neg()
    weight = alpha[:, 0].conj().imag  # an upstream gradient with the bit
    with fastcap.backend(target.backend):
        x = view.detach().requires_grad_()
        out = F_cap.attention_coverage(x, reduction="none")
        (gradient,) = torch.autograd.grad(out, x, weight)
    plain = view.clone().requires_grad_()
    wanted = (1 - plain.sum(1)) ** 2
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, plain, weight.clone())[0])


# Raw calls -------------------------------------------------------------------------------------------------------------


def raw(**wrong):
    """The forward and the backward of the extension with some tensors replaced."""
    t = {
        "alpha": torch.rand(B, T, L), "valid": torch.ones(B, T, dtype=torch.uint8), "tau": torch.ones(B),
        "out": torch.empty(()), "residual": torch.zeros(B, L), "grad_out": torch.ones(()), "dalpha": torch.empty(B, T, L),
        "reduction": 1, **wrong,
    }  # fmt: skip
    c = _backend.extension()
    c.attention_coverage_fwd_cpu(t["alpha"], t["valid"], t["tau"], t["out"], t["residual"], 1.0, t["reduction"], 1)
    c.attention_coverage_bwd_cpu(t["grad_out"], t["residual"], t["valid"], t["dalpha"], t["reduction"], 1)
    return t["out"], t["dalpha"]


RAW = {
    "alpha": [
        torch.rand(T, L), torch.rand(B, T, L + 1), torch.rand(B, T, L).long(), None, torch.rand(B, T, L, device="meta"),
    ],
    "valid": [torch.ones(B, T + 1).byte(), torch.ones(B).byte(), torch.ones(B, T), None],
    "tau": [torch.ones(B + 1), torch.ones(B).double(), torch.ones(())],
    "out": [torch.empty(1), torch.empty((), dtype=torch.float64), None, torch.empty((), device="meta")],
    "residual": [
        torch.zeros(B, L + 1), torch.zeros(L, B).T, torch.zeros(B, L).double(), torch.zeros(B, 1, L), None,
        torch.zeros(B, L, device="meta"),
    ],
    "grad_out": [torch.ones(1), torch.ones((), dtype=torch.float64), None],
    "dalpha": [torch.empty(B, L, T).mT, torch.empty(B, T), torch.empty(B, T, L + 1), None, torch.empty(B + 1, T, L)],
    "reduction": [0, 4, -1],
}  # fmt: skip


@pytest.mark.parametrize(("name", "place"), [(name, i) for name, values in RAW.items() for i in range(len(values))])
def test_raw_calls_with_wrong_tensors_raise(name, place, cpp):
    assert all(x.isfinite().all() for x in raw())
    with pytest.raises(FastcapError, match=r"fastcap\.attention_coverage: \w+ must .*, got .*; "):
        raw(**{name: RAW[name][place]})


def test_raw_operators_name_an_unknown_reduction(cpp):
    with pytest.raises(FastcapError, match="reduction must be one of none, mean, batchmean, sum, got 'avg'"):
        torch.ops.fastcap.attention_coverage_fwd(torch.rand(B, T, L), None, None, 1.0, "avg", True, "cpp")


# Benchmark -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("valid", "backward", "moved", "flops"),
    [  # two captions of three steps over five locations, two heads: 60 elements of 2 bytes, 20 sums
        (None, False, 60 * 2, 60 + 3 * 20),
        (4, False, 2 * 4 * 5 * 2, 40 + 3 * 20),
        (None, True, 60 * 2 + 20 * 2 + 2 * 20 * 4, 60 + 4 * 20),  # one row of the gradient; the residual written and read
        (4, True, 40 * 2 + 60 * 2 + 2 * 20 * 4, 40 + 4 * 20),
    ],
)
def test_traffic_by_hand(valid, backward, moved, flops):
    from fastcap.benchmarks import floors

    found = floors.attention_coverage(2, 2, 3, 5, 2, valid=valid, backward=backward)
    assert found == floors.Traffic(moved, flops)


def test_every_provider_of_the_benchmark_is_right_or_says_why_not(one_thread):
    from fastcap.benchmarks import bench_attention_coverage as bench
    from fastcap.benchmarks import harness

    settings = harness.Settings("tiny", "cpu", seconds=0.01)
    cases = bench.cases(settings)
    assert {(case.variant, case.mode) for case in cases} == {(v, m) for v in bench.VARIANTS for m in bench.MODES}
    for case in cases:
        rows = {result.row["provider"]: result.row["status"] for result in harness.measure(case, settings)}
        assert {rows["reference"], rows["eager"], rows["sum"]} == {"ok"} and set(rows.values()) <= {"ok", "unavailable"}
    of_all = [case for case in bench.cases(harness.Settings("default", "cpu")) if case.goals]
    assert {case.shape for case in of_all} == {"sat", "sat_large", "sat_huge"}
    assert all({goal.provider, goal.against} <= set(case.providers) for case in of_all for goal in case.goals)


# Triton ----------------------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(2, 17, 64), (1, 2, 33, 260), (2, 16, 77)], ids=lambda s: "x".join(map(str, s)))
def test_interpreted_blocks_and_tails_agree(shape, dtype, reference):
    alpha = make_alpha(*shape).to(dtype)
    where = reference._replace(backend="triton")
    lengths = torch.arange(shape[0]) * 11 % shape[-2] + 1
    for options in ({}, {"lengths": lengths, "reduction": "none"}):
        exact, plain = call(reference, alpha.double(), **options), call(reference, alpha, **options)
        for a, e, p in zip(call(where, alpha, **options), exact, plain, strict=True):
            assert_close_to_float64(a, e, p)


def test_rows_of_whole_packs_are_read_and_written_by_16_bytes():
    pytest.importorskip("triton")
    if _backend.interpreting():
        pytest.skip("nothing can be compiled under TRITON_INTERPRET=1")
    from fastcap.kernels._common import compile_for

    plans = dict(OPERATIONS["attention_coverage"].launches())
    forward, _, backward = plans["sat-masked-float32"]
    assert "ld.global.v4" in compile_for(forward, "cuda", 90, 32).asm["ptx"]
    assert "st.global.v4" in compile_for(backward, "cuda", 90, 32).asm["ptx"]
