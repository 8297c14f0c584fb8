"""Batches for training and evaluation, and a sampler that resumes at the exact batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastcap.data._checks import check_int
from fastcap.data.attributed import Attributed, attribute_images, attribute_words
from fastcap.data.tokenizer import CaptionTokenizer
from fastcap.errors import bad

IGNORE_INDEX = -100


class collate:
    """`collate(tokenizer, max_length, attributes)`: the DataLoader's `collate_fn` for items of `KarpathyDataset`.

    A batch of B captions, the longest of which has T - 1 tokens, is a dict of

    - images [B, 3, S, S] float32, or features [B, R, D], where images of fewer regions than R end in rows of zeros; with
      `attributes`, these and the words of each image's record as ids, `Attributed`
    - inputs [B, T] int64: start, then the words; the rest `pad_id`
    - target [B, T] int64: the words, then end; the rest -100
    - lengths [B] int64: valid targets of each caption, end included
    - imgids, captions: lists of B
    - truncated: how many of the B captions had more than `max_length` tokens

    A longer caption keeps its first `max_length` tokens and still ends with the end token, as in BLIP's and the
    self-critical recipes; so T <= max_length + 1. A class, not a closure, because workers must be able to pickle it.
    """

    def __init__(self, tokenizer: CaptionTokenizer, max_length: int = 40, attributes: bool = False) -> None:
        check_int("data.collate", "max_length", max_length, 1, "pass the number of tokens to keep of a caption")
        self.tokenizer, self.max_length, self.attributes = tokenizer, max_length, attributes

    def __call__(self, items: list[dict]) -> dict:
        encoded = [self.tokenizer.encode(item["caption"]) for item in items]
        lengths = [min(len(ids), self.max_length) + 1 for ids in encoded]
        B, T = len(items), max(lengths)
        inputs = torch.full((B, T), self.tokenizer.pad_id, dtype=torch.int64)
        target = torch.full((B, T), IGNORE_INDEX, dtype=torch.int64)
        for b, (ids, length) in enumerate(zip(encoded, lengths, strict=True)):
            kept = ids[: length - 1]
            inputs[b, :length] = torch.tensor([self.tokenizer.start_id, *kept])
            target[b, :length] = torch.tensor([*kept, self.tokenizer.end_id])
        return {
            "images": stack_items(items, self.tokenizer if self.attributes else None),
            "inputs": inputs,
            "target": target,
            "lengths": torch.tensor(lengths),
            "imgids": [item["imgid"] for item in items],
            "captions": [item["caption"] for item in items],
            "truncated": sum(len(ids) > self.max_length for ids in encoded),
        }


def collate_images(items: list[dict]) -> dict:
    """The `collate_fn` for `KarpathyDataset.images()`: images as in `collate`, and lists of B: imgids, captions (each a list
    of references), extras."""
    return {
        "images": stack_images([item["image"] for item in items]),
        "imgids": [item["imgid"] for item in items],
        "captions": [item["captions"] for item in items],
        "extras": [item["extras"] for item in items],
    }


def stack_images(images: list[torch.Tensor]) -> torch.Tensor:
    """Pictures [3, S, S] to [B, 3, S, S]; features [R_b, D] to [B, max R_b, D], padded with rows of zeros."""
    if images[0].dim() == 2 and len({len(features) for features in images}) > 1:
        return torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
    return torch.stack(images)


def stack_items(items: list[dict], tokenizer: CaptionTokenizer | None = None) -> torch.Tensor | Attributed:
    """The images of items of `KarpathyDataset` or of its `images()`; with a tokenizer, with their attributes as its ids."""
    images = stack_images([item["image"] for item in items])
    return images if tokenizer is None else attribute_images(images, [attribute_words(item) for item in items], tokenizer)


class ShuffledBatches:
    """A `batch_sampler` of shuffled batches that can be stopped and resumed at any batch of any epoch.

    The order of epoch e depends on (seed, e) alone. Iterating yields the rest of the current epoch and moves nothing:
    workers draw batches ahead of the training, so only the trainer knows where it is, and says so:

        for epoch in range(batches.epoch, num_epochs):
            for batch in loader:                 # the rest of `epoch`
                train_step(batch)
                batches.advance()                # or batches.set_position(epoch, batch)
                # a checkpoint taken here holds batches.state_dict()

    `len()` is the number of batches of a whole epoch.
    """

    _OP = "data.ShuffledBatches"

    def __init__(self, num_items: int, batch_size: int, seed: int = 0, drop_last: bool = False) -> None:
        check_int(self._OP, "num_items", num_items, 1, "pass len(dataset)")
        check_int(self._OP, "batch_size", batch_size, 1, "pass the items of a batch")
        check_int(self._OP, "seed", seed, 0, "pass for example seed=0")
        if drop_last and num_items < batch_size:
            got = f"{num_items} items and batch_size {batch_size}"
            raise bad(self._OP, "drop_last", "leave at least one batch", got, "pass drop_last=False")
        # Plain numbers, so that the state goes into JSON.
        self.num_items, self.batch_size, self.seed = int(num_items), int(batch_size), int(seed)
        self.drop_last = bool(drop_last)
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.num_items, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        # The position is read now, before the trainer moves it, not at each step.
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_items).tolist()
        first, B = self.batch, self.batch_size
        return (order[i * B : (i + 1) * B] for i in range(first, len(self)))

    def advance(self) -> None:
        """Say that one more batch has been trained on; after the last one the next epoch begins."""
        self.set_position(self.epoch, self.batch + 1)

    def set_position(self, epoch: int, batch: int) -> None:
        """Say that `batch` batches of `epoch` have been trained on: 0 <= batch <= len(self)."""
        if epoch < 0 or not 0 <= batch <= len(self):
            got = f"epoch {epoch}, batch {batch}"
            raise bad(self._OP, "position", f"have 0 <= batch <= {len(self)}", got, "count the batches trained on")
        self.epoch, self.batch = (epoch + 1, 0) if batch == len(self) else (epoch, batch)

    def state_dict(self) -> dict[str, int | bool]:
        """The position, and what the order depends on."""
        return {**self._order(), "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Go to a position; FastcapError if it was taken over other data or settings, whose order differs."""
        for name, ours in self._order().items():
            if state.get(name) != ours:
                got = f"{name} {state.get(name)!r} instead of {ours!r}"
                remedy = "resume with the same data and settings"
                raise bad(self._OP, "state", "come from the same sampler", got, remedy)
        self.set_position(state["epoch"], state["batch"])

    def _order(self) -> dict[str, int | bool]:
        names = ("num_items", "batch_size", "seed", "drop_last")
        return {name: getattr(self, name) for name in names}
