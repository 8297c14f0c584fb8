"""What `fastcap evaluate` evaluates on: images by their ids, their references, and pictures where there are any."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcap import data as datasets
from fastcap.data import Attributed
from fastcap.data.batching import stack_items
from fastcap.errors import bad
from fastcap.eval import read_references
from fastcap.eval._json import is_id

_OP = "evaluate"
_REMEDY = "repair that, or pass --partial to evaluate the others only"


class Images:
    """Images with references, by their ids, in order: what a folder (`Split`) and a file (`Listed`) have in common.

    ids: of the images. key: what the ids are called. name: of all of them, in messages. json: the file of the captions.
    filenames: of each its picture's, or "". references: of each its captions. facts: of each, or None.
    without: ids of images that have no reference, which are not in `ids`. wordless: references without a word, left out.
    """

    ids: list[int | str]
    key: str
    name: str
    option: str  # that it came by
    needs: str  # what an image must have
    split: str | None
    json: Path
    filenames: list[str]
    references: list[list[str]]
    facts: list[dict] | None
    without: list[int | str]
    wordless: int
    records: Sequence[dict] = ()  # of each image, where there are pictures

    def dataset(self, image_size: int, features: str | None) -> tuple[Any, dict[Any, int]]:
        """The images as pictures of this size, or as features, and the place of each id among them."""
        raise NotImplementedError(f"{type(self).__name__} has no pictures")

    def usable(
        self,
        captions: Sequence[tuple[str, dict[str, str]]],
        captioners: Sequence[tuple[int, str | None]] = (),
        clip_size: int | None = None,
        *,
        partial: bool,
    ) -> Usable:
        """The images that have all that is needed; unless `partial`, one that lacks something is an error.

        captions: (what they are called, captions by id). captioners: (side of the pictures, path of the features or None).
        clip_size: side of the pictures for the CLIP.
        """
        left = list(range(len(self.ids)))
        reasons: list[str] = []
        for name, given in captions:
            self._check_foreign(name, given, partial)
            left = self._keep(left, [str(id) in given for id in self.ids], name, reasons)
        needed = [*captioners, *([] if clip_size is None else [(clip_size, None)])]
        for image_size, features in dict.fromkeys(needed):
            made, places = self.dataset(image_size, features)
            what = "pictures" if features is None else f"features in {features}"
            has = [id in places for id in self.ids]
            why = dict(made.skipped).get(str(self.records[has.index(False)]["path"]), "") if False in has else ""
            left = self._keep(left, has, what, reasons, why)
        if reasons and not partial or not left:
            raise bad(_OP, f"every image of {self.name}", f"have {self.needs}", "; ".join(reasons), _REMEDY)
        left_out = f"{len(left)} of {len(self.ids)} images evaluated: {'; '.join(reasons)}" if reasons else ""
        return Usable(self, left, left_out)

    def warnings(self) -> list[str]:
        """What was left out as no one can score it."""
        told = []
        if self.without:
            verb = "has" if len(self.without) == 1 else "have"
            count = f"{len(self.without):,} of {len(self.without) + len(self.ids):,} images"
            told.append(f"{count} {verb} no reference, and are left out: the first {self.key} {self.without[0]}")
        if self.wordless:
            told.append(f"{self.wordless:,} references without a word are left out")
        return told

    def describe(self, usable: Usable) -> dict[str, Any]:
        """What the results say about the data."""
        return {
            "json": str(self.json),
            "split": self.split,
            "images": len(usable.ids),
            "images_in_split": len(self.ids),
            "images_without_reference": len(self.without),
            "references": sum(map(len, usable.references)),
            "image_ids": self.key,
        }

    def _keep(self, left: list[int], has: list[bool], what: str, reasons: list[str], why: str = "") -> list[int]:
        """Those of `left` that have `what`; says how many have not, and the first with the reason `why`."""
        without = [n for n, there in enumerate(has) if not there]
        if without:
            filename = self.filenames[without[0]]
            detail = ", ".join(part for part in (filename, why) if part)
            first = f"{self.key} {self.ids[without[0]]}" + (f" ({detail})" if detail else "")
            reasons.append(f"{len(without)} without {what}, the first {first}")
        return [n for n in left if has[n]]

    def _check_foreign(self, name: str, given: dict[str, str], partial: bool) -> None:
        """Captions of images that are not here: of other data, of another split, or of other ids."""
        ids = {str(id) for id in (*self.ids, *self.without)}
        foreign = [id for id in given if id not in ids]
        if len(foreign) == len(given) or foreign and not partial:
            rule = f"be of the images of {self.name}, by {self.key}, such as {self.ids[0]}"
            got = f"{len(foreign)} of {len(given)} of others, such as {foreign[0]}"
            part = "" if len(foreign) == len(given) else ", or pass --partial to leave them out"
            raise bad(_OP, name, rule, got, f"check {self.option}, --split and the ids{part}")


class Listed(Images):
    """The images of a file of references; there are no pictures.

    Raises FastcapError as `fastcap.eval.read_references` does.
    """

    option, needs = "--references", "a caption"

    def __init__(self, path: str | os.PathLike, split: str | None) -> None:
        found = read_references(path, split)
        self.ids, self.key, self.split, self.json = found.ids, found.key, found.split, found.path
        self.name = str(found.path) if found.split is None else f"split {found.split!r}"
        self.filenames, self.references, self.facts = found.filenames, found.captions, found.facts
        self.without, self.wordless = found.without, found.wordless


class Split(Images):
    """The images of one split of a folder, by their ids: the cocoid where every image has one, else the imgid.

    Raises FastcapError for data that cannot be read, an unknown split, one without a caption, and ids that two images have.
    """

    option, needs = "--data", "a caption and a picture"

    def __init__(self, folder: str | os.PathLike, split: str | None) -> None:
        self.folder, self.split = folder, "test" if split is None else split
        self.name = f"split {self.split!r}"
        described = datasets.KarpathyDataset(folder, split=self.split, verify=False)
        self.json, self.records = described.json, described.records
        self.key = "cocoid" if all("cocoid" in record for record in self.records) else "imgid"
        self.ids = [record[self.key] for record in self.records]
        self.filenames = [record["filename"] for record in self.records]
        seen: set[str] = set()
        for id, filename in zip(self.ids, self.filenames, strict=True):
            if not is_id(id):
                rule = f"have a {self.key} (number or string)"
                raise bad(_OP, f"image {filename} of {self.json}", rule, id, "give every image of the split one")
            if str(id) in seen:
                rule = f"have a {self.key} of its own"
                raise bad(_OP, f"image {filename} of {self.json}", rule, id, "give every image of the split another")
            seen.add(str(id))
        view = described.images()
        items = [view.describe(n) for n in range(len(view))]
        self.references = [item["captions"] for item in items]
        facts = [item["extras"].get("facts") for item in items]
        self.facts = facts if all(isinstance(one, dict) for one in facts) else None
        reasons = [reason for _, reason in described.skipped]
        self.wordless = sum(reason.startswith("caption ") for reason in reasons)
        self.without = self._without_reference(described)
        self._known: dict[tuple[int, str | None], tuple[Any, dict[Any, int]]] = {}

    def dataset(self, image_size: int, features: str | None) -> tuple[Any, dict[Any, int]]:
        """The images as pictures of this size, or as features, and the place of each id among them."""
        if (image_size, features) not in self._known:
            made = datasets.KarpathyDataset(self.folder, split=self.split, image_size=image_size, features=features)
            places = {record[self.key]: n for n, record in enumerate(made.records)}
            self._known[image_size, features] = made, places
        return self._known[image_size, features]

    def _without_reference(self, described: Any) -> list[int | str]:
        """The ids of the images of the split that KarpathyDataset left out as they have no caption."""
        if not any(reason.endswith("has no caption") for _, reason in described.skipped):
            return []
        known = {record["imgid"] for record in self.records}
        wanted = {"train", "restval"} if self.split == "train" else {self.split}
        records = enumerate(json.loads(self.json.read_text(encoding="utf-8"))["images"])
        missing = [(n, record) for n, record in records if record["split"] in wanted and record.get("imgid", n) not in known]
        return [record.get(self.key, record.get("imgid", n)) for n, record in missing]


@dataclass
class Usable:
    """The images that are evaluated, in order; `left_out` says which are not, or is empty."""

    source: Images
    indices: list[int]
    left_out: str

    def __post_init__(self) -> None:
        source = self.source
        self.ids = [source.ids[n] for n in self.indices]
        self.references = [source.references[n] for n in self.indices]
        self.facts = None if source.facts is None else [source.facts[n] for n in self.indices]

    def images(
        self, image_size: int, features: str | None, batch_size: int, tokenizer: Any | None = None
    ) -> Iterator[Tensor | Attributed]:
        """Batches [B, 3, S, S] in [-1, 1], or of features [B, R, D]; with a tokenizer, with the images' attribute words."""
        for first in range(0, len(self.ids), batch_size):
            yield self.batch(range(first, min(first + batch_size, len(self.ids))), image_size, features, tokenizer)

    def batch(
        self, places: Sequence[int], image_size: int, features: str | None, tokenizer: Any | None = None
    ) -> Tensor | Attributed:
        """Those at `places` of `ids`, as `images` gives them."""
        made, where = self.source.dataset(image_size, features)
        view = made.images()
        return stack_items([view[where[self.ids[place]]] for place in places], tokenizer)

    def picture(self, place: int) -> Path | None:
        """The file of the picture at `place` of `ids`, if there are pictures."""
        records = self.source.records
        return records[self.indices[place]]["path"] if records else None
