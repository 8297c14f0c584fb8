"""Length and variety of captions, and how much of each is in the others."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest

from fastcap.errors import FastcapError
from fastcap.eval import diversity, self_bleu


def test_worked_captions():
    # words: a red circle / a red circle / a square: 8 words, 4 distinct; 5 pairs, 3 distinct
    assert diversity(["A red circle.", "a red circle", "a square"]) == {
        "mean_length": pytest.approx(8 / 3),
        "unique_share": pytest.approx(2 / 3),
        "vocabulary": 4,
        "distinct_1": pytest.approx(4 / 8),
        "distinct_2": pytest.approx(3 / 5),
    }


def test_empty_captions_count_as_length_zero():
    assert diversity(["", "a circle"])["mean_length"] == 1.0
    assert diversity([""]) == {
        "mean_length": 0.0,
        "unique_share": 1.0,
        "vocabulary": 0,
        "distinct_1": 0.0,
        "distinct_2": 0.0,
    }


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], r"fastcap\.eval\.diversity: captions must be a list of at least one caption, got \[\]"),
        ("a circle", "captions must be a list of at least one caption, got 'a circle'"),
        (["a", None], r"captions\[1\] must be a string, got None"),
    ],
)
def test_bad_input_is_refused(captions, message):
    with pytest.raises(FastcapError, match=message):
        diversity(captions)


# Self-BLEU


def of_pycocoevalcap(captions):
    """The definition, caption by caption."""
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    joined = [" ".join(words) for words in captions]
    references = {n: joined[:n] + joined[n + 1 :] for n in range(len(joined))}
    _, each = bleu.Bleu(4).compute_score(references, {n: [said] for n, said in enumerate(joined)}, verbose=0)
    return each[3]


@pytest.mark.parametrize("seed", range(4))
def test_self_bleu_is_the_bleu_with_all_others_as_references(seed):
    rng = random.Random(seed)
    words = "a a red car dog on the grass".split()
    captions = [rng.choices(words, k=rng.choice([0, 1, 3, 6, 9, 14])) for _ in range(40)]
    assert np.abs(self_bleu(captions) - of_pycocoevalcap(captions)).max() < 1e-9


def test_self_bleu_of_equal_captions_is_one_and_of_unlike_ones_nothing():
    said = "a red car stops".split()
    assert self_bleu([said] * 3) == pytest.approx([1, 1, 1])
    assert self_bleu([["a", "b", "c", "d"], ["e", "f", "g", "h"]]) == pytest.approx([0, 0], abs=1e-9)
    assert self_bleu([[], [], said]) == pytest.approx([0, 0, 0], abs=1e-9)


def test_self_bleu_takes_repeated_words_as_often_as_another_caption_has_them():
    found = self_bleu([["the"] * 3, ["the"] * 2])
    assert found == pytest.approx([0, 0], abs=0.03)  # not quite: what keeps divisions by 0 away shows
    found = self_bleu([["the"] * 6, ["the"] * 5])
    assert found[0] == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert found[1] == pytest.approx(math.exp(1 - 6 / 5))  # all of it is in the other, which is longer


def test_self_bleu_of_5000_captions_takes_no_time():
    rng = random.Random(0)
    words = [f"w{n}" for n in range(2000)]
    captions = [rng.choices(words, k=11) for _ in range(5000)]
    began = time.process_time()
    assert len(self_bleu(captions)) == 5000 and time.process_time() - began < 5


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([["a"]], r"fastcap\.eval\.self_bleu: captions must be a list of at least two captions, got 1"),
        ("ab", "captions must be a list of at least two captions, got 'ab'"),
        ([["a"], "a b"], r"captions\[1\] must be a list of words, got 'a b'"),
        ([["a"], [1]], r"captions\[1\] must be a list of words, got \[1\]"),
    ],
)
def test_self_bleu_refuses_bad_input(captions, message):
    with pytest.raises(FastcapError, match=message):
        self_bleu(captions)
