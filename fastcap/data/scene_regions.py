"""Regions and attribute words of generated scenes, by a small detector: what GLIED reads in place of a picture.

Published captioners read what a Faster R-CNN and an attribute detector made of a picture, with their errors. Here a small
network, trained for a few hundred steps on the cells of the training split and nothing else, plays both parts. It sees one
16 x 16 cell at a time, through noise, for the cells are so plain that it would not err otherwise: its last hidden layer,
beside the cell's place, is the feature of a region, nine to a picture; the words that it holds most probable anywhere in the
picture are its attributes, and some of them are wrong.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcap.data._checks import check_int, require
from fastcap.data.scene_captions import WORDS
from fastcap.data.scenes import BACKGROUNDS, CELL, COLORS, COLUMNS, IMAGE_SIZE, REGIONS, ROWS, SHAPES, SIZES, TEXTURES
from fastcap.errors import bad

_OP = "data.write_scene_regions"
CELLS = len(ROWS) * len(COLUMNS)
HIDDEN = 64  # of the network's last layer; a region is this and, one-hot, the cell's row and column
WIDTH = HIDDEN + len(ROWS) + len(COLUMNS)
_OF_OBJECTS = {"shape": SHAPES, "color": tuple(COLORS), "size": SIZES, "texture": TEXTURES}
_VALUES = {**_OF_OBJECTS, "background": tuple(BACKGROUNDS)}
_EMPTY, _IGNORED = "object", -1  # the head that says whether a cell has an object; the class of what a cell does not have
NOISE = 0.4  # standard deviation of what is added to the pixels, which lie in [-1, 1], before the detector sees them
_BATCH, _LR = 256, 3e-3
VOCABULARY = tuple(WORDS[name][value][0] for name, values in _VALUES.items() for value in values)


@dataclass(frozen=True)
class RegionSummary:
    """What `write_scene_regions` wrote. `accuracy` is the detector's on the cells of the other splits: of `object` on all
    cells, of `background` likewise, of the others where there is an object. `attributes_right` is the share of the words
    that are true of their picture, `attributes_found` of true words that are among them."""

    features: Path
    images: int
    width: int
    accuracy: dict[str, float]
    attributes_right: float
    attributes_found: float


def write_scene_regions(
    root: str | os.PathLike, *, attributes: int = 12, noise: float = NOISE, steps: int = 300, seed: int = 0
) -> RegionSummary:
    """Writes `regions.npz` beside the scenes, and into their JSON each picture's `attributes`.

    `regions.npz` holds `features` [N, 9, 70] float32 and `ids` [N], the imgids, as `RegionFeatures` reads them: one region
    for each cell of the 3 x 3 grid, from the upper left, row by row. A picture's attributes are the words that the detector
    holds most probable, the most probable first. The same arguments give the same files on the same machine.

    Args:
        root: a folder that `write_scenes` wrote.
        attributes: words of a picture, at most the 25 that there are: the usual words for shapes, colours, sizes,
            textures and backgrounds. A picture has 5 to 12 true ones.
        noise: standard deviation of the normal noise on each pixel, in [-1, 1], that the detector sees; always the same
            for a picture. At 0.4 it is right on 85% of the shapes and 97% of the colours; without, on nearly all.
        steps: of training the detector, 256 cells each: 300 take some ten seconds of one core.
        seed: of the noise, the detector's weights and the order of its cells.

    Returns:
        `RegionSummary`, which says how often the detector errs.

    Raises:
        FastcapError: `root` holds no scenes, or an argument is out of range.

    >>> write_scenes("data/scenes")                                    # doctest: +SKIP
    >>> write_scene_regions("data/scenes").features                    # doctest: +SKIP
    PosixPath('data/scenes/regions.npz')
    """
    check_int(_OP, "attributes", attributes, 1, "pass attributes=12")
    check_int(_OP, "steps", steps, 1, "pass steps=300")
    check_int(_OP, "seed", seed, 0, "pass seed=0")
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise bad(_OP, "noise", "be at least 0 and finite", noise, f"pass noise={NOISE}")
    if attributes > len(VOCABULARY):
        raise bad(_OP, "attributes", f"be at most {len(VOCABULARY)}, the words there are", attributes, "pass attributes=12")
    root = Path(root)
    document = _read(root)
    images = document["images"]
    cells = _cells(root, images)
    cells += noise * torch.randn(cells.shape, generator=torch.Generator().manual_seed(seed))
    labels = {name: torch.tensor(_labels(name, images)) for name in (_EMPTY, *_VALUES)}
    trained = torch.tensor([image["split"] in ("train", "restval") for image in images])
    if not trained.any():
        raise bad(_OP, "root", "have a training split", str(root), "write the scenes again")
    detector = _train(cells[trained], {name: of[trained] for name, of in labels.items()}, steps, seed)
    with torch.no_grad():
        outputs = [detector(part.flatten(0, 1)) for part in cells.split(512)]
    hidden = torch.cat([out[0] for out in outputs]).view(len(images), CELLS, HIDDEN)
    logits = {name: torch.cat([out[1][name] for out in outputs]).view(len(images), CELLS, -1) for name in labels}
    place = torch.cat([torch.eye(3).repeat_interleave(3, 0), torch.eye(3).repeat(3, 1)], 1)
    features = torch.cat([hidden, place.expand(len(images), -1, -1)], 2).numpy()
    chosen = _word_scores(logits).topk(attributes).indices
    for image, row in zip(images, chosen.tolist(), strict=True):
        image["attributes"] = [VOCABULARY[i] for i in row]
    document["regions"] = {"attributes": attributes, "noise": noise, "steps": steps, "seed": seed}

    path = root / REGIONS
    partial = root / f".{REGIONS}.partial"
    with open(partial, "wb") as file:
        np.savez(file, features=features, ids=np.array([image["imgid"] for image in images]))
    os.replace(partial, path)
    file = root / "dataset_scenes.json"
    partial = file.with_suffix(".json.partial")
    partial.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, file)
    held = ~trained if not trained.all() else trained
    accuracy = {name: _accuracy(logits[name][held], of[held]) for name, of in labels.items()}
    right, true = _hits(chosen[held], {name: of[held] for name, of in labels.items()})
    return RegionSummary(path, len(images), WIDTH, accuracy, right / (attributes * int(held.sum())), right / true)


class _Detector(nn.Module):
    """A cell [N, 3, 16, 16] in [-1, 1] -> hidden [N, HIDDEN], and the logits of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * (CELL // 4) ** 2, HIDDEN), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(HIDDEN, len(values)) for name, values in _VALUES.items()})
        self.heads[_EMPTY] = nn.Linear(HIDDEN, 2)

    def forward(self, cells: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.trunk(cells)
        return hidden, {name: head(hidden) for name, head in self.heads.items()}


def _train(cells: Tensor, labels: dict[str, Tensor], steps: int, seed: int) -> _Detector:
    """Half of each batch are cells with an object: seven in nine are empty."""
    cells = cells.flatten(0, 1)
    labels = {name: of.flatten() for name, of in labels.items()}
    full, empty = labels[_EMPTY].nonzero().squeeze(1), (labels[_EMPTY] == 0).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = _Detector()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=_LR)
    for _ in range(steps):
        half = [kind[torch.randint(len(kind), (_BATCH // 2,), generator=generator)] for kind in (full, empty)]
        batch = torch.cat(half)
        _, logits = detector(cells[batch])
        losses = [F.cross_entropy(logits[name], of[batch], ignore_index=_IGNORED) for name, of in labels.items()]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    return detector.eval()


def _word_scores(logits: dict[str, Tensor]) -> Tensor:
    """The probability that a word of VOCABULARY is true of a picture, [N, words].

    Of an object's word: that it is true of any cell, the cells taken as independent. Of a background: the mean of the
    cells, which are all on one."""
    there = logits[_EMPTY].double().softmax(-1)[..., 1:]
    found = [1 - (1 - there * logits[name].double().softmax(-1)).prod(1) for name in _OF_OBJECTS]
    return torch.cat([*found, logits["background"].double().softmax(-1).mean(1)], 1)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    known = labels != _IGNORED
    return (logits.argmax(-1) == labels)[known].double().mean().item()


def _hits(chosen: Tensor, labels: dict[str, Tensor]) -> tuple[int, int]:
    """How many of the chosen words are true of their picture, and how many true words there are."""
    true = []
    for name, values in _VALUES.items():
        classes = labels[name].masked_fill(labels[name] == _IGNORED, len(values))
        true.append(F.one_hot(classes, len(values) + 1).amax(1)[:, :-1])
    table = torch.cat(true, 1)
    return int(table.gather(1, chosen).sum()), int(table.sum())


def _labels(name: str, images: list[dict]) -> list[list[int]]:
    """The class of each cell of each picture; _IGNORED for an attribute of an object where there is none."""
    rows = []
    for image in images:
        if name == "background":
            rows.append([_VALUES[name].index(image["facts"]["background"])] * CELLS)
            continue
        row = [0 if name == _EMPTY else _IGNORED] * CELLS
        for item in image["facts"]["objects"]:
            cell = ROWS.index(item["row"]) * len(COLUMNS) + COLUMNS.index(item["column"])
            row[cell] = 1 if name == _EMPTY else _VALUES[name].index(item[name])
        rows.append(row)
    return rows


def _cells(root: Path, images: list[dict]) -> Tensor:
    """float32 [N, 9, 3, 16, 16] in [-1, 1], read from the picture files."""
    Image = require("PIL.Image", _OP)
    pixels = np.empty((len(images), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for one, image in zip(pixels, images, strict=True):
        path = root / image["filepath"] / image["filename"]
        try:
            with Image.open(path) as picture:
                one[:] = np.asarray(picture.convert("RGB"))
        except (OSError, ValueError) as error:
            raise bad(_OP, "picture", "be as write_scenes wrote it", f"{path} ({error})", "write them again") from error
    grid = torch.from_numpy(pixels).view(-1, 3, CELL, 3, CELL, 3).permute(0, 1, 3, 5, 2, 4)
    return grid.reshape(-1, CELLS, 3, CELL, CELL).float() / 127.5 - 1


def _read(root: Path) -> dict:
    file = root / "dataset_scenes.json"
    remedy = "run: fastcap data scenes --out FOLDER"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        sound = all("facts" in image for image in document["images"]) and document["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise bad(_OP, "root", "be a folder of scenes", f"{root} ({error})", remedy) from error
    if not sound:
        raise bad(_OP, "root", "hold scenes with their facts", str(file), remedy)
    return document
