"""What compute-sanitizer prints, read; the calls that it watches, made on a CPU; and what is said where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastcap
from fastcap import testing

pytest.importorskip("triton")

from fastcap.benchmarks import sanitize

CLEAN = "========= COMPUTE-SANITIZER\nfastcap calls: 12\n========= ERROR SUMMARY: 0 errors\n"
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _rows_kernel+0x1a0 in attention_coverage_from_scores.py:99
=========     by thread (3,0,0) in block (1,0,0)
=========     Address 0x7f0000000400 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx at something+0x1234 in libcuda.so
=========
========= Invalid __global__ write of size 16 bytes
=========     at void fastcap::<unnamed>::backward_kernel<float>(Args, fastcap::Tensor)+0x2b0
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Invalid __global__ read of size 8 bytes
=========     at void at::native::vectorized_elementwise_kernel<4, float>(int)+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========
fastcap calls: 7
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """\
========= Error: Race reported between Write access at _softmax_kernel+0x90 in additive_attention.py:70
=========     and Read access at _softmax_kernel+0x110 in additive_attention.py:72 [16 hazards]
=========
fastcap calls: 1
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
KERNELS = {"_rows_kernel", "_softmax_kernel"}


def test_a_clean_run_has_its_calls_and_no_error():
    found = sanitize.parse(CLEAN, KERNELS)
    assert found.calls == 12 and not found.ours and not found.others and str(found) == "12 calls, no error"


def test_errors_are_counted_by_kernel_and_torchs_own_told_apart():
    found = sanitize.parse(MEMCHECK, KERNELS)
    assert found.ours == {"_rows_kernel": 1, "fastcap::<unnamed>::backward_kernel<float>": 1}
    assert found.others == {"at::native::vectorized_elementwise_kernel<4, float>": 1}
    assert found.calls == 7 and "1 in kernels that are not ours" in str(found)


def test_a_race_names_its_kernel_once():
    assert sanitize.parse(RACECHECK, KERNELS).ours == {"_softmax_kernel": 1}


def test_an_error_without_a_kernel_counts_as_ours():
    text = "========= Program hit CUDA_ERROR_ILLEGAL_ADDRESS (error 700) on CUDA API call to cuLaunchKernel.\n"
    found = sanitize.parse(text, KERNELS)
    assert found.ours.total() == 1 and found.calls is None


def test_our_kernels_are_known_by_name():
    known = sanitize.our_kernels()
    assert {"_rows_kernel", "_subset_cross_entropy_fwd_kernel", "contrastive_reward_weights_kernel"} <= known


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert sanitize.main([]) == 2
    assert "device must be a CUDA GPU that torch sees, got None" in capsys.readouterr().err
    assert sanitize.main(["no-such-tool"]) == 2
    assert sanitize.main(["--seconds", "0"]) == 2


def test_the_turns_go_through_all_operations(monkeypatch):
    monkeypatch.setattr(fastcap, "backends", lambda: {"triton": True, "cuda": True})
    turns = list(sanitize._turns("cuda"))
    first = {id(operation) for operation, *_ in turns[: len(testing.OPERATIONS)]}
    assert first == {id(operation) for operation in testing.OPERATIONS.values()}
    assert {backend for *_, backend in turns} == {"triton", "cuda"}
    assert all(backend in operation.backends for operation, _, _, backend in turns)


def test_the_calls_are_made_and_compared():
    """In the interpreter, a few of them, as a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "fastcap.benchmarks.sanitize", "--calls-only", "--device", "cpu", "--seconds", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split(sanitize.DONE)[1]) >= 2


def test_the_wrong_result_of_a_call_is_found(monkeypatch):
    case = testing.OPERATIONS["attention_coverage"].cases()[0]
    operation = testing.OPERATIONS["attention_coverage"]
    monkeypatch.setattr(sanitize, "_turns", lambda device: iter([(operation, case, torch.float32, "cpp")]))
    assert sanitize.make_calls("cpu", float("inf")) == 1
    evaluate = testing.evaluate

    def wrong(operation, arguments, backend):
        outputs, gradients = evaluate(operation, arguments, backend)
        return [x + (0.01 if backend == "cpp" else 0) for x in outputs], gradients

    monkeypatch.setattr(testing, "evaluate", wrong)
    with pytest.raises(AssertionError, match="allowed"):
        sanitize.make_calls("cpu", float("inf"))
