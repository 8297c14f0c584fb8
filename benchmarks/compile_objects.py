"""Compiles one program for one target and says what came out, as a dict that JSON holds. Results are kept beside Triton's.

A result is found again by the code of the kernel, its specialisation, the target, the compiler's version and the code of the
modules that read machine code: change one of these, and it is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastcap.benchmarks import compile_plans, disassembly, occupancy
from fastcap.benchmarks.compile_plans import TARGETS
from fastcap.benchmarks.disassembly import OP, Instructions, Resources

from fastcap.errors import bad

ROOT = Path(__file__).resolve().parent.parent
CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
NVCC_OPTIONS = ("-O3", "-std=c++17")
# The warps of a block of each CUDA kernel, as its launcher says; its other kernels have WARPS.
CUDA_WARPS = {"reduce_kernel": 32}
WARPS = 8


class Task(NamedTuple):
    """Something to compile: what it is called, by what its result is found again, and how to make that."""

    name: str
    key: str
    make: Callable[[], Any]

    def path(self) -> Path:
        return store() / f"{hashlib.sha256(self.key.encode()).hexdigest()}.json"

    def kept(self) -> Any:
        """The result of an earlier run, or None."""
        try:
            return json.loads(self.path().read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None

    def run(self) -> Any:
        """The result, made and kept."""
        result = self.make()
        text = json.dumps(result)
        path = self.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)  # another process may write the same
        return json.loads(text)


def store() -> Path:
    """The folder of kept results: below Triton's cache, so that TRITON_CACHE_DIR moves both."""
    given = os.environ.get("TRITON_CACHE_DIR")
    return (Path(given) if given else Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton" / "cache") / "fastcap"


@cache
def _readers() -> str:
    """A hash of the code that reads machine code."""
    parts = [Path(module.__file__).read_bytes() for module in (disassembly, occupancy)] + [Path(__file__).read_bytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


# Triton ----------------------------------------------------------------------------------------------------------------


def triton_task(launch, target: str) -> Task:
    """A launch's program, for a target."""
    import triton

    words = (triton.__version__, target, launch.kernel.cache_key, compile_plans.specialisation(launch), _readers())
    return Task(compile_plans.identity(launch), "\n".join(words), lambda: compile_triton(launch, target))


def compile_triton(launch, target: str) -> dict[str, Any]:
    """What a launch's program is on a target."""
    from fastcap.kernels._common import compile_for

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION.*")
        compiled = compile_for(launch, *TARGETS[target])
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            [used] = disassembly.resources_of_cubin(cubin).values()
            [code] = disassembly.code_of_cubin(cubin).values()
        found = disassembly.parse_sass(code)
    else:
        used, found = disassembly.parse_amdgcn(compiled.asm["amdgcn"])
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0  # of tensor memory, from sm_100 on
    result = described(target, used, found, shared, launch.num_warps, columns)
    result["dots"] = dots(compiled.asm["ttir"])
    result["accesses"] = disassembly.accesses(compiled.asm["llir"], compile_plans.pointers(launch))
    return result


_DOT = re.compile(
    r"\btt\.dot (?:[^:\n]*?inputPrecision = (\w+))?[^:\n]*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>"
)


def dots(ttir: str) -> list[list]:
    """[rows, columns, depth, type of the factors, precision] of each product of tiles in Triton's code."""
    found = {(int(m), int(n), int(k), of, precision or "ieee") for precision, m, k, of, n in _DOT.findall(ttir)}
    return [list(dot) for dot in sorted(found)]


def described(
    target: str, used: Resources, found: Instructions, dynamic: int, warps: int, columns: int = 0
) -> dict[str, Any]:
    """The numbers of a program; dynamic: bytes of shared memory that come with the launch."""
    # from sm_90 on, objects count what a block takes besides its own as the kernel's
    reserved = occupancy.ARCHITECTURES[target].reserved if target != "sm_80" else 0
    shared = max(0, used.shared - reserved) + dynamic
    held = occupancy.occupancy(target, used, shared, warps, columns)
    result = {
        "registers": used.registers, "spill": used.spill, "stack": used.stack, "shared": shared, "block": warps,
        "warps": held.warps, "most": held.most, "limit": held.limit,
    }  # fmt: skip
    if columns:
        result["columns"] = columns
    if target.startswith("gfx"):
        result |= {"accumulators": used.accumulators, "scalars": used.scalars}
    each = found._asdict()
    return result | {name: value for name, value in each.items() if value or name in ("loads", "stores")}


# CUDA ------------------------------------------------------------------------------------------------------------------


def cuda_tasks(operations: Sequence[str], targets: Sequence[str]) -> list[tuple[str, str, Task]]:
    """(operation, target, task) of each CUDA source; raises ToolMissing without an nvcc that runs."""
    sources = {name: ROOT / "csrc" / name / f"{name}_cuda.cu" for name in operations}
    sources = {name: source for name, source in sources.items() if source.is_file()}
    targets = [target for target in targets if target in CUDA_TARGETS]
    if not sources or not targets:
        return []
    nvcc = disassembly.find_nvcc()
    version = disassembly.version_of(nvcc)
    found = []
    for name, source in sources.items():
        files = sorted([*source.parent.glob("*"), *(ROOT / "csrc" / "common").glob("*")])
        code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        for target in targets:
            key = "\n".join((version, target, " ".join(NVCC_OPTIONS), code, _readers()))
            make = lambda source=source, target=target: compile_cuda(nvcc, source, target)  # noqa: E731
            found.append((name, target, Task(f"{name}_cuda.cu", key, make)))
    return found


def compile_cuda(nvcc: str, source: Path, target: str) -> dict[str, dict[str, Any]]:
    """What the kernels of a CUDA source are on a target, by a name that says their template's arguments."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        disassembly.output_of(nvcc, *NVCC_OPTIONS, f"-arch={target}", "-cubin", source, "-o", cubin)
        resources, code = disassembly.resources_of_cubin(cubin), disassembly.code_of_cubin(cubin)
    result = {}
    for mangled, used in resources.items():
        name = template_name(mangled)
        if name in result:
            raise bad(OP, source.name, "have kernels that differ in name or template arguments", name, "rename one")
        warps = CUDA_WARPS.get(name.partition("<")[0], WARPS)
        result[name] = described(target, used, disassembly.parse_sass(code[mangled]), 0, warps)
    return dict(sorted(result.items()))


_BUILTIN = {"f": "float", "d": "double", "b": "bool", "i": "int", "l": "long", "x": "long long"}


def template_name(mangled: str) -> str:
    """forward_kernel<float, 4>, of the name that the compiler gives it. The namespace is left out, for it holds a hash of
    the file's place: so the name is the same on every machine."""
    name, rest = _kernel_in(mangled)
    if not rest.startswith("I"):
        return name
    rest, words = rest[1:], []
    while rest and not rest.startswith("E"):
        number, named = re.match(r"L[a-z](\d+)E", rest), re.match(r"\d+", rest)
        if number:
            words.append(number.group(1))
            rest = rest[number.end() :]
        elif named:
            end = named.end() + int(named.group())
            words.append(rest[named.end() : end].lstrip("_"))
            rest = rest[end:]
        else:
            words.append(_BUILTIN.get(rest[0], rest[0]))
            rest = rest[1:]
    return f"{name}<{', '.join(words)}>"


def _kernel_in(mangled: str) -> tuple[str, str]:
    """(the kernel's name, what follows it): a name comes behind its length, which other digits may come before."""
    for digits in re.finditer(r"\d+", mangled):
        for begin in range(len(digits.group())):
            end = digits.end() + int(digits.group()[begin:])
            name = mangled[digits.end() : end]
            if re.fullmatch(r"[a-z]\w*_kernel", name):
                return name, mangled[end:]
    return mangled, ""
