"""The benchmarks' own arithmetic and honesty: floors by hand, wrong providers refused, files written whatever happens."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastcap.benchmarks import __main__ as runner
from fastcap.benchmarks import bench_subset_cross_entropy as subset
from fastcap.benchmarks import captions, floors, harness, peers, report, timing
from fastcap.benchmarks.harness import Case, Problem, Provider, Settings

import fastcap
from fastcap import bench, memory
from fastcap.errors import FastcapError

TINY = Settings("tiny", "cpu", seconds=0.01)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny tensors: threads only get in each other's way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Floors ----------------------------------------------------------------------------------------------------------------

# Caption 1: ids 4 2 4, so 3 valid tokens x 2 ids = 6 pairs. Caption 2: id 7 alone: 1 pair. Three positions are ignored.
TARGET = torch.tensor([[4, 2, 4], [7, -100, -100]])


def test_counts_by_hand():
    assert floors.count(TARGET) == floors.Counts(positions=6, valid=4, captions=2, pairs=7, distinct=3)


@pytest.mark.parametrize(
    ("rows", "gathers", "backward", "read", "flops"),
    [
        ("none", True, False, 6 * 8 + 7 * 64, 3 * 7),
        ("none", True, True, 6 * 8 + 7 * 64 + 6 * 100 * 4, 2 * 3 * 7),  # the gradient is written once
        ("first", True, False, 6 * 8 + 2 * 100 * 4 + 4 * 64, 3 * (4 + 200)),  # 2 + 1 pairs belong to first tokens
        ("first", True, True, 6 * 8 + 2 * 100 * 4 + 4 * 64 + (6 + 2) * 100 * 4, 2 * 3 * (4 + 200)),
        ("all", True, False, 6 * 8 + 4 * 100 * 4, 3 * (7 + 400)),  # a row that is read whole needs no gathers
        ("all", False, True, 6 * 8 + 4 * 100 * 4 + (6 + 4) * 100 * 4, 2 * 3 * 400),
    ],
)
def test_traffic_by_hand(rows, gathers, backward, read, flops):
    found = floors.subset_cross_entropy(TARGET, 100, 4, rows=rows, gathers=gathers, backward=backward, sector=64)
    assert found == floors.Traffic(read, flops)


# Inputs ----------------------------------------------------------------------------------------------------------------


def test_targets_are_real_captions():
    target = captions.draw_targets(64, 20, 30_522, seed=1)
    assert target.shape == (64, 20) and target.dtype == torch.int64
    valid = target != -100
    assert valid[:, 0].all() and target[valid].min() >= 0 and target.max() < 30_522
    assert not (valid[:, 1:] & ~valid[:, :-1]).any()  # padding is at the end
    counts = floors.count(target)
    assert counts.distinct < counts.valid  # words are said twice
    assert torch.equal(target, captions.draw_targets(64, 20, 30_522, seed=1))
    assert not torch.equal(target, captions.draw_targets(64, 20, 30_522, seed=2))


def test_padded_share_is_met():
    target = captions.draw_targets(32, 20, 30_522, padded=0.25)
    assert (target == -100).float().mean() == pytest.approx(0.25, abs=0.03)


def test_words_keep_apart():
    ids = {captions.spread(rank, 9_490) for rank in range(9_490)}
    assert len(ids) == 9_490 and max(ids) < 9_490


def test_own_captions_suffice(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCAP_SHARED", str(tmp_path))
    monkeypatch.setattr(captions, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    found = captions.load.__wrapped__()
    assert len(found.words) == 40 and "own" in found.source
    assert 8 < sum(map(len, found.words)) / 40 < 14


# The harness -----------------------------------------------------------------------------------------------------------


def test_compare_tells_slow_from_fast():
    samples = timing.compare({"fast": lambda: None, "slow": lambda: time.sleep(0.005)}, seconds=0.1, rounds=(3, 20))
    assert len(samples["slow"]) >= 3 and len(samples["fast"]) >= len(samples["slow"])
    assert min(samples["slow"]) >= 0.004 and min(samples["fast"]) < 0.001


def test_compare_runs_setup_before_each_call_untimed():
    state = {"ready": False, "calls": 0}

    def call():
        assert state["ready"]
        state["ready"], state["calls"] = False, state["calls"] + 1

    def setup():
        time.sleep(0.002)
        state["ready"] = True

    samples = timing.compare({"f": call}, seconds=0, rounds=(3, 3), sample_time=0, setups={"f": setup}, flush=True)
    assert len(samples["f"]) == 3 and state["calls"] == 6 and min(samples["f"]) < 0.002


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory on a CPU is measured on Linux alone")
def test_peak_memory_counts_scratch_that_torch_does_not_see():
    import numpy

    def call():
        scratch = numpy.ones(2**21)  # 16 MiB past torch's allocator, freed before the call ends
        scratch.sum()
        del scratch
        return torch.ones(2**20)  # 4 MiB

    extra, how = memory.peak_extra(call, "cpu")
    if extra is None:
        pytest.skip(how)
    assert extra == pytest.approx(16 * 2**20, abs=2e6)
    assert memory.peak_extra(lambda: torch.ones(2**22), "cpu")[0] == pytest.approx(2**24, abs=2e6)


def a_case(**runs):
    """exact: loss 2, gradient [1, -1], times the upstream gradient."""
    providers = {name: Provider(run) for name, run in runs.items()}
    upstream = torch.tensor(0.5, dtype=torch.float64)

    def build():
        exact = (torch.tensor(2.0, dtype=torch.float64), torch.tensor([0.5, -0.5], dtype=torch.float64))
        return Problem(providers, lambda _: exact, floors.Traffic(16, 4), upstream)

    return Case("made_up", "tiny", "2", "fp32", "plain", "forward_backward", tuple(providers), build)


def right(upstream):
    return torch.tensor(2.0), torch.tensor([1.0, -1.0]) * (1.0 if upstream is None else upstream.float())


def test_a_wrong_provider_is_not_timed(tmp_path):
    def broken(upstream):
        raise RuntimeError("no kernel")

    case = a_case(
        right=right,
        wrong_loss=lambda upstream: (torch.tensor(2.1), right(upstream)[1]),
        forgets_upstream=lambda upstream: right(None),
        not_a_number=lambda upstream: (torch.tensor(float("nan")), right(upstream)[1]),
        wrong_shape=lambda upstream: (torch.tensor(2.0), torch.tensor(1.0)),
        broken=broken,
    )
    settings = Settings("tiny", "cpu", seconds=0.01, rows=str(tmp_path / "rows.jsonl"))
    found = {result.row["provider"]: result for result in harness.measure(case, settings)}
    assert found["right"].row["status"] == "ok" and found["right"].samples
    for name in ("wrong_loss", "forgets_upstream", "not_a_number", "wrong_shape"):
        assert found[name].row["status"] == "wrong" and not found[name].samples and "median_s" not in found[name].row
        assert "against float64" in found[name].row["reason"]
    assert found["broken"].row["status"] == "error" and "no kernel" in found["broken"].row["reason"]
    rows = report.read_rows(settings.rows)
    assert [row["provider"] for row in rows] == list(found)
    assert "wrong_loss: wrong in 1 case: errors" in report.table(rows)


def test_no_case_begins_after_the_deadline():
    settings = Settings("tiny", "cpu", deadline=time.time() - 1)
    (result,) = harness.measure(a_case(right=right), settings)
    assert result.row["status"] == "skipped" and "out of time" in result.row["reason"]


def test_every_variant_is_computed_alike_by_all_who_can():
    cases = [case for case in subset.cases(TINY) if case.mode == "forward_backward"]
    assert {case.variant for case in cases} == set(subset.VARIANTS)
    for case in cases:
        rows = [result.row for result in harness.measure(case, TINY)]
        assert {row["status"] for row in rows} <= {"ok", "unavailable"}, report.table(rows)
        done = {row["provider"] for row in rows if row["status"] == "ok"}
        assert done >= {"reference", "zeros_like"} and len(done & {"masked", "gather", "cross_entropy"}) >= 1
        for row in rows:
            if row["status"] == "ok":
                assert row["p25_s"] <= row["median_s"] <= row["p75_s"] and row["bytes"] > 0 and row["rounds"] >= 5
                assert row["machine"]["torch"] == torch.__version__ and row["memory_method"]


def test_ids_name_provider_shape_dtype_and_mode():
    case = subset.cases(Settings("quick", "cpu"))[1]
    assert case.name == "blip-fp32-subset-forward_backward" and case.providers[0] == "cpp"


def test_too_large_a_case_is_skipped(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10**6)
    rows = [result.row for result in harness.measure(subset.cases(Settings("quick", "cpu"))[0], TINY)]
    assert {row["status"] for row in rows} == {"skipped"} and "needs 1 GB" in rows[0]["reason"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_rows_hold_device_and_host_time():
    settings = Settings("tiny", "cuda", seconds=0.05)
    for case in subset.cases(settings)[:2]:
        rows = [result.row for result in harness.measure(case, settings)]
        timed = [row for row in rows if row["status"] == "ok"]
        assert {"triton", "gather"} <= {row["provider"] for row in timed}, report.table(rows)
        assert all(row["host_s"] > 0 and row["peak_extra_bytes"] is not None for row in timed)


def test_missing_peers_say_why():
    assert "GPU" in peers.missing("cpu")["liger_kernel"]


# Reports and commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1.23 s"), (0.00341, "3.41 ms"), (812e-6, "812 us"), (0.0451, "45.1 ms"), (5e-8, "0.05 us")],
)
def test_durations_have_three_digits(seconds, text):
    assert report.duration(seconds) == text


def test_bench_runs_through_pytest_and_writes(tmp_path, capsys):
    pytest.importorskip("pytest_benchmark")
    given = dict(profile="tiny", shapes=["tiny"], device="cpu", seconds=0.005, out=tmp_path)
    rows = bench.run(["subset_cross_entropy"], huge_pages=True, **given)
    assert all(row["machine"]["torch_huge_pages"] for row in rows)
    assert {row["status"] for row in rows} <= {"ok", "unavailable"}
    names = {path.name for path in tmp_path.iterdir()}
    assert {"subset_cross_entropy_huge_pages.json", "subset_cross_entropy_huge_pages_time.png", "pytest.log"} <= names
    stored = json.loads((tmp_path / "subset_cross_entropy_huge_pages.json").read_text())
    assert stored["command"].startswith("fastcap bench subset_cross_entropy") and "--huge-pages" in stored["command"]
    assert stored["machine"]["device"]
    assert report.read(tmp_path / "subset_cross_entropy_huge_pages.json") == rows
    log = (tmp_path / "pytest.log").read_text()
    assert "bench_subset_cross_entropy[gather-tiny-fp32-subset-forward]" in log  # pytest-benchmark's own table
    printed = capsys.readouterr().out
    assert "share of floor" in printed and "subset_cross_entropy" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(operations=["attention"]), "fastcap.bench: operations must be among .*, got 'attention'; name one"),
        (dict(operations="attention"), r"fastcap.bench: operations must be a list of names, got 'attention'; pass \["),
        (dict(shapes=["bert"]), "fastcap.bench: shapes must be among .*blip.*, got 'bert'; leave shapes out"),
        (dict(profile="fast"), "fastcap.bench: profile must be one of tiny, quick, .*, got 'fast'; "),
        (dict(device="tpu"), "fastcap.bench: device must be auto, cpu or cuda, got 'tpu'; leave it out"),
        (dict(seconds=0), "fastcap.bench: seconds must be above 0, got 0; leave it out"),
    ],
)
def test_bench_refuses_bad_arguments(given, message, tmp_path):
    pytest.importorskip("pytest_benchmark")
    with pytest.raises(FastcapError, match=message):
        bench.run(**given, out=tmp_path)


def test_bench_without_its_extra_names_it(monkeypatch):
    monkeypatch.setattr(bench, "_NEEDS", ("pytest", "no_such_module"))
    with pytest.raises(FastcapError, match=r"got no no-such-module; run: pip install 'fastcap\[bench\]'"):
        bench.run()


def test_quick_and_all_exclude_each_other():
    with pytest.raises(FastcapError, match="--all must come without --quick"):
        bench.main(["--quick", "--all"])


def test_every_benchmark_file_joins_by_its_name():
    here = Path(runner.__file__).parent
    assert set(runner.operations()) == {path.stem[len("bench_") :] for path in here.glob("bench_*.py")}
    for name in runner.operations():
        module = runner.module(name)
        assert module.OPERATION == name and module.SHAPES and callable(getattr(module, f"bench_{name}"))
        assert module.cases(TINY)


def gpu_script(*arguments):
    script = Path(fastcap.__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
    if not script.is_file():
        pytest.skip("gpu.py runs from a source tree")
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=150)


def test_gpu_dry_run_writes_at_most_eight_files(tmp_path):
    done = gpu_script("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {"gpu.json", "gpu.log"} <= names and len(names) <= 8
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["name"] for stage in stored["stages"]][:2] == ["build", "tests"]
    assert any(row["operation"] == "subset_cross_entropy" and row["status"] == "ok" for row in stored["rows"])
    assert "share of floor" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_without_a_gpu_says_so_in_one_line(tmp_path):
    done = gpu_script("--quick", "--out", str(tmp_path / "out"))
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert done.stderr.startswith("fastcap.gpu: device must be a CUDA GPU") and done.stderr.count("\n") == 1


def test_a_stage_that_runs_too_long_is_stopped(tmp_path):
    from fastcap.benchmarks import gpu

    run = gpu.Run("dry-run", tmp_path, tmp_path)
    run.stage("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1, tmp_path)
    run.stage("wrong", [sys.executable, "-c", "raise SystemExit(3)"], 30, tmp_path)
    run.started -= 10_000
    run.stage("late", [sys.executable, "-c", ""], 30, tmp_path)
    assert [stage.result for stage in run.stages] == ["stopped after 1 s", "failed (status 3)", "left out: out of time"]
