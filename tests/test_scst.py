"""Self-critical training: its loss and gradient, its rewards, the steps by likelihood before it, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("PIL")

from fastcap import data, models
from fastcap.errors import FastcapError
from fastcap.rewards import Bleu, CiderD, CombinedReward, parse_rewards
from fastcap.train import TrainConfig, Trainer, rl_guards, rl_policy, rl_settings, scst, setup, train

pytestmark = pytest.mark.usefixtures("one_thread")

LONGEST = 8
SIZES = {
    "show-attend-tell": {"width": 16, "attention_width": 8},
    "show-and-tell": {"width": 16},
    "glied": {"width": 16, "heads": 2},
    "blip": {"width": 16, "pretrained": "none"},
}
NO_MLE = {"mle_steps": 0, "mle_lr": None, "mle_warmup": None}
RECIPE = Path(__file__).resolve().parent.parent / "docs" / "recipes" / "self-critical.md"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    data.write_scenes(folder, num_images=60, seed=0)
    return str(folder)


@pytest.fixture
def config(scenes, tmp_path):
    return _config(scenes, tmp_path / "run")


def _config(scenes, out, **changes):
    given = {"batch_size": 12, "mle_steps": 3, "steps": 6, "lr": 1e-3, "mle_lr": 5e-3, "mle_warmup": 1, "warmup": 1}
    given |= {"objective": "scst", "validate_every": 0, "max_length": LONGEST, "samples_every": 1}
    model = changes.get("model", "show-attend-tell")
    return TrainConfig(data=scenes, out=str(out), **{**given, **SIZES[model], **changes})


def _with(config, **changes):
    return dataclasses.replace(config, **changes)


def _run(config, **options):
    return train(config, progress=False, **options)


def _lines(config, name="log.jsonl"):
    with open(f"{config.out}/{name}", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class StandIn:
    """A CLIP: an image is its mean colour, a text the numbers of its letters."""

    width, image_size, fingerprint = 3, 16, "stand-in"

    def images(self, images):
        return images.mean((2, 3)) + 2

    def texts(self, captions):
        return torch.tensor([[1.0 + caption.count(letter) for letter in "aeo"] for caption in captions])


# The loss, on a captioner whose every number can be written down ---------------------------------------------------------

PAD, START, END, UNK, A, B = range(6)
WORDS = {"a": A, "b": B}


class Bigrams(nn.Module):
    """p(word | the word before, the image): a table of logits for each image; the forbidden have next to nothing."""

    def __init__(self, seed=0):
        super().__init__()
        self.head = nn.Linear(14, 6).double()
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(6, 14, generator=torch.Generator().manual_seed(seed)))
            self.head.bias.copy_(torch.tensor([-60.0, -60.0, 0.3, -60.0, 0.1, -0.2]))

    def _hidden(self, images, token):
        return torch.cat((F.one_hot(token, 6).double(), F.one_hot(images, 8).double()), -1)

    def encode(self, images):
        return images

    def start(self, memory):
        return memory

    def step(self, token, state, memory):
        return self.head(self._hidden(memory, token)), state

    def hidden_states(self, images, inputs, lengths=None):
        return self._hidden(images.unsqueeze(1).expand_as(inputs), inputs)


class Letters:
    pad_id, start_id, end_id, unk_id = PAD, START, END, UNK

    def encode(self, text):
        return [WORDS[word] for word in text.split()]

    def decode(self, ids):
        return " ".join("ab"[i - A] for i in ids if i >= A)

    def save(self, path):
        Path(path).write_text(json.dumps(WORDS))


def _tiny(tmp_path, **changes):
    """(the loss, its model, what `begin` takes) of four images with references of the words a and b."""
    references = [["a a", "a b"], ["b", "b b"], ["a b b"], ["b a"]]
    records = [
        {"imgid": 10 + i, "sentences": [{"raw": caption} for caption in captions]} for i, captions in enumerate(references)
    ]
    options = {"objective": "scst", "init_from": "x", "max_length": 2, "samples": 2, "on_collapse": "go-on", **changes}
    config = TrainConfig(data="x", out="x", **options)
    model, pairs = Bigrams(), SimpleNamespace(records=records)
    given = (config, model, Letters(), None, pairs, None, tmp_path, torch.device("cpu"), torch.enable_grad, print)
    images = torch.tensor([2, 0, 1, 3, 0])
    batch = {"imgids": [12, 10, 11, 13, 10], "captions": ["a b b", "a a", "b", "b a", "a b"]}
    return scst.SelfCriticalLoss(*given), model, images, batch, [references[i] for i in images.tolist()]


@pytest.mark.parametrize("objective, n", [("scst", 1), ("scst", 2), ("new-scst", 3)])
def test_the_gradient_is_the_one_derived_by_hand(tmp_path, objective, n):
    """d loss / d z = (r - b) (softmax(z) - onehot) / valid tokens, at each word of each caption and at its end."""
    loss, model, images, batch, references = _tiny(tmp_path, objective=objective, samples=n)
    loss.begin(images, batch, 1)
    value = loss.part(images, None, None, None, 0)
    value.backward()
    scorer = CiderD([[f"{caption} ." for caption in each] for each in [["a a", "a b"], ["b", "b b"], ["a b b"], ["b a"]]])
    inputs, target, lengths = loss._sequences
    said = [[token for token in row.tolist() if token >= A or token == END] for row in target]
    texts = [" ".join("." if token == END else "ab"[token - A] for token in caption) for caption in said]
    assert any(caption[-1] == END for caption in said) and any(len(caption) == 3 and END not in caption for caption in said)
    rewards = scorer(texts, [[f"{r} ." for r in each] for each in references for _ in range(n)])
    if objective == "scst":
        with torch.no_grad():
            spoken = models.greedy(model, images, max_length=3, forbidden=(PAD, START, UNK))
        greedy = [" ".join([*("ab"[i - A] for i in row), *(["."] if len(row) < 3 else [])]) for row in spoken.lists()]
        baseline = scorer(greedy, [[f"{r} ." for r in each] for each in references]).repeat_interleave(n)
    else:
        baseline = torch.stack([(rewards[i // 3 * 3 : i // 3 * 3 + 3].sum() - rewards[i]) / 2 for i in range(len(rewards))])
    assert (rewards - baseline).abs().max() > 0.1
    valid, wanted, dweight = sum(map(len, said)), 0.0, torch.zeros(6, 14, dtype=torch.float64)
    with torch.no_grad():
        for i, caption in enumerate(said):
            before = START
            for token in caption:
                h = model._hidden(images[i // n], torch.tensor(before))
                p = torch.softmax(model.head(h), 0)
                share = (rewards[i] - baseline[i]) / valid
                wanted -= share * p[token].log()
                dweight += torch.outer(share * (p - F.one_hot(torch.tensor(token), 6)), h)
                before = token
    torch.testing.assert_close(value.detach(), wanted, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.head.weight.grad, dweight, rtol=0, atol=1e-6 * dweight.abs().max().item())
    assert loss.values()["reward"] == pytest.approx(rewards.mean().item(), abs=1e-9)
    assert loss.values()["reward_baseline"] == pytest.approx(baseline.mean().item(), abs=1e-9)


def test_over_all_captions_it_is_the_gradient_of_the_expected_reward(tmp_path, monkeypatch):
    """sum_x p(x) (r(x) - b) grad log p(x) = grad sum_x p(x) r(x), over every caption that there is of an image."""
    loss, model, images, batch, _ = _tiny(tmp_path, samples=1)
    images, batch = images[:1], {name: values[:1] for name, values in batch.items()}
    captions = [[*words] for length in range(4) for words in itertools.product([A, B], repeat=length)]
    assert len(captions) == 1 + 2 + 4 + 8  # of three words without an end: cut
    greedy = models.Captions(torch.tensor([[A, A, 0]]), torch.tensor([2]), torch.zeros(1))
    expected, estimate, total = 0.0, torch.zeros(6, 14, dtype=torch.float64), 0.0
    for caption in captions:
        drawn = models.Captions(torch.tensor([[*caption, 0]]), torch.tensor([len(caption)]), torch.zeros(1))
        monkeypatch.setattr(rl_policy.Policy, "captions", lambda self, *_, drawn=drawn: (drawn, greedy))
        loss.begin(images, batch, 1)
        inputs, target, lengths = loss._sequences
        assert lengths.item() == min(len(caption) + 1, 3)
        log_p = -F.cross_entropy(model.head(model.hidden_states(images, inputs))[0], target[0], reduction="sum")
        p = log_p.exp()
        expected, total = expected + p * loss.values()["reward"], total + p.item()
        model.zero_grad()
        loss.part(images, None, None, None, 0).backward()
        estimate += p.detach() * lengths.item() * model.head.weight.grad
    assert total == pytest.approx(1, abs=1e-12)
    (wanted,) = torch.autograd.grad(-expected, model.head.weight)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(estimate, wanted, rtol=0, atol=1e-6)


def test_the_baseline_of_new_scst_leaves_the_sample_out():
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert scst.others_mean(rewards, 3).tolist() == [4.0, 3.5, 1.5, 1.5, 1.5, 0.0]


def test_a_sample_that_equals_the_greedy_caption_is_not_read_back(tmp_path, monkeypatch):
    loss, model, images, batch, _ = _tiny(tmp_path, samples=1)
    greedy = models.greedy(model, images, max_length=3, forbidden=(PAD, START, UNK))
    monkeypatch.setattr(rl_policy.Policy, "captions", lambda self, *_: (greedy, greedy))
    loss.begin(images, batch, 1)
    read = []
    monkeypatch.setattr(model, "hidden_states", lambda *args, of=model.hidden_states: read.append(args[1]) or of(*args))
    loss.part(images, None, None, None, 0).backward()
    assert [len(inputs) for inputs in read] == [1] and model.head.weight.grad.abs().max() == 0
    assert loss.values()["reward_spread"] == 0 and loss.values()["loss"] == 0


@pytest.mark.parametrize("objective, n", [("scst", 2), ("new-scst", 3)])
def test_the_parts_of_a_step_add_up_to_the_formula(config, objective, n):
    """Against plain torch on logits, of a captioner with attention, whole and in three parts."""
    found = []
    for accumulate in (1, 3):
        changes = {"objective": objective, "samples": n, "accumulate": accumulate, "batch_size": 10}
        run = _with(config, out=f"{config.out}-{accumulate}", **changes)
        trainer = Trainer(run, progress=False)
        training, batch = trainer._training._reinforced, next(iter(trainer._loader))
        training.begin(batch["images"], batch, 1)
        parts = (batch[name].chunk(accumulate) for name in ("images", "inputs", "target", "lengths"))
        for part in zip(*parts, strict=True):
            training.part(*part, 0).backward()
        found.append([parameter.grad.clone() for parameter in trainer.model.parameters()])
    model, drawn = trainer.model, training._sequences
    model.zero_grad()
    logits = model(batch["images"].repeat_interleave(n, 0), drawn.inputs)[0]
    nats = F.cross_entropy(logits.flatten(0, 1), drawn.target.flatten(), reduction="none").view(drawn.target.shape)
    advantage = training._weights * drawn.lengths.sum()
    loss = (advantage * nats.sum(1)).sum() / (drawn.target != -100).sum()
    loss.backward()
    assert advantage.abs().max() > 1e-3 and loss.item() == pytest.approx(training.values()["loss"], rel=1e-4)
    for whole, parts, parameter in zip(*found, model.parameters(), strict=True):
        limit = 1e-4 * parameter.grad.abs().max().item() + 1e-9
        torch.testing.assert_close(whole, parameter.grad, rtol=0, atol=limit)
        torch.testing.assert_close(parts, parameter.grad, rtol=0, atol=limit)


@pytest.mark.parametrize("model", SIZES)
def test_a_picture_with_several_captions_is_encoded_once(scenes, tmp_path, model):
    if model == "blip":
        pytest.importorskip("transformers")
    trainer = Trainer(_config(scenes, tmp_path / "run", model=model), progress=False)
    captioner = trainer.model.eval().double()
    batch = next(iter(trainer._loader))
    images, rows = batch["images"][:4].double(), torch.tensor([2, 0, 0, 3, 2, 2])
    inputs, lengths = batch["inputs"][:6], batch["lengths"][:6]
    counted = rl_policy.Sequences(inputs, inputs, lengths)
    seen = []
    look = captioner.blip.vision_model if model == "blip" else captioner.encoder

    def count(_, args, kwargs):
        seen.append(len([*args, *kwargs.values()][0]))

    handle = look.register_forward_pre_hook(count, with_kwargs=True)
    once = rl_policy.hidden_states(captioner, images, rows, counted)
    handle.remove()
    each = captioner.hidden_states(images[rows], inputs, lengths)
    valid = torch.arange(inputs.shape[1]) < lengths[:, None]
    torch.testing.assert_close(once[valid], each[valid], rtol=1e-9, atol=1e-12)
    assert seen == [4]
    weight = torch.randn(once.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * valid.unsqueeze(2)
    parameters = [p for p in captioner.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((weight * x).sum(), parameters, allow_unused=True) for x in (once, each)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


# Rewards ----------------------------------------------------------------------------------------------------------------


def _with_ends(record):
    return [" ".join([*data.words(sentence["raw"]), "."]) for sentence in record["sentences"]]


def test_rewards_of_a_batch_are_those_of_its_texts_with_an_end(config):
    trainer = Trainer(_with(config, rewards="cider-d=2,bleu-4=0.5,similarity=3"), embedder=StandIn(), progress=False)
    training, batch = trainer._training._reinforced, next(iter(trainer._loader))
    training.begin(batch["images"], batch, 1)
    records = {record["imgid"]: record for record in trainer._pairs.records}
    references = {id: _with_ends(record) for id, record in records.items()}
    said = [trainer.tokenizer.decode(words) for words in scst.words_of(training._sequences)]
    whole = [words[-1] == trainer.tokenizer.end_id for words in scst.words_of(training._sequences)]
    assert set(whole) == {True, False}  # some are cut before their end, and then have none
    texts = [f"{text} ." if ended else text for text, ended in zip(said, whole, strict=True)]
    theirs = [references[id] for id in batch["imgids"]]
    values = training.values()
    cider = CiderD(list(references.values()))(texts, theirs).mean().item()
    assert values["reward_cider_d"] == pytest.approx(cider, abs=1e-9) and cider > 0
    assert values["reward_bleu_4"] == pytest.approx(Bleu()(texts, theirs).mean().item(), abs=1e-12)
    pixels = torch.stack([torch.tensor(data.read_pixels(records[id]["path"], 16)) for id in batch["imgids"]])
    images = F.normalize(StandIn().images(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1), dim=1)
    cosine = (F.normalize(StandIn().texts(said), dim=1) * images).sum(1).mean().item()
    assert values["reward_similarity"] == pytest.approx(cosine, abs=1e-5)
    total = 2 * values["reward_cider_d"] + 0.5 * values["reward_bleu_4"] + 3 * values["reward_similarity"]
    assert values["reward"] == pytest.approx(total, abs=1e-6)


def test_unknown_words_are_never_drawn_and_earn_nothing(config):
    trainer = Trainer(_with(config, min_count=40, samples=4), progress=False)
    unknown = trainer.tokenizer.unk_id
    with torch.no_grad():
        trainer.model.head.bias[unknown] = 20.0
    training, batch = trainer._training._reinforced, next(iter(trainer._loader))
    assert any(unknown in trainer.tokenizer.encode(caption) for caption in batch["captions"])
    training.begin(batch["images"], batch, 1)
    assert unknown not in training._sequences.target.flatten().tolist()


def test_validation_is_by_cider_d_whatever_the_rewards(config):
    config = _with(config, rewards="bleu-4", validate_every=6, validate_batches=2)
    result = _run(config)
    records = data.KarpathyDataset(config.data, "train").records
    scorer = CiderD([_with_ends(record) for record in records])
    scores = {}
    batches = setup.validation_sampler(result.config, result.validation)
    for batch in setup.make_loader(result.config, result.validation, result.tokenizer, torch.device("cpu"), batches):
        forbidden = (PAD, START, UNK)
        said = models.greedy(result.model, batch["images"], max_length=LONGEST + 1, forbidden=forbidden).lists()
        for imgid, words in zip(batch["imgids"], said, strict=True):
            record = next(record for record in result.validation.records if record["imgid"] == imgid)
            text = result.tokenizer.decode(words) + (" ." if len(words) <= LONGEST else "")
            scores[imgid] = scorer([text], [_with_ends(record)]).item()
    assert _lines(config)[-1]["val_reward"] == pytest.approx(sum(scores.values()) / len(scores), abs=1e-9)


def test_bleu_is_pycocoevalcaps_of_each_caption():
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    draw = random.Random(0)

    def caption(least, most):
        return " ".join(draw.choices("abcd", k=draw.randint(least, most)))

    references = [[caption(1, 9) for _ in range(draw.randint(1, 5))] for _ in range(60)]
    candidates = [caption(0, 12) for _ in range(60)]
    candidates[:3] = [references[0][0], "", "a a a a a a a a"]
    _, wanted = scorer.compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)}, verbose=0)
    for n in (1, 4):
        found = Bleu(n)(candidates, references)
        torch.testing.assert_close(found, torch.tensor(wanted[n - 1], dtype=torch.float64), rtol=0, atol=1e-12)
    ids = [["abcd".index(word) for word in candidate.split()] for candidate in candidates]
    by_ids = [[["abcd".index(word) for word in each.split()] for each in captions] for captions in references]
    assert torch.equal(Bleu()(ids, by_ids), Bleu()(candidates, references))
    assert torch.equal(Bleu()(candidates[::-1], references, range(59, -1, -1)), Bleu()(candidates, references).flip(0))


def test_bleu_by_hand():
    """3 of 4 words, 2 of 3 pairs; "a" twice in the caption and once in a reference counts once; 4 words against 5."""
    (found,) = Bleu(2)(["a red a bus"], [["a red bus stops here", "the a bus goes on"]])
    assert found.item() == pytest.approx(math.sqrt(3 / 4 * 2 / 3) * math.exp(1 - 5 / 4), abs=1e-8)


def test_rewards_by_name():
    assert parse_rewards("cider-d") == {"cider-d": 1.0}
    assert parse_rewards(" bleu-4 = .5 , cider-d") == {"bleu-4": 0.5, "cider-d": 1.0}
    references = [["a red bus .", "the bus ."], ["a cat on a mat .", "a cat sits ."]]
    captions, rows = ["a red bus .", "a cat .", "a bus ."], torch.tensor([0, 1, 0])
    found = CombinedReward({"cider-d": 1.0, "bleu-4": 2.0}, references)(captions, rows)
    assert set(found.parts) == {"cider-d", "bleu-4"}
    torch.testing.assert_close(found.parts["cider-d"], CiderD(references)(captions, None, rows))
    torch.testing.assert_close(found.total, found.parts["cider-d"] + 2 * found.parts["bleu-4"])
    cider = CiderD([*references, ["nothing ."]])
    other = CombinedReward({"cider-d": 1.0}, references, cider)(captions, rows).total
    torch.testing.assert_close(other, cider(captions, references, rows))
    assert not torch.equal(other, found.parts["cider-d"])
    with pytest.raises(
        FastcapError, match="rewards.CombinedReward: similarity must be given where it has a weight, got None"
    ):
        CombinedReward({"similarity": 1.0}, references)(captions, rows)


@pytest.mark.parametrize(
    "given, message",
    [
        ("", "rewards must name rewards among 'cider-d', 'bleu-4', 'similarity', got ''; pass for example"),
        ("cider", "rewards must name rewards among .* got 'cider'"),
        ("cider-d,,bleu-4", "rewards must name rewards among"),
        ("cider-d=0", "rewards must have weights above 0 and finite, got 'cider-d=0'; pass cider-d=1, or leave it out"),
        ("cider-d=1,bleu-4=-1", "rewards must have weights above 0 and finite, got 'bleu-4=-1'"),
        ("cider-d=nan", "rewards must have weights above 0 and finite"),
        ("cider-d=inf", "rewards must have weights above 0 and finite"),
        ("cider-d=much", "rewards must have weights above 0 and finite, got 'cider-d=much'"),
        ("cider-d=", "rewards must have weights above 0 and finite"),
        ("cider-d=1,cider-d=2", "rewards must name 'cider-d' once, got 'cider-d=1,cider-d=2'; add its weights up"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(config, given, message):
    with pytest.raises(FastcapError, match=rf"fastcap\.train: {message}"):
        _with(config, rewards=given)
    with pytest.raises(FastcapError, match=rf"fastcap\.rewards\.CombinedReward: {message}"):
        parse_rewards(given)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Bleu(0), "n must be an integer of at least 1, got 0"),
        (lambda: Bleu()(["a"], [["a"]], [1]), r"rows must lie in \[0, 1\), got 1"),
        (lambda: Bleu()(["a"], [["a"]], [0, 0]), "rows must be one for each of the 1 candidates, got 2"),
        (lambda: Bleu()(["a"], [["a"]], [0.5]), "rows must be integers, got 'list'"),
        (lambda: Bleu()(["a"], [[]]), r"references\[0\] must have a caption, got 'none'"),
        (lambda: Bleu()(["a b"], ["a b"]), r"references\[0\] must be a list, got 'str'"),
        (lambda: Bleu()("a", [["a"]]), "candidates must be a list, got 'str'"),
        (lambda: Bleu()(["a"], None), "references must be a list, got 'NoneType'"),
        (lambda: Bleu()(["a", 3], [["a"], ["b"]]), r"candidates\[1\] must be a caption, got 'int'"),
        (lambda: Bleu()(["a"], [["a", [None]]]), r"references\[0\]\[1\] must hold words, or ids, got 'NoneType'"),
    ],
)
def test_bleu_refuses_what_it_cannot_score(make, message):
    with pytest.raises(FastcapError, match=rf"fastcap\.rewards\.Bleu: {message}"):
        make()


def test_document_frequencies_may_come_from_another_run(config, scenes, tmp_path):
    first = Trainer(config, progress=False)
    kept = Path(config.out) / "reward" / "document_frequencies.npz"
    batch = next(iter(first._loader))

    def values(trainer):
        training = trainer._training._reinforced
        training.begin(batch["images"], batch, 1)
        return training.values()

    again = Trainer(_with(config, out=str(tmp_path / "again"), df=str(kept)), progress=False)
    assert values(again) == values(first)
    assert not (tmp_path / "again" / "reward").exists()
    scorer = CiderD([[[A, END], [A, A, END]], [[B, END]]])
    scorer.save(tmp_path / "few.npz")
    other = Trainer(_with(config, out=str(tmp_path / "other"), df=str(tmp_path / "few.npz")), progress=False)
    assert values(other)["reward"] != values(first)["reward"]
    with pytest.raises(FastcapError, match="train: df must be of the same tokenizer, got .* --init-from"):
        Trainer(_with(config, out=str(tmp_path / "cut"), df=str(kept), min_count=40), progress=False)
    CiderD([["a red bus"], ["a cat"]]).save(tmp_path / "words.npz")
    with pytest.raises(FastcapError, match=r"train: df must be of a tokenizer's ids, got '.*words.npz \(of words\)'"):
        Trainer(_with(config, out=str(tmp_path / "words"), df=str(tmp_path / "words.npz")), progress=False)
    with pytest.raises(FastcapError, match="train: df must not be empty"):
        _with(config, df="")
    with pytest.raises(FastcapError, match="path must be a file, got 'nowhere.npz'"):
        Trainer(_with(config, out=str(tmp_path / "none"), df="nowhere.npz"), progress=False)


# Runs, with steps by likelihood first -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model, objective", [*((model, "scst") for model in SIZES), ("show-attend-tell", "new-scst")])
def test_every_captioner_trains(scenes, tmp_path, model, objective):
    if model == "blip":
        pytest.importorskip("transformers")
    config = _config(scenes, tmp_path / "run", model=model, objective=objective, validate_every=6, validate_batches=1)
    result = _run(config)
    log = _lines(config)
    usual = {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "seconds"}
    usual |= {"attributes"} if model == "glied" else set()
    assert set(log[2]) == usual
    rewards = {"reward", "reward_baseline", "reward_cider_d", "reward_spread", "length", "unique"}
    assert set(log[3]) == usual - {"attributes"} | rewards
    assert set(log[-1]) == set(log[3]) | {"val_loss", "val_mle", "val_reward"}
    assert all(record["grad_norm"] > 0 for record in log) and result.val_mle == log[-1]["val_mle"]
    assert result.config.samples == (5 if objective == "new-scst" else 1)
    samples = _lines(config, "samples.jsonl")
    assert [line["step"] for line in samples] == [4, 5, 6]  # the steps by likelihood draw nothing
    assert set(samples[0]["captions"][0]) == {"imgid", "drawn", "reward", "baseline", "own"}


def test_the_first_steps_are_a_run_by_likelihood(config, scenes, tmp_path):
    """Bit for bit, with what belongs to the likelihood alone; then the rates and the moments begin anew."""
    extras = {"coverage": 0.5, "scheduled_sampling": 0.25, "label_smoothing": 0.1}
    alone = _with(config, out=str(tmp_path / "alone"), objective="mle", **NO_MLE,
                  steps=3, lr=5e-3, **extras)  # fmt: skip
    wanted = {name: x.clone() for name, x in _run(alone).model.state_dict().items()}
    seen, moments = {}, []

    def look(trainer, record):
        moments.append({int(each["step"]) for each in trainer.optimizer.state.values()})
        if record["step"] == 3:
            seen.update({name: x.clone() for name, x in trainer.model.state_dict().items()})

    _run(_with(config, **extras), callbacks=[look])
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted)
    log, by_likelihood = _lines(config), _lines(alone)
    assert [record["loss"] for record in log[:3]] == [record["loss"] for record in by_likelihood]
    assert [record["coverage"] for record in log[:3]] == [record["coverage"] for record in by_likelihood]
    cosine = [1.0, 0.5 * (1 + math.cos(0)), 0.5 * (1 + math.cos(math.pi / 2))]  # a step of rise, then two of fall
    assert [record["lr"] for record in log] == pytest.approx([5e-3 * x for x in cosine] + [1e-3 * x for x in cosine])
    assert moments == [{1}, {2}, {3}, {1}, {2}, {3}]


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """Runs that nothing interrupted, by objective."""
    made = {}

    def find(objective, options):
        if objective not in made:
            config = _config(scenes, tmp_path_factory.mktemp(objective) / "run", objective=objective, **options)
            made[objective] = _run(config, **_clip(objective)), config
        return made[objective]

    return find


def _clip(objective):
    return {"embedder": StandIn()} if objective == "wtf-rl" else {}


@pytest.mark.parametrize("objective, stop", [("new-scst", 2), ("new-scst", 3), ("new-scst", 4), ("wtf-rl", 2)])
def test_a_resumed_run_is_the_same_bit_for_bit_across_the_switch(scenes, tmp_path, whole, objective, stop):
    """Interrupted before it, at it, and after it."""
    options = {"validate_every": 2, "validate_batches": 1, "scheduled_sampling": 0.25}
    result, config = whole(objective, options)
    halted = _config(scenes, tmp_path / "halted", objective=objective, **options)
    _run(halted, callbacks=[lambda trainer, record: trainer.stop() if record["step"] == stop else None], **_clip(objective))
    torch.rand(100)
    resumed = _run(halted, resume=True, **_clip(objective))
    assert all(torch.equal(x, result.model.state_dict()[name]) for name, x in resumed.model.state_dict().items())
    clocks = ("images_per_s", "seconds")
    one, other = ([{k: v for k, v in line.items() if k not in clocks} for line in _lines(run)] for run in (config, halted))
    assert one == other and len(one) == 6
    assert _lines(config, "samples.jsonl") == _lines(halted, "samples.jsonl")


@pytest.mark.slow
def test_self_critical_training_raises_cider_d(scenes, tmp_path):
    sizes = {"width": 32, "attention_width": 16, "batch_size": 16, "samples": 3}
    config = _config(scenes, tmp_path / "run", objective="new-scst", mle_steps=120, steps=190, lr=2e-3, warmup=5, **sizes)
    _run(config)
    rewards = [record["reward_cider_d"] for record in _lines(config)[120:]]
    first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
    assert last > 1.25 * first, (first, last)


def test_a_captioner_that_is_there_needs_no_likelihood(config, tmp_path):
    _run(_with(config, objective="mle", **NO_MLE))
    again = TrainConfig(data=config.data, out=str(tmp_path / "again"), objective="scst", init_from=config.out, steps=2,
                        batch_size=12, validate_every=0)  # fmt: skip
    result = _run(again)
    assert result.step == 2 and {"reward"} <= set(_lines(again)[0])


def test_half_precision_rewards_in_full(config):
    _run(_with(config, precision="bf16", samples=2))
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in _lines(config))


def test_progress_tells_the_rewards(config, capsys):
    train(_with(config, steps=4, rewards="cider-d,bleu-4=0.5"))
    told = capsys.readouterr().err
    assert re.search(r"reward \d\.\d{3} \(CIDEr-D \d\.\d{3}, BLEU-4 \d\.\d{3}; \d\.\d words, \d+% unique\)", told)


# Guards and errors ------------------------------------------------------------------------------------------------------


def test_captions_that_are_all_alike_stop_the_run(config, monkeypatch):
    monkeypatch.setattr(rl_guards, "PATIENCE", 2)
    said = models.Captions(torch.tensor([[5]]), torch.tensor([1]), torch.zeros(1))

    def alike(self, images, step, greedy):
        rows = [x.repeat_interleave(len(images), 0) for x in said]
        return models.Captions(*rows), models.Captions(*rows) if greedy else None

    monkeypatch.setattr(rl_policy.Policy, "captions", alike)
    with pytest.raises(
        FastcapError, match=r"captions drawn in step 5 must differ from each other, got '\w+'; .* lower --lr, or"
    ):
        _run(config)
    assert len(_lines(config)) == 4
    assert _run(_with(config, out=config.out + "-on", on_collapse="go-on")).step == 6


def test_rewards_that_fall_apart_or_teach_nothing_stop_the_run(monkeypatch):
    monkeypatch.setattr(rl_guards, "PATIENCE", 2)
    guard = rl_guards.Collapse(told=rl_guards.SELF_CRITICAL)
    for step, reward in enumerate([1.0, 1.0, 0.4], 1):
        guard.check(["a", "b"], reward, 0.1, step, 2)
    with pytest.raises(FastcapError, match="the reward of step 4 must stay above 0.5, half of .* come apart: lower --lr"):
        guard.check(["a", "b"], 0.4, 0.1, 4, 2)
    guard = rl_guards.Collapse(told=rl_guards.SELF_CRITICAL)
    guard.check(["a", "b"], 0.0, 0.0, 1, 2)
    with pytest.raises(FastcapError, match=r"reward_spread\) above 1e-07.* begin with more steps by likelihood"):
        guard.check(["a", "b"], 0.0, 0.0, 2, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        *(
            ({name: value}, f"{name} must be left out with objective scst, got {value!r}; or pass --objective wtf-rl")
            for name, value in {
                "alpha": 0.5, "gt_weight": "none", "reward_baseline": "none", "neighbours": 1, "discriminator_lr": 1e-4,
                "reward_scale": 10.0, "reward_exclude": "group", "policy": "beam", "beam_size": 3,
            }.items()
        ),
        ({"objective": "wtf-rl", "df": "x"}, "df must be left out with objective wtf-rl, got 'x'; or pass --objective scst"),
        ({"objective": "mle", **NO_MLE, "rewards": "bleu-4"}, "rewards must be left out with objective mle"),
        ({"objective": "mle", "mle_steps": 0}, "mle_lr must be left out without mle_steps, got 0.005"),
        ({"objective": "mle"}, "mle_steps must be 0 with objective mle, got 3; leave it out, or pass"),
        ({"objective": "smile"}, "mle_steps must be 0 with objective smile"),
        ({"mle_steps": 6}, "mle_steps must be less than steps, 6, got 6; the steps after them are by scst"),
        ({"mle_steps": -1}, "mle_steps must be at least 0"),
        ({"mle_lr": 0.0}, "mle_lr must be positive and finite"),
        ({"mle_warmup": -1}, "mle_warmup must be at least 0"),
        ({"objective": "new-scst", "samples": 1}, "samples must be at least 2 with objective new-scst, got 1; pass"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"temperature": math.nan}, "temperature must be positive and finite"),
        ({"reward_clip": "clip"}, "reward_clip must be left out with rewards 'cider-d', got 'clip'; or give"),
        ({**NO_MLE, "coverage": 1.0}, "coverage must be 0 with objective scst"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(config, changes, message):
    with pytest.raises(FastcapError, match=rf"fastcap\.train: {message}"):
        _with(config, **changes)


def test_what_self_critical_training_needs_is_asked_for(config):
    bare = _with(config, **NO_MLE)
    with pytest.raises(
        FastcapError, match="init_from must be given with objective scst, got None; train .* --mle-steps 2000"
    ):
        Trainer(bare, progress=False)
    with pytest.raises(
        FastcapError, match="reward_clip must be given with rewards 'similarity', got None; pass --reward-clip"
    ):
        Trainer(_with(config, rewards="similarity"), progress=False)
    with pytest.raises(FastcapError, match="embedder must be left out with rewards 'cider-d'"):
        Trainer(config, embedder=StandIn(), progress=False)
    with pytest.raises(FastcapError, match="attention must be soft or mean with objective scst, got 'hard'"):
        Trainer(_with(config, attention="hard"), progress=False)
    with pytest.raises(FastcapError, match="loss_fn must be left out with objective scst"):
        Trainer(config, loss_fn=lambda logits, target: logits.sum(), progress=False)


def test_one_image_has_no_document_frequencies(config, tmp_path):
    document = json.loads((Path(config.data) / "dataset_scenes.json").read_text(encoding="utf-8"))
    kept = {record["split"]: record for record in document["images"]}  # one of each split
    (tmp_path / "dataset_one.json").write_text(json.dumps({"images": list(kept.values())}), encoding="utf-8")
    (tmp_path / "images").symlink_to(Path(config.data) / "images")
    with pytest.raises(FastcapError, match="train: data must have at least 2 pictures to train on with .* got 1; .* --df"):
        Trainer(_with(config, data=str(tmp_path)), progress=False)


def test_checkpoints_from_before_samples_could_be_left_open_are_read(config):
    assert TrainConfig(data="x", out="y", samples=1).objective == "mle"
    assert rl_settings.SAMPLES.keys() == {"wtf-rl", "scst", "new-scst"}


@pytest.mark.skipif(not RECIPE.is_file(), reason="reads the source tree")
def test_the_recipe_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    """Every command and every snippet, one after the other, with fewer pictures and steps."""
    pytest.importorskip("typer")
    from fastcap import cli

    monkeypatch.chdir(tmp_path)
    text = RECIPE.read_text(encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for command in commands.strip().splitlines():
        words = shlex.split(command)
        if words[1] == "data":
            words += ["--num-images", "60"]
        if words[1] == "train":
            words += ["--steps", "3", "--batch-size", "8", "--validate-batches", "1"]
            words += ["--mle-steps", "2"] if "--mle-steps" in words else []
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capsys.readouterr().err
    assert re.search(r"^scenes/images/scene_000000.png\t\w+", capsys.readouterr().out, re.MULTILINE)
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(snippet.replace("2_500", "2").replace("2_800", "4"), str(RECIPE), "exec"), names)
    assert names["result"].step == 4
    log = [json.loads(line) for line in open("captioner/log.jsonl", encoding="utf-8")]
    rows = re.findall(r"^\| (`.*?) \|", text.split("## What is logged")[1], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named - set(log[-1]) == {"reward_bleu_4", "reward_similarity"} and "val_reward" in named
