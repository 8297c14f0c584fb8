"""What tests and benchmarks share: every operation with example inputs, and the rule for how exact a result must be.

`OPERATIONS` has one entry an operation; tests/test_all_ops.py then holds it to one contract. Imports torch and fastcap only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcap import functional
from fastcap.ops import _backend

from . import launches
from .additive import ADDITIVE_ATTENTION, ADDITIVE_ATTENTION_STEPS
from .contrastive import CONTRASTIVE_REWARD, DECOUPLED_CONTRASTIVE_LOSS
from .coverage import ATTENTION_COVERAGE
from .coverage_from_scores import ATTENTION_COVERAGE_FROM_SCORES
from .operation import Case, Operation
from .ranks import RETRIEVAL_RANKS

# Running ---------------------------------------------------------------------------------------------------------------


def upstream(output: Tensor) -> Tensor:
    """A gradient for `output`, no two elements alike: a kernel that scales all rows by the first one's is found out."""
    steps = torch.arange(1, output.numel() + 1, dtype=torch.float64)
    return (1.5 + torch.sin(3.7 * steps)).view(output.shape).to(output)


def evaluate(
    operation: Operation,
    arguments: dict[str, Any],
    backend: str,
    *,
    function: Callable | None = None,
    retain_graph: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of `operation.given`) of one call under `backend`, with `upstream` gradients."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in operation.given(arguments)}
    leaves = leaves if operation.differentiable else {}
    with _backend.backend(backend):
        outputs = (function or operation.function)(**{**arguments, **leaves})
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not leaves:
        return outputs, []
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [upstream(o) for o in outputs], retain_graph=retain_graph
    )
    return [o.detach() for o in outputs], list(gradients)


class Allocations(TorchDispatchMode):
    """The largest storage that an operator returns, in bytes; inside our own operators too."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastcap":
            with self:  # a mode is off while it handles an operator: on again, below the key that brought us here
                output = function._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        else:
            output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return output


# How exact -------------------------------------------------------------------------------------------------------------

# Steps of the dtype, at the largest exact value, that a correct kernel may be off where plain torch happens to be exact: the
# rounding of the result, and of the log-sum-exp that it is formed from.
FLOOR_STEPS = 4
# In float64 plain torch is itself the measure, with an error of its own from sums over thousands of words.
FLOOR_STEPS_FLOAT64 = 32


def tolerance(exact: Tensor, plain: Tensor, dtype: torch.dtype, size: float = 0.0) -> float:
    """The largest error that a result in `dtype` may have against `exact` (float64): twice that of plain torch in that
    dtype, plus FLOOR_STEPS steps at the largest exact value.

    `size` is for results of nearly nothing, such as the loss over one candidate: the size of the terms that cancel in them,
    FLOOR_STEPS steps of which, in the dtype that sums run in, are allowed besides.
    """
    finite = exact.isfinite()
    error = (plain.double() - exact)[finite].abs()
    steps = FLOOR_STEPS_FLOAT64 if dtype == torch.float64 else FLOOR_STEPS
    floor = steps * torch.finfo(dtype).eps * exact[finite].abs().max().item() if finite.any() else 0.0
    cancelled = FLOOR_STEPS * torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps * size
    return 2 * (error.max().item() if error.numel() else 0.0) + floor + cancelled


def assert_close_to_float64(actual: Tensor, exact: Tensor, plain: Tensor, what: str = "result", size: float = 0.0) -> None:
    """`actual` is as near to `exact` as `tolerance` asks, with NaN and infinities in the same places."""
    if actual.shape != exact.shape:
        raise AssertionError(f"{what} has shape {list(actual.shape)}, not {list(exact.shape)}")
    actual, exact, plain = actual.detach().cpu(), exact.detach().cpu(), plain.detach().cpu()
    finite = exact.isfinite()
    limit = torch.where(finite, 0.0, exact)
    got_limit = torch.where(actual.double().isfinite(), 0.0, actual.double())
    if not torch.equal(limit.nan_to_num(nan=12345.0), got_limit.nan_to_num(nan=12345.0)):
        raise AssertionError(f"{what}: infinities or NaN differ: got {actual}, must be {exact}")
    error = (actual.double() - exact)[finite].abs()
    allowed = tolerance(exact, plain, actual.dtype, size)
    if error.numel() and not error.max().item() <= allowed:
        raise AssertionError(f"{what}: error {error.max().item():.3g} against float64, allowed {allowed:.3g}")


# subset_cross_entropy --------------------------------------------------------------------------------------------------


def make_captions(
    B: int, T: int, V: int, *, seed: int = 0, prompt: int = 1, scale: float = 3.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] float64 and targets [B, T] like a captioner's: a prompt and padding that are ignored, lengths that
    differ, words that repeat. With B > 2 the last caption has no valid word at all."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(B, T, V, dtype=torch.float64, generator=generator)
    target = torch.randint(max(1, min(V, T // 2 + 2)), (B, T), generator=generator) * 7 % V  # few words: repeats
    t = torch.arange(T)
    lengths = T - torch.arange(B) % max(1, T // 2)
    target = target.masked_fill((t >= lengths[:, None]) | (t < min(prompt, T - 1)), ignore_index)
    if B > 2:
        target[-1] = ignore_index
    return logits, target


def _subset_cross_entropy_cases() -> list[Case]:
    B, T, V = 3, 6, 23
    logits, target = make_captions(B, T, V)
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(V, dtype=torch.float64, generator=generator) + 0.3
    per_token = torch.randn(B, T, dtype=torch.float64, generator=generator)
    shared = torch.tensor([4, 9, -1, 4, 22, 0])
    own = torch.tensor([[5, 5, 1, -1], [-1, -1, -1, -1], [0, 1, 2, 22]])
    everything = {"label_smoothing": 0.1, "weight": weight, "logit_softcap": 7.0, "z_loss": 1e-2}
    options = {
        "caption": {},
        "caption-first-in-subset": {"first_token": "subset"},
        "caption-mixture": {"mle_weight": 0.3},
        "caption-mixture-first-in-subset": {"mle_weight": 0.01, "first_token": "subset", "reduction": "none"},
        "caption-all-options": {**everything, "token_weight": per_token, "reduction": "none"},
        "caption-sum-all-options": {**everything, "first_token": "subset", "reduction": "sum"},
        "reverse": {"subset": "reverse", "reduction": "none"},
        "reverse-first-in-subset": {"subset": "reverse", "first_token": "subset"},
        "reverse-all-options": {**everything, "subset": "reverse", "mle_weight": 0.4, "token_weight": per_token[:, :1]},
        "random": {"subset": "random", "seed": 7, "num_random": 5, "reduction": "none"},
        "random-mixture": {"subset": "random", "seed": 8, "mle_weight": 0.5, "label_smoothing": 0.2},
        "ids": {"subset": shared, "first_token": "subset", "reduction": "none"},
        "ids-per-caption": {"subset": own, "mle_weight": 0.2, "weight": weight},
        "full": {"subset": "full"},
        "full-all-options": {**everything, "subset": "full", "token_weight": per_token, "reduction": "none"},
        "mle-weight-one": {"mle_weight": 1.0, "reduction": "sum"},
    }
    cases = [Case(name, {"input": logits, "target": target, **given}) for name, given in options.items()]

    def add(name, B, T, V, *, prompt=1, **given):
        x, y = make_captions(B, T, V, seed=len(cases), prompt=prompt, ignore_index=given.get("ignore_index", -100))
        cases.append(Case(name, {"input": x, "target": y, **given}))

    # where kernels change their way: one token, one word, more than 64 ids (sorted), rows of several blocks and a tail
    add("one-token", 2, 1, 9, prompt=0, first_token="subset")
    add("one-word", 2, 3, 1, z_loss=0.1)
    add("pad-is-a-word", 2, 6, 11, ignore_index=0, subset="reverse", reduction="none")
    add("long-captions", 1, 67, 90, first_token="subset", reduction="none")
    add("long-captions-reverse", 1, 66, 90, subset="reverse", label_smoothing=0.1)
    add("many-ids", 1, 3, 300, subset=torch.arange(280, 80, -1) // 2, label_smoothing=0.1, mle_weight=0.1)
    add("many-random", 1, 3, 90, subset="random", seed=3, num_random=65)
    add("wide", 2, 3, 4101, reduction="none")
    add("wide-reverse", 1, 3, 4101, subset="reverse", first_token="subset", label_smoothing=0.1, logit_softcap=20.0)
    add("wide-full", 1, 3, 4101, subset="full", label_smoothing=0.1)
    x, y = make_captions(1, 5, 13, seed=99)
    cases.append(Case("flat", {"input": x[0], "target": y[0], "token_weight": per_token[0, :5], "reduction": "none"}))
    return cases


# linear_subset_cross_entropy -------------------------------------------------------------------------------------------


def make_hidden(
    B: int, T: int, V: int, H: int, *, seed: int = 0, prompt: int = 1, bias: float = 30.0, ignore_index: int = -100
) -> dict[str, Tensor]:
    """input [B, T, H], linear_weight [V, H], linear_bias [V] (all float64) and the target of `make_captions`, by name.

    The bias is large by default: with one of 0.01 its gradient may be wrong and no test notices.
    """
    _, target = make_captions(B, T, V, seed=seed, prompt=prompt, ignore_index=ignore_index)
    generator = torch.Generator().manual_seed(seed + 1)
    input, linear_weight, linear_bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((B, T, H), (V, H), (V,))
    )
    linear_weight *= 3 / H**0.5  # logits of the size of a captioner's, whatever H is
    return {"input": input, "linear_weight": linear_weight, "linear_bias": bias * linear_bias, "target": target}


def _linear_subset_cross_entropy_cases() -> list[Case]:
    cases = []

    def add(name, B, T, V, H, *, bias=0.0, prompt=1, flat=False, **given):
        call = make_hidden(
            B, T, V, H, seed=len(cases), prompt=prompt, bias=bias, ignore_index=given.get("ignore_index", -100)
        )
        terms = call["input"].abs() @ call["linear_weight"].abs().T + call["linear_bias"].abs()
        if not bias:
            del call["linear_bias"]
        if flat:
            call.update(input=call["input"][0], target=call["target"][0])
        cases.append(Case(name, {**call, **given}, size=terms.max().item() if terms.numel() else 0.0))

    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(23, dtype=torch.float64, generator=generator) + 0.3
    per_token = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    everything = {"label_smoothing": 0.1, "weight": weight, "logit_softcap": 7.0, "z_loss": 1e-2}
    shared, own = torch.tensor([4, 9, -1, 4, 22, 0]), torch.tensor([[5, 5, 1, -1], [-1, -1, -1, -1], [0, 1, 2, 22]])
    narrow, each, large = {"first_token": "subset"}, {"reduction": "none"}, {"bias": 30.0}
    small = (3, 6, 23, 5)  # memory_budget=500: the float32 logits of five tokens, or of six words for all tokens

    add("caption", *small)
    add("caption-first-in-subset", *small, **narrow, **each)
    add("caption-bias", *small, **large, memory_budget=0)
    add("caption-first-in-subset-bias", *small, **narrow, **large, memory_budget=0)
    add("caption-mixture-bias", *small, **large, **each, mle_weight=0.3, memory_budget=500)
    add("caption-mixture-first-in-subset", *small, **narrow, mle_weight=0.01, memory_budget=500)
    add("caption-all-options", *small, **each, **everything, bias=3.0, token_weight=per_token)
    add("caption-sum-all-options", *small, **narrow, **everything, bias=3.0, reduction="sum", memory_budget=0)
    add("reverse", *small, **each, subset="reverse", memory_budget=0)
    add("reverse-first-in-subset-bias", *small, **narrow, **large, subset="reverse")
    mixed = {**everything, "mle_weight": 0.4, "token_weight": per_token[:, :1]}
    add("reverse-all-options", *small, **mixed, bias=3.0, subset="reverse", memory_budget=500)
    add("random", *small, **each, subset="random", seed=7, num_random=5)
    add("random-mixture", *small, **large, subset="random", seed=8, mle_weight=0.5, label_smoothing=0.2, memory_budget=0)
    add("ids-bias", *small, **narrow, **each, **large, subset=shared)
    add("ids-per-caption", *small, subset=own, mle_weight=0.2, weight=weight, memory_budget=500)
    add("full-bias", *small, **large, subset="full")
    add("full-all-options", *small, **each, **everything, bias=3.0, subset="full", token_weight=per_token, memory_budget=500)
    add("full-sum", *small, subset="full", reduction="sum", memory_budget=0)
    add("mle-weight-one", *small, **large, mle_weight=1.0, reduction="sum", memory_budget=500)
    crowd = (4, 16, 9, 5)  # many tokens and few words: best in blocks of tokens, several of which 1000 bytes ask for
    add("crowd-full", *crowd, **large, subset="full", memory_budget=1000)
    add(
        "crowd-full-sum-all-options",
        *crowd,
        **{**everything, "weight": weight[:9]},
        subset="full",
        reduction="sum",
        memory_budget=1000,
    )
    add("crowd-mixture", *crowd, **large, mle_weight=0.3, label_smoothing=0.1, memory_budget=1000)
    add("crowd-mixture-first-in-subset", *crowd, **narrow, subset=shared[:4] % 9, mle_weight=0.1, memory_budget=1000)
    add("crowd-reverse", *crowd, **large, subset="reverse", memory_budget=1000)
    # where kernels change their way: one token, one word, one feature, more than 64 ids (sorted), several blocks and a tail
    add("one-token", 2, 1, 9, 3, prompt=0, **narrow)
    add("one-word", 2, 3, 1, 4, z_loss=0.1, bias=1.0)
    add("one-feature", 2, 4, 11, 1, **large, **each, memory_budget=0)
    add("pad-is-a-word", 2, 6, 11, 5, ignore_index=0, subset="reverse", **each)
    add("long-captions", 1, 67, 90, 3, **narrow, **each)
    add("long-captions-mixture", 2, 66, 90, 3, **large, mle_weight=0.1, memory_budget=2000)
    add("many-ids", 1, 3, 300, 3, subset=torch.arange(280, 80, -1) // 2, label_smoothing=0.1, mle_weight=0.1)
    falling = torch.arange(178, 108, -1) // 2  # not in order, and each twice
    add("many-ids-first-in-subset", 1, 3, 90, 3, **narrow, **each, bias=3.0, subset=falling, label_smoothing=0.1)
    add("many-ids-per-caption", 2, 3, 90, 3, subset=torch.randint(-1, 90, (2, 67), generator=generator))
    add("many-random", 1, 3, 90, 3, **narrow, subset="random", seed=3, num_random=65)
    add("wide", 2, 3, 4101, 5, **each, memory_budget=0)
    add("wide-reverse", 1, 3, 4101, 5, **narrow, subset="reverse", label_smoothing=0.1, logit_softcap=20.0, memory_budget=0)
    add("wide-features", 2, 4, 37, 259, **large, mle_weight=0.2)
    add("flat", 1, 5, 13, 4, **each, bias=3.0, token_weight=per_token[0, :5], flat=True)
    return cases


OPERATIONS: dict[str, Operation] = {
    "subset_cross_entropy": Operation(
        function=functional.subset_cross_entropy,
        cases=_subset_cross_entropy_cases,
        empty=Case(
            "empty",
            {"input": torch.zeros(0, 4, 7, dtype=torch.float64), "target": torch.zeros(0, 4, dtype=torch.int64)},
        ),
        inputs=("input",),
        operators=("subset_cross_entropy_fwd", "subset_cross_entropy_bwd"),
        launches=launches.subset_cross_entropy,
    ),
    "linear_subset_cross_entropy": Operation(
        function=functional.linear_subset_cross_entropy,
        cases=_linear_subset_cross_entropy_cases,
        empty=Case("empty", make_hidden(0, 4, 7, 5)),
        inputs=("input", "linear_weight", "linear_bias"),
        operators=("linear_subset_cross_entropy_fwd", "linear_subset_cross_entropy_bwd"),
        launches=launches.linear_subset_cross_entropy,
        backends=("reference", "cpp", "triton"),
        autocasts=True,
    ),
    "attention_coverage": ATTENTION_COVERAGE,
    "attention_coverage_from_scores": ATTENTION_COVERAGE_FROM_SCORES,
    "additive_attention": ADDITIVE_ATTENTION,
    "additive_attention_steps": ADDITIVE_ATTENTION_STEPS,
    "contrastive_reward": CONTRASTIVE_REWARD,
    "decoupled_contrastive_loss": DECOUPLED_CONTRASTIVE_LOSS,
    "retrieval_ranks": RETRIEVAL_RANKS,
}
