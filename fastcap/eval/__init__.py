"""Scores of captions."""

from __future__ import annotations

from fastcap.eval.diversity import diversity

__all__ = ["diversity"]
