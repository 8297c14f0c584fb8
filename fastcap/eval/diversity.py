"""How varied captions are: a model that has learnt only the common caption says it of every image."""

from __future__ import annotations

from collections.abc import Sequence

from fastcap.data.text import words
from fastcap.errors import bad


def diversity(captions: Sequence[str]) -> dict[str, float]:
    """Length and variety of one caption per image; words as `fastcap.data.words` cuts them.

    Returned: `mean_length` (words), `unique_share` (distinct captions / captions), `vocabulary` (distinct words),
    `distinct_1` and `distinct_2` (distinct words and pairs of neighbours / all of them, over all captions together; 0.0
    where there are none). Raises FastcapError for an empty list or a caption that is no string.

    >>> diversity(["a red circle", "a red circle", "a square", "a"])["unique_share"]
    0.75
    """
    if isinstance(captions, str) or not len(captions):
        raise bad("eval.diversity", "captions", "be a list of at least one caption", captions, "pass one per image")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise bad("eval.diversity", f"captions[{i}]", "be a string", caption, "pass captions as text")
    cut = [tuple(words(caption)) for caption in captions]
    singles = [word for caption in cut for word in caption]
    pairs = [pair for caption in cut for pair in zip(caption, caption[1:], strict=False)]
    return {
        "mean_length": len(singles) / len(cut),
        "unique_share": len(set(cut)) / len(cut),
        "vocabulary": len(set(singles)),
        "distinct_1": len(set(singles)) / len(singles) if singles else 0.0,
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0,
    }
