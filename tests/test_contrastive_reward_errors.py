"""contrastive_reward: how it runs (blocks, memory, what is kept), the module, and what it answers to bad arguments.

What it computes: test_contrastive_reward.py.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
import sys
import time

import pytest
import torch

import fastcap
from fastcap import nn
from fastcap.errors import FastcapError
from fastcap.functional import contrastive_reward, decoupled_contrastive_loss
from fastcap.ops import _backend
from fastcap.testing import Allocations, upstream

BASELINES = ("logsumexp", "max", "mean", "none")
inf, nan = math.inf, math.nan


def make(P, Q, D=5, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(P + Q)
    text, image = (torch.randn(n, D, dtype=dtype, generator=generator) for n in (P, Q))
    return text, image, torch.randint(Q, (P,), generator=generator)


def run(place, text, image, positive=None, **given):
    """[reward, gradients of text and image] on the CPU, with an uneven upstream gradient."""
    leaves = [x.detach().to(place.device).requires_grad_() for x in (text, image)]
    positive = positive if positive is None else positive.to(place.device)
    with fastcap.backend(place.backend):
        out = contrastive_reward(*leaves, positive=positive, **given)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, upstream(out)))]


def whole(text, image, positive, *, baseline, exclude, logit_scale):
    """[reward, gradients], both ways, from all similarities at once; a text and image each have others."""
    leaves = [x.detach().requires_grad_() for x in (text, image)]
    t, v = (torch.nn.functional.normalize(x) for x in leaves)
    s = logit_scale * t @ v.T
    P, Q = s.shape
    p = torch.arange(P)
    pair = torch.arange(Q) == positive[:, None]
    mine = p == p[:, None] if exclude == "self" else positive == positive[:, None]
    of = torch.logsumexp if baseline == "logsumexp" else torch.amax
    bases = [of(x.masked_fill(out, -inf), 1) for x, out in ((s, pair), (s.T[positive], mine))]
    reward = (s[p, positive] - sum(bases) / 2) / logit_scale
    return [reward.detach(), *torch.autograd.grad(reward, leaves, upstream(reward))]


# How it runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("P", "Q"), [(511, 1025), (513, 1023), (1030, 7), (3, 2051), (1200, 1100)])
def test_blocks_that_do_not_divide_the_texts_or_images(P, Q, compiled):
    """The CPU's blocks have 512 texts and 1,024 images."""
    inputs = make(P, Q, 8)
    for given in ({"baseline": "logsumexp", "exclude": "self"}, {"baseline": "max", "exclude": "group"}):
        found, wanted = run(compiled, *inputs, logit_scale=20.0, **given), whole(*inputs, logit_scale=20.0, **given)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (4, 100), (100, 5)])
def test_blocks_of_any_size_give_the_same(blocks, cpp, monkeypatch):
    from fastcap.ops import _similarity_blocks

    inputs = make(9, 11)
    cases = [{"baseline": b, "direction": d} for b in BASELINES[:2] for d in ("both", "text_to_image", "image_to_text")]
    expected = [run(cpp, *inputs, **given) for given in cases]
    monkeypatch.setattr(_similarity_blocks, "BLOCK_ROWS", blocks[0])
    monkeypatch.setattr(_similarity_blocks, "BLOCK_COLS", blocks[1])
    for given, wanted in zip(cases, expected, strict=True):
        for a, b in zip(run(cpp, *inputs, **given), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_results_do_not_depend_on_the_number_of_threads(cpp):
    before = torch.get_num_threads()
    inputs, found = make(700, 300, 16, dtype=torch.float32), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(cpp, *inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)  # the products are torch's


def test_texts_of_one_image_cost_what_images_cost(cpp):
    """5,000 texts of one image: the sum of the others of each, in one pass, and exact."""
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    own = torch.linspace(-30, 10, 5000, dtype=torch.float64)[order]
    text = torch.stack([own, torch.zeros(5000, dtype=torch.float64)], 1).requires_grad_()
    start = time.perf_counter()
    with fastcap.backend("cpp"):
        out = contrastive_reward(
            text, torch.eye(2, dtype=torch.float64), positive=torch.zeros(5000, dtype=torch.int64), logit_scale=1.0,
            normalize=False, direction="image_to_text",
        )  # fmt: skip
    (dtext,) = torch.autograd.grad(out, text, upstream(out))
    seconds = time.perf_counter() - start
    of_some = torch.tensor([0, 17, 4999, own.argmax().item(), own.argmin().item()])
    for p in of_some.tolist():
        others = torch.cat([own[:p], own[p + 1 :]])
        assert out[p].item() == pytest.approx((own[p] - others.logsumexp(0)).item(), rel=1e-13)
    # of text p: its own upstream gradient, less its weight in the base of each other text
    g, base = upstream(out), own - out.detach()
    dense = g - ((g * (own[of_some][:, None] - base).exp()).sum(1) - (g * (own - base).exp())[of_some])[:, None]
    torch.testing.assert_close(dtext[of_some, 0], dense[torch.arange(5), of_some], rtol=1e-10, atol=1e-12)
    assert seconds < 1.0  # [P, P] scores alone would be 200 MB


@pytest.mark.parametrize("baseline", BASELINES)
def test_no_similarities_are_made_whole(baseline, compiled):
    """On the CPU 2,048 x 2,048 of them would be 16.8 MB, on a GPU 8,192 x 8,192 of them 268; blocks are 2 and 64 MiB."""
    P, most = (2048, 2 << 20) if compiled.device == "cpu" else (8192, 64 << 20)
    text, image, positive = (x.to(compiled.device) for x in make(P, P, 32, dtype=torch.float32))
    for exclude in ("self", "group"):
        leaves = [x.clone().requires_grad_() for x in (text, image)]
        with fastcap.backend(compiled.backend), Allocations() as watch:
            contrastive_reward(*leaves, positive=positive, baseline=baseline, exclude=exclude).sum().backward()
        assert 0 < watch.largest <= most < P * P


def test_nothing_is_kept_without_a_gradient(target):
    text, image, positive = (x.to(target.device) for x in make(6, 4))
    kept = []
    with (
        fastcap.backend(target.backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        for baseline in BASELINES:
            assert not contrastive_reward(text, image, positive=positive, baseline=baseline).requires_grad
            with torch.no_grad():
                contrastive_reward(text.clone().requires_grad_(), image, positive=positive, baseline=baseline)
    assert not kept


@pytest.mark.parametrize("baseline", BASELINES[:2])
def test_a_few_numbers_a_text_and_an_image_are_kept_for_the_backward(baseline, compiled):
    text, image, positive = (x.to(compiled.device) for x in make(300, 400, 32, dtype=torch.float32))
    leaves, kept = [x.requires_grad_() for x in (text, image)], []
    with (
        fastcap.backend(compiled.backend),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        contrastive_reward(*leaves, positive=positive, baseline=baseline)
    inputs = {x.data_ptr() for x in leaves}
    more = {x.data_ptr(): x.nbytes for x in kept if x.data_ptr() not in inputs}
    assert kept and sum(more.values()) < 200 * (300 + 400)  # [P, Q] floats are 480,000 bytes


MEASURE = """
import sys, torch, fastcap
from fastcap import functional as F_cap
def high_water(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024
torch.set_num_threads(1)
P, backward = int(sys.argv[1]), sys.argv[2] == "backward"
def step(P):
    text, image = (torch.randn(P, 512, requires_grad=backward) for _ in range(2))
    with fastcap.backend("cpp"):
        before = high_water(reset=True)
        out = F_cap.contrastive_reward(text, image)
        if backward:
            out.sum().backward()
    return high_water() - before
step(1100)  # the libraries' own scratch
print(step(P))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark of Linux's /proc")
@pytest.mark.parametrize(("P", "mode", "most"), [(8192, "forward", 10e6), (4096, "backward", 40e6)])
def test_memory_is_a_scratch_and_what_gradients_need(P, mode, most, cpp):
    """Similarities would be 268 MB, and 67 MB where the gradients of 4,096 texts and images of 512 numbers are 16.8."""
    command = [sys.executable, "-c", MEASURE, str(P), mode]
    result = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < most


def test_a_double_backward_is_refused_but_by_the_reference(target):
    leaves = [x.to(target.device).requires_grad_() for x in make(4, 4)[:2]]
    for function in (contrastive_reward, decoupled_contrastive_loss):
        with fastcap.backend(target.backend):
            out = function(*leaves, logit_scale=3.0).sum()
        (gradient,) = torch.autograd.grad(out, leaves[0], create_graph=True)
        if target.backend == "reference":
            assert torch.autograd.grad(gradient.square().sum(), leaves[1])[0].isfinite().all()
        else:
            with pytest.raises(RuntimeError, match="contrastive_reward: the gradient must not be differentiated again"):
                gradient.sum().backward()


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_loss_compiles_without_a_graph_break(backend, dynamic, baseline):
    if not fastcap.backends()[backend]:
        pytest.skip(fastcap.backends()[backend].reason)
    torch._dynamo.reset()
    loss_of = functools.partial(decoupled_contrastive_loss, baseline=baseline)
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    text, image, positive = make(6, 5)
    found = []
    for function in (loss_of, compiled):
        leaves = [x.clone().requires_grad_() for x in (text, image, torch.tensor(7.0, dtype=torch.float64))]
        with fastcap.backend(backend):
            loss = function(*leaves[:2], positive=positive, logit_scale=leaves[2], clamp=(None, 3.0))
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found)


def test_int32_indices_and_a_scale_of_any_dtype_will_do(target):
    text, image, positive = (x.to(target.device) for x in make(6, 4))
    with fastcap.backend(target.backend):
        wanted = contrastive_reward(text, image, positive=positive, logit_scale=4.0)
        for scale in (4, torch.tensor(4.0), torch.tensor([4.0]).half(), torch.tensor(4.0, dtype=torch.float64)):
            scale = scale.to(target.device) if isinstance(scale, torch.Tensor) else scale
            found = contrastive_reward(text, image, positive=positive.int(), logit_scale=scale)
            torch.testing.assert_close(found, wanted)
            assert found.dtype == torch.float64


# The module ------------------------------------------------------------------------------------------------------------


def test_the_module_is_the_function():
    text, image, positive = make(6, 4)
    options = {"baseline": "max", "direction": "text_to_image", "exclude": "group", "clamp": (None, 0.5), "normalize": False}
    for given in ({}, options, {"logit_scale": 3.0, "precision": "high"}):
        module = nn.ContrastiveReward(**given)
        assert torch.equal(module(text, image, positive), contrastive_reward(text, image, positive=positive, **given))
        assert torch.equal(module(text[:3], image), contrastive_reward(text[:3], image, **given))
    assert repr(module).startswith("ContrastiveReward(logit_scale=3.0, baseline='logsumexp', direction='both', ")
    learnt = nn.ContrastiveReward(logit_scale=torch.nn.Parameter(torch.tensor(5.0)))
    learnt(text, image, positive).sum().backward()
    assert [name for name, _ in learnt.named_parameters()] == ["logit_scale"] and learnt.logit_scale.grad != 0
    kept = nn.ContrastiveReward(logit_scale=torch.tensor(5.0))
    assert dict(kept.named_buffers()).keys() == {"logit_scale"} and "logit_scale=tensor, " in repr(kept)
    torch.testing.assert_close(kept(text, image, positive), learnt(text, image, positive).detach())


# Errors ----------------------------------------------------------------------------------------------------------------

T, V = torch.ones(4, 3), torch.ones(4, 3)
WHICH = "; pass the row in image of each text's image, [P] int64"
ONE_EACH, A_ROW = "; pass one index a text", "; pass one embedding a row"
INSIDE = "positive must lie in [0, {}), the rows of image, got {}; pass the row of each text's image"
SCALE = (
    "logit_scale must be a finite number above 0, or a tensor of one, got {}; pass logit_scale=100.0, or exp of the learnt"
)
RANGE = "logit_scale must lie in [1.18e-38, 3.4e+38], where sums are float32, got {}; scale the"
BASELINE = "baseline must be one of 'logsumexp', 'max', 'mean', 'none', got {}; pass baseline='logsumexp'"
DIRECTION = "direction must be one of 'both', 'text_to_image', 'image_to_text', got {}; pass direction='both'"
PAIR = "clamp must be None or a pair (lowest, highest), got {}; pass clamp=(None, 16.0), or None for none"
ENDS = "clamp must hold numbers or None, the lowest first, got {}; pass clamp=(None, 16.0), or None for none"
INDICES = "positive must be int64 or int32, got 'float32'; pass indices of rows of image: .long()"
MANY = "positive must be given where there are more texts than images, 4 and 3, got None"
EMBEDDINGS = [  # (text, image, the message)
    ([1.0], V, "text must be a torch.Tensor, got 'list'; pass embeddings, one a row"),
    (T, None, "image must be a torch.Tensor, got 'NoneType'; pass embeddings, one a row"),
    (T.long(), V, "text must be float32 or float64 or float16 or bfloat16, got 'int64'; convert the text embeddings"),
    (T, V.to_sparse(), "image must be dense, got torch.sparse_coo; call image.to_dense()"),
    (T[0], V, "text must have shape [P, D], D >= 1, got [3]" + A_ROW),
    (T, V[None], "image must have shape [Q, D], D >= 1, got [1, 4, 3]" + A_ROW),
    (T[:, :0], V[:, :0], "text must have shape [P, D], D >= 1, got [4, 0]" + A_ROW),
    (T, V[:, :2], "image must have the width of text, 3, got 2; embed both with one model, after its projections"),
    (T, V.half(), "image must have the dtype of text, float32, got 'float16'; convert one of them"),
    (T, V.to("meta"), "image must be on the device of input, cpu, got 'meta'; call image.to(input.device)"),
    (T, V[:3], MANY + WHICH),
]
OPTIONS = [  # (name, value, the message)
    ("positive", [0, 1, 2, 3], "positive must be a torch.Tensor, got 'list'" + WHICH),
    ("positive", torch.zeros(4), INDICES),
    ("positive", torch.zeros(3).long(), "positive must have shape [P] = [4], got [3]" + ONE_EACH),
    ("positive", torch.zeros(4, 1).long(), "positive must have shape [P] = [4], got [4, 1]" + ONE_EACH),
    ("positive", torch.tensor([0, 4, 1, 1]), INSIDE.format(4, 4)),
    ("positive", torch.tensor([0, 3, 1, -1], dtype=torch.int32), INSIDE.format(4, -1)),
    *(("logit_scale", value, SCALE.format(repr(value))) for value in (0, -1.0, nan, inf, True, "100", None)),
    ("logit_scale", torch.tensor(-2.0), SCALE.format(-2.0)),
    ("logit_scale", torch.tensor(inf), SCALE.format(inf)),
    *(("logit_scale", value, RANGE.format(value)) for value in (1e39, 1e-39, 10**39)),
    ("logit_scale", torch.tensor(1e39, dtype=torch.float64), RANGE.format(1e39)),
    ("logit_scale", torch.ones(2), SCALE.format("'torch.float32 [2]'")),
    ("logit_scale", torch.tensor(3), SCALE.format("'torch.int64 []'")),
    *(("baseline", value, BASELINE.format(repr(value))) for value in ("lse", None, "")),
    *(("direction", value, DIRECTION.format(repr(value))) for value in ("i2t", 0)),
    ("exclude", True, "exclude must be one of 'self', 'group', got True; pass exclude='self'"),
    ("normalize", 1, "normalize must be True or False, got 1; pass normalize=True"),
    *(("clamp", value, PAIR.format(repr(value))) for value in (16.0, (1.0, 2.0, 3.0), "16")),
    *(("clamp", value, ENDS.format(repr(value))) for value in ((2.0, 1.0), (None, nan), (None, "16"), (True, 2.0))),
    ("precision", "tf32", "precision must be one of 'highest', 'high', 'medium', got 'tf32'; pass precision='highest'"),
]


@pytest.mark.parametrize(("text", "image", "given", "message"), [
    *((text, image, {}, message) for text, image, message in EMBEDDINGS),
    *((T, V, {name: value}, message) for name, value, message in OPTIONS),
    (T, V[:0], {"positive": torch.zeros(4).long()}, INSIDE.format(0, 0)),
], ids=itertools.count())  # fmt: skip
def test_bad_arguments_are_named(text, image, given, message):
    for function in (contrastive_reward, decoupled_contrastive_loss):
        with pytest.raises(FastcapError) as raised:
            function(text, image, **given)
        assert str(raised.value).startswith(f"fastcap.{function.__name__}: {message}")


def test_the_loss_names_a_wrong_reduction():
    with pytest.raises(FastcapError, match="decoupled_contrastive_loss: reduction must be one of .*, got 'avg'; "):
        decoupled_contrastive_loss(T, V, reduction="avg")


def test_cuda_has_no_sources_of_its_own():
    with pytest.raises(FastcapError), fastcap.backend("cuda"):
        contrastive_reward(T, V)


# The raw operators and the extension -------------------------------------------------------------------------------------


def raw_forward(**other):
    given = {
        "text": torch.rand(4, 3), "image": torch.rand(5, 3), "positive": torch.tensor([0, 4, 1, 1]),
        "row_factor": torch.ones(4), "col_factor": torch.ones(5), "rows": True, "cols": True, "baseline": "logsumexp",
        "precision": "highest", "backend": "cpp",
    }  # fmt: skip
    return torch.ops.fastcap.contrastive_reward_fwd(*{**given, **other}.values())


def raw_backward(**other):
    given = {
        "down": torch.rand(4), "drow": torch.rand(4), "dcol": torch.rand(5), "text": torch.rand(4, 3),
        "image": torch.rand(5, 3), "positive": torch.tensor([0, 4, 1, 1]), "row_factor": torch.ones(4),
        "col_factor": torch.ones(5), "row": torch.full((4,), 9.0), "row_index": torch.zeros(0).long(),
        "col": torch.full((5,), 9.0), "col_index": torch.zeros(0).long(), "need_text": True, "need_image": True,
        "baseline": "logsumexp", "precision": "highest", "backend": "cpp",
    }  # fmt: skip
    return torch.ops.fastcap.contrastive_reward_bwd(*{**given, **other}.values())


BAD = {
    "text": (torch.rand(4, 2), torch.rand(3, 3), torch.rand(4), torch.rand(4, 3).double()),
    "image": (torch.rand(5, 2), torch.rand(4, 3), torch.rand(15)),
    "positive": (torch.zeros(3).long(), torch.zeros(4), torch.zeros(4, 1).long()),
    "row_factor": (torch.ones(3), torch.ones(4).double(), torch.ones(4, 1)),
    "col_factor": (torch.ones(4), torch.ones(5).double()),
    "down": (torch.rand(3), torch.rand(4).double()),
    "drow": (torch.rand(5), torch.rand(4).double()),
    "dcol": (torch.rand(4), torch.rand(5).double()),
    "row": (torch.rand(5), torch.rand(4).double()),
    "col": (torch.rand(4), torch.rand(5).double()),
    "baseline": ("mean", "lse", ""),
    "precision": ("tf32", ""),
    "backend": ("cuda", "reference", "gpu"),
}


@pytest.mark.parametrize(("name", "place"), [(name, i) for name, values in BAD.items() for i in range(len(values))])
def test_raw_operators_refuse_what_does_not_fit(name, place, cpp):
    for call, accepts in ((raw_forward, ("down", "drow", "dcol", "row", "col")), (raw_backward, ())):
        assert all(x.isfinite().all() for x in call() if x.is_floating_point())
        if name not in accepts:
            with pytest.raises((FastcapError, RuntimeError)):
                call(**{name: BAD[name][place]})


@pytest.mark.parametrize("baseline", ["logsumexp", "max"])
@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**62)])
def test_an_index_out_of_range_gives_nan_and_no_wrong_read(wrong, baseline, fused):
    """The public function refuses it on the CPU; on a GPU, where looking costs a synchronisation, the kernel answers so."""
    device = fused.device
    given = {"text": torch.rand(4, 3), "image": torch.rand(5, 3), "positive": torch.tensor([0, wrong, 1, 1])}
    call = {name: x.to(device) for name, x in given.items()}
    call |= {"row_factor": torch.ones(4, device=device), "col_factor": torch.ones(5, device=device)}
    own, row, _, col, _ = raw_forward(**call, baseline=baseline, backend=fused.backend)
    assert own.isnan().tolist() == [False, True, False, False] and row.isfinite().all() and col.isfinite().all()
    value, index = torch.ops.fastcap.contrastive_reward_others_fwd(own, call["positive"], 5, baseline, fused.backend)
    assert value[2:].isfinite().all() and value[0] == -inf
    if baseline == "logsumexp":
        dvalue = torch.ones(4, device=device)
        down = torch.ops.fastcap.contrastive_reward_others_bwd(dvalue, value, own, call["positive"], 5, fused.backend)
        assert down[2:].isfinite().all() and down[0] == 0


def test_the_extension_checks_what_it_is_given(cpp):
    """Called by hand with wrong shapes, dtypes or layouts it raises: it never follows a pointer too far."""
    extension = _backend.extension()
    good = {
        "scores": torch.zeros(4, 5), "positive": torch.zeros(4).long(), "row_factor": torch.ones(4),
        "col_factor": torch.ones(5), "own": torch.zeros(4), "row_top": torch.zeros(4), "row_sum": torch.zeros(4).double(),
        "row_index": None, "col_top": torch.zeros(5), "col_sum": torch.zeros(5).double(), "col_index": None,
        "first_row": 0, "first_col": 0, "threads": 1,
    }  # fmt: skip
    bad = {
        "scores": (
            torch.zeros(20), torch.zeros(5, 4).T, torch.zeros(4, 5).half(), torch.zeros(4, 6), None,
            torch.zeros(4, 5, device="meta"),
        ),
        "positive": (torch.zeros(4), torch.zeros(8).long()[::2], torch.zeros(5).long(), None),
        "row_factor": (torch.ones(5), torch.ones(4).double(), None), "col_factor": (torch.ones(4), None),
        "own": (torch.zeros(3), torch.zeros(4).double(), None), "row_top": (torch.zeros(5), torch.zeros(4).double()),
        "row_sum": (torch.zeros(4), torch.zeros(3).double(), None), "row_index": (torch.zeros(4).long(), torch.zeros(4)),
        "col_top": (torch.zeros(4),), "col_sum": (torch.zeros(5), None), "first_col": (-1,),
    }  # fmt: skip
    for name, values in bad.items():
        extension.contrastive_reward_block_fwd_cpu(*good.values())
        for value in values:
            with pytest.raises((FastcapError, TypeError)):
                extension.contrastive_reward_block_fwd_cpu(*{**good, name: value}.values())
    index = {"row_index": torch.zeros(4).long(), "col_index": torch.zeros(5).long()}
    for absent in (
        {"row_top": None}, {"col_top": None}, {"row_top": None, "row_sum": None, "col_top": None, "col_sum": None},
        {"row_top": None, "row_sum": None, "row_index": index["row_index"]},
        {"col_top": None, "col_sum": None, "col_index": index["col_index"]},
    ):  # fmt: skip
        with pytest.raises(FastcapError, match="top must be given"):
            extension.contrastive_reward_block_fwd_cpu(*{**good, **absent}.values())
