"""What captions earn in self-critical training: the run's rewards against all captions that people wrote of the image.

Captions are the tokenizer's ids, and the end is the last word of each, of what is drawn (unless it was cut before its end)
and of the references alike. Otherwise captions that stop in mid-sentence, "a man in a", earn the most: their n-grams are
right, and nothing misses the rest (Hu, Cavicchioli and Capotondi, A Request for Clarity over the End of Sequence Token in
the Self-Critical Sequence Training, arXiv:2305.12254).

All words that the tokenizer does not know are one unknown word of the references; it is never drawn, so nothing equals it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcap.errors import FastcapError, bad
from fastcap.rewards import CiderD, CombinedReward, parse_rewards
from fastcap.rewards.combined import Combined

from . import rl_images
from .config import TrainConfig
from .rl_rewards import embed_texts, first_of_each, row_of_each

_FREQUENCIES, _MADE_BY = "document_frequencies.npz", "document_frequencies.json"


class SelfCriticalRewarder:
    """The weighted sum of a run's `rewards`, of captions given as ids.

    Args:
        config: `rewards`, `df` and `workers` of a run.
        tokenizer: of the run.
        embedder: the CLIP of the reward "similarity", else None.
        records: of the training images, in `KarpathyDataset`'s order.
        validation: of the images that are validated on, or None.
        folder: where the document frequencies are written, and the images' embeddings are kept.
        note: told what takes a while.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: Any, embedder: Any, records: Sequence[dict], validation: Sequence[dict] | None,
        folder: Path, device: torch.device, note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._row_of, self._embedder, self._device = row_of_each(records), embedder, device
        weights = parse_rewards(config.rewards, "train")
        if len(records) < 2 and not config.df:
            rule = f"have at least 2 pictures to train on with objective {config.objective}"
            remedy = "of one alone CIDEr-D weighs every word 0; pass more, or --df, the document frequencies of others"
            raise bad("train", "data", rule, len(records), remedy)
        references = _references(records, tokenizer)
        tokens = _digest(tokenizer)
        cider = _loaded(config.df, tokens, tokenizer.end_id, note) if config.df else None
        self._combined = CombinedReward(weights, references, cider)
        self._cider = self._combined.cider or cider or CiderD(references)
        if cider is None:
            _write(self._cider, folder, tokens)
        self._images = None
        if "similarity" in weights:
            self._images = rl_images.find(embedder, records, 0, folder, workers=config.workers, note=note).to(device)
        self._validation_row_of, self._validation = {}, None
        if validation is not None:
            self._validation_row_of = row_of_each(validation)
            self._validation = self._cider.prepare(_references(validation, tokenizer))

    def rows(self, imgids: list) -> Tensor:
        """[B] int64, where each image stands among the training images."""
        return torch.tensor([self._row_of[imgid] for imgid in imgids])

    def __call__(self, captions: list[list[int]], texts: list[str], rows: Tensor) -> Combined:
        """What N captions, the same as ids and as texts, earn as captions of the images `rows` [N]."""
        similarity = None
        if self._images is not None:
            embedded = embed_texts(self._embedder, texts, self._device)
            similarity = (embedded * self._images.embeddings[rows.to(self._device)]).sum(1)
        return self._combined(captions, rows, similarity=similarity)

    def of_validation(self, imgids: list, captions: list[list[int]]) -> Tensor:
        """[U], CIDEr-D of one caption of each of the U different images of a validation batch, of which `captions` are."""
        first = first_of_each(imgids)[0].tolist()
        rows = [self._validation_row_of[imgids[i]] for i in first]
        return self._cider([captions[i] for i in first], self._validation, rows)


def _references(records: Sequence[dict], tokenizer: Any) -> list[list[list[int]]]:
    """Of each image its captions as ids, each with the end; whole, however long the model's may be."""
    return [
        [[*tokenizer.encode(sentence["raw"]), tokenizer.end_id] for sentence in record["sentences"]] for record in records
    ]


def _digest(tokenizer: Any) -> str:
    """What two tokenizers share that give words the same ids: a digest of the file that they save."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def _write(cider: CiderD, folder: Path, tokens: str) -> None:
    """The document frequencies, for `df` of other runs, and what tokenizer's ids they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    made_by = folder / _MADE_BY
    if made_by.is_file() and (folder / _FREQUENCIES).is_file():  # a resumed run: the same data and tokenizer
        return
    cider.save(folder / _FREQUENCIES)
    partial = made_by.with_suffix(".partial")
    partial.write_text(json.dumps({"tokenizer": tokens}) + "\n", encoding="utf-8")
    os.replace(partial, made_by)


def _loaded(path: str, tokens: str, an_id: int, note: Callable[[str], None]) -> CiderD:
    """A scorer with saved document frequencies; those that a run wrote must be of the same tokenizer."""
    cider, made_by = CiderD.load(path), Path(path).parent / _MADE_BY
    try:
        cider.prepare([[[an_id]]])
    except FastcapError as error:
        remedy = "encode the captions before they are counted, with the run's tokenizer, or leave --df out"
        raise bad("train", "df", "be of a tokenizer's ids", f"{path} (of words)", remedy) from error
    if Path(path).name == _FREQUENCIES and made_by.is_file():
        if json.loads(made_by.read_text(encoding="utf-8")).get("tokenizer") != tokens:
            remedy = (
                "its ids are other words here: take this run's tokenizer from that run with --init-from, or leave --df out"
            )
            raise bad("train", "df", "be of the same tokenizer", path, remedy)
    else:
        note(f"document frequencies of {path}, beside which nothing says of which tokenizer's ids they are: not checked")
    return cider
