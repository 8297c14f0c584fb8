"""Captions of generated scenes: written with few details, parsed exactly.

A caption mentions 1, 2 or 3 of the scene's objects with probability .5, .35, .15 (no more than it has), by shape always
and by each further detail with probability under one half: size .3, texture .3, colour .45, position .25; the
background .15. Every word has synonyms. So the likeliest caption is a generic one ("a circle"), although every detail
is described somewhere: the premise of SMILE.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from fastcap.data.scenes import Scene, SceneObject
from fastcap.data.text import words
from fastcap.errors import bad

SAID = {"size": 0.3, "texture": 0.3, "color": 0.45, "position": 0.25, "background": 0.15}
REFERENCES = 5

# Per attribute: value -> the words for it, the usual one first. No word stands for two values.
WORDS = {
    "size": {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")},
    "texture": {
        "solid": ("solid", "plain"),
        "striped": ("striped", "stripy", "banded"),
        "dotted": ("dotted", "spotted", "speckled"),
    },
    "color": {
        "red": ("red", "crimson", "scarlet"),
        "orange": ("orange", "tangerine"),
        "yellow": ("yellow", "golden"),
        "green": ("green", "emerald"),
        "cyan": ("cyan", "turquoise"),
        "blue": ("blue", "navy"),
        "purple": ("purple", "violet"),
        "pink": ("pink", "rose"),
    },
    "shape": {
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle", "pyramid"),
        "diamond": ("diamond", "rhombus"),
        "cross": ("cross", "plus"),
        "star": ("star", "asterisk"),
        "ring": ("ring", "hoop"),
        "crescent": ("crescent", "moon"),
    },
    "row": {"top": ("top", "upper"), "bottom": ("bottom", "lower")},
    "column": {"left": ("left",), "right": ("right",)},
    "background": {"white": ("white",), "black": ("black",), "gray": ("gray", "grey"), "beige": ("beige", "tan")},
}
_MEANING = {
    word: (attribute, value)
    for attribute, values in WORDS.items()
    for value, synonyms in values.items()
    for word in synonyms
}
# "the middle left", "the top center", "the center": the middle row or column, or both, by what stands beside it.
_MIDDLE = ("middle", "center", "centre")


@dataclass(frozen=True)
class CaptionFacts:
    """What a caption claims: per object a set of (attribute, value), and the backgrounds named (one, if consistent)."""

    objects: tuple[frozenset[tuple[str, str]], ...]
    backgrounds: frozenset[str]

    def __len__(self) -> int:
        return sum(map(len, self.objects)) + len(self.backgrounds)


def write_captions(scenes: Iterable[Scene], seed: int = 0) -> list[list[str]]:
    """Five references for each scene, deterministic by seed. They may repeat, as people do."""
    rng = Random(f"fastcap captions {seed}")
    return [[_caption(rng, scene) for _ in range(REFERENCES)] for scene in scenes]


def _caption(rng: Random, scene: Scene) -> str:
    count = min(_pick(rng, (1, 2, 3), (0.5, 0.35, 0.15)), len(scene.objects))
    mentioned = rng.sample(scene.objects, count)
    text = _pick(rng, ("", "there is ", "a picture of "), (0.7, 0.15, 0.15))
    text += _pick(rng, (" and ", " with "), (0.7, 0.3)).join(_noun_phrase(rng, item) for item in mentioned)
    if rng.random() < SAID["background"]:
        ground = _synonym(rng, "background", scene.background)
        text += _pick(rng, (f" on a {ground} background", f" on {ground}", f" against a {ground} backdrop"))
    return text


def _noun_phrase(rng: Random, item: SceneObject) -> str:
    said = [name for name in ("size", "texture", "color") if rng.random() < SAID[name]] + ["shape"]
    phrase = " ".join(_synonym(rng, name, getattr(item, name)) for name in said)
    if rng.random() < SAID["position"]:
        phrase += _pick(rng, (" at the ", " in the ")) + _position(rng, item)
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _position(rng: Random, item: SceneObject) -> str:
    middle = _pick(rng, ("center", "middle"))
    if item.row == "middle":
        return middle if item.column == "center" else f"middle {item.column}"
    return f"{_synonym(rng, 'row', item.row)} {middle if item.column == 'center' else item.column}"


def _synonym(rng: Random, attribute: str, value: str) -> str:
    """The usual word six times in ten, otherwise one of the others."""
    usual, *others = WORDS[attribute][value]
    return usual if not others or rng.random() < 0.6 else _pick(rng, others)


def _pick(rng: Random, values, weights=None):
    return rng.choices(values, weights)[0]


def parse_caption(text: str) -> CaptionFacts:
    """The facts a caption claims. Exact on generated references; any other text is read as far as it goes.

    Unknown words are skipped. Size, texture and colour belong to the next shape named, a position to the shape before
    it (or, before any shape, to the first). Details that no shape follows make an object without a shape. A word that
    contradicts another ("red blue circle") is a claim too, and one of the two will be false. Repeats count once.
    """
    if not isinstance(text, str):
        raise bad("data.scenes", "caption", "be a string", text, "pass the caption's text")
    shapes: list[set] = []  # the objects, in order
    places: list[list[str]] = [[]]  # position words after shape 0, 1, ...; [0] collects those before any shape
    pending: set = set()
    backgrounds = set()
    for word in words(text):
        attribute, value = _MEANING.get(word, (None, word))
        if attribute == "background":
            backgrounds.add(value)
        elif attribute == "shape":
            shapes.append(pending | {(attribute, value)})
            places.append([])
            pending = set()
        elif attribute in ("row", "column") or word in _MIDDLE:
            places[-1].append(word)
        elif attribute is not None:
            pending.add((attribute, value))
    if pending or (places[0] and not shapes):
        shapes.append(pending)
        places.append([])
    for i, item in enumerate(shapes):
        item |= _place_facts(places[i + 1] if i else places[0] + places[1])
    return CaptionFacts(tuple(frozenset(item) for item in shapes), frozenset(backgrounds))


def _place_facts(said: list[str]) -> set[tuple[str, str]]:
    facts = {_MEANING[word] for word in said if word not in _MIDDLE}
    named = {attribute for attribute, _ in facts}
    if len(named) < 2 and any(word in _MIDDLE for word in said):
        facts |= {("row", "middle")} if "row" not in named else set()
        facts |= {("column", "center")} if "column" not in named else set()
    return facts
