"""Retrieval: does a caption find its image among all images, and an image its caption among all captions?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcap import functional
from fastcap.errors import bad
from fastcap.eval import _embeddings

KS = (1, 5, 10)
_OP = "eval.retrieval"


class Queries(NamedTuple):
    """For each of N queries, how the best of what it should find stands among the rest; int64 [N] each.

    above: others that score higher; tied: others that score the same; own: what it should find that scores the same, 1 or
    more. Where scores are equal no order is better than another, so results are means over all orders of equals.
    """

    above: Tensor
    tied: Tensor
    own: Tensor

    def rank(self) -> Tensor:
        """The place of the first one found, [N] float64: 1 is best, and each other of the same score counts half where
        there is one to find."""
        return self.above + (self.tied + self.own + 1).double() / (self.own + 1)

    def credit(self, k: int) -> Tensor:
        """The chance that one of those to find is among the first k, [N] float64."""
        equals = self.tied + self.own
        below = equals - torch.minimum((k - self.above).clamp_min(0), equals)  # of the equals, those after place k
        missed = torch.ones_like(self.above, dtype=torch.float64)
        for i in range(int(self.own.max()) if len(self.own) else 0):  # C(below, own) / C(equals, own)
            factor = (below - i).clamp_min(0).double() / (equals - i).clamp_min(1)
            missed = torch.where(i < self.own, missed * factor, missed)
        return 1 - missed


class Retrieved(NamedTuple):
    """The queries of both directions: a caption over all images [P], and an image over all captions, in the order of the
    images that have one."""

    text_to_image: Queries
    image_to_text: Queries


@torch.no_grad()
def retrieve(
    text: Tensor,
    image: Tensor,
    positive: Tensor | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Retrieved:
    """Both directions' queries, from which `retrieval` makes its numbers; for scores per image.

    Args:
        text, image, positive: as in `retrieval`.
        progress: called with how much is done and how much there is to do, now and then.

    >>> import torch
    >>> retrieve(torch.eye(3), torch.eye(3)).text_to_image.rank()
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    _embeddings.check(_OP, "text", text)
    _embeddings.check(_OP, "image", image, text)
    if len(text) == 0:
        raise bad(_OP, "text", "have a row", list(text.shape), "pass the embedding of at least one caption")
    options = {} if progress is None else {"progress": progress}
    counts = functional.retrieval_counts(text, image, positive=positive, **options)
    above_images, tied_images, above_texts, tied_texts = (count.long() for count in counts)
    to_image = Queries(above_images, tied_images, torch.ones_like(above_images))
    if positive is None:
        return Retrieved(to_image, Queries(above_texts, tied_texts, torch.ones_like(above_texts)))
    # An image's best caption is the one with the fewest above it; siblings of the same score have as many.
    found, row = torch.unique(positive.long(), return_inverse=True)
    least = torch.full_like(found, len(text)).scatter_reduce(0, row, above_texts, "amin")
    best = above_texts == least[row]
    own = torch.zeros_like(found).scatter_add(0, row, best.long())
    others = torch.zeros_like(found).scatter_reduce(0, row[best], tied_texts[best], "amax")
    return Retrieved(to_image, Queries(least, others + 1 - own, own))


def retrieval(
    text: Tensor,
    image: Tensor,
    positive: Tensor | None = None,
    ks: Sequence[int] = KS,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Recall at k and ranks, from captions to images (t2i) and from images to captions (i2t), by cosine.

    Equivalent to, where no two scores are equal::

        s = normalize(text) @ normalize(image).T                                       # [P, Q]
        rank = 1 + (s > s[range(P), positive][:, None]).sum(1)                         # of each caption's image
        r1, mean_rank, median_rank = (rank <= 1).mean(), rank.mean(), rank.median()    # t2i; i2t likewise with s.T

    Equal scores count by their chance under a random order: with `above` others that score higher and `tied` that score the
    same, a hit at k is worth (k - above) / (tied + 1) within [0, 1], and the rank is above + 1 + tied / 2. A captioner that
    says the same of every image so scores k / N, not 1. An image with several captions is found by the best of them; its
    other captions do not count against it.

    Args:
        text: [P, D] embeddings of captions, float; their lengths do not matter. Embed equal captions once, and repeat the
            row: embedded in two batches they may differ by rounding, and a tie becomes an accident.
        image: [Q, D], of images, in the dtype of `text`.
        positive: [P] int64, the row in `image` of each caption's image; None: caption p belongs to image p. Images without a
            caption are searched, and ask nothing.
        ks: the k of recall at k.
        progress: as in `retrieve`.

    Returns:
        t2i_r<k> and i2t_r<k> in [0, 1] for each k; and t2i_mean_rank, t2i_median_rank, i2t_mean_rank, i2t_median_rank, of
        which 1 is best.

    Raises:
        FastcapError: shapes that do not fit, an index out of range, no caption, or an embedding that is not finite.

    Memory: O(P + Q); no [P, Q] tensor (`fastcap.functional.retrieval_counts`).

    >>> import torch
    >>> text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # the first two say the same
    >>> found = retrieval(text, torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), ks=(1,))
    >>> found["t2i_r1"], round(found["i2t_r1"], 3)                 # the second's image is second; the first two share theirs
    (0.6666666666666666, 0.667)
    """
    check_ks(_OP, ks)
    return summary(retrieve(text, image, positive, progress=progress), ks)


def summary(found: Retrieved, ks: Sequence[int] = KS) -> dict[str, float]:
    """The numbers that `retrieval` returns."""
    scores = {}
    for name, queries in (("t2i", found.text_to_image), ("i2t", found.image_to_text)):
        rank = queries.rank()
        scores.update({f"{name}_r{k}": float(queries.credit(k).mean()) for k in ks})
        scores[f"{name}_mean_rank"] = float(rank.mean())
        scores[f"{name}_median_rank"] = float(_median(rank))
    return scores


def check_ks(op: str, ks: Sequence[int]) -> None:
    rule, remedy = "be integers of at least 1", "pass ks=(1, 5, 10)"
    if not isinstance(ks, Sequence):
        raise bad(op, "ks", rule, ks, remedy)
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise bad(op, "ks", rule, k, remedy)


def _median(values: Tensor) -> Tensor:
    """The middle one, or the mean of the two in the middle; torch's takes the lower of the two."""
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
