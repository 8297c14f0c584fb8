"""Generated scenes: small pictures whose every fact is known, so that a caption can be checked exactly.

A picture is 48 x 48 RGB: 3 x 3 cells of 16 px, 1 to 3 objects in different cells (equally likely), 8 shapes, 8 colours,
2 sizes, 3 textures, 4 backgrounds, and noise. Scenes come in groups of 4 or 5: the first is drawn at random, each other
one differs from it in exactly one attribute of one object (or in the background): hard negatives for retrieval.

`scene_captions` writes and parses the captions, `scene_scores` scores them.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from random import Random

import numpy as np

from fastcap.data._checks import check_int, require
from fastcap.data._folder import DatasetSummary, FolderWriter, sentences

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "crescent")
COLORS = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "cyan": (60, 210, 220),
    "blue": (50, 80, 220),
    "purple": (140, 50, 180),
    "pink": (250, 130, 190),
}
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
BACKGROUNDS = {"white": (240, 240, 240), "black": (15, 15, 15), "gray": (128, 128, 128), "beige": (215, 190, 150)}

_OP = "data.scenes"
IMAGE_SIZE, CELL = 48, 16  # pixels
REGIONS = "regions.npz"  # what `write_scene_regions` adds to a folder of scenes
NOISE = 8  # uniform noise of -8 .. 8 levels of 255 on every channel
_RADIUS = {"small": 4.0, "large": 7.5}  # pixels
_CHANGES = ("shape", "color", "size", "texture", "position", "background")


@dataclass(frozen=True)
class SceneObject:
    """One object; the field values are those listed at the top of this module."""

    shape: str
    color: str
    size: str
    texture: str
    row: str
    column: str


@dataclass(frozen=True)
class Scene:
    """The facts of one picture. `group` numbers the hard-negative group it belongs to."""

    objects: tuple[SceneObject, ...]
    background: str
    group: int = 0

    def to_facts(self) -> dict:
        """The facts as stored under "facts" in `dataset_scenes.json`; `from_facts` reads them back."""
        return {"background": self.background, "objects": [asdict(item) for item in self.objects]}

    @classmethod
    def from_facts(cls, facts: dict, group: int = 0) -> Scene:
        return cls(tuple(SceneObject(**item) for item in facts["objects"]), facts["background"], group)


def make_scenes(num_images: int = 8000, seed: int = 0) -> list[Scene]:
    """`num_images` scenes (at least 12, so that groups of 4 and 5 fill them exactly and every split gets one)."""
    check_int(_OP, "num_images", num_images, 12, "ask for 12 or more")
    check_int(_OP, "seed", seed, 0, "pass for example seed=0")
    rng = Random(f"fastcap scenes {seed}")
    scenes: list[Scene] = []
    group = 0
    while len(scenes) < num_images:
        left = num_images - len(scenes)
        # Draw 4 or 5, but never leave a rest that cannot be cut into fours and fives (1, 2, 3, 6, 7 or 11).
        sizes = [n for n in (4, 5) if left >= n and left - n not in (1, 2, 3, 6, 7, 11)]
        scenes += _make_group(rng, rng.choice(sizes), group)
        group += 1
    return scenes


def _make_group(rng: Random, size: int, group: int) -> list[Scene]:
    cells = rng.sample([(row, column) for row in ROWS for column in COLUMNS], rng.randint(1, 3))
    objects = tuple(
        SceneObject(rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(SIZES), rng.choice(TEXTURES), *cell)
        for cell in cells
    )
    members = [Scene(objects, rng.choice(list(BACKGROUNDS)), group)]
    while len(members) < size:
        changed = _change_one(rng, members[0])
        if changed not in members:
            members.append(changed)
    return members


def _change_one(rng: Random, scene: Scene) -> Scene:
    """`scene` with one attribute changed: the background, or one of an object's (its position counts as one)."""
    attribute = rng.choice(_CHANGES)
    if attribute == "background":
        return replace(scene, background=rng.choice([name for name in BACKGROUNDS if name != scene.background]))
    i = rng.randrange(len(scene.objects))
    old = scene.objects[i]
    if attribute == "position":
        taken = {(item.row, item.column) for item in scene.objects}
        row, column = rng.choice([(r, c) for r in ROWS for c in COLUMNS if (r, c) not in taken])
        new = replace(old, row=row, column=column)
    else:
        values = {"shape": SHAPES, "color": COLORS, "size": SIZES, "texture": TEXTURES}[attribute]
        new = replace(old, **{attribute: rng.choice([v for v in values if v != getattr(old, attribute)])})
    return replace(scene, objects=scene.objects[:i] + (new,) + scene.objects[i + 1 :])


def split_groups(scenes: list[Scene], seed: int = 0) -> list[str]:
    """The split of each scene: a tenth of the groups (at least one) to "val", a tenth to "test", every group whole."""
    groups = sorted({scene.group for scene in scenes})
    Random(f"fastcap split {seed}").shuffle(groups)
    held = max(1, round(len(groups) / 10))
    named = dict.fromkeys(groups, "train")
    named.update(dict.fromkeys(groups[:held], "test"))
    named.update(dict.fromkeys(groups[held : 2 * held], "val"))
    return [named[scene.group] for scene in scenes]


def render_scenes(scenes: list[Scene], seed: int = 0) -> np.ndarray:
    """Pictures of the scenes, uint8 [N, 48, 48, 3]. `seed` draws the noise, in the order of the list."""
    alpha, shade = _templates()
    palette = np.array(list(COLORS.values()), np.float32)
    N = len(scenes)
    grounds = np.array(list(BACKGROUNDS.values()), np.int16)
    ground_names, color_names = list(BACKGROUNDS), list(COLORS)
    index = np.array([ground_names.index(scene.background) for scene in scenes], np.int64)
    cells = np.empty((N, 9, CELL, CELL, 3), np.int16)
    cells[:] = grounds[index][:, None, None, None]

    placed = [(n, item) for n, scene in enumerate(scenes) for item in scene.objects]
    i_scene = np.array([n for n, _ in placed], np.int64)
    i_cell = np.array([ROWS.index(o.row) * 3 + COLUMNS.index(o.column) for _, o in placed], np.int64)
    i_template = np.array(
        [(SHAPES.index(o.shape) * 2 + SIZES.index(o.size)) * 3 + TEXTURES.index(o.texture) for _, o in placed], np.int64
    )
    i_color = np.array([color_names.index(o.color) for _, o in placed], np.int64)
    # Every object has a cell of its own, so one fancy-indexed assignment draws them all.
    cover = alpha[i_template][..., None]
    inked = shade[i_template][..., None] * palette[i_color][:, None, None]
    cells[i_scene, i_cell] = cells[i_scene, i_cell] * (1 - cover) + inked * cover

    noise = np.random.default_rng([seed, 48]).integers(-NOISE, NOISE, cells.shape, dtype=np.int8, endpoint=True)
    cells += noise
    np.clip(cells, 0, 255, out=cells)
    grid = cells.astype(np.uint8).reshape(N, 3, 3, CELL, CELL, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(N, IMAGE_SIZE, IMAGE_SIZE, 3)


def _templates() -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel an object covers, and how bright its ink is there: two float32 [8 * 2 * 3, 16, 16]."""
    fine = 4  # samples per pixel and axis, for smooth edges
    axis = (np.arange(CELL * fine) + 0.5) / fine - CELL / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    row, column = np.mgrid[:CELL, :CELL]
    inks = {
        "solid": np.ones((CELL, CELL)),
        "striped": np.where(row // 2 % 2 == 0, 1.0, 0.35),
        "dotted": np.where((row % 4 < 2) & (column % 4 < 2), 0.2, 1.0),
    }
    alpha, shade = [], []
    for shape in SHAPES:
        for size in SIZES:
            inside = _inside(shape, x / _RADIUS[size], y / _RADIUS[size]).astype(np.float32)
            cover = inside.reshape(CELL, fine, CELL, fine).mean(axis=(1, 3))
            for texture in TEXTURES:
                alpha.append(cover)
                shade.append(inks[texture].astype(np.float32))
    return np.stack(alpha), np.stack(shade)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether the point lies inside a shape of radius 1 about the origin; y points down."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r < 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.85
    if shape == "triangle":
        return (y < 0.8) & (abs(x) < (y + 1) * 0.55)
    if shape == "diamond":
        return abs(x) * 1.3 + abs(y) < 1
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95)
    if shape == "ring":
        return (r < 1) & (r > 0.5)
    if shape == "crescent":
        return (r < 1) & (np.hypot(x - 0.5, y) > 0.8)
    # star: between a tip (angle 0, radius 1) and a notch (36 degrees, radius .42) the edge is a straight line
    step, notch = np.pi / 5, 0.42
    angle = np.abs((np.arctan2(x, -y) + step) % (2 * step) - step)
    return r * (np.sin(angle) + notch * np.sin(step - angle)) < notch * np.sin(step)


def write_scenes(out: str | os.PathLike, num_images: int = 8000, seed: int = 0) -> DatasetSummary:
    """Write `dataset_scenes.json` (Karpathy's format, five references an image) and `images/*.png` under `out`.

    Each image also has "facts" (`Scene.from_facts` reads them) and "group". Deterministic by seed. Running again over
    its own output is fine; a folder that holds anything else is refused. The JSON is written last.
    """
    from fastcap.data.scene_captions import write_captions  # it imports this module

    Image = require("PIL.Image", "data.write_scenes")
    scenes = make_scenes(num_images, seed)
    folder = FolderWriter(out, "scenes", "write_scenes")
    (folder.root / REGIONS).unlink(missing_ok=True)  # of the pictures that are replaced
    pictures, splits = render_scenes(scenes, seed), split_groups(scenes, seed)
    images, sentid = [], 0
    for imgid, (scene, captions) in enumerate(zip(scenes, write_captions(scenes, seed), strict=True)):
        filename = f"scene_{imgid:06d}.png"
        # Noise does not compress: level 1 is as small as level 9 and several times faster.
        Image.fromarray(pictures[imgid]).save(folder.image_path(filename), compress_level=1)
        references = sentences(captions, imgid, sentid)
        sentid += len(references)
        images.append(
            {
                "filename": filename,
                "filepath": "images",
                "imgid": imgid,
                "split": splits[imgid],
                "sentids": [sentence["sentid"] for sentence in references],
                "sentences": references,
                "facts": scene.to_facts(),
                "group": scene.group,
            }
        )
    folder.finish(images, seed=int(seed))
    return folder.summary(images, [])
