"""Every metric of `fastcap evaluate`, measured one by one: what cannot be measured says why, and is never a zero.

Adding a metric is one function of `Task` that returns `Found` or `NotMeasured`, and one entry in `METRICS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastcap.data.scene_scores import claim_counts, scores_of_counts
from fastcap.data.text import words
from fastcap.errors import bad
from fastcap.eval import coco_scores
from fastcap.eval.bootstrap import Draws, interval, mean_of, means, medians, of_sums
from fastcap.eval.captioned import Captioned, Column, Found, Metric, NotMeasured, Progress, Task
from fastcap.eval.clip_score import clip_score, ref_clip_score
from fastcap.eval.diversity import diversity, self_bleu
from fastcap.eval.java_scores import meteor, spice
from fastcap.eval.retrieval import KS, retrieve, summary

_OP = "eval.measure"
TOKENIZERS = ("fastcap", "ptb")


class Measured(NamedTuple):
    """All metrics of one captioner.

    scores, each: numbers of the set and of each image, by the metrics' own names.
    not_measured: by metric, why it has none.
    intervals: 95 % confidence intervals (low, high) by the scores' names; empty without `bootstrap`, and of one image, of
        which every resample is the same.
    resampled: the scores of each resample, [R] each, for `paired_difference`.
    draws: which images each resample held; None without resamples.
    """

    scores: dict[str, float]
    each: dict[str, list[float]]
    not_measured: dict[str, NotMeasured]
    intervals: dict[str, tuple[float, float]] = {}
    resampled: dict[str, np.ndarray] = {}
    draws: Draws | None = None


def measure(
    captioned: Captioned,
    *,
    tokenizer: str = "fastcap",
    bootstrap: int = 0,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Every metric of `METRICS` on one captioner's captions.

    Args:
        captioned: the captions, with references, facts and embeddings as far as there are any.
        tokenizer: what cuts captions into words for BLEU, METEOR, ROUGE-L, CIDEr, SPICE and self-BLEU: "fastcap"
            (`ptb_tokenize`, no Java) or "ptb" (the Stanford tokenizer in Java).
        bootstrap: how many resamples of the images the intervals are from; 0 makes none, published work has 1,000.
        seed: of the resamples. Equal seeds draw equal images, so two captioners of the same images can be compared.
        metrics: names in `METRICS` to measure; None: all.
        progress: called with how much is done and how much there is to do, while captions are ranked.

    Returns:
        `Measured`.

    Raises:
        FastcapError: an option that is none. What cannot be measured is no error: see `Measured.not_measured`.

    >>> pairs = Captioned(["a red circle", "a dog"], [["a circle"], ["one dog"]])
    >>> found = measure(pairs, metrics=["clip_score", "diversity"])
    >>> found.scores["mean_length"], found.not_measured["clip_score"].reason
    (2.5, 'no CLIP was given')
    """
    chosen = _check(tokenizer, bootstrap, seed, metrics)
    task = Task(captioned, tokenizer, progress)
    images = len(captioned.captions)
    draws = Draws(images, bootstrap, seed) if bootstrap and images > 1 else None
    measured = Measured({}, {}, {}, {}, {}, draws)
    for name in chosen:
        found = METRICS[name].measure(task)
        if isinstance(found, NotMeasured):
            measured.not_measured[name] = found
            continue
        measured.scores.update(found.scores)
        measured.each.update(found.each)
        if draws is not None and found.resampled is not None:
            resampled = draws.scores(found.resampled)
            measured.resampled.update(resampled)
            measured.intervals.update({key: interval(values) for key, values in resampled.items()})
    return measured


def _check(tokenizer: object, bootstrap: object, seed: object, metrics: object) -> list[str]:
    if tokenizer not in TOKENIZERS:
        raise bad(_OP, "tokenizer", f"be one of {', '.join(TOKENIZERS)}", tokenizer, "pass 'fastcap'; 'ptb' needs Java")
    for name, value in (("bootstrap", bootstrap), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise bad(_OP, name, "be an integer of at least 0", value, f"pass {name}={1000 if name == 'bootstrap' else 0}")
    if bootstrap == 1:
        raise bad(_OP, "bootstrap", "be 0 or at least 2", 1, "pass 1000")
    if metrics is None:
        return list(METRICS)
    if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not set(metrics) <= set(METRICS):
        raise bad(_OP, "metrics", f"be a list of some of {', '.join(METRICS)}", metrics, "pass metrics=['bleu', 'cider']")
    return [name for name in METRICS if name in metrics]


_NO_CLIP = NotMeasured("no CLIP was given", "pass --clip, a run of fastcap train --model clip or a transformers CLIP")


def _retrieval(task: Task) -> Found | NotMeasured:
    embedded = task.captioned.embedded
    if embedded is None:
        return _NO_CLIP
    found = retrieve(embedded.text, embedded.image, progress=task.progress)
    each = {"t2i_rank": found.text_to_image.rank().tolist(), "i2t_rank": found.image_to_text.rank().tolist()}
    credits, ranks = {}, {}
    for name, queries in (("t2i", found.text_to_image), ("i2t", found.image_to_text)):
        credits.update({f"{name}_r{k}": queries.credit(k).cpu().numpy() for k in KS})
        ranks[name] = queries.rank().cpu().numpy()
    mean = means({**credits, **{f"{name}_mean_rank": rank for name, rank in ranks.items()}})
    median = medians({f"{name}_median_rank": rank for name, rank in ranks.items()})
    return Found(summary(found), each, lambda counts: mean(counts) | median(counts))


def _clip_score(task: Task) -> Found | NotMeasured:
    embedded = task.captioned.embedded
    if embedded is None:
        return _NO_CLIP
    return mean_of("clip_score", clip_score(embedded.text, embedded.image).cpu().numpy())


def _ref_clip_score(task: Task) -> Found | NotMeasured:
    if task.captioned.embedded is None:
        return _NO_CLIP
    if missing := task.without_references():
        return missing
    text, image, reference = task.captioned.embedded
    counts = torch.tensor([len(references) for references in task.captioned.references])
    of = torch.repeat_interleave(torch.arange(len(counts)), counts).to(text.device)
    return mean_of("ref_clip_score", ref_clip_score(text, image, reference, of).cpu().numpy())


def _diversity(task: Task) -> Found:
    lengths = [len(words(caption)) for caption in task.captioned.captions]
    return Found(diversity(task.captioned.captions), {"length": lengths}, means({"mean_length": np.array(lengths, float)}))


def _self_bleu(task: Task) -> Found | NotMeasured:
    if isinstance(task.tokens, NotMeasured):
        return task.tokens
    if len(task.captioned.captions) < 2:
        return NotMeasured("one caption has no others to be like", "evaluate two images or more")
    return Found({"self_bleu": float(self_bleu(task.tokens.captions).mean())})


def _facts(task: Task) -> Found | NotMeasured:
    if task.captioned.facts is None:
        return NotMeasured("the data hold no facts", "evaluate on scenes: fastcap data scenes")
    each = claim_counts(task.captioned.captions, task.captioned.facts, KS)
    scores = {key: float(score) for key, score in scores_of_counts(each.sum(0), KS).items()}
    return Found(scores, resampled=of_sums(each, lambda counts: scores_of_counts(counts, KS)))


def _ranks(prefix: str, group: str) -> tuple[Column, ...]:
    recalls = tuple(Column(f"{prefix}_r{k}", group, f"R@{k}", "{:.3f}") for k in KS)
    mean = Column(f"{prefix}_mean_rank", group, "mean rank", "{:.1f}")
    return (*recalls, mean, Column(f"{prefix}_median_rank", group, "median rank", "{:.1f}"))


_PEOPLE, _TO_IMAGE, _TO_CAPTION = "references", "caption to image", "image to caption"
_CLIP, _TRUE, _SAID = "CLIP", "facts of scenes", "captions"
METRICS: dict[str, Metric] = {
    "bleu": Metric(tuple(Column(f"bleu_{n}", _PEOPLE, f"BLEU-{n}", "{:.3f}") for n in range(1, 5)), coco_scores.bleu),
    "meteor": Metric((Column("meteor", _PEOPLE, "METEOR", "{:.3f}"),), meteor),
    "rouge_l": Metric((Column("rouge_l", _PEOPLE, "ROUGE-L", "{:.3f}"),), coco_scores.rouge_l),
    "cider": Metric((Column("cider", _PEOPLE, "CIDEr", "{:.3f}"),), coco_scores.cider),
    "spice": Metric((Column("spice", _PEOPLE, "SPICE", "{:.3f}"),), spice),
    "retrieval": Metric((*_ranks("t2i", _TO_IMAGE), *_ranks("i2t", _TO_CAPTION)), _retrieval),
    "clip_score": Metric((Column("clip_score", _CLIP, "CLIPScore", "{:.3f}"),), _clip_score),
    "ref_clip_score": Metric((Column("ref_clip_score", _CLIP, "RefCLIPScore", "{:.3f}"),), _ref_clip_score),
    "facts": Metric(
        (
            Column("fact_precision", _TRUE, "precision", "{:.3f}"),
            Column("fact_recall", _TRUE, "recall", "{:.3f}"),
            Column("oracle_r1", _TRUE, "oracle R@1", "{:.3f}"),
        ),
        _facts,
    ),
    "diversity": Metric(
        (
            Column("mean_length", _SAID, "words", "{:.1f}"),
            Column("unique_share", _SAID, "unique", "{:.1%}"),
            Column("vocabulary", _SAID, "vocabulary", "{:.0f}"),
            Column("distinct_1", _SAID, "distinct-1", "{:.3f}"),
            Column("distinct_2", _SAID, "distinct-2", "{:.3f}"),
        ),
        _diversity,
    ),
    "self_bleu": Metric((Column("self_bleu", _SAID, "self-BLEU", "{:.3f}"),), _self_bleu),
}
