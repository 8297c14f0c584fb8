"""Our GPU kernels under NVIDIA's compute-sanitizer: `python -m fastcap.benchmarks.sanitize [TOOL ...]`.

Every operation's example calls (fastcap.testing), forward and backward, by each backend of a GPU, on tensors that torch
allocates one by one, so that a read past an end is outside of any. memcheck finds accesses out of bounds or misaligned,
racecheck hazards in shared memory, initcheck reads of memory that nothing wrote, synccheck barriers that not all reach.
What they find in torch's own kernels is told apart, and is no failure. The calls take turns between the operations: however
few fit into --seconds, all operations are among them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import fastcap
from fastcap.errors import FastcapError, bad

OP = "bench.sanitize"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("triton", "cuda")
DONE = "fastcap calls:"  # before their number, in what the sanitized process prints


class Found(NamedTuple):
    """What a tool found: errors by kernel, ours and others', and how many calls it watched. `calls` is None where the
    process did not reach its end."""

    ours: Counter
    others: Counter
    calls: int | None

    def __str__(self) -> str:
        if self.calls is None:
            return "the process did not reach its end"
        named = ", ".join(f"{name} {count}" for name, count in self.ours.most_common())
        text = f"{self.calls} calls, " + (f"errors in {named}" if self.ours else "no error")
        return text + (f"; {self.others.total()} in kernels that are not ours" if self.others else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcap.benchmarks.sanitize", description=__doc__)
    parser.add_argument("tools", nargs="*", help=f"default: {' '.join(TOOLS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each tool, after which no call is begun")
    parser.add_argument("--calls-only", action="store_true", help="make the calls, in this process, and watch nothing")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        for tool in given.tools:
            if tool not in TOOLS:
                raise bad(OP, "tools", f"be among {', '.join(TOOLS)}", tool, "leave them out for all")
        if not 0 < given.seconds < 86_400:
            raise bad(OP, "seconds", "lie in (0, 86400)", given.seconds, "pass 60")
        if given.device == "cuda" and not torch.cuda.is_available():
            raise bad(OP, "device", "be a CUDA GPU that torch sees", None, "run on a machine with one")
        if given.calls_only:
            print(DONE, make_calls(given.device, time.time() + given.seconds), flush=True)
            return 0
        program = find_sanitizer()
    except FastcapError as error:
        print(error, file=sys.stderr)
        return 2
    failed = False
    for tool in given.tools or TOOLS:
        found = run(program, tool, given.seconds)
        failed |= bool(found.ours) or not found.calls
        print(f"{tool}: {found}", flush=True)
    return int(failed)


def find_sanitizer() -> str:
    """The program; raises where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(home) / "bin"))
    if found is None:
        raise bad(OP, "compute-sanitizer", "be on the path", None, "install it with the CUDA toolkit")
    return found


def run(program: str, tool: str, seconds: float) -> Found:
    """The calls under one tool. What it says of errors is printed."""
    command = [program, "--tool", tool, "--print-limit", "1000", "--error-exitcode", "0"]
    command += [sys.executable, "-m", "fastcap.benchmarks.sanitize", "--calls-only", "--seconds", f"{seconds:g}"]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or a block would end where torch's pool ends
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    found = parse(done.stdout, our_kernels())
    if found.ours or found.calls is None:
        print("\n".join(done.stdout.splitlines()[-200:]), flush=True)
    return found


def parse(output: str, ours: set[str]) -> Found:
    """What the tool's output says. An error that names no kernel counts as ours."""
    mine, others = Counter(), Counter()
    for block in re.split(r"(?m)^(?=={9} \S)", output):
        head = block.split("\n", 1)[0]
        if not re.match(r"========= (?:Invalid|Uninitialized|Misaligned|Barrier|Program hit|Error:|Race reported)", head):
            continue
        places = re.findall(r"\bat ([^\n]+?)\+0x[0-9a-f]+", block)
        names = [re.sub(r"\(.*", "", place).removeprefix("void ").strip() for place in places]
        name = names[0] if names else head.removeprefix("========= ")
        is_ours = not names or any(n in ours or "fastcap::" in n for n in names)
        (mine if is_ours else others)[name] += 1
    calls = re.search(rf"{DONE} (\d+)", output)
    return Found(mine, others, int(calls.group(1)) if calls else None)


def our_kernels() -> set[str]:
    """The names of our Triton kernels."""
    import importlib
    import pkgutil

    import triton

    from fastcap import kernels

    modules = [
        importlib.import_module(f"fastcap.kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)
    ]
    return {x.fn.__name__ for module in modules for x in vars(module).values() if isinstance(x, triton.runtime.JITFunction)}


def make_calls(device: str, until: float) -> int:
    """Example calls of all operations in turn, until a time; how many. Raises where a result is not the reference's."""
    from fastcap import testing

    count = 0
    for operation, case, dtype, backend in _turns(device):
        if time.time() > until:
            break
        got = testing.evaluate(operation, case.to(dtype, device), backend)
        plain = testing.evaluate(operation, case.to(dtype, device), "reference")
        exact = testing.evaluate(operation, case.to(dtype, device, keep=torch.float64), "reference")
        for results, size in ((0, case.size), (1, 0.0)):  # outputs, then gradients
            for ours, wanted, rounded in zip(got[results], exact[results], plain[results], strict=True):
                testing.assert_close_to_float64(ours, wanted, rounded, f"{case.name} by {backend} in {dtype}", size)
        count += 1
    return count


def _turns(device: str) -> Iterator[tuple]:
    """(operation, case, dtype, backend), an operation after another."""
    from fastcap import testing

    statuses = fastcap.backends()
    backends = [name for name in BACKENDS if statuses[name]]
    queues = [
        [
            (op, case, dtype, backend)
            for dtype in DTYPES
            for case in op.cases()
            for backend in backends
            if backend in op.backends
        ]
        for op in testing.OPERATIONS.values()
    ]
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                yield queue[turn]


if __name__ == "__main__":
    sys.exit(main())
