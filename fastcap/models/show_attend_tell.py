"""Show, Attend and Tell (Xu et al., 2015), with soft or hard attention.

At each word, with y the previous word, h and c the LSTM's state, a_l the annotation of location l:

    e_l   = v . tanh(U a_l + W h)              alpha = softmax(e)
    z     = sigmoid(w_beta . h) * sum_l alpha_l a_l
    h, c  = LSTM([E y; z], h, c)
    logits = head(tanh(L_h h + E y + L_z z))

That is the original; `VARIANTS` has the widely used PyTorch tutorial's choices too. Hard attention puts one a_l, sampled
from alpha, in place of their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcap.errors import bad
from fastcap.functional import additive_attention, additive_attention_steps

from . import attention
from ._steps import Schedule, StepLinear, plan
from .encoders import build_encoder

CHOICES = {
    "attention": ("soft", "hard", "mean"),
    "activation": ("tanh", "relu"),
    "gate": ("scalar", "vector", "none"),
    "output": ("deep", "linear"),
}
VARIANTS = {
    "original": {"activation": "tanh", "gate": "scalar", "output": "deep"},
    "tutorial": {"activation": "relu", "gate": "vector", "output": "linear"},
}


@dataclass(frozen=True)
class ShowAttendTellConfig:
    """Sizes and choices of the model; plain values, so that it is JSON as it stands.

    encoder: "conv", the name or folder of a `transformers` vision model, or an encoder's own `config`.
    attention: "soft"; "hard", which trains on sampled locations by REINFORCE; or "mean", all locations alike at every word.
    activation: of the attention's hidden layer, "tanh" or "relu".
    gate: what the context is multiplied by, a function of the state: one number ("scalar"), one for each of its values
        ("vector"), or nothing ("none").
    output: "deep", a hidden layer that sees state, word and context; or "linear", the state alone.
    """

    vocab_size: int
    encoder: Any = "conv"
    embed_width: int = 256
    hidden_width: int = 256
    attention_width: int = 128
    dropout: float = 0.2
    attention: str = "soft"
    activation: str = "tanh"
    gate: str = "scalar"
    output: str = "deep"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_width", "hidden_width", "attention_width"):
            if getattr(self, name) < 1:
                raise bad("models", name, "be at least 1", getattr(self, name), f"pass a positive {name}")
        if not 0 <= self.dropout < 1:
            raise bad("models", "dropout", "be in [0, 1)", self.dropout, "pass dropout=0.2")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                rule = f"be one of {', '.join(map(repr, choices))}"
                raise bad("models", name, rule, getattr(self, name), f"pass {name}={choices[0]!r}")


class Memory(NamedTuple):
    """What is computed once per image: annotations [B, L, D], their projections `U a`, keys [B, L, A] (None for mean
    attention), mask [B, L], False where a location does not count (None: all do), and the mean annotation [B, D]."""

    annotations: Tensor
    keys: Tensor | None
    mask: Tensor | None
    mean: Tensor


class State(NamedTuple):
    """The LSTM's state: h [B, H] and c [B, H]."""

    h: Tensor
    c: Tensor


class Decoded(NamedTuple):
    """What `teacher_forced` returns, of T steps; all is zero at steps that do not count.

    hidden [B, T, E] (H with output "linear"), of which `head` makes the logits; alphas [B, T, L], before any sampling. Where
    attention is hard, in training: log_probs [B, T], log alpha of the sampled locations, 0 for captions whose coin fell on
    soft; and entropy [B, T] of alpha, in nats. Else None.
    """

    hidden: Tensor
    alphas: Tensor
    log_probs: Tensor | None
    entropy: Tensor | None


class _Layers(NamedTuple):
    """The layers that each step applies, as modules or as a sequence's `StepLinear`."""

    gate: Callable[[Tensor], Tensor] | None
    gates: Callable[[Tensor], Tensor]


class ShowAttendTell(nn.Module):
    """The model; `config` is kept with the encoder's own configuration in place of its name."""

    name = "show-attend-tell"
    Config = ShowAttendTellConfig
    HARD = 0.5  # hard attention: how probable it is that a caption of a training batch samples; the others use alpha itself

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(config.encoder)
        self.config = ShowAttendTellConfig(**{**config.__dict__, "encoder": self.encoder.config})
        D, E, H, A = self.encoder.width, config.embed_width, config.hidden_width, config.attention_width
        self.embed = nn.Embedding(config.vocab_size, E)
        self.start_state = nn.Linear(D, 2 * H)
        if config.attention != "mean":
            self.keys = nn.Linear(D, A)  # U
            self.query = nn.Linear(H, A, bias=False)  # W; the bias is in U
            self.score = nn.Linear(A, 1, bias=False)  # v; softmax cancels a bias
        if config.gate != "none":
            self.gate = nn.Linear(H, 1 if config.gate == "scalar" else D)  # w_beta
        self.word_gates = nn.Linear(E, 4 * H)  # the LSTM's weights for E y, applied to all T words at once
        self.state_gates = nn.Linear(D + H, 4 * H, bias=False)  # and for [z; h], which wait for the step before
        if config.output == "deep":
            self.output_h = nn.Linear(H, E)
            self.output_z = nn.Linear(D, E, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(E if config.output == "deep" else H, config.vocab_size)
        if config.attention == "hard":
            # the moving mean of a token's loss, for training; at first that of a model that knows nothing
            self.register_buffer("baseline", torch.tensor(math.log(config.vocab_size)))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """So that the picture is heard from the first step: with torch's defaults the model learns the language alone
        for its first thousand steps, which costs .3 of validation loss after 600 (scenes, MLE: 1.68 against 1.35)."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.embed.weight, std=0.1)
        if self.config.output == "deep":
            self.output_z.weight.mul_(2)  # z is at first the mean of all locations, in which they nearly cancel
        if self.config.gate != "none":
            self.gate.bias.fill_(2)  # open
        forget = slice(self.config.hidden_width, 2 * self.config.hidden_width)
        self.word_gates.bias.zero_()[forget] = 1  # open

    def forward(
        self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None, *, scheduled_sampling: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The words' logits [B, T, V], and where the model looked for each, alphas [B, T, L].

        Arguments are those of `teacher_forced`.
        """
        hidden, alphas, *_, schedule = self._decode(images, inputs, lengths, scheduled_sampling)
        return schedule.unpack(self.head(hidden), *inputs.shape), schedule.unpack(alphas, *inputs.shape)

    def hidden_states(
        self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """[B, T, E], of which `head` makes the logits: for losses that take hidden states and the head's weight.

        rows: [B] int64, which of the images each caption is of; None: one image for each. An image is encoded once.
        """
        hidden, *_, schedule = self._decode(images, inputs, lengths, 0.0, rows)
        return schedule.unpack(hidden, *inputs.shape)

    def teacher_forced(
        self, images: Tensor, inputs: Tensor, lengths: Tensor | None = None, *, scheduled_sampling: float = 0.0
    ) -> Decoded:
        """What a training step needs of captions whose words are known.

        Hard attention samples in training mode alone. In evaluation, and in decoding, it uses alpha itself: the expectation
        of the context that it trained on, with no noise in what is compared and no luck in what is said.

        Args:
            images: [B, 3, S, S] in [-1, 1], or what else the encoder takes.
            inputs: [B, T] int64, the start and the words before each predicted one.
            lengths: [B] on the CPU, how many steps of each caption count. What comes after is not computed, and zero,
                which halves the time where the longest caption of a batch is twice the mean.
            scheduled_sampling: probability in [0, 1] that a word of `inputs`, the start excepted, gives way to one that the
                model itself says there (Bengio et al. 2015): sampled, without dropout, after the words before it as they
                were replaced. That takes one more pass, without gradients, with logits of the replaced words alone.
        """
        *packed, schedule = self._decode(images, inputs, lengths, scheduled_sampling)
        return Decoded(*(None if x is None else schedule.unpack(x, *inputs.shape) for x in packed))

    def _decode(
        self, images: Tensor, inputs: Tensor, lengths: Tensor | None, scheduled_sampling: float, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Schedule]:
        """Of the N (step, row) that count: hidden [N, E], alphas [N, L], log_probs [N] and entropy [N]; and the schedule."""
        if not 0 <= scheduled_sampling <= 1:
            remedy = "pass 0 for the captions' own words"
            raise bad("models", "scheduled_sampling", "be in [0, 1]", scheduled_sampling, remedy)
        schedule = plan(inputs, lengths)
        if rows is None:
            memory = self.encode(schedule.sort(images))
        else:
            of = schedule.sort(rows)
            memory = Memory(*(None if x is None else x.index_select(0, of) for x in self.encode(images)))
        if scheduled_sampling:
            inputs = self._replace(inputs, memory, schedule, scheduled_sampling)
            torch.clear_autocast_cache()  # before torch 2.11 it would hand weights cast without a gradient to what follows
        words = self.embed(schedule.pack(inputs))
        gate = StepLinear(self.gate, schedule.rows) if self.config.gate != "none" else None
        layers = _Layers(gate, StepLinear(self.state_gates, schedule.rows, add=self.word_gates(words)))
        attend = self._attention(memory, schedule, inputs.shape[1])
        state, h, z, alphas = self.start(memory), [], [], []
        for rows in schedule.rows:
            if rows < len(state.h):
                state = State(*(x[:rows] for x in state))
            state, context, alpha = _advance(state, attend, layers)
            h.append(state.h)
            z.append(context)
            alphas.append(alpha)
        hidden = self.dropout(self._output(torch.cat(h), words, z))
        alphas = torch.cat(alphas)
        if not isinstance(attend, attention.Hard):
            return hidden, alphas, None, None, schedule
        return hidden, alphas, attend.log_probs(alphas), attention.entropy(alphas), schedule

    def _attention(self, memory: Memory, schedule: Schedule, T: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Where the model looks, h [n, H] -> (context [n, D], alpha [n, L]), at each step of a batch."""
        annotations, keys, mask, mean = memory
        if keys is None:
            return attention.Mean(mean, attention.uniform_weights(annotations, mask))
        options = {"steps": T, "activation": self.config.activation, "mask": mask}
        attend = additive_attention_steps(keys, self.score.weight[0], annotations, **options)
        query = StepLinear(self.query, schedule.rows)
        if self.config.attention == "soft" or not self.training:
            return attention.Soft(attend, query)
        coins = torch.rand(len(annotations), device=annotations.device) < self.HARD
        return attention.Hard(attend, query, coins[schedule.captions(T)].unsqueeze(1), schedule.rows)

    @torch.no_grad()
    def _replace(self, inputs: Tensor, memory: Memory, schedule: Schedule, p: float) -> Tensor:
        """`inputs`, where each word but the first is with probability `p` one that the model samples there.

        The coins fall on the CPU, so that only the chosen rows make logits and nothing waits for the device.
        """
        replaced = schedule.sort(inputs).clone()
        chosen = torch.rand(inputs.shape) < p
        state = self.start(memory)
        for t, rows in enumerate(schedule.rows[1:]):
            memory = Memory(*(None if x is None else x[:rows] for x in memory))
            state = State(*(x[:rows] for x in state))
            word = self.embed(replaced[:rows, t])
            state, z, _ = self._step(word, state, memory)
            picked = chosen[:rows, t + 1].nonzero().squeeze(1).to(inputs.device, non_blocking=True)
            if len(picked):
                logits = self.head(self._output(state.h[picked], word[picked], [z[picked]]))
                p_next = torch.softmax(logits.float(), dim=1)
                token, _ = attention.sample(p_next, torch.rand(len(picked), 1, device=inputs.device))
                replaced[picked, t + 1] = token.squeeze(1)
        return replaced if schedule.order is None else torch.empty_like(inputs).index_copy_(0, schedule.order, replaced)

    def encode(self, images: Tensor) -> Memory:
        annotations, mask = self.encoder(images), self.encoder.mask(images)
        keys = self.keys(annotations) if self.config.attention != "mean" else None
        return Memory(annotations, keys, mask, attention.mean_annotation(annotations, mask))

    def start(self, memory: Memory) -> State:
        return State(*torch.tanh(self.start_state(memory.mean)).chunk(2, 1))

    def step(self, token: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """One word further: token [B] -> logits [B, V] of the next word, and the state after `token`."""
        word = self.embed(token)
        state, z, _ = self._step(word, state, memory)
        return self.head(self.dropout(self._output(state.h, word, [z]))), state

    def _step(self, word: Tensor, state: State, memory: Memory) -> tuple[State, Tensor, Tensor]:
        """The state after words [B, E], the context [B, D] and alpha [B, L]: one step on its own."""
        annotations, keys, mask, mean = memory
        if keys is None:
            attend = attention.Mean(mean, attention.uniform_weights(annotations, mask))
        else:
            options = {"activation": self.config.activation, "mask": mask}
            look = partial(additive_attention, keys, v=self.score.weight[0], values=annotations, **options)
            attend = attention.Soft(look, self.query)
        gate = self.gate if self.config.gate != "none" else None
        word_gates = self.word_gates(word)
        return _advance(state, attend, _Layers(gate, lambda x: word_gates + self.state_gates(x)))

    def _output(self, h: Tensor, word: Tensor, z: list[Tensor]) -> Tensor:
        """What `head` makes logits of, but for dropout; z in parts of the rows."""
        if self.config.output == "linear":
            return h
        return torch.tanh(self.output_h(h) + word + self.output_z(torch.cat(z)))


def _advance(
    state: State, attend: Callable[[Tensor], tuple[Tensor, Tensor]], layers: _Layers
) -> tuple[State, Tensor, Tensor]:
    """One step: the state after it, the gated context, and alpha."""
    z, alpha = attend(state.h)
    if layers.gate is not None:
        z = z * torch.sigmoid(layers.gate(state.h))
    gates, new = layers.gates(torch.cat((z, state.h), dim=1)).split((3 * state.h.shape[1], state.h.shape[1]), dim=1)
    into, forget, out = torch.sigmoid(gates).chunk(3, dim=1)
    c = torch.addcmul(forget * state.c, into, torch.tanh(new))
    return State(out * torch.tanh(c), c), z, alpha
