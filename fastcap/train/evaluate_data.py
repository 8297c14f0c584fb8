"""What `fastcap evaluate` evaluates on: the images of a split that every captioner has, and their embeddings by a CLIP."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcap import data as datasets
from fastcap.data.batching import stack_images
from fastcap.errors import bad
from fastcap.eval import Embedded

from .bars import Bar

_OP = "evaluate"
_REMEDY = "repair that, or pass --partial to evaluate the others only"


class Split:
    """The images of one split, by their ids: the cocoid where every image has one, else the imgid.

    Raises FastcapError for data that cannot be read, an unknown split, one without a caption, and ids that two images have.
    """

    def __init__(self, folder: str | os.PathLike, split: str) -> None:
        self.folder, self.split = folder, split
        described = datasets.KarpathyDataset(folder, split=split, verify=False)
        self.json, self.records = described.json, described.records
        self.key = "cocoid" if all("cocoid" in record for record in self.records) else "imgid"
        self.ids = [record[self.key] for record in self.records]
        seen: set[str] = set()
        for id, record in zip(map(str, self.ids), self.records, strict=True):
            if id in seen:
                rule = f"have a {self.key} of its own"
                remedy = "give every image of the split another"
                raise bad(_OP, f"image {record['filename']} of {self.json}", rule, record[self.key], remedy)
            seen.add(id)
        self._view = described.images()
        self._known: dict[tuple[int, str | None], tuple[Any, dict[Any, int]]] = {}

    def dataset(self, image_size: int, features: str | None) -> tuple[Any, dict[Any, int]]:
        """The images as pictures of this size, or as features, and the place of each id among them."""
        if (image_size, features) not in self._known:
            made = datasets.KarpathyDataset(self.folder, split=self.split, image_size=image_size, features=features)
            places = {record[self.key]: n for n, record in enumerate(made.records)}
            self._known[image_size, features] = made, places
        return self._known[image_size, features]

    def usable(
        self,
        captions: Sequence[tuple[str, dict[str, str]]],
        captioners: Sequence[tuple[int, str | None]],
        clip_size: int | None,
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
            left = self._keep(left, [str(id) in given for id in self.ids], name, reasons, {})
        needed = [*captioners, *([] if clip_size is None else [(clip_size, None)])]
        for image_size, features in dict.fromkeys(needed):
            made, places = self.dataset(image_size, features)
            what = "pictures" if features is None else f"features in {features}"
            left = self._keep(left, [id in places for id in self.ids], what, reasons, dict(made.skipped))
        if reasons and not partial or not left:
            got = "; ".join(reasons)
            raise bad(_OP, f"every image of split {self.split!r}", "have a caption and a picture", got, _REMEDY)
        left_out = f"{len(left)} of {len(self.ids)} images evaluated: {'; '.join(reasons)}" if reasons else ""
        return Usable(self, left, left_out)

    def describe(self, usable: Usable) -> dict[str, Any]:
        """What the results say about the data."""
        return {
            "json": str(self.json),
            "split": self.split,
            "images": len(usable.ids),
            "images_in_split": len(self.ids),
            "references": sum(map(len, usable.references)),
            "image_ids": self.key,
        }

    def item(self, index: int) -> dict:
        return self._view.describe(index)

    def _keep(self, left: list[int], has: list[bool], what: str, reasons: list[str], why: dict[str, str]) -> list[int]:
        without = [n for n, there in enumerate(has) if not there]
        if without:
            record = self.records[without[0]]
            reason = why.get(str(record["path"]))
            first = f"{self.key} {self.ids[without[0]]} ({record['filename']}{f', {reason}' if reason else ''})"
            reasons.append(f"{len(without)} without {what}, the first {first}")
        return [n for n in left if has[n]]

    def _check_foreign(self, name: str, given: dict[str, str], partial: bool) -> None:
        """Captions of images that the split does not have: of other data, of another split, or of other ids."""
        ids = {str(id) for id in self.ids}
        foreign = [id for id in given if id not in ids]
        if len(foreign) == len(given) or foreign and not partial:
            rule = f"be of the images of split {self.split!r}, by {self.key}, such as {self.ids[0]}"
            got = f"{len(foreign)} of {len(given)} of others, such as {foreign[0]}"
            part = "" if len(foreign) == len(given) else ", or pass --partial to leave them out"
            raise bad(_OP, name, rule, got, f"check --data, --split and the ids{part}")


@dataclass
class Usable:
    """The images that are evaluated, in the order of the split; `left_out` says which are not, or is empty."""

    split: Split
    indices: list[int]
    left_out: str

    def __post_init__(self) -> None:
        items = [self.split.item(n) for n in self.indices]
        self.ids = [self.split.ids[n] for n in self.indices]
        self.references: list[list[str]] = [item["captions"] for item in items]
        facts = [item["extras"].get("facts") for item in items]
        self.facts = None if None in facts else facts

    def images(self, image_size: int, features: str | None, batch_size: int) -> Iterator[Tensor]:
        """Batches [B, 3, S, S] in [-1, 1], or of features [B, R, D]."""
        made, places = self.split.dataset(image_size, features)
        view = made.images()
        for first in range(0, len(self.ids), batch_size):
            yield stack_images([view[places[id]]["image"] for id in self.ids[first : first + batch_size]])


class Judge:
    """A CLIP with the pictures and references embedded. Equal texts are embedded once and share a row's numbers, so that
    equal captions tie exactly."""

    def __init__(self, embedder: Any, usable: Usable, prompt: str, batch_size: int, show: bool) -> None:
        self._embedder, self._prompt, self._batch_size, self._show = embedder, prompt, batch_size, show
        self._cut_before = embedder.truncated
        made: list[Tensor] = []
        with Bar("pictures by the CLIP", len(usable.ids), show) as bar:
            for images in usable.images(embedder.image_size, None, batch_size):
                made.append(embedder.images(images).float())
                bar(sum(map(len, made)))
        self._image = torch.cat(made)
        self._reference = self._texts([text for references in usable.references for text in references], "references")

    @property
    def cut(self) -> int:
        """How many distinct texts were longer than the CLIP's context."""
        return self._embedder.truncated - self._cut_before

    def of(self, captions: Sequence[str], name: str) -> Embedded:
        """With the captions of one captioner."""
        return Embedded(self._texts(captions, f"captions of {name}"), self._image, self._reference)

    def _texts(self, captions: Sequence[str], label: str) -> Tensor:
        """[N, D] float32."""
        distinct = sorted(set(captions), key=lambda text: (len(text), text))  # batches of like lengths: little padding
        made: list[Tensor] = []
        with Bar(f"{label} by the CLIP", len(distinct), self._show) as bar:
            for first in range(0, len(distinct), self._batch_size):
                batch = [self._prompt + text for text in distinct[first : first + self._batch_size]]
                made.append(self._embedder.texts(batch).float())
                bar(first + len(batch))
        place = {text: n for n, text in enumerate(distinct)}
        embedded = torch.cat(made)
        return embedded[torch.tensor([place[text] for text in captions], device=embedded.device)]
