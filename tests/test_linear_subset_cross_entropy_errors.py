"""What linear_subset_cross_entropy answers to bad arguments: which one, its rule, what it got."""

from __future__ import annotations

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
    """A main_grad of another shape would be written to where it has no memory."""
    for wrong in (torch.zeros(V, H + 1), torch.zeros(V), torch.zeros(H, V), torch.zeros(V, H, device="meta"), [0.0]):
        parameter = torch.nn.Parameter(head())
        parameter.main_grad = wrong
        message = raised({"grad_weight": "accumulate", "linear_weight": parameter}, backend)
        assert message.startswith(f"{OP}linear_weight must ") and "main_grad" in message


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
