"""linear_subset_cross_entropy against plain torch, torch's chunked loss and others: from hidden states and the head.

Bytes and FLOPs: see floors.linear_subset_cross_entropy. The floors that are measured are torch.zeros_like(weight) for the
subset's dense gradient, and the matrix products alone ("matmuls") where the whole vocabulary takes part; a sparse or
accumulated gradient has no such floor, and its own traffic is what it is held against. On a CPU zeros_like can be beaten:
bench_subset_cross_entropy says how, and `fastcap bench --huge-pages` compares without that.

Our providers are a backend and what it is asked for: "cpp" (all defaults), "cpp-sparse" and "cpp-accumulate"
(grad_weight), "cpp-32MB", "cpp-4GB" and "cpp-0" (memory_budget). "chunked" is torch's own with its own choice of rows,
"chunked-32MB" the same with as many rows as fill 32 MiB with logits. "mle" and names that end in "-mle" or "-blip" compute
something else, in the same seconds: the likelihood alone, and the same provider at blip's vocabulary.

Padding: rows that are ignored cost us nothing, and cost eager torch what others do. "large" shapes have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastcap.benchmarks import captions, floors, harness, peers, plain
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings, Skip
from fastcap.benchmarks.plain import DENSE_ROWS, GATHERS, IGNORED, MODES, VARIANTS
from torch import Tensor

import fastcap
from fastcap import functional as F_cap
from fastcap import memory
from fastcap.ops import _backend

OPERATION = "linear_subset_cross_entropy"
FORWARD, BACKWARD = MODES


class Shape(NamedTuple):
    """B captions of T tokens over V words, from H features; `padded` as captions.draw_targets takes it."""

    B: int
    T: int
    V: int
    H: int
    padded: float | None = None


SHAPES = {
    "tiny": Shape(4, 6, 97, 16),  # for tests
    "blip": Shape(32, 20, 30_522, 768, padded=0.25),
    "blip_256k": Shape(32, 20, 256_000, 768, padded=0.25),  # what does not depend on V is as fast as blip
    "show_attend_tell": Shape(32, 52, 9_490, 512),
    "gpt2": Shape(32, 20, 50_257, 768),
    "qwen": Shape(32, 20, 151_936, 2_048),
    "gemma": Shape(32, 20, 262_144, 2_304),
    "large_head": Shape(32, 32, 256_000, 2_048, padded=0.0),  # for its memory
}
# N = B T tokens without padding, on a GPU: the heads of BLIP, Qwen and Gemma, and each at H 4,096.
TOKENS = {640: (32, 20), 4_096: (64, 64), 16_384: (256, 64)}
HEADS = {"31k": (30_524, 768), "152k": (151_936, 2_048), "262k": (262_144, 2_304)}
LARGE = {f"large_{N}_{v}": Shape(*TOKENS[N], V, H, 0.0) for N in (4_096, 640, 16_384) for v, (V, H) in HEADS.items()}
WIDE = {f"large_4096_{v}_h4096": Shape(*TOKENS[4_096], V, 4_096, 0.0) for v, (V, _) in HEADS.items()}
SHAPES |= LARGE | WIDE

FORMS = {
    "": {},
    "-sparse": {"grad_weight": "sparse"},
    "-accumulate": {"grad_weight": "accumulate"},
    "-32MB": {"memory_budget": 32 << 20},
    "-4GB": {"memory_budget": 4 << 30},
    "-0": {"memory_budget": 0},
}

# What is promised of the forward and backward, by (device, shape, variant): in float32 on a CPU, bfloat16 for large shapes
# and on a GPU.
GOALS = {
    ("cpu", "blip", "subset"): (
        Goal("cpp", 1.4, "zeros_like"), Goal("cpp", 1.0, "gather"), Goal("cpp", 1.0, "compile"),
        Goal("cpp-sparse", 0.1, "compile"), Goal("cpp-accumulate", 0.1, "compile"),
        Goal("cpp-sparse", 10e6, quantity="memory"), Goal("cpp-accumulate", 10e6, quantity="memory"),
    ),
    ("cpu", "blip_256k", "subset"): (
        Goal("cpp-sparse", 1.3, "cpp-sparse-blip"), Goal("cpp-accumulate", 1.3, "cpp-accumulate-blip"),
        Goal("cpp-sparse", 10e6, quantity="memory"), Goal("cpp-accumulate", 10e6, quantity="memory"),
    ),
    ("cpu", "blip", "full"): (
        Goal("cpp-32MB", 1.05, "cross_entropy"), Goal("cpp-32MB", 1 / 3, "chunked"), Goal("cpp-4GB", 1.0, "cross_entropy"),
    ),
    ("cpu", "blip", "mixture"): (
        Goal("cpp-32MB", 1.05, "mle"), Goal("cpp-32MB", 1 / 3, "mle-chunked"), Goal("cpp-4GB", 1.0, "mle"),
        Goal("cpp", 1.05, "cpp-mle"),
    ),
    ("cpu", "large_head", "full"): (
        Goal("cpp", 3e9, quantity="scratch"), Goal("cpp-0", 3e9, quantity="scratch"),
        Goal("cross_entropy-fp32", 3e9, quantity="scratch", at_least=True),
    ),
    ("cuda", "blip", "subset"): (Goal("triton-sparse", 60e-6),),
}  # fmt: skip
RIVALS = ("liger_kernel", "cut_cross_entropy", "cut_cross_entropy-exact", "chunked", "compile")
FASTER = tuple(Goal("triton", 1.0, rival) for rival in RIVALS)
LEANER = tuple(Goal("triton-0", 1.0, rival, "memory") for rival in RIVALS if rival != "cut_cross_entropy")  # the exact ones
SHARE = (Goal("triton", 0.65, quantity="products", at_least=True),)
GOALS |= {("cuda", name, "full"): FASTER + LEANER + (SHARE if name in WIDE else ()) for name in (*LARGE, *WIDE)}


# What is run ------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Comparisons of one shape."""

    shape: str
    dtypes: tuple[str, ...]
    variants: tuple[str, ...]
    modes: tuple[str, ...]
    compiles: bool = False


def plan(settings: Settings) -> list[Plan]:
    """The comparisons of a profile on a device, what matters most first: a run may be out of time before its end."""
    gpu, main, dense = settings.device.startswith("cuda"), ("subset", "first_full"), ("full", "mixture")
    dtypes = ("bf16", "fp32") if gpu else ("fp32",)
    large = [Plan(name, ("bf16",), ("full",), (BACKWARD,), gpu) for name in (*LARGE, *WIDE)]
    head = Plan("large_head", ("bf16",), ("full",), (BACKWARD,))
    wide = Plan("blip_256k", dtypes, ("subset",), (BACKWARD,), gpu)
    if settings.shapes:
        of_all = [Plan(name, dtypes, (*main, *dense), MODES, True) for name in SHAPES]
        fixed = {one.shape: one for one in (*large, head, wide)}
        return [fixed.get(one.shape, one) for one in of_all if one.shape in settings.shapes]
    if settings.profile == "tiny":
        return [Plan("tiny", ("fp32",), tuple(VARIANTS), MODES)]
    if settings.profile == "quick":
        return [Plan("blip", dtypes, ("subset", "full"), (BACKWARD,))]
    others = ("gpt2", "show_attend_tell", "qwen", "gemma")
    if settings.profile == "all" or gpu:
        blip = [Plan("blip", dtypes, ("subset", "full"), (BACKWARD,), True), wide]
        rest = [
            Plan("blip", dtypes, ("mixture", "first_full", "reverse"), (BACKWARD,), not gpu),
            Plan("blip", dtypes, tuple(VARIANTS), (FORWARD,), not gpu),
            *(Plan(name, dtypes, (*main, "full"), (BACKWARD,)) for name in others),
        ]
        return [*blip, *large, *rest] if gpu else [*blip, *rest, Plan("blip", ("bf16",), main, (BACKWARD,)), head]
    return [
        Plan("blip", dtypes, ("subset",), MODES, True),
        wide,
        Plan("blip", dtypes, ("full",), (BACKWARD,), True),
        Plan("blip", dtypes, ("mixture", "first_full"), (BACKWARD,)),
    ]


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile on a device."""
    found = []
    gpu = settings.device.startswith("cuda")
    for one in plan(settings):
        for dtype, variant, mode in ((d, v, m) for d in one.dtypes for v in one.variants for m in one.modes):
            measured_in = "bf16" if one.shape.startswith("large") or gpu else "fp32"
            goals = GOALS.get((torch.device(settings.device).type, one.shape, variant), ())
            rounds = 5 if gpu or DENSE_ROWS[variant] != "all" else 0 if one.shape == "large_head" else 3
            key = (one.shape, dtype, variant, mode)
            providers = names(*key, one.compiles, settings)
            sizes = " x ".join(f"{n:,}" for n in SHAPES[one.shape][:4])
            found.append(
                Case(
                    OPERATION, one.shape, sizes, dtype, variant, mode, providers,
                    lambda key=key, providers=providers: build(*key, providers, settings.device), rounds,
                    goals if mode == BACKWARD and dtype == measured_in else (),
                )
            )  # fmt: skip
    return found


def names(shape: str, dtype: str, variant: str, mode: str, compiles: bool, settings: Settings) -> tuple[str, ...]:
    """The providers of a case: ours, peers, what is timed for scale, the floor."""
    gpu, backward, quick = settings.device.startswith("cuda"), mode == BACKWARD, settings.profile == "quick"
    backend, forms, scale = "triton" if gpu else "cpp", [""], []
    if backward and variant == "subset":
        forms += ["-sparse", "-accumulate"]
        scale = [f"{backend}{form}-blip" for form in forms[1:]] if shape == "blip_256k" else []
    if backward and variant in ("full", "mixture"):
        forms += ["-32MB"] if quick else ["-32MB", "-4GB", *(["-0"] if variant == "full" else [])]
        scale = ["mle", "mle-chunked", f"{backend}-mle"] if variant == "mixture" else []
    if variant == "full":
        others = ["cross_entropy", *(["cross_entropy-fp32"] if shape == "large_head" else [])]
        # Torch's own blocks in bfloat16 on a CPU: 35 times as long as eager at N 256, V 32,000, H 256. Minutes a call here.
        slow = quick or (shape == "large_head" and not gpu)  # a minute a call there
        others += [] if slow else ["chunked", "chunked-32MB"]
        others += ["liger_kernel", "cut_cross_entropy", "cut_cross_entropy-exact"] if gpu else []
    else:
        others = [*(["masked"] if shape != "blip_256k" or gpu else []), "gather"]
    floor = [] if variant == "subset" and not backward else ["zeros_like"] if variant == "subset" else ["matmuls"]
    reference = [f"reference{form}" for form in forms if "B" not in form] if settings.profile == "tiny" else []
    reference = ["reference"] if settings.profile == "all" and shape == "blip" and not gpu else reference
    ours = [f"{backend}{form}" for form in forms]
    return (*ours, *reference, *others, *(["compile"] if compiles and dtype != "fp16" else []), *scale, *floor)


# The peers -----------------------------------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor], Tensor]


def losses(target: Tensor, V: int, dtype: torch.dtype, variant: str, device: str) -> dict[str, Callable[[], Loss | str]]:
    """Of each peer, what makes its loss, or says why there is none."""
    rows = max(1, (32 << 20) // (V * dtype.itemsize))

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        return plain.masked(F.linear(hidden, weight), target, "full")

    def best(hidden: Tensor, weight: Tensor) -> Tensor:
        return plain.linear_gather(hidden, weight, target, variant)

    def flat(peer: peers.Peer) -> Loss | str:
        call = peer.call
        return peer.reason if call is None else lambda h, w: call(h.flatten(0, 1), w, target.flatten())

    return {
        "masked": lambda: lambda h, w: plain.masked(F.linear(h, w), target, variant),
        "gather": lambda: best,
        "compile": lambda: peers.compiled(eager if variant == "full" else best).call,
        "cross_entropy": lambda: eager,
        # as transformers' own loss functions do
        "cross_entropy-fp32": lambda: lambda h, w: plain.masked(F.linear(h, w).float(), target, "full"),
        "mle": lambda: eager,
        "chunked": lambda: flat(peers.torch_chunked()),
        "mle-chunked": lambda: flat(peers.torch_chunked()),
        "chunked-32MB": lambda: flat(peers.torch_chunked(rows)),
        "liger_kernel": lambda: flat(peers.liger_linear_cross_entropy(device)),
        "cut_cross_entropy": lambda: flat(half_only(peers.cut_cross_entropy(device), dtype)),
        "cut_cross_entropy-exact": lambda: flat(half_only(peers.cut_cross_entropy(device, exact=True), dtype)),
    }


def half_only(peer: peers.Peer, dtype: torch.dtype) -> peers.Peer:
    return peer if dtype.itemsize == 2 else peers.Peer(None, "cut-cross-entropy's backward takes half precision only")


# A case ----------------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [B, T]


def draw(shape: str, dtype: torch.dtype, device: str) -> Inputs:
    """Hidden states of unit size, and a head that gives logits of about 3."""
    B, T, V, H, padded = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator, device=device)
    weight = torch.randn(V, H, generator=generator, device=device).mul_(3 / H**0.5)
    target = captions.draw_targets(B, T, V, padded=padded, ignore_index=IGNORED)
    return Inputs(hidden.to(dtype), weight.to(dtype), target.to(device))


def stepping(loss_of: Loss, inputs: Inputs, backward: bool) -> Callable:
    """A provider's run: the loss, and the gradients of the hidden states and of the head as autograd returns them."""
    hidden, weight = (x.detach().requires_grad_(backward) for x in inputs[:2])

    def run(upstream: Tensor | None = None) -> tuple:
        if not backward:
            with torch.no_grad():
                return (loss_of(hidden, weight),)
        loss = loss_of(hidden, weight)
        grads = torch.autograd.grad(loss, (hidden, weight), None if upstream is None else upstream.to(loss.dtype))
        return (loss.detach(), *grads)

    return run


def accumulating(loss_of: Loss, inputs: Inputs) -> Callable:
    """The same for grad_weight="accumulate": into `.grad`, or in half precision into a float32 `main_grad`, never zeroed.

    With an upstream gradient, where the result is checked, the gradient of the head is the difference that a second call
    makes to the first one's.
    """
    hidden, weight = (x.detach().requires_grad_() for x in inputs[:2])
    if weight.dtype.itemsize == 2:
        sums = weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    else:
        sums = weight.grad = torch.zeros_like(weight)

    def run(upstream: Tensor | None = None) -> tuple:
        if upstream is None:
            hidden.grad = None
            loss = loss_of(hidden, weight)
            loss.backward()
            return loss.detach(), hidden.grad
        run()
        before, hidden.grad = sums.clone(), None
        loss = loss_of(hidden, weight)
        loss.backward(upstream.to(loss.dtype))
        return loss.detach(), hidden.grad, sums - before

    return run


def products(inputs: Inputs, variant: str, backward: bool) -> Callable:
    """The matrix products that a step cannot do without, of the rows that need the whole vocabulary, and nothing else."""
    hidden, weight, target = (x.detach() for x in inputs)
    if DENSE_ROWS[variant] == "first":
        rows = hidden[torch.arange(len(target), device=target.device), plain.first_tokens(target)]
    else:
        rows = hidden[target != IGNORED]
    logits = rows.new_empty(rows.shape[0], weight.shape[0])

    def run(upstream: Tensor | None = None) -> tuple:
        torch.mm(rows, weight.T, out=logits)
        return (logits @ weight, logits.T @ rows) if backward else ()

    return run


def build(shape: str, dtype: str, variant: str, mode: str, providers: Sequence[str], device: str) -> Problem:
    """Inputs and providers; raises Skip where the device has too little memory."""
    backward, kind = mode == BACKWARD, harness.DTYPES[dtype]
    B, T, V, H, _ = SHAPES[shape]
    exact_in = torch.float32 if shape == "large_head" and kind.itemsize == 2 else torch.float64
    need, free = memory_needed(shape, kind, variant, providers, exact_in), memory.available(device)
    if free is not None and need > 0.8 * free:
        raise Skip(f"needs about {need / 1e9:.1f} GB with the check in {exact_in}, {free / 1e9:.1f} GB are free")
    inputs = draw(shape, kind, device)
    at_blip = draw("blip", kind, device) if any(name.endswith("-blip") for name in providers) else None
    chosen = _backend.select(OPERATION, torch.device(device).type, _backend.NO_CUDA)
    of_peers = losses(inputs.target, V, kind, variant, device)

    def traffic(grad_weight: str = "dense") -> floors.Traffic:
        return floors.linear_subset_cross_entropy(
            inputs.target.cpu(), V, H, kind.itemsize, rows=DENSE_ROWS[variant], gathers=variant in GATHERS,
            backward=backward, grad_weight=grad_weight,
        )  # fmt: skip

    def ours(name: str) -> Provider:
        backend = name.split("-")[0]
        why = harness.cannot_run(backend, device)
        scale = next((end for end in ("-blip", "-mle") if name.endswith(end)), "")
        kind = "scale" if scale else "reference" if backend == "reference" else "ours"
        if why:
            return Provider(None, kind, why)
        data = at_blip if scale == "-blip" else inputs
        options = VARIANTS["full" if scale == "-mle" else variant] | FORMS[name[len(backend) :].removesuffix(scale)]

        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            with fastcap.backend(backend):
                return F_cap.linear_subset_cross_entropy(hidden, weight, data.target, **options)

        grad_weight = options.get("grad_weight", "dense")
        run = accumulating(loss_of, data) if grad_weight == "accumulate" else stepping(loss_of, data, backward)
        own = None if grad_weight == "dense" or scale else traffic(grad_weight)
        return Provider(run, kind, auto=name == chosen, traffic=own)

    def provider(name: str) -> Provider:
        if name.split("-")[0] in ("cpp", "triton", "reference"):
            return ours(name)
        if name == "zeros_like":
            return Provider(lambda upstream=None: (torch.zeros_like(inputs.weight),), "floor")
        if name == "matmuls":
            return Provider(products(inputs, variant, backward), "floor")
        loss_of = of_peers[name]()
        kind = "scale" if name.startswith("mle") else "peer"
        if isinstance(loss_of, str):
            return Provider(None, kind, loss_of)
        return Provider(stepping(loss_of, inputs, backward), kind)

    return Problem(
        {name: provider(name) for name in providers},
        lambda upstream: plain.linear_exact(*inputs, variant, backward, upstream, exact_in),
        traffic(),
        torch.tensor(0.37, dtype=torch.float64, device=device) if backward else None,
        str(exact_in).removeprefix("torch."),
        products=True,
    )


def memory_needed(shape: str, dtype: torch.dtype, variant: str, providers: Sequence[str], exact_in: torch.dtype) -> int:
    """Bytes, about: the inputs, what stays beside them, and the exact answer while it is made or while it is compared."""
    B, T, V, H, _ = SHAPES[shape]
    head, logits = V * H * dtype.itemsize, B * T * V * 4
    beside = head + logits * ("matmuls" in providers) + 2 * head * any("accumulate" in name for name in providers)
    answer = 0 if variant == "subset" else 2 * V * H * exact_in.itemsize
    eager = 5 * logits if {"masked", "cross_entropy", "mle"} & set(providers) else 0
    in_float32 = 2 * V * H * 4 if dtype.itemsize == 2 and "chunked" in providers else 0
    return beside + max(answer + 6 * plain.GROUP, answer // 2 + 2 * head + max(eager, in_float32))


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_linear_subset_cross_entropy(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
