"""How far a long command is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Bar:
    """Progress of one part of a command, on stderr.

    >>> with Bar("caption", 1000) as bar:  # doctest: +SKIP
    ...     bar(64)                        # 64 of 1,000 are done
    """

    EVERY = 10.0  # seconds between plain lines

    def __init__(self, label: str, total: int, show: bool = True) -> None:
        self.label, self.total, self._show = label, total, show
        self._bar: Any = None
        self._printed = time.perf_counter()

    def __enter__(self) -> Bar:
        if self._show and sys.stderr.isatty():
            self._bar = _rich_bar()
        if self._bar is not None:
            self._task = self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int | None = None) -> None:
        """So many are done, of `total` where that was not known before."""
        self.total = self.total if total is None else total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total)
        elif self._show and time.perf_counter() - self._printed >= self.EVERY:
            self._printed = time.perf_counter()
            print(f"{self.label}: {done:,} of {self.total:,}", file=sys.stderr, flush=True)


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
