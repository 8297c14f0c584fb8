"""Everything that needs a CUDA machine, in one command and a fixed time: `python benchmarks/gpu.py [--quick]`.

From a source tree, with no network and nothing installed but torch: builds the extension in place if it can, says which
backends and peers are there and why others are not, runs the tests marked `gpu` if pytest is there, runs example calls under
compute-sanitizer if that is there, runs the benchmarks, and writes gpu.json, gpu.log and plots to $OUT (default build/gpu),
at most 8 files. Each stage has its limit, so the results of what was done are written whatever happens; --stage names those
to run, to give one all the time there is. Operations are those that have a bench_<operation>.py. --dry-run goes through the
stages on a CPU, with tiny shapes and nothing built or sanitized.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_FILES = 8
REPORTING = 20  # seconds kept back for the table and the plots
LIMITS = {  # seconds: of the whole run, then of single stages; the benchmarks take what is left
    "full": {"total": 525, "build": 240, "inventory": 30, "tests": 150, "sanitize": 100},
    "quick": {"total": 170, "build": 60, "inventory": 15, "tests": 45, "sanitize": 0},
    "dry-run": {"total": 280, "build": 60, "inventory": 60, "tests": 120, "sanitize": 0},
}
STAGES = ("build", "inventory", "tests", "sanitize", "bench")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROBE = """
import json, platform, torch
gpu = torch.cuda.is_available()
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "gpu": torch.cuda.get_device_name() if gpu else None,
    "arch": "%d%d" % torch.cuda.get_device_capability() if gpu else None}))
"""


INVENTORY = """
import json, sys, torch, fastcap
from fastcap.benchmarks import machine, peers
print("torch", torch.__version__, "triton", machine.version_of("triton"))
for name, status in fastcap.backends().items():
    print(f"backend {name}: {'yes' if status else 'no'}, {status.reason}")
away = peers.missing(sys.argv[1]) | ({} if peers.torch_chunked().call else {"torch_chunked": peers.torch_chunked().reason})
for name in (*peers.PEERS, "torch_chunked"):
    print(f"peer {name}: {'no, ' + away[name] if name in away else 'yes'}")
"""


@dataclass
class Stage:
    """What was run, and how it ended: "ok", "failed (status)", "stopped after N s" or "left out: why"."""

    name: str
    command: str = ""
    result: str = ""
    seconds: float = 0.0


@dataclass
class Run:
    """One run: where it writes, when it must end, and what was done so far."""

    mode: str
    out: Path
    home: Path  # a folder with nothing but a link named fastcap: on the path instead of ROOT, with its kernels/
    started: float = field(default_factory=time.time)
    stages: list[Stage] = field(default_factory=list)
    arguments: Sequence[str] = ()  # of the command

    @property
    def left(self) -> float:
        return self.started + LIMITS[self.mode]["total"] - REPORTING - time.time()

    @property
    def rows_file(self) -> Path:
        return self.home / "rows.jsonl"

    def say(self, text: str) -> None:
        print(text, flush=True)
        with open(self.out / "gpu.log", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def stage(self, name: str, command: list[str], limit: float, cwd: Path, *, fine: dict | None = None, **env: str) -> None:
        """Runs a command for at most `limit` seconds; its output goes to the log and to the screen.

        fine: exit statuses that are no failure -> what to say of them.
        """
        stage = Stage(name, " ".join(command))
        self.stages.append(stage)
        limit = min(limit, self.left)
        if limit < 1:
            stage.result = "left out: out of time"
            return self.say(f"== {name}: {stage.result}")
        self.say(f"== {name} (at most {limit:.0f} s): {stage.command}")
        begun = time.time()
        with open(self.out / "gpu.log", "ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                command, cwd=cwd, env={**os.environ, **self.env(), **env}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit)
                stage.result = {0: "ok", **(fine or {})}.get(status, f"failed (status {status})")
            except subprocess.TimeoutExpired:
                stage.result = f"stopped after {limit:.0f} s"
            finally:  # whatever it left running, and itself
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        stage.seconds = round(time.time() - begun, 1)
        lines = (self.out / "gpu.log").read_bytes()[start:].decode(errors="replace").splitlines()
        print("\n".join(lines[-60:]), flush=True)
        self.say(f"== {name}: {stage.result}, {stage.seconds:.0f} s")

    def leave_out(self, name: str, why: str) -> None:
        self.stages.append(Stage(name, result=f"left out: {why}"))
        self.say(f"== {name}: left out: {why}")

    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.home), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def operations() -> list[str]:
    """Those that have a benchmark."""
    return [path.stem.removeprefix("bench_") for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))]


def build(run: Run, arch: str | None) -> None:
    missing = [name for name in ("setuptools",) if importlib.util.find_spec(name) is None]
    if missing:
        return run.leave_out("build", f"{missing[0]} is not installed; only the backends that are there can run")
    # FASTCAP_EXTENSION=1: a failed build must show. One architecture, unless more were asked for: a fraction of the time.
    env = {"FASTCAP_EXTENSION": "1", "FASTCAP_ARCHS": os.environ.get("FASTCAP_ARCHS") or arch or "90"}
    # Without pyproject.toml, whose licence field a setuptools before 77 rejects; the link to fastcap/ takes the module home.
    place = run.home / "build"
    place.mkdir()
    for name in ("setup.py", "csrc", "fastcap"):
        (place / name).symlink_to(ROOT / name)
    (place / "setup.cfg").write_text("[metadata]\nname = fastcap\n[options]\npackages = fastcap\n")
    command = ["--name"] if run.mode == "dry-run" else ["build_ext", "--inplace"]
    run.stage("build", [sys.executable, "setup.py", *command], LIMITS[run.mode]["build"], place, **env)


def take_inventory(run: Run) -> None:
    """Which backends and peers are here, and why the others are not."""
    device = "cpu" if run.mode == "dry-run" else "cuda"
    run.stage("inventory", [sys.executable, "-c", INVENTORY, device], LIMITS[run.mode]["inventory"], run.home)


def sanitize(run: Run, last: bool) -> None:
    """Example calls under each tool of compute-sanitizer; `last`: all the time that is left is this stage's."""
    limit = LIMITS[run.mode]["sanitize"]
    if limit == 0:
        return run.leave_out("sanitize", f"there is no time for it in --{run.mode}")
    for i, tool in enumerate(SANITIZERS):
        share = run.left / (len(SANITIZERS) - i) if last else limit / len(SANITIZERS)
        command = [sys.executable, "-m", "fastcap.benchmarks.sanitize", tool, "--seconds", f"{max(1.0, 0.6 * share):.0f}"]
        run.stage(f"sanitize {tool}", command, share, run.home, fine={2: "left out: compute-sanitizer is not here"})


def test(run: Run, last: bool) -> None:
    """The tests marked `gpu`; `last`: all the time that is left is this stage's."""
    if importlib.util.find_spec("pytest") is None:
        return run.leave_out("tests", "pytest is not installed; running the benchmarks alone")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-m", "gpu"]
    command += ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--durations=5"]
    command += (
        ["--collect-only", str(ROOT / "tests" / "test_all_ops.py")] if run.mode == "dry-run" else [str(ROOT / "tests")]
    )
    limit = int(run.left) if last else LIMITS[run.mode]["tests"]
    ends = {"FASTCAP_TEST_SECONDS": str(limit - 10)}  # tests that have not begun by then are skipped, and pytest reports
    run.stage("tests", command, limit, run.home, fine={5: "ok: no test is marked gpu"}, **ends)


def bench(run: Run, names: list[str]) -> None:
    profile, device = {"full": ("all", "cuda"), "quick": ("quick", "cuda"), "dry-run": ("tiny", "cpu")}[run.mode]
    for done, name in enumerate(names):
        share = run.left / (len(names) - done)
        command = [sys.executable, "-m", "fastcap.benchmarks", name, "--profile", profile, "--device", device]
        command += ["--rows", str(run.rows_file), "--deadline", f"{time.time() + max(1.0, 0.85 * share):.0f}"]
        command += ["--seconds", {"full": "1.0", "quick": "0.5", "dry-run": "0.01"}[run.mode]]
        run.stage(f"bench {name}", command, share, run.home)


def finish(run: Run, probe: dict) -> None:
    """Writes gpu.json, draws what can be drawn, and prints the table, last."""
    report = importlib.import_module(f"{__package__}.report" if __package__ else "report")
    rows = report.read_rows(run.rows_file)
    command = shlex.join(["python", "benchmarks/gpu.py", *run.arguments])
    shown = [asdict(stage) for stage in run.stages]
    report.write(run.out / "gpu.json", rows, command, probe=probe, stages=shown)
    try:
        report.draw(rows, run.out, limit=MOST_FILES - 2)
    except ImportError as error:
        run.say(f"no plots: {error}; pip install matplotlib")
    except Exception as error:  # the results are written; a plot must not lose the table
        run.say(f"no plots: {type(error).__name__}: {error}")
    for stage in run.stages:
        run.say(f"{stage.name}: {stage.result}")
    run.say(report.table(rows) if rows else "no benchmark ran")
    run.say(f"{time.time() - run.started:.0f} s; files in {run.out}: {', '.join(sorted(os.listdir(run.out)))}")


def probe_torch(home: Path) -> dict:
    """What torch says of this machine; {"error"} where it does not start."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], cwd=home, capture_output=True, text=True, timeout=120)
        return json.loads(done.stdout) if done.returncode == 0 else {"error": (done.stderr.splitlines() or ["?"])[-1]}
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return {"error": str(error)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 3 minutes instead of under 9")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU: tiny shapes, nothing built")
    parser.add_argument("--out", default=os.environ.get("OUT") or str(ROOT / "build" / "gpu"), help="default: $OUT")
    parser.add_argument("--only", action="append", choices=operations(), help="benchmark this operation; may be repeated")
    parser.add_argument("--stage", action="append", choices=STAGES, help="run this stage; may be repeated; default: all")
    given = parser.parse_args(arguments)
    mode = "dry-run" if given.dry_run else "quick" if given.quick else "full"
    out = Path(given.out).resolve()
    with tempfile.TemporaryDirectory(prefix="fastcap-gpu-") as folder:
        home = Path(folder)
        (home / "fastcap").symlink_to(ROOT / "fastcap", target_is_directory=True)
        probe = probe_torch(home)
        if mode != "dry-run" and not probe.get("gpu"):
            seen = probe.get("error") or f"none that torch {probe['torch']} sees"
            print(
                f"fastcap.gpu: device must be a CUDA GPU, got {seen}; run on a machine with one, or pass --dry-run",
                file=sys.stderr,
            )
            return 2
        out.mkdir(parents=True, exist_ok=True)
        for old in [out / "gpu.json", out / "gpu.log", *out.glob("*_time.png"), *out.glob("*_memory.png")]:
            old.unlink(missing_ok=True)
        run = Run(mode, out, home, arguments=sys.argv[1:] if arguments is None else arguments)
        run.say(f"{probe.get('gpu') or 'no GPU: a dry run'}; torch {probe.get('torch')}, Python {probe.get('python')}")
        chosen = [name for name in STAGES if name in (given.stage or STAGES)]
        stages = {
            "build": lambda: build(run, probe.get("arch")),
            "inventory": lambda: take_inventory(run),
            "tests": lambda: test(run, last=chosen[-1] == "tests"),
            "sanitize": lambda: sanitize(run, last=chosen[-1] == "sanitize"),
            "bench": lambda: bench(run, given.only or operations()),
        }
        try:
            for name in chosen:
                stages[name]()
        finally:
            finish(run, probe)
    return int(any(not stage.result.startswith(("ok", "left out")) for stage in run.stages))


if __name__ == "__main__":
    sys.exit(main())
