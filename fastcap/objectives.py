"""The objectives by name: each is one setting of the losses over a subset of the vocabulary."""

from __future__ import annotations

from typing import Any

OBJECTIVES: dict[str, dict[str, Any]] = {
    "mle": {"subset": "full"},  # every word of the vocabulary competes
    "smile": {"subset": "caption"},  # only the words of the caption itself: rewards detail
    "smile+mle": {"subset": "caption", "mle_weight": 0.01},  # with a little MLE: keeps rare wrong words down
    "resmile": {"subset": "reverse"},  # only the words that the caption does not hold: rewards brevity
}
