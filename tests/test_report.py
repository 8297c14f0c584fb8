"""The report of `fastcap evaluate`: which images it shows, that it needs and runs nothing from outside, and attention."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from fastcap import data
from fastcap.eval.report import Card, Said, Word, report
from fastcap.train import TrainConfig, evaluate_report, train
from fastcap.train.attention_pictures import lit
from fastcap.train.captioner import Captioner
from fastcap.train.evaluate import evaluate
from fastcap.train.evaluate_report import choose, data_uri, shade

pytestmark = pytest.mark.usefixtures("one_thread")
N = 30
VOID = {"meta", "img", "br"}
EVIL = '<script>alert("1")</script>\'&amp;<img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Elements with their attributes and texts; a tag that is not closed in order is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        self.texts.append((self._open[-1] if self._open else "", text))

    def all(self, tag, **wanted):
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    def text(self, *tags):
        return " ".join(" ".join(text for tag, text in self.texts if not tags or tag in tags).split())


def picture_of(uri):
    kind, encoded = re.fullmatch(r"data:image/(png|jpeg);base64,([\w+/=]+)", uri).groups()
    made = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))
    assert made.format.lower() == kind
    return made


def pixels(uri):
    return np.asarray(picture_of(uri)).astype(float)


def document(*names, **fields):
    rows = [
        {"name": name, "scores": {"cider": 1.25}, "intervals": {"cider": [1.0, 1.5]}, "not_measured": {}} for name in names
    ]
    return {
        "command": "fastcap evaluate", "versions": {"fastcap": "0"}, "settings": {"bootstrap": 1000}, "clip": None,
        "warnings": [], "rows": rows, "comparisons": [], "seconds": {"all": 1.0}, **fields,
    }  # fmt: skip


def results(path, captions, ids=None):
    ids = range(len(captions)) if ids is None else ids
    path.write_text(json.dumps([{"image_id": i, "caption": c} for i, c in zip(ids, captions, strict=True)]))
    return path


def folder(root, pictures):
    """A data set whose picture n is of one colour."""
    root.mkdir()
    images = []
    for n in range(pictures):
        Image.new("RGB", (40, 20), (8 * n, 255 - 8 * n, 99)).save(root / f"{n}.png")
        said = [{"raw": f"a red dog number {n}"}, {"raw": "a dog"}]
        images.append({"filename": f"{n}.png", "imgid": n, "split": "test", "sentences": said})
    (root / "dataset_x.json").write_text(json.dumps({"images": images}))
    return root


# Which images


def test_the_best_the_worst_and_some_between():
    scores = np.array([np.arange(N, dtype=float)])
    sections = choose(scores, N, 9, "CIDEr")
    assert [(title, places) for title, _, places in sections] == [
        ("Best", [29, 28, 27]), ("Worst", [0, 1, 2]), ("Most different", []), ("In between", [26, 18, 10]),
    ]  # fmt: skip


def test_several_captioners_are_also_shown_where_they_differ_most():
    scores = np.zeros((2, N))
    scores[:, :3], scores[:, 3:6] = 2, -2
    scores[:, 17] = 1, -1  # nowhere else do they differ
    scores[0, 20], scores[1, 20] = 0.1, -0.1
    sections = dict((title, places) for title, _, places in choose(scores, N, 12, "CIDEr"))
    assert sections["Best"] == [0, 1, 2] and sections["Worst"] == [5, 4, 3]
    assert sections["Most different"][:2] == [17, 20]


@pytest.mark.parametrize("captioners", [0, 1, 2, 3])
@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 8, 29, 30, 60])
def test_each_image_is_shown_once_and_as_many_as_asked_for(captioners, most):
    scores = np.random.default_rng(0).random((captioners, N)) if captioners else None
    places = [place for _, _, chosen in choose(scores, N, most, "CIDEr") for place in chosen]
    assert len(places) == len(set(places)) == min(most, N) and set(places) <= set(range(N))
    assert choose(scores, N, most, "CIDEr") == choose(scores, N, most, "CIDEr")


def test_images_of_equal_scores_come_in_their_order():
    assert choose(np.ones((1, 5)), 5, 5, "CIDEr")[0][2] == [0, 1, 2, 3, 4]


# The page


def test_every_text_is_escaped_wherever_it_comes_from():
    said = Said(EVIL, EVIL, {EVIL: 1.0}, [Word(EVIL, "data:image/png;base64,AAAA")])
    card = Card(EVIL, [EVIL], [said], missing=EVIL)
    why = {"spice": {"reason": EVIL, "remedy": EVIL}}
    made = document(EVIL, warnings=[EVIL], command=EVIL, versions={EVIL: EVIL}, clip={"fingerprint": EVIL})
    made["rows"][0]["not_measured"] = why
    made["settings"][EVIL] = EVIL
    made["comparisons"] = [{"first": EVIL, "second": EVIL, "differences": {"cider": {"value": 1, "low": -1, "high": 2}}}]
    text = report(made, EVIL, [(EVIL, EVIL, [card])], [EVIL])
    assert "alert" in text and "<script" not in text and "<img src=x" not in text
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "h1", "h2", "h3", "p",
        "div", "table", "thead", "tbody", "tr", "th", "td", "small", "span", "i", "strong", "em", "details", "summary", "ul",
        "li", "dl", "dt", "dd", "figure", "figcaption", "img",
    }  # fmt: skip
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    assert page.text().count(EVIL) > 10  # all there, as text


def test_the_page_needs_and_runs_nothing_from_outside(tmp_path):
    said = results(tmp_path / "c.json", ["a dog http://example.com/x.png"] * 12)
    evaluate(folder(tmp_path / "data", 12), captions=[said], out=tmp_path / "out", metrics=["cider"], progress=False)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    sources = [found[name] for _, found in page.elements for name in ("src", "href", "srcset") if name in found]
    assert len(sources) == 12 and all(source.startswith("data:image/") for source in sources)
    urls = re.findall(r"url\(([^)]*)\)", text)
    assert all(url.startswith("data:image/") for url in urls) and "@import" not in text
    assert page.all("meta", name="viewport") and "prefers-color-scheme: dark" in text


def test_scores_stand_with_their_intervals():
    made = document("one", "two")
    made["rows"][1]["scores"], made["rows"][1]["intervals"] = {"cider": 2.0, "rouge_l": 0.5}, {"cider": [1.5, 2.0]}
    page = Page(report(made, "on what", []))
    cells = page.text("td", "small", "th")
    assert "1.250 1.000 to 1.500" in cells and "2.000 1.500 to 2.000" in cells
    assert "ROUGE-L" in cells and "METEOR" not in cells  # columns that someone has
    assert [one["style"] for one in page.all("i")] == ["left:0.0%;width:50.0%", "left:50.0%;width:50.0%"]


def test_differences_that_hold_zero_are_grey():
    differences = {
        "cider": {"value": 0.5, "low": 0.2, "high": 0.8},
        "rouge_l": {"value": -0.1, "low": -0.3, "high": 0.1},
        "mean_length": {"value": -0.01, "low": -0.02, "high": -0.005},
    }
    made = document("one", "two", comparisons=[{"first": "two", "second": "one", "differences": differences}])
    page = Page(report(made, "on what", []))
    assert [found["class"] for found in page.all("td") if found.get("class")] == ["same", "differs", "differs"]
    cells = page.text("td", "small", "th")
    assert "two − one" in cells and "+0.500 +0.200 to +0.800" in cells and "−0.100 −0.300 to +0.100" in cells
    assert "0.0 0.0 to 0.0" in cells  # no sign where nothing is left after rounding


def test_words_of_no_reference_are_marked():
    card = Card("1", ["A red dog."], [Said("one", "A Red cat, on a <b>sofa")])
    page = Page(report(document("one"), "on what", [("Best", "", [card])]))
    assert [text for tag, text in page.texts if tag == "span"][1:] == ["cat", "on", "b", "sofa"]
    assert "A Red cat , on a < b > sofa" in page.text("p", "span")


# Pictures


def test_pictures_are_those_of_their_images(tmp_path):
    said = results(tmp_path / "c.json", [f"a dog number {n}" for n in range(12)])
    root = folder(tmp_path / "data", 12)
    evaluate(root, captions=[said], out=tmp_path / "out", metrics=["cider"], report_images=6, progress=False)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    titles = [text for tag, text in page.texts if tag == "h3"]
    pictures = page.all("img")
    assert len(titles) == len(pictures) == 6
    for title, found in zip(titles, pictures, strict=True):
        n = int(re.fullmatch(r"imgid (\d+) · \1.png", title).group(1))
        made = picture_of(found["src"])
        assert made.size == (40, 20) == (int(found["width"]), int(found["height"]))
        assert made.getpixel((20, 10)) == (8 * n, 255 - 8 * n, 99)


def test_a_picture_that_is_gone_or_broken_is_told_in_its_place(tmp_path):
    root = folder(tmp_path / "data", 3)
    (root / "0.png").unlink()
    (root / "1.png").write_text("no picture")
    said = results(tmp_path / "c.json", ["a dog"] * 3)
    evaluate(root, captions=[said], out=tmp_path / "out", metrics=["cider"], progress=False)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("img")) == 1 and len(page.all("article")) == 3
    told = page.text("p")
    assert (
        f"No picture: {root / '0.png'} (no such file)" in told and f"No picture: {root / '1.png'} (cannot identify" in told
    )


def test_large_pictures_are_made_small_and_transparent_ones_lie_on_white(tmp_path):
    Image.new("RGB", (1200, 600), (200, 30, 30)).save(tmp_path / "large.png")
    uri, size = data_uri(tmp_path / "large.png", 360)
    assert size == (360, 180) and picture_of(uri).format == "JPEG" and len(uri) < 8000
    assert np.allclose(picture_of(uri).getpixel((180, 90)), (200, 30, 30), atol=3)
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert picture_of(data_uri(tmp_path / "clear.png", 360)[0]).getpixel((5, 5)) == (255, 255, 255)


def test_no_images_leave_the_scores(tmp_path):
    said = results(tmp_path / "c.json", ["a dog"] * 3)
    root = folder(tmp_path / "data", 3)
    evaluate(root, captions=[said], out=tmp_path / "out", metrics=["cider"], report_images=0, progress=False)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert not page.all("article") and "CIDEr" in page.text("th")


# Attention


def test_a_map_lies_on_the_picture_as_light_where_was_looked():
    """What a browser makes of it, a picture of one colour under the layer, against the figures of attention."""
    alpha = np.array([[0.7, 0.1], [0.1, 0.1]])
    layer = picture_of(shade(alpha, None))
    assert layer.mode == "LA" and layer.size == (evaluate_report.SHADE,) * 2
    shown = []
    for level in (0, 200):
        ground = Image.new("RGBA", layer.size, (level, level, level, 255))
        made = np.asarray(Image.alpha_composite(ground, layer.convert("RGBA")).convert("L")).astype(float)
        assert made[0, 0] == made.max() and made[0, 0] - made[-1, -1] > 50  # bright where it looked, on black ground too
        assert np.all(np.diff(made[0]) <= 1)  # from the left to the right ever darker
        shown.append(made)
    figure = lit(np.full((24, 24, 3), 200, np.uint8), alpha).mean(2)
    assert np.abs(shown[1] - figure).max() < 30


def test_where_captioners_look_is_shown_for_each_word_and_where_not_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_report, "AT_ONCE", 2)
    data.write_scenes(tmp_path / "scenes", num_images=60, seed=0)
    for model in ("show-attend-tell", "show-and-tell"):
        config = TrainConfig(
            data=str(tmp_path / "scenes"), out=str(tmp_path / model), model=model, steps=4, width=16, batch_size=8,
            validate_every=0,
        )  # fmt: skip
        train(config, progress=False)
    runs = [tmp_path / "show-attend-tell", tmp_path / "show-and-tell"]
    made = evaluate(
        tmp_path / "scenes", runs, split="val", out=tmp_path / "out", metrics=["cider"], report_images=3, per_image=True,
        progress=False,
    )  # fmt: skip
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    said = {one["image_id"]: one["caption"] for one in made.document["rows"][0]["per_image"]}
    shown = [int(re.match(r"imgid (\d+) ", text).group(1)) for tag, text in page.texts if tag == "h3"]
    words = [text for tag, text in page.texts if tag == "figcaption"]
    assert len(shown) == 3 and words and "<unk>" not in words
    assert words == [word for id in shown for word in said[id].split()]
    layers = [found["src"] for found in page.all("img") if "class" not in found]
    assert len(layers) == len(words) and {picture_of(layer).mode for layer in layers} == {"LA"}
    captioner = Captioner.load(runs[0])
    view = data.KarpathyDataset(tmp_path / "scenes", split="val", image_size=captioner.image_size).images()
    at = {record["imgid"]: n for n, record in enumerate(view.dataset.records)}
    images = torch.stack([view[at[id]]["image"] for id in shown])
    attended, centres = captioner.attention(images, [said[id] for id in shown]), captioner.centres(images)
    maps = [alpha.numpy() for one in attended for alpha in one.maps]
    far = [
        max(np.abs(pixels(layer) - pixels(shade(alpha, laid))).max() for layer, alpha in zip(layers, maps, strict=True))
        for laid in (centres, None)
    ]
    assert far[0] <= 2 < 10 < far[1]  # laid out by what the encoder's locations see, which do not tile the picture
    thumbnails = [found["style"] for found in page.all("article")]
    assert all(
        picture_of(re.match(r"--p:url\(([^)]*)\);--a:1.000", style).group(1)).size == (48, 48) for style in thumbnails
    )
    assert "No attention of show-and-tell: model must have attention to show, got 'show-and-tell'." in page.text("p")
