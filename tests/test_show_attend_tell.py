"""Show, Attend and Tell: its variants, soft, hard and mean attention, scheduled sampling, and what its steps share."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastcap
from fastcap import models
from fastcap.errors import FastcapError
from fastcap.models import attention
from fastcap.models._steps import StepLinear, plan
from fastcap.models.show_attend_tell import CHOICES, VARIANTS
from fastcap.train.attention_terms import coverage_penalty, hard_attention_loss, update_baseline

pytestmark = pytest.mark.usefixtures("one_thread")

D, V = 12, 20
ALL = [
    pytest.param({"attention": kind, **options}, id=f"{kind}-{name}")
    for kind in CHOICES["attention"]
    for name, options in {**VARIANTS, "ungated": {"activation": "tanh", "gate": "none", "output": "deep"}}.items()
]


def _model(**options):
    """In float64, so that only what is computed can differ."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "embed_width": 11, "hidden_width": 10, "attention_width": 9, "dropout": 0.0}
    encoder = {"kind": "features", "width_in": 7, "width": D}
    return models.build("show-attend-tell", **{**sizes, "encoder": encoder, **options}).double()


@pytest.fixture
def features():
    """[B, R, 7] of 6 images, of which two have fewer regions than 5."""
    features = torch.randn(6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    features[1, 3:] = features[4, 1:] = 0
    return features


@pytest.fixture
def inputs():
    return torch.randint(1, V, (6, 8), generator=torch.Generator().manual_seed(2))


LENGTHS = torch.tensor([3, 8, 1, 5, 8, 2])


def _gradients(model, loss):
    return dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True),
            strict=True,
        )
    )


def _assert_same(found, wanted, rtol=1e-9, atol=1e-11):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


# What is computed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ALL)
def test_the_compiled_steps_have_the_gradients_of_plain_torch(options, features, inputs, cpp):
    _check_against_plain_torch(options, features, inputs, cpp)


@pytest.mark.parametrize("options", [ALL[0], ALL[4]])
def test_every_backends_steps_have_the_gradients_of_plain_torch(options, features, inputs, fused):
    _check_against_plain_torch(options, features, inputs, fused)


def _check_against_plain_torch(options, features, inputs, target):
    results, features, inputs = [], features.to(target.device), inputs.to(target.device)
    for backend in ("reference", target.backend):
        model = _model(**options).train().to(target.device)
        with fastcap.backend(backend):
            torch.manual_seed(5)
            decoded = model.teacher_forced(features, inputs, LENGTHS)
            generator = torch.Generator().manual_seed(3)
            terms = [x for x in decoded if x is not None]
            upstream = [torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in terms]
            loss = sum((x * weight).sum() for x, weight in zip(terms, upstream, strict=True))
            results.append((*terms, _gradients(model, loss)))
    *wanted, gradients = results[0]
    *found, other = results[1]
    assert len(found) == len(wanted) == (4 if options["attention"] == "hard" else 2)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)
    _assert_same(other, gradients)


@pytest.mark.parametrize("options", ALL)
def test_captions_that_end_leave_and_nothing_that_counts_changes(options, features, inputs):
    model = _model(**options).eval()
    counts = torch.arange(8) < LENGTHS.unsqueeze(1)
    weight = torch.rand(6, 8, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * counts.unsqueeze(2)
    whole, whole_alphas = model(features, inputs)
    part, part_alphas = model(features, inputs, LENGTHS)
    torch.testing.assert_close(part[counts], whole[counts], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part_alphas[counts], whole_alphas[counts], rtol=1e-12, atol=1e-12)
    assert (part[~counts] == 0).all() and (part_alphas[~counts] == 0).all()
    _assert_same(_gradients(model, (part * weight).sum()), _gradients(model, (whole * weight).sum()))


@pytest.mark.parametrize("options", ALL)
def test_a_step_at_a_time_is_the_parallel_pass(options, features, inputs):
    model = _model(**options).eval()
    expected, _ = model(features, inputs)
    memory = model.encode(features)
    state = model.start(memory)
    for t in range(inputs.shape[1]):
        logits, state = model.step(inputs[:, t], state, memory)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ALL)
def test_every_variant_decodes_by_beam_as_one_image_at_a_time(options, features):
    model = _model(**options)
    with torch.no_grad():
        model.head.weight.mul_(8)  # decided words
    found = models.beam_search(model, features, beam_size=3, max_length=6)
    for b in range(len(features)):
        alone = models.beam_search(model, features[b : b + 1], beam_size=3, max_length=6)
        assert alone.lists()[0] == found.lists()[b]
    assert (
        models.beam_search(model, features, beam_size=1, max_length=6).lists()
        == models.greedy(model, features, max_length=6).lists()
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_equations(name, features, inputs):
    model, options = _model(**VARIANTS[name]).eval(), VARIANTS[name]
    a, mask = model.encoder(features), model.encoder.mask(features)
    mean = torch.stack([row[kept].mean(0) for row, kept in zip(a, mask, strict=True)])
    h, c = torch.tanh(model.start_state(mean)).chunk(2, 1)
    activation, expected = {"tanh": torch.tanh, "relu": torch.relu}[options["activation"]], []
    for t in range(inputs.shape[1]):
        y = model.embed(inputs[:, t])
        e = model.score(activation(model.keys(a) + model.query(h).unsqueeze(1))).squeeze(2)
        z = (e.masked_fill(~mask, -torch.inf).softmax(1).unsqueeze(2) * a).sum(1) * torch.sigmoid(model.gate(h))
        i, f, o, g = (model.word_gates(y) + model.state_gates(torch.cat((z, h), 1))).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        deep = options["output"] == "deep"
        expected.append(model.head(torch.tanh(model.output_h(h) + y + model.output_z(z)) if deep else h))
    torch.testing.assert_close(model(features, inputs)[0], torch.stack(expected, 1), rtol=1e-11, atol=1e-12)


def test_a_variant_has_the_parameters_that_it_needs():
    shared = {"embed", "start_state", "word_gates", "state_gates", "head", "encoder"}
    attends = {"keys", "query", "score"}
    wanted = {
        ("soft", "original"): attends | {"gate", "output_h", "output_z"},
        ("hard", "original"): attends | {"gate", "output_h", "output_z", "baseline"},
        ("soft", "tutorial"): attends | {"gate"},
        ("mean", "tutorial"): {"gate"},
    }
    for (kind, variant), own in wanted.items():
        model = _model(attention=kind, **VARIANTS[variant])
        assert {name.split(".")[0] for name in model.state_dict()} == shared | own
        assert model.gate.out_features == (1 if variant == "original" else D)
        assert model.head.in_features == (11 if variant == "original" else 10)
    assert not hasattr(_model(gate="none"), "gate")


@pytest.mark.parametrize("variant", VARIANTS)
def test_mean_attention_is_soft_attention_whose_scores_are_alike(variant, features, inputs):
    mean, soft = (_model(attention=kind, **VARIANTS[variant]).eval() for kind in ("mean", "soft"))
    soft.load_state_dict(mean.state_dict(), strict=False)
    with torch.no_grad():
        soft.score.weight.zero_()
    logits, alphas = mean(features, inputs)
    wanted, wanted_alphas = soft(features, inputs)
    torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alphas, wanted_alphas, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alphas[1, 0], torch.tensor([1, 1, 1, 0, 0], dtype=torch.float64) / 3)


@pytest.mark.parametrize("options", ALL)
def test_regions_that_only_pad_change_nothing(options, features, inputs):
    model = _model(**options).eval()
    logits, alphas = model(features, inputs)
    padded, more = model(F.pad(features, (0, 0, 0, 4)), inputs)
    torch.testing.assert_close(padded, logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(more, F.pad(alphas, (0, 4)), rtol=1e-12, atol=1e-12)
    alone, _ = model(features[1:2, :3], inputs[1:2])
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ALL)
def test_an_image_without_a_region_is_no_nan(options, features, inputs):
    features[2] = 0
    model = _model(**options).train()
    model.HARD = 1.0
    decoded = model.teacher_forced(features, inputs)
    gradients = _gradients(model, sum(x.square().sum() for x in decoded if x is not None))
    assert all(x is None or x.isfinite().all() for x in (*decoded, *gradients.values()))
    assert (decoded.alphas[2] == 0).all()


# What is kept, copied and computed -------------------------------------------------------------------------------------


class _Given(nn.Module):
    """Annotations as they are: a frozen encoder."""

    width, config = D, {}

    def forward(self, images):
        self.seen = images
        return images

    def mask(self, images):
        return None


def _on_given(monkeypatch, **options):
    monkeypatch.setattr("fastcap.models.show_attend_tell.build_encoder", lambda config: _Given())
    torch.manual_seed(0)
    return models.build("show-attend-tell", **{"vocab_size": V, "encoder": {}, "dropout": 0.0, **options})


def _kept_bytes(run):
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    return sum(kept.values()), result


def test_nothing_of_the_size_of_all_steps_activations_is_kept(monkeypatch, cpp):
    B, T, L, A = 4, 16, 64, 96
    model = _on_given(monkeypatch, embed_width=16, hidden_width=16, attention_width=A)
    annotations, inputs = torch.randn(B, L, D), torch.randint(0, V, (B, T))
    activation = B * T * L * A * 4
    kept = {}
    for backend in ("reference", cpp.backend):
        with fastcap.backend(backend):
            kept[backend], result = _kept_bytes(lambda: model(annotations, inputs))
    weights = sum(p.numel() for p in model.parameters())
    assert kept["reference"] > activation
    # O(B L (D + A)) once, and O(B T (L + A + D)) of the steps, with 20 tensors of the width of state, words or gates
    assert kept["cpp"] < 4 * (B * L * (D + A) + B * T * (4 * L + 2 * A + 2 * D + 20 * 16) + weights) < activation / 4
    del result


def test_what_is_sorted_already_is_not_copied(monkeypatch):
    model, images = _on_given(monkeypatch), torch.randn(6, 4, D)
    inputs = torch.randint(0, V, (6, 8))
    for lengths in (None, torch.full((6,), 5), torch.tensor([8, 8, 5, 3, 3, 1])):
        model(images, inputs, lengths)
        assert model.encoder.seen is images
    model(images, inputs, LENGTHS)
    assert torch.equal(model.encoder.seen, images[LENGTHS.argsort(descending=True, stable=True)])


class _Shapes(TorchDispatchMode):
    """The shapes of all results but views."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.made += [tuple(x.shape) for x in made if x.untyped_storage().data_ptr() not in given]
        return result


def test_annotations_that_are_not_trained_get_no_gradient(monkeypatch, cpp):
    model, inputs = _on_given(monkeypatch), torch.randint(0, V, (6, 8))
    for wanted in (False, True):
        annotations = torch.randn(6, 4, D, requires_grad=wanted)
        loss = model(annotations, inputs)[0].square().sum()
        with _Shapes() as shapes:
            loss.backward()
        assert ((6, 4, D) in shapes.made) == wanted


def test_the_weights_of_the_steps_get_their_gradients_once(monkeypatch, cpp):
    model, inputs = _on_given(monkeypatch, hidden_width=16, embed_width=24, attention_width=40), torch.randint(0, V, (6, 8))
    loss = model(torch.randn(6, 4, D), inputs)[0].square().sum()
    with _Shapes() as shapes:
        loss.backward()
    assert all(shapes.made.count(shape) == 1 for shape in ((64, D + 16), (40, 16), (1, 16)))


def test_a_layer_of_steps_is_its_module_called_each_time():
    torch.manual_seed(0)
    rows, layer = [4, 3, 1], nn.Linear(5, 6, dtype=torch.float64)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    add = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    for given in (None, add):
        steps = StepLinear(layer, rows, add=given)
        found = torch.cat([steps(part) for part in x.split(rows)])
        wanted = layer(x) if given is None else F.linear(x, layer.weight) + add
        torch.testing.assert_close(found, wanted)
        upstream = torch.rand_like(found)
        tensors = [x, layer.weight, layer.bias, add]
        pairs = (torch.autograd.grad(y, tensors, upstream, retain_graph=True, allow_unused=True) for y in (found, wanted))
        for one, two in zip(*pairs, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two)
    (gradient,) = torch.autograd.grad(found.square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_layer_of_steps_need_not_take_all_of_them():
    layer, x = nn.Linear(5, 6, bias=False), torch.randn(7, 5)
    steps = StepLinear(layer, [4, 3, 2])
    made = [steps(x[:4]), steps(x[4:])]
    gradients = [torch.autograd.grad(y.sum(), layer.weight, retain_graph=True)[0] for y in (torch.cat(made), layer(x))]
    torch.testing.assert_close(*gradients)
    (first,) = torch.autograd.grad(made[0].sum(), layer.weight)
    torch.testing.assert_close(first, torch.autograd.grad(layer(x[:4]).sum(), layer.weight)[0])


def test_under_autocast_the_steps_multiply_in_bfloat16_and_the_gradient_is_the_weights():
    torch.manual_seed(0)
    layer, x, rows = nn.Linear(16, 6), torch.randn(12, 16), [6, 4, 2]
    with torch.autocast("cpu", torch.bfloat16):
        steps = StepLinear(layer, rows)
        found = torch.cat([steps(part) for part in x.split(rows)])
        wanted = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(y.float().square().sum(), layer.weight)[0] for y in (found, wanted)]
    assert gradients[0].dtype == torch.float32
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)


def test_the_plan_of_a_batch_follows_its_lengths():
    inputs = torch.arange(12).view(3, 4)
    rows, order, flat = plan(inputs, torch.tensor([2, 4, 1]))
    assert rows == [3, 2, 1, 1] and order.tolist() == [1, 0, 2]
    assert inputs.flatten()[flat].tolist() == [4, 0, 8, 5, 1, 6, 7]
    rows, order, flat = plan(inputs, None)
    assert rows == [3] * 4 and order is None and flat.view(4, 3).tolist() == inputs.t().tolist()
    assert plan(inputs, torch.tensor([4, 4, 2])).order is None


# Hard attention --------------------------------------------------------------------------------------------------------


def test_locations_are_sampled_as_often_as_they_weigh():
    alpha = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    uniform = (torch.arange(1000) + 0.5).unsqueeze(1) / 1000
    place, one_hot = attention.sample(alpha.expand(1000, 5), uniform)
    assert torch.bincount(place.squeeze(1), minlength=5).tolist() == [500, 0, 200, 300, 0]
    assert torch.equal(one_hot, F.one_hot(place.squeeze(1), 5).float())


def test_no_location_of_weight_0_is_sampled_at_the_ends_of_the_distribution():
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(4096, 7, generator=generator).pow(20)
    alpha[:, [0, 3, 6]] = 0  # at both ends
    alpha = alpha / alpha.sum(1, keepdim=True)
    for u in (0.0, 1 - 2**-24):
        place, one_hot = attention.sample(alpha, torch.full((4096, 1), u))
        assert (alpha.gather(1, place) > 0).all() and (one_hot.sum(1) == 1).all()
    place, one_hot = attention.sample(torch.zeros(2, 7), torch.rand(2, 1))
    assert (one_hot == 0).all() and place.max() < 7


def test_in_training_about_half_of_the_captions_sample_and_the_others_do_not():
    model = _model(attention="hard").train()
    features = torch.randn(200, 5, 7, dtype=torch.float64)
    inputs, lengths = torch.randint(1, V, (200, 4)), torch.randint(1, 5, (200,))
    torch.manual_seed(0)
    decoded = model.teacher_forced(features, inputs, lengths)
    counts = torch.arange(4) < lengths.unsqueeze(1)
    hard = decoded.log_probs[:, 0] != 0
    assert 70 < hard.sum() < 130  # 4 standard deviations
    assert torch.equal(decoded.log_probs != 0, hard.unsqueeze(1) & counts)
    p = decoded.log_probs.exp()[hard.unsqueeze(1) & counts]
    among = (decoded.alphas[hard.unsqueeze(1) & counts] - p.unsqueeze(1)).abs().min(1).values
    assert among.max() < 1e-12
    soft = _model(attention="soft").train()
    soft.load_state_dict(model.state_dict(), strict=False)
    wanted = soft.teacher_forced(features, inputs, lengths)
    torch.testing.assert_close(decoded.hidden[~hard], wanted.hidden[~hard], rtol=1e-12, atol=1e-12)
    assert (decoded.hidden[hard, 0] - wanted.hidden[hard, 0]).abs().sum(1).min() > 1e-6


def test_entropy_is_that_of_the_weights_and_its_gradient_is_finite_at_0():
    alphas = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    found = attention.entropy(alphas)
    wanted = torch.distributions.Categorical(probs=alphas.detach()).entropy()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), alphas)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[2], -(alphas[2].detach().log() + 1))


def test_a_seed_reproduces_the_samples_and_evaluation_has_none(features, inputs):
    model = _model(attention="hard").train()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(model.teacher_forced(features, inputs, LENGTHS))
    for one, other in zip(runs[0], runs[1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(runs[0].log_probs, runs[2].log_probs)
    state = torch.get_rng_state()
    decoded = model.eval().teacher_forced(features, inputs, LENGTHS)
    assert decoded.log_probs is None and decoded.entropy is None and torch.equal(torch.get_rng_state(), state)
    soft = _model(attention="soft").eval()
    soft.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(decoded.hidden, soft.hidden_states(features, inputs, LENGTHS))


def _costs(model, target, decoded):
    logits = model.head(decoded.hidden)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_the_estimator_is_in_expectation_the_gradient_of_the_expected_loss(monkeypatch, baseline):
    """One caption of 2 words, 2 locations: all 4 paths, each weighted by its probability."""
    model = _model(attention="hard", **VARIANTS["original"]).train()
    model.HARD = 1.0
    with torch.no_grad():
        model.score.weight.mul_(3)  # far from even
    features = torch.randn(1, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    inputs, target = torch.tensor([[1, 5]]), torch.tensor([[5, 2]])
    path = []

    def forced(alpha, uniform):
        place = torch.tensor([[path[forced.step]]])
        forced.step += 1
        return place, torch.zeros_like(alpha).scatter_(1, place, 1.0)

    def run(chosen):
        path[:], forced.step = chosen, 0
        decoded = model.teacher_forced(features, inputs)
        p = decoded.alphas[0, [0, 1], list(chosen)].prod()
        return _costs(model, target, decoded), decoded, p

    def expected_loss():
        with torch.no_grad():
            return sum((p * losses.mean()).item() for losses, _, p in map(run, itertools.product((0, 1), repeat=2)))

    monkeypatch.setattr(attention, "sample", forced)
    expectation, total = {}, 0.0
    for chosen in itertools.product((0, 1), repeat=2):
        losses, decoded, p = run(chosen)
        options = {"tokens": 2, "reinforce": 1.0, "entropy_weight": 0.0}
        moving = torch.tensor(baseline, dtype=torch.float64)
        terms = hard_attention_loss(losses, decoded.log_probs, decoded.entropy, torch.tensor([2]), moving, **options)
        total += p.item()
        for name, gradient in _gradients(model, losses.sum() / 2 + terms).items():
            expectation[name] = expectation.get(name, 0) + p.item() * gradient
    assert total == pytest.approx(1)
    checked = 0
    for name, parameter in model.named_parameters():  # against differences of the expected loss, in float64
        flat, found = parameter.data.view(-1), expectation[name].flatten()
        for i in range(0, len(flat), max(1, len(flat) // 3)):
            before, ends = flat[i].item(), []
            for change in (1e-5, -1e-5):
                flat[i] = before + change
                ends.append(expected_loss())
            flat[i] = before
            assert found[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-9), name
            checked += 1
    assert checked > 40 and expectation["score.weight"].abs().max() > 1e-4


def test_the_papers_weights_of_the_estimator():
    losses = torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    log_probs, entropy = torch.tensor([[-0.5, -1.0], [-2.0, 0.0]]), torch.tensor([[0.7, 0.6], [0.5, 0.0]])
    loss = hard_attention_loss(losses, log_probs, entropy, torch.tensor([2, 1]), torch.tensor(2.0), 3)
    # costs 3 and 3, of 2 tokens and 1, which the baseline expects to cost 4 and 2; log p -1.5 and -2
    torch.testing.assert_close(loss, torch.tensor((0.1 * (1.5 - 2.0) - 0.002 * 1.8) / 3))
    assert not loss.requires_grad  # the cost is not differentiated here: its gradient is the cross-entropy's own
    baseline = torch.tensor(2.0)
    update_baseline(baseline, torch.tensor(3.0))
    assert baseline.item() == pytest.approx(0.9 * 2 + 0.1 * 3)


# Scheduled sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHOICES["attention"])
def test_scheduled_sampling_of_0_is_none(kind, features, inputs):
    model = _model(attention=kind, dropout=0.5).train()
    runs = []
    for options in ({}, {"scheduled_sampling": 0.0}):
        torch.manual_seed(0)
        runs.append((model.teacher_forced(features, inputs, LENGTHS, **options), torch.get_rng_state()))
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))


@pytest.mark.parametrize("options", ALL)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_scheduled_sampling_of_1_feeds_what_the_model_says(options, lengths, features, inputs, monkeypatch):
    monkeypatch.setattr(attention, "sample", lambda p, uniform: (p.argmax(1, keepdim=True), None))
    model = _model(**options).eval()
    found, _ = model(features, inputs, lengths, scheduled_sampling=1.0)
    memory = model.encode(features)
    state, token = model.start(memory), inputs[:, 0]
    counts = torch.arange(8) < (LENGTHS if lengths is not None else torch.full((6,), 8)).unsqueeze(1)
    for t in range(8):
        logits, state = model.step(token, state, memory)
        torch.testing.assert_close(found[counts[:, t], t], logits[counts[:, t]], rtol=1e-12, atol=1e-12)
        token = logits.argmax(1)


def test_samples_are_drawn_as_often_as_asked_and_from_the_models_distribution(monkeypatch):
    model = _model().eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.full((V,), 1e-9).index_fill(0, torch.tensor([5, 7]), 1.0).log())
        model.head.bias[7] += torch.tensor(3.0).log()  # 5 and 7, one to three
    features, inputs = torch.randn(500, 3, 7, dtype=torch.float64), torch.zeros(500, 9, dtype=torch.int64)
    logits = []
    model.head.register_forward_hook(lambda module, given, out: logits.append(len(out)))
    torch.manual_seed(1)
    with torch.no_grad():
        replaced = model._replace(inputs, model.encode(features), plan(inputs, None), 0.25)
    assert (replaced[:, 0] == 0).all() and sum(logits) == (replaced[:, 1:] != 0).sum()  # no logits but the samples' own
    words, counts = replaced[:, 1:].unique(return_counts=True)
    assert words.tolist() == [0, 5, 7]
    share = counts / 4000
    assert abs(share[0] - 0.75) < 0.03 and abs(share[1] / (share[1] + share[2]) - 0.25) < 0.06


def test_a_share_outside_0_to_1_is_refused(features, inputs):
    with pytest.raises(FastcapError, match=r"fastcap.models: scheduled_sampling must be in \[0, 1\], got 1.5; pass 0 for"):
        _model().teacher_forced(features, inputs, scheduled_sampling=1.5)


# Coverage --------------------------------------------------------------------------------------------------------------

WORKED = {  # three steps over a map of 2 x 2, and the sum of (1 - sum_t alpha)^2
    0.9: [[0.1, 0.4, 0.2, 0.3], [0.1, 0.1, 0.1, 0.7], [0.0, 0.4, 0.3, 0.3]],
    7.0: [[1.0, 0.0, 0.0, 0.0]] * 3,
}


@pytest.mark.parametrize("R", WORKED)
def test_the_worked_examples_have_their_penalty_under_every_reduction(R):
    alphas = torch.tensor([WORKED[R]] * 2, dtype=torch.float64)
    lengths = torch.tensor([3, 3])
    wanted = {"sum": 2 * R, "batchmean": R, "mean": R / 4, "theano": 2 * R / 4}
    for reduction, value in wanted.items():
        for mask in (None, torch.ones(2, 4, dtype=torch.bool)):
            locations = None if mask is None else mask.sum()
            found = coverage_penalty(alphas, lengths, mask, captions=2, locations=locations, reduction=reduction)
            assert found.item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("target", ["1", "0.5", "length"])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "theano"])
def test_locations_that_do_not_count_are_not_penalised(reduction, target):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    alphas = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64) * mask.unsqueeze(1)
    lengths = torch.tensor([4, 2, 3])
    alphas = (alphas * (torch.arange(4) < lengths.unsqueeze(1)).unsqueeze(2)).requires_grad_()
    kinds = {"captions": 3, "target": target, "reduction": reduction}
    found = coverage_penalty(alphas, lengths, mask, locations=mask.sum(), **kinds)
    wanted = 0.0
    for b in range(3):
        L = int(mask[b].sum())
        tau = lengths[b] / L if target == "length" else float(target)
        R = (tau - alphas[b, :, :L].sum(0)).square().sum()
        wanted = wanted + R / {"mean": 10, "batchmean": 3, "sum": 1, "theano": L}[reduction]
    torch.testing.assert_close(found, wanted)
    pair = [torch.autograd.grad(x, alphas, retain_graph=True)[0] for x in (found, wanted)]
    torch.testing.assert_close(pair[0] * mask.unsqueeze(1), pair[1])


# Files and errors ------------------------------------------------------------------------------------------------------


def test_a_model_of_before_the_variants_is_loaded_as_the_original(tmp_path, features, inputs):
    model = _model().float()
    models.save(model, tmp_path)
    file = tmp_path / "model.json"
    config = json.loads(file.read_text())
    for name in CHOICES:
        del config[name]
    file.write_text(json.dumps(config))
    again = models.load(tmp_path)
    assert again.config == model.config and again.config.attention == "soft" and again.config.gate == "scalar"
    assert torch.equal(again(features.float(), inputs)[0], model.eval()(features.float(), inputs)[0])


def test_the_baseline_is_saved_with_the_model(tmp_path):
    model = _model(attention="hard", **VARIANTS["tutorial"]).float()
    start = math.log(model.config.vocab_size)  # a token's loss where nothing is known
    assert model.baseline.item() == pytest.approx(start)
    update_baseline(model.baseline, torch.tensor(30.0))
    models.save(model, tmp_path)
    assert models.load(tmp_path).baseline.item() == pytest.approx(0.9 * start + 3.0)


def test_lengths_that_do_not_fit_are_answered():
    model = _model(**VARIANTS["original"])
    inputs = torch.ones(3, 4, dtype=torch.int64)
    for lengths, message in (
        (torch.tensor([2]), r"lengths must be a tensor \[B\] = \[3\], got \[1\]"),
        ([4, 3, 2], r"lengths must be a tensor \[B\] = \[3\], got 'list'"),
        (torch.tensor([0, 0, 0]), r"lengths must lie in \[0, 4\], one of them above 0, got \[0, 0, 0\]"),
        (torch.tensor([5, 1, 1]), r"lengths must lie in \[0, 4\], one of them above 0, got \[5, 1, 1\]"),
    ):
        with pytest.raises(FastcapError, match=r"fastcap\.models: " + message):
            model.hidden_states(torch.zeros(3, 2, 7, dtype=torch.float64), inputs, lengths)


@pytest.mark.parametrize("kind", ["soft", "mean"])
def test_the_compiled_model_has_the_gradients_of_the_eager_one(kind):
    torch._dynamo.reset()
    model = _model(attention=kind, **VARIANTS["original"])
    features = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = torch.tensor([[1, 5, 3], [1, 2, 4], [1, 3, 3]])
    weight = torch.randn(3, 3, model.head.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    eager = _gradients(model, (model.hidden_states(features, inputs) * weight).sum())
    compiled = torch.compile(model.hidden_states, backend="aot_eager")
    traced = _gradients(model, (compiled(features, inputs) * weight).sum())
    assert eager.keys() == traced.keys() and eager
    for name, gradient in eager.items():
        torch.testing.assert_close(traced[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_is_none_is_named(name):
    with pytest.raises(FastcapError) as caught:
        _model(**{name: "odd"})
    assert str(caught.value) == (
        f"fastcap.models: {name} must be one of {', '.join(map(repr, CHOICES[name]))}, got 'odd'; "
        f"pass {name}={CHOICES[name][0]!r}"
    )
