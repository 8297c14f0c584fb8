"""What a compiled kernel holds: registers, spills, tensor-core instructions, and the width of each access to global memory.

Read off the machine code: of NVIDIA's by cuobjdump and nvdisasm, which come with triton, of AMD's off the assembly that
triton keeps. LLVM's intermediate code tells which argument an access goes to, which machine code no longer does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fastcap.errors import FastcapError, bad

OP = "compile_report"


class ToolMissing(FastcapError):
    """A compiler or disassembler is not on this machine; the message says where it was looked for."""


class Resources(NamedTuple):
    """What a kernel takes of a processor. Bytes of `stack` and `local` are a thread's, of `shared` a block's."""

    registers: int  # a thread's; AMD: of both kinds, as they are allotted
    stack: int = 0
    local: int = 0
    shared: int = 0
    accumulators: int = 0  # AMD: those of the registers that are AGPRs
    scalars: int = 0  # AMD: a wave's
    spilled: int = 0  # AMD: registers

    @property
    def spill(self) -> int:
        """Bytes of memory that stand in for registers."""
        return max(self.stack, self.local, 4 * self.spilled)


class Instructions(NamedTuple):
    """Counts in the code, by name or by width in bits; a loop's body counts once."""

    tensor: dict[str, int]
    loads: dict[int, int]  # from global memory, those that copy to shared memory among them
    stores: dict[int, int]
    copies: int  # of the loads, those that go to shared memory: LDGSTS, cp.async
    bulk: int  # TMA's, which have no width
    atomics: int
    spills: int  # loads and stores of local memory


# Tools -----------------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm: triton's own, else that on the path, else the toolkit's."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    for place in (own, shutil.which(name), _toolkit() / name):
        if place and Path(place).is_file():
            return str(place)
    raise ToolMissing(f"{name} is neither in triton nor on the path nor in {_toolkit()}")


def find_nvcc() -> str:
    """The path of an nvcc that runs."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(_toolkit()))
    if found is None:
        raise ToolMissing(f"nvcc is neither on the path nor in {_toolkit()}")
    probe = subprocess.run([found, "--version"], capture_output=True, text=True)
    if probe.returncode != 0:
        raise ToolMissing(f"nvcc does not run: {probe.stderr.strip()[-200:]}")
    return found


def version_of(command: str) -> str:
    """What a tool of NVIDIA's says of its release."""
    said = output_of(command, "--version")
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said) or re.search(r"release (\d+\.\d+)", said)
    return found.group(1) if found else said.strip().splitlines()[-1]


def _toolkit() -> Path:
    return Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"


def output_of(*command: object) -> str:
    """What a command prints; raises with what it says where it fails."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip()[-2000:]
        raise bad(OP, Path(words[0]).name, "succeed", f"status {result.returncode}", said or " ".join(words))
    return result.stdout


# NVIDIA ----------------------------------------------------------------------------------------------------------------

_USAGE = re.compile(r"Function (\S+?):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[\w:]+)*)", re.MULTILINE)
_NARROW = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_BULK = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED")


def resources_of_cubin(cubin: Path) -> dict[str, Resources]:
    """Of each kernel in an object. Local memory is what spills, and the stack of calls with it."""
    return parse_usage(output_of(tool("cuobjdump"), "-res-usage", cubin))


def parse_usage(text: str) -> dict[str, Resources]:
    """What `cuobjdump -res-usage` prints, by kernel."""
    found = {}
    for name, registers, stack, shared, local in _USAGE.findall(text):
        found[name] = Resources(int(registers), int(stack), int(local), int(shared))
    if not found:
        raise bad(OP, "cuobjdump", "name a kernel", text[:200], "check that the object holds one")
    return found


def code_of_cubin(cubin: Path) -> dict[str, str]:
    """The disassembly of each kernel in an object."""
    text = output_of(tool("nvdisasm"), "-c", cubin)
    parts = re.split(r"^\s*//-+ \.text\.(\S+)\s+-+.*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parse_sass(text: str) -> Instructions:
    """Counts in NVIDIA's machine code."""
    tensor, loads, stores, one = Counter(), Counter(), Counter(), Counter()
    for name, modifiers in _SASS.findall(text):
        words = modifiers.split(".")
        width = next((_NARROW[word] for word in words if word in _NARROW), 32)
        if name.endswith("MMA"):
            tensor[name] += 1
        elif name in ("LDG", "LD", "LDGSTS"):
            loads[width] += 1
            one["copies"] += name == "LDGSTS"
        elif name in ("STG", "ST"):
            stores[width] += 1
        elif name in ("LDL", "STL"):
            one["spills"] += 1
        elif name in _BULK:
            one["bulk"] += 1
        elif name in ("ATOMG", "ATOM", "RED", "REDG"):
            one["atomics"] += 1
    return _counted(tensor, loads, stores, one)


def _counted(tensor: Counter, loads: Counter, stores: Counter, one: Counter) -> Instructions:
    kinds = (dict(sorted(found.items())) for found in (tensor, loads, stores))
    return Instructions(*kinds, one["copies"], one["bulk"], one["atomics"], one["spills"])


# AMD -------------------------------------------------------------------------------------------------------------------

_GCN = re.compile(r"^\s+((?:global|buffer|flat|scratch)_(?:load|store|atomic)\w*|v_s?mfmac?_\w+)([^;\n]*)", re.MULTILINE)
_GCN_WIDTHS = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16, "dword": 32, "format": 32}


def parse_amdgcn(text: str) -> tuple[Resources, Instructions]:
    """What the assembly of one kernel says and holds. Scalar loads, of arguments and what all lanes share, do not count."""

    def said(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise bad(OP, "amdgcn", f"say its .{name}", text[:100], "use a version of triton that is supported")
        return int(found.group(1))

    names = ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size", "agpr_count", "sgpr_count")
    registers, stack, shared, accumulators, scalars = map(said, names)
    used = Resources(registers, stack, 0, shared, accumulators, scalars, said("vgpr_spill_count"))
    tensor, loads, stores, one = Counter(), Counter(), Counter(), Counter()
    for name, rest in _GCN.findall(text):
        kind = name.split("_")[1]
        if name.startswith("v_"):
            tensor["mfma"] += 1
        elif name.startswith("scratch"):
            one["spills"] += 1
        elif kind == "atomic":
            one["atomics"] += 1
        elif kind == "load":
            loads[_gcn_width(name)] += 1
            one["copies"] += bool(re.search(r"\blds\b", rest) or "_lds_" in name)
        else:
            stores[_gcn_width(name)] += 1
    return used, _counted(tensor, loads, stores, one)


def _gcn_width(name: str) -> int:
    words = name.split("_")
    for word in words[2:]:
        by, _, times = word.partition("x")
        if by in _GCN_WIDTHS:
            return _GCN_WIDTHS[by] * int(times or 1)
        if re.fullmatch(r"b\d+", word):
            return int(word[1:])
    raise bad(OP, "amdgcn", "hold known loads and stores", name, "teach benchmarks/disassembly.py its width")


# LLVM's code -----------------------------------------------------------------------------------------------------------

_POINTER = re.compile(r"ptr(?: addrspace\([18]\))(?: (?!null)[a-z]\w*(?:\([^)]*\))?)* (%[\w.]+)")
_ASM_ACCESS = re.compile(r"(?<![A-Za-z_.])(ld|st|red|atom)\.(?:[\w:]+\.)*?global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_ASM_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)")
_INTRINSIC_COPY = re.compile(r"@llvm\.nvvm\.cp\.async\.c[ag]\.shared\.global\.(\d+)")
_BUFFER = re.compile(
    r"@llvm\.(?:amdgcn\.raw\.ptr\.buffer|masked)\.(load|store|atomic)[\w.]*?\.(?:v(\d+))?(?:i|f|bf)(\d+)[.(]"
)
_PLAIN = re.compile(
    r"(?:^|= )(?:tail )?(load|store)(?: volatile| atomic)* (?:<(\d+) x )?(i\d+|float|double|half|bfloat|ptr)"
)
_BITS = {"float": 32, "double": 64, "half": 16, "bfloat": 16, "ptr": 64}


def accesses(llir: str, arguments: list[str]) -> dict[str, dict[str, dict[int, int]]]:
    """Of each pointer argument, what kinds of access go to it ("load", "store", "atomic"), by width in bits.

    arguments: the names of the kernel's pointer arguments, in order. An access is followed back to the argument that its
    address comes from, through what LLVM does to pointers; numbers that were loaded are no part of an address's origin.
    """
    head, _, body = llir[llir.index("define ") :].partition("\n")
    roots = dict(zip(re.findall(r"ptr addrspace\(1\)[^%]*?(%\w+)", head), arguments, strict=False))
    sources: dict[str, list[str]] = {}
    found: dict[str, dict[str, Counter]] = {}
    touched: list[tuple[str, int, str]] = []
    for line in body.split("\n}", 1)[0].splitlines():
        access = _access(line)
        if access is not None:
            kind, bits, address = access
            touched.append((kind, bits, address))
        elif "ptr" in line and " = " in line:
            name, _, value = line.strip().partition(" = ")
            sources[name] = _operands(value)
    for kind, bits, address in touched:
        for argument in _origins(address, sources, roots):
            counts = found.setdefault(argument, {}).setdefault(kind, Counter())
            counts[bits] += 1
    return {name: {kind: dict(sorted(n.items())) for kind, n in kinds.items()} for name, kinds in found.items()}


def _operands(value: str) -> list[str]:
    if value.startswith("phi ptr addrspace"):
        return re.findall(r"\[ (%[\w.]+),", value)
    return _POINTER.findall(value)


def _access(line: str) -> tuple[str, int, str] | None:
    """(kind, bits, address) of a line that reads or writes global memory."""
    pointers = _POINTER.findall(line)
    if not pointers:
        return None
    if " asm " in line:
        copy = _ASM_COPY.search(line)
        if copy:
            return "load", 8 * int(copy.group(1), 16), pointers[-1]
        access = _ASM_ACCESS.search(line)
        if access:
            kind = {"ld": "load", "st": "store"}.get(access.group(1), "atomic")
            return kind, int(access.group(2) or 1) * int(access.group(3)), pointers[-1]
        return None
    copy, buffer = _INTRINSIC_COPY.search(line), _BUFFER.search(line)
    if copy:
        return "load", 8 * int(copy.group(1)), pointers[-1]
    if buffer:
        return buffer.group(1), int(buffer.group(2) or 1) * int(buffer.group(3)), pointers[-1]
    if " atomicrmw " in line or " cmpxchg " in line or line.lstrip().startswith(("atomicrmw", "cmpxchg")):
        return "atomic", int((re.search(r", i(\d+) ", line) or [0, 32])[1]), pointers[0]
    plain = _PLAIN.search(line.strip())
    if plain:
        kind, times, of = plain.groups()
        return kind, int(times or 1) * (_BITS.get(of) or int(of[1:])), pointers[-1]
    return None


def _origins(address: str, sources: dict[str, list[str]], roots: dict[str, str]) -> list[str]:
    """The arguments that an address may come from: usually one."""
    seen, ahead, found = set(), [address], []
    while ahead:
        name = ahead.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in roots:
            found.append(roots[name])
        ahead += sources.get(name, [])
    return sorted(found)
