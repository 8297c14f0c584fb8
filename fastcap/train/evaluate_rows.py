"""The captioners that `fastcap evaluate` compares: checkpoints and files of captions, what each says, and its scores."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastcap import eval as metrics
from fastcap.data import words
from fastcap.errors import bad
from fastcap.eval import _java

from . import checkpoint
from .bars import Bar
from .captioner import Captioner
from .config import TrainConfig
from .evaluate_data import Usable
from .evaluate_judge import Judge

_OP = "evaluate"
Source = str | os.PathLike


@dataclass
class Row:
    """One captioner: a checkpoint or a file of captions.

    captions: what it says of each image; ids: as the checkpoint's tokenizer has it. measured: after `measure`.
    """

    name: str
    kind: str  # "checkpoint" or "captions"
    path: Path
    config: TrainConfig | None = None
    given: dict[str, str] | None = None
    captions: Sequence[str] = ()
    ids: Sequence[list[int]] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    measured: metrics.Measured | None = None

    def features(self, moved: Source | None) -> str | None:
        """Where the features that it was trained on are, if it was trained on features."""
        return None if self.config is None or self.config.features is None else str(moved or self.config.features)


def read_rows(checkpoints: Sequence[Source], captions: Sequence[Source]) -> list[Row]:
    """The captioners, their configurations and files read and checked, with names of their own."""
    rows = []
    for path in map(Path, checkpoints):
        config = checkpoint.read_config(checkpoint.find(path))
        if config.model == "clip":
            raise bad(_OP, "checkpoint", "be of a captioner", f"a CLIP, {path}", "pass it as --clip")
        rows.append(Row(_name(path), "checkpoint", path, config=config))
    for path in map(Path, captions):
        rows.append(Row(path.stem, "captions", path, given=metrics.read_results(path)))
    names = [row.name for row in rows]
    for n, row in enumerate(rows):
        if names.count(row.name) > 1:
            row.name = str(row.path)
        if row.path in [other.path for other in rows[:n]]:
            raise bad(_OP, row.kind, "differ from the others", str(row.path), "name each once")
    return rows


def caption(row: Row, usable: Usable, features: Source | None, device: torch.device, show: bool, **decoding: Any) -> None:
    """Puts into the row what it says of each image."""
    if row.given is not None:
        row.captions = [row.given[str(id)] for id in usable.ids]
        return
    began = time.perf_counter()
    captioner = Captioner.load(row.path, device)
    batch_size = decoding.pop("batch_size")
    said: list[list[int]] = []
    with Bar(f"captions of {row.name}", len(usable.ids), show) as bar:
        of = captioner.image_size, row.features(features), batch_size, captioner.attribute_tokenizer
        for images in usable.images(*of):
            said += captioner.ids(images, **decoding)
            bar(len(said))
    row.ids, row.captions = said, [captioner.tokenizer.decode(ids) for ids in said]
    row.seconds["caption"] = round(time.perf_counter() - began, 3)


def empty(row: Row, usable: Usable) -> Iterator[str]:
    """A warning where captions have no word."""
    without = [n for n, said in enumerate(row.captions) if not words(said)]
    if without:
        verb = "caption of" if len(without) == 1 else "captions of"
        first = f"the first of {usable.source.key} {usable.ids[without[0]]}"
        yield f"{len(without):,} {verb} {row.name} without a word, {first}; scored as they are"


def measure(row: Row, usable: Usable, judge: Judge | None, show: bool, **options: Any) -> None:
    """Puts into the row what is measured of its captions; options as of `fastcap.eval.measure`."""
    began = time.perf_counter()
    embedded = None if judge is None else judge.of(row.captions, row.name)
    if show:
        _tell_java(row, options["metrics"])
    captioned = metrics.Captioned(row.captions, usable.references, usable.facts, embedded)
    with Bar(f"scores of {row.name}", len(usable.ids), show) as bar:
        row.measured = metrics.measure(captioned, progress=bar, **options)
    row.seconds["score"] = round(time.perf_counter() - began, 3)


def _tell_java(row: Row, chosen: Sequence[str] | None) -> None:
    """That it will take a while; how far it is, a program in Java does not say."""
    slow = [name.upper() for name in ("meteor", "spice") if chosen is None or name in chosen]
    try:
        if slow:
            _java.java()
            text = f"scores of {row.name}: {' and '.join(slow)} by Java, which can take minutes"
            print(text, file=sys.stderr, flush=True)
    except _java.Unavailable:
        return


def document(row: Row, usable: Usable, per_image: bool) -> dict[str, Any]:
    """What evaluation.json says of one captioner."""
    found = row.measured
    made = {
        "name": row.name,
        row.kind: str(row.path),
        "scores": found.scores,
        "intervals": {name: list(interval) for name, interval in found.intervals.items()},
        "not_measured": {name: {"reason": why.reason, "remedy": why.remedy} for name, why in found.not_measured.items()},
        "seconds": row.seconds,
    }
    if row.config is not None:
        made["step"] = checkpoint.read(checkpoint.find(row.path))["step"]
    if per_image:
        made["per_image"] = [
            {"image_id": id, "caption": said, **scores}
            for id, said, scores in zip(usable.ids, row.captions, each(row), strict=True)
        ]
    return made


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each further captioner has more or less than the first one, with intervals; none without resamples."""
    made = []
    for row in rows[1:]:
        if row.measured.draws is not None and rows[0].measured.draws is not None:
            found = metrics.paired_difference(row.measured, rows[0].measured)
            differences = {name: dict(one._asdict()) for name, one in found.items()}
            made.append({"first": row.name, "second": rows[0].name, "differences": differences})
    return made


def each(row: Row) -> list[dict[str, float]]:
    """The scores of each image by name."""
    found = row.measured.each
    if not found:
        return [{} for _ in row.captions]
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


def _name(path: Path) -> str:
    """A run's folder, and the step where a checkpoint in it was named."""
    path = path.resolve()
    return f"{path.parents[1].name}/{path.name}" if path.parent.name == "checkpoints" else path.name
