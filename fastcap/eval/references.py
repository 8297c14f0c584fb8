"""Reference captions from a file, without pictures: COCO's `captions_*.json`, or Karpathy's `dataset_*.json`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcap.data.text import words
from fastcap.errors import bad
from fastcap.eval._json import is_id, is_text, kind, read_json

_OP = "eval.references"
_REMEDY = "give COCO's captions_*.json or a Karpathy-format dataset_*.json"
Id = int | str


@dataclass(frozen=True)
class References:
    """The captions that people gave to images.

    path: of the file. split: of a Karpathy-format file, None for COCO's, which is one split.
    key: what the ids are: "image_id" of COCO's format, "cocoid" or "imgid" of Karpathy's.
    ids: of the images that have a reference, in the order of the file. captions: of each, at least one.
    filenames: of each its picture's name, or "" where the file has none.
    without: ids of the images that have no reference; they are not in `ids`.
    wordless: how many references had no word in them, and were left out.
    facts: of each image its "facts", or None where one has none.
    """

    path: Path
    split: str | None
    key: str
    ids: list[Id]
    captions: list[list[str]]
    filenames: list[str]
    without: list[Id]
    wordless: int
    facts: list[dict] | None = None


@dataclass(frozen=True)
class _Image:
    id: Id
    filename: str
    captions: list[str]
    facts: Any = None


def read_references(path: str | os.PathLike, split: str | None = None) -> References:
    """The reference captions of a file, in either format; which one it is, the file says.

    COCO's `captions_*.json` has "images" with an "id" and "annotations" with an "image_id" and a "caption", several of them
    to an image. Karpathy's `dataset_*.json` has "images" with "sentences"; their ids are the cocoid where every image of the
    split has one, else the imgid.

    Args:
        path: of the file.
        split: of a Karpathy-format file; None is "test", and "train" includes "restval". COCO's format has no splits.

    Raises:
        FastcapError, which names the file and the entry: it is missing, no UTF-8, no JSON, or in no such format; an id is
        missing or that of two images; a caption is no string; a caption is of an image that the file does not list; there is
        no such split, or nothing in it.

    >>> found = read_references("annotations/captions_val2014.json")              # doctest: +SKIP
    >>> found.ids[0], found.captions[0]                                           # doctest: +SKIP
    """
    path = Path(path)
    document = read_json(_OP, "references", path, _REMEDY)
    found = document if isinstance(document, dict) else {}
    annotations, images = found.get("annotations"), found.get("images")
    if isinstance(annotations, list):
        if split is not None:
            remedy = "leave --split out: a file in COCO's format is one split"
            raise bad(_OP, "split", f"not be given for {path}", split, remedy)
        key, made = "image_id", _of_coco(path, annotations, images)
    elif isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images):
        split = "test" if split is None else split
        key, made = _of_karpathy(path, images, split)
    else:
        results = isinstance(document, list)
        remedy = "this looks like captions to score: pass it as --captions" if results else _REMEDY
        rule = "hold 'annotations' as COCO has them, or 'images' with 'sentences' as Karpathy's files do"
        raise bad(_OP, "references", rule, f"{path} with {kind(document)}", remedy)
    return _sound(path, split, key, made)


def _of_coco(path: Path, annotations: list, images: object) -> list[_Image]:
    if images is not None and not isinstance(images, list):
        raise bad(_OP, f"'images' of {path}", "be a list", kind(images), _REMEDY)
    listed: dict[str, _Image] = {}
    for n, image in enumerate(images or []):
        if not isinstance(image, dict) or not is_id(image.get("id")):
            raise bad(_OP, f"images[{n}] of {path}", "have an id (number or string)", repr(image)[:80], _REMEDY)
        if str(image["id"]) in listed:
            raise bad(_OP, f"images[{n}] of {path}", "have an id of its own", image["id"], "keep one entry for each image")
        listed[str(image["id"])] = _Image(image["id"], _filename(image.get("file_name")), [])
    for n, annotation in enumerate(annotations):
        sound = isinstance(annotation, dict) and is_id(annotation.get("image_id")) and is_text(annotation.get("caption"))
        if not sound:
            rule = "have an image_id (number or string) and a caption (string of Unicode)"
            remedy = "give COCO's captions_*.json; instances_*.json and person_keypoints_*.json have no captions"
            raise bad(_OP, f"annotations[{n}] of {path}", rule, repr(annotation)[:80], remedy)
        id = annotation["image_id"]
        if str(id) not in listed:
            if images is not None:
                rule = f"be of an image that {path.name} lists"
                raise bad(
                    _OP, f"annotations[{n}] of {path}", rule, f"image_id {id}", "add the image, or leave its captions out"
                )
            listed[str(id)] = _Image(id, "", [])
        listed[str(id)].captions.append(annotation["caption"])
    return list(listed.values())


def _of_karpathy(path: Path, images: list, split: str) -> tuple[str, list[_Image]]:
    for n, image in enumerate(images):
        wrong = (
            not isinstance(image, dict) or not is_text(image.get("split")) or not isinstance(image.get("sentences"), list)
        )
        if wrong:
            raise bad(_OP, f"images[{n}] of {path}", "have a split and sentences", repr(image)[:80], _REMEDY)
    known = {image["split"] for image in images}
    if split not in known:
        raise bad(_OP, "split", f"be one that {path} has", split, f"pass --split with one of: {', '.join(sorted(known))}")
    wanted = {"train", "restval"} if split == "train" else {split}
    chosen = [(n, image) for n, image in enumerate(images) if image["split"] in wanted]
    key = "cocoid" if all("cocoid" in image for _, image in chosen) else "imgid"
    made = []
    for n, image in chosen:
        id = image.get(key, n)  # as KarpathyDataset counts images without an imgid
        if not is_id(id):
            raise bad(_OP, f"images[{n}] of {path}", f"have a {key} (number or string)", repr(id)[:80], _REMEDY)
        made.append(_Image(id, _filename(image.get("filename")), list(_said(path, n, image)), image.get("facts")))
    return key, made


def _said(path: Path, n: int, image: dict) -> Iterator[str]:
    for sentence in image["sentences"]:
        if not isinstance(sentence, dict) or not is_text(sentence.get("raw")):
            rule = "have a caption in 'raw' (string of Unicode) in each of its sentences"
            raise bad(_OP, f"images[{n}] of {path}", rule, repr(sentence)[:80], _REMEDY)
        yield sentence["raw"]


def _sound(path: Path, split: str | None, key: str, images: list[_Image]) -> References:
    """With the ids checked, and with what has no word and what is then without a reference apart."""
    seen: set[str] = set()
    for image in images:
        if str(image.id) in seen:
            remedy = "give every image of the split another"
            raise bad(_OP, f"image {image.filename or image.id} of {path}", f"have a {key} of its own", image.id, remedy)
        seen.add(str(image.id))
    kept = [[caption for caption in image.captions if words(caption)] for image in images]
    wordless = sum(len(image.captions) for image in images) - sum(map(len, kept))
    having = [(image, captions) for image, captions in zip(images, kept, strict=True) if captions]
    without = [image.id for image, captions in zip(images, kept, strict=True) if not captions]
    if not having:
        where = f"{path}" if split is None else f"split {split!r} of {path}"
        got = f"none for {len(images)} images, {wordless} without a word"
        raise bad(_OP, where, "have a reference caption", got, _REMEDY)
    facts = [image.facts for image, _ in having]
    return References(
        path, split, key,
        ids=[image.id for image, _ in having], captions=[captions for _, captions in having],
        filenames=[image.filename for image, _ in having], without=without, wordless=wordless,
        facts=facts if all(isinstance(one, dict) for one in facts) else None,
    )  # fmt: skip


def _filename(value: object) -> str:
    return value if is_text(value) else ""
