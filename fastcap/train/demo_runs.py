"""What the demo's stories share: runs that are kept and gone on with, and expectations held against numbers."""

from __future__ import annotations

import hashlib
import operator
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import checkpoint, demo_report, recipes
from .config import TrainConfig
from .demo import MARK, _fresh, _unless_interrupted
from .loop import train

Expected = tuple[str, str, str, str, str]  # (what is expected, score, variant, how it compares, with which)
_COMPARE = {"<": operator.lt, ">": operator.gt, ">=": operator.ge, "<=": operator.le}


@dataclass
class Trend:
    """One expectation, and what the numbers say: means over the seeds, and for each seed whether it holds."""

    expected: str
    score: str
    mean: float
    other_mean: float
    holds: bool
    holds_by_seed: list[bool]

    @property
    def verdict(self) -> str:
        for_seeds = f"in {sum(self.holds_by_seed)} of {len(self.holds_by_seed)} seeds"
        if self.holds:
            return f"holds {for_seeds}" if all(self.holds_by_seed) else f"holds on average, {for_seeds}"
        return f"DOES NOT HOLD on average, {for_seeds} it does" if any(self.holds_by_seed) else "DOES NOT HOLD, in no seed"


def trends(scores: dict[str, list[dict[str, float | None]]], expected: Sequence[Expected]) -> list[Trend]:
    """What was expected, compared with the scores: `scores[variant]` has one dict for each seed."""
    found = []
    for expectation, score, variant, sign, other in expected:
        pairs = [(a[score], b[score]) for a, b in zip(scores[variant], scores[other], strict=True)]
        mean, other_mean = (statistics.mean(values) for values in zip(*pairs, strict=True))
        holds = [_COMPARE[sign](a, b) for a, b in pairs]
        found.append(Trend(expectation, score, mean, other_mean, _COMPARE[sign](mean, other_mean), holds))
    return found


class Pace:
    """Makes runs, and says before each how many there are and how long they may take.

    Args:
        runs: how many there are of each kind; runs of a kind take about as long as each other.
    """

    def __init__(self, runs: dict[str, int]) -> None:
        self._left, self._all = dict(runs), sum(runs.values())
        self._took: dict[str, list[float]] = {kind: [] for kind in runs}

    def made(self, kind: str, title: str, config: TrainConfig) -> Path:
        """The last checkpoint of the run, trained now unless an earlier demo did."""
        number = self._all - sum(self._left.values()) + 1
        demo_report.title(f"{number} of {self._all}: {title}, {config.steps} steps")
        started = time.perf_counter()
        found, fresh = finished(config)
        self._left[kind] -= 1
        if fresh:
            self._took[kind].append(time.perf_counter() - started)
        known = all(self._took[kind] for kind, left in self._left.items() if left)
        minutes = sum(statistics.mean(self._took[kind]) * left for kind, left in self._left.items() if left and known) / 60
        left = f"; about {minutes:.0f} minutes left" if known and minutes else ""
        demo_report.say(f"{self._took[kind][-1]:.0f} s{left}" if fresh else "as an earlier demo left it")
        return found


def finished(config: TrainConfig) -> tuple[Path, bool]:
    """The run's last checkpoint, and whether it was trained now: not where an earlier demo did the same run, from the same
    weights and with the same reward."""
    out = Path(config.out)
    if config.init_from:
        complete = recipes.complete(config.with_model_of(checkpoint.read_config(checkpoint.find(config.init_from))))
    else:
        complete = recipes.complete(config)
    made_of = "".join(digest(source) for source in (config.init_from, config.reward_clip) if source)
    last = checkpoint.last_of(out)
    ours = last is not None and (out / MARK).is_file() and (out / MARK).read_text() == made_of
    begun = ours and not complete.differences(checkpoint.read_config(last))
    if begun and checkpoint.read(last)["step"] == config.steps:
        return last, False
    if not begun:
        (_fresh(out) / MARK).write_text(made_of)
    return _unless_interrupted(train(config, resume=begun)).checkpoint, True


def digest(source: str) -> str:
    """Of the weights of a checkpoint."""
    return hashlib.sha256((checkpoint.find(source) / "model.safetensors").read_bytes()).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Or not at all: what is half written would stand in the way of going on."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def spread(n: int, wanted: int) -> list[int]:
    """`wanted` of n indices, evenly spread."""
    return [i * n // min(n, wanted) for i in range(min(n, wanted))]
