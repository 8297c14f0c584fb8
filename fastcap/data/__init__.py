"""Captioning data: generated sets that need no download, a reader of Karpathy's format, tokenizers, batches.

Names load their module when first used, so that importing this package needs neither pillow nor tokenizers.
"""

from __future__ import annotations

import importlib

_HOME = {
    "words": "text",
    "DatasetSummary": "_folder",
    "Scene": "scenes",
    "SceneObject": "scenes",
    "make_scenes": "scenes",
    "render_scenes": "scenes",
    "split_groups": "scenes",
    "write_scenes": "scenes",
    "RegionSummary": "scene_regions",
    "write_scene_regions": "scene_regions",
    "CaptionFacts": "scene_captions",
    "parse_caption": "scene_captions",
    "write_captions": "scene_captions",
    "score_captions": "scene_scores",
    "find_font": "emoji",
    "write_emoji": "emoji",
    "KarpathyDataset": "karpathy",
    "read_pixels": "karpathy",
    "RegionFeatures": "features",
    "CaptionTokenizer": "tokenizer",
    "Attributed": "attributed",
    "ShuffledBatches": "batching",
    "ignore_padding": "sequences",
    "collate": "batching",
    "collate_images": "batching",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
