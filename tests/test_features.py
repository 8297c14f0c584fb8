"""Features of regions in place of pictures: files, ids, batches, workers."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastcap.data import CaptionTokenizer, KarpathyDataset, RegionFeatures, collate, collate_images
from fastcap.errors import FastcapError

REGIONS = {"101": 3, "102": 5, "103": 1, "104": 5}  # R of each image
FORMS = ["folder npy", "folder npz", "npz", "npz compressed", "npz stacked", "hdf5", "hdf5 suffixed", "hdf5 stacked"]


def arrays(regions=REGIONS, width=4, dtype=np.float32):
    generator = np.random.default_rng(0)
    return {id: generator.standard_normal((R, width)).astype(dtype) for id, R in regions.items()}


def write(path, form, values):
    """The features in one of the `FORMS`; in the stacked ones every image has the same R. Returns the path."""
    if form.startswith("folder"):
        path.mkdir()
        for id, value in values.items():
            np.save(path / f"{id}.npy", value) if form == "folder npy" else np.savez(path / f"{id}.npz", feat=value)
    elif form == "npz stacked":
        np.savez(path, features=np.stack(list(values.values())), ids=np.array([int(id) for id in values]))
        path = path.with_suffix(".npz")
    elif form.startswith("npz"):
        (np.savez_compressed if "compressed" in form else np.savez)(path, **values)
        path = path.with_suffix(".npz")
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            if form == "hdf5 stacked":
                file["features"], file["ids"] = np.stack(list(values.values())), list(values)
            for id, value in values.items() if form != "hdf5 stacked" else ():
                file[id if form == "hdf5" else f"{id}_features"] = value
                if form == "hdf5 suffixed":
                    file[f"{id}_boxes"] = np.zeros((len(value), 4))
    return path


def karpathy(root, count=4, cocoids=True, splits=None):
    """A dataset_coco.json without a picture: imgid n, cocoid 101 + n, filename pic<n>.jpg, two captions each."""
    records = []
    for n in range(count):
        sentences = [{"raw": f"caption {word} {n}", "sentid": 2 * n + i} for i, word in enumerate(("one", "two"))]
        record = {"filename": f"pic{n}.jpg", "imgid": n, "split": splits[n] if splits else "train", "sentences": sentences}
        records.append({**record, "cocoid": 101 + n} if cocoids else record)
    root.mkdir(exist_ok=True)
    (root / "dataset_coco.json").write_text(json.dumps({"images": records}))
    return root


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_was_written_as_float32(tmp_path, form, dtype):
    values = arrays({id: 3 for id in REGIONS} if "stacked" in form else REGIONS, dtype=dtype)
    features = RegionFeatures(write(tmp_path / "features", form, values))
    assert len(features) == 4 and features.width == 4 and 103 in features and "105" not in features
    for id, value in reversed(values.items()):
        found = features[int(id)]
        assert found.dtype == np.float32 and np.array_equal(found, value.astype(np.float32))
        found[:] = 7  # the caller's own
        assert np.array_equal(features[id], value.astype(np.float32))


def test_a_row_of_an_npz_is_read_without_the_others(tmp_path, monkeypatch):
    values = arrays({id: 3 for id in REGIONS})
    features = RegionFeatures(write(tmp_path / "features", "npz stacked", values))
    monkeypatch.setattr(np.lib.format, "read_array", None)  # what reads a whole member
    assert np.array_equal(features[102], values["102"])
    np.savez(tmp_path / "order.npz", ids=np.array(["a", "b"]), features=np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)))
    monkeypatch.undo()
    assert np.array_equal(RegionFeatures(tmp_path / "order.npz")["b"], np.arange(12.0, 24).reshape(3, 4))


def test_nothing_is_open_after_construction_a_pickle_or_a_fork(tmp_path):
    def open_files():
        return [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts the open files in /proc")
    for form in ("npz", "npz stacked", "hdf5"):
        values = arrays({id: 3 for id in REGIONS})
        path = write(tmp_path / form, form, values)
        features = RegionFeatures(path)
        assert str(path) not in open_files()
        features[101]
        assert str(path) in open_files()
        again = pickle.loads(pickle.dumps(features))
        assert again._store is None and np.array_equal(again[104], values["104"])
        again.close()
        read, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            closed = str(path) not in open_files()
            os.write(write_end, b"%d" % (closed and np.array_equal(features[102], values["102"])))
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 1) == b"1"
        assert np.array_equal(features[103], values["103"])  # the parent opens it again
        features.close()


@pytest.mark.parametrize("form", ["npz", "hdf5", "folder npy"])
def test_workers_give_the_batches_of_the_main_process(tmp_path, form):
    path = write(tmp_path / "features", form, arrays())
    dataset = KarpathyDataset(karpathy(tmp_path / "data"), features=path)
    dataset[0]  # opens the file in this process
    make = collate(CaptionTokenizer.train_words(dataset.captions()), 5)
    alone = list(DataLoader(dataset, batch_size=2, collate_fn=make))
    loader = DataLoader(dataset, batch_size=2, collate_fn=make, num_workers=2)
    together = list(loader)
    assert len(alone) == len(together) == 4
    for one, two in zip(alone, together, strict=True):
        assert one["imgids"] == two["imgids"] and torch.equal(one["images"], two["images"])


def test_an_item_has_its_images_features_and_needs_no_picture(tmp_path):
    values = arrays()
    dataset = KarpathyDataset(karpathy(tmp_path / "data"), features=write(tmp_path / "features", "hdf5", values))
    assert len(dataset) == 8 and dataset.skipped == []
    item = dataset[3]
    assert (item["caption"], item["imgid"]) == ("caption two 1", 1)
    assert item["image"].dtype == torch.float32 and torch.equal(item["image"], torch.tensor(values["102"]))
    assert torch.equal(dataset.images()[3]["image"], torch.tensor(values["104"]))
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3]["image"], item["image"])


@pytest.mark.parametrize("key", ["imgid", "cocoid", "stem"])
def test_the_files_names_are_one_of_the_records_three(tmp_path, key):
    names = {"imgid": "0123", "cocoid": ["101", "102", "103", "104"], "stem": ["pic0", "pic1", "pic2", "pic3"]}[key]
    values = arrays(dict.fromkeys(names, 2))
    path = write(tmp_path / "features", "npz", values)
    for features in (path, RegionFeatures(path, key=key)):
        dataset = KarpathyDataset(karpathy(tmp_path / "data"), features=features)
        for n, name in enumerate(names):
            assert np.array_equal(dataset.images()[n]["image"].numpy(), values[name])


def test_a_cocoid_that_is_another_images_imgid_does_not_confuse_them(tmp_path):
    """imgids 0..3 and cocoids 2..5: the names 2..5 are all the cocoids, and two of the imgids."""
    root = karpathy(tmp_path / "data", splits=["train", "train", "train", "val"])
    document = json.loads((root / "dataset_coco.json").read_text())
    for record in document["images"]:
        record["cocoid"] = record["imgid"] + 2
    (root / "dataset_coco.json").write_text(json.dumps(document))
    values = arrays(dict.fromkeys("2345", 2))
    path = write(tmp_path / "features", "npz", values)
    for split, expected in (("train", "234"), ("val", "5")):  # the split of one image alone could not tell
        found = KarpathyDataset(root, split, features=path).images()
        assert len(found) == len(expected)
        assert all(np.array_equal(found[n]["image"].numpy(), values[name]) for n, name in enumerate(expected))
    two = write(tmp_path / "two", "npz", arrays(dict.fromkeys("23", 2)))  # images 2 and 3 by imgid, 0 and 1 by cocoid
    with pytest.raises(FastcapError, match="image pic0.jpg must have one name in .*, got 'None by its imgid and 2 by its "):
        KarpathyDataset(root, features=two)
    chosen = KarpathyDataset(root, features=RegionFeatures(two, key="cocoid"))
    assert [item["imgid"] for item in map(chosen.images().describe, range(2))] == [0, 1]
    assert len(chosen.skipped) == 1


def test_images_without_features_are_skipped_and_listed_or_an_error_when_read(tmp_path):
    path = write(tmp_path / "features", "npz", {id: value for id, value in arrays().items() if id != "102"})
    root = karpathy(tmp_path / "data")
    dataset = KarpathyDataset(root, features=path)
    assert [record["imgid"] for record in dataset.records] == [0, 2, 3]
    assert dataset.skipped == [(str(root / "pic1.jpg"), f"no features in {path}")]
    unchecked = KarpathyDataset(root, features=path, verify=False)
    assert len(unchecked) == 8
    with pytest.raises(FastcapError, match="image pic1.jpg must have features in .*, got .none named '102', its cocoid.; "):
        unchecked[2]
    with pytest.raises(FastcapError, match="have an image that can be used, got .*; check what the features are named by"):
        KarpathyDataset(root, features=write(tmp_path / "others", "npz", arrays({"7": 2})))


def test_images_of_fewer_regions_are_padded_with_rows_of_zeros(tmp_path):
    values = arrays()
    dataset = KarpathyDataset(karpathy(tmp_path / "data"), features=write(tmp_path / "features", "npz", values))
    view = dataset.images()
    images = collate_images([view[n] for n in range(4)])["images"]
    assert images.shape == (4, 5, 4)
    for n, value in enumerate(values.values()):
        assert np.array_equal(images[n, : len(value)].numpy(), value) and not images[n, len(value) :].any()
    make = collate(CaptionTokenizer.train_words(dataset.captions()), 5)
    assert make([dataset[0], dataset[4]])["images"].shape == (2, 3, 4)
    assert make([dataset[2], dataset[6]])["images"].shape == (2, 5, 4)


def test_pictures_are_stacked_and_of_different_sizes_refused():
    from fastcap.data.batching import stack_images

    assert stack_images([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]).shape == (2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="equal size"):
        stack_images([torch.zeros(3, 8, 8), torch.ones(3, 9, 8)])


def bad_files(folder):
    """name -> (path, what the error says)."""
    good = arrays({id: 3 for id in REGIONS})
    stacked = np.stack(list(good.values()))
    (folder / "text.h5").write_text("features")
    (folder / "empty").write_bytes(b"")
    (folder / "none").mkdir()
    (folder / "both").mkdir()
    np.save(folder / "both" / "1.npy", stacked[0])
    np.savez(folder / "both" / "1.npz", stacked[0])
    np.savez(folder / "no_ids.npz", features=stacked)
    np.savez(folder / "no_features.npz", ids=[1, 2, 3, 4], att=stacked)
    np.savez(folder / "counts.npz", features=stacked, ids=[1, 2, 3])
    np.savez(folder / "floats.npz", features=stacked, ids=[1.0, 2.0, 3.0, 4.0])
    np.savez(folder / "twice.npz", features=stacked, ids=[1, 2, 1, 4])
    np.savez(folder / "rank.npz", features=stacked[0], ids=[1, 2, 3])
    np.savez(folder / "grid.npz", **{"7": stacked})
    np.savez_compressed(folder / "compressed.npz", features=stacked, ids=[1, 2, 3, 4])
    (folder / "cut.npz").write_bytes((folder / "grid.npz").read_bytes()[:-30])
    return {
        "nowhere": "path must be a file or folder, got '.*nowhere'; check the path",
        "text.h5": "path must be HDF5, npz, or a folder of .npy or .npz, got '.*text.h5'",
        "empty": "path must be HDF5, npz, or a folder of .npy or .npz, got '.*empty'",
        "none": "path must hold the features of an image, got '.*none'; name arrays",
        "both": "path must hold one file of an image, got '1.npy and 1.npz in .*both'; remove one",
        "no_ids.npz": "path must say whose features it holds, got '.*no_ids.npz'; store the images' ids",
        "no_features.npz": "path must hold 'features' with its 'ids', got 'ids, att in .*'; rename the array",
        "counts.npz": r"path must hold 'features' \[N, R, D\] with 'ids' .*, got 'features \(4, 3, 4\) with ids \(3,\) of",
        "floats.npz": r"path must hold .*, got 'features \(4, 3, 4\) with ids \(4,\) of float64 in .*; store one id",
        "twice.npz": "ids of .*twice.npz must differ, got '1 twice'; keep one row",
        "rank.npz": r"path must hold .*, got 'features \(3, 4\) with ids \(3,\)",
        "grid.npz": r"features of image 7 must be one array \[R, D\] .*, got '\(4, 3, 4\) in .*grid.npz'; reshape a grid",
        "compressed.npz": "'features' in .*compressed.npz must be stored without compression, .*; write it with np.savez",
        "cut.npz": r"path must be a whole file, got '.*cut.npz \(File is not a zip file\)'",
    }


def test_a_file_of_another_kind_is_refused_when_it_is_named(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(FastcapError, match=f"fastcap.data.features: {message}"):
            RegionFeatures(tmp_path / name)
    with pytest.raises(FastcapError, match="key must be one of 'imgid', 'cocoid', 'stem', or None, got 'name'"):
        RegionFeatures(tmp_path / "grid.npz", key="name")


@pytest.mark.parametrize("form", ["npz", "hdf5", "folder npy"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3), np.float32), r"be 4 wide, as the first image's, got '\(2, 3\) in .*; compute all features by one"),
        (
            np.zeros((0, 4), np.float32),
            r"be one array \[R, D\] that is not empty, got '\(0, 4\) in .*leave out images without",
        ),
        (
            np.zeros((2, 2, 4), np.float32),
            r"be one array \[R, D\] that is not empty, got '\(2, 2, 4\) in .*; reshape a grid",
        ),
        (np.zeros((2, 4), np.int64), "be floating-point numbers, got 'int64 in .*; store them as float16 or float32"),
        (np.array([[1, np.nan, 2, np.inf]], np.float16), "be finite, got '2 values that are not in .*; compute them again"),
    ],
)
def test_an_image_with_wrong_features_is_named_when_it_is_read(tmp_path, form, value, message):
    path = write(tmp_path / "features", form, {**arrays({"101": 3}), "102": value})
    dataset = KarpathyDataset(karpathy(tmp_path / "data", count=2), features=path)
    assert dataset[0]["image"].shape == (3, 4)
    with pytest.raises(FastcapError, match=rf"fastcap\.data\.features: features of image 102 must {message}"):
        dataset[2]


def test_broken_bytes_are_an_error_that_names_the_image(tmp_path):
    path = write(tmp_path / "features", "npz", arrays())
    with zipfile.ZipFile(path) as archive:
        values = archive.getinfo("104.npy").header_offset + 200
    data = bytearray(path.read_bytes())
    data[values : values + 10] = b"\xff" * 10
    path.write_bytes(data)
    with pytest.raises(FastcapError, match="features of image 104 must be readable, got .*Bad CRC-32 .*; copy or write"):
        RegionFeatures(path)[104]
    folder = write(tmp_path / "folder", "folder npy", arrays())
    (folder / "102.npy").write_bytes((folder / "102.npy").read_bytes()[:-3])
    with pytest.raises(FastcapError, match="features of image 102 must be readable, got .*'102.npy' in .*folder"):
        RegionFeatures(folder)[102]
    np.savez(folder / "105.npz", a=np.zeros((1, 4)), b=np.zeros((1, 4)))
    with pytest.raises(FastcapError, match="features of image 105 must be readable, got .*it holds a, b, not one array"):
        RegionFeatures(folder)[105]
    with pytest.raises(FastcapError, match=r"id must be one of the 5 in .*folder, got '9'; pass one such as '101'"):
        RegionFeatures(folder)[9]


def test_a_pickled_object_is_not_loaded(tmp_path):
    np.savez(tmp_path / "evil.npz", **{"101": np.array([[print]], dtype=object)})
    with pytest.raises(FastcapError, match="features of image 101 must be readable, got .*allow_pickle=False"):
        RegionFeatures(tmp_path / "evil.npz")[101]


def test_a_wrong_hdf5_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file["101/features"] = np.zeros((2, 4))
    with pytest.raises(FastcapError, match="path must be readable, got .*'101' is a group, not an array"):
        RegionFeatures(tmp_path / "group.h5")
    with h5py.File(tmp_path / "none.h5", "w"):
        pass
    with pytest.raises(FastcapError, match="path must hold the features of an image"):
        RegionFeatures(tmp_path / "none.h5")
    path = write(tmp_path / "cut.h5", "hdf5", arrays())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FastcapError, match=r"path must be a whole file, got .*truncated"):
        RegionFeatures(path)


def test_hdf5_needs_h5py_and_says_so(tmp_path, monkeypatch):
    path = write(tmp_path / "features", "hdf5", arrays())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(FastcapError, match="fastcap.data.features: h5py must be installed, .*; run: pip install 'fastcap"):
        RegionFeatures(path)
