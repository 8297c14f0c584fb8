"""GLIED (Liu et al., 2019), which attends to an image's regions and attribute words, and its Base, which does so once.

With words x = E y + position, regions I, attributes A (embeddings of words by the same E), `MHA` and `G` as in
`_attention_blocks`, and G(y; x) = LayerNorm(x + dropout(y)), GLIED is

    I~  = G(MHA_vd(I, I, I); I)                                   visual distilling, once an image
    t~  = G(MHA_ad(x, A, A); x)                                   attribute distilling: the word asks
    x~  = G(MHA_x(t~, T~, T~); t~)                                causal
    c_g = G(MHA_v(x~, I~, I~); x~)
    c~  = G(MHA_vl(c_g, I, I) + MHA_al(c_g, A, A); c_g)           local distilling
    logits = head(c~)

Each distilling step can be left out: I~ is then I, t~ is x, c~ is c_g. Attributes are always read: where neither attribute
nor local distilling does, c_g = G(MHA_v(x~, I~, I~) + MHA_a(x~, A, A); x~). With all three left out that is Base.
docs/math/glied.md has each wiring and its parameters.

Source: Liu, Ren, Liu, Lei and Sun, Exploring and Distilling Cross-Modal Information for Image Captioning (IJCAI 2019).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcap.data import Attributed
from fastcap.errors import bad

from ._attention_blocks import AddNorm, Attention, Keys, Past, Source, next_logits, sinusoids, weights
from .attributes import AttributePredictor
from .encoders import build_encoder

POSITIONS = 64  # in the table at first; it grows when a caption is longer
DISTILLING = ("visual_distilling", "attribute_distilling", "local_distilling")


@dataclass(frozen=True)
class GliedConfig:
    """Sizes and choices of the model; plain values, so that it is JSON as it stands.

    encoder: what `build_encoder` takes. Annotations of another width than `width` are projected to it.
    width: d, of words, regions and attributes; a multiple of `heads`.
    visual_distilling, attribute_distilling, local_distilling: the three steps; Base has none.
    attribute_ids: the words that are attributes, as the tokenizer's ids, of which the model predicts each image's. Empty: an
        image's attributes are given with it.
    attribute_shares: of `attribute_ids`, how often each is in a caption: what the prediction begins at. Empty: .05.
    num_attributes: M, how many are predicted of an image; all where there are fewer.
    """

    vocab_size: int
    encoder: Any = "conv"
    width: int = 512
    heads: int = 8
    dropout: float = 0.1
    visual_distilling: bool = True
    attribute_distilling: bool = True
    local_distilling: bool = True
    attribute_ids: list[int] = field(default_factory=list)
    attribute_shares: list[float] = field(default_factory=list)
    num_attributes: int = 49

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "heads", "num_attributes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad("models", name, "be an integer of at least 1", value, f"pass a positive {name}")
        if self.width % self.heads:
            near = max(self.heads, round(self.width / self.heads) * self.heads)
            raise bad("models", "width", f"be a multiple of heads={self.heads}", self.width, f"pass width={near}")
        if not 0 <= self.dropout < 1:
            raise bad("models", "dropout", "be in [0, 1)", self.dropout, "pass dropout=0.1")
        for name in DISTILLING:
            if not isinstance(getattr(self, name), bool):
                raise bad("models", name, "be True or False", getattr(self, name), f"pass {name}=True")
        whole = isinstance(self.attribute_ids, (list, tuple)) and all(type(i) is int for i in self.attribute_ids)
        if not whole:
            rule = "be a list of integers, the tokenizer's ids"
            raise bad("models", "attribute_ids", rule, self.attribute_ids, "pass [] where attributes are given")
        if self.attribute_ids and not 0 < min(self.attribute_ids) <= max(self.attribute_ids) < self.vocab_size:
            rule = f"lie in [1, {self.vocab_size}), the ids of words"
            got = max(self.attribute_ids) if min(self.attribute_ids) > 0 else min(self.attribute_ids)
            raise bad("models", "attribute_ids", rule, got, "pass ids of the tokenizer")
        if self.attribute_shares and len(self.attribute_shares) != len(self.attribute_ids):
            rule = f"be as many as attribute_ids, {len(self.attribute_ids)}"
            raise bad("models", "attribute_shares", rule, len(self.attribute_shares), "pass one share for each id")


class Memory:
    """What is computed once per image: the keys and values of each attention to it.

    Not a tuple, so that decoding leaves it as it is: the rows of an image ask its keys together, and nothing is repeated.
    """

    def __init__(self, regions: Source, attributes: Source, keys: dict[str, Keys], absent: Tensor | None) -> None:
        self.regions, self.attributes, self.keys, self.absent = regions, attributes, keys, absent

    def rows(self, rows: Tensor) -> Memory:
        """That of the images `rows` [N], which may repeat."""

        def chosen(parts: tuple[Tensor | None, ...]) -> list[Tensor | None]:
            return [None if x is None else x.index_select(0, rows) for x in parts]

        keys = {name: Keys(*chosen(keys)) for name, keys in self.keys.items()}
        return Memory(Source(*chosen(self.regions)), Source(*chosen(self.attributes)), keys, *chosen((self.absent,)))


class Read(NamedTuple):
    """What `teacher_forced` returns, of T steps.

    hidden [B, T, d], of which `head` makes the logits, zero at steps that do not count; query [B, heads, T, E] and
    key [B, heads, R, E], of the last attention to regions, and mask [B, R], False at rows that are none (None: all are);
    absent [B, K], the log-probability of not having each attribute, where the model predicts them, else None.
    """

    hidden: Tensor
    query: Tensor
    key: Tensor
    mask: Tensor | None
    absent: Tensor | None


class Glied(nn.Module):
    """The model; `config` is kept with the encoder's own configuration in place of its name."""

    name = "glied"
    Config = GliedConfig

    def __init__(self, config: GliedConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(config.encoder)
        self.config = dataclasses.replace(config, encoder=self.encoder.config)
        d, heads = config.width, config.heads
        self.regions = nn.Identity() if self.encoder.width == d else nn.Linear(self.encoder.width, d, bias=False)
        self.embed = nn.Embedding(config.vocab_size, d)
        self.register_buffer("positions", sinusoids(POSITIONS, d), persistent=False)

        def block(parts: int = 1) -> tuple[nn.Module, ...]:
            return *(Attention(d, heads) for _ in range(parts)), AddNorm(d, config.dropout)

        if config.visual_distilling:
            self.distil_regions, self.distil_regions_norm = block()
        if config.attribute_distilling:
            self.distil_attributes, self.distil_attributes_norm = block()
        self.context, self.context_norm = block()
        self.look, self.look_norm = block()
        if config.local_distilling:
            self.local_look, self.local_attributes, self.local_norm = block(2)
        elif not config.attribute_distilling:
            self.semantic = Attention(d, heads)
        self.head = nn.Linear(d, config.vocab_size)
        self.predictor = None
        if config.attribute_ids:
            options = (config.attribute_ids, config.num_attributes, config.attribute_shares)
            self.predictor = AttributePredictor(d, *options)

    def forward(self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The words' logits [B, T, V], and where the model looked for each, alphas [B, T, R].

        alphas are the mean over the heads of the last attention to regions: of local distilling, where there is one.

        Args:
            images: [B, 3, S, S] in [-1, 1], or what else the encoder takes; with attributes given, `data.Attributed`.
            inputs: [B, T] int64, the start and the words before each predicted one.
            lengths: [B], how many steps of each caption count; what comes after is zero.
        """
        read = self.teacher_forced(images, inputs, lengths)
        alphas = weights(read.query, Keys(read.key, read.key, Source(read.key, read.mask).bias(read.key.dtype)))
        if read.mask is not None:
            alphas = alphas.masked_fill(~read.mask.unsqueeze(1), 0)
        return _counted(self.head(read.hidden), lengths), _counted(alphas, lengths)

    def hidden_states(
        self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """[B, T, d], of which `head` makes the logits: for losses that take hidden states and the head's weight.

        rows: [B] int64, the image of each caption, where these are not one for each image; an image is encoded once.
        """
        return self.teacher_forced(images, inputs, lengths, rows).hidden

    def teacher_forced(
        self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None, rows: Tensor | None = None
    ) -> Read:
        """What a training step needs of captions whose words are known: all steps at once.

        Arguments are those of `forward` and of `hidden_states`.
        """
        if inputs.dim() != 2 or inputs.shape[1] < 1:
            raise bad("models", "inputs", "have shape [B, T], T >= 1", list(inputs.shape), "pass the start at least")
        memory = self.encode(images) if rows is None else self.encode(images).rows(rows)
        x = self.embed(inputs) + self._positions(0, inputs.shape[1])
        if self.config.attribute_distilling:
            x = self.distil_attributes_norm(self._ask("distil_attributes", x, memory), x)
        x = self.context_norm(self.context.causal(x), x)
        hidden, query, last = self._select(x, memory)
        return Read(_counted(hidden, lengths), query, last.key, memory.regions.mask, memory.absent)

    def encode(self, images: Tensor) -> Memory:
        """The keys and values of the image's regions, I and I~, and of its attributes."""
        config, (pictures, given) = self.config, self._parts(images)
        regions = self._source(self.regions(self.encoder(pictures)), self.encoder.mask(pictures))
        absent = None
        if self.predictor is not None:
            absent = self.predictor(regions.x, regions.mask)
            given = self.predictor.most_probable(absent)
        attributes = self._source(self.embed(given), given != 0)
        groups = regions
        if config.visual_distilling:
            distil = self.distil_regions
            found = distil(distil.queries(regions.x), distil.keys(regions))
            groups = self._source(self.distil_regions_norm(found, regions.x), regions.mask)
        read = {"look": groups}
        if config.attribute_distilling:
            read["distil_attributes"] = attributes
        if config.local_distilling:
            read |= {"local_look": regions, "local_attributes": attributes}
        elif not config.attribute_distilling:
            read["semantic"] = attributes
        keys = {name: getattr(self, name).keys(source) for name, source in read.items()}
        return Memory(regions, attributes, keys, absent)

    def start(self, memory: Memory) -> None:
        """No word has been read."""
        return None

    def step(self, token: Tensor, state: Past | None, memory: Memory) -> tuple[Tensor, Past]:
        """One word further: token [N] -> logits [N, V] of the next word, and the state after `token`: the words so far.

        N is the images', or a multiple: the rows of an image follow each other.
        """
        x = self.embed(token) + self._positions(0 if state is None else state.length, 1)
        if self.config.attribute_distilling:
            x = self.distil_attributes_norm(self._ask_of_rows("distil_attributes", x, memory), x)
        found, state = self.context.next(x, state)
        x = self.context_norm(found, x)
        hidden, _, _ = self._select(_of_images(x, memory), memory)
        return next_logits(self.head, hidden.flatten(0, 1)), state

    def _select(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Keys]:
        """c~ of x~ [B, T, d]; and the queries and keys of the last attention to regions."""
        query = self.look.queries(x)
        last = memory.keys["look"]
        found = self.look(query, last)
        if "semantic" in memory.keys:
            found = found + self._ask("semantic", x, memory)
        x = self.look_norm(found, x)
        if self.config.local_distilling:
            query, last = self.local_look.queries(x), memory.keys["local_look"]
            found = self.local_look(query, last) + self._ask("local_attributes", x, memory)
            x = self.local_norm(found, x)
        return x, query, last

    def _ask(self, name: str, x: Tensor, memory: Memory) -> Tensor:
        attention = getattr(self, name)
        return attention(attention.queries(x), memory.keys[name])

    def _ask_of_rows(self, name: str, x: Tensor, memory: Memory) -> Tensor:
        """`_ask` of x [N, d], those of an image together."""
        return self._ask(name, _of_images(x, memory), memory).flatten(0, 1)

    def _positions(self, first: int, count: int) -> Tensor:
        if first + count > len(self.positions):
            self.positions = sinusoids(2 * (first + count), self.config.width).to(self.positions)
        return self.positions[first : first + count]

    def _parts(self, images: Any) -> tuple[Tensor, Tensor | None]:
        """The pictures or features, and the attributes [B, M] where they are given."""
        if isinstance(images, Attributed) == (self.predictor is not None):
            rule = "be a tensor" if self.predictor is not None else "be fastcap.data.Attributed, with their attribute words"
            remedy = "this model predicts them" if self.predictor is not None else "this model does not predict them"
            raise bad("models", "images of this glied", rule, type(images).__name__, remedy)
        return (images.images, images.attributes) if isinstance(images, Attributed) else (images, None)

    @staticmethod
    def _source(x: Tensor, mask: Tensor | None) -> Source:
        return Source(x if mask is None else x.masked_fill(~mask.unsqueeze(2), 0), mask)


def _of_images(x: Tensor, memory: Memory) -> Tensor:
    """x [N, d] as [images, rows of each, d]."""
    B = len(memory.regions.x)
    if len(x) % max(B, 1) or (len(x) and not B):
        rule = f"have as many rows for each of the {B} images"
        raise bad("models", "token", rule, len(x), "let an image's rows follow each other")
    return x.view(B, len(x) // max(B, 1), x.shape[1])


def _counted(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [B, T, *], zero from each caption's length on."""
    if lengths is None:
        return x
    past = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device, non_blocking=True).unsqueeze(1)
    return x.masked_fill(past.unsqueeze(2), 0)


def matching_width(config: GliedConfig) -> int:
    """The width of a Base with about as many parameters as the model of `config`, to compare the two fairly.

    Of all multiples of `config.heads`, the one whose number of parameters is nearest. An encoder whose own width is that of
    `config`, such as the projection of features, is widened with it.
    """
    wanted = _parameters(config)
    fewest, most = 1, 1  # heads wide
    while _parameters(_base(config, most * config.heads)) < wanted:
        fewest, most = most, 2 * most
    while most - fewest > 1:
        middle = (fewest + most) // 2
        less = _parameters(_base(config, middle * config.heads)) < wanted
        fewest, most = (middle, most) if less else (fewest, middle)
    candidates = (fewest * config.heads, most * config.heads)
    return min(candidates, key=lambda width: abs(_parameters(_base(config, width)) - wanted))


def _base(config: GliedConfig, width: int) -> GliedConfig:
    encoder = config.encoder
    if isinstance(encoder, dict) and encoder.get("width") == config.width:
        encoder = {**encoder, "width": width}
    return dataclasses.replace(config, width=width, encoder=encoder, **dict.fromkeys(DISTILLING, False))


def _parameters(config: GliedConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Glied(config).parameters())
