"""The tables of `compile_report`: programs by kernel or one by one, and cases by their bytes against the floor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastcap.benchmarks import report

Programs = dict[str, dict[str, Any]]


def show(programs: dict[str, Programs], cases: dict[str, dict[str, dict[str, Any]]], long: bool = False) -> str:
    """Of each target its kernels; then the cases, which are alike on all targets but for contrastive_reward's tiles."""
    parts = []
    for target, found in programs.items():
        if not found:
            continue
        groups: dict[str, list[dict]] = {}
        for name, program in found.items():
            groups.setdefault(name if long else _kernel(name), []).append(program)
        head = ["kernel", "programs", "registers", "spill", "shared", "warps", "of", "by", "tensor cores", "loads", "stores"]
        rows = [_row(name, group) for name, group in groups.items()]
        parts.append(f"{target}: {len(found)} programs\n{_aligned([head, *rows], right=range(1, 7))}")
    parts.append(
        "Registers and bytes of spills of a thread, bytes of shared memory of a block: the most of a kernel's programs.\n"
        "Warps: the fewest that are resident on a processor, of as many, and what keeps others away.\n"
        "Loads and stores of global memory: instructions of all its programs, by bits."
    )
    shown = _cases(next(iter(cases.values()), {}), long)
    return "\n\n".join([*parts, *shown])


def _kernel(name: str) -> str:
    """A CUDA kernel is its own group; of Triton's the programs of one function are one."""
    return name if ".cu " in name else name.rpartition("-")[0]


def _row(name: str, group: Sequence[dict[str, Any]]) -> list[str]:
    fewest = min(group, key=lambda program: program["warps"])
    shared = max(program["shared"] for program in group)
    tensor = sorted({family for program in group for family in program.get("tensor", {})})
    without = sum(not program.get("tensor") for program in group)
    cores = ", ".join(tensor) + (f" ({without} without)" if tensor and without else "")
    return [
        name, str(len(group)), str(max(program["registers"] for program in group)),
        str(max(program["spill"] for program in group)), f"{shared:,}", str(fewest["warps"]), str(fewest["most"]),
        fewest["limit"], cores, _widths(program["loads"] for program in group),
        _widths(program["stores"] for program in group),
    ]  # fmt: skip


def _widths(counts: Iterable[dict[Any, int]]) -> str:
    """ "128: 12, 32: 3"."""
    total: dict[int, int] = {}
    for each in counts:
        for bits, n in each.items():
            total[int(bits)] = total.get(int(bits), 0) + n
    return ", ".join(f"{bits}: {total[bits]}" for bits in sorted(total, reverse=True))


def _cases(cases: dict[str, dict[str, Any]], long: bool) -> list[str]:
    """Cases with a floor to be set against; unless `long` one line for each operation and variant, the worst."""
    found: dict[str, tuple[float, str, dict]] = {}
    for name, entry in cases.items():
        if "floor" not in entry:
            continue
        operation, shape, *rest = name.split()
        key = name if long else f"{operation} {' '.join(rest)}"
        ratio = entry["bytes"] / max(1, entry["floor"])
        if key not in found or ratio > found[key][0]:
            found[key] = ratio, shape, entry
    if not found:
        return []
    rows = []
    for key, (ratio, shape, entry) in found.items():
        operation, *rest = key.split()
        rest = rest[1:] if long else rest
        sizes = [report.size(entry[which]) for which in ("bytes", "floor")]
        rows.append([operation, shape, " ".join(rest), *sizes, f"{ratio:.2f}"])
    head = ["operation", "shape" if long else "worst shape", "case", "bytes", "floor", "ratio"]
    title = "bytes that the launches move, each tensor once a launch, where they are all that a call does:"
    return [f"{title}\n{_aligned([head, *rows], right=range(3, 6))}"]


def _aligned(rows: Sequence[Sequence[str]], right: Iterable[int]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = set(right)
    lines = (
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
