"""Bytes and FLOPs that an operation cannot do without: small formulas, checked by hand in tests/test_benchmarks.py."""

from __future__ import annotations

from typing import NamedTuple

import torch

SECTOR = {"cpu": 64, "cuda": 32}  # the least that memory hands over for one gathered number: a cache line, a sector
PER_TERM = 3  # FLOPs of one term of a logsumexp or of its gradient: subtract, exp, then add or multiply


class Traffic(NamedTuple):
    """What must move to and from memory, and be computed, at least."""

    bytes: int
    flops: int


class Counts(NamedTuple):
    """What a batch of targets asks for."""

    positions: int  # B * T
    valid: int
    captions: int  # with at least one valid token
    pairs: int  # sum over captions of valid tokens x distinct ids: the gathered logits
    distinct: int  # sum over captions of distinct ids
    words: int  # distinct ids of the batch


def count(target: torch.Tensor, ignore_index: int = -100) -> Counts:
    """Counts of target [B, T]."""
    rows = [[y for y in row if y != ignore_index] for row in target.tolist()]
    return Counts(
        target.numel(),
        sum(len(row) for row in rows),
        sum(bool(row) for row in rows),
        sum(len(row) * len(set(row)) for row in rows),
        sum(len(set(row)) for row in rows),
        len(set().union(*rows)),
    )


def subset_cross_entropy(
    target: torch.Tensor, V: int, itemsize: int, *, rows: str, gathers: bool, backward: bool, sector: int
) -> Traffic:
    """The floor of subset_cross_entropy from logits.

    Forward: the targets (8 bytes each), V logits of each row whose loss runs over the vocabulary, and a sector for each
    logit gathered from the other rows. Backward: the dense gradient written, and the logits of the dense rows read
    again.

    Args:
        target: [B, T] int64; -100 is ignored.
        V: vocabulary size.
        itemsize: bytes of a logit.
        rows: the rows that need the whole vocabulary: "none", "first" (the first token of each caption) or "all".
        gathers: whether tokens choose among their caption's words, in addition to those rows.
        backward: whether the gradient is formed too.
        sector: bytes moved to gather one logit.
    """
    counts = count(target)
    dense = {"none": 0, "first": counts.captions, "all": counts.valid}[rows]
    terms = counts.pairs if gathers else 0
    moved = 0 if rows == "all" else terms  # a row that is read whole holds its candidates already
    if rows == "first":  # whose loss is over the vocabulary alone
        terms, moved = terms - counts.distinct, moved - counts.distinct
    read = 8 * counts.positions + dense * V * itemsize + moved * sector
    flops = PER_TERM * (terms + dense * V)
    if backward:
        read += (counts.positions + dense) * V * itemsize
        flops *= 2
    return Traffic(read, flops)


def linear_subset_cross_entropy(
    target: torch.Tensor,
    V: int,
    H: int,
    itemsize: int,
    *,
    rows: str,
    gathers: bool,
    backward: bool,
    grad_weight: str = "dense",
) -> Traffic:
    """The floor of linear_subset_cross_entropy, with the head W [V, H].

    Forward: the targets, the hidden state of each valid token, and of W the rows that are used, each once: those of the
    batch's words, or all where some row runs over the vocabulary. The logits are written nowhere. Backward: the same
    numbers of the hidden states and of W read once more (what dW multiplies, and what dh does), dh written, and dW:
    whole ("dense"), or the rows that are used, with an id of 8 bytes each ("sparse") or read first ("accumulate").

    FLOPs: of the matrix products alone, 2 H for each logit that is used, forward, and twice that again backward. With no
    ignored token and no repeated word that is 3 x 2 N T H for the subset and 6 N V H for the vocabulary.

    Args:
        target: [B, T] int64; -100 is ignored.
        V: vocabulary size.
        H: hidden width.
        itemsize: bytes of a number of the hidden states and of W.
        rows: the rows that need the whole vocabulary: "none", "first" (the first token of each caption) or "all".
        gathers: whether tokens choose among their caption's words, in addition to those rows.
        backward: whether the gradients of the hidden states and of W are formed too.
        grad_weight: the form of dW: "dense", "sparse" or "accumulate".
    """
    counts = count(target)
    dense = {"none": 0, "first": counts.captions, "all": counts.valid}[rows]
    terms = counts.pairs if gathers and rows != "all" else 0  # among the logits of a row that is whole are the subset's
    if rows == "first":
        terms -= counts.distinct
    used = V if dense else counts.words
    read = 8 * counts.positions + (counts.valid + used) * H * itemsize
    flops = 2 * H * (terms + dense * V)
    if not backward:
        return Traffic(read, flops)
    written = counts.positions * H * itemsize
    written += {
        "dense": V * H * itemsize,
        "sparse": used * (H * itemsize + 8),
        "accumulate": 2 * used * H * itemsize,
    }[grad_weight]
    return Traffic(2 * read - 8 * counts.positions + written, 3 * flops)


def additive_attention(B: int, L: int, A: int, D: int, itemsize: int, *, steps: int, backward: bool) -> Traffic:
    """The floor of `steps` calls of additive_attention to the same keys [B, L, A] and values [B, L, D].

    Each step reads keys and values whole, forward, and again backward (for the gradients of query and alpha), for the next
    step is not known before; their gradients are written once. One more read of keys serves the gradient of keys where there
    are several steps, one step has it on the way. What is of the size of queries, contexts and alphas is left out.

    FLOPs: 4 a key forward (add, activation, multiply, add) and 8 backward (add, activation, its slope, and the products and
    sums for the gradients of keys, query and v), 2 a value forward and 3 backward.
    """
    keys, values = B * L * A, B * L * D
    moved = steps * (keys + values)
    flops = steps * (4 * keys + 2 * values)
    if backward:
        moved += steps * (keys + values) + keys + values + (keys if steps > 1 else 0)
        flops += steps * (8 * keys + 3 * values)
    return Traffic(moved * itemsize, flops)


def attention_coverage_from_scores(B: int, heads: int, T: int, L: int, E: int, itemsize: int, *, backward: bool) -> Traffic:
    """The floor of attention_coverage_from_scores, with queries [B, heads, T, E] and keys [B, heads, L, E].

    Bytes: queries and keys read, and again backward, where their gradients are written; the [B, heads, T, L] weights are
    written nowhere, and the sums [B, heads, L] are left out. FLOPs: of the matrix products alone: the scores, made again
    backward, and two for the gradients.
    """
    inputs, product = B * heads * (T + L) * E * itemsize, 2 * B * heads * T * L * E
    return Traffic(3 * inputs, 4 * product) if backward else Traffic(inputs, product)


def contrastive_reward(P: int, Q: int, D: int, itemsize: int, *, backward: bool) -> Traffic:
    """The floor of contrastive_reward, with texts [P, D] and images [Q, D].

    Bytes: the embeddings read, and again backward, where their gradients are written; the [P, Q] scores are written nowhere,
    and what is of the size of P and Q is left out. FLOPs: of the matrix products alone: the scores, made again backward, and
    two for the gradients.
    """
    inputs, product = (P + Q) * D * itemsize, 2 * P * Q * D
    return Traffic(3 * inputs, 4 * product) if backward else Traffic(inputs, product)


def retrieval_ranks(P: int, Q: int, D: int, itemsize: int) -> Traffic:
    """The floor of retrieval_ranks: texts [P, D] and images [Q, D] read once, and one product of them."""
    return Traffic((P + Q) * D * itemsize, 2 * P * Q * D)


def cider_d(letters: int, words: int, n: int = 4) -> Traffic:
    """The floor of CIDEr-D: text of one byte a letter read once, and a weight, its square and a sum for each n-gram."""
    return Traffic(letters, 3 * n * words)


def training_step(B: int, T: int, L: int, A: int, D: int, H: int, V: int, parameters: int) -> Traffic:
    """The floor of a float32 training step of Show, Attend and Tell on given annotations, with AdamW.

    Bytes: those of T steps of attention whose values want no gradient, and 28 a parameter for AdamW, which reads it, its
    gradient and two moments, and writes it and the moments. FLOPs: of matrix products alone, 2 for a row and a number of a
    weight that meet, and twice that backward (half of it for the keys' projection, whose input wants no gradient): keys B L
    rows; head, LSTM, query and output B T rows.
    """
    attention = additive_attention(B, L, A, D, 4, steps=T, backward=True)
    products = 2 * 2 * B * L * D * A + 3 * 2 * B * T * (H * V + (D + 2 * H) * 4 * H + H * A + (H + D) * H)
    return Traffic(attention.bytes - 4 * B * L * D + 28 * parameters, products)


def attention_coverage(
    B: int, heads: int, T: int, L: int, itemsize: int, *, valid: int | None = None, backward: bool
) -> Traffic:
    """The floor of attention_coverage of alpha [B, heads, T, L].

    Forward: the valid rows of alpha, read once. Backward: the residual of each location is written by the forward and read
    again (4 bytes each), and the gradient is written: one row a caption and head where all steps are valid, which a view
    repeats, else all of it.

    FLOPs: an addition for each element read; a subtraction, a product and an addition for each location; and backward a
    product for each.

    Args:
        B, heads, T, L: captions, heads, steps and locations.
        itemsize: bytes of an element of alpha.
        valid: the valid steps of all captions together; None: B * T, and no step may be left out.
        backward: whether the gradient is formed too.
    """
    sums = B * heads * L
    read = heads * (B * T if valid is None else valid) * L
    if not backward:
        return Traffic(read * itemsize, read + 3 * sums)
    written = sums if valid is None else sums * T
    return Traffic((read + written) * itemsize + 2 * 4 * sums, read + 4 * sums)
