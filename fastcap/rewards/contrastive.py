"""How well captions fit their images in the eyes of a CLIP, less what a caption of the batch would get anyway."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.functional import contrastive_reward

_OP = "rewards.SimilarityReward"

# What each baseline asks of fastcap.functional.contrastive_reward; the similarity itself where it asks for no baseline.
BASELINES = {
    "two-way": {"baseline": "logsumexp", "direction": "both"},
    "one-way": {"baseline": "logsumexp", "direction": "image_to_text"},
    "similar": {"baseline": "none"},
    "greedy": {"baseline": "none"},
    "none": {"baseline": "none"},
}


class Similarity(NamedTuple):
    """own [P], the cosine of each text and its image; reward [P], the same less its baseline."""

    own: Tensor
    reward: Tensor


class SimilarityReward:
    """The similarity of each text and its image, less a baseline; no gradient.

    ========  ==========================================================================================
    baseline  what is subtracted from the cosine <t_p, v_pos(p)>
    ========  ==========================================================================================
    two-way   the mean of log-sum-exp over the other images, and over the other texts, each / scale
    one-way   log-sum-exp over the other texts, of the text's image, / scale (image to text)
    similar   the mean cosine of the text and the images most similar to its own
    greedy    the cosine of the greedy caption of the same image (self-critical)
    none      nothing
    ========  ==========================================================================================

    Args:
        baseline: one of these.
        scale: the inverse temperature of the log-sum-exps, a CLIP's logit scale. The reward is in units of a cosine,
            whatever it is.
        exclude: "self" counts other texts of the same image among the others, "group" does not.

    Raises:
        FastcapError: an argument breaks its rule, here or in a call.

    Source: Chaffin, Claveau and Kijak, Distinctive Image Captioning (arXiv:2402.13936).

    >>> import torch
    >>> SimilarityReward("one-way", scale=10.0)(torch.eye(2), torch.eye(2), torch.arange(2)).reward
    tensor([1., 1.])
    """

    def __init__(self, baseline: str = "two-way", scale: float = 100.0, exclude: str = "self") -> None:
        if baseline not in BASELINES:
            rule = f"be one of {', '.join(map(repr, BASELINES))}"
            raise bad(_OP, "baseline", rule, baseline, "pass baseline='two-way'")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise bad(_OP, "scale", "be above 0 and finite", scale, "pass the logit scale of the CLIP, or 100.0")
        if exclude not in ("self", "group"):
            raise bad(_OP, "exclude", "be one of 'self', 'group'", exclude, "pass exclude='self'")
        self.baseline, self.scale, self.exclude = baseline, float(scale), exclude

    @torch.no_grad()
    def __call__(
        self, text: Tensor, image: Tensor, positive: Tensor, *, similar: Tensor | None = None, greedy: Tensor | None = None
    ) -> Similarity:
        """The rewards of all P texts.

        Args:
            text: [P, D] embeddings, of any length.
            image: [Q, D] embeddings of different images.
            positive: [P] int64, the row in `image` of each text's image.
            similar: [P, k] int64, for "similar": the rows in `image` of the images most similar to each text's own.
            greedy: [P] int64, for "greedy": the row in `text` of the greedy caption of each text's image.
        """
        for name, given, letters in (("similar", similar, "[P, k], k >= 1"), ("greedy", greedy, "[P]")):
            wanted = (text.shape[0], *([given.shape[1]] if given is not None and given.dim() == 2 else []))
            if self.baseline == name and (given is None or given.shape != wanted or given.dim() != 1 + (name == "similar")):
                got = None if given is None else list(given.shape)
                raise bad(_OP, name, f"be a tensor {letters} of indices with that baseline", got, "pass one row a text")
        if self.baseline == "similar" and similar.shape[1] == 0:
            raise bad(_OP, "similar", "name at least one image a text", list(similar.shape), "ask for neighbours")
        text, image = (torch.nn.functional.normalize(x.float(), dim=1) for x in (text, image))
        options = {"positive": positive, "logit_scale": self.scale, "normalize": False}
        own = contrastive_reward(text, image, baseline="none", **options)
        if self.baseline == "similar":
            return Similarity(own, own - torch.einsum("pd,pkd->pk", text, image[similar]).mean(1))
        if self.baseline == "greedy":
            return Similarity(own, own - own[greedy])
        if self.baseline == "none":
            return Similarity(own, own)
        return Similarity(own, contrastive_reward(text, image, exclude=self.exclude, **options, **BASELINES[self.baseline]))
