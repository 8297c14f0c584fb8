"""Which implementation of an operation runs, and why not another.

`reference` is plain torch and runs anywhere. `cpp` needs the compiled extension and CPU tensors, `cuda` the extension built
with nvcc and CUDA tensors, `triton` the triton package and CUDA tensors (or TRITON_INTERPRET=1, for tests on a CPU).
A backend that is named and cannot run raises `BackendUnavailable`; it never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastcap.errors import BackendUnavailable, FastcapError, bad

NAMES = ("auto", "reference", "cpp", "triton", "cuda")
NO_CUDA = ("reference", "cpp", "triton")  # the backends of operations without CUDA sources: decision 8

# What `auto` tries, by device. The CPU's order is measured (benchmarks/results); on a GPU Triton goes first until measured.
AUTO = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}

_chosen: str | None = None


class Status(NamedTuple):
    """Whether a backend can run on this machine, and if not, why and how to get it."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


@functools.cache
def extension():
    """fastcap._C, or the ImportError that says why there is none."""
    try:
        return importlib.import_module("fastcap._C")
    except ImportError as error:
        return error


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _status(name: str) -> Status:
    return _find_status(name, interpreting())


@functools.cache
def _find_status(name: str, interpreted: bool) -> Status:
    built = extension()
    if name == "reference":
        return Status(True, "plain torch")
    if name == "cpp":
        if isinstance(built, ImportError):
            return Status(
                False, f"fastcap._C is missing ({built}); install a C++17 compiler, then pip install fastcap again"
            )
        return Status(True, f"fastcap._C, {'OpenMP' if built.openmp else 'one thread: built without OpenMP'}")
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return Status(False, "triton is not installed; pip install triton (Linux)")
        if not interpreted and not any(shutil.which(c) for c in (os.environ.get("CC"), "gcc", "clang", "cc") if c):
            return Status(False, "triton needs a C compiler for its launchers, and finds none; install gcc")
        if not torch.cuda.is_available() and not interpreted:
            return Status(False, "torch sees no CUDA GPU; run on one, or set TRITON_INTERPRET=1 to test on the CPU")
        return Status(True, "interpreted on the CPU" if interpreted else "compiled at the first call of each kind")
    if isinstance(built, ImportError) or built.cuda is None:
        missing = "fastcap._C was built without CUDA, for nvcc was missing or failed"
        return Status(False, f"{missing}; install the CUDA toolkit and then fastcap again")
    if not torch.cuda.is_available():
        return Status(False, f"torch sees no CUDA GPU (the kernels are built, for {built.cuda}); run on a machine with one")
    return Status(True, f"fastcap._C for {built.cuda}")


def backends() -> dict[str, Status]:
    """The backends and whether each can run on this machine.

    Returns:
        name -> `Status(available, reason)`; a status is true where the backend can run.

    >>> import fastcap
    >>> bool(fastcap.backends()["reference"])
    True
    """
    return {name: _status(name) for name in NAMES[1:]}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every fastcap operation inside the block with one backend, whatever the device and shape.

    Holds for the whole process, as torch.backends' flags do; the backward runs with the backend of its forward.
    The environment variable FASTCAP_BACKEND sets the same for a whole run.

    Args:
        name: "auto" (the fastest measured), "reference", "cpp", "triton" or "cuda".

    Raises:
        FastcapError: `name` is none of these.
        BackendUnavailable: the backend cannot run on this machine; the message says why and how to get it.

    >>> with backend("reference"):
    ...     pass
    """
    global _chosen
    _require(name, "backend")
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


def _require(name: str, op: str, remedy: str = "pass backend('auto')") -> None:
    if name not in NAMES:
        raise bad(op, "backend", f"be one of {', '.join(NAMES)}", name, remedy)
    if name != "auto":
        status = _status(name)
        if not status:
            raise BackendUnavailable(f"fastcap.{op}: backend must be able to run here, got {name!r}; {status.reason}")


def select(op: str, device: str, has: tuple[str, ...] = NAMES[1:]) -> str:
    """The backend that runs `op` on tensors of a device type: the one chosen by name, else the first of AUTO that can.

    has: the backends that the operation has.
    """
    return _resolve(op, _chosen, device, has)


def _resolve(op: str, chosen: str | None, device: str, has: tuple[str, ...]) -> str:
    name = chosen or os.environ.get("FASTCAP_BACKEND") or "auto"
    if name == "auto":
        for candidate in AUTO.get(device, ()):
            if candidate in has and _can_run(candidate, device):
                return candidate
        return "reference"
    remedy = "pass backend('auto')" if chosen else "unset FASTCAP_BACKEND, or set it to auto"
    _require(name, op, remedy)
    if name not in has:
        rule = f"be one that this operation has ({', '.join(has)})"
        raise BackendUnavailable(f"fastcap.{op}: backend must {rule}, got {name!r}; {remedy}")
    if not _can_run(name, device):
        where = "CPU" if name == "cpp" else "CUDA"
        raise BackendUnavailable(
            f"fastcap.{op}: input must be a {where} tensor for backend {name!r}, got one on {device!r}; "
            "move it, or use backend('auto')"
        )
    return name


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo, which takes a second. Constant by its
# arguments: torch.compile guards on _chosen, which `select` reads.
_resolve._dynamo_marked_constant = True


def _can_run(name: str, device: str) -> bool:
    if name == "reference":
        return True
    if name == "triton" and device == "cpu":
        return interpreting() and bool(_status(name))
    return device == ("cpu" if name == "cpp" else "cuda") and bool(_status(name))


__all__ = ["BackendUnavailable", "FastcapError", "Status", "backend", "backends"]
