"""contrastive_reward over a group of processes equals one process that has everything, and none ever has that.

contrastive_worker.py runs once for 2 processes and once for 4, over gloo; the tests below judge what each process saw.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastcap
from fastcap.functional import contrastive_reward, decoupled_contrastive_loss
from fastcap.testing import assert_close_to_float64

if not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")):
    pytest.skip("needs torch.distributed with gloo, and fork", allow_module_level=True)

WORKER = Path(__file__).with_name("contrastive_worker.py")
_spec = importlib.util.spec_from_file_location("contrastive_worker", WORKER)
worker = sys.modules["contrastive_worker"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

D, WORLDS = worker.D, (2, 4)
EVERY = [pytest.param(world, case, id=f"{world}-{case.name}") for world in WORLDS for case in worker.cases(world)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """seen(world)[rank]: what the processes of that world saw; they run once."""
    folder, found = tmp_path_factory.mktemp("processes"), {}

    def of(world: int) -> list[dict]:
        if world not in found:
            found[world] = []  # a failure fails once, not for every test again
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTCAP_BACKEND": ""}
            command = [sys.executable, str(WORKER), str(world), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
            assert done.returncode == 0, done.stderr[-6000:]
            found[world] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        if not found[world]:
            pytest.fail(f"the {world} processes failed before")
        return found[world]

    return of


def joined(parts: list[dict]) -> dict:
    """What all processes have together: rows one after another, and the sum of the shares of the scale's gradient."""
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("reward", "text", "image")}
    return {**whole, "scale": sum(part["scale"] for part in parts)}


@pytest.mark.parametrize("world, case", EVERY)
def test_equals_one_process(seen, one_thread, world, case):
    found = joined([of["cases"][case.name] for of in seen(world)])
    plainly = case._replace(backend="reference")
    exact, plain = worker.run(plainly, None, dtype=torch.float64), worker.run(plainly, None)
    unit = 1.0  # the size of a cosine, or of what stands for it
    if not case.options.get("normalize", True) and found["reward"].numel():
        unit = math.prod(x.double().norm(dim=1).max().item() for x in worker.inputs(case)[:2])
    # Gradients weigh what cancels in them by exponentials of scores, which are off by the rounding of the scores.
    off = max(1.0, unit * case.scale)
    of_rows, of_scale = off * unit * case.scale, off * 2 * unit * worker.inputs(case).weight.abs().sum().item()
    sizes = {"reward": unit, "text": of_rows, "image": of_rows, "scale": of_scale}
    for name, value in found.items():
        if name == "reward" or not case.nan:
            assert value.dtype == plain[name].dtype
            assert_close_to_float64(value, exact[name], plain[name], name, size=sizes[name])
    if case.nan:  # reached some, and not all
        assert 0 < found["reward"].isnan().sum() < len(found["reward"])


@pytest.mark.parametrize("world", WORLDS)
def test_the_cases_have_siblings_on_other_processes_and_images_elsewhere(world):
    """Guards this file: without them most cases would not say much."""
    whole = worker.inputs(worker.cases(world)[0])
    of_text, of_image = (
        torch.arange(world).repeat_interleave(torch.tensor(sizes)) for sizes in (worker.TEXTS[world], worker.IMAGES[world])
    )
    apart = [
        len(set(of_text[whole.positive == q].tolist())) > 1 and int((whole.positive == q).sum()) > 2
        for q in range(len(whole.image))
    ]
    assert sum(apart) >= 2
    assert 0 < (of_image[whole.positive] == of_text).sum() < len(of_text)


@pytest.mark.parametrize("world", WORLDS)
def test_no_process_receives_all_images_or_any_text(seen, world):
    P, Q = worker.TEXTS[world], worker.IMAGES[world]
    for rank, of in enumerate(seen(world)):
        order = [(rank - step) % world for step in range(world)]  # whose images are here, one after another
        shards = [((Q[owner], D), torch.bfloat16) for owner in order]
        sums = [((Q[owner], D), torch.float32) for owner in order]
        forward, backward = (of["traffic"][f"logsumexp-{way}"] for way in ("forward", "backward"))
        there = [shape for shape in shards[1:] if shape[0][0]]
        assert forward["received"] == there  # each once, and in the forward nothing but them
        assert forward["sent"] == [shape for shape in shards[:-1] if shape[0][0]]
        home = [shape for shape in [*sums[1:], sums[0]] if shape[0][0]]
        assert sorted(map(str, backward["received"])) == sorted(map(str, there + home))
        record, *vectors = forward["vectors"]
        assert record[0] % world == 0 and record[0] // world < 100  # the first is what each process tells
        for shape in (*vectors, *backward["vectors"]):
            assert len(shape) == 1 and shape[0] <= sum(P) + sum(Q)


@pytest.mark.parametrize("world", WORLDS)
def test_a_mean_of_paired_texts_moves_no_image(seen, world):
    for of in seen(world):
        forward, backward = (of["traffic"][f"mean-paired-{way}"] for way in ("forward", "backward"))
        assert not forward["received"] and not backward["received"]
        Q = sum(worker.IMAGES[world])
        assert set(forward["vectors"][1:]) == {(Q,), (2, D), (1, Q)}


# Mistakes: (what the process that makes it is told, what the others are told)

TOLD = {
    "width": "text must have one width on all processes, got '6 on rank 0, .*7 on rank {last}'; embed with one model",
    "dtype": "text must have one dtype on all processes, got 'float32 on rank 0, .*float64 on rank {last}'; convert it",
    "positive-below": r"positive must lie in \[0, {Q}\), the images of all processes, got '-1 on rank {last}'; count",
    "positive-above": r"positive must lie in \[0, {Q}\), the images of all processes, got '{Q} on rank {last}'; count",
    "scale": "logit_scale must be the same on all processes, got '100.0 on rank 0, .*50.0 on rank {last}'; broadcast it",
    "options": "group must be of processes that call with the same options, got .*; pass the same on every process",
    "grad-mode": "group must be of processes in one grad mode, got 'on on rank 0, .*off on rank {last}'; use torch.no_grad",
    "group-name": "group must be a torch.distributed.ProcessGroup or None, got 'world'; pass torch.distributed.group.WORLD",
    "group-number": "group must be a torch.distributed.ProcessGroup or None, got 0; pass",
    "outside": "group must be one that this process belongs to, got 'none of rank ",
    "double-backward": "the gradient must not be differentiated again, got a double backward; call it without a group",
}
TOLD_ONE = {
    "image-width": "image must have the width of text, 6, got 7",
    "not-a-tensor": "text must be a torch.Tensor, got 'list'",
    "too-few-images": "positive must be given where there are more texts than images, 4 and 3",
    "positive-shape": r"positive must have shape \[P\] = \[3\], got \[1\]",
    "scale-infinite": "logit_scale must be a finite number above 0",
    "baseline": "baseline must be one of 'logsumexp', 'max', 'mean', 'none', got 'median'",
    "backend": "backend must be able to run here, got 'triton'",
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [*TOLD, *TOLD_ONE])
def test_a_mistake_on_one_process_is_an_error_on_all(seen, world, name):
    if name == "backend" and fastcap.backends()["triton"]:
        pytest.skip("triton can run here")
    last = world - 1
    for rank, of in enumerate(seen(world)):
        told = of["mistakes"][name]
        pattern = (TOLD.get(name) or TOLD_ONE[name]).format(last=last, Q=3 * world)
        if name in TOLD_ONE and rank != last:
            assert "group must be of processes that all bring valid arguments, got" in told, told
            assert f"on rank {last}: fastcap.contrastive_reward: " in told and "correct them there" in told, told
        assert re.match(f"(FastcapError|BackendUnavailable|RuntimeError): fastcap.contrastive_reward: .*{pattern}", told), (
            told
        )


def test_every_mistake_is_judged(seen):
    assert set(seen(2)[0]["mistakes"]) == set(TOLD) | set(TOLD_ONE)


def test_a_group_needs_torch_distributed():
    assert not dist.is_initialized()
    with pytest.raises(
        fastcap.FastcapError, match="group must be None where torch.distributed is not initialised, got 'all'"
    ):
        contrastive_reward(torch.eye(2), torch.eye(2), group="all")


# Single facts


def single(world):
    """The case of most facts: all of it, and by definition."""
    return worker.inputs(worker.Case("single", {}, P=worker.TEXTS[world], Q=worker.IMAGES[world]))


@pytest.mark.parametrize("world", WORLDS)
def test_without_gradients_nothing_is_kept(seen, world):
    whole = single(world)
    exact = contrastive_reward(whole.text, whole.image, positive=whole.positive)
    parts = [of["single"]["no-grad"] for of in seen(world)]
    assert not any(requires_grad for requires_grad, _ in parts)
    torch.testing.assert_close(torch.cat([reward for _, reward in parts]), exact)


@pytest.mark.parametrize("world", WORLDS)
def test_one_process_may_learn_alone(seen, world):
    whole = single(world)
    text, image = (x.clone().requires_grad_() for x in whole[:2])
    reward = contrastive_reward(text, image, positive=whole.positive, logit_scale=9.0)
    (reward * whole.weight).sum().backward()
    exact = {"text": (world - 1, text.grad, whole.P), "image": (0, image.grad, whole.Q)}
    for rank, of in enumerate(seen(world)):
        for name, (learner, gradient, sizes) in exact.items():
            found = of["single"][f"one-learns-{name}"]
            assert set(found) == ({name} if rank == learner else set())
            if found:
                torch.testing.assert_close(found[name], worker.shard(gradient, sizes, rank))


@pytest.mark.parametrize("world", WORLDS)
def test_a_group_of_one_is_the_plain_path(seen, world):
    whole = single(world)
    exact = contrastive_reward(whole.text, whole.image, positive=whole.positive)
    for of in seen(world):
        torch.testing.assert_close(of["single"]["alone"], exact)


@pytest.mark.parametrize("world", WORLDS)
def test_groups_of_some_processes(seen, world):
    """Ranks count within the group: of 4 processes, {0, 2} and {1, 3} at the same time."""
    exact = worker.run(worker.Case("pairs", {}, backend="reference", P=(3, 4), Q=(4, 2)), None)
    parts = [of["single"]["pairs"] for of in seen(world)]
    for first in range(world // 2):
        found = joined([parts[first], parts[first + world // 2]])
        for name, value in exact.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("world", WORLDS)
def test_the_loss_is_of_the_own_texts(seen, world):
    whole = single(world)
    exact = decoupled_contrastive_loss(whole.text, whole.image, positive=whole.positive, reduction="none")
    for rank, of in enumerate(seen(world)):
        own = worker.shard(exact, whole.P, rank)
        found = of["single"]["loss"]
        torch.testing.assert_close(found["none"], own)
        torch.testing.assert_close(found["sum"], own.sum())
        torch.testing.assert_close(found["mean"], own.sum() / max(1, len(own)))


@pytest.mark.parametrize("world", WORLDS)
def test_torch_compile_leaves_it_alone(seen, world):
    for of in seen(world):
        torch.testing.assert_close(of["single"]["compiled"], of["single"]["no-grad"][1])


@pytest.mark.parametrize("world", WORLDS)
def test_data_parallel_gradients_are_those_of_the_mean_of_the_losses(seen, world):
    """Of the model's weights and of the scale alike, and so, with shards of one size, of the loss of the whole batch."""
    whole = worker.inputs(worker.Case("ddp", {}, paired=True, P=(3,) * world, Q=(4,) * world))
    model = worker.Towers()
    text, image, scale = model(whole.text, whole.image)
    decoupled_contrastive_loss(text, image, positive=whole.positive, logit_scale=scale).backward()
    for of in seen(world):
        for name, x in model.named_parameters():
            torch.testing.assert_close(of["single"]["data-parallel"][name], x.grad)


@pytest.mark.parametrize("world", WORLDS)
def test_errors_leave_no_message_behind(seen, world):
    name = worker.cases(world)[0].name
    for of in seen(world):
        for found, before in zip(of["after"].values(), of["cases"][name].values(), strict=True):
            assert torch.equal(found, before)
