"""Sampling from a table of next-word probabilities: what is drawn, how often, from which numbers."""

from __future__ import annotations

import pytest
import torch

from fastcap import models
from fastcap.errors import FastcapError
from fastcap.models import beam_search, greedy, sample, sample_and_greedy
from fastcap.models.sampling import _inverse

PAD, START, END = 0, 1, 2


class Table(torch.nn.Module):
    """A model whose next word depends on the word before alone: log_p [V, V]; and on the image, which is a shift [B, V]."""

    def __init__(self, log_p):
        super().__init__()
        self.log_p, self.modes, self.encoded = log_p, [], 0

    def encode(self, images):
        self.modes.append(self.training)
        self.encoded += 1
        return images

    def start(self, memory):
        return memory.new_zeros(len(memory))

    def step(self, token, state, memory):
        return self.log_p[token] + memory, state + 1


def table(V=7, seed=0, end=-1.0):
    log_p = torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
    log_p[:, END] = end
    return Table(log_p)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(B, V=7, seed=3):
    return 0.5 * torch.randn(B, V, generator=generator(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_words_come_as_often_as_they_are_probable(temperature):
    model, N = table(), 40_000
    seen = sample(model, torch.zeros(1, 7), samples=N, max_length=2, temperature=temperature, generator=generator())
    p = torch.softmax(model.log_p / temperature, 1)
    p[:, [PAD, START]] = 0
    p = p / p.sum(1, keepdim=True)
    first = torch.where(seen.lengths > 0, seen.tokens[:, 0], END)
    frequency = torch.bincount(first, minlength=7) / N
    error = (p[START] * (1 - p[START]) / N).sqrt()
    assert ((frequency - p[START]).abs() <= 4.5 * error).all()
    assert frequency[PAD] == frequency[START] == 0
    followed = (first == 3) & (seen.lengths > 0)
    second = torch.where(seen.lengths > 1, seen.tokens[:, 1], END)[followed]
    n = len(second)
    error = (p[3] * (1 - p[3]) / n).sqrt()
    assert n > 1000 and ((torch.bincount(second, minlength=7) / n - p[3]).abs() <= 4.5 * error).all()


def test_scores_are_the_log_p_of_what_was_said_and_its_end():
    model, B = table(end=1.0), 5
    shift = images(B)
    drawn = sample(model, shift, samples=6, max_length=6, generator=generator(1))
    for row, (said, score) in enumerate(zip(drawn.lists(), drawn.scores.tolist(), strict=True)):
        words = [START, *said] + ([END] if len(said) < 6 else [])
        log_p = torch.log_softmax(model.log_p + shift[row // 6], 1)
        assert score == pytest.approx(sum(log_p[a, b].item() for a, b in zip(words, words[1:], strict=False)), abs=1e-5)
    assert len({*map(len, drawn.lists())}) > 2  # some end early, some late


def test_the_same_numbers_draw_the_same_captions_whatever_else_is_drawn():
    model, shift = table(), images(4)
    one = sample(model, shift, samples=2, max_length=8, generator=generator(5))
    assert one.lists() == sample(model, shift, samples=2, max_length=8, generator=generator(5)).lists()
    assert one.lists() != sample(model, shift, samples=2, max_length=8, generator=generator(6)).lists()
    torch.manual_seed(5)
    assert one.lists() == sample(model, shift, samples=2, max_length=8).lists()
    changed = shift.clone()
    changed[0] += torch.tensor([0.0, 0, 9, 0, 0, 0, 0])  # the first image's captions end at once
    other = sample(model, changed, samples=2, max_length=8, generator=generator(5))
    assert other.lists()[2:] == one.lists()[2:] and other.lists()[:2] == [[], []]


def test_a_rounding_of_the_logits_draws_the_same_captions():
    model, shift = table(V=50, end=-1.5), images(100, V=50)
    drawn = sample(model, shift, samples=5, max_length=12, generator=generator(2))
    model.log_p = model.log_p + 1e-6 * torch.randn(50, 50, generator=generator(9))
    again = sample(model, shift, samples=5, max_length=12, generator=generator(2))
    assert again.lists() == drawn.lists() and int(drawn.lengths.sum()) > 2000


def test_sample_and_greedy_are_both_in_one_pass():
    model, shift = table(end=-0.5), images(6)
    model.train()
    drawn, best = sample_and_greedy(model, shift, samples=2, max_length=5, generator=generator(4))
    assert model.encoded == 1 and model.modes == [False] and model.training
    assert drawn.lists() == sample(model, shift, samples=2, max_length=5, generator=generator(4)).lists()
    wanted = greedy(model, shift, max_length=5)
    assert best.lists() == wanted.lists()
    torch.testing.assert_close(best.scores, wanted.scores)
    assert not drawn.scores.requires_grad


def test_a_low_temperature_is_greedy():
    model, shift = table(end=-0.5), images(6)
    cold = sample(model, shift, temperature=1e-4, max_length=5, generator=generator())
    assert cold.lists() == greedy(model, shift, max_length=5).lists()


def test_no_caption_is_longer_than_its_steps_and_ends_are_cut():
    model = table(end=-torch.inf)
    drawn = sample(model, images(3), samples=2, max_length=4, generator=generator())
    assert drawn.tokens.shape == (6, 4) and drawn.lengths.tolist() == [4] * 6
    model = table(end=50.0)
    drawn = sample(model, images(3), samples=2, max_length=4, generator=generator())
    assert drawn.lengths.tolist() == [0] * 6 and drawn.tokens.shape == (6, 0)


def test_an_id_of_probability_0_is_never_drawn():
    log_p = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).log_softmax(1)
    uniform = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert _inverse(log_p.expand(4, -1), uniform).tolist() == [1, 1, 3, 3]
    assert _inverse(torch.full((1, 5), torch.nan), uniform[:1]).item() in range(5)


@pytest.mark.parametrize("name", ["show-attend-tell", "show-and-tell", "blip"])
def test_captions_of_a_model_have_the_log_p_of_its_teacher_forcing(name):
    if name == "blip":
        pytest.importorskip("transformers")
        architecture = models.small_architecture(20, width=32, image_size=16, max_tokens=16)
        model = models.build("blip", architecture=architecture, prompt=[5, 6])
    else:
        model = models.build(name, vocab_size=20, embed_width=16, hidden_width=16)
    torch.manual_seed(0)
    pictures = torch.randn(3, 3, 16, 16)
    drawn, best = sample_and_greedy(model.eval(), pictures, samples=2, max_length=6, generator=generator(8))
    for captions, rows in ((drawn, 2), (best, 1)):
        for row, said in enumerate(captions.lists()):
            words = said + [END] * (len(said) < 6)
            inputs = torch.tensor([[START, *words[:-1]]])
            with torch.no_grad():
                log_p = torch.log_softmax(model(pictures[row // rows][None], inputs)[0][0], 1)
            wanted = log_p.gather(1, torch.tensor(words)[:, None]).sum()
            torch.testing.assert_close(captions.scores[row], wanted, rtol=1e-4, atol=1e-4)
    found = beam_search(model, pictures, beam_size=1, max_length=6)
    assert found.lists() == best.lists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0; .* greedy"),
        ({"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
    ],
)
def test_arguments_are_checked(options, message):
    for function in (sample, sample_and_greedy):
        with pytest.raises(FastcapError, match=rf"fastcap\.models\.sample: {message}"):
            function(table(), images(2), **options)
