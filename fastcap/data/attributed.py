"""Images that come with attribute words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcap.errors import bad


class Attributed:
    """A batch of images with the attribute words of each, which goes where a tensor of images goes.

    It has what training, decoding and reinforcement do with a batch, and nothing else; each does it to both parts.

    Args:
        images: [B, 3, S, S] or features [B, R, D].
        attributes: [B, M] int64, the tokenizer's ids; 0 where an image has fewer.

    >>> batch = Attributed(torch.zeros(2, 3, 48, 48), torch.tensor([[7, 9], [4, 0]]))
    >>> batch.repeat_interleave(3, 0)[1:4].attributes.tolist()
    [[7, 9], [7, 9], [4, 0]]
    """

    def __init__(self, images: Tensor, attributes: Tensor) -> None:
        if attributes.dim() != 2 or attributes.dtype != torch.int64 or len(attributes) != len(images):
            rule, got = f"be int64 [{len(images)}, M]", f"{attributes.dtype} {list(attributes.shape)}"
            raise bad("data.Attributed", "attributes", rule, got, "pass ids, 0 where an image has fewer")
        self.images, self.attributes = images, attributes

    @property
    def shape(self) -> torch.Size:
        """Of the images."""
        return self.images.shape

    @property
    def device(self) -> torch.device:
        return self.images.device

    def dim(self) -> int:
        """Of the images."""
        return self.images.dim()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> Attributed:
        return self._each(lambda x: x[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Attributed:
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Attributed:
        return self._each(lambda x: x.pin_memory())

    def double(self) -> Attributed:
        """With images in float64."""
        return Attributed(self.images.double(), self.attributes)

    def repeat_interleave(self, repeats: int, dim: int = 0) -> Attributed:
        return self._each(lambda x: x.repeat_interleave(repeats, dim))

    def chunk(self, chunks: int) -> list[Attributed]:
        return self._parts(lambda x: x.chunk(chunks))

    def split(self, size: int) -> list[Attributed]:
        return self._parts(lambda x: x.split(size))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Attributed:
        return Attributed(function(self.images), function(self.attributes))

    def _parts(self, function: Callable[[Tensor], Sequence[Tensor]]) -> list[Attributed]:
        pairs = zip(function(self.images), function(self.attributes), strict=True)
        return [Attributed(images, attributes) for images, attributes in pairs]

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """`torch.cat` of several; no other function of torch takes one."""
        if function is not torch.cat or kwargs or len(args) > 2 or args[1:] not in ((), (0,)):
            return NotImplemented
        (parts, *dim) = args
        return cls(torch.cat([p.images for p in parts], *dim), torch.cat([p.attributes for p in parts], *dim))


def word_ids(found: Sequence[str], tokenizer: Any) -> list[int | None]:
    """The id of each word that the tokenizer has as one token; None for the others."""
    encoded = (tokenizer.encode(word) for word in found)
    return [ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_id else None for ids in encoded]


def attribute_words(item: dict) -> list[str]:
    """The attributes of an item of `KarpathyDataset` or of its `images()`."""
    found = item["attributes"] if "attributes" in item else item.get("extras", {}).get("attributes")
    if found is None:
        remedy = 'add "attributes": ["red", "circle"] to its record, or [] where it has none'
        raise bad("data.attributes", f"image {item['imgid']}", "have attributes", "none", remedy)
    return found


def attribute_images(images: Tensor, found: Sequence[Sequence[str]], tokenizer: Any) -> Attributed:
    """`images` with the words of each that the tokenizer knows, in their order, each once.

    found: of each image its words, the most probable first. Words of several tokens, and unknown ones, are left out.
    """
    known = [dict.fromkeys(id for id in word_ids(words, tokenizer) if id is not None) for words in found]
    return Attributed(images, _padded([list(ids) for ids in known]))


def _padded(ids: Sequence[Sequence[int]]) -> Tensor:
    """[B, M] int64 of lists of ids: M the longest, one at least; 0 behind the others."""
    M = max([1, *map(len, ids)])
    return torch.tensor([[*row, *[0] * (M - len(row))] for row in ids], dtype=torch.int64).view(len(ids), M)
