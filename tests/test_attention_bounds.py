"""What the attention and contrastive kernels would get wrong on hardware alone, told without a GPU: offsets beyond 2^31,
launch grids, barriers, maxima of NaN, awkward strides. docs/gpu-review.md has the arguments."""

from __future__ import annotations

import math
import mmap
import os
import re
import warnings

import pytest
import torch

import fastcap
from fastcap import functional as F_cap
from fastcap.errors import FastcapError
from fastcap.testing import additive, contrastive, coverage, coverage_from_scores, ranks, upstream

triton = pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
pytestmark = pytest.mark.usefixtures("quiet_compiler")
compiles = pytest.mark.skipif(INTERPRETING, reason="nothing can be compiled under TRITON_INTERPRET=1")

MOST_X, MOST_YZ = 2**31 - 1, 65_535  # blocks of a CUDA grid


# Grids -----------------------------------------------------------------------------------------------------------------


def large_plans():
    """Calls that a GPU of 192 GB can hold, of few locations, of many, of many captions and of wide rows."""
    for shape in ((2**24, 1, 1), (1, 1, 2**31 - 2**12), (3, 2**20, 2**10), (70_000, 70_000, 3)):
        yield from coverage.plan_attention_coverage(shape, torch.bfloat16, masked=True)
    for shape in ((2**20, 8, 1, 1, 64), (1, 1, 2**24, 3, 256), (1, 1, 3, 2**24, 256), (1, 1, 3, 5, 2**20)):
        yield from coverage_from_scores.plan_attention_coverage_from_scores(shape, torch.bfloat16)
    for shape in ((2**24, 1, 16, 16), (1, 2**24, 512, 512), (2, 3, 2**20, 2**20)):
        yield from additive.plan_additive_attention(*shape, torch.bfloat16, steps=2)
        yield from additive.plan_additive_attention(*shape, torch.float32)
    for shape in ((2**24, 2**24, 768), (2**27, 1, 16), (1, 2**27, 16)):
        for baseline in ("logsumexp", "max"):
            yield from contrastive.plan_contrastive_reward(shape, torch.bfloat16, baseline=baseline)
        yield from ranks.plan_retrieval_ranks(*shape, torch.bfloat16)


def test_grids_are_within_what_cuda_launches():
    """And their product too: Triton's launcher forms it as an int, and launches nothing where that is not above 0."""
    for launch in large_plans():
        x, *yz = launch.grid
        assert 0 < x <= MOST_X and all(0 < n <= MOST_YZ for n in yz), (launch.kernel, launch.grid)
        assert math.prod(launch.grid) <= MOST_X, (launch.kernel, launch.grid)


# Offsets ---------------------------------------------------------------------------------------------------------------


def reserved(size: int, dtype: torch.dtype) -> torch.Tensor:
    """[size] zeros, of which only what is written takes memory."""
    MAP_NORESERVE = 0x4000
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except (OSError, AttributeError) as error:
        pytest.skip(f"no {size * dtype.itemsize >> 30} GiB of addresses: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x with a stride in `dim` that carries its last element past 2^31 elements; 32-bit offsets, which wrap, would lead to
    zeros in front of it."""
    stride = -(-(2**31) // (x.shape[dim] - 1) // 16) * 16
    strides = list(x.contiguous().stride())
    strides[dim] = stride
    far = reserved(2**32 + 2**20 + stride, x.dtype).as_strided(x.shape, strides, 2**31)
    return far.copy_(x)


def results(function, arguments, leaves, gradients=None):
    """Outputs and gradients of `leaves` under Triton; `gradients`: of the outputs, where they are not `upstream`'s."""
    given = {**arguments, **{name: arguments[name].detach().requires_grad_() for name in leaves}}
    with fastcap.backend("triton"):
        outputs = function(**given)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    if not leaves:
        return outputs
    gradients = gradients or [upstream(output) for output in outputs]
    found = torch.autograd.grad(outputs, [given[name] for name in leaves], gradients)
    return *(output.detach() for output in outputs), *found


def assert_same_wherever_it_lies(function, arguments, leaves, name, dim, *, bits=True, **options):
    """bits: to the last one, where torch adds nothing in an order that strides decide."""
    near = {key: x.float() if x.dtype == torch.float64 else x for key, x in arguments.items()}
    far = {**near, name: far_apart(near[name], dim)}
    assert far[name].stride(dim) * (far[name].shape[dim] - 1) >= 2**31
    for found, expected in zip(
        results(lambda **given: function(**given, **options), far, leaves),
        results(lambda **given: function(**given, **options), near, leaves),
        strict=True,
    ):
        assert torch.equal(found, expected) if bits else torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


SOME = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
TAU = torch.tensor([0.5, 1.25, -0.75])


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "dim"), [*(("alpha", dim) for dim in range(4)), ("mask", 0), ("mask", 1), ("target", 0)], ids=str
)
def test_attention_coverage_reads_2_to_the_31_elements_apart(name, dim, in_place):
    arguments = {"alpha": coverage.make_alpha(3, 3, 3, 3), "mask": SOME, "target": TAU}
    function = F_cap.attention_coverage
    assert_same_wherever_it_lies(function, arguments, ["alpha"], name, dim, reduction="none")


@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [0, 2])
def test_upstream_gradients_may_lie_2_to_the_31_elements_apart(dim, in_place):
    alpha, pairs = coverage.make_alpha(3, 3, 3, 3).float(), coverage_from_scores.make_query_and_key(3, 3, T=3, L=3, E=3)
    near = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    for gradient in ([near], [far_apart(near, dim)]):
        given = {"reduction": "none", "mask": SOME}
        of_alpha = results(F_cap.attention_coverage, {"alpha": alpha, **given}, ["alpha"], gradient)
        pairs = {key: x.float() for key, x in pairs.items()}
        of_pairs = results(F_cap.attention_coverage_from_scores, {**pairs, **given}, ["query", "key"], gradient)
        if gradient[0] is near:
            expected = of_alpha + of_pairs
    for found, wanted in zip(of_alpha + of_pairs, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "dim"), [("query", 0), ("query", 2), ("key", 1), ("key", 3)], ids=str)
def test_attention_coverage_from_scores_reads_2_to_the_31_elements_apart(name, dim, in_place):
    arguments = coverage_from_scores.make_query_and_key(3, 3, T=3, L=3, E=3)
    function, given = F_cap.attention_coverage_from_scores, {"mask": SOME, "key_mask": SOME}
    assert_same_wherever_it_lies(function, {**arguments, **given}, ["query", "key"], name, dim, reduction="none")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "dim"), [*((name, dim) for name in ("keys", "values") for dim in range(3)), ("mask", 0), ("mask", 1)], ids=str
)
def test_additive_attention_reads_2_to_the_31_elements_apart(name, dim, in_place):
    arguments = {**additive.make_locations(3, 3, 3, 3), "mask": SOME}
    leaves = ["keys", "query", "v", "values"]
    assert_same_wherever_it_lies(F_cap.additive_attention, arguments, leaves, name, dim)
    if name == "keys":
        steps = {**additive.make_locations(3, 3, 3, 3, T=2), "mask": SOME}
        assert_same_wherever_it_lies(additive.run_steps, steps, leaves, name, dim)


@pytest.mark.interpreter
@pytest.mark.parametrize("dim", range(3))
def test_operators_read_what_steps_report_2_to_the_31_elements_apart(dim, in_place):
    """And weights and their gradients, which the public functions pass contiguous."""
    given = {key: x.float() for key, x in additive.make_locations(3, 3, 3, 3, T=3).items()}
    keys, v, dscores = given["keys"], given["v"], torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    bwd = torch.ops.fastcap.additive_attention_memory_bwd
    expected = bwd(dscores, given["query"], keys, v, "tanh", "triton")
    for of_memory in ((far_apart(dscores, dim), given["query"]), (dscores, far_apart(given["query"], dim))):
        for found, wanted in zip(bwd(*of_memory, keys, v, "tanh", "triton"), expected, strict=True):
            assert torch.equal(found, wanted)
    if dim == 2:
        return
    weights, values, x = dscores[0], given["values"], dscores[1]
    far = far_apart(weights, dim), far_apart(x, dim)
    context = torch.ops.fastcap.additive_attention_context_fwd
    assert torch.equal(context(far[0], values, "triton"), context(weights, values, "triton"))
    bwd = torch.ops.fastcap.additive_attention_context_bwd
    expected = bwd(x, weights, values, True, True, "triton")
    for of_context in ((x, far[0]), (far[1], weights)):
        for found, wanted in zip(bwd(*of_context, values, True, True, "triton"), expected, strict=True):
            assert torch.equal(found, wanted)
    alpha, query = weights.softmax(1), given["query"][0]
    bwd = torch.ops.fastcap.additive_attention_weights_bwd
    expected = bwd(x, alpha, keys, query, v, "tanh", True, "triton")
    for of_weights in ((far[1], alpha, query), (x, far_apart(alpha, dim), query), (x, alpha, far_apart(query, dim))):
        dalpha, weights, given_query = of_weights
        for found, wanted in zip(bwd(dalpha, weights, keys, given_query, v, "tanh", True, "triton"), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "dim", "sizes"),
    [("text", 0, (3, 3, 16)), ("image", 0, (3, 3, 16)), ("text", 0, (66, 5, 16)), ("image", 0, (5, 66, 16)),
     ("text", 1, (3, 3, 3)), ("image", 1, (3, 3, 70))], ids=str,
)  # fmt: skip
def test_contrastive_rewards_and_ranks_read_2_to_the_31_elements_apart(name, dim, sizes, in_place):
    """In a tile by 64-bit offsets where 32 bits do not reach, and from tile to tile always. Strides of features: a copy."""
    arguments = contrastive.make_pairs(*sizes) | {"positive": contrastive.make_positive(*sizes[:2])}
    for baseline in ("logsumexp", "max"):
        options = {"baseline": baseline, "bits": False}
        assert_same_wherever_it_lies(F_cap.contrastive_reward, arguments, ["text", "image"], name, dim, **options)
    assert_same_wherever_it_lies(F_cap.retrieval_counts, arguments, [], name, dim)


# Maxima ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hardwares_maxima(monkeypatch):
    """A GPU's maximum of a number and NaN is the number; the interpreter's, between elements, is NaN."""
    import numpy as np

    interpreter = pytest.importorskip("triton.runtime.interpreter")
    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        chosen = lambda self, x, y, function=function: self.binary_op(x, y, function)  # noqa: E731
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, chosen)


def test_rows_far_apart_are_read_where_they_lie_and_others_from_a_copy():
    """By offsets of 64 bits where 32 do not reach; in pieces of 16 bytes, which are nowhere in a row of 513 numbers."""
    from fastcap.kernels import contrastive_reward as kernels

    def launch(text, image):
        n = torch.empty(len(text), device="meta"), torch.empty(len(image), device="meta")
        given = text, image, n[0].long(), *n, n[0], n[0], n[0].long(), n[1], n[1].long()
        return kernels.plan_contrastive_reward_fwd(*given, "logsumexp", "ieee")[0].args

    def empty(*size):
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    plain = empty(4096, 512)
    far, sliced, odd = empty(4096, 2**25)[:, :512], empty(4096, 513)[:, 1:], empty(4096, 513)
    for text, wide, copied in ((plain, 0, 0), (far, 1, 0), (sliced, 0, 1), (odd, 0, 1), (empty(512, 4096).T, 0, 1)):
        args = launch(text, empty(4096, text.shape[1]))
        assert args["WIDE"] == bool(wide) and args["EVEN"]
        assert (args["text_ptr"] is not text) == bool(copied)
        assert args["text_strides"][0] % 16 == 0 and args["text_strides"][1] == 1 and args["D"] % 16 == 0


@pytest.mark.interpreter
@pytest.mark.parametrize(("broken", "place"), [(torch.nan, (4, 1)), (torch.inf, (8, 2)), (-torch.inf, (0, 0))], ids=str)
def test_what_is_not_finite_reaches_the_same_results_with_a_gpus_maxima(place, broken, hardwares_maxima):
    def spoilt(arguments, name, *where):
        arguments = {key: x.float() if x.dtype == torch.float64 else x for key, x in arguments.items()}
        arguments[name] = arguments[name].clone()
        arguments[name][where] = broken
        return arguments

    i, j = place
    pairs = contrastive.make_pairs(9, 9, 3) | {"positive": contrastive.make_positive(9, 9)}
    calls = []
    for name in ("text", "image"):
        for baseline in ("logsumexp", "max"):
            given = spoilt(pairs, name, i, j)
            calls.append(lambda given=given, b=baseline: F_cap.contrastive_reward(**given, baseline=b, normalize=False))
    located = additive.make_locations(2, 9, 3, 4)
    for name in ("keys", "values"):
        given = spoilt(located, name, 1, i, j)
        calls.append(lambda given=given: F_cap.additive_attention(**given))
    dotted = coverage_from_scores.make_query_and_key(2, T=9, L=9, E=3)
    for name in ("query", "key"):
        given = spoilt(dotted, name, 1, i, j)
        calls.append(lambda given=given: F_cap.attention_coverage_from_scores(**given, reduction="none"))
    for call in calls:
        found = {}
        for backend in ("triton", "reference"):
            with fastcap.backend(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                found[backend] = call()
        torch.testing.assert_close(found["triton"], found["reference"], equal_nan=True, rtol=1e-4, atol=1e-4)


# Operators called by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_gradients_of_all_captions_are_not_asked_of_some(backend):
    """The public functions never do. The rows of the others would be memory that nothing wrote."""
    given = {key: x.float() for key, x in additive.make_locations(3, 3, 3, 3).items()}
    keys, v, values, weights = given["keys"], given["v"], given["values"], torch.full((2, 3), 1 / 3)
    with pytest.raises(FastcapError, match=r"additive_attention: query must have a row for each of keys, 3, .* got 2; "):
        bwd = torch.ops.fastcap.additive_attention_weights_bwd
        bwd(weights, weights, keys, given["query"][:2], v, "tanh", True, backend)
    with pytest.raises(FastcapError, match=r"additive_attention: weights must have a row for each of values, 3, .* got 2; "):
        torch.ops.fastcap.additive_attention_context_bwd(torch.ones(2, 3), weights, values, True, True, backend)


def test_a_launch_that_fails_says_so_in_the_one_form():
    built = fastcap.ops._backend.extension()
    if isinstance(built, ImportError) or built.cuda is None or torch.cuda.is_available():
        pytest.skip("needs the CUDA kernels, and no GPU")
    alpha, out = torch.zeros(1, 2, 9), torch.zeros(1, 9)
    with pytest.raises(FastcapError, match=r"^fastcap\.attention_coverage: the kernel must launch on this GPU, got .*; "):
        built.attention_coverage_fwd_cuda(alpha, None, None, out, None, None, 1.0, 0, 0)
    with pytest.raises(FastcapError, match=r"^fastcap\.attention_coverage: the kernel must launch on this GPU, got .*; "):
        built.attention_coverage_bwd_cuda(out, out, None, torch.zeros(1, 1, 9), 0, 0)


# Compiled for GPUs that are not there ----------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=str)
def test_columns_are_written_back_before_other_threads_read_them(target):
    """The partial results of columns, once for each block of rows: a barrier ends the loop over these."""
    from fastcap.kernels._common import compile_for

    launch = contrastive.plan_contrastive_reward((8192, 8192, 512), torch.bfloat16)[0]
    assert launch.args["ROW_BLOCKS"] > 1
    text = compile_for(launch, *target).asm["ttgir"]
    (barrier,) = (found.start() for found in re.finditer(r"\b(?:ttg|gpu)\.barrier\b", text))
    assert max(found.start() for found in re.finditer(r"\btt\.store\b|\bamdg?p?u?\.buffer_store\b", text)) < barrier


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_awkward_embeddings_take_no_more_registers_than_even_ones(dtype):
    """Rows of 513 numbers, read number by number, overflowed the registers of the largest tiles."""
    from fastcap.kernels._common import compile_for
    from fastcap.kernels.contrastive_reward import Device

    hopper = Device(9, 132, 227 << 10)
    even, odd = (
        contrastive.plan_contrastive_reward((65_536, 65_536, D), dtype, precision="high", others=False, device=hopper)
        for D in (512, 513)
    )
    for one, other in zip(even, odd, strict=True):
        ptx = [compile_for(launch, "cuda", 90, 32).asm["ptx"] for launch in (one, other)]
        for instruction in ("cp.async.cg.shared.global", "ld.global.b16", ".local"):
            assert ptx[0].count(instruction) == ptx[1].count(instruction), (one.kernel, instruction)
