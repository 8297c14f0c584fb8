"""Reads results and shows them: one table, and bars of time and of memory. Needs nothing but matplotlib, and that to draw.

A result file is {"command", "written", "machine", "rows"}; a row has its own "machine" only where it differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

OURS, FLOOR, PEERS = "#1b6ca8", "#9a9a9a", ("#e0803a", "#c9a227", "#7a9e5f", "#8d6b9f", "#b3574a", "#5f9ea0")
SCALE = "#c4c4c4"  # another computation, timed for scale
MODE = {"forward": "fwd", "forward_backward": "fwd+bwd"}


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a file of JSON lines; a last line that was cut short, by a run that was stopped, is left out."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def write(path: str | Path, rows: Sequence[dict], command: str, **more) -> None:
    """Writes a result file, what the rows share about the machine once."""
    machine = rows[0]["machine"] if rows else {}
    kept = [{k: v for k, v in row.items() if k != "machine" or v != machine} for row in rows]
    written = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    contents = {"command": command, "written": written, "machine": machine, **more, "rows": kept}
    Path(path).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def read(path: str | Path) -> list[dict]:
    """The rows of a result file."""
    contents = json.loads(Path(path).read_text(encoding="utf-8"))
    return [{"machine": contents["machine"], **row} for row in contents["rows"]]


def cases(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    """The rows of each comparison, in their order."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in ("operation", "shape", "dtype", "variant", "mode")), []).append(row)
    return found


def best(rows: Sequence[dict]) -> tuple[dict | None, dict | None]:
    """(what fastcap chooses by itself, else the fastest of ours; the fastest peer) among the rows of one case."""
    timed = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["median_s"])
    ours = [row for row in timed if row["kind"] == "ours"] or [row for row in timed if row["kind"] == "reference"]
    peers = [row for row in timed if row["kind"] == "peer"]
    return next((row for row in ours if row["auto"]), ours[0] if ours else None), peers[0] if peers else None


def duration(seconds: float) -> str:
    """ "812 us", "3.41 ms", "1.20 s": three digits."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    value = seconds / scale
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {unit}"


def size(nbytes: float) -> str:
    """ "9.2 MB", "3.0 GB"."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _line(rows: Sequence[dict]) -> list[str]:
    first = rows[0]
    case = f"{first['dtype']} {first['variant']} {MODE.get(first['mode'], first['mode'])}"
    ours, peer = best(rows)
    cells = [first["operation"], f"{first['shape']} {first['sizes'].replace(' ', '')}", case]
    cells += [f"{row['provider']} {duration(row['median_s'])}" if row else "none" for row in (ours, peer)]
    cells.append(f"{peer['median_s'] / ours['median_s']:.1f}x" if ours and peer else "")
    cells.append(f"{ours['share_of_floor']:.0%}" if ours else "")
    predicted = ours.get("predicted_s") if ours else None
    return [*cells, duration(predicted) if predicted else "", f"{predicted / ours['median_s']:.0%}" if predicted else ""]


def progress(rows: Sequence[dict]) -> str:
    """One line on a case that is done."""
    _, shape, case, ours, peer, ratio, share, predicted, _ = _line(rows)
    if (ours, peer) == ("none", "none"):
        return f"{shape}, {case}: {rows[0].get('reason', rows[0]['status'])}"
    line = f"{shape}, {case}: ours {ours}, best peer {peer}, {ratio or '-'}, {share or '-'} of the floor"
    return line + (f", predicted {predicted}" if predicted else "")


def aligned(lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Lines of cells as a table; the columns `right` are set to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def table(rows: Sequence[dict]) -> str:
    """All cases, a line each; below, what went wrong and what was left out, once each. What the model predicts of a GPU
    (roofline.py) stands beside what was measured on one, with its share of that."""
    head = ["operation", "shape", "case", "ours", "best peer", "ratio", "share of floor", "predicted", "share"]
    shown = [head, *(_line(group) for group in cases(rows).values())]
    if not any(line[-1] for line in shown[1:]):
        shown = [line[:-2] for line in shown]
    lines = aligned(shown, right=(5, 6, 7, 8)).split("\n")
    notes = Counter(
        (row["provider"], row["status"], row.get("reason", ""))
        for row in rows
        if row["status"] != "ok" and row.get("kind") != "floor"
    )
    for (provider, status, reason), count in notes.items():
        lines.append(f"{provider}: {status} in {count} case{'s' * (count > 1)}: {reason}")
    if any(row.get("floor") == "measured" and row.get("share_of_floor", 0) > 1.05 for row in rows):
        lines.append("A share above 100%: the floor is torch's own, which is not the fastest; the benchmark says why.")
    lines += goals(rows)
    busy = max((row.get("load") or 0 for row in rows), default=0)
    cores = rows[0]["machine"]["cores"] if rows else 0
    if busy > 1.5 * cores and not rows[0]["machine"].get("cuda"):
        lines.append(f"The machine was busy: a load of up to {busy:g} on {cores} cores. Run again when it is idle.")
    return "\n".join(lines)


def goals(rows: Sequence[dict]) -> list[str]:
    """What the benchmarks promise, a line each: the bound, what was found, and whether it was kept."""
    lines = []
    for row in rows:
        for goal in row.get("goals", []):
            bound = "at least" if goal["at_least"] else "at most"
            if goal["against"]:
                bound += f" {goal['limit']:.3g} times the {goal['quantity']} of {goal['against']}"
                found = "not measured" if goal["found"] is None else f"{goal['found']:.3g}"
            else:
                show = {"time": duration, "products": "{:.0%} of the rate of products".format}.get(goal["quantity"], size)
                bound += f" {show(goal['limit'])}" + (" beyond its outputs" if goal["quantity"] == "scratch" else "")
                found = "not measured" if goal["found"] is None else show(goal["found"])
            verdict = {True: ": kept", False: ": MISSED", None: ""}[goal["met"]]
            case = f"{row['shape']} {row['dtype']} {row['variant']} {MODE.get(row['mode'], row['mode'])}"
            lines.append(f"{case}: {row['provider']} {bound}: {found}{verdict}")
    return lines


def each(rows: Sequence[dict]) -> str:
    """Every provider of every case, a line each: time, that time in parts of the fastest peer's, memory."""
    lines = []
    for group in cases(rows).values():
        first = group[0]
        lines.append(f"{first['shape']} {first['sizes']}, {first['dtype']} {first['variant']} {MODE[first['mode']]}")
        _, peer = best(group)
        for row in group:
            if row["status"] != "ok":
                lines.append(f"  {row['provider']:<24} {row['status']}")
                continue
            ratio = f"{row['median_s'] / peer['median_s']:.2f} of {peer['provider']}" if peer else ""
            extra, held = row["peak_extra_bytes"], row.get("output_bytes")
            memory = (
                "" if extra is None else f"{size(extra)} extra" + ("" if held is None else f", {size(held)} of it outputs")
            )
            lines.append(f"  {row['provider']:<24} {duration(row['median_s']):>9}  {ratio:<30} {memory}".rstrip())
    return "\n".join(lines)


def draw(rows: Sequence[dict], out: str | Path, limit: int = 12, suffix: str = "") -> list[Path]:
    """Bars of time for each operation, then of memory, as PNG files in `out`; at most `limit` of them."""
    import matplotlib

    matplotlib.use("Agg")
    operations = list(dict.fromkeys(row["operation"] for row in rows if row["status"] == "ok"))
    wanted = [(operation, kind) for kind in ("time", "memory") for operation in operations][:limit]
    written = []
    for operation, kind in wanted:
        groups = [group for key, group in cases(rows).items() if key[0] == operation]
        path = Path(out) / f"{operation}{suffix}_{kind}.png"
        if _draw(groups, kind, path):
            written.append(path)
    return written


def _draw(groups: list[list[dict]], kind: str, path: Path) -> bool:
    """One panel a case, one bar a provider, on a logarithmic axis of times the floor's time, or of its memory."""
    from matplotlib import pyplot

    panels = []
    for group in groups:
        timed = [row for row in group if row["status"] == "ok"]
        if kind == "memory":
            timed = [row for row in timed if row["peak_extra_bytes"] is not None and row["mode"] == "forward_backward"]
        if any(row["kind"] != "floor" for row in timed):
            panels.append(timed)
    if not panels:
        return False
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    tallest = max(len(panel) for panel in panels)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.8 * columns, lines * (0.26 * tallest + 1.0) + 0.7), squeeze=False, layout="constrained"
    )
    colours = _colours([row for panel in panels for row in panel])
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, panel, kind, colours)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    first = panels[0][0]
    what = "time of a call, relative to the floor" if kind == "time" else "peak memory beyond the inputs"
    machine = first["machine"]
    on = machine["device"] if machine.get("cuda") else f"{machine['device']}, {machine['threads']} threads"
    pages = ", torch in 2 MiB pages" if machine.get("torch_huge_pages") else ""
    figure.suptitle(f"{first['operation']}: {what}\n{on}, torch {machine['torch']}{pages}", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _panel(axis, panel: list[dict], kind: str, colours: dict[str, str]) -> None:
    panel = sorted(panel, key=lambda row: row["median_s"] if kind == "time" else row["peak_extra_bytes"])
    if kind == "time":
        # One floor for all, the measured one where there is one: a provider may have another of its own.
        floor = next((row for row in panel if row["floor"] == "measured"), panel[0])["floor_s"]
        least = next((row["provider"] for row in panel if row["kind"] == "floor"), "bytes / bandwidth")
        values = [row["median_s"] / floor for row in panel]
        labels = [duration(row["median_s"]) for row in panel]
        start = min(0.5, min(values) / 2)
        axis.set_xscale("log")
        axis.axvline(1, color=FLOOR, linewidth=1, zorder=0)
        axis.set_xlim(start, max(values) * 6)
        axis.set_xlabel(f"times the floor: {least}")
    else:
        values = [row["peak_extra_bytes"] / 1e6 for row in panel]
        labels = [f"{value:,.1f} MB" for value in values]
        start = 0
        axis.set_xlim(0, max(max(values), 1) * 1.3)
        axis.set_xlabel("MB")
    places = range(len(panel))
    axis.barh(places, [v - start for v in values], left=start, height=0.7, color=[colours[r["provider"]] for r in panel])
    for place, value, label in zip(places, values, labels, strict=True):
        axis.annotate(label, (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5)
    axis.set_yticks(places, [row["provider"] for row in panel], fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7.5)
    axis.xaxis.label.set_size(8)
    first = panel[0]
    mode = MODE.get(first["mode"], first["mode"])
    axis.set_title(f"{first['shape']} {first['sizes']}\n{first['dtype']} {first['variant']} {mode}", fontsize=8.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _colours(rows: list[dict]) -> dict[str, str]:
    """Ours blue, the floor grey, a peer the same colour in every panel."""
    fixed = {"ours": OURS, "reference": "#9cc4e4", "floor": FLOOR, "scale": SCALE}
    peers = list(dict.fromkeys(row["provider"] for row in rows if row["kind"] == "peer"))
    found = {row["provider"]: fixed[row["kind"]] for row in rows if row["kind"] in fixed}
    return {**found, **{name: PEERS[i % len(PEERS)] for i, name in enumerate(peers)}}


def slug(name: str) -> str:
    """A name as a folder: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcap.benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", help="result files")
    parser.add_argument("--out", help="a folder to draw plots in")
    parser.add_argument("--each", action="store_true", help="every provider, with its memory, before the table")
    given = parser.parse_args(arguments)
    rows = [row for file in given.files for row in read(file)]
    if given.each:
        print(each(rows) + "\n")
    print(table(rows))
    if given.out:
        Path(given.out).mkdir(parents=True, exist_ok=True)
        for path in draw(rows, given.out):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
