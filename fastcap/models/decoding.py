"""Greedy and beam search for any model with three methods.

    memory        = model.encode(images)                tensors whose first dimension is the image
    state         = model.start(memory)                 likewise
    logits, state = model.step(token, state, memory)    token [B] int64 -> logits [B, V]

`memory` and `state` are tensors, or tuples, lists or dicts of them. Nothing loops over images. A beam search repeats them
for its beams; what is none of these (None, for example) it hands to `step` as it is, whose rows are then the images in
order, each repeated. Where beams change places, a state is indexed, or asked for its `rows(index)` if it has such a method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad


class Captions(NamedTuple):
    """tokens [B, T] int64, padded with 0 and without start or end; lengths [B]; scores [B], the (normalised) log p."""

    tokens: Tensor
    lengths: Tensor
    scores: Tensor

    def lists(self) -> list[list[int]]:
        """The captions as lists of ids, for a tokenizer to decode."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]


@torch.no_grad()
def greedy(
    model: Any,
    images: Tensor,
    *,
    max_length: int = 20,
    start_id: int = 1,
    end_id: int = 2,
    forbidden: Sequence[int] = (0, 1),
) -> Captions:
    """The most probable word at each step, until the end or `max_length` steps (the end counts as one).

    Args:
        forbidden: ids that are never chosen; by default the pad and the start.
    """
    _check(max_length, 1, 0.0)
    with _evaluating(model):
        memory = model.encode(images)
        state = model.start(memory)
        B = images.shape[0]
        token = torch.full((B,), start_id, device=images.device)
        ended = torch.zeros(B, dtype=torch.bool, device=images.device)
        scores = torch.zeros(B, device=images.device)
        chosen = []
        for _ in range(max_length):
            logits, state = model.step(token, state, memory)
            log_p, token = (x.squeeze(1) for x in _likeliest(logits, forbidden, 1))
            scores = scores + log_p.masked_fill(ended, 0.0)
            chosen.append(token.masked_fill(ended, end_id))
            ended = ended | (token == end_id)
            if ended.all():
                break
    return _captions(torch.stack(chosen, 1), scores, end_id)


@torch.no_grad()
def beam_search(
    model: Any,
    images: Tensor,
    *,
    beam_size: int = 3,
    length_penalty: float = 0.0,
    max_length: int = 20,
    start_id: int = 1,
    end_id: int = 2,
    forbidden: Sequence[int] = (0, 1),
) -> Captions:
    """The best caption that a beam of `beam_size` finds, for all images at once.

    A caption scores `log p / steps ** length_penalty`; steps count the end. Each step the `beam_size` best
    continuations count: those that end move to the finished captions, which nothing but a better finished caption
    displaces, and the best that do not end go on. An image is done when `beam_size` captions have finished, or when no
    caption still going can overtake the best finished one. Captions cut at `max_length` compete as they are.
    `beam_size=1` is greedy decoding; a beam wider than the number of captions is exhaustive search.

    Args:
        length_penalty: 0 compares log-probabilities, 1 their mean per step; between them, longer captions gain.
    """
    _check(max_length, beam_size, length_penalty)
    with _evaluating(model):
        B, K, device = images.shape[0], beam_size, images.device
        memory = model.encode(images)
        state = _each(lambda x: x.repeat_interleave(K, dim=0), model.start(memory))
        memory = _each(lambda x: x.repeat_interleave(K, dim=0), memory)
        row = torch.arange(B, device=device).unsqueeze(1)
        live = torch.full((B, K), -torch.inf, device=device)
        live[:, 0] = 0.0  # all K beams begin alike, so only one counts
        tokens = torch.full((B, K), start_id, device=device)
        words = torch.full((B, K, max_length), end_id, device=device)
        finished = torch.full((B, K), -torch.inf, device=device)
        finished_words = words.clone()
        done = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_length):
            logits, state = model.step(tokens.flatten(), state, memory)
            # 2 K candidates: at most K of them end, one per beam, so that K are left to go on
            log_p, likeliest = (x.unflatten(0, (B, K)) for x in _likeliest(logits, forbidden, 2 * K))
            each = log_p.shape[2]
            scores, place = (live.unsqueeze(2) + log_p).flatten(1).topk(min(2 * K, K * each), dim=1)
            beam, token = place // each, likeliest.flatten(1).gather(1, place)
            candidates = words[row, beam]
            candidates[:, :, step] = token
            ends = token == end_id

            new = scores / (step + 1) ** length_penalty
            new = new.masked_fill(~ends | done.unsqueeze(1), -torch.inf)[:, :K]
            finished, finished_words = _best(finished, finished_words, new, candidates[:, :K], K)

            live, kept = scores.masked_fill(ends, -torch.inf).topk(K, dim=1)
            tokens, words = token.gather(1, kept), candidates[row, kept]
            source = (beam.gather(1, kept) + row * K).flatten()
            state = state.rows(source) if hasattr(state, "rows") else _each(lambda x, s=source: x.index_select(0, s), state)

            reachable = live[:, 0] / max_length**length_penalty  # log p only falls, and is divided by at most this
            done = done | (finished > -torch.inf).all(1) | (finished[:, 0] >= reachable)
            if done.all():
                break
        cut = (live / max_length**length_penalty).masked_fill(done.unsqueeze(1), -torch.inf)
        finished, finished_words = _best(finished, finished_words, cut, words, 1)
    return _captions(finished_words[:, 0], finished[:, 0], end_id)


def _best(scores: Tensor, words: Tensor, new: Tensor, new_words: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` best of two sets of captions, best first: scores [B, *], words [B, *, T]."""
    scores, order = torch.cat((scores, new), dim=1).topk(keep, dim=1)
    words = torch.cat((words, new_words), dim=1)
    return scores, words.gather(1, order.unsqueeze(2).expand(-1, -1, words.shape[2]))


def _likeliest(logits: Tensor, forbidden: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """(log p, ids), both [N, count]: the most probable words of logits [N, V], best first; fewer where V is less.

    Probabilities are over all words, the forbidden too, which come last, with a log p of -inf."""
    logits = logits.float()
    values, ids = _largest(logits, min(count + len(forbidden), logits.shape[1]))
    log_p = values - logits.logsumexp(1, keepdim=True)
    if forbidden:
        never = (ids.unsqueeze(2) == torch.tensor(forbidden, device=ids.device)).any(2)
        log_p, order = log_p.masked_fill(never, -torch.inf).topk(min(count, log_p.shape[1]), dim=1)
        ids = ids.gather(1, order)
    return log_p, ids


_BLOCK = 64  # words


def _largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk of the rows of x [N, V]. On a CPU by way of the blocks with the largest maxima, which hold all of them: torch
    finds maxima ten times faster than it sorts through a row."""
    N, V = x.shape
    blocks = V // _BLOCK
    if x.device.type != "cpu" or blocks < 4 * count:
        return x.topk(count, dim=1)
    whole = x[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    chosen = whole.amax(2).topk(count, dim=1).indices.unsqueeze(2)
    rest = torch.arange(blocks * _BLOCK, V, device=x.device).expand(N, -1)
    among = torch.cat((whole.gather(1, chosen.expand(-1, -1, _BLOCK)).flatten(1), x[:, blocks * _BLOCK :]), 1)
    ids = torch.cat(((chosen * _BLOCK + torch.arange(_BLOCK, device=x.device)).flatten(1), rest), 1)
    values, places = among.topk(count, dim=1)
    return values, ids.gather(1, places)


def _log_probabilities(logits: Tensor, forbidden: Sequence[int]) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=1)
    if forbidden:
        log_p[:, list(forbidden)] = -torch.inf
    return log_p


def _captions(words: Tensor, scores: Tensor, end_id: int) -> Captions:
    """Cuts each caption [B, T] at its first end."""
    before_end = (words == end_id).cumsum(1) == 0
    lengths = before_end.sum(1)
    longest = int(lengths.max()) if len(lengths) else 0
    return Captions(words.masked_fill(~before_end, 0)[:, :longest], lengths, scores)


def _each(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` of every tensor in tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _each(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        values = [_each(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off while decoding, and the model's mode restored after."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _check(max_length: int, beam_size: int, length_penalty: float) -> None:
    if max_length < 1:
        raise bad("models", "max_length", "be at least 1", max_length, "pass max_length=20")
    if beam_size < 1:
        raise bad("models", "beam_size", "be at least 1", beam_size, "pass beam_size=1 for greedy decoding")
    if length_penalty < 0:
        raise bad("models", "length_penalty", "be at least 0", length_penalty, "pass 0 for none, 1 for the mean")
