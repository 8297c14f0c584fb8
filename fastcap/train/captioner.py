"""A trained checkpoint at work: pictures in, captions out, and where the model looked for each word."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcap import data, models
from fastcap.data.batching import stack_items
from fastcap.errors import bad

from . import checkpoint


class CaptionedFile(NamedTuple):
    """A picture file with its caption: the text, the ids that were decoded, and the picture as the model took it, with its
    attribute words where the model must be given them.

    Of a file that cannot be read `caption`, `ids` and `image` are None, and `reason` says why.
    """

    path: str
    caption: str | None
    reason: str
    ids: list[int] | None = None
    image: Tensor | None = None
    attributes: Sequence[str] | None = None


Centres = tuple[Sequence[float], Sequence[float]]
"""Where the rows and the columns of a grid of locations look, in shares of the picture's height and width."""


class Attended(NamedTuple):
    """The words of a caption, and for each where the model looked: maps [words, rows, columns], each with sum 1."""

    words: list[str]
    maps: Tensor


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
        if config.model == "clip":
            remedy = "it embeds and cannot caption; it is for train --reward-clip and evaluate --clip"
            raise bad("caption", "checkpoint", "be a captioner's", f"{folder}, a clip", remedy)
        tokenizer = models.load_tokenizer(found)
        return cls(models.load(found, device), tokenizer, config.image_size, config.max_length)

    @property
    def attribute_tokenizer(self) -> Any | None:
        """For `fastcap.data.batching.stack_items`: the tokenizer, where the model must be given attribute words."""
        given = isinstance(self.model, models.Glied) and self.model.predictor is None
        return self.tokenizer if given else None

    def __call__(self, images: Tensor, *, beam: int = 1, length_penalty: float = 0.0) -> list[str]:
        """Captions of images [B, 3, S, S] in [-1, 1]: greedy, or the best of a beam."""
        found = self.ids(images, beam=beam, length_penalty=length_penalty)
        return [self.tokenizer.decode(ids) for ids in found]

    def ids(self, images: Tensor, *, beam: int = 1, length_penalty: float = 0.0) -> list[list[int]]:
        """The captions as the tokenizer's ids, without start and end."""
        images, words = images.to(self.device), self.tokenizer
        ids = {"start_id": words.start_id, "end_id": words.end_id, "forbidden": (words.pad_id, words.start_id)}
        ids["max_length"] = self.max_length + 1  # the end is one
        if beam == 1:
            found = models.greedy(self.model, images, **ids)
        else:
            found = models.beam_search(self.model, images, beam_size=beam, length_penalty=length_penalty, **ids)
        return found.lists()

    @torch.no_grad()
    def attention(self, images: Tensor, captions: Sequence[str | Sequence[int]]) -> list[Attended]:
        """Where the model looked for each word of its captions: one forward pass over the given words.

        The map of a word is the attention with which the model predicted it, after the words before; of a word in pieces,
        the mean of its pieces'. `fastcap.train.attention_pictures.draw` makes the figure.

        Args:
            images: [B, 3, S, S] in [-1, 1].
            captions: of each image, the ids that `ids` gives, or a text, which is cut into the tokenizer's words.

        Raises:
            FastcapError: the model has no attention, or its locations are no grid of the picture.

        >>> captioner = Captioner.load("runs/scenes")                     # doctest: +SKIP
        >>> images = captioner.read("photo.png").unsqueeze(0)             # doctest: +SKIP
        >>> words, maps = captioner.attention(images, captioner(images))[0]  # doctest: +SKIP
        """
        if isinstance(captions, str) or len(captions) != len(images):
            got = f"{len(captions)} for {len(images)} images" if not isinstance(captions, str) else captions
            raise bad("caption", "captions", "be one for each image", got, "pass a list of them")
        if len(captions) == 0:
            return []
        encode = self.tokenizer.encode
        ids = [encode(caption) if isinstance(caption, str) else self._to_end(caption) for caption in captions]
        images = images.to(self.device)
        # Row b reads start, w_1, .., w_n-1 and so predicts w_1, .., w_n; what stands after is not looked at.
        inputs = torch.full((len(ids), max(1, *map(len, ids))), self.tokenizer.pad_id)
        for row, known in zip(inputs, ids, strict=True):
            row[: max(1, len(known))] = torch.tensor([self.tokenizer.start_id, *known[:-1]])
        alphas = self.model(images, inputs.to(self.device))[1]
        if alphas is None:
            remedy = "caption with a checkpoint of show-attend-tell or glied, or leave attention out"
            raise bad("caption", "model", "have attention to show", getattr(self.model, "name", "one without"), remedy)
        rows, columns = self._grid(images, alphas.shape[2])
        made = []
        for row, alpha in zip(ids, alphas.float().cpu(), strict=True):
            words, ends = self._pieces(row)
            maps = [alpha[first:end].mean(0) for first, end in zip([0, *ends], ends, strict=False)]
            maps = torch.stack(maps) if maps else alpha[:0]
            made.append(Attended(words, maps.view(-1, rows, columns)))
        return made

    def centres(self, images: Tensor) -> Centres | None:
        """The middles of what the locations see, where the encoder knows better than that they tile the picture.

        A convolution of stride 2 looks around every second pixel beginning with the first, so that after several of them
        a location sees what lies half a tile above and to the left of its own.
        """
        find = getattr(getattr(self.model, "encoder", None), "centres", None)
        return None if find is None else find(images)

    def _to_end(self, ids: Iterable[int]) -> list[int]:
        kept = list(itertools.takewhile(lambda i: i != self.tokenizer.end_id, map(int, ids)))
        for i in kept:
            if not 0 <= i < self.tokenizer.vocab_size:
                rule = f"have ids in [0, {self.tokenizer.vocab_size})"
                raise bad("caption", "captions", rule, i, "pass what `ids` of the same captioner gave")
        return kept

    def _pieces(self, ids: list[int]) -> tuple[list[str], list[int]]:
        """The words of a caption, and after how many ids each is complete."""
        words: list[str] = []
        ends: list[int] = []
        known: list[int] = []  # of a word that pieces may continue, and of those before it
        for end, i in enumerate(ids, 1):
            if i == self.tokenizer.unk_id:  # decoding drops it, but the model did predict it
                words, ends, known = [*words, "<unk>"], [*ends, end], []
                continue
            before, said = len(self.tokenizer.decode(known).split()), self.tokenizer.decode([*known, i]).split()
            known.append(i)
            if len(said) > before:
                words.append(said[-1])
                ends.append(end)
            elif said and words:
                words[-1], ends[-1] = said[-1], end
        return words, ends

    def _grid(self, images: Tensor, locations: int) -> tuple[int, int]:
        """(rows, columns) in which the locations tile the picture."""
        find = getattr(getattr(self.model, "encoder", None), "grid", None)
        side = math.isqrt(locations)
        grid = find(images) if find is not None else (side, side)
        if grid is None or grid[0] * grid[1] != locations:
            got = f"{locations} locations" + ("" if grid is None else f" for a grid of {grid[0]} x {grid[1]}")
            remedy = "regions of precomputed features have none to draw on; train with an encoder of pictures, such as conv"
            raise bad("caption", "attention", "lie on a grid of the picture", got, remedy)
        return grid

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
        self,
        paths: Iterable[str | Path],
        *,
        beam: int = 1,
        length_penalty: float = 0.0,
        batch_size: int = 64,
        features: data.RegionFeatures | None = None,
        attributes: Mapping[str, Sequence[str]] | None = None,
    ) -> Iterator[CaptionedFile]:
        """Each picture with its caption, or why it cannot be read, in order.

        features: of a model that was trained on precomputed features; the paths are then the ids that they are stored by.
        attributes: of a model that was trained with the attributes given: the words by name of the file, or by id.
        """
        if isinstance(getattr(self.model, "encoder", None), models.FeatureEncoder) != (features is not None):
            got = "none" if features is None else str(features.path)
            rule = "be given where the model was trained on them, and only there"
            raise bad("caption", "features", rule, got, "see `features` in the checkpoint's trainer.json")
        if (self.attribute_tokenizer is not None) != (attributes is not None):
            got = "none" if attributes is None else f"{len(attributes)} images' words"
            rule = "be given where the model was trained with the words of its images given, and only there"
            raise bad("caption", "attributes", rule, got, "see `attributes` in the checkpoint's trainer.json")
        read_one = self.read if features is None else lambda id: torch.from_numpy(features[id])
        paths = iter(paths)
        while batch := list(itertools.islice(paths, batch_size)):
            read: dict[int, dict] = {}
            reasons: dict[int, str] = {}
            for i, path in enumerate(batch):
                try:
                    words = {} if attributes is None else {"attributes": _words_of(path, attributes, features is None)}
                    read[i] = {"image": read_one(path), **words}
                except ValueError as error:
                    reasons[i] = str(error)
            found: dict[int, list[int]] = {}
            if read:
                images = stack_items(list(read.values()), self.attribute_tokenizer)
                ids = self.ids(images, beam=beam, length_penalty=length_penalty)
                found = dict(zip(read, ids, strict=True))
            for i, path in enumerate(batch):
                if i in reasons:
                    yield CaptionedFile(str(path), None, reasons[i])
                else:
                    item = read[i]["image"], read[i].get("attributes")
                    yield CaptionedFile(str(path), self.tokenizer.decode(found[i]), "", found[i], *item)


def _words_of(path: str | Path, attributes: Mapping[str, Sequence[str]], is_file: bool) -> Sequence[str]:
    name = Path(path).name if is_file else str(path)
    if name not in attributes:
        remedy = "name it in the file of --attributes, with [] where it has none"
        raise bad("caption", f"image {path}", "have attributes", "none", remedy)
    return attributes[name]
