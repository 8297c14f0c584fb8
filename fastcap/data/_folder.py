"""Writing a Karpathy-format folder so that an interrupted run never leaves one that looks complete."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fastcap.data.text import words
from fastcap.errors import bad

_MARKER = ".fastcap-unfinished"  # stands in the folder from the first write until the JSON is in place


@dataclass(frozen=True)
class DatasetSummary:
    """What `write_scenes` or `write_emoji` wrote.

    `splits` maps a split to its number of images; `skipped` lists (name, reason) of what was left out.
    """

    root: Path
    json: Path
    images: int
    captions: int
    splits: dict[str, int]
    skipped: list[tuple[str, str]] = field(default_factory=list)


def sentences(captions: Iterable[str], imgid: int, first_sentid: int) -> list[dict]:
    """The `sentences` of one image in Karpathy's format."""
    return [{"tokens": words(raw), "raw": raw, "imgid": imgid, "sentid": first_sentid + i} for i, raw in enumerate(captions)]


class FolderWriter:
    """Opens `out` for the data set `name`; `image_path` gives where each PNG goes; `finish` writes the JSON, last.

    Raises FastcapError if `out` is a file or a folder that holds anything but an earlier (or interrupted) run's output.
    """

    def __init__(self, out: str | os.PathLike, name: str, made_by: str) -> None:
        self.root, self.name, self.made_by, self.op = Path(out), name, made_by, f"data.{made_by}"
        self.json = self.root / f"dataset_{name}.json"
        self._check_is_ours()
        (self.root / "images").mkdir(parents=True, exist_ok=True)
        (self.root / _MARKER).touch()
        self._stale = set(self._files_of_earlier_run())
        self.json.unlink(missing_ok=True)

    def image_path(self, filename: str) -> Path:
        self._stale.discard(filename)
        return self.root / "images" / filename

    def finish(self, images: list[dict], **extras) -> None:
        """Write `dataset_<name>.json` with one rename, and drop pictures that only an earlier run had."""
        for filename in self._stale:
            (self.root / "images" / filename).unlink(missing_ok=True)
        document = {"dataset": self.name, "made_by": self.made_by, **extras, "images": images}
        partial = self.json.with_suffix(".json.partial")
        partial.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, self.json)
        (self.root / _MARKER).unlink(missing_ok=True)

    def summary(self, images: list[dict], skipped: list[tuple[str, str]]) -> DatasetSummary:
        splits = dict(Counter(image["split"] for image in images))
        captions = sum(len(image["sentences"]) for image in images)
        return DatasetSummary(self.root, self.json, len(images), captions, splits, skipped)

    def _check_is_ours(self) -> None:
        remedy = "give a new or empty folder"
        if self.root.exists() and not self.root.is_dir():
            raise bad(self.op, "out", "be a folder", str(self.root), remedy)
        held = sorted(path.name for path in self.root.iterdir()) if self.root.exists() else []
        others = [name for name in held if name.startswith("dataset_") and name.endswith(".json")]
        if others:
            ours = others == [self.json.name] and self._made_by_us()
        else:
            ours = not held or _MARKER in held
        if not ours:
            what = f"{self.root} (holds {', '.join(held[:5])})"
            raise bad(self.op, "out", f"be empty or hold only what {self.made_by} wrote before", what, remedy)

    def _made_by_us(self) -> bool:
        try:
            return json.loads(self.json.read_text(encoding="utf-8")).get("made_by") == self.made_by
        except (ValueError, AttributeError):
            return False

    def _files_of_earlier_run(self) -> list[str]:
        if not self.json.exists():
            return []
        # `Path.name` keeps an edited JSON from naming a file outside the folder.
        return [Path(image["filename"]).name for image in json.loads(self.json.read_text(encoding="utf-8"))["images"]]
