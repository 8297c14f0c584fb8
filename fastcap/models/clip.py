"""A small CLIP (Radford et al., 2021): an encoder of images and one of texts, whose embeddings of a pair point the same way.

With a_l the annotations of the locations of an image, and w_t the words of a text, the end among them:

    image = sum_l P_l (P a_l)                              each location has weights of its own: where a thing is counts
    text  = P_t mean_t(transformer(E w_t + position_t))    over the words of the text, which see each other
    score = scale <image, text> / (|image| |text|)         scale = exp(log_scale), at most 100

It embeds, and so has none of a captioner's `hidden_states`, `head`, `start` and `step`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcap.errors import bad

from .encoders import FeatureEncoder, build_encoder

HEAD_WIDTH = 32  # of one head of attention
LARGEST_SCALE, FIRST_SCALE = 100.0, 1 / 0.07
_GROUPS, _GROUP = 4, 32  # texts are encoded in at most 4 groups of similar length, of 32 or more


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the model; plain values, so that it is JSON as it stands.

    encoder: what `build_encoder` takes; one of pictures, not of features.
    image_size: side of the pictures, in pixels.
    width: of word embeddings, locations and hidden layers; a multiple of 32, the width of a head of attention.
    embed_width: D, of the embeddings.
    text_layers: of the text's transformer.
    context: tokens of the longest text, its end included.
    dropout: in the text's transformer.
    """

    vocab_size: int
    encoder: Any = "conv"
    image_size: int = 48
    width: int = 128
    embed_width: int = 256
    text_layers: int = 1
    context: int = 31
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "image_size", "width", "embed_width", "text_layers", "context"):
            if getattr(self, name) < 1:
                raise bad("models", name, "be at least 1", getattr(self, name), f"pass a positive {name}")
        if self.width % HEAD_WIDTH:
            near = max(1, round(self.width / HEAD_WIDTH)) * HEAD_WIDTH
            raise bad("models", "width", f"be a multiple of {HEAD_WIDTH} with clip", self.width, f"pass width={near}")
        if not 0 <= self.dropout < 1:
            raise bad("models", "dropout", "be in [0, 1)", self.dropout, "pass dropout=0.1")


class Clip(nn.Module):
    """The model; `config` is kept with the encoder's own configuration in place of its name."""

    name = "clip"
    Config = ClipConfig

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(config.encoder)
        self.config = ClipConfig(**{**config.__dict__, "encoder": self.encoder.config})
        W, D, heads = config.width, config.embed_width, config.width // HEAD_WIDTH
        self.location = nn.Linear(self.encoder.width, W)  # P
        self.image_projection = nn.Linear(self._locations() * W, D)  # all P_l
        self.embed = nn.Embedding(config.vocab_size, W)
        self.position = nn.Parameter(torch.empty(config.context, W))
        layer = nn.TransformerEncoderLayer(
            W, heads, 4 * W, config.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.words = nn.TransformerEncoder(layer, config.text_layers, nn.LayerNorm(W), enable_nested_tensor=False)
        self.text_projection = nn.Linear(W, D)  # P_t
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        nn.init.normal_(self.embed.weight, std=0.1)
        nn.init.normal_(self.position, std=0.02)

    @property
    def logit_scale(self) -> Tensor:
        """The factor of cosines in the loss, a tensor [] with its gradient; at most 100, as CLIP's."""
        return self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()

    @torch.no_grad()
    def limit_scale(self) -> None:
        """After a step of the optimiser: brings the parameter back to where a gradient still moves it."""
        self.log_scale.clamp_(min=0.0, max=math.log(LARGEST_SCALE))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings [B, D], not of unit length, of images [B, 3, S, S] in [-1, 1], S = `config.image_size`."""
        S = self.config.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, S, S):
            remedy = "resize them, as a ClipEmbedder does"
            raise bad("models", "images of clip", f"have shape [B, 3, {S}, {S}]", list(images.shape), remedy)
        return self.image_projection(self.location(self.encoder(images)).flatten(1))

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings [N, D], not of unit length, of texts.

        Args:
            ids: [N, T] int64, the words of each text and its end; what follows is not looked at.
            lengths: [N] on the CPU, how many ids of each count, at least 1 and at most `config.context`.
        """
        self._check_texts(ids, lengths)
        N = len(ids)
        if not N:
            return self.text_projection(self.position[:0])
        # Texts of similar length together: of a batch of captions more than half is padding otherwise.
        order = lengths.argsort(stable=True)
        groups = order.split(max(_GROUP, -(-N // _GROUPS)))
        means = torch.cat([self._mean_of_words(ids, lengths, group) for group in groups])
        return self.text_projection(means)[order.argsort().to(ids.device)]

    def _mean_of_words(self, ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """[n, W] of some of the texts."""
        lengths = lengths[rows]
        T = int(lengths.max())
        ids, lengths = ids[rows.to(ids.device), :T], lengths.to(ids.device).unsqueeze(1)
        past = torch.arange(T, device=ids.device) >= lengths
        hidden = self.words(self.embed(ids.masked_fill(past, 0)) + self.position[:T], src_key_padding_mask=past)
        return hidden.masked_fill(past.unsqueeze(2), 0).sum(1) / lengths

    @torch.no_grad()
    def _locations(self) -> int:
        """L, of pictures of the model's size."""
        if isinstance(self.encoder, FeatureEncoder):
            remedy = "pass 'conv', 'vgg16' or the name of a backbone"
            raise bad("models", "encoder", "take pictures with clip", self.encoder.config, remedy)
        S = self.config.image_size
        return self.encoder(torch.zeros(1, 3, S, S)).shape[1]

    def _check_texts(self, ids: Tensor, lengths: Tensor) -> None:
        if ids.dim() != 2 or lengths.shape != ids.shape[:1]:
            got, remedy = f"{list(ids.shape)} and {list(lengths.shape)}", "pass ids [N, T] and lengths [N]"
            raise bad("models", "texts", "be ids [N, T] with lengths [N]", got, remedy)
        most = min(ids.shape[1], self.config.context)
        if len(ids) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= most:
            remedy = "cut the texts and keep their end, as an embedder does"
            raise bad("models", "lengths", f"lie in [1, {most}]", lengths.tolist(), remedy)
