"""Timings that hold in noise: what is compared runs in turn, round after round, and only medians are used.

A busy machine slows everything for seconds at a time. Timed one after another, one function would catch the slow
seconds and another not; here each round times each function once, in shuffled order, so ratios of medians hold even
where the times do not. What this cannot mend: with more runnable threads than cores, threaded code waits for its own
descheduled threads. Rows record the load.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


def compare(
    calls: Mapping[str, Call],
    *,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (5, 200),
    sample_time: float = 1e-3,
    device: str = "cpu",
    setups: Mapping[str, Call] | None = None,
    flush: bool | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each function, one sample a round; slow functions sit out rounds, evenly spread.

    Args:
        calls: name -> what to time. Its result is dropped, and freed, within the time.
        seconds: about how long all rounds together take; `rounds` (fewest, most) come first.
        sample_time: calls shorter than this are repeated within a sample, which is then their mean.
        device: "cpu" (perf_counter) or "cuda" (events; the GPU is kept busy until all of a call is queued, so that the
            time is the GPU's, not Python's).
        setups: name -> what must run, untimed, before each call.
        flush: empty the caches before each call, untimed. Default: on a GPU only; on a CPU the round's other functions
        do.

    Warm-up, compilation and calibration are not in the samples.
    """
    setups = setups or {}
    watch = _CudaWatch(flush is not False) if device.startswith("cuda") else _CpuWatch(bool(flush))
    repeats, every = {}, {}
    share = seconds / max(1, len(calls))
    fewest, most = rounds
    for name, call in calls.items():
        once = watch(call, 1, setups.get(name))  # warm-up
        for _ in range(2 if once < 0.1 else 0):
            once = min(once, watch(call, 1, setups.get(name)))
        repeats[name] = max(1, min(1000, math.ceil(sample_time / max(once, 1e-7))))
        every[name] = max(fewest, min(most, int(share / max(repeats[name] * once, 1e-9))))  # rounds, so far
    count = max(every.values(), default=0)
    every = {name: max(1, count // its_rounds) for name, its_rounds in every.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, chance = list(calls), random.Random(0)
    for i in range(count):
        chance.shuffle(order)
        for name in order:
            if i % every[name] == 0:
                samples[name].append(watch(calls[name], repeats[name], setups.get(name)))
    return samples


class _CpuWatch:
    def __init__(self, flush: bool):
        self.junk = torch.empty(64 * 2**20, dtype=torch.uint8) if flush else None

    def __call__(self, call: Call, repeats: int, setup: Call | None) -> float:
        if setup is None and self.junk is None:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        total = 0.0
        for _ in range(repeats):
            if setup:
                setup()
            if self.junk is not None:
                self.junk.fill_(1)
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return total / repeats


class _CudaWatch:
    CYCLES_PER_SECOND = 2e9  # about; torch.cuda._sleep counts clock cycles

    def __init__(self, flush: bool):
        self.junk = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda") if flush else None
        self.hold = 200e-6

    def __call__(self, call: Call, repeats: int, setup: Call | None) -> float:
        pairs = []
        for _ in range(min(repeats, 20)):
            if setup:
                setup()
            if self.junk is not None:
                self.junk.fill_(1)
            torch.cuda._sleep(int(self.hold * self.CYCLES_PER_SECOND))
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            start = time.perf_counter()
            call()
            queued = time.perf_counter() - start
            last.record()
            self.hold = min(5e-3, max(200e-6, 1.5 * queued))
            pairs.append((first, last))
        torch.cuda.synchronize()
        return sum(first.elapsed_time(last) for first, last in pairs) / 1e3 / len(pairs)


def host_time(call: Call, setup: Call | None = None, repeats: int = 10) -> float:
    """Seconds that Python is busy with one call on a GPU, which does not wait: the launch cost. The median of `repeats`."""
    times = []
    for _ in range(repeats):
        if setup:
            setup()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


@functools.cache
def copy_bandwidth(device: str, nbytes: int | None = None) -> float:
    """Bytes a second, read and written, of the fastest of 9 copies of a buffer far larger than the caches: the ceiling.

    A CPU may read a line before it writes it; that hidden third transfer is not counted, here or in the operations.
    """
    nbytes = nbytes or (2**30 if device.startswith("cuda") else 256 * 2**20)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    sink = torch.zeros_like(source)
    times = compare({"copy": lambda: sink.copy_(source)}, seconds=0, rounds=(9, 9), device=device, flush=False)["copy"]
    return 2 * nbytes / min(times)


@functools.cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of 5 products of large square matrices: the ceiling of what is matrix products."""
    n = 8192 if device.startswith("cuda") else 2048 if dtype == torch.float32 else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = compare({"product": lambda: torch.mm(a, b, out=out)}, seconds=0, rounds=(5, 5), device=device, flush=False)
    return 2 * n**3 / min(times["product"])
