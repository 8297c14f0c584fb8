"""What every test file shares: which tests run here, and the (device, backend) pairs that one is run on.

Kernels in Triton run on the CPU only in Triton's interpreter, chosen by TRITON_INTERPRET=1 before triton is imported, and
nothing can be compiled in such a process. So tests marked `interpreter` are left out of an ordinary run, in which
test_kernels_interpreter.py runs all of them in a process of their own.
"""

from __future__ import annotations

import collections
import os
import time
import warnings
from typing import NamedTuple

import pytest
import torch

import fastcap


class Target(NamedTuple):
    """Where an operation runs."""

    device: str
    backend: str


TARGETS = {
    Target("cpu", "reference"): (),
    Target("cpu", "cpp"): (),
    Target("cpu", "triton"): pytest.mark.interpreter,
    Target("cuda", "reference"): pytest.mark.gpu,
    Target("cuda", "triton"): pytest.mark.gpu,
    Target("cuda", "cuda"): pytest.mark.gpu,
}
FUSED = [target for target in TARGETS if target.backend != "reference"]
COMPILED = [target for target in FUSED if target != Target("cpu", "triton")]
GPU = [target for target in FUSED if target.device == "cuda"]


def _params(targets):
    return [pytest.param(target, marks=TARGETS[target], id=f"{target.device}-{target.backend}") for target in targets]


def _runnable(request) -> Target:
    status = fastcap.backends()[request.param.backend]
    if not status:
        pytest.skip(f"backend {request.param.backend}: {status.reason}")
    return request.param


@pytest.fixture(params=_params(TARGETS))
def target(request) -> Target:
    """Every place where an operation can run, plain torch included."""
    return _runnable(request)


@pytest.fixture(params=_params(FUSED))
def fused(request) -> Target:
    """Every place with a kernel of ours."""
    return _runnable(request)


@pytest.fixture(params=_params(COMPILED))
def compiled(request) -> Target:
    """`fused` without Triton's interpreter, which needs 10 ms a token: for larger inputs."""
    return _runnable(request)


@pytest.fixture
def cpp() -> Target:
    """The compiled extension, on the CPU."""
    status = fastcap.backends()["cpp"]
    if not status:
        pytest.skip(f"backend cpp: {status.reason}")
    return Target("cpu", "cpp")


@pytest.fixture
def reference() -> Target:
    """Plain torch, on the CPU."""
    return Target("cpu", "reference")


@pytest.fixture(params=_params(GPU))
def gpu(request) -> Target:
    """Every place on a GPU with a kernel of ours."""
    return _runnable(request)


_BEGAN = time.monotonic()


def pytest_runtest_setup(item):
    """A run that must end in time (FASTCAP_TEST_SECONDS) skips what it has not begun by then, and still reports."""
    seconds = float(os.environ.get("FASTCAP_TEST_SECONDS") or "inf")
    if time.monotonic() - _BEGAN > seconds:
        pytest.skip(f"not begun within FASTCAP_TEST_SECONDS={seconds:.0f}")


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the markers
def pytest_collection_modifyitems(config, items):
    interpreting = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if interpreting:
        _share(items)
    kept, left_out = [], []
    for item in items:
        belongs = interpreting or item.get_closest_marker("interpreter") is None
        (kept if belongs else left_out).append(item)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _share(items):
    """In Triton's interpreter, a thousand times slower than what it stands for, every n-th of the parameters of a test with
    `interpreted_share(n)` is ordinary; the others are `slow`. The others still run compiled, in C++ and on a GPU."""
    met = collections.Counter()
    for item in items:
        share = item.get_closest_marker("interpreted_share")
        if share and item.get_closest_marker("interpreter"):
            if met[item.function] % share.args[0]:
                item.add_marker(pytest.mark.slow)
            met[item.function] += 1


@pytest.fixture
def one_thread():
    """Tiny tensors: threads only get in each other's way. Bitwise comparisons need one number of threads besides."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Kernels of Triton -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_compiler(monkeypatch):
    """Compiles as Triton does by default, without its warning."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION.*")
        yield


@pytest.fixture
def in_place(monkeypatch):
    """Triton's interpreter copies the memory of its arguments back, onto itself where that lies on the CPU."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
