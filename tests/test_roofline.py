"""The performance model of a GPU against counts by hand: what is launched, the bytes that it moves, its FLOPs."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch

import fastcap
from fastcap import functional as F_cap
from fastcap.errors import FastcapError

pytest.importorskip("triton")

from fastcap.benchmarks import compile_plans, floors, roofline
from fastcap.benchmarks.harness import DTYPES, Settings
from fastcap.benchmarks.trace import Batch, Work, trace

TARGET = torch.tensor([[1, 2, 1, -100], [3, 4, 5, 6]])  # 7 tokens of 6 words; 3 x 2 + 4 x 4 = 22 pairs
V, H = 10, 3


def meta(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta").requires_grad_()


def of(call, batch, *inputs):
    """The work of a call and its backward, with an upstream gradient that is there."""

    def run():
        out = call(*inputs)
        torch.autograd.grad(out, inputs, torch.empty_like(out))

    return trace(run, batch)


def test_a_subset_from_logits_is_three_launches_of_known_size():
    call = functools.partial(F_cap.subset_cross_entropy, target=TARGET.to("meta"), first_token="subset")
    batch = Batch.of(TARGET, "subset")
    assert batch == Batch(positions=8, valid=7, words=6, dense=0, gathered=22, terms=22)
    kept = 8 * 5 * 4  # [2, 4, 1 + 4] numbers of 4 bytes, of ids and of gradients each
    assert of(call, batch, meta(2, 4, V)) == [
        # the labels, a sector a logit, what is kept, and a loss and a weight a token
        Work("subset_cross_entropy_fwd", 64 + 22 * 32 + 2 * kept + 2 * 8 * 4, 3 * 22),
        Work("subset_cross_entropy_reduce", 2 * 8 * 4 + 4 + 4),
        # the upstream gradient and 1 / the denominator, labels, what was kept, and the gradient written
        Work("subset_cross_entropy_bwd", 4 + 4 + 64 + 2 * kept + 8 * V * 4, 3 * 22),
    ]


def test_dense_rows_are_read_whole_forward_and_backward():
    call = functools.partial(F_cap.subset_cross_entropy, target=TARGET.to("meta"), subset="full")
    rows, stats = 7 * V * 2, 8 * 8 * 4
    assert of(call, Batch.of(TARGET, "full"), meta(2, 4, V, dtype=torch.bfloat16)) == [
        Work("subset_cross_entropy_fwd", 64 + rows + stats + 2 * 8 * 4, 3 * 7 * V),
        Work("subset_cross_entropy_reduce", 2 * 8 * 4 + 4 + 4),
        Work("_to_copy", 4 + 2),  # the loss in the dtype of the logits, and its gradient back
        Work("_to_copy", 2 + 4),
        Work("subset_cross_entropy_bwd", 4 + 4 + 64 + rows + stats + 8 * V * 2, 3 * 7 * V),
    ]


def test_a_subset_with_the_head_by_hand():
    call = functools.partial(F_cap.linear_subset_cross_entropy, target=TARGET.to("meta"), first_token="subset")
    x, words, labels, losses, kept = 8 * H * 4, 6 * H * 4, 64, 8 * 4, 2 * 4 * 4 * 4
    assert of(call, Batch.of(TARGET, "subset"), meta(2, 4, H), meta(V, H)) == [
        Work("denominator", labels + 4),
        Work("caption_fwd", x + words + labels + losses + kept, 2 * 8 * 4 * H),
        Work("reduce", losses + 4 + 4),
        Work("caption_bwd", 4 + 4 + x + words + labels + kept + x + x + 8 * 4, 2 * 2 * 8 * 4 * H),  # dx, and two by place
        Work("eq", labels + 8),  # what is ignored is no word
        Work("masked_fill", 2 * labels + 8),
        Work("first", labels + 32 + 64 + 32, 2 * 8 * 8),
        Work("rank", labels + 32 + 64 + 3 * 32, 2 * 8 * 8),
        Work("new_zeros", x),
        Work("add_rows", 2 * x + 3 * 32 + x),
        Work("zero_", V * H * 4),
        Work("write_rows", words + words + 64),  # of the values those of words, and all ids
    ]


def test_all_logits_kept_are_three_products_and_a_row_kernel():
    call = functools.partial(F_cap.linear_subset_cross_entropy, target=TARGET.to("meta"), subset="full")
    work = of(call, Batch.of(TARGET, "full"), meta(2, 4, H), meta(V, H))
    products = [one for one in work if one.name in ("mm", "matmul")]
    logits, head, x = 8 * V * 4, V * H * 4, 8 * H * 4
    assert [one.bytes for one in products] == [x + head + logits] * 3  # logits; dx; the head's gradient
    assert [one.flops for one in products] == [2 * 8 * V * H] * 3
    (emit,) = (one for one in work if one.name == "linear_subset_cross_entropy_emit")
    assert emit.bytes >= 2 * logits and emit.flops == 3 * 8 * V


def test_coverage_by_hand():
    B, T, L = 2, 5, 4
    sums, alpha = B * L * 4, B * T * L * 4
    forward, total, backward = of(F_cap.attention_coverage, Batch(B * T, B * T), meta(B, T, L))
    assert forward == Work(
        "attention_coverage_fwd", alpha + sums + 2 * 4, B * T * L + 3 * B * L
    )  # alpha, residuals, two parts
    assert total == Work("scaled_sum", 2 * 4 + 4)
    assert backward == Work("attention_coverage_bwd", 4 + sums + sums, B * L)  # one row for all steps
    lengths = torch.tensor([5, 3])
    work = of(functools.partial(F_cap.attention_coverage, lengths=lengths.to("meta")), Batch(10, 8), meta(B, T, L))
    forward, backward = (one for one in work if one.name.startswith("attention_coverage"))
    assert forward.bytes == alpha * 8 // 10 + sums + 2 * 4 + B * T
    assert backward.bytes == 4 + sums + alpha + B * T


def test_coverage_from_scores_multiplies_seven_times():
    """2 products forward; backward 3 for the queries and 2 for the keys, each of 2 T L E FLOPs a caption and head."""
    B, heads, T, L, E = 2, 3, 20, 36, 64
    work = of(F_cap.attention_coverage_from_scores, None, meta(B, heads, T, E), meta(B, heads, L, E))
    assert sum(one.flops for one in work) == 7 * 2 * B * heads * T * L * E
    floor = floors.attention_coverage_from_scores(B, heads, T, L, E, 4, backward=True)
    assert floor.bytes < sum(one.bytes for one in work) < 3 * floor.bytes


def test_attention_reads_keys_and_values_once_each_way():
    B, L, A, D = 2, 9, 24, 17
    work = trace(lambda: F_cap.additive_attention(meta(B, L, A), meta(B, A), meta(A), meta(B, L, D)), None)
    by_name = {one.name: one for one in work}
    alpha = B * L * 4
    assert by_name["scores"] == Work("scores", B * L * A * 4 + B * A * 4 + A * 4 + alpha, 4 * B * L * A)
    assert by_name["softmax"].bytes == alpha
    assert by_name["context"].bytes == alpha + B * L * D * 4 + B * D * 4


def test_the_contrastive_reward_is_one_product_and_its_gradient_three_more():
    P, Q, D = 512, 512, 64
    call = functools.partial(F_cap.decoupled_contrastive_loss)
    work = of(call, None, meta(P, D, dtype=torch.bfloat16), meta(Q, D, dtype=torch.bfloat16))
    products = [one for one in work if one.flops]
    assert [one.name for one in products] == [
        "contrastive_reward_statistics", "contrastive_reward_weights", "mm", "mm",
    ]  # fmt: skip
    assert {one.flops for one in products} == {2 * P * Q * D} and {one.unit for one in products} == {"half"}
    assert products[1].bytes >= P * Q * 2 + (P + Q) * D * 2  # the weights are written, and read by each product
    assert products[2].bytes == P * Q * 2 + Q * D * 2 + P * D * 4


def test_ranks_of_texts_and_images_come_of_one_product_over_both():
    P, Q, D = 40, 8, 16
    positive = torch.empty(P, dtype=torch.int64, device="meta")
    work = trace(lambda: F_cap.retrieval_ranks(meta(P, D), meta(Q, D), positive=positive), None)
    (counts,) = (one for one in work if one.name == "counts")
    assert counts.flops == 2 * P * (P + Q) * D


def test_time_is_the_largest_of_bytes_flops_and_the_launch():
    machine = roofline.Machine("of tests", 1e9, {"half": 1e12, "float32": 1e11}, 1e-6)
    bytes_, flops, small = Work("a", 10**6, 10**6, "half"), Work("b", 10, 10**9), Work("c", 1, 1)
    assert [roofline.bound_of(work, machine) for work in (bytes_, flops, small)] == ["bytes", "FLOPs", "launches"]
    assert roofline.predict([bytes_, flops, small], machine) == pytest.approx(1e-3 + 1e-2 + 1e-6)


@pytest.mark.parametrize("operation", roofline.OPERATIONS)
def test_no_call_moves_or_multiplies_less_than_the_floor_of_the_operation(operation):
    """Every case of a GPU's run has a prediction, and what our plans do is at least what anybody must."""
    bench = roofline._bench(operation)
    cases = bench.cases(Settings(profile="all", device="cuda"))
    assert cases
    for case in cases:
        backward = case.mode == "forward_backward"
        given = compile_plans.Given(bench.SHAPES[case.shape], DTYPES[case.dtype], case.variant, backward, "", "sm_90")
        floor = compile_plans.PLANNERS[operation](given)["floor"]
        work = roofline.work_of(operation, case.shape, case.dtype, case.variant, case.mode)
        assert sum(one.bytes for one in work) >= floor.bytes, case.name
        assert sum(one.flops for one in work) >= floor.flops, case.name


@pytest.mark.parametrize("form", roofline.forms("linear_subset_cross_entropy"))
def test_every_form_of_the_heads_gradient_has_a_prediction(form):
    case = "linear_subset_cross_entropy", "blip", "bf16", "subset", "forward_backward"
    dense, work = (roofline.work_of(*case, given) for given in ("", form))
    sizes = [sum(one.bytes for one in works) for works in (dense, work)]
    if form in ("-sparse", "-accumulate"):  # nothing of the size of the head is written
        assert sizes[1] < 30_522 * 768 * 2 < sizes[0]
    else:
        assert sizes[0] == sizes[1]


def test_what_we_do_not_model_is_refused():
    for given, message in (
        (("no-such-operation", "blip", "fp32", "subset", "forward"), "operation must be one of subset_cross_entropy"),
        (("subset_cross_entropy", "no-such-shape", "fp32", "subset", "forward"), "shape must be one of tiny"),
        (("subset_cross_entropy", "blip", "fp32", "subset", "sideways"), "mode must be one of forward"),
        (("subset_cross_entropy", "blip", "fp32", "subset", "forward", "-sparse"), "form must be one of"),
    ):
        with pytest.raises(FastcapError, match=message):
            roofline.work_of(*given)


def test_the_command_prints_a_line_a_case(capsys):
    assert roofline.main(["attention_coverage"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("attention_coverage ") == len(
        roofline._bench("attention_coverage").cases(Settings(profile="all", device="cuda"))
    )
    assert "Predicted for an NVIDIA H200: 4.3 TB/s, 790 TFLOP/s of bf16." in printed
    assert roofline.main(["no-such-operation"]) == 2


def test_tracing_leaves_everything_as_it_was():
    """The operations choose their backends as before."""
    before = fastcap.backends()
    roofline.work_of("attention_coverage", "sat", "fp32", "plain", "forward")
    assert fastcap.backends() == before
    alpha = torch.rand(2, 3, 4)
    assert torch.allclose(F_cap.attention_coverage(alpha), ((1 - alpha.sum(1)) ** 2).mean())


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "fastcap.benchmarks.roofline", "retrieval_ranks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "coco5k" in done.stdout, done.stderr
