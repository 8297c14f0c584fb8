"""What stops a run by reinforcement that can no longer come to good, with what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fastcap.errors import bad

PATIENCE = 20  # steps in a row in which nothing can be learnt
LEAST_SPREAD = 1e-7  # of the rewards of a step: rounding of a cosine in float32

_REMEDIES = {
    "reward_similarity": "check the weights of --reward-clip: its embeddings of these captions or pictures are not finite",
    "reward_baseline": "check --reward-scale and the weights of --reward-clip",
    "reward_discriminator": "lower --discriminator-lr, or pass --alpha 1 for none",
    "reward_gt": "check --reward-clip and --reward-scale, or pass --gt-weight none",
}


def check_finite(values: dict[str, float], step: int) -> None:
    """Raises for the first part of the reward of `step` that is NaN or infinite."""
    for name, remedy in _REMEDIES.items():
        if name in values and not math.isfinite(values[name]):
            raise bad("train", f"{name} of step {step}", "be finite", values[name], remedy)


class Told(NamedTuple):
    """The words of an objective: what it measures captions by, and what helps against each way to collapse."""

    measure: str
    alike: str
    flat: str
    apart: str


WTF_RL = Told(
    "similarity (reward_similarity)",
    "lower --lr or --alpha, or keep --gt-weight clamp0",
    "raise --temperature or --samples, pass another --reward-baseline, or check --reward-clip",
    "lower --lr, keep --gt-weight clamp0 and --alpha below 1",
)
SELF_CRITICAL = Told(
    "reward",
    "lower --lr, or begin with more steps by likelihood",
    "begin with more steps by likelihood (--mle-steps, --init-from) if `reward` is 0; else it has learnt what it can",
    "lower --lr",
)


class Collapse:
    """Counts the steps in a row whose captions, or whose rewards, are all the same, or whose captions are less than half as
    good as those of the first `PATIENCE` steps; at `PATIENCE` it raises.

    `counts` is what a checkpoint keeps; `told`, what an error says.
    """

    def __init__(self, counts: dict[str, float] | None = None, told: Told = WTF_RL) -> None:
        self._told = told
        none = {"empty": 0, "identical": 0, "spread": 0, "apart": 0, "steps": 0, "at_first": 0.0}
        self.counts = {**none, **(counts or {})}

    def check(self, captions: Sequence[str], measure: float, spread: float, step: int, images: int) -> None:
        """captions: those drawn in `step`; measure: how good they are, their mean cosine or reward; spread: the standard
        deviation of their rewards less the baseline; images: of how many they are, for those of one may well be alike."""
        several = images > 1
        alike, flat = several and len(set(captions)) == 1, several and spread < LEAST_SPREAD
        if self.counts["steps"] < PATIENCE:
            self.counts["steps"] += 1
            self.counts["at_first"] += measure / PATIENCE
        at_first = self.counts["at_first"]
        apart = self.counts["steps"] == PATIENCE and at_first > 0 and measure < at_first / 2
        seen = {"empty": not any(captions), "identical": alike, "spread": flat, "apart": apart}
        for name, now in seen.items():
            self.counts[name] = self.counts[name] + 1 if now else 0
        remedy = self._told.alike
        drawn, since = f"the captions drawn in step {step}", f"as in the {PATIENCE - 1} steps before"
        if self.counts["empty"] >= PATIENCE:
            raise bad("train", drawn, "have words", captions[0], f"none has, {since}: {remedy}")
        if self.counts["identical"] >= PATIENCE:
            raise bad("train", drawn, "differ from each other", captions[0], f"every image has it, {since}: {remedy}")
        if self.counts["spread"] >= PATIENCE:
            rule = f"have a spread (reward_spread) above {LEAST_SPREAD:g}, or there is nothing to learn"
            raise bad("train", f"the rewards of step {step}", rule, spread, f"{since}: {self._told.flat}")
        if self.counts["apart"] >= PATIENCE:
            least = self.counts["at_first"] / 2
            rule = f"stay above {least:.3g}, half of what it was at first"
            remedy = f"{since}, and the captions come apart: {self._told.apart}"
            raise bad("train", f"the {self._told.measure} of step {step}", rule, measure, remedy)
