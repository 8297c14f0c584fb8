"""The losses over a caption's words in plain torch, as a benchmark's peers and its oracle: what both operations share.

`masked` is the paper's own formulation, `gather` the best plain torch from logits, `linear_gather` from hidden states and
the head, and `linear_exact` what the latter should give.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
MODES = ("forward", "forward_backward")

# What each variant passes to the function, and which rows need the whole vocabulary.
VARIANTS = {
    "subset": {"first_token": "subset"},
    "first_full": {"first_token": "full"},
    "mixture": {"first_token": "full", "mle_weight": 0.01},
    "full": {"subset": "full"},
    "reverse": {"subset": "reverse", "first_token": "subset"},
}
DENSE_ROWS = {"subset": "none", "first_full": "first", "mixture": "all", "full": "all", "reverse": "all"}
GROUP = 128 * 2**20  # bytes of logits that linear_exact makes at a time
GATHERS = ("subset", "first_full", "mixture")  # tokens choose among their caption's words, too


def first_tokens(target: Tensor) -> Tensor:
    """[B]: where each caption's first valid token is."""
    return (target != IGNORED).int().argmax(1)


def allowed_words(target: Tensor, V: int, variant: str) -> Tensor:
    """[B, T or 1, V] bool: the words among which each token chooses."""
    B, T = target.shape
    words = torch.zeros(B, V + 1, dtype=torch.bool, device=target.device)
    words = words.scatter_(1, target.where(target != IGNORED, V), True)[:, None, :V]
    if variant == "reverse":
        own = target.clamp(min=0).unsqueeze(-1)
        return (~words).expand(B, T, V).scatter(2, own, True)
    if variant in ("first_full", "mixture"):
        words = words.expand(B, T, V).clone()
        words[torch.arange(B, device=target.device), first_tokens(target)] = True
    return words


def masked(input: Tensor, target: Tensor, variant: str, fill: float = -1e9, reduction: str = "mean") -> Tensor:
    """The paper's own formulation: a boolean mask over the vocabulary, and torch's cross entropy."""
    V = input.shape[2]

    def reduced(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction=reduction)

    if variant == "full":
        return reduced(input)
    loss = reduced(input.masked_fill(~allowed_words(target, V, variant), fill))
    m = VARIANTS[variant].get("mle_weight", 0.0)
    return m * reduced(input) + (1 - m) * loss if m else loss


def gather(input: Tensor, target: Tensor, variant: str) -> Tensor:
    """The best plain torch: only the caption's logits, repeats masked; the whole vocabulary only where it is asked for."""
    B, T, V = input.shape
    y = target.clamp(min=0)
    everywhere = y[:, None, :].expand(B, T, T)
    if variant == "reverse":
        first = target.gather(1, first_tokens(target)[:, None])  # stands in for what is ignored: word 0 may be allowed
        rest = input.scatter(2, target.where(target != IGNORED, first)[:, None, :].expand(B, T, T), -torch.inf)
        z_y = input.gather(2, y.unsqueeze(-1)).squeeze(-1)
        loss = torch.logaddexp(rest.logsumexp(-1), z_y) - z_y
        return mean(loss, target)
    whole = None
    if variant in ("first_full", "mixture"):
        whole = input[torch.arange(B, device=target.device), first_tokens(target)].logsumexp(-1)
    loss = mean(among_words(input.gather(2, everywhere), target, whole), target)
    m = VARIANTS[variant].get("mle_weight", 0.0)
    if m:
        loss = m * F.cross_entropy(input.flatten(0, 1), target.flatten(), ignore_index=IGNORED) + (1 - m) * loss
    return loss


def among_words(z: Tensor, target: Tensor, whole: Tensor | None) -> Tensor:
    """[B, T]: the losses from z [B, T, T], the logits of the words at each position of the caption, repeats masked.

    whole: [B], the logsumexp over the vocabulary that the first token of each caption uses; None: it has no exception.
    """
    T = target.shape[1]
    earlier = torch.ones(T, T, dtype=torch.bool, device=z.device).tril(-1)
    repeat = ((target[:, :, None] == target[:, None, :]) & earlier).any(-1)
    lse = z.masked_fill((repeat | (target == IGNORED))[:, None, :], -torch.inf).logsumexp(-1)
    if whole is not None:
        lse = lse.scatter(1, first_tokens(target)[:, None], whole[:, None].to(lse.dtype))
    return lse - z.diagonal(dim1=1, dim2=2)


def mean(loss: Tensor, target: Tensor) -> Tensor:
    """Over the valid tokens."""
    valid = target != IGNORED
    return loss.masked_fill(~valid, 0.0).sum() / valid.sum()


# From hidden states [B, T, H] and the head [V, H] -----------------------------------------------------------------------


def linear_gather(hidden: Tensor, weight: Tensor, target: Tensor, variant: str) -> Tensor:
    """The best plain torch: only the rows of the head that the caption's words need, and a product for each caption."""
    if variant in ("mixture", "reverse"):  # each row needs all of its logits: the caption's are among them
        return gather(F.linear(hidden, weight), target, variant)
    words = F.embedding(target.clamp(min=0), weight)  # [B, T, H]
    whole = None
    if variant == "first_full":
        first = first_tokens(target)
        whole = F.linear(hidden[torch.arange(len(first), device=first.device), first], weight).logsumexp(-1)
    return mean(among_words(hidden @ words.mT, target, whole), target)


def linear_exact(
    hidden: Tensor, weight: Tensor, target: Tensor, variant: str, backward: bool, upstream: Tensor | None, dtype: torch.dtype
) -> tuple:
    """The loss, and its gradients times `upstream`, by the masked formulation in `dtype`, some captions at a time.

    The gradient of the head is row-sparse where only the batch's words have one.
    """
    V, words, valid = weight.shape[0], None, target != IGNORED
    if variant == "subset":  # no other word has a part: the masked formulation on a vocabulary of the batch's words
        words = target[valid].unique()
        weight, target = weight[words], torch.searchsorted(words, target).where(valid, IGNORED)
    weight = weight.to(dtype)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    dhidden = torch.empty_like(hidden, dtype=dtype) if backward else None
    dweight = torch.zeros_like(weight) if backward else None
    step = max(1, GROUP // (target.shape[1] * weight.shape[0] * dtype.itemsize))
    for h, t, i in zip(hidden.split(step), target.split(step), range(0, len(target), step), strict=True):
        z = (h.to(dtype) @ weight.T).requires_grad_(backward)
        part = masked(z, t, variant, fill=-torch.inf, reduction="sum") / valid.sum()
        loss += part.detach()
        if backward:
            (dz,) = torch.autograd.grad(part, z, None if upstream is None else upstream.to(dtype))
            dhidden[i : i + step] = dz @ weight
            dweight.addmm_(dz.flatten(0, 1).T, h.to(dtype).flatten(0, 1))
    if not backward:
        return (loss,)
    if words is not None:
        dweight = torch.sparse_coo_tensor(words[None], dweight, (V, dweight.shape[1]), check_invariants=False)
    return loss, dhidden, dweight


# Attention --------------------------------------------------------------------------------------------------------------


def attend(keys: Tensor, query: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(context [B, D], alpha [B, L]) of keys [B, L, A], query [B, A], v [A] and values [B, L, D]: as decoders write it."""
    alpha = torch.softmax(torch.tanh(keys + query.unsqueeze(1)) @ v, dim=1)
    return torch.bmm(alpha.unsqueeze(1), values).squeeze(1), alpha
