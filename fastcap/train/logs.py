"""What a run writes while it trains: `log.jsonl`, TensorBoard events, and progress for the reader at the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One step: step, epoch, loss, lr, grad_norm, images_per_s, seconds; with the terms of attention coverage, entropy and
baseline; by reward its parts (docs/recipes/distinctive.md and self-critical.md); after a validation also val_loss, val_mle
and val_reward."""


class JsonLog:
    """`log.jsonl`, one object per step. A resumed run drops what was written after its checkpoint."""

    def __init__(self, file: Path, step: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(file) if _step_of(line) <= step]
        partial = file.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(file)
        self._handle = file.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        # fp16 may overflow and skip a step; JSON knows no inf
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}
        self._handle.write(json.dumps(finite) + "\n")
        self._handle.flush()

    def close(self) -> None:
        self._handle.close()


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # a line that a crash cut short: its step is run again
        return float("inf")


class TensorBoardLog:
    """The same numbers for TensorBoard; where it is not installed, nothing."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
        else:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: Record) -> None:
        if self._writer is not None:
            for name in set(record) - {"step", "epoch", "seconds"}:
                self._writer.add_scalar(name, record[name], record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Progress:
    """A rich bar on a terminal, a line every few seconds elsewhere, nothing when `show` is False."""

    EVERY = 10.0  # seconds between plain lines

    def __init__(self, step: int, steps: int, show: bool) -> None:
        self._show, self._steps, self._bar = show, steps, None
        self._first, self._began, self._printed = step, time.perf_counter(), 0.0
        if show and sys.stderr.isatty():
            self._bar = _rich_bar()
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=steps, completed=step, loss="", speed="")
            self._bar.start()

    def write(self, record: Record) -> None:
        if self._bar is not None:
            loss, speed = f"{record['loss']:.3f}", _per_second(record["images_per_s"])
            loss += f", reward {record['reward']:.3f}" if "reward" in record else ""
            self._bar.update(self._task, completed=record["step"], loss=loss, speed=speed)
        now = time.perf_counter()
        validated = "val_loss" in record
        if validated or record["step"] == self._steps or now - self._printed >= self.EVERY and self._bar is None:
            self._printed = now
            left = (now - self._began) / (record["step"] - self._first) * (self._steps - record["step"])
            text = f"step {record['step']}/{self._steps}  loss {record['loss']:.3f}"
            if "reward" in record:
                text += f"  reward {record['reward']:.3f} ({_parts_of_reward(record)})"
            if validated:
                text += f"  validation {record['val_loss']:.3f}"
                text += _beside_loss(record)
                text += f", reward {record['val_reward']:.3f}" if "val_reward" in record else ""
            self.note(f"{text}  {_per_second(record['images_per_s'])} images/s  {_clock(left)} left")

    def note(self, text: str) -> None:
        if not self._show:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


_REWARDS = {
    "reward_similarity": "similarity",
    "reward_cider_d": "CIDEr-D",
    "reward_bleu_4": "BLEU-4",
    "reward_gt": "own captions",
}


def _parts_of_reward(record: Record) -> str:
    parts = ", ".join(f"{told} {record[name]:.3f}" for name, told in _REWARDS.items() if name in record)
    if "disc_accuracy" in record:
        parts += f", discriminator {record['disc_accuracy']:.0%} right"
    if record.get("texts_cut"):
        parts += f", {record['texts_cut']:.0f} texts longer than the CLIP's context"
    return f"{parts}; {record['length']:.1f} words, {record['unique']:.0%} unique"


def _beside_loss(record: Record) -> str:
    """What a validation found beside its loss: cross-entropy, or of a CLIP how it retrieves."""
    if "val_mle" in record:
        as_mle = f"{record['val_mle']:.3f}"
        return f" (as MLE {as_mle})" if as_mle != f"{record['val_loss']:.3f}" else ""
    found = f"{record['val_t2i_r1']:.1%} text to image, {record['val_i2t_r1']:.1%} image to text"
    return f" (first of {record['val_images']}: {found})"


def _per_second(images: float) -> str:
    return f"{images:,.0f}" if images >= 10 else f"{images:.1f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    return Bar(
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} images/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
