"""Oracle scores of captions of scenes: is what they say true, how much do they say, do they tell scenes apart?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from fastcap.data.scene_captions import CaptionFacts, parse_caption
from fastcap.data.scenes import Scene, SceneObject
from fastcap.errors import bad

_MAX_OBJECTS = 3
_ATTRIBUTES = tuple(field.name for field in fields(SceneObject))


class _SceneTable:
    """All scenes as arrays, so that one caption is compared with all of them at once."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.backgrounds = np.array([scene.background for scene in scenes])
        padded = [list(scene.objects) + [None] * (_MAX_OBJECTS - len(scene.objects)) for scene in scenes]
        self.objects = {
            name: np.array([[getattr(item, name, "") for item in row] for row in padded]) for name in _ATTRIBUTES
        }
        self._seen: dict[CaptionFacts, np.ndarray] = {}

    def true_claims(self, claimed: CaptionFacts) -> np.ndarray:
        """How many of the caption's claims hold in each scene, int64 [N], its objects matched to the scene's as well as
        can be, one to one."""
        if claimed not in self._seen:
            self._seen[claimed] = self._count(claimed)
        return self._seen[claimed]

    def _count(self, claimed: CaptionFacts) -> np.ndarray:
        N = len(self.backgrounds)
        # best[n, used]: most claims true when the objects in the bit set `used` of scene n are taken. Over 8 sets
        # and the mentions one by one this finds the best matching exactly, whatever the number of mentions.
        best = np.full((N, 1 << _MAX_OBJECTS), -1, np.int64)
        best[:, 0] = 0
        for mention in claimed.objects:
            gain = np.zeros((N, _MAX_OBJECTS), np.int64)
            for attribute, value in mention:
                gain += self.objects[attribute] == value
            after = best.copy()
            for used in range(1 << _MAX_OBJECTS):
                for i in range(_MAX_OBJECTS):
                    if not used >> i & 1:
                        with_i = np.where(best[:, used] < 0, -1, best[:, used] + gain[:, i])
                        np.maximum(after[:, used | 1 << i], with_i, out=after[:, used | 1 << i])
            best = after
        total = best.max(axis=1)
        for name in claimed.backgrounds:
            total += self.backgrounds == name
        return total


def score_captions(
    captions: Sequence[str], scenes: Sequence[Scene | dict], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Score caption i against scene i, and as a query among all the scenes.

    `scenes` are `Scene`s or the "facts" stored in `dataset_scenes.json`. A fact is a shape, colour, size, texture, row
    or column of one object, or the background. Returned, each in [0, 1] except the last:

    - fact_precision: true claims / claims, over all captions together (0.0 if nothing was claimed);
    - fact_recall: true claims / facts of the scenes;
    - oracle_r<k>: the share of captions whose own scene is among the k scenes that fulfil most of its claims; ties
      count by their chance under a random order, so a caption that says nothing scores k / N;
    - facts_per_caption: claims / captions.

    Raises FastcapError for an empty list, lists of different lengths, or an entry that is not a caption or a scene.
    """
    return {name: float(score) for name, score in scores_of_counts(claim_counts(captions, scenes, ks).sum(0), ks).items()}


def claim_counts(captions: Sequence[str], scenes: Sequence[Scene | dict], ks: Sequence[int] = (1, 5, 10)) -> np.ndarray:
    """What `score_captions` counts of each caption, [N, 4 + K] float64: 1; its claims; those that are true; the facts of its
    scene; and for each k how sure it is that the scene is among the first k."""
    if len(captions) != len(scenes) or not captions:
        got = f"{len(captions)} captions and {len(scenes)} scenes"
        raise bad("data.score_captions", "captions", "be as many as the scenes, and at least one", got, "pass pairs")
    scenes = [_as_scene(scene, i) for i, scene in enumerate(scenes)]
    table = _SceneTable(scenes)
    counts = np.empty((len(captions), 4 + len(ks)))
    for i, caption in enumerate(captions):
        claimed = parse_caption(caption)
        agreement = table.true_claims(claimed)
        better, tied = int((agreement > agreement[i]).sum()), int((agreement == agreement[i]).sum())
        present = len(scenes[i].objects) * len(_ATTRIBUTES) + 1
        counts[i] = 1, len(claimed), agreement[i], present, *np.clip((np.array(ks) - better) / tied, 0, 1)
    return counts


def scores_of_counts(counts: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
    """The scores of sums of `claim_counts` over captions: of [..., 4 + K] each [...]."""
    captions, claims, true, present = (counts[..., n] for n in range(4))
    return {
        "fact_precision": true / np.maximum(claims, 1),  # of no claims none is true
        "fact_recall": true / present,
        **{f"oracle_r{k}": counts[..., 4 + n] / captions for n, k in enumerate(ks)},
        "facts_per_caption": claims / captions,
    }


def _as_scene(scene: Scene | dict, i: int) -> Scene:
    if isinstance(scene, Scene):
        return scene
    try:
        return Scene.from_facts(scene)
    except (TypeError, KeyError) as error:
        remedy = "pass the 'facts' of a scenes data set"
        raise bad("data.score_captions", f"scenes[{i}]", "be a Scene or its facts", scene, remedy) from error
