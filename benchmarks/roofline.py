"""What our operations should take on an H200: a model of each, from shapes and options.

The work of a call (launches, bytes, FLOPs) is what trace.py writes down of the code as it stands; the time of a launch is
the largest of three: its bytes at the rate of a copy, its FLOPs at the rate of the unit that does them, and what any launch
takes. So the prediction is what the plan costs on a perfect GPU: the floor of our own design, where benchmarks/floors.py has
the operation's.

`python -m fastcap.benchmarks.roofline` prints the predictions of all benchmarks on a GPU, and needs none; results that were
measured on one have them beside them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from fastcap.benchmarks import captions, harness, report
from fastcap.benchmarks.plain import MODES, VARIANTS
from fastcap.benchmarks.trace import Batch, Work, tensors_of, trace
from torch import Tensor

from fastcap import functional as F_cap
from fastcap.errors import FastcapError, bad

OP = "bench.roofline"
FORWARD, BACKWARD = MODES
OPERATIONS = (
    "subset_cross_entropy", "linear_subset_cross_entropy", "attention_coverage", "attention_coverage_from_scores",
    "additive_attention", "contrastive_reward", "retrieval_ranks",
)  # fmt: skip


class Machine(NamedTuple):
    """Rates a second; FLOPs by what multiplies."""

    name: str
    bytes: float
    flops: dict[str, float]
    launch: float  # seconds from one launch to the next, at least


# 4.3 TB/s of a copy and 790 TFLOP/s of bf16 were measured on one. The others are leads: tf32 does half of what bf16 does by
# the datasheet, whose 67 TFLOP/s of float32 (and as much of float64 by tensor cores) are taken at the same 80%.
H200 = Machine("NVIDIA H200", 4.3e12, {"half": 790e12, "tf32": 395e12, "float32": 53e12, "float64": 53e12}, 2e-6)


def seconds(work: Work, machine: Machine = H200) -> float:
    """Of one launch: its bytes, its FLOPs, or that it is one."""
    return max(machine.launch, work.bytes / machine.bytes, work.flops / machine.flops[work.unit])


def predict(work: Sequence[Work], machine: Machine = H200) -> float:
    """Seconds of all, one after another."""
    return sum(seconds(one, machine) for one in work)


# Calls of the benchmarks -----------------------------------------------------------------------------------------------


def work_of(operation: str, shape: str, dtype: str, variant: str, mode: str, form: str = "") -> list[Work]:
    """The work of what a benchmark times as ours.

    Args:
        operation: one of OPERATIONS. shape, variant, mode: as its benchmark names them. dtype: "fp32", "bf16", ...
        form: what follows the backend in a provider's name: "-sparse", "-0", ...

    Raises:
        FastcapError: there is no such operation, shape, dtype, variant or mode.
    """
    bench = _bench(operation)
    known = {"shape": bench.SHAPES, "dtype": harness.DTYPES, "mode": MODES, "form": forms(operation)}
    for name, value in (("shape", shape), ("dtype", dtype), ("mode", mode), ("form", form)):
        if value not in known[name]:
            raise bad(OP, name, f"be one of {', '.join(known[name])}", value, f"see bench_{operation}.py")
    return list(_work_of(operation, shape, dtype, variant, mode == BACKWARD, form))


def forms(operation: str) -> tuple[str, ...]:
    """What may follow the backend in the name of one of ours."""
    if operation == "linear_subset_cross_entropy":
        return tuple(_bench(operation).FORMS)
    return ("", "-high") if operation == "contrastive_reward" else ("",)


def _bench(operation: str) -> Any:
    if operation not in OPERATIONS:
        raise bad(OP, "operation", f"be one of {', '.join(OPERATIONS)}", operation, "the others run on a CPU alone")
    return importlib.import_module(f"fastcap.benchmarks.bench_{operation}")


@functools.cache
def _work_of(operation: str, shape: str, dtype: str, variant: str, backward: bool, form: str) -> tuple[Work, ...]:
    call, inputs, batch = _CALLS[operation](_bench(operation).SHAPES[shape], harness.DTYPES[dtype], variant, form)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            given = [x.requires_grad_(backward) for x in inputs]
            outputs = tensors_of(call(*given))
            if not backward:
                return
            upstream = [x.detach() for x in outputs]  # some gradient of their size, which is there
            if form == "-accumulate":
                given[1].grad = torch.empty_like(given[1])
                torch.autograd.backward(outputs, upstream)
            else:
                torch.autograd.grad(outputs, given, upstream)

    return tuple(trace(run, batch))


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _call_subset(shape: Any, dtype: torch.dtype, variant: str, form: str):
    B, T, V, padded = shape
    target = captions.draw_targets(B, T, V, padded=padded)
    options = VARIANTS[variant]
    call = functools.partial(F_cap.subset_cross_entropy, target=target.to("meta"), **options)
    return call, [_empty(B, T, V, dtype=dtype)], Batch.of(target, variant)


def _call_linear(shape: Any, dtype: torch.dtype, variant: str, form: str):
    B, T, V, H, padded = shape
    target = captions.draw_targets(B, T, V, padded=padded)
    options = VARIANTS[variant] | _bench("linear_subset_cross_entropy").FORMS[form]
    call = functools.partial(F_cap.linear_subset_cross_entropy, target=target.to("meta"), **options)
    return call, [_empty(B, T, H, dtype=dtype), _empty(V, H, dtype=dtype)], Batch.of(target, variant)


def _call_coverage(shape: Any, dtype: torch.dtype, variant: str, form: str):
    B, heads, T, L = shape
    lengths, batch = _lengths(B, T, variant)
    alpha = _empty(B, heads, T, L, dtype=dtype) if heads else _empty(B, T, L, dtype=dtype)
    return functools.partial(F_cap.attention_coverage, lengths=lengths), [alpha], batch


def _call_from_scores(shape: Any, dtype: torch.dtype, variant: str, form: str):
    B, heads, T, L, E = shape
    lengths, batch = _lengths(B, T, variant)
    call = functools.partial(F_cap.attention_coverage_from_scores, lengths=lengths)
    return call, [_empty(B, heads, T, E, dtype=dtype), _empty(B, heads, L, E, dtype=dtype)], batch


def _lengths(B: int, T: int, variant: str) -> tuple[Tensor | None, Batch]:
    if variant != "lengths":
        return None, Batch(B * T, B * T)
    lengths = (captions.draw_targets(B, T, 9_490) != -100).sum(1)
    return lengths.to("meta"), Batch(B * T, int(lengths.sum()))


def _call_additive(shape: Any, dtype: torch.dtype, variant: str, form: str):
    B, L, A, D, T = shape
    T = T if variant == "caption" else 1

    def call(keys: Tensor, queries: Tensor, v: Tensor, values: Tensor):
        if T == 1:
            return F_cap.additive_attention(keys, queries[0], v, values)
        attend = F_cap.additive_attention_steps(keys, v, values, steps=T)
        return [attend(query) for query in queries.unbind(0)]

    return call, [_empty(*size, dtype=dtype) for size in ((B, L, A), (T, B, A), (A,), (B, L, D))], None


def _call_contrastive(shape: Any, dtype: torch.dtype, variant: str, form: str):
    P, Q, D, texts = shape
    positive = None if texts == 1 else _empty(P, dtype=torch.int64)

    precision = form.removeprefix("-") or "highest"

    def call(text: Tensor, image: Tensor):
        given = {"positive": positive, "precision": precision}
        if variant == "infonce":
            ways = "text_to_image", "image_to_text"
            return [F_cap.decoupled_contrastive_loss(text, image, direction=way, reduction="none", **given) for way in ways]
        function = F_cap.decoupled_contrastive_loss if torch.is_grad_enabled() else F_cap.contrastive_reward
        return function(text, image, **given)

    return call, [_empty(P, D, dtype=dtype), _empty(Q, D, dtype=dtype)], None


def _call_ranks(shape: Any, dtype: torch.dtype, variant: str, form: str):
    P, Q, D, texts = shape
    call = functools.partial(F_cap.retrieval_ranks, positive=_empty(P, dtype=torch.int64))
    return call, [_empty(P, D, dtype=dtype), _empty(Q, D, dtype=dtype)], None


_CALLS: dict[str, Callable] = dict(
    zip(
        OPERATIONS,
        (_call_subset, _call_linear, _call_coverage, _call_from_scores, _call_additive, _call_contrastive, _call_ranks),
        strict=True,
    )
)


# The command -----------------------------------------------------------------------------------------------------------


def rows(operations: Sequence[str]) -> list[list[str]]:
    """A line for each benchmark on a GPU: operation, shape, case, launches, bytes, FLOPs, time, and what most of it is."""
    settings = harness.Settings(profile="all", device="cuda")
    lines = []
    for operation in operations:
        for case in _bench(operation).cases(settings):
            work = work_of(operation, case.shape, case.dtype, case.variant, case.mode)
            total = predict(work)
            took = dict.fromkeys(("bytes", "FLOPs", "launches"), 0.0)
            for one in work:
                took[bound_of(one)] += seconds(one)
            lines.append(
                [
                    operation, f"{case.shape} {case.sizes.replace(' ', '')}",
                    f"{case.dtype} {case.variant} {report.MODE[case.mode]}", f"{len(work)}",
                    report.size(sum(w.bytes for w in work)), f"{sum(w.flops for w in work) / 1e9:.3g}",
                    report.duration(total), max(took, key=took.get),
                ]
            )  # fmt: skip
    return lines


def bound_of(work: Work, machine: Machine = H200) -> str:
    """Which of the three takes the time of a launch."""
    took = seconds(work, machine)
    return "launches" if took == machine.launch else "bytes" if took == work.bytes / machine.bytes else "FLOPs"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcap.benchmarks.roofline", description=__doc__)
    parser.add_argument("operations", nargs="*", help="only these; default: all")
    parser.add_argument("--each", action="store_true", help="every launch and call of each case, too")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        for name in given.operations:
            _bench(name)
        head = ["operation", "shape", "case", "launches", "bytes", "GFLOP", "predicted", "most of it"]
        if given.each:
            _show_each(given.operations or OPERATIONS)
        print(report.aligned([head, *rows(given.operations or OPERATIONS)], right=(3, 4, 5, 6)))
        print(f"Predicted for an {H200.name}: {H200.bytes / 1e12:g} TB/s, {H200.flops['half'] / 1e12:.0f} TFLOP/s of bf16.")
    except FastcapError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _show_each(operations: Sequence[str]) -> None:
    for operation in operations:
        for case in _bench(operation).cases(harness.Settings(profile="all", device="cuda")):
            print(f"{operation} {case.name}")
            for one in work_of(operation, case.shape, case.dtype, case.variant, case.mode):
                took = f"{report.duration(seconds(one)):>8} ({bound_of(one)})"
                print(f"  {one.name:45} {report.size(one.bytes):>9} {one.flops / 1e9:9.3g} GFLOP {took}")


if __name__ == "__main__":
    sys.exit(main())
