"""contrastive_reward of embeddings that lie on several processes: the images of each visit all others, one after another.

A process multiplies its texts with the images that are with it. It keeps, for its texts, what all images amount to, and for
each image, what its own texts amount to; the latter are merged over the processes at the end, [Q] numbers. No process holds
more images than its own and two visiting shards, and no texts but its own. The backward makes a second turn, in which the
gradient of each shard of images follows it around and comes home.

Each process receives every image of the others once in the forward, and again in the backward with its gradient in the dtype
of sums; besides, O(P + Q) numbers. With "mean" or "none", images travel only if some text lies apart from its image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.ops import _backend, _contrastive, _contrastive_dense, _embeddings, _processes
from fastcap.ops._autograd import once
from fastcap.ops._contrastive import Options, Statistics
from fastcap.ops._contrastive_agree import Facts, Whole, agree, facts_of
from fastcap.ops._embeddings import Embeddings
from fastcap.ops._processes import Ring

_NO_DOUBLE_BACKWARD = "call it without a group under `with fastcap.backend('reference'):`, which supports it"


def _visit_fwd(*arguments, backend: str) -> Statistics:
    if backend == "reference":
        return _contrastive_dense.fwd(*arguments)
    return Statistics(*torch.ops.fastcap.contrastive_reward_fwd(*arguments, backend))


def _visit_bwd(*arguments, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return _contrastive_dense.bwd(*arguments)
    return torch.ops.fastcap.contrastive_reward_bwd(*arguments, backend)


# A whole turn ----------------------------------------------------------------------------------------------------------


def _turn_fwd(text, image, positive, row_factor, col_factor, whole: Whole, options: Options, backend: str) -> Statistics:
    """Of this process' texts [P] over all images, and of all images [Q] over all texts; indices count over all processes."""
    rows, cols, baseline = options.statistics
    indices, P, Q = baseline == "max", text.shape[0], sum(whole.Q)
    own = row_factor.new_full((P,), torch.nan)
    row, col = (own.new_full((n,), -torch.inf) for n in (P if rows else 0, Q if cols else 0))
    row_index, col_index = (positive.new_full(x.shape if indices else (0,), -1) for x in (row, col))
    for owner, visiting in whole.ring.visits(image, whole.Q, whole.turns(options)):
        if not P or not visiting.shape[0]:
            continue
        at = whole.images(owner)
        local = positive - at.start
        part = _visit_fwd(
            text, visiting, local, row_factor, col_factor[at], rows, cols, baseline, options.precision, backend=backend
        )
        own = part.own.where(_contrastive.here(local, visiting.shape[0])[0], own)
        if cols:
            col[at] = part.col
        if cols and indices:
            col_index[at] = part.col_index + whole.texts.start
        if rows and indices:
            found = part.row_index + at.start  # visits do not come in the order of ranks: of equals, the first
            better = (part.row > row) | ((part.row == row) & (found < row_index)) | (part.row.isnan() & ~row.isnan())
            row, row_index = part.row.where(better, row), found.where(better, row_index)
        elif rows:
            row = torch.logaddexp(row, part.row)
    if cols and indices:
        col, col_index = whole.ring.largest(col, col_index)
    elif cols:
        col = whole.ring.logsumexp(col)
    return Statistics(own, row, row_index, col, col_index)


def _turn_bwd(ctx, down: Tensor, drow: Tensor, dcol: Tensor, need_text: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of this process' text and image, but for the norms; the factors count as constants."""
    text, image, scale, positive, row_norm, col_factor, row, row_index, col, col_index = ctx.saved_tensors
    whole, options, backend = ctx.options
    ring, need_image, row_factor, acc = whole.ring, whole.wants_image, scale * row_norm, row_norm.dtype
    dtext = text.new_zeros(text.shape, dtype=acc) if need_text else None
    passing = part_image = None
    for owner, visiting in ring.visits(image, whole.Q, whole.turns(options)):
        part_image = visiting.new_zeros(visiting.shape, dtype=acc) if need_image else None
        if text.shape[0] and visiting.shape[0] and (need_text or need_image):
            at = whole.images(owner)
            of_cols = (x[at] if x.numel() else x for x in (col, col_index - whole.texts.start))
            part_text, part = _visit_bwd(
                down, drow, dcol[at] if dcol.numel() else dcol, text, visiting, positive - at.start, row_factor,
                col_factor[at], row, row_index - at.start, *of_cols, need_text, need_image,
                options.statistics[2], options.precision, backend=backend,
            )  # fmt: skip
            if need_text:
                dtext += part_text
            part_image = part if need_image else None
        if need_image and whole.turns(options):
            if passing is not None:
                part_image += passing.arrived()
            passing = ring.pass_on(part_image, owner, whole.Q, tag=1)
    return dtext, part_image if passing is None else passing.arrived()


class _Turn(torch.autograd.Function):
    """(own, row, row_index, col, col_index) as _turn_fwd has them; own [P] of all processes where siblings count.

    anchor: needs a gradient where any process wants one, so that every process runs the backward.
    """

    @staticmethod
    def forward(ctx, text, image, scale, anchor, positive, whole, options, backend):
        row_norm, col_norm = (_embeddings.inverse_norms(x, options.normalize) for x in (text, image))
        col_factor = whole.ring.gather(col_norm, whole.Q) if options.normalize else col_norm.new_ones(sum(whole.Q))
        found = _turn_fwd(text, image, positive, scale * row_norm, col_factor, whole, options, backend)
        if whole.wanted:
            ctx.save_for_backward(text, image, scale, positive, row_norm, col_factor, *found[1:])
            ctx.options = whole, options, backend
        ctx.mark_non_differentiable(found.row_index, found.col_index)
        own = whole.ring.gather(found.own, whole.P) if whole.siblings(options) else found.own
        return own, *found[1:]

    @staticmethod
    def backward(ctx, down, drow, _, dcol, __):
        text, image, scale, _, row_norm, col_factor = ctx.saved_tensors[:6]
        whole, options, _ = ctx.options
        needed = ctx.needs_input_grad[:3]
        upstream = down, drow, dcol
        if whole.siblings(options):
            down, dcol = whole.ring.sum(torch.cat((down, dcol))).split((down.shape[0], dcol.shape[0]))
            down = down[whole.texts]
        else:
            dcol = whole.ring.sum(dcol)
        dtext, dimage = _turn_bwd(ctx, down, drow, dcol, needed[0] or needed[2])
        norms = row_norm, col_factor[whole.images(whole.ring.rank)]
        gradients = _contrastive.through_norms(text, image, scale, norms, dtext, dimage, options.normalize, needed)
        of = *upstream, text, image, scale
        once_only = (None if g is None else once(whole.op, g, *of, remedy=_NO_DOUBLE_BACKWARD) for g in gradients)
        return *once_only, None, None, None, None, None


# The mean as a baseline ------------------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum over the processes, and of the gradients. anchor: as in _Turn."""

    @staticmethod
    def forward(ctx, x, anchor, whole):
        ctx.whole = whole
        return whole.ring.sum(x)

    @staticmethod
    def backward(ctx, dsum):
        dx = once(ctx.whole.op, ctx.whole.ring.sum(dsum), dsum, remedy=_NO_DOUBLE_BACKWARD)
        return dx, None, None


def _means(pairs: Embeddings, own: Tensor, scale: Tensor, anchor: Tensor, whole: Whole, options: Options):
    """(over the other images, over the other texts), [P] or None: _contrastive.mean_over_*, of sums over the processes."""
    t, v = (_embeddings.normalized(x.double(), options.normalize) for x in pairs[:2])
    scale, q, at = scale.double(), _contrastive.here(pairs.positive, sum(whole.Q))[1], whole.images(whole.ring.rank)
    by_group = options.exclude == "group" and not whole.paired
    broken = ~t.isfinite().all(1) & by_group  # stays out of the sums: the texts of an image must not see one of their own
    of_texts, of_images = _Sum.apply(torch.stack((t.masked_fill(broken[:, None], 0.0).sum(0), v.sum(0))), anchor, whole)
    over_images = _contrastive.mean_of(scale * (t @ of_images) - own, sum(whole.Q) - 1).to(own.dtype)
    if not options.over_texts:
        return over_images, None

    def by_image(index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(sum(whole.Q)).index_put((index,), values, accumulate=True)

    lists = [by_image(torch.arange(at.start, at.stop, device=q.device), scale * (v @ of_texts))]
    if by_group:  # of an image's own texts: their number, how many are broken, and the sum of the others
        inside = own.masked_fill(broken, 0.0).double()
        lists += [by_image(q, x) for x in (torch.ones_like(inside), broken.double(), inside)]
    total, *of_own = _Sum.apply(torch.stack(lists), anchor, whole)
    if not by_group:
        return over_images, _contrastive.mean_of(total[q] - own, sum(whole.P) - 1).to(own.dtype)
    count, bad_ones, inside = of_own
    left = sum(whole.P) - count[q]
    over_texts = ((total - inside)[q] / left.clamp_min(1)).masked_fill(bad_ones.sum() > bad_ones[q], torch.nan)
    return over_images, over_texts.masked_fill(left < 1, -torch.inf).to(own.dtype)


# The whole -------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # what is exchanged decides what is computed
def log_ratio(op: str, text, image, positive, logit_scale, group, options: Options) -> tuple[Tensor, Tensor]:
    """contrastive_reward's log-ratio [P] of this process' texts, and logit_scale as a tensor. Checks everything.

    An error in the arguments of one process is raised on all.
    """
    _processes.check_group(op, group)
    ring, facts, error = Ring(group), Facts(), None
    try:
        _contrastive.check_options(op, options)
        pairs = _embeddings.prepare(op, text, image, positive, options.precision, sharded=True)
        ring.check_device(op, "text", text)
        scale = _contrastive.scale_of(op, logit_scale, text)
        backend = _backend.select(op, text.device.type, _backend.NO_CUDA)
        facts = facts_of(op, ring, pairs, scale, options)
    except Exception as caught:  # whatever it is, the others must not wait for this process
        error = caught
    every = ring.exchange(facts, error)
    if error is not None:
        raise error
    whole = agree(op, ring, every)
    if pairs.distinct:
        pairs = pairs._replace(positive=pairs.positive + whole.images(ring.rank).start)
    anchor = torch.zeros((), device=text.device, requires_grad=whole.wanted)
    pairs = _contrastive.wide_for_mean(pairs, options)
    own, row, _, col, col_index = _Turn.apply(*pairs[:2], scale, anchor, pairs.positive, whole, options, backend)
    siblings = _siblings(own, pairs.positive, whole, options, backend)
    if whole.siblings(options):
        own = own[whole.texts]
    means = _means(pairs, own, scale, anchor, whole, options) if options.baseline == "mean" else (row, col)
    ratios = []
    if options.over_images:
        ratios.append(_contrastive.ratio(own, means[0], options))
    if options.over_texts:
        base = means[1]
        if options.baseline in ("logsumexp", "max"):
            base = _contrastive.base_over_texts(col, col_index, pairs.positive, siblings, options.baseline)
        ratios.append(_contrastive.ratio(own, base, options))
    return sum(ratios[1:], ratios[0]) / len(ratios), scale


def _siblings(own: Tensor, positive: Tensor, whole: Whole, options: Options, backend: str) -> tuple[Tensor, Tensor] | None:
    """Of each text of this process, what the other texts of its image amount to; own [P] is of all processes."""
    if not whole.siblings(options):
        return None
    positive = whole.ring.gather(positive, whole.P)
    if backend == "reference":
        return _contrastive_dense.others(own, positive, whole.texts, options.baseline)
    from fastcap.ops.contrastive_reward import others

    value, index = others(own, positive, sum(whole.Q), options.baseline, backend)
    return value[whole.texts], index[whole.texts] if index.numel() else index
