"""Captions, families and splits of emoji, from the structure that Unicode gives their names.

Every content word is one of Unicode's (names and aliases as the `emoji` package carries them); "with", "of", "and",
"flag for" are the only joints. From ":woman_running_facing_right_medium_skin_tone:" come, in this order:

1. the full name                      woman running facing right with medium skin tone
2. without the skin tone              woman running facing right
3. without direction and hair too     woman running
4. the gender-neutral emoji's name    person running
5. the noun at its head               (for "red heart": heart; only nouns of `_HEADS`, under which many emoji fall)
6. aliases of 1-4                     running woman, runner

Repeats are dropped and five are kept. So one picture is described in more and in less detail, each detail being told by
a minority of its references: the likeliest caption is generic, the detail is there to be learnt. A flag has "flag for
France", "flag of France" and "flag"; many other things have one level only, the name, and their aliases.

The family of an emoji is caption 4 where there is one, else caption 3: every skin tone, hair, gender, direction and
pairing of one motif is one family.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

REFERENCES = 5

_TONE = re.compile(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone")
_HAIR = re.compile(r"_(red_hair|curly_hair|white_hair|bald)(?=_|$)")
_FACING = re.compile("_facing_right$")
_PERSON = "(?:man|woman|person|boy|girl|adult|child)"
_PEOPLE = re.compile(rf"^(kiss|couple_with_heart|family)_({_PERSON}(?:_{_PERSON})*)$")
# These stand at the end of Unicode's short names after a colon, which the `emoji` package drops.
_TRAIT = re.compile(r"^(.*)_(blond_hair|beard)$")

# Nouns that many emoji's names end in (before "with", "of", ...), and which are true of each of them: "hot dog" is why
# they are listed and not computed.
_HEADS = frozenset(
    "face button heart hand arrow square cat mark circle moon symbol flag star diamond tree medal cloud book person"
    " envelope mailbox umbrella monkey banknote camera shoe sun".split()
)
_AFTER_HEAD = re.compile(r"_(?:with|in|on|of|at|without|over|for|behind|and)_.*$")

# Gender to neutral, tried in this order; the result counts only if it is an emoji's name.
_NEUTRAL_WORDS = (("man", "person"), ("woman", "person"), ("men", "people"), ("women", "people"))
_NEUTRAL_NAMES = {
    "woman_and_man_holding_hands": "people_holding_hands",
    "prince": "person_with_crown",
    "princess": "person_with_crown",
    "mermaid": "merperson",
    "merman": "merperson",
    "old_man": "older_person",
    "old_woman": "older_person",
    "boy": "child",
    "girl": "child",
    "Mrs._Claus": "Mx_Claus",
    "Santa_Claus": "Mx_Claus",
}


@dataclass(frozen=True)
class Emoji:
    """One emoji: its characters, its name as a natural phrase, its family, and its references."""

    characters: str
    name: str
    family: str
    captions: tuple[str, ...]


class EmojiNames:
    """The names of one version of the `emoji` package: of its EMOJI_DATA, {characters: {"en": ":name:", ...}}."""

    def __init__(self, data: dict[str, dict]) -> None:
        qualified = {text: entry for text, entry in data.items() if entry["status"] == 2}  # 2: fully qualified
        self._names = {text: entry["en"].strip(":") for text, entry in qualified.items()}
        self._aliases = {
            entry["en"].strip(":"): [alias.strip(":") for alias in entry.get("alias", [])] for entry in qualified.values()
        }

    def all(self) -> list[Emoji]:
        """Every emoji, in the order of its code points."""
        return [self._describe(text) for text in sorted(self._names)]

    def _describe(self, characters: str) -> Emoji:
        name = self._names[characters]
        if _is_flag(characters):
            place = _plain(name)
            return Emoji(characters, f"flag for {place}", "flag", (f"flag for {place}", f"flag of {place}", "flag"))
        toneless = _TONE.sub("", name)
        base = self._base(toneless)
        neutral = self._neutral(base)
        levels = [name, toneless, base, neutral]
        phrases = [_phrase(level) for level in levels]
        phrases += [head for head in [_head(neutral)] if head]
        for level in levels:
            if not _PEOPLE.match(level):  # ":couplekiss_man_woman:" is a code, not words
                phrases += [_plain(alias) for alias in self._aliases.get(level, []) if _is_prose(alias)]
        return Emoji(characters, phrases[0], _phrase(neutral), tuple(_without_repeats(phrases)[:REFERENCES]))

    def _base(self, name: str) -> str:
        """`name` (no skin tone) without hair, direction and the people of a couple, where that is an emoji too."""
        for pattern, kept in ((_HAIR, ""), (_FACING, ""), (_PEOPLE, r"\1")):
            shorter = pattern.sub(kept, name)
            if shorter in self._aliases:
                name = shorter
        return name

    def _neutral(self, name: str) -> str:
        if name in _NEUTRAL_NAMES:
            return _NEUTRAL_NAMES[name]
        parts = name.split("_")
        for gendered, neutral in _NEUTRAL_WORDS:
            if gendered in parts:
                without = "_".join(part for part in parts if part != gendered)
                replaced = "_".join(neutral if part == gendered else part for part in parts)
                for candidate in (replaced, without):
                    if candidate in self._aliases:
                        return candidate
        return name


def split_emoji(families: Sequence[str], seed: int = 0) -> list[tuple[str, str]]:
    """(split, "seen" or "unseen") for each picture, given its family.

    - Unseen families: of the families of each size (1, 2-11, 12-60 pictures) a sixteenth goes whole to "test", as many
      to "val". The few larger ones (persons, couples) are too much of the data to hold out.
    - Variants of seen families: of each other family of 4 or more pictures a twelfth, rounded at random, to each.
    - Flags always stay in "train": no picture tells a country that was never named.
    """
    rng = Random(f"fastcap emoji {seed}")
    members: dict[str, list[int]] = defaultdict(list)
    for i, family in enumerate(families):
        members[family].append(i)
    result = [("train", "seen")] * len(families)
    buckets: list[list[str]] = [[], [], [], []]
    for family in sorted(members):
        if family != "flag":
            buckets[sum(len(members[family]) >= size for size in (2, 12, 61))].append(family)
    for bucket in buckets:
        rng.shuffle(bucket)
        held = 0 if bucket is buckets[-1] else round(len(bucket) / 16)
        for n, family in enumerate(bucket):
            pictures = members[family]
            if n < 2 * held:
                for i in pictures:
                    result[i] = ("test" if n < held else "val", "unseen")
            elif len(pictures) >= 4:
                rng.shuffle(pictures)
                share = len(pictures) / 12
                for split in ("test", "val"):
                    for _ in range(int(share + rng.random())):
                        result[pictures.pop()] = (split, "seen")
    return result


def _is_flag(characters: str) -> bool:
    """A country flag (two regional indicators) or a region's (the black flag and tag letters)."""
    return "\U0001f1e6" <= characters[0] <= "\U0001f1ff" or "\U000e007f" in characters


def _phrase(name: str) -> str:
    """The name as English: details that Unicode puts after a colon follow "with", the people of a couple "of"."""
    tones = _TONE.findall(name)
    name = _TONE.sub("", name)
    details = [f"{tone} skin tone" for tone in tones]
    hair = _HAIR.search(name)
    if hair:
        name = _HAIR.sub("", name)
        if hair[1] == "bald":
            name = f"bald_{name}"
        else:
            details.append(_plain(hair[1]))
    trait = _TRAIT.match(name)
    if trait:
        name = trait[1]
        details.insert(0, _plain(trait[2]))
    couple = _PEOPLE.match(name)
    phrase = _plain(name)
    if couple:
        phrase = f"{_plain(couple[1])} of {_listed(couple[2].split('_'))}"
    return f"{phrase} with {_listed(details)}" if details else phrase


def _head(name: str) -> str | None:
    core = _AFTER_HEAD.sub("", name).split("_")
    does_something = core[0] == "person" and len(core) > 1  # "person raising hand" is no hand
    return core[-1] if core[-1] in _HEADS and not does_something else None


def _listed(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("’", "'").replace("“", "").replace("”", "").replace("&", "and").lower()


def _is_prose(alias: str) -> bool:
    """Whether an alias is words, not a code such as ":u7533:", ":+1:", ":m:" or ":clock330:"."""
    parts = alias.split("_")
    return all(len(part) > 1 and part.replace("-", "").isalpha() for part in parts)


def _without_repeats(phrases: list[str]) -> list[str]:
    """The first of those that read alike: ":t_rex:" repeats ":T-Rex:", ":eight_oclock:" ":eight_o'clock:"."""
    first: dict[str, str] = {}
    for phrase in phrases:
        first.setdefault(re.sub(r"\W", "", phrase), phrase)
    return list(first.values())
