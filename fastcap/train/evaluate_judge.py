"""The CLIP that judges captions in `fastcap evaluate`, and whether it had rewarded the captioner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcap.errors import FastcapError
from fastcap.eval import Embedded

from . import checkpoint
from .bars import Bar
from .config import TrainConfig
from .evaluate_data import Usable


class Judge:
    """A CLIP with the pictures and references embedded. Equal texts are embedded once and share a row's numbers, so that
    equal captions tie exactly."""

    def __init__(self, embedder: Any, usable: Usable, prompt: str, batch_size: int, show: bool) -> None:
        self._embedder, self._prompt, self._batch_size, self._show = embedder, prompt, batch_size, show
        self._cut_before = embedder.truncated
        made: list[Tensor] = []
        with Bar("pictures by the CLIP", len(usable.ids), show) as bar:
            for images in usable.images(embedder.image_size, None, batch_size):
                made.append(embedder.images(images).float())
                bar(sum(map(len, made)))
        self._image = torch.cat(made)
        self._reference = self._texts([text for references in usable.references for text in references], "references")

    @property
    def cut(self) -> int:
        """How many distinct texts were longer than the CLIP's context."""
        return self._embedder.truncated - self._cut_before

    def of(self, captions: Sequence[str], name: str) -> Embedded:
        """With the captions of one captioner."""
        return Embedded(self._texts(captions, f"captions of {name}"), self._image, self._reference)

    def _texts(self, captions: Sequence[str], label: str) -> Tensor:
        """[N, D] float32."""
        distinct = sorted(set(captions), key=lambda text: (len(text), text))  # batches of like lengths: little padding
        made: list[Tensor] = []
        with Bar(f"{label} by the CLIP", len(distinct), self._show) as bar:
            for first in range(0, len(distinct), self._batch_size):
                batch = [self._prompt + text for text in distinct[first : first + self._batch_size]]
                made.append(self._embedder.texts(batch).float())
                bar(first + len(batch))
        place = {text: n for n, text in enumerate(distinct)}
        embedded = torch.cat(made)
        return embedded[torch.tensor([place[text] for text in captions], device=embedded.device)]


def load_embedder(source: str, device: torch.device) -> Any:
    from . import embedders

    return embedders.load(source, device)


def rewarded_by_the_judge(captioners: Sequence[tuple[str, TrainConfig | None]], clip: str, judge: Any) -> list[str]:
    """A warning for each captioner whose reward was this very CLIP; also if that was in a run that it began from.

    captioners: (name, configuration of its run).
    """
    known = {clip: judge.fingerprint}
    warnings = []
    for name, config in captioners:
        for source in _reward_clips(config):
            if source not in known:
                try:
                    known[source] = load_embedder(source, torch.device("cpu")).fingerprint
                except FastcapError as error:
                    known[source] = None
                    warnings.append(f"{name} was rewarded with {source}, which cannot be compared with --clip: {error}")
            if known[source] == judge.fingerprint:
                warnings.append(
                    f"{name} was rewarded with this very CLIP, {source}: its retrieval and CLIPScore are what it was "
                    "trained for, and no measure; pass another --clip"
                )
    return warnings


def _reward_clips(config: TrainConfig | None) -> list[str]:
    """The CLIPs that rewarded a run, and the runs that it began from as far as they are still there."""
    found: list[str] = []
    seen: set[Path] = set()
    while config is not None:
        source = getattr(config, "reward_clip", None)
        if source and source not in found:
            found.append(source)
        if not config.init_from:
            break
        try:
            before = checkpoint.find(config.init_from)
            config = None if before.resolve() in seen else checkpoint.read_config(before)
            seen.add(before.resolve())
        except FastcapError:
            break
    return found
