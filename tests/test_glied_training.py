"""GLIED and its Base in `fastcap train`: what a run makes, its losses, resumption, captions, attributes."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("PIL")

from fastcap import cli, data, models
from fastcap.errors import FastcapError
from fastcap.train import Captioner, TrainConfig, Trainer, checkpoint, evaluate_data, evaluate_rows, train
from fastcap.train.attention_terms import coverage_penalty, coverage_penalty_of_heads
from fastcap.train.objectives import ATTRIBUTE_WEIGHT

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Path(__file__).resolve().parent.parent / "docs" / "recipes" / "glied.md"
SMALL = {"model": "glied", "width": 16, "heads": 2, "num_attributes": 5, "batch_size": 16, "steps": 6, "warmup": 2}
SMALL["validate_every"] = 0
GIVEN = {"attributes": "given", "num_attributes": None}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """About 50 pictures to train on, with 5 captions each; their attributes are their shapes, and a word that none says."""
    folder = tmp_path_factory.mktemp("scenes")
    data.write_scenes(folder, num_images=60, seed=0)
    file = folder / "dataset_scenes.json"
    document = json.loads(file.read_text())
    for n, record in enumerate(document["images"]):
        record["attributes"] = [thing["shape"] for thing in record["facts"]["objects"]] + ["zebra"] if n % 5 else []
    file.write_text(json.dumps(document))
    return str(folder)


@pytest.fixture
def config(scenes, tmp_path):
    return TrainConfig(data=scenes, out=str(tmp_path / "run"), **SMALL)


def _with(config, **changes):
    return dataclasses.replace(config, **changes)


def _quiet(config, **options):
    return train(config, progress=False, **options)


def _log(config):
    with open(f"{config.out}/log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model", ["glied", "base"])
def test_a_run_is_its_recipe(config, model):
    result = _quiet(_with(config, model=model, steps=1, visual_distilling=None if model == "glied" else True))
    made = result.model
    assert type(made) is models.Glied and result.config.model == model and result.config.attributes == "predicted"
    switches = (made.config.visual_distilling, made.config.attribute_distilling, made.config.local_distilling)
    assert switches == ((True, True, True) if model == "glied" else (True, False, False))
    assert made.config.encoder["width"] == made.config.width == 16 and made.predictor.keep == 5
    words = {result.tokenizer.decode([i]) for i in made.config.attribute_ids}
    assert {"red", "circle", "large"} <= words and not {"a", "the", "and"} & words
    again = Captioner.load(config.out)
    assert _equal(again.model, made) and again.attribute_tokenizer is None


def test_the_loss_is_the_objective_and_that_of_the_attributes(config):
    trainer = Trainer(_with(config, dropout=0.0), progress=False)
    images, inputs, target, lengths = trainer._to_device(next(iter(trainer._loader)))
    loss = trainer._training
    loss.begin(images, {"target": target}, 1)
    total = loss.part(images, inputs, target, lengths, int((target != -100).sum()))
    read = trainer.model.teacher_forced(images, inputs, lengths)
    logits = trainer.model.head(read.hidden)
    mle = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    attributes = trainer.model.predictor.loss(read.absent, target).mean()
    torch.testing.assert_close(total, mle + ATTRIBUTE_WEIGHT * attributes)
    values = loss.values()
    assert values["loss"] == pytest.approx(mle.item(), rel=1e-5)
    assert values["attributes"] == pytest.approx(attributes.item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"objective": "smile", "model": "base"}], ids=str)
def test_training_lowers_the_loss(config, options):
    result = _quiet(_with(config, steps=30, lr=5e-3, validate_every=30, validate_batches=2, coverage=0.1, **options))
    log = _log(config)
    first, last = log[0], log[-1]
    assert last["loss"] < 0.85 * first["loss"] and last["coverage"] > 0 and result.val_mle < 4.3


@pytest.mark.parametrize("changes", [{}, {**GIVEN, "coverage": 1.0, "model": "base"}], ids=["predicted", "given"])
def test_stopped_and_resumed_is_bitwise_uninterrupted(config, changes):
    config = _with(config, dropout=0.3, **changes)
    whole = _quiet(config)
    halted = _with(config, out=config.out + "-halted")

    def stop(trainer, record):
        if record["step"] == 3:
            trainer.stop()

    assert _quiet(halted, callbacks=[stop]).step == 3
    torch.rand(1000)  # whatever else happens between
    assert _equal(_quiet(halted, resume=True).model, whole.model)
    kept = ("step", "loss", "grad_norm")
    assert [[r[k] for k in kept] for r in _log(halted)] == [[r[k] for k in kept] for r in _log(config)]


@pytest.mark.parametrize("changes", [{}, {**GIVEN, "local_distilling": False}], ids=["predicted", "given"])
def test_a_step_in_parts_is_one_batch(config, scenes, tmp_path, changes):
    import numpy as np

    folder, generator = tmp_path / "features", np.random.default_rng(0)
    folder.mkdir()
    for split in ("train", "val"):
        for record in data.KarpathyDataset(scenes, split).records:
            np.save(folder / f"{record['imgid']}.npy", generator.standard_normal((int(generator.integers(2, 5)), 10)))
    found = []
    for accumulate in (1, 4):
        run = _with(config, features=str(folder), coverage=2.0, dropout=0.0, accumulate=accumulate, clip=1e9, **changes)
        trainer = Trainer(run, progress=False)
        trainer.model.double()
        batch = next(iter(trainer._loader))
        batch["images"] = batch["images"].double()
        trainer._began = time.perf_counter()
        record = trainer._train_step(0, batch)
        found.append(([record["coverage"], record.get("attributes", 0.0)], [p.grad for p in trainer.model.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-9)
    assert isinstance(trainer.model.encoder, models.FeatureEncoder) and trainer.config.num_attributes == changes.get(
        "num_attributes", 5
    )
    for one, part in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(part, one, rtol=1e-9, atol=1e-9 * one.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "theano"])
@pytest.mark.parametrize("target", ["1", "length"])
@pytest.mark.parametrize("masked", [False, True])
def test_coverage_is_the_penalty_of_each_head_on_average(reduction, target, masked):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 2, n, 4, dtype=torch.float64, generator=generator) for n in (5, 6))
    lengths, mask = torch.tensor([5, 2, 3]), None
    scores = query @ key.mT / 2
    if masked:
        mask = torch.arange(6) < torch.tensor([6, 3, 1]).unsqueeze(1)
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    alphas = scores.softmax(3) * (torch.arange(5) < lengths.unsqueeze(1))[:, None, :, None]
    options = {"captions": 7, "locations": torch.tensor(31) if masked else None, "target": target, "reduction": reduction}
    found = coverage_penalty_of_heads(query, key, lengths, mask, **options)
    heads = [coverage_penalty(alphas[:, h], lengths, mask, **options) for h in range(2)]
    torch.testing.assert_close(found, (heads[0] + heads[1]) / 2, rtol=1e-10, atol=1e-12)


def test_a_loss_of_ones_own_takes_logits_and_leaves_the_attributes(config):
    def loss_fn(logits, target):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    own, ours = _with(config, coverage=1.0, steps=3), _with(config, coverage=1.0, steps=3, out=config.out + "-ours")
    _quiet(own, loss_fn=loss_fn)
    _quiet(ours)
    kept = ("loss", "coverage", "attributes", "grad_norm")
    for one, other in zip(_log(own), _log(ours), strict=True):
        assert [one[name] for name in kept] == pytest.approx([other[name] for name in kept], rel=1e-3)


def test_given_attributes_reach_training_captions_and_evaluation(config, scenes, tmp_path, capsys):
    config = _with(config, **GIVEN, steps=3, validate_every=3, validate_batches=1, workers=1)
    result = train(config)
    told = capsys.readouterr().err
    assert "left out 1 of 9 attribute words, which occur " in told and "the first: 'zebra'" in told
    assert result.model.predictor is None and result.config.attribute_vocab is None
    captioner = Captioner.load(config.out)
    assert captioner.attribute_tokenizer is not None
    with pytest.raises(FastcapError, match="images of this glied must be fastcap.data.Attributed"):
        captioner(torch.zeros(1, 3, 48, 48))
    view = data.KarpathyDataset(scenes, split="test").images()
    images = data.batching.stack_items([view[0], view[1]], captioner.attribute_tokenizer)
    maps = captioner.attention(images, ["a red circle", "a star"])
    assert maps[0].maps.shape == (3, 6, 6) and maps[0].maps.sum((1, 2)).tolist() == pytest.approx([1] * 3, rel=1e-4)
    files = [str(record["path"]) for record in view.dataset.records[:2]]
    arguments = ["caption", *files, "--checkpoint", config.out, "--attributes", f"{scenes}/dataset_scenes.json"]
    picture = tmp_path / "looked.png"
    assert _command([*arguments, "--attention", str(picture), "--beam", "2"]) == 0 and picture.is_file()
    said = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    assert said == captioner(images, beam=2)
    assert _command(arguments[:-2]) == 2
    assert "attributes must be given where the model was trained with the words of its images" in capsys.readouterr().err
    (row,) = evaluate_rows.read_rows([config.out], [])
    usable = evaluate_data.Split(scenes, "test").usable([], [(48, None)], partial=False)
    evaluate_rows.caption(row, usable, None, torch.device("cpu"), False, batch_size=4, beam=2)
    assert len(row.captions) == len(view) and list(row.captions[:2]) == said


def test_self_critical_training_goes_on_from_either(config):
    for changes in ({}, {**GIVEN, "model": "base"}):
        first = _with(config, **changes, steps=2, out=f"{config.out}-{len(changes)}")
        _quiet(first)
        tuned = TrainConfig(data=config.data, out=first.out + "-rl", init_from=first.out, objective="scst", steps=2,
                            batch_size=6, validate_every=0)  # fmt: skip
        result = _quiet(tuned)
        assert result.config.model == first.model and result.step == 2
        assert not torch.equal(result.model.embed.weight, models.load(checkpoint.find(first.out)).embed.weight)


def _command(arguments):
    try:
        cli.app()(arguments, standalone_mode=False)
    except FastcapError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 17}, "fastcap.models: width must be a multiple of heads=2, got 17; pass width=16"),
        ({"attention": "soft"}, "fastcap.train: attention must be left out with glied, got 'soft'; that model has no such"),
        (
            {"scheduled_sampling": 0.5},
            "fastcap.train: scheduled_sampling must be 0 with glied, got 0.5; or pass --model show",
        ),
        ({"attributes": "given"}, "fastcap.train: num_attributes must be left out with attributes 'given', got 5; the data"),
        ({"model": "show-and-tell"}, "fastcap.train: heads must be left out with show-and-tell, got 2; that model has no"),
        ({"min_count": 10**6}, "fastcap.data.tokenizer: captions must hold at least one word to learn"),
    ],
)
def test_what_does_not_fit_is_named(config, change, message):
    with pytest.raises(FastcapError) as caught:
        Trainer(_with(config, **change), progress=False)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attributes": "none"}, "attributes must be one of 'predicted', 'given', got 'none'; pass attributes='predicted'"),
        ({"visual_distilling": 1}, "visual_distilling must be True or False, got 1; pass True or False"),
        ({"heads": 0}, "heads must be at least 1, got 0; pass heads=1 or more"),
    ],
)
def test_settings_that_are_none_are_named(config, change, message):
    with pytest.raises(FastcapError) as caught:
        _with(config, **change)
    assert str(caught.value).startswith(f"fastcap.train: {message}")


def test_records_without_attributes_cannot_be_given(config, tmp_path):
    plain = tmp_path / "plain"
    data.write_scenes(plain, num_images=20, seed=0)
    with pytest.raises(FastcapError, match="image .* must have attributes, got 'none'; add \"attributes\""):
        _quiet(_with(config, data=str(plain), **GIVEN))


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_record_without_attributes_is_found_before_the_first_step(config, scenes, tmp_path, split):
    document = json.loads((Path(scenes) / "dataset_scenes.json").read_text(encoding="utf-8"))
    lacking = [record for record in document["images"] if record["split"] == split][-1]
    del lacking["attributes"]
    (tmp_path / "dataset_one.json").write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / "images").symlink_to(Path(scenes) / "images")
    with pytest.raises(FastcapError, match=f"image {lacking['imgid']} must have attributes"):
        Trainer(_with(config, data=str(tmp_path), validate_every=1, **GIVEN), progress=False)


@pytest.mark.skipif(not RECIPE.is_file(), reason="reads the source tree")
def test_the_recipe_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    """Every command and every snippet, one after the other, with fewer pictures and steps."""
    monkeypatch.chdir(tmp_path)
    text = RECIPE.read_text(encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    small = {"data": ["--num-images", "60"], "train": ["--steps", "2", "--batch-size", "8", "--validate-every", "0"]}
    for command in commands.strip().splitlines():
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [*words, *small.get(words[1], [])])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capsys.readouterr().err
    assert re.search(r"^scenes/images/scene_000000.png\t", capsys.readouterr().out, re.MULTILINE)
    assert (tmp_path / "looked.png").is_file()
    assert not checkpoint.read_config(checkpoint.find("no-visual")).visual_distilling
    assert "attributes" in json.loads((tmp_path / "glied" / "log.jsonl").read_text().splitlines()[-1])
    names = {}
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(snippet, str(RECIPE), "exec"), names)
    assert names["wide"] == 600
