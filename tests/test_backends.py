"""Which backend runs: chosen by name, by the environment or by itself; and what is said where one cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import fastcap
from fastcap import functional as F_cap
from fastcap.errors import BackendUnavailable, FastcapError
from fastcap.ops import _backend
from fastcap.testing import OPERATIONS

NAMES = {"reference", "cpp", "triton", "cuda"}


def call(requires_grad=True):
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_(requires_grad)
    return x, F_cap.subset_cross_entropy(x, torch.tensor([[1, 2, 1], [0, -100, 4]]))


def ran(loss) -> str:
    """The backend behind a loss: only the kernels have an autograd.Function, which knows."""
    node = loss.grad_fn
    return node.backend if type(node).__name__ == "_SubsetCrossEntropyBackward" else "reference"


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv("FASTCAP_BACKEND", raising=False)


def test_every_backend_has_a_status_with_a_reason():
    statuses = fastcap.backends()
    assert set(statuses) == NAMES and list(statuses)[0] == "reference"
    for status in statuses.values():
        assert bool(status) is status.available
        assert isinstance(status.reason, str) and len(status.reason) > 8
    assert statuses["reference"]


def test_auto_takes_the_extension_on_the_cpu_where_there_is_one():
    expected = "cpp" if fastcap.backends()["cpp"] else "reference"
    assert ran(call()[1]) == expected
    with fastcap.backend("auto"):
        assert ran(call()[1]) == expected


@pytest.mark.gpu
def test_auto_takes_a_kernel_on_the_gpu():
    x = torch.randn(2, 3, 5, device="cuda", requires_grad=True)
    loss = F_cap.subset_cross_entropy(x, torch.ones(2, 3, dtype=torch.int64, device="cuda"))
    available = [name for name in ("triton", "cuda") if fastcap.backends()[name]]
    assert ran(loss) in (available or ["reference"])


def test_a_named_backend_holds_inside_its_block_only(cpp):
    with fastcap.backend("reference"):
        assert ran(call()[1]) == "reference"
        with fastcap.backend("cpp"):
            assert ran(call()[1]) == "cpp"
        assert ran(call()[1]) == "reference"
    assert ran(call()[1]) == "cpp"


def test_the_former_backend_returns_after_an_error_in_the_block(cpp):
    with pytest.raises(ZeroDivisionError), fastcap.backend("reference"):
        raise ZeroDivisionError
    assert ran(call()[1]) == "cpp"
    with pytest.raises(FastcapError), fastcap.backend("reference"), fastcap.backend("nonsense"):
        pass
    assert ran(call()[1]) == "cpp"


def test_a_choice_holds_in_all_threads(cpp):
    seen = []
    with fastcap.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ran(call()[1])))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_the_backward_runs_with_the_backend_of_its_forward(cpp, monkeypatch):
    used = []
    launcher = sys.modules["fastcap.ops.subset_cross_entropy"]._launcher
    monkeypatch.setattr(
        sys.modules["fastcap.ops.subset_cross_entropy"], "_launcher", lambda name: used.append(name) or launcher(name)
    )
    with fastcap.backend("cpp"):
        x, loss = call()
    with fastcap.backend("reference"):
        loss.backward()
        assert x.grad.abs().sum() > 0
    assert used == ["cpp", "cpp"]


@pytest.mark.parametrize("name", ["Triton", "", "gpu", None, 3, "reference "])
def test_an_unknown_backend_is_an_error_that_lists_the_known(name):
    with pytest.raises(FastcapError) as error, fastcap.backend(name):
        pass
    assert str(error.value) == (
        f"fastcap.backend: backend must be one of auto, reference, cpp, triton, cuda, got {name!r}; pass backend('auto')"
    )


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_backend_that_cannot_run_raises_and_never_falls_back(name):
    status = fastcap.backends()[name]
    if status:
        with fastcap.backend(name):
            pass
        return
    with pytest.raises(BackendUnavailable) as error, fastcap.backend(name):
        pass
    assert str(error.value) == f"fastcap.backend: backend must be able to run here, got {name!r}; {status.reason}"
    assert isinstance(error.value, FastcapError) and isinstance(error.value, (RuntimeError, ValueError))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.skipif(_backend.interpreting(), reason="for a process without Triton's interpreter")
def test_the_gpu_backends_say_what_they_lack():
    assert (
        "torch sees no CUDA GPU" in fastcap.backends()["triton"].reason
        or "not installed" in fastcap.backends()["triton"].reason
    )
    assert "nvcc" in fastcap.backends()["cuda"].reason or "no CUDA GPU" in fastcap.backends()["cuda"].reason


@pytest.mark.parametrize(
    ("wish", "outcome"),
    [
        ("reference", "reference"),
        ("auto", None),
        ("", None),
        ("nonsense", "FastcapError: fastcap.subset_cross_entropy: backend must be one of"),
    ],
)
def test_the_environment_chooses_for_a_whole_run(wish, outcome, monkeypatch):
    monkeypatch.setenv("FASTCAP_BACKEND", wish)
    expected = outcome or ("cpp" if fastcap.backends()["cpp"] else "reference")
    try:
        got = ran(call()[1])
    except FastcapError as error:
        got = f"{type(error).__name__}: {error}"
    assert got.startswith(expected)


def test_a_block_outranks_the_environment(cpp, monkeypatch):
    monkeypatch.setenv("FASTCAP_BACKEND", "reference")
    assert ran(call()[1]) == "reference"
    with fastcap.backend("cpp"):
        assert ran(call()[1]) == "cpp"
    with fastcap.backend("auto"):
        assert ran(call()[1]) == "cpp"


def test_a_backend_for_other_devices_is_an_error(monkeypatch):
    """On a machine whose GPU backends can run, tensors on the CPU still cannot use them."""
    monkeypatch.setattr(_backend, "_status", lambda name: _backend.Status(True, "pretended"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, device in (("cuda", "cpu"), ("triton", "cpu")):
        with pytest.raises(BackendUnavailable) as error, fastcap.backend(name):
            _backend.select("some_op", device)
        assert str(error.value).startswith(
            f"fastcap.some_op: input must be a CUDA tensor for backend {name!r}, got one on {device!r}; "
        )
    with pytest.raises(BackendUnavailable, match="must be a CPU tensor for backend 'cpp', got one on 'cuda'"):
        with fastcap.backend("cpp"):
            _backend.select("some_op", "cuda")
    with fastcap.backend("reference"):
        assert _backend.select("some_op", "anything") == "reference"
    assert _backend.select("some_op", "anything") == "reference"  # a device that auto does not know


def test_a_compiled_function_follows_a_later_choice(cpp):
    torch._dynamo.reset()
    target = torch.tensor([[1, 2, 1]])
    compiled = torch.compile(lambda x: F_cap.subset_cross_entropy(x, target), fullgraph=True, backend="aot_eager")
    used = []
    launcher = sys.modules["fastcap.ops.subset_cross_entropy"]._launcher
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys.modules["fastcap.ops.subset_cross_entropy"], "_launcher", lambda name: used.append(name) or launcher(name)
        )
        compiled(torch.randn(1, 3, 5))
        assert used == ["cpp"]
        with fastcap.backend("reference"):
            compiled(torch.randn(1, 3, 5))
        assert used == ["cpp"]
        compiled(torch.randn(1, 3, 5))
        assert used == ["cpp", "cpp"]


def test_checks_of_values_can_be_asked_for_by_the_environment():
    """FASTCAP_CHECK is read at each call; on the CPU values are checked always."""
    from fastcap.ops import _checks

    assert _checks.checks_values(torch.zeros(1))
    assert not _checks.checks_values(torch.zeros(1, device="meta"))


def test_the_reference_runs_on_meta_tensors():
    x = torch.randn(2, 3, 5, device="meta", requires_grad=True)
    loss = F_cap.subset_cross_entropy(x, torch.zeros(2, 3, dtype=torch.int64, device="meta"), reduction="none")
    assert loss.is_meta and loss.shape == (2, 3)
    assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape


def test_triton_runs_on_the_cpu_only_in_its_interpreter(cpp):
    """In processes of their own, for Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    code = "import fastcap; print(fastcap.backends()['triton'].available, fastcap.backends()['triton'].reason)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for extra, expected in (({"TRITON_INTERPRET": "1"}, "True interpreted"), ({"TRITON_INTERPRET": "0"}, None), ({}, None)):
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**environment, **extra},
            cwd=os.path.dirname(__file__),
        )
        assert result.returncode == 0, result.stderr
        expected = expected or ("True compiled" if torch.cuda.is_available() else "False torch sees no CUDA GPU")
        assert result.stdout.startswith(expected)


def test_an_operation_without_cuda_sources_never_takes_that_backend(monkeypatch):
    """On a GPU without triton, where fastcap._C has CUDA kernels of other operations."""
    monkeypatch.setattr(_backend, "_status", lambda name: _backend.Status(name != "triton", "as this test says"))
    assert _backend.select("additive_attention", "cuda", _backend.NO_CUDA) == "reference"
    assert _backend.select("subset_cross_entropy", "cuda") == "cuda"
    with (
        fastcap.backend("cuda"),
        pytest.raises(BackendUnavailable, match=r"fastcap\.additive_attention: backend must be one "),
    ):
        _backend.select("additive_attention", "cuda", _backend.NO_CUDA)


def test_the_registry_says_which_backends_an_operation_has(monkeypatch):
    """What the contract's tests leave out is what the operation itself refuses."""
    monkeypatch.setattr(_backend, "_status", lambda name: _backend.Status(True, "as this test says"))
    for name, operation in OPERATIONS.items():
        if "cuda" in operation.backends:
            continue
        arguments = operation.cases()[0].arguments
        with (
            fastcap.backend("cuda"),
            pytest.raises(BackendUnavailable, match=rf"fastcap\.({name}|{operation.stem}): backend must be one"),
        ):
            operation.function(**arguments)
