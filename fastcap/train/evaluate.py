"""`fastcap evaluate`: captions of a split, by trained models or from files, and their scores side by side.

Captions come first, model by model; then the CLIP that judges embeds the pictures and the references, once for all rows,
and the captions; `fastcap.eval.measure` turns them into numbers. `evaluate_data` holds the images and their references,
`evaluate_rows` the captioners, `evaluate_judge` the CLIP, `evaluate_report` chooses what the page of HTML shows, and
`evaluate_files` writes all down.
"""

from __future__ import annotations

import inspect
import math
import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastcap.errors import bad
from fastcap.eval import METRICS
from fastcap.eval.metrics import TOKENIZERS

from . import evaluate_files, evaluate_judge, evaluate_report, evaluate_rows
from .evaluate_data import Images, Listed, Split
from .evaluate_rows import Source
from .setup import find_device

_OP = "evaluate"
FORMAT = 1  # of evaluation.json: a later one may have more fields, and another number where a field means something else
_FEWEST = 40  # resamples whose outer 2.5 % are at least one each


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `document` is what `evaluation.json` holds, `table` what is printed and `evaluation.md` holds;
    `files` what was written."""

    document: dict[str, Any]
    table: str
    files: tuple[Path, ...] = ()


@torch.no_grad()
def evaluate(
    data: Source | None = None,
    checkpoints: Sequence[Source] = (),
    captions: Sequence[Source] = (),
    *,
    references: Source | None = None,
    clip: str | None = None,
    split: str | None = None,
    tokenizer: str = "fastcap",
    metrics: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    beam: int = 1,
    length_penalty: float = 0.0,
    batch_size: int = 64,
    clip_prompt: str = "",
    features: Source | None = None,
    out: Source | None = None,
    per_image: bool = False,
    report_images: int = 60,
    partial: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Evaluation:
    """Captions every image of a split and scores what was said; several captioners at once make one table, a row each.

    Args:
        data: a folder in Karpathy's format: pictures and references.
        checkpoints: runs or checkpoints of captioners.
        captions: files in COCO's results format, to score as they are. `image_id` is the images' id in COCO's format; in
            Karpathy's their cocoid where every image of the split has one, else their imgid.
        references: in place of `data`: a file of references, COCO's `captions_*.json` or Karpathy's `dataset_*.json`. No
            pictures are needed then, and so neither a checkpoint nor a CLIP can be used.
        clip: the CLIP that judges, as `fastcap.train.embedders.load` takes it; None leaves what needs one unmeasured. It
            should not be the one that a captioner was rewarded with: that one is a target, and no longer a measure.
        split: of the data; None is "test". COCO's `captions_*.json` is one split, and has none to name.
        tokenizer: what cuts captions into words for scores that compare with references: "fastcap", or "ptb", the Stanford
            tokenizer that published scores are from, which needs Java.
        metrics: names in `fastcap.eval.METRICS`; None: all. METEOR and SPICE run in Java, and take longer than all others.
        bootstrap: resamples of the images for 95 % confidence intervals; 0 for none.
        seed: of the resamples.
        beam, length_penalty: of decoding; 1 is greedy.
        batch_size: pictures or texts at a time.
        clip_prompt: text before each caption and reference when the CLIP reads it. Published CLIPScores have
            "A photo depicts ".
        features: of captioners trained on precomputed features, where they are now; None: where they were in training.
        out: folder for `evaluation.json`, `evaluation.md`, `report.html` and the captions of each checkpoint,
            `captions-NAME.json`; None writes nothing. Earlier files of these names are replaced.
        per_image: whether the JSON holds each image's caption and scores, and `per_image.csv` too.
        report_images: most images that the report shows: the best, the worst and some between.
        partial: evaluate the images that have a picture, features and captions everywhere, and say how many they are;
            otherwise one image without is an error.
        device: "auto", "cpu", "cuda", ...
        progress: whether to show how far it is, on stderr.

    Returns:
        `Evaluation`; its document's rows have `scores` and `intervals` by name, and `not_measured` with reason and remedy.

    Raises:
        FastcapError: nothing to evaluate, a checkpoint that is no captioner's, a file or split that is not sound, ids that
            do not fit.

    >>> made = evaluate("data/scenes", ["runs/mle", "runs/smile"], clip="runs/clip-b")           # doctest: +SKIP
    >>> made = evaluate(captions=["results.json"], references="annotations/captions_val2014.json")  # doctest: +SKIP
    >>> print(made.table)                                                                        # doctest: +SKIP
    """
    settings = {
        "data": _text(data), "references": _text(references), "split": split, "clip": clip, "tokenizer": tokenizer,
        "metrics": _names(metrics), "bootstrap": bootstrap, "seed": seed, "beam": beam, "length_penalty": length_penalty,
        "batch_size": batch_size, "clip_prompt": clip_prompt, "features": _text(features), "per_image": per_image,
        "report_images": report_images, "partial": partial, "device": device,
    }  # fmt: skip
    _check(settings, checkpoints, captions)
    command = _command(settings, checkpoints, captions, out)
    began, target, folder = time.perf_counter(), find_device(device), evaluate_files.folder(out)
    rows = evaluate_rows.read_rows(checkpoints, captions)
    judge = evaluate_judge.load_embedder(clip, target) if clip is not None else None
    named = [(row.name, row.config) for row in rows]
    warnings = [] if judge is None else evaluate_judge.rewarded_by_the_judge(named, clip, judge)
    source: Images = Listed(references, split) if data is None else Split(data, split)
    warnings += source.warnings()
    usable = source.usable(
        [(f"captions of {row.path}", row.given) for row in rows if row.given is not None],
        [(row.config.image_size, row.features(features)) for row in rows if row.config is not None],
        None if judge is None else judge.image_size,
        partial=partial,
    )
    if usable.left_out:
        warnings.append(usable.left_out)
    reading = time.perf_counter() - began
    decoding = {"beam": beam, "length_penalty": length_penalty, "batch_size": batch_size}
    for row in rows:
        evaluate_rows.caption(row, usable, features, target, progress, **decoding)
        warnings += evaluate_rows.empty(row, usable)
    embedding = time.perf_counter()
    embedded = None if judge is None else evaluate_judge.Judge(judge, usable, clip_prompt, batch_size, progress)
    embedding = time.perf_counter() - embedding
    options = {"tokenizer": tokenizer, "bootstrap": bootstrap, "seed": seed, "metrics": settings["metrics"]}
    for row in rows:
        evaluate_rows.measure(row, usable, embedded, progress, **options)
    if embedded is not None and embedded.cut:
        warnings.append(f"{embedded.cut} texts were longer than the CLIP's context, which cut them")
    document = {
        "format": FORMAT,
        "command": command,
        "versions": _versions(),
        "settings": {**settings, "split": source.split, "device": str(target)},
        "data": source.describe(usable),
        "clip": None if judge is None else {"source": clip, "fingerprint": judge.fingerprint, "width": judge.width},
        "warnings": warnings,
        "rows": [evaluate_rows.document(row, usable, per_image) for row in rows],
        "comparisons": evaluate_rows.comparisons(rows),
        "seconds": {"read": round(reading, 3), "embed": round(embedding, 3)},
    }
    document["seconds"]["all"] = round(time.perf_counter() - began, 3)
    table = evaluate_files.table(document)
    if folder is None:
        return Evaluation(document, table)
    report = evaluate_report.make(document, rows, usable, report_images, features, target)
    document["seconds"]["all"] = round(time.perf_counter() - began, 3)
    files = evaluate_files.write(folder, document, table, report, rows, usable, per_image)
    return Evaluation(document, table, tuple(files))


def _check(settings: Mapping[str, Any], checkpoints: Sequence[Source], captions: Sequence[Source]) -> None:
    """All that can be found wrong before any work is done."""
    for name, value in (("checkpoints", checkpoints), ("captions", captions)):
        if isinstance(value, (str, os.PathLike)):
            raise bad(_OP, name, "be a list", str(value), f"pass [{str(value)!r}]")
    for name, least, usual in (("batch_size", 1, 64), ("beam", 1, 1), ("seed", 0, 0), ("report_images", 0, 60)):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise bad(_OP, name, f"be an integer of at least {least}", value, f"pass {name}={usual}")
    value = settings["bootstrap"]
    if isinstance(value, bool) or not isinstance(value, int) or value != 0 and value < _FEWEST:
        raise bad(_OP, "bootstrap", f"be 0 or an integer of at least {_FEWEST}", value, "pass bootstrap=1000, or 0 for none")
    value = settings["length_penalty"]
    if not isinstance(value, (int, float)) or not math.isfinite(value):  # JSON has no NaN
        raise bad(_OP, "length_penalty", "be a finite number", value, "pass length_penalty=0.0")
    if settings["tokenizer"] not in TOKENIZERS:
        rule = f"be one of {', '.join(TOKENIZERS)}"
        raise bad(_OP, "tokenizer", rule, settings["tokenizer"], "pass tokenizer=fastcap; ptb needs Java")
    for name in settings["metrics"] or ():
        if name not in METRICS:
            rule = f"be among {', '.join(METRICS)}"
            raise bad(_OP, "metrics", rule, name, "name some of these, or none for all")
    if (settings["data"] is None) == (settings["references"] is None):
        got = "neither" if settings["data"] is None else "both"
        remedy = "pass --data FOLDER, with pictures, or --references FILE, without"
        raise bad(_OP, "data or references", "be given, one of them", got, remedy)
    if not checkpoints and not captions:
        raise bad(_OP, "checkpoint", "be given", "none", "pass --checkpoint RUN, or --captions FILE; each may be repeated")
    for name, value in (("checkpoint", next(iter(checkpoints), None)), ("clip", settings["clip"])):
        if settings["data"] is None and value is not None:
            remedy = "pass --data FOLDER in place of --references: it looks at pictures"
            raise bad(_OP, name, "come with --data", str(value), remedy)


def _names(value: Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise bad(_OP, "metrics", "be a list of names", value, "pass metrics=['bleu', 'cider'], or None for all")
    return [str(name) for name in value]


def _text(path: Source | None) -> str | None:
    return None if path is None else str(path)


def _command(
    settings: Mapping[str, Any], checkpoints: Sequence[Source], captions: Sequence[Source], out: Source | None
) -> str:
    """The command line that does the same."""
    words = ["fastcap", "evaluate"]
    for path in checkpoints:
        words += ["--checkpoint", str(path)]
    for path in captions:
        words += ["--captions", str(path)]
    usual = inspect.signature(evaluate).parameters
    for name, value in settings.items():
        if name == "metrics" and value is not None:
            words += ["--metrics", ",".join(value)]
        elif value != usual[name].default:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words if out is None else [*words, "--out", str(out)])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastcap", "transformers", "numpy", "pycocoevalcap"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed" if package != "fastcap" else "not installed: run from its sources"
    return {**found, "platform": f"{platform.system()} {platform.machine()}"}
