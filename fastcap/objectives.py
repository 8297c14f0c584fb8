"""The objectives by name: those of the losses over a subset of the vocabulary, each one setting, and those by reward."""

from __future__ import annotations

from typing import Any

OBJECTIVES: dict[str, dict[str, Any]] = {
    "mle": {"subset": "full"},  # every word of the vocabulary competes
    "smile": {"subset": "caption"},  # only the words of the caption itself: rewards detail
    "smile+mle": {"subset": "caption", "mle_weight": 0.01},  # with a little MLE: keeps rare wrong words down
    "resmile": {"subset": "reverse"},  # only the words that the caption does not hold: rewards brevity
}

REINFORCED = ("wtf-rl",)  # of a captioner's own captions, rewarded by a CLIP
