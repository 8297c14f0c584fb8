"""Show and Tell: its equations, decoding a word at a time, lengths, features, learning."""

from __future__ import annotations

import pytest
import torch

from fastcap import functional, models
from fastcap.errors import FastcapError

pytestmark = pytest.mark.usefixtures("one_thread")

CONV = {"kind": "conv", "width": 12, "channels": [8, 8, 16]}
FEATURES = {"kind": "features", "width_in": 10, "width": 12}


def make(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "embed_width": 24, "hidden_width": 16, "dropout": 0.0, "encoder": CONV}
    return models.build("show-and-tell", **{**sizes, **options})


@pytest.fixture
def images():
    return torch.rand(5, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def features():
    """Five images of one to four regions, as a batch pads them."""
    found = torch.randn(5, 4, 10, generator=torch.Generator().manual_seed(0))
    for b, regions in enumerate((4, 2, 1, 3, 4)):
        found[b, regions:] = 0
    return found


@pytest.fixture
def inputs():
    return torch.randint(0, 20, (5, 7), generator=torch.Generator().manual_seed(1))


def test_the_forward_pass_is_the_equations_of_the_paper(images, inputs):
    model = make().double()
    images = images.double()
    W, U = model.lstm.weight_ih_l0, model.lstm.weight_hh_l0
    bias = model.lstm.bias_ih_l0 + model.lstm.bias_hh_l0
    h = c = torch.zeros(5, 16, dtype=torch.float64)
    told = model.picture(model.encoder(images).mean(1))
    expected = []
    for x in (told, *model.embed(inputs).unbind(1)):
        into, forget, new, out = (x @ W.T + h @ U.T + bias).chunk(4, 1)
        c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
        h = out.sigmoid() * c.tanh()
        expected.append(h @ model.head.weight.T + model.head.bias)
    logits, alphas = model(images, inputs)
    assert alphas is None
    torch.testing.assert_close(logits, torch.stack(expected[1:], 1), rtol=1e-10, atol=1e-10)  # the picture predicts no word


def test_the_head_of_the_hidden_states_is_the_logits(images, inputs):
    model = make()
    hidden = model.hidden_states(images, inputs)
    assert hidden.shape == (5, 7, 16) and isinstance(model.head, torch.nn.Linear)
    assert torch.equal(model.head(hidden), model(images, inputs)[0])


@pytest.mark.parametrize("encoder", [CONV, FEATURES], ids=["conv", "features"])
def test_a_step_at_a_time_gives_the_logits_of_the_forward_pass(images, features, inputs, encoder):
    model = make(encoder=encoder).double()
    pictures = (images if encoder is CONV else features).double()
    expected, _ = model(pictures, inputs)
    memory = model.encode(pictures)
    state = model.start(memory)
    for t in range(7):
        logits, state = model.step(inputs[:, t], state, memory)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-10, atol=1e-10)


def test_lengths_skip_work_and_change_nothing_that_counts(images, inputs):
    model, images = make().double(), images.double()
    lengths = torch.tensor([3, 7, 1, 0, 5])
    counts = torch.arange(7) < lengths.unsqueeze(1)
    full, _ = model(images, inputs)
    part, _ = model(images, inputs, lengths)
    torch.testing.assert_close(part[counts], full[counts], rtol=1e-10, atol=1e-10)
    assert not part[~counts].any() and not model.hidden_states(images, inputs, lengths)[~counts].any()
    weight = torch.randn(full.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * counts.unsqueeze(2)
    wanted = torch.autograd.grad((full * weight).sum(), model.parameters())
    for one, other in zip(torch.autograd.grad((part * weight).sum(), model.parameters()), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert model.hidden_states(images, inputs, torch.tensor([2, 3, 1, 2, 2])).shape == (
        5,
        7,
        16,
    )  # the loss's target has T = 7


def test_padded_regions_do_not_change_what_the_model_is_told(features, inputs):
    model = make(encoder=FEATURES).double()
    features = features.double()
    told = model.encode(features)
    for b, regions in enumerate((4, 2, 1, 3, 4)):
        alone = features[b : b + 1, :regions]
        torch.testing.assert_close(told[b : b + 1], model.picture(model.encoder(alone).mean(1)), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(alone, inputs[b : b + 1])[0], model(features, inputs)[0][b : b + 1])
    assert torch.isfinite(model.encode(torch.zeros_like(features))).all()  # an image without a region


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 7, 1, 2, 5])])
def test_autocast_runs_forward_and_backward(images, inputs, lengths):
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden_states(images, inputs, lengths)
        hidden.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.lstm.parameters())
    with torch.no_grad():
        torch.testing.assert_close(hidden.float(), model.hidden_states(images, inputs, lengths), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("encoder", [CONV, FEATURES], ids=["conv", "features"])
def test_it_learns_eight_captions_by_heart(encoder):
    """Each by its own picture: the loss falls below a hundredth, and both decoders say the captions again."""
    generator = torch.Generator().manual_seed(3)
    shape = (8, 3, 16, 16) if encoder is CONV else (8, 6, 10)
    images = torch.rand(shape, generator=generator) * 2 - 1
    words = torch.randint(3, 12, (8, 5), generator=generator)
    lengths = torch.tensor([6, 5, 4, 3, 6, 5, 4, 6])  # the end included
    inputs = torch.cat((torch.ones(8, 1, dtype=torch.int64), words), 1)
    target = torch.cat((words, torch.zeros(8, 1, dtype=torch.int64)), 1)
    for b, length in enumerate(lengths):
        target[b, length - 1] = 2
        target[b, length:] = -100
    model = make(encoder=encoder, vocab_size=12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        hidden = model.hidden_states(images, inputs, lengths)
        loss = functional.linear_subset_cross_entropy(
            hidden, model.head.weight, target, linear_bias=model.head.bias, subset="full"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    said = [words[b, : lengths[b] - 1].tolist() for b in range(8)]
    assert models.greedy(model, images, max_length=8).lists() == said
    assert models.beam_search(model, images, max_length=8, beam_size=1).lists() == said


@pytest.mark.parametrize("encoder", [CONV, FEATURES, "conv"], ids=["conv", "features", "by name"])
def test_a_saved_model_is_loaded_bit_for_bit(images, features, inputs, tmp_path, encoder):
    model = make(encoder=encoder).eval()
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert type(again) is models.ShowTell and again.config == model.config
    pictures = features if encoder is FEATURES else images
    assert torch.equal(again(pictures, inputs)[0], model(pictures, inputs)[0])


def test_the_picture_is_heard_by_the_first_words_and_by_the_last(images):
    """At first, the same words before different pictures: the logits differ by picture, after twelve words as after one."""
    model = make(embed_width=256, hidden_width=256, encoder="conv")
    with torch.no_grad():
        logits, _ = model(images, torch.randint(0, 20, (1, 12), generator=torch.Generator().manual_seed(0)).expand(5, -1))
    heard = logits.std(0).mean(1)
    assert heard[0] > 0.05 and heard[11] > 0.5 * heard[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"hidden_width": 0}, "hidden_width must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"attention_width": 8}, "options must be among dropout, embed_width, encoder, hidden_width, vocab_size, got 'att"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(FastcapError) as caught:
        make(**options)
    assert str(caught.value).startswith(f"fastcap.models: {message}")
