"""The demo's story of attention: what it trains on, what it keeps, and what it concludes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from fastcap import cli, data
from fastcap.errors import FastcapError
from fastcap.train import demo_attention as demo
from fastcap.train import demo_runs, loop

pytestmark = pytest.mark.usefixtures("one_thread")


def _small(monkeypatch):
    """Six captioners of 40 pictures and two steps, from two seeds."""
    monkeypatch.setattr(demo, "NUM_SCENES", 40)
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "SEEDS", 2)
    monkeypatch.setattr(demo, "DRAWN", 1)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The story, told once: where, and what came out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        _small(patch)
        made = demo.run(out)
    torch.set_num_threads(threads)
    return out, made


def test_thorough_captions_say_all_there_is_and_only_what_is_true(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NUM_SCENES", 40)
    assert demo.write_thorough_scenes(tmp_path) == 40
    document = json.loads((tmp_path / "dataset_scenes.json").read_text())
    for i in range(5):
        captions = [image["sentences"][i]["raw"] for image in document["images"]]
        scores = data.score_captions(captions, [image["facts"] for image in document["images"]])
        assert scores["fact_precision"] == scores["fact_recall"] == 1.0
        assert max(len(data.words(caption)) for caption in captions) <= demo.MAX_LENGTH
    first = [image["sentences"] for image in document["images"]]
    assert any(len({sentence["raw"] for sentence in five}) > 1 for five in first)  # in other words, or another order
    assert all(sentence["tokens"] == data.words(sentence["raw"]) for five in first for sentence in five)
    demo.write_thorough_scenes(tmp_path)
    assert json.loads((tmp_path / "dataset_scenes.json").read_text()) == document


def test_every_variant_is_trained_from_every_seed_with_its_own_settings(told):
    from fastcap.train import checkpoint

    out, made = told
    assert made.seeds == [0, 1] and set(made.scores) == set(demo.VARIANTS)
    for name, (_, settings) in demo.VARIANTS.items():
        for seed in made.seeds:
            config = checkpoint.read_config(checkpoint.find(out / "attention" / f"{name}-{seed}"))
            assert config.seed == seed and config.objective == "mle" and config.steps == 2
            assert {key: getattr(config, key) for key in settings} == settings
            assert config.coverage == settings.get("coverage", 0.0)


def test_scores_are_of_the_right_runs(told):
    """No attention has no R; of all locations alike it is the least that the captions' lengths allow."""
    out, made = told
    pairs = data.KarpathyDataset(out / "attention" / "scenes", split="val")
    steps = torch.tensor([len(data.words(caption)) + 1.0 for caption in pairs.captions()])
    least = (36 * (1 - steps / 36) ** 2).mean().item()
    for scores in made.scores["mean"]:
        assert scores["coverage"] == pytest.approx(least, rel=1e-5)
    assert all(scores["coverage"] is None for scores in made.scores["show-and-tell"])
    for name in ("soft", "hard", "coverage", "coverage-batchmean"):
        assert all(scores["coverage"] > least for scores in made.scores[name])
    for seeds in made.scores.values():
        assert seeds[0]["val_ce"] != seeds[1]["val_ce"]


def test_validation_loss_is_the_mean_over_words(told):
    """Against torch's cross_entropy caption by caption, without padding."""
    from fastcap.train import Captioner

    out, made = told
    captioner = Captioner.load(out / "attention" / "soft-0")
    pairs = data.KarpathyDataset(out / "attention" / "scenes", split="val")
    losses = []
    with torch.no_grad():
        for item in (pairs[i] for i in range(len(pairs))):
            ids = captioner.tokenizer.encode(item["caption"])
            inputs, target = torch.tensor([[1, *ids]]), torch.tensor([*ids, 2])
            logits = captioner.model(item["image"][None], inputs)[0][0]
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    assert made.scores["soft"][0]["val_ce"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_numbers_and_picture_lie_beside_the_runs(told):
    out, made = told
    kept = json.loads((out / "attention" / "attention.json").read_text())
    assert kept["scores"] == made.scores and kept["steps"] == 2 and kept["seeds"] == [0, 1]
    assert [trend["verdict"] for trend in kept["trends"]] == [trend.verdict for trend in made.trends]
    assert (out / "attention" / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_trained_again(told, monkeypatch, capsys):
    out, made = told
    _small(monkeypatch)
    monkeypatch.setattr(demo_runs, "train", lambda *_, **__: pytest.fail("trained again"))
    again = demo.run(out)
    assert again.scores == made.scores
    assert capsys.readouterr().out.count("as an earlier demo left it") == 12


def test_an_interrupted_demo_goes_on_where_it_was(told, monkeypatch, tmp_path):
    _small(monkeypatch)
    monkeypatch.setattr(demo, "VARIANTS", {name: demo.VARIANTS[name] for name in ("soft", "mean", "coverage")})
    monkeypatch.setattr(demo, "EXPECTED", ())
    monkeypatch.setattr(demo, "_draw", lambda *_: None)
    begun = []

    def interrupt(config, **options):
        """Ctrl-C after the first step of the second run."""
        begun.append((Path(config.out).name, options.get("resume", False)))
        stop = [lambda trainer, record: trainer.stop("SIGINT")] if len(begun) == 2 else []
        return loop.train(config, callbacks=stop, **options)

    monkeypatch.setattr(demo_runs, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path)
    made = demo.run(tmp_path)
    assert begun[:3] == [("soft-0", False), ("mean-0", False), ("mean-0", True)] and len(begun) == 7
    assert made.scores == {name: told[1].scores[name] for name in made.scores}  # as if it had never stopped


def test_another_length_is_another_run(told, monkeypatch, tmp_path):
    _small(monkeypatch)
    monkeypatch.setattr(demo, "SEEDS", 1)
    monkeypatch.setattr(demo, "VARIANTS", {name: demo.VARIANTS[name] for name in ("soft", "coverage")})
    monkeypatch.setattr(demo, "EXPECTED", ())
    monkeypatch.setattr(demo, "_draw", lambda *_: None)
    demo.run(tmp_path)
    assert demo.run(tmp_path, scale=1.5).steps == 3
    assert [path.name for path in (tmp_path / "attention" / "soft-0" / "checkpoints").glob("step-*")] == ["step-00000003"]


def test_a_run_that_no_demo_made_is_left_alone(monkeypatch, tmp_path):
    _small(monkeypatch)
    own = tmp_path / "attention" / "show-and-tell-0"
    own.mkdir(parents=True)
    (own / "log.jsonl").write_text("{}")
    with pytest.raises(FastcapError, match="out must hold nothing but an earlier demo"):
        demo.run(tmp_path)
    assert (own / "log.jsonl").read_text() == "{}"


def _scores(**by_variant):
    """Two seeds of each variant, alike but for what is given as variant=(score, first, second)."""
    base = {"val_ce": 1.0, "coverage": 10.0, "oracle_r1": 0.5}
    scores = {name: [dict(base), dict(base)] for name in demo.VARIANTS}
    for variant, (score, *values) in by_variant.items():
        for one, value in zip(scores[variant.replace("_", "-")], values, strict=True):
            one[score] = value
    return scores


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.9, 0.8), "holds in 2 of 2 seeds"),
        ((1.05, 0.8), "holds on average, in 1 of 2 seeds"),
        ((0.99, 1.1), "DOES NOT HOLD on average, in 1 of 2 seeds it does"),
        ((1.0, 1.1), "DOES NOT HOLD, in no seed"),
    ],
)
def test_the_verdict_follows_the_numbers(values, verdict):
    found = {trend.expected: trend for trend in demo.trends(_scores(soft=("val_ce", *values)), demo.EXPECTED)}
    trend = found["soft has less loss than Show and Tell"]
    assert trend.verdict == verdict and trend.mean == pytest.approx(sum(values) / 2) and trend.other_mean == 1.0


def test_equal_recall_is_not_lower():
    found = {trend.expected: trend for trend in demo.trends(_scores(), demo.EXPECTED)}
    assert found["coverage does not lower the R@1 of soft"].holds
    assert not found["coverage spreads attention: less R than soft"].holds
    lower = {trend.expected: trend for trend in demo.trends(_scores(coverage=("oracle_r1", 0.5, 0.4)), demo.EXPECTED)}
    assert not lower["coverage does not lower the R@1 of soft"].holds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--story", "smiles"],
            "fastcap.demo: story must be one of 'smile', 'attention', 'distinctive', 'glied', got 'smiles';",
        ),
        (["--story", "attention", "--data", "emoji"], "fastcap.demo: data must be scenes for the story of attention, got"),
        (["--story", "attention", "--scale", "0"], "fastcap.demo: scale must be in (0, 100], got 0.0; pass 1"),
        (["--scale", "0"], "fastcap.demo: scale must be in (0, 100], got 0.0; pass 1"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["fastcap", "demo", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith(message) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["fastcap", "demo", "--story", "attention", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "fastcap: the demo was interrupted; the same command goes on with it\n"
