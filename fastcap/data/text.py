"""The one rule by which fastcap cuts a caption into words: data files, tokenizers and metrics all use it."""

from __future__ import annotations

import re

# Letters and digits, joined inside a word by one hyphen or apostrophe ("medium-dark", "o'clock", "man's"); all other
# punctuation separates words and is dropped. Python's `re` and the regex engine of `tokenizers` read it alike.
WORD_PATTERN = r"[^\W_]+(?:['’-][^\W_]+)*"
_WORD = re.compile(WORD_PATTERN)


def words(text: str) -> list[str]:
    """Lower-case words of a caption, punctuation dropped.

    >>> words("A man's T-shirt, seen at 5 o'clock .")
    ['a', "man's", 't-shirt', 'seen', 'at', '5', "o'clock"]
    """
    return _WORD.findall(text.lower())
