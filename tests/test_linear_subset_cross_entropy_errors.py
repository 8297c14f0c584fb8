"""What linear_subset_cross_entropy answers to bad arguments: which one, its rule, what it got."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
import weakref

import pytest
import torch

import fastcap
from fastcap import functional as F_cap
from fastcap.errors import FastcapError

OP = "fastcap.linear_subset_cross_entropy: "
B, T, V, H = 2, 3, 5, 4
nan, inf = float("nan"), float("inf")


def hidden():
    return torch.randn(B, T, H, generator=torch.Generator().manual_seed(0))


def head():
    return torch.randn(V, H, generator=torch.Generator().manual_seed(1))


def labels():
    return torch.tensor([[1, 4, 1], [0, -100, 2]])


DTYPES = "float32 or float64 or float16 or bfloat16"
NARROW = {"first_token": "subset"}

# (arguments that replace the good ones, the one that is named, parts of the message besides)
BAD = [
    ({"input": [1.0]}, "input", ["torch.Tensor", "got 'list'"]),
    ({"input": None}, "input", ["torch.Tensor", "got 'NoneType'"]),
    ({"input": torch.zeros(B, T, H).long()}, "input", [DTYPES, "got 'int64'"]),
    ({"input": torch.zeros(B, T, H, dtype=torch.complex64)}, "input", [DTYPES, "got 'complex64'"]),
    ({"input": torch.zeros(H)}, "input", ["[B, T, H] or [N, H]", "got [4]"]),
    ({"input": torch.zeros(())}, "input", ["[B, T, H] or [N, H]", "got []"]),
    ({"input": torch.zeros(1, B, T, H)}, "input", ["[B, T, H] or [N, H]", "got [1, 2, 3, 4]"]),
    ({"input": torch.zeros(B, T, 0)}, "input", ["H >= 1", "got [2, 3, 0]"]),
    ({"linear_weight": [[1.0]]}, "linear_weight", ["torch.Tensor", "got 'list'"]),
    ({"linear_weight": None}, "linear_weight", ["torch.Tensor", "got 'NoneType'"]),
    ({"linear_weight": torch.nn.Linear(H, V)}, "linear_weight", ["torch.Tensor", "got 'Linear'"]),
    ({"linear_weight": torch.zeros(V, H).long()}, "linear_weight", ["got 'int64'"]),
    ({"linear_weight": torch.zeros(V, H).double()}, "linear_weight", ["got 'float64'"]),
    ({"linear_weight": torch.zeros(V, H).bfloat16()}, "linear_weight", ["got 'bfloat16'"]),
    ({"input": torch.zeros(B, T, H).bfloat16()}, "linear_weight", ["got 'float32'"]),
    ({"linear_weight": torch.zeros(H)}, "linear_weight", ["[V, H]", "got [4]"]),
    ({"linear_weight": torch.zeros(1, V, H)}, "linear_weight", ["[V, H]", "got [1, 5, 4]"]),
    ({"linear_weight": torch.zeros(H, V)}, "linear_weight", ["[V, H]", "got [4, 5]"]),
    ({"linear_weight": torch.zeros(V, H + 1)}, "linear_weight", ["[V, H]", "got [5, 5]"]),
    ({"linear_weight": torch.zeros(0, H)}, "linear_weight", ["[V, H]", "got [0, 4]"]),
    ({"linear_weight": torch.eye(V, H).to_sparse()}, "linear_weight", ["dense", "got torch.sparse_coo", "to_dense"]),
    ({"linear_weight": torch.eye(V, H).to_sparse(1)}, "linear_weight", ["dense", "got torch.sparse_coo"]),
    ({"linear_weight": torch.zeros(V, H, device="meta")}, "linear_weight", ["on the device of input", "got 'meta'"]),
    ({"linear_bias": 1.0}, "linear_bias", ["torch.Tensor", "got 'float'"]),
    ({"linear_bias": True}, "linear_bias", ["torch.Tensor", "got 'bool'"]),
    ({"linear_bias": torch.zeros(V).long()}, "linear_bias", ["got 'int64'"]),
    ({"linear_bias": torch.zeros(V).double()}, "linear_bias", ["got 'float64'"]),
    ({"linear_bias": torch.zeros(V + 1)}, "linear_bias", ["[V] = [5]", "got [6]"]),
    ({"linear_bias": torch.zeros(1)}, "linear_bias", ["[V] = [5]", "got [1]"]),
    ({"linear_bias": torch.zeros(())}, "linear_bias", ["[V] = [5]", "got []"]),
    ({"linear_bias": torch.zeros(1, V)}, "linear_bias", ["[V] = [5]", "got [1, 5]"]),
    ({"linear_bias": torch.zeros(V, device="meta")}, "linear_bias", ["on the device of input", "got 'meta'"]),
    ({"target": [[1, 2, 3]]}, "target", ["torch.Tensor", "got 'list'"]),
    ({"target": labels().int()}, "target", ["int64", "got 'int32'"]),
    ({"target": labels().t()}, "target", ["[B, T] = [2, 3]", "got [3, 2]"]),
    ({"target": labels().flatten()}, "target", ["[B, T] = [2, 3]", "got [6]"]),
    ({"target": labels().to("meta")}, "target", ["on the device of input", "got 'meta'"]),
    ({"target": labels() + 1}, "target", ["lie in [0, 5) or be -100", "got 5"]),
    ({"target": labels() - 1}, "target", ["lie in [0, 5) or be -100", "got -1"]),
    ({"target": labels() + 2**40}, "target", ["lie in [0, 5) or be -100", f"got {2**40 + 1}"]),
    ({"target": labels() + 1, **NARROW}, "target", ["lie in [0, 5) or be -100", "got 5"]),
    ({"target": labels() + 1, "subset": "full"}, "target", ["lie in [0, 5) or be -100", "got 5"]),
    ({"target": labels() + 1, "subset": "reverse"}, "target", ["lie in [0, 5) or be -100", "got 5"]),
    ({"ignore_index": -1}, "target", ["lie in [0, 5) or be -1", "got -100"]),
    ({"ignore_index": 1.0}, "ignore_index", ["an int", "got 1.0"]),
    ({"ignore_index": 2**63}, "ignore_index", ["64 bits", f"got {2**63}"]),
    ({"subset": "captions"}, "subset", ["'caption', 'full', 'reverse', 'random'", "got 'captions'"]),
    ({"subset": None}, "subset", ["'caption', 'full', 'reverse', 'random'", "got None"]),
    ({"subset": torch.tensor([1.0])}, "subset", ["int64", "got 'float32'"]),
    ({"subset": torch.zeros(3, 1).long()}, "subset", ["[K] or [B, K] with B = 2", "got [3, 1]"]),
    ({"subset": torch.tensor([1], device="meta")}, "subset", ["on the device of input", "got 'meta'"]),
    ({"subset": torch.tensor([1, 5])}, "subset", ["lie in [0, 5) or be -1", "got 5"]),
    ({"subset": torch.tensor([1, 5]), **NARROW}, "subset", ["lie in [0, 5) or be -1", "got 5"]),
    ({"subset": torch.tensor([[1], [-100]]), **NARROW}, "subset", ["lie in [0, 5) or be -1", "got -100"]),
    ({"subset": torch.tensor([2**40]), "mle_weight": 0.5}, "subset", ["lie in [0, 5) or be -1", f"got {2**40}"]),
    ({"first_token": "first"}, "first_token", ["'full', 'subset'", "got 'first'"]),
    ({"reduction": "avg"}, "reduction", ["'none', 'mean', 'sum'", "got 'avg'"]),
    ({"num_random": 0}, "num_random", ["at least 1", "got 0"]),
    ({"seed": 1.0}, "seed", ["64 bits", "got 1.0"]),
    ({"weight": [1.0] * V}, "weight", ["torch.Tensor", "got 'list'"]),
    ({"weight": torch.ones(V + 1)}, "weight", ["[V] = [5]", "got [6]"]),
    ({"weight": torch.ones(H)}, "weight", ["[V] = [5]", "got [4]"]),
    ({"weight": torch.ones(V, device="meta")}, "weight", ["on the device of input", "got 'meta'"]),
    ({"weight": torch.ones(V, requires_grad=True)}, "weight", ["not require a gradient"]),
    ({"token_weight": torch.ones(T)}, "token_weight", ["[B, T] = [2, 3] or [B, 1]", "got [3]"]),
    ({"token_weight": torch.ones(B, T, requires_grad=True)}, "token_weight", ["not require a gradient"]),
    ({"grad_weight": "full"}, "grad_weight", ["'dense', 'sparse', 'accumulate'", "got 'full'"]),
    ({"grad_weight": None}, "grad_weight", ["'dense', 'sparse', 'accumulate'", "got None"]),
    ({"grad_weight": True}, "grad_weight", ["'dense', 'sparse', 'accumulate'", "got True"]),
    ({"grad_weight": ["dense"]}, "grad_weight", ["'dense', 'sparse', 'accumulate'", "got ['dense']"]),
]
for _value in (-1, 0.5, 1e9, nan, inf, True, False, "1GB", "0", [0], 1j):
    BAD.append(({"memory_budget": _value}, "memory_budget", ["int", f"got {_value!r}"]))
for _name, _values in {
    "mle_weight": [-0.1, 1.1], "label_smoothing": [-1e-9, 2], "z_loss": [-1.0], "logit_softcap": [0, -30.0],
}.items():  # fmt: skip
    for _value in (*_values, nan, inf, True, "0.1"):
        BAD.append(({_name: _value}, _name, ["number", f"got {_value!r}"]))

# A gradient with rows for the batch's words alone, where a token has one for every word
WIDE = [
    {}, {**NARROW, "mle_weight": 0.1}, {**NARROW, "mle_weight": 1.0}, {**NARROW, "subset": "full"}, {"subset": "full"},
    {**NARROW, "subset": "reverse"}, {"subset": torch.tensor([1])}, {"subset": "random"},
]  # fmt: skip


def raised(arguments, backend):
    with pytest.raises(FastcapError) as error, fastcap.backend(backend):
        F_cap.linear_subset_cross_entropy(
            **{"input": hidden(), "linear_weight": head(), "target": labels(), **arguments},
        )
    assert isinstance(error.value, ValueError)
    return str(error.value)


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    status = fastcap.backends()[request.param]
    if not status:
        pytest.skip(status.reason)
    return request.param


@pytest.mark.parametrize(
    ("arguments", "name", "parts"),
    BAD,
    ids=[f"{name}-{parts[-1]}-{i}" for i, (_, name, parts) in enumerate(BAD)],
)
def test_a_bad_argument_is_named_with_its_rule_and_a_remedy(arguments, name, parts, backend):
    message = raised(arguments, backend)
    assert message.startswith(f"{OP}{name} must ")
    assert all(part in message for part in parts), message
    assert ", got " in message and "; " in message.split(", got ", 1)[1], message  # and a remedy at the end


@pytest.mark.parametrize("options", WIDE, ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_a_sparse_gradient_needs_rows_of_the_batch_alone(options, trained, backend):
    """Also with a frozen head: what is wrong shows before training begins."""
    message = raised({**options, "grad_weight": "sparse", "linear_weight": head().requires_grad_(trained)}, backend)
    assert message.startswith(f"{OP}grad_weight must ")
    assert "got 'sparse'" in message and "first_token='subset'" in message


@pytest.mark.parametrize("options", [{}, NARROW, {"subset": "full"}], ids=str)
def test_accumulating_needs_a_leaf(options, backend):
    message = raised({**options, "grad_weight": "accumulate", "linear_weight": head().requires_grad_() * 2}, backend)
    assert message.startswith((f"{OP}linear_weight must ", f"{OP}grad_weight must "))
    assert "leaf" in message


def test_accumulating_checks_where_it_adds(backend):
    """A main_grad of another shape would be written to where it has no memory, an expanded one to one row V times."""
    zeros = torch.zeros(V, H)
    for wrong in (
        torch.zeros(V, H + 1), torch.zeros(V), torch.zeros(H, V), torch.zeros(V, H, device="meta"), [0.0], zeros.to_sparse(),
        zeros[:1].expand(V, H), zeros[:, :1].expand(V, H), zeros.to(torch.float8_e4m3fn), zeros.int(), zeros.cfloat(),
    ):  # fmt: skip
        parameter = torch.nn.Parameter(head())
        parameter.main_grad = wrong
        for options in ({}, NARROW):
            message = raised({"grad_weight": "accumulate", "linear_weight": parameter, **options}, backend)
            assert message.startswith(f"{OP}linear_weight must ") and "main_grad" in message


@pytest.mark.parametrize("options", [{}, NARROW], ids=["caption", "caption-first-in-subset"])
def test_accumulating_into_an_expanded_gradient_is_refused(options, backend):
    """Of stride 0: the rows are one row."""
    for gradient in (torch.zeros(1, H).expand(V, H), torch.zeros(V, 1).expand(V, H), torch.zeros(()).expand(V, H)):
        parameter = torch.nn.Parameter(head())
        parameter.grad = gradient
        message = raised({"grad_weight": "accumulate", "linear_weight": parameter, **options}, backend)
        assert message.startswith(f"{OP}linear_weight must ") and "(its grad)" in message
    assert (gradient == 0).all()


def test_an_array_is_no_name(backend):
    numpy = pytest.importorskip("numpy")
    for name in ("subset", "reduction", "first_token", "grad_weight", "memory_budget"):
        assert raised({name: numpy.array([1, 2])}, backend).startswith(f"{OP}{name} must ")


def test_an_argument_that_does_not_exist_is_a_type_error():
    with pytest.raises(TypeError, match="size_average"):
        F_cap.linear_subset_cross_entropy(hidden(), head(), labels(), size_average=True)
    with pytest.raises(TypeError):
        F_cap.linear_subset_cross_entropy(hidden(), head(), labels(), torch.zeros(V))  # options are keywords


def test_a_flat_input_is_checked_alike(backend):
    assert raised({"input": hidden()[0]}, backend).startswith(f"{OP}target must have shape")
    flat = {"input": hidden()[0], "target": labels()[0]}
    assert raised({**flat, "token_weight": torch.ones(T, 1)}, backend).startswith(f"{OP}token_weight must have shape")
    assert raised({**flat, "linear_weight": head().T}, backend).startswith(f"{OP}linear_weight must have shape")


def test_only_autocast_lets_dtypes_differ(backend):
    """Under autocast a module's output is bfloat16 and its head float32, which F.linear takes too."""
    mixed = {"input": hidden().bfloat16()}
    assert "linear_weight must" in raised(mixed, backend)
    with fastcap.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F_cap.linear_subset_cross_entropy(hidden().bfloat16(), head(), labels(), linear_bias=torch.zeros(V))
    assert loss.isfinite() and loss.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, NARROW], ids=["caption", "caption-first-in-subset"])
def test_autocast_leaves_float64_alone_and_converts_the_head(options, backend):
    """As torch's own linear is not run in a lower precision for float64; but there the head must be converted by hand."""
    x, weight, bias = hidden().double().requires_grad_(), head().requires_grad_(), torch.ones(V, requires_grad=True)
    call = {"target": labels(), **options}
    with fastcap.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F_cap.linear_subset_cross_entropy(x, weight, linear_bias=bias, **call)
    gradients = torch.autograd.grad(loss, (x, weight, bias))
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight, bias)]
    with fastcap.backend("reference"):
        exact = F_cap.linear_subset_cross_entropy(wide[0], wide[1], linear_bias=wide[2], **call)
    assert loss.dtype == torch.float64 and [g.dtype for g in gradients] == [torch.float64, torch.float32, torch.float32]
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-14)
    for gradient, expected in zip(gradients, torch.autograd.grad(exact, wide), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-7)


def test_good_budgets_are_taken(backend):
    with fastcap.backend(backend):
        losses = [
            F_cap.linear_subset_cross_entropy(hidden(), head(), labels(), memory_budget=budget)
            for budget in (None, 0, 1, 10**6, 2**62)
        ]
    torch.testing.assert_close(losses, [losses[0]] * len(losses))


def test_a_bad_call_leaves_later_calls_and_gradients_alone(backend):
    parameter = torch.nn.Parameter(head())
    with fastcap.backend(backend):
        before = F_cap.linear_subset_cross_entropy(hidden(), parameter, labels())
    raised({"target": labels() + 1, "grad_weight": "accumulate", "linear_weight": parameter}, backend)
    assert parameter.grad is None
    with fastcap.backend(backend):
        assert torch.equal(F_cap.linear_subset_cross_entropy(hidden(), parameter, labels()), before)


# The raw functions of the extension ------------------------------------------------------------------------------------

REDUCTIONS, KINDS, K = {"none": 0, "mean": 1, "sum": 2}, {"set": 0, "reverse": 1, "full": 2}, 4


def native_options(kind="set", mle_weight=0.5):
    from fastcap import _C

    return _C.SubsetOptions(
        subset=KINDS[kind], first_full=True, mle_weight=mle_weight, label_smoothing=0.1, logit_softcap=0.0, z_loss=0.1,
        ignore_index=-100, ids_pad=-1, reduction=REDUCTIONS["mean"],
    )  # fmt: skip


def native_arguments(function):
    """Arguments that `function` takes, of a mixture; those of LinearTokens first."""
    tokens = {
        "target": labels(), "ids": torch.tensor([[[0, 2, 2, -1]]]), "weight": torch.ones(V),
        "token_weight": torch.ones(B, T), "bias": torch.zeros(V), "V": V,
    }  # fmt: skip
    rows, n = torch.tensor([0, 2, 5]), 3
    running = {"state": torch.zeros(n, 8, dtype=torch.float64), "picks": torch.zeros(n, K + 1)}
    kept = {
        "stats": torch.zeros(8, n), "cols": torch.full((n, K + 1), -1, dtype=torch.int32), "dset": torch.zeros(n, K + 1)
    }  # fmt: skip
    loss = torch.zeros(B, T)
    given = {
        "tokens": {"rows": torch.zeros(B * T).long(), "inv_denom": torch.zeros(())},
        "set": {"scores": torch.zeros(B, T, K), "score_y": loss.clone(), "loss": loss, "dset": torch.zeros(B, T, K + 1)},
        "rows": {"logits": torch.zeros(n, V), "rows": rows, "loss": loss, "need_grad": True},
        "absorb": {"logits": torch.zeros(n, V - 1), "begin": 1, "rows": rows, **running},
        "finish": {"rows": rows, **running, "loss": loss, **kept},
        "emit": {"logits": torch.zeros(n, V - 1), "begin": 1, "rows": rows, **kept},
        "group": {"ids": labels().flatten(), "pad": -100, "V": V, "group": rows.new_zeros(6), "distinct": rows.new_zeros(6)},
        "add_rows": {
            "values": torch.zeros(2, H), "group": torch.tensor([0, 1, -1, 1]), "factor": torch.ones(4),
            "source": torch.zeros(2, H), "share": 2,
        },
        "write_rows": {
            "out": torch.zeros(V, H), "ids": torch.tensor([0, V - 1]), "values": torch.zeros(2, H), "add": True,
            "clear": False,
        },
    }[function]  # fmt: skip
    return given if function in ("group", "add_rows", "write_rows") else {**tokens, **given}


def call_native(function, arguments, options, threads=1):
    """As csrc takes them: the tokens' tensors in one object, then the rest, then options and threads."""
    from fastcap import _C

    values = list(arguments.values())
    if function in ("group", "add_rows", "write_rows"):
        options, tokens = None, []
    else:
        tokens, values = [_C.LinearTokens(*values[:6])], values[6:]
    more = [] if options is None else [options]
    more += [] if function in ("tokens", "finish", "group") else [threads]
    return getattr(_C, f"linear_subset_cross_entropy_{function}_cpu")(*tokens, *values, *more)


def in_a_child(*actions) -> list[str]:
    """What each action does, in one process of their own: "ok" or "raises <type>: <message>"; last, whether it lived:
    "exits 0" or "dies of signal <n>"."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            signal.alarm(30)  # a child that hangs is killed, and reported as such
            for action in actions:
                try:
                    action()
                    outcome = "ok"
                except Exception as error:
                    outcome = f"raises {type(error).__name__}: {error}"
                os.write(write, outcome.encode() + b"\0")
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        outcomes = pipe.read().decode().split("\0")[:-1]
    _, status = os.waitpid(child, 0)
    end = f"dies of signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exits {os.WEXITSTATUS(status)}"
    return [*outcomes, end]


FAR = 2**40  # elements away: what is read there is no memory of this process
LABELLED = ("tokens", "set", "rows", "absorb", "finish", "emit")  # the functions that take LinearTokens
# (functions, argument, what stands in for it)
FAULTS = [
    *[(LABELLED, "target", spoil) for spoil in (
        lambda x: x + FAR, lambda x: x - FAR, lambda x: x + 1, lambda x: x.int(), lambda x: None, lambda x: x[0],
        lambda x: x.to("meta"),
    )],
    *[(LABELLED, "ids", spoil) for spoil in (
        lambda x: x + FAR, lambda x: x - FAR, lambda x: x + 3, lambda x: x - 1, lambda x: x.int(), lambda x: None,
        lambda x: x[0], lambda x: x.expand(3, 1, K), lambda x: x.to("meta"),
    )],
    *[(LABELLED, name, spoil) for name in ("weight", "bias") for spoil in (
        lambda x: x.double(), lambda x: x.bfloat16(), lambda x: x.long(), lambda x: x[1:], lambda x: torch.ones(2 * V)[::2],
    )],
    *[(LABELLED, "token_weight", spoil) for spoil in (lambda x: x.double(), lambda x: x.long(), lambda x: x[:1])],
    *[(LABELLED, "V", spoil) for spoil in (lambda x: 0, lambda x: -1, lambda x: 2**31)],
    (("tokens",), "inv_denom", lambda x: x.double()), (("tokens",), "inv_denom", lambda x: x.long()),
    (("tokens",), "inv_denom", lambda x: x.half()), (("tokens",), "inv_denom", lambda x: torch.zeros(1)),
    (("tokens",), "inv_denom", lambda x: None), (("tokens",), "rows", lambda x: x.int()),
    (("tokens",), "rows", lambda x: x.view(2, 3)), (("tokens",), "rows", lambda x: torch.zeros(12).long()[::2]),
    *[(("rows", "absorb", "finish", "emit"), "rows", spoil) for spoil in (
        lambda x: x + FAR, lambda x: x - FAR, lambda x: x + 1, lambda x: x - 1, lambda x: x.int(), lambda x: x[:2],
        lambda x: None, lambda x: x.to("meta"),
    )],
    *[(("rows", "absorb", "emit"), "logits", spoil) for spoil in (
        lambda x: x.long(), lambda x: x[:2], lambda x: x[0], lambda x: None, lambda x: torch.zeros(3, V + 1),
        lambda x: x.T.contiguous().T, lambda x: x.to("meta"),
    )],
    (("rows", "absorb", "emit"), "logits", lambda x: x.double()),  # beside a float32 bias
    (("absorb", "emit"), "begin", lambda x: x + 1), (("absorb", "emit"), "begin", lambda x: -1),
    (("absorb", "emit"), "begin", lambda x: 2**63 - 1),
    *[(("absorb", "finish"), name, spoil) for name in ("state", "picks") for spoil in (
        lambda x: x[:2], lambda x: x[:, 1:], lambda x: x.half(), lambda x: None, lambda x: x.T.contiguous().T,
    )],
    (("absorb", "finish"), "state", lambda x: x.float()), (("absorb", "finish"), "picks", lambda x: x.double()),
    *[(("set", "rows", "finish"), "loss", spoil) for spoil in (
        lambda x: None, lambda x: x[:1], lambda x: x.double(), lambda x: x.T.contiguous().T,
    )],
    *[(("finish", "emit"), name, spoil) for name in ("stats", "cols", "dset") for spoil in (
        lambda x: x[:2], lambda x: x[:, :2], lambda x: x.double(), lambda x: x.T.contiguous().T,
    )],
    (("emit",), "stats", lambda x: None), (("finish", "emit"), "dset", lambda x: None),
    *[(("set",), name, spoil) for name in ("scores", "dset") for spoil in (
        lambda x: x[:1], lambda x: x[..., 1:], lambda x: x.double(), lambda x: x.transpose(0, 1), lambda x: x.long(),
    )],
    (("set",), "scores", lambda x: None), (("set",), "score_y", lambda x: None), (("set",), "score_y", lambda x: x[:1]),
    (("set",), "score_y", lambda x: x.double()),
    *[(("group",), "ids", spoil) for spoil in (
        lambda x: x + FAR, lambda x: x.where(x < 0, V), lambda x: x.where(x < 0, -1), lambda x: x.int(), lambda x: x[1:],
    )],
    *[(("group",), name, spoil) for name in ("group", "distinct") for spoil in (
        lambda x: x[1:], lambda x: x.int(), lambda x: None, lambda x: torch.zeros(12).long()[::2],
    )],
    *[(("add_rows",), "group", spoil) for spoil in (lambda x: x + 1, lambda x: x - 1, lambda x: x + FAR, lambda x: x.int())],
    *[(("add_rows",), "factor", spoil) for spoil in (lambda x: x[1:], lambda x: x.double(), lambda x: x.half())],
    *[(("add_rows",), name, spoil) for name in ("values", "source") for spoil in (
        lambda x: x[:1], lambda x: x[:, 1:], lambda x: x.double(), lambda x: x.T.contiguous().T, lambda x: x[0],
        lambda x: None,
    )],
    (("add_rows",), "source", lambda x: x[:0]),
    *[(("add_rows",), "share", spoil) for spoil in (lambda x: 0, lambda x: -1, lambda x: 1)],
    *[(("write_rows",), "ids", spoil) for spoil in (
        lambda x: x + 1, lambda x: x - 1, lambda x: x + FAR, lambda x: x[1:], lambda x: x.int(), lambda x: None,
    )],
    *[(("write_rows",), "out", spoil) for spoil in (
        lambda x: x[1:], lambda x: x[:, 1:], lambda x: x.long(), lambda x: None, lambda x: x.T.contiguous().T,
    )],
    *[(("write_rows",), "values", spoil) for spoil in (
        lambda x: x[1:], lambda x: x[:, 1:], lambda x: x.double(), lambda x: x.half(), lambda x: None,
    )],
]  # fmt: skip
SPOILT = sorted({(function, name) for functions, name, _ in FAULTS for function in functions})


@pytest.mark.parametrize(("function", "name"), SPOILT, ids=[f"{function}-{name}" for function, name in SPOILT])
def test_the_extension_raises_and_never_crashes(function, name, cpp):
    def call(spoil):
        arguments = native_arguments(function)
        arguments[name] = spoil(arguments[name])
        return lambda: call_native(function, arguments, native_options())

    spoilt = [spoil for functions, argument, spoil in FAULTS if argument == name and function in functions]
    outcomes = in_a_child(call(lambda x: x), *map(call, spoilt))
    assert outcomes[0] == "ok" and outcomes[-1] == "exits 0", outcomes
    assert len(outcomes) == len(spoilt) + 2
    assert all(o.startswith((f"raises FastcapError: {OP}", "raises TypeError")) for o in outcomes[1:-1]), outcomes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [*LABELLED, "group", "add_rows", "write_rows"])
def test_the_extension_takes_what_fits(function, kind, cpp):
    """No kind of subset follows a pointer that only another one has."""
    arguments = native_arguments(function)
    if kind == "full" and function in LABELLED:
        arguments["ids"] = None
    if kind != "set":
        arguments.update({"picks": torch.zeros(3, 1)} if "picks" in arguments else {})
        arguments.update({"cols": None, "dset": None} if "cols" in arguments else {})
    if function == "set" and kind == "full":  # no token chooses among few
        arguments.update(scores=torch.zeros(B, T, 0), dset=torch.zeros(B, T, 1))
    outcomes = in_a_child(*(lambda m=m: call_native(function, arguments, native_options(kind, m)) for m in (0.0, 0.5, 1.0)))
    assert outcomes == ["ok"] * 3 + ["exits 0"]


@pytest.mark.parametrize("kind", ["set", "reverse"])
@pytest.mark.parametrize("function", LABELLED)
def test_no_ids_where_some_are_needed_are_refused(function, kind, cpp):
    arguments = {**native_arguments(function), "ids": None}
    outcome, end = in_a_child(lambda: call_native(function, arguments, native_options(kind)))
    assert outcome.startswith(f"raises FastcapError: {OP}subset must") and end == "exits 0", (outcome, end)


def test_a_share_of_any_size_needs_a_row(cpp):
    """Rounded up, 4 of 2^63 - 1 would overflow."""
    arguments = {**native_arguments("add_rows"), "source": torch.zeros(0, H)}
    outcomes = in_a_child(
        *(lambda n=n: call_native("add_rows", {**arguments, "share": n}, None) for n in (2, 2**62, 2**63 - 3, 2**63 - 1))
    )
    assert outcomes.pop() == "exits 0", outcomes
    assert all(outcome.startswith(f"raises FastcapError: {OP}source must") for outcome in outcomes), outcomes


@pytest.mark.parametrize("column", [V, V + 1, 2**30, -2, -(2**30)])
def test_columns_out_of_range_write_nothing_outside_the_panel(column, cpp):
    memory = torch.full((3, 3, V - 1), 7.0)
    arguments = {**native_arguments("emit"), "logits": memory[1]}
    arguments["cols"] = torch.full_like(arguments["cols"], column)

    def emit():
        call_native("emit", arguments, native_options())
        if not (memory[0] == 7).all() or not (memory[2] == 7).all():
            raise RuntimeError("memory outside the panel was written")

    outcome, end = in_a_child(emit)
    assert end == "exits 0" and (outcome == "ok" or outcome.startswith(f"raises FastcapError: {OP}")), (outcome, end)


def test_tokens_keep_the_tensors_alive_to_which_they_point(cpp):
    from fastcap import _C

    given = {name: value for name, value in native_arguments("tokens").items() if name not in ("rows", "inv_denom")}
    alive = {name: weakref.ref(value) for name, value in given.items() if name != "V"}
    tokens = _C.LinearTokens(*given.values())
    given.clear()
    gc.collect()
    assert [name for name in alive if alive[name]() is None] == []
    rows, inv_denom = torch.zeros(B * T).long(), torch.zeros(())
    n = _C.linear_subset_cross_entropy_tokens_cpu(tokens, rows, inv_denom, native_options())
    assert n == 5 and inv_denom.item() == pytest.approx(1 / 5)  # valid tokens, of weights of 1
    del tokens
    gc.collect()
    assert [name for name in alive if alive[name]() is not None] == []
