"""`fastcap evaluate` on files: captions against references in COCO's and Karpathy's formats, and all that can be wrong."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")

from fastcap import cli
from fastcap import eval as metrics

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = Path(os.environ.get("FASTCAP_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "data" / "coco_captions"
IDS = [391895, 522418, 184613, 318219]
REFERENCES = [
    ["A man rides a red motorcycle.", "A person on a motorcycle, on a dirt road"],
    ["A woman cuts a large white cake.", "A lady with a knife and a cake", "Someone is cutting a cake"],
    ["A child holds an umbrella near a cow."],
    ["A boy stands in front of a computer.", "Two boys at a keyboard"],
]
GOOD = [
    "A man rides a motorcycle.",
    "A woman cuts a white cake.",
    "A child holds a flowered umbrella.",
    "A boy at a computer.",
]
POOR = ["A dog.", "A woman cuts bread", "A child and a cow", "A photo of a room with a cat"]
TOKENS = ["bleu", "meteor", "rouge_l", "cider", "spice", "self_bleu"]  # metrics that cut captions by the tokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with references in both formats and captions. There is no Java."""
    monkeypatch.chdir(tmp_path)
    without_java(monkeypatch)
    write(Path("captions_val.json"), coco(IDS, REFERENCES))
    write(Path("dataset_x.json"), karpathy(IDS, REFERENCES))
    write(Path("good.json"), results(GOOD))
    write(Path("poor.json"), results(POOR))
    return tmp_path


@pytest.fixture
def fastcap(monkeypatch, capsys):
    """Runs a command line in this process: fastcap("evaluate", ...) -> (status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastcap", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def evaluated(fastcap):
    """`fastcap evaluate` of these arguments, which must succeed: the document that it writes."""

    def run(*arguments):
        status, out, err = fastcap("evaluate", *arguments, "--out", "out")
        assert status == 0, err
        assert out == Path("out/evaluation.md").read_text(encoding="utf-8")
        return strict(Path("out/evaluation.json"))

    return run


@pytest.fixture
def refused(fastcap):
    """`fastcap evaluate` of these arguments, which must fail: its one line, without the line's end."""

    def run(*arguments):
        status, out, err = fastcap("evaluate", *arguments)
        assert (status, out, err.count("\n"), err[-1:]) == (2, "", 1, "\n"), err
        return err[:-1]

    return run


def without_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)


def strict(path):
    """JSON as other readers take it: no NaN."""

    def no_json(name):
        raise AssertionError(f"{path} has {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=no_json)


def write(path, document):
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def results(captions, ids=IDS):
    return [{"image_id": id, "caption": caption} for id, caption in zip(ids, captions, strict=True)]


def coco(ids, references):
    """As COCO has it: other fields too, and annotations in no order."""
    images = [{"id": id, "file_name": f"{id}.jpg", "height": 480, "license": 1} for id in ids]
    annotations = [{"image_id": id, "caption": said} for id, texts in zip(ids, references, strict=True) for said in texts]
    annotations = [{"id": n, **annotation} for n, annotation in enumerate(annotations)][::-1]
    return {"info": {"year": 2014}, "licenses": [], "images": images, "annotations": annotations}


def karpathy(ids, references, split="test", **fields):
    images = [
        {"filename": f"{id}.jpg", "imgid": n, "cocoid": id, "split": split, "sentences": [{"raw": said} for said in texts]}
        for n, (id, texts) in enumerate(zip(ids, references, strict=True))
    ]
    return {"dataset": "coco", "images": [{**image, **fields} for image in images]}


def scores(document, row=0):
    return document["rows"][row]["scores"]


# References


def test_both_formats_give_what_the_library_measures(here, evaluated):
    wanted = metrics.measure(metrics.Captioned(GOOD, REFERENCES), bootstrap=1000).scores
    assert 0.3 < wanted["bleu_4"] < 1 and wanted["cider"] > 1
    of_coco = evaluated("--captions", "good.json", "--captions", "poor.json", "--references", "captions_val.json")
    assert scores(of_coco) == pytest.approx(wanted)
    assert scores(of_coco, 1)["cider"] < 0.5 * wanted["cider"]
    assert of_coco["data"] == {
        "json": "captions_val.json", "split": None, "images": 4, "images_in_split": 4, "images_without_reference": 0,
        "references": 8, "image_ids": "image_id",
    }  # fmt: skip
    of_karpathy = evaluated("--captions", "good.json", "--references", "dataset_x.json")
    assert scores(of_karpathy) == pytest.approx(wanted)
    assert of_karpathy["data"]["split"] == "test" and of_karpathy["data"]["image_ids"] == "cocoid"
    of_folder = evaluated("--captions", "good.json", "--data", ".")
    assert scores(of_folder) == scores(of_karpathy) and of_folder["data"] == of_karpathy["data"]


def test_images_without_a_cocoid_go_by_imgid(here, evaluated):
    document = karpathy(IDS, REFERENCES)
    del document["images"][2]["cocoid"]
    for n, image in enumerate(document["images"]):
        image["imgid"] = f"image-{n}"  # ids may be strings
    write(here / "dataset_x.json", document)
    write(here / "good.json", results(GOOD, [f"image-{n}" for n in range(4)]))
    for option, value in (("--references", "dataset_x.json"), ("--data", ".")):
        found = evaluated("--captions", "good.json", option, value, "--per-image")
        assert found["data"]["image_ids"] == "imgid"
        assert [one["image_id"] for one in found["rows"][0]["per_image"]] == [f"image-{n}" for n in range(4)]


def test_a_split_is_chosen_and_train_has_restval(here, evaluated, refused):
    document = karpathy(IDS, REFERENCES)
    for image, split in zip(document["images"], ["train", "restval", "val", "train"], strict=True):
        image["split"] = split
    write(here / "dataset_x.json", document)
    write(here / "some.json", results([GOOD[n] for n in (0, 1, 3)], [IDS[n] for n in (0, 1, 3)]))
    assert evaluated("--captions", "some.json", "--references", "dataset_x.json", "--split", "train")["data"]["images"] == 3
    assert refused("--captions", "good.json", "--references", "dataset_x.json") == (
        "fastcap.eval.references: split must be one that dataset_x.json has, got 'test'; pass --split with one of: restval, "
        "train, val"
    )
    assert refused("--captions", "good.json", "--references", "captions_val.json", "--split", "val") == (
        "fastcap.eval.references: split must not be given for captions_val.json, got 'val'; leave --split out: a file in "
        "COCO's format is one split"
    )


def test_a_file_of_annotations_alone_has_its_images(here, evaluated):
    document = coco(IDS, REFERENCES)
    write(here / "captions_val.json", {"annotations": document["annotations"]})
    found = evaluated("--captions", "good.json", "--references", "captions_val.json")
    assert found["data"]["images"] == 4 and found["rows"][0]["scores"]["cider"] > 1


@pytest.mark.parametrize("form", ["coco", "karpathy", "folder"])
def test_images_without_a_reference_are_left_out_and_so_are_their_captions(here, evaluated, form):
    """One has none, one has only references without a word."""
    ids, references = [7, *IDS, 8], [[], *REFERENCES, ["...", " "]]
    made = {"coco": coco, "karpathy": karpathy, "folder": karpathy}[form](ids, references)
    (here / "dataset_x.json").unlink()
    write(here / ("captions_val.json" if form == "coco" else "dataset_x.json"), made)
    write(here / "all.json", results(["a dog", *GOOD, "a cat"], ids))
    where = {"coco": ["--references", "captions_val.json"], "karpathy": ["--references", "dataset_x.json"]}
    found = evaluated("--captions", "all.json", *where.get(form, ["--data", "."]))
    key = "image_id" if form == "coco" else "cocoid"
    assert found["warnings"] == [
        f"2 of 6 images have no reference, and are left out: the first {key} 7",
        "2 references without a word are left out",
    ]
    assert found["data"]["images"] == 4 and found["data"]["images_without_reference"] == 2
    assert scores(found) == pytest.approx(metrics.measure(metrics.Captioned(GOOD, REFERENCES)).scores)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{", "references must be valid JSON in UTF-8, got 'r.json (Expecting property name"),
        (b"", "references must be valid JSON in UTF-8, got 'r.json (Expecting value"),
        (b'{"images": NaN}', "references must be valid JSON in UTF-8, got 'r.json (NaN is no JSON)'"),
        (b'{"annotations": [-Infinity]}', "references must be valid JSON in UTF-8, got 'r.json (-Infinity is no JSON)'"),
        (b'{"a": "caf\xe9"}', "references must be valid JSON in UTF-8, got \"r.json ('utf-8' codec can't decode byte 0xe9"),
        (b"[" * 100_000, "references must be valid JSON in UTF-8"),
        (b"[]", "references must hold 'annotations' as COCO has them, or 'images' with 'sentences' as Karpathy's files do"),
        (b"3", "references must hold 'annotations' "),
        (b'{"images": []}', "references must hold 'annotations' "),
        (b'{"images": [{"id": 1}]}', "references must hold 'annotations' "),
        (b'{"annotations": {"1": "a"}}', "references must hold 'annotations' "),
        (b'{"annotations": []}', 'r.json must have a reference caption, got \'none for 0 images, 0 without a word\''),
        (b'{"images": {}, "annotations": []}', "'images' of r.json must be a list, got 'an object with nothing in it'"),
        (b'{"images": [{"file_name": "a"}], "annotations": []}', "images[0] of r.json must have an id (number or string), "),
        (
            b'{"images": [{"id": 1}, {"id": "1"}], "annotations": []}',
            "images[1] of r.json must have an id of its own, got '1'; keep one entry for each image",
        ),
        (
            b'{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}',
            "annotations[0] of r.json must have an image_id (number or string) and a caption (string of Unicode), "
            "got \"{'image_id': 1, 'bbox': []}\"; give COCO's captions_*.json; instances_*.json and "
            "person_keypoints_*.json have no captions",
        ),
        (b'{"images": [], "annotations": [{"image_id": 1, "caption": 5}]}', "annotations[0] of r.json must have an image"),
        (b'{"annotations": [{"image_id": 1, "caption": "\\ud800"}]}', "annotations[0] of r.json must have an image_id"),
        (b'{"annotations": [{"image_id": 1.5, "caption": "a"}]}', "annotations[0] of r.json must have an image_id"),
        (b'{"annotations": ["a"]}', "annotations[0] of r.json must have an image_id"),
        (
            b'{"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]}',
            "annotations[0] of r.json must be of an image that r.json lists, got 'image_id 2'; add the image, or leave its ",
        ),
        (b'{"images": [{"sentences": []}]}', "images[0] of r.json must have a split and sentences, got \"{'"),
        (b'{"images": [{"split": "test", "sentences": []}, 3]}', "images[1] of r.json must have a split and sentences, "),
        (
            b'{"images": [{"split": "test", "sentences": [{"raw": null}]}]}',
            "images[0] of r.json must have a caption in 'raw' (string of Unicode) in each of its sentences, ",
        ),
        (
            b'{"images": [{"split": "test", "imgid": [], "sentences": []}]}',
            "images[0] of r.json must have a imgid (number or string), got '[]'",
        ),
        (
            b'{"images": [{"split": "test", "filename": "f", "imgid": 1, "sentences": []}, '
            b'{"split": "test", "filename": "g", "imgid": 1, "sentences": []}]}',
            "image g of r.json must have a imgid of its own, got 1; give every image of the split another",
        ),
        (
            b'{"images": [{"split": "test", "sentences": [{"raw": "!"}]}]}',
            "split 'test' of r.json must have a reference caption, got 'none for 1 images, 1 without a word'",
        ),
    ],
)  # fmt: skip
def test_a_references_file_that_is_not_sound_is_one_line(here, refused, content, message):
    (here / "r.json").write_bytes(content)
    said = refused("--captions", "good.json", "--references", "r.json")
    assert said.startswith(f"fastcap.eval.references: {message}"), said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"image_id": 1, "caption": "a", "score": NaN}]', "captions must be valid JSON in UTF-8, got 'c.json (NaN is"),
        (b'[{"image_id": NaN, "caption": "a"}]', "captions must be valid JSON in UTF-8, got 'c.json (NaN is no JSON)'"),
        (b"null", "captions must hold a list of captions, got 'c.json with null'"),
        (b'"text"', "captions must hold a list of captions, got 'c.json with a string'"),
        (b'[{"image_id": 1, "caption": ["a"]}]', "entry 0 of c.json must have an image_id (number or string) and a"),
        (b'[{"caption": "a"}]', "entry 0 of c.json must have an image_id (number or string) and a caption (str"),
        (b'[{"image_id": "", "caption": "a"}]', "entry 0 of c.json must have an image_id (number or string) and a"),
        (b'[{"image_id": 1, "caption": "\\udc80 b"}]', "entry 0 of c.json must have an image_id (number or string) and a "),
        (b'[{"image_id": ' + b"9" * 5000 + b', "caption": "a"}]', "captions must be valid JSON in UTF-8, got 'c.json (Ex"),
        (
            b'[{"image_id": 391895, "caption": "a"}, {"image_id": 391895, "caption": "b"}]',
            "entry 1 of c.json must have an image_id of its own, got 391895; keep one caption for each image",
        ),
    ],
)  # fmt: skip
def test_a_captions_file_that_is_not_sound_is_one_line(here, refused, content, message):
    (here / "c.json").write_bytes(content)
    said = refused("--captions", "c.json", "--references", "captions_val.json")
    assert said.startswith(f"fastcap.eval.results: {message}"), said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.karpathy: root must hold one dataset_*.json, got '0 in .'; "),
        (b"[" * 100_000, "data.karpathy: json must be valid JSON, got "),
        (b'{"a": "\xe9"}', "data.karpathy: json must be valid JSON, got "),
        (b"[]", "data.karpathy: json must hold a list of 'images', got 'dataset_x.json'; "),
        (b'{"images": [{"filename": "a"}]}', "data.karpathy: images[0] of dataset_x.json must have a split (str)"),
        (karpathy([1], [["a"]], filepath=3), "data.karpathy: filepath of images[0] of dataset_x.json must be a string"),
        (karpathy([1], [[]]), "data.karpathy: split 'test' of dataset_x.json must have an image that can be used"),
        (karpathy([None], [["a"]]), "evaluate: image None.jpg of dataset_x.json must have a cocoid (number or string)"),
        (karpathy([[]], [["a"]]), "evaluate: image [].jpg of dataset_x.json must have a cocoid (number or string)"),
        (karpathy([5, 5], [["a"], ["b"]]), "evaluate: image 5.jpg of dataset_x.json must have a cocoid of its own"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_sound_is_one_line(here, refused, content, message):
    (here / "dataset_x.json").unlink()
    if content is not None:
        (here / "dataset_x.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert refused("--captions", "good.json", "--data", ".").startswith(f"fastcap.{message}")


def test_each_file_in_the_place_of_the_other_is_told(here, refused):
    assert refused("--captions", "captions_val.json", "--references", "captions_val.json").endswith(
        "; this looks like references: pass it as --references"
    )
    assert refused("--captions", "good.json", "--references", "poor.json").endswith(
        "got 'poor.json with a list'; this looks like captions to score: pass it as --captions"
    )


def test_a_file_that_is_not_there_or_a_folder_is_one_line(here, refused):
    assert refused("--captions", "good.json", "--references", "none.json") == (
        "fastcap.eval.references: references must be a file, got 'none.json'; give COCO's captions_*.json or a "
        "Karpathy-format dataset_*.json"
    )
    assert refused("--captions", "good.json", "--references", ".").startswith(
        "fastcap.eval.references: references must be a readable file, got '. (Is a directory)'; "
    )
    assert refused("--captions", "none.json", "--references", "captions_val.json").startswith(
        "fastcap.eval.results: captions must be a file, got 'none.json'; "
    )
    assert refused("--captions", ".", "--references", "captions_val.json").startswith(
        "fastcap.eval.results: captions must be a readable file, got '. (Is a directory)'; "
    )


def test_a_byte_order_mark_is_no_error(here, evaluated):
    for name in ("good.json", "captions_val.json"):
        (here / name).write_bytes(b"\xef\xbb\xbf" + (here / name).read_bytes())
    assert scores(evaluated("--captions", "good.json", "--references", "captions_val.json"))["cider"] > 1


# Ids


def test_ids_that_all_differ_are_an_error_even_of_a_part(here, refused):
    write(here / "c.json", results(GOOD, [1, 2, 3, 4]))
    for part in ([], ["--partial"]):
        assert refused("--captions", "c.json", "--references", "captions_val.json", *part) == (
            "fastcap.evaluate: captions of c.json must be of the images of captions_val.json, by image_id, such as 391895, "
            "got '4 of 4 of others, such as 1'; check --references, --split and the ids"
        )


def test_ids_that_differ_in_part_are_an_error_unless_a_part_is_asked_for(here, refused, evaluated):
    write(here / "c.json", results([*GOOD, "a"], [*IDS, 5]))
    files = ["--captions", "c.json", "--references", "captions_val.json"]
    assert refused(*files) == (
        "fastcap.evaluate: captions of c.json must be of the images of captions_val.json, by image_id, such as 391895, "
        "got '1 of 5 of others, such as 5'; check --references, --split and the ids, or pass --partial to leave them out"
    )
    assert evaluated(*files, "--partial")["data"]["images"] == 4


def test_fewer_captions_are_an_error_unless_a_part_is_asked_for(here, refused, evaluated):
    write(here / "c.json", results(GOOD[1:], IDS[1:]))
    files = ["--captions", "c.json", "--captions", "poor.json", "--references", "captions_val.json"]
    assert refused(*files) == (
        "fastcap.evaluate: every image of captions_val.json must have a caption, got '1 without captions of c.json, the "
        "first image_id 391895 (391895.jpg)'; repair that, or pass --partial to evaluate the others only"
    )
    found = evaluated(*files, "--partial")
    assert found["data"]["images"] == 3 and found["data"]["images_in_split"] == 4
    assert found["warnings"][0].startswith(
        "3 of 4 images evaluated: 1 without captions of c.json, the first image_id 391895 "
    )
    wanted = metrics.measure(metrics.Captioned(POOR[1:], REFERENCES[1:])).scores
    assert scores(found, 1) == pytest.approx(wanted)  # every captioner on the same images


# Captions as they come


def test_empty_captions_are_scored_and_counted(here, evaluated):
    write(here / "c.json", results([GOOD[0], "", " .", GOOD[3]]))
    found = evaluated("--captions", "c.json", "--references", "captions_val.json", "--per-image")
    assert found["warnings"] == ["2 captions of c without a word, the first of image_id 522418; scored as they are"]
    assert "Warning: 2 captions of c without a word" in Path("out/evaluation.md").read_text()
    each = found["rows"][0]["per_image"]
    assert [one["cider"] == 0 for one in each] == [False, True, True, False] and each[1]["length"] == 0
    assert scores(found)["cider"] == pytest.approx(sum(one["cider"] for one in each) / 4)


def test_captions_of_every_kind_come_back_as_they_were(here, evaluated):
    said = ['a\nman\trides, "quickly"\r\n', "=1+1;<script>alert('1')</script>", "café 猫 🛵 \u200d\u202e x", "word " * 5000]
    write(here / "c.json", results(said))
    found = evaluated("--captions", "c.json", "--references", "captions_val.json", "--per-image")
    assert [one["caption"] for one in found["rows"][0]["per_image"]] == said
    with open("out/per_image.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["caption"] for line in lines] == said and [int(line["image_id"]) for line in lines] == IDS
    assert [line["captioner"] for line in lines] == ["c"] * 4
    assert [float(line["cider"]) for line in lines] == [one["cider"] for one in found["rows"][0]["per_image"]]
    assert scores(found)["mean_length"] > 1250 and 0 <= scores(found)["bleu_4"] <= 1
    assert "<script>" not in Path("out/report.html").read_text(encoding="utf-8")


def test_a_name_that_is_no_utf_8_is_no_error(here, fastcap):
    name = os.fsdecode(b"caf\xe9.json")
    try:
        (here / "good.json").rename(here / name)
    except OSError:
        pytest.skip("this file system has no such names")
    status, out, err = fastcap("evaluate", "--captions", name, "--references", "captions_val.json", "--out", "out")
    assert status == 0, err
    assert "| caf\\udce9 " in out and (here / "out" / "evaluation.md").read_text() == out
    assert strict(here / "out" / "evaluation.json")["rows"][0]["captions"] == name


def test_one_image_is_measured_as_far_as_one_can_be(here, evaluated):
    write(here / "captions_val.json", coco(IDS[:1], REFERENCES[:1]))
    write(here / "good.json", results(GOOD[:1], IDS[:1]))
    found = evaluated("--captions", "good.json", "--references", "captions_val.json")
    assert scores(found)["rouge_l"] > 0.5 and found["rows"][0]["intervals"] == {} == dict(found["comparisons"])
    assert "cider" in found["rows"][0]["not_measured"]  # whose weights of words come from how many images have them
    nothing = evaluated("--captions", "good.json", "--references", "captions_val.json", "--metrics", "clip_score")
    assert scores(nothing) == {} and list(nothing["rows"][0]["not_measured"]) == ["clip_score"]


# Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--captions", "good.json"],
            "data or references must be given, one of them, got 'neither'; pass --data FOLDER, with pictures, or "
            "--references FILE, without",
        ),
        (
            ["--captions", "good.json", "--data", ".", "--references", "captions_val.json"],
            "data or references must be given, one of them, got 'both'; ",
        ),
        (
            ["--checkpoint", "run", "--references", "captions_val.json"],
            "checkpoint must come with --data, got 'run'; pass --data FOLDER in place of --references: it looks at pictures",
        ),
        (
            ["--captions", "good.json", "--references", "captions_val.json", "--clip", "judge"],
            "clip must come with --data, got 'judge'; ",
        ),
        (["--references", "captions_val.json"], "checkpoint must be given, got 'none'; pass --checkpoint RUN, or --capt"),
        (["--metrics", "bleu,ciderr"], "metrics must be among bleu, meteor, rouge_l, cider, spice, retrieval, clip_score, "),
        (["--metrics", ""], "metrics must be among "),
        (["--tokenizer", "moses"], "tokenizer must be one of fastcap, ptb, got 'moses'; pass tokenizer=fastcap; ptb needs "),
        (["--bootstrap", "-1"], "bootstrap must be 0 or an integer of at least 40, got -1; pass bootstrap=1000, or 0 "),
        (["--bootstrap", "1"], "bootstrap must be 0 or an integer of at least 40, got 1; "),
        (["--seed", "-1"], "seed must be an integer of at least 0, got -1; pass seed=0"),
        (["--report-images", "-1"], "report_images must be an integer of at least 0, got -1; pass report_images=60"),
    ],
)  # fmt: skip
def test_options_that_are_none_are_one_line(here, refused, arguments, message):
    if arguments[0] in ("--metrics", "--tokenizer", "--bootstrap", "--seed", "--report-images"):
        arguments = ["--captions", "good.json", "--references", "captions_val.json", *arguments]
    said = refused(*arguments)
    assert said.startswith(f"fastcap.evaluate: {message}"), said


def test_only_the_chosen_metrics_are_measured(here, evaluated):
    found = evaluated(
        "--captions", "good.json", "--references", "captions_val.json", "--metrics", "cider, diversity,clip_score"
    )
    row = found["rows"][0]
    assert set(row["scores"]) == {"cider", "mean_length", "unique_share", "vocabulary", "distinct_1", "distinct_2"}
    assert list(row["not_measured"]) == ["clip_score"] and found["settings"]["metrics"] == [
        "cider",
        "diversity",
        "clip_score",
    ]


def test_intervals_hold_the_scores_and_follow_the_seed(here, evaluated):
    files = ["--captions", "good.json", "--captions", "poor.json", "--references", "captions_val.json"]
    one, same, other = (evaluated(*files, "--seed", seed)["rows"] for seed in (0, 0, 1))
    for row in one:
        assert {"bleu_4", "rouge_l", "cider", "mean_length"} <= set(row["intervals"])
        for name, (low, high) in row["intervals"].items():
            assert low <= row["scores"][name] <= high, name
    assert [row["intervals"] for row in one] == [row["intervals"] for row in same]
    assert [row["intervals"] for row in one] != [row["intervals"] for row in other]
    without = evaluated(*files, "--bootstrap", 0)
    assert [row["intervals"] for row in without["rows"]] == [{}, {}] and without["comparisons"] == []


def test_captioners_are_compared_on_the_same_resamples(here, evaluated):
    shutil.copy("good.json", "twin.json")
    files = ["--captions", "good.json", "--captions", "poor.json", "--captions", "twin.json"]
    found = evaluated(*files, "--references", "captions_val.json")
    poor, twin = found["comparisons"]
    assert [(one["first"], one["second"]) for one in (poor, twin)] == [("poor", "good"), ("twin", "good")]
    worse = poor["differences"]["cider"]
    assert worse["value"] == pytest.approx(scores(found, 1)["cider"] - scores(found, 0)["cider"])
    assert worse["low"] < worse["value"] < worse["high"] < 0
    assert twin["differences"]["cider"] == {"value": 0, "low": 0, "high": 0}
    assert "- poor less good: BLEU-1 −" in Path("out/evaluation.md").read_text(encoding="utf-8")


def test_the_document_says_how_to_do_it_again(here, fastcap, evaluated):
    options = ["--metrics", "bleu,rouge_l", "--bootstrap", "50", "--seed", "3", "--partial", "--per-image"]
    files = ["--captions", "good.json", "--references", "captions_val.json"]
    (here / "captions_val.json").rename("the captions.json")
    found = evaluated(*files[:3], "the captions.json", *options)
    assert found["format"] == 1 and found["settings"]["tokenizer"] == "fastcap" and found["settings"]["seed"] == 3
    assert {"python", "torch", "fastcap", "numpy", "pycocoevalcap", "platform"} <= set(found["versions"])
    first = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.suffix in (".csv", ".md")}
    shutil.rmtree("out")
    assert found["command"] == (
        "fastcap evaluate --captions good.json --references 'the captions.json' --metrics bleu,rouge_l --bootstrap 50 "
        "--seed 3 --per-image --partial --out out"
    )
    status, _, err = fastcap(*shlex.split(found["command"])[1:])
    assert status == 0, err
    again = strict(Path("out/evaluation.json"))
    unlike = {"seconds", "rows"}
    assert {k: v for k, v in again.items() if k not in unlike} == {k: v for k, v in found.items() if k not in unlike}
    assert first == {name: (here / "out" / name).read_bytes() for name in first}
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"evaluation.json", "evaluation.md", "report.html", "per_image.csv"}


# What cannot run


def not_measured(document, names):
    found = document["rows"][0]["not_measured"]
    assert set(names) <= set(found)
    assert not any(key.startswith(name) for key in scores(document) for name in names)
    return [found[name] for name in names]


def test_without_java_there_is_no_meteor_and_all_else(here, evaluated):
    found = evaluated("--captions", "good.json", "--references", "captions_val.json")
    (meteor,) = not_measured(found, ["meteor"])
    assert meteor["reason"] == "no Java was found" and "put java on the PATH" in meteor["remedy"]
    assert {"bleu_4", "rouge_l", "cider", "self_bleu", "mean_length"} <= set(scores(found))
    table = Path("out/evaluation.md").read_text()
    assert "Not measured: meteor" in table and "no Java was found" in table


def test_without_java_the_ptb_tokenizer_leaves_what_needs_no_words_of_it(here, evaluated):
    found = evaluated("--captions", "good.json", "--references", "captions_val.json", "--tokenizer", "ptb")
    assert {why["reason"] for why in not_measured(found, TOKENS)} == {"no Java was found"}
    assert set(scores(found)) == {"mean_length", "unique_share", "vocabulary", "distinct_1", "distinct_2"}


needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
needs_pycocoevalcap = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap: pip install pycocoevalcap"
)


@needs_java
def test_without_pycocoevalcap_there_is_no_meteor_and_all_else(here, evaluated, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    found = evaluated("--captions", "good.json", "--references", "captions_val.json")
    for why in not_measured(found, ["meteor", "spice"]):
        assert why["reason"] == "pycocoevalcap is not installed" and "pip install" in why["remedy"]
    assert {"bleu_4", "rouge_l", "cider"} <= set(scores(found))
    found = evaluated("--captions", "good.json", "--references", "captions_val.json", "--tokenizer", "ptb")
    assert {why["reason"] for why in not_measured(found, TOKENS)} == {"pycocoevalcap is not installed"}


@needs_java
@needs_pycocoevalcap
def test_without_its_jars_pycocoevalcap_gives_no_meteor_and_all_else(here, evaluated, monkeypatch, tmp_path_factory):
    (folder,) = importlib.util.find_spec("pycocoevalcap").submodule_search_locations
    bare = tmp_path_factory.mktemp("bare")
    shutil.copytree(folder, bare / "pycocoevalcap", ignore=shutil.ignore_patterns("*.jar", "data", "lib", "__pycache__"))
    (bare / "pycocoevalcap" / "__init__.py").touch()  # else it is a namespace, and the installed one is a part of it
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(bare)
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    found = evaluated("--captions", "good.json", "--references", "captions_val.json")
    for why in not_measured(found, ["meteor", "spice"]):
        assert why["reason"].startswith("pycocoevalcap has no ") and why["remedy"]
    found = evaluated("--captions", "good.json", "--references", "captions_val.json", "--tokenizer", "ptb")
    assert all(why["reason"].startswith("pycocoevalcap has no tokenizer/") for why in not_measured(found, TOKENS))


@needs_java
@needs_pycocoevalcap
def test_with_java_both_tokenizers_agree(here, evaluated, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(here)
    files = ["--captions", "good.json", "--references", "captions_val.json", "--metrics", "bleu,rouge_l,cider,self_bleu"]
    ours, java = (evaluated(*files, "--tokenizer", tokenizer) for tokenizer in ("fastcap", "ptb"))
    assert len(scores(ours)) == 7 and scores(ours) == scores(java)
    assert (ours["settings"]["tokenizer"], java["settings"]["tokenizer"]) == ("fastcap", "ptb")


# Known answers: each first reference of the COCO captions against the other four, of the first 1,000 images


@pytest.fixture
def people(tmp_path, monkeypatch):
    if not SHARED.is_dir():
        pytest.skip("needs the COCO captions: set FASTCAP_SHARED")
    monkeypatch.chdir(tmp_path)
    texts = [(SHARED / f"reference{n}.txt").read_text(encoding="utf-8").split("\n")[:1000] for n in range(5)]
    ids = [1000 + 7 * n for n in range(1000)]
    write(Path("people.json"), results(texts[0], ids))
    write(Path("captions_people.json"), coco(ids, list(zip(*texts[1:], strict=True))))
    return ["--captions", "people.json", "--references", "captions_people.json"]


def test_people_score_what_is_known_without_java(people, evaluated, monkeypatch):
    without_java(monkeypatch)
    found = scores(evaluated(*people, "--metrics", "bleu,rouge_l,cider", "--bootstrap", 100, "--report-images", 0))
    assert [found[name] for name in ("bleu_4", "rouge_l", "cider")] == pytest.approx([0.193, 0.466, 0.910], abs=0.002)


@pytest.mark.slow
@needs_java
@needs_pycocoevalcap
@pytest.mark.parametrize("tokenizer", ["fastcap", "ptb"])
def test_people_score_what_is_known(people, evaluated, tokenizer):
    found = scores(evaluated(*people, "--tokenizer", tokenizer))
    wanted = {"bleu_4": 0.193, "meteor": 0.240, "rouge_l": 0.466, "cider": 0.910}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=0.002)


@pytest.mark.slow
def test_five_thousand_images_take_seconds_without_java(tmp_path, evaluated, monkeypatch):
    """In time of the processor, so that other work on the machine does not count; 20 s are allowed, 2 were measured."""
    if not SHARED.is_dir():
        pytest.skip("needs the COCO captions: set FASTCAP_SHARED")
    monkeypatch.chdir(tmp_path)
    without_java(monkeypatch)
    texts = [(SHARED / f"reference{n}.txt").read_text(encoding="utf-8").split("\n")[:5000] for n in range(5)]
    write(Path("people.json"), results(texts[0], range(5000)))
    write(Path("captions_people.json"), coco(range(5000), list(zip(*texts[1:], strict=True))))
    began = time.process_time()
    found = evaluated("--captions", "people.json", "--references", "captions_people.json")
    assert time.process_time() - began < 20
    assert found["data"]["images"] == 5000 and found["settings"]["bootstrap"] == 1000


# The recipe

RECIPE = Path(__file__).resolve().parent.parent / "docs" / "recipes" / "evaluation.md"


@pytest.mark.skipif(not RECIPE.is_file(), reason="reads the source tree")
def test_the_recipe_runs_as_it_is_written(here, fastcap):
    """Every command and every snippet, one after the other, with fewer pictures and steps."""
    pytest.importorskip("safetensors")
    (here / "good.json").rename("ours.json")
    (here / "poor.json").rename("baseline.json")
    (here / "captions_val.json").rename("captions_val2014.json")
    text = RECIPE.read_text(encoding="utf-8")
    small = {"data": ["--num-images", "60"], "train": ["--steps", "2", "--batch-size", "8", "--validate-batches", "1"]}
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.strip().splitlines()]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "fastcap"
        status, _, err = fastcap(*words[1:], *small.get(words[1], []))
        assert status == 0, err
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    for snippet in snippets:
        exec(compile(snippet, str(RECIPE), "exec"), names)
    assert names["low"] <= names["cider"] <= names["high"] and 0 < names["found"].scores["rouge_l"] < 1
    made = strict(Path("scores/evaluation.json"))
    told = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text.split("## evaluation.json")[1], re.MULTILINE))
    assert list(told) == list(made)
    assert set(made["data"]) == set(re.findall(r"`(\w+)`", told["data"]))
    assert set(made["clip"]) == set(re.findall(r"`(\w+)`", told["clip"]))
    of_a_row = set(re.findall(r"`(\w+)`", text.split("Of a row:")[1])) - {"captions", "per_image", "image_id", "caption"}
    assert set(made["rows"][0]) == of_a_row - {"reason", "remedy"}
