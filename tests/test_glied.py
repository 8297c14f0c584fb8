"""GLIED and its Base: the equations, decoding with caches, masks, ablations, features and attributes, learning."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastcap import functional, models
from fastcap.data import Attributed
from fastcap.errors import FastcapError
from fastcap.models._attention_blocks import Source
from fastcap.models.glied import DISTILLING, GliedConfig, matching_width

pytestmark = pytest.mark.usefixtures("one_thread")

V, D, HEADS = 20, 16, 4
CONV = {"kind": "conv", "width": 12, "channels": [8, 8, 16]}
FEATURES = {"kind": "features", "width_in": 10, "width": D}
REGIONS, WORDS = (4, 2, 1, 3, 4), (3, 1, 0, 2, 3)  # of each of five images
WIRINGS = [dict(zip(DISTILLING, chosen, strict=True)) for chosen in itertools.product((True, False), repeat=3)]
BASE = dict.fromkeys(DISTILLING, False)


def named(wiring):
    return "+".join(name.split("_")[0] for name, there in wiring.items() if there) or "base"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = models.build(
        "glied", **{"vocab_size": V, "encoder": FEATURES, "width": D, "heads": HEADS, "dropout": 0.0, **options}
    )
    with torch.no_grad():  # a head that is sure of itself: rounding does not change the words
        model.head.weight.mul_(4)
    return model


@pytest.fixture
def images():
    """Five images of one to four regions and none to three attributes, as a batch pads them."""
    features = torch.randn(5, 4, 10, generator=generator())
    attributes = torch.randint(3, V, (5, 3), generator=generator(1))
    for b, (regions, words) in enumerate(zip(REGIONS, WORDS, strict=True)):
        features[b, regions:] = 0
        attributes[b, words:] = 0
    return Attributed(features, attributes)


@pytest.fixture
def inputs():
    return torch.randint(0, V, (5, 7), generator=generator(2))


# The equations ----------------------------------------------------------------------------------------------------------


def by_hand(model, features, attributes, words):
    """The logits [T, V] of one image, its regions [R, D] and its attributes [M], none padded; head by head, word by word."""
    weights, config = dict(model.named_parameters()), model.config

    def mha(name, query, source):
        if len(source) == 0:
            return torch.zeros_like(query)
        q, k, v = weights[f"{name}.project.weight"].view(3, HEADS, D // HEADS, D)
        heads = []
        for i in range(HEADS):
            scores = (query @ q[i].T) @ (source @ k[i].T).T / math.sqrt(D // HEADS)
            p = torch.exp(scores - scores.max(1, keepdim=True).values)
            heads.append(p / p.sum(1, keepdim=True) @ (source @ v[i].T))
        return torch.cat(heads, 1) @ weights[f"{name}.out.weight"].T

    def g(name, y, x):
        z = x + y
        centred = z - z.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}_norm.normalise.weight"] + weights[f"{name}_norm.normalise.bias"]

    I = model.encoder(features[None])[0]  # noqa: E741
    A = weights["embed.weight"][attributes]
    groups = g("distil_regions", mha("distil_regions", I, I), I) if config.visual_distilling else I
    x = weights["embed.weight"][words] + model.positions[: len(words)]
    t = g("distil_attributes", mha("distil_attributes", x, A), x) if config.attribute_distilling else x
    x = g("context", torch.cat([mha("context", t[n : n + 1], t[: n + 1]) for n in range(len(t))]), t)
    found = mha("look", x, groups)
    if not config.attribute_distilling and not config.local_distilling:
        found = found + mha("semantic", x, A)
    c = g("look", found, x)
    if config.local_distilling:
        c = g("local", mha("local_look", c, I) + mha("local_attributes", c, A), c)
    return c @ weights["head.weight"].T + weights["head.bias"]


@pytest.mark.parametrize("wiring", WIRINGS, ids=named)
def test_the_forward_pass_is_the_equations(images, inputs, wiring):
    model, images = make(**wiring).double(), images.double()
    with torch.no_grad():
        for p in model.parameters():  # also what is one or zero at first
            p.add_(0.1 * torch.randn(p.shape, generator=generator(3), dtype=p.dtype))
        logits, _ = model(images, inputs)
        for b, (regions, words) in enumerate(zip(REGIONS, WORDS, strict=True)):
            expected = by_hand(model, images.images[b, :regions], images.attributes[b, :words], inputs[b])
            torch.testing.assert_close(logits[b], expected, rtol=1e-12, atol=1e-12)


def test_positions_are_the_sinusoids_and_their_table_grows(images):
    model = make()
    for position, column in ((0, 0), (5, 3), (63, 15), (17, 8)):
        angle = position / 10000 ** (2 * (column % 8) / D)
        expected = math.sin(angle) if column < 8 else math.cos(angle)
        assert model.positions[position, column].item() == pytest.approx(expected, abs=1e-6)
    long = torch.randint(3, V, (5, 100), generator=generator(4))
    before = model.positions.clone()
    with torch.no_grad():
        logits, _ = model(images, long)
        torch.testing.assert_close(logits[:, :64], make()(images, long[:, :64])[0])
    assert len(model.positions) >= 100 and torch.equal(model.positions[:64], before)
    assert "positions" not in model.state_dict()


def test_heads_and_hidden_states_give_the_logits(images, inputs):
    model = make()
    hidden = model.hidden_states(images, inputs)
    assert hidden.shape == (5, 7, D) and isinstance(model.head, torch.nn.Linear)
    assert torch.equal(model.head(hidden), model(images, inputs)[0])


# Decoding ---------------------------------------------------------------------------------------------------------------


class Recomputing:
    """The same model, decoded without caches: the parallel pass over all words so far at each step."""

    def __init__(self, model):
        self.model = model

    def encode(self, images):
        return {"images": images.images, "attributes": images.attributes}

    def start(self, memory):
        return torch.empty(len(memory["images"]), 0, dtype=torch.int64)

    def step(self, token, words, memory):
        words = torch.cat((words, token.unsqueeze(1)), 1)
        return self.model(Attributed(memory["images"], memory["attributes"]), words)[0][:, -1], words


@pytest.mark.parametrize("wiring", WIRINGS, ids=named)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_step_at_a_time_gives_the_logits_of_the_forward_pass(images, inputs, wiring, dtype, bound):
    model = make(**wiring).to(dtype)
    if dtype == torch.float64:
        images = images.double()
    with torch.no_grad():
        expected, _ = model(images, inputs)
        memory = model.encode(images)
        state = model.start(memory)
        for t in range(7):
            logits, state = model.step(inputs[:, t], state, memory)
            torch.testing.assert_close(logits, expected[:, t], rtol=bound, atol=bound * expected.abs().max().item())


@pytest.mark.parametrize("wiring", [WIRINGS[0], BASE], ids=named)
def test_caches_change_no_word_of_any_search(images, wiring):
    model = make(**wiring).double().eval()
    plain, images = Recomputing(model), images.double()
    options = {"max_length": 9}
    wanted = models.greedy(plain, images, **options)
    found = models.greedy(model, images, **options)
    assert found.lists() == wanted.lists() and len({*map(tuple, found.lists())}) > 1
    for beam in (2, 3, 5):
        wanted = models.beam_search(plain, images, beam_size=beam, **options)
        found = models.beam_search(model, images, beam_size=beam, **options)
        assert found.lists() == wanted.lists()
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-6, atol=1e-6)
    wanted = models.sample(plain, images, samples=4, generator=generator(5), **options)
    assert models.sample(model, images, samples=4, generator=generator(5), **options).lists() == wanted.lists()
    drawn, best = models.sample_and_greedy(model, images, samples=4, generator=generator(5), **options)
    assert drawn.lists() == wanted.lists() and best.lists() == models.greedy(model, images, **options).lists()


def test_a_large_vocabulary_is_scored_in_blocks_alike(images):
    model = make(vocab_size=2500)
    token = torch.randint(3, 2500, (5,), generator=generator(6))
    with torch.no_grad():
        memory = model.encode(images)
        in_blocks, state = model.step(token, None, memory)
        torch.testing.assert_close(in_blocks, model(images, token[:, None])[0][:, 0], rtol=1e-5, atol=1e-5)
    assert in_blocks.shape == (5, 2500) and state.keys.shape == (5, 1, 2 * D)


def test_rows_that_change_places_take_their_words_along(images):
    """Of one image. With and without gradients: chosen twice before the next word, they are copied as if at once."""
    model = make().double().eval()
    token, image = torch.tensor([4, 5, 6, 7, 8]), images.double()[[3]]
    first, second = torch.tensor([0, 1, 1, 3, 3]), torch.tensor([1, 0, 2, 3, 4])
    words = torch.stack((token, token.flip(0)), 1)[first[second]]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            memory = model.encode(image)
            _, state = model.step(token, None, memory)
            _, state = model.step(token.flip(0), state.rows(torch.arange(5)), memory)
            found, after = model.step(token, state.rows(first).rows(second), memory)
            expected, _ = model(image[[0] * 5], torch.cat((words, token[:, None]), 1))
        torch.testing.assert_close(found, expected[:, -1], rtol=1e-10, atol=1e-10)
        assert after.length == 3


def test_a_step_with_rows_that_are_no_multiple_of_the_images_is_refused(images):
    model = make().eval()
    memory = model.encode(images)
    with pytest.raises(FastcapError, match=r"token must have as many rows for each of the 5 images, got 7; let"):
        model.step(torch.full((7,), 4), None, memory)


def test_no_images_give_no_captions():
    model = make().eval()
    none = Attributed(torch.zeros(0, 9, 10), torch.zeros(0, 4, dtype=torch.int64))
    for found in (models.greedy(model, none), models.beam_search(model, none, beam_size=3)):
        assert found.tokens.shape == (0, 0) and found.scores.shape == (0,)


# Masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", [WIRINGS[0], BASE], ids=named)
def test_padding_of_regions_and_attributes_changes_nothing(images, inputs, wiring):
    model, images = make(**wiring).double(), images.double()
    logits, alphas = model(images, inputs)
    for b, (regions, words) in enumerate(zip(REGIONS, WORDS, strict=True)):
        alone = Attributed(images.images[b : b + 1, :regions], images.attributes[b : b + 1, : max(1, words)])
        own, looked = model(alone, inputs[b : b + 1])
        torch.testing.assert_close(own[0], logits[b], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(looked[0], alphas[b, :, :regions], rtol=1e-12, atol=1e-12)
        assert not alphas[b, :, regions:].any()
    assert not torch.allclose(logits[0], logits[4])  # the images do differ


@pytest.mark.parametrize("wiring", WIRINGS, ids=named)
def test_a_later_word_changes_nothing_before_it(images, inputs, wiring):
    model = make(**wiring).double()
    changed = inputs.clone()
    changed[:, 4] = (changed[:, 4] + 1) % V
    one, other = model(images.double(), inputs)[0], model(images.double(), changed)[0]
    assert torch.equal(one[:, :4], other[:, :4])
    assert ((one[:, 4:] - other[:, 4:]).abs().amax(2) > 1e-9).all()


@pytest.mark.parametrize("wiring", WIRINGS, ids=named)
def test_an_image_with_nothing_in_it_gives_numbers(images, inputs, wiring):
    model = make(**wiring)
    nothing = Attributed(torch.zeros_like(images.images), torch.zeros_like(images.attributes))
    logits, alphas = model(nothing, inputs)
    assert logits.isfinite().all() and not alphas.any()
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert len(models.beam_search(model, nothing, max_length=4).lists()) == 5


def test_scores_of_a_source_with_nothing_in_it_stay_finite():
    """What a softmax makes of nothing but -inf is up to the kernel; here it never gets that."""
    mask = torch.tensor([[True, True, False], [False, False, False]])
    bias = Source(torch.zeros(2, 3, D), mask).bias(torch.float64)[:, 0, 0]
    assert bias.tolist() == [[0, 0, -math.inf], [0, 0, 0]] and bias.dtype == torch.float64
    assert Source(torch.zeros(2, 3, D), None).bias(torch.float32) is None


def test_lengths_leave_out_what_comes_after(images, inputs):
    model, images = make().double(), images.double()
    lengths = torch.tensor([3, 7, 1, 0, 5])
    counts = torch.arange(7) < lengths.unsqueeze(1)
    full, part = model(images, inputs)[0], model(images, inputs, lengths)[0]
    assert torch.equal(part[counts], full[counts]) and not part[~counts].any()
    assert not model.hidden_states(images, inputs, lengths)[~counts].any()


def test_rows_say_of_which_image_a_caption_is(images, inputs):
    model, rows = make().double(), torch.tensor([3, 0, 0, 4, 1])
    found = model.hidden_states(images.double(), inputs, rows=rows)
    torch.testing.assert_close(found, model.hidden_states(images.double()[rows], inputs))
    predicting = make(attribute_ids=[4, 5, 6, 7], num_attributes=2).double()
    read = predicting.teacher_forced(images.images.double(), inputs, rows=rows)
    torch.testing.assert_close(read.absent, predicting.encode(images.images.double()[rows]).absent)


# Ablations --------------------------------------------------------------------------------------------------------------


def names(wiring):
    return {name: p.shape for name, p in make(**wiring).named_parameters()}


def of(*blocks):
    """The parameters of attentions, and of what is added and normalised after one."""
    parts = (
        ("normalise.weight", "normalise.bias") if block.endswith("norm") else ("project.weight", "out.weight")
        for block in blocks
    )
    return {f"{block}.{part}" for block, some in zip(blocks, parts, strict=True) for part in some}


@pytest.mark.parametrize("rest", WIRINGS, ids=named)
def test_each_switch_changes_the_parameters_of_its_step_and_no_others(rest):
    """Attributes are read somewhere: by `semantic`, where neither attribute nor local distilling reads them."""
    visual, attribute, local = (({**rest, name: True}, {**rest, name: False}) for name in DISTILLING)
    with_it, without = map(names, visual)
    assert (
        with_it.keys() - without.keys() == of("distil_regions", "distil_regions_norm") and without.items() <= with_it.items()
    )
    with_it, without = map(names, attribute)
    assert with_it.keys() - without.keys() == of("distil_attributes", "distil_attributes_norm")
    assert without.keys() - with_it.keys() == (set() if rest["local_distilling"] else of("semantic"))
    with_it, without = map(names, local)
    assert with_it.keys() - without.keys() == of("local_look", "local_attributes", "local_norm")
    assert without.keys() - with_it.keys() == (set() if rest["attribute_distilling"] else of("semantic"))
    shared = with_it.keys() & without.keys()
    assert {name: with_it[name] for name in shared} == {name: without[name] for name in shared}


def test_every_wiring_says_something_else_with_the_same_weights(images, inputs):
    full = make()
    said = []
    for wiring in WIRINGS:
        model = make(seed=1, **wiring)
        kept = {name: p for name, p in full.state_dict().items() if name in model.state_dict()}
        model.load_state_dict(kept, strict=False)
        said.append(model(images, inputs)[0])
    for one, other in itertools.combinations(said, 2):
        assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("wiring", WIRINGS, ids=named)
def test_every_parameter_learns(images, inputs, wiring):
    """Also through the attributes that are predicted, and their loss."""
    model = make(attribute_ids=[4, 5, 6, 7], num_attributes=2, **wiring)
    read = model.teacher_forced(images.images, inputs)
    loss = model.head(read.hidden).log_softmax(2)[..., 5].sum() + model.predictor.loss(read.absent, inputs).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_parameters_are_those_of_the_documentation():
    """docs/math/glied.md: at the published sizes, on features of 2,048 and 9,567 words."""
    sizes = {"vocab_size": 9567, "encoder": {"kind": "features", "width_in": 2048, "width": 512}, "width": 512, "heads": 8}

    def count(**options):
        with torch.device("meta"):
            return sum(p.numel() for p in models.build("glied", **sizes, **options).parameters())

    attention, norm = 4 * 512**2, 2 * 512
    shared = 2 * 9567 * 512 + 9567 + (2 * 2048 + 2048 * 512 + 512)  # words, head, regions
    assert count() == shared + 6 * attention + 5 * norm == 17_155_935
    assert count(**BASE) == shared + 3 * attention + 2 * norm == 14_007_135
    assert count(visual_distilling=False) == count() - attention - norm
    assert count(attribute_distilling=False) == count() - attention - norm
    assert count(local_distilling=False) == count() - 2 * attention - norm
    assert matching_width(GliedConfig(**sizes)) == 600


@pytest.mark.parametrize("encoder", [FEATURES, CONV], ids=["features", "conv"])
def test_the_matching_base_is_the_nearest_in_parameters(encoder):
    def parameters(**options):
        chosen = {"vocab_size": 50, "width": 32, "heads": 4, "encoder": {**encoder, "width": 32}, **options}
        return sum(p.numel() for p in models.build("glied", **chosen).parameters())

    config = GliedConfig(50, {**encoder, "width": 32}, 32, 4)
    width, wanted = matching_width(config), parameters()
    assert width > 32 and width % 4 == 0
    off = {
        w: abs(parameters(width=w, encoder={**encoder, "width": w}, **BASE) - wanted) for w in (width - 4, width, width + 4)
    }
    assert min(off, key=off.get) == width


# Attention --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", WIRINGS, ids=named)
def test_alphas_are_the_mean_over_the_heads_of_the_last_look_at_regions(images, inputs, wiring):
    model, images = make(**wiring).double(), images.double()
    _, alphas = model(images, inputs)
    read = model.teacher_forced(images, inputs)
    scores = torch.einsum("bhte,bhre->bhtr", read.query, read.key) / 2  # sqrt(E)
    expected = scores.masked_fill(~read.mask[:, None, None], -torch.inf).softmax(3).mean(1)
    torch.testing.assert_close(alphas, expected)
    assert alphas.shape == (5, 7, 4)
    last = "local_look" if wiring["local_distilling"] else "look"
    _, key, _ = getattr(model, last).project.weight.chunk(3)
    groups = model.encode(images).keys[last].key
    torch.testing.assert_close(read.key, groups)
    if wiring["local_distilling"] or not wiring["visual_distilling"]:  # at the regions themselves
        plain = (model.encoder(images.images) @ key.T).unflatten(2, (HEADS, -1)).transpose(1, 2)
        torch.testing.assert_close(groups, plain)


# Encoders, precision, files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 7, 1, 2, 5])])
def test_autocast_runs_forward_backward_and_decoding(images, inputs, lengths):
    model = make(attribute_ids=[4, 5, 6, 7], num_attributes=2)
    with torch.autocast("cpu", torch.bfloat16):
        read = model.teacher_forced(images.images, inputs, lengths)
        (read.hidden.float().square().sum() + model.predictor.loss(read.absent, inputs).sum()).backward()
        assert len(models.beam_search(model, images.images, max_length=5).lists()) == 5
    assert read.absent.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for name, p in model.named_parameters() if not name.startswith("head"))
    with torch.no_grad():
        exact = model.hidden_states(images.images, inputs, lengths)
    torch.testing.assert_close(read.hidden.float(), exact, rtol=0.1, atol=0.1)


def test_annotations_of_another_width_are_projected(inputs):
    pictures = torch.rand(5, 3, 48, 48, generator=generator()) * 2 - 1
    model = make(encoder=CONV, attribute_ids=[4, 5, 6])
    logits, alphas = model(pictures, inputs)
    assert logits.shape == (5, 7, V) and alphas.shape == (5, 7, 36) and model.regions.weight.shape == (D, 12)
    torch.testing.assert_close(alphas.sum(2), torch.ones(5, 7))
    assert isinstance(make(encoder={**CONV, "width": D}).regions, torch.nn.Identity)


@pytest.mark.parametrize("options", [{}, BASE, {"attribute_ids": [4, 9, 5], "attribute_shares": [0.3, 0.2, 0.1]}], ids=str)
def test_a_saved_model_is_loaded_bit_for_bit(images, inputs, tmp_path, options):
    model = make(**options).eval()
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert type(again) is models.Glied and again.config == model.config
    taken = images.images if "attribute_ids" in options else images
    assert torch.equal(again(taken, inputs)[0], model(taken, inputs)[0])


@pytest.mark.parametrize("wiring", [WIRINGS[0], BASE], ids=named)
def test_it_learns_eight_captions_by_heart(wiring):
    """Each by its own regions: the loss falls below a twentieth, and both decoders say the captions again."""
    images = Attributed(torch.randn(8, 6, 10, generator=generator(3)), torch.full((8, 1), 3))
    words = torch.randint(3, 12, (8, 5), generator=generator(4))
    lengths = torch.tensor([6, 5, 4, 3, 6, 5, 4, 6])  # the end included
    inputs = torch.cat((torch.ones(8, 1, dtype=torch.int64), words), 1)
    target = torch.cat((words, torch.zeros(8, 1, dtype=torch.int64)), 1)
    for b, length in enumerate(lengths):
        target[b, length - 1] = 2
        target[b, length:] = -100
    torch.manual_seed(0)
    model = models.build("glied", vocab_size=12, encoder=FEATURES, width=D, heads=HEADS, dropout=0.0, **wiring)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        hidden = model.hidden_states(images, inputs, lengths)
        loss = functional.linear_subset_cross_entropy(
            hidden, model.head.weight, target, linear_bias=model.head.bias, subset="full"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    said = [words[b, : lengths[b] - 1].tolist() for b in range(8)]
    assert models.greedy(model, images, max_length=8).lists() == said
    assert models.beam_search(model, images, max_length=8, beam_size=1).lists() == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"width": 18}, "width must be a multiple of heads=4, got 18; pass width=16"),
        ({"heads": True}, "heads must be an integer of at least 1, got True"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"visual_distilling": "no"}, "visual_distilling must be True or False, got 'no'; pass visual_distilling=True"),
        ({"attribute_ids": [4, V]}, f"attribute_ids must lie in [1, {V}), the ids of words, got {V}; pass ids"),
        ({"attribute_ids": [4, 0]}, f"attribute_ids must lie in [1, {V}), the ids of words, got 0; pass ids"),
        ({"attribute_ids": [4, 4]}, "attribute_ids must be ids of different words, one at least, got '2 ids'"),
        ({"attribute_ids": [4], "attribute_shares": [0.1, 0.2]}, "attribute_shares must be as many as attribute_ids, 1, go"),
        ({"num_attributes": 0}, "num_attributes must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(FastcapError) as caught:
        make(**options)
    assert str(caught.value).startswith(f"fastcap.models: {message}")


def test_images_with_and_without_their_attributes_are_told_apart(images, inputs):
    with pytest.raises(
        FastcapError, match="images of this glied must be fastcap.data.Attributed, with their attribute words"
    ):
        make()(images.images, inputs)
    with pytest.raises(FastcapError, match="must be a tensor, got 'Attributed'; this model predicts them"):
        make(attribute_ids=[4, 5])(images, inputs)
    with pytest.raises(
        FastcapError, match=r"inputs must have shape \[B, T\], T >= 1, got \[5, 0\]; pass the start at least"
    ):
        make()(images, inputs[:, :0])
