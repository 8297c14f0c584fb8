"""Reading Karpathy-format data: a `dataset_*.json` beside a folder of images, such as the usual `dataset_coco.json`."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from fastcap.data._checks import check_int, require
from fastcap.data.features import RegionFeatures, name_of
from fastcap.data.text import words
from fastcap.errors import bad

_OP = "data.karpathy"
_STANDARD = {"filename", "filepath", "imgid", "split", "sentids", "sentences"}  # the rest of a record are its extras
_KINDS = {"filename": str, "split": str, "sentences": list}


class KarpathyDataset(Dataset):
    """One split of a Karpathy-format data set. One item is one (image, caption) pair, for training:

        {"image": float32 [3, S, S], "caption": str, "imgid": int, "sentid": int}

    and "attributes", a list of words, where the image's record has them.
    `images()` is the same data with one item per image, for evaluation.

    Args:
        root: the folder with one `dataset_*.json` (or give the file as `json`) and the images, which are looked for as
            filepath/filename and filename under `image_root` (default: the JSON's folder), then under its `images`.
        split: "train", "val", "test" or what else the JSON has. "train" includes "restval", as the field does, unless
            `restval` is False.
        image_size: S; images are resized to S x S pixels with antialiasing, without keeping their proportions.
        max_captions: at most this many captions per image, the first ones.
        mean, std: `(value - mean) / std` is returned for values in [0, 1]; a number, or one per channel.
        verify: look at every image at construction and skip those that are missing or broken. Where the split fits into
            the cache they are decoded in full, else only opened (a JPEG cut short is then found when it is read).
            Without it, a missing or broken image raises when it is read.
        cache_bytes: most memory for decoded images (uint8, 3 S^2 bytes each); 0 for none.
        features: `RegionFeatures`, or their path: an item's "image" is then its features, float32 [R, D], in place of the
            picture, which need not be there. `verify` looks whether each image has features, and skips those without.

    `skipped` lists what was left out, as (path, reason): images missing or broken, captions without a word or that are
    no string, images with no caption left. Only if nothing is left is that an error. Transparent images lie on white.

    Raises FastcapError for a missing, ambiguous or broken JSON (naming file and position) and for an unknown split.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        *,
        json: str | os.PathLike | None = None,
        image_root: str | os.PathLike | None = None,
        image_size: int = 48,
        max_captions: int | None = None,
        restval: bool = True,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        verify: bool = True,
        cache_bytes: int = 256 * 2**20,
        features: RegionFeatures | str | os.PathLike | None = None,
    ) -> None:
        check_int(_OP, "image_size", image_size, 1, "pass the pixels of a side, for example image_size=48")
        if max_captions is not None:
            check_int(_OP, "max_captions", max_captions, 1, "pass None for all captions")
        self.json = Path(json) if json is not None else _find_json(Path(root))
        self.image_root = Path(image_root) if image_root is not None else self.json.parent
        self.split, self.image_size = split, image_size
        self._mean, self._std = _per_channel("mean", mean), _per_channel("std", std)
        if (self._std == 0).any():
            raise bad(_OP, "std", "be non-zero", std, "pass for example std=0.5")
        self.features = RegionFeatures(features) if isinstance(features, (str, os.PathLike)) else features
        if features is None:
            require("PIL.Image", _OP)  # now, and not at the first picture
        self.skipped: list[tuple[str, str]] = []
        records = [self._clean(record, max_captions) for record in self._records_of_split(split, restval)]
        self.records = [record for record in records if record is not None]
        fits = len(self.records) * 3 * image_size**2 <= cache_bytes
        self._room = cache_bytes // (3 * image_size**2)
        self._cache: dict[Path, np.ndarray] = {}
        if verify:
            self.records = [record for record in self.records if self._is_sound(record, decode=fits)]
        if not self.records:
            got = f"{len(self.skipped)} skipped, the first: {self.skipped[0]}" if self.skipped else "none"
            remedy = "check image_root" if features is None else "check what the features are named by"
            raise bad(_OP, f"split {split!r} of {self.json}", "have an image that can be used", got, remedy)
        self._pairs = [(i, j) for i, record in enumerate(self.records) for j in range(len(record["sentences"]))]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict:
        i, j = self._pairs[index]
        record = self.records[i]
        sentence = record["sentences"][j]
        item = {
            "image": self._tensor(record),
            "caption": sentence["raw"],
            "imgid": record["imgid"],
            "sentid": sentence["sentid"],
        }
        return {**item, "attributes": record["attributes"]} if "attributes" in record else item

    def captions(self) -> list[str]:
        """Every caption of the split, in the order of the items; what a tokenizer is trained on."""
        return [self.records[i]["sentences"][j]["raw"] for i, j in self._pairs]

    def images(self) -> ImagesView:
        """The same split with one item per image; see `ImagesView`."""
        return ImagesView(self)

    def _records_of_split(self, split: str, restval: bool) -> list[dict]:
        document = _read_json(self.json)
        self._key = self.features.choose_key(document) if self.features is not None else None
        known = {record["split"] for record in document}
        wanted = {split, "restval"} if split == "train" and restval else {split}
        if split not in known:
            raise bad(_OP, "split", f"be one that {self.json} has", split, f"pass one of: {', '.join(sorted(known))}")
        return [record for record in document if record["split"] in wanted]

    def _clean(self, record: dict, max_captions: int | None) -> dict | None:
        """The record with usable captions only and the image's path, or None (listed) if it has no caption."""
        path = self._path(record)
        kept = []
        for sentence in record["sentences"]:
            raw = sentence.get("raw") if isinstance(sentence, dict) else None
            if isinstance(raw, str) and words(raw):
                kept.append({**sentence, "sentid": sentence.get("sentid", -1)})
            else:
                self.skipped.append((str(path), f"caption without words: {sentence!r}"))
        if not kept:
            self.skipped.append((str(path), f"image {record['imgid']} has no caption"))
            return None
        return {**record, "sentences": kept[:max_captions], "path": path}

    def _path(self, record: dict) -> Path:
        inner = Path(record.get("filepath") or "") / record["filename"]
        tried = [base / name for base in (self.image_root, self.image_root / "images") for name in (inner, inner.name)]
        return next((path for path in tried if path.is_file()), tried[0])

    def _is_sound(self, record: dict, decode: bool) -> bool:
        if self.features is not None:
            found = self.features.id_of(record, self._key) is not None
            if not found:
                self.skipped.append((str(record["path"]), f"no features in {self.features.path}"))
            return found
        try:
            if decode:
                self._pixels(record)
            else:
                with require("PIL.Image", _OP).open(record["path"]) as image:
                    image.verify()
        except FileNotFoundError:
            self.skipped.append((str(record["path"]), "no such file"))
        except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error, ...
            self.skipped.append((str(record["path"]), f"broken image ({error})"))
        else:
            return True
        return False

    def _pixels(self, record: dict) -> np.ndarray:
        """The image as uint8 [S, S, 3], from the cache or the file."""
        key = record["path"]
        if key in self._cache:
            return self._cache[key]
        pixels = read_pixels(record["path"], self.image_size)
        if len(self._cache) < self._room:
            self._cache[key] = pixels
        return pixels

    def _tensor(self, record: dict) -> torch.Tensor:
        if self.features is not None:
            return torch.from_numpy(self.features.of(record, self._key))
        try:
            pixels = self._pixels(record)
        except Exception as error:
            remedy = "repair the file, or construct with verify=True to skip such images"
            raise bad(_OP, "image", "be readable", f"{record['path']} ({error})", remedy) from error
        # A copy: the cache's pixels must not be shared with a tensor that someone may write to.
        image = torch.tensor(pixels).permute(2, 0, 1).to(torch.float32) / 255
        return (image - self._mean) / self._std


def read_pixels(path: str | Path, size: int) -> np.ndarray:
    """A picture file as uint8 RGB [size, size, 3]: transparent pictures on white, resized bicubically with antialiasing.

    Raises what Pillow raises for a file that is missing or no picture.
    """
    Image = require("PIL.Image", _OP)
    with Image.open(path) as image:
        if "A" in image.getbands() or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        rgb = image.convert("RGB")
        return np.asarray(rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BICUBIC))


class ImagesView(Dataset):
    """One item per image: {"image": float32 [3, S, S], "captions": list[str], "imgid": int, "extras": dict}.

    `extras` are the record's other fields: "facts" and "group" of scenes, "family" and "family_status" of emoji,
    "cocoid" of COCO.
    """

    def __init__(self, dataset: KarpathyDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.records)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.dataset._tensor(self.dataset.records[index]), **self.describe(index)}

    def describe(self, index: int) -> dict:
        """The item without its image, which is not read."""
        record = self.dataset.records[index]
        return {
            "captions": [sentence["raw"] for sentence in record["sentences"]],
            "imgid": record["imgid"],
            "extras": {name: value for name, value in record.items() if name not in _STANDARD and name != "path"},
        }


def _per_channel(name: str, value: float | Sequence[float]) -> torch.Tensor:
    tensor = torch.tensor(value, dtype=torch.float32)
    if tensor.numel() not in (1, 3):
        raise bad(_OP, name, "be one number or three", value, "pass one per channel")
    return tensor.reshape(-1, 1, 1)


def _find_json(root: Path) -> Path:
    if root.is_file():
        return root
    found = sorted(root.glob("dataset_*.json"))
    if len(found) != 1:
        got = f"{len(found)} in {root}" + "".join(f", {path.name}" for path in found)
        raise bad(_OP, "root", "hold one dataset_*.json", got, "name the file: json=...")
    return found[0]


def read_attributes(path: str | os.PathLike, features: RegionFeatures | None = None) -> dict[str, list[str]]:
    """The attribute words of the images of a Karpathy-format file, by the picture's name or the features' id."""
    records = _read_json(Path(path))
    key = None if features is None else features.choose_key(records)
    names = [Path(record["filename"]).name if key is None else name_of(record, key) for record in records]
    found = {name: record["attributes"] for name, record in zip(names, records, strict=True) if "attributes" in record}
    if not found:
        remedy = 'add "attributes": ["red", "circle"] to its records'
        raise bad(_OP, "json", "have the attributes of an image", str(path), remedy)
    return found


def _read_json(path: Path) -> list[dict]:
    """The checked `images` of the file."""
    remedy = "give a Karpathy-format dataset_*.json"
    try:
        with open(path, encoding="utf-8") as file:
            document = json_module.load(file)
    except FileNotFoundError as error:
        raise bad(_OP, "json", "be a file", str(path), remedy) from error
    except (ValueError, RecursionError) as error:  # broken JSON (its message gives the place) or text that is not UTF-8
        raise bad(_OP, "json", "be valid JSON", f"{path} ({error})", remedy) from error
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list) or not images:
        raise bad(_OP, "json", "hold a list of 'images'", str(path), remedy)
    for n, record in enumerate(images):
        wrong = [key for key, kind in _KINDS.items() if not isinstance(record, dict) or type(record.get(key)) is not kind]
        if wrong:
            rule = " and ".join(f"have a {key} ({_KINDS[key].__name__})" for key in wrong)
            raise bad(_OP, f"images[{n}] of {path}", rule, str(record)[:80], remedy)
        record.setdefault("imgid", n)
        if not isinstance(record.get("filepath") or "", str):
            raise bad(_OP, f"filepath of images[{n}] of {path}", "be a string", record["filepath"], remedy)
        attributes = record.get("attributes", [])
        if not isinstance(attributes, list) or not all(isinstance(word, str) for word in attributes):
            remedy = 'write "attributes": ["red", "circle"], or leave them out'
            raise bad(_OP, f"attributes of images[{n}] of {path}", "be a list of words", str(attributes)[:80], remedy)
    return images
