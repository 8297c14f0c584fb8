"""What the report of `fastcap evaluate` shows: which images, their pictures, and where captioners looked."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcap.data._checks import require
from fastcap.errors import FastcapError
from fastcap.eval.report import Card, Said, Word, report

from . import attention_pictures
from .captioner import Captioner, Centres
from .evaluate_data import Usable
from .evaluate_files import heading
from .evaluate_rows import Row, Source, each

SHOWN = {"cider": "CIDEr", "clip_score": "CLIPScore"}  # of a caption, beside it; the first that is there ranks the images
SIDE, THUMBNAIL = 360, 96  # most pixels of a picture, and of those under attention
AT_ONCE = 16  # pictures whose attention is found together
SHADE = 24  # side of a map of attention; browsers smooth it
# Of a picture's light c there is left k c + w: where a captioner did not look, and where it looked most. What is dark itself
# is then still seen to be lit.
_UNSEEN, _SEEN = (0.16, 0.06), (0.70, 0.30)
_FEW = 40  # a smaller picture is not made smaller, and lossless


@torch.no_grad()
def make(
    document: Mapping[str, Any],
    rows: Sequence[Row],
    usable: Usable,
    most: int,
    features: Source | None,
    device: torch.device,
) -> str:
    """The page, with at most so many images."""
    scores = [each(row) for row in rows]
    name = next((name for name in SHOWN if all(name in row.measured.each for row in rows)), None)
    ranked_by = None if name is None else np.array([row.measured.each[name] for row in rows])
    sections = choose(ranked_by, len(usable.ids), most, SHOWN.get(name, ""))
    places = [place for _, _, chosen in sections for place in chosen]
    attended, notes = [], []
    for row in rows:
        looked, why = _attention(row, usable, places, features, device)
        attended.append(looked)
        notes += [f"No attention of {row.name}: {why}."] if why else []
    cards = {}
    for place in places:
        said = []
        for row, found, looked in zip(rows, scores, attended, strict=True):
            shown = {label: found[place][key] for key, label in SHOWN.items() if key in found[place]}
            said.append(Said(row.name, row.captions[place], shown, looked.get(place, [])))
        cards[place] = _card(usable, place, said)
    shown = [(title, explanation, [cards[place] for place in chosen]) for title, explanation, chosen in sections]
    return report(document, heading(document), shown, notes)


def choose(scores: np.ndarray | None, images: int, most: int, label: str) -> list[tuple[str, str, list[int]]]:
    """(title, explanation, places) of the images to show, each once, the same ones for the same scores.

    Best, worst, and spread over all ranks between; of several captioners also those where they differ most.

    scores: [captioners, images], higher is better, or None: then the images are spread over all of them.
    """
    most = min(most, images)
    if most == 0:
        return []
    if scores is None:
        places = [n * images // most for n in range(most)]
        return [("Images", f"{most:,} of {images:,}, in even steps.", places)]
    mean = scores.mean(0)
    order = sorted(range(images), key=lambda n: (-mean[n], n))
    by = f"{label}{', the mean of all captioners' if len(scores) > 1 else ''}"
    if most == images:
        return [("Images", f"All of them, by {by}.", order)]
    parts = 4 if len(scores) > 1 else 3
    part = most // parts
    best, worst = order[:part], order[images - part :][::-1]
    left = order[part : images - part]
    differing: list[int] = []
    if len(scores) > 1:
        gap = scores.max(0) - scores.min(0)
        differing = sorted(left, key=lambda n: (-gap[n], n))[:part]
        left = [n for n in left if n not in set(differing)]
    count = most - len(best) - len(worst) - len(differing)
    spread = [left[n * len(left) // count] for n in range(count)]
    return [
        ("Best", f"Highest {by}.", best),
        ("Worst", f"Lowest {by}.", worst),
        ("Most different", f"Where the captioners' {label} is furthest apart.", differing),
        ("In between", f"In even steps through all others, from the best by {by}.", spread),
    ]


def _card(usable: Usable, place: int, said: Sequence[Said]) -> Card:
    id, filename = usable.ids[place], usable.source.filenames[usable.indices[place]]
    title = f"{usable.source.key} {id}" + (f" · {filename}" if filename else "")
    path = usable.picture(place)
    if path is None:
        return Card(title, usable.references[place], said)
    try:
        picture, size = data_uri(path, SIDE)
        thumbnail = data_uri(path, THUMBNAIL)[0] if any(one.attended for one in said) else ""
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error, ...
        why = "no such file" if isinstance(error, FileNotFoundError) else error
        return Card(title, usable.references[place], said, missing=f"No picture: {path} ({why})")
    return Card(title, usable.references[place], said, picture, thumbnail, size)


def data_uri(path: Path, side: int) -> tuple[str, tuple[int, int]]:
    """A picture file, no larger than `side`, as a data URI, and its width and height. Transparent pictures lie on white.

    Raises what Pillow raises for a file that is missing or no picture.
    """
    Image = require("PIL.Image", "evaluate")
    with Image.open(path) as image:
        if "A" in image.getbands() or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        picture = image.convert("RGB")
    lossless = max(picture.size) <= 2 * _FEW
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _encoded(picture, "PNG" if lossless else "JPEG"), picture.size


def shade(alpha: np.ndarray, centres: Centres | None) -> str:
    """A map of attention [rows, columns] as what lies on the picture: dark and opaque where the captioner did not look, a
    veil of light where it looked most."""
    Image = require("PIL.Image", "evaluate")
    light = attention_pictures.smooth(alpha, (SHADE, SHADE), centres)
    light = light / max(light.max(), 1e-12)
    keeps, adds = ((1 - light) * unseen + light * seen for unseen, seen in zip(_UNSEEN, _SEEN, strict=True))
    layers = np.stack([adds / (1 - keeps), 1 - keeps], 2) * 255  # grey of the layer, and how much it covers
    return _encoded(Image.fromarray(layers.round().astype(np.uint8)), "PNG")


def _encoded(image: Any, form: str) -> str:
    held = io.BytesIO()
    image.save(held, form, **({"quality": 82} if form == "JPEG" else {"optimize": True}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(held.getvalue()).decode('ascii')}"


def _attention(
    row: Row, usable: Usable, places: Sequence[int], features: Source | None, device: torch.device
) -> tuple[dict[int, list[Word]], str]:
    """By place, the words that a checkpoint said with where it looked; or none, and why."""
    if row.config is None or not places:
        return {}, ""
    captioner = Captioner.load(row.path, device)
    found: dict[int, list[Word]] = {}
    for first in range(0, len(places), AT_ONCE):
        batch = places[first : first + AT_ONCE]
        images = usable.batch(batch, captioner.image_size, row.features(features), captioner.attribute_tokenizer)
        try:
            attended = captioner.attention(images, [row.ids[place] for place in batch])
        except FastcapError as error:  # a model without attention, or of regions that are no grid of the picture
            return {}, str(error).removeprefix("fastcap.caption: ").split("; ")[0]
        centres = captioner.centres(images)
        for place, one in zip(batch, attended, strict=True):
            maps = one.maps.numpy()
            found[place] = [Word(word, shade(alpha, centres)) for word, alpha in zip(one.words, maps, strict=True)]
    return found, ""
