"""Captions to ids and back: a thin class over Hugging Face's `tokenizers`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastcap.data._checks import check_int, require
from fastcap.data.text import WORD_PATTERN, words
from fastcap.errors import bad

_OP = "data.tokenizer"
PAD, START, END, UNK = "<pad>", "<start>", "<end>", "<unk>"
SPECIALS = (PAD, START, END, UNK)
_CONTINUES = "##"  # marks a word piece that does not begin a word


class CaptionTokenizer:
    """Words or word pieces of captions, lower-case and without punctuation (`fastcap.data.words` is the rule).

    `pad_id` 0, `start_id` 1, `end_id` 2, `unk_id` 3. Make one with `train_words`, `train_wordpiece` or `load`.

    >>> tokenizer = CaptionTokenizer.train_words(["A red circle.", "a blue square"])
    >>> tokenizer.encode("a red square")
    [4, 7, 8]
    >>> tokenizer.decode([1, 4, 7, 8, 2, 0])
    'a red square'
    """

    pad_id, start_id, end_id, unk_id = range(4)

    def __init__(self, tokenizer) -> None:
        """`tokenizer`: a `tokenizers.Tokenizer` whose ids 0-3 are the four special tokens."""
        found = tuple(tokenizer.id_to_token(i) for i in range(len(SPECIALS)))
        if found != SPECIALS:
            remedy = "train it with CaptionTokenizer"
            raise bad(_OP, "tokenizer", f"have {', '.join(SPECIALS)} as ids 0-3", found, remedy)
        self._tokenizer = tokenizer
        self._tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]

    @classmethod
    def train_words(cls, captions: Iterable[str], min_count: int = 1, max_size: int | None = None) -> CaptionTokenizer:
        """One id per word that occurs at least `min_count` times, the commonest first; others become `<unk>`.

        `max_size` bounds the vocabulary, special tokens included. Deterministic: ties are in alphabetical order.
        """
        check_int(_OP, "min_count", min_count, 1, "pass 1 to keep every word")
        if max_size is not None:
            check_int(_OP, "max_size", max_size, len(SPECIALS) + 1, "pass None for no bound")
        tokenizers = require("tokenizers", _OP)
        counts = Counter(word for caption in _checked(captions) for word in words(caption))
        kept = [word for word in sorted(counts, key=lambda word: (-counts[word], word)) if counts[word] >= min_count]
        if not kept:
            got = f"{len(counts)} words, none of them {min_count} times"
            raise bad(_OP, "captions", "hold at least one word to learn", got, "lower min_count or check the captions")
        vocabulary = {token: i for i, token in enumerate([*SPECIALS, *kept][:max_size])}
        return cls(_with_words(tokenizers, tokenizers.models.WordLevel(vocabulary, unk_token=UNK)))

    @classmethod
    def train_wordpiece(cls, captions: Iterable[str], vocab_size: int) -> CaptionTokenizer:
        """Word pieces learnt from the captions: at most `vocab_size`, special tokens and single letters included."""
        check_int(_OP, "vocab_size", vocab_size, len(SPECIALS) + 1, "pass some thousands")
        corpus = _checked(captions)
        if not any(words(caption) for caption in corpus):
            got = f"{len(corpus)} captions without one"
            raise bad(_OP, "captions", "hold at least one word to learn", got, "check the captions")
        tokenizers = require("tokenizers", _OP)
        letters = {letter for caption in corpus for word in words(caption) for letter in word[1:]}
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            # The library numbers letters inside words in the random order of a hash map, and ties between merges follow
            # the numbers. As "special" tokens they are numbered first, in this order, and training is deterministic.
            special_tokens=[*SPECIALS, *(_CONTINUES + letter for letter in sorted(letters))],
            continuing_subword_prefix=_CONTINUES,
            show_progress=False,
        )
        trained = _with_words(tokenizers, tokenizers.models.WordPiece(unk_token=UNK))
        trained.train_from_iterator(corpus, trainer)
        if trained.get_vocab_size() > vocab_size:
            remedy = f"pass at least {trained.get_vocab_size()}"
            raise bad(_OP, "vocab_size", "have room for the special tokens and every letter", vocab_size, remedy)
        # A new tokenizer, in which those letters are pieces like any other.
        model = tokenizers.models.WordPiece(
            trained.get_vocab(), unk_token=UNK, continuing_subword_prefix=_CONTINUES, max_input_chars_per_word=100
        )
        return cls(_with_words(tokenizers, model))

    @classmethod
    def load(cls, path: str | os.PathLike) -> CaptionTokenizer:
        """Read what `save` wrote. Raises FastcapError naming the file if it is missing or not such a JSON."""
        remedy = "give a file that CaptionTokenizer.save wrote"
        if not Path(path).is_file():
            raise bad(_OP, "path", "be a file", str(path), remedy)
        tokenizers = require("tokenizers", _OP)
        try:
            text = Path(path).read_text(encoding="utf-8")
            json.loads(text)  # for its message: it gives line and column
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise bad(_OP, "path", "be a tokenizers JSON", f"{path} ({error})", remedy) from error
        return cls(tokenizer)

    def save(self, path: str | os.PathLike) -> None:
        """Write the `tokenizers` JSON, which `tokenizers.Tokenizer.from_file` and transformers read too."""
        partial = Path(f"{path}.partial")
        partial.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(partial, path)

    def encode(self, text: str) -> list[int]:
        """Ids of the caption's words or pieces, without special tokens; unknown ones are `unk_id`."""
        if not isinstance(text, str):
            raise bad(_OP, "text", "be a string", text, "pass one caption; encode_batch takes several")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` for each caption."""
        # Not the library's own encode_batch: it starts threads, and a DataLoader that forks after that is warned about.
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The caption of `ids` (a list, or a 1-D integer tensor): up to the first `end_id`, special tokens dropped.

        Of a caption whose words are all known it gives back `" ".join(words(caption))`.
        """
        text = ""
        for i in ids.tolist() if hasattr(ids, "tolist") else ids:
            if i == self.end_id:
                break
            if not 0 <= i < len(self._tokens):
                raise bad(_OP, "ids", f"lie in [0, {len(self._tokens)})", i, "decode with the tokenizer of the model")
            if i >= len(SPECIALS):
                token = self._tokens[i]
                text += token.removeprefix(_CONTINUES) if token.startswith(_CONTINUES) else f" {token}"
        return text.strip()

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._tokens)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"CaptionTokenizer({type(self._tokenizer.model).__name__}, vocab_size={self.vocab_size})"


def _checked(captions: Iterable[str]) -> list[str]:
    if isinstance(captions, str):
        raise bad(_OP, "captions", "be several captions", captions, "pass a list of strings")
    corpus = list(captions)
    if not corpus:
        raise bad(_OP, "captions", "hold at least one caption", "none", "pass the training captions")
    for i, caption in enumerate(corpus):
        if not isinstance(caption, str):
            raise bad(_OP, f"captions[{i}]", "be a string", caption, "pass captions as text")
    return corpus


def _with_words(tokenizers, model):
    """A tokenizer that cuts text exactly as `words` does, so that its JSON needs no Python beside it."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    # invert: what matches is a word and is kept, what lies between is removed.
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(WORD_PATTERN), behavior="removed", invert=True
    )
    return tokenizer
