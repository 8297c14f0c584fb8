"""What reinforcement asks of a captioner, and nothing else: captions of its own, and its hidden states on given words.

A model serves if it has

    memory        = model.encode(images)                        for sampling, greedy and beam search, as
    state         = model.start(memory)                         `fastcap.models.decoding` says
    logits, state = model.step(token, state, memory)
    hidden        = model.hidden_states(images, inputs, lengths)   [B, T, H], with gradients
    model.head                                                  a linear layer: hidden -> logits

so Show, Attend and Tell, Show and Tell, and BLIP do, and a new model does when it is added to `fastcap.models`. Where
`hidden_states` also takes `rows`, the image of each caption, a picture with several captions is encoded once.

The pad, the start and the unknown word are never drawn, but log p has them: what the model gives them is no caption's.

Dropout is off in both passes. The words are drawn from a policy, and REINFORCE needs the gradient of that policy's log p:
with dropout in the second pass alone, a reward that is the same for all captions would not cancel, and where it is negative
it would push the dropped-out model away from the whole one. `without_dropout` is evaluation mode, but for recurrent layers,
whose backward cuDNN offers in training mode only; they have one layer here, and so no dropout of their own. At a temperature
of 1 the captions are the policy's own, and the estimate has no bias; at another it has.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcap import models
from fastcap.data.batching import IGNORE_INDEX

from .config import TrainConfig


class Sequences(NamedTuple):
    """Captions as teacher forcing reads them: inputs [N, T]; target [N, T], -100 behind each caption's end; lengths [N] on
    the CPU, the targets that count."""

    inputs: Tensor
    target: Tensor
    lengths: Tensor

    def rows(self, chosen: Tensor | slice) -> Sequences:
        """Some of the captions; `chosen` lies on the CPU."""
        moved = chosen if isinstance(chosen, slice) else chosen.to(self.inputs.device)
        return Sequences(self.inputs[moved], self.target[moved], self.lengths[chosen])


class Policy:
    """The captions that a model gives of images, and how they are read back by it.

    Args:
        config: `policy`, `samples`, `temperature`, `beam_size`, `max_length` and `seed` of a run.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: TrainConfig) -> None:
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._ids = {"start_id": tokenizer.start_id, "end_id": tokenizer.end_id, "max_length": config.max_length + 1}
        unknown = getattr(tokenizer, "unk_id", None)
        self._ids["forbidden"] = (tokenizer.pad_id, tokenizer.start_id, *([] if unknown is None else [unknown]))

    def captions(self, images: Tensor, step: int, greedy: bool) -> tuple[models.Captions, models.Captions | None]:
        """(`samples` captions of each of B images, one after the other; the greedy ones if asked for).

        The numbers that are drawn depend on the run's seed and `step` alone.
        """
        config = self._config
        if config.policy == "beam":
            found = models.beam_search(self._model, images, beam_size=config.beam_size, **self._ids)
            return found, self.greedy(images) if greedy else None
        options = {"samples": config.samples, "temperature": config.temperature, "generator": generator(config.seed, step)}
        if greedy:
            return models.sample_and_greedy(self._model, images, **options, **self._ids)
        return models.sample(self._model, images, **options, **self._ids), None

    def greedy(self, images: Tensor) -> models.Captions:
        return models.greedy(self._model, images, **self._ids)

    def texts(self, captions: models.Captions) -> list[str]:
        return [self._tokenizer.decode(ids) for ids in captions.lists()]

    def sequences(self, captions: models.Captions) -> Sequences:
        """What predicts each word of the captions, and their end, but that of captions which were cut."""
        steps, device = self._ids["max_length"], captions.tokens.device
        said, words = captions.lengths, captions.tokens
        lengths = (said + 1).clamp(max=steps)
        place = torch.arange(int(lengths.max()), device=device)
        words = torch.nn.functional.pad(words, (0, len(place) - words.shape[1]))
        target = words.masked_fill(place == said.unsqueeze(1), self._tokenizer.end_id)
        target = target.masked_fill(place >= lengths.unsqueeze(1), IGNORE_INDEX)
        start = torch.full_like(words[:, :1], self._tokenizer.start_id)
        inputs = torch.cat((start, words[:, :-1]), dim=1).masked_fill(place > said.unsqueeze(1), self._tokenizer.pad_id)
        return Sequences(inputs, target, lengths.cpu())


def hidden_states(model: nn.Module, images: Tensor, rows: Tensor, captions: Sequences) -> Tensor:
    """[N, T, H] of N captions, caption n of image `rows[n]`; `rows` [N] int64 lies on the CPU."""
    inputs, lengths = captions.inputs, captions.lengths
    if torch.equal(rows, torch.arange(len(images))):
        return model.hidden_states(images, inputs, lengths)
    rows = rows.to(images.device)
    if "rows" in inspect.signature(model.hidden_states).parameters:
        return model.hidden_states(images, inputs, lengths, rows=rows)
    return model.hidden_states(images[rows], inputs, lengths)


def generator(seed: int, step: int) -> torch.Generator:
    """Of the uniform numbers of a step; on the CPU, so that every device draws the same."""
    import numpy as np

    (mixed,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed) % 2**63)


def joined(parts: list[Sequences], pad_id: int) -> Sequences:
    """Several sets of captions as one, padded to the longest."""
    T = max(part.inputs.shape[1] for part in parts)

    def grown(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, T - x.shape[1]), value=value)

    return Sequences(
        torch.cat([grown(part.inputs, pad_id) for part in parts]),
        torch.cat([grown(part.target, IGNORE_INDEX) for part in parts]),
        torch.cat([part.lengths for part in parts]),
    )


def without_dropout(model: nn.Module) -> None:
    """Sets the mode in which captions are drawn and their log p is differentiated; `model.train()` sets it back."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.train()
