"""Greedy and beam search, against plain enumeration and a beam written with lists."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastcap.errors import FastcapError
from fastcap.models import beam_search, decoding, greedy

START, END, V = 1, 2, 5  # ids 0 (pad) and 1 (start) are forbidden: three words and the end may follow


class Table:
    """The next word depends on the image and on the two words before: enough for a beam to go wrong."""

    def __init__(self, images: int, seed: int, spread: float = 2.0) -> None:
        self.logits = torch.randn(images, V, V, V, generator=torch.Generator().manual_seed(seed)) * spread

    def encode(self, images):
        return {"logits": self.logits[images]}

    def start(self, memory):
        return (torch.full((len(memory["logits"]),), START), [torch.zeros(len(memory["logits"]), 1)])

    def step(self, token, state, memory):
        before, steps = state
        rows = torch.arange(len(token))
        return memory["logits"][rows, before, token], (token, [steps[0] + 1])

    def log_p(self, image: int, words: list[int]) -> float:
        total, history = 0.0, [START, START, *words]
        for before, last, word in zip(history, history[1:], history[2:], strict=False):
            row = self.logits[image, before, last].clone()
            log_p = torch.log_softmax(row, 0)
            total += log_p[word].item()
        return total


def _sequences(steps: int):
    """Every caption of at most `steps` steps: ended, or cut at the last."""
    for n in range(steps):
        for words in itertools.product((3, 4), repeat=n):
            yield [*words, END]
    for words in itertools.product((3, 4), repeat=steps):
        yield list(words)


def _exhaustive(table: Table, image: int, steps: int, penalty: float) -> tuple[list[int], float]:
    scored = [(table.log_p(image, words) / len(words) ** penalty, words) for words in _sequences(steps)]
    score, words = max(scored)
    return [word for word in words if word != END], score


def _beam_by_lists(table: Table, image: int, K: int, steps: int, penalty: float) -> tuple[list[int], float]:
    live, finished = [(0.0, [])], []
    for step in range(1, steps + 1):
        ranked = sorted(
            ((table.log_p(image, [*words, w]), [*words, w]) for _, words in live for w in (END, 3, 4)), reverse=True
        )
        finished += [(score / step**penalty, words) for score, words in ranked[:K] if words[-1] == END]
        live = [(score, words) for score, words in ranked if words[-1] != END][:K]
        if len(finished) >= K:
            break
    else:
        finished += [(score / steps**penalty, words) for score, words in live]
    score, words = max(finished)
    return [word for word in words if word != END], score


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_a_beam_wider_than_the_number_of_captions_is_exhaustive(penalty):
    table = Table(images=6, seed=0)
    found = beam_search(table, torch.arange(6), beam_size=64, length_penalty=penalty, max_length=5)
    for image, words in enumerate(found.lists()):
        best, score = _exhaustive(table, image, 5, penalty)
        assert words == best
        assert found.scores[image].item() == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_batched_beam_is_the_beam_of_each_image(K, penalty):
    table = Table(images=40, seed=K)
    found = beam_search(table, torch.arange(40), beam_size=K, length_penalty=penalty, max_length=6)
    for image, words in enumerate(found.lists()):
        expected, score = _beam_by_lists(table, image, K, 6, penalty)
        assert words == expected
        assert found.scores[image].item() == pytest.approx(score, abs=1e-5)


def test_a_memory_that_is_no_tensor_is_not_repeated_and_serves_rows_in_the_order_of_the_images():
    class Kept(Table):
        def encode(self, images):
            self.memory = object()
            return self.memory

        def start(self, memory):
            return super().start({"logits": self.logits})

        def step(self, token, state, memory):
            assert memory is self.memory
            repeated = self.logits.repeat_interleave(len(token) // len(self.logits), dim=0)
            return super().step(token, state, {"logits": repeated})

    expected = beam_search(Table(images=9, seed=3), torch.arange(9), max_length=6)
    found = beam_search(Kept(images=9, seed=3), torch.arange(9), max_length=6)
    assert found.lists() == expected.lists() and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_of_one_is_greedy(penalty):
    table = Table(images=50, seed=9)
    one = beam_search(table, torch.arange(50), beam_size=1, length_penalty=penalty, max_length=7)
    plain = greedy(table, torch.arange(50), max_length=7)
    assert one.lists() == plain.lists()
    steps = (plain.lengths + 1).clamp(max=7)  # the end is a step, unless the caption was cut
    torch.testing.assert_close(one.scores, plain.scores / steps**penalty)


def test_a_wider_beam_finds_a_better_caption_where_greedy_goes_wrong():
    table = Table(images=1, seed=0)
    table.logits[:] = -1e4
    table.logits[0, START, START, [3, 4]] = torch.tensor([0.6, 0.4]).log()
    table.logits[0, START, 3, [3, 4, END]] = torch.tensor([0.4, 0.3, 0.3]).log()
    table.logits[0, START, 4, END] = 0.0
    table.logits[0, 3, [3, 4], END] = 0.0
    assert greedy(table, torch.tensor([0])).lists() == [[3, 3]]  # .6 * .4
    best = beam_search(table, torch.tensor([0]), beam_size=2)
    assert best.lists() == [[4]]  # .4
    assert best.scores[0].exp().item() == pytest.approx(0.4)


def test_length_penalty_prefers_the_longer_of_two():
    table = Table(images=1, seed=0)
    table.logits[:] = -1e4
    table.logits[0, START, START, [3, END]] = torch.tensor([0.45, 0.55]).log()
    table.logits[0, :, 3, [4]] = 0.0
    table.logits[0, :, 4, [END]] = 0.0
    assert beam_search(table, torch.tensor([0]), beam_size=16, length_penalty=0.0).lists() == [[]]
    assert beam_search(table, torch.tensor([0]), beam_size=16, length_penalty=1.0).lists() == [[3, 4]]


def test_the_pad_and_the_start_are_never_said():
    table = Table(images=10, seed=4)
    table.logits[..., :2] += 50
    for found in (greedy(table, torch.arange(10)), beam_search(table, torch.arange(10))):
        assert not {0, 1} & {word for words in found.lists() for word in words}


def test_captions_that_never_end_are_cut():
    table = Table(images=3, seed=5)
    table.logits[..., END] = -1e9
    for found in (greedy(table, torch.arange(3), max_length=4), beam_search(table, torch.arange(3), max_length=4)):
        assert found.lengths.tolist() == [4, 4, 4]
        assert found.tokens.shape == (3, 4)


def test_shorter_captions_are_padded_with_zero():
    table = Table(images=30, seed=6)
    found = greedy(table, torch.arange(30), max_length=6)
    assert len(set(found.lengths.tolist())) > 1
    for row, n in zip(found.tokens, found.lengths, strict=True):
        assert (row[n:] == 0).all() and (row[:n] > END).all()


def test_no_images_give_no_captions():
    table = Table(images=2, seed=0)
    for found in (greedy(table, torch.arange(0)), beam_search(table, torch.arange(0))):
        assert found.lists() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "fastcap.models: beam_size must be at least 1, got 0; pass beam_size=1 for greedy decoding"),
        ({"max_length": 0}, "fastcap.models: max_length must be at least 1, got 0; pass max_length=20"),
        (
            {"length_penalty": -1.0},
            "fastcap.models: length_penalty must be at least 0, got -1.0; pass 0 for none, 1 for",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(FastcapError) as caught:
        beam_search(Table(images=1, seed=0), torch.arange(1), **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("V", [3, 64, 1000, 1024])
def test_the_largest_by_blocks_are_those_of_topk(V):
    x = torch.randn(6, V, generator=torch.Generator().manual_seed(V))
    x[0, -1], x[1, 0], x[2] = 9.0, 9.0, -torch.inf  # behind the last block; in the first; nothing
    count = min(3, V)
    values, ids = decoding._largest(x, count)
    torch.testing.assert_close(values, x.topk(count, dim=1).values, rtol=0, atol=0)
    torch.testing.assert_close(x.gather(1, ids), values, rtol=0, atol=0)
    assert all(len(set(row)) == count for row in ids.tolist()) and (ids >= 0).all() and (ids < V).all()


def test_words_are_found_as_by_a_softmax_over_all_of_them_without_the_forbidden():
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))
    logits[0, 7] = 50.0  # the forbidden too take their share
    wanted = logits.log_softmax(1)
    wanted[:, [0, 7]] = -torch.inf
    log_p, ids = decoding._likeliest(logits, (0, 7), 6)
    torch.testing.assert_close(log_p, wanted.topk(6, dim=1).values)
    assert torch.equal(ids, wanted.topk(6, dim=1).indices)
    log_p, ids = decoding._likeliest(logits[:, :4], (0, 3), 6)  # fewer words than are wanted: the forbidden come last
    assert log_p.shape == (4, 4) and (log_p[:, 2:] == -torch.inf).all() and (log_p[:, :2] > -torch.inf).all()
