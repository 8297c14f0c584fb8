"""The row kernels of linear_subset_cross_entropy, between torch's matrix products. Maths and names: csrc/common/subset.h and
csrc/linear_subset_cross_entropy/*.h.

`set`: one program a token, over the scores of its candidates. `absorb`, `finish`, `emit`: n dense rows, in panels of
columns of the logits; one program a row, or a row and a block of columns. Nothing waits for the device: where the CPU counts
the rows that need all logits, here as many are computed as there may be, and what is too many has gradients of 0.

Floor, bytes: absorb reads a panel once, emit reads and writes it once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcap.kernels._captions import CaptionKernels
from fastcap.kernels._common import acc_of, block_of, softcap
from fastcap.kernels._ids import MAX_PAIRED_IDS, excluded_marks, repeats_as_pads
from fastcap.kernels._subset import (
    A_F,
    A_S,
    D_F,
    D_S,
    LSE_F,
    LSE_S,
    NUM_STATS,
    S_F,
    S_S,
    add_to_state,
    dense_gradient,
    merge,
    part_of,
    set_part,
    token_of,
)  # fmt: skip
from fastcap.kernels._totals import denominator_kernel, reduce_kernel
from fastcap.kernels._word_sums import WordSums

# The running sums of a row: of part F and of part S each the largest logit, the sum of exp(z - it), the number of
# candidates, the sums of w and of w z.
M_F, E_F, N_F, W_F, WZ_F, M_S, E_S, N_S, W_S, WZ_S = (tl.constexpr(i) for i in range(10))
NUM_STATE = 10


@triton.jit
def _place(rows_ptr, i):
    """The token of a dense row."""
    if rows_ptr is None:
        return i
    else:
        return tl.load(rows_ptr + i)


@triton.jit
def _linear_subset_cross_entropy_set_kernel(
    scores_ptr, score_y_ptr, bias_ptr, target_ptr, ids_ptr, weight_ptr, token_weight_ptr, loss_ptr, dset_ptr,
    target_strides, ids_strides, token_weight_strides,
    T, V, K,
    smoothing: tl.float64, z_loss: tl.float64,
    IGNORE_INDEX: tl.constexpr, IDS_PAD: tl.constexpr, CAP: tl.constexpr, FIRST_FULL: tl.constexpr, SMOOTH: tl.constexpr,
    UNIQUE: tl.constexpr, NEED_GRAD: tl.constexpr, HAS_OWN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss = tl.full((), smoothing, ACC), tl.full((), z_loss, ACC)
    i_n = tl.program_id(0).to(tl.int64)
    i_b, i_t = i_n // T, i_n % T
    y, valid, w_y, of_full, scale = token_of(
        target_ptr, target_strides, token_weight_ptr, token_weight_strides, weight_ptr, i_b, i_t, V, tl.zeros((), ACC),
        IGNORE_INDEX, False, FIRST_FULL, BLOCK_T, ACC,
    )  # fmt: skip
    wanted = valid & (of_full == 0)
    if HAS_OWN:
        z_y = tl.load(scores_ptr + i_n * K + i_t, mask=wanted, other=0.0).to(ACC)
        C = K
    else:
        z_y = tl.load(score_y_ptr + i_n, mask=wanted, other=0.0).to(ACC)
        C = K + 1
    if bias_ptr is not None:
        z_y += tl.load(bias_ptr + y)
    z_y = softcap(z_y, CAP)
    loss, scale = set_part(
        scores_ptr + i_n * K, 1, bias_ptr, ids_ptr + i_b * ids_strides[0] + i_t * ids_strides[1], ids_strides, weight_ptr,
        None, dset_ptr + i_n * C,
        V, K, y, z_y, w_y, wanted, 1 - of_full, scale, i_t, smoothing, z_loss,
        IDS_PAD, CAP, SMOOTH, UNIQUE, NEED_GRAD, False, HAS_OWN, ACC, BLOCK_K,
    )  # fmt: skip
    tl.store(loss_ptr + i_n, scale * loss, mask=wanted)


@triton.jit
def _linear_subset_cross_entropy_absorb_kernel(
    logits_ptr, bias_ptr, rows_ptr, target_ptr, ids_ptr, excluded_ptr, weight_ptr, state_ptr, picks_ptr,
    target_strides, ids_strides,
    T, V, K, P, begin,
    CAP: tl.constexpr, IGNORE_INDEX: tl.constexpr, IDS_PAD: tl.constexpr, IS_SET: tl.constexpr, IS_REVERSE: tl.constexpr,
    HAS_FULL: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A panel's columns go into the row's running sums; the logits of its target and candidates are picked."""
    i_n = tl.program_id(0).to(tl.int64)
    place = _place(rows_ptr, i_n)
    i_b, i_t = place // T, place % T
    y = tl.load(target_ptr + i_b * target_strides[0] + i_t * target_strides[1])
    p_row = logits_ptr + i_n * P
    p_state = state_ptr + i_n * 10
    m_f = tl.full((BLOCK_P,), float("-inf"), ACC)
    s_f = tl.zeros((BLOCK_P,), ACC)
    m_r = tl.full((BLOCK_P,), float("-inf"), ACC)
    s_r = tl.zeros((BLOCK_P,), ACC)
    n_r = tl.zeros((BLOCK_P,), ACC)
    sum_w = tl.zeros((BLOCK_P,), ACC)
    sum_wz = tl.zeros((BLOCK_P,), ACC)
    sum_wr = tl.zeros((BLOCK_P,), ACC)
    sum_wzr = tl.zeros((BLOCK_P,), ACC)
    for start in range(0, P, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = o_p < P
        z = tl.load(p_row + o_p, mask=m_p, other=float("-inf")).to(ACC)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + begin + o_p, mask=m_p, other=0.0)
        z = tl.where(m_p, softcap(z, CAP), float("-inf"))
        if HAS_FULL:
            m_f, s_f = merge(m_f, s_f, z)
        if SMOOTH:
            if weight_ptr is None:
                w = tl.full((BLOCK_P,), 1.0, ACC)
            else:
                w = tl.load(weight_ptr + begin + o_p, mask=m_p, other=0.0)
            sum_w += tl.where(m_p, w, 0.0)
            sum_wz += tl.where(m_p, w * z, 0.0)
        if IS_REVERSE:
            gone = tl.load(excluded_ptr + i_b * V + begin + o_p, mask=m_p, other=1)
            kept = m_p & ((gone == 0) | (begin + o_p == y))
            m_r, s_r = merge(m_r, s_r, tl.where(kept, z, float("-inf")))
            n_r += kept.to(ACC)
            if SMOOTH:
                sum_wr += tl.where(kept, w, 0.0)
                sum_wzr += tl.where(kept, w * z, 0.0)
    if HAS_FULL:
        add_to_state(p_state + M_F, m_f, s_f, sum_w, sum_w, sum_wz)
    if IS_REVERSE:
        add_to_state(p_state + M_S, m_r, s_r, n_r, sum_wr, sum_wzr)
    inside = (y != IGNORE_INDEX) & (y >= begin) & (y < begin + P)
    C = 1
    if IS_SET:
        C = K + 1
        p_ids = ids_ptr + i_b * ids_strides[0] + i_t * ids_strides[1]
        for start in range(0, K, BLOCK_K):
            o_k = start + tl.arange(0, BLOCK_K)
            ids = tl.load(p_ids + o_k.to(tl.int64) * ids_strides[2], mask=o_k < K, other=IDS_PAD)
            m_k = (o_k < K) & (ids != IDS_PAD) & (ids >= begin) & (ids < begin + P)
            picked = tl.load(p_row + (ids - begin), mask=m_k, other=0.0).to(ACC)  # bias and cap come with `finish`
            tl.store(picks_ptr + i_n * C + 1 + o_k, picked, mask=m_k)
    z_y = tl.load(p_row + (y - begin), mask=inside, other=0.0).to(ACC)
    tl.store(picks_ptr + i_n * C, z_y, mask=inside)


@triton.jit
def _linear_subset_cross_entropy_finish_kernel(
    state_ptr, picks_ptr, bias_ptr, rows_ptr, target_ptr, ids_ptr, weight_ptr, token_weight_ptr,
    loss_ptr, stats_ptr, cols_ptr, dset_ptr,
    target_strides, ids_strides, token_weight_strides,
    N, T, V, K,
    smoothing: tl.float64, z_loss: tl.float64, mle_weight: tl.float64,
    IGNORE_INDEX: tl.constexpr, IDS_PAD: tl.constexpr, CAP: tl.constexpr,
    IS_SET: tl.constexpr, IS_REVERSE: tl.constexpr, IS_FULL: tl.constexpr, FIRST_FULL: tl.constexpr, SMOOTH: tl.constexpr,
    UNIQUE: tl.constexpr, NEED_GRAD: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss = tl.full((), smoothing, ACC), tl.full((), z_loss, ACC)
    mle_weight = tl.full((), mle_weight, ACC)
    N = tl.full((), N, tl.int64)  # 7 N may not fit 32 bits
    i_n = tl.program_id(0).to(tl.int64)
    place = _place(rows_ptr, i_n)
    i_b, i_t = place // T, place % T
    y, valid, w_y, of_full, scale = token_of(
        target_ptr, target_strides, token_weight_ptr, token_weight_strides, weight_ptr, i_b, i_t, V, mle_weight,
        IGNORE_INDEX, IS_FULL, FIRST_FULL, BLOCK_T, ACC,
    )  # fmt: skip
    of_rest = 1 - of_full
    p_state = state_ptr + i_n * 10
    C = 1
    if IS_SET:
        C = K + 1
    z_y = tl.load(picks_ptr + i_n * C)
    if bias_ptr is not None:
        z_y += tl.load(bias_ptr + y)
    z_y = softcap(z_y, CAP)

    wants_full = valid & (of_full > 0)
    wants_rest = valid & (of_rest > 0)
    lse_f = tl.load(p_state + M_F) + tl.log(tl.load(p_state + E_F))
    part, a, s, d = part_of(
        lse_f, z_y, w_y, V, tl.load(p_state + W_F), tl.load(p_state + WZ_F), smoothing, z_loss
    )  # fmt: skip
    loss = tl.where(wants_full, of_full * part, 0.0)
    if NEED_GRAD:
        factor = tl.where(wants_full, scale * of_full, 0.0)
        tl.store(stats_ptr + LSE_F * N + i_n, tl.where(wants_full, lse_f, 0.0))
        tl.store(stats_ptr + A_F * N + i_n, tl.where(wants_full, factor * a, 0.0))
        tl.store(stats_ptr + S_F * N + i_n, tl.where(wants_full, factor * s, 0.0))
        tl.store(stats_ptr + D_F * N + i_n, tl.where(wants_full, factor * d, 0.0))
    if IS_REVERSE:
        lse_r = tl.load(p_state + M_S) + tl.log(tl.load(p_state + E_S))
        n = tl.maximum(tl.load(p_state + N_S), 1.0)
        part, a, s, d = part_of(
            lse_r, z_y, w_y, n, tl.load(p_state + W_S), tl.load(p_state + WZ_S), smoothing, z_loss
        )  # fmt: skip
        loss += tl.where(wants_rest, of_rest * part, 0.0)
        if NEED_GRAD:
            factor = tl.where(wants_rest, scale * of_rest, 0.0)
            tl.store(stats_ptr + LSE_S * N + i_n, tl.where(wants_rest, lse_r, 0.0))
            tl.store(stats_ptr + A_S * N + i_n, tl.where(wants_rest, factor * a, 0.0))
            tl.store(stats_ptr + S_S * N + i_n, tl.where(wants_rest, factor * s, 0.0))
            tl.store(stats_ptr + D_S * N + i_n, tl.where(wants_rest, factor * d, 0.0))
    elif NEED_GRAD:
        for j in tl.static_range(LSE_S, D_S + 1):
            tl.store(stats_ptr + j * N + i_n, 0.0)
    if IS_SET:
        part, scale = set_part(
            picks_ptr + i_n * C + 1, 1, bias_ptr, ids_ptr + i_b * ids_strides[0] + i_t * ids_strides[1], ids_strides,
            weight_ptr, cols_ptr + i_n * C, dset_ptr + i_n * C,
            V, K, y, z_y, w_y, wants_rest, of_rest, scale, 0, smoothing, z_loss,
            IDS_PAD, CAP, SMOOTH, UNIQUE, NEED_GRAD, False, False, ACC, BLOCK_K,
        )  # fmt: skip
        loss += part
    tl.store(loss_ptr + place, scale * loss, mask=valid)


@triton.jit
def _linear_subset_cross_entropy_emit_kernel(
    logits_ptr, bias_ptr, rows_ptr, target_ptr, excluded_ptr, weight_ptr, stats_ptr, cols_ptr, dset_ptr, target_strides,
    N, T, V, P, C, begin, NUM_BLOCKS,
    CAP: tl.constexpr, IS_SET: tl.constexpr, IS_REVERSE: tl.constexpr, SMOOTH: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of a panel's row: the logits become d loss / d logits, in place."""
    i_n = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    first = (tl.program_id(0) % NUM_BLOCKS) * BLOCK_P
    place = _place(rows_ptr, i_n)
    i_b, i_t = place // T, place % T
    y = tl.load(target_ptr + i_b * target_strides[0] + i_t * target_strides[1]).to(tl.int32)
    p_row = logits_ptr + i_n * P
    o_p = first + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    z = tl.load(p_row + o_p, mask=m_p, other=0.0).to(ACC)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + begin + o_p, mask=m_p, other=0.0)
    z = softcap(z, CAP)
    gone = o_p * 0
    if IS_REVERSE:
        gone = tl.load(excluded_ptr + i_b * V + begin + o_p, mask=m_p, other=1).to(tl.int32)
    N = tl.full((), N, tl.int64)
    lse_f, a_f = tl.load(stats_ptr + LSE_F * N + i_n), tl.load(stats_ptr + A_F * N + i_n)
    s_f, d_f = tl.load(stats_ptr + S_F * N + i_n), tl.load(stats_ptr + D_F * N + i_n)
    lse_r, a_r = tl.load(stats_ptr + LSE_S * N + i_n), tl.load(stats_ptr + A_S * N + i_n)
    s_r, d_r = tl.load(stats_ptr + S_S * N + i_n), tl.load(stats_ptr + D_S * N + i_n)
    dz = dense_gradient(
        z, begin + o_p, y, gone, weight_ptr, V, lse_f, a_f, s_f, d_f, lse_r, a_r, s_r, d_r, CAP, IS_REVERSE, SMOOTH
    )
    tl.store(p_row + o_p, dz.to(logits_ptr.dtype.element_ty), mask=m_p)
    if IS_SET:
        tl.debug_barrier()  # the block is written before its candidates are added to it
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            cols = tl.load(cols_ptr + i_n * C + o_c, mask=o_c < C, other=-1) - begin
            m_c = (o_c < C) & (cols >= first) & (cols < first + BLOCK_P) & (cols < P)
            dx = tl.load(dset_ptr + i_n * C + o_c, mask=m_c, other=0.0)
            dx += tl.load(p_row + cols, mask=m_c, other=0.0).to(ACC)
            tl.store(p_row + cols, dx.to(logits_ptr.dtype.element_ty), mask=m_c)


# Launchers -------------------------------------------------------------------------------------------------------------


class LinearKernels(CaptionKernels, WordSums):
    """The row kernels on a GPU, for one batch; fastcap.ops._native has the CPU's. A list `plan` takes launches unrun."""

    def __init__(self, target, ids, weight, token_weight, bias, V, options, plan=None):
        own = options.kind == "set" and ids is None  # the candidates are the caption's words
        self.ids = target.unsqueeze(1) if own else ids
        self.target, self.weight, self.token_weight, self.bias, self.V = target, weight, token_weight, bias, V
        self.options, self.own, self.plan, self.on = options, own, plan, target
        self.excluded = None
        if options.kind == "reverse":
            self.excluded = excluded_marks(self.ids, options.ids_pad, V)
        elif options.kind == "set":
            self.ids = repeats_as_pads(self.ids, options.ids_pad)
        self.K = self.ids.shape[2] if options.kind == "set" else 0
        self.mixed = options.kind == "set" and options.mle_weight > 0  # dense rows have a set part too

    def find_rows(self, rows, inv_denom):
        """Writes `rows` and `inv_denom`; returns the dense rows' tokens, None for all in order."""
        self._launch(denominator_kernel, (1,), 8, dict(
            target_ptr=self.target, weight_ptr=self.weight, inv_denom_ptr=inv_denom, target_strides=self.target.stride(),
            N=self.target.numel(), T=max(1, self.target.shape[1]), V=self.V, IGNORE_INDEX=self.options.ignore_index,
            IS_MEAN=self.options.reduction == "mean", ACC=acc_of(inv_denom), BLOCK_N=block_of(self.target.numel(), 2048),
        ))  # fmt: skip
        B, T = self.target.shape
        if rows.numel() == B * T:
            rows.copy_(torch.arange(B * T, device=rows.device))
        elif rows.numel() > 0 and T > 0:
            first = (self.target != self.options.ignore_index).int().argmax(1)
            torch.add(first, torch.arange(0, B * T, T, device=rows.device), out=rows)
        return self.kept_rows(rows)

    def reduce(self, loss, inv_denom, out):
        self._launch(reduce_kernel, (1,), 8, dict(
            loss_ptr=loss, inv_denom_ptr=inv_denom, out_ptr=out, N=loss.numel(), BLOCK_N=block_of(loss.numel(), 2048),
        ))  # fmt: skip

    def kept_rows(self, rows):
        return None if rows.numel() == self.target.numel() else rows

    def set(self, scores, score_y, loss, dset):
        self._launch(_linear_subset_cross_entropy_set_kernel, (self.target.numel(),), 2, dict(
            scores_ptr=scores, score_y_ptr=score_y, loss_ptr=loss, dset_ptr=loss if dset is None else dset,
            **self._labels(), **self._losses(loss), NEED_GRAD=dset is not None, HAS_OWN=self.own,
        ))  # fmt: skip

    def rows(self, logits, rows, loss, need_grad):
        """A panel of all columns: absorbed, finished, and turned into its gradient."""
        n = logits.shape[0]
        running = self.start(n, loss)
        stats = loss.new_empty((NUM_STATS, n) if need_grad else 0)
        mixed = need_grad and self.mixed
        cols = loss.new_empty((n, self.K + 1) if mixed else 0, dtype=torch.int32)
        dset = loss.new_empty((n, self.K + 1) if mixed else 0)
        self.absorb(logits, 0, rows, running)
        self.finish(rows, running, loss, stats, cols, dset)
        if need_grad:
            self.emit(logits, 0, rows, stats, cols, dset)

    def start(self, n, like):
        state = like.new_zeros(n, NUM_STATE)
        state[:, ::5] = -torch.inf
        return state, like.new_zeros(n, self.K + 1 if self.mixed else 1)

    def absorb(self, logits, begin, rows, running):
        (n, P), o = logits.shape, self.options
        warps = 4 if self.mixed and not o.label_smoothing else 8  # where 8 spill
        self._launch(_linear_subset_cross_entropy_absorb_kernel, (n,), warps, dict(
            logits_ptr=logits, rows_ptr=rows, excluded_ptr=self.excluded, state_ptr=running[0], picks_ptr=running[1],
            **self._labels(), P=P, begin=begin, CAP=o.logit_softcap, IGNORE_INDEX=o.ignore_index, IDS_PAD=o.ids_pad,
            IS_SET=self.mixed, IS_REVERSE=o.kind == "reverse", HAS_FULL=o.has_full, SMOOTH=o.label_smoothing > 0,
            ACC=acc_of(running[0]), BLOCK_P=self._block(P), BLOCK_K=block_of(self.K, MAX_PAIRED_IDS),
        ))  # fmt: skip

    def finish(self, rows, running, loss, stats, cols, dset):
        o, n = self.options, running[0].shape[0]
        some = stats.numel() > 0
        self._launch(_linear_subset_cross_entropy_finish_kernel, (n,), 2, dict(
            state_ptr=running[0], picks_ptr=running[1], rows_ptr=rows, loss_ptr=loss, stats_ptr=stats if some else loss,
            cols_ptr=cols if some else loss, dset_ptr=dset if some else loss, **self._labels(), **self._losses(loss),
            N=n, mle_weight=o.mle_weight, IS_SET=self.mixed, IS_REVERSE=o.kind == "reverse", IS_FULL=o.kind == "full",
            NEED_GRAD=some,
        ))  # fmt: skip

    def emit(self, logits, begin, rows, stats, cols, dset):
        o, (n, P), labels = self.options, logits.shape, self._labels()
        block, mixed = self._block(P), cols.numel() > 0
        blocks = triton.cdiv(P, block)
        for name in ("ids_ptr", "ids_strides", "K"):
            labels.pop(name)
        self._launch(_linear_subset_cross_entropy_emit_kernel, (n * blocks,), 8, dict(
            logits_ptr=logits, rows_ptr=rows, excluded_ptr=self.excluded, stats_ptr=stats,
            cols_ptr=cols if mixed else None, dset_ptr=dset if mixed else None, **labels, N=n, P=P, C=self.K + 1,
            begin=begin, NUM_BLOCKS=blocks, CAP=o.logit_softcap, IS_SET=mixed, IS_REVERSE=o.kind == "reverse",
            SMOOTH=o.label_smoothing > 0, ACC=acc_of(stats), BLOCK_P=block, BLOCK_C=block_of(self.K + 1, 128),
        ))  # fmt: skip

    def advise(self, tensor):
        """Only the CPU's pages."""

    def _labels(self):
        """What all kernels but the sums take."""
        ids_strides = (0, 0, 0)
        if self.options.kind == "set":  # a size of 1 is shared
            shape, strides = self.ids.shape, self.ids.stride()
            ids_strides = (0 if shape[0] == 1 else strides[0], 0 if shape[1] == 1 else strides[1], strides[2])
        return {
            "target_ptr": self.target, "ids_ptr": self.ids, "weight_ptr": self.weight, "bias_ptr": self.bias,
            "target_strides": self.target.stride(), "ids_strides": ids_strides,
            "T": self.target.shape[1], "V": self.V, "K": self.K,
        }  # fmt: skip

    def _losses(self, loss):
        """What the kernels that finish a loss take besides."""
        o, weighted = self.options, self.token_weight is not None
        return {
            "token_weight_ptr": self.token_weight,
            "token_weight_strides": self.token_weight.stride() if weighted else (0, 0),
            "smoothing": o.label_smoothing, "z_loss": o.z_loss, "IGNORE_INDEX": o.ignore_index, "IDS_PAD": o.ids_pad,
            "CAP": o.logit_softcap, "FIRST_FULL": o.first_full, "SMOOTH": o.label_smoothing > 0,
            "UNIQUE": self.K > MAX_PAIRED_IDS,  # repeats are gone; among few, all in one block, the kernel finds them
            "ACC": acc_of(loss), "BLOCK_K": block_of(self.K, MAX_PAIRED_IDS),
            "BLOCK_T": block_of(self.target.shape[1], 1024),
        }  # fmt: skip

    def _block(self, P):
        """Columns of a block: fewer where a row has more sums, which are kept in registers."""
        return block_of(P, 1024 if self.options.kind == "reverse" or self.options.label_smoothing > 0 else 2048)
