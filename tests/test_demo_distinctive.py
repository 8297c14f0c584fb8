"""The demo's story of distinctive captions: what it trains on what, what it keeps, and what it concludes."""

from __future__ import annotations

import dataclasses
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
from fastcap.train import checkpoint, demo_runs, demo_tables, embedders, loop
from fastcap.train import demo_distinctive as demo
from fastcap.train import demo_distinctive_report as report

pytestmark = pytest.mark.usefixtures("one_thread")
ENDS = ("two-way", "one-way")


def _small(monkeypatch, seeds=2, variants=None):
    """Everything from 80 pictures and two steps, and tested on six."""
    plan = demo.PLANS["scenes"]
    kept = {name: plan.variants[name] for name in variants or plan.variants}
    expected = tuple(one for one in plan.expected if {one[2], one[4]} <= {demo.MLE, *kept})
    small = {"clip_steps": 2, "base_steps": 2, "rl_steps": 2, "variants": kept, "expected": expected}
    monkeypatch.setattr(demo, "PLANS", {"scenes": dataclasses.replace(plan, **small)})
    monkeypatch.setattr(demo, "NUM_SCENES", 80)
    monkeypatch.setattr(demo, "TESTED", 6)
    monkeypatch.setattr(demo, "SEEDS", {"scenes": seeds})


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
    return out / "distinctive", made


def _config(run: Path):
    return checkpoint.read_config(checkpoint.find(run))


def _per_image(run: Path) -> list[dict]:
    return json.loads((checkpoint.find(run) / "demo_scores.json").read_text())["per_image"]


def _images(folder: Path, split: str) -> dict[int, dict]:
    (file,) = folder.glob("dataset_*.json")
    return {image["imgid"]: image for image in json.loads(file.read_text())["images"] if image["split"] == split}


def test_the_clips_learn_from_other_pictures_and_the_groups_stay_whole(told):
    out, _ = told
    whole, first, second = (_images(out / name, "train") for name in ("scenes", "scenes-clip", "scenes-judge"))
    assert first and second and not first.keys() & second.keys() and first.keys() | second.keys() == whole.keys()
    groups = [{image["group"] for image in half.values()} for half in (first, second)]
    assert not groups[0] & groups[1]
    assert abs(len(groups[0]) - len(groups[1])) <= 1
    for folder in ("scenes-clip", "scenes-judge"):
        dataset = data.KarpathyDataset(out / folder, split="train")
        assert not dataset.skipped and torch.equal(dataset[0]["image"], _first_of(out, dataset))


def _first_of(out: Path, dataset) -> torch.Tensor:
    """The same picture, read from the scenes that all come from."""
    whole = data.KarpathyDataset(out / "scenes", split="train").images()
    return next(item["image"] for item in whole if item["imgid"] == dataset.records[0]["imgid"])


def test_the_tested_pictures_are_the_first_of_the_test_split_and_no_clip_has_learnt_them(told):
    out, made = told
    whole = list(_images(out / "scenes", "test"))
    assert list(_images(out / "scenes-judge", "test")) == whole[:6] and len(whole) > 6
    for name in made.scores:
        assert [one["image_id"] for one in _per_image(out / f"{name}-0")] == whole[:6]


def test_every_run_has_its_own_settings_starts_from_its_seeds_captioner_and_never_sees_the_judge(told):
    out, made = told
    assert made.seeds == [0, 1] and set(made.scores) == {demo.MLE, *demo.PLANS["scenes"].variants}
    plan = demo.PLANS["scenes"]
    for seed in made.seeds:
        base, clip, judge = (_config(out / f"{name}-{seed}") for name in (demo.MLE, "clip", "judge"))
        assert base.objective == "mle" and base.seed == seed and Path(base.data) == out / "scenes"
        assert clip.model == judge.model == "clip" and clip.seed != judge.seed and clip.width != judge.width
        assert (Path(clip.data), Path(judge.data)) == (out / "scenes-clip", out / "scenes-judge")
        for name, (_, settings) in plan.variants.items():
            if seed and name in plan.once:
                assert not (out / f"{name}-{seed}").exists() and len(made.scores[name]) == 1
                continue
            config = _config(out / f"{name}-{seed}")
            assert config.objective == "wtf-rl" and config.seed == seed and config.steps == 2
            assert Path(config.init_from) == checkpoint.find(out / f"{demo.MLE}-{seed}")
            assert Path(config.reward_clip) == checkpoint.find(out / f"clip-{seed}")
            assert {key: getattr(config, key) for key in settings} == settings
    changed = {name: (_config(out / f"{name}-0")) for name in plan.variants}
    assert {name: config.reward_baseline for name, config in changed.items() if config.reward_baseline != "two-way"} == {
        name: name for name in ("one-way", "none", "greedy", "similar")
    }
    assert {name for name, config in changed.items() if config.gt_weight == "none"} == {"plain", "discriminator"}
    assert {name for name, config in changed.items() if config.alpha == 1} == {"plain", "references"}


def test_scores_are_of_what_the_run_says_in_the_eyes_of_the_judge(told):
    """Against cosines and ranks formed here, from captions made here."""
    from fastcap.train import Captioner

    out, made = told
    for name, seed in (("two-way", 1), (demo.MLE, 0)):
        captioner, embedder = Captioner.load(out / f"{name}-{seed}"), embedders.load(str(out / f"judge-{seed}"), "cpu")
        items = data.KarpathyDataset(out / "scenes-judge", split="test").images()
        images = torch.stack([items[i]["image"] for i in range(6)])
        said = captioner(images)
        assert [one["caption"] for one in _per_image(out / f"{name}-{seed}")] == said
        text = torch.nn.functional.normalize(torch.cat([embedder.texts([caption]) for caption in said]).double(), dim=1)
        image = torch.nn.functional.normalize(embedder.images(images).double(), dim=1)
        scores, kept = text @ image.T, made.scores[name][seed]
        own = scores.diagonal()
        above = (scores > own[:, None] + 1e-6).sum(1)
        assert kept["t2i_r1"] == pytest.approx((above == 0).double().mean().item())
        assert kept["clip_score"] == pytest.approx((2.5 * own.clamp_min(0)).mean().item(), rel=1e-4)
        facts = [items[i]["extras"]["facts"] for i in range(6)]
        assert kept["fact_precision"] == data.score_captions(said, facts)["fact_precision"]


def test_numbers_tables_and_picture_lie_beside_the_runs(told):
    out, made = told
    kept = json.loads((out / "distinctive.json").read_text())
    assert kept["scores"] == made.scores and kept["steps"] == made.steps == {"clip": 2, "base": 2, "rl": 2}
    assert [trend["verdict"] for trend in kept["trends"]] == [trend.verdict for trend in made.trends]
    assert (out / "distinctive.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "distinctive.md").read_text()
    first, second = (one["t2i_r1"] for one in made.scores["two-way"])
    assert f"{(first + second) / 2:.3f} ({first:.3f}, {second:.3f})" in text
    for trend in made.trends:
        assert f"| {trend.expected} | " in text and text.count(f"| {trend.verdict} |") >= 1
    tables = [block.splitlines() for block in text.split("\n\n")[1:]]
    assert len(tables) == 3 and all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_finished_runs_are_not_trained_again(told, monkeypatch, capsys):
    out, made = told
    _small(monkeypatch)
    monkeypatch.setattr(demo_runs, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(demo, "evaluate", lambda *_, **__: pytest.fail("scored again"))
    assert demo.run(out.parent).scores == made.scores
    assert capsys.readouterr().out.count("as an earlier demo left it") == 19


def test_what_was_made_of_other_weights_is_made_again(told, monkeypatch, tmp_path):
    """A CLIP with other weights rewards other runs; a captioner without that reward stays."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(told[0], tmp_path / "distinctive")
    _small(monkeypatch, seeds=1, variants=ENDS)
    trained = []

    def noted(config, **options):
        trained.append(Path(config.out).name)
        return loop.train(config, **options)

    monkeypatch.setattr(demo_runs, "train", noted)
    demo.run(tmp_path)  # paths differ from the told ones, so whatever starts from another checkpoint is another run
    trained.clear()
    demo.run(tmp_path)
    assert trained == []
    file = checkpoint.find(tmp_path / "distinctive" / "clip-0") / "model.safetensors"
    save_file({name: x + 1e-3 for name, x in load_file(file).items()}, file)
    demo.run(tmp_path)
    assert trained == ["two-way-0", "one-way-0"]


def test_an_interrupted_demo_goes_on_where_it_was(told, monkeypatch, tmp_path):
    _small(monkeypatch, seeds=1, variants=ENDS)
    begun = []

    def interrupt(config, **options):
        """Ctrl-C after the first step of the fourth run."""
        begun.append((Path(config.out).name, options.get("resume", False)))
        stop = [lambda trainer, record: trainer.stop("SIGINT")] if len(begun) == 4 else []
        return loop.train(config, callbacks=stop, **options)

    monkeypatch.setattr(demo_runs, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path)
    made = demo.run(tmp_path)
    names = ["clip-0", "judge-0", "mle-0", "two-way-0", "two-way-0", "one-way-0"]
    assert begun == [(name, i == 4) for i, name in enumerate(names)]
    assert made.scores == {name: told[1].scores[name][:1] for name in made.scores}  # as if it had never stopped


def test_a_run_that_no_demo_made_is_left_alone(monkeypatch, tmp_path):
    _small(monkeypatch)
    own = tmp_path / "distinctive" / "clip-0"
    own.mkdir(parents=True)
    (own / "log.jsonl").write_text("{}")
    with pytest.raises(FastcapError, match="out must hold nothing but an earlier demo"):
        demo.run(tmp_path)
    assert (own / "log.jsonl").read_text() == "{}"


def test_emoji_compare_mle_smile_and_reinforcement(monkeypatch, tmp_path):
    """With scenes in their place, so that no font is needed: families for groups, and no facts."""
    plan = dataclasses.replace(demo.PLANS["emoji"], clip_steps=2, base_steps=2, rl_steps=2)
    _small(monkeypatch)

    def write(folder, seed):
        summary = data.write_scenes(folder, num_images=80, seed=seed)
        document = json.loads(summary.json.read_text())
        for image in document["images"]:
            image["family"] = f"family {image.pop('group')}"
            del image["facts"]
        summary.json.write_text(json.dumps(document))
        return summary

    monkeypatch.setattr(demo, "PLANS", {"emoji": plan})
    monkeypatch.setattr(demo, "SEEDS", {"emoji": 1})
    monkeypatch.setattr(demo.data, "write_emoji", write)
    made = demo.run(tmp_path, dataset="emoji", seed=3)
    assert made.seeds == [3] and list(made.scores) == ["mle", "smile", "two-way"]
    out = tmp_path / "distinctive-emoji"
    assert [_config(out / f"{name}-3").objective for name in made.scores] == ["mle", "smile", "wtf-rl"]
    assert "fact_precision" not in made.scores["mle"][0] and "precision" not in (out / "distinctive.md").read_text().split(
        "|"
    )
    assert (out / "distinctive.png").is_file()


def _scores(**by_variant):
    """Two seeds of each variant, alike but for what is given as variant=(score, first, second)."""
    base = {"t2i_r1": 0.5, "i2t_r1": 0.5, "fact_precision": 0.9}
    scores = {name: [dict(base), dict(base)] for name in (demo.MLE, *demo.PLANS["scenes"].variants)}
    for variant, (score, *values) in by_variant.items():
        for one, value in zip(scores[variant.replace("_", "-")], values, strict=True):
            one[score] = value
    return scores


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.4, 0.3), "holds in 2 of 2 seeds"),
        ((0.55, 0.3), "holds on average, in 1 of 2 seeds"),
        ((0.49, 0.6), "DOES NOT HOLD on average, in 1 of 2 seeds it does"),
        ((0.5, 0.6), "DOES NOT HOLD, in no seed"),
    ],
)
def test_the_verdict_follows_the_numbers(values, verdict):
    expected = demo.PLANS["scenes"].expected
    found = {trend.expected: trend for trend in demo.trends(_scores(one_way=("t2i_r1", *values)), expected)}
    trend = found["two-way beats one-way, captions to images"]
    assert trend.verdict == verdict and trend.mean == 0.5 and trend.other_mean == pytest.approx(sum(values) / 2)
    assert not found["two-way beats one-way, images to captions"].holds


def test_the_scale_is_of_all_steps_and_leaves_two():
    assert demo.PLANS["scenes"].scaled(0.02) == {"clip": 14, "base": 20, "rl": 5}
    assert set(demo.PLANS["emoji"].scaled(0.001).values()) == {2}


def test_what_recall_costs_is_told():
    """Equal recall costs nothing; less does."""
    expected = demo.PLANS["scenes"].expected
    name = "both terms do not lower R@1, captions to images"
    assert {trend.expected: trend for trend in demo.trends(_scores(), expected)}[name].holds
    lower = {trend.expected: trend for trend in demo.trends(_scores(plain=("t2i_r1", 0.6, 0.7)), expected)}[name]
    assert (
        lower.verdict == "DOES NOT HOLD, in no seed" and demo_tables.against(lower, report._COLUMNS) == "0.500 against 0.650"
    )


def test_the_picture_says_what_was_said_its_rank_and_what_fits_better():
    """Three pictures along a circle; the second run's caption of the first lies nearer to the second picture."""
    angles = torch.tensor([0.0, 0.4, 1.0])
    image = torch.stack((angles.cos(), angles.sin()), 1)
    text = torch.stack((image[:1], image[1:2]))  # [runs, rows, D]
    view = [{"image": torch.zeros(3, 8, 8), "captions": ["x"], "imgid": i, "extras": {}} for i in range(3)]
    told = {"mle": [{"caption": "a red $ring$", "t2i_rank": 1.0}], "two-way": [{"caption": "", "t2i_rank": 2.5}]}
    made = report.figure(view, [0], {"mle": "before", "two-way": "after"}, told, image, text)
    texts = {(text.get_text(), text.get_color()) for text in made.texts}
    assert {("before", "0.45"), ("after", "tab:red"), ("a red $ring$", "black"), ("(nothing)", "black")} <= texts
    assert {"rank 1 of 3", "rank 2.5 of 3"} <= {text for text, _ in texts}
    assert [text.get_color() for text in made.texts if text.get_text() == "\N{BLACK CIRCLE}"] == ["tab:red"]
    assert len(made.axes) == 3  # the picture and both others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "coco"], "fastcap.demo: data must be one of 'auto', 'emoji', 'scenes', got 'coco'; pass auto"),
        (["--scale", "0"], "fastcap.demo: scale must be in (0, 100], got 0.0; pass 1"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    command = ["fastcap", "demo", "--story", "distinctive", "--out", str(tmp_path / "out"), *arguments]
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
    command = ["fastcap", "demo", "--story", "distinctive", "--out", str(tmp_path), "--data", "emoji", "--scale", "0.02"]
    monkeypatch.setattr(sys, "argv", [*command, "--seed", "5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and given == {"out": str(tmp_path), "dataset": "emoji", "scale": 0.02, "seed": 5}
    assert capsys.readouterr().err == "fastcap: the demo was interrupted; the same command goes on with it\n"
