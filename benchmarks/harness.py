"""Runs the rows of a benchmark: checks each provider against float64, then times them in turn, then measures their memory.

A `Case` is one comparison (a shape, dtype, variant and mode); its `Problem` holds the inputs and the providers. A
provider that is wrong is not timed. Nothing here needs pytest: `run_cases` is the whole of it, and `parametrize` and
`replay` let pytest-benchmark show the same rows, one test a provider, with the samples that were taken in turn.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from fastcap.benchmarks import machine, timing
from fastcap.benchmarks.floors import Traffic

import fastcap
from fastcap import memory

PROFILES = ("tiny", "quick", "default", "all")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest error of an output, in parts of its largest exact value (of 1, for smaller losses). Ours sum in float32, so only
# their outputs are rounded: half precision's own eps. Plain torch rounds its logsumexp, and with it every probability.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
TOLERANCE_OF_PEERS = {**TOLERANCE, torch.float16: 2**-7, torch.bfloat16: 2**-4}
# Products over a vocabulary, one term after another: what torch's chunked loss does with its blocks of a few rows.
TOLERANCE_OF_PRODUCTS = {**TOLERANCE_OF_PEERS, torch.float32: 1e-4}
# Ours round logits to the dtype as plain torch does, whose own gradients are off by 2^-7 at 64,000 words; twice that.
TOLERANCE_OF_OUR_PRODUCTS = {**TOLERANCE, torch.float16: 2**-9, torch.bfloat16: 2**-6}
_SECONDS = {"tiny": 0.05, "quick": 2.0, "default": 3.0, "all": 3.0}
_VARIABLE = "FASTCAP_BENCH_SETTINGS"
_BLOCK = 2**24  # numbers that are compared at a time


@dataclass(frozen=True)
class Settings:
    """How to run: handed to subprocesses as one environment variable."""

    profile: str = "default"
    device: str = "cpu"
    shapes: tuple[str, ...] = ()  # only these; empty: the profile's
    seconds: float | None = None  # of timing per case; None: the profile's
    deadline: float | None = None  # time.time() after which no case is begun
    rows: str | None = None  # a file to which each row is added as a line of JSON

    @property
    def seconds_per_case(self) -> float:
        return _SECONDS[self.profile] if self.seconds is None else self.seconds

    def to_env(self) -> dict[str, str]:
        return {_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_env(cls) -> Settings:
        given = json.loads(os.environ.get(_VARIABLE, "{}"))
        given["shapes"] = tuple(given.get("shapes", ()))
        return cls(**given)


class Skip(Exception):
    """A case cannot run here; the message says why."""


@dataclass
class Provider:
    """One way to compute the case's outputs.

    run(upstream) returns the outputs as a tuple, the loss first; `upstream` is the gradient of the loss to go back
    with, None for 1. kind: "ours", "peer", "reference" (ours, in plain torch), "floor" (the least to be done; not
    checked) or "scale" (another computation, to compare with in the same seconds; not checked).
    """

    run: Callable[[torch.Tensor | None], tuple] | None
    kind: str = "peer"
    missing: str = ""  # why `run` is None
    setup: Callable[[], object] | None = None  # must run, untimed, before each call
    auto: bool = False  # what fastcap chooses by itself here
    traffic: Traffic | None = None  # of its own, where it does less than the case: its floor, then, for a floor is not


@dataclass
class Problem:
    """The inputs of a case, inside its functions."""

    providers: dict[str, Provider]
    exact: Callable[[torch.Tensor], tuple]  # upstream (float64) -> the outputs in `exact_in`
    traffic: Traffic
    upstream: torch.Tensor | None = None  # not 1, so that one who forgets it is found out; None for a forward
    exact_in: str = "float64"  # or "float32", for half precision where the time or the memory is not there
    products: bool = False  # the FLOPs are of matrix products: their measured rate is a ceiling, their rounding allowed


class Goal(NamedTuple):
    """A bound that a provider should keep: its time or memory, at most (or at least) `limit` times that of another.

    quantity: "time", "memory" (peak extra bytes), "scratch" (those without the outputs) or "products" (the share of the
    measured rate of matrix products). Without `against` the limit is in seconds, in bytes, or that share.
    """

    provider: str
    limit: float
    against: str = ""
    quantity: str = "time"
    at_least: bool = False

    def judge(self, rows: dict[str, dict]) -> dict:
        """What was found, as a row stores it; "found" is None where one of the two was not measured."""
        fields = {"time": "median_s", "memory": "peak_extra_bytes", "scratch": "scratch_bytes"}
        name = fields.get(self.quantity, f"share_of_{self.quantity}")
        found = rows.get(self.provider, {}).get(name)
        if self.against and found is not None:
            other = rows.get(self.against, {}).get(name)
            found = found / other if other else None
        met = None if found is None else found >= self.limit if self.at_least else found <= self.limit
        return {**self._asdict(), "found": found, "met": met}


@dataclass(frozen=True)
class Case:
    """One comparison, known before it is built; `providers` names all that `build` will return."""

    operation: str
    shape: str
    sizes: str
    dtype: str
    variant: str
    mode: str
    providers: tuple[str, ...]
    build: Callable[[], Problem] = field(compare=False, repr=False)
    rounds: int = 5  # of timing, at least; 0: only the two calls by which memory is measured, for calls of minutes
    goals: tuple[Goal, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.dtype}-{self.variant}-{self.mode}"


class Result(NamedTuple):
    """A row as it is stored, and its samples in seconds, in the order in which they were taken."""

    row: dict
    samples: list[float]


def errors(outputs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> list[float]:
    """The largest error of each output, in parts of its largest exact value, or of 1 for a scalar below 1.

    Either may be row-sparse. Large ones are compared block by block: none is copied whole.
    """
    found = []
    for got, wanted in zip(outputs, exact, strict=True):
        if got.shape != wanted.shape:
            return [float("inf")] * len(exact)
        got, wanted = (x.coalesce() if x.is_sparse else x for x in (got, wanted))
        largest = (wanted.values() if wanted.is_sparse else wanted).abs().amax().item() if wanted.numel() else 0.0
        scale = max(1.0, largest) if wanted.dim() == 0 else largest or 1.0
        worst = [(a.to(wanted.dtype) - b).abs().max() for a, b in zip(_blocks(got), _blocks(wanted), strict=True)]
        found.append(torch.stack(worst).max().item() / scale if worst else 0.0)  # max() keeps a NaN
    return found


def _blocks(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks of rows of x, dense."""
    if x.dim() == 0:
        yield x
        return
    step = max(1, _BLOCK // max(1, x[0].numel() if x.shape[0] else 1))
    for start in range(0, x.shape[0], step):
        stop = min(start + step, x.shape[0])
        if not x.is_sparse:
            yield x[start:stop]
            continue
        rows = x.indices()[0]
        inside = (rows >= start) & (rows < stop)
        yield x.values().new_zeros(stop - start, *x.shape[1:]).index_copy_(0, rows[inside] - start, x.values()[inside])


def nbytes(outputs: Sequence[torch.Tensor]) -> int:
    """Bytes that the outputs of a call hold."""
    parts = [(x._indices(), x._values()) if x.is_sparse else (x,) for x in outputs]
    return sum(part.numel() * part.element_size() for of_one in parts for part in of_one)


def cannot_run(backend: str, device: str) -> str:
    """Why one of our backends cannot run on the device; "" where it can."""
    status = fastcap.backends()[backend]
    if not status:
        return status.reason
    needed = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}.get(backend)
    return "" if needed is None or device.startswith(needed) else f"runs on {needed}, not on {device}"


def measure(case: Case, settings: Settings) -> list[Result]:
    """Checks, times and weighs every provider of a case; adds the rows to `settings.rows`."""
    results = []
    try:
        if settings.deadline is not None and time.time() > settings.deadline:
            raise Skip("out of time: the budget of this run is spent")
        results = _measure(case, settings)
    except (Skip, torch.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
        results = [Result(_row(case, name, settings, status="skipped", reason=reason), []) for name in case.providers]
    if settings.rows:
        with open(settings.rows, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(result.row) + "\n" for result in results)
    return results


def _measure(case: Case, settings: Settings) -> list[Result]:
    problem = case.build()
    assert tuple(problem.providers) == case.providers, f"{case.name} must build {case.providers}"
    ceiling = timing.copy_bandwidth(settings.device)
    rows = {name: _row(case, name, settings, kind=provider.kind) for name, provider in problem.providers.items()}
    sound = _check(problem, rows, DTYPES[case.dtype])
    calls = {name: (lambda run=provider.run: run(None)) for name, provider in sound.items()}
    setups = {name: provider.setup for name, provider in sound.items() if provider.setup}
    samples = {name: [] for name in calls}
    if case.rounds:
        most = (case.rounds, max(case.rounds, 200))
        samples = timing.compare(
            calls, seconds=settings.seconds_per_case, rounds=most, device=settings.device, setups=setups
        )
    gc.collect()
    gc.freeze()  # each weighing collects garbage, and would walk through all that was ever imported: a tenth of a second
    try:
        weights = {name: _weigh(call, settings.device, setups.get(name)) for name, call in calls.items()}
    finally:
        gc.unfreeze()
    for name, weight in weights.items():
        samples[name] = samples[name] or weight.seconds
    floors = [statistics.median(samples[name]) for name, p in sound.items() if p.kind == "floor"]
    for name, weight in weights.items():
        traffic = sound[name].traffic or problem.traffic
        measured = bool(floors) and sound[name].traffic is None
        floor = floors[0] if measured else traffic.bytes / ceiling
        method = "inclusive" if len(samples[name]) < 3 else "exclusive"
        low, middle, high = statistics.quantiles(samples[name], n=4, method=method)
        rows[name].update(
            status="ok", median_s=middle, p25_s=low, p75_s=high, min_s=min(samples[name]), rounds=len(samples[name]),
            bytes=traffic.bytes, flops=traffic.flops, ceiling_bytes_per_s=ceiling,
            share_of_ceiling=traffic.bytes / middle / ceiling,
            floor="measured" if measured else "traffic", floor_s=floor, share_of_floor=floor / middle,
            peak_extra_bytes=weight.extra, memory_method=weight.method, output_bytes=weight.outputs,
            scratch_bytes=None if weight.extra is None else max(0, weight.extra - weight.outputs),
            auto=sound[name].auto, load=machine.load(),
        )  # fmt: skip
        if problem.products:
            rate = timing.product_rate(settings.device, DTYPES[case.dtype])
            rows[name].update(ceiling_flops_per_s=rate, share_of_products=traffic.flops / middle / rate)
        if settings.device.startswith("cuda"):
            rows[name]["host_s"] = timing.host_time(calls[name], setups.get(name))
            if name.startswith("triton"):
                rows[name].update(_predicted(case, name.removeprefix("triton")))
    absent = {name for name, row in rows.items() if row.get("status") == "unavailable"}
    for goal in case.goals:
        if goal.provider in rows and not absent & {goal.provider, goal.against}:  # else the row says why
            rows[goal.provider].setdefault("goals", []).append(goal.judge(rows))
    return [Result(row, samples.get(name, [])) for name, row in rows.items()]


def _predicted(case: Case, form: str) -> dict:
    """What the model of an H200 says of ours, where it knows the benchmark: `predicted_s` and `predicted_launches`."""
    from fastcap.benchmarks import roofline

    if case.operation not in roofline.OPERATIONS or form not in roofline.forms(case.operation):
        return {}
    try:
        work = roofline.work_of(case.operation, case.shape, case.dtype, case.variant, case.mode, form)
    except Exception as error:  # a prediction must not cost a measurement
        return {"not_predicted": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    return {"predicted_s": roofline.predict(work), "predicted_launches": len(work)}


class _Weight(NamedTuple):
    extra: int | None  # bytes at the peak, beyond what was there before
    method: str
    outputs: int  # bytes of what the call returns
    seconds: list[float]  # of the two calls that it took


def _weigh(call: timing.Call, device: str, setup: timing.Call | None) -> _Weight:
    """The memory of a call, and, for calls too long to be timed as well, the time it took meanwhile."""
    seconds, sizes = [], []

    def watched():
        start = time.perf_counter()
        outputs = call()
        seconds.append(time.perf_counter() - start)
        sizes.append(nbytes(outputs))
        return outputs

    extra, method = memory.peak_extra(watched, device, setup)
    return _Weight(extra, method, sizes[-1], seconds)


def _check(problem: Problem, rows: dict[str, dict], dtype: torch.dtype) -> dict[str, Provider]:
    """The providers that may be timed; writes into their rows why the others may not."""
    exact = problem.exact(problem.upstream)
    sound = {}
    for name, provider in problem.providers.items():
        row = rows[name]
        if provider.run is None:
            row.update(status="unavailable", reason=provider.missing)
            continue
        try:
            if provider.setup:
                provider.setup()
            outputs = provider.run(problem.upstream)
        except torch.OutOfMemoryError as error:
            row.update(status="skipped", reason=str(error).splitlines()[0])
            continue
        except Exception as error:  # whatever a peer raises is a result, not the end of the run
            row.update(status="error", reason=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        if provider.kind not in ("floor", "scale"):
            of_peers = TOLERANCE_OF_PRODUCTS if problem.products else TOLERANCE_OF_PEERS
            of_ours = TOLERANCE_OF_OUR_PRODUCTS if problem.products else TOLERANCE
            tolerance = (of_peers if provider.kind == "peer" else of_ours)[dtype]
            row["errors"], row["tolerance"] = errors(outputs, exact), tolerance
            if not all(error <= tolerance for error in row["errors"]):  # a NaN is not <=
                found = ", ".join(f"{error:.1e}" for error in row["errors"])
                row.update(
                    status="wrong", reason=f"errors {found} against {problem.exact_in}; at most {tolerance:.1e} is right"
                )
                continue
        sound[name] = provider
    return sound


def _row(case: Case, provider: str, settings: Settings, **more) -> dict:
    named = {key: getattr(case, key) for key in ("operation", "shape", "sizes", "dtype", "variant", "mode")}
    return {**named, "provider": provider, "machine": machine.describe(settings.device), **more}


def run_cases(cases: Sequence[Case], settings: Settings) -> Iterator[list[Result]]:
    """Measures each case as it is asked for."""
    for case in cases:
        yield measure(case, settings)
        if settings.device.startswith("cuda"):
            torch.cuda.empty_cache()


# pytest-benchmark ------------------------------------------------------------------------------------------------------

_clock = 0.0
_latest: tuple[Case, dict[str, Result]] | None = None  # all rows of a case are measured when its first is asked for


def replayed_time() -> float:
    """A clock that moves only as recorded samples are replayed."""
    return _clock


def parametrize(metafunc, cases: Callable[[Settings], list[Case]]) -> None:
    """One test for each provider of each case: call it from pytest_generate_tests."""
    import pytest

    metafunc.parametrize(
        "case, provider",
        [
            pytest.param(
                case,
                provider,
                id=f"{provider}-{case.name}",
                marks=pytest.mark.benchmark(group=f"{case.operation} {case.name}", timer=replayed_time),
            )
            for case in cases(Settings.from_env())
            for provider in case.providers
        ],
    )


def replay(benchmark, case: Case, provider: str) -> None:
    """Gives pytest-benchmark the provider's samples; fails where the provider is wrong, skips where it cannot run."""
    import pytest

    global _latest
    if _latest is None or _latest[0] != case:
        _latest = case, {result.row["provider"]: result for result in measure(case, Settings.from_env())}
    row, samples = _latest[1][provider]
    benchmark.extra_info.update(row)
    if row["status"] in ("unavailable", "skipped"):
        pytest.skip(row["reason"])
    if row["status"] != "ok":
        pytest.fail(f"{row['status']}, so not timed: {row['reason']}", pytrace=False)
    left = iter(samples)

    def play() -> None:
        global _clock
        _clock += next(left, 0.0)

    benchmark.pedantic(play, rounds=len(samples))
