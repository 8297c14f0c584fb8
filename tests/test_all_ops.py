"""One contract over every operation: a new one joins by its entry in fastcap.testing.OPERATIONS."""

from __future__ import annotations

import contextlib
import functools
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastcap
from fastcap.testing import OPERATIONS, assert_close_to_float64, evaluate, upstream

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):  # slow: float32 is left to the strides, float64 to test_<op>.py
    FLOATS = (torch.bfloat16,)
CASES = [(name, case) for name, operation in OPERATIONS.items() for case in operation.cases()]
SMALL = [
    (name, case)
    for name, case in CASES
    if sum(case.arguments[i].numel() for i in OPERATIONS[name].given(case.arguments)) < 1000
]

every_operation = pytest.mark.parametrize("name", OPERATIONS)


def every_case(cases=CASES):
    return pytest.mark.parametrize(("name", "case"), cases, ids=[f"{name}-{case.name}" for name, case in cases])


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def on_backends_that_it_has(request):
    """An operation is held to the contract on the backends that it has."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    where = next((given[key] for key in ("target", "fused", "compiled", "gpu", "backend") if key in given), "reference")
    backend = getattr(where, "backend", where)
    if "name" in given and backend not in OPERATIONS[given["name"]].backends:
        pytest.skip(f"{given['name']} has no backend {backend}")


def results_of(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


@contextlib.contextmanager
def poisoned_memory():
    """Fresh tensors hold NaN, and integers their largest value: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check(name, case, dtype, target, arguments=None):
    """Outputs and gradients are as near to float64 as the rule asks; `arguments` may hold the values in other strides."""
    operation = OPERATIONS[name]
    exact = evaluate(operation, case.to(dtype, keep=torch.float64), "reference")
    plain = evaluate(operation, case.to(dtype, target.device), "reference")
    actual = evaluate(operation, arguments or case.to(dtype, target.device), target.backend)
    for kind, results, exacts, plains in zip(("output", "gradient"), actual, exact, plain, strict=True):
        assert len(results) == len(exacts)
        for i, (a, e, p) in enumerate(zip(results, exacts, plains, strict=True)):
            assert a.dtype == (operation.result_of(dtype) if kind == "output" else dtype), (kind, i, a.dtype)
            size = case.size if kind == "output" else 0.0
            assert_close_to_float64(a, e, p, f"{kind} {i} of {name} ({case.name})", size)


@every_case()
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.interpreted_share(3)
def test_every_backend_agrees_with_float64_and_writes_every_element(name, case, dtype, fused):
    with poisoned_memory():
        check(name, case, dtype, fused)


@every_case(SMALL)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_pass_gradcheck(name, case, backend):
    if not fastcap.backends()[backend]:
        pytest.skip(fastcap.backends()[backend].reason)
    operation = OPERATIONS[name]
    arguments = case.to(torch.float64)
    leaves = {i: arguments.pop(i).requires_grad_() for i in operation.given(arguments)}
    if not operation.differentiable:
        with fastcap.backend(backend):
            outputs = results_of(operation.function(**arguments, **leaves))
        assert not any(output.requires_grad for output in outputs)
        return

    def call(*values):
        with fastcap.backend(backend):
            return operation.function(**arguments, **dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


class Recorded(TorchDispatchMode):
    """Keeps the arguments of each call of a fastcap operator."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastcap":
            detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls[func] = detached
        return func(*args, **(kwargs or {}))


@every_case(SMALL)
def test_operators_pass_opcheck(name, case, monkeypatch):
    """Schema, fake tensors (the Meta implementation's shapes) and what torch.compile makes of the raw operators."""
    if not fastcap.backends()["cpp"]:
        pytest.skip(fastcap.backends()["cpp"].reason)
    with Recorded() as recorded:  # a backward that frees its graph may write in place, which no operator does
        evaluate(OPERATIONS[name], case.to(torch.float32), "cpp", retain_graph=True)
    called = {f"{func._schema.name}" for func in recorded.calls}
    known = {f"fastcap::{o}" for o in OPERATIONS[name].operators}
    assert called == known if case.name == OPERATIONS[name].cases()[0].name else called <= known
    # What a forward keeps for its backward may have rows that nobody needs or writes: NaN in both of the runs compared
    monkeypatch.setattr(torch.testing, "assert_close", functools.partial(torch.testing.assert_close, equal_nan=True))
    with poisoned_memory():
        for func, args in recorded.calls.items():
            torch.library.opcheck(func, tuple(args))


COMPILED = [(name, case) for name, operation in OPERATIONS.items() for case in operation.cases()[::5]]


@every_case(COMPILED)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_compiled_without_a_graph_break_gives_the_same(name, case, backend):
    """Forward and backward, in fixed shapes; the inputs hold ignored tokens."""
    if not fastcap.backends()[backend]:
        pytest.skip(fastcap.backends()[backend].reason)
    torch._dynamo.reset()
    operation = OPERATIONS[name]
    compiled = torch.compile(operation.function, fullgraph=True, backend="aot_eager")
    eager = evaluate(operation, case.to(torch.float32), backend)
    traced = evaluate(operation, case.to(torch.float32), backend, function=compiled)
    torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


@every_operation
def test_compiled_with_dynamic_shapes_by_inductor_gives_the_same(name):
    torch._dynamo.reset()
    operation = OPERATIONS[name]
    first = operation.cases()[0]
    backend = "cpp" if fastcap.backends()["cpp"] else "reference"
    compiled = torch.compile(operation.function, fullgraph=True, dynamic=True)
    for batch in (first, *(case for case in operation.cases() if case.name == "wide")):
        arguments = {k: v for k, v in batch.to(torch.float32).items() if k not in ("reduction",)}
        eager = evaluate(operation, arguments, backend)
        traced = evaluate(operation, arguments, backend, function=compiled)
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


def transposed(x):
    """The same values, the last two dimensions swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else strided(x)


def strided(x):
    """The same values, every second element of a larger tensor whose other elements are NaN (or out of range)."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan if x.is_floating_point() else -12345)
    view = wide[..., 1::2]
    return view.copy_(x)


@every_case(SMALL)
@pytest.mark.parametrize("layout", [transposed, strided])
@pytest.mark.interpreted_share(3)
def test_any_strides_will_do(name, case, layout, fused):
    arguments = {
        k: layout(v) if isinstance(v, torch.Tensor) and v.dim() > 0 else v
        for k, v in case.to(torch.float32, fused.device).items()
    }
    check(name, case, torch.float32, fused, arguments)


@every_operation
def test_an_expanded_input_gets_the_gradient_of_its_copies(name, target):
    """One row of strides 0: the gradient of the expanded tensor, and autograd's sum over it."""
    operation = OPERATIONS[name]
    case = operation.cases()[0]
    arguments = case.to(torch.float64, target.device)
    x = operation.inputs[0]
    row = arguments[x][:1].clone().requires_grad_()
    copies = row.detach().expand_as(arguments[x]).clone().requires_grad_()
    with fastcap.backend(target.backend):
        expanded = results_of(operation.function(**{**arguments, x: row.expand_as(arguments[x])}))
        copied = results_of(operation.function(**{**arguments, x: copies}))
    if not operation.differentiable:
        torch.testing.assert_close(expanded, copied, rtol=0, atol=0)
        return
    torch.autograd.backward([*expanded, *copied], [upstream(result) for result in (*expanded, *copied)])
    torch.testing.assert_close(expanded, copied)
    torch.testing.assert_close(row.grad, copies.grad.sum(0, keepdim=True))


@every_operation
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_an_empty_batch_gives_nothing_and_no_error(name, dtype, target):
    operation = OPERATIONS[name]
    with poisoned_memory():
        outputs, gradients = evaluate(operation, operation.empty.to(dtype, target.device), target.backend)
    for output in outputs:
        assert output.dtype == operation.result_of(dtype) and (output == 0).all()
    given = operation.given(operation.empty.arguments) if operation.differentiable else ()
    for i, gradient in zip(given, gradients, strict=True):
        assert gradient.dtype == dtype and gradient.shape == operation.empty.arguments[i].shape
        assert (gradient == 0).all()  # a parameter's has elements, also where the batch has none


@every_operation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=dtype_id)
def test_autocast_gives_float32_results_and_gradients_in_the_inputs_dtype(name, dtype, target):
    """Matrices are multiplied in autocast's dtype, as plain torch does it; float64 stays float64."""
    operation = OPERATIONS[name]
    # a loss for each token, where there is one: the error of their mean may vanish by chance, and allow nothing
    case = next((case for case in operation.cases() if case.arguments.get("reduction") == "none"), operation.cases()[0])
    autocast = functools.partial(torch.autocast, target.device, dtype=torch.bfloat16)
    with autocast():
        outputs, gradients = evaluate(operation, case.to(dtype, target.device), target.backend)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert [o.dtype for o in outputs] == [operation.result or wanted] * len(outputs)
    assert [g.dtype for g in gradients] == [dtype] * len(gradients)
    exact = evaluate(operation, case.to(dtype, keep=torch.float64), "reference")
    with autocast(enabled=operation.autocasts):
        plain = evaluate(operation, case.to(dtype, target.device, keep=wanted), "reference")
    for o, e, p in zip(outputs + gradients, exact[0] + exact[1], plain[0] + plain[1], strict=True):
        assert_close_to_float64(o, e, p.to(o.dtype), name)


@every_case()
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_no_result_is_read_back_on_the_host(name, case, backend):
    """On fake tensors a value cannot be read, so .item(), nonzero() or a data-dependent shape raises."""
    if not fastcap.backends()[backend]:
        pytest.skip(fastcap.backends()[backend].reason)
    mode, arguments = FakeTensorMode(), case.to(torch.float32)
    fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with mode:
        outputs, gradients = evaluate(OPERATIONS[name], fakes, backend)
    real, real_gradients = evaluate(OPERATIONS[name], arguments, "reference")
    assert [(o.shape, o.dtype) for o in outputs] == [(o.shape, o.dtype) for o in real]
    assert [(g.shape, g.dtype) for g in gradients] == [(g.shape, g.dtype) for g in real_gradients]


@every_operation
def test_results_are_the_same_bits_every_time(name, compiled):
    for case in OPERATIONS[name].cases():
        first, second = (
            evaluate(OPERATIONS[name], case.to(torch.float32, compiled.device), compiled.backend) for _ in range(2)
        )
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(a, b), case.name


@every_operation
def test_inference_needs_no_gradient(name, target):
    """Under no_grad, and where no input requires a gradient, the results are the same and carry no graph."""
    operation = OPERATIONS[name]
    arguments = operation.cases()[0].to(torch.float32, target.device)
    expected, _ = evaluate(operation, arguments, target.backend)
    with fastcap.backend(target.backend):
        plain = operation.function(**arguments)
        with torch.inference_mode():
            inferred = operation.function(**arguments)
        with torch.no_grad():
            silent = operation.function(
                **{**arguments, operation.inputs[0]: arguments[operation.inputs[0]].clone().requires_grad_()}
            )
    for result in (plain, inferred, silent):
        result = results_of(result)
        assert not any(r.requires_grad for r in result)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@every_operation
def test_a_gradient_of_a_gradient_is_refused_whichever_way_it_is_asked_for(name, fused):
    """A gradient penalty by .backward() and by autograd.grad: never silently without the penalty's part."""
    operation = OPERATIONS[name]
    if not operation.differentiable:
        pytest.skip(f"{name} has no gradient")
    for case in operation.cases()[::7]:
        arguments = case.to(torch.float64, fused.device)
        leaves = {i: arguments[i].requires_grad_() for i in operation.given(arguments)}

        def penalised(arguments=arguments, leaves=leaves):
            with fastcap.backend(fused.backend):
                outputs = results_of(operation.function(**arguments))
            total = sum(upstream(o).mul(o).sum() for o in outputs)
            gradients = torch.autograd.grad(total, list(leaves.values()), create_graph=True, allow_unused=True)
            return total + sum(g.square().sum() for g in gradients if g is not None)

        message = rf"fastcap\.{operation.stem or name}: the gradient must not be differentiated again"
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(penalised(), list(leaves.values()), allow_unused=True)
        with pytest.raises(RuntimeError, match=message):
            penalised().backward()


# On a GPU only ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_case()
def test_forward_and_backward_never_wait_for_the_gpu(name, case, gpu):
    operation, arguments = OPERATIONS[name], case.to(torch.float32, gpu.device)
    expected = evaluate(operation, arguments, gpu.backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaves = {i: arguments[i].detach().requires_grad_() for i in operation.given(arguments)}
        with fastcap.backend(gpu.backend):
            outputs = operation.function(**{**arguments, **leaves})
        outputs = results_of(outputs)
        gradients = []
        if operation.differentiable:
            gradients = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([o.detach() for o in outputs], expected[0])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.gpu
@every_case()
def test_forward_and_backward_are_captured_in_a_cuda_graph(name, case, gpu):
    operation, arguments = OPERATIONS[name], case.to(torch.float32, gpu.device)
    leaves = {i: arguments[i].detach().clone().requires_grad_() for i in operation.given(arguments)}
    upstreams = [upstream(o) for o in evaluate(operation, arguments, gpu.backend)[0]]

    def step():
        with fastcap.backend(gpu.backend):
            outputs = operation.function(**{**arguments, **leaves})
        outputs = results_of(outputs)
        if not operation.differentiable:
            return outputs, ()
        return outputs, torch.autograd.grad(outputs, list(leaves.values()), upstreams)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gradients = step()
    with torch.no_grad():
        for leaf in leaves.values():  # other values in the same memory
            leaf.copy_(0.75 * leaf.flip(-1))
    graph.replay()
    other = {**arguments, **{i: leaf.detach() for i, leaf in leaves.items()}}
    expected = evaluate(operation, other, gpu.backend)
    torch.testing.assert_close([o.detach() for o in outputs], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(list(gradients), expected[1], rtol=0, atol=0)


@pytest.mark.gpu
@every_case(COMPILED)
def test_compiled_on_the_gpu_without_a_graph_break_gives_the_same(name, case, gpu):
    torch._dynamo.reset()
    operation, arguments = OPERATIONS[name], case.to(torch.float32, gpu.device)
    compiled = torch.compile(operation.function, fullgraph=True)
    eager = evaluate(operation, arguments, gpu.backend)
    traced = evaluate(operation, arguments, gpu.backend, function=compiled)
    torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@every_operation
def test_kernels_run_in_the_current_stream(name, gpu):
    """The inputs are made late in a side stream: a kernel in the default stream would read them too early."""
    operation = OPERATIONS[name]
    case = operation.cases()[0]
    arguments = case.to(torch.float32, gpu.device)
    expected = evaluate(operation, arguments, gpu.backend)
    late = {i: torch.full_like(arguments[i], torch.nan) for i in operation.given(arguments)}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for i, value in late.items():
            value.copy_(arguments[i])
        result = evaluate(operation, {**arguments, **late}, gpu.backend)
    torch.cuda.synchronize()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
