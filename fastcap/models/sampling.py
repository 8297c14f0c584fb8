"""Captions drawn from a model's own distribution, for any model that `fastcap.models.decoding` can decode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcap.errors import bad

from .decoding import Captions, _captions, _each, _evaluating, _log_probabilities


@torch.no_grad()
def sample(
    model: Any,
    images: Tensor,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    max_length: int = 20,
    start_id: int = 1,
    end_id: int = 2,
    forbidden: Sequence[int] = (0, 1),
    generator: torch.Generator | None = None,
) -> Captions:
    """Captions whose every word is drawn from softmax(logits / temperature), until the end or `max_length` steps.

    A word is the inverse of its distribution function at a uniform number, of which each step of each caption has its own,
    all drawn before the first step. So a logit that is off by a rounding changes a word only where the number lies within
    that rounding of a boundary, and no caption changes another's numbers.

    Args:
        model: with `encode`, `start` and `step`, as `fastcap.models.decoding` says; evaluation mode meanwhile.
        images: [B, 3, S, S] in [-1, 1], or what else the model encodes.
        samples: captions of each image.
        temperature: above 0; below 1 the probable words become more so.
        max_length: steps at most; the end counts as one.
        forbidden: ids of probability 0; by default the pad and the start.
        generator: of the uniform numbers; None is torch's global one.

    Returns:
        `Captions` of B * samples rows, those of an image together: row b * samples + j. `scores` are log p of
        softmax(logits / temperature), from which the forbidden ids take their share as in `greedy` and `beam_search`.

    Raises:
        FastcapError: samples or max_length is below 1, or temperature is not above 0 and finite.

    >>> captions = sample(model, images, samples=5, generator=torch.Generator().manual_seed(0))  # doctest: +SKIP
    """
    ids = {"start_id": start_id, "end_id": end_id, "forbidden": forbidden}
    return _draw(model, images, samples, False, temperature, max_length, generator, **ids)[0]


@torch.no_grad()
def sample_and_greedy(model: Any, images: Tensor, *, samples: int = 1, temperature: float = 1.0, max_length: int = 20,
                      start_id: int = 1, end_id: int = 2, forbidden: Sequence[int] = (0, 1),
                      generator: torch.Generator | None = None) -> tuple[Captions, Captions]:  # fmt: skip
    """`sample` and `greedy` of the same images in one pass, which encodes them once: (B * samples captions, B captions).

    The arguments, the numbers drawn and the errors are those of `sample`.
    """
    ids = {"start_id": start_id, "end_id": end_id, "forbidden": forbidden}
    return _draw(model, images, samples, True, temperature, max_length, generator, **ids)


def _draw(
    model: Any, images: Tensor, samples: int, with_greedy: bool, temperature: float, max_length: int,
    generator: torch.Generator | None, *, start_id: int, end_id: int, forbidden: Sequence[int],
) -> tuple[Captions, Captions]:  # fmt: skip
    """Each image has `samples` rows, and with_greedy one more, its last, that takes the most probable words."""
    _check(samples, temperature, max_length)
    B, rows, device = images.shape[0], samples + with_greedy, images.device
    drawn_on = generator.device if generator is not None else "cpu"
    uniform = torch.rand(B, samples, max_length, generator=generator, dtype=torch.float64, device=drawn_on).to(device)
    is_greedy = (torch.arange(B * rows, device=device) % rows) == samples
    with _evaluating(model):
        memory = model.encode(images)
        state = _each(lambda x: x.repeat_interleave(rows, dim=0), model.start(memory))
        memory = _each(lambda x: x.repeat_interleave(rows, dim=0), memory)
        token = torch.full((B * rows,), start_id, device=device)
        ended = torch.zeros(B * rows, dtype=torch.bool, device=device)
        scores = torch.zeros(B * rows, device=device)
        chosen = []
        for t in range(max_length):
            logits, state = model.step(token, state, memory)
            log_p = _log_probabilities(logits / temperature, forbidden)
            token = log_p.argmax(1)
            drawn = _inverse(log_p.view(B, rows, -1)[:, :samples].flatten(0, 1), uniform[:, :, t].flatten())
            token[~is_greedy] = drawn
            scores = scores + log_p.gather(1, token.unsqueeze(1)).squeeze(1).masked_fill(ended, 0.0)
            chosen.append(token.masked_fill(ended, end_id))
            ended = ended | (token == end_id)
            if ended.all():
                break
    words = torch.stack(chosen, 1)
    return tuple(_captions(words[kind], scores[kind], end_id) for kind in (~is_greedy, is_greedy))


def _inverse(log_p: Tensor, uniform: Tensor) -> Tensor:
    """[R], where the distribution functions of log_p [R, V] pass `uniform` [R]: never at an id of probability 0."""
    log_p = log_p.double() - log_p.amax(1, keepdim=True)  # the forbidden ids may have had nearly everything
    total = log_p.exp().cumsum(1)
    last = total[:, -1:]
    wanted = torch.minimum(uniform.unsqueeze(1) * last, torch.nextafter(last, torch.zeros_like(last)))
    found = torch.searchsorted(total, wanted, right=True).squeeze(1)
    return found.clamp(max=log_p.shape[1] - 1)  # of NaN: an id all the same, which the loss will show


def _check(samples: int, temperature: float, max_length: int) -> None:
    for name, value, usual in (("samples", samples, 1), ("max_length", max_length, 20)):
        if value < 1:
            raise bad("models.sample", name, "be at least 1", value, f"pass {name}={usual}")
    if not 0 < temperature < math.inf:
        rule, remedy = "be above 0 and finite", "pass temperature=1.0, or decode with greedy for the limit at 0"
        raise bad("models.sample", "temperature", rule, temperature, remedy)
