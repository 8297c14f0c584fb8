"""The benchmarks' own arithmetic and honesty: floors by hand, wrong providers refused, files written whatever happens."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastcap.benchmarks import __main__ as runner
from fastcap.benchmarks import (
    bench_additive_attention,
    bench_attention_coverage,
    bench_attention_coverage_from_scores,
    bench_cider_d,
    bench_contrastive_reward,
    bench_retrieval_ranks,
    bench_training,
    captions,
    floors,
    harness,
    peers,
    plain,
    report,
    timing,
)
from fastcap.benchmarks import bench_linear_subset_cross_entropy as linear
from fastcap.benchmarks import bench_subset_cross_entropy as subset
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings

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
    assert floors.count(TARGET) == floors.Counts(positions=6, valid=4, captions=2, pairs=7, distinct=3, words=3)


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


@pytest.mark.parametrize(
    ("rows", "gathers", "backward", "grad_weight", "moved", "flops"),
    [  # a row of the hidden states or of W is 40 bytes, and 20 FLOPs a logit
        ("none", True, False, "dense", 48 + (4 + 3) * 40, 20 * 7),
        ("none", True, True, "dense", 48 + 2 * (4 + 3) * 40 + (6 + 100) * 40, 3 * 20 * 7),
        ("none", True, True, "sparse", 48 + 2 * (4 + 3) * 40 + 6 * 40 + 3 * (40 + 8), 3 * 20 * 7),
        ("none", True, True, "accumulate", 48 + 2 * (4 + 3) * 40 + 6 * 40 + 3 * 2 * 40, 3 * 20 * 7),
        ("first", True, False, "dense", 48 + (4 + 100) * 40, 20 * (4 + 200)),  # 2 + 1 pairs belong to first tokens
        ("all", True, True, "dense", 48 + 2 * (4 + 100) * 40 + (6 + 100) * 40, 3 * 20 * 400),
        ("all", False, True, "accumulate", 48 + 2 * (4 + 100) * 40 + (6 + 200) * 40, 3 * 20 * 400),
    ],
)
def test_traffic_with_the_head_by_hand(rows, gathers, backward, grad_weight, moved, flops):
    given = dict(rows=rows, gathers=gathers, backward=backward, grad_weight=grad_weight)
    found = floors.linear_subset_cross_entropy(TARGET, 100, 10, 4, **given)
    assert found == floors.Traffic(moved, flops)


def test_flops_without_padding_are_the_known_formulas():
    B, T, V, H = 5, 7, 1_000, 16
    target = torch.arange(B * T).view(B, T)
    subset_only = floors.linear_subset_cross_entropy(target, V, H, 4, rows="none", gathers=True, backward=True)
    assert subset_only.flops == 3 * 2 * (B * T) * T * H
    mixture = floors.linear_subset_cross_entropy(target, V, H, 4, rows="all", gathers=True, backward=True)
    assert mixture.flops == 6 * (B * T) * V * H


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
    # The project's own captions have at most 15 words with the end: were all of them the longest, a quarter would be left
    share = (target == -100).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03) or ("own" in captions.load().source and 0.25 <= share < 0.3)


def test_rows_without_padding_are_captions_in_a_row():
    target = captions.draw_targets(8, 64, 30_522, padded=0.0)
    assert target.shape == (8, 64) and (target >= 0).all()
    assert ((target == captions.spread(0, 30_522)).sum(1) >= 2).all()  # ends of captions inside a row
    assert len({tuple(row) for row in target.tolist()}) == 8


def test_words_keep_apart():
    ids = {captions.spread(rank, 9_490) for rank in range(9_490)}
    assert len(ids) == 9_490 and max(ids) < 9_490


def test_own_captions_suffice(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCAP_SHARED", str(tmp_path))
    monkeypatch.setattr(captions, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    found = captions.load.__wrapped__()
    assert len(found.words) == 40 and "own" in found.source
    assert 8 < sum(map(len, found.words)) / 40 < 14


# Plain torch -----------------------------------------------------------------------------------------------------------


def masked_step(hidden, weight, target, variant):
    """The loss and both gradients, by the masked formulation on all logits at once."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    loss = plain.masked(hidden @ weight.T, target, variant, fill=-torch.inf)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


@pytest.fixture
def head():
    """(hidden states, head, targets) in float64: three captions, a repeated word, a pad in the middle and at the end."""
    generator = torch.Generator().manual_seed(3)
    target = torch.tensor([[4, 2, 4, -100], [7, -100, 0, 12], [12, 7, 7, 7]])
    hidden, weight = (torch.randn(*shape, 5, generator=generator, dtype=torch.float64) for shape in ((3, 4), (13,)))
    return hidden, weight, target


@pytest.mark.parametrize("variant", plain.VARIANTS)
def test_exact_answer_does_not_depend_on_its_groups(head, variant, monkeypatch):
    wanted = masked_step(*head, variant)
    for group in (1, 2**27):  # one caption at a time, and all at once
        monkeypatch.setattr(plain, "GROUP", group)
        found = plain.linear_exact(*head, variant, True, torch.tensor(0.5), torch.float64)
        for got, exact, factor in zip(found, wanted, (1.0, 0.5, 0.5), strict=True):
            got = got.to_dense() if got.is_sparse else got
            torch.testing.assert_close(got, factor * exact, rtol=1e-12, atol=1e-14)
        assert found[2].is_sparse == (variant == "subset")
        torch.testing.assert_close(plain.linear_exact(*head, variant, False, None, torch.float64), (wanted[0],))


@pytest.mark.parametrize("variant", [name for name in plain.VARIANTS if name != "full"])
def test_gathered_loss_is_the_masked_one(head, variant):
    hidden, weight, target = head
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = plain.linear_gather(hidden, weight, target, variant)
    found = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    torch.testing.assert_close(found, masked_step(hidden.detach(), weight.detach(), target, variant), rtol=1e-12, atol=1e-14)


def test_accumulated_gradient_is_checked_by_difference(head):
    hidden, weight, target = head
    *_, exact = masked_step(*head, "subset")

    def loss_of(h, w):
        return plain.linear_gather(h, w, target, "subset")

    def overwrites(h, w):
        w.grad.zero_()
        return loss_of(h, w)

    upstream = torch.tensor(0.37, dtype=torch.float64)
    inputs = linear.Inputs(hidden, weight, target)
    *_, found = linear.accumulating(loss_of, inputs)(upstream)
    torch.testing.assert_close(found, 0.37 * exact, rtol=1e-12, atol=1e-14)
    *_, wrong = linear.accumulating(overwrites, inputs)(upstream)
    assert not torch.allclose(wrong, 0.37 * exact, rtol=0.1)


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
    import mmap

    import numpy

    def call():
        scratch = mmap.mmap(-1, 2**24)  # past torch's allocator, and past the C library, which may keep what is freed
        numpy.frombuffer(scratch, dtype=numpy.uint8)[:] = 1
        scratch.close()  # before the call ends
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


def test_errors_compare_row_sparse_outputs_block_by_block(monkeypatch):
    monkeypatch.setattr(harness, "_BLOCK", 6)  # two rows
    dense = torch.zeros(7, 3, dtype=torch.float64)
    dense[1], dense[6] = torch.tensor([1.0, -4.0, 2.0]), torch.tensor([0.5, 0.0, 3.0])
    repeated = torch.sparse_coo_tensor(
        [[6, 1, 6]], torch.stack([dense[6] / 2, dense[1], dense[6] / 2]), (7, 3), check_invariants=True
    )
    for got in (dense, dense.to_sparse(1), repeated):
        for exact in (dense, dense.to_sparse(1)):
            assert harness.errors((got.float(),), (exact,)) == [0.0]
    for row, value in ((1, 1.0), (4, 4.0)):  # a row that has a gradient, and one that should have none
        wrong = dense.clone()
        wrong[row, 0] += value
        for got in (wrong, wrong.to_sparse(1)):
            assert harness.errors((got,), (dense.to_sparse(1),)) == [value / 4]
    wrong[0, 0] = torch.nan
    assert not harness.errors((wrong,), (dense,))[0] <= 1.0
    assert harness.errors((dense[:6],), (dense,)) == [float("inf")]


def test_outputs_are_weighed():
    sparse = torch.sparse_coo_tensor([[1, 4]], torch.ones(2, 3), (7, 3), check_invariants=True)
    assert harness.nbytes((torch.ones(5, dtype=torch.bfloat16), sparse)) == 10 + 2 * 8 + 2 * 3 * 4


def test_a_call_of_minutes_runs_three_times():
    calls = []

    def slow(upstream):
        calls.append(upstream)
        return right(upstream)

    (result,) = harness.measure(dataclasses.replace(a_case(slow=slow), rounds=0), TINY)
    assert len(calls) == 3 and calls[1:] == [None, None]  # checked once, weighed in two, and timed meanwhile
    row = result.row
    assert row["status"] == "ok" and row["rounds"] == 2 and row["p25_s"] <= row["median_s"] <= row["p75_s"]


def test_a_provider_that_does_less_has_a_floor_of_its_own():
    case = a_case(right=right, less=right, least=right)
    problem = case.build()
    problem.providers["less"].traffic = floors.Traffic(8, 2)
    problem.providers["least"].kind = "floor"
    found = {
        result.row["provider"]: result.row
        for result in harness.measure(dataclasses.replace(case, build=lambda: problem), TINY)
    }
    assert found["right"]["floor"] == "measured" and found["right"]["floor_s"] == found["least"]["median_s"]
    assert found["less"]["floor"] == "traffic" and (found["less"]["bytes"], found["less"]["flops"]) == (8, 2)
    assert found["less"]["floor_s"] == pytest.approx(8 / found["less"]["ceiling_bytes_per_s"])


def test_another_computation_is_timed_but_no_peer():
    case = a_case(right=right, another=lambda upstream: (torch.tensor(9.0),))
    problem = case.build()
    problem.providers["another"].kind = "scale"
    rows = [result.row for result in harness.measure(dataclasses.replace(case, build=lambda: problem), TINY)]
    assert [row["status"] for row in rows] == ["ok", "ok"] and "errors" not in rows[1]
    assert report.best(rows)[1]["provider"] == "right"


def test_rounding_of_products_is_allowed_to_peers_alone():
    case = a_case(peer=lambda upstream: (right(upstream)[0], right(upstream)[1] * (1 + 5e-5)), ours=right)
    problem = case.build()
    problem.providers["ours"] = dataclasses.replace(problem.providers["peer"], kind="ours")
    case = dataclasses.replace(case, build=lambda: problem)
    for problem.products, expected in ((False, ["wrong", "wrong"]), (True, ["ok", "wrong"])):
        assert [result.row["status"] for result in harness.measure(case, TINY)] == expected


def test_goals_are_judged_in_their_own_case():
    rows = {
        "ours": {"median_s": 2.0, "peak_extra_bytes": 9e6, "scratch_bytes": 5e6, "share_of_products": 0.7},
        "peer": {"median_s": 4.0, "peak_extra_bytes": 90e6, "scratch_bytes": None},
    }
    for goal, found, met in (
        (Goal("ours", 0.6, "peer"), 0.5, True),
        (Goal("ours", 0.4, "peer"), 0.5, False),
        (Goal("ours", 1e7, quantity="memory"), 9e6, True),
        (Goal("ours", 1.0, "peer", "memory"), 0.1, True),
        (Goal("ours", 6e6, quantity="scratch", at_least=True), 5e6, False),
        (Goal("ours", 0.65, quantity="products", at_least=True), 0.7, True),
        (Goal("ours", 1.0, "peer", "scratch"), None, None),
        (Goal("ours", 1.0, "missing"), None, None),
    ):
        judged = goal.judge(rows)
        assert (judged["found"], judged["met"]) == (pytest.approx(found) if found else None, met), goal
    case = dataclasses.replace(
        a_case(right=right), goals=(Goal("right", 1e-12), Goal("right", 1e9, quantity="scratch", at_least=True))
    )
    problem = case.build()
    problem.providers["absent"] = Provider(None, missing="not installed")
    absent = (*case.goals, Goal("right", 1.0, "absent"), Goal("absent", 1.0))  # the row says why; no goal does again
    case = dataclasses.replace(case, goals=absent, providers=("right", "absent"), build=lambda: problem)
    table = report.table([result.row for result in harness.measure(case, TINY)])
    assert table.count("absent") == 1 and "absent: unavailable in 1 case: not installed" in table
    assert "tiny fp32 plain fwd+bwd: right at most 0.00 us: " in table and "MISSED" in table
    assert "right at least 1.00 GB beyond its outputs: 0." in table


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_goals_name_providers_of_their_case(device):
    promised = {key[1:] for key in linear.GOALS if key[0] == device}
    for case in linear.cases(Settings("all", device)):
        promised -= {(case.shape, case.variant)} if case.goals else set()
        for goal in case.goals:
            assert goal.provider in case.providers and goal.against in (*case.providers, ""), (case.name, goal)
    assert not promised


def test_no_case_begins_after_the_deadline():
    settings = Settings("tiny", "cpu", deadline=time.time() - 1)
    (result,) = harness.measure(a_case(right=right), settings)
    assert result.row["status"] == "skipped" and "out of time" in result.row["reason"]


@pytest.mark.parametrize("module", [subset, linear], ids=lambda module: module.OPERATION)
def test_every_variant_is_computed_alike_by_all_who_can(module):
    cases = [case for case in module.cases(TINY) if case.mode == "forward_backward"]
    assert {case.variant for case in cases} == set(plain.VARIANTS)
    for case in cases:
        rows = [result.row for result in harness.measure(case, TINY)]
        assert {row["status"] for row in rows} <= {"ok", "unavailable"}, report.table(rows)
        done = {row["provider"]: row for row in rows if row["status"] == "ok"}
        assert "reference" in done and done.keys() & {"zeros_like", "matmuls"}
        assert any(row["kind"] == "peer" for row in done.values())
        for row in done.values():
            assert row["p25_s"] <= row["median_s"] <= row["p75_s"] and row["bytes"] > 0 and row["rounds"] >= 3
            assert row["machine"]["torch"] == torch.__version__ and row["memory_method"] and row["output_bytes"] > 0
        if module is linear:
            assert all(0 < row["share_of_products"] < 1.5 for row in done.values())
            forms = {"subset": {"-sparse", "-accumulate"}, "mixture": {"-32MB", "-4GB"}, "full": {"-32MB", "-4GB", "-0"}}
            assert {f"cpp{form}" for form in forms.get(case.variant, ())} <= set(case.providers)
            assert case.variant != "subset" or {"reference-sparse", "reference-accumulate"} <= done.keys()
            assert case.variant != "full" or "cross_entropy" in done


ATTENTION = [bench_additive_attention, bench_attention_coverage, bench_attention_coverage_from_scores, bench_training]


@pytest.mark.parametrize("module", ATTENTION, ids=lambda module: module.OPERATION)
def test_attention_is_computed_alike_by_all_who_can(module):
    """Ours and plain torch's, outputs and gradients, against float64, at the tiny shape in every variant and mode."""
    cases = module.cases(TINY)
    assert len(cases) == len({case.name for case in cases}) >= 2
    for case in cases:
        rows = [result.row for result in harness.measure(case, TINY)]
        assert {row["status"] for row in rows} <= {"ok", "unavailable"}, report.table(rows)
        done = {row["provider"]: row for row in rows if row["status"] == "ok"}
        assert "cpp" in done or not fastcap.backends()["cpp"]
        assert any(row["kind"] == "peer" for row in done.values())
        assert all(row["errors"] for row in done.values() if row["kind"] not in ("floor", "scale"))


@pytest.mark.parametrize("module", ATTENTION, ids=lambda module: module.OPERATION)
def test_goals_of_attention_name_providers_of_their_case(module):
    promised = 0
    for case in module.cases(Settings("default", "cpu")):
        for goal in case.goals:
            assert goal.provider in case.providers and goal.against in (*case.providers, ""), (case.name, goal)
            promised += 1
    assert promised


def test_floor_of_additive_attention_by_hand():
    # 2 images, 3 locations, keys of 4 and values of 5 numbers: 24 keys, 30 values
    given = dict(B=2, L=3, A=4, D=5, itemsize=4)
    assert floors.additive_attention(**given, steps=1, backward=False) == floors.Traffic(54 * 4, 24 * 4 + 30 * 2)
    one = floors.additive_attention(**given, steps=1, backward=True)  # read twice, written once
    assert one == floors.Traffic(3 * 54 * 4, 24 * 12 + 30 * 5)
    three = floors.additive_attention(**given, steps=3, backward=True)  # read 3 + 3 times, keys once more, written once
    assert three == floors.Traffic((6 * 54 + 24 + 54) * 4, 3 * (24 * 12 + 30 * 5))


def test_floor_of_coverage_by_hand():
    # 2 captions of 3 steps over 4 locations, one head: 24 weights, 8 sums, which are written and read in float32
    given = dict(B=2, heads=1, T=3, L=4, itemsize=2)
    assert floors.attention_coverage(**given, backward=False) == floors.Traffic(24 * 2, 24 + 3 * 8)
    assert floors.attention_coverage(**given, backward=True) == floors.Traffic((24 + 8) * 2 + 64, 24 + 4 * 8)
    ragged = floors.attention_coverage(**given, valid=5, backward=True)  # 20 weights read, 24 gradients written
    assert ragged == floors.Traffic((20 + 24) * 2 + 64, 20 + 4 * 8)


def test_floor_of_coverage_from_scores_by_hand():
    # 2 captions, 1 head, 3 steps, 4 locations, 5 features: queries of 30 numbers and keys of 40; a product: 2*2*3*4*5 FLOPs
    given = dict(B=2, heads=1, T=3, L=4, E=5, itemsize=4)
    assert floors.attention_coverage_from_scores(**given, backward=False) == floors.Traffic(280, 240)
    assert floors.attention_coverage_from_scores(**given, backward=True) == floors.Traffic(3 * 280, 4 * 240)


def test_floor_of_contrastive_rewards_by_hand():
    # 2 texts, 3 images, 5 features: 25 numbers, a product of 2 x 2 x 3 x 5 FLOPs
    assert floors.contrastive_reward(2, 3, 5, 4, backward=False) == floors.Traffic(100, 60)
    assert floors.contrastive_reward(2, 3, 5, 4, backward=True) == floors.Traffic(300, 240)


@pytest.mark.parametrize("group", [1, 2**27])  # a text at a time, and all at once
@pytest.mark.parametrize("name", ["tiny", "tiny_shared"])
def test_exact_contrastive_answer_is_plain_torchs_in_float64(name, group, monkeypatch):
    monkeypatch.setattr(plain, "GROUP", group)
    sizes = bench_contrastive_reward.SHAPES[name]
    text, image, positive = bench_contrastive_reward.embeddings(sizes, torch.float64, "cpu")
    rewards = plain.contrastive(text, image, positive, 20.0)
    torch.testing.assert_close(plain.contrastive_exact(text, image, positive, 20.0, "reward"), (rewards,))
    published = plain.contrastive_published(text, image, positive, 20.0)
    torch.testing.assert_close(published[rewards < 0.7], rewards[rewards < 0.7])
    assert (rewards < 0.7).any() and published.max() <= 16 / 20
    leaves = [x.requires_grad_() for x in (text, image)]
    losses = {"reward": lambda: -20 * plain.contrastive(*leaves, positive, 20.0).mean()}
    if positive is None:
        losses["infonce"] = lambda: plain.info_nce(*leaves, 20.0)
    for variant, of in losses.items():
        loss, upstream = of(), torch.tensor(0.37, dtype=torch.float64)
        wanted = (loss.detach(), *torch.autograd.grad(loss, leaves, upstream))
        found = plain.contrastive_exact(text, image, positive, 20.0, variant, upstream)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_contrastive_rewards_are_computed_alike_by_all_who_can():
    cases = bench_contrastive_reward.cases(TINY)
    assert len(cases) == 6 and {case.variant for case in cases} == set(bench_contrastive_reward.VARIANTS)
    for case in cases:
        rows = [result.row for result in harness.measure(case, TINY)]
        assert {row["status"] for row in rows} <= {"ok", "unavailable"}, report.table(rows)
        done = {row["provider"]: row for row in rows if row["status"] == "ok"}
        assert {"reference", "eager", "product"} <= done.keys() and ("cpp" in done or not fastcap.backends()["cpp"])
        assert all(row["errors"] for row in done.values() if row["kind"] not in ("floor", "scale"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_goals_of_contrastive_rewards_name_providers_of_their_case(device):
    promised = {}
    for case in bench_contrastive_reward.cases(Settings("default", device)):
        promised[case.shape] = promised.get(case.shape, 0) + len(case.goals)
        for goal in case.goals:
            assert goal.provider in case.providers and goal.against in (*case.providers, ""), (case.name, goal)
    assert promised["b8192"] and promised["rl"] and (device == "cpu" or promised["b65536"])


def test_floor_of_ranks_by_hand():
    assert floors.retrieval_ranks(2, 3, 5, 4) == floors.Traffic(100, 60)


def test_ranks_are_computed_alike_by_all_who_can():
    cases = bench_retrieval_ranks.cases(TINY)
    assert [case.shape for case in cases] == ["tiny", "tiny_shared"]
    for case in cases:
        rows = [result.row for result in harness.measure(case, TINY)]
        assert {row["status"] for row in rows} <= {"ok", "unavailable"}, report.table(rows)
        done = {row["provider"]: row for row in rows if row["status"] == "ok"}
        assert {"reference", "eager", "float64", "product"} <= done.keys()
        assert "cpp" in done or not fastcap.backends()["cpp"]
        assert all(row["errors"] == [0.0, 0.0] for row in done.values() if row["kind"] not in ("floor", "scale"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_goals_of_ranks_name_providers_of_their_case(device):
    for case in bench_retrieval_ranks.cases(Settings("default", device)):
        assert case.goals
        for goal in case.goals:
            assert goal.provider in case.providers and goal.against in (*case.providers, ""), (case.name, goal)


def test_cider_d_is_computed_alike_by_all_who_can():
    assert floors.cider_d(100, 20) == floors.Traffic(100, 240)
    (case,) = bench_cider_d.cases(TINY)
    rows = [result.row for result in harness.measure(case, TINY)]
    done = {row["provider"]: row for row in rows if row["status"] == "ok"}
    assert "reference" in done and ("cpp" in done or not fastcap.backends()["cpp"]), report.table(rows)
    assert ("pycocoevalcap" in done) == (importlib.util.find_spec("pycocoevalcap") is not None)
    assert bench_cider_d.cases(Settings("default", "cuda")) == []
    candidates, references = bench_cider_d.texts(bench_cider_d.SHAPES["coco5k"])
    assert len(candidates) == len(references) == 5000 and {len(group) for group in references} == {5}
    for case in bench_cider_d.cases(Settings("default", "cpu")):
        assert case.goals and all(goal.provider in case.providers for goal in case.goals)


def test_floor_of_a_training_step_by_hand():
    # 1 caption of 2 words over 3; 4 locations of 5 numbers; attention 6, state 7 wide; 100 parameters
    found = floors.training_step(1, 2, 4, 6, 5, 7, 3, 100)
    keys, values = 4 * 6, 4 * 5
    moved = 2 * (keys + values) * 2 + keys + keys  # T steps forward and backward, keys once more, their gradient
    products = 2 * 2 * 4 * 5 * 6 + 3 * 2 * 2 * (7 * 3 + (5 + 14) * 28 + 7 * 6 + (7 + 5) * 7)
    assert found == floors.Traffic(4 * moved + 2800, products)


def test_ids_name_provider_shape_dtype_and_mode():
    case = subset.cases(Settings("quick", "cpu"))[1]
    assert case.name == "blip-fp32-subset-forward_backward" and case.providers[0] == "cpp"


@pytest.mark.parametrize("module", [subset, linear], ids=lambda module: module.OPERATION)
def test_too_large_a_case_is_skipped(module, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10**6)
    rows = [result.row for result in harness.measure(module.cases(Settings("quick", "cpu"))[0], TINY)]
    assert {row["status"] for row in rows} == {"skipped"} and "needs " in rows[0]["reason"]
    assert "0.0 GB are free" in rows[0]["reason"] or "0 GB are free" in rows[0]["reason"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("module", [subset, linear], ids=lambda module: module.OPERATION)
def test_gpu_rows_hold_device_and_host_time(module):
    settings = Settings("tiny", "cuda", seconds=0.05)
    for case in module.cases(settings)[:2]:
        rows = [result.row for result in harness.measure(case, settings)]
        timed = [row for row in rows if row["status"] == "ok"]
        assert {"triton", "gather"} <= {row["provider"] for row in timed}, report.table(rows)
        assert all(row["host_s"] > 0 and row["peak_extra_bytes"] is not None for row in timed)


def test_missing_peers_say_why():
    reasons = peers.missing("cpu")
    of_gpus = {"liger_kernel", "liger_kernel_linear", "cut_cross_entropy", "inf_cl"}
    assert set(reasons) - {"open_clip"} == of_gpus
    assert all("runs on GPUs only" in reasons[name] for name in of_gpus)
    assert "pip install open-clip-torch" in reasons.get("open_clip", "pip install open-clip-torch")


def test_torch_chunks_rows_as_asked():
    peer = peers.torch_chunked(3)
    if peer.call is None:
        pytest.skip(peer.reason)
    hidden, weight, target = torch.randn(8, 4), torch.randn(11, 4), torch.arange(8)
    torch.testing.assert_close(
        peer.call(hidden, weight, target), torch.nn.functional.cross_entropy(hidden @ weight.T, target)
    )


def test_every_provider_has_its_line(tmp_path):
    rows = [result.row for result in harness.measure(a_case(right=right, wrong=lambda upstream: right(None)), TINY)]
    shown = report.each(rows).splitlines()
    assert shown[0] == "tiny 2, fp32 plain fwd+bwd" and len(shown) == 3
    assert "1.00 of right" in shown[1] and "0.0 MB of it outputs" in shown[1] and shown[2].split() == ["wrong", "wrong"]


# Reports and commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1.23 s"), (0.00341, "3.41 ms"), (812e-6, "812 us"), (0.0451, "45.1 ms"), (5e-8, "0.05 us")],
)
def test_durations_have_three_digits(seconds, text):
    assert report.duration(seconds) == text


def test_bench_runs_through_pytest_and_writes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    for name in [
        name for name in os.environ if name.startswith("PYTEST_XDIST")
    ]:  # its pytest is none of a test run's workers
        monkeypatch.delenv(name)
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
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "only", [("subset_cross_entropy", "cider_d"), pytest.param((), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_gpu_dry_run_writes_at_most_eight_files(only, tmp_path):
    done = gpu_script("--dry-run", "--out", str(tmp_path), *(f"--only={name}" for name in only))
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {"gpu.json", "gpu.log"} <= names and len(names) <= 8
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["name"] for stage in stored["stages"]][:4] == ["build", "inventory", "tests", "sanitize"]
    assert all(stage["result"].startswith(("ok", "left out")) for stage in stored["stages"])
    assert "backend cpp: yes" in done.stdout and "peer liger_kernel: no, Liger-Kernel runs on GPUs only" in done.stdout
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
