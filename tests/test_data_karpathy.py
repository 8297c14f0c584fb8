"""Reading Karpathy-format folders, making batches, resuming."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from fastcap.data import CaptionTokenizer, KarpathyDataset, ShuffledBatches, collate, collate_images
from fastcap.errors import FastcapError

image = pytest.importorskip("PIL.Image")
pytest.importorskip("tokenizers")


def folder(root, captions_of_images, splits=None, filepath="val2014"):
    """A folder in the layout of dataset_coco.json: one small JPEG per entry of `captions_of_images`."""
    records, sentid = [], 0
    (root / filepath).mkdir(parents=True, exist_ok=True)
    for n, captions in enumerate(captions_of_images):
        filename = f"COCO_val2014_{n:012d}.jpg"
        image.new("RGB", (40, 30), (n * 20, 100, 200)).save(root / filepath / filename)
        sentences = [{"tokens": [], "raw": raw, "imgid": n, "sentid": sentid + i} for i, raw in enumerate(captions)]
        sentid += len(captions)
        split = splits[n] if splits else "train"
        record = {"filepath": filepath, "filename": filename, "imgid": n, "split": split, "cocoid": 100 + n}
        records.append({**record, "sentids": [s["sentid"] for s in sentences], "sentences": sentences})
    (root / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": records}))
    return root


TWO = [["A cat.", "a black cat"], ["a dog", "two dogs", "dogs"]]


def test_items_are_pairs_and_the_view_has_one_item_per_image(tmp_path):
    dataset = KarpathyDataset(folder(tmp_path, TWO), image_size=16)
    assert len(dataset) == 5 and dataset.skipped == []
    assert [dataset[i]["caption"] for i in range(5)] == dataset.captions() == TWO[0] + TWO[1]
    item = dataset[3]
    assert (item["imgid"], item["sentid"]) == (1, 3)
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32
    expected = torch.tensor([20, 100, 200]) / 255 * 2 - 1
    assert torch.allclose(item["image"].mean((1, 2)), expected, atol=0.03)  # JPEG rounds colours
    view = dataset.images()
    assert len(view) == 2
    assert view[1]["captions"] == TWO[1] and view[1]["imgid"] == 1
    assert view[1]["extras"] == {"cocoid": 101} and "image" not in view.describe(1)
    assert len(KarpathyDataset(tmp_path, max_captions=1)) == 2


def test_train_includes_restval_unless_told_otherwise(tmp_path):
    root = folder(tmp_path, [["a"], ["b"], ["c"], ["d"]], ["train", "restval", "val", "test"])
    assert KarpathyDataset(root).captions() == ["a", "b"]
    assert KarpathyDataset(root, restval=False).captions() == ["a"]
    assert KarpathyDataset(root, "restval").captions() == ["b"]
    with pytest.raises(FastcapError, match="got 'valid'; pass one of: restval, test, train, val"):
        KarpathyDataset(root, "valid")


def test_images_are_found_beside_the_json_under_image_root_or_in_images(tmp_path):
    root = folder(tmp_path / "a", TWO)
    (tmp_path / "pictures").mkdir()
    (root / "val2014").rename(tmp_path / "pictures" / "images")
    assert len(KarpathyDataset(root / "dataset_coco.json", image_root=tmp_path / "pictures")) == 5
    assert len(KarpathyDataset("unused", json=root / "dataset_coco.json", image_root=tmp_path / "pictures" / "images")) == 5


def test_normalisation_takes_a_number_or_one_per_channel(tmp_path):
    root = folder(tmp_path, TWO)
    plain = KarpathyDataset(root, mean=0.0, std=1.0)[0]["image"]
    assert plain.min() >= 0 and plain.max() <= 1
    scaled = KarpathyDataset(root, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))[0]["image"]
    by_hand = (plain - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert torch.equal(scaled, by_hand)
    with pytest.raises(FastcapError, match="std must be non-zero"):
        KarpathyDataset(root, std=0)
    with pytest.raises(FastcapError, match="mean must be one number or three"):
        KarpathyDataset(root, mean=[0.1, 0.2])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16"])
def test_every_image_mode_reads_and_transparency_lies_on_white(tmp_path, mode):
    root = folder(tmp_path, [["a"]])
    [path] = (root / "val2014").iterdir()
    if mode == "P":
        image.new("P", (8, 8), 0).save(path, format="PNG", transparency=0)
    else:
        image.new(mode, (8, 8), 0).save(path, format="PNG")
    value = KarpathyDataset(root, image_size=8)[0]["image"]
    assert (value == (1.0 if mode in ("RGBA", "LA", "P") else -1.0)).all()


def test_writing_into_an_item_does_not_change_the_next_read(tmp_path):
    dataset = KarpathyDataset(folder(tmp_path, TWO))
    before = dataset[0]["image"].clone()
    dataset[0]["image"].zero_()
    assert torch.equal(dataset[0]["image"], before)


@pytest.mark.parametrize("cache_bytes", [0, 3 * 16 * 16, 2**20])
def test_the_cache_changes_memory_and_not_values(tmp_path, cache_bytes):
    dataset = KarpathyDataset(folder(tmp_path, TWO), image_size=16, cache_bytes=cache_bytes)
    reference = KarpathyDataset(tmp_path, image_size=16)
    for i in (0, 4, 2, 0):
        assert torch.equal(dataset[i]["image"], reference[i]["image"])
    assert sum(pixels.nbytes for pixels in dataset._cache.values()) <= cache_bytes


def test_broken_and_missing_images_are_skipped_and_listed(tmp_path):
    root = folder(tmp_path, [["a"], ["b"], ["c"], ["d"]])
    paths = sorted((root / "val2014").iterdir())
    paths[0].write_bytes(b"this is no picture")
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    dataset = KarpathyDataset(root)
    assert dataset.captions() == ["d"]
    assert [path for path, _ in dataset.skipped] == [str(path) for path in paths[:3]]
    assert [reason[:12] for _, reason in dataset.skipped] == ["broken image", "no such file", "broken image"]


def test_a_cut_jpeg_too_large_for_the_cache_is_an_error_when_read(tmp_path):
    root = folder(tmp_path, [["a"], ["b"]])
    path = sorted((root / "val2014").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-10])
    dataset = KarpathyDataset(root, cache_bytes=0)
    assert dataset.skipped == []
    with pytest.raises(FastcapError, match=rf"image must be readable, got '.*{path.name} .*; repair the file"):
        dataset[0]


def test_without_verification_a_missing_image_is_an_error_when_read(tmp_path):
    root = folder(tmp_path, TWO)
    path = sorted((root / "val2014").iterdir())[0]
    path.unlink()
    dataset = KarpathyDataset(root, verify=False)
    assert len(dataset) == 5
    with pytest.raises(FastcapError, match=rf"image must be readable, got .*{path.name}"):
        dataset[0]


def test_all_images_missing_is_an_error(tmp_path):
    root = folder(tmp_path, TWO)
    for path in (root / "val2014").iterdir():
        path.unlink()
    with pytest.raises(FastcapError, match="must have an image that can be used, got .2 skipped, the first: .*no such"):
        KarpathyDataset(root)


def test_bad_captions_are_skipped_and_listed_and_an_image_without_any_is_too(tmp_path):
    dataset = KarpathyDataset(folder(tmp_path, [["a", "", "..."], [None, 3], ["b"]]))
    assert dataset.captions() == ["a", "b"]
    reasons = [reason for _, reason in dataset.skipped]
    assert sum("caption without words" in reason for reason in reasons) == 4
    assert "image 1 has no caption" in reasons
    with pytest.raises(FastcapError, match="must have an image that can be used"):
        KarpathyDataset(folder(tmp_path / "none", [[""]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', r"json must be valid JSON, got '.*dataset_x\.json \(.*line 1 column 13"),
        ("[]", "json must hold a list of 'images'"),
        ('{"images": []}', "json must hold a list of 'images'"),
        ('{"images": [{"filename": "a.png", "split": "train"}]}', r"images\[0\] of .* must have a sentences \(list\)"),
        ('{"images": [3]}', r"images\[0\] of .*dataset_x\.json must have a filename \(str\) and"),
    ],
)
def test_a_bad_json_is_refused_by_name_and_position(tmp_path, text, message):
    (tmp_path / "dataset_x.json").write_text(text)
    with pytest.raises(FastcapError, match=rf"fastcap\.data\.karpathy: {message}"):
        KarpathyDataset(tmp_path)


def test_none_or_several_jsons_are_refused(tmp_path):
    with pytest.raises(FastcapError, match=r"root must hold one dataset_\*\.json, got '0 in "):
        KarpathyDataset(tmp_path)
    for name in "ab":
        (tmp_path / f"dataset_{name}.json").write_text("{}")
    with pytest.raises(FastcapError, match=r"got '2 in .*dataset_a\.json, dataset_b\.json'; name the file: json="):
        KarpathyDataset(tmp_path)
    with pytest.raises(FastcapError, match="json must be a file"):
        KarpathyDataset(tmp_path, json=tmp_path / "none.json")


def test_a_batch_shifts_pads_and_ignores(tmp_path):
    dataset = KarpathyDataset(folder(tmp_path, TWO), image_size=8)
    tokenizer = CaptionTokenizer.train_words(dataset.captions())
    batch = collate(tokenizer, max_length=2)([dataset[0], dataset[4]])
    a, cat, dogs = (tokenizer.encode(word)[0] for word in ("a", "cat", "dogs"))
    assert batch["inputs"].tolist() == [[1, a, cat], [1, dogs, 0]]
    assert batch["target"].tolist() == [[a, cat, 2], [dogs, 2, -100]]
    assert batch["lengths"].tolist() == [3, 2]
    assert batch["images"].shape == (2, 3, 8, 8)
    assert (batch["imgids"], batch["captions"], batch["truncated"]) == ([0, 1], ["A cat.", "dogs"], 0)


def test_a_long_caption_is_cut_counted_and_still_ends(tmp_path):
    dataset = KarpathyDataset(folder(tmp_path, [["one two three four"], ["one"]]), image_size=8)
    tokenizer = CaptionTokenizer.train_words(dataset.captions())
    batch = collate(tokenizer, max_length=2)([dataset[0], dataset[1]])
    one, two = tokenizer.encode("one two")
    assert batch["inputs"].tolist() == [[1, one, two], [1, one, 0]]
    assert batch["target"].tolist() == [[one, two, 2], [one, 2, -100]]
    assert batch["truncated"] == 1
    with pytest.raises(FastcapError, match="max_length must be an integer of at least 1, got 0"):
        collate(tokenizer, 0)


def test_workers_give_the_batches_of_the_main_process(tmp_path):
    dataset = KarpathyDataset(folder(tmp_path, [[f"caption {n}"] for n in range(10)]), image_size=8)
    make = collate(CaptionTokenizer.train_words(dataset.captions()), 5)
    found = []
    for workers in (0, 2):
        batches = ShuffledBatches(len(dataset), 3, seed=7)
        found.append(
            [batch["imgids"] for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=make, num_workers=workers)]
        )
    assert found[0] == found[1]
    assert sorted(sum(found[0], [])) == list(range(10))
    view = DataLoader(dataset.images(), batch_size=4, collate_fn=collate_images)
    first = next(iter(view))
    assert first["images"].shape == (4, 3, 8, 8) and first["captions"][2] == ["caption 2"]
    assert first["extras"][1] == {"cocoid": 101}


def test_training_resumes_at_the_exact_batch_although_workers_read_ahead(tmp_path):
    dataset = KarpathyDataset(folder(tmp_path, [[f"caption {n}"] for n in range(20)]), image_size=8)
    make = collate(CaptionTokenizer.train_words(dataset.captions()), 5)

    def consume(batches, steps, workers):
        """Train for `steps` batches over as many epochs as that takes."""
        seen = []
        while len(seen) < steps:
            for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=make, num_workers=workers):
                seen.append(batch["imgids"])
                batches.advance()
                if len(seen) == steps:
                    break
        return seen

    whole = consume(ShuffledBatches(20, 3, seed=1), 17, workers=0)
    for stop in (4, 7, 9):  # inside an epoch, at the end of one, inside the next (7 batches each)
        first = ShuffledBatches(20, 3, seed=1)
        before = consume(first, stop, workers=2)
        state = json.loads(json.dumps(first.state_dict()))
        assert (state["epoch"], state["batch"]) == divmod(stop, 7)
        second = ShuffledBatches(20, 3, seed=1)
        second.load_state_dict(state)
        assert before + consume(second, 17 - stop, workers=0) == whole


def test_an_epoch_holds_every_item_once_in_an_order_of_its_own():
    batches = ShuffledBatches(10, 4, seed=2)
    first = list(batches)
    assert first == list(batches)  # iterating moves nothing
    assert [len(batch) for batch in first] == [4, 4, 2] and len(batches) == 3
    batches.set_position(0, 3)
    assert (batches.epoch, batches.batch) == (1, 0)
    assert sorted(sum(first, [])) == sorted(sum(batches, [])) == list(range(10))
    assert list(batches) != first != list(ShuffledBatches(10, 4, seed=3))
    assert [len(batch) for batch in ShuffledBatches(10, 4, drop_last=True)] == [4, 4]


def test_a_sampler_refuses_what_it_cannot_do():
    for arguments in ((0, 1), (5, 0), (5, 2.0), (5, 2, -1)):
        with pytest.raises(FastcapError, match=r"fastcap\.data\.ShuffledBatches: \w+ must be an integer of at least"):
            ShuffledBatches(*arguments)
    with pytest.raises(FastcapError, match="drop_last must leave at least one batch"):
        ShuffledBatches(3, 4, drop_last=True)
    batches = ShuffledBatches(10, 4)
    with pytest.raises(FastcapError, match="position must have 0 <= batch <= 3, got 'epoch 0, batch 4'"):
        batches.set_position(0, 4)
    with pytest.raises(FastcapError, match="got 'num_items 11 instead of 10'; resume with the same data"):
        batches.load_state_dict(ShuffledBatches(11, 4).state_dict())


def test_importing_the_package_needs_no_extra_and_a_missing_one_is_named():
    program = """
import sys
for name in ("PIL", "tokenizers", "emoji"):
    sys.modules[name] = None  # as if not installed
import fastcap.data
from fastcap.data import CaptionTokenizer, KarpathyDataset, make_scenes, write_emoji, write_scenes
make_scenes(12)
for call in (lambda: CaptionTokenizer.train_words(["a"]), lambda: write_scenes("none"), lambda: write_emoji("none")):
    try:
        call()
    except fastcap.errors.FastcapError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert [line.split(" must be installed")[0].split(": ")[1] for line in lines] == ["tokenizers", "pillow", "emoji"]
    assert all(line.endswith("run: pip install 'fastcap[train]'") for line in lines)
