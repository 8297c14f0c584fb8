"""Regions and attribute words of scenes: what the detector writes, from what, and how often it errs."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from fastcap import data
from fastcap.data import scene_regions as regions
from fastcap.errors import FastcapError

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, STEPS = 300, 100


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of scenes with regions, and the summary."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("scenes")
    data.write_scenes(root, num_images=COUNT, seed=1)
    made = data.write_scene_regions(root, steps=STEPS)
    torch.set_num_threads(threads)
    return root, made


def _images(root):
    return json.loads((root / "dataset_scenes.json").read_text())["images"]


def _true_words(facts):
    """The words that are true of a picture, of those that can be its attributes."""
    said = {
        regions.WORDS[name][item[name]][0] for item in facts["objects"] for name in ("shape", "color", "size", "texture")
    }
    return said | {facts["background"]}


def test_features_are_read_by_their_picture_nine_to_each_with_the_place_of_the_cell(scenes):
    root, made = scenes
    features = data.RegionFeatures(made.features)
    dataset = data.KarpathyDataset(root, split="val", features=features)
    assert made.images == len(features) == COUNT and made.width == features.width == regions.WIDTH
    held = np.load(made.features)
    for item, record in zip((dataset.images()[i] for i in range(5)), dataset.records, strict=False):
        assert np.array_equal(item["image"].numpy(), held["features"][held["ids"].tolist().index(record["imgid"])])
    one = held["features"][3]
    assert one.shape == (9, regions.WIDTH) and one.dtype == np.float32
    rows, columns = one[:, regions.HIDDEN : regions.HIDDEN + 3], one[:, regions.HIDDEN + 3 :]
    assert rows.argmax(1).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and columns.argmax(1).tolist() == [0, 1, 2] * 3
    assert (rows.sum(1) == 1).all() and (columns.sum(1) == 1).all()


def test_a_region_is_of_its_own_cell(scenes):
    """Two scenes of a group that differ in one object differ most in that object's region."""
    root, made = scenes
    held, images = np.load(made.features)["features"], _images(root)
    found = right = 0
    for i, (one, two) in enumerate(zip(images, images[1:], strict=False)):
        a, b = (x["facts"]["objects"] for x in (one, two))
        if one["group"] != two["group"] or one["facts"]["background"] != two["facts"]["background"] or len(a) != len(b):
            continue
        differ = [x for x, y in zip(a, b, strict=True) if x != y and (x["row"], x["column"]) == (y["row"], y["column"])]
        if len(differ) != 1 or sum(x != y for x, y in zip(a, b, strict=True)) != 1:
            continue
        cell = regions.ROWS.index(differ[0]["row"]) * 3 + regions.COLUMNS.index(differ[0]["column"])
        found += 1
        right += int(np.linalg.norm(held[i] - held[i + 1], axis=1).argmax() == cell)
    assert found > 20 and right / found > 0.6  # by chance one in nine


def test_every_picture_has_twelve_different_words_and_most_true_ones_are_among_them(scenes):
    root, made = scenes
    images = _images(root)
    assert all(len(set(image["attributes"])) == len(image["attributes"]) == 12 for image in images)
    assert {word for image in images for word in image["attributes"]} <= set(regions.VOCABULARY)
    held = [image for image in images if image["split"] != "train"]
    true = [_true_words(image["facts"]) for image in held]
    hits = [len(words & set(image["attributes"])) for words, image in zip(true, held, strict=True)]
    assert made.attributes_found == pytest.approx(sum(hits) / sum(map(len, true)))
    assert made.attributes_right == pytest.approx(sum(hits) / (12 * len(held)))
    assert 0.75 < made.attributes_found < 1  # with errors, as a detector's


def test_the_most_probable_words_come_first(scenes):
    """Of a picture's words the first three are true far more often than the last three."""
    images = [image for image in _images(scenes[0]) if image["split"] != "train"]
    first, last = (
        np.mean([word in _true_words(image["facts"]) for image in images for word in image["attributes"][part]])
        for part in (slice(3), slice(-3, None))
    )
    assert first > 0.9 and last < first - 0.3


def test_the_probability_of_a_word_is_that_any_cell_with_an_object_has_it():
    logits = {name: torch.zeros(1, 9, len(values)) for name, values in regions._VALUES.items()}
    logits["object"] = torch.tensor([-40.0, 40.0]).expand(1, 9, 2).clone()
    logits["object"][0, 2:] = logits["object"][0, 2:].flip(-1)  # the first two cells have an object
    logits["size"][0, 0] = torch.log(torch.tensor([0.3, 0.7]))
    logits["size"][0, 1] = torch.log(torch.tensor([0.5, 0.5]))
    scores = dict(zip(regions.VOCABULARY, regions._word_scores(logits)[0].tolist(), strict=True))
    assert scores["small"] == pytest.approx(1 - 0.7 * 0.5, rel=1e-5)
    assert scores["large"] == pytest.approx(1 - 0.3 * 0.5, rel=1e-5)
    assert scores["circle"] == pytest.approx(1 - (7 / 8) ** 2, rel=1e-5) and scores["white"] == pytest.approx(0.25)


def test_the_detector_learns_from_the_training_split_alone(scenes, tmp_path):
    """Other facts of the other splits change nothing but the accuracy that is told."""
    root, made = scenes
    shutil.copytree(root, tmp_path / "scenes")
    file = tmp_path / "scenes" / "dataset_scenes.json"
    document = json.loads(file.read_text())
    for image in document["images"]:
        if image["split"] != "train":
            image["facts"]["background"] = "white" if image["facts"]["background"] != "white" else "black"
    file.write_text(json.dumps(document))
    other = data.write_scene_regions(tmp_path / "scenes", steps=STEPS)
    assert np.array_equal(np.load(other.features)["features"], np.load(made.features)["features"])
    assert other.accuracy["shape"] == made.accuracy["shape"] and other.accuracy["background"] < 0.2


def test_the_seed_decides_and_nothing_else_of_the_process(scenes, tmp_path):
    root, made = scenes
    first = np.load(made.features)["features"]
    shutil.copytree(root, tmp_path / "scenes")
    torch.manual_seed(9)
    state = torch.get_rng_state()
    again = data.write_scene_regions(tmp_path / "scenes", steps=STEPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.load(again.features)["features"], first) and _images(tmp_path / "scenes") == _images(root)
    other = data.write_scene_regions(tmp_path / "scenes", steps=STEPS, seed=1)
    assert not np.array_equal(np.load(other.features)["features"], first)


def test_without_noise_the_detector_errs_less(scenes, tmp_path):
    root, made = scenes
    shutil.copytree(root, tmp_path / "scenes")
    clear = data.write_scene_regions(tmp_path / "scenes", steps=STEPS, noise=0.0)
    assert clear.accuracy["color"] > made.accuracy["color"] and clear.accuracy["shape"] > made.accuracy["shape"]


def test_scenes_that_are_written_again_lose_the_regions_of_the_old_ones(scenes, tmp_path):
    shutil.copytree(scenes[0], tmp_path / "scenes")
    data.write_scenes(tmp_path / "scenes", num_images=20, seed=5)
    assert not (tmp_path / "scenes" / "regions.npz").exists()
    assert not any("attributes" in image for image in _images(tmp_path / "scenes"))


def test_the_command_writes_them_and_says_how_often_the_detector_errs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer")
    from fastcap import cli

    given = ["fastcap", "data", "scenes", "--out", str(tmp_path), "--num-images", "40", "--regions"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None) and len(data.RegionFeatures(tmp_path / "regions.npz")) == 40
    assert "of shapes right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": 0}, "attributes must be an integer of at least 1, got 0; pass attributes=12"),
        ({"attributes": 26}, "attributes must be at most 25, the words there are, got 26; pass attributes=12"),
        ({"noise": float("nan")}, "noise must be at least 0 and finite, got nan; pass noise=0.4"),
        ({"noise": -1}, "noise must be at least 0 and finite, got -1; pass noise=0.4"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0; pass steps=300"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1; pass seed=0"),
    ],
)
def test_bad_arguments_are_named(scenes, options, message):
    before = (scenes[0] / "dataset_scenes.json").read_bytes()
    with pytest.raises(FastcapError) as error:
        data.write_scene_regions(scenes[0], **options)
    assert str(error.value) == f"fastcap.data.write_scene_regions: {message}"
    assert (scenes[0] / "dataset_scenes.json").read_bytes() == before


def test_a_folder_without_scenes_or_with_a_broken_picture_is_an_error(scenes, tmp_path):
    with pytest.raises(FastcapError, match="root must be a folder of scenes"):
        data.write_scene_regions(tmp_path)
    (tmp_path / "dataset_scenes.json").write_text('{"images": [{"filename": "a.png"}]}')
    with pytest.raises(FastcapError, match="root must hold scenes with their facts"):
        data.write_scene_regions(tmp_path)
    shutil.copytree(scenes[0], tmp_path / "scenes")
    (tmp_path / "scenes" / "images" / "scene_000003.png").write_bytes(b"no picture")
    with pytest.raises(FastcapError, match="picture must be as write_scenes wrote it, got .*scene_000003.png"):
        data.write_scene_regions(tmp_path / "scenes")
