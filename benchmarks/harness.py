"""Runs the rows of a benchmark: checks each provider against float64, then times them in turn, then measures their memory.

A `Case` is one comparison (a shape, dtype, variant and mode); its `Problem` holds the inputs and the providers. A
provider that is wrong is not timed. Nothing here needs pytest: `run_cases` is the whole of it, and `parametrize` and
`replay` let pytest-benchmark show the same rows, one test a provider, with the samples that were taken in turn.
"""

from __future__ import annotations

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

from fastcap import memory

PROFILES = ("tiny", "quick", "default", "all")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest error of an output, in parts of its largest exact value (of 1, for smaller losses). Ours sum in float32, so only
# their outputs are rounded: half precision's own eps. Plain torch rounds its logsumexp, and with it every probability.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
TOLERANCE_OF_PEERS = {**TOLERANCE, torch.float16: 2**-7, torch.bfloat16: 2**-4}
_SECONDS = {"tiny": 0.05, "quick": 2.0, "default": 3.0, "all": 3.0}
_VARIABLE = "FASTCAP_BENCH_SETTINGS"


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
    with, None for 1. kind: "ours", "peer", "reference" (ours, in plain torch) or "floor" (the least to be done; not
    checked).
    """

    run: Callable[[torch.Tensor | None], tuple] | None
    kind: str = "peer"
    missing: str = ""  # why `run` is None
    setup: Callable[[], object] | None = None  # must run, untimed, before each call
    auto: bool = False  # what fastcap chooses by itself here


@dataclass
class Problem:
    """The inputs of a case, inside its functions."""

    providers: dict[str, Provider]
    exact: Callable[[torch.Tensor], tuple]  # upstream (float64) -> the outputs in float64
    traffic: Traffic
    upstream: torch.Tensor | None = None  # not 1, so that one who forgets it is found out; None for a forward


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

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.dtype}-{self.variant}-{self.mode}"


class Result(NamedTuple):
    """A row as it is stored, and its samples in seconds, in the order in which they were taken."""

    row: dict
    samples: list[float]


def errors(outputs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> list[float]:
    """The largest error of each output, in parts of its largest exact value, or of 1 for a scalar below 1."""
    found = []
    for got, wanted in zip(outputs, exact, strict=True):
        if got.shape != wanted.shape:
            return [float("inf")] * len(exact)
        scale = wanted.abs().max().item()
        scale = max(1.0, scale) if wanted.dim() == 0 else scale or 1.0
        found.append(((got.to(wanted.dtype) - wanted).abs().max() / scale).item())
    return found


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
    samples = timing.compare(calls, seconds=settings.seconds_per_case, device=settings.device, setups=setups)
    floors = [statistics.median(samples[name]) for name, p in sound.items() if p.kind == "floor"]
    floor = floors[0] if floors else problem.traffic.bytes / ceiling
    for name, call in calls.items():
        low, middle, high = statistics.quantiles(samples[name], n=4)
        extra, how = memory.peak_extra(call, settings.device, setups.get(name))
        rows[name].update(
            status="ok", median_s=middle, p25_s=low, p75_s=high, min_s=min(samples[name]), rounds=len(samples[name]),
            bytes=problem.traffic.bytes, flops=problem.traffic.flops, ceiling_bytes_per_s=ceiling,
            share_of_ceiling=problem.traffic.bytes / middle / ceiling,
            floor="measured" if floors else "traffic", floor_s=floor, share_of_floor=floor / middle,
            peak_extra_bytes=extra, memory_method=how, auto=sound[name].auto, load=machine.load(),
        )  # fmt: skip
        if settings.device.startswith("cuda"):
            rows[name]["host_s"] = timing.host_time(call, setups.get(name))
    return [Result(row, samples.get(name, [])) for name, row in rows.items()]


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
        if provider.kind != "floor":
            tolerance = (TOLERANCE_OF_PEERS if provider.kind == "peer" else TOLERANCE)[dtype]
            row["errors"], row["tolerance"] = errors(outputs, exact), tolerance
            if not all(error <= tolerance for error in row["errors"]):  # a NaN is not <=
                found = ", ".join(f"{error:.1e}" for error in row["errors"])
                row.update(status="wrong", reason=f"errors {found} against float64; at most {tolerance:.1e} is right")
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
