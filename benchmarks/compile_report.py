"""`python -m benchmarks.compile_report`: every kernel compiled for the GPUs that it is meant for, without one.

Triton's kernels as `auto` runs them at the shapes of the benchmarks, for sm_80, sm_90, sm_100 and gfx942; the CUDA kernels
for those of NVIDIA. Of each program: registers, spills, shared memory, theoretical occupancy, tensor-core instructions, and
the loads and stores of global memory by width; of each case the bytes that its launches move, against the operation's floor
(benchmarks/floors.py). compile_rules.py says what is asked of these, and what the bytes are and are not.

Fails, and names each, where a kernel spills, multiplies without tensor cores though they take its factors, is narrower than
its tensors' layout allows, or is more than 10% worse than the committed results in a number. What cannot be compiled or read
here, for want of nvcc or a disassembler, is reported and left out. What compile_excuses.py knows to be
so, with its reason, is told in every report and fails none.

    python -m benchmarks.compile_report                                    against benchmarks/results/compiled
    python -m benchmarks.compile_report --only additive_attention --target sm_90 --long
    python -m benchmarks.compile_report --write                            commits new numbers
"""

from __future__ import annotations

import atexit
import importlib.util
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _leave_the_root() -> None:
    """Takes the source tree's root off sys.path, where `python -m benchmarks.compile_report` has put it: its kernels/ would
    shadow Hugging Face's package. Where fastcap is not installed it is found through a link of its own, as in gpu.py."""
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT]
    if importlib.util.find_spec("fastcap") is None:
        home = tempfile.TemporaryDirectory(prefix="fastcap-report-")
        (Path(home.name) / "fastcap").symlink_to(ROOT / "fastcap", target_is_directory=True)
        sys.path.insert(0, home.name)
        atexit.register(home.cleanup)


if __package__ == "benchmarks":
    _leave_the_root()

import argparse  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

from fastcap.benchmarks import captions, compile_objects, compile_plans, compile_rules, compile_table  # noqa: E402
from fastcap.benchmarks.compile_objects import CUDA_TARGETS, Task  # noqa: E402
from fastcap.benchmarks.compile_plans import PLANNERS, TARGETS, identity, planned  # noqa: E402
from fastcap.benchmarks.compile_rules import Failure  # noqa: E402
from fastcap.benchmarks.disassembly import OP, ToolMissing, find_nvcc, output_of, tool, version_of  # noqa: E402

from fastcap.errors import FastcapError, bad  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "compiled"
FEW = 4  # tasks, which are done before processes have begun
COMMAND = "python -m benchmarks.compile_report --write"

_tasks: list[Task] = []  # of a run, as its processes inherit them


# Compiling -------------------------------------------------------------------------------------------------------------


def _attempt(index: int) -> tuple[int, Any, str]:
    """(index, result or None, what went wrong): a kernel that does not compile must not hide what the others are."""
    try:
        return index, _tasks[index].run(), ""
    except ToolMissing:
        raise
    except Exception as error:
        return index, None, f"{type(error).__name__}: {str(error)[-500:]}"


def compile_all(tasks: Sequence[Task], jobs: int) -> list[tuple[Any, str]]:
    """(result, what went wrong) of each task, in `jobs` processes where many have none yet."""
    found: list[tuple[Any, str]] = [(task.kept(), "") for task in tasks]
    _tasks[:] = tasks
    missing = [i for i, (result, _) in enumerate(found) if result is None]
    if not missing:
        return found
    print(f"compiling {len(missing)} of {len(tasks)} programs, the others are known", file=sys.stderr, flush=True)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default now, without its warning
    begun = time.time()

    def take(done: int, outcome: tuple[int, Any, str]) -> None:
        found[outcome[0]] = outcome[1:]
        if done % 50 == 0:
            print(f"{done} of {len(missing)}, {time.time() - begun:.0f} s", file=sys.stderr, flush=True)

    if jobs < 2 or len(missing) <= FEW:
        for done, i in enumerate(missing, 1):
            take(done, _attempt(i))
        return found
    with warnings.catch_warnings():
        # Launches hold functions that cannot be sent: processes inherit them. No thread of ours runs yet.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            for done, outcome in enumerate(pool.imap_unordered(_attempt, missing), 1):
                take(done, outcome)
    return found


class Report:
    """What a run found: programs and cases by target, broken rules, and what was left out."""

    def __init__(self) -> None:
        self.programs: dict[str, dict[str, dict]] = {}
        self.cases: dict[str, dict[str, dict]] = {}
        self.failures: list[Failure] = []
        self.notes: list[str] = []


def collect(targets: Sequence[str], only: Sequence[str], jobs: int) -> Report:
    """Plans, compiles, and checks the rules that need no other report."""
    report = Report()
    plans = {target: list(planned(target, tuple(only))) for target in targets}
    entries: dict[tuple[str, str], Task] = {}
    missing = _missing_disassembler()
    for target in targets:
        if missing and target in CUDA_TARGETS:
            report.notes.append(f"{target}: left out: {missing}")
            plans[target] = []
        for case in plans[target]:
            for launch, _ in case.launches:
                key = (target, identity(launch))
                if key not in entries:
                    entries[key] = compile_objects.triton_task(launch, target)
    cuda = []
    try:
        if not missing:
            cuda = compile_objects.cuda_tasks(list(only) or list(PLANNERS), _known_to_nvcc(targets, report))
    except ToolMissing as error:
        report.notes.append(f"CUDA kernels: left out: {error}")
    results = compile_all([task for *_, task in cuda] + list(entries.values()), jobs)
    made: dict[tuple[str, str], dict] = {}
    for (target, name), task, (result, error) in zip(entries, entries.values(), results[len(cuda) :], strict=True):
        if result is None:
            report.failures.append(Failure("compile", f"{target} {task.name}", error))
        else:
            made[target, name] = result
    for target in targets:
        report.programs[target] = {name: made[at, name] for at, name in made if at == target}
        report.cases[target] = dict(_case(report, target, case) for case in plans[target])
        _check_programs(report, target)
    for (operation, target, task), (result, error) in zip(cuda, results, strict=False):
        if result is None:
            report.failures.append(Failure("compile", f"{target} {task.name}", error))
            continue
        for kernel, program in result.items():
            report.programs[target][f"{task.name} {kernel}"] = program
            report.failures += compile_rules.check_program(target, f"{task.name} {kernel}", program)
            report.failures += compile_rules.check_cuda_widths(target, operation, kernel, program)
    return report


def _missing_disassembler() -> str:
    try:
        for name in ("cuobjdump", "nvdisasm"):
            tool(name)
    except ToolMissing as error:
        return str(error)
    return ""


def _known_to_nvcc(targets: Sequence[str], report: Report) -> list[str]:
    """Those of `targets` that nvcc compiles for: sm_100 came with 12.8, and older ones leave with new versions."""
    of_cuda = [target for target in targets if target in CUDA_TARGETS]
    shown = output_of(find_nvcc(), "--list-gpu-arch").split() if of_cuda else []
    unknown = [target for target in of_cuda if f"compute_{target[3:]}" not in shown]
    report.notes += [f"CUDA kernels for {target}: left out: this nvcc does not know it" for target in unknown]
    return [target for target in of_cuda if target not in unknown]


def _case(report: Report, target: str, case: compile_plans.Planned) -> tuple[str, dict[str, Any]]:
    """A case as the report keeps it: its programs in order with how often each runs, bytes and floor."""
    programs: dict[str, int] = {}
    moved, complete, narrow = 0, True, {}
    for launch, times in case.launches:
        name = identity(launch)
        programs[name] = programs.get(name, 0) + times
        result = report.programs[target].get(name)
        if result is None:
            complete = False
            continue
        moved += times * sum(compile_rules.argument_bytes(launch, result["accesses"], case).values())
        for failure in compile_rules.check_widths(target, launch, result, case):
            narrow.setdefault(_argument(failure), failure)
    met = {_argument(failure) for failure in report.failures if failure.rule == "narrow"}
    report.failures += [failure for key, failure in narrow.items() if key not in met]
    entry: dict[str, Any] = {"programs": programs}
    if complete and case.floor is not None:
        entry |= {"bytes": moved, "floor": case.floor.bytes} if case.whole else {"bytes": moved}
    return f"{case.operation} {case.name}", entry


def _argument(failure: Failure) -> tuple[object, ...]:
    """Where it is, the argument, the kind of access and whether it is known: of these one failure is told."""
    return failure.where, failure.what.split()[0], failure.what.split(": ")[1].split()[0], compile_rules.known(failure)


def _check_programs(report: Report, target: str) -> None:
    first: dict[str, str] = {}
    for case, entry in report.cases[target].items():
        for name in entry["programs"]:
            first.setdefault(name, case)
    for name, program in report.programs[target].items():
        report.failures += compile_rules.check_program(target, f"{name} ({first[name]})", program)


# Comparing and writing -------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of what compiled and read the kernels."""
    import torch
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    for name, find in (("nvcc", find_nvcc), ("nvdisasm", lambda: tool("nvdisasm"))):
        try:
            found[name] = version_of(find())
        except ToolMissing:
            found[name] = "none"
    return {**found, "captions": captions.load().source}


def against(report: Report, target: str, committed: dict[str, Any], here: dict[str, str]) -> None:
    """Adds what is worse than in a committed file. A case's programs are set against those that it had, kernel by kernel."""
    before = committed["versions"]
    changed = [f"{name} {before.get(name)} -> {here[name]}" for name in ("triton", "nvcc") if before.get(name) != here[name]]
    if changed:
        report.notes.append(f"{target}: committed by other compilers: {', '.join(changed)}")
    met: set[tuple[str, str]] = set()
    pairs = [(name, name, "") for name in report.programs[target] if ".cu " in name]
    for case, entry in report.cases[target].items():
        old = committed["cases"].get(case, {"programs": {}})
        for name in entry["programs"]:
            same = [other for other in entry["programs"] if _kernel(other) == _kernel(name)]
            olds = [other for other in old["programs"] if _kernel(other) == _kernel(name)]
            if same.index(name) < len(olds):
                pairs.append((name, olds[same.index(name)], case))
        if "bytes" in entry and "bytes" in old and before.get("captions") == here["captions"]:
            where = f"{target} {case}"
            report.failures += compile_rules.compare(where, "bytes", entry["bytes"], old["bytes"], False)
    for name, old_name, case in pairs:
        now, old = report.programs[target].get(name), committed["programs"].get(old_name)
        if now and old and (name, old_name) not in met:
            met.add((name, old_name))
            where = f"{target} {name}" + (f" ({case})" if case else "")
            report.failures += compile_rules.compare_programs(where, now, old)


def _kernel(name: str) -> str:
    return name.rpartition("-")[0]


def write(folder: Path, report: Report, target: str, here: dict[str, str]) -> Path:
    """Writes a target's file: a line for each program and each case, in the order of their names."""
    kept = {
        name: {key: value for key, value in program.items() if key != "accesses" and value != []}
        for name, program in report.programs[target].items()
    }
    lines = [f' "command": {json.dumps(COMMAND)}', f' "target": {json.dumps(target)}', f' "versions": {json.dumps(here)}']
    for title, rows in (("programs", kept), ("cases", report.cases[target])):
        body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
        lines.append(f' "{title}": {{\n{body}\n }}')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target}.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def read(place: Path, target: str) -> dict[str, Any] | None:
    """The committed file of a target: in a folder, or the file itself where it is that target's."""
    path = place / f"{target}.json" if place.is_dir() else place
    if not path.is_file():
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        return contents if contents["target"] == target else None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise bad(OP, "--against", "be a file that --write made, or a folder of them", str(path), "name one") from None


# The command line ------------------------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", action="append", default=[], metavar="OPERATION", help="may be repeated")
    parser.add_argument("--target", action="append", default=[], help=f"of {', '.join(TARGETS)}; may be repeated")
    parser.add_argument("--against", metavar="FILE", help="a target's file, or a folder of them; default: the committed")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)} instead of comparing")
    parser.add_argument("--out", metavar="FOLDER", help="write the files there as well")
    parser.add_argument("--long", action="store_true", help="a line for each program and case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile; default: all cores")
    given = parser.parse_args(arguments)
    for name, chosen, known in (("--only", given.only, PLANNERS), ("--target", given.target, TARGETS)):
        for value in chosen:
            if value not in known:
                raise bad(OP, name, f"be among {', '.join(known)}", value, "leave it out for all")
    if given.jobs < 1:
        raise bad(OP, "--jobs", "be at least 1", given.jobs, "leave it out")
    if given.write and (given.only or given.target):
        raise bad(OP, "--write", "come without --only and --target", True, "write all, so that the files stay whole")
    if given.write and not (ROOT / "csrc").is_dir():
        raise bad(OP, "--write", "be used in a source tree", str(ROOT), "pass --out FOLDER")
    if given.against and not Path(given.against).exists():
        raise bad(OP, "--against", "be a file or folder", given.against, "leave it out for the committed results")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise bad(
            OP, "TRITON_INTERPRET", "be unset", os.environ["TRITON_INTERPRET"], "nothing is compiled in its interpreter"
        )
    if importlib.util.find_spec("triton") is None:
        raise bad(OP, "triton", "be installed", None, "pip install triton (Linux)")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every rule is kept, 1 where one is broken, 2 for a mistake in the command."""
    begun = time.time()
    try:
        given = _parse(arguments)
        targets = list(dict.fromkeys(given.target)) or list(TARGETS)
        report = collect(targets, given.only, given.jobs)
        here = versions()
        place = Path(given.against) if given.against else RESULTS
        for target in targets if not given.write else ():
            committed = read(place, target)
            if committed is None:
                report.notes.append(f"{target}: compared with nothing: {place} has no file of it")
            else:
                against(report, target, committed, here)
    except FastcapError as error:
        print(error, file=sys.stderr)
        return 2
    for folder in filter(None, (RESULTS if given.write else None, Path(given.out) if given.out else None)):
        for target in targets:
            if report.programs[target]:
                report.notes.append(f"written: {write(folder, report, target, here)}")
    print(compile_table.show(report.programs, report.cases, given.long))
    for note in report.notes:
        print(note)
    kinds = [(failure, compile_rules.known(failure)) for failure in report.failures]
    for entry in dict.fromkeys(entry for _, entry in kinds if entry):
        of = [failure for failure, other in kinds if other is entry]
        print(f"known, {len(of)} times: {of[0]}: {entry.why}")
    if not (given.only or given.target):
        for entry in compile_rules.KNOWN:
            if not any(other is entry for _, other in kinds):
                print(f"known no more, take it out of compile_excuses.py: {entry}")
    failures = [failure for failure, entry in kinds if not entry]
    for failure in failures:
        print(f"FAILED {failure}")
    count = sum(map(len, report.programs.values()))
    print(f"{count} programs, {len(failures)} rules broken anew, {time.time() - begun:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
