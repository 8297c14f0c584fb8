"""`fastcap evaluate`: captions of a split by models and from files, scored side by side."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

from fastcap import cli, data
from fastcap import eval as metrics
from fastcap.errors import FastcapError
from fastcap.train import TrainConfig, checkpoint, evaluate_judge, train
from fastcap.train.bars import Bar
from fastcap.train.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
N = 6  # images of the split "test" of `coco`


class FakeClip:
    """Knows each text and picture by a random vector; counts what it is shown."""

    image_size, width, fingerprint = 8, 16, "fake"

    def __init__(self, context=None):
        self.truncated, self.context, self.shown = 0, context, []

    def _vector(self, seed):
        return torch.randn(self.width, generator=torch.Generator().manual_seed(seed % 2**31))

    def images(self, images):
        assert images.shape[1:] == (3, 8, 8) and -1 <= images.min() and images.max() <= 1
        return torch.stack([self._vector(int(image.mul(1e4).sum())) for image in images])

    def texts(self, captions):
        assert isinstance(captions, list)
        self.shown += captions
        if self.context:
            self.truncated += sum(len(caption.split()) > self.context for caption in captions)
        return torch.stack([self._vector(sum(map(ord, caption)) * 31 + len(caption)) for caption in captions])


class KnowingClip(FakeClip):
    """Image n, in the order shown, is direction n; so is the text "n", and every other text is a direction of its own."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def images(self, images):
        self.seen += len(images)
        return torch.eye(self.width)[self.seen - len(images) : self.seen]

    def texts(self, captions):
        return torch.stack([torch.eye(self.width)[int(c) if c.isdigit() else self.width - 1] for c in captions])


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """METEOR takes a second to start. test_evaluate_files.py has what needs Java, and what is said without it."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)


@pytest.fixture
def clips(monkeypatch):
    """The CLIPs that a source names, by source; any other is a FakeClip. Returned to be filled."""
    known = {}

    def load(source, device):
        if source == "gone":
            raise FastcapError("fastcap.train: clip must be there, got 'gone'; pass another")
        return known.setdefault(source, FakeClip())

    monkeypatch.setattr(evaluate_judge, "load_embedder", load)
    return known


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


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    data.write_scenes(folder, num_images=60, seed=0)
    return folder


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    """Two captioners of scenes, hardly trained."""
    out = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("two", 1)):
        config = TrainConfig(
            data=str(scenes),
            out=str(out / name),
            seed=seed,
            steps=4,
            width=16,
            attention_width=8,
            batch_size=8,
            validate_every=0,
        )
        train(config, progress=False)
    return out


@pytest.fixture
def coco(tmp_path):
    from PIL import Image

    """Six pictures, 100, 107, .. 135 by cocoid, and one of another split; two references each."""
    folder = tmp_path / "coco"
    folder.mkdir()
    images = []
    for n in range(N + 1):
        Image.new("RGB", (8, 8), (40 * n, 255 - 40 * n, 7 * n)).save(folder / f"{n}.png")
        said = [{"raw": f"reference {n}"}, {"raw": f"another of {n}"}]
        images.append(
            {
                "filename": f"{n}.png",
                "imgid": n,
                "cocoid": 100 + 7 * n,
                "split": "test" if n < N else "val",
                "sentences": said,
            }
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return folder


IDS = [100 + 7 * n for n in range(N)]


def write(path, captions, ids=IDS):
    """A results file with these captions."""
    path.write_text(json.dumps([{"image_id": i, "caption": c} for i, c in zip(ids, captions, strict=True)]))
    return path


def row_of(made, n=0):
    return made.document["rows"][n]


# Numbers


def test_right_captions_have_the_highest_scores(coco, clips, tmp_path):
    clips["knowing"] = KnowingClip()
    made = evaluate(coco, captions=[write(tmp_path / "right.json", map(str, range(N)))], clip="knowing", progress=False)
    scores = row_of(made)["scores"]
    assert [scores[f"{d}_r{k}"] for d in ("t2i", "i2t") for k in (1, 5, 10)] == [1.0] * 6
    assert scores["t2i_mean_rank"] == scores["i2t_median_rank"] == 1
    assert scores["clip_score"] == pytest.approx(2.5)
    assert scores["ref_clip_score"] == 0.0  # measured: no reference is like the captions


def test_swapped_captions_lose_what_they_should(coco, clips, tmp_path):
    """Captions 0 and 1 are each other's: both are found by the other image, and all six images but these two tie at 0."""
    clips["knowing"] = KnowingClip()
    said = ["1", "0", "2", "3", "4", "5"]
    made = evaluate(coco, captions=[write(tmp_path / "c.json", said)], clip="knowing", per_image=True, progress=False)
    scores = row_of(made)["scores"]
    assert scores["t2i_r1"] == scores["i2t_r1"] == pytest.approx(4 / 6)
    # behind the one above, the own image ties with four others for places 2 to 6
    assert scores["t2i_r5"] == pytest.approx((4 + 2 * 4 / 5) / 6) and scores["t2i_r10"] == 1.0
    assert scores["t2i_mean_rank"] == pytest.approx((4 * 1 + 2 * 4) / 6) and scores["t2i_median_rank"] == 1
    assert scores["clip_score"] == pytest.approx(2.5 * 4 / 6)
    each = row_of(made)["per_image"]
    assert [one["t2i_rank"] for one in each] == [4, 4, 1, 1, 1, 1]
    assert [one["clip_score"] for one in each] == pytest.approx([0, 0, 2.5, 2.5, 2.5, 2.5])
    assert [one["image_id"] for one in each] == IDS and [one["caption"] for one in each] == said


def test_references_count_in_ref_clip_score(coco, clips, tmp_path):
    """Captions that are a reference word for word: closest cosine 1, so the mean of the image's part and 1."""
    said = [f"another of {n}" for n in range(N)]
    made = evaluate(
        coco, captions=[write(tmp_path / "c.json", said)], clip="fake", per_image=True, batch_size=4, progress=False
    )
    each = row_of(made)["per_image"]
    wanted = [2 * c / (c + 1) for c in (one["clip_score"] for one in each)]
    assert [one["ref_clip_score"] for one in each] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert 0 < max(wanted) and row_of(made)["scores"]["ref_clip_score"] == pytest.approx(sum(wanted) / N)


def test_one_caption_for_every_image_has_chance(coco, clips, tmp_path):
    """Batches of one text at a time, whose embeddings could differ by rounding: equal captions still tie."""
    made = evaluate(coco, captions=[write(tmp_path / "c.json", ["a thing"] * N)], clip="fake", batch_size=1, progress=False)
    scores = row_of(made)["scores"]
    assert [scores["i2t_r1"], scores["i2t_r5"], scores["i2t_mean_rank"]] == pytest.approx([1 / N, 5 / N, (N + 1) / 2])
    assert scores["t2i_mean_rank"] == pytest.approx((N + 1) / 2)  # its images come in some order, each place once
    assert clips["fake"].shown.count("a thing") == 1


def test_facts_and_diversity_are_those_of_the_captions(scenes, tmp_path):
    """On scenes what people said is true; a caption of another scene is not."""
    view = data.KarpathyDataset(scenes, split="train", verify=False).images()
    items = [view.describe(i) for i in range(len(view))]
    said = [item["captions"][0] for item in items]
    path = write(tmp_path / "people.json", said, [item["imgid"] for item in items])
    shifted = write(tmp_path / "shifted.json", said[1:] + said[:1], [item["imgid"] for item in items])
    made = evaluate(scenes, captions=[path, shifted], split="train", metrics=["facts", "diversity"], progress=False)
    people, other = (row_of(made, n)["scores"] for n in (0, 1))
    assert people["fact_precision"] == 1.0 > other["fact_precision"]
    assert people["oracle_r1"] > other["oracle_r1"]
    wanted = data.score_captions(said, [item["extras"]["facts"] for item in items]) | metrics.diversity(said)
    assert people == wanted
    assert other["vocabulary"] == people["vocabulary"] and other["mean_length"] == people["mean_length"]


# What cannot be measured


def test_without_a_clip_nothing_of_it_is_a_number(coco, tmp_path):
    chosen = ["retrieval", "clip_score", "ref_clip_score", "facts", "diversity"]
    made = evaluate(coco, captions=[write(tmp_path / "c.json", ["a b"] * N)], metrics=chosen, progress=False)
    row = row_of(made)
    assert set(row["scores"]) == {"mean_length", "unique_share", "vocabulary", "distinct_1", "distinct_2"}
    assert set(row["not_measured"]) == {"retrieval", "clip_score", "ref_clip_score", "facts"}
    assert row["not_measured"]["retrieval"]["reason"] == "no CLIP was given"
    assert "R@1" not in made.table and "CLIPScore" not in made.table.split("Not measured")[0]
    assert "Not measured: retrieval, clip_score, ref_clip_score (no CLIP was given; pass --clip, " in made.table
    assert "Not measured: facts (the data hold no facts; evaluate on scenes: fastcap data scenes)." in made.table


def test_pictures_that_nothing_looks_at_need_not_be_there(coco, tmp_path):
    for picture in coco.glob("*.png"):
        picture.unlink()
    made = evaluate(coco, captions=[write(tmp_path / "c.json", ["a b"] * N)], progress=False)
    assert row_of(made)["scores"]["mean_length"] == 2.0


def test_a_metric_of_one_row_only_is_a_dash_in_the_other():
    rows = [
        metrics.Row("a", {"clip_score": 0.5}, {}),
        metrics.Row("b", {}, {"clip_score": metrics.NotMeasured("why", "do")}),
    ]
    assert metrics.table(rows, "head").splitlines() == [
        "head",
        "",
        "| CLIP | CLIPScore | RefCLIPScore |",
        "| :--- | --------: | -----------: |",
        "| a    |     0.500 |            - |",
        "| b    |         - |            - |",
        "",
        "Not measured of b: clip_score (why; do).",
    ]


# The command


def test_models_and_files_make_one_table(fastcap, clips, scenes, runs, tmp_path):
    out = tmp_path / "out"
    arguments = ["evaluate", "--data", scenes, "--clip", "judge", "--split", "train", "--out", out]
    status, said, err = fastcap(
        *arguments, "--checkpoint", runs / "one", "--checkpoint", runs / "two", "--per-image", "--batch-size", 7
    )
    assert status == 0, err
    document = json.loads((out / "evaluation.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["one", "two"]
    assert (out / "evaluation.md").read_text() == said
    count = len(data.KarpathyDataset(scenes, verify=False).records)
    assert said.startswith(f"{count} images of train in {scenes / 'dataset_scenes.json'}, greedy, judged by judge\n")
    for head in ("references", "caption to image", "image to caption", "CLIPScore", "facts of scenes", "words"):
        assert head in said
    assert len([line for line in said.splitlines() if line.startswith("| one ")]) == 6
    assert document["settings"]["batch_size"] == 7 and document["settings"]["clip"] == "judge"
    assert document["clip"] == {"source": "judge", "fingerprint": "fake", "width": 16}
    assert document["versions"]["torch"] == torch.__version__ and document["rows"][0]["step"] == 4
    for row in document["rows"]:
        each = row["per_image"]
        assert len(each) == count
        for key in ("clip_score", "ref_clip_score"):
            assert sum(one[key] for one in each) / count == pytest.approx(row["scores"][key])
        assert sum(one["t2i_rank"] for one in each) / count == pytest.approx(row["scores"]["t2i_mean_rank"])
        assert sum(one["length"] for one in each) / count == pytest.approx(row["scores"]["mean_length"])
    # What it wrote down can be evaluated in place of the model, and scores the same.
    status, _, err = fastcap(*arguments, "--captions", out / "captions-one.json", "--captions", out / "captions-two.json")
    assert status == 0, err
    again = json.loads((out / "evaluation.json").read_text())
    assert [row["scores"] for row in again["rows"]] == [row["scores"] for row in document["rows"]]
    assert again["rows"][0]["captions"] == str(out / "captions-one.json") and "per_image" not in again["rows"][0]


@pytest.mark.parametrize("beam", [1, 3])
def test_captions_are_those_of_the_caption_command(fastcap, scenes, runs, tmp_path, beam):
    made = evaluate(scenes, [runs / "one"], split="val", beam=beam, out=tmp_path, batch_size=3, progress=False)
    said = metrics.read_results(tmp_path / "captions-one.json")
    records = data.KarpathyDataset(scenes, split="val", verify=False).records
    assert list(said) == [str(record["imgid"]) for record in records]
    pictures = [record["path"] for record in records]
    status, out, err = fastcap("caption", "--checkpoint", runs / "one", "--beam", beam, *pictures)
    assert status == 0, err
    assert [line.split("\t")[1] for line in out.splitlines()] == list(said.values())
    assert ("beam 3" in made.table) == (beam == 3)


def test_a_checkpoint_of_a_run_has_its_step_in_its_name(scenes, runs):
    step = checkpoint.find(runs / "one")
    made = evaluate(scenes, [runs / "one", step], split="val", progress=False)
    assert [row["name"] for row in made.document["rows"]] == ["one", "one/step-00000004"]
    assert row_of(made, 0)["scores"] == row_of(made, 1)["scores"]


def test_a_model_of_features_needs_pictures_for_the_clip_only(scenes, clips, tmp_path):
    import numpy as np

    document = json.loads((scenes / "dataset_scenes.json").read_text())
    rng = np.random.default_rng(0)
    arrays = {str(record["imgid"]): rng.normal(size=(2, 6)).astype("f4") for record in document["images"]}
    np.savez(tmp_path / "regions.npz", **arrays)
    config = TrainConfig(
        data=str(scenes), out=str(tmp_path / "run"), features=str(tmp_path / "regions.npz"), steps=2, width=16,
        attention_width=8, batch_size=8, validate_every=0,
    )  # fmt: skip
    train(config, progress=False)
    made = evaluate(scenes, [tmp_path / "run"], clip="judge", split="val", progress=False)
    (tmp_path / "regions.npz").rename(tmp_path / "moved.npz")
    with pytest.raises(FastcapError, match="regions.npz"):
        evaluate(scenes, [tmp_path / "run"], split="val", progress=False)
    moved = evaluate(scenes, [tmp_path / "run"], clip="judge", split="val", features=tmp_path / "moved.npz", progress=False)
    assert row_of(moved)["scores"] == row_of(made)["scores"] and "t2i_r1" in row_of(made)["scores"]
    short = {name: array for name, array in arrays.items() if name != str(document["images"][-1]["imgid"])}
    np.savez(tmp_path / "short.npz", **short)
    split = document["images"][-1]["split"]
    with pytest.raises(FastcapError, match="1 without features in .*short.npz, the first imgid 59 "):
        evaluate(scenes, [tmp_path / "run"], split=split, features=tmp_path / "short.npz", progress=False)


def test_the_prompt_stands_before_what_the_clip_reads(coco, clips, tmp_path):
    path = write(tmp_path / "c.json", ["a cat"] * N)
    made = evaluate(coco, captions=[path], clip="fake", clip_prompt="A photo depicts ", progress=False)
    assert "A photo depicts a cat" in clips["fake"].shown
    assert all(text.startswith("A photo depicts ") for text in clips["fake"].shown)
    assert made.document["settings"]["clip_prompt"] == "A photo depicts "


def test_texts_that_the_clip_cuts_are_counted(coco, clips, tmp_path):
    clips["short"] = FakeClip(context=2)
    clips["short"].truncated = 5  # of earlier use
    made = evaluate(coco, captions=[write(tmp_path / "c.json", ["a", "a b c"] * 3)], clip="short", progress=False)
    # "a b c" and the six references "another of n"
    assert made.document["warnings"] == ["7 texts were longer than the CLIP's context, which cut them"]
    assert made.table.endswith("\n\nWarning: 7 texts were longer than the CLIP's context, which cut them.")


# The judge must not be the reward


def rewarded(run, to, clip, **fields):
    """A copy of a run whose configuration says that a CLIP rewarded it."""
    shutil.copytree(run, to)
    state = checkpoint.find(to) / "trainer.json"
    document = json.loads(state.read_text())
    document["config"].update({"reward_clip": clip, "objective": "wtf-rl", **fields})
    state.write_text(json.dumps(document))
    return to


def test_the_clip_that_rewarded_a_captioner_is_no_judge_of_it(scenes, clips, runs, tmp_path):
    assert "reward_clip" in {field.name for field in dataclasses.fields(TrainConfig)}
    clips["other"] = FakeClip()
    clips["other"].fingerprint = "other"
    by_judge = rewarded(runs / "one", tmp_path / "by-judge", "judge")
    by_copy = rewarded(runs / "one", tmp_path / "by-copy", "a copy of judge")
    by_other = rewarded(runs / "one", tmp_path / "by-other", "other")
    by_gone = rewarded(runs / "one", tmp_path / "by-gone", "gone")
    later = rewarded(runs / "one", tmp_path / "later", None, init_from=str(by_copy), objective="mle")
    made = evaluate(
        scenes, [by_judge, by_copy, by_other, by_gone, later, runs / "two"], clip="judge", split="val", progress=False
    )
    told = [text for text in made.document["warnings"] if "rewarded" in text]
    assert [(text.split()[0], "this very CLIP" in text) for text in told] == [
        ("by-judge", True), ("by-copy", True), ("by-gone", False), ("later", True),
    ]  # fmt: skip
    assert "gone, which cannot be compared with --clip" in told[2] and "Warning: by-judge was rewarded" in made.table
    for options in ({"checkpoints": [by_other], "clip": "judge"}, {"checkpoints": [by_judge]}):
        assert "rewarded" not in evaluate(scenes, **options, split="val", progress=False).table


def test_a_trained_clip_judges(fastcap, scenes, runs, tmp_path):
    """The whole command, against embeddings taken by hand and dense similarities; and the warning by true fingerprints."""
    from fastcap.train import embedders

    config = TrainConfig(
        data=str(scenes), out=str(tmp_path / "clip"), model="clip", steps=12, width=32, batch_size=16, validate_every=0
    )
    train(config, progress=False)
    shutil.copytree(tmp_path / "clip", tmp_path / "moved")
    said = rewarded(runs / "one", tmp_path / "rewarded", str(tmp_path / "moved"))
    status, out, err = fastcap(
        "evaluate", "--data", scenes, "--checkpoint", said, "--clip", tmp_path / "clip", "--out", tmp_path / "out"
    )
    assert status == 0, err
    assert f"Warning: rewarded was rewarded with this very CLIP, {tmp_path / 'moved'}: " in out
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    embedder = embedders.load(str(tmp_path / "clip"), "cpu")
    assert document["clip"]["fingerprint"] == embedder.fingerprint
    view = data.KarpathyDataset(scenes, split="test", image_size=embedder.image_size).images()
    captions = list(metrics.read_results(tmp_path / "out" / "captions-rewarded.json").values())
    text = embedder.texts(captions).double()
    image = embedder.images(torch.stack([item["image"] for item in view])).double()
    cosines = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
    scores = document["rows"][0]["scores"]
    assert scores["clip_score"] == pytest.approx(2.5 * cosines.diag().clamp_min(0).mean().item(), abs=1e-6)
    above = (cosines > cosines.diag()[:, None] + 1e-6).sum(1)
    level = ((cosines - cosines.diag()[:, None]).abs() <= 1e-6).sum(1) - 1
    assert scores["t2i_mean_rank"] == pytest.approx((1 + above + level / 2).mean().item())
    of = torch.tensor([n for n, item in enumerate(view) for _ in item["captions"]])
    reference = embedder.texts([caption for item in view for caption in item["captions"]]).double()
    closest = torch.nn.functional.cosine_similarity(text[of], reference)
    best = torch.stack([closest[of == n].max() for n in range(len(text))])
    part = 2.5 * cosines.diag()
    wanted = torch.where((part > 0) & (best > 0), 2 * part * best / (part + best), 0.0).mean().item()
    assert 0.1 < wanted == pytest.approx(scores["ref_clip_score"], abs=1e-5)


# Images and ids


def test_captions_belong_to_cocoids_where_there_are_any(coco, tmp_path):
    made = evaluate(coco, captions=[write(tmp_path / "c.json", ["a b"] * N, map(str, IDS))], progress=False)
    assert made.document["data"]["image_ids"] == "cocoid" and made.document["data"]["images"] == N
    with pytest.raises(
        FastcapError, match=r"captions of .*c.json must be of the images of split 'test', by cocoid, such as 100"
    ):
        evaluate(coco, captions=[write(tmp_path / "c.json", ["a b"] * N, range(N))], progress=False)


def test_a_missing_caption_is_an_error_unless_a_part_is_asked_for(coco, clips, tmp_path):
    path = write(tmp_path / "c.json", ["a", "b", "c", "d"], IDS[:4])
    message = (
        r"fastcap.evaluate: every image of split 'test' must have a caption and a picture, got '2 without captions of .*, "
        r"the first cocoid 128 \(4.png\)'; repair that, or pass --partial to evaluate the others only"
    )
    with pytest.raises(FastcapError, match=message):
        evaluate(coco, captions=[path], progress=False)
    clips["knowing"] = KnowingClip()
    made = evaluate(coco, captions=[path], clip="knowing", partial=True, per_image=True, progress=False)
    assert made.document["data"]["images"] == 4 and made.document["data"]["images_in_split"] == N
    assert [one["image_id"] for one in row_of(made)["per_image"]] == IDS[:4]
    assert "Warning: 4 of 6 images evaluated: 2 without captions of " in made.table


def test_captions_of_other_images_are_an_error_unless_a_part_is_asked_for(coco, tmp_path):
    path = write(tmp_path / "c.json", ["a b"] * (N + 1), [*IDS, 142])
    message = r"got '1 of 7 of others, such as 142'; check --data, --split and the ids, or pass --partial to leave them out"
    with pytest.raises(FastcapError, match=message):
        evaluate(coco, captions=[path], progress=False)
    assert evaluate(coco, captions=[path], partial=True, progress=False).document["data"]["images"] == N


@pytest.mark.parametrize("harm", ["missing", "broken"])
def test_a_missing_or_broken_picture_is_an_error_that_names_it(coco, clips, tmp_path, harm):
    path = write(tmp_path / "c.json", ["a b"] * N)
    (coco / "2.png").unlink() if harm == "missing" else (coco / "2.png").write_text("no picture")
    why = "no such file" if harm == "missing" else r"broken image \(.*\)"
    with pytest.raises(FastcapError, match=rf"1 without pictures, the first cocoid 114 \(2.png, {why}\)"):
        evaluate(coco, captions=[path], clip="fake", progress=False)
    made = evaluate(coco, captions=[path], clip="fake", partial=True, per_image=True, progress=False)
    assert [one["image_id"] for one in row_of(made)["per_image"]] == [id for id in IDS if id != 114]


def test_each_caption_meets_its_own_picture_whatever_the_order_of_the_file(coco, clips, tmp_path):
    said = [f"caption {n}" for n in range(N)]
    one = evaluate(coco, captions=[write(tmp_path / "a.json", said)], clip="fake", progress=False)
    two = evaluate(coco, captions=[write(tmp_path / "b.json", said[::-1], IDS[::-1])], clip="fake", progress=False)
    assert row_of(one)["scores"] == row_of(two)["scores"]


def test_two_images_of_one_id_are_an_error(coco, tmp_path):
    document = json.loads((coco / "dataset_coco.json").read_text())
    document["images"][3]["cocoid"] = 100
    (coco / "dataset_coco.json").write_text(json.dumps(document))
    with pytest.raises(FastcapError, match=r"image 3.png of .* must have a cocoid of its own, got 100; give every image"):
        evaluate(coco, captions=[write(tmp_path / "c.json", ["a"] * N)], progress=False)


# Bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{", r"captions must be valid JSON in UTF-8, got '.*c.json \(Expecting property name.*line 1 column 3"),
        (
            b'[{"image_id": 1, "caption": "caf\xe9"}]',
            r"captions must be valid JSON in UTF-8, got \".*codec can't decode byte 0xe9",
        ),
        (b"\xff\xfe[\x00]\x00", "captions must be valid JSON in UTF-8"),
        (b"", r"captions must be valid JSON in UTF-8, got '.*c.json \(Expecting value"),
        (b"[" * 100_000, "captions must be valid JSON in UTF-8"),
        (b"[]", "captions must hold a list of captions, got '.*c.json with no entry'"),
        (b'{"100": "a"}', "captions must hold a list of captions, got \".*c.json with an object with '100'\"; give a list"),
        (b'["a"]', r"entry 0 of .*c.json must have an image_id \(number or string\) and a caption"),
        (b'[{"image_id": 100}]', "entry 0 of .*c.json must have an image_id"),
        (b'[{"image_id": 100, "caption": null}]', "entry 0 of .*c.json must have an image_id"),
        (b'[{"image_id": true, "caption": "a"}]', "entry 0 of .*c.json must have an image_id"),
        (b'[{"image_id": 1.5, "caption": "a"}]', "entry 0 of .*c.json must have an image_id"),
        (b'[{"image_id": 100, "caption": "\\ud800"}]', "entry 0 of .*c.json must have an image_id"),
        (
            b'[{"image_id": 100, "caption": "a"}, {"image_id": "100", "caption": "b"}]',
            "entry 1 of .*c.json must have an image_id of its own, got '100'; keep one caption for each image",
        ),
    ],
)
def test_a_captions_file_that_is_not_sound_is_one_error(coco, tmp_path, content, message):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(FastcapError, match="fastcap.eval.results: " + message):
        evaluate(coco, captions=[tmp_path / "c.json"], progress=False)


def test_results_keep_what_they_hold(tmp_path):
    said = {7: "a « café »", "x-1": "", 100: 'two\n"lines"'}
    metrics.write_results(tmp_path / "c.json", said)
    assert metrics.read_results(tmp_path / "c.json") == {"7": "a « café »", "x-1": "", "100": 'two\n"lines"'}
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "fastcap.evaluate: checkpoint must be given, got 'none'; pass --checkpoint RUN, or --captions FILE"),
        (["--captions", "none.json"], "fastcap.eval.results: captions must be a file, got 'none.json'; give a list of"),
        (["--captions", "."], "fastcap.eval.results: captions must be a readable file, got '. ("),
        (["--checkpoint", "none"], "fastcap.train: checkpoint must be a checkpoint or the folder of a run, got 'none'; "),
        (["--captions", "c.json", "--split", "tset"], "fastcap.data.karpathy: split must be one that "),
        (
            ["--captions", "c.json", "--batch-size", "0"],
            "fastcap.evaluate: batch_size must be an integer of at least 1, got 0",
        ),
        (
            ["--captions", "c.json", "--beam", "0"],
            "fastcap.evaluate: beam must be an integer of at least 1, got 0; pass beam=1",
        ),
        (
            ["--captions", "c.json", "--length-penalty", "nan"],
            "fastcap.evaluate: length_penalty must be a finite number, got nan; pass length_penalty=0.0",
        ),
        (["--captions", "c.json", "--out", "c.json"], "fastcap.evaluate: out must be a folder, got 'c.json'; name another"),
        (
            ["--captions", "c.json", "--out", "c.json/x"],
            "fastcap.evaluate: out must be a folder that can be made, got 'c.json/x (Not a directory)'; name another",
        ),
        (
            ["--captions", "c.json", "--captions", "c.json"],
            "fastcap.evaluate: captions must differ from the others, got 'c.json'",
        ),
        (["--captions", "c.json", "--device", "nonsense"], "fastcap.train: device must be one that torch can use here"),
    ],
)
def test_bad_input_is_one_line_and_status_2(fastcap, coco, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.json", ["a"] * N)
    status, out, err = fastcap("evaluate", "--data", coco, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1


def test_a_split_whose_images_have_no_caption_is_an_error(coco, tmp_path):
    document = json.loads((coco / "dataset_coco.json").read_text())
    for image in document["images"]:
        image["sentences"] = []
    (coco / "dataset_coco.json").write_text(json.dumps(document))
    with pytest.raises(FastcapError, match="split 'test' of .* must have an image that can be used, got "):
        evaluate(coco, captions=[write(tmp_path / "c.json", ["a"] * N)], progress=False)


def test_a_clip_is_no_captioner(scenes, runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "clip")
    state = checkpoint.find(tmp_path / "clip") / "trainer.json"
    document = json.loads(state.read_text())
    document["config"]["model"] = "clip"
    state.write_text(json.dumps(document))
    with pytest.raises(
        FastcapError, match="evaluate: checkpoint must be of a captioner, got 'a CLIP, .*'; pass it as --clip"
    ):
        evaluate(scenes, [tmp_path / "clip"], progress=False)


def test_one_path_is_no_list(coco, tmp_path):
    with pytest.raises(FastcapError, match=r"captions must be a list, got 'c.json'; pass \['c.json'\]"):
        evaluate(coco, captions="c.json")


# Metrics of given captions, as a library


def test_references_may_be_missing():
    embedded = metrics.Embedded(torch.eye(2), torch.eye(2), torch.eye(2)[:1])
    found = metrics.measure(metrics.Captioned(["a", "b"], [["a"], []], embedded=embedded))
    assert found.scores["clip_score"] == 2.5 and "ref_clip_score" not in found.scores
    assert found.not_measured["ref_clip_score"].reason == "image 1 has no reference"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"captions": []}, r"captions must be a list of at least one caption, got \[\]"),
        ({"captions": "ab"}, "captions must be a list of at least one caption, got 'ab'"),
        ({"references": [["a"]]}, "references must have an entry for each caption, 2, got 1"),
        ({"facts": [{}]}, "facts must have an entry for each caption, 2, got 1"),
        (
            {"embedded": metrics.Embedded(*[torch.eye(2)] * 3)},
            "embedded.reference must have 3 rows, got 2; embed all of them",
        ),
        (
            {"embedded": metrics.Embedded(torch.eye(2), torch.eye(3), torch.eye(2))},
            "embedded.image must have the width of text",
        ),
    ],
)
def test_what_is_measured_must_fit(fields, message):
    with pytest.raises(FastcapError, match=f"fastcap.eval.measure: {message}"):
        metrics.Captioned(**{"captions": ["a", "b"], "references": [["a"], ["b", "c"]], **fields})


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(Bar, "EVERY", 0.0)
    with Bar("captions", 2000) as bar:
        bar(64)
        bar(1000, 3000)
    with Bar("silent", 2, show=False) as bar:
        bar(1)
    assert capsys.readouterr().err == "captions: 64 of 2,000\ncaptions: 1,000 of 3,000\n"
