"""What `fastcap evaluate` writes into --out, each file whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcap import eval as metrics
from fastcap.errors import bad
from fastcap.eval.report import groups, signed

from .evaluate_data import Usable
from .evaluate_rows import Row, each

_OP = "evaluate"


def folder(out: str | os.PathLike | None) -> Path | None:
    """The folder to write to, found out before the work."""
    if out is None:
        return None
    made = Path(out)
    if made.exists() and not made.is_dir():
        raise bad(_OP, "out", "be a folder", str(made), "name another")
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad(_OP, "out", "be a folder that can be made", f"{made} ({error.strerror})", "name another") from error
    return made


def table(document: dict[str, Any]) -> str:
    """What is printed, and evaluation.md: the scores side by side, what was not measured, and the warnings."""
    rows = []
    for row in document["rows"]:
        without = {name: metrics.NotMeasured(**why) for name, why in row["not_measured"].items()}
        intervals = {name: tuple(interval) for name, interval in row["intervals"].items()}
        rows.append(metrics.Row(row["name"], row["scores"], without, intervals))
    warnings = "".join(f"\n\nWarning: {warning}." for warning in document["warnings"])
    return metrics.table(rows, heading(document)) + _differences(document["comparisons"]) + warnings


def _differences(comparisons: Sequence[dict[str, Any]]) -> str:
    made = []
    for one in comparisons:
        parts = []
        for column in (column for _, columns in groups() for column in columns if column.key in one["differences"]):
            value, low, high = (signed(column, one["differences"][column.key][name]) for name in ("value", "low", "high"))
            parts.append(f"{column.head} {value} ({low} to {high})")
        if parts:
            made.append(f"- {one['first']} less {one['second']}: {', '.join(parts)}")
    return "\n\nDifferences on the same images, with 95 % intervals:\n\n" + "\n".join(made) if made else ""


def heading(document: dict[str, Any]) -> str:
    """One line: on what, how decoded, and by whom judged."""
    data, settings, clip = document["data"], document["settings"], document["clip"]
    decoded = any("checkpoint" in row for row in document["rows"])
    how = (["greedy" if settings["beam"] == 1 else f"beam {settings['beam']}"] if decoded else []) + (
        [f"judged by {clip['source']}"] if clip else []
    )
    of = f" of {data['split']}" if data["split"] else ""
    return f"{data['images']:,} images{of} in {data['json']}" + "".join(f", {part}" for part in how)


def write(
    out: Path, document: dict[str, Any], table: str, report: str, rows: Sequence[Row], usable: Usable, per_image: bool
) -> list[Path]:
    """Writes all files; returned: their paths, the main ones first."""
    text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    files = {"evaluation.json": text, "evaluation.md": table + "\n", "report.html": report}
    if per_image:
        files["per_image.csv"] = _csv(rows, usable)
    for name, content in files.items():
        partial = out / f"{name}.partial"
        partial.write_bytes(content.encode("utf-8", "backslashreplace"))  # a path need not be UTF-8
        os.replace(partial, out / name)
    said = []
    for row in rows:
        if row.kind == "checkpoint":
            safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in row.name)
            path = out / f"captions-{safe}.json"
            while path in said:  # names that differ only in what a file name cannot have
                path = path.with_name(f"{path.stem}-.json")
            said.append(path)
            metrics.write_results(path, dict(zip(usable.ids, row.captions, strict=True)))
    return [*(out / name for name in files), *said]


def _csv(rows: Sequence[Row], usable: Usable) -> str:
    """A line for each image and captioner: its caption and the scores that an image has; empty where it has none."""
    names = list(dict.fromkeys(name for row in rows for name in row.measured.each))
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(["image_id", "captioner", "caption", *names])
    for row in rows:
        for id, said, scores in zip(usable.ids, row.captions, each(row), strict=True):
            writer.writerow([id, row.name, said, *(scores.get(name, "") for name in names)])
    return made.getvalue()
