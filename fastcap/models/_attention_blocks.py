"""The parts of a model made of attention: multi-head attention, what is added and normalised after it, positions.

With heads i = 1..k of width E = d / k, and all products without a bias,

    MHA(Q, K, V) = [A_1; ...; A_k] W,   A_i = softmax(Q W_i^Q (K W_i^K)^T / sqrt(E)) V W_i^V
    G(y; x)      = LayerNorm(x + dropout(y))

Source: Vaswani et al., Attention Is All You Need (arXiv:1706.03762).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 1024  # words at a time


class Source(NamedTuple):
    """What is attended to: x [B, L, d]; mask [B, L] bool, False at rows that only pad, which are zero; None: all count."""

    x: Tensor
    mask: Tensor | None

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, 1, L], what is added to scores: -inf where nothing is. A row with nothing at all gets 0: its values are
        zero, and so is what attention makes of them, where a softmax of -inf alone would be NaN."""
        if self.mask is None:
            return None
        left_out = ~self.mask & self.mask.any(1, keepdim=True)
        return torch.zeros_like(self.mask, dtype=dtype).masked_fill(left_out, -torch.inf)[:, None, None]


class Keys(NamedTuple):
    """A `Source` as one attention reads it: key and value [B, heads, L, E], and the bias of the scores."""

    key: Tensor
    value: Tensor
    bias: Tensor | None


class Attention(nn.Module):
    """Multi-head attention over a source that is projected once, however often it is asked."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width, bias=False)  # queries, keys and values, in this order
        self.out = nn.Linear(width, width, bias=False)
        for part in (*self.project.weight.chunk(3), self.out.weight):
            nn.init.xavier_uniform_(part)

    def keys(self, source: Source) -> Keys:
        """The keys and values of a source."""
        width = source.x.shape[-1]
        key, value = F.linear(source.x, self.project.weight[width:]).chunk(2, -1)
        # contiguous: decoding reads them at every word, and on a CPU in half the time so
        return Keys(self._split(key).contiguous(), self._split(value).contiguous(), source.bias(key.dtype))

    def queries(self, x: Tensor) -> Tensor:
        """x [B, T, d] to [B, heads, T, E]."""
        return self._split(F.linear(x, self.project.weight[: x.shape[-1]]))

    def forward(self, query: Tensor, keys: Keys) -> Tensor:
        """What the queries [B, heads, T, E] find, [B, T, d]."""
        return self._join(F.scaled_dot_product_attention(query, keys.key, keys.value, attn_mask=keys.bias))

    def causal(self, x: Tensor) -> Tensor:
        """Each of x [B, T, d] attends to itself and those before it: [B, T, d]."""
        query, key, value = (self._split(part) for part in self.project(x).chunk(3, -1))
        return self._join(F.scaled_dot_product_attention(query, key, value, is_causal=True))

    def next(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """`causal` of one more x [N, d] after those of `past`: ([N, d], the past with this one)."""
        width = x.shape[-1]
        query, now = self.project(x).unsqueeze(1).split((width, 2 * width), -1)
        past = Past(now) if past is None else past.then(now)
        key, value = (self._split(part) for part in past.keys.chunk(2, -1))
        return self._join(F.scaled_dot_product_attention(self._split(query), key, value)).squeeze(1), past

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(2))


class Past:
    """The keys and values of the words read so far.

    Which rows go on is noted, and they are copied as the next word is put behind them: once, where to choose and then to
    append would copy them twice.
    """

    def __init__(self, keys: Tensor, chosen: Tensor | None = None) -> None:
        self.keys, self._chosen = keys, chosen  # [*, t, 2 d]; [N], or all

    @property
    def length(self) -> int:
        """t."""
        return self.keys.shape[1]

    def rows(self, index: Tensor) -> Past:
        """Of the rows `index` [N], which may repeat."""
        return Past(self.keys, index if self._chosen is None else self._chosen[index])

    def then(self, now: Tensor) -> Past:
        """With one more word, [N, 1, 2 d]."""
        if self._chosen is None:
            return Past(torch.cat((self.keys, now), 1))
        if torch.is_grad_enabled():
            return Past(torch.cat((self.keys.index_select(0, self._chosen), now), 1))
        keys = now.new_empty(now.shape[0], self.length + 1, now.shape[2])
        torch.index_select(self.keys, 0, self._chosen, out=keys[:, : self.length])
        keys[:, self.length :] = now
        return Past(keys)


class AddNorm(nn.Module):
    """G(y; x)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.normalise = nn.Dropout(dropout), nn.LayerNorm(width)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.normalise(x + self.dropout(y))


def next_logits(head: nn.Linear, hidden: Tensor) -> Tensor:
    """`head` of hidden [N, d] of one word, [N, V].

    On a CPU in blocks of words: of few rows and a large vocabulary MKL takes 24 ms for the whole product and 15 for its
    blocks (96 x 512 x 9,567, one thread).
    """
    V = head.weight.shape[0]
    if hidden.device.type != "cpu" or V <= 2 * BLOCK or torch.is_grad_enabled():
        return head(hidden)
    logits = hidden.new_empty(hidden.shape[0], V)
    for first in range(0, V, BLOCK):
        words = slice(first, first + BLOCK)
        torch.addmm(head.bias[words], hidden, head.weight[words].T, out=logits[:, words])
    return logits


def weights(query: Tensor, keys: Keys) -> Tensor:
    """The mean over heads of softmax(query key^T / sqrt(E)), [B, T, L]."""
    scores = query @ keys.key.mT * query.shape[-1] ** -0.5
    return (scores if keys.bias is None else scores + keys.bias).softmax(-1).mean(1)


def sinusoids(count: int, width: int) -> Tensor:
    """[count, width], of position t: sin(t / 10000^(2 i / width)) in the first half of the columns, cosines in the other."""
    half = (width + 1) // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float64) * (-2 * torch.log(torch.tensor(1e4)) / width))
    angle = torch.arange(count, dtype=torch.float64).unsqueeze(1) * rate
    return torch.cat((angle.sin(), angle.cos()), 1)[:, :width].to(torch.get_default_dtype())
