"""Words as the Penn Treebank has them: the Stanford tokenizer's own, without Java."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest

from fastcap.errors import FastcapError
from fastcap.eval import _java, ptb_tokenize, ptb_tokenize_java

SHARED = Path(os.environ.get("FASTCAP_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "data" / "coco_captions"

# What the Stanford tokenizer of pycocoevalcap 1.2 makes of a caption, punctuation dropped: `test_java_says_the_same` asks.
CAPTIONS = {
    "A man's dog can't wait.": "a man 's dog ca n't wait",
    "I'm sure they're here, we've seen; he'd say she'll see": "i 'm sure they 're here we 've seen he 'd say she 'll see",
    "DON'T won't shan't isn't mustn't've": "do n't wo n't sha n't is n't must n't 've",
    "THEY'RE ON THE SHOE'S MATE, cannot's": "they 're on the shoe 's mate cannot 's",
    "gonna gotta wanna lemme gimme cannot dunno": "gon na got ta wan na lem me gim me can not dunno",
    "'Tis the dogs' ball, James's and O'Brien's": "'t is the dogs ball james 's and o'brien 's",
    "rock'n'roll, rock 'n' roll and 'em 'til 'cause": "rock 'n' roll rock 'n' roll and 'em 'til 'cause",
    "y'all ma'am o'clock c'mon d'eau Hawai'i": "y' all ma'am o'clock c'mon d'eau hawai'i",
    "the '90s, the 1990s and the 90's": "the '90s the 1990s and the 90 's",
    "a U.S. flag on St. John's Ave. in the U.S.": "a u.s. flag on st. john 's ave. in the u.s.",
    "Mr. and Mrs. Smith at 5 p.m. on Dec. 3, etc.": "mr. and mrs. smith at 5 p.m. on dec. 3 etc.",
    "a cat sat. No. 5 and no. It was": "a cat sat no. 5 and no it was",
    "by J. Crew, by J. The dog": "by j. crew by j the dog",
    "3,000 people, 1/2 cup, 3 1/2 cups, .5 and 5.5": "3,000 people 1/2 cup 3 1/2 cups .5 and 5.5",
    "5th 10am 5:30pm 12/25/2010 555-1234 (555) 555-1234": "5th 10am 5:30 pm 12/25/2010 555-1234 -lrb-555-rrb- 555-1234",
    "$5, $5.00, £5, €5, US$5, 5% and 5¢": "$ 5 $ 5.00 # 5 $ 5 us$ 5 5 % and 5 cents",
    '5\'10" tall, 6" wide': "5 10 tall 6 wide",
    "a t-shirt, red-and-white, 3-year-old, x-ray": "a t-shirt red-and-white 3-year-old x-ray",
    "and/or he/she w/ a / b": "and/or he/she w / a / b",
    "wait... what.. ok.... a . . . b … c": "wait what ok a b c",
    "a -- b --- c – d — e a—b": "a b c d e a b",
    "AT&T, R&B, salt & pepper, a&b &amp; c": "at&t r&b salt & pepper a & b & c",
    "a (small) [big] {huge} <tag> x < y": "a -lrb- small -rrb- -lsb- big -rsb- -lcb- huge -rcb- <tag> x < y",
    "http://www.abc.com/a?b=c, www.abc.com/def. joe@abc.com": "http://www.abc.com/a?b=c www.abc.com/def joe@abc.com",
    "@joe likes #dogs at 12.jpg": "@joe likes #dogs at 12.jpg",
    ":) :-( ;-P :D <3 ^_^": ":-rrb- :--lrb- ;-p :d < 3 ^_^",
    "Wow!! Really?! Yes! No?": "wow !! really ?! yes no",
    "“quoted” ‘single’ it’s don’t ``back''": "quoted single it 's do n't back",
    "café naïve Zürich señor ½ cup 25° © 日本": "café naïve zürich señor 1/2 cup 25 ° © 日本",
    "cat 😀 dog 👍🏽": "cat dog",
    "a_b C++ F-16 mp3 * ** # % = + ~ ^ | \\": "a_b c++ f-16 mp3 * ** # % = + ~ ^ | \\",
    "hello.world hello!world one,two one,two-three": "hello.world hello!world one two one,two-three",
    "colour, favourite and grey theatre": "colour favourite and grey theatre",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_worked_captions(caption):
    assert ptb_tokenize([caption]) == [CAPTIONS[caption].split()]


def test_a_caption_each_whatever_is_in_it():
    odd = ["", " ", ".", "\n", "a\nb", "a\r\nb\x0bc\x0cd\x85e\u2028f\u2029g", "\x00", "a\x07b", "\ud800", "😀", "|||", "\t"]
    found = ptb_tokenize(odd)
    assert len(found) == len(odd)
    assert [found[n] for n in (0, 1, 2, 3)] == [[]] * 4
    assert found[4] == ["a", "b"] and found[5] == list("abcdefg") and found[7] == ["a", "b"]
    assert found[6] == found[8] == found[9] == found[11] == [] and found[10] == ["|"] * 3


def test_words_do_not_depend_on_the_other_captions():
    captions = [*CAPTIONS, *reversed(CAPTIONS)]
    assert ptb_tokenize(captions) == [ptb_tokenize([caption])[0] for caption in captions]


def test_long_captions_take_linear_time():
    for unit in ("a", "a.", "a-", "1/", "'", "<a ", "a@", ".", "a,", "(5"):
        began = time.perf_counter()
        ptb_tokenize([unit * 2000])
        assert time.perf_counter() - began < 5, unit


@pytest.mark.parametrize("tokenize", [ptb_tokenize, ptb_tokenize_java])
def test_bad_input_is_refused(tokenize):
    with pytest.raises(
        FastcapError, match=rf"fastcap\.eval\.{tokenize.__name__}: captions must be a list of strings, got 'a'"
    ):
        tokenize("a")
    with pytest.raises(FastcapError, match=r"captions\[1\] must be a string, got None; pass captions as text"):
        tokenize(["a", None])


# Against Java


@pytest.fixture(scope="module")
def java():
    try:
        _java.java(), _java.coco_file("tokenizer", "stanford-corenlp-3.4.1.jar")
    except _java.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def coco_captions():
    """Five files of a caption for each of 5,000 images."""
    if not SHARED.is_dir():
        pytest.skip("needs the COCO captions: set FASTCAP_SHARED")
    return [(SHARED / f"reference{n}.txt").read_text(encoding="utf-8").splitlines() for n in range(5)]


def different(captions):
    pairs = zip(captions, ptb_tokenize_java(captions), ptb_tokenize(captions), strict=True)
    return [(caption, theirs, ours) for caption, theirs, ours in pairs if theirs != ours]


def test_java_says_the_same(java):
    assert different(list(CAPTIONS)) == []
    assert ptb_tokenize_java(["", "a\nb", " ", "\u2028", "c"]) == [[], ["a", "b"], [], [], ["c"]]


def as_written(caption, rng):
    """The caption as a person types it: COCO's are cut at every punctuation mark; now and then capitals and typography."""
    caption = re.sub(r" ' (s|t|re|ve|ll|d|m)\b", r"'\1", caption).replace(" - ", "-").replace("s ' ", "s' ")
    caption = (
        re.sub(r" ([.,;:!?)])", r"\1", re.sub(r'" ([^"]*?) ?"', r'"\1"', caption)).replace("( ", "(").replace(" / ", "/")
    )
    form = rng.choice([str, str, str, str.upper, str.title])
    caption = form(caption)
    if rng.random() < 0.3:
        caption = caption.replace("'", "’").replace("-", rng.choice("-–"))
    if rng.random() < 0.2:
        caption = caption.replace(", ", ",").replace(" a ", " 3 ").replace(" the ", " Mr. ")
    return rng.choice(["{}", "{}", '"{}"', "“{}”", "({}).", "{}!!", "{}...", "{} ."]).format(caption)


def test_all_captions_of_coco_come_out_as_java_has_them(java, coco_captions):
    captions = [caption for references in coco_captions for caption in references]
    assert len(captions) == 25_000
    assert different(captions) == []
    rng = random.Random(0)
    assert different([as_written(caption, rng) for caption in captions]) == []


PARTS = """
    a the dog man's U.S. Mr. St. J. K. can't don't it's o'clock 3 5 12 1/2 3,000 $5 £5 5% 5th 2nd 10am 5:30 p.m. a.m.
    e.g. etc. cannot gonna T-shirt x-ray and/or he/she red-and-white 'em 'til '90s O'Brien c++ AT&T R&B & @bob #tag
    www.abc.com http://a.bc/d.html me@x.org ... .. !! ?! -- - – — “ ” ‘ ’ " ' `` '' ( ) [ ] { } < > / \\ * _ ~ ^ | = +
    % # @ , . ; : ! ? :) :-( ;) <3 é café naïve ½ ° © ™ … 日本 😀 No. no. The Then ft. in. lb. 6' 6" 5'10" (555) 555-1234
    1990-1995 12/25/2010 mp3 a_b img_12.jpg 7-Eleven i.e. Ph.D. Jan. vs. 2x4 y'all rock'n'roll 'n' ma'am dogs' 80's
    hawai'i w/ w/o 24/7 TV's A+ M&M's &amp; -LRB- <b> </b> C. D.C. N.Y.C. Inc. Co. Jr. II 's n't 're 'll
""".split()


def test_made_up_captions_come_out_as_java_has_them(java):
    rng = random.Random(0)
    assert different([" ".join(rng.choices(PARTS, k=rng.randint(1, 6))) for _ in range(3000)]) == []
    marks = "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~aB5 "
    assert different([a + b for a in marks for b in marks]) == []
    # Parts run together at random, as nobody writes: 171 of 20,000 differed when this was written.
    glued = ["".join(part + " " * (rng.random() < 0.6) for part in rng.choices(PARTS, k=4)).strip() for _ in range(3000)]
    assert len(different(glued)) < 45


# Known differences: what Java says, and what fastcap says. docs/math/evaluation.md names them.
DIFFERENCES = {
    "ol'ft.": ("ol' ft.", "ol ft."),  # a shortened word run together with an abbreviation
    "me@x.org™": ("me@x.org™", "me@x.org ™"),  # an e-mail address run together with a symbol
    "Mr.™ by C. Mr.™": ("mr. ™ by c. mr. ™", "mr. ™ by c mr. ™"),  # an initial before a title that a symbol follows
    "\u1cd0a": ("a", "\u1cd0 a"),  # marks of scripts that Unicode got after the tokenizer was made
}


@pytest.mark.parametrize("caption", DIFFERENCES)
def test_known_differences_are_still_there(java, caption):
    theirs, ours = DIFFERENCES[caption]
    assert (ptb_tokenize_java([caption]), ptb_tokenize([caption])) == ([theirs.split()], [ours.split()])


def test_pycocoevalcap_lets_a_caption_depend_on_the_next_one(java):
    """Its lines go to Java as one text, in which "U." is an abbreviation before "dog" and ends a sentence before "A"."""
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    found = {}
    for after in ("A dog", "Dogs"):
        given = {0: [{"caption": "the Wii U."}, {"caption": after}]}
        found[after] = module.PTBTokenizer().tokenize(given)[0][0].split()
    assert found == {"A dog": ["the", "wii", "u"], "Dogs": ["the", "wii", "u."]}
    for after in found:
        assert ptb_tokenize_java(["the Wii U.", after])[0] == ptb_tokenize(["the Wii U.", after])[0] == ["the", "wii", "u."]


# Without Java


def test_without_java_the_java_tokenizer_says_so(monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv("FASTCAP_JAVA", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(_java.Unavailable, match=r"no Java was found; install a Java runtime, 8 or newer"):
        ptb_tokenize_java(["a"])
    monkeypatch.setenv("FASTCAP_JAVA", "")
    with pytest.raises(_java.Unavailable, match=r"FASTCAP_JAVA is empty.*unset FASTCAP_JAVA"):
        ptb_tokenize_java(["a"])
