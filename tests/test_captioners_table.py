"""The captioners' benchmark and table: what is compared is alike, and the table says what was measured."""

from __future__ import annotations

import functools
import json

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from fastcap.benchmarks import bench_captioners, harness, table_captioners

from fastcap import data
from fastcap.errors import FastcapError

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = harness.Settings(profile="tiny", seconds=0.01)


@pytest.mark.parametrize("case", bench_captioners.cases(TINY), ids=lambda case: case.name)
def test_all_ways_to_train_and_to_decode_compute_alike(case):
    problem = case.build()
    exact = problem.exact(problem.upstream)
    compared = 0
    for provider in problem.providers.values():
        if provider.run is None:
            continue
        outputs = provider.run(problem.upstream)
        assert max(harness.errors(outputs, exact)) < 2e-5
        compared += 1
    assert compared >= 2 and set(case.providers) == set(problem.providers)


def test_a_training_step_has_the_gradient_of_every_parameter():
    problem = bench_captioners.training("tiny", "glied", TINY)
    found = problem.providers["plain"].run(None)
    assert len(found) == 1 + len(list(bench_captioners.make_model("glied", bench_captioners.SHAPES["tiny"]).parameters()))
    assert all(torch.isfinite(x).all() for x in found) and sum(x.abs().sum() > 0 for x in found[1:]) == len(found) - 1


def test_decoding_goes_on_to_the_last_word():
    """With random weights and a vocabulary of COCO's size; a caption that ended would be less work."""
    problem = bench_captioners.decoding("coco", "lstm", "greedy", TINY)
    scores, tokens = problem.providers["plain"].run(None)
    assert tokens.shape == (32, bench_captioners.WORDS) and (tokens > 2).all() and scores.shape == (32,)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of two models that train three steps on 40 scenes."""
    out = tmp_path_factory.mktemp("table")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_captioners, "EVERY", 1)
        patch.setattr(table_captioners, "SECONDS", 0.2)
        patch.setattr(table_captioners.data, "write_scene_regions", functools.partial(data.write_scene_regions, steps=3))
        given = ["--levels", "100", "1e-3", "--steps", "3", "--scenes", "40", "--models", "lstm", "glied", "--out", str(out)]
        assert table_captioners.main(given) == 0
    torch.set_num_threads(threads)
    return json.loads((out / "captioners_table.json").read_text())


def test_the_table_has_a_row_for_each_model_and_backend(table):
    assert [(row["model"], row["backend"]) for row in table["rows"]] == [
        (model, backend) for model in ("lstm", "glied") for backend in ("auto", "reference")
    ]
    assert (
        "table_captioners --levels 100 1e-3 --steps 3" in table["command"] and table["machine"]["torch"] == torch.__version__
    )
    for row in table["rows"]:
        (run,) = row["runs"]
        assert run["steps"] == 3 and run["ms_per_step"] > 0  # on to the level that it does not reach
        assert list(run["reached"]) == ["100"] and 0 < run["reached"]["100"] < run["seconds"]
        assert row["seconds"] == {"100": run["reached"]["100"], "0.001": None}
        assert row["greedy_per_s"] > 0 and row["beam_3_per_s"] > 0
    first, second = (row["parameters"] for row in table["rows"][::2])
    assert first != second and table["rows"][0]["parameters"] == table["rows"][1]["parameters"]


def test_the_backends_take_the_same_steps(table):
    for of_one in (table["rows"][:2], table["rows"][2:]):
        losses = [row["runs"][0]["val_ce"] for row in of_one]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_level_that_is_not_reached_is_not_a_time():
    row = {"model": "lstm", "label": "LSTM", "parameters": 5, "greedy_per_s": 10.0, "beam_3_per_s": 4.0}
    row["runs"] = [{"ms_per_step": 7.0}]
    rows = [{**row, "backend": "auto", "seconds": {"1": 3.2, "0.5": None}},
            {**row, "backend": "reference", "seconds": {"1": None, "0.5": None}}]  # fmt: skip
    text = table_captioners.table(rows)
    assert text.splitlines()[-1] == "| LSTM | 5 | not reached, 3 | not reached | 7, 7 | 10, 10 | 4, 4 |"


def test_a_run_stops_where_all_levels_are_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(table_captioners, "EVERY", 1)
    data.write_scenes(tmp_path / "scenes", num_images=40)
    given = {"data": str(tmp_path / "scenes"), "out": str(tmp_path / "run"), "steps": 9, "batch_size": 8, "width": 8}
    run, _ = table_captioners._until(table_captioners.TrainConfig(**given, validate_every=2), [100.0, 50.0])
    assert run["steps"] == 2 and set(run["reached"]) == {"100", "50"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--models", "blip"], "models must be among lstm, soft-attention, base, glied, got 'blip'; leave it out for all"),
        (["--steps", "0"], "steps must be at least 1, got 0; leave it out"),
        (["--levels", "1", "0"], "levels must be above 0, got 0.0; leave them out"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(FastcapError) as error:
        table_captioners.main(given)
    assert str(error.value) == f"fastcap.bench.table_captioners: {message}"
