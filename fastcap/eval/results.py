"""Captions in COCO's results format: a JSON list of {"image_id": ..., "caption": ...}."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from fastcap.errors import bad
from fastcap.eval._json import is_id, is_text, kind, read_json

_OP = "eval.results"
_REMEDY = 'give a list of {"image_id": ..., "caption": ...}, as COCO has it'


def read_results(path: str | os.PathLike) -> dict[str, str]:
    """The captions of a results file by image id. Ids are numbers or strings; as keys all are strings.

    Raises FastcapError, which names the file and the entry: it is missing, no UTF-8 or no JSON; no list; an entry lacks its
    id or its caption, or has one of another kind; two entries have one id; there is none.

    >>> read_results("captions.json")["391895"]                           # doctest: +SKIP
    'a man on a motorcycle'
    """
    path = Path(path)
    document = read_json(_OP, "captions", path, _REMEDY)
    if not isinstance(document, list) or not document:
        got = f"{path} with {'no entry' if document == [] else kind(document)}"
        references = isinstance(document, dict) and ("annotations" in document or "images" in document)
        remedy = "this looks like references: pass it as --references" if references else _REMEDY
        raise bad(_OP, "captions", "hold a list of captions", got, remedy)
    found: dict[str, str] = {}
    for n, entry in enumerate(document):
        sound = isinstance(entry, dict) and is_id(entry.get("image_id")) and is_text(entry.get("caption"))
        if not sound:
            rule = "have an image_id (number or string) and a caption (string of Unicode)"
            raise bad(_OP, f"entry {n} of {path}", rule, repr(entry)[:80], _REMEDY)
        id = str(entry["image_id"])
        if id in found:
            remedy = "keep one caption for each image"
            raise bad(_OP, f"entry {n} of {path}", "have an image_id of its own", entry["image_id"], remedy)
        found[id] = entry["caption"]
    return found


def write_results(path: str | os.PathLike, captions: Mapping[int | str, str]) -> None:
    """Writes captions by image id as a results file, whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    entries = [{"image_id": id, "caption": caption} for id, caption in captions.items()]
    partial.write_text(json.dumps(entries, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    os.replace(partial, path)
