"""The objectives by name: those of the losses over a subset of the vocabulary, each one setting, and those by reward."""

from __future__ import annotations

from typing import Any

OBJECTIVES: dict[str, dict[str, Any]] = {
    "mle": {"subset": "full"},  # every word of the vocabulary competes
    "smile": {"subset": "caption"},  # only the words of the caption itself: rewards detail
    "smile+mle": {"subset": "caption", "mle_weight": 0.01},  # with a little MLE: keeps rare wrong words down
    "resmile": {"subset": "reverse"},  # only the words that the caption does not hold: rewards brevity
}

# Of a captioner's own captions: wtf-rl is rewarded by a CLIP among other pairs, against a baseline of these; self-critical
# training by what people said of the image, against the greedy caption (scst), or the image's other samples (new-scst).
SELF_CRITICAL = ("scst", "new-scst")
REINFORCED = ("wtf-rl", *SELF_CRITICAL)
