"""Captions cut into words as the Penn Treebank does, punctuation dropped: what published scores of captions count.

The words are those of pycocoevalcap's `PTBTokenizer`, which runs the Stanford tokenizer in Java; here it takes no Java.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

from fastcap.errors import bad
from fastcap.eval import _java
from fastcap.eval._ptb_rules import ABBREVIATIONS, BEFORE_NUMBERS, IN_LOWER_OR_CAPITALISED, OF_STATES, RULES, TITLES

PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
"""What pycocoevalcap drops. Brackets it means to drop too, but they are "-lrb-" by then, and stay."""

_RULES = [(re.compile(pattern), name, "ahead" if "?P<ahead>" in pattern else 0) for name, pattern in RULES.items()]
_TWO_WORDS = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BETWEEN = "between"
_DROPPED = '"\u2018\u2019\u201b\u2010\u2011\x91\x92'
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "", "&nbsp;": ""}
_ABBREVIATED = {*TITLES, *ABBREVIATIONS, *OF_STATES, *IN_LOWER_OR_CAPITALISED, *BEFORE_NUMBERS}
# Where a rule may see beyond white space: tags, "1 1/2", telephone numbers, and what follows "J." or "no.".
_REACHES = re.compile(rf"<|\d\s+\d|\)\s\d|(?<![^\W\d_])(?:[A-Za-z]|(?i:{'|'.join(BEFORE_NUMBERS)}))\.\s")


def ptb_tokenize(captions: Sequence[str]) -> list[list[str]]:
    """The lower-case words of each caption by the rules of the Penn Treebank, without punctuation.

    Equivalent to pycocoevalcap's `PTBTokenizer` (Stanford CoreNLP 3.4.1, -lowerCase): "don't" is "do" and "n't", "man's" is
    "man" and "'s", "cannot" is "can" and "not"; "U.S.", "3,000", "t-shirt" and "and/or" are one word. Every caption of COCO
    comes out alike; docs/math/evaluation.md lists what does not.

    Args:
        captions: C strings; line breaks in them are spaces.

    Returns:
        C lists of words; a caption without a word has [].

    Raises:
        FastcapError: something that is no string.

    >>> ptb_tokenize(["A man's dog can't wait.", '"Stop!"', ""])
    [['a', 'man', "'s", 'dog', 'ca', "n't", 'wait'], ['stop'], []]
    """
    _check("eval.ptb_tokenize", captions)
    made = []
    for caption in captions:
        text = caption if caption.isascii() else caption.translate(_CHARACTERS)
        text = text.replace("&apos;", "'") if "&apos;" in text else text
        if _REACHES.search(text):
            made.append(_tokens(text))
            continue
        words: list[str] = []
        for part in text.split():
            words += _part(part)
        made.append(words)
    return made


def ptb_tokenize_java(captions: Sequence[str]) -> list[list[str]]:
    """The same by the Stanford tokenizer itself, in Java; line breaks in a caption are spaces, and an empty one has [].

    Args:
        captions: C strings.

    Raises:
        FastcapError: something that is no string; or, as `fastcap.eval._java.Unavailable`, without Java or pycocoevalcap.

    >>> ptb_tokenize_java(["A man's dog."])                                                          # doctest: +SKIP
    [['a', 'man', "'s", 'dog']]
    """
    _check("eval.ptb_tokenize_java", captions)
    jar = _java.coco_file("tokenizer", "stanford-corenlp-3.4.1.jar")
    # Each caption is one line of input and of output: whatever else could end a line is a space. The tokenizer looks beyond
    # a line: "Wii U." has a full stop for itself if the next caption begins with "A". So a line stands in between.
    lines = [line for caption in captions for line in (" ".join(caption.split()), _BETWEEN)]
    options = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    found = _java.run("the Stanford tokenizer", options, lines)
    if len(found) != len(lines) or set(found[1::2]) > {_BETWEEN}:
        reason = f"the Stanford tokenizer answered {len(found)} lines for {len(lines)}"
        raise _java.Unavailable(reason, "use the tokenizer without Java: --tokenizer fastcap")
    return [[word for word in line.split() if word not in PUNCTUATION] for line in found[::2]]


def _check(op: str, captions: object) -> None:
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        raise bad(op, "captions", "be a list of strings", captions, "pass [caption]")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise bad(op, f"captions[{i}]", "be a string", caption, "pass captions as text")


@functools.lru_cache(maxsize=1 << 16)
def _part(part: str) -> tuple[str, ...]:
    """The words of what stands between white space; most parts are a word, and some punctuation behind it."""
    word = part[:-1] if part[-1] in ".,;:" else part
    if word.isascii() and word.isalpha():
        word = word.lower()
        if word not in _TWO_WORDS and (part[-1] != "." or len(word) > 1 and word not in _ABBREVIATED):
            return (word,)
    return tuple(_tokens(part))


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    place = 0
    while place < len(text):
        furthest = 0
        for pattern, name, read in _RULES:
            match = pattern.match(text, place)
            if match and match.end(read) > furthest:
                furthest, end, rule = match.end(read), match.end(), name
        found += _words(rule, text[place:end])
        place = end
    return [word for word in found if word not in PUNCTUATION]


def _words(rule: str, token: str) -> list[str]:
    """What one token becomes; one with white space in it is several words, as the scorers take it."""
    token = token.lower()
    if rule == "split":
        return [token[: _TWO_WORDS[token]], token[_TWO_WORDS[token] :]]
    if rule == "entity":
        token = _ENTITIES.get(token, token)
    elif rule == "one":
        token = _BRACKETS.get(token, token) if token.isprintable() and token not in _DROPPED else ""
    elif rule == "mark":
        token = ""
    elif rule == "company":
        token = token.replace("&amp;", "&")
    elif rule in ("smiley", "phone"):
        token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    elif rule in ("ending", "n't"):
        token = token.replace("\u2019", "'").replace("\x92", "'").replace("\u2018", "`")
    return token.split()


class _Characters(dict):
    """What characters beyond ASCII become, found out at the first use of each: letters and digits stay, most symbols are
    tokens of their own, and what the tokenizer of 2014 does not know is nothing."""

    def __missing__(self, code: int) -> str:
        made = self[code] = self._find(code)
        return made

    def _find(self, code: int) -> str:
        character = chr(code)
        if code < 0x80 or code in _APOSTROPHES:
            return character
        if character in _NAMED:
            return f" {_NAMED[character]} "
        if character in _JOINED:
            return _JOINED[character]
        category = unicodedata.category(character)
        if code <= 0xFFFF and (category[0] in "LM" or category == "Nd") and category != "Me":
            return character
        return f" {character} " if any(low <= code <= high for low, high in _SYMBOLS) else " "


_APOSTROPHES = {0x2019, 0x92, 0x2018, 0x91, 0x201B, 0x2010, 0x2011}
_NAMED = {
    "\xa2": "cents", "\xa3": "#", "\xa4": "$", "\x80": "$", "\u20a0": "$", "\u20ac": "$", "\xbc": "1/4", "\xbd": "1/2",
    "\xbe": "3/4", "\u2153": "1/3", "\u2154": "2/3",
}  # fmt: skip
_JOINED = {
    "\xad": "", **dict.fromkeys("\u2013\u2014\u2015\x96\x97", "--"),
    **dict.fromkeys("\u201c\u201d\xab\xbb\x93\x94", '"'),
}  # fmt: skip
# The symbols of the basic plane that are tokens, by the measured ranges.
_SYMBOLS = (
    (0xA1, 0xA1), (0xA5, 0xA9), (0xAC, 0xAC), (0xAE, 0xB4), (0xB6, 0xB9), (0xBF, 0xBF), (0xD7, 0xD7), (0xF7, 0xF7),
    (0x2016, 0x2017), (0x201A, 0x201A), (0x201E, 0x2023), (0x2030, 0x2038), (0x203B, 0x203B), (0x203E, 0x2042),
    (0x2044, 0x2044), (0x2070, 0x2070), (0x2074, 0x207E), (0x2080, 0x208E), (0x20A4, 0x20A4), (0x2100, 0x2101),
    (0x2103, 0x2106), (0x2108, 0x2109), (0x2114, 0x2114), (0x2116, 0x2118), (0x211E, 0x2123), (0x2125, 0x2125),
    (0x2127, 0x2127), (0x2129, 0x2129), (0x212E, 0x212E), (0x213A, 0x213B), (0x2140, 0x2144), (0x214A, 0x214D),
    (0x214F, 0x214F), (0x2155, 0x215E), (0x2190, 0x2BFF), (0x3001, 0x3002), (0x3012, 0x3012), (0x30FB, 0x30FB),
    (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF65), (0xFFE0, 0xFFE1), (0xFFE5, 0xFFE6),
)  # fmt: skip
_CHARACTERS = _Characters()
