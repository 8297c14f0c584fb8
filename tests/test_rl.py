"""Training by reinforcement: the loss and its gradient, what a step draws and rewards, guards, resumption, both backends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("PIL")

import fastcap
from fastcap import data, models
from fastcap.errors import FastcapError
from fastcap.testing import Allocations
from fastcap.train import TrainConfig, Trainer, rl, rl_guards, rl_images, rl_policy, rl_rewards, train

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"width": 16, "attention_width": 8, "batch_size": 16, "warmup": 2, "validate_every": 0}
LONGEST = 8
RECIPE = Path(__file__).resolve().parent.parent / "docs" / "recipes" / "distinctive.md"


class StandIn:
    """A CLIP of random numbers: an image is a projection of its coarse pixels, a text the sum of its words' vectors."""

    width, image_size, logit_scale, truncated = 12, 16, 20.0, 0

    def __init__(self, seed=0, words=()):
        self.seed, self.words, self.calls = seed, words, []
        self.fingerprint = f"stand-in {seed}"
        self.projection = torch.randn(27, self.width, generator=torch.Generator().manual_seed(seed))

    def images(self, images):
        self.calls.append(len(images))
        coarse = F.adaptive_avg_pool2d(images, 3).flatten(1)
        return (coarse - coarse.mean(0)) @ self.projection if len(images) > 1 else coarse @ self.projection

    def texts(self, captions):
        assert captions and all(isinstance(caption, str) for caption in captions)
        return torch.stack([sum(map(self._word, [*caption.split(), "."])) for caption in captions])

    def _word(self, word):
        number = int.from_bytes(hashlib.sha256(f"{self.seed} {word}".encode()).digest()[:4], "big")
        return torch.randn(self.width, generator=torch.Generator().manual_seed(number))


class LikesAWord(StandIn):
    """Every image is the same direction, which a text has the more of the more often it says a word."""

    def __init__(self, word):
        super().__init__()
        self.word = word

    def images(self, images):
        return torch.eye(self.width)[:1].expand(len(images), -1)

    def texts(self, captions):
        direction = torch.eye(self.width)
        return torch.stack([direction[0] * caption.split().count(self.word) + direction[1] for caption in captions])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    data.write_scenes(folder, num_images=60, seed=0)
    return str(folder)


@pytest.fixture(scope="module")
def captioner(scenes, tmp_path_factory):
    """Runs by model, each trained for a few steps: enough to say words, not to know what it sees."""
    made = {}

    def find(model="show-attend-tell", steps=40):
        if model not in made:
            out = str(tmp_path_factory.mktemp(model) / "run")
            sizes = {"show-attend-tell": ("width", "attention_width"), "show-and-tell": ("width",), "blip": ("width",)}[
                model
            ]
            options = {name: SMALL[name] for name in (*sizes, "batch_size", "warmup", "validate_every")}
            options.update({"pretrained": "none"} if model == "blip" else {})
            config = TrainConfig(data=scenes, out=out, model=model, max_length=LONGEST, steps=steps, lr=5e-3, **options)
            train(config, progress=False)
            made[model] = out
        return made[model]

    return find


@pytest.fixture
def config(scenes, captioner, tmp_path):
    return _config(scenes, captioner(), tmp_path / "run")


def _config(scenes, base, out, **changes):
    given = {"batch_size": 12, "steps": 6, "lr": 1e-3, "warmup": 0, "validate_every": 0, "max_length": LONGEST}
    return TrainConfig(data=scenes, out=str(out), objective="wtf-rl", init_from=base, **{**given, **changes})


def _with(config, **changes):
    return dataclasses.replace(config, **changes)


def _run(config, embedder=None, **options):
    return train(config, embedder=embedder or StandIn(), progress=False, **options)


def _lines(config, name="log.jsonl"):
    with open(f"{config.out}/{name}", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# The loss ---------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_reinforce_by_hand():
    """d/dz of -sum_n r_n / N mean_t log p: r_n (softmax(z) - onehot) / (N T_n) at each of the T_n words of a caption."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(5, 7).double()
    target = torch.tensor([[1, 2, 3, 6], [4, 6, -100, -100], [6, -100, -100, -100]])
    lengths, reward = torch.tensor([4, 2, 1]), torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    loss = rl.reinforce(hidden, head, target, rl.caption_weights(reward, lengths), 1 << 20)
    loss.backward()
    dlogits, wanted = torch.zeros(3, 4, 7, dtype=torch.float64), 0.0
    with torch.no_grad():
        p = torch.softmax(head(hidden), 2)
        for n in range(3):
            for t in range(int(lengths[n])):
                y, share = target[n, t], reward[n] / (3 * lengths[n])
                dlogits[n, t] = share * (p[n, t] - F.one_hot(y, 7))
                wanted -= share * p[n, t, y].log()
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden.grad, dlogits @ head.weight.detach(), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(
        head.weight.grad, torch.einsum("btv,bth->vh", dlogits, hidden.detach()), rtol=1e-9, atol=1e-14
    )
    torch.testing.assert_close(head.bias.grad, dlogits.sum((0, 1)), rtol=1e-9, atol=1e-14)
    assert hidden.grad[1, 2:].abs().max() == 0 and hidden.grad[1, 1].abs().max() > 0  # no padding; but the end


@pytest.mark.parametrize("reward", [2.0, -2.0])
def test_a_higher_reward_raises_log_p(reward):
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(2, 3, 4, generator=generator), torch.nn.Linear(4, 6)
    target = torch.tensor([[1, 3, 2], [5, 2, -100]])

    def log_p():
        return -F.cross_entropy(head(hidden).flatten(0, 1), target.flatten(), reduction="none").view(2, 3).sum(1)

    before = log_p()
    weight = rl.caption_weights(torch.tensor([reward, 0.0]), torch.tensor([3, 2]))
    rl.reinforce(hidden, head, target, weight, 1 << 20).backward()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter -= 0.1 * parameter.grad
    assert ((log_p() - before)[0] > 0) == (reward > 0)


@pytest.mark.parametrize("kind", ["clamp0", "centered", "raw", "none"])
def test_the_step_is_the_loss_of_the_two_terms(config, kind):
    """Against the formula on logits: drawn captions by their reward, the batch's own by w of theirs."""
    config = _with(config, gt_weight=kind, samples=2, accumulate=2, batch_size=10, reward_baseline="none")
    trainer = Trainer(config, embedder=StandIn(), progress=False)
    batch, found = _step(trainer)
    training = trainer._training
    drawn = training._sequences
    rewards = training.seen
    own = rewards.own
    w = {"clamp0": own.clamp(min=0), "centered": own - own.mean(), "raw": own, "none": 0 * own}[kind]

    def log_p(images, inputs, target):
        rl_policy.without_dropout(trainer.model)
        logits = trainer.model(images, inputs)[0]
        nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        return -nats.sum(1) / (target != -100).sum(1)

    trainer.model.zero_grad()
    images = batch["images"]
    loss = -(rewards.drawn * log_p(images.repeat_interleave(2, 0), drawn.inputs, drawn.target)).mean()
    loss = loss - (w * log_p(images, batch["inputs"], batch["target"])).mean()
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert (own[:5] > 0).tolist() != (own[5:] > 0).tolist()  # so the parts leave out other captions
    for (name, parameter), gradient in zip(trainer.model.named_parameters(), found["gradients"], strict=True):
        limit = 1e-4 * parameter.grad.abs().max().item() + 1e-8
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def _step(trainer):
    """(the batch of the next step, its values and the gradients before they are clipped), without an optimiser's step."""
    training, kept = trainer._training, {}
    rewarder = training._rewarder

    def remember(*args):
        training.seen = rewarder(*args)
        return training.seen

    remember.uses_greedy, remember.adversary = rewarder.uses_greedy, rewarder.adversary
    training._rewarder = remember
    batch = next(iter(trainer._loader))
    trainer.model.train()
    trainer.optimizer.zero_grad()
    moved = trainer._to_device(batch)
    training.begin(moved[0], batch, 1)
    for part in zip(*(x.chunk(trainer.config.accumulate) for x in moved), strict=True):
        training.part(*part, 0).backward()
    kept["gradients"] = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    return batch, {**training.values(), **kept}


def test_the_parts_of_a_step_add_up(config):
    found = []
    for accumulate in (1, 3):
        run = _with(config, out=f"{config.out}-{accumulate}", accumulate=accumulate)
        found.append(_step(Trainer(run, embedder=StandIn(), progress=False))[1])
    whole, parts = (each.pop("gradients") for each in found)
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-7)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4 * one.abs().max().item() + 1e-8)


def test_captions_are_read_back_with_their_end_and_without_padding(config):
    trainer = Trainer(config, embedder=StandIn(), progress=False)
    policy = trainer._training._policy
    words = models.Captions(torch.tensor([[4, 5, 0], [6, 0, 0], [0, 0, 0]]), torch.tensor([2, 1, 0]), torch.zeros(3))
    inputs, target, lengths = policy.sequences(words)
    assert inputs.tolist() == [[1, 4, 5], [1, 6, 0], [1, 0, 0]]
    assert target.tolist() == [[4, 5, 2], [6, 2, -100], [2, -100, -100]]
    assert lengths.tolist() == [3, 2, 1]
    cut = models.Captions(torch.full((1, LONGEST + 1), 7), torch.tensor([LONGEST + 1]), torch.zeros(1))
    inputs, target, lengths = policy.sequences(cut)  # a caption that was cut has no end to learn
    assert inputs.tolist() == [[1] + [7] * LONGEST] and target.tolist() == [[7] * (LONGEST + 1)]
    assert lengths.tolist() == [LONGEST + 1]


@pytest.mark.parametrize("model", ["show-attend-tell", "show-and-tell", "blip"])
def test_read_back_log_p_is_that_of_the_draw(scenes, captioner, tmp_path, model):
    trainer = Trainer(_config(scenes, captioner(model), tmp_path / "run"), embedder=StandIn(), progress=False)
    trainer.model.train()
    rl_policy.without_dropout(trainer.model)
    policy, images = trainer._training._policy, next(iter(trainer._loader))["images"]
    drawn, greedy = policy.captions(images, 1, greedy=True)
    for captions in (drawn, greedy):
        inputs, target, lengths = policy.sequences(captions)
        logits = trainer.model.head(trainer.model.hidden_states(images, inputs, lengths)).detach()
        nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none", ignore_index=-100).view(
            target.shape
        )
        torch.testing.assert_close(-nats.sum(1), captions.scores, rtol=1e-4, atol=1e-4)
    assert drawn.lengths.max() > 0


# A run ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["show-attend-tell", "show-and-tell", "blip"])
def test_what_is_rewarded_is_said_more(scenes, captioner, tmp_path, model):
    changes = {"reward_baseline": "none", "neighbours": 0, "alpha": 1.0, "gt_weight": "none", "steps": 40, "lr": 5e-3}
    changes["samples"] = 4
    config = _config(scenes, captioner(model), tmp_path / "run", **changes)
    _run(config, LikesAWord("a"))
    log = _lines(config)
    first, last = (sum(record["reward"] for record in part) / 5 for part in (log[:5], log[-5:]))
    assert last > first + 0.1
    assert "disc_accuracy" not in log[0] and log[0]["reward_baseline"] == 0


def test_the_log_and_the_samples_hold_the_parts_of_the_reward(config):
    config = _with(config, steps=4, samples_every=2, validate_every=4, validate_batches=2)
    result = _run(config)
    log = _lines(config)
    usual = {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "seconds", "length", "unique", "disc_accuracy"}
    usual |= {"disc_loss", "reward", "reward_greedy", "texts_cut"}
    usual |= {f"reward_{name}" for name in ("similarity", "baseline", "discriminator", "gt", "spread")}
    assert set(log[0]) == usual and set(log[-1]) == usual | {"val_loss", "val_mle", "val_reward"}
    assert result.val_loss == result.val_mle == log[-1]["val_mle"]
    for record in log:
        sim = record["reward_similarity"] - record["reward_baseline"]
        assert record["reward"] == pytest.approx(0.94 * sim + 0.06 * record["reward_discriminator"], abs=1e-6)
        assert 0 < record["unique"] <= 1 and 0 <= record["disc_accuracy"] <= 1 and 0 < record["length"] <= LONGEST + 1
    lines = _lines(config, "samples.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    shown = lines[0]["captions"]
    assert len(shown) == 4 and set(shown[0]) == {"imgid", "drawn", "reward", "similarity", "own", "own_reward"}


@pytest.mark.parametrize("baseline", ["two-way", "one-way", "similar", "greedy", "none"])
@pytest.mark.parametrize("policy", ["sample", "beam"])
def test_every_baseline_and_policy_runs(config, baseline, policy):
    config = _with(
        config, reward_baseline=baseline, policy=policy, steps=2, **({"beam_size": 3} if policy == "beam" else {})
    )
    result = _run(config)
    assert result.step == 2
    log = _lines(config)
    assert ("reward_greedy" in log[0]) == (baseline in ("two-way", "one-way", "greedy"))
    if baseline == "greedy":
        assert all(record["reward_greedy"] == 0 for record in log)
    if baseline == "none":
        assert all(record["reward_baseline"] == 0 for record in log)
    if baseline == "similar":
        assert all(record["reward_baseline"] != 0 for record in log)


def test_reference_and_fused_kernels_draw_and_reward_alike(config, cpp):
    config = _with(config, steps=20, samples_every=1)
    runs = []
    for backend in ("reference", "auto"):
        run = _with(config, out=f"{config.out}-{backend}")
        said = []
        with fastcap.backend(backend):
            _run(run, callbacks=[lambda trainer, _, said=said: said.append(trainer._training._sequences.target.tolist())])
        runs.append(
            (said, [[record[name] for name in record if "reward" in name or name == "loss"] for record in _lines(run)])
        )
    (said, plain), (fused_said, fused) = runs
    assert len(said) == 20 and said == fused_said
    assert len({json.dumps(each) for each in said}) == 20
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"alpha": 1.0}, {"policy": "beam", "beam_size": 2}], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(config, changes):
    config = _with(config, **changes, steps=6, samples_every=1)
    whole = _run(config)
    halted = _with(config, out=config.out + "-halted")
    _run(halted, callbacks=[lambda trainer, record: trainer.stop() if record["step"] == 3 else None])
    torch.rand(100)
    embedder = StandIn()
    result = _run(halted, embedder, resume=True)
    assert embedder.calls == []  # the images' embeddings were kept
    assert _equal(_weights(result.model), _weights(whole.model))
    one, other = (
        torch.tensor(
            [[record[name] for name in record if name not in ("images_per_s", "seconds")] for record in _lines(run)]
        )
        for run in (config, halted)
    )
    assert torch.equal(one, other) and len(one) == 6
    assert _lines(config, "samples.jsonl") == _lines(halted, "samples.jsonl")
    saved = (result.checkpoint / "discriminator.safetensors").exists()
    assert saved == ("alpha" not in changes)


def test_half_precision_trains_and_rewards_in_full(config):
    log = []
    _run(_with(config, precision="bf16", steps=2), callbacks=[lambda trainer, record: log.append(record)])
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in log)


def test_a_captioner_of_features_is_rewarded_by_its_pictures(scenes, tmp_path):
    import numpy as np

    folder = tmp_path / "features"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for record in data.KarpathyDataset(scenes, split).records:
            np.save(folder / f"{record['imgid']}.npy", generator.standard_normal((3, 10), dtype=np.float32))
    base = TrainConfig(data=scenes, out=str(tmp_path / "base"), features=str(folder), steps=2, max_length=LONGEST, **SMALL)
    train(base, progress=False)
    changes = {"features": str(folder), "steps": 2, "validate_every": 2, "validate_batches": 1}
    config = _config(scenes, base.out, tmp_path / "run", **changes)
    embedder = StandIn()
    result = _run(config, embedder)
    assert sum(embedder.calls) == len(data.KarpathyDataset(scenes, "train").records)
    assert result.val_mle is not None and "val_reward" not in _lines(config)[-1]


def test_another_clip_does_not_go_on_with_a_run(config):
    _run(config, callbacks=[lambda trainer, record: trainer.stop()])
    with pytest.raises(FastcapError, match=r"train: reward_clip must have the weights that the run began with"):
        _run(config, other := StandIn(seed=1), resume=True)
    assert not other.calls  # it is refused before it embeds the pictures


def test_a_step_makes_no_logits_of_all_words(scenes, captioner, tmp_path):
    """Reading back N captions of T words would make N * T * V logits: with V enlarged, by far the largest tensor."""
    trainer = Trainer(_config(scenes, captioner(), tmp_path / "run", memory_budget=0.05), embedder=StandIn(), progress=False)
    training = trainer._training
    batch = next(iter(trainer._loader))
    training.begin(batch["images"], batch, 1)
    trainer.model.head = torch.nn.Linear(trainer.model.head.in_features, 20_000)
    tokens = int(training._sequences.target.shape[1] * (len(batch["images"]) + (training._own != 0).sum()))
    with Allocations() as seen:
        training.part(batch["images"], batch["inputs"], batch["target"], batch["lengths"], 0).backward()
    weight = 4 * trainer.model.head.weight.numel()
    assert weight <= seen.largest < 0.5 * 4 * tokens * 20_000


# Images and neighbours ---------------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_others(monkeypatch):
    embeddings = F.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    embeddings[7] = embeddings[3]  # twins: each is the other's first
    scores = embeddings @ embeddings.T
    scores.fill_diagonal_(-2)
    wanted = scores.topk(4, dim=1).values
    monkeypatch.setattr(rl_images, "BLOCK", 60 * 4 * 7)  # 7 rows at a time: does not divide 60
    ways = [rl_images._by_torch, *([rl_images._by_faiss] if rl_images.importlib.util.find_spec("faiss") else [])]
    for way in ways:
        found = way(embeddings, 4)
        assert found.shape == (60, 4) and (found != torch.arange(60)[:, None]).all()
        torch.testing.assert_close(scores.gather(1, found), wanted, rtol=0, atol=1e-6)
        assert found[7, 0] == 3 and found[3, 0] == 7
    assert rl_images.nearest(embeddings, 0).shape == (60, 0)


def test_an_image_joins_a_step_once():
    neighbours = torch.tensor([[1, 2], [0, 4], [3, 4], [2, 1], [1, 2]])
    near = rl_images.around(torch.tensor([2, 0, 2]), neighbours)
    assert near.rows.tolist() == [0, 1, 2, 3, 4]
    assert near.rows[near.own].tolist() == [2, 0, 2]
    assert near.rows[near.similar].tolist() == [[3, 4], [1, 2], [3, 4]]


def test_kept_images_are_made_again_for_another_clip_or_number_of_neighbours(scenes, tmp_path):
    records = data.KarpathyDataset(scenes, "train").records
    notes, first = [], StandIn()

    def find(embedder, k=2, of=records):
        return rl_images.find(embedder, of, k, tmp_path, note=notes.append)

    images = find(first)
    again = find(StandIn())
    assert len(notes) == 1 and torch.equal(images.neighbours, again.neighbours)
    assert torch.equal(images.embeddings, again.embeddings)
    other = find(StandIn(seed=5))
    assert len(notes) == 2 and not torch.equal(images.embeddings, other.embeddings)
    assert find(StandIn(seed=5), k=3).neighbours.shape[1] == 3 and len(notes) == 3
    assert len(find(StandIn(seed=5), k=3, of=records[:-1]).embeddings) == len(records) - 1 and len(notes) == 4
    (tmp_path / "images.safetensors").write_bytes(b"cut short")
    find(first)
    assert len(notes) == 5
    with pytest.raises(FastcapError, match=r"train: neighbours must lie in \[0, \d+\]"):
        find(first, k=len(records))


@pytest.mark.parametrize("baseline", ["two-way", "one-way", "similar", "greedy", "none"])
def test_each_text_is_rewarded_for_its_own_image(config, scenes, tmp_path, baseline):
    """Against loops over the texts, with an image twice in the batch and one in it that is another's neighbour."""
    embedder, records = StandIn(), data.KarpathyDataset(scenes, "train").records
    config = _with(config, reward_baseline=baseline, alpha=0.7, discriminator_lr=1e-9)
    rewarder = rl_rewards.Rewarder(config, embedder, records, tmp_path / "images", torch.device("cpu"), lambda text: None)
    images = rl_images.find(embedder, records, 2, tmp_path / "images")
    rows = [5, 9, 5, int(images.neighbours[9, 0])]
    drawn = ["a red circle", "a star", "the moon", "a blue square", "red", "a cross", "the star", "a ring"]
    own = ["a circle", "stars and moons", "a red ring", "blue"]
    greedy = ["a red", "a blue", "a red", "the"]
    found = rewarder([records[row]["imgid"] for row in rows], drawn, own, greedy if rewarder.uses_greedy else None)
    chosen = sorted({*rows, *images.neighbours[rows].flatten().tolist()})
    texts = [(text, rows[i // 2]) for i, text in enumerate(drawn)] + list(zip(own, rows, strict=True))
    texts += [(greedy[i], rows[i]) for i in (0, 1, 3)]
    embedded = F.normalize(torch.stack([embedder.texts([text])[0] for text, _ in texts]), dim=1)
    cosines = embedded @ images.embeddings.T
    for p, (_, row) in enumerate(texts[: len(drawn) + len(own)]):
        others = [q for q in chosen if q != row]
        to_images = (20 * cosines[p, others]).logsumexp(0) / 20
        to_texts = torch.cat((cosines[:p, row], cosines[p + 1 :, row])).mul(20).logsumexp(0) / 20
        said = greedy[rows.index(row)]
        base = {
            "two-way": (to_images + to_texts) / 2,
            "one-way": to_texts,
            "similar": cosines[p, images.neighbours[row]].mean(),
            "greedy": F.normalize(embedder.texts([said]), dim=1)[0] @ images.embeddings[row],
            "none": 0.0,
        }[baseline]
        human = rewarder.adversary.reward(images.embeddings[[row]], embedded[[p]])[0]
        wanted = 0.7 * (cosines[p, row] - base) + 0.3 * human
        reward = torch.cat((found.drawn, found.own))[p]
        torch.testing.assert_close(reward, wanted, rtol=1e-4, atol=1e-5)
        if p < len(drawn):
            torch.testing.assert_close(found.similarity[p], cosines[p, row], rtol=1e-4, atol=1e-5)


# Guards and errors -------------------------------------------------------------------------------------------------------


class _Broken(StandIn):
    def texts(self, captions):
        return super().texts(captions) * torch.tensor([math.nan] + [1.0] * (len(captions) - 1))[:, None]


def test_a_reward_that_is_not_finite_stops_the_run_and_is_named(config):
    with pytest.raises(FastcapError, match=r"reward_similarity of step 1 must be finite, got nan; check the weights of"):
        _run(config, _Broken())
    for name in ("reward_baseline", "reward_discriminator", "reward_gt"):
        with pytest.raises(FastcapError, match=f"{name} of step 7 must be finite, got inf"):
            rl_guards.check_finite({"reward_similarity": 0.1, name: math.inf}, 7)


def test_a_collapsed_policy_stops_the_run(config, monkeypatch):
    monkeypatch.setattr(rl_guards, "PATIENCE", 3)
    said = models.Captions(torch.tensor([[5]]), torch.tensor([1]), torch.zeros(1))

    def alike(self, images, step, greedy):
        rows = [x.repeat_interleave(len(images), 0) for x in said]
        return models.Captions(*rows), models.Captions(*rows) if greedy else None

    monkeypatch.setattr(rl_policy.Policy, "captions", alike)
    with pytest.raises(FastcapError, match=r"the captions drawn in step 3 must differ from each other, got 'the'; every"):
        _run(config)
    assert len(_lines(config)) == 2


@pytest.mark.parametrize(
    "captions, spread, message",
    [
        (["", ""], 1.0, "captions drawn in step 4 must have words, got ''; none has, as in the 2 steps before: lower --lr"),
        (["a", "a"], 1.0, "captions drawn in step 4 must differ from each other, got 'a'; every image has it"),
        (["a", "b"], 0.0, r"rewards of step 4 must have a spread \(reward_spread\) above 1e-07, or .* raise --temperature"),
    ],
)
def test_what_can_teach_nothing_stops_the_run_after_a_while(monkeypatch, captions, spread, message):
    monkeypatch.setattr(rl_guards, "PATIENCE", 3)
    guard = rl_guards.Collapse()
    for step in (1, 2):
        guard.check(captions, 0.5, spread, step, 2)
    guard.check(["a", "b"], 0.5, 1.0, 3, 2)
    assert {guard.counts[name] for name in ("empty", "identical", "spread", "apart")} == {0}
    guard.check(captions, 0.5, spread, 2, 2)
    guard = rl_guards.Collapse(dict(guard.counts))  # as a checkpoint keeps it
    guard.check(captions, 0.5, spread, 3, 2)
    with pytest.raises(FastcapError, match=message):
        guard.check(captions, 0.5, spread, 4, 2)


def test_captions_that_come_apart_stop_the_run(config, monkeypatch):
    """Pushed away from what it says by rewards that are mostly negative, a policy ends in noise: varied, and nonsense."""
    monkeypatch.setattr(rl_guards, "PATIENCE", 3)
    guard = rl_guards.Collapse()
    similarities = [0.4, 0.5, 0.6, 0.26, 0.24, 0.24, 0.3, 0.24, 0.24]  # of the first three the mean is .5
    for step, similarity in enumerate(similarities, 1):
        guard.check(["a", "b"], similarity, 0.1, step, 2)
    guard = rl_guards.Collapse(dict(guard.counts))
    rule = r"reward_similarity\) of step 10 must stay above 0.25, half of what it was at first, got 0.24; .* lower --lr"
    with pytest.raises(FastcapError, match=rule):
        guard.check(["a", "b"], 0.24, 0.1, 10, 2)
    below = rl_guards.Collapse()  # a start at or below 0 says nothing of what is half as good
    for step in range(1, 12):
        below.check(["a", "b"], -0.1, 0.1, step, 2)
    assert below.counts["apart"] == 0

    steps = iter([*range(1, 13)] * 2)

    def worse(self, *arguments, found=rl_rewards.Rewarder.__call__):
        rewards = found(self, *arguments)
        return rewards._replace(values={**rewards.values, "reward_similarity": 1 / next(steps)})

    monkeypatch.setattr(rl_rewards.Rewarder, "__call__", worse)
    assert _run(_with(config, steps=12, on_collapse="go-on", out=config.out + "-on")).step == 12
    with pytest.raises(FastcapError, match="step 6 must stay above"):  # half of (1 + 1/2 + 1/3) / 3 is .31
        _run(_with(config, steps=12))


def test_texts_that_the_clip_cut_are_told(config, capsys):
    class Short(StandIn):
        truncated = 0

        def texts(self, captions):
            self.truncated += len([caption for caption in captions if len(caption.split()) > 3])
            return super().texts(captions)

    train(_with(config, steps=2, policy="beam"), embedder=(short := Short()))
    cut = [line["texts_cut"] for line in _lines(config)]
    assert min(cut) > 0 and sum(cut) == short.truncated  # the data's own captions among them
    assert f", {cut[-1]:.0f} texts longer than the CLIP's context; " in capsys.readouterr().err


def test_captions_of_one_image_may_be_alike(config, monkeypatch):
    monkeypatch.setattr(rl_guards, "PATIENCE", 2)
    _run(_with(config, batch_size=1, samples=3, temperature=1e-3, steps=4))
    assert {line["unique"] for line in _lines(config)} == {1 / 3}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"policy": "greedy"}, "policy must be one of 'sample', 'beam'"),
        ({"reward_baseline": "both"}, "reward_baseline must be one of 'two-way'"),
        ({"reward_exclude": "all"}, "reward_exclude must be one of"),
        ({"gt_weight": "clamp"}, "gt_weight must be one of 'clamp0'"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"alpha": math.nan}, r"alpha must be in \[0, 1\]"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"reward_scale": -1.0}, "reward_scale must be positive and finite"),
        ({"discriminator_lr": math.inf}, "discriminator_lr must be positive and finite"),
        ({"neighbours": -1}, "neighbours must be at least 0"),
        ({"neighbours": 0, "reward_baseline": "similar"}, "neighbours must be at least 1 with reward baseline 'similar'"),
        ({"beam_size": 3}, "beam_size must be left out with policy 'sample', got 3; or pass policy='beam'"),
        ({"alpha": 1.0, "discriminator_lr": 1e-4}, "discriminator_lr must be left out with alpha 1"),
        ({"rewards": "bleu-4"}, "rewards must be left out with objective wtf-rl, got 'bleu-4'; or pass --objective scst or"),
        ({"policy": "beam", "samples": 2}, "samples must be 1 with policy 'beam'"),
        ({"policy": "beam", "temperature": 0.5}, "temperature must be 1.0 with policy 'beam'"),
        ({"coverage": 1.0}, "coverage must be 0 with objective wtf-rl"),
        ({"scheduled_sampling": 0.5}, "scheduled_sampling must be 0 with objective wtf-rl"),
        (
            {"objective": "mle", "samples": 3},
            "samples must be left out with objective mle, got 3; or pass --obj",
        ),
        ({"objective": "smile", "reward_clip": "run"}, "reward_clip must be left out with objective smile"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(config, changes, message):
    with pytest.raises(FastcapError, match=rf"fastcap\.train: {message}"):
        _with(config, **changes)


def test_what_reinforcement_needs_is_asked_for(config, captioner):
    with pytest.raises(FastcapError, match="reward_clip must be given with objective wtf-rl, got None; pass --rew"):
        Trainer(config, progress=False)
    with pytest.raises(FastcapError, match="init_from must be given with objective wtf-rl, got None; train a captioner"):
        Trainer(_with(config, init_from=None), embedder=StandIn(), progress=False)
    with pytest.raises(FastcapError, match=r"label_smoothing must be 0 with objective wtf-rl, got 0\.1; .* the likelihood"):
        Trainer(_with(config, label_smoothing=0.1), embedder=StandIn(), progress=False)
    with pytest.raises(FastcapError, match="loss_fn must be left out"):
        Trainer(config, embedder=StandIn(), loss_fn=lambda logits, target: logits.sum(), progress=False)
    with pytest.raises(FastcapError, match="embedder must be left out with objective mle"):
        Trainer(_with(config, objective="mle"), embedder=StandIn(), progress=False)


def test_hard_attention_is_refused(scenes, tmp_path):
    base = str(tmp_path / "hard")
    options = {**SMALL, "attention": "hard", "steps": 1, "max_length": LONGEST}
    train(TrainConfig(data=scenes, out=base, **options), progress=False)
    with pytest.raises(FastcapError, match="attention must be soft or mean with objective wtf-rl, got 'hard'"):
        Trainer(_config(scenes, base, tmp_path / "run"), embedder=StandIn(), progress=False)


def test_progress_tells_the_reward(config, capsys):
    train(_with(config, steps=1), embedder=StandIn())
    told = capsys.readouterr().err
    assert re.search(r"embedding \d+ pictures with the reward's CLIP, and finding 2 neighbours of each", told)
    assert re.search(
        r"reward -?\d\.\d{3} \(similarity -?\d\.\d{3}, own captions .* right; \d\.\d words, \d+% unique\)", told
    )


@pytest.mark.skipif(not RECIPE.is_file(), reason="reads the source tree")
def test_the_recipe_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    """Every command and every snippet, one after the other, with fewer pictures and steps."""
    pytest.importorskip("typer")
    from fastcap import cli

    monkeypatch.chdir(tmp_path)
    text = RECIPE.read_text(encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    small = {"data": ["--num-images", "60"], "train": ["--steps", "2", "--batch-size", "8", "--validate-batches", "1"]}
    for command in commands.strip().splitlines():
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [*words, *small.get(words[1], [])])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capsys.readouterr().err
    assert re.search(r"^scenes/images/scene_000000.png\t\w+", capsys.readouterr().out, re.MULTILINE)
    names = {}
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    snippet = snippet.replace('"steps": 250, "batch_size": 32', '"steps": 2, "batch_size": 8')
    exec(compile(snippet, str(RECIPE), "exec"), names)
    assert names["result"].step == 2 and names["similarity"].shape == (1, 1)
    log = [json.loads(line) for line in open("distinctive/log.jsonl", encoding="utf-8")]
    for name in re.findall(r"`(\w+)`", text.split("## What is logged")[1].split("`samples.jsonl`")[0]):
        assert name in log[-1] or name == "jsonl", f"{name} is not in the log"
