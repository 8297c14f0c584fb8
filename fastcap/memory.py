"""Peak memory that a call needs beyond what was there before it, results included.

GPU: torch's caching allocator (`max_memory_allocated`); what a library allocates past torch is not in it.
CPU, Linux: the process's own peak. The kernel's high-water mark is reset (/proc/self/clear_refs), the call runs, and
VmHWM after is compared with VmRSS before: so scratch of C++ counts as torch's tensors do. The kernel counts pages in
batches: the figure is good to about 0.3 MB. Elsewhere nothing is measured, and the method says so.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

RESOLUTION = 300_000  # bytes; of the CPU's figure


def peak_extra(call: Callable[[], object], device: str, setup: Callable[[], object] | None = None) -> tuple:
    """(bytes or None, how they were measured). The call runs twice: what it allocates once and keeps is not counted."""
    if setup:
        setup()
    call()
    if setup:
        setup()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the call would reuse, uncounted, what earlier ones freed
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before), "VmHWM after the call less VmRSS before, to 0.3 MB"
    except (OSError, AttributeError, KeyError) as error:
        return None, f"not measured: needs Linux's /proc/self/clear_refs ({type(error).__name__})"


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines if line.startswith("Vm"))[field].split()[0]) * 1024


def available(device: str) -> int | None:
    """Bytes free on the device; None where that is not known."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
