"""BLEU, ROUGE-L and CIDEr of captions against references, by the image, as pycocoevalcap defines them and without it."""

from __future__ import annotations

import numpy as np

from fastcap.eval._ngrams import Corpus, counted
from fastcap.eval.bootstrap import mean_of, of_sums
from fastcap.eval.captioned import Found, NotMeasured, Task, Tokens

N = 4  # longest n-grams
_SMALL, _TINY = 1e-9, 1e-15  # pycocoevalcap's, which keep a division by 0 and a logarithm of 0 away
_BETA = 1.2  # of ROUGE-L: recall counts 1.44 times as much as precision


def bleu(task: Task) -> Found | NotMeasured:
    """BLEU-1 to BLEU-4 of the whole set, and of each image."""
    if isinstance(tokens := _compared(task), NotMeasured):
        return tokens
    each = bleu_counts(tokens)
    of_images = bleu_of(each)
    scores = {key: float(value) for key, value in bleu_of(each.sum(0)).items()}
    return Found(scores, {key: value.tolist() for key, value in of_images.items()}, of_sums(each, bleu_of))


def bleu_counts(tokens: Tokens) -> np.ndarray:
    """[N, 10] float64, of each image: for k = 1 .. 4 the k-grams of the caption that stand in a reference, each at most as
    often as in the reference that has it most often; its k-grams; its words; the words of the reference closest in length,
    of two the shorter."""
    images = len(tokens.captions)
    owner = np.repeat(np.arange(images), [len(each) for each in tokens.references])
    corpus = Corpus([*tokens.captions, *(words for each in tokens.references for words in each)])
    said, theirs = corpus.lengths[:images], corpus.lengths[images:]
    made = np.zeros((images, 2 * N + 2))
    for k, (ids, of) in enumerate(corpus.grams(N), 1):
        made[:, k - 1] = _clipped(ids, of, owner, images)
        made[:, N + k - 1] = np.maximum(said - k + 1, 0)
    made[:, -2] = said
    distance = np.abs(theirs - said[owner]) * (int(theirs.max(initial=0)) + 1) + theirs  # nearest, then shortest
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    best = np.minimum.reduceat(distance, first)
    made[:, -1] = best % (int(theirs.max(initial=0)) + 1)
    return made


def _clipped(ids: np.ndarray, of: np.ndarray, owner: np.ndarray, images: int) -> np.ndarray:
    """[N]: n-grams of each image's caption in its references. ids, of: of the captions, then of the references."""
    G = int(ids.max(initial=0)) + 1
    mine = of < images
    gram, times = counted(of[mine] * G + ids[mine])
    # How often each reference has an n-gram, then the most of an image's references.
    in_reference, count = counted((of[~mine] - images) * G + ids[~mine])
    of_image = owner[in_reference // G] * G + in_reference % G
    order = np.lexsort((count, of_image))
    last = np.flatnonzero(np.diff(of_image[order], append=-1))
    known, most = of_image[order][last], count[order][last]
    place = np.minimum(np.searchsorted(known, gram), max(len(known) - 1, 0))
    right = np.where(known[place] == gram, np.minimum(times, most[place]), 0) if len(known) else np.zeros(len(gram))
    return np.bincount(gram // G, weights=right, minlength=images)


def bleu_of(counts: np.ndarray) -> dict[str, np.ndarray]:
    """BLEU-1 to BLEU-4 of counts [..., 10], of `bleu_counts` or sums of them: [...] each."""
    precision = (counts[..., :N] + _TINY) / (counts[..., N : 2 * N] + _SMALL)
    product = np.cumprod(precision, -1)
    ratio = (counts[..., -2] + _TINY) / (counts[..., -1] + _SMALL)
    short = np.where(ratio < 1, np.exp(np.minimum(0, 1 - 1 / ratio)), 1.0)
    return {f"bleu_{k}": product[..., k - 1] ** (1 / k) * short for k in range(1, N + 1)}


def rouge_l(task: Task) -> Found | NotMeasured:
    """ROUGE-L: the mean over images of the F-score of the longest common subsequence."""
    if isinstance(tokens := _compared(task), NotMeasured):
        return tokens
    return mean_of("rouge_l", rouge_of(tokens))


def rouge_of(tokens: Tokens) -> np.ndarray:
    """[N]: with P the best precision and R the best recall over the references, (1 + 1.44) P R / (R + 1.44 P)."""
    precision, recall = np.zeros(len(tokens.captions)), np.zeros(len(tokens.captions))
    for i, (caption, references) in enumerate(zip(tokens.captions, tokens.references, strict=True)):
        masks = _masks(caption)
        for reference in references:
            if caption and reference:
                common = _common(masks, len(caption), reference)
                precision[i] = max(precision[i], common / len(caption))
                recall[i] = max(recall[i], common / len(reference))
    both = precision * recall
    return (1 + _BETA**2) * both / np.where(both > 0, recall + _BETA**2 * precision, 1.0)


def _masks(caption: list[str]) -> dict[str, int]:
    masks: dict[str, int] = {}
    for place, word in enumerate(caption):
        masks[word] = masks.get(word, 0) | 1 << place
    return masks


def _common(masks: dict[str, int], length: int, other: list[str]) -> int:
    """The length of the longest common subsequence, a row of its table at a time as the bits of one integer: a 0 stands
    where the row rises (Hyyro, 2004)."""
    row = (1 << length) - 1
    for word in other:
        both = row & masks.get(word, 0)
        row = (row + both) | (row - both)
    return length - (row & ((1 << length) - 1)).bit_count()


def cider(task: Task) -> Found | NotMeasured:
    """CIDEr-D, times 10, with document frequencies from the references of the images that are evaluated."""
    from fastcap.rewards import CiderD

    if isinstance(tokens := _compared(task), NotMeasured):
        return tokens
    if len(tokens.captions) < 2:
        reason = "of one image every n-gram is in all images, so its weight, log(1/1), is 0"
        return NotMeasured(reason, "evaluate two images or more; published numbers are of thousands")
    return mean_of("cider", CiderD(tokens.references)(tokens.captions).numpy())


def _compared(task: Task) -> Tokens | NotMeasured:
    return task.without_references() or task.tokens
