"""BLIP (Li et al., 2022): a vision transformer, and a decoder like BERT whose words attend to the picture's patches.

The weights live in `transformers.BlipForConditionalGeneration`, which is imported when a model is made and not before.

The decoder reads start, a prompt ("a picture of") and the caption; the prompt is given, never predicted. Callers deal in
captions without it: `hidden_states` puts the prompt after the start and returns only the states that predict the words
of the caption, which computes what labels of -100 over the prompt do, and `step` reads it with the start token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcap.data._checks import require
from fastcap.errors import bad

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALL_LAYERS, PATCH = 3, 16  # of a model made by `small_architecture`


@dataclass(frozen=True)
class BlipConfig:
    """What the model is, in plain values: JSON as it stands.

    architecture: `transformers.BlipConfig(...).to_dict()`, or what its constructor takes; see `small_architecture`.
    prompt: ids that follow the start token; may be empty.
    mean, std: normalisation per channel of pixel values in [0, 1].
    """

    architecture: dict[str, Any]
    prompt: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    std: list[float] = field(default_factory=lambda: list(CLIP_STD))


def small_architecture(
    vocab_size: int,
    *,
    image_size: int = 48,
    width: int = 128,
    dropout: float = 0.0,
    max_tokens: int = 128,
    start_id: int = 1,
    end_id: int = 2,
    pad_id: int = 0,
) -> dict[str, Any]:
    """An architecture small enough to train from random weights on small pictures: `BlipConfig(architecture=...)`.

    Both transformers have 3 layers of `width` in heads of 32; patches are 16 x 16 pixels, as BLIP's are.

    Raises:
        FastcapError: `image_size` is not a whole number of patches, or another size is below 1.
    """
    for name, value in (("vocab_size", vocab_size), ("width", width), ("image_size", image_size)):
        if value < 1:
            raise bad("models", name, "be at least 1", value, f"pass a positive {name}")
    if image_size % PATCH:
        near = max(PATCH, round(image_size / PATCH) * PATCH)
        raise bad("models", "image_size", f"be a multiple of {PATCH}, the patch", image_size, f"pass image_size={near}")
    if not 0 <= dropout < 1:
        raise bad("models", "dropout", "be in [0, 1)", dropout, "pass dropout=0.0")
    heads = next(n for n in range(max(1, width // 32), 0, -1) if width % n == 0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": SMALL_LAYERS}
    sizes["num_attention_heads"] = heads
    # The usual .02 is for widths of 768 (transformers' own 1e-10 for the vision side is for no training at all). With it
    # and patches of 8 a captioner of width 128 learnt the language alone in 600 steps on scenes: exchanging the pictures
    # cost nothing. With these and patches of 16 it cost .58, on a validation loss of 1.62.
    vision = {"initializer_range": width**-0.5, "image_size": image_size, "patch_size": PATCH}
    ids = {"bos_token_id": start_id, "eos_token_id": end_id, "sep_token_id": end_id, "pad_token_id": pad_id}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    text = {"initializer_range": 0.05, "vocab_size": vocab_size, "max_position_embeddings": max_tokens}
    return {"text_config": {**sizes, **ids, **drop, **text}, "vision_config": {**sizes, **vision}}


class Memory:
    """What is computed once per image: for each decoder layer, the keys and values [B, heads, L, D / heads] of its patches.

    Not a tuple, so that beam search does not repeat it for each beam: for BLIP-base that is 42.5 MB a picture in fp32.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers


class Blip(nn.Module):
    """The captioning model; `blip` is the transformers model, whose weights may be given with it."""

    name = "blip"
    Config = BlipConfig

    def __init__(self, config: BlipConfig, blip: nn.Module | None = None) -> None:
        super().__init__()
        if blip is None:
            transformers = require("transformers", "models")
            blip = transformers.BlipForConditionalGeneration(transformers.BlipConfig(**config.architecture))
        self.blip, self.config = blip, config
        self.register_buffer("prompt", torch.tensor(config.prompt, dtype=torch.int64), persistent=False)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(config, name), dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def head(self) -> nn.Linear:
        """The layer that makes logits of `hidden_states`; its weight is the word embeddings'."""
        return self.blip.text_decoder.cls.predictions.decoder

    @property
    def longest(self) -> int:
        """How many tokens a caption may have, the end included, beside the start and the prompt."""
        return self.blip.config.text_config.max_position_embeddings - len(self.prompt)

    def forward(self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, None]:
        """The words' logits [B, T, V], and None: there is no one attention map to show.

        Args:
            images: [B, 3, S, S] in [-1, 1], S as the architecture has it.
            inputs: [B, T] int64, the start and the words before each predicted one, without the prompt.
            lengths: not used; a decoder that reads all words at once has nothing to skip.
        """
        return self.head(self.hidden_states(images, inputs)), None

    def hidden_states(
        self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """[B, T, H], of which `head` makes the logits: for losses that take hidden states and the head's weight.

        rows: [B] int64, which of the images each caption is of; None: one image for each. An image is encoded once.
        """
        decoder, patches = self.blip.text_decoder, self._patches(images)
        if rows is not None:
            patches = patches.index_select(0, rows)
        tokens = self._with_prompt(inputs)
        read = decoder.bert(tokens, encoder_hidden_states=patches, is_decoder=True, use_cache=False)
        return decoder.cls.predictions.transform(read.last_hidden_state[:, len(self.prompt) :])

    def encode(self, images: Tensor) -> Memory:
        patches = self._patches(images)
        attentions = [layer.crossattention.self for layer in self._layers]
        return Memory([(_split(a, a.key(patches)), _split(a, a.value(patches))) for a in attentions])

    def start(self, memory: Memory) -> list[tuple[Tensor, Tensor]]:
        """For each layer, the keys and values of the words read so far: none, [B, heads, 0, H / heads]."""
        return [(keys[:, :, :0], values[:, :, :0]) for keys, values in memory.layers]

    def step(self, token: Tensor, state: list[tuple[Tensor, Tensor]], memory: Memory) -> tuple[Tensor, list]:
        """One word further: token [R] -> logits [R, V] of the next word, and the state after `token`.

        The R rows are the B images in order, each R / B times. The first token is the start, and the prompt follows it.
        """
        decoder, done = self.blip.text_decoder, state[0][0].shape[2]
        tokens = token.unsqueeze(1) if done else self._with_prompt(token.unsqueeze(1))
        hidden = decoder.bert.embeddings(input_ids=tokens, past_key_values_length=done)
        after = []
        for layer, (keys, values), seen in zip(self._layers, state, memory.layers, strict=True):
            own = layer.attention.self
            keys = torch.cat((keys, _split(own, own.key(hidden))), dim=2)
            values = torch.cat((values, _split(own, own.value(hidden))), dim=2)
            after.append((keys, values))
            hidden = _attend(layer.attention, hidden, keys, values, causal=not done)
            hidden = _attend(layer.crossattention, hidden, *seen)
            hidden = layer.feed_forward_chunk(hidden)
        return decoder.cls(hidden[:, -1]), after

    @property
    def _layers(self) -> nn.ModuleList:
        return self.blip.text_decoder.bert.encoder.layer

    def _patches(self, images: Tensor) -> Tensor:
        pixels = ((images + 1) / 2 - self.mean) / self.std
        return self.blip.vision_model(pixel_values=pixels).last_hidden_state

    def _with_prompt(self, inputs: Tensor) -> Tensor:
        prompt = self.prompt.expand(len(inputs), -1)
        return torch.cat((inputs[:, :1], prompt, inputs[:, 1:]), dim=1)


def _split(attention: nn.Module, x: Tensor) -> Tensor:
    """[R, T, heads * D] to [R, heads, T, D]."""
    return x.unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2)


def _attend(block: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> Tensor:
    """An attention block's output [R, T, H] where keys and values [B, heads, L, D] are known; each serves R / B rows."""
    B, (R, T, _) = len(keys), hidden.shape
    rows = R // B if B else 1
    query = _split(block.self, block.self.query(hidden)).unflatten(0, (B, rows))  # [B, rows, heads, T, D]
    query = query.transpose(1, 2).flatten(2, 3)
    context = F.scaled_dot_product_attention(query, keys, values, is_causal=causal)
    context = context.unflatten(2, (rows, T)).permute(0, 2, 3, 1, 4)  # [B, rows, T, heads, D]
    return block.output(context.flatten(3).flatten(0, 1), hidden)
