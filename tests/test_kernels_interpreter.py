"""Runs every test marked `interpreter` in one process of its own: there Triton's kernels run on the CPU, as numpy.

By hand: TRITON_INTERPRET=1 pytest -m interpreter tests
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcap
from fastcap.ops._subset import Options
from fastcap.testing import OPERATIONS

HERE = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


STEMS = dict.fromkeys(operation.stem or name for name, operation in OPERATIONS.items())
OTHERS = (
    "all_ops", "kernels_interpreter", "show_attend_tell", "contrastive_reward_triton", "cross_entropy_bounds",
    "attention_bounds",
)  # fmt: skip
FILES = [f"test_{stem}.py" for stem in (*OTHERS, *STEMS)]


@pytest.mark.skipif(INTERPRETING, reason="this is the process that it would start")
@pytest.mark.parametrize("file", FILES)
def test_the_tests_marked_interpreter_pass_in_their_process(file):
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "interpreter and not slow",
        "-q",
        "--maxfail=20",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    # -m puts the working directory on sys.path: not the root, where our kernels/ lies
    result = subprocess.run([*command, str(HERE / file)], capture_output=True, text=True, cwd=HERE, env=environment)
    if result.returncode != 0:
        pytest.fail(f"in the interpreter's process:\n{result.stdout[-20_000:]}\n{result.stderr[-2000:]}", pytrace=False)
    passed = int(result.stdout.rsplit(" passed", 1)[0].split()[-1].lstrip("("))
    assert passed >= (240 if file == "test_all_ops.py" else 1), result.stdout[-2000:]


def raw(x, target, ids, kind="set", reduction="none", first_full=False):
    options = Options(kind, -1 if kind == "set" else -100, first_full, 0.0, 0.0, 0.0, 0.0, -100, reduction)
    return torch.ops.fastcap.subset_cross_entropy_fwd(x, target, ids, None, None, *options, True, "triton"), options


@pytest.mark.interpreter
@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**62)])
@pytest.mark.parametrize("kind", ["set", "reverse", "full"])
def test_a_target_out_of_range_gives_nan_and_no_wrong_read(wrong, kind):
    """The public function refuses it on the CPU; on a GPU, where looking costs a synchronisation, the kernel answers so."""
    assert fastcap.backends()["triton"]
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[1, 2, 3], [4, wrong, 0]])
    ids = {"set": torch.tensor([0, 1]).expand(2, 3, 2), "reverse": y.unsqueeze(1), "full": None}[kind]
    (out, *saved), options = raw(x, y, ids, kind)
    assert out[1, 1].isnan() and out[0].isfinite().all() and out[1, [0, 2]].isfinite().all()
    dx = torch.ops.fastcap.subset_cross_entropy_bwd(
        torch.ones(2, 3), saved[0], x, y, ids if kind == "reverse" else None, None, *saved[1:], *options, [2, 3, 5],
        torch.float32, "triton",
    )  # fmt: skip
    assert dx[0].isfinite().all() and dx[1, 1].isnan().any()
    (mean, *_), _ = raw(x, y, ids, kind, "mean")
    assert mean.isnan()


@pytest.mark.interpreter
@pytest.mark.parametrize("wrong", [-2, 5, 2**40])
@pytest.mark.parametrize("K", [2, 70])
def test_an_id_out_of_range_gives_nan_in_the_rows_that_use_it(wrong, K):
    x = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(1, 3, K, dtype=torch.int64)
    ids[0, 1, K - 1] = wrong
    (out, *_), _ = raw(x, torch.tensor([[1, 2, 3]]), ids)
    assert out[0, 1].isnan() and out[0, [0, 2]].isfinite().all()


@pytest.mark.interpreter
def test_interpreted_kernels_are_what_ran(monkeypatch):
    """Guards this house: were the interpreter not used, `auto` would quietly have tested the C++ kernels twice."""
    from fastcap.kernels import subset_cross_entropy as kernels

    calls = []
    original = kernels.subset_cross_entropy_fwd
    monkeypatch.setattr(kernels, "subset_cross_entropy_fwd", lambda *a: calls.append(1) or original(*a))
    with fastcap.backend("triton"):
        fastcap.functional.subset_cross_entropy(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64))
    assert calls == [1]
