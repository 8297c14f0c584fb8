"""`python -m fastcap.benchmarks OPERATION ...`: the benchmarks without pytest, a line for each case as it is done."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from fastcap.benchmarks import harness, report

from fastcap.errors import FastcapError, bad


def operations() -> dict[str, Path]:
    """The operations that have a benchmark, by name, and its file."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(Path(__file__).parent.glob("bench_*.py"))}


def module(operation: str):
    """The benchmark of an operation: OPERATION, SHAPES and cases()."""
    if operation not in operations():
        names = ", ".join(operations())
        raise bad("bench", "operations", f"be among {names}", operation, "name one of these, or none for all")
    return importlib.import_module(f"fastcap.benchmarks.bench_{operation}")


def check(chosen: list[str] | tuple[str, ...], profile: str, shapes: list[str] | tuple[str, ...]) -> list[str]:
    """The operations to run; raises for a name that none of them knows."""
    if profile not in harness.PROFILES:
        raise bad("bench", "profile", f"be one of {', '.join(harness.PROFILES)}", profile, "pass --quick or nothing")
    chosen = list(chosen) or list(operations())
    known = dict.fromkeys(shape for name in chosen for shape in module(name).SHAPES)
    for shape in shapes:
        if shape not in known:
            raise bad("bench", "shapes", f"be among {', '.join(known)}", shape, "leave shapes out for the profile's own")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcap.benchmarks", description=__doc__)
    parser.add_argument("operations", nargs="*", help="none: all")
    parser.add_argument("--profile", default="default", help=", ".join(harness.PROFILES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, help="of timing per case")
    parser.add_argument("--deadline", type=float, help="UNIX time after which no case is begun")
    parser.add_argument("--rows", help="a file to which each row is added as a line of JSON")
    given = parser.parse_args(arguments)
    try:
        chosen = check(given.operations, given.profile, given.shapes)
    except FastcapError as error:
        print(error, file=sys.stderr)
        return 2
    failed = False
    settings = harness.Settings(given.profile, given.device, tuple(given.shapes), given.seconds, given.deadline, given.rows)
    for operation in chosen:
        for results in harness.run_cases(module(operation).cases(settings), settings):
            rows = [result.row for result in results]
            print(report.progress(rows), flush=True)
            for row in rows:
                if row["status"] in ("wrong", "error"):
                    failed = True
                    print(f"  {row['provider']}: {row['status']}, so not timed: {row['reason']}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
