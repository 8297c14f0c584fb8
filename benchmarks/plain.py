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


# Contrastive ------------------------------------------------------------------------------------------------------------


def similarities(text: Tensor, image: Tensor, scale: float) -> Tensor:
    """[P, Q]: scale times the cosines."""
    return scale * (F.normalize(text, dim=1) @ F.normalize(image, dim=1).T)


def contrastive(text: Tensor, image: Tensor, positive: Tensor | None, scale: float) -> Tensor:
    """The rewards [P]: all similarities, the pairs masked out of them. positive: [P], or None for 0 to P - 1."""
    s = similarities(text, image, scale)
    P, Q = s.shape
    if positive is None:  # in both directions the same elements leave
        pair = torch.eye(P, Q, dtype=torch.bool, device=s.device)
        others = s.masked_fill(pair, -torch.inf)
        own, over_images, over_texts = s.diagonal(), others.logsumexp(1), others.logsumexp(0)[:P]
    else:
        own = s.gather(1, positive[:, None]).squeeze(1)
        pair = torch.arange(Q, device=s.device) == positive[:, None]
        over_images = s.masked_fill(pair, -torch.inf).logsumexp(1)
        itself = torch.eye(P, dtype=torch.bool, device=s.device)
        over_texts = s[:, positive].masked_fill(itself, -torch.inf).logsumexp(0)
    return (own - (over_images + over_texts) / 2) / scale


def contrastive_published(text: Tensor, image: Tensor, positive: Tensor | None, scale: float) -> Tensor:
    """The rewards [P] as the method's authors write them: the pair taken out of the sum of all, and a clamp at 16."""
    s = similarities(text, image, scale)
    e = s.exp()
    over_texts, over_images = (((e.sum(i, keepdim=True) - e).log() - s).clamp(min=-16) for i in (0, 1))
    where = torch.arange(len(s), device=s.device) if positive is None else positive
    return -(over_texts + over_images).gather(1, where[:, None]).squeeze(1) / 2 / scale


def info_nce(text: Tensor, image: Tensor, scale: float) -> Tensor:
    """CLIP's loss: cross entropy over images and over texts, the pair among them."""
    s = similarities(text, image, scale)
    where = torch.arange(len(s), device=s.device)
    return (F.cross_entropy(s, where) + F.cross_entropy(s.T, where)) / 2


def contrastive_exact(
    text: Tensor, image: Tensor, positive: Tensor | None, scale: float, variant: str, upstream: Tensor | None = None
) -> tuple:
    """(rewards [P],), or the mean loss and its gradients times `upstream`, in float64, some texts at a time.

    variant: "reward", for -scale times the mean reward, or "infonce", CLIP's loss.
    """
    leaves = [x.detach().double().requires_grad_() for x in (text, image)]
    normal = [F.normalize(x, dim=1) for x in leaves]
    t, v = (x.detach() for x in normal)
    P, Q = len(t), len(v)
    where = torch.arange(P, device=t.device) if positive is None else positive
    step = max(1, GROUP // (8 * Q))

    def blocks():
        for i in range(0, P, step):
            pair = torch.arange(Q, device=t.device) == where[i : i + step, None]
            yield slice(i, min(i + step, P)), scale * (t[i : i + step] @ v.T), pair

    own, row = (t.new_empty(P) for _ in range(2))
    col = t.new_full((Q,), -torch.inf)
    for p, s, pair in blocks():
        own[p] = s[pair]
        others = s.masked_fill(pair, -torch.inf)
        row[p] = others.logsumexp(1)
        col = torch.logaddexp(col, others.logsumexp(0))
    for x in (own, row, col):
        x.requires_grad_()
    over_texts = col[where]
    if positive is not None:  # the other texts of its image
        same = (where == where[:, None]).fill_diagonal_(False)
        siblings = own.expand(P, P).masked_fill(~same, -torch.inf)
        alone = ~same.any(1)
        over_texts = torch.logaddexp(over_texts, siblings.masked_fill(alone[:, None], -1e300).logsumexp(1))
    if variant == "infonce":
        loss = (F.softplus(row - own) + F.softplus(over_texts - own)).mean() / 2
    else:
        ratio = own - (row + over_texts) / 2
        loss = -ratio.mean()
        if upstream is None:
            return (ratio.detach() / scale,)
    if upstream is None:
        return (loss.detach(),)
    down, drow, dcol = torch.autograd.grad(loss, (own, row, col), upstream.double())
    dt, dv = torch.zeros_like(t), torch.zeros_like(v)
    for p, s, pair in blocks():
        ds = drow[p, None] * (s - row.detach()[p, None]).exp() + dcol * (s - col.detach()).exp()
        ds = scale * ds.where(~pair, down[p, None])
        dt[p], dv = ds @ v, dv.addmm_(ds.T, t[p])
    return (loss.detach(), *torch.autograd.grad(normal, leaves, [dt, dv]))
