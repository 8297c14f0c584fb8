"""What subset_cross_entropy answers to bad arguments, word for word; and that its raw operators raise and never crash."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import pytest
import torch

import fastcap
from fastcap import functional as F_cap
from fastcap import nn
from fastcap.errors import FastcapError
from fastcap.ops import _subset
from fastcap.ops._subset import Options

OP = "fastcap.subset_cross_entropy: "
B, T, V = 2, 3, 5
nan, inf = float("nan"), float("inf")


def logits():
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(0))


def labels():
    return torch.tensor([[1, 4, 1], [0, -100, 2]])


DTYPES = "float32 or float64 or float16 or bfloat16"
CHOICES = "one of 'caption', 'full', 'reverse', 'random'"
HEADS = "check the vocabulary size of the tokenizer and of the head"
DEVICE = "must be on the device of input, cpu, got 'meta'"
GRADIENT = "must not require a gradient, got 'requires_grad=True'"
YOURSELF = "or multiply the loss of reduction='none' yourself"
SHAPES = "; pass the logits, that dimension last"
SLICE = "; shift and slice input and target alike"
MINUS_ONE = "; pad rows with -1"
FACTORS = "token_weight must have shape [B, T] = [2, 3] or [B, 1], got "
ONE_A_CAPTION = "; use token_weight[:, None] for one a caption"

# (arguments that replace the good ones, the message)
BAD = [
    ({"input": [1.0]}, "input must be a torch.Tensor, got 'list'; pass the logits"),
    ({"input": None}, "input must be a torch.Tensor, got 'NoneType'; pass the logits"),
    ({"input": torch.zeros(B, T, V, dtype=torch.int64)}, f"input must be {DTYPES}, got 'int64'; convert the logits"),
    ({"input": torch.zeros(B, T, V, dtype=torch.complex64)}, f"input must be {DTYPES}, got 'complex64'; convert the logits"),
    ({"input": torch.zeros(B, T, V, dtype=torch.bool)}, f"input must be {DTYPES}, got 'bool'; convert the logits"),
    ({"input": torch.zeros(V)}, "input must have shape [B, T, V] or [N, V], V >= 1, got [5]" + SHAPES),
    ({"input": torch.zeros(())}, "input must have shape [B, T, V] or [N, V], V >= 1, got []" + SHAPES),
    ({"input": torch.zeros(1, B, T, V)}, "input must have shape [B, T, V] or [N, V], V >= 1, got [1, 2, 3, 5]" + SHAPES),
    ({"input": torch.zeros(B, T, 0)}, "input must have shape [B, T, V] or [N, V], V >= 1, got [2, 3, 0]" + SHAPES),
    ({"target": [[1, 2, 3]]}, "target must be a torch.Tensor, got 'list'; pass token ids of dtype int64"),
    ({"target": None}, "target must be a torch.Tensor, got 'NoneType'; pass token ids of dtype int64"),
    ({"target": labels().int()}, "target must be int64, got 'int32'; call target.long()"),
    ({"target": labels().float()}, "target must be int64, got 'float32'; call target.long()"),
    ({"target": labels().t()}, "target must have shape [B, T] = [2, 3], got [3, 2]" + SLICE),
    ({"target": labels()[:, 1:]}, "target must have shape [B, T] = [2, 3], got [2, 2]" + SLICE),
    ({"target": labels().flatten()}, "target must have shape [B, T] = [2, 3], got [6]" + SLICE),
    ({"target": labels().to("meta")}, f"target {DEVICE}; call target.to(input.device)"),
    ({"target": labels() + 1}, f"target must lie in [0, 5) or be -100, got 5; {HEADS}"),
    ({"target": labels() - 1}, f"target must lie in [0, 5) or be -100, got -1; {HEADS}"),
    ({"target": labels() + 2**40}, f"target must lie in [0, 5) or be -100, got {2**40 + 1}; {HEADS}"),
    ({"ignore_index": -1}, f"target must lie in [0, 5) or be -1, got -100; {HEADS}"),
    ({"ignore_index": 1.0}, "ignore_index must be an int, got 1.0; pass -100"),
    ({"ignore_index": None}, "ignore_index must be an int, got None; pass -100"),
    ({"ignore_index": True}, "ignore_index must be an int, got True; pass -100"),
    ({"subset": "captions"}, f"subset must be {CHOICES}, got 'captions'; or pass ids as a tensor [K] or [B, K]"),
    ({"subset": None}, f"subset must be {CHOICES}, got None; or pass ids as a tensor [K] or [B, K]"),
    ({"subset": [1, 2]}, f"subset must be {CHOICES}, got [1, 2]; or pass ids as a tensor [K] or [B, K]"),
    ({"subset": torch.tensor([1.0])}, "subset must be int64, got 'float32'; call subset.long()"),
    ({"subset": torch.tensor([True])}, "subset must be int64, got 'bool'; call subset.long()"),
    ({"subset": torch.tensor(1)}, "subset must have shape [K] or [B, K] with B = 2, got []" + MINUS_ONE),
    ({"subset": torch.zeros(3, 1).long()}, "subset must have shape [K] or [B, K] with B = 2, got [3, 1]" + MINUS_ONE),
    ({"subset": torch.zeros(2, 3, 1).long()}, "subset must have shape [K] or [B, K] with B = 2, got [2, 3, 1]" + MINUS_ONE),
    ({"subset": torch.tensor([1], device="meta")}, f"subset {DEVICE}; call subset.to(input.device)"),
    ({"subset": torch.tensor([1, 5])}, f"subset must lie in [0, 5) or be -1, got 5; {HEADS}"),
    ({"subset": torch.tensor([1, -2])}, f"subset must lie in [0, 5) or be -1, got -2; {HEADS}"),
    ({"subset": torch.tensor([[1], [-100]])}, f"subset must lie in [0, 5) or be -1, got -100; {HEADS}"),
    ({"first_token": "first"}, "first_token must be one of 'full', 'subset', got 'first'; pass first_token='full'"),
    ({"first_token": True}, "first_token must be one of 'full', 'subset', got True; pass first_token='full'"),
    ({"reduction": "avg"}, "reduction must be one of 'none', 'mean', 'sum', got 'avg'; pass reduction='mean'"),
    ({"reduction": None}, "reduction must be one of 'none', 'mean', 'sum', got None; pass reduction='mean'"),
    ({"num_random": 0}, "num_random must be an int of at least 1, got 0; the paper draws 10"),
    ({"num_random": 2.0}, "num_random must be an int of at least 1, got 2.0; the paper draws 10"),
    ({"num_random": True}, "num_random must be an int of at least 1, got True; the paper draws 10"),
    ({"seed": 1.0}, "seed must be None or an int of 64 bits, got 1.0; pass seed=0"),
    ({"seed": False}, "seed must be None or an int of 64 bits, got False; pass seed=0"),
    ({"seed": 2**63}, f"seed must be None or an int of 64 bits, got {2**63}; pass seed=0"),
    ({"weight": [1.0] * V}, "weight must be a torch.Tensor, got 'list'; pass a tensor or None"),
    ({"weight": torch.ones(V).long()}, f"weight must be {DTYPES}, got 'int64'; call weight.float()"),
    ({"weight": torch.ones(V + 1)}, "weight must have shape [V] = [5], got [6]; pass one weight a class"),
    ({"weight": torch.ones(1, V)}, "weight must have shape [V] = [5], got [1, 5]; pass one weight a class"),
    ({"weight": torch.ones(V, device="meta")}, f"weight {DEVICE}; call weight.to(input.device)"),
    ({"weight": torch.ones(V, requires_grad=True)}, f"weight {GRADIENT}; pass weight.detach(), {YOURSELF}"),
    ({"token_weight": 1.0}, "token_weight must be a torch.Tensor, got 'float'; pass a tensor or None"),
    ({"token_weight": torch.ones(B, T).bool()}, f"token_weight must be {DTYPES}, got 'bool'; call token_weight.float()"),
    ({"token_weight": torch.ones(B)}, FACTORS + "[2]" + ONE_A_CAPTION),
    ({"token_weight": torch.ones(T)}, FACTORS + "[3]" + ONE_A_CAPTION),
    ({"token_weight": torch.ones(1, T)}, FACTORS + "[1, 3]" + ONE_A_CAPTION),
    ({"token_weight": torch.ones(B, 2)}, FACTORS + "[2, 2]" + ONE_A_CAPTION),
    ({"token_weight": torch.ones(B, T, device="meta")}, f"token_weight {DEVICE}; call token_weight.to(input.device)"),
    (
        {"token_weight": torch.ones(B, T, requires_grad=True)},
        f"token_weight {GRADIENT}; pass token_weight.detach(), {YOURSELF}",
    ),
]  # fmt: skip

NUMBERS = {
    "mle_weight": ("be a number in [0, 1]", "0 is the subset loss alone, 1 is MLE alone", [-0.1, 1.1]),
    "label_smoothing": ("be a number in [0, 1]", "0 smooths nothing", [-1e-9, 2]),
    "z_loss": ("be a finite number of at least 0", "0 adds nothing", [-1.0]),
    "logit_softcap": ("be a number in [1e-30, 1e+30]", "pass None for no cap", [0, -30.0]),
}
for _name, (_rule, _remedy, _values) in NUMBERS.items():
    for _value in (*_values, nan, inf, -inf, True, "0.1", [0.1], 1j):
        BAD.append(({_name: _value}, f"{_name} must {_rule}, got {_value!r}; {_remedy}"))


def raised(arguments, backend):
    with pytest.raises(FastcapError) as error, fastcap.backend(backend):
        F_cap.subset_cross_entropy(**{"input": logits(), "target": labels(), **arguments})
    assert isinstance(error.value, ValueError)
    return str(error.value)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_a_bad_argument_is_named_with_its_rule_and_a_remedy(arguments, message, backend):
    if not fastcap.backends()[backend]:
        pytest.skip(fastcap.backends()[backend].reason)
    assert raised(arguments, backend) == OP + message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ignore_index", 2**63),
        ("ignore_index", -(2**70)),
        ("subset", "numpy"),
        ("reduction", "numpy"),
        ("first_token", "numpy"),
    ],
)
def test_values_that_python_or_torch_would_answer_for_are_named_too(name, value):
    """An int of more than 64 bits, and an array (which compares element by element)."""
    if value == "numpy":
        value = pytest.importorskip("numpy").array([1, 2])
    for backend in ("reference", "cpp"):
        if fastcap.backends()[backend]:
            assert raised({name: value}, backend).startswith(f"{OP}{name} must ")


def test_an_argument_that_does_not_exist_is_a_type_error():
    with pytest.raises(TypeError, match="size_average"):
        F_cap.subset_cross_entropy(logits(), labels(), size_average=True)
    with pytest.raises(TypeError):
        F_cap.subset_cross_entropy(logits(), labels(), "caption")  # options are keywords


def test_a_flat_input_is_checked_alike(cpp):
    with pytest.raises(FastcapError, match=r"target must have shape .* got "):
        F_cap.subset_cross_entropy(logits()[0], labels())
    with pytest.raises(FastcapError, match=r"token_weight must have shape .* got "):
        F_cap.subset_cross_entropy(logits()[0], labels()[0], token_weight=torch.ones(T, 1))


def test_the_module_raises_the_same_error():
    with pytest.raises(FastcapError, match=r"^fastcap\.subset_cross_entropy: reduction must be one of .* got 'avg'"):
        nn.SubsetCrossEntropyLoss(reduction="avg")(logits(), labels())


def test_a_bad_call_leaves_later_calls_alone(cpp):
    before = F_cap.subset_cross_entropy(logits(), labels())
    raised({"target": labels() + 1}, "cpp")
    assert torch.equal(F_cap.subset_cross_entropy(logits(), labels()), before)


# Raw operators and the extension: no shape, dtype or value may make them read or write where they must not -------------

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
KINDS = {"set": 0, "reverse": 1, "full": 2}


def options_of(kind="set", **changed):
    given = Options(kind, -100, True, 0.1, 0.1, 0.0, 0.0, -100, "mean")._replace(**changed)
    fields = given._asdict()
    return given, {**fields, "kind": KINDS[kind], "reduction": REDUCTIONS[given.reduction]}


def native_options(**changed):
    from fastcap import _C

    _, fields = options_of(**changed)
    return _C.SubsetOptions(subset=fields.pop("kind"), **fields)


def forward_arguments(kind="set"):
    ids = {"set": labels().unsqueeze(1).expand(B, T, T), "reverse": labels().unsqueeze(1), "full": None}[kind]
    C = T + 1
    return {
        "input": logits(), "target": labels(), "ids": ids, "weight": torch.ones(V), "token_weight": torch.ones(B, T),
        "out": torch.zeros(()), "inv_denom": torch.zeros(()), "stats": torch.zeros(8, B, T),
        "cols": torch.zeros(B, T, C, dtype=torch.int32) if kind == "set" else None,
        "dset": torch.zeros(B, T, C) if kind == "set" else None,
    }  # fmt: skip


def backward_arguments(kind="set"):
    from fastcap import _C

    saved = forward_arguments(kind)
    _C.subset_cross_entropy_fwd_cpu(*saved.values(), native_options(kind=kind), 1)
    kept = {name: saved[name] for name in ("inv_denom", "input", "target", "ids", "weight", "stats", "cols", "dset")}
    return {"grad_out": torch.ones(()), **kept, "dinput": torch.zeros(B, T, V)}


def in_a_child(action) -> str:
    """What `action` does in a process of its own: "ok", "raises <type>: <message>" or "dies of signal <n>"."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            signal.alarm(30)  # a child that hangs is killed, and reported as such
            try:
                action()
                outcome = "ok"
            except Exception as error:
                outcome = f"raises {type(error).__name__}: {error}"
            os.write(write, outcome.encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        outcome = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return f"dies of signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else outcome


# What stands in for each tensor: (argument, how it is spoilt, which kinds)
FORWARD_FAULTS = [
    ("input", lambda x: x[0]), ("input", lambda x: x[None]), ("input", lambda x: x.long()), ("input", lambda x: None),
    ("input", lambda x: x.to("meta")), ("input", lambda x: x[:, :, :0]), ("input", lambda x: x[:1]),
    ("target", lambda x: x[:1]), ("target", lambda x: x.int()), ("target", lambda x: None),
    ("target", lambda x: x.to("meta")), ("target", lambda x: x + 2**40), ("target", lambda x: x - 2**40),
    ("ids", lambda x: x[:, :, :1]), ("ids", lambda x: x[:1]), ("ids", lambda x: x.int()), ("ids", lambda x: None),
    ("ids", lambda x: x + 2**40), ("ids", lambda x: x.to("meta")), ("ids", lambda x: x[0]),
    ("weight", lambda x: x[1:]), ("weight", lambda x: x.double()), ("weight", lambda x: torch.ones(2 * V)[::2]),
    ("token_weight", lambda x: x[:1]), ("token_weight", lambda x: x.double()),
    ("out", lambda x: None), ("out", lambda x: torch.zeros(B, T)), ("out", lambda x: x.double()),
    ("inv_denom", lambda x: None), ("inv_denom", lambda x: torch.zeros(1)), ("inv_denom", lambda x: x.double()),
    ("stats", lambda x: x[:7]), ("stats", lambda x: x[:, :1]), ("stats", lambda x: x.double()),
    ("stats", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    ("cols", lambda x: x[:, :, 1:]), ("cols", lambda x: x.long()), ("cols", lambda x: x.transpose(0, 1)),
    ("dset", lambda x: None), ("dset", lambda x: x[:, :, 1:]), ("dset", lambda x: x.double()),
]  # fmt: skip
BACKWARD_FAULTS = [
    ("grad_out", lambda x: None), ("grad_out", lambda x: torch.ones(B, T)), ("grad_out", lambda x: x.double()),
    ("grad_out", lambda x: x.to("meta")),
    ("inv_denom", lambda x: None), ("inv_denom", lambda x: x.double()),
    ("input", lambda x: None), ("input", lambda x: x[:1]), ("input", lambda x: x.half()), ("input", lambda x: x.to("meta")),
    ("target", lambda x: None), ("target", lambda x: x[:1]), ("target", lambda x: x.int()),
    ("weight", lambda x: x[1:]), ("weight", lambda x: x.double()),
    ("stats", lambda x: None), ("stats", lambda x: x[:7]), ("stats", lambda x: x.double()),
    ("cols", lambda x: x[:, :, 1:]), ("cols", lambda x: x[:1]), ("cols", lambda x: x.long()),
    ("cols", lambda x: x + 2**30), ("cols", lambda x: x * 0 + V), ("cols", lambda x: x * 0 - 2**30),
    ("dset", lambda x: None), ("dset", lambda x: x.double()), ("dset", lambda x: x[:1]),
    ("dinput", lambda x: None), ("dinput", lambda x: x[0]), ("dinput", lambda x: x.half()), ("dinput", lambda x: x.double()),
    ("dinput", lambda x: x.transpose(0, 1)), ("dinput", lambda x: x.to("meta")),
]  # fmt: skip
REVERSE_FAULTS = [
    ("ids", lambda x: None), ("ids", lambda x: x[:1]), ("ids", lambda x: x.int()), ("ids", lambda x: x + 2**40),
    ("ids", lambda x: x.where(x < 0, -(2**40))),
]  # fmt: skip


def numbered(faults):
    return [pytest.param(*fault, id=f"{fault[0]}-{i}") for i, fault in enumerate(faults)]


@pytest.mark.parametrize(("name", "spoil"), numbered(FORWARD_FAULTS))
def test_the_extensions_forward_raises_and_never_crashes(name, spoil, cpp):
    from fastcap import _C

    arguments = forward_arguments()
    assert in_a_child(lambda: _C.subset_cross_entropy_fwd_cpu(*arguments.values(), native_options(), 1)) == "ok"
    arguments[name] = spoil(arguments[name])
    outcome = in_a_child(lambda: _C.subset_cross_entropy_fwd_cpu(*arguments.values(), native_options(), 1))
    assert outcome.startswith((f"raises FastcapError: {OP}", "raises TypeError")), outcome


@pytest.mark.parametrize(
    ("kind", "name", "spoil"),
    [pytest.param("set", *f.values, id=f"set-{f.id}") for f in numbered(BACKWARD_FAULTS)]
    + [pytest.param("reverse", *f.values, id=f"reverse-{f.id}") for f in numbered(REVERSE_FAULTS)],
)
def test_the_extensions_backward_raises_and_never_crashes(kind, name, spoil, cpp):
    from fastcap import _C

    arguments = backward_arguments(kind)
    options = native_options(kind=kind)
    assert in_a_child(lambda: _C.subset_cross_entropy_bwd_cpu(*arguments.values(), options, 1)) == "ok"
    arguments[name] = spoil(arguments[name])
    outcome = in_a_child(lambda: _C.subset_cross_entropy_bwd_cpu(*arguments.values(), options, 1))
    left_out = name == "cols" and outcome == "ok"  # columns out of range may also be passed over: see below
    assert left_out or outcome.startswith((f"raises FastcapError: {OP}", "raises TypeError")), outcome


def test_columns_out_of_range_write_nothing_outside_the_gradient(cpp):
    """Rows with no dense part go another way, which must check the saved columns as well."""
    from fastcap import _C

    memory = torch.full((3, B, T, V), 7.0)
    options = native_options(first_full=False, mle_weight=0.0)
    for column in (V, V + 1, 2**30, -(2**30)):
        arguments = {**backward_arguments(), "input": None, "stats": None, "dinput": memory[1]}
        arguments["cols"] = torch.full_like(arguments["cols"], column)
        outcome = in_a_child(lambda given=arguments: (
            _C.subset_cross_entropy_bwd_cpu(*given.values(), options, 1), check(memory)
        ))  # fmt: skip
        assert outcome == "ok" or outcome.startswith(f"raises FastcapError: {OP}"), (column, outcome)


def check(memory):
    if not (memory[0] == 7).all() or not (memory[2] == 7).all():
        raise RuntimeError("memory outside the gradient was written")


def raw(x, target, ids, options, backend="cpp"):
    return torch.ops.fastcap.subset_cross_entropy_fwd(x, target, ids, None, None, *options, True, backend)


def test_raw_operators_raise_on_bad_shapes_dtypes_and_names(cpp):
    options, _ = options_of("full")
    narrow, _ = options_of("set")
    assert raw(logits(), labels(), None, options)[0].isfinite()
    wrong = [
        (logits()[0], labels(), None, options), (logits(), labels()[:1], None, options),
        (logits(), labels().int(), None, options), (logits().long(), labels(), None, options),
        (logits(), labels() + 1, None, options), (logits(), labels(), None, narrow),
        (logits(), labels(), labels(), narrow), (logits(), labels(), None, options._replace(kind="none")),
        (logits(), labels(), None, options._replace(reduction="avg")), (logits(), labels(), None, options, "gpu"),
        (logits(), labels(), None, options, "cuda"), (torch.zeros(B, T, 0), labels(), None, options),
    ]  # fmt: skip
    for arguments in wrong:
        outcome = in_a_child(lambda given=arguments: raw(*given))
        assert outcome.startswith("raises"), (outcome, arguments)


def test_prepare_serves_every_operation_with_its_own_name():
    """The checks are shared: the message names the operation that was called."""
    with pytest.raises(FastcapError, match=r"^fastcap\.another: target must be int64"):
        _subset.prepare(
            "another", logits(), labels().int(), V, subset="caption", first_token="full", mle_weight=0.0, weight=None,
            token_weight=None, ignore_index=-100, label_smoothing=0.0, logit_softcap=None, z_loss=0.0, num_random=10,
            seed=None, reduction="mean",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["input", "linear_weight"])
def test_what_is_sparse_is_refused_by_name(name):
    arguments = {"input": torch.zeros(1, 2, 3), "linear_weight": torch.zeros(4, 3)}
    arguments[name] = arguments[name].to_sparse()
    calls = [lambda: F_cap.linear_subset_cross_entropy(**arguments, target=torch.zeros(1, 2, dtype=torch.int64))]
    if name == "input":
        calls.append(lambda: F_cap.subset_cross_entropy(arguments["input"], torch.zeros(1, 2, dtype=torch.int64)))
    for call in calls:
        with pytest.raises(FastcapError, match=f"{name} must be dense, got torch.sparse_coo; call {name}.to_dense"):
            call()
