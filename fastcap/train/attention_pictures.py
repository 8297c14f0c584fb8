"""Figures of attention, as in Show, Attend and Tell: the picture, then for each word where the model looked.

A map is drawn as light on the picture: full where the word's attention is greatest, dim where there is none. Each word
has its own scale, so a map that is bright all over is one that looked everywhere alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fastcap import data
from fastcap.data._checks import require
from fastcap.errors import bad

if TYPE_CHECKING:
    from .captioner import Attended, CaptionedFile, Captioner, Centres

MOST = 16  # pictures of one figure: beyond, it is taller than any screen
PIXELS = 256  # side at which pictures and maps are made; a tile is about half of it
DPI = 110
TILE, GAP, TEXT, EDGE = 1.15, 0.07, 0.23, 0.06  # inches: height of a picture, between two, of the words above, around all
COLUMNS = 8  # square pictures in a line, the first without its words
FONT = 10.5  # points
SPREAD = 0.5  # of the Gaussian that smooths a map, in locations: neighbours run into each other, and stay apart
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg", ".eps")


class Row(NamedTuple):
    """One picture of a figure.

    picture: uint8 [S, S, 3], squeezed to a square as the model takes it.
    attended: the words and their maps.
    title: stands above the picture.
    aspect: width / height of the picture before it was squeezed.
    centres: what `Captioner.centres` gives.
    """

    picture: np.ndarray
    attended: Attended
    title: str = ""
    aspect: float = 1.0
    centres: Centres | None = None


def check(path: str | Path, pictures: int) -> None:
    """Raises what `draw` would, before anything is computed."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        rule = f"end in one of {', '.join(SUFFIXES)}"
        raise bad("caption", "--attention", rule, str(path), f"name a picture, such as {path.stem or 'attention'}.png")
    if path.is_dir():
        raise bad("caption", "--attention", "be a file to write", str(path), f"name one in it: {path / 'attention.png'}")
    if not path.parent.is_dir():
        raise bad("caption", "--attention", "lie in a folder that exists", str(path), f"run: mkdir -p {path.parent}")
    if pictures > MOST:
        remedy = "name fewer, and draw the others in a figure of their own"
        raise bad("caption", "--attention", f"show at most {MOST} pictures", pictures, remedy)


def draw_files(path: str | Path, captioner: Captioner, files: Sequence[CaptionedFile]) -> None:
    """The figure of picture files that `captioner` has captioned, each as fine and as wide as its file has it.

    Raises:
        FastcapError: as `draw` and `Captioner.attention` do.
    """
    items = [{"image": told.image, "attributes": told.attributes} for told in files]
    images = data.batching.stack_items(items, captioner.attribute_tokenizer)
    attended, centres = captioner.attention(images, [told.ids for told in files]), captioner.centres(images)
    rows = []
    for told, one in zip(files, attended, strict=True):
        with require("PIL.Image", "caption").open(told.path) as image:
            aspect = image.width / image.height
        rows.append(Row(data.read_pixels(told.path, PIXELS), one, "", aspect, centres))
    draw(path, rows)


def row_of_image(image: torch.Tensor, attended: Attended, title: str = "", centres: Centres | None = None) -> Row:
    """The row of a picture [3, S, S] in [-1, 1]."""
    fine = torch.nn.functional.interpolate(image[None].float().cpu(), (PIXELS, PIXELS), mode="bicubic", antialias=True)[0]
    pixels = ((fine.permute(1, 2, 0) + 1) / 2).clamp(0, 1) * 255
    return Row(pixels.round().to(torch.uint8).numpy(), attended, title, centres=centres)


def draw(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes the figure, in the format that the path's suffix names; long captions go on in further lines.

    >>> words, maps = captioner.attention(images, captions)[0]                    # doctest: +SKIP
    >>> draw("attention.png", [row_of_image(images[0], Attended(words, maps))])   # doctest: +SKIP

    Raises:
        FastcapError: no format of a picture, no such folder, no rows, or too many.
    """
    check(path, len(rows))
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure(rows).savefig(partial, format=path.suffix.lower().lstrip("."), dpi=DPI)
        os.replace(partial, path)  # a picture that stands there is whole, or still the earlier one
    finally:
        partial.unlink(missing_ok=True)


def figure(rows: Sequence[Row]) -> Any:
    """The figure of `draw`, a `matplotlib.figure.Figure`: for a notebook."""
    if not rows:
        raise bad("caption", "rows", "hold at least one picture", "none", "pass a Row for each picture")
    require("matplotlib", "caption")
    from matplotlib.figure import Figure

    placed = [_place(row) for row in rows]
    width = max(x + tile for tiles, tile in placed for x, _ in tiles) + EDGE
    height = 2 * EDGE + sum(_lines(tiles) for tiles, _ in placed) * (TEXT + TILE) + (len(rows) - 1) * 2 * GAP
    made = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    top = EDGE
    for row, (tiles, tile) in zip(rows, placed, strict=True):
        shown = [row.picture, *(lit(row.picture, alpha.numpy(), row.centres) for alpha in row.attended.maps)]
        for i, (x, line) in enumerate(tiles):
            y = top + line * (TEXT + TILE) + TEXT
            axes = made.add_axes((x / width, 1 - (y + TILE) / height, tile / width, TILE / height))
            axes.imshow(shown[i], aspect="auto", interpolation="lanczos")
            axes.set_axis_off()
            if i:
                _write(axes, row.attended.words[i - 1], tile, color="black")
            else:
                _write(axes, row.title, tile, color="0.4", style="italic")
        top += _lines(tiles) * (TEXT + TILE) + 2 * GAP
    return made


def lit(picture: np.ndarray, alpha: np.ndarray, centres: Centres | None = None) -> np.ndarray:
    """A picture, uint8 [S, S, 3], under the light of a map [rows, columns]: uint8 [S, S, 3]."""
    light = smooth(alpha, picture.shape[:2], centres)
    light = (light / max(light.max(), 1e-12))[:, :, None]
    colours = picture.astype(np.float32) / 255
    grey = colours.mean(2, keepdims=True)
    dim = 0.06 + 0.26 * (0.4 * colours + 0.6 * grey)  # what is not looked at can still be made out, nearly without colour
    bright = 0.65 * colours + 0.35  # and what is dark itself is seen to be lit
    return ((dim + light * (bright - dim)).clip(0, 1) * 255).round().astype(np.uint8)


def smooth(alpha: np.ndarray, size: tuple[int, int], centres: Centres | None = None) -> np.ndarray:
    """A map [rows, columns] at `size` pixels: means of the locations, weighted by their distance from each pixel.

    Unlike an interpolation by cubics it never leaves the range of the map, and unlike a linear one it shows no creases.
    Without `centres` the locations tile the picture.
    """
    weights = []
    for axis, (pixels, locations) in enumerate(zip(size, alpha.shape, strict=True)):
        centre = (np.arange(locations) + 0.5) / locations if centres is None else np.asarray(centres[axis])
        far = ((np.arange(pixels) + 0.5) / pixels)[:, None] - centre
        near = np.exp(-0.5 * (far * locations / SPREAD) ** 2)
        weights.append(near / near.sum(1, keepdims=True))
    return weights[0] @ alpha.astype(np.float64) @ weights[1].T


def _place(row: Row) -> tuple[list[tuple[float, int]], float]:
    """(x in inches, line) of each tile of a row, and the tiles' width. The first is the picture itself.

    Words stand beside the picture, and in further lines under each other: what stands in the first column begins a new
    picture.
    """
    tile = TILE * min(max(row.aspect, 0.6), 1.8)
    fit = int(COLUMNS * (TILE + GAP) / (tile + GAP)) - 1
    tiles = [(EDGE, 0)]
    tiles += [(EDGE + (1 + i % fit) * (tile + GAP), i // fit) for i in range(len(row.attended.words))]
    return tiles, tile


def _lines(tiles: list[tuple[float, int]]) -> int:
    return 1 + tiles[-1][1]


def _write(axes: Any, label: str, tile: float, color: str, style: str = "normal") -> None:
    """The label over a tile, as much smaller as it must be to fit."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not label.strip():
        return
    font = FontProperties(size=FONT, style=style)
    wide = TextPath((0, 0), label.replace("$", r"\$"), prop=font).get_extents().width / 72
    font.set_size(FONT * min(1, 0.93 * tile / wide))  # hinting makes letters wider than their outlines
    axes.text(
        0.5, 1 + 0.045 / TILE, label, ha="center", va="bottom", transform=axes.transAxes, parse_math=False,
        fontproperties=font, color=color,
    )  # fmt: skip
