"""The parts of contrastive_reward that are plain torch on every device, O((P + Q) D) at most: its options and their checks,
the pairs' own scores, gradients with one entry a row, the mean as a baseline, and how a log-ratio is put together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _checks, _dtypes, _embeddings
from fastcap.ops._embeddings import Embeddings

BASELINES = ("logsumexp", "max", "mean", "none")
DIRECTIONS = ("both", "text_to_image", "image_to_text")
EXCLUDES = ("self", "group")


class Options(NamedTuple):
    """The keyword arguments of contrastive_reward of that name."""

    baseline: str
    direction: str
    exclude: str
    clamp: tuple[float | None, float | None] | None
    normalize: bool
    precision: str

    @property
    def over_images(self) -> bool:
        """Text to image: a text is compared over images."""
        return self.direction != "image_to_text"

    @property
    def over_texts(self) -> bool:
        return self.direction != "text_to_image"

    @property
    def statistics(self) -> tuple[bool, bool, str]:
        """(rows, cols, baseline) asked of the operators; a mean or nothing needs no similarities but the pairs'."""
        if self.baseline in ("mean", "none"):
            return False, False, "logsumexp"
        return self.over_images, self.over_texts, self.baseline


class Statistics(NamedTuple):
    own: Tensor  # [P] the scores of the pairs
    row: Tensor  # [P] of the other images, for each text
    row_index: Tensor
    col: Tensor  # [Q] of the texts of other images, for each image
    col_index: Tensor


def check_options(op: str, options: Options) -> None:
    choices = (("baseline", BASELINES), ("direction", DIRECTIONS), ("exclude", EXCLUDES))
    for name, known in choices:
        _checks.check_choice(op, name, getattr(options, name), known, f"pass {name}={known[0]!r}")
    if not isinstance(options.normalize, bool):
        raise bad(op, "normalize", "be True or False", options.normalize, "pass normalize=True")
    if options.clamp is None:
        return
    remedy = "pass clamp=(None, 16.0), or None for none"
    if not isinstance(options.clamp, (tuple, list)) or len(options.clamp) != 2:
        raise bad(op, "clamp", "be None or a pair (lowest, highest)", options.clamp, remedy)
    ends = [math.inf * (-1) ** (i == 0) if end is None else end for i, end in enumerate(options.clamp)]
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends)
    if not numbers or not ends[0] <= ends[1]:  # NaN fails too
        raise bad(op, "clamp", "hold numbers or None, the lowest first", tuple(options.clamp), remedy)


def scale_of(op: str, logit_scale: float | Tensor, text: Tensor) -> Tensor:
    """logit_scale as a tensor [] in the dtype of sums, on the device of `text`."""
    acc, rule = _dtypes.acc_of(text), "be a finite number above 0, or a tensor of one"
    remedy = "pass logit_scale=100.0, or exp of the learnt parameter"
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1 or not logit_scale.is_floating_point():
            raise bad(op, "logit_scale", rule, f"{logit_scale.dtype} {list(logit_scale.shape)}", remedy)
        _checks.check_device(op, "logit_scale", logit_scale, text)
        if _checks.checks_values(logit_scale):
            value = logit_scale.item()
            if value <= 0 or value == math.inf:  # NaN is the computation's own, and stays visible in what comes out
                raise bad(op, "logit_scale", rule, value, remedy)
            _check_range(op, value, acc)
        return logit_scale.reshape(()).to(acc)
    is_number = isinstance(logit_scale, (int, float)) and not isinstance(logit_scale, bool)
    if not is_number or not 0 < logit_scale < math.inf:
        raise bad(op, "logit_scale", rule, logit_scale, remedy)
    _check_range(op, logit_scale, acc)
    return torch.full((), float(logit_scale), dtype=acc, device=text.device)


def _check_range(op: str, scale: float, acc: torch.dtype) -> None:
    """`scale` is neither 0 nor infinite in the dtype of sums, which may be narrower than its own."""
    range = torch.finfo(acc)
    if scale < range.tiny or scale > range.max:
        rule = f"lie in [{range.tiny:.3g}, {range.max:.3g}], where sums are {str(acc).removeprefix('torch.')}"
        raise bad(op, "logit_scale", rule, scale, "scale the embeddings' similarities less, such as by 100.0")


def check_sizes(op: str, text: Tensor, of_texts: dict[str, Tensor], image: Tensor, of_images: dict[str, Tensor]) -> None:
    """Vectors fit the texts and images: launchers take slices of them, and a slice of one too long is no error."""
    for n, letters, vectors in ((text.shape[0], "[P]", of_texts), (image.shape[0], "[Q]", of_images)):
        for name, x in vectors.items():
            _checks.check_shape(op, name, x, (n,), letters, "call the public function")


# Scores of pairs -------------------------------------------------------------------------------------------------------


def here(positive: Tensor, Q: int) -> tuple[Tensor, Tensor]:
    """(whether each text's image is one of Q, an index that is safe to read)."""
    return (positive >= 0) & (positive < Q), _readable(positive, Q)


def _readable(positive: Tensor, Q: int) -> Tensor:
    return positive.clamp(0, max(Q - 1, 0))


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> [N], in their dtype: autocast has it made in half precision."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.linalg.vecdot(x, y)


def own_scores(
    text: Tensor, image: Tensor, positive: Tensor, row_factor: Tensor, col_factor: Tensor, own: Tensor
) -> None:  # fmt: skip
    """Writes own [P], the score of each text and its image; NaN where that is not one of these images."""
    if image.shape[0] == 0:
        own.fill_(torch.nan)
        return
    mine, index = here(positive, image.shape[0])
    dots = _dots(text.to(own.dtype), image[index].to(own.dtype))
    own.copy_((dots * row_factor * col_factor[index]).where(mine, torch.nan))


def sparse_bwd(
    down: Tensor, drow: Tensor, dcol: Tensor, text: Tensor, image: Tensor, positive: Tensor, row_factor: Tensor,
    col_factor: Tensor, row_index: Tensor, col_index: Tensor, dtext: Tensor, dimage: Tensor,
) -> None:  # fmt: skip
    """The gradient where each row and column of the scores has one entry besides the pair: its largest, or none."""
    dtext.zero_()
    dimage.zero_()
    p = torch.arange(text.shape[0], device=text.device)
    q = torch.arange(image.shape[0], device=text.device)
    _add_entries(p, positive, down, text, image, row_factor, col_factor, dtext, dimage)
    if row_index.numel():
        _add_entries(p, row_index, drow, text, image, row_factor, col_factor, dtext, dimage)
    if col_index.numel():
        _add_entries(col_index, q, dcol, text, image, row_factor, col_factor, dtext, dimage)


def _add_entries(p, q, ds, text, image, row_factor, col_factor, dtext, dimage) -> None:
    """Adds the gradient of the scores (p_i, q_i), which is ds_i; those outside are none. Deterministic: no atomics."""
    if not text.shape[0] or not image.shape[0]:
        return
    (has_p, p), (has_q, q) = here(p, text.shape[0]), here(q, image.shape[0])
    counts = has_p & has_q
    d = (ds * row_factor[p] * col_factor[q]).where(counts, 0.0)[:, None]
    skipped = ~counts[:, None]  # 0 times what is not finite would be NaN
    if dtext.shape[0]:
        dtext.index_put_((p,), (d * image[q].to(d.dtype)).masked_fill(skipped, 0.0), accumulate=True)
    if dimage.shape[0]:
        dimage.index_put_((q,), (d * text[p].to(d.dtype)).masked_fill(skipped, 0.0), accumulate=True)


@torch.no_grad()  # under create_graph=True grad mode is on
def through_norms(
    text: Tensor, image: Tensor, scale: Tensor, norms: list[Tensor], dtext: Tensor, dimage: Tensor, normalize: bool,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of text, image and logit_scale, from those that take the factors of rows and columns for constants.

    Scaling a row of text scales its scores, and so does logit_scale: both need <text_p, dtext_p> = sum_q ds_pq s_pq only.
    """
    gradients: list[Tensor | None] = []
    along = None
    for x, dx, inverse, need in ((text, dtext, norms[0], needed[0] or needed[2]), (image, dimage, norms[1], needed[1])):
        if not need:
            gradients.append(None)
            continue
        moved = _dots(x.to(dx.dtype), dx) if normalize or x is text else None
        along = moved if along is None else along
        if normalize:
            shrink = (moved * inverse * inverse).masked_fill(inverse >= 1 / _embeddings.EPS, 0.0)
            dx.addcmul_(x.to(dx.dtype), shrink[:, None], value=-1)  # nobody else's memory
        gradients.append(dx.to(x.dtype))
    return [gradients[0] if needed[0] else None, gradients[1], along.sum() / scale if needed[2] else None]


# Baselines -------------------------------------------------------------------------------------------------------------


def ratio(own: Tensor, base: Tensor, options: Options) -> Tensor:
    """own - base, clamped; own where base is -inf: with nothing to compare with, the similarity itself."""
    if options.baseline != "none":
        own = own - base.masked_fill(base == -torch.inf, 0.0)
    ends = options.clamp or (None, None)
    return own if ends[0] is None and ends[1] is None else own.clamp(*ends)


def dense_base(s: Tensor, excluded: Tensor, baseline: str) -> Tensor:
    """What the scores [P, n] of each row amount to without the excluded ones; -inf where none are left."""
    left = ~excluded.all(1)
    if baseline == "none":
        return torch.full_like(s[:, 0], -torch.inf)
    if baseline == "mean":
        base = s.masked_fill(excluded, 0.0).sum(1) / (~excluded).sum(1).clamp_min(1)
    else:
        s = s.masked_fill(excluded & left[:, None], -torch.inf)
        base = s.logsumexp(1) if baseline == "logsumexp" else s.max(1).values
    return base.where(left, -torch.inf)


def base_over_texts(
    col: Tensor, col_index: Tensor, positive: Tensor, siblings: tuple[Tensor, Tensor] | None, baseline: str
) -> Tensor:  # fmt: skip
    """Of each text, what the other texts amount to for its image: texts of other images, and its siblings if any count."""
    q = _readable(positive, col.shape[0])
    if siblings is None:
        return col[q]
    value, index = siblings
    if baseline == "max":
        first = (value > col[q]) | ((value == col[q]) & (index < col_index[q])) | value.isnan()
        return value.where(first & (index >= 0), col[q])
    return _logaddexp(col[q], value)


def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """torch.logaddexp with a gradient of 0, not NaN, where both are -inf."""
    none = (x == -torch.inf) & (y == -torch.inf)
    return torch.logaddexp(x.masked_fill(none, 0.0), y).masked_fill(none, -torch.inf)


def wide_for_mean(pairs: Embeddings, options: Options) -> Embeddings:
    """In the dtype of sums if the mean is the baseline: an embedding's gradients through it and through the pair then cancel
    before they are rounded to half precision, not after."""
    if options.baseline != "mean":
        return pairs
    acc = _dtypes.acc_of(pairs.text)
    return pairs._replace(text=pairs.text.to(acc), image=pairs.image.to(acc))


def mean_over_images(pairs: Embeddings, own: Tensor, scale: Tensor, options: Options) -> Tensor:
    """The mean similarity of a text and the other images: the similarity to their sum, in float64."""
    t, v = (_embeddings.normalized(x.double(), options.normalize) for x in pairs[:2])
    total = scale.double() * (t @ v.sum(0))
    return mean_of(total - own, v.shape[0] - 1).to(own.dtype)


def mean_over_texts(pairs: Embeddings, own: Tensor, scale: Tensor, options: Options) -> Tensor:
    """The mean similarity of a text's image and the other texts; with exclude="group", the texts of other images."""
    t, v = (_embeddings.normalized(x.double(), options.normalize) for x in pairs[:2])
    P, Q = t.shape[0], v.shape[0]
    q = here(pairs.positive, Q)[1]
    if options.exclude == "self" or pairs.distinct:
        total = scale.double() * (v @ t.sum(0))
        return mean_of(total[q] - own, P - 1).to(own.dtype)
    # What is not finite stays out of the sums: the texts of an image must not see one of their own.
    broken = ~t.isfinite().all(1)
    whole = own.masked_fill(broken, 0.0).double()
    total = scale.double() * (v @ t.masked_fill(broken[:, None], 0.0).sum(0))
    count, bad_ones, inside = (x.new_zeros(Q) for x in (whole, whole, whole))
    count = count.index_put((q,), torch.ones_like(whole), accumulate=True)
    bad_ones = bad_ones.index_put((q,), broken.double(), accumulate=True)
    inside = inside.index_put((q,), whole, accumulate=True)
    left = P - count[q]
    mean = (total - inside)[q] / left.clamp_min(1)
    mean = mean.masked_fill(broken.sum() > bad_ones[q], torch.nan)
    return mean.masked_fill(left < 1, -torch.inf).to(own.dtype)


def mean_of(total: Tensor, count: int) -> Tensor:
    return total / count if count else torch.full_like(total, -torch.inf)
