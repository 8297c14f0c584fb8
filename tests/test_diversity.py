"""Length and variety of captions."""

from __future__ import annotations

import pytest

from fastcap.errors import FastcapError
from fastcap.eval import diversity


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
