"""Targets with the statistics of real captions: lengths, words said twice, and the few words that are in most of them.

The COCO captions are used where they are ($FASTCAP_SHARED, else ../shared beside the source tree); else the captions
below, written for this project, whose lengths (9 to 14 words) and repeats are alike.
"""

from __future__ import annotations

import functools
import math
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

CAPTIONS = """\
a man in a red jacket rides a small bicycle down the street
two dogs are playing with a ball on the grass near a fence
a woman is holding an umbrella in the rain beside a bus
a plate of food with rice and vegetables on a wooden table
a brown horse standing in a field next to a white horse
the kitchen has a stove and a sink and a large window
a group of people sitting around a table with glasses of wine
a cat is sleeping on top of a pile of clean clothes
a train pulls into the station while people wait on the platform
a little girl with a blue hat is eating a slice of cake
an old clock hangs on the wall of a brick building
a surfer rides a wave while another surfer paddles out to sea
a bathroom with a white toilet and a green shower curtain
three sheep graze on a hill with snow on the mountains behind
a boy throws a ball to a man who is wearing a glove
a street sign on a pole in front of a tall building
a bowl of oranges and a bowl of apples on a kitchen counter
a black and white photo of a man with a long beard
a yellow truck is parked on the side of a dirt road
a young couple walks along the beach as the sun goes down
a giraffe bends its neck to eat leaves from a small tree
a laptop and a cup of coffee sit on a desk by the window
several kites are flying in the sky over a park full of people
a man is cutting a large pizza with a pair of scissors
an airplane flies low over the houses at the edge of town
a bird with a long beak is standing in the shallow water
a child in pajamas brushes his teeth in front of a mirror
a tennis player swings his racket at the ball during a match
a bench under a tree covered with pink flowers in the spring
a skier in a green suit jumps over a bump of snow
two elephants spray water on each other in a muddy river
a vase with red and white roses is on the window sill
a fire truck with its lights on is turning at the corner
a person on a motorcycle waits for the traffic light to change
a teddy bear sits in a chair with a book on its lap
a market stall sells bananas and carrots and many other fruits
a living room with a couch and a television and two lamps
a boat is tied to a dock on a lake with calm water
a chef in a white hat puts a tray of bread into the oven
a zebra and her young one drink from a pool in the shade
"""


class Captions(NamedTuple):
    """Captions as lists of words, the rank of each word by frequency (1 is the commonest), and where they come from."""

    words: list[list[str]]
    ranks: dict[str, int]
    source: str


@functools.cache
def load() -> Captions:
    """The COCO captions where they are, else CAPTIONS."""
    for shared in (os.environ.get("FASTCAP_SHARED"), Path(__file__).resolve().parent.parent.parent / "shared"):
        folder = Path(shared or ".") / "data" / "coco_captions"
        files = sorted(folder.glob("reference*.txt")) if shared else []
        if files:
            lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
            return _captions(lines, "COCO captions")
    return _captions(CAPTIONS.splitlines(), "the project's own 40 captions")


def _captions(lines: list[str], source: str) -> Captions:
    words = [said for line in lines if (said := re.findall(r"[a-z0-9']+", line.lower()))]
    common = Counter(word for said in words for word in said).most_common()
    return Captions(words, {word: rank for rank, (word, _) in enumerate(common, start=1)}, source)


def spread(rank: int, V: int) -> int:
    """The id of the word of a rank: a fixed permutation of [0, V), so that common words do not lie side by side."""
    step = round(V * 0.618)
    while math.gcd(step, V) != 1:
        step += 1
    return rank * step % V


def draw_targets(
    B: int, T: int, V: int, *, padded: float | None = None, ignore_index: int = -100, seed: int = 0
) -> torch.Tensor:
    """[B, T] int64: captions drawn at random, each ended by one id of its own (rank 0), cut at T, then `ignore_index`.

    With `padded`, about that share of the positions is ignored: while the captions so far are too short for it, the
    longest of eight is drawn; with 0 none is, and a row is captions one after another. Without it the captions are as
    long as they are.
    """
    captions, chance = load(), random.Random(seed)
    rows, used = [], 0
    for _ in range(B if padded != 0 else 0):
        said = chance.choice(captions.words)
        if padded is not None and used < (1 - padded) * T * len(rows) + T / 2:
            said = max((chance.choice(captions.words) for _ in range(8)), key=len)
        ids = [spread(captions.ranks[word], V) for word in said][: T - 1] + [spread(0, V)]
        rows.append(ids + [ignore_index] * (T - len(ids)))
        used += len(ids)
    while len(rows) < B:
        ids = []
        while len(ids) < T:
            ids += [spread(captions.ranks[word], V) for word in chance.choice(captions.words)] + [spread(0, V)]
        rows.append(ids[:T])
    return torch.tensor(rows, dtype=torch.int64)
