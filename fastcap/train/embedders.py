"""A CLIP by the name of where it is: a run of `fastcap train --model clip`, or a CLIP of transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from fastcap import models
from fastcap.errors import bad

from . import checkpoint


def load(source: str | Path, device: str | torch.device = "cpu") -> models.Embedder:
    """The embedder of images and texts that rewards captions or judges them.

    Args:
        source: the folder of a run of `fastcap train --model clip`, whose last checkpoint is taken, or one checkpoint in it;
            or the folder or hub name of a CLIP of transformers.
        device: where it runs.

    Raises:
        FastcapError: there is no such thing, it is no CLIP, or its files are not whole.

    >>> embedder = load("runs/clip")                                                       # doctest: +SKIP
    >>> torch.nn.functional.cosine_similarity(                                             # doctest: +SKIP
    ...     embedder.texts(["a red circle"]), embedder.images(picture.unsqueeze(0)))
    """
    folder = Path(source)
    if not (folder / "trainer.json").is_file() and checkpoint.last_of(folder) is None:
        return models.load_clip(str(source), device)
    found = checkpoint.find(folder)
    config = checkpoint.read_config(found)
    if config.model != "clip":
        remedy = "pass a run of fastcap train --model clip, or a transformers CLIP"
        raise bad("train", "clip", "embed images and texts", f"{source}, a {config.model}", remedy)
    return models.ClipEmbedder(models.load(found, device), models.load_tokenizer(found))
