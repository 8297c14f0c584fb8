"""Scores of captions: of given captions and embeddings, whatever model made them.

`metrics` holds all that `fastcap evaluate` measures, `table` shows it, `results` reads captions in COCO's format.
"""

from __future__ import annotations

from fastcap.eval.clip_score import clip_score, ref_clip_score
from fastcap.eval.diversity import diversity
from fastcap.eval.metrics import METRICS, Captioned, Embedded, Found, Measured, Metric, NotMeasured, measure
from fastcap.eval.results import read_results, write_results
from fastcap.eval.retrieval import Queries, Retrieved, retrieval, retrieve
from fastcap.eval.table import Row, table

__all__ = [
    "METRICS",
    "Captioned",
    "Embedded",
    "Found",
    "Measured",
    "Metric",
    "NotMeasured",
    "Queries",
    "Retrieved",
    "Row",
    "clip_score",
    "diversity",
    "measure",
    "read_results",
    "ref_clip_score",
    "retrieval",
    "retrieve",
    "table",
    "write_results",
]
