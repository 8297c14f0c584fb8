"""`fastcap evaluate`: captions of a split, by trained models or from files, and their scores side by side.

Captions come first, model by model; then the CLIP that judges embeds the pictures and the references, once for all rows,
and the captions; `fastcap.eval.measure` turns them into numbers. `evaluate_data` holds the split and its pictures.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastcap import eval as metrics
from fastcap.errors import FastcapError, bad

from . import checkpoint
from .bars import Bar
from .captioner import Captioner
from .config import TrainConfig
from .evaluate_data import Judge, Split, Usable
from .setup import find_device

_OP = "evaluate"
Source = str | os.PathLike


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `document` is what `evaluation.json` holds, `table` what is printed and `evaluation.md` holds."""

    document: dict[str, Any]
    table: str


@dataclass
class _Row:
    """One captioner: a checkpoint or a file of captions."""

    name: str
    kind: str  # "checkpoint" or "captions"
    path: Path
    config: TrainConfig | None = None
    given: dict[str, str] | None = None
    captions: Sequence[str] = ()
    seconds: dict[str, float] | None = None


@torch.no_grad()
def evaluate(
    data: Source,
    checkpoints: Sequence[Source] = (),
    captions: Sequence[Source] = (),
    *,
    clip: str | None = None,
    split: str = "test",
    beam: int = 1,
    length_penalty: float = 0.0,
    batch_size: int = 64,
    clip_prompt: str = "",
    features: Source | None = None,
    out: Source | None = None,
    per_image: bool = False,
    partial: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Evaluation:
    """Captions every image of a split and scores what was said; several captioners at once make one table, a row each.

    Args:
        data: a folder in Karpathy's format: pictures and references.
        checkpoints: runs or checkpoints of captioners.
        captions: files in COCO's results format, to score as they are. `image_id` is the images' cocoid where the data have
            one, else their imgid.
        clip: the CLIP that judges, as `fastcap.train.embedders.load` takes it; None leaves what needs one unmeasured. It
            should not be the one that a captioner was rewarded with: that one is a target, and no longer a measure.
        split: of the data.
        beam, length_penalty: of decoding; 1 is greedy.
        batch_size: pictures or texts at a time.
        clip_prompt: text before each caption and reference when the CLIP reads it. Published CLIPScores have
            "A photo depicts ".
        features: of captioners trained on precomputed features, where they are now; None: where they were in training.
        out: folder for `evaluation.json`, `evaluation.md` and the captions of each checkpoint, `captions-NAME.json`; None
            writes nothing. Earlier files of these names are replaced.
        per_image: whether the JSON holds each image's caption and scores.
        partial: evaluate the images that have a picture, features and captions everywhere, and say how many they are;
            otherwise one image without is an error.
        device: "auto", "cpu", "cuda", ...
        progress: whether to show how far it is, on stderr.

    Returns:
        `Evaluation`; its document's rows have `scores` by name and `not_measured` with reason and remedy.

    Raises:
        FastcapError: nothing to evaluate, a checkpoint that is no captioner's, a file or split that is not sound, ids that
            do not fit.

    >>> made = evaluate("data/scenes", ["runs/mle", "runs/smile"], clip="runs/clip-b")  # doctest: +SKIP
    >>> print(made.table)                                                              # doctest: +SKIP
    """
    _check(batch_size, beam, length_penalty, checkpoints, captions)
    began, target, folder = time.perf_counter(), find_device(device), _folder(out)
    rows = _rows(checkpoints, captions)
    judge = _load_embedder(clip, target) if clip is not None else None
    warnings = [] if judge is None else _rewarded_by_the_judge(rows, clip, judge)
    dataset = Split(data, split)
    usable = dataset.usable(
        [(f"captions of {row.path}", row.given) for row in rows if row.given is not None],
        [(row.config.image_size, _features_of(row.config, features)) for row in rows if row.config is not None],
        None if judge is None else judge.image_size,
        partial=partial,
    )
    if usable.left_out:
        warnings.append(usable.left_out)
    for row in rows:
        _caption(row, usable, features, target, progress, beam=beam, length_penalty=length_penalty, batch_size=batch_size)
    embedding = time.perf_counter()
    embedded = None if judge is None else Judge(judge, usable, clip_prompt, batch_size, progress)
    embedding = time.perf_counter() - embedding
    made = [_measure(row, usable, embedded, per_image, progress) for row in rows]
    if embedded is not None and embedded.cut:
        warnings.append(f"{embedded.cut} texts were longer than the CLIP's context, which cut them")
    document = {
        "versions": _versions(),
        "settings": {
            "data": str(data), "split": split, "clip": clip, "beam": beam, "length_penalty": length_penalty,
            "batch_size": batch_size, "clip_prompt": clip_prompt, "features": None if features is None else str(features),
            "partial": partial, "device": str(target),
        },
        "data": dataset.describe(usable),
        "clip": None if judge is None else {"source": clip, "fingerprint": judge.fingerprint, "width": judge.width},
        "warnings": warnings,
        "rows": made,
        "seconds": {"embed": round(embedding, 3), "all": round(time.perf_counter() - began, 3)},
    }  # fmt: skip
    result = Evaluation(document, _table(document))
    if folder is not None:
        _write(folder, result, rows, usable)
    return result


def _check(
    batch_size: int, beam: int, length_penalty: float, checkpoints: Sequence[Source], captions: Sequence[Source]
) -> None:  # fmt: skip
    for name, value in (("checkpoints", checkpoints), ("captions", captions)):
        if isinstance(value, (str, os.PathLike)):
            raise bad(_OP, name, "be a list", str(value), f"pass [{str(value)!r}]")
    for name, value in (("batch_size", batch_size), ("beam", beam)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise bad(_OP, name, "be an integer of at least 1", value, f"pass {name}={64 if name == 'batch_size' else 1}")
    if not isinstance(length_penalty, (int, float)) or not math.isfinite(length_penalty):  # JSON has no NaN
        raise bad(_OP, "length_penalty", "be a finite number", length_penalty, "pass length_penalty=0.0")
    if not checkpoints and not captions:
        raise bad(_OP, "checkpoint", "be given", "none", "pass --checkpoint RUN, or --captions FILE; each may be repeated")


def _folder(out: Source | None) -> Path | None:
    """The folder to write to, found out before the work."""
    if out is None:
        return None
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise bad(_OP, "out", "be a folder", str(folder), "name another")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _rows(checkpoints: Sequence[Source], captions: Sequence[Source]) -> list[_Row]:
    """The captioners, their configurations and files read and checked, with names of their own."""
    rows = []
    for path in map(Path, checkpoints):
        found = checkpoint.find(path)
        config = checkpoint.read_config(found)
        if config.model == "clip":
            raise bad(_OP, "checkpoint", "be of a captioner", f"a CLIP, {path}", "pass it as --clip")
        rows.append(_Row(_name(path), "checkpoint", path, config=config))
    for path in map(Path, captions):
        rows.append(_Row(path.stem, "captions", path, given=metrics.read_results(path)))
    names = [row.name for row in rows]
    for n, row in enumerate(rows):
        if names.count(row.name) > 1:
            row.name = str(row.path)
        if row.path in [other.path for other in rows[:n]]:
            raise bad(_OP, row.kind, "differ from the others", str(row.path), "name each once")
    return rows


def _name(path: Path) -> str:
    """A run's folder, and the step where a checkpoint in it was named."""
    path = path.resolve()
    return f"{path.parents[1].name}/{path.name}" if path.parent.name == "checkpoints" else path.name


def _load_embedder(source: str, device: torch.device) -> Any:
    from . import embedders

    return embedders.load(source, device)


def _features_of(config: TrainConfig, moved: Source | None) -> str | None:
    return None if config.features is None else str(moved or config.features)


def _rewarded_by_the_judge(rows: list[_Row], clip: str, judge: Any) -> list[str]:
    """A warning for each captioner whose reward was this very CLIP; also if that was in a run that it began from."""
    known = {clip: judge.fingerprint}
    warnings = []
    for row in rows:
        for source in _reward_clips(row.config):
            if source not in known:
                try:
                    known[source] = _load_embedder(source, torch.device("cpu")).fingerprint
                except FastcapError as error:
                    known[source] = None
                    warnings.append(f"{row.name} was rewarded with {source}, which cannot be compared with --clip: {error}")
            if known[source] == judge.fingerprint:
                warnings.append(
                    f"{row.name} was rewarded with this very CLIP, {source}: its retrieval and CLIPScore are what it was "
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


def _caption(row: _Row, usable: Usable, features: Source | None, device: torch.device, show: bool, **decoding: Any) -> None:
    began = time.perf_counter()
    if row.given is not None:
        row.captions = [row.given[str(id)] for id in usable.ids]
        row.seconds = {}
        return
    captioner = Captioner.load(row.path, device)
    batch_size = decoding.pop("batch_size")
    said: list[str] = []
    with Bar(f"captions of {row.name}", len(usable.ids), show) as bar:
        for images in usable.images(captioner.image_size, _features_of(row.config, features), batch_size):
            said += captioner(images, **decoding)
            bar(len(said))
    row.captions = said
    row.seconds = {"caption": round(time.perf_counter() - began, 3)}


def _measure(row: _Row, usable: Usable, judge: Judge | None, per_image: bool, show: bool) -> dict[str, Any]:
    began = time.perf_counter()
    embedded = None if judge is None else judge.of(row.captions, row.name)
    captioned = metrics.Captioned(row.captions, usable.references, usable.facts, embedded)
    with Bar(f"ranks of {row.name}", len(usable.ids), show) as bar:
        found = metrics.measure(captioned, progress=bar)
    made = {
        "name": row.name,
        row.kind: str(row.path),
        "scores": found.scores,
        "not_measured": {name: why._asdict() for name, why in found.not_measured.items()},
        "seconds": {**row.seconds, "score": round(time.perf_counter() - began, 3)},
    }
    if row.config is not None:
        made["step"] = checkpoint.read(checkpoint.find(row.path))["step"]
    if per_image:
        each = [dict(zip(found.each, values, strict=True)) for values in zip(*found.each.values(), strict=True)]
        made["per_image"] = [
            {"image_id": id, "caption": caption, **scores}
            for id, caption, scores in zip(usable.ids, row.captions, each, strict=True)
        ]
    return made


def _table(document: dict[str, Any]) -> str:
    rows = []
    for row in document["rows"]:
        without = {name: metrics.NotMeasured(**why) for name, why in row["not_measured"].items()}
        rows.append(metrics.Row(row["name"], row["scores"], without))
    data, settings, clip = document["data"], document["settings"], document["clip"]
    decoded = any("checkpoint" in row for row in document["rows"])
    how = (["greedy" if settings["beam"] == 1 else f"beam {settings['beam']}"] if decoded else []) + (
        [f"judged by {clip['source']}"] if clip else []
    )
    head = f"{data['images']:,} images of {data['split']} in {data['json']}" + "".join(f", {part}" for part in how)
    warnings = "".join(f"\n\nWarning: {warning}." for warning in document["warnings"])
    return metrics.table(rows, head) + warnings


def _write(folder: Path, made: Evaluation, rows: list[_Row], usable: Usable) -> None:
    for row in rows:
        if row.kind == "checkpoint":
            safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in row.name)
            said = dict(zip(usable.ids, row.captions, strict=True))
            metrics.write_results(folder / f"captions-{safe}.json", said)
    text = json.dumps(made.document, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    for name, content in (("evaluation.json", text), ("evaluation.md", made.table + "\n")):
        partial = folder / f"{name}.partial"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, folder / name)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastcap", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed" if package != "fastcap" else "not installed: run from its sources"
    return {**found, "platform": f"{platform.system()} {platform.machine()}"}
