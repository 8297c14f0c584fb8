"""Scores of captions: of given captions and embeddings, whatever model made them.

`metrics` holds all that `fastcap evaluate` measures, `table` shows it, `results` reads captions in COCO's format.
"""

from __future__ import annotations

from fastcap.eval.bootstrap import Difference, paired_difference
from fastcap.eval.captioned import Captioned, Embedded, Found, Metric, NotMeasured
from fastcap.eval.clip_score import clip_score, ref_clip_score
from fastcap.eval.diversity import diversity, self_bleu
from fastcap.eval.metrics import METRICS, Measured, measure
from fastcap.eval.ptb import ptb_tokenize, ptb_tokenize_java
from fastcap.eval.references import References, read_references
from fastcap.eval.results import read_results, write_results
from fastcap.eval.retrieval import Queries, Retrieved, retrieval, retrieve
from fastcap.eval.table import Row, table

__all__ = [
    "METRICS",
    "Captioned",
    "Difference",
    "Embedded",
    "Found",
    "Measured",
    "Metric",
    "NotMeasured",
    "Queries",
    "References",
    "Retrieved",
    "Row",
    "clip_score",
    "diversity",
    "measure",
    "paired_difference",
    "ptb_tokenize",
    "ptb_tokenize_java",
    "read_references",
    "read_results",
    "ref_clip_score",
    "retrieval",
    "retrieve",
    "self_bleu",
    "table",
    "write_results",
]
