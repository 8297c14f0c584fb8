"""Attribute words of an image: which words captions of it are likely to hold, by multiple-instance learning over regions.

A region r has the word w with probability p_r(w) = sigmoid(u_w . a_r + b_w), and the image has it unless no region does,

    p(w) = 1 - prod_r (1 - p_r(w))                                               noisy or

trained with binary cross-entropy on whether a caption of the image holds w. So a word that one region shows is found,
without anything said about where.

Source: Fang et al., From Captions to Visual Concepts and Back (arXiv:1411.4952), section 3.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastcap.data import words
from fastcap.errors import bad

# Words that say how a caption is built and not what is in the picture; the list is English.
STOP_WORDS = frozenset(
    "a about above across after against all along also am among an and another any are around as at be because been before "
    "behind being below beneath beside besides between both but by can could did do does doing down during each either else "
    "etc every few for from had has have having he her here hers him his how i if in inside into is it its it's itself just "
    "like many may me more most much must my near next no nor not of off on onto or other others our out outside over own "
    "past per she should so some such than that that's the their them then there there's these they this those through to "
    "together too toward towards under until up upon us very was we were what when where which while who whom whose why "
    "will with within without would you your".split()
)
PRIOR_REGIONS = 36  # of an image, when a word's bias is set so that the image has it as often as captions do


def content_words(captions: Iterable[str], limit: int) -> list[tuple[str, float]]:
    """The `limit` words that the most captions hold, without stop words, each with the share of captions that hold it.

    Ties are in alphabetical order.

    >>> content_words(["a red circle", "the red square"], 2)
    [('red', 1.0), ('circle', 0.5)]
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise bad("models.attributes", "limit", "be an integer of at least 1", limit, "pass limit=1000")
    counts: Counter[str] = Counter()
    total = 0
    for caption in captions:
        counts.update({*words(caption)} - STOP_WORDS)
        total += 1
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:limit]
    return [(word, counts[word] / total) for word in ranked]


class AttributePredictor(nn.Module):
    """The probabilities of K words, of which the `keep` most probable are an image's attributes.

    Args:
        width: of a region's annotation.
        ids: the K words as the tokenizer's ids, each once.
        keep: M, how many are kept of an image; K where that is less.
        shares: how often each word is in a caption, in (0, 1): at first every image has it with that probability.
    """

    ids: Tensor

    def __init__(self, width: int, ids: Sequence[int], keep: int, shares: Sequence[float] | None = None) -> None:
        super().__init__()
        if not ids or len({*ids}) != len(ids) or min(ids) < 1:
            got, remedy = f"{len(ids)} ids", "pass the ids of the captions' frequent words"
            raise bad("models", "attribute_ids", "be ids of different words, one at least", got, remedy)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)  # the configuration has them
        self.keep = min(keep, len(ids))
        self.score = nn.Linear(width, len(ids))
        nn.init.normal_(self.score.weight, std=0.1 * width**-0.5)
        with torch.no_grad():
            self.score.bias.copy_(torch.tensor([_bias(share) for share in shares or [0.05] * len(ids)]))

    def forward(self, regions: Tensor, mask: Tensor | None) -> Tensor:
        """log(1 - p(w)) [B, K], float32 at least, of regions [B, R, D] of which mask [B, R] says which count."""
        with torch.autocast(regions.device.type, enabled=False):
            scores = self.score(regions.to(self.score.weight.dtype))
            absent = nn.functional.logsigmoid(-scores)
            if mask is not None:
                absent = absent.masked_fill(~mask.unsqueeze(2), 0)
            return absent.sum(1)

    @torch.no_grad()
    def most_probable(self, absent: Tensor) -> Tensor:
        """[B, M], the ids of the most probable words, best first; 0 (none) in rows of an image without a region."""
        best = self.ids[absent.topk(self.keep, dim=1, largest=False).indices]
        return best.masked_fill((absent == 0).all(1, keepdim=True), 0)

    def loss(self, absent: Tensor, target: Tensor) -> Tensor:
        """[B], the binary cross-entropy of each image, added up over the words.

        Args:
            absent: [B, K], of `forward`.
            target: [B, T] int64, a caption of each image; ids below 0 are none.
        """
        said = (target.unsqueeze(2) == self.ids).any(1)
        return -torch.where(said, _log_rest(absent), absent).sum(1)


def _log_rest(x: Tensor) -> Tensor:
    """log(1 - e^x) of x <= 0, without the cancellation near 0 and at -inf; the gradient is finite everywhere."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    small, large = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))


def _bias(share: float) -> float:
    """Of the score of one of `PRIOR_REGIONS` regions, so that the noisy or is `share`."""
    share = min(max(share, 1e-4), 1 - 1e-4)
    absent = (1 - share) ** (1 / PRIOR_REGIONS)
    return math.log((1 - absent) / absent)
