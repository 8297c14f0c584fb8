"""`fastcap bench`: runs the benchmarks through pytest, prints one table, draws plots and writes the results as JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fastcap.errors import FastcapError, bad

OP = "bench"
_NEEDS = ("pytest", "pytest_benchmark", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see `fastcap bench --help`. Exits with 1 where a provider was wrong."""
    parser = argparse.ArgumentParser(prog="fastcap bench", description=__doc__)
    parser.add_argument("operations", nargs="*", help="none: all that have a benchmark")
    parser.add_argument("--quick", action="store_true", help="one shape, under a minute")
    parser.add_argument("--all", action="store_true", help="every shape that fits in memory")
    parser.add_argument("--shapes", nargs="+", default=[], help="only these, for example blip gpt2")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seconds", type=float, help="of timing per comparison")
    parser.add_argument("--huge-pages", action="store_true", help="CPU: torch asks for 2 MiB pages too, as our kernels do")
    parser.add_argument("--out", default="fastcap-bench", help="folder for JSON and plots")
    parser.add_argument("--save", action="store_true", help="in a source tree: also into benchmarks/results/<device>")
    given = vars(parser.parse_args(arguments))
    quick, everything = given.pop("quick"), given.pop("all")
    if quick and everything:
        raise bad(OP, "--all", "come without --quick", True, "pass one of them")
    rows = run(profile="quick" if quick else "all" if everything else "default", **given)
    if any(row["status"] in ("wrong", "error") for row in rows):
        sys.exit(1)


def run(
    operations: Sequence[str] = (),
    *,
    profile: str = "default",
    shapes: Sequence[str] = (),
    device: str = "auto",
    seconds: float | None = None,
    huge_pages: bool = False,
    out: str | os.PathLike = "fastcap-bench",
    save: bool = False,
) -> list[dict]:
    """Runs benchmarks, prints their table, and writes <operation>.json and plots into `out`.

    Args:
        operations: names, for example ("subset_cross_entropy",); none: all that have a benchmark.
        profile: "quick" (one shape, under a minute), "default" (minutes), "all", or "tiny" (for tests; no measure of
        speed).
        shapes: only these shapes; none: the profile's.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        seconds: of timing per comparison; None: the profile's.
        huge_pages: run under THP_MEM_ALLOC_ENABLE=1, so that all of torch's large tensors are in 2 MiB pages, as the
            gradients that fastcap makes always are (Linux, CPU). Most of the time of a fresh gradient is its page faults.
            The results are named <operation>_huge_pages.
        out: a folder, made if it is missing.
        save: also write the results into benchmarks/results/<device> of a source tree.

    Returns:
        The rows, a dict for each provider of each comparison: benchmarks/harness.py says what they hold.

    Raises:
        FastcapError: a name is unknown, the device is not there, or the `bench` extra is not installed.
    """
    _require_extra()
    import torch

    from fastcap.benchmarks import __main__ as listing
    from fastcap.benchmarks import harness, machine, report

    for name, given in (("operations", operations), ("shapes", shapes)):
        if isinstance(given, str):
            raise bad(OP, name, "be a list of names", given, f"pass [{given!r}]")
    chosen = listing.check(operations, profile, shapes)
    if device not in ("auto", "cpu", "cuda"):
        raise bad(OP, "device", "be auto, cpu or cuda", device, "leave it out")
    if device == "cuda" and not torch.cuda.is_available():
        raise bad(OP, "device", "be one that torch sees", device, "pass device='cpu', or run on a machine with a GPU")
    if seconds is not None and not seconds > 0:
        raise bad(OP, "seconds", "be above 0", seconds, "leave it out")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    results = _results_folder(machine.folder_name(device)) if save else None
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad(OP, "out", "be a folder that can be written", str(out), str(error)) from None
    suffix = "_huge_pages" if huge_pages else ""
    print(f"{machine.describe(device)['device']}, {machine.describe(device)['threads']} threads; results in {out}")

    with tempfile.TemporaryDirectory(prefix="fastcap-bench-") as folder:
        settings = harness.Settings(
            profile, device, tuple(shapes), seconds, rows=str((Path(folder) / "rows.jsonl").resolve())
        )
        files = [str(listing.operations()[name]) for name in chosen]
        log = out / "pytest.log"
        status = _pytest(files, Path(folder), settings, log, {"THP_MEM_ALLOC_ENABLE": "1"} if huge_pages else {})
        rows = report.read_rows(settings.rows)
    if not rows:
        raise bad(OP, "run", "end with results", f"pytest's status {status}", f"read {log}")
    command = _command(chosen, profile, shapes, seconds, device) + (" --huge-pages" if huge_pages else "")
    for operation in chosen:
        own = [row for row in rows if row["operation"] == operation]
        if own:
            for place in filter(None, (out, results)):
                place.mkdir(parents=True, exist_ok=True)
                report.write(place / f"{operation}{suffix}.json", own, command)
    print("\n" + report.table(rows))
    for path in report.draw(rows, out, suffix=suffix):
        print(path)
    return rows


def _require_extra() -> None:
    missing = [name.replace("_", "-") for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "run: pip install 'fastcap[bench]'"
        raise FastcapError(f"fastcap.{OP}: the bench extra must be installed, got no {', '.join(missing)}; {remedy}")


def _results_folder(device: str) -> Path:
    """benchmarks/results/<device> of the source tree."""
    import fastcap.benchmarks

    root = Path(fastcap.benchmarks.__file__).resolve().parent.parent
    if not (root / "csrc").is_dir():
        raise bad(OP, "save", "be used in a source tree", str(root), "leave save out and copy the files of `out`")
    return root / "benchmarks" / "results" / device


def _command(chosen, profile: str, shapes, seconds, device: str) -> str:
    words = ["fastcap bench", *chosen]
    words += {"default": [], "quick": ["--quick"], "all": ["--all"]}.get(profile, [f"(profile {profile})"])
    words += ["--shapes", *shapes] if shapes else []
    words += [f"--seconds {seconds:g}"] if seconds else []
    return " ".join([*words, f"--device {device}"])


def _pytest(files: list[str], folder: Path, settings, log: Path, more: dict[str, str]) -> int:
    """Runs pytest on benchmark files, away from any source tree; prints a line for each comparison as it is done."""
    import fastcap
    from fastcap.benchmarks import report

    # The package by a link of its own: a source tree's root holds `kernels/`, and must not be on the path.
    path = os.environ.get("PYTHONPATH", "")
    with contextlib.suppress(OSError):  # where links are not allowed, fastcap is installed, or found as it was here
        (folder / "fastcap").symlink_to(Path(fastcap.__file__).parent, target_is_directory=True)
        path = os.pathsep.join(filter(None, (str(folder), path)))
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "--rootdir", str(Path(files[0]).parent)]
    command += ["-c", os.devnull, f"--benchmark-storage=file://{folder / 'storage'}", *files]
    env = {**os.environ, "PYTHONPATH": path, **settings.to_env(), **more}
    seen = 0
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            while True:
                ended = process.poll() is not None
                groups = list(report.cases(report.read_rows(settings.rows)).values())
                for rows in groups[seen:]:
                    print(report.progress(rows), flush=True)
                seen = len(groups)
                if ended:
                    return process.returncode
                time.sleep(0.3)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


if __name__ == "__main__":
    main()
