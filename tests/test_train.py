"""The training loop: what a step computes, checkpoints, exact resumption, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("PIL")

from fastcap import data, models
from fastcap import functional as F_cap
from fastcap.errors import FastcapError
from fastcap.objectives import OBJECTIVES
from fastcap.train import Captioner, TrainConfig, Trainer, checkpoint, objectives, train
from fastcap.train.objectives import make_loss
from fastcap.train.recipes import SETTINGS, complete
from fastcap.train.setup import learning_rate

SMALL = {"width": 16, "attention_width": 8, "batch_size": 16, "steps": 8, "warmup": 2, "validate_every": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """About 50 pictures to train on, with 5 captions each: 15 steps of 16 an epoch."""
    folder = tmp_path_factory.mktemp("scenes")
    data.write_scenes(folder, num_images=60, seed=0)
    return str(folder)


@pytest.fixture
def config(scenes, tmp_path):
    return TrainConfig(data=scenes, out=str(tmp_path / "run"), **SMALL)


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _log(config):
    with open(f"{config.out}/log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _with(config, **changes):
    return dataclasses.replace(config, **changes)


def _quiet(config, **options):
    return train(config, progress=False, **options)


def test_training_lowers_the_loss_and_leaves_a_checkpoint_that_captions(config, scenes):
    config = _with(config, steps=60, lr=5e-3, validate_every=30, validate_batches=2, keep=1)
    result = _quiet(config)
    losses = [record["loss"] for record in _log(config)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert result.step == 60 and not result.interrupted and result.loss == losses[-1]
    captioner = Captioner.load(config.out)
    view = data.KarpathyDataset(scenes, "val").images()
    (said,) = captioner(view[0]["image"].unsqueeze(0))
    assert said == captioner(view[0]["image"].unsqueeze(0), beam=1)[0] and said.split()[0] in ("a", "there")
    picture = data.KarpathyDataset(scenes, "val").records[0]["path"]
    torch.testing.assert_close(captioner.read(picture), view[0]["image"])


def test_the_log_has_one_object_per_step(config):
    config = _with(config, steps=20, validate_every=10)
    _quiet(config)
    log = _log(config)
    assert [record["step"] for record in log] == list(range(1, 21))
    assert [record["epoch"] for record in log] == [0] * 15 + [1] * 5
    usual = {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "seconds"}
    for record in log:
        assert set(record) == usual | ({"val_loss", "val_mle"} if record["step"] % 10 == 0 else set())
    if importlib.util.find_spec("tensorboard"):
        assert os.listdir(f"{config.out}/tensorboard")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_is_its_setting_of_the_subset_loss(config, objective):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 5, 8, generator=generator), torch.nn.Linear(8, 30)
    logits = head(hidden)
    target = torch.randint(4, 30, (3, 5), generator=generator)
    target[1, 3:] = -100
    loss = make_loss(_with(config, objective=objective, mle_weight=0.25), head)(hidden, target)
    mle = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    smile = F_cap.subset_cross_entropy(logits, target)
    reverse = F_cap.subset_cross_entropy(logits, target, subset="reverse")
    expected = {"mle": mle, "smile": smile, "smile+mle": 0.25 * mle + 0.75 * smile, "resmile": reverse}
    torch.testing.assert_close(loss, expected[objective])
    assert set(expected) == set(OBJECTIVES)


@pytest.mark.parametrize(
    "changes",
    [{"objective": objective} for objective in OBJECTIVES]
    + [{"coverage": 3.0, "coverage_reduction": kind} for kind in ("mean", "batchmean", "sum", "theano")]
    + [{"coverage": 3.0, "coverage_target": "length"}, {"attention": "hard"}, {"attention": "mean"}],
    ids=lambda changes: ",".join(map(str, changes.values())),
)
def test_accumulating_4_times_8_is_one_batch_of_32(scenes, tmp_path, changes, monkeypatch):
    # Of hard attention the parts draw other samples than the whole, and so another result: here alpha itself is used.
    monkeypatch.setattr(models.ShowAttendTell, "HARD", 0.0)
    gradients = []
    for accumulate in (1, 4):
        config = TrainConfig(
            data=scenes, out=str(tmp_path / str(accumulate)), dropout=0.0, clip=1e9,
            **{**SMALL, **changes, "batch_size": 32, "accumulate": accumulate},
        )  # fmt: skip
        trainer = Trainer(config, progress=False)
        trainer.model.double()  # so that only the sum's order is left to differ, by 1e-13
        batch = next(iter(trainer._loader))
        batch["images"] = batch["images"].double()
        tokens = [int((part != -100).sum()) for part in batch["target"].chunk(4)]
        assert len(tokens) == 4 and len(set(tokens)) > 1  # so a mean of means would differ
        trainer._began = time.perf_counter()
        record = trainer._train_step(0, batch)
        logged = {name: record[name] for name in ("loss", "coverage", "entropy", "baseline") if name in record}
        gradients.append((logged, [p.grad.clone() for p in trainer.model.parameters()]))
    (logged, whole), (other, parts) = gradients
    assert set(logged) - {"loss"} == ({"coverage"} if "coverage" in changes else set()) | (
        {"entropy", "baseline"} if changes.get("attention") == "hard" else set()
    )
    assert other == pytest.approx(logged, rel=1e-6)
    for one, part in zip(whole, parts, strict=True):
        torch.testing.assert_close(part, one, rtol=1e-9, atol=1e-10 * one.abs().max().item())


def test_coverage_spreads_attention_and_is_logged_beside_the_objective(config):
    logs = {}
    for weight in (0.0, 1.0):
        run = _with(config, out=f"{config.out}-{weight}", steps=40, lr=5e-3, coverage=weight)
        trainer = Trainer(run, progress=False)
        with torch.no_grad():
            trainer.model.score.weight.mul_(12)  # at first it is nearly even
        model = trainer.run().model
        batch = next(iter(trainer._loader))
        with torch.no_grad():
            _, alphas = model(batch["images"], batch["inputs"], batch["lengths"])
        least = (1 - batch["lengths"] / 36).square().mean()  # of even attention
        logs[weight] = ((1 - alphas.sum(1)).square().mean() - least).item(), _log(run)
    (spread, log), (free, plain) = logs[1.0], logs[0.0]
    assert 0 < spread < 0.3 * free
    assert "coverage" not in plain[0] and log[-1]["coverage"] < log[0]["coverage"]
    assert log[0]["loss"] == plain[0]["loss"]  # the objective alone


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_baseline_moves_once_a_step_towards_the_mean_cost_of_a_token(config, accumulate, monkeypatch):
    monkeypatch.setattr(models.ShowAttendTell, "HARD", 0.0)
    config = _with(config, attention="hard", accumulate=accumulate, dropout=0.0, steps=3)
    trainer = Trainer(config, progress=False)
    wanted = math.log(trainer.model.config.vocab_size)
    while trainer.step < 3:
        trainer._sampler.set_position(0, trainer.step)
        batch = next(iter(trainer._loader))
        with torch.no_grad():
            logits, _ = trainer.model.eval()(batch["images"], batch["inputs"], batch["lengths"])
        wanted = 0.9 * wanted + 0.1 * F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten()).item()
        trainer._began = time.perf_counter()
        record = trainer._train_step(0, batch)
        assert record["baseline"] == pytest.approx(wanted, rel=1e-5)
        assert trainer.model.baseline.item() == record["baseline"]


@pytest.mark.parametrize("changes", [{"attention": "hard"}, {"scheduled_sampling": 0.3}, {"coverage": 1.0}], ids=str)
def test_what_is_sampled_or_added_resumes_bit_for_bit(config, changes):
    config = _with(config, **changes, dropout=0.3, steps=6)
    whole = _quiet(config)
    halted = _with(config, out=config.out + "-halted")
    _quiet(halted, callbacks=[lambda trainer, record: trainer.stop() if record["step"] == 3 else None])
    torch.rand(100)
    result = _quiet(halted, resume=True)
    assert _equal(_weights(result.model), _weights(whole.model))
    assert ("baseline" in _weights(result.model)) == ("attention" in changes)


@pytest.mark.parametrize("changes", [{"attention": "hard", "variant": "tutorial"}, {"attention": "mean"}], ids=str)
def test_every_attention_trains_and_captions(config, scenes, changes):
    config = _with(config, **changes, steps=60, lr=5e-3, validate_every=60, validate_batches=2)
    result = _quiet(config)
    log = _log(config)
    losses = [record["loss"] for record in log]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert result.val_loss == pytest.approx(result.val_mle)  # the objective alone
    assert result.model.config.attention == changes["attention"] and result.config.variant is not None
    (said,) = Captioner.load(config.out)(data.KarpathyDataset(scenes, "val").images()[0]["image"].unsqueeze(0))
    assert said.split()[0] in ("a", "there")
    second = _with(config, out=config.out + "-on", init_from=config.out, attention=None, variant=None, steps=1)
    assert Trainer(second, progress=False).config.attention == changes["attention"]


def test_a_checkpoint_of_before_hard_attention_goes_on_bit_for_bit(config):
    whole = _quiet(config)
    halted = _with(config, out=config.out + "-halted")
    first = _quiet(halted, callbacks=[lambda trainer, record: trainer.stop() if record["step"] == 3 else None])
    new = ("attention", "variant", "coverage", "coverage_reduction", "coverage_target", "scheduled_sampling", "features")
    _changed("trainer.json", lambda state: _without(state, "config", new))(first.checkpoint)
    _changed("model.json", lambda model: _without({"": model}, "", ("attention", "activation", "gate", "output"))[""])(
        first.checkpoint
    )
    assert _equal(_weights(_quiet(halted, resume=True).model), _weights(whole.model))
    run = Trainer(_with(config, out=config.out + "-from", init_from=halted.out, coverage=1.0), progress=False)
    assert (run.config.attention, run.config.variant) == ("soft", "original")


def _without(state, name, removed):
    return {**state, name: {key: value for key, value in state[name].items() if key not in removed}}


def _write_features(folder, scenes, width=10):
    """Features of 2 to 4 regions for every picture, by its imgid."""
    import numpy as np

    folder.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for record in data.KarpathyDataset(scenes, split).records:
            R = int(generator.integers(2, 5))
            np.save(folder / f"{record['imgid']}.npy", generator.standard_normal((R, width), dtype=np.float32))
    return str(folder)


@pytest.mark.parametrize("model", ["show-attend-tell", "show-and-tell"])
def test_features_of_regions_stand_in_for_pictures(config, scenes, tmp_path, model):
    features = _write_features(tmp_path / "features", scenes)
    options = {"coverage": 1.0} if model == "show-attend-tell" else {"attention_width": None}
    config = _with(config, features=features, model=model, validate_every=4, validate_batches=2, **options)
    result = _quiet(config)
    assert isinstance(result.model.encoder, models.FeatureEncoder) and math.isfinite(result.val_loss)
    assert result.model.encoder.config == {"kind": "features", "width_in": 10, "width": 16} and result.config.encoder is None
    moved = tmp_path / "moved"
    (tmp_path / "features").rename(moved)
    assert _quiet(_with(config, features=str(moved)), resume=True).step == result.step
    tuned = _with(config, out=config.out + "-on", init_from=config.out, features=None)
    with pytest.raises(FastcapError, match="features must be given: the model reads features of regions, got None; give"):
        Trainer(tuned, progress=False)
    Trainer(_with(tuned, features=str(moved)), progress=False)
    pictures = _with(config, out=config.out + "-pictures", features=None, coverage=0.0, steps=1)
    _quiet(pictures)
    with pytest.raises(FastcapError, match="features must be left out: the model reads pictures, got .*; give the run"):
        _quiet(_with(pictures, features=str(moved)), resume=True)


def test_accumulating_regions_of_other_numbers_is_one_batch(config, scenes, tmp_path):
    features, gradients = _write_features(tmp_path / "features", scenes), []
    for accumulate in (1, 4):
        run = _with(config, features=features, coverage=2.0, dropout=0.0, accumulate=accumulate, clip=1e9)
        trainer = Trainer(run, progress=False)
        trainer.model.double()
        batch = next(iter(trainer._loader))
        batch["images"] = batch["images"].double()
        trainer._began = time.perf_counter()
        record = trainer._train_step(0, batch)
        gradients.append((record["coverage"], [p.grad.clone() for p in trainer.model.parameters()]))
    assert gradients[1][0] == pytest.approx(gradients[0][0], rel=1e-9)
    for one, part in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(part, one, rtol=1e-9, atol=1e-10 * one.abs().max().item())


def test_hard_attention_takes_no_loss_of_ones_own(config):
    with pytest.raises(FastcapError, match="loss_fn must be left out with hard attention, which needs the loss of each"):
        Trainer(_with(config, attention="hard"), progress=False, loss_fn=lambda logits, target: logits.mean())


def test_coverage_and_scheduled_sampling_go_with_a_loss_of_ones_own(config):
    def loss_fn(logits, target):
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    changes = {"coverage": 1.0, "scheduled_sampling": 0.3, "steps": 4}
    own, ours = _with(config, **changes), _with(config, **changes, out=config.out + "-ours")
    _quiet(own, loss_fn=loss_fn)
    _quiet(ours)
    kept = ("loss", "coverage", "grad_norm")
    for one, other in zip(_log(own), _log(ours), strict=True):
        assert [one[name] for name in kept] == pytest.approx([other[name] for name in kept], rel=1e-3)


def test_the_help_offers_what_attention_can_be(monkeypatch):
    testing = pytest.importorskip("typer.testing")
    from fastcap.cli import app

    monkeypatch.setenv("COLUMNS", "200")
    text = testing.CliRunner().invoke(app(), ["train", "--help"]).output
    for option in (
        "attention",
        "variant",
        "coverage",
        "coverage-reduction",
        "coverage-target",
        "scheduled-sampling",
        "features",
    ):
        assert f"--{option} " in text


def test_the_validation_loss_is_the_mean_over_all_its_tokens(config):
    losses = []
    for batch_size in (4, 64):
        changes = {
            "batch_size": batch_size,
            "validate_batches": 64,
            "validate_every": 1,
            "out": f"{config.out}{batch_size}",
        }
        losses.append(Trainer(_with(config, objective="mle", **changes), progress=False).validate())
    assert losses[0]["val_loss"] == pytest.approx(losses[1]["val_loss"], rel=1e-5)
    assert losses[0]["val_mle"] == pytest.approx(losses[0]["val_loss"], rel=1e-6)


def test_the_learning_rate_rises_and_falls(config):
    config = _with(config, steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0 and rates[9:] == sorted(rates[9:], reverse=True) and 0 < rates[-1] < 0.001
    assert learning_rate(_with(config, warmup=0), 1) == 1.0
    assert learning_rate(_with(config, warmup=500), 100) == pytest.approx(0.2)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_in_the_middle_of_an_epoch_and_resumed_is_bitwise_uninterrupted(config, workers):
    config = _with(config, steps=20, dropout=0.3, workers=workers)  # 15 steps an epoch
    whole = _quiet(config)
    halted = _with(config, out=config.out + "-halted")

    def stop(trainer, record):
        if record["step"] in (6, 17):
            trainer.stop()

    first = _quiet(halted, callbacks=[stop])
    assert first.interrupted and first.step == 6
    torch.rand(1000)  # whatever else happens between
    second = _quiet(halted, resume=True, callbacks=[stop])
    assert second.interrupted and second.step == 17
    third = _quiet(halted, resume=True)
    assert third.step == 20 and not third.interrupted
    assert _equal(_weights(third.model), _weights(whole.model))
    kept = ("step", "epoch", "loss", "lr", "grad_norm")
    assert [[r[k] for k in kept] for r in _log(halted)] == [[r[k] for k in kept] for r in _log(config)]


def test_resuming_after_a_crash_repeats_the_lost_steps_and_logs_each_once(config):
    config = _with(config, steps=12, checkpoint_every=4, dropout=0.3)
    whole = _quiet(config)
    crashed = _with(config, out=config.out + "-crashed")

    def crash(trainer, record):
        if record["step"] == 7:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        _quiet(crashed, callbacks=[crash])
    assert [record["step"] for record in _log(crashed)] == list(range(1, 8))
    with open(f"{crashed.out}/log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # cut short
    result = _quiet(crashed, resume=True)
    assert _equal(_weights(result.model), _weights(whole.model))
    assert [record["step"] for record in _log(crashed)] == list(range(1, 13))


def test_every_random_generator_is_restored():
    import random

    import numpy as np

    state = json.loads(json.dumps(checkpoint.random_state()))
    drawn = [(random.gauss(0, 1), np.random.randn(), torch.rand(1).item()) for _ in range(3)]
    checkpoint.set_random_state(state)
    assert drawn == [(random.gauss(0, 1), np.random.randn(), torch.rand(1).item()) for _ in range(3)]


def test_ctrl_c_saves_a_checkpoint_to_resume_from_bit_for_bit(config):
    config = _with(config, steps=300, dropout=0.3, workers=1)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.to_dict().items() if value is not None]
    command = [sys.executable, "-c", "from fastcap.cli import main; main()", "train"]
    environment, work = {**os.environ, "OMP_NUM_THREADS": "1"}, os.path.dirname(config.out)
    process = subprocess.Popen(
        [*command, *options], env=environment, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not (os.path.exists(f"{config.out}/log.jsonl") and len(_log_lines(config)) > 3):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the worker gets it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "SIGINT: finishing step" in err
    assert f"go on with: fastcap train --out {config.out} --resume" in out
    stopped = len(_log_lines(config))
    assert 3 < stopped < 300
    resumed = subprocess.run(
        [*command, "--out", config.out, "--resume"], env=environment, cwd=work, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed at step {stopped} of 300" in resumed.stderr
    assert [record["step"] for record in _log(config)] == list(range(1, 301))
    whole = _quiet(_with(config, out=config.out + "-whole", workers=0))
    assert _equal(_weights(models.load(checkpoint.find(config.out))), _weights(whole.model))


def _log_lines(config):
    with open(f"{config.out}/log.jsonl", encoding="utf-8") as file:
        return file.readlines()


def test_a_checkpoint_is_complete_and_holds_no_pickle(config, tmp_path):
    result = _quiet(config)
    files = sorted(file.name for file in result.checkpoint.iterdir())
    assert files == ["model.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "trainer.json"]
    moved = result.checkpoint.rename(tmp_path / "elsewhere")
    captioner = Captioner.load(moved)
    assert _equal(_weights(captioner.model), _weights(result.model))
    assert captioner.tokenizer.vocab_size == result.tokenizer.vocab_size


def _changed(name, change):
    """Of a JSON file `name` in a folder."""

    def apply(folder):
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return apply


def _cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_changed("trainer.json", lambda state: {}), r"hold a whole trainer.json, .* \(it lacks step, .*; use an earlier"),
        (_changed("trainer.json", lambda state: []), r"hold a whole trainer.json, .* \(it lacks everything\)'; use an"),
        (_changed("trainer.json", lambda state: {**state, "config": 3}), r"hold a whole .* lacks settings in config\)"),
        (_cut("trainer.json"), r"hold a whole trainer.json, got .*; use an earlier checkpoint"),
        (
            _changed("trainer.json", lambda state: {**state, "config": {**state["config"], "new_thing": 1}}),
            r"have settings that this fastcap knows, got '.* \(new_thing\)'; use the newer fastcap that wrote it",
        ),
        (_cut("optimizer.safetensors"), "hold a whole optimizer.safetensors, got .*; use an earlier checkpoint, or start"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_not_resumed(config, spoil, message):
    spoil(_quiet(_with(config, steps=1)).checkpoint)
    with pytest.raises(FastcapError, match=f"fastcap.train: checkpoint must {message}"):
        _quiet(_with(config, steps=1), resume=True)


def test_only_the_newest_checkpoints_are_kept_and_last_points_to_one(config):
    config = _with(config, checkpoint_every=2, keep=2)
    result = _quiet(config)
    folder = result.checkpoint.parent
    assert sorted(file.name for file in folder.iterdir()) == ["last", "step-00000006", "step-00000008"]
    assert checkpoint.find(config.out) == result.checkpoint == folder / "step-00000008"


def test_a_checkpoint_that_was_not_finished_does_not_count(config, monkeypatch):
    config = _with(config, checkpoint_every=4)

    def torn(*args):
        if len(saved) == 1:
            raise OSError("disk full")
        saved.append(args)
        return real(*args)

    real, saved = checkpoint._save_optimizer, []
    monkeypatch.setattr(checkpoint, "_save_optimizer", torn)
    with pytest.raises(OSError):
        _quiet(config)
    assert checkpoint.find(config.out).name == "step-00000004"
    monkeypatch.undo()
    assert _quiet(config, resume=True).step == 8
    assert not list(checkpoint.find(config.out).parent.glob(".*"))


def test_init_from_starts_with_the_weights_and_words_of_a_checkpoint(config):
    first = _quiet(config)
    second = _with(config, out=config.out + "-smile", objective="smile", init_from=config.out, width=999)
    trainer = Trainer(second, progress=False)
    assert _equal(_weights(trainer.model), _weights(first.model))
    assert trainer.step == 0 and not trainer.optimizer.state
    assert trainer.config.width == 16
    trainer.run()
    assert Captioner.load(second.out).tokenizer.vocab_size == first.tokenizer.vocab_size
    assert _quiet(second, resume=True).step == 8  # finished: nothing left to do


def test_another_loss_can_stand_in(config):
    shapes = []

    def loss_fn(logits, target):
        shapes.append((logits.shape[:2], target.shape))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    replaced = _quiet(_with(config, objective="smile"), loss_fn=loss_fn)
    assert len(shapes) == 8 and all(one == other for one, other in shapes)
    plain = _quiet(_with(config, out=config.out + "-mle", objective="mle"))
    assert replaced.loss == pytest.approx(plain.loss, rel=1e-4)


@pytest.mark.parametrize("own_loss", [False, True])
def test_the_head_runs_for_a_loss_of_ones_own_and_for_no_other(config, own_loss):
    loss_fn = (lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten())) if own_loss else None
    trainer = Trainer(_with(config, steps=2, validate_every=1, validate_batches=1), progress=False, loss_fn=loss_fn)
    calls = []
    trainer.model.head.register_forward_hook(lambda *_: calls.append(1))
    assert math.isfinite(trainer.run().val_mle) and len(calls) == (4 if own_loss else 0)


def test_label_smoothing_is_part_of_mle_alone(config):
    hidden, head = torch.randn(3, 5, 8), torch.nn.Linear(8, 30)
    target = torch.randint(4, 30, (3, 5))
    loss = make_loss(_with(config, label_smoothing=0.1), head)(hidden, target)
    expected = F.cross_entropy(head(hidden).flatten(0, 1), target.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    for objective in ("smile", "smile+mle", "resmile"):
        with pytest.raises(FastcapError, match=f"label_smoothing must be 0 with objective {re.escape(objective)}, got 0.1"):
            complete(_with(config, objective=objective, label_smoothing=0.1))


def test_a_run_writes_down_what_it_was_not_told(config):
    result = _quiet(_with(config, width=None))
    saved = checkpoint.read_config(result.checkpoint)
    assert saved == result.config and (saved.width, saved.lr, saved.label_smoothing) == (256, 2e-3, 0.0)
    assert saved.prompt is None and saved.pretrained is None  # blip's


def test_a_configuration_from_before_blip_can_still_be_read(config):
    result = _quiet(config)
    file = result.checkpoint / "trainer.json"
    state = json.loads(file.read_text())
    for name in ("pretrained", "prompt"):
        del state["config"][name]
    file.write_text(json.dumps(state))
    assert _quiet(config, resume=True).step == result.step


def test_a_run_from_before_memory_budgets_goes_on_bit_for_bit(config):
    whole = _quiet(config)
    halted = _with(config, out=config.out + "-halted")
    first = _quiet(halted, callbacks=[lambda trainer, record: trainer.stop() if record["step"] == 3 else None])
    file = first.checkpoint / "trainer.json"
    state = json.loads(file.read_text())
    del state["config"]["memory_budget"]
    state["config"]["mle_weight"] = 0.01  # then its default with every objective
    file.write_text(json.dumps(state))
    assert _equal(_weights(_quiet(halted, resume=True).model), _weights(whole.model))


@pytest.mark.parametrize("objective", ["mle", "smile", "resmile"])
def test_the_weight_of_mle_is_part_of_the_mixture_alone(config, objective):
    with pytest.raises(FastcapError) as caught:
        complete(_with(config, objective=objective, mle_weight=0.5))
    assert str(caught.value) == (
        f"fastcap.train: mle_weight must be 0 with objective {objective}, got 0.5; "
        "leave it out, or pass --objective smile+mle"
    )
    assert complete(_with(config, objective=objective)).mle_weight is None
    for given, ran in ((None, 0.01), (0.5, 0.5), (0, 0)):
        assert complete(_with(config, objective="smile+mle", mle_weight=given)).mle_weight == ran


def test_one_pass_validates_mle_and_two_any_other_objective(config, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return F_cap.linear_subset_cross_entropy(*args, **options)

    monkeypatch.setattr(objectives, "linear_subset_cross_entropy", counted)
    config = _with(config, validate_every=1, validate_batches=1, memory_budget=0.5)
    for changes, passes in (({}, 1), ({"label_smoothing": 0.1}, 2), ({"objective": "smile"}, 2)):
        calls.clear()
        trainer = Trainer(_with(config, **changes), progress=False)
        losses = trainer.validate()
        assert len(calls) == passes and all(options["memory_budget"] == 1 << 19 for options in calls)
        assert (losses["val_loss"] == losses["val_mle"]) == (passes == 1)


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_a_setting_has_one_default_or_one_in_the_recipes(field):
    usually_none = ("pretrained", "init_from", "mle_weight", "features", "reward_clip", "reward_scale", "df", "samples")
    usually_none += ("mle_lr", "mle_warmup")  # those of a run by likelihood
    assert (field.default is None) == (field.name in (*SETTINGS, *usually_none))


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "hard", "coverage": 1.0, "variant": "tutorial"}, {"scheduled_sampling": 0.5}], ids=str
)
def test_bf16_trains_on_the_cpu(config, changes):
    result = _quiet(_with(config, **changes, precision="bf16", validate_every=8, validate_batches=1))
    assert result.val_mle == pytest.approx(result.val_loss, rel=1e-6)
    assert math.isfinite(result.loss) and next(result.model.parameters()).dtype == torch.float32


def test_a_backbone_trains_and_its_checkpoint_needs_it_no_more(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    config = _with(config, encoder=str(tmp_path / "vit"), steps=3)
    frozen = _weights(models.BackboneEncoder(str(tmp_path / "vit")))
    result = _quiet(config)
    (tmp_path / "vit").rename(tmp_path / "gone")
    assert _equal(_weights(Captioner.load(config.out).model.encoder), frozen)
    assert _quiet(config, resume=True).step == result.step


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_change(config):
    def loss_fn(logits, target):
        return logits.mean() * (math.nan if len(_log(config)) == 5 else 1.0)

    with pytest.raises(FastcapError) as caught:
        _quiet(_with(config, checkpoint_every=4), loss_fn=loss_fn)
    text = str(caught.value)
    assert text.startswith("fastcap.train: loss of step 6 must be finite, got nan; lower --lr (it was ")
    assert text.endswith("the last checkpoint is " + str(checkpoint.find(config.out)))
    assert len(_log(config)) == 5


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(config):
    trainer = Trainer(config, progress=False, loss_fn=lambda logits, target: (logits * 0).sum().sqrt())
    before = _weights(trainer.model)
    with pytest.raises(FastcapError, match="grad_norm of step 1 must be finite, got nan; lower --lr"):
        trainer.run()
    assert _equal(_weights(trainer.model), before)


def test_a_folder_that_holds_a_run_is_not_overwritten(config):
    result = _quiet(config)
    before = _log(config)
    with pytest.raises(FastcapError) as caught:
        _quiet(config)
    assert str(caught.value) == (
        f"fastcap.train: out must be a new folder, got {config.out!r}; "
        f"it holds a run at {result.checkpoint.name}: add --resume to go on with it, or name another folder"
    )
    assert _log(config) == before


def test_resuming_with_other_settings_or_data_is_refused(config, tmp_path):
    _quiet(config)
    with pytest.raises(FastcapError, match="lr must stay 0.002, as the run began, got 0.5; leave it out"):
        _quiet(_with(config, lr=0.5), resume=True)
    with pytest.raises(FastcapError, match="memory_budget must stay 256.0, as the run began, got 0; leave it out"):
        _quiet(_with(config, memory_budget=0), resume=True)
    data.write_scenes(tmp_path / "other", num_images=40, seed=1)
    with pytest.raises(FastcapError, match="data must hold the .* captions that the run began with"):
        _quiet(_with(config, data=str(tmp_path / "other")), resume=True)
    with pytest.raises(FastcapError, match="out must hold a checkpoint to resume, got .*; start a new run without"):
        _quiet(_with(config, out=str(tmp_path / "empty")), resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"objective": "rl"},
            "objective must be one of 'mle', 'smile', 'smile+mle', 'resmile', 'wtf-rl', 'scst', 'new-scst', got 'rl'",
        ),
        ({"model": "vit"}, "model must be one of 'show-attend-tell', 'show-and-tell', 'glied', 'blip', 'clip', 'base', go"),
        ({"precision": "int8"}, "precision must be one of 'fp32', 'bf16', 'fp16', got 'int8'; pass precision='fp32'"),
        ({"steps": 0}, "steps must be at least 1, got 0; pass steps=1 or more"),
        ({"steps": 1.5}, "steps must be an integer, got 1.5; pass an integer"),
        ({"steps": True}, "steps must be an integer, got True; pass an integer"),
        ({"lr": -1.0}, "lr must be positive and finite, got -1.0; pass lr=0.002"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan; pass lr=0.002"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0; pass a share such as dropout=0.1"),
        ({"memory_budget": -1}, "memory_budget must be in [0, 1073741824] MB, got -1; pass memory_budget=256, or 0 for"),
        ({"memory_budget": math.inf}, "memory_budget must be in [0, 1073741824] MB, got inf; pass memory_budget=256"),
        ({"accumulate": 17}, "accumulate must be at most batch_size=16, got 17; pass a smaller number"),
        ({"warmup": -1}, "warmup must be at least 0, got -1; pass warmup=0 or more"),
        ({"data": ""}, "data must not be empty, got ''; pass --data"),
        ({"attention": "none"}, "attention must be one of 'soft', 'hard', 'mean', got 'none'; pass attention='soft'"),
        ({"variant": "new"}, "variant must be one of 'original', 'tutorial', got 'new'; pass variant='original'"),
        ({"coverage": -1.0}, "coverage must be at least 0 and finite, got -1.0; pass coverage=1.0, or 0 for none"),
        ({"coverage": math.nan}, "coverage must be at least 0 and finite, got nan; pass coverage=1.0, or 0 for none"),
        ({"coverage_reduction": "max"}, "coverage_reduction must be one of 'mean', 'batchmean', 'sum', 'theano', got 'max'"),
        (
            {"coverage_target": "all"},
            "coverage_target must be a finite number or 'length', got 'all'; pass coverage_target='1'",
        ),
        ({"coverage_target": "inf"}, "coverage_target must be a finite number or 'length', got 'inf'; pass coverage_tar"),
        ({"coverage_target": 1.0}, "coverage_target must be a string, got 1.0; pass a string"),
        ({"scheduled_sampling": 1.5}, "scheduled_sampling must be in [0, 1], got 1.5; pass scheduled_sampling=0.25, or 0"),
        ({"init_from": 3}, "init_from must be a string, got 3; pass a string"),
    ],
)
def test_bad_settings_are_named(config, change, message):
    with pytest.raises(FastcapError) as caught:
        _with(config, **change)
    assert str(caught.value).startswith(f"fastcap.train: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "precision must be 'fp32' or 'bf16' on cpu, got 'fp16'; pass --precision bf16"),
        ({"device": "abacus"}, "device must be one that torch can use here, got 'abacus'; pass --device auto, or cpu"),
        ({"prompt": "a"}, "prompt must be left out with show-attend-tell, got 'a'; that model has no such setting to"),
        ({"pretrained": "a"}, "pretrained must be left out with show-attend-tell, got 'a'; or pass --model blip"),
        (
            {"model": "show-and-tell", "attention_width": None, "attention": "soft"},
            "attention must be left out with show-and-tell, got 'soft'; that model has no such setting to choose",
        ),
        (
            {"model": "blip", "pretrained": "none", "attention_width": None, "variant": "tutorial"},
            "variant must be left out with blip, got 'tutorial'; that model has no such setting to choose",
        ),
        (
            {"model": "show-and-tell", "attention_width": None, "coverage": 1.0},
            "coverage must be 0 with show-and-tell, got 1.0; or pass --model show-attend-tell",
        ),
        (
            {"attention": "mean", "coverage": 1.0},
            "coverage must be 0 with mean attention, which it cannot change, got 1.0; leave it out, or train soft attention",
        ),
        (
            {"model": "blip", "pretrained": "none", "attention_width": None, "scheduled_sampling": 0.5},
            "scheduled_sampling must be 0 with blip, got 0.5; or pass --model show-attend-tell",
        ),
        (
            {"model": "blip", "pretrained": "none", "attention_width": None, "features": "regions"},
            "features must be left out with blip, got 'regions'; or pass --model show-attend-tell",
        ),
        (
            {"features": "regions", "encoder": "conv"},
            "encoder must be left out with features, got 'conv'; the features come from an encoder that ran before",
        ),
        ({"init_from": "nowhere"}, "checkpoint must be a checkpoint or the folder of a run, got 'nowhere'"),
    ],
)
def test_what_cannot_run_here_is_refused_before_anything_is_written(config, change, message):
    with pytest.raises(FastcapError) as caught:
        _quiet(_with(config, **{"device": "cpu", **change}))
    assert str(caught.value).startswith(f"fastcap.train: {message}")
    assert not os.path.exists(config.out)


def test_data_without_a_validation_split_trains_only_without_validation(config, scenes, tmp_path):
    (file,) = (f for f in os.listdir(scenes) if f.endswith(".json"))
    with open(f"{scenes}/{file}", encoding="utf-8") as handle:
        document = json.load(handle)
    document["images"] = [image for image in document["images"] if image["split"] == "train"]
    for image in document["images"]:
        image["filepath"] = f"{scenes}/images"
    (tmp_path / "dataset_part.json").write_text(json.dumps(document))
    config = _with(config, data=str(tmp_path), steps=2)
    with pytest.raises(FastcapError, match="or train without validation: --validate-every 0"):
        _quiet(_with(config, validate_every=1))
    assert _quiet(config).val_loss is None
