"""contrastive_reward and decoupled_contrastive_loss: what they are, by hand, by definition and by laws; gradients too.

`dense` is the definition, one text at a time, from all similarities. Scores are also handed in as they are: with the
identity as images, normalize=False and a scale of 1, text is the table of scores. How it runs, the module and bad arguments:
test_contrastive_reward_errors.py.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import fastcap
from fastcap.functional import contrastive_reward, decoupled_contrastive_loss
from fastcap.ops import _backend
from fastcap.testing import assert_close_to_float64, upstream

BASELINES = ("logsumexp", "max", "mean", "none")
DIRECTIONS = ("both", "text_to_image", "image_to_text")
EXCLUDES = ("self", "group")
EVERY = [{"baseline": b, "direction": d, "exclude": e} for b, d, e in itertools.product(BASELINES, DIRECTIONS, EXCLUDES)]
RAW = {"normalize": False, "logit_scale": 1.0}  # scores as they are
every_option = pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(o.values()))


def dense(
    text, image, positive=None, *, logit_scale=100.0, baseline="logsumexp", direction="both", exclude="self", clamp=None,
    normalize=True,
):  # fmt: skip
    """The log-ratio [P], from all similarities; each text's others are picked out of them."""
    P, Q = len(text), len(image)
    positive = torch.arange(P) if positive is None else positive.long()
    if normalize:
        text, image = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (text, image))
    s = logit_scale * (text @ image.T)
    ratios = []
    for p, q in enumerate(positive.tolist()):
        other_images = torch.arange(Q) != q
        other_texts = torch.arange(P) != p if exclude == "self" else positive != q
        over = {"text_to_image": s[p, other_images], "image_to_text": s[other_texts, q]}
        each = [compared(s[p, q], over[d], baseline, clamp) for d in DIRECTIONS[1:] if direction in ("both", d)]
        ratios.append(sum(each) / len(each))
    return torch.stack(ratios)


def compared(own, others, baseline, clamp):
    """The log-ratio of a pair to the others of one direction."""
    if len(others) and baseline == "max":
        largest = others.max()
        first = 0 if largest.isnan() else (others == largest).nonzero()[0, 0]
        own = own - (largest if largest.isnan() else others[first])
    elif len(others) and baseline != "none":
        own = own - (others.logsumexp(0) if baseline == "logsumexp" else others.mean())
    return own if clamp is None else own.clamp(*clamp)


def make(P, Q, D=5, *, seed=0):
    """text [P, D] and image [Q, D], float64, of any length and direction; positive [P]: several texts an image, or none."""
    generator = torch.Generator().manual_seed(seed)
    text, image = (torch.randn(n, D, dtype=torch.float64, generator=generator) for n in (P, Q))
    return text, image, torch.randint(max(1, Q - Q // 4), (P,), generator=generator)


def result_and_gradients(out, leaves):
    """On the CPU, with an uneven upstream gradient; a leaf without a part in the result has a gradient of 0."""
    gradients = torch.autograd.grad(out, leaves, upstream(out), allow_unused=True, materialize_grads=True)
    return [x.detach().cpu() for x in (out, *gradients)]


def run(place, text, image, positive=None, *, function=contrastive_reward, dtype=torch.float64, scale=None, **given):
    """[result, gradients of text and image, and of the scale where one is given that wants it]."""
    leaves = [x.detach().to(place.device, dtype).requires_grad_() for x in (text, image)]
    if scale is not None:
        leaves.append(torch.tensor(scale, dtype=torch.float64, device=place.device, requires_grad=True))
        given["logit_scale"] = leaves[2]
    positive = positive if positive is None else positive.to(place.device)
    with fastcap.backend(place.backend):
        out = function(*leaves[:2], positive=positive, **given)
    return result_and_gradients(out, leaves)


def expected(text, image, positive=None, *, dtype=torch.float64, scale=None, **given):
    """The same by `dense`, as a reward, from embeddings in `dtype` that are summed in float32 at least."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (text, image)]
    wide = [x.to(torch.promote_types(dtype, torch.float32)) for x in leaves]
    factor = given.pop("logit_scale", 100.0)
    if scale is not None:
        leaves.append(torch.tensor(scale, dtype=torch.float64, requires_grad=True))
        factor = leaves[2].to(wide[0].dtype)
    return result_and_gradients(dense(*wide, positive, logit_scale=factor, **given) / factor, leaves)


def agree(found, wanted, **limits):
    limits = limits or {"rtol": 1e-9, "atol": 1e-10}
    for what, a, b in zip(("result", "dtext", "dimage", "dscale"), found, wanted, strict=False):
        torch.testing.assert_close(a, b, **limits, msg=lambda m, what=what: f"{what}: {m}")


def of_scores(place, scores, positive=None, dtype=torch.float64, **given):
    """The rewards of a table of scores [P, Q]."""
    images = torch.eye(scores.shape[1], dtype=dtype)
    return run(place, scores, images, positive, dtype=dtype, **{**RAW, **given})[0].double()


# What it is ------------------------------------------------------------------------------------------------------------

ODDS = torch.tensor([[6.0, 2.0, 1.0], [3.0, 4.0, 5.0], [1.0, 1.0, 8.0]], dtype=torch.float64)
ONE_WAY, OTHER_WAY = {"direction": "text_to_image"}, {"direction": "image_to_text"}
BY_HAND = [  # (positive, options, the odds of each pair against its others)
    (None, ONE_WAY, [6 / 3, 4 / 8, 8 / 2]),
    (None, OTHER_WAY, [6 / 4, 4 / 3, 8 / 6]),
    (None, {"clamp": (None, None), **OTHER_WAY}, [6 / 4, 4 / 3, 8 / 6]),
    (None, {}, [(6 / 3 * 6 / 4) ** 0.5, (4 / 8 * 4 / 3) ** 0.5, (8 / 2 * 8 / 6) ** 0.5]),
    (None, {"baseline": "max"}, [(6 / 2 * 6 / 3) ** 0.5, (4 / 5 * 4 / 2) ** 0.5, (8 / 1 * 8 / 5) ** 0.5]),
    (None, {"baseline": "mean", **ONE_WAY}, [6 / 2**0.5, 4 / 15**0.5, 8 / 1]),
    (None, {"baseline": "none"}, [6, 4, 8]),
    ([0, 0, 1], ONE_WAY, [6 / 3, 3 / 9, 1 / 9]),
    ([0, 0, 1], OTHER_WAY, [6 / 4, 3 / 7, 1 / 6]),
    ([0, 0, 1], {"exclude": "group", **OTHER_WAY}, [6 / 1, 3 / 1, 1 / 6]),
    ([0, 0, 1], {"baseline": "max", **OTHER_WAY}, [6 / 3, 3 / 6, 1 / 4]),
    ([0, 0, 1], {"baseline": "mean", **OTHER_WAY}, [6 / 3**0.5, 3 / 6**0.5, 1 / 8**0.5]),
    ([0, 0, 1], {"baseline": "max", "exclude": "group", **OTHER_WAY}, [6 / 1, 3 / 1, 1 / 4]),
    ([0, 0, 1], {"baseline": "mean", "exclude": "group", **OTHER_WAY}, [6 / 1, 3 / 1, 1 / 8**0.5]),
    # each direction is clamped by itself
    ([0, 0, 1], {"clamp": (math.log(0.4), math.log(1.6))}, [(1.6 * 1.5) ** 0.5, (0.4 * 3 / 7) ** 0.5, 0.4]),
]


@pytest.mark.parametrize(("positive", "options", "odds"), BY_HAND)
def test_the_odds_of_three_texts_by_hand(positive, options, odds, target):
    positive = positive and torch.tensor(positive)
    found = of_scores(target, ODDS.log(), positive, **options)
    torch.testing.assert_close(found, torch.tensor(odds, dtype=torch.float64).log())
    scaled = of_scores(target, ODDS.log() / 7, positive, logit_scale=7.0, **options)  # the scale is divided out again
    torch.testing.assert_close(7 * scaled, found)


@every_option
def test_it_is_the_dense_definition(options, target):
    """Results and gradients of text, image and scale, in float64."""
    settled = [{"clamp": (-0.4, 0.7), "scale": 3.0}, {}, {"normalize": False, "scale": 0.7}, {"clamp": (None, 16)}]
    for P, Q in ((7, 4), (4, 6)):
        for more in settled[: 1 if _backend.interpreting() else None]:
            agree(run(target, *make(P, Q), **options, **more), expected(*make(P, Q), **options, **more))


@pytest.mark.parametrize("baseline", BASELINES[:2])
def test_several_tiles_and_their_tails(baseline, fused):
    """More texts, images and features than a tile of the kernels has, and no multiple of it."""
    inputs = make(67, 70, 33)
    agree(run(fused, *inputs, baseline=baseline, scale=9.0), expected(*inputs, baseline=baseline, scale=9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_each_dtype_is_as_exact_as_plain_torch(dtype, fused):
    """Embeddings are rounded to the dtype, and nothing else is: the result is float32."""
    for options, given in itertools.product(EVERY[:6:3] if _backend.interpreting() else EVERY, (True, False)):
        text, image, positive = make(9, 11, 24, seed=1)
        call = dict(text=text.to(dtype).double(), image=image.to(dtype).double(), scale=20.0, **options)
        call["positive"] = positive if given else None
        found, exact, plain = run(fused, dtype=dtype, **call), expected(**call), expected(dtype=dtype, **call)
        assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
        # scores of up to 20 are rounded, and their exponentials weigh what cancels in gradients
        for what, a, e, p, size in zip(("result", "dtext", "dimage"), found, exact, plain, (1.0, 20.0, 20.0), strict=False):
            assert_close_to_float64(a, e, p, f"{what}, {options}", size=size)


def test_gradients_through_a_mean_are_rounded_to_half_precision_once(target):
    """Nearly equal images: those through the pair and through the mean cancel to a 500th of either."""
    text = torch.linspace(0.5, 1, 24, dtype=torch.float64).view(3, 8).bfloat16()
    image = torch.ones(2, 8, dtype=torch.bfloat16)
    image[1, ::2] += 2**-7  # the next number
    given = {"positive": torch.tensor([0, 1, 0]), "baseline": "mean", "direction": "text_to_image", **RAW}
    exact = expected(text.double(), image.double(), **given)
    found = run(target, text, image, dtype=torch.bfloat16, **given)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("baseline", BASELINES)
def test_autocast_changes_nothing(baseline, fused):
    """Not even around the backward, where torch's own products, and so the reference's, are made in half precision."""
    inputs = make(6, 4)
    with torch.autocast(fused.device, dtype=torch.bfloat16):
        found = run(fused, *inputs, dtype=torch.float32, baseline=baseline, scale=9.0)
    plain = run(fused, *inputs, dtype=torch.float32, baseline=baseline, scale=9.0)
    agree(found, plain, rtol=0, atol=0)


@drawn(st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_and_option_is_the_dense_definition(data):
    P, Q, D = (data.draw(st.integers(1, n)) for n in (9, 9, 4))
    options = {name: data.draw(st.sampled_from(choices)) for name, choices in (
        ("baseline", BASELINES), ("direction", DIRECTIONS), ("exclude", EXCLUDES), ("normalize", (True, False)),
        ("clamp", (None, (None, 16.0), (-1.0, None), (-0.3, 0.9))),
    )}  # fmt: skip
    text, image, _ = make(P, Q, D, seed=data.draw(st.integers(0, 1000)))
    positive = torch.tensor(data.draw(st.lists(st.integers(0, Q - 1), min_size=P, max_size=P)))
    if data.draw(st.booleans()):
        text, positive = text.T.contiguous().T, positive.repeat_interleave(2)[::2]
        image = torch.stack([image, torch.full_like(image, math.nan)], 2)[..., 0]
    scale = torch.tensor(data.draw(st.sampled_from([0.3, 5.0, 60.0])), dtype=torch.float64)
    wanted = expected(text, image, positive, scale=scale.item(), **options)
    for backend in ("reference", "cpp") if fastcap.backends()["cpp"] else ("reference",):
        leaves = [x.detach().requires_grad_() for x in (text, image, scale)]
        with fastcap.backend(backend):
            out = contrastive_reward(*leaves[:2], positive=positive, logit_scale=leaves[2], **options)
        agree(result_and_gradients(out, leaves), wanted, rtol=1e-8, atol=1e-9)


# Laws ------------------------------------------------------------------------------------------------------------------


def test_an_order_of_texts_or_images_is_an_order_of_rewards(target):
    text, image, positive = make(8, 6)
    generator = torch.Generator().manual_seed(1)
    texts, images = (torch.randperm(n, generator=generator) for n in (8, 6))
    out, dtext, dimage = run(target, text, image, positive)
    moved = run(target, text[texts], image, positive[texts])[0]
    torch.testing.assert_close(moved, out[texts])
    moved, moved_dtext, moved_dimage = run(target, text, image[images], images.argsort()[positive])
    agree((moved, moved_dtext, moved_dimage), (out, dtext, dimage[images]))


def test_lengths_do_not_matter_where_rows_are_normalised(target):
    text, image, positive = make(6, 5)
    lengths = torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    out, dtext, dimage = run(target, text, image, positive)
    longer, dlonger, _ = run(target, text * lengths, image / lengths[:5], positive)
    agree((longer, dlonger * lengths), (out, dtext))
    for x, dx in ((text, dtext), (image, dimage)):  # a gradient has no part along its embedding
        assert (x * dx).sum(1).abs().max() < 1e-12 and dx.abs().max() > 0.1


def test_what_is_far_from_everything_changes_nothing(target):
    """An image opposite to all texts, 190 nats below; a text opposite to all images."""
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(n, 4, generator=generator, dtype=torch.float64).abs() + 3 for n in (5, 3))
    positive, far = torch.tensor([0, 1, 2, 0, 1]), -torch.ones(1, 4, dtype=torch.float64)
    wanted = run(target, text, image, positive)
    out, dtext, dimage = run(target, text, torch.cat([image, far]), positive)
    agree((out, dtext, dimage[:3]), wanted)
    assert dimage[3].abs().max() < 1e-60
    more = run(target, torch.cat([text, far]), image, torch.tensor([0, 1, 2, 0, 1, 2]))[0]
    torch.testing.assert_close(more[:5], wanted[0])


def test_both_ways_is_the_mean_of_each(target):
    for given in ({}, {"clamp": (-0.5, 0.5)}, {"baseline": "max", "exclude": "group"}):
        both, one, other = (run(target, *make(7, 5), direction=d, **given) for d in DIRECTIONS)
        agree(both, [(a + b) / 2 for a, b in zip(one, other, strict=True)])


def test_the_loss_is_minus_the_scale_times_the_reward(target):
    given = {"logit_scale": 11.0, "clamp": (None, 3.0)}
    reward, dtext, dimage = run(target, *make(7, 5), **given)
    loss, *gradients = run(target, *make(7, 5), function=decoupled_contrastive_loss, reduction="none", **given)
    agree((loss, *gradients), (-11 * reward, -11 * dtext, -11 * dimage))
    for more, wanted in (({"reduction": "sum"}, loss.sum()), ({}, loss.mean())):
        found = run(target, *make(7, 5), function=decoupled_contrastive_loss, **given, **more)[0]
        torch.testing.assert_close(found, wanted)


def test_with_the_pair_put_back_it_is_cross_entropy(target):
    """InfoNCE, CLIP's own loss: softplus of the decoupled one, for each direction."""
    text, image, _ = make(5, 8)
    positive = torch.tensor([2, 0, 7, 3, 1])
    for direction in DIRECTIONS[1:]:
        leaves = [x.clone().requires_grad_() for x in (text, image)]
        s = 9 * F.normalize(leaves[0]) @ F.normalize(leaves[1]).T
        s, where = (s, positive) if direction == "text_to_image" else (s.T[positive], torch.arange(5))
        wanted = result_and_gradients(F.cross_entropy(s, where, reduction="none"), leaves)
        given = {"logit_scale": 9.0, "direction": direction, "reduction": "none"}
        found = run(target, text, image, positive, function=lambda *a, **k: F.softplus(decoupled_contrastive_loss(*a, **k)),
                    **given)  # fmt: skip
        agree(found, wanted)


def test_texts_and_images_change_places(target):
    text, image, _ = make(6, 6)
    for baseline in BASELINES:
        there = run(target, text, image, baseline=baseline, **ONE_WAY, logit_scale=13.0)
        back = run(target, image, text, baseline=baseline, **OTHER_WAY, logit_scale=13.0)
        agree(there, (back[0], back[2], back[1]))


def test_self_and_group_differ_only_where_texts_share_an_image(target):
    text, image, _ = make(5, 7)
    for baseline in BASELINES[:3]:
        agree(*(run(target, text, image, torch.tensor([4, 0, 6, 2, 1]), baseline=baseline, exclude=e) for e in EXCLUDES))
    for baseline in ("logsumexp", "mean"):
        one, other = (
            run(target, text, image, torch.tensor([0, 0, 1, 2, 3]), baseline=baseline, exclude=e, logit_scale=2.0)[0]
            for e in EXCLUDES
        )
        torch.testing.assert_close(one[2:], other[2:])
        assert (one[:2] - other[:2]).abs().min() > 1e-3
    agree(run(target, text, image), run(target, text, image, torch.arange(5)))  # the default: 0 to P - 1


# Numbers that are hard -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lead", [4.0, 16.0, 16.7, 30.0, 90.0, 1000.0])
def test_a_pair_that_leads_far_is_finite_and_exact(lead, dtype, target):
    """Own scores of 60, others around 60 - lead: from some 16 nats on float32's sum of all is the pair's."""
    s = torch.linspace(-2, 2, 36, dtype=torch.float64).view(6, 6).sin() + 60 - lead
    s = s.fill_diagonal_(60.0).to(dtype).double()
    found = of_scores(target, s, dtype=dtype)
    wanted = dense(s, torch.eye(6, dtype=torch.float64), **RAW)
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=2 * 60 * torch.finfo(dtype).eps)
    e = s.to(dtype).exp()
    if dtype == torch.float32 and lead > 20:  # the pair taken out of the sum afterwards
        assert not (e.sum(1) - e.diagonal()).log().isfinite().any()


def test_near_duplicates_at_a_scale_of_100(target):
    """In float32: pairs at a cosine of 1, doubles of them within 1e-4, the rest opposite, 200 nats away."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.zeros(4, 16, dtype=torch.float64)
    axis[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    image = axis + 5e-3 * torch.randn(4, 16, generator=generator, dtype=torch.float64)
    text = image[[0, 1, 2, 3, 0]] + 1e-4 * torch.randn(5, 16, generator=generator, dtype=torch.float64)
    for options in ({"baseline": "max"}, {}, {"exclude": "group"}):
        call = dict(
            text=text.float().double(), image=image.float().double(), positive=torch.tensor([0, 1, 2, 3, 0]), **options
        )
        found, plain = (of(dtype=torch.float32, **call) for of in (lambda **k: run(target, **k), expected))
        for a, e, p, size in zip(found, expected(**call), plain, (1.0, 100.0, 100.0), strict=True):
            assert_close_to_float64(a, e, p, f"{options}", size=size)
    opposite = run(target, image[[0, 2]], image[[0, 2]], dtype=torch.float32)[0]
    torch.testing.assert_close(opposite.double(), expected(image[[0, 2]], image[[0, 2]])[0], rtol=0, atol=5e-7)
    assert opposite.min() > 1.99  # leads of more than 199 nats


def published(text, image, scale):
    """The formula of the published script: the pair taken out of the sum of all, the clamp, the division. Pairs (p, p)."""
    s = scale * F.normalize(text) @ F.normalize(image).T
    e = s.exp()
    over_texts, over_images = s - (e.sum(0) - e).log(), s - (e.sum(1, keepdim=True) - e).log()
    return (over_texts.clamp(max=16).diagonal() + over_images.clamp(max=16).diagonal()) / 2 / scale


def test_the_clamp_gives_the_published_rewards(target):
    """Two more images a text as neighbours, as in the published script; leads from below 0 to beyond the clamp."""
    generator = torch.Generator().manual_seed(5)
    image, noise = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (27, 9))
    text = image[:9] + torch.linspace(0, 8, 9, dtype=torch.float64)[:, None] * noise
    wanted = published(text, image, 60.0)
    assert (wanted[:2] == 16 / 60).all() and wanted.min() < 0
    found = run(target, text, image, logit_scale=60.0, clamp=(None, 16))[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)  # their own error: exp(16) 2^-53 / 60
    assert run(target, text, image, logit_scale=60.0)[0][:2].min() > 17 / 60
    narrow = run(target, text, image, dtype=torch.float32, logit_scale=60.0, clamp=(None, 16))[0]
    theirs = published(text.float(), image.float(), 60.0)
    near = theirs < 8 / 60
    torch.testing.assert_close(narrow[near], theirs[near], rtol=0, atol=1e-4)
    torch.testing.assert_close(narrow.double(), wanted, rtol=0, atol=1e-6)


@every_option
def test_with_nothing_left_to_compare_with_it_is_the_similarity(options, target):
    """One text and one image; several texts of one image; one text; all texts of one image among several."""
    for P, Q, q in ((1, 1, 0), (4, 1, 0), (1, 3, 2), (5, 3, 1)):
        text, image, _ = make(P, Q)
        positive = torch.full((P,), q)
        found = run(target, text, image, positive, scale=2.0, **options)
        agree(found, expected(text, image, positive, scale=2.0, **options))
        assert all(x.isfinite().all() for x in found)
        if P == Q == 1:
            torch.testing.assert_close(found[0], F.cosine_similarity(text, image))
            clamped = run(target, text, image, logit_scale=50.0, clamp=(-1.0, 1.0), **options)[0]
            torch.testing.assert_close(clamped, found[0].clamp(-0.02, 0.02))


@pytest.mark.parametrize("exclude", EXCLUDES)
def test_of_equal_largest_the_first_gets_the_gradient(exclude, target):
    """Scores of small integers: ties among images, among texts of other images, and of these with texts of the same."""
    for seed in range(2 if _backend.interpreting() else 8):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(0, 3, (9, 5), generator=generator).double()
        call = scores, torch.eye(5).double(), torch.randint(0, 3, (9,), generator=generator)
        for direction in DIRECTIONS:
            given = {"baseline": "max", "direction": direction, "exclude": exclude, **RAW}
            agree(run(target, *call, **given), expected(*call, **given))


@every_option
def test_nan_reaches_the_rewards_that_depend_on_it_and_no_other(options, target):
    """A broken text, an image with a text or two, an image without: the others keep their values."""
    text, image, _ = make(6, 5)
    positive = torch.tensor([0, 1, 0, 2, 3, 3])
    whole = dense(text, image, positive, **options) / 100
    for which, row in ((0, 0), (0, 3), (1, 2), (1, 0), (1, 4)):
        broken = [text.clone(), image.clone()]
        broken[which][row, 1] = math.nan
        wanted = dense(*broken, positive, **options)
        found = run(target, *broken, positive, **options)[0]
        assert torch.equal(found.isnan(), wanted.isnan()), (which, row)
        good = ~wanted.isnan()
        torch.testing.assert_close(found[good], whole[good], rtol=1e-9, atol=1e-11)


def test_an_embedding_of_zeros_is_at_a_right_angle_to_everything(target):
    text, image, positive = make(5, 4)
    text[1], image[2] = 0.0, 0.0
    found = run(target, text, image, positive)[0]
    torch.testing.assert_close(found, dense(text, image, positive) / 100)
    assert found.isfinite().all()


def test_gradients_pass_gradcheck(target):
    if target == ("cpu", "triton"):
        pytest.skip("seconds for each of a hundred calls in the interpreter: gradients are compared above")
    text, image, positive = (x.to(target.device) for x in make(5, 4, 3))
    leaves = tuple(x.requires_grad_() for x in (text, image, torch.tensor(1.7, dtype=torch.float64, device=target.device)))
    for options, function in itertools.product(EVERY, (contrastive_reward, decoupled_contrastive_loss)):

        def call(text, image, scale, function=function, options=options):
            with fastcap.backend(target.backend):
                return function(text, image, positive=positive, logit_scale=scale, **options)

        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
