"""Where each text's image stands among all images, and each text among all texts, by similarity: what recall@k and mean
ranks are made of, without the [P, Q] similarities ever in memory.

The story, top to bottom: what is computed (`reference`, plain torch), the operators of `torch.ops.fastcap` with their CPU,
CUDA and Meta implementations, and the public functions. `_rank_blocks.py` holds the CPU's loop over blocks of scores. When a
tie is a tie, and the costs, are in docs/math/retrieval_ranks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _backend, _checks, _embeddings

OP = "retrieval_ranks"


class Counts(NamedTuple):
    """How many others score higher than each text and its image, or just as high; [P] int64."""

    above_images: Tensor
    tied_images: Tensor
    above_texts: Tensor
    tied_texts: Tensor


def reference(text: Tensor, image: Tensor, positive: Tensor, normalize: bool) -> tuple[Tensor, Counts]:
    """(the scores [P] of the pairs, the counts) in plain torch, in float64. O(P Q + P^2) memory.

    Equal embeddings take the scores of the first of them: a product may round the same dot product differently elsewhere.
    """
    own_image, others = _embeddings_here(positive, image.shape[0])
    if text.shape[0] == 0 or image.shape[0] == 0:
        own = text.new_full((text.shape[0],), torch.nan, dtype=torch.float64)
        return own, Counts(*(torch.zeros_like(positive) for _ in Counts._fields))
    (t, r, first), (v, c, first_image) = (_described(x, normalize) for x in (text, image))
    with torch.autocast(text.device.type, enabled=False):
        s = (t @ v.T)[first][:, first_image] * r[:, None] * c
    own = s.gather(1, others[:, None]).squeeze(1).where(own_image, torch.nan)
    over_texts = s.T[others]  # [P, P]: the scores of all texts with the image of each
    return own, Counts(
        (s > own[:, None]).sum(1),
        (s == own[:, None]).sum(1) - own_image.long() + own.isnan() * own_image,  # itself, unless it is NaN
        (over_texts > own[:, None]).sum(1),
        (over_texts == own[:, None]).sum(1) - own_image.long() + own.isnan() * own_image,
    )


def _embeddings_here(positive: Tensor, Q: int) -> tuple[Tensor, Tensor]:
    """(whether each text's image is one of Q, an index that is safe to read)."""
    return (positive >= 0) & (positive < Q), positive.clamp(0, max(Q - 1, 0))


def _described(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(x in float64, the factors of its rows, the first row that equals each)."""
    norm, same = _norms(x), _same_rows(x)
    factor = norm.clamp_min(_embeddings.EPS).reciprocal() if normalize else torch.ones_like(norm)
    return x.double(), factor[same], same


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)


_ROWS_AT_ONCE = 16_384


def _same_rows(x: Tensor) -> Tensor:
    """[N] int64: the first row that equals each one; itself for a row with NaN. No shape depends on values."""
    N = x.shape[0]
    if N == 0:
        return x.new_empty(0, dtype=torch.int64)
    keys = torch.cat([_row_keys(x[i : i + _ROWS_AT_ONCE]) for i in range(0, N, _ROWS_AT_ONCE)])
    order = keys.argsort(stable=True)
    rows = x[order]
    differs = torch.cat([order.new_ones(1), (rows[1:] != rows[:-1]).any(1).long()])
    start = (differs * torch.arange(N, device=x.device)).cummax(0).values
    return torch.empty_like(order).scatter(0, order, order[start])


def _row_keys(x: Tensor) -> Tensor:
    """[N] int64, equal for equal rows, and nearly surely only for these. Sums of integers: exact in any order."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = (x + 0.0).contiguous().view(integers).long()  # + 0.0: of -0, 0
    bits = bits ^ (bits >> 32) ^ (bits >> 16)  # the low bits of a number that was converted are 0
    w = torch.arange(1, x.shape[1] + 1, device=x.device) * -7046029254386353131
    w = (w ^ (w >> 30)) * -4658895280553007687
    return (bits * ((w ^ (w >> 27)) | 1)).sum(1)


# Operators -------------------------------------------------------------------------------------------------------------
#
# own  what is needed once: the scores of the pairs (NaN where positive is out of range), the norms of texts and images, the
#      first text or image that equals each, and the texts in the order of their images
# fwd  the counts over the rows [begin, end): whole for those rows over images, and their part for all texts over texts. 0
#      where the own score is NaN

_library = torch.library.Library("fastcap", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    f"{OP}_own(Tensor text, Tensor image, Tensor positive, bool normalize, str backend) -> "
    "(Tensor own, Tensor text_norm, Tensor image_norm, Tensor text_same, Tensor image_same, Tensor order)",
    tags=_tags,
)
_library.define(
    f"{OP}_fwd(Tensor text, Tensor image, Tensor positive, Tensor own, Tensor text_norm, Tensor image_norm, "
    "Tensor text_same, Tensor image_same, Tensor order, bool normalize, SymInt begin, SymInt end, str backend) -> "
    "(Tensor above_images, Tensor tied_images, Tensor above_texts, Tensor tied_texts)",
    tags=_tags,
)


def _own_outputs(text: Tensor, image: Tensor) -> tuple[Tensor, ...]:
    """own [P], text_norm [P], image_norm [Q] float64; text_same [P], image_same [Q], order [P] int64; unwritten."""
    P, Q = text.shape[0], image.shape[0]
    norms = (text.new_empty(n, dtype=torch.float64) for n in (P, P, Q))
    return *norms, *(text.new_empty(n, dtype=torch.int64) for n in (P, Q, P))


@torch.no_grad()
def _own(text, image, positive, normalize, backend):
    _check_embeddings(text, image, positive)
    outputs = _own_outputs(text, image)
    own, text_norm, image_norm, text_same, image_same, order = outputs
    launcher = _launcher(backend)
    if backend == "triton":
        for x, norm, same in ((text, text_norm, text_same), (image, image_norm, image_same)):
            same.copy_(_same_rows(x))
            norm.copy_(_norms(x)[same])
    launcher.retrieval_ranks_own(text, image, positive, normalize, *outputs[:5])
    order.copy_(positive.argsort(stable=True))
    return outputs


def _own_meta(text, image, positive, normalize, backend):
    return _own_outputs(text, image)


def _fwd_outputs(text: Tensor, begin: int, end: int) -> Counts:
    P = text.shape[0]
    return Counts(*(text.new_empty(n, dtype=torch.int64) for n in (end - begin, end - begin, P, P)))


@torch.no_grad()
def _fwd(
    text, image, positive, own, text_norm, image_norm, text_same, image_same, order, normalize, begin, end, backend
):  # fmt: skip
    _check_embeddings(text, image, positive)
    P, Q = text.shape[0], image.shape[0]
    vectors = {"own": own, "text_norm": text_norm, "image_norm": image_norm}
    indices = {"text_same": text_same, "image_same": image_same, "order": order}
    for name, x in {**vectors, **indices}.items():
        _checks.check_shape(OP, name, x, (Q if name.startswith("image") else P,), "[P] or [Q]", "call the public function")
        dtype = torch.float64 if name in vectors else torch.int64
        _checks.check_dtype(OP, name, x, (dtype,), "call the public function")
    if not 0 <= begin <= end <= P:
        raise bad(OP, "begin", f"lie in [0, end] and end in [begin, {P}]", (begin, end), "call the public function")
    given = (x.contiguous() for x in (*vectors.values(), *indices.values()))
    counts = _fwd_outputs(text, begin, end)
    _launcher(backend).retrieval_ranks_fwd(text, image, positive, normalize, *given, begin, end, counts)
    return tuple(counts)


def _fwd_meta(
    text, image, positive, own, text_norm, image_norm, text_same, image_same, order, normalize, begin, end, backend
):  # fmt: skip
    return tuple(_fwd_outputs(text, begin, end))


def _check_embeddings(text: Tensor, image: Tensor, positive: Tensor) -> None:
    """What the public functions pass holds this; an operator called by hand is held to it too."""
    remedy = "call the public function"
    if text.dim() != 2 or image.dim() != 2 or text.shape[1] != image.shape[1] or text.dtype != image.dtype:
        shapes = [*text.shape], [*image.shape]
        raise bad(OP, "text and image", "be [P, D] and [Q, D] of one dtype", shapes, remedy)
    _checks.check_dtype(OP, "text", text, _checks.FLOATS, remedy)
    _checks.check_shape(OP, "positive", positive, (text.shape[0],), "[P]", remedy)
    _checks.check_dtype(OP, "positive", positive, (torch.int64,), remedy)


def _launcher(backend: str):
    """The module that runs a backend; reached here, inside a function, so that importing fastcap imports neither."""
    _checks.check_choice(OP, "backend", backend, ("cpp", "triton"), "call the public function")
    if backend == "triton":
        from fastcap.kernels import retrieval_ranks as triton_launcher

        return triton_launcher
    from fastcap.ops import _rank_blocks

    return _rank_blocks


for _key in ("CPU", "CUDA"):
    _library.impl(f"{OP}_own", _own, _key)
    _library.impl(f"{OP}_fwd", _fwd, _key)
_library.impl(f"{OP}_own", _own_meta, "Meta")
_library.impl(f"{OP}_fwd", _fwd_meta, "Meta")


# Public functions ------------------------------------------------------------------------------------------------------

# Rows between two calls of `progress`: a block of the CPU's; a GPU is waited for at each.
_STEP = {"cpp": 512, "triton": 16_384}
Progress = Callable[[int, int], None]


def _count(
    op: str, text: Tensor, image: Tensor, positive: Tensor | None, normalize: bool, progress: Progress | None
) -> tuple[Tensor, Counts]:  # fmt: skip
    """(which pairs have no score [P] bool, the counts). Checks everything."""
    if not isinstance(normalize, bool):
        raise bad(op, "normalize", "be True or False", normalize, "pass normalize=True")
    if progress is not None and not callable(progress):
        raise bad(op, "progress", "be None or a function of (rows done, rows in all)", progress, "pass None")
    text, image, positive, _ = _embeddings.prepare(op, text, image, positive, "highest")
    text, image = text.detach(), image.detach()
    P, Q = text.shape[0], image.shape[0]
    backend = _backend.select(op, text.device.type, _backend.NO_CUDA)
    if backend == "reference":
        own, counts = reference(text, image, positive, normalize)
        if progress is not None:
            progress(P, P)
    else:
        own, *of = torch.ops.fastcap.retrieval_ranks_own(text, image, positive, normalize, backend)
        given = text, image, positive, own, *of, normalize
        if progress is None:
            counts = Counts(*torch.ops.fastcap.retrieval_ranks_fwd(*given, 0, P, backend))
        else:
            counts = _count_in_steps(given, P, backend, progress)
    none = own.isnan()
    others = max(Q - 1, 0), 0, max(P - 1, 0), 0
    return none, Counts(*(x.masked_fill(none, n) for x, n in zip(counts, others, strict=True)))


def _count_in_steps(given: tuple, P: int, backend: str, progress: Progress) -> Counts:
    # Made once: outputs of a step that are kept would lie between what the next ones free, and the heap would only grow.
    counts = Counts(*(torch.zeros_like(given[2]) for _ in Counts._fields))
    for begin in range(0, P, _STEP[backend]):
        end = min(begin + _STEP[backend], P)
        parts = torch.ops.fastcap.retrieval_ranks_fwd(*given, begin, end, backend)
        for whole, part in zip(counts[:2], parts[:2], strict=True):
            whole[begin:end] = part
        for total, part in zip(counts[2:], parts[2:], strict=True):
            total.add_(part)
        if given[0].is_cuda:  # else rows would be reported that are only queued
            torch.cuda.synchronize(given[0].device)
        progress(end, P)
    return counts


def retrieval_counts(
    text: Tensor,
    image: Tensor,
    *,
    positive: Tensor | None = None,
    normalize: bool = True,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many other images score higher with each text than its own image does, how many as high, and the same of texts.

    Equivalent to::

        t, v = (torch.nn.functional.normalize(x.double(), dim=1) for x in (text, image))
        s = t @ v.T                                                             # [P, Q]
        own, p, q = s[range(P), positive], torch.arange(P), torch.arange(Q)
        other_images, other_texts = q != positive[:, None], p != p[:, None]
        above_images = ((s > own[:, None]) & other_images).sum(1)               # [P]
        tied_images = ((s == own[:, None]) & other_images).sum(1)
        above_texts = ((s.T[positive] > own[:, None]) & other_texts).sum(1)
        tied_texts = ((s.T[positive] == own[:, None]) & other_texts).sum(1)

    Both directions come from one pass over the products, and no [P, Q] tensor is made.

    Args:
        text: [P, D] embeddings of texts; float32, float64, float16 or bfloat16, any strides.
        image: [Q, D] embeddings of images, in the dtype of `text`. There may be more of either.
        positive: [P] int64, the row in `image` of each text's image. None: 0 to P - 1, images beyond are no text's.
        normalize: whether rows are divided by their length first; lengths below 1e-12 count as that.
        progress: called with (rows done, rows in all) after each block of texts; on a GPU each is waited for. Not under
            torch.compile.

    Returns:
        (above_images, tied_images, above_texts, tied_texts), [P] int64 each. Other texts of the same image count among the
        texts like any other. NaN scores neither above nor as high as anything; of a text whose own score is NaN all others
        count as above, and none as tied.

    Raises:
        FastcapError: an argument breaks its rule; the message names it. On a CUDA device an index out of range gives a NaN
            score, never a wrong read; FASTCAP_CHECK=1 turns that into the error, at the price of a synchronisation.

    Integers: there is no gradient, whatever the embeddings require. Deterministic. Equal embeddings tie, exactly. On the CPU
    and under the reference backend the counts are those of float64 scores, whatever the dtype; Triton's scores are
    float32 sums (float64 for float64), so that embeddings which are not equal may be ordered differently where their scores
    differ by a rounding. Memory: O(P + Q) and a scratch of some MiB on the CPU; on a GPU also a copy of the embeddings.

    >>> import torch
    >>> text, image = torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.eye(2)
    >>> retrieval_counts(text, image)  # the second text is nearer to the first image than to its own
    (tensor([0, 1]), tensor([0, 0]), tensor([0, 0]), tensor([0, 0]))
    """
    return tuple(_count("retrieval_counts", text, image, positive, normalize, progress)[1])


def retrieval_ranks(
    text: Tensor,
    image: Tensor,
    *,
    positive: Tensor | None = None,
    normalize: bool = True,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The rank of each text's image among all images, and of each text among all texts for its image; 1 is best.

    Equivalent to::

        above_images, tied_images, above_texts, tied_texts = retrieval_counts(text, image, ...)
        1 + above_images + tied_images / 2, 1 + above_texts + tied_texts / 2

    A tie counts half: of two equal best images each has rank 1.5. For recall@k, `(ranks <= k).double().mean()` takes such a
    text for found or not; `retrieval_counts` has what a share of it needs.

    Args:
        text, image, positive, normalize, progress: as in `retrieval_counts`.

    Returns:
        (ranks over images, ranks over texts), [P] float64 each, for float32 has no halves beyond 2^23. Other texts of the
        same image compete. NaN where the text's own score is NaN: it has no rank, and counts as found at no k.

    Raises:
        FastcapError: as `retrieval_counts`.

    No gradient; deterministic; precision and memory as `retrieval_counts`.

    >>> import torch
    >>> retrieval_ranks(torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.eye(2))
    (tensor([1., 2.], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """
    none, counts = _count(OP, text, image, positive, normalize, progress)
    ranks = (1 + above + tied.double() / 2 for above, tied in (counts[:2], counts[2:]))
    return tuple(rank.masked_fill(none, torch.nan) for rank in ranks)
