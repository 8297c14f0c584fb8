"""contrastive_reward against plain torch, which makes all similarities, and against others' contrastive losses.

Bytes and FLOPs: see floors.contrastive_reward. The floor that is measured is the product text @ image.T alone ("product"),
and with the backward four of them ("products"): the scores, the scores again, and the gradients of texts and images. Both
make the [P, Q] similarities, which ours do not.

"forward" is the reward, without gradients, which is what captioners are trained with; "forward_backward" the loss and the
gradients of both embeddings, normalised inside. "published" is the formula of the method's authors, which cancels where a
pair leads: timed, not checked. Inf-CL and open_clip compute CLIP's loss, with the pair in the denominator. Next to the
reward they are timed in the same seconds; in the variant "infonce" they are checked, and ours are the softplus of each
direction's loss, in two calls.

The embeddings are like a trained CLIP's: pairs at a cosine of about 0.3, others around 0, a scale of 100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastcap.benchmarks import floors, harness, peers, plain
from fastcap.benchmarks.harness import Case, Goal, Problem, Provider, Settings, Skip
from fastcap.benchmarks.plain import MODES
from torch import Tensor

import fastcap
from fastcap import functional as F_cap
from fastcap import memory
from fastcap.ops import _backend

OPERATION = "contrastive_reward"
FORWARD, BACKWARD = MODES
SCALE = 100.0


class Shape(NamedTuple):
    """P texts and Q images of D numbers; the first P / texts images have `texts` texts each, the others none."""

    P: int
    Q: int
    D: int
    texts: int = 1


SHAPES = {
    "tiny": Shape(9, 9, 7),  # for tests
    "tiny_shared": Shape(12, 10, 7, 3),
    "rl": Shape(768, 768, 512, 3),  # a step of WTF-RL: sample, ground truth and greedy; each image has two neighbours
    "b4096": Shape(4_096, 4_096, 512),
    "b8192": Shape(8_192, 8_192, 512),
    "b32768": Shape(32_768, 32_768, 512),
    "b65536": Shape(65_536, 65_536, 512),
}
VARIANTS = ("reward", "infonce")
RIVALS = ("inf_cl", "open_clip")


def goals(shape: str, variant: str, mode: str, device: str, dtype: str) -> tuple[Goal, ...]:
    """On a CPU bounds by the product alone, on a GPU by what others take; memory that does not grow with P Q."""
    ours, sizes = "cpp" if device == "cpu" else "triton", SHAPES[shape]
    if variant != "reward" or sizes.P < 768:
        return ()
    if shape == "rl":
        return (Goal(ours, 1.0, "eager"),)
    promised = [Goal(ours, 64e6, quantity="scratch")] if mode == FORWARD else []
    if device == "cpu":
        return (Goal(ours, 1.25 if mode == FORWARD else 4.5, "product"), *promised)
    promised += [Goal(ours, 1.0, rival) for rival in RIVALS]
    if dtype == "bf16" and mode == FORWARD:
        promised.append(Goal(ours, 0.6, quantity="products", at_least=True))
    return tuple(promised)


def cases(settings: Settings) -> list[Case]:
    """The comparisons of a profile on a device."""
    device = settings.device.split(":")[0]
    found = []
    for shape, dtypes, variants, modes, compiles in plan(settings):
        for dtype, variant, mode in ((d, v, m) for d in dtypes for v in variants for m in modes):
            sizes, given = SHAPES[shape], names(variant, mode, dtype, compiles, settings)
            found.append(Case(
                OPERATION, shape, f"{sizes.P:,} x {sizes.Q:,} x {sizes.D}", dtype, variant, mode, given,
                lambda key=(shape, dtype, variant, mode), given=given: build(*key, settings, given),
                goals=goals(shape, variant, mode, device, dtype),
            ))  # fmt: skip
    return found


def plan(settings: Settings) -> list[tuple[str, tuple, tuple, tuple, bool]]:
    """(shape, dtypes, variants, modes, whether to compile) of each shape to run, what matters most first."""
    gpu = settings.device.startswith("cuda")
    dtypes = ("bf16", "fp32") if gpu else ("fp32",)
    if settings.shapes:
        return [(name, dtypes, of(name), MODES, False) for name in SHAPES if name in settings.shapes]
    if settings.profile == "tiny":
        return [(name, ("fp32",), of(name), MODES, False) for name in ("tiny", "tiny_shared")]
    if settings.profile == "quick":
        return [("rl", dtypes, ("reward",), MODES, False)]
    main = [("b8192", dtypes, ("reward",), MODES, True), ("rl", dtypes, ("reward",), MODES, True)]
    if not gpu:
        return main
    others = [(name, dtypes, ("reward",), MODES, False) for name in ("b4096", "b32768", "b65536")]
    return [*main, *others, ("b8192", ("bf16",), ("infonce",), MODES, False)]


def of(shape: str) -> tuple[str, ...]:
    """The variants of a shape: CLIP's loss has one text an image."""
    return VARIANTS if SHAPES[shape].texts == 1 else VARIANTS[:1]


def names(variant: str, mode: str, dtype: str, compiles: bool, settings: Settings) -> tuple[str, ...]:
    """The providers, ours first. The reference makes all similarities as eager does: in the whole run only."""
    ours = ["cpp", "triton", *(["reference"] if settings.profile in ("tiny", "all") else [])]
    if dtype == "fp32" and settings.device.startswith("cuda"):
        ours.insert(2, "triton-high")  # TF32 products, which Inf-CL's are
    floor = ["product"] if mode == FORWARD else ["products", "product"]
    peers_of = ["eager", *(["compile"] if compiles else [])]
    return (*ours, *floor, *peers_of, *(["published"] if variant == "reward" else []), *RIVALS)


def embeddings(sizes: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(text, image, positive or None): pairs at a cosine of about 0.3, lengths that are not 1."""
    generator = torch.Generator(device).manual_seed(0)
    P, Q, D, texts = sizes
    image, noise = (torch.randn(n, D, generator=generator, device=device) for n in (Q, P))
    positive = torch.arange(P, device=device) // texts
    text = 0.3 * image[positive] + 0.95 * noise
    return text.to(dtype), image.to(dtype), positive if texts > 1 else None


def build(shape: str, dtype: str, variant: str, mode: str, settings: Settings, chosen: tuple[str, ...]) -> Problem:
    """Inputs and providers; raises Skip where a CPU has too little memory for the similarities, which others make."""
    device, kind, sizes = settings.device, harness.DTYPES[dtype], SHAPES[shape]
    need, free = 4 * 4 * sizes.P * sizes.Q, memory.available(device)
    if free is not None and need > 0.8 * free and not device.startswith("cuda"):  # a GPU refuses those who need too much
        raise Skip(f"needs {need / 1e9:.0f} GB for plain torch, {free / 1e9:.0f} GB are free")
    backward = mode == BACKWARD
    text, image, positive = embeddings(sizes, kind, device)
    inputs = text, image

    def step(rewards_or_loss: Callable[[Tensor, Tensor], Tensor]):
        """Runs what gives the rewards [P], or with the backward and for CLIP's loss the mean."""

        def run(upstream: Tensor | None = None) -> tuple:
            if not backward:
                with torch.no_grad():
                    return (rewards_or_loss(*inputs),)
            loss = rewards_or_loss(*inputs)
            return (loss.detach(), *torch.autograd.grad(loss, inputs, None if upstream is None else upstream.to(loss.dtype)))

        for x in inputs:
            x.requires_grad_(backward)
        return run

    def ours(backend: str, precision: str = "highest"):
        given = {"positive": positive, "logit_scale": SCALE, "precision": precision}

        def call(text, image):
            with fastcap.backend(backend):
                if variant == "infonce":
                    ways = ("text_to_image", "image_to_text")
                    each = [
                        F_cap.decoupled_contrastive_loss(text, image, direction=way, reduction="none", **given)
                        for way in ways
                    ]
                    return sum(F.softplus(loss).mean() for loss in each) / 2
                function = F_cap.decoupled_contrastive_loss if backward else F_cap.contrastive_reward
                return function(text, image, **given)

        return step(call)

    def eager(text, image, of=plain.contrastive):
        if variant == "infonce":
            return plain.info_nce(text, image, SCALE)
        rewards = of(text, image, positive, SCALE)
        return -SCALE * rewards.mean() if backward else rewards

    def rival(peer: peers.Peer):
        return step(lambda text, image: peer.call(F.normalize(text, dim=1), F.normalize(image, dim=1), SCALE))

    def product(upstream=None):
        return (text.detach() @ image.detach().T,)

    def products(upstream=None):
        s, t, v = product()[0], text.detach(), image.detach()
        return s, t @ v.T, s @ v, s.T @ t

    def provider(name: str) -> Provider:
        if name in ("product", "products"):
            is_floor = (name == "products") == backward
            return Provider(products if name == "products" else product, "floor" if is_floor else "scale")
        if name in RIVALS:
            peer = peers.PEERS[name](device)
            kind_of = "peer" if variant == "infonce" else "scale"
            return Provider(rival(peer) if peer.call else None, kind_of, peer.reason)
        if name == "eager":
            return Provider(step(eager))
        if name == "compile":
            return Provider(step(peers.compiled(eager).call))
        if name == "published":
            return Provider(step(lambda text, image: eager(text, image, plain.contrastive_published)), "scale")
        backend, _, precision = name.partition("-")
        why = harness.cannot_run(backend, device)
        kind_of = "reference" if name == "reference" else "scale" if precision else "ours"
        return Provider(None if why else ours(backend, precision or "highest"), kind_of, why, auto=name == selected)

    selected = _backend.select(OPERATION, device.split(":")[0], _backend.NO_CUDA)
    upstream = torch.tensor(0.37, dtype=torch.float64, device=device) if backward else None
    traffic = floors.contrastive_reward(sizes.P, sizes.Q, sizes.D, kind.itemsize, backward=backward)

    def exact(upstream: Tensor | None) -> tuple:
        return plain.contrastive_exact(*inputs, positive, SCALE, variant, upstream)

    return Problem({name: provider(name) for name in chosen}, exact, traffic, upstream, products=True)


def pytest_generate_tests(metafunc) -> None:
    harness.parametrize(metafunc, cases)


def bench_contrastive_reward(benchmark, case: Case, provider: str) -> None:
    harness.replay(benchmark, case, provider)
