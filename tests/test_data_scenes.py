"""Generated scenes: what is drawn, said, parsed and scored."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import numpy as np
import pytest

from fastcap.data import (
    KarpathyDataset,
    Scene,
    SceneObject,
    make_scenes,
    parse_caption,
    render_scenes,
    score_captions,
    split_groups,
    words,
    write_captions,
    write_scenes,
)
from fastcap.data.scene_captions import WORDS
from fastcap.data.scenes import BACKGROUNDS, COLORS
from fastcap.errors import FastcapError

RED_CIRCLE = SceneObject("circle", "red", "small", "solid", "top", "left")
BLUE_SQUARE = SceneObject("square", "blue", "large", "dotted", "middle", "center")
SCENE = Scene((RED_CIRCLE, BLUE_SQUARE), "white")


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(2000, seed=3)


def facts(scene: Scene) -> list[set]:
    return [{(field.name, getattr(item, field.name)) for field in fields(item)} for item in scene.objects]


def differences(a: Scene, b: Scene) -> int:
    """Attributes in which two scenes differ; an object's row and column are one attribute, its position."""
    count = int(a.background != b.background)
    for x, y in zip(a.objects, b.objects, strict=True):
        count += sum(getattr(x, name) != getattr(y, name) for name in ("shape", "color", "size", "texture"))
        count += (x.row, x.column) != (y.row, y.column)
    return count


def test_every_member_of_a_group_differs_from_its_first_in_exactly_one_attribute(scenes):
    groups: dict[int, list[Scene]] = {}
    for scene in scenes:
        groups.setdefault(scene.group, []).append(scene)
    for first, *others in groups.values():
        assert len(others) in (3, 4)
        assert [differences(first, other) for other in others] == [1] * len(others)
        assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("num_images", range(12, 40))
def test_any_number_of_images_from_12_is_made_exactly(num_images):
    assert len(make_scenes(num_images)) == num_images


def test_objects_lie_in_different_cells_and_number_one_to_three(scenes):
    for scene in scenes:
        assert len({(item.row, item.column) for item in scene.objects}) == len(scene.objects)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}


def test_a_group_is_never_split(scenes):
    splits: dict[int, set[str]] = {}
    for scene, split in zip(scenes, split_groups(scenes), strict=True):
        splits.setdefault(scene.group, set()).add(split)
    assert all(len(names) == 1 for names in splits.values())
    assert {"train", "val", "test"} == set.union(*splits.values())


def test_scenes_pictures_and_captions_depend_on_the_seed_alone(scenes):
    assert make_scenes(2000, seed=3) == scenes
    assert make_scenes(2000, seed=4) != scenes
    some = scenes[:40]
    assert np.array_equal(render_scenes(some, 1), render_scenes(some, 1))
    assert not np.array_equal(render_scenes(some, 1), render_scenes(some, 2))
    assert write_captions(some, 1) == write_captions(some, 1) != write_captions(some, 2)


def test_a_cell_shows_its_object_in_its_colour_and_the_rest_the_background():
    [picture] = render_scenes([SCENE]).astype(int)
    assert picture.shape == (48, 48, 3)
    assert abs(picture[8, 8] - COLORS["red"]).max() <= 8  # centre of the top left cell
    assert abs(picture[40, 40] - BACKGROUNDS["white"]).max() <= 8  # the bottom right cell is empty
    assert abs(picture[1, 1] - BACKGROUNDS["white"]).max() <= 8  # a small circle leaves its cell's corner free


def test_every_shape_size_and_texture_looks_different():
    pictures = {
        render_scenes([Scene((SceneObject(shape, "red", size, texture, "top", "left"),), "white")]).tobytes()
        for shape in WORDS["shape"]
        for size in WORDS["size"]
        for texture in WORDS["texture"]
    }
    assert len(pictures) == 8 * 2 * 3


def test_every_reference_is_true_of_its_scene(scenes):
    for scene, captions in zip(scenes, write_captions(scenes, 3), strict=True):
        assert len(captions) == 5
        for caption in captions:
            claimed = parse_caption(caption)
            assert 1 <= len(claimed.objects) <= len(scene.objects)
            assert claimed.backgrounds <= {scene.background}
            left = facts(scene)
            for mention in sorted(claimed.objects, key=len, reverse=True):
                match = next((item for item in left if mention <= item), None)
                if match is not None:
                    left.remove(match)
            # Greedy matching by size may miss a perfect one; the exact matching of the score may not.
            if len(left) != len(scene.objects) - len(claimed.objects):
                assert score_captions([caption], [scene])["fact_precision"] == 1.0
    for r in range(5):
        score = score_captions([captions[r] for captions in write_captions(scenes[:300], 3)], scenes[:300])
        assert score["fact_precision"] == 1.0


def test_each_detail_is_said_less_than_half_the_time_at_the_stated_rates(scenes):
    mentions = [item for captions in write_captions(scenes) for text in captions for item in parse_caption(text).objects]
    said = {name: np.mean([any(a == name for a, _ in item) for item in mentions]) for name in ("size", "color", "row")}
    assert said == pytest.approx({"size": 0.3, "color": 0.45, "row": 0.25}, abs=0.02)
    grounds = [bool(parse_caption(text).backgrounds) for captions in write_captions(scenes) for text in captions]
    assert np.mean(grounds) == pytest.approx(0.15, abs=0.02)


def test_no_word_has_two_meanings():
    said = [word for values in WORDS.values() for synonyms in values.values() for word in synonyms]
    assert len(said) == len(set(said))


@pytest.mark.parametrize(
    ("caption", "objects", "backgrounds"),
    [
        ("a circle", [{("shape", "circle")}], set()),
        (
            "A tiny CRIMSON disc, in the upper left, on grey.",
            [{("shape", "circle"), ("size", "small"), ("color", "red"), ("row", "top"), ("column", "left")}],
            {"gray"},
        ),
        ("a ring in the middle", [{("shape", "ring"), ("row", "middle"), ("column", "center")}], set()),
        ("a ring at the bottom middle", [{("shape", "ring"), ("row", "bottom"), ("column", "center")}], set()),
        ("a ring at the middle right", [{("shape", "ring"), ("row", "middle"), ("column", "right")}], set()),
        (
            "top left a star with a ring",
            [{("shape", "star"), ("row", "top"), ("column", "left")}, {("shape", "ring")}],
            set(),
        ),
        ("circle circle xyzzy red", [{("shape", "circle")}, {("shape", "circle")}, {("color", "red")}], set()),
        ("red blue red circle", [{("shape", "circle"), ("color", "red"), ("color", "blue")}], set()),
        ("on the left", [{("column", "left")}], set()),
        ("a a of the", [], set()),
        ("", [], set()),
    ],
)
def test_captions_parse_to_their_facts(caption, objects, backgrounds):
    claimed = parse_caption(caption)
    assert list(claimed.objects) == objects
    assert claimed.backgrounds == backgrounds
    assert len(claimed) == sum(map(len, objects)) + len(backgrounds)


def test_scores_of_worked_captions():
    other = Scene((SceneObject("circle", "green", "small", "solid", "top", "left"),), "black")
    # The first caption says three true things and one that is false (the square is not green); the second one, true.
    score = score_captions(["a red circle and a green square", "a circle"], [SCENE, other])
    assert score["fact_precision"] == pytest.approx(4 / 5)
    assert score["fact_recall"] == pytest.approx(4 / (13 + 7))
    assert score["oracle_r1"] == pytest.approx((1 + 1 / 2) / 2)  # "a circle" fits both scenes
    assert score["oracle_r5"] == 1.0
    assert score["facts_per_caption"] == 2.5


def test_mentions_are_matched_as_well_as_can_be_and_one_to_one():
    twins = Scene((RED_CIRCLE, SceneObject("circle", "red", "large", "solid", "top", "right")), "white")
    assert score_captions(["a circle and a small circle"], [twins])["fact_precision"] == 1.0
    assert score_captions(["a circle and a circle and a circle"], [twins])["fact_precision"] == pytest.approx(2 / 3)


def test_a_caption_that_says_nothing_ties_with_every_scene(scenes):
    score = score_captions(["of the"] * 50, scenes[:50])
    assert (score["fact_precision"], score["fact_recall"]) == (0.0, 0.0)
    assert score["oracle_r1"] == pytest.approx(1 / 50)
    assert score["oracle_r10"] == pytest.approx(10 / 50)


def test_more_detail_retrieves_better(scenes):
    some = scenes[:200]
    full = [
        " and ".join(f"a {o.size} {o.texture} {o.color} {o.shape} at the {o.row} {o.column}" for o in scene.objects)
        + f" on {scene.background}"
        for scene in some
    ]
    shapes = [f"a {scene.objects[0].shape}" for scene in some]
    detailed, generic = score_captions(full, some), score_captions(shapes, some)
    assert detailed["fact_precision"] == detailed["fact_recall"] == 1.0
    assert detailed["oracle_r1"] > 0.99 > 0.1 > generic["oracle_r1"]


def test_scores_take_stored_facts_and_refuse_what_is_no_scene():
    assert score_captions(["a circle"], [SCENE.to_facts()]) == score_captions(["a circle"], [SCENE])
    assert Scene.from_facts(json.loads(json.dumps(SCENE.to_facts()))) == SCENE
    with pytest.raises(FastcapError, match=r"fastcap\.data\.score_captions: scenes\[0\] must be a Scene or its facts"):
        score_captions(["a circle"], [{"nothing": 1}])
    with pytest.raises(FastcapError, match="as many as the scenes, and at least one, got '1 captions and 0 scenes'"):
        score_captions(["a circle"], [])
    with pytest.raises(FastcapError, match="caption must be a string, got 3"):
        parse_caption(3)


@pytest.mark.parametrize(("num_images", "seed"), [(11, 0), (12.0, 0), (True, 0), (12, -1)])
def test_bad_arguments_are_refused(num_images, seed):
    with pytest.raises(FastcapError, match=r"fastcap\.data\.scenes: (num_images|seed) must be an integer of at least"):
        make_scenes(num_images, seed)


def test_the_folder_reads_back_as_written(tmp_path):
    pytest.importorskip("PIL")
    summary = write_scenes(tmp_path / "out", 60, seed=5)
    assert (summary.images, summary.captions, summary.skipped) == (60, 300, [])
    first = summary.json.read_bytes()
    scenes = make_scenes(60, 5)
    pictures = render_scenes(scenes, 5)
    total = 0
    for split, count in summary.splits.items():
        view = KarpathyDataset(tmp_path / "out", split, mean=0.0, std=1.0).images()
        assert len(view) == count
        for item in (view[i] for i in range(count)):
            i = item["imgid"]
            assert Scene.from_facts(item["extras"]["facts"], item["extras"]["group"]) == scenes[i]
            assert np.array_equal((item["image"].permute(1, 2, 0) * 255).round().byte().numpy(), pictures[i])
            assert item["captions"] == write_captions(scenes, 5)[i]
            total += 1
    assert total == 60
    record = json.loads(first)["images"][0]
    assert record["sentids"] == [0, 1, 2, 3, 4]
    assert all(sentence["tokens"] == words(sentence["raw"]) for sentence in record["sentences"])
    # Again, and smaller: the same bytes, then no picture left over.
    write_scenes(tmp_path / "out", 60, seed=5)
    assert summary.json.read_bytes() == first
    write_scenes(tmp_path / "out", 20, seed=5)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 20


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FastcapError, match=r"data\.write_scenes: out must be empty or hold only.*thesis\.txt"):
        write_scenes(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FastcapError, match="out must be a folder"):
        write_scenes(tmp_path / "thesis.txt", 20)
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "dataset_coco.json").write_text("{}")
    with pytest.raises(FastcapError, match="dataset_coco.json"):
        write_scenes(tmp_path, 20)


def test_an_interrupted_run_leaves_no_json_and_can_be_run_again(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    write_scenes(tmp_path, 20)
    save = image.Image.save

    def fail_at_fifth(self, path, **options):
        if re.search("000005", str(path)):
            raise KeyboardInterrupt
        save(self, path, **options)

    monkeypatch.setattr(image.Image, "save", fail_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path, 20)
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.undo()
    assert write_scenes(tmp_path, 20).images == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_scenes.json", "images"]
