"""Emoji: pictures from an installed font, captions and families from Unicode's names."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict

import pytest

from fastcap.data import KarpathyDataset, find_font, words, write_emoji
from fastcap.data.emoji_captions import EmojiNames, split_emoji
from fastcap.errors import FastcapError

package = pytest.importorskip("emoji")
image = pytest.importorskip("PIL.Image")


def font_or_skip():
    features = pytest.importorskip("PIL.features")
    if not features.check("raqm"):
        pytest.skip("this Pillow has no Raqm text layout")
    try:
        return find_font()
    except FastcapError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def described():
    return {item.characters: item for item in EmojiNames(package.EMOJI_DATA).all()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    font_or_skip()
    summary = write_emoji(tmp_path_factory.mktemp("emoji"))
    return summary, json.loads(summary.json.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("characters", "family", "captions"),
    [
        (
            "🏃🏽‍♀️‍➡️",
            "person running",
            [
                "woman running facing right with medium skin tone",
                "woman running facing right",
                "woman running",
                "person running",
                "running woman",
            ],
        ),
        ("👋🏾", "waving hand", ["waving hand with medium-dark skin tone", "waving hand", "hand", "wave"]),
        (
            "👨🏻‍🦰",
            "person",
            ["man with light skin tone and red hair", "man with red hair", "man", "person", "red haired man"],
        ),
        ("👩🏿‍🦲", "person", ["bald woman with dark skin tone", "bald woman", "woman", "person", "adult"]),
        (
            "🧑🏻‍❤️‍🧑🏿",
            "couple with heart",
            [
                "couple with heart of person and person with light skin tone and dark skin tone",
                "couple with heart of person and person",
                "couple with heart",
            ],
        ),
        ("👨‍👩‍👧", "family", ["family of man, woman and girl", "family"]),
        ("🇫🇷", "flag", ["flag for france", "flag of france", "flag"]),
        ("❤️", "red heart", ["red heart", "heart"]),
        ("🌭", "hot dog", ["hot dog", "hotdog"]),
        ("🕗", "eight o'clock", ["eight o'clock"]),
    ],
)
def test_references_go_from_detailed_to_generic(described, characters, family, captions):
    item = described[characters]
    assert item.family == family
    # Names and aliases may change between versions of the emoji package; "hotdog" repeats "hot dog".
    assert list(item.captions) == [caption for caption in captions if caption != "hotdog"]


def test_every_emoji_has_one_to_five_lower_case_references_of_real_words(described):
    vocabulary = {"with", "of", "and", "flag", "for"}
    for entry in package.EMOJI_DATA.values():
        for name in [entry["en"], *entry.get("alias", [])]:
            vocabulary |= set(words(name.replace("’", "'").replace("_", " ")))
    for item in described.values():
        assert 1 <= len(item.captions) <= 5
        assert len(set(item.captions)) == len(item.captions)
        for caption in item.captions:
            assert caption == caption.lower() and "_" not in caption
            assert words(caption) and set(words(caption)) <= vocabulary


def test_skin_tone_is_told_by_a_minority_of_the_references(described):
    toned = [item for item in described.values() if "skin tone" in item.name]
    assert len(toned) > 1500
    for item in toned:
        assert sum("skin tone" in caption for caption in item.captions) == 1 < len(item.captions)


def test_unseen_families_are_whole_and_seen_ones_stay_in_training(described):
    families = [item.family for item in described.values()]
    splits = split_emoji(families)
    assert splits == split_emoji(families)
    assert splits != split_emoji(families, seed=1)
    by_family = defaultdict(set)
    for family, (split, status) in zip(families, splits, strict=True):
        by_family[family].add((split, status))
        assert split != "train" or status == "seen"
    for found in by_family.values():
        unseen = [split for split, status in found if status == "unseen"]
        assert found == {(unseen[0], "unseen")} if unseen else ("train", "seen") in found
    assert by_family["flag"] == {("train", "seen")}
    assert set(Counter(splits)) == {
        ("train", "seen"),
        ("test", "seen"),
        ("test", "unseen"),
        ("val", "seen"),
        ("val", "unseen"),
    }


def test_the_folder_holds_some_thousand_different_pictures_and_lists_the_rest(written, described):
    summary, document = written
    assert summary.images + len(summary.skipped) == len(described)
    assert summary.images > 3000
    assert summary.captions == sum(len(record["sentences"]) for record in document["images"])
    assert all(reason for _, reason in summary.skipped)
    assert [list(pair) for pair in summary.skipped] == document["skipped"]
    assert document["font"] and document["emoji_package"] == package.__version__
    files = {record["filename"] for record in document["images"]}
    assert len(files) == summary.images == len(list((summary.root / "images").iterdir()))


def test_pictures_are_colourful_on_white(written):
    summary, document = written
    record = next(record for record in document["images"] if record["emoji"] == "😀")
    with image.open(summary.root / "images" / record["filename"]) as picture:
        assert (picture.mode, picture.size) == ("RGB", (48, 48))
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        red, green, blue = picture.getpixel((24, 12))
        assert red > 200 and green > 150 and blue < 120  # a yellow forehead


def test_the_reader_gives_family_and_status(written):
    summary, _ = written
    view = KarpathyDataset(summary.root, "test").images()
    assert {item["extras"]["family_status"] for item in map(view.describe, range(len(view)))} == {"seen", "unseen"}
    assert len(view) == summary.splits["test"]


def test_a_missing_font_is_an_error_that_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTCAP_EMOJI_FONT", raising=False)
    monkeypatch.setattr("fastcap.data.emoji._fontconfig_fonts", lambda: [])
    monkeypatch.setattr("fastcap.data.emoji._KNOWN_PATHS", (str(tmp_path / "none.ttf"),))
    with pytest.raises(FastcapError, match=r"font must be installed.*none\.ttf.*apt-get install fonts-noto-color-emoji"):
        write_emoji(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FastcapError, match=r"fastcap\.data\.emoji: font must be a font file, got '.*gone\.ttf'"):
        find_font(tmp_path / "gone.ttf")
    monkeypatch.setenv("FASTCAP_EMOJI_FONT", str(tmp_path / "gone.ttf"))
    with pytest.raises(FastcapError, match="FASTCAP_EMOJI_FONT must be a font file"):
        find_font()


def test_a_file_that_is_no_colour_font_is_refused(tmp_path):
    fake = tmp_path / "fake.ttf"
    fake.write_bytes(b"not a font" * 100)
    pytest.importorskip("PIL.features").check("raqm") or pytest.skip("this Pillow has no Raqm text layout")
    with pytest.raises(FastcapError, match=r"font must be a font that Pillow opens, got '.*fake\.ttf"):
        write_emoji(tmp_path / "out", font=fake)


@pytest.mark.parametrize("size", [0, 7, "48", 48.0])
def test_a_bad_size_is_refused(tmp_path, size):
    with pytest.raises(FastcapError, match=r"fastcap\.data\.emoji: size must be an integer of at least 8"):
        write_emoji(tmp_path, size=size)


def test_the_environment_names_the_font(tmp_path, monkeypatch):
    font = font_or_skip()
    os.symlink(font, tmp_path / "mine.ttf")
    monkeypatch.setenv("FASTCAP_EMOJI_FONT", str(tmp_path / "mine.ttf"))
    assert find_font() == tmp_path / "mine.ttf"
