"""What a measurement ran on: device, threads, versions and commit."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from fastcap.benchmarks import report

import fastcap


@functools.cache
def _describe(device: str, threads: int) -> dict:
    found = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch_huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda if device.startswith("cuda") else None,
        "fastcap": fastcap.__version__,
        "commit": commit(),
    }
    if device.startswith("cuda"):
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["liger_kernel"] = version_of("liger_kernel")
        found["cut_cross_entropy"] = version_of("cut-cross-entropy")
    return found


def describe(device: str) -> dict:
    """Names and versions, as each result records them."""
    return dict(_describe(device, torch.get_num_threads()))


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load() -> float | None:
    """Runnable threads on the machine, on average over the last minute; None where that is not known."""
    try:
        return round(os.getloadavg()[0], 1)
    except (AttributeError, OSError):
        return None


@functools.cache
def cpu_name() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree, "-dirty" where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"],
            capture_output=True, text=True, timeout=20, check=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def folder_name(device: str) -> str:
    """The name of a machine's folder in results/: "nvidia-h200", "amd-epyc-2-threads"."""
    found = describe(device)
    name = found["device"] if device.startswith("cuda") else f"{found['device']} {found['threads']} threads"
    return report.slug(name)
