"""Rewards of captions: each baseline against its definition, and a discriminator that learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastcap.errors import FastcapError
from fastcap.rewards import BASELINES, Adversary, Discriminator, SimilarityReward

P, Q, D = 7, 5, 6
POSITIVE = torch.tensor([0, 1, 2, 0, 1, 2, 0])
GREEDY = torch.tensor([4, 5, 6, 4, 4, 5, 6])  # which text is the greedy one of each text's image; those are their own
SIMILAR = torch.tensor([[3, 4], [2, 3], [1, 4], [3, 4], [2, 3], [1, 4], [3, 4]])


def embeddings(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(P, D, generator=generator), torch.randn(Q, D, generator=generator)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("exclude", ["self", "group"])
def test_each_baseline_is_its_definition(baseline, exclude):
    text, image = embeddings()
    t, v = F.normalize(text.double(), dim=1), F.normalize(image.double(), dim=1)
    s = t @ v.T
    own = s[torch.arange(P), POSITIVE]
    to_images = torch.stack([10 * s[p, torch.arange(Q) != POSITIVE[p]] for p in range(P)]).logsumexp(1) / 10
    to_texts = []
    for p in range(P):
        others = torch.arange(P) != p if exclude == "self" else POSITIVE != POSITIVE[p]
        to_texts.append((10 * s[others, POSITIVE[p]]).logsumexp(0) / 10)
    to_texts = torch.stack(to_texts)
    wanted = {
        "two-way": own - (to_images + to_texts) / 2,
        "one-way": own - to_texts,
        "similar": own - torch.stack([s[p, SIMILAR[p]].mean() for p in range(P)]),
        "greedy": own - own[GREEDY],
        "none": own,
    }[baseline]
    reward = SimilarityReward(baseline, 10.0, exclude)
    found = reward(text, 3 * image, POSITIVE, similar=SIMILAR, greedy=GREEDY)
    torch.testing.assert_close(found.own.double(), own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.reward.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not found.reward.requires_grad


def test_the_greedy_baseline_is_zero_where_the_sample_is_the_greedy_caption():
    text, image = embeddings()
    text[0] = text[4]
    positive = torch.tensor([1, 1, 2, 0, 1, 2, 0])
    greedy = torch.tensor([4, 4, 5, 6, 4, 5, 6])
    found = SimilarityReward("greedy")(text, image, positive, greedy=greedy).reward
    assert found[[0, 4, 5, 6]].tolist() == [0.0] * 4
    assert (found[[1, 2, 3]] != 0).all()


def test_a_text_that_fits_its_image_alone_has_more_reward_than_one_that_fits_all():
    image = torch.eye(4)
    text = torch.eye(4) + 0.1
    text[3] = 1.0  # as similar to each image
    found = SimilarityReward("two-way", 20.0)(text, image, torch.arange(4)).reward
    assert (found[:3] > found[3] + 0.2).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"baseline": "both"}, "baseline must be one of 'two-way', 'one-way', 'similar', 'greedy', 'none', got 'both'"),
        ({"scale": 0.0}, "scale must be above 0 and finite, got 0.0"),
        ({"scale": math.inf}, "scale must be above 0 and finite, got inf"),
        ({"exclude": "pair"}, "exclude must be one of 'self', 'group', got 'pair'"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(FastcapError, match=rf"fastcap\.rewards\.SimilarityReward: {message}"):
        SimilarityReward(**options)


@pytest.mark.parametrize(
    "baseline, given",
    [
        ("similar", {}),
        ("similar", {"similar": SIMILAR[:3]}),
        ("similar", {"similar": SIMILAR[:, 0]}),
        ("similar", {"similar": SIMILAR[:, :0]}),
        ("greedy", {}),
        ("greedy", {"greedy": SIMILAR}),
        ("greedy", {"greedy": GREEDY[:3]}),
    ],
)
def test_what_a_baseline_compares_with_must_be_given(baseline, given):
    text, image = embeddings()
    with pytest.raises(FastcapError, match=rf"SimilarityReward: {baseline} must "):
        SimilarityReward(baseline)(text, image, POSITIVE, **given)


# The discriminator ------------------------------------------------------------------------------------------------------


def pairs(n, seed):
    """Images, human texts, which have something of their image, and generated ones, which have not."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, D, generator=generator)
    noise, generated = torch.randn(2, n, D, generator=generator)
    return image, image + 0.3 * noise, generated


def test_the_discriminator_learns_to_tell_human_from_generated():
    adversary = Adversary(D, lr=1e-3)
    told = []
    for step in range(150):
        image, human, generated = pairs(64, step)
        told.append(adversary.learn(image, human, image, generated))
    assert told[0].accuracy < 0.7 and sum(each.accuracy for each in told[-10:]) / 10 > 0.85
    assert told[0].loss == pytest.approx(math.log(2), abs=0.1) and told[-1].loss < 0.5
    image, human, generated = pairs(200, 999)
    reward = adversary.reward(image, human), adversary.reward(image, generated)
    assert reward[0].mean() > 0.75 and reward[1].mean() < 0.35
    assert all((each >= 0).all() and (each <= 1).all() and not each.requires_grad for each in reward)


def test_the_kinds_count_half_each_whatever_their_number():
    one, other = Adversary(D), Adversary(D)
    image, human, generated = pairs(8, 0)
    first = one.learn(image, human, image, generated)
    again = other.learn(image, human, image.repeat(5, 1), generated.repeat(5, 1))
    assert again == pytest.approx(first, rel=1e-5)
    wanted = {name: x for name, x in one.state().items() if name.startswith("model")}
    found = other.state()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)


def test_the_length_of_an_embedding_says_nothing_and_no_gradient_reaches_it():
    discriminator = Discriminator(D)
    image, human, _ = pairs(4, 0)
    human.requires_grad_()
    logits = discriminator(image, human)
    torch.testing.assert_close(discriminator(5 * image, 0.1 * human), logits)
    logits.sum().backward()
    assert human.grad is None and discriminator.layers[0].weight.grad.abs().max() > 0


def test_its_weights_depend_on_its_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = Adversary(D, seed=1), Adversary(D, seed=1), Adversary(D, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state().values(), same.state().values(), strict=True))
    assert not torch.equal(one.state()["model/layers.0.weight"], other.state()["model/layers.0.weight"])


def test_it_goes_on_from_its_state_bit_for_bit():
    whole, halted = Adversary(D), Adversary(D)
    for adversary in (whole, halted):
        for step in range(3):
            image, human, generated = pairs(8, step)
            adversary.learn(image, human, image, generated)
    resumed = Adversary(D, seed=9)
    resumed.load({name: tensor.clone() for name, tensor in halted.state().items()})
    for adversary in (whole, resumed):
        for step in range(3, 6):
            image, human, generated = pairs(8, step)
            adversary.learn(image, human, image, generated)
    one, other = whole.state(), resumed.state()
    assert one.keys() == other.keys() and len(one) == 6 + 3 * 6
    assert all(torch.equal(one[name], other[name]) for name in one)
