"""CLIPScore and RefCLIPScore, from embeddings of captions, images and references."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.eval import _embeddings

WEIGHT = 2.5
"""The published factor on the cosine."""


@torch.no_grad()
def clip_score(text: Tensor, image: Tensor, weight: float = WEIGHT) -> Tensor:
    """CLIPScore of each caption for its image: how well they match by a CLIP, without a reference.

    Equivalent to::

        weight * torch.nn.functional.cosine_similarity(text, image).clamp_min(0)

    Args:
        text: [N, D] embeddings of captions, any floating point dtype; their lengths do not matter.
        image: [N, D], of the image of each caption.
        weight: the published 2.5, which stretches a usual CLIP's cosines to about [0, 1].

    Returns:
        [N] float64 in [0, weight]; what is reported is the mean. Papers also print it times 100, and embed captions behind
        the words "A photo depicts": leave them out for a CLIP that was not trained on such sentences, and say which it was.

    Raises:
        FastcapError: shapes that do not fit, or an embedding that is not finite.

    Source: Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning (arXiv:2104.08718), section 3.

    >>> import torch
    >>> clip_score(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # cosines .6 and -1
    tensor([1.5000, 0.0000], dtype=torch.float64)
    """
    op = "eval.clip_score"
    _check_pairs(op, text, image, weight)
    return weight * _embeddings.pair_cosines(text, image).clamp_min(0)


@torch.no_grad()
def ref_clip_score(text: Tensor, image: Tensor, reference: Tensor, of: Tensor, weight: float = WEIGHT) -> Tensor:
    """RefCLIPScore of each caption: the harmonic mean of its CLIPScore and of its cosine with the closest reference.

    Equivalent to, for caption n::

        closest = max(cosine(text[n], reference[r]) for r in range(R) if of[r] == n)
        clip_s, ref = weight * max(cosine(text[n], image[n]), 0), max(closest, 0)
        0 if clip_s * ref == 0 else 2 * clip_s * ref / (clip_s + ref)

    The factor `weight` is on the image's part alone, as published, so the mean is of [0, weight] and [0, 1].

    Args:
        text: [N, D] embeddings of captions.
        image: [N, D], of the image of each caption.
        reference: [R, D], of all references.
        of: [R] int64, the row in `text` of the caption that each reference is for; every caption needs one.
        weight: as in `clip_score`.

    Returns:
        [N] float64.

    Raises:
        FastcapError: shapes that do not fit, an embedding that is not finite, or a caption without a reference.

    Source: Hessel et al. (arXiv:2104.08718), section 3; the authors' code does not cut negative cosines with references off,
    the paper does, and so does this.

    >>> import torch
    >>> text, image = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])              # cosine .6: CLIPScore 1.5
    >>> ref_clip_score(text, image, torch.tensor([[4.0, 3.0], [0.0, 1.0]]), torch.tensor([0, 0]))  # closest: .8
    tensor([1.0435], dtype=torch.float64)
    """
    op = "eval.ref_clip_score"
    _check_pairs(op, text, image, weight)
    _embeddings.check(op, "reference", reference, text)
    _embeddings.check_rows(op, "of", of, len(reference), text)
    cosines = _embeddings.pair_cosines(text, reference, of)
    closest = cosines.new_full((len(text),), -math.inf).scatter_reduce(0, of.long(), cosines, "amax")
    without = closest.isneginf()
    if bool(without.any()):
        got = f"none for caption {int(without.nonzero()[0])}"
        raise bad(op, "reference", "have one for each caption", got, "leave such captions out")
    with_image = weight * _embeddings.pair_cosines(text, image).clamp_min(0)
    return torch.where(with_image * closest > 0, 2 * with_image * closest / (with_image + closest), 0.0)


def _check_pairs(op: str, text: Tensor, image: Tensor, weight: float) -> None:
    _embeddings.check(op, "text", text)
    _embeddings.check(op, "image", image, text)
    if len(image) != len(text):
        rule = f"have a row for each caption, {len(text)}"
        remedy = "where images have several captions, repeat their rows"
        raise bad(op, "image", rule, len(image), remedy)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise bad(op, "weight", "be a positive number", weight, "pass 2.5, the published one")
