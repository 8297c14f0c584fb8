"""A trained CLIP at work: pictures and texts in, embeddings out. One interface, whoever trained it: `Embedder`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcap.errors import bad

from .clip import Clip
from .encoders._base import normalise_colours

_TEXTS, _IMAGES = 256, 64  # at a time


class Embedder:
    """Embeds images and texts by one model, in evaluation mode and without gradients.

    width: D, of the embeddings.
    image_size: side of the pictures as the model takes them, in pixels; others are resized.
    context: tokens of the longest text, what begins and ends it included.
    logit_scale: the inverse temperature that the model was trained with.
    truncated: how many texts were cut at `context` so far.

    What a subclass adds: `_ids`, `_embed_texts`, `_embed_images` and `_rest`.
    """

    width: int

    def __init__(self, model: nn.Module, image_size: int, context: int, logit_scale: float) -> None:
        self.model = model.eval()
        self.image_size, self.context, self.logit_scale = image_size, context, logit_scale
        self.truncated = 0
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of pictures [B, 3, S, S] in [-1, 1], of any size S: float32, on the model's device.

        Raises:
            FastcapError: `images` are no square pictures.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
            raise bad("embedder", "images", "be a float tensor", got, "pass pictures in [-1, 1]")
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            remedy = "pass square pictures, as the data's reader makes them"
            raise bad("embedder", "images", "have shape [B, 3, S, S]", list(images.shape), remedy)
        with torch.autocast(self.device.type, enabled=False):
            made = [self._embed_images(part.to(self.device, torch.float32)) for part in images.split(_IMAGES)]
        return torch.cat(made) if made and len(images) else torch.zeros(0, self.width, device=self.device)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [N, D] of texts: float32, on the model's device.

        A text of more than `context` tokens keeps its first ones and its end, and is counted in `truncated`; a word that the
        model does not know is its tokenizer's unknown word. Embed equal texts once: in another batch they may differ by
        rounding.

        Raises:
            FastcapError: `captions` are not texts.
        """
        if isinstance(captions, str):
            raise bad("embedder", "captions", "be several texts", captions, "pass a list of them")
        ids = [self._ids(_checked(caption)) for caption in captions]
        self.truncated += sum(len(one) > self.context for one in ids)
        ids = [one if len(one) <= self.context else [*one[: self.context - 1], one[-1]] for one in ids]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # so that little is padding
        made = torch.zeros(len(ids), self.width, device=self.device)
        for first in range(0, len(ids), _TEXTS):
            rows = order[first : first + _TEXTS]
            lengths = torch.tensor([len(ids[row]) for row in rows])
            padded = [[*ids[row], *[ids[row][-1]] * (int(lengths[-1]) - len(ids[row]))] for row in rows]
            with torch.autocast(self.device.type, enabled=False):
                made[rows] = self._embed_texts(torch.tensor(padded, device=self.device), lengths)
        return made

    @cached_property
    def fingerprint(self) -> str:
        """Of what the embeddings depend on: the weights, the tokenizer, and how pictures are prepared."""
        digest = hashlib.sha256(json.dumps([type(self).__name__, self.image_size, self.context, self._rest()]).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _ids(self, text: str) -> list[int]:
        """The whole text's ids, with what begins and ends it."""
        raise NotImplementedError

    def _embed_texts(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids [n, T], each padded with its last one; lengths [n] on the CPU."""
        raise NotImplementedError

    def _embed_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _rest(self) -> Any:
        """What else embeddings depend on, as JSON."""
        raise NotImplementedError


class ClipEmbedder(Embedder):
    """A `Clip` with the tokenizer that it was trained with."""

    def __init__(self, model: Clip, tokenizer: Any) -> None:
        super().__init__(model, model.config.image_size, model.config.context, model.logit_scale.item())
        self.width, self.tokenizer = model.config.embed_width, tokenizer

    def _ids(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text), self.tokenizer.end_id]

    def _embed_texts(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.model.encode_text(ids, lengths)

    def _embed_images(self, images: Tensor) -> Tensor:
        return self.model.encode_image(resized(images, self.image_size))

    def _rest(self) -> Any:
        tokens = self.tokenizer
        return [self.model.config.__dict__, [tokens.decode([i]) for i in range(tokens.vocab_size)]]


class TransformersClipEmbedder(Embedder):
    """`transformers.CLIPModel` with its tokenizer; `fastcap.models.load_clip` makes one of a folder or hub name.

    Args:
        model: a CLIPModel.
        tokenizer: its tokenizer, which puts a start before a text and an end after it.
        mean, std: normalisation per channel of values in [0, 1].
        resize: side to which pictures are resized before their middle is cut out, if not the model's own.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, mean: Sequence[float], std: Sequence[float], resize: int | None = None
    ) -> None:  # fmt: skip
        config = model.config
        size, context = config.vision_config.image_size, config.text_config.max_position_embeddings
        super().__init__(model, size, context, model.logit_scale.exp().item())
        self.width, self.tokenizer = config.projection_dim, tokenizer
        self.mean, self.std, self.resize = tuple(mean), tuple(std), resize or size

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def _embed_texts(self, ids: Tensor, lengths: Tensor) -> Tensor:
        # Attention is causal and the first end is what is read: ends in place of pads change nothing.
        return _features(self.model.get_text_features(input_ids=ids))

    def _embed_images(self, images: Tensor) -> Tensor:
        images, edge = resized(images, self.resize), (self.resize - self.image_size) // 2
        if edge > 0:
            images = images[:, :, edge : edge + self.image_size, edge : edge + self.image_size]
        return _features(self.model.get_image_features(pixel_values=normalise_colours(images, self.mean, self.std)))

    def _rest(self) -> Any:
        return [self.mean, self.std, self.resize, sorted(self.tokenizer.get_vocab().items())]


def resized(images: Tensor, size: int) -> Tensor:
    """Pictures [B, 3, S, S] in [-1, 1] at another size, as Pillow's antialiased bicubic filter does but for its rounding."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def _features(found: Any) -> Tensor:
    """transformers 4 gives the tensor, 5 an output that holds it."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _checked(caption: Any) -> str:
    if not isinstance(caption, str):
        raise bad("embedder", "captions", "be texts", caption, "pass a list of strings")
    return caption
