"""Captions to ids and back."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from fastcap.data import CaptionTokenizer, words
from fastcap.errors import FastcapError

tokenizers = pytest.importorskip("tokenizers")

CAPTIONS = [
    "A man rides a red motorcycle on a dirt road.",
    "A young girl's birthday cake, with candles!",
    "Two dogs are playing; the dogs look happy",
    "a medium-dark mug at five o'clock",
]


def trained(kind: str, captions=CAPTIONS) -> CaptionTokenizer:
    if kind == "words":
        return CaptionTokenizer.train_words(captions)
    return CaptionTokenizer.train_wordpiece(captions, 80)


@pytest.mark.parametrize("kind", ["words", "wordpiece"])
def test_decode_gives_back_the_normalised_caption(kind):
    tokenizer = trained(kind)
    for caption in CAPTIONS:
        ids = tokenizer.encode(caption)
        assert tokenizer.decode(ids) == " ".join(words(caption))
        assert min(ids) >= 4
    assert tokenizer.encode_batch(CAPTIONS) == [tokenizer.encode(caption) for caption in CAPTIONS]


@pytest.mark.parametrize("kind", ["words", "wordpiece"])
def test_a_saved_tokenizer_loads_equal_and_so_does_a_pickled_one(kind, tmp_path):
    tokenizer = trained(kind)
    tokenizer.save(tmp_path / "tokenizer.json")
    for other in (CaptionTokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert len(other) == len(tokenizer) == other.vocab_size
        assert other.encode_batch(CAPTIONS) == tokenizer.encode_batch(CAPTIONS)
        assert other.decode(other.encode(CAPTIONS[1])) == " ".join(words(CAPTIONS[1]))
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.encode(CAPTIONS[1]).ids == tokenizer.encode(CAPTIONS[1])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("kind", ["words", "wordpiece"])
def test_training_twice_gives_the_same_ids(kind, tmp_path):
    for name in "ab":
        trained(kind, CAPTIONS * 3).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_special_tokens_have_the_first_ids():
    tokenizer = trained("words")
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.encode("a zebra") == [4, 3]  # "a" is the commonest word
    assert tokenizer.encode("...") == []


def test_decode_stops_at_the_end_and_drops_special_tokens():
    tokenizer = trained("words")
    ids = [1, *tokenizer.encode("a red cake"), 3, 2, *tokenizer.encode("dogs"), 0, 0]
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == "a red cake"
    assert tokenizer.decode([]) == ""
    with pytest.raises(FastcapError, match=r"ids must lie in \[0, \d+\), got 99999"):
        tokenizer.decode([99999])


def test_rare_words_and_large_vocabularies_are_cut():
    captions = ["a cat", "a cat", "a dog"]
    assert CaptionTokenizer.train_words(captions, min_count=2).vocab_size == 4 + 2
    assert CaptionTokenizer.train_words(captions, max_size=5).decode([4]) == "a"
    assert CaptionTokenizer.train_wordpiece(CAPTIONS, 60).vocab_size == 60


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CaptionTokenizer.train_words([]), "captions must hold at least one caption"),
        (lambda: CaptionTokenizer.train_words("a cat"), "captions must be several captions, got 'a cat'"),
        (lambda: CaptionTokenizer.train_words(["a", 3]), r"captions\[1\] must be a string, got 3"),
        (lambda: CaptionTokenizer.train_words(["a"], min_count=2), "captions must hold at least one word to learn"),
        (lambda: CaptionTokenizer.train_words(["a"], min_count=0), "min_count must be an integer of at least 1"),
        (lambda: CaptionTokenizer.train_words(["a"], max_size=4), "max_size must be an integer of at least 5"),
        (lambda: CaptionTokenizer.train_wordpiece(["..."], 50), "captions must hold at least one word to learn"),
        (lambda: CaptionTokenizer.train_wordpiece(["a"], 4), "vocab_size must be an integer of at least 5"),
        (lambda: CaptionTokenizer.train_wordpiece(["abcd"], 7), "vocab_size must have room for .* pass at least 11"),
        (lambda: trained("words").encode(None), "text must be a string, got None"),
        (lambda: CaptionTokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))), "as ids 0-3"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(FastcapError, match=f"fastcap.data.tokenizer: .*{message}"):
        make()


def test_a_broken_file_is_refused_by_name(tmp_path):
    (tmp_path / "broken.json").write_text('{"version": ')
    with pytest.raises(FastcapError, match=r"path must be a tokenizers JSON, got '.*broken\.json \(.*line 1 column"):
        CaptionTokenizer.load(tmp_path / "broken.json")
    (tmp_path / "other.json").write_text('{"images": []}')
    with pytest.raises(FastcapError, match=r"path must be a tokenizers JSON, got '.*other\.json"):
        CaptionTokenizer.load(tmp_path / "other.json")
    with pytest.raises(FastcapError, match=r"path must be a file, got '.*none\.json'"):
        CaptionTokenizer.load(tmp_path / "none.json")


def test_real_captions_are_cut_alike_by_words_and_by_the_tokenizer():
    repository = Path(__file__).resolve().parents[1]
    shared = Path(os.environ.get("FASTCAP_SHARED", repository.parent / "shared"))
    source = shared / "data" / "coco_captions" / "reference0.txt"
    if not source.is_file():
        pytest.skip(f"no COCO captions at {source}")
    captions = source.read_text(encoding="utf-8").splitlines()
    tokenizer = CaptionTokenizer.train_words(captions)
    assert all(tokenizer.decode(tokenizer.encode(caption)) == " ".join(words(caption)) for caption in captions)
    assert 3000 < tokenizer.vocab_size < 8000
    pieces = CaptionTokenizer.train_wordpiece(captions, 1000)
    assert all(pieces.decode(pieces.encode(caption)) == " ".join(words(caption)) for caption in captions[:500])
