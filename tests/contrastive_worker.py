"""What one of several processes does in test_contrastive_distributed.py: every case on its shards; what it saw, to a file.

Run as `contrastive_worker.py WORLD FOLDER`: it starts WORLD processes, which meet in a file in FOLDER and leave
WORLD-RANK.pt there. They fork from one that has imported torch, so that the import is paid once.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor

import fastcap
from fastcap import functional as F

D = 6
TEXTS = {2: (5, 8), 4: (5, 0, 9, 3)}  # by rank: shards differ, one has no text, another no image
IMAGES = {2: (6, 4), 4: (4, 6, 0, 3)}


class Case(NamedTuple):
    """One call on shards, and what it is made of."""

    name: str
    options: dict
    backend: str = "cpp"
    dtype: torch.dtype = torch.float64
    paired: bool = False  # the default for `positive`: every text beside its image
    P: tuple[int, ...] = ()  # by rank
    Q: tuple[int, ...] = ()
    scale: float = 7.0
    ties: bool = False
    nan: str = ""  # "text" or "image": row 1 of it is NaN


class Inputs(NamedTuple):
    """Of all processes together."""

    text: Tensor
    image: Tensor
    positive: Tensor
    weight: Tensor  # [P]: the upstream gradient
    P: tuple[int, ...]
    Q: tuple[int, ...]


def options_of_every_kind() -> list[dict]:
    both = itertools.product(("logsumexp", "max", "mean", "none"), ("both", "text_to_image", "image_to_text"))
    return [
        {"baseline": baseline, "direction": direction, "exclude": exclude}
        for (baseline, direction), exclude in itertools.product(both, ("self", "group"))
    ]


def cases(world: int) -> list[Case]:
    P, Q, none = TEXTS[world], IMAGES[world], (0,) * (world - 1)
    found = []
    for backend in filter(fastcap.backends().get, ("reference", "cpp")):
        for options in options_of_every_kind():
            found.append(Case("-".join((backend, *options.values())), options, backend, P=P, Q=Q))
        for baseline in ("logsumexp", "max", "mean") if world == 2 or backend == "cpp" else ():
            base, name = {"baseline": baseline}, f"{backend}-{baseline}"
            found += [
                Case(f"{name}-paired", base, backend, paired=True, P=tuple(min(p) for p in zip(P, Q, strict=True)), Q=Q),
                Case(f"{name}-float32", base, backend, torch.float32, P=P, Q=Q),
                Case(f"{name}-bfloat16", base, backend, torch.bfloat16, P=P, Q=Q),
                Case(f"{name}-raw", {**base, "normalize": False}, backend, P=P, Q=Q, scale=0.7),
                Case(f"{name}-clamped", {**base, "clamp": (-3.0, 1.5)}, backend, P=P, Q=Q),
                Case(f"{name}-ties", {**base, "normalize": False}, backend, P=P, Q=Q, ties=True, scale=0.5),
                Case(f"{name}-scale-100", base, backend, torch.float32, P=P, Q=Q, scale=100.0),
                Case(f"{name}-all-on-the-last", base, backend, P=(*none, 7), Q=(*none, 5)),
                Case(f"{name}-one-pair", base, backend, paired=True, P=(1, *none), Q=(1, *none)),
                Case(f"{name}-nothing", base, backend, P=(0,) * world, Q=(0,) * world),
                Case(f"{name}-no-texts", base, backend, P=(0,) * world, Q=Q),
            ]
            over_images, over_texts = ({**base, "direction": way} for way in ("text_to_image", "image_to_text"))
            found += [
                Case(f"{name}-nan-text", over_images, backend, P=P, Q=Q, nan="text"),
                Case(f"{name}-nan-image", over_texts, backend, P=P, Q=Q, nan="image"),
                Case(f"{name}-nan-group", {**over_texts, "exclude": "group"}, backend, P=P, Q=Q, nan="text"),
            ]
        found.append(Case(f"{backend}-none-paired", {"baseline": "none"}, backend, paired=True, P=Q, Q=Q))
    return found


def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(len(case.name) + sum(case.P))
    P, Q = sum(case.P), sum(case.Q)
    text, image = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (P, Q))
    if case.ties:  # on different processes too; scores of whole numbers are exact
        text, image = (2 * text[torch.arange(P) % 3]).round(), (2 * image[torch.arange(Q) % 2]).round()
    if case.paired:
        offsets = [sum(case.Q[:rank]) for rank in range(len(case.Q))]
        positive = torch.cat([torch.arange(n) + o for n, o in zip(case.P, offsets, strict=True)])
    else:  # a few images have most of the texts, and some have none
        positive = torch.randint(0, max(1, Q), (P,), generator=generator).clamp_max(max(0, Q - 4))
    weight = torch.randn(P, generator=generator, dtype=torch.float64)
    if case.nan:
        (text if case.nan == "text" else image)[1] = torch.nan
        positive[:3] = torch.tensor([0, 1, 1])
    return Inputs(text.to(case.dtype), image.to(case.dtype), positive, weight, case.P, case.Q)


def shard(x: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return x[sum(sizes[:rank]) : sum(sizes[: rank + 1])].clone()


def run(case: Case, rank: int | None, group=None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The reward and the gradients of this process' shard; of everything in one process where `rank` is None.

    dtype: what the inputs, of case.dtype, are converted to.
    """
    whole = inputs(case)
    text, image, positive, weight = whole[:4]
    text, image = text.to(dtype or case.dtype), image.to(dtype or case.dtype)
    if rank is not None:
        text, positive, weight = (shard(x, whole.P, rank) for x in (text, positive, weight))
        image = shard(image, whole.Q, rank).T.contiguous().T  # any strides: what is sent must be contiguous
    sums = torch.float64 if text.dtype == torch.float64 else torch.float32
    scale = torch.tensor(case.scale, dtype=sums).requires_grad_()
    text.requires_grad_()
    image.requires_grad_()
    given = None if case.paired and rank is not None else positive
    with fastcap.backend(case.backend):
        reward = F.contrastive_reward(text, image, positive=given, logit_scale=scale, group=group, **case.options)
    (reward * scale * weight.to(sums)).sum().backward()  # of the log-ratios: those of rewards do not depend on some scales
    return {"reward": reward.detach(), "text": text.grad, "image": image.grad, "scale": scale.grad}


# What is sent and received ---------------------------------------------------------------------------------------------


class Traffic:
    """Shapes of what torch.distributed was given while it is entered: all that a process can get from others."""

    def __enter__(self):
        self.sent, self.received, self.vectors = [], [], []
        self._kept = {name: getattr(dist, name) for name in ("batch_isend_irecv", "all_reduce")}

        def batch_isend_irecv(operations):
            for operation in operations:
                of = self.sent if operation.op is dist.isend else self.received
                of.append((tuple(operation.tensor.shape), operation.tensor.dtype))
            return self._kept["batch_isend_irecv"](operations)

        def all_reduce(x, *arguments, **options):
            self.vectors.append(tuple(x.shape))
            return self._kept["all_reduce"](x, *arguments, **options)

        def forbidden(*_, **__):
            raise AssertionError("a collective that the test does not record")

        replaced = {"batch_isend_irecv": batch_isend_irecv, "all_reduce": all_reduce}
        for name in ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "broadcast", "recv"):
            self._kept[name], replaced[name] = getattr(dist, name), forbidden
        for name, function in replaced.items():
            setattr(dist, name, function)
        return self

    def __exit__(self, *_):
        for name, function in self._kept.items():
            setattr(dist, name, function)

    def seen(self) -> dict:
        return {"sent": self.sent, "received": self.received, "vectors": self.vectors}


def traffic(rank: int, world: int, group) -> dict[str, dict]:
    """Of one call with unequal shards, in half precision, by kind."""
    found = {}
    P, Q = TEXTS[world], IMAGES[world]
    for name, case in {
        "logsumexp": Case("traffic", {}, dtype=torch.bfloat16, P=P, Q=Q),
        "mean-paired": Case("traffic", {"baseline": "mean"}, paired=True, P=tuple(map(min, P, Q)), Q=Q),
    }.items():
        whole = inputs(case)
        text, positive, image = shard(whole.text, P if not case.paired else case.P, rank), None, shard(whole.image, Q, rank)
        if not case.paired:
            positive = shard(whole.positive, P, rank)
        with Traffic() as quiet, torch.no_grad():
            F.contrastive_reward(text, image, positive=positive, group=group, **case.options)
        found[f"{name}-forward"] = quiet.seen()
        text.requires_grad_()
        image.requires_grad_()
        reward = F.contrastive_reward(text, image, positive=positive, group=group, **case.options)
        with Traffic() as loud:
            reward.sum().backward()
        found[f"{name}-backward"] = loud.seen()
    return found


# Mistakes on one process, and other single facts -----------------------------------------------------------------------


def message_of(function) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mistakes(rank: int, group) -> dict[str, str]:
    """What this process is told when the last one but none else makes a mistake; or each its own."""
    last = rank == dist.get_world_size(group) - 1
    plain = {"text": torch.randn(3, D), "image": torch.randn(3, D)}
    wrong = {
        "width": {"text": torch.randn(3, D + 1), "image": torch.randn(3, D + 1)},
        "image-width": {"image": torch.randn(3, D + 1)},
        "dtype": {"text": torch.randn(3, D).double(), "image": torch.randn(3, D).double()},
        "not-a-tensor": {"text": [1.0]},
        "too-few-images": {"text": torch.randn(4, D)},
        "positive-below": {"positive": torch.tensor([0, -1, 2])},
        "positive-above": {"positive": torch.tensor([0, 1, 3 * dist.get_world_size(group)])},
        "positive-shape": {"positive": torch.tensor([0])},
        "scale": {"logit_scale": 50.0},
        "scale-infinite": {"logit_scale": float("inf")},
        "options": {"exclude": "group"},
        "baseline": {"baseline": "median"},
        "backend": {},
    }
    found = {}
    for name, change in wrong.items():
        arguments = {**plain, "group": group, **(change if last else {})}
        named = fastcap.backend("triton") if name == "backend" and last else contextlib.nullcontext()
        try:
            with named:
                found[name] = message_of(lambda arguments=arguments: F.contrastive_reward(**arguments))
        except fastcap.BackendUnavailable as error:  # the context refuses it before the call: set as an environment would
            assert name == "backend" and "triton" in str(error)
            os.environ["FASTCAP_BACKEND"] = "triton"
            found[name] = message_of(lambda arguments=arguments: F.contrastive_reward(**arguments))
            del os.environ["FASTCAP_BACKEND"]

    def in_mixed_modes():
        text = plain["text"].clone().requires_grad_()
        with torch.no_grad() if last else contextlib.nullcontext():
            F.contrastive_reward(text, plain["image"], group=group)

    def twice():
        text, image = (x.double().requires_grad_() for x in plain.values())
        reward = F.contrastive_reward(text, image, logit_scale=2.0, group=group)
        (gradient,) = torch.autograd.grad(reward.square().sum(), text, create_graph=True)
        gradient.sum().backward()

    found["grad-mode"], found["double-backward"] = message_of(in_mixed_modes), message_of(twice)
    for name, other in (("group-name", "world"), ("group-number", 0), ("outside", dist.GroupMember.NON_GROUP_MEMBER)):
        found[name] = message_of(lambda other=other: F.contrastive_reward(**plain, group=other))
    return found


def single_facts(rank: int, world: int, group) -> dict:
    """What does not fit a case."""
    found, case = {}, Case("single", {}, P=TEXTS[world], Q=IMAGES[world])
    whole = inputs(case)
    text, positive = (shard(x, whole.P, rank) for x in (whole.text, whole.positive))
    image = shard(whole.image, whole.Q, rank)

    with torch.no_grad():
        quiet = F.contrastive_reward(text.clone().requires_grad_(), image, positive=positive, group=group)
    found["no-grad"] = quiet.requires_grad, quiet
    # Only one process has anything to learn, of its texts or of its images: the others run the backward with it.
    for name, learner in (("text", world - 1), ("image", 0)):
        given = {"text": text.clone(), "image": image.clone()}
        given[name].requires_grad_(rank == learner)
        reward = F.contrastive_reward(**given, positive=positive, logit_scale=9.0, group=group)
        (reward * shard(whole.weight, whole.P, rank)).sum().backward()
        found[f"one-learns-{name}"] = {key: x.grad for key, x in given.items() if x.grad is not None}

    found["alone"] = F.contrastive_reward(whole.text, whole.image, positive=whole.positive, group=ALONE)
    pair = PAIRS[rank % (world // 2)]
    small = Case("pairs", {}, P=(3, 4), Q=(4, 2))
    found["pairs"] = run(small, dist.get_rank(pair), pair)

    loss = {}
    for reduction in ("mean", "sum", "none"):
        loss[reduction] = F.decoupled_contrastive_loss(text, image, positive=positive, reduction=reduction, group=group)
    found["loss"] = loss
    compiled = torch.compile(F.contrastive_reward, backend="eager")
    found["compiled"] = compiled(text, image, positive=positive, group=group)
    found["data-parallel"] = data_parallel(rank, world, group)
    return found


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        weights = (torch.randn(D, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        self.text, self.image = (torch.nn.Parameter(weight) for weight in weights)
        self.log_scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return text @ self.text, image @ self.image, self.log_scale.exp()


def data_parallel(rank: int, world: int, group) -> dict[str, Tensor]:
    """The gradients that DistributedDataParallel leaves, of equal shards and the mean of each."""
    case = Case("ddp", {}, paired=True, P=(3,) * world, Q=(4,) * world)
    whole = inputs(case)
    model = torch.nn.parallel.DistributedDataParallel(Towers())
    text, image, scale = model(shard(whole.text, case.P, rank), shard(whole.image, case.Q, rank))
    F.decoupled_contrastive_loss(text, image, logit_scale=scale, group=group).backward()
    return {name: x.grad for name, x in model.module.named_parameters()}


ALONE = None
PAIRS: list = []


def work(rank: int, world: int, folder: Path) -> None:
    global ALONE
    torch.set_num_threads(1)
    if sys.platform == "linux":  # the name of the machine need not lead to itself
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = dist.FileStore(str(folder / f"meeting-{world}"), world)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=wait)
    group = dist.group.WORLD
    alone = [dist.new_group([r]) for r in range(world)]
    ALONE = alone[rank]
    PAIRS[:] = [dist.new_group([r, r + world // 2]) for r in range(world // 2)]
    seen = {
        "cases": {case.name: run(case, rank, group) for case in cases(world)},
        "traffic": traffic(rank, world, group),
        "mistakes": mistakes(rank, group),
        "single": single_facts(rank, world, group),
        "after": run(cases(world)[0], rank, group),  # nothing above left a message behind
    }
    torch.save(seen, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def main(world: int, folder: Path) -> int:
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(rank, world, folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
