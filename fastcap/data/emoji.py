"""Emoji as a captioning data set: pictures from a colour emoji font, captions from Unicode's names.

Real pictures and words that people wrote, with no download. Skin tones, hair, gender and direction make near-duplicates
in plenty, so it measures how distinctive captions are. `emoji_captions` says how references and splits are made.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from fastcap.data._checks import check_int, require
from fastcap.data._folder import DatasetSummary, FolderWriter, sentences
from fastcap.data.emoji_captions import EmojiNames, split_emoji
from fastcap.errors import bad

_OP = "data.emoji"
_KNOWN_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "C:/Windows/Fonts/seguiemj.ttf",
)
_REMEDY = "run: apt-get install fonts-noto-color-emoji, or name a font with font= or FASTCAP_EMOJI_FONT"
# Bitmap fonts open only at the sizes they hold: Noto 109 or 128, Apple 160 or 96 and so on. The largest common first.
_STRIKES = (160, 136, 128, 109, 96, 64)
_PROBE, _NOT_A_CHARACTER = "\U0001f600", "\U0010fffe"


def find_font(font: str | os.PathLike | None = None) -> Path:
    """The colour emoji font to draw with: `font`, else $FASTCAP_EMOJI_FONT, else fontconfig's, else a known path.

    Raises FastcapError if a font that was named does not exist, or if there is none; the message lists where it looked.
    """
    named = font if font is not None else os.environ.get("FASTCAP_EMOJI_FONT")
    if named:
        if not Path(named).is_file():
            raise bad(_OP, "font" if font is not None else "FASTCAP_EMOJI_FONT", "be a font file", str(named), _REMEDY)
        return Path(named)
    looked = [*_fontconfig_fonts(), *(str(Path(path).expanduser()) for path in _KNOWN_PATHS)]
    for path in looked:
        if Path(path).is_file():
            return Path(path)
    raise bad(_OP, "font", "be installed", "none at " + ", ".join(looked), _REMEDY)


def _fontconfig_fonts() -> list[str]:
    """Files of the colour fonts that fontconfig lists, emoji fonts by name first; none without fontconfig."""
    try:
        listed = subprocess.run(
            ["fc-list", ":color=true", "file"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    files = sorted(line.strip().rstrip(":") for line in listed.splitlines() if line.strip())
    return [path for path in files if "emoji" in Path(path).name.lower()]


class EmojiFont:
    """Draws emoji with one font file, and knows what the font lacks.

    Raises FastcapError if the file is not a colour font Pillow can draw, or Pillow lacks the Raqm text layout, without
    which a sequence ("woman" + "medium skin tone" + "rocket") comes out as its separate parts.
    """

    def __init__(self, path: Path) -> None:
        self._image, self._draw = require("PIL.Image", _OP), require("PIL.ImageDraw", _OP)
        if not require("PIL.features", _OP).check("raqm"):
            raise bad(_OP, "pillow", "have the Raqm text layout", "none", "install Pillow's own wheel and libfribidi0")
        self.path = path
        self._font = self._open(path)
        self._advance = self._font.getlength(_PROBE)
        probe = self._picture(_PROBE)
        if probe is None or not any(low < high for low, high in probe.convert("RGB").getextrema()):
            raise bad(_OP, "font", "hold colour pictures that Pillow can draw", str(path), _REMEDY)
        tofu = self._picture(_NOT_A_CHARACTER)
        self._tofu = tofu and tofu.tobytes()
        self._seen: dict[bytes, str] = {}

    def _open(self, path: Path):
        truetype = require("PIL.ImageFont", _OP).truetype
        for strike in _STRIKES:
            try:
                return truetype(str(path), strike)
            except OSError as error:
                reason = str(error)
        raise bad(_OP, "font", "be a font that Pillow opens", f"{path} ({reason})", _REMEDY)

    def draw(self, characters: str, name: str):
        """(RGBA picture at the font's own size, None), or (None, why there is none)."""
        if self._font.getlength(characters) > 1.5 * self._advance:
            return None, "the font has no one picture for the sequence"
        picture = self._picture(characters)
        if picture is None:
            return None, "the font has no picture (blank)"
        pixels = picture.tobytes()
        if pixels == self._tofu:
            return None, "the font has no picture (placeholder)"
        earlier = self._seen.setdefault(pixels, name)
        if earlier != name:
            return None, f"the font draws the same picture as for {earlier!r}"
        return picture, None

    def _picture(self, characters: str):
        """The glyph centred in a transparent square, or None if nothing is drawn."""
        left, top, right, bottom = self._font.getbbox(characters)
        side = max(right - left, bottom - top)
        if min(right - left, bottom - top) <= 0:
            return None
        picture = self._image.new("RGBA", (side, side))
        origin = ((side - (right - left)) // 2 - left, (side - (bottom - top)) // 2 - top)
        self._draw.Draw(picture).text(origin, characters, font=self._font, embedded_color=True)
        return picture if picture.getchannel("A").getbbox() else None

    def over_white(self, picture, size: int):
        """The RGBA picture over white as RGB, `size` x `size`. Composited before it shrinks: no dark fringe."""
        white = self._image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        return white.convert("RGB").resize((size, size), self._image.Resampling.LANCZOS)


def write_emoji(
    out: str | os.PathLike, size: int = 48, font: str | os.PathLike | None = None, seed: int = 0
) -> DatasetSummary:
    """Write `dataset_emoji.json` (Karpathy's format) and `images/*.png`, `size` x `size` px over white, under `out`.

    Each image also has "emoji" (its characters), "name", "family" and "family_status": "seen" or "unseen" in training.
    Emoji that the font lacks or draws like another are left out and listed in the summary's `skipped`. Deterministic by
    seed for one font and one version of the `emoji` package; both are recorded in the JSON, which is written last.
    Raises FastcapError for a missing font (naming where it looked), a bad size, or a folder that holds something else.
    """
    check_int(_OP, "size", size, 8, "pass the pixels of a side, for example size=48")
    check_int(_OP, "seed", seed, 0, "pass for example seed=0")
    package = require("emoji", _OP)
    glyphs = EmojiFont(find_font(font))
    folder = FolderWriter(out, "emoji", "write_emoji")
    pictures, skipped = {}, []
    known = EmojiNames(package.EMOJI_DATA).all()
    # Of emoji that are drawn alike (some islands have their country's flag) the one of the shortest name is kept.
    for item in sorted(known, key=lambda item: (len(item.name), item.name)):
        picture, reason = glyphs.draw(item.characters, item.name)
        if picture is None:
            skipped.append((item.name, reason))
        else:
            pictures[item.characters] = picture
    drawn = [item for item in known if item.characters in pictures]
    if not drawn:
        raise bad(_OP, "font", "draw at least one emoji", str(glyphs.path), _REMEDY)

    images, sentid = [], 0
    splits = split_emoji([item.family for item in drawn], seed)
    for imgid, (item, (split, status)) in enumerate(zip(drawn, splits, strict=True)):
        filename = "-".join(f"{ord(character):x}" for character in item.characters) + ".png"
        glyphs.over_white(pictures[item.characters], size).save(folder.image_path(filename))
        references = sentences(item.captions, imgid, sentid)
        sentid += len(references)
        images.append(
            {
                "filename": filename,
                "filepath": "images",
                "imgid": imgid,
                "split": split,
                "sentids": [sentence["sentid"] for sentence in references],
                "sentences": references,
                "emoji": item.characters,
                "name": item.name,
                "family": item.family,
                "family_status": status,
            }
        )
    made_with = {"font": glyphs.path.name, "emoji_package": package.__version__, "size": size}
    folder.finish(images, seed=int(seed), **made_with, skipped=skipped)
    return folder.summary(images, skipped)
