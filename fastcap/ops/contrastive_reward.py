"""The reward of CLIP-guided captioning, and the same quantity as a loss: how far the similarity of a text and its image lies
above that of the other pairs in the batch, without the [P, Q] similarities ever in memory.

The story, top to bottom: what is computed (`reference`, plain torch), the operators of `torch.ops.fastcap` with their CPU,
CUDA and Meta implementations, their autograd.Functions, how a ratio is put together, and the public functions.
`_similarity_blocks.py` is the CPU's loop over blocks, `_contrastive.py` plain torch on every device, `_contrastive_ring.py`
embeddings on several processes. Maths and costs: docs/math/contrastive_reward.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcap.ops import _backend, _checks, _contrastive, _dtypes, _embeddings
from fastcap.ops._autograd import once
from fastcap.ops._contrastive import Options, Statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "contrastive_reward"


def reference(text: Tensor, image: Tensor, positive: Tensor, logit_scale: Tensor, options: Options) -> Tensor:
    """The log-ratio [P] of each text in plain torch, in the dtype of sums. O(P Q + P^2) memory."""
    t, v = (_embeddings.normalized(x, options.normalize) for x in (text, image))
    if t.shape[0] == 0:
        return (t.sum(1) + v.sum()) * logit_scale
    with torch.autocast(text.device.type, enabled=False):
        s = logit_scale * (t @ v.T)
    own = s.gather(1, positive[:, None]).squeeze(1)
    ratios = []
    if options.over_images:
        pair = torch.arange(v.shape[0], device=s.device) == positive[:, None]
        ratios.append(_contrastive.ratio(own, _contrastive.dense_base(s, pair, options.baseline), options))
    if options.over_texts:
        p = torch.arange(t.shape[0], device=s.device)
        excluded = p == p[:, None] if options.exclude == "self" else positive == positive[:, None]
        ratios.append(_contrastive.ratio(own, _contrastive.dense_base(s.T[positive], excluded, options.baseline), options))
    return sum(ratios) / len(ratios)


# Operators -------------------------------------------------------------------------------------------------------------
#
# fwd         of the scores s_pq = row_factor_p col_factor_q <text_p, image_q>, the pairs (p, positive_p) left out: for each
#             row and column the log-sum-exp, or for "max" the largest and where; and the scores of the pairs themselves
# others_fwd  of the pairs' own scores: the same for the other texts of the same image, each text without itself
# bwd, others_bwd  their gradients, for factors that are constants

_library = torch.library.Library("fastcap", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    f"{OP}_fwd(Tensor text, Tensor image, Tensor positive, Tensor row_factor, Tensor col_factor, bool rows, bool cols, "
    "str baseline, str precision, str backend) -> (Tensor own, Tensor row, Tensor row_index, Tensor col, Tensor col_index)",
    tags=_tags,
)
_library.define(
    f"{OP}_bwd(Tensor down, Tensor drow, Tensor dcol, Tensor text, Tensor image, Tensor positive, Tensor row_factor, "
    "Tensor col_factor, Tensor row, Tensor row_index, Tensor col, Tensor col_index, bool need_text, bool need_image, "
    "str baseline, str precision, str backend) -> (Tensor dtext, Tensor dimage)",
    tags=_tags,
)
_library.define(
    f"{OP}_others_fwd(Tensor own, Tensor positive, SymInt Q, str baseline, str backend) -> (Tensor value, Tensor index)",
    tags=_tags,
)
_library.define(
    f"{OP}_others_bwd(Tensor dvalue, Tensor value, Tensor own, Tensor positive, SymInt Q, str backend) -> Tensor", tags=_tags
)


def _fwd_outputs(text: Tensor, image: Tensor, rows: bool, cols: bool, baseline: str) -> Statistics:
    """own [P], row [P], row_index [P] int64, col [Q], col_index [Q] int64; empty where not wanted; unwritten."""
    acc, indices = _dtypes.acc_of(text), baseline == "max"
    P, Q = text.shape[0], image.shape[0]
    return Statistics(
        text.new_empty(P, dtype=acc),
        text.new_empty(P if rows else 0, dtype=acc),
        text.new_empty(P if rows and indices else 0, dtype=torch.int64),
        text.new_empty(Q if cols else 0, dtype=acc),
        text.new_empty(Q if cols and indices else 0, dtype=torch.int64),
    )


@torch.no_grad()
def _fwd(text, image, positive, row_factor, col_factor, rows, cols, baseline, precision, backend):
    _contrastive.check_sizes(OP, text, {"positive": positive, "row_factor": row_factor}, image, {"col_factor": col_factor})
    outputs = _fwd_outputs(text, image, rows, cols, baseline)
    launcher = _launcher(backend, baseline, precision)
    if rows or cols:
        launcher.contrastive_reward_fwd(text, image, positive, row_factor, col_factor, *outputs, baseline, precision)
    else:
        _contrastive.own_scores(text, image, positive, row_factor, col_factor, outputs.own)
    return tuple(outputs)


def _fwd_meta(text, image, positive, row_factor, col_factor, rows, cols, baseline, precision, backend):
    return tuple(_fwd_outputs(text, image, rows, cols, baseline))


def _bwd_outputs(text: Tensor, image: Tensor, need_text: bool, need_image: bool) -> tuple[Tensor, Tensor]:
    """In the dtype of sums, for a gradient through the norms follows."""
    acc = _dtypes.acc_of(text)
    return (
        text.new_empty(text.shape if need_text else (0, text.shape[1]), dtype=acc),
        image.new_empty(image.shape if need_image else (0, image.shape[1]), dtype=acc),
    )


@torch.no_grad()
def _bwd(
    down, drow, dcol, text, image, positive, row_factor, col_factor, row, row_index, col, col_index, need_text, need_image,
    baseline, precision, backend,
):  # fmt: skip
    of_texts = {"positive": positive, "row_factor": row_factor, "down": down}
    of_texts |= {"row": row, "drow": drow} if row.numel() else {}
    of_images = {"col_factor": col_factor} | ({"col": col, "dcol": dcol} if col.numel() else {})
    _contrastive.check_sizes(OP, text, of_texts, image, of_images)
    outputs = _bwd_outputs(text, image, need_text, need_image)
    scores = text, image, positive, row_factor, col_factor
    launcher = _launcher(backend, baseline, precision)
    if baseline == "max" or (row.numel() == 0 and col.numel() == 0):
        _contrastive.sparse_bwd(down, drow, dcol, *scores, row_index, col_index, *outputs)
    else:
        launcher.contrastive_reward_bwd(down, drow, dcol, *scores, row, col, *outputs, precision)
    return outputs


def _bwd_meta(
    down, drow, dcol, text, image, positive, row_factor, col_factor, row, row_index, col, col_index, need_text, need_image,
    baseline, precision, backend,
):  # fmt: skip
    return _bwd_outputs(text, image, need_text, need_image)


def _others_outputs(own: Tensor, positive: Tensor, baseline: str) -> tuple[Tensor, Tensor]:
    """value [P]; index [P] int64 for "max", else empty; unwritten."""
    return torch.empty_like(own), positive.new_empty(own.shape if baseline == "max" else (0,))


@torch.no_grad()
def _others_fwd(own, positive, Q, baseline, backend):
    outputs = _others_outputs(own, positive, baseline)
    _launcher(backend, baseline).contrastive_reward_others_fwd(own, positive, Q, *outputs)
    return outputs


@torch.no_grad()
def _others_bwd(dvalue, value, own, positive, Q, backend):
    down = torch.empty_like(own)
    _launcher(backend).contrastive_reward_others_bwd(dvalue, value, own, positive, Q, down)
    return down


def _launcher(backend: str, baseline: str = "max", precision: str = "highest"):
    """The module that runs a backend; reached here, inside a function, so that importing fastcap imports neither."""
    for name, value, known in (
        ("baseline", baseline, ("logsumexp", "max")),
        ("precision", precision, _embeddings.PRECISIONS),
        ("backend", backend, ("cpp", "triton")),
    ):
        _checks.check_choice(OP, name, value, known, "call the public function")
    if backend == "triton":
        from fastcap.kernels import contrastive_reward as triton_launcher

        return triton_launcher
    from fastcap.ops import _similarity_blocks

    return _similarity_blocks


for _key in ("CPU", "CUDA"):
    _library.impl(f"{OP}_fwd", _fwd, _key)
    _library.impl(f"{OP}_bwd", _bwd, _key)
    _library.impl(f"{OP}_others_fwd", _others_fwd, _key)
    _library.impl(f"{OP}_others_bwd", _others_bwd, _key)
_library.impl(f"{OP}_fwd", _fwd_meta, "Meta")
_library.impl(f"{OP}_bwd", _bwd_meta, "Meta")
_library.impl(
    f"{OP}_others_fwd", lambda own, positive, Q, baseline, backend: _others_outputs(own, positive, baseline), "Meta"
)
_library.impl(f"{OP}_others_bwd", lambda dvalue, value, own, positive, Q, backend: torch.empty_like(own), "Meta")


class _Statistics(torch.autograd.Function):
    """(own, row, row_index, col, col_index) of the similarities; differentiable in text, image and logit_scale."""

    @staticmethod
    def forward(ctx, text, image, logit_scale, positive, options, backend, wanted):
        norms = tuple(_embeddings.inverse_norms(x, options.normalize) for x in (text, image))
        factors = logit_scale * norms[0], norms[1]
        kept = options.statistics
        found = torch.ops.fastcap.contrastive_reward_fwd(text, image, positive, *factors, *kept, options.precision, backend)
        if wanted and any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(text, image, logit_scale, positive, *norms, *found)
            ctx.options = options, backend
        ctx.mark_non_differentiable(found[2], found[4])
        return found

    @staticmethod
    def backward(ctx, down, drow, _, dcol, __):
        text, image, logit_scale, positive, *norms = ctx.saved_tensors[:6]
        own, *found = ctx.saved_tensors[6:]
        options, backend = ctx.options
        need_text, need_image, need_scale = ctx.needs_input_grad[:3]
        factors = logit_scale * norms[0], norms[1]
        dtext, dimage = torch.ops.fastcap.contrastive_reward_bwd(
            down, drow, dcol, text, image, positive, *factors, *found, need_text or need_scale, need_image,
            options.statistics[2], options.precision, backend,
        )  # fmt: skip
        gradients = _contrastive.through_norms(
            text, image, logit_scale, norms, dtext, dimage, options.normalize, ctx.needs_input_grad[:3]
        )
        of = down, drow, dcol, text, image, logit_scale
        return *(None if g is None else once(OP, g, *of) for g in gradients), None, None, None, None


class _Others(torch.autograd.Function):
    """(value, index) of the other texts of each text's image."""

    @staticmethod
    def forward(ctx, own, positive, Q, baseline, backend):
        value, index = torch.ops.fastcap.contrastive_reward_others_fwd(own, positive, Q, baseline, backend)
        ctx.save_for_backward(value, own, positive)
        ctx.options = Q, backend
        ctx.mark_non_differentiable(index)
        return value, index

    @staticmethod
    def backward(ctx, dvalue, _):
        value, own, positive = ctx.saved_tensors
        down = torch.ops.fastcap.contrastive_reward_others_bwd(dvalue, value, own, positive, *ctx.options)
        return once(OP, down, dvalue, own), None, None, None, None


def others(own: Tensor, positive: Tensor, Q: int, baseline: str, backend: str) -> tuple[Tensor, Tensor]:
    """What the other texts of the same image amount to, [P], -inf where there is none; for "max" also which, -1 for none."""
    if baseline == "logsumexp":
        return _Others.apply(own, positive, Q, baseline, backend)
    _, index = torch.ops.fastcap.contrastive_reward_others_fwd(own.detach(), positive, Q, baseline, backend)
    return own[index.clamp_min(0)].where(index >= 0, -torch.inf), index


# Public functions ------------------------------------------------------------------------------------------------------


def _log_ratio(op: str, text, image, positive, logit_scale, group, options: Options) -> tuple[Tensor, Tensor]:
    """(the log-ratio [P], logit_scale as a tensor), both in the dtype of sums. Checks everything."""
    if group is not None:
        from fastcap.ops import _contrastive_ring

        return _contrastive_ring.log_ratio(op, text, image, positive, logit_scale, group, options)
    _contrastive.check_options(op, options)
    pairs = _embeddings.prepare(op, text, image, positive, options.precision)
    scale = _contrastive.scale_of(op, logit_scale, text)
    backend = _backend.select(op, text.device.type, _backend.NO_CUDA)
    if backend == "reference":
        return reference(*pairs[:3], scale, options), scale
    pairs = _contrastive.wide_for_mean(pairs, options)
    own, row, _, col, col_index = _Statistics.apply(
        *pairs[:2], scale, pairs.positive, options, backend, torch.is_grad_enabled()
    )
    ratios = []
    if options.over_images:
        base = _contrastive.mean_over_images(pairs, own, scale, options) if options.baseline == "mean" else row
        ratios.append(_contrastive.ratio(own, base, options))
    if options.over_texts:
        if options.baseline == "mean":
            base = _contrastive.mean_over_texts(pairs, own, scale, options)
        elif pairs.distinct or options.baseline == "none":
            base = col[: text.shape[0]]  # text p belongs to image p: a view. An index is added up by a sort, backward
        else:
            siblings = None
            if options.exclude == "self":
                siblings = others(own, pairs.positive, image.shape[0], options.baseline, backend)
            base = _contrastive.base_over_texts(col, col_index, pairs.positive, siblings, options.baseline)
        ratios.append(_contrastive.ratio(own, base, options))
    return sum(ratios[1:], ratios[0]) / len(ratios), scale


def contrastive_reward(
    text: Tensor,
    image: Tensor,
    *,
    positive: Tensor | None = None,
    logit_scale: float | Tensor = 100.0,
    baseline: str = "logsumexp",
    direction: str = "both",
    exclude: str = "self",
    clamp: tuple[float | None, float | None] | None = None,
    normalize: bool = True,
    precision: str = "highest",
    group: ProcessGroup | None = None,
) -> Tensor:
    """How much more similar each text is to its image than the other pairs of the batch are: a reward for captions.

    Equivalent to::

        t, v = (torch.nn.functional.normalize(x, dim=1) for x in (text, image))
        s = logit_scale * t @ v.T                                              # [P, Q]
        own, p, q = s[range(P), positive], torch.arange(P), torch.arange(Q)
        over_images = s.masked_fill(q == positive[:, None], -inf).logsumexp(1)
        over_texts = s.T[positive].masked_fill(p == p[:, None], -inf).logsumexp(1)
        reward = ((own - over_images) + (own - over_texts)) / 2 / logit_scale  # [P]

    The pair itself leaves each sum exactly, however far it leads. No [P, Q] or [P, P] tensor is made, in neither direction.

    Args:
        text: [P, D] embeddings of texts; float32, float64, float16 or bfloat16, any strides.
        image: [Q, D] embeddings of images, in the dtype of `text`. There may be more of either.
        positive: [P] int64, the row in `image` of each text's image. None: 0 to P - 1, images beyond are no text's.
        logit_scale: the inverse temperature, above 0, a number or a tensor of one, which may need a gradient.
        baseline: what is subtracted: "logsumexp" of the others (decoupled contrastive), their "max", their "mean", or
            "none", which leaves the similarity.
        direction: "text_to_image" compares a text over images, "image_to_text" an image over texts, "both" takes the mean.
        exclude: "self" counts the other texts of the same image among the others of "image_to_text", "group" does not.
        clamp: (lowest, highest) of each direction's log-ratio before it is divided by the scale, None at an open end; the
            published code has (None, 16).
        normalize: whether rows are divided by their length first; lengths below 1e-12 count as that.
        precision: of float32 products on a GPU: "highest" (float32), "high" (TF32) or "medium" (bfloat16), as
            `torch.set_float32_matmul_precision` names them. Half precision inputs are multiplied as they are, and summed in
            float32. On the CPU and under the reference backend torch's own setting holds, which is "highest" unless changed.
        group: processes that hold the rows of `text` and `image` in shards of any sizes, in the order of their ranks;
            `positive` then counts images over all, and by default text p belongs to this process' image p.
            Every process calls, and runs the backward if any wants a gradient: that of the sum over the processes, of which
            logit_scale, the same on all, gets this one's share, as DistributedDataParallel expects. None: all is here.

    Returns:
        [P], differentiable in text, image and logit_scale: float64 for float64 embeddings, else float32. Where nothing is
        left to compare with (a single text or image) the similarity itself. NaN in an embedding reaches the rewards that
        depend on it, and no other.

    Raises:
        FastcapError: an argument breaks its rule; the message names it. On a CUDA device an index out of range gives NaN,
            never a wrong read; FASTCAP_CHECK=1 turns that into the error, at the price of a synchronisation.
        RuntimeError: in a double backward or under a torch.func transform, which only the reference backend supports.

    Deterministic; of equal largest others, the first gets the gradient. Memory: O(P + Q), and a scratch of some MiB; with
    gradients, [P, D] and [Q, D] in the dtype of sums. Without gradients nothing is kept. Copied are embeddings on the CPU
    in half precision or not contiguous, on a GPU where rows are no multiples of 16 numbers; by "mean" both, in float64.

    Source: Chaffin, Claveau and Kijak, Distinctive Image Captioning: Leveraging Ground Truth Captions in CLIP Guided
    Reinforcement Learning (arXiv:2402.13936); Yeh et al., Decoupled Contrastive Learning (arXiv:2110.06848), equation 6.

    >>> import torch
    >>> contrastive_reward(torch.eye(2), torch.eye(2), logit_scale=10.0)  # each leads its only rival by a cosine of 1
    tensor([1., 1.])
    """
    options = Options(baseline, direction, exclude, clamp, normalize, precision)
    ratio, scale = _log_ratio(OP, text, image, positive, logit_scale, group, options)
    return ratio / scale


def decoupled_contrastive_loss(
    text: Tensor,
    image: Tensor,
    *,
    positive: Tensor | None = None,
    logit_scale: float | Tensor = 100.0,
    baseline: str = "logsumexp",
    direction: str = "both",
    exclude: str = "self",
    clamp: tuple[float | None, float | None] | None = None,
    normalize: bool = True,
    precision: str = "highest",
    group: ProcessGroup | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss that trains a CLIP without its pair in the denominator: -logit_scale times `contrastive_reward`.

    Equivalent to::

        -(logit_scale * contrastive_reward(text, image, ...)).mean()

    Args:
        text, image, positive, logit_scale, ..., group: as in `contrastive_reward`.
        reduction: "mean" over the texts, "sum", or "none" for [P]. Over a group, each process' own texts: what gradients
            reach an embedding are those of the sum of all processes' losses.

    Returns:
        A scalar, or [P]: float64 for float64 embeddings, else float32. The mean over no texts is 0.

    Raises, is deterministic and takes memory as `contrastive_reward` does.

    Source: Yeh et al. (arXiv:2110.06848), equation 6.

    >>> import torch
    >>> decoupled_contrastive_loss(torch.eye(2), torch.eye(2), logit_scale=10.0).item()
    -10.0
    """
    op = "decoupled_contrastive_loss"
    _checks.check_choice(op, "reduction", reduction, ("mean", "sum", "none"), "pass reduction='mean'")
    options = Options(baseline, direction, exclude, clamp, normalize, precision)
    loss = -_log_ratio(op, text, image, positive, logit_scale, group, options)[0]
    if reduction == "none":
        return loss
    return loss.sum() / max(loss.shape[0], 1) if reduction == "mean" else loss.sum()
