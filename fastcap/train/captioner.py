"""A trained checkpoint at work: pictures in, captions out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcap import data, models
from fastcap.errors import bad

from . import checkpoint


class Captioner:
    """A model with its tokenizer and the size of picture it was trained on.

    >>> captioner = Captioner.load("runs/scenes")                     # doctest: +SKIP
    >>> captioner(captioner.read("photo.png").unsqueeze(0), beam=3)   # doctest: +SKIP
    ['a large red circle']
    """

    def __init__(self, model: nn.Module, tokenizer: Any, image_size: int, max_length: int) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.image_size, self.max_length = image_size, max_length
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Captioner:
        """From a checkpoint, or from the last one of a run's folder."""
        found = checkpoint.find(folder)
        config = checkpoint.read_config(found)
        tokenizer = models.load_tokenizer(found)
        return cls(models.load(found, device), tokenizer, config.image_size, config.max_length)

    def __call__(self, images: Tensor, *, beam: int = 1, length_penalty: float = 0.0) -> list[str]:
        """Captions of images [B, 3, S, S] in [-1, 1]: greedy, or the best of a beam."""
        images, words = images.to(self.device), self.tokenizer
        ids = {"start_id": words.start_id, "end_id": words.end_id, "forbidden": (words.pad_id, words.start_id)}
        ids["max_length"] = self.max_length + 1  # the end is one
        if beam == 1:
            found = models.greedy(self.model, images, **ids)
        else:
            found = models.beam_search(self.model, images, beam_size=beam, length_penalty=length_penalty, **ids)
        return [self.tokenizer.decode(ids) for ids in found.lists()]

    def read(self, path: str | Path) -> Tensor:
        """A picture file as the model takes it, [3, S, S] in [-1, 1]; transparent pictures lie on white."""
        try:
            pixels = data.read_pixels(path, self.image_size)
        except FileNotFoundError as error:
            raise bad("caption", "image", "be a file", str(path), "check the path") from error
        except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error, ...
            raise bad("caption", "image", "be a readable picture", str(path), f"leave it out ({error})") from error
        return (torch.tensor(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.5

    def files(
        self, paths: Iterable[str | Path], *, beam: int = 1, length_penalty: float = 0.0, batch_size: int = 64
    ) -> Iterator[tuple[str, str | None, str]]:
        """(path, caption, "") for each picture, in order, or (path, None, why) for one that cannot be read."""
        paths = iter(paths)
        while batch := list(itertools.islice(paths, batch_size)):
            read: dict[int, Tensor] = {}
            reasons: dict[int, str] = {}
            for i, path in enumerate(batch):
                try:
                    read[i] = self.read(path)
                except ValueError as error:
                    reasons[i] = str(error)
            captions: dict[int, str] = {}
            if read:
                found = self(torch.stack(list(read.values())), beam=beam, length_penalty=length_penalty)
                captions = dict(zip(read, found, strict=True))
            for i, path in enumerate(batch):
                yield str(path), captions.get(i), reasons.get(i, "")
