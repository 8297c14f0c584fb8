"""Show, Attend and Tell (Xu et al., 2015) with soft attention, in plain torch.

At each word, with y the previous word, h and c the LSTM's state, a_l the annotation of location l:

    e_l   = v . tanh(U a_l + W h)              alpha = softmax(e)
    z     = sigmoid(w_beta . h) * sum_l alpha_l a_l
    h, c  = LSTM([E y; z], h, c)
    logits = head(tanh(L_h h + E y + L_z z))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcap.errors import bad

from .encoders import build_encoder


@dataclass(frozen=True)
class ShowAttendTellConfig:
    """Sizes of the model; plain values, so that it is JSON as it stands.

    `encoder` is "conv", the name or folder of a `transformers` vision model, or an encoder's own `config`.
    """

    vocab_size: int
    encoder: Any = "conv"
    embed_width: int = 256
    hidden_width: int = 256
    attention_width: int = 128
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_width", "hidden_width", "attention_width"):
            if getattr(self, name) < 1:
                raise bad("models", name, "be at least 1", getattr(self, name), f"pass a positive {name}")
        if not 0 <= self.dropout < 1:
            raise bad("models", "dropout", "be in [0, 1)", self.dropout, "pass dropout=0.2")


class Memory(NamedTuple):
    """What is computed once per image: annotations [B, L, D] and their projections `U a`, keys [B, L, A]."""

    annotations: Tensor
    keys: Tensor


class State(NamedTuple):
    """The LSTM's state: h [B, H] and c [B, H]."""

    h: Tensor
    c: Tensor


class Schedule(NamedTuple):
    """Which captions each step works on: the longest first, and ever fewer of them.

    rows: how many at step t; order [B]: the caption of each row; flat [N], N = sum(rows): b * T + t of each one.
    """

    rows: list[int]
    order: Tensor
    flat: Tensor


ROWS_STEP = 16  # rows leave this many at a time: each time costs a copy of the memory's gradient


class ShowAttendTell(nn.Module):
    """The model; `config` is kept with the encoder's own configuration in place of its name."""

    name = "show-attend-tell"
    Config = ShowAttendTellConfig

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(config.encoder)
        self.config = ShowAttendTellConfig(**{**config.__dict__, "encoder": self.encoder.config})
        D, E, H, A = self.encoder.width, config.embed_width, config.hidden_width, config.attention_width
        self.embed = nn.Embedding(config.vocab_size, E)
        self.start_state = nn.Linear(D, 2 * H)
        self.keys = nn.Linear(D, A)  # U
        self.query = nn.Linear(H, A, bias=False)  # W; the bias is in U
        self.score = nn.Linear(A, 1, bias=False)  # v; softmax cancels a bias
        self.gate = nn.Linear(H, 1)  # w_beta
        self.word_gates = nn.Linear(E, 4 * H)  # the LSTM's weights for E y, applied to all T words at once
        self.state_gates = nn.Linear(D + H, 4 * H, bias=False)  # and for [z; h], which wait for the step before
        self.output_h = nn.Linear(H, E)
        self.output_z = nn.Linear(D, E, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(E, config.vocab_size)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """So that the picture is heard from the first step: with torch's defaults the model learns the language alone
        for its first thousand steps, which costs .3 of validation loss after 600 (scenes, MLE: 1.68 against 1.35)."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.output_z.weight.mul_(2)  # z is at first the mean of all locations, in which they nearly cancel
        self.gate.bias.fill_(2)  # open
        forget = slice(self.config.hidden_width, 2 * self.config.hidden_width)
        self.word_gates.bias.zero_()[forget] = 1  # open

    def forward(self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The words' logits, and where the model looked for each.

        Args:
            images: [B, 3, S, S] in [-1, 1].
            inputs: [B, T] int64, the start and the words before each predicted one.
            lengths: [B] on the CPU, how many steps of each caption count. What comes after is not computed, and zero,
                which halves the time where the longest caption of a batch is twice the mean.

        Returns:
            logits [B, T, V] and alphas [B, T, L].
        """
        hidden, alphas, schedule = self._decode(images, inputs, lengths)
        return _unpack(self.head(hidden), schedule, inputs), _unpack(alphas, schedule, inputs)

    def hidden_states(self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, T, E], of which `head` makes the logits: for losses that take hidden states and the head's weight."""
        hidden, _, schedule = self._decode(images, inputs, lengths)
        return _unpack(hidden, schedule, inputs)

    def _decode(self, images: Tensor, inputs: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Schedule]:
        """Hidden states [N, E] and alphas [N, L] of the N (step, row) that count."""
        schedule = _schedule(inputs, lengths)
        memory = self.encode(images.index_select(0, schedule.order))
        state = self.start(memory)
        words = self.embed(inputs.flatten()[schedule.flat])
        h, z, alphas = [], [], []
        for word_gates in self.word_gates(words).split(schedule.rows):
            rows = len(word_gates)
            if rows < len(state.h):
                state, memory = State(*(x[:rows] for x in state)), Memory(*(x[:rows] for x in memory))
            state, context, alpha = self._advance(word_gates, state, memory)
            h.append(state.h)
            z.append(context)
            alphas.append(alpha)
        return self._deep_output(torch.cat(h), words, torch.cat(z)), torch.cat(alphas), schedule

    def encode(self, images: Tensor) -> Memory:
        annotations = self.encoder(images)
        return Memory(annotations, self.keys(annotations))

    def start(self, memory: Memory) -> State:
        return State(*torch.tanh(self.start_state(memory.annotations.mean(1))).chunk(2, 1))

    def step(self, token: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """One word further: token [B] -> logits [B, V] of the next word, and the state after `token`."""
        word = self.embed(token)
        state, z, _ = self._advance(self.word_gates(word), state, memory)
        return self.head(self._deep_output(state.h, word, z)), state

    def _advance(self, word_gates: Tensor, state: State, memory: Memory) -> tuple[State, Tensor, Tensor]:
        query = self.query(state.h).unsqueeze(1)
        alpha = torch.softmax(self.score(torch.tanh(memory.keys + query)).squeeze(2), dim=1)
        z = torch.bmm(alpha.to(memory.annotations.dtype).unsqueeze(1), memory.annotations).squeeze(1)
        z = z * torch.sigmoid(self.gate(state.h))
        gates = word_gates + self.state_gates(torch.cat((z, state.h), dim=1))
        into, forget, out, new = gates.chunk(4, dim=1)
        c = torch.sigmoid(forget) * state.c + torch.sigmoid(into) * torch.tanh(new)
        return State(torch.sigmoid(out) * torch.tanh(c), c), z, alpha

    def _deep_output(self, h: Tensor, word: Tensor, z: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.output_h(h) + word + self.output_z(z)))


def _schedule(inputs: Tensor, lengths: Tensor | None) -> Schedule:
    B, T = inputs.shape
    lengths = torch.full((B,), T) if lengths is None else lengths.cpu()
    order = lengths.argsort(descending=True, stable=True)
    running = (lengths.unsqueeze(1) > torch.arange(T)).sum(0)
    rows = [min(B, -(-n // ROWS_STEP) * ROWS_STEP) for n in running.tolist() if n]
    flat = torch.cat([order[:n] * T + t for t, n in enumerate(rows)])
    return Schedule(rows, order.to(inputs.device), flat.to(inputs.device))


def _unpack(packed: Tensor, schedule: Schedule, inputs: Tensor) -> Tensor:
    """[N, *] to [B, T, *], zero where nothing was computed."""
    B, T = inputs.shape
    return packed.new_zeros(B * T, packed.shape[1]).index_copy(0, schedule.flat, packed).view(B, T, -1)
