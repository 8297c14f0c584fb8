"""The demo's story of GLIED: what it trains on what, what it keeps, and what it concludes."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from fastcap import cli, data, models
from fastcap.errors import FastcapError
from fastcap.eval import Captioned, measure
from fastcap.models.glied import matching_width
from fastcap.train import Captioner, checkpoint, demo_runs, demo_tables, loop
from fastcap.train import demo_glied as demo
from fastcap.train import demo_glied_report as report

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = (*demo.MLE, *demo.RL)


def _small(monkeypatch):
    """Everything from 40 pictures, one seed and two or three steps."""
    for name, value in {
        "NUM_SCENES": 40,
        "SEEDS": 1,
        "STEPS": {"mle": 3, "before": 3, "after": 2},
        "BATCH": 16,
        "VALIDATED": 20,
    }.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo.data, "write_scene_regions", functools.partial(data.write_scene_regions, steps=3))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The story, told once by the command: where, and what is in its JSON."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        _small(patch)
        patch.setattr(sys, "argv", ["fastcap", "demo", "--story", "glied", "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    torch.set_num_threads(threads)
    assert ended.value.code in (0, None)
    return out / "glied", json.loads((out / "glied" / "glied.json").read_text())


def _config(out: Path, name: str):
    return checkpoint.read_config(checkpoint.find(out / f"{name}-0"))


def _parts(out: Path, name: str):
    return {key.split(".")[0] for key, _ in models.load(checkpoint.find(out / f"{name}-0")).named_parameters()}


def test_each_run_has_the_settings_of_its_row(told):
    out, made = told
    assert made["seeds"] == [0] and tuple(made["scores"]) == ALL and made["steps"] == {"mle": 3, "before": 3, "after": 2}
    for name, (_, settings) in demo.MLE.items():
        config = _config(out, name)
        assert {key: getattr(config, key) for key in settings} == settings
        assert (config.objective, config.attributes, config.steps, config.seed) == ("mle", "given", 3, 0)
        assert Path(config.data) == out / "scenes-thorough" and config.max_length == demo.MAX_LENGTH
        assert Path(config.features) == out / "scenes-thorough" / "regions.npz"
    assert _config(out, "before").model == "glied" and _config(out, "before").objective == "mle"
    for name in demo.RL:
        assert Path(_config(out, name).data) == out / "scenes"
    for name, objective in (("scst", "scst"), ("new-scst", "new-scst"), ("more", "mle")):
        config = _config(out, name)
        assert (config.objective, config.steps, config.rewards) == (objective, 2, "cider-d")
        assert Path(config.init_from) == checkpoint.find(out / "before-0")


def test_both_kinds_of_captions_are_of_the_same_pictures_seen_through_other_noise(told):
    out, _ = told
    thorough, own = (json.loads((out / name / "dataset_scenes.json").read_text()) for name in ("scenes-thorough", "scenes"))
    assert thorough["regions"] == {**own["regions"], "noise": 0.4} and own["regions"]["noise"] == 0.1
    for one, two in zip(thorough["images"], own["images"], strict=True):
        assert one["filename"] == two["filename"] and one["facts"] == two["facts"]
        assert sum(len(s["tokens"]) for s in one["sentences"]) > sum(len(s["tokens"]) for s in two["sentences"])
    names = [one["filename"] for one in own["images"]]
    pictures = [[(out / name / "images" / file).read_bytes() for file in names] for name in ("scenes-thorough", "scenes")]
    assert pictures[0] == pictures[1]


def test_an_ablation_lacks_its_own_step_alone(told):
    out, _ = told
    whole = _parts(out, "glied")
    assert whole - _parts(out, "no-visual") == {"distil_regions", "distil_regions_norm"}
    assert whole - _parts(out, "no-attribute") == {"distil_attributes", "distil_attributes_norm"}
    assert whole - _parts(out, "no-local") == {"local_look", "local_attributes", "local_norm"}
    assert _parts(out, "base") == _parts(out, "wide") and "distil_regions" not in _parts(out, "base")


def test_the_wide_base_has_about_as_many_parameters_as_glied(told):
    out, made = told
    glied, wide, base = (made["scores"][name][0]["parameters"] for name in ("glied", "wide", "base"))
    assert base < 0.8 * glied and abs(wide - glied) < 0.05 * glied
    assert _config(out, "wide").width == matching_width(models.load(checkpoint.find(out / "glied-0")).config)
    assert _config(out, "base").width == _config(out, "glied").width < _config(out, "wide").width


def test_scores_are_of_what_the_run_says_of_all_test_pictures(told):
    """Against captions made and scored here."""
    out, made = told
    found = checkpoint.find(out / "scst-0")
    captioner = Captioner.load(found)
    view = data.KarpathyDataset(out / "scenes", split="test", features=out / "scenes" / "regions.npz").images()
    items = [view[i] for i in range(len(view))]
    said = captioner(data.batching.stack_items(items, captioner.tokenizer))
    kept = json.loads((found / "demo_scores.json").read_text())
    assert kept["captions"] == said and len(said) == len(view) > 3
    facts = [item["extras"]["facts"] for item in items]
    wanted = measure(Captioned(said, [item["captions"] for item in items], facts), metrics=demo.SCORED).scores
    scores = made["scores"]["scst"][0]
    assert {name: scores[name] for name in wanted} == pytest.approx(wanted)
    assert {"cider", "bleu_4", "fact_precision", "mean_length", "unique_share"} <= set(wanted)
    assert scores["captions_per_s"] > 0


def test_the_loss_is_the_cross_entropy_of_the_validation_split(told):
    out, made = told
    captioner = Captioner.load(out / "base-0")
    pairs = data.KarpathyDataset(out / "scenes-thorough", split="val", features=out / "scenes-thorough" / "regions.npz")
    assert len(pairs) == 20  # VALIDATED: all there are
    batch = data.collate(captioner.tokenizer, demo.MAX_LENGTH, attributes=True)([pairs[i] for i in range(len(pairs))])
    with torch.no_grad():
        logits, _ = captioner.model(batch["images"], batch["inputs"], batch["lengths"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["target"].flatten(), ignore_index=-100)
    assert made["scores"]["base"][0]["val_ce"] == pytest.approx(loss.item(), rel=1e-4)


def test_numbers_tables_and_picture_lie_beside_the_runs(told):
    out, made = told
    assert (out / "glied.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "glied.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n")[1:]]
    assert len(tables) == 4 and all(len({line.count("|") for line in table}) == 1 for table in tables)
    for name, (label, _) in demo.MLE.items():
        assert f"| {label} | {made['scores'][name][0]['parameters']:,} |" in text
    for name, (label, _) in demo.RL.items():
        assert f"| {label} | {made['scores'][name][0]['cider']:.3f} |" in tables[2][2 + list(demo.RL).index(name)] + " |"
    assert len(made["trends"]) == len(demo.EXPECTED)
    for trend in made["trends"]:
        assert f"| {trend['expected']} | " in text and f"| {trend['verdict']} |" in text
    for table in tables[1:3]:
        assert "| precision | words |" in table[0]  # precision stands beside length


def test_finished_runs_and_data_are_not_made_again(told, monkeypatch, capsys):
    out, made = told
    _small(monkeypatch)
    monkeypatch.setattr(demo_runs, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(demo, "evaluate", lambda *_, **__: pytest.fail("scored again"))
    monkeypatch.setattr(demo, "write_thorough_scenes", lambda *_: pytest.fail("written again"))
    assert demo.run(out.parent).scores == made["scores"]
    assert capsys.readouterr().out.count("as an earlier demo left it") == len(ALL)


def test_an_interrupted_demo_goes_on_where_it_was(told, monkeypatch, tmp_path):
    _small(monkeypatch)
    kept = {"glied": demo.MLE["glied"], "no-visual": demo.MLE["no-visual"]}
    monkeypatch.setattr(demo, "MLE", kept)
    monkeypatch.setattr(demo, "RL", {name: demo.RL[name] for name in ("before", "scst")})
    monkeypatch.setattr(demo, "EXPECTED", ())
    monkeypatch.setattr(report, "draw", lambda *_: None)
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
    names = ["glied-0", "no-visual-0", "no-visual-0", "before-0", "scst-0"]
    assert begun == [(name, i == 2) for i, name in enumerate(names)]
    for name in made.scores:  # as if it had never stopped
        first, again = made.scores[name][0], told[1]["scores"][name][0]
        assert {key: first[key] for key in first if key != "captions_per_s"} == pytest.approx(
            {key: again[key] for key in again if key != "captions_per_s"}
        )


def test_scenes_without_their_regions_are_written_again(monkeypatch, tmp_path):
    """As a demo leaves them that was interrupted between the two."""
    _small(monkeypatch)
    folder = tmp_path / "scenes-thorough"
    demo.write_thorough_scenes(folder, 40)
    demo.write_data(tmp_path)
    images = json.loads((folder / "dataset_scenes.json").read_text())["images"]
    assert len(images) == 40 and all("attributes" in image for image in images)
    before = [(path, path.stat().st_mtime_ns) for path in tmp_path.glob("*/regions.npz")]
    assert len(before) == 2
    demo.write_data(tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in before)


def test_a_run_that_no_demo_made_is_left_alone(monkeypatch, tmp_path):
    _small(monkeypatch)
    own = tmp_path / "glied" / "glied-0"
    own.mkdir(parents=True)
    (own / "log.jsonl").write_text("{}")
    with pytest.raises(FastcapError, match="out must hold nothing but an earlier demo"):
        demo.run(tmp_path)
    assert (own / "log.jsonl").read_text() == "{}"


def _scores(**by_variant):
    """Three seeds of each variant, alike but for what is given as variant=(score, first, second, third)."""
    base = {score: 0.5 for _, score, *_ in demo.EXPECTED}
    scores = {name: [dict(base) for _ in range(3)] for name in ALL}
    for variant, (score, *values) in by_variant.items():
        for one, value in zip(scores[variant.replace("_", "-")], values, strict=True):
            one[score] = value
    return scores


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.6, 0.7, 0.8), "holds in 3 of 3 seeds"),
        ((0.6, 0.7, 0.4), "holds on average, in 2 of 3 seeds"),
        ((0.1, 0.1, 0.6), "DOES NOT HOLD on average, in 1 of 3 seeds it does"),
        ((0.5, 0.4, 0.3), "DOES NOT HOLD, in no seed"),
    ],
)
def test_the_verdict_follows_the_numbers(values, verdict):
    found = {trend.expected: trend for trend in demo.trends(_scores(no_visual=("val_ce", *values)), demo.EXPECTED)}
    assert found["visual distilling lowers the loss"].verdict == verdict
    assert found["local distilling lowers the loss"].verdict == "DOES NOT HOLD, in no seed"  # all are alike


def test_longer_or_less_true_captions_are_told():
    """Equal length and precision cost nothing; more words and less precision do."""
    names = ("new-scst does not make captions longer", "new-scst does not lower precision")
    found = {trend.expected: trend for trend in demo.trends(_scores(), demo.EXPECTED)}
    assert all(found[name].holds for name in names)
    worse = _scores(new_scst=("mean_length", 0.6, 0.6, 0.6))
    assert not {t.expected: t for t in demo.trends(worse, demo.EXPECTED)}[names[0]].holds
    worse = _scores(new_scst=("fact_precision", 0.4, 0.4, 0.4))
    trend = {t.expected: t for t in demo.trends(worse, demo.EXPECTED)}[names[1]]
    assert not trend.holds and demo_tables.against(trend, report._COLUMNS) == "0.400 against 0.500"


def test_the_picture_shows_each_seed_and_what_is_true():
    facts = {"background": "white", "objects": [dict(shape="ring", color="red", size="small", texture="solid",
                                                     row="top", column="left")]}  # fmt: skip
    item = {"image": torch.zeros(3, 8, 8), "extras": {"facts": facts}}
    said = {name: ["a red ring"] for name in report._COLOURS} | {"new-scst": ["a blue ring on white"]}
    scores = {"glied": [{key: 0.25 for key in report._PLOTTED}, {key: 0.75 for key in report._PLOTTED}]}
    labels = {name: name for name in report._COLOURS}
    own = {"new-scst": labels.pop("new-scst")}
    made = report.figure([item], said, {name: scores["glied"] for name in report._COLOURS}, labels, own)
    texts = [text.get_text() for text in made.texts]
    assert texts.count("2 of 2 facts true") == 4 and texts.count("2 of 3 facts true") == 1
    assert {"a red ring", "a blue ring on white"} <= set(texts)
    first = made.axes[0]
    assert first.get_title() == "validation CE" and len(made.axes) == 2 * len(report._PLOTTED) + 1
    assert sorted(first.lines[0].get_xdata()) == [0.25, 0.75] and list(first.lines[1].get_xdata()) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "emoji"], "fastcap.demo: data must be scenes for the story of GLIED, got 'emoji'; leave it out: only"),
        (["--scale", "0"], "fastcap.demo: scale must be in (0, 100], got 0.0; pass 1"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    command = ["fastcap", "demo", "--story", "glied", "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith(message) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_passes_on_what_it_was_given_and_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    given = {}

    def interrupted(out, **options):
        given.update(options, out=out)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    command = ["fastcap", "demo", "--story", "glied", "--out", str(tmp_path), "--scale", "0.02", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and given == {"out": str(tmp_path), "dataset": "auto", "scale": 0.02, "seed": 5}
    assert capsys.readouterr().err == "fastcap: the demo was interrupted; the same command goes on with it\n"
