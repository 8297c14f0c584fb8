"""What is asked of a compiled kernel, and when a number is worse than the committed one. Excuses: compile_excuses.py.

Widths: where a tensor's layout allows 16 bytes a load or store, the widest access that its kernel has to it must be of 16
bytes. A layout allows it where elements lie side by side along one dimension, of a whole number of 16 bytes, and all other
strides are whole numbers of 16 bytes. Judged is a tensor that is a tenth or more of the bytes that its launch moves. It is
the widest that is judged, for a tail needs a path of its own; means are compared with the committed ones besides.

Bytes: of a launch, those of each tensor that the code loads from, and of each that it stores to (both, and for an atomic
too: twice), each element once however often it is read: what caches cannot save. Of a case, the sum over its launches. It
is neither measured nor a model of caches: reading tiles again from L2 is not in it, nor is a sector of which one number is
used. Where the data say what is read, GATHERED counts as the floor does. Products, fills and copies by torch are not in it;
so it is set against the floor only where the launches are all that a case does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from fastcap.benchmarks import floors
from fastcap.benchmarks.compile_excuses import KNOWN, NARROW, NARROW_CUDA, Known
from fastcap.benchmarks.compile_plans import Planned

WIDE = 128  # bits
SHARE = 0.1  # of a launch's bytes, from which a tensor is judged
WORSE = 1.1  # a number may be this many times the committed one


class Failure(NamedTuple):
    """A rule that is broken: by what, and how."""

    rule: str  # "spill", "tensor cores", "narrow", "worse"
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.what}"


def known(failure: Failure) -> Known | None:
    """The entry of KNOWN that a failure is."""
    target, _, rest = failure.where.partition(" ")
    for entry in KNOWN:
        if (
            entry.rule == failure.rule
            and re.search(rf"(?<!\w){re.escape(entry.kernel)}(?!\w)", rest)
            and re.search(entry.what, failure.what)
            and (not entry.targets or target in entry.targets)
        ):
            return entry
    return None


# Bytes -----------------------------------------------------------------------------------------------------------------


def _gathered_logits(x: torch.Tensor, of: Planned) -> int:
    """Rows that are read whole, and a sector for each logit that is gathered from the others."""
    counts, sector = of.counts, floors.SECTOR["cuda"]
    gathers = 0 if of.rows == "all" else counts.pairs - (counts.distinct if of.rows == "first" else 0)
    return _dense_rows(x, of) + gathers * sector


def _dense_rows(x: torch.Tensor, of: Planned) -> int:
    rows = {"none": 0, "first": of.counts.captions, "all": of.counts.valid}[of.rows]
    return rows * x.shape[-1] * x.element_size()


def _candidates(x: torch.Tensor, of: Planned) -> int:
    """A sector for each, to which is added what is written last."""
    return of.counts.pairs * floors.SECTOR["cuda"]


def _used_words(x: torch.Tensor, of: Planned) -> int:
    return of.counts.words * x.shape[-1] * x.element_size()


# (kernel, argument, kind) -> bytes of it that are touched once, where the targets say which.
GATHERED: dict[tuple[str, str, str], Callable[[torch.Tensor, Planned], int]] = {
    ("_subset_cross_entropy_fwd_kernel", "input_ptr", "load"): _gathered_logits,
    ("_subset_cross_entropy_bwd_kernel", "input_ptr", "load"): _dense_rows,
    ("_subset_cross_entropy_bwd_kernel", "dinput_ptr", "load"): _candidates,
    ("_caption_fwd_kernel", "head_ptr", "load"): _used_words,
    ("_caption_bwd_kernel", "head_ptr", "load"): _used_words,
    ("_write_rows_kernel", "out_ptr", "load"): _used_words,
    ("_write_rows_kernel", "out_ptr", "store"): _used_words,
}


def bytes_of(tensor: torch.Tensor) -> int:
    """Of the elements that there are: a dimension that repeats them counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def argument_bytes(launch, accesses: dict[str, dict], of: Planned) -> dict[tuple[str, str], int]:
    """The bytes that a launch moves, by argument and kind of access."""
    moved = {}
    for name, kinds in accesses.items():
        tensor = launch.args[name]
        for kind in kinds:
            touched = GATHERED.get((launch.kernel.fn.__name__, name, kind)) if of.counts else None
            moved[name, kind] = touched(tensor, of) if touched else bytes_of(tensor) * (2 if kind == "atomic" else 1)
    return moved


# Rules -----------------------------------------------------------------------------------------------------------------


def allows_16_bytes(tensor: torch.Tensor) -> bool:
    """Whether its rows can be read or written by 16 bytes, wherever one begins."""
    item = tensor.element_size()
    steps = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and stride]
    rows = [size for size, stride in steps if stride == 1]
    if len(rows) != 1 or rows[0] * item % 16:
        return False
    return all(stride * item % 16 == 0 for _, stride in steps if stride != 1) and tensor.storage_offset() * item % 16 == 0


def check_widths(target: str, launch, result: dict[str, Any], of: Planned) -> Iterable[Failure]:
    """Arguments of a launch whose widest access is narrower than their layout allows."""
    kernel, moved = launch.kernel.fn.__name__, argument_bytes(launch, result["accesses"], of)
    for (name, kind), nbytes in moved.items():
        tensor, widest = launch.args[name], max(map(int, result["accesses"][name][kind]))
        if kind == "atomic" or widest >= WIDE or nbytes < SHARE * sum(moved.values()) or not allows_16_bytes(tensor):
            continue
        excuse = NARROW.get((kernel, name, kind))
        if excuse and (not excuse.when or excuse.when(of)) and (not excuse.targets or target in excuse.targets):
            continue
        shape = " x ".join(map(str, tensor.shape))
        what = f"{name} [{shape}] {str(tensor.dtype)[6:]}: {kind}s of at most {widest} bits"
        yield Failure("narrow", f"{target} {of.operation} {kernel}", f"{what} ({of.name})")


def check_cuda_widths(target: str, operation: str, kernel: str, result: dict[str, Any]) -> Iterable[Failure]:
    """CUDA kernels without a single access of 16 bytes."""
    if (operation, kernel) not in NARROW_CUDA and (operation, kernel.partition("<")[0]) not in NARROW_CUDA:
        widest = max([*map(int, result["loads"]), *map(int, result["stores"])], default=0)
        if widest < WIDE:
            yield Failure("narrow", f"{target} {operation} {kernel}", f"loads and stores of at most {widest} bits")


def check_program(target: str, where: str, result: dict[str, Any]) -> Iterable[Failure]:
    """Spills, and products without tensor cores where their factors are of a type that these take."""
    if result["spill"] or result.get("spills"):
        what = f"{result['spill']} bytes a thread, {result.get('spills', 0)} instructions, {result['registers']} registers"
        yield Failure("spill", f"{target} {where}", what)
    for rows, columns, depth, of, precision in result.get("dots", ()):
        if of in ("f32", "f64") and precision == "ieee":
            continue  # full precision, which tensor cores do not have for float32
        family = expected_family(target, rows, result["block"])
        if not any(name.startswith(family) for name in result.get("tensor", ())):
            has = ", ".join(result.get("tensor", ())) or "none"
            what = f"a product of {rows} x {columns} x {depth} {of} ({precision}) wants {family[0]}, and has {has}"
            yield Failure("tensor cores", f"{target} {where}", what)


def expected_family(target: str, rows: int, warps: int) -> tuple[str, ...]:
    """Names of tensor-core instructions, one of which a product must have. The asynchronous ones work on 64 rows at a time,
    by four warps together; a product of fewer goes to those of Ampere on every later GPU."""
    if target.startswith("gfx"):
        return ("mfma",)
    whole = rows >= 64 and warps % 4 == 0
    return {"sm_90": ("HGMMA",), "sm_100": ("UTC",)}.get(target, ("HMMA",)) if whole else ("HMMA",)


# Comparison ------------------------------------------------------------------------------------------------------------


def mean_width(counts: dict[Any, int]) -> float:
    """Bits of an access, on average over the instructions; 0 for none."""
    total = sum(counts.values())
    return sum(int(bits) * n for bits, n in counts.items()) / total if total else 0.0


def numbers(result: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    """What is compared of a program: name -> (value, whether more is better)."""
    return {
        "registers": (result["registers"], False),
        "bytes of shared memory": (result["shared"], False),
        "resident warps": (result["warps"], True),
        "bits a load": (mean_width(result["loads"]), True),
        "bits a store": (mean_width(result["stores"]), True),
    }


def compare_programs(where: str, now: dict[str, Any], before: dict[str, Any]) -> Iterable[Failure]:
    """What is more than a tenth worse, and tensor-core instructions that are gone."""
    committed = numbers(before)
    for name, (value, more) in numbers(now).items():
        yield from compare(where, name, value, committed[name][0], more)
    for family in before.get("tensor", {}):
        if family not in now.get("tensor", {}):
            yield Failure("worse", where, f"no {family} any more")


def compare(where: str, name: str, value: float, before: float, more: bool) -> Iterable[Failure]:
    """Whether one number is more than a tenth worse."""
    if (before > WORSE * value) if more else (value > WORSE * before):
        yield Failure("worse", where, f"{name}: {value:,.6g}, committed {before:,.6g}")
