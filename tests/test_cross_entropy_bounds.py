"""What the cross-entropy kernels would get wrong on hardware alone, told without a GPU: offsets beyond 2^31, launch grids,
alignment, barriers, shared memory. docs/gpu-review.md has the arguments."""

from __future__ import annotations

import mmap
import os
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastcap
from fastcap import functional as F_cap
from fastcap.errors import FastcapError
from fastcap.ops import _head
from fastcap.testing import make_hidden
from fastcap.testing.launches import plan_linear_subset_cross_entropy, plan_subset_cross_entropy

triton = pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
pytestmark = pytest.mark.usefixtures("quiet_compiler")
compiles = pytest.mark.skipif(INTERPRETING, reason="nothing can be compiled under TRITON_INTERPRET=1")

MOST_X, MOST_YZ = 2**31 - 1, 65_535  # blocks of a CUDA grid
SMALLEST_SHARED = 64 << 10  # bytes a block may have on gfx942; sm_86 and sm_89 give 99 KiB, sm_80 163, sm_90 and sm_100 227


# Grids -----------------------------------------------------------------------------------------------------------------

# 16k tokens of Gemma's words; one caption of as many; nothing divisible by a block; ones
LARGE = {"captions": (820, 20, 262_144, 4096), "flat": (1, 16_400, 262_144, 4096)}
SMALL = {"odd": (3, 61, 30_523, 769), "ones": (1, 1, 1, 1)}
WAYS = {
    "caption": {},
    "caption-first-in-subset": {"first_token": "subset"},
    "mixture": {"mle_weight": 0.01},
    "reverse": {"subset": "reverse"},
    "full": {"subset": "full"},
    "random": {"subset": "random"},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("shape", [*LARGE.values(), *SMALL.values()], ids=[*LARGE, *SMALL])
def test_grids_are_within_what_cuda_launches(shape, options):
    B, T, V, H = shape
    launches = plan_subset_cross_entropy(B, T, V, torch.bfloat16, **options)
    for plan in ("keep", "panels"):
        launches += plan_linear_subset_cross_entropy(B, T, V, H, torch.bfloat16, plan, budget=None, **options)
    for launch in launches:
        x, *yz = launch.grid
        assert 0 < x <= MOST_X and all(0 < n <= MOST_YZ for n in yz), (launch.kernel, launch.grid)


def test_batched_products_have_few_enough_matrices():
    """A library may put the batch in the z of its grid."""
    ids = torch.empty(200_000, 1, dtype=torch.int64, device="meta")
    ranges = _head._chunks(torch.empty(200_000, 1, 1, device="meta"), ids, 1)
    assert ranges[0][0] == 0 and ranges[-1][1] == 200_000
    assert all(end == begin for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False))
    assert max(end - begin for begin, end in ranges) <= MOST_YZ


@pytest.mark.parametrize("subset", ["caption", "random", torch.tensor([3, 9, 1])], ids=["caption", "random", "ids"])
def test_rows_of_the_head_may_be_gathered_in_pieces(subset, fused, monkeypatch):
    """Each of one group of tokens: the same sums, in the same order."""
    if fused.backend == "cuda":
        pytest.skip("has no head")
    call = {k: v.to(fused.device) for k, v in make_hidden(3, 6, 11, 5).items()}
    subset = subset.to(fused.device) if isinstance(subset, torch.Tensor) else subset

    def results():
        leaves = [call[name].clone().requires_grad_() for name in ("input", "linear_weight", "linear_bias")]
        options = {"linear_bias": leaves[2], "subset": subset, "seed": 1, "reduction": "sum"}
        with fastcap.backend(fused.backend):
            loss = F_cap.linear_subset_cross_entropy(*leaves[:2], call["target"], **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    whole = results()
    monkeypatch.setattr(_head, "GATHERED", 1)
    for found, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The largest number of float32 that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.numel = max(self.numel, made.numel())
        return made


def test_sums_of_float16_are_not_made_of_a_float32_copy_of_the_logits():
    logits = torch.randn(40, 203, generator=torch.Generator().manual_seed(0)).half()
    factor = torch.rand(40, 1, generator=torch.Generator().manual_seed(1))
    with Largest() as largest:
        sums = _head._column_sums(logits, factor)
    assert largest.numel <= logits.numel() // 7
    torch.testing.assert_close(sums.double(), (logits.double() * factor.double()).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V", [2**31 - 2**16 + 1, 2**31, 2**40])
def test_a_vocabulary_too_large_for_32_bit_columns_is_refused(V):
    logits, target = torch.empty(1, 1, V, device="meta"), torch.empty(1, 1, dtype=torch.int64, device="meta")
    with pytest.raises(FastcapError, match=rf"input must have at most 2147418112 words, got {V}; "):
        F_cap.subset_cross_entropy(logits, target)
    hidden, head = torch.empty(1, 1, 1, device="meta"), torch.empty(V, 1, device="meta")
    with pytest.raises(FastcapError, match=rf"linear_weight must have at most 2147418112 words, got {V}; "):
        F_cap.linear_subset_cross_entropy(hidden, head, target)


# Offsets ---------------------------------------------------------------------------------------------------------------


def reserved(size: int, dtype: torch.dtype) -> torch.Tensor:
    """[size] zeros, of which only what is written takes memory."""
    MAP_NORESERVE = 0x4000
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except (OSError, AttributeError) as error:
        pytest.skip(f"no {size * dtype.itemsize >> 30} GiB of addresses: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """The numbers of x [B, 3] or [3], each row's 2^30 apart; 32-bit offsets would lead to zeros in front of them."""
    shape = (1, 3) if x.dim() == 1 else x.shape
    far = reserved(2**32 + 64, x.dtype).as_strided(shape, (16, 2**30), 2**31)
    return far.copy_(x).view(x.shape)


FAR = {
    "caption": {},
    "ids": {"subset": torch.tensor([3, 9, 1])},
    "ids-mixture": {"subset": torch.tensor([3, 9, 1]), "mle_weight": 0.5},
}


@pytest.mark.interpreter
@pytest.mark.parametrize("options", FAR.values(), ids=FAR)
def test_labels_ids_and_weights_may_lie_2_to_the_31_elements_apart(options, in_place):
    call = make_hidden(2, 3, 11, 4)
    call["token_weight"] = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]], dtype=torch.float64)
    call["first_token"] = "subset"
    far = {**call, "target": far_apart(call["target"]), "token_weight": far_apart(call["token_weight"]), **options}
    if "subset" in options:
        far["subset"] = far_apart(options["subset"])
    assert far["target"].stride(1) == 2**30
    logits = torch.randn(2, 3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def results(call):
        hidden, head = (call[name].clone().requires_grad_() for name in ("input", "linear_weight"))
        x = logits.clone().requires_grad_()
        rest = {k: v for k, v in call.items() if k not in ("input", "linear_weight", "linear_bias")}
        with fastcap.backend("triton"):
            loss = F_cap.linear_subset_cross_entropy(hidden, head, **rest)
            from_logits = F_cap.subset_cross_entropy(x, **rest)
        gradients = torch.autograd.grad(loss + from_logits, (hidden, head, x))
        return loss.detach(), from_logits.detach(), *gradients

    for found, expected in zip(results(far), results({**call, **options}), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["subset_cross_entropy", "linear_subset_cross_entropy"])
def test_statistics_of_more_than_2_to_the_31_numbers_are_found(kind, in_place):
    """[8, N] for N tokens: 7 N passes 2^31 at 307 million. One program runs, of the N."""
    from fastcap.kernels import linear_subset_cross_entropy as linear
    from fastcap.kernels import subset_cross_entropy as logits_kernels

    from fastcap.ops import _subset
    from fastcap.testing.launches import DEFAULTS

    N, V = 2**29, 7
    x, target = torch.randn(1, 1, V, generator=torch.Generator().manual_seed(0)), torch.tensor([[4]])
    ids, _, _, options = _subset.prepare(kind, x, target, V, **{**DEFAULTS, "subset": "reverse", "reduction": "none"})
    options = options._replace(first_full=False, mle_weight=0.25)  # both parts
    out, inv_denom, none = torch.empty(1, 1), torch.ones(()), torch.empty(0)
    far = reserved(2**32 + 2**31, torch.float32)[2**31 :]
    near, gradients = torch.empty(8, 1, 1), []
    for stats in (near, far):
        launches = []
        if kind == "subset_cross_entropy":
            gradient = torch.empty(1, 1, V)
            args = x, target, ids, None, None, out, inv_denom, stats, none.int(), none, options
            launches += logits_kernels.plan_subset_cross_entropy_fwd(*args)
            args = torch.ones(1, 1), inv_denom, x, target, ids, None, stats, none.int(), none, gradient, options
            launches += logits_kernels.plan_subset_cross_entropy_bwd(*args)
        else:
            gradient = x[0].clone()
            kernels = linear.LinearKernels(target, ids, None, None, None, V, options, plan=launches)
            running = kernels.start(1, out)
            kernels.absorb(gradient, 0, None, running)
            kernels.finish(None, running, out, stats, none.int(), none)
            kernels.emit(gradient, 0, None, stats, none.int(), none)
        for launch in launches:
            if stats is far and "N" in launch.args:
                launch.args["N"] = N
            launch.run()
        gradients.append(gradient.flatten())
    assert near.count_nonzero() > 4
    assert torch.equal(far[: 8 * N : N], near.flatten())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("layout", ["every-second", "flat"])
def test_labels_that_lie_two_apart_are_read_with_any_ignore_index(layout, fused):
    """Nothing copies them where -1 is ignored already: the sums by word would read what lies between."""
    if fused.backend == "cuda":
        pytest.skip("has no head")
    call = make_hidden(3, 6, 11, 5)
    target = call["target"].masked_fill(call["target"] == call.get("ignore_index", -100), -1)
    if layout == "flat":
        target, call["input"] = target.flatten(), call["input"].flatten(0, 1)
    spread = torch.stack([target, (target + 1) % 11], -1)[..., 0]
    assert spread.stride(-1) == 2

    def gradients(target):
        leaves = [call[name].to(fused.device).requires_grad_() for name in ("input", "linear_weight")]
        with fastcap.backend(fused.backend):
            loss = F_cap.linear_subset_cross_entropy(*leaves, target, ignore_index=-1, first_token="subset")
        return torch.autograd.grad(loss, leaves)

    for found, expected in zip(gradients(spread.to(fused.device)), gradients(target.to(fused.device)), strict=True):
        assert torch.equal(found, expected)


# Compiled for GPUs that are not there ----------------------------------------------------------------------------------

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def compiled(launch, target):
    from fastcap.kernels._common import compile_for

    return compile_for(launch, *TARGETS[target])


def named(launches, name):
    (found,) = {launch.kernel.fn.__name__: launch for launch in launches if name in launch.kernel.fn.__name__}.values()
    return found


@compiles
@pytest.mark.parametrize("name", ["bwd_kernel", "emit_kernel"])
def test_a_block_is_written_before_its_candidates_are_written_over_it(name):
    """By other threads, so a barrier stands between."""
    if name == "bwd_kernel":
        launch = named(plan_subset_cross_entropy(32, 20, 30_522, torch.float32, first_token="subset"), name)
    else:
        launch = named(plan_linear_subset_cross_entropy(32, 20, 30_522, 768, torch.float32, mle_weight=0.01), name)
    for target, kind, store, barrier in (
        ("sm_90", "ptx", r"\bst\.global", r"\bbar(?:rier\.cta)?\.sync"),
        ("gfx942", "amdgcn", r"\b(?:global|buffer)_store", r"\bs_barrier"),
    ):
        text = compiled(launch, target).asm[kind]
        stores = [found.start() for found in re.finditer(store, text)]
        assert any(stores[0] < found.start() < stores[-1] for found in re.finditer(barrier, text))


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_the_longest_fused_caption_fits_in_shared_memory(dtype, target):
    """Of every GPU: a kernel that asks for more is refused when it is launched."""
    T = 32 if dtype == torch.float64 else 64
    launches = plan_linear_subset_cross_entropy(32, T, 9_490, 512, dtype, first_token="subset")
    assert not [x for x in plan_linear_subset_cross_entropy(1, T + 1, 9, 9, dtype) if "caption" in x.kernel.fn.__name__]
    for name in ("caption_fwd_kernel", "caption_bwd_kernel"):
        assert compiled(named(launches, name), target).metadata.shared <= SMALLEST_SHARED


@compiles
def test_kernels_are_compiled_ahead_as_the_launcher_would_specialise_them():
    """Else what is compiled and measured here is another program than the one that runs."""
    from fastcap.kernels._common import source_of
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "create_function_from_signature") or not hasattr(triton.JITFunction, "_pack_args"):
        pytest.skip("this Triton binds arguments in another way")
    backend = make_backend(GPUTarget("cuda", 90, 32))
    launches = plan_subset_cross_entropy(32, 20, 30_522, torch.bfloat16, mle_weight=0.01)
    launches += plan_linear_subset_cross_entropy(1, 1, 2**16, 16, torch.float32, "panels", mle_weight=0.5)
    launches += plan_linear_subset_cross_entropy(32, 20, 30_522, 768, torch.bfloat16, subset="random", reduction="none")
    for launch in launches:
        kernel, options = launch.kernel, {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialisation, _ = bind(**launch.args, **options)
        _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialisation, options)
        source = source_of(launch)
        assert source.signature == signature
        assert source.constants == constants
        assert source.attrs == {place: given for place, given in attributes.items() if given}


def test_a_launch_that_fails_says_so_in_the_one_form():
    built = fastcap.ops._backend.extension()
    if isinstance(built, ImportError) or built.cuda is None or torch.cuda.is_available():
        pytest.skip("needs the CUDA kernels, and no GPU")
    from fastcap.ops import _native, _subset
    from fastcap.testing.launches import DEFAULTS

    x, target = torch.zeros(1, 2, 9), torch.tensor([[4, 5]])
    *_, options = _subset.prepare(
        "subset_cross_entropy", x, target, 9, **{**DEFAULTS, "subset": "full", "reduction": "none"}
    )
    args = x, target, None, None, None, torch.empty(1, 2), torch.empty(()), None, None, None, None, None
    with pytest.raises(FastcapError, match=r"^fastcap\.subset_cross_entropy: the kernel must launch on this GPU, got .*; "):
        built.subset_cross_entropy_fwd_cuda(*args, _native._subset_options(options), 0)


def test_a_gradient_that_is_not_aligned_is_refused():
    built = fastcap.ops._backend.extension()
    if isinstance(built, ImportError) or built.cuda is None:
        pytest.skip("needs the CUDA kernels")
    from fastcap.ops import _native, _subset
    from fastcap.testing.launches import DEFAULTS

    gradient, target = torch.zeros(19)[1:].view(1, 2, 9), torch.tensor([[4, 5]])
    given = {**DEFAULTS, "first_token": "subset", "reduction": "none"}
    *_, options = _subset.prepare("subset_cross_entropy", gradient, target, 9, **given)
    cols, dset = torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3)
    args = torch.ones(1, 2), torch.ones(()), None, target, None, None, None, cols, dset, gradient, None
    with pytest.raises(FastcapError, match=r"dinput must start at a multiple of 16 bytes, got "):
        built.subset_cross_entropy_bwd_cuda(*args, _native._subset_options(options), 0)
