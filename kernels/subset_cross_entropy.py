"""Softmax cross-entropy over a subset of the vocabulary, from logits. Maths and names: csrc/subset_cross_entropy/*.h.

Forward: one program a token (a row of V logits). It reads the ids that the token may choose from, masks repeats by comparing
them with each other in registers, gathers their logits, and where the whole vocabulary takes part runs once over the row.
A second launch of one program reduces the tokens' losses, in a fixed order. Backward: one program a block of a row writes
zeros, or the dense gradient, and then its candidates; programs never share an element. Three launches in all.

Floor, bytes: forward 32 per gathered logit (a sector), plus V * itemsize for each row that needs the whole vocabulary;
backward N * V * itemsize written, plus as much read for rows with a dense part.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastcap.kernels._common import Launch, acc_of, block_of, run, softcap
from fastcap.kernels._ids import MAX_PAIRED_IDS, excluded_marks, without_repeats
from fastcap.kernels._subset import (
    A_F,
    A_S,
    D_F,
    D_S,
    LSE_F,
    LSE_S,
    S_F,
    S_S,
    dense_gradient,
    finish,
    merge,
    part_of,
    set_part,
    token_of,
)  # fmt: skip


@triton.jit
def _subset_cross_entropy_fwd_kernel(
    input_ptr, target_ptr, ids_ptr, excluded_ptr, weight_ptr, token_weight_ptr,
    loss_ptr, denom_ptr, stats_ptr, cols_ptr, dset_ptr,
    input_strides, target_strides, ids_strides, token_weight_strides,
    N, T, V, K,
    smoothing: tl.float64, z_loss: tl.float64, mle_weight: tl.float64,
    IGNORE_INDEX: tl.constexpr, IDS_PAD: tl.constexpr, CAP: tl.constexpr,
    IS_SET: tl.constexpr, IS_REVERSE: tl.constexpr, IS_FULL: tl.constexpr, FIRST_FULL: tl.constexpr,
    HAS_MLE: tl.constexpr, SMOOTH: tl.constexpr, UNIQUE: tl.constexpr, NEED_GRAD: tl.constexpr, ACC: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss = tl.full((), smoothing, ACC), tl.full((), z_loss, ACC)
    mle_weight = tl.full((), mle_weight, ACC)
    N = tl.full((), N, tl.int64)  # 7 N may not fit 32 bits
    i_n = tl.program_id(0).to(tl.int64)
    i_b, i_t = i_n // T, i_n % T
    p_row = input_ptr + i_b * input_strides[0] + i_t * input_strides[1]
    y, valid, w_y, of_full, scale = token_of(
        target_ptr, target_strides, token_weight_ptr, token_weight_strides, weight_ptr, i_b, i_t, V, mle_weight,
        IGNORE_INDEX, IS_FULL, FIRST_FULL, BLOCK_T, ACC,
    )  # fmt: skip
    of_rest = 1 - of_full

    loss = tl.zeros((), ACC)
    z_y = softcap(tl.load(p_row + y * input_strides[2], mask=valid, other=0.0).to(ACC), CAP)

    # Dense parts: one pass over the row serves the whole vocabulary and, where asked for, all but the excluded.
    wants_full = valid & (of_full > 0)
    wants_rest = valid & (of_rest > 0)
    if IS_FULL or FIRST_FULL or HAS_MLE or IS_REVERSE:
        if wants_full | IS_REVERSE & valid:
            m_f = tl.full((BLOCK_V,), float("-inf"), ACC)
            s_f = tl.zeros((BLOCK_V,), ACC)
            m_r = tl.full((BLOCK_V,), float("-inf"), ACC)
            s_r = tl.zeros((BLOCK_V,), ACC)
            sum_w = tl.zeros((BLOCK_V,), ACC)
            sum_wz = tl.zeros((BLOCK_V,), ACC)
            sum_wr = tl.zeros((BLOCK_V,), ACC)
            sum_wzr = tl.zeros((BLOCK_V,), ACC)
            n_r = tl.zeros((BLOCK_V,), ACC)
            for start in range(0, V, BLOCK_V):
                o_v = start + tl.arange(0, BLOCK_V)
                m_v = o_v < V
                p_v = p_row + o_v.to(tl.int64) * input_strides[2]
                z = softcap(tl.load(p_v, mask=m_v, other=float("-inf")).to(ACC), CAP)
                z = tl.where(m_v, z, float("-inf"))
                m_f, s_f = merge(m_f, s_f, z)
                if SMOOTH:
                    if weight_ptr is None:
                        w = tl.full((BLOCK_V,), 1.0, ACC)
                    else:
                        w = tl.load(weight_ptr + o_v, mask=m_v, other=0.0)
                    sum_w += tl.where(m_v, w, 0.0)
                    sum_wz += tl.where(m_v, w * z, 0.0)
                if IS_REVERSE:
                    gone = tl.load(excluded_ptr + i_b * V + o_v, mask=m_v, other=1)
                    kept = m_v & ((gone == 0) | (o_v == y))
                    m_r, s_r = merge(m_r, s_r, tl.where(kept, z, float("-inf")))
                    if SMOOTH:
                        n_r += kept.to(ACC)
                        sum_wr += tl.where(kept, w, 0.0)
                        sum_wzr += tl.where(kept, w * z, 0.0)
            if wants_full:
                lse_f = finish(m_f, s_f)
                part, a, s, d = part_of(lse_f, z_y, w_y, V, tl.sum(sum_w, 0), tl.sum(sum_wz, 0), smoothing, z_loss)
                loss += of_full * part
                if NEED_GRAD:
                    tl.store(stats_ptr + LSE_F * N + i_n, lse_f)
                    tl.store(stats_ptr + A_F * N + i_n, scale * of_full * a)
                    tl.store(stats_ptr + S_F * N + i_n, scale * of_full * s)
                    tl.store(stats_ptr + D_F * N + i_n, scale * of_full * d)
            if IS_REVERSE:
                if wants_rest:
                    lse_r = finish(m_r, s_r)
                    n = tl.maximum(tl.sum(n_r, 0), 1.0)
                    part, a, s, d = part_of(lse_r, z_y, w_y, n, tl.sum(sum_wr, 0), tl.sum(sum_wzr, 0), smoothing, z_loss)
                    loss += of_rest * part
                    if NEED_GRAD:
                        tl.store(stats_ptr + LSE_S * N + i_n, lse_r)
                        tl.store(stats_ptr + A_S * N + i_n, scale * of_rest * a)
                        tl.store(stats_ptr + S_S * N + i_n, scale * of_rest * s)
                        tl.store(stats_ptr + D_S * N + i_n, scale * of_rest * d)
        if NEED_GRAD:  # what no branch wrote
            if not wants_full:
                for j in tl.static_range(LSE_F, D_F + 1):
                    tl.store(stats_ptr + j * N + i_n, 0.0)
            if not (wants_rest & IS_REVERSE):
                for j in tl.static_range(LSE_S, D_S + 1):
                    tl.store(stats_ptr + j * N + i_n, 0.0)

    # The set part: the target, then the ids that are neither pads nor repeats nor the target.
    if IS_SET:
        p_cols = cols_ptr + i_n * (K + 1)
        p_dset = dset_ptr + i_n * (K + 1)
        p_ids = ids_ptr + i_b * ids_strides[0] + i_t * ids_strides[1]
        part, scale = set_part(
            p_row, input_strides[2], None, p_ids, ids_strides, weight_ptr, p_cols, p_dset,
            V, K, y, z_y, w_y, wants_rest, of_rest, scale, 0, smoothing, z_loss,
            IDS_PAD, CAP, SMOOTH, UNIQUE, NEED_GRAD, True, False, ACC, BLOCK_K,
        )  # fmt: skip
        loss += part

    tl.store(loss_ptr + i_n, tl.where(valid, scale * loss, 0.0))
    if denom_ptr is not None:
        tl.store(denom_ptr + i_n, tl.where(valid, w_y, 0.0))


@triton.jit
def _subset_cross_entropy_reduce_kernel(
    loss_ptr, denom_ptr, out_ptr, inv_denom_ptr, N, IS_MEAN: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The sum or mean over tokens, and 1 / the denominator; one program, so the order is fixed."""
    o_n = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), loss_ptr.dtype.element_ty)
    denom = tl.zeros((BLOCK_N,), loss_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK_N):
        m_n = start + o_n < N
        total += tl.load(loss_ptr + start + o_n, mask=m_n, other=0.0)
        if IS_MEAN:
            denom += tl.load(denom_ptr + start + o_n, mask=m_n, other=0.0)
    total = tl.sum(total, 0)
    if IS_MEAN:
        denom = tl.sum(denom, 0)
        some = denom != 0
        inv_denom = tl.where(some, 1 / tl.where(some, denom, 1.0), 0.0)
        tl.store(out_ptr, tl.where(some, total * inv_denom, 0.0))
        tl.store(inv_denom_ptr, inv_denom)
    else:
        tl.store(out_ptr, total)
        tl.store(inv_denom_ptr, 1.0)


@triton.jit
def _store_zeros(p_dx, m_v, before, V, BLOCK_V: tl.constexpr):
    zeros = tl.zeros((BLOCK_V,), p_dx.dtype.element_ty)
    if (before >= 0) & (before + BLOCK_V <= V):  # no mask, so 16 bytes a store
        tl.store(p_dx + tl.arange(0, BLOCK_V), zeros)
    else:
        tl.store(p_dx + tl.arange(0, BLOCK_V), zeros, mask=m_v)


@triton.jit
def _subset_cross_entropy_bwd_kernel(
    grad_out_ptr, inv_denom_ptr, input_ptr, target_ptr, excluded_ptr, weight_ptr, stats_ptr, cols_ptr, dset_ptr, dinput_ptr,
    input_strides, target_strides, grad_out_strides,
    N, T, V, C, NUM_BLOCKS,
    CAP: tl.constexpr, IS_SET: tl.constexpr, IS_REVERSE: tl.constexpr, IS_DENSE: tl.constexpr, SMOOTH: tl.constexpr,
    PER_TOKEN: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    i_v = tl.program_id(0) % NUM_BLOCKS
    i_b, i_t = i_n // T, i_n % T
    # Blocks start at multiples of ALIGN elements of the whole gradient, not of the row, so that 16-byte stores are aligned
    # for any V; the block's columns may begin a little before 0.
    begin = i_n * V
    base = begin // ALIGN * ALIGN + i_v * BLOCK_V
    p_dx = dinput_ptr + base
    before = (base - begin).to(tl.int32)  # the first column of this block; columns fit 32 bits, and cost half the registers
    o_v = before + tl.arange(0, BLOCK_V)
    m_v = (o_v >= 0) & (o_v < V)

    if PER_TOKEN:
        g = tl.load(grad_out_ptr + i_b * grad_out_strides[0] + i_t * grad_out_strides[1])
    else:
        g = tl.load(grad_out_ptr)
    g *= tl.load(inv_denom_ptr)

    if IS_DENSE:
        N = tl.full((), N, tl.int64)
        lse_f, a_f = tl.load(stats_ptr + LSE_F * N + i_n), tl.load(stats_ptr + A_F * N + i_n)
        s_f, d_f = tl.load(stats_ptr + S_F * N + i_n), tl.load(stats_ptr + D_F * N + i_n)
        lse_r, a_r = tl.load(stats_ptr + LSE_S * N + i_n), tl.load(stats_ptr + A_S * N + i_n)
        s_r, d_r = tl.load(stats_ptr + S_S * N + i_n), tl.load(stats_ptr + D_S * N + i_n)
        y = tl.load(target_ptr + i_b * target_strides[0] + i_t * target_strides[1]).to(tl.int32)
        p_row = input_ptr + i_b * input_strides[0] + i_t * input_strides[1]
        dense = (a_f != 0) | (s_f != 0) | (d_f != 0) | (a_r != 0) | (s_r != 0) | (d_r != 0)
        if dense:
            p_v = p_row + o_v.to(tl.int64) * input_strides[2]
            z = softcap(tl.load(p_v, mask=m_v, other=0.0).to(ACC), CAP)
            gone = o_v * 0
            if IS_REVERSE:
                gone = tl.load(excluded_ptr + i_b * V + o_v, mask=m_v, other=1).to(tl.int32)
            dz = dense_gradient(
                z, o_v, y, gone, weight_ptr, V, lse_f, a_f, s_f, d_f, lse_r, a_r, s_r, d_r, CAP, IS_REVERSE, SMOOTH
            )
            tl.store(p_dx + tl.arange(0, BLOCK_V), (g * dz).to(dinput_ptr.dtype.element_ty), mask=m_v)
        else:
            _store_zeros(p_dx, m_v, before, V, BLOCK_V)
    else:
        _store_zeros(p_dx, m_v, before, V, BLOCK_V)

    if IS_SET:
        tl.debug_barrier()  # the block is written before its candidates are written over it
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            cols = tl.load(cols_ptr + i_n * C + o_c, mask=o_c < C, other=-1)
            m_c = (cols >= 0) & (cols >= before) & (cols < before + BLOCK_V)
            dx = g * tl.load(dset_ptr + i_n * C + o_c, mask=m_c, other=0.0)
            if IS_DENSE:  # added to what is there: cheaper in registers than to form it again
                dx += tl.load(p_dx + (cols - before), mask=m_c, other=0.0).to(ACC)
            tl.store(p_dx + (cols - before), dx.to(dinput_ptr.dtype.element_ty), mask=m_c)


# Launchers -------------------------------------------------------------------------------------------------------------


# fmt: off
def plan_subset_cross_entropy_fwd(
    input, target, ids, weight, token_weight, out, inv_denom, stats, cols, dset, options
) -> list[Launch]:
    """The launches of the forward. Scratch is made here; nothing is launched."""
    B, T, V = input.shape
    N, K = B * T, ids.shape[2] if ids is not None else 0
    is_set, is_reverse, is_mean = options.kind == "set", options.kind == "reverse", options.reduction == "mean"
    ids = without_repeats(ids, options.ids_pad) if is_set else ids
    reduce = options.reduction != "none"
    loss = out.new_empty(N) if reduce else out
    denom = out.new_empty(N) if is_mean else None
    forward = Launch(_subset_cross_entropy_fwd_kernel, (N,), dict(
        input_ptr=input, target_ptr=target, ids_ptr=ids if is_set else None,
        excluded_ptr=excluded_marks(ids, options.ids_pad, V) if is_reverse else None,
        weight_ptr=weight, token_weight_ptr=token_weight,
        loss_ptr=loss, denom_ptr=denom, stats_ptr=stats, cols_ptr=cols, dset_ptr=dset,
        input_strides=input.stride(), target_strides=target.stride(), ids_strides=ids.stride() if is_set else (0, 0, 0),
        token_weight_strides=token_weight.stride() if token_weight is not None else (0, 0),
        N=N, T=T, V=V, K=K,
        smoothing=options.label_smoothing, z_loss=options.z_loss, mle_weight=options.mle_weight,
        IGNORE_INDEX=options.ignore_index, IDS_PAD=options.ids_pad, CAP=options.logit_softcap,
        IS_SET=is_set, IS_REVERSE=is_reverse, IS_FULL=options.kind == "full", FIRST_FULL=options.first_full,
        HAS_MLE=options.mle_weight > 0, SMOOTH=options.label_smoothing > 0, UNIQUE=K > MAX_PAIRED_IDS,
        NEED_GRAD=stats.numel() > 0 or cols.numel() > 0, ACC=acc_of(input),
        # "reverse" keeps the sums of two parts in registers
        BLOCK_V=block_of(V, 1024 if is_reverse else 2048), BLOCK_K=block_of(K, MAX_PAIRED_IDS), BLOCK_T=block_of(T, 1024),
    ), num_warps=8 if options.is_dense else 4 if K > 32 else 2)  # 64 ids compared with each other: with 2, registers spill
    if not reduce:
        inv_denom.fill_(1.0)
        return [forward]
    return [forward, Launch(_subset_cross_entropy_reduce_kernel, (1,), dict(
        loss_ptr=loss, denom_ptr=denom, out_ptr=out, inv_denom_ptr=inv_denom, N=N,
        IS_MEAN=is_mean, BLOCK_N=block_of(N, 2048),
    ), num_warps=8)]


def plan_subset_cross_entropy_bwd(
    grad_out, inv_denom, input, target, ids, weight, stats, cols, dset, dinput, options
) -> list[Launch]:
    """The one launch of the backward."""
    B, T, V = dinput.shape
    N, C = B * T, cols.shape[2] if cols.dim() == 3 else 0
    is_reverse, is_dense, per_token = options.kind == "reverse", options.is_dense, options.reduction == "none"
    align = 16 // dinput.element_size()
    block_v = block_of(V + align, 4096)
    num_blocks = triton.cdiv(V + align - 1, block_v)
    return [Launch(_subset_cross_entropy_bwd_kernel, (N * num_blocks,), dict(
        grad_out_ptr=grad_out, inv_denom_ptr=inv_denom, input_ptr=input if is_dense else None, target_ptr=target,
        excluded_ptr=excluded_marks(ids, options.ids_pad, V) if is_reverse else None,
        weight_ptr=weight, stats_ptr=stats, cols_ptr=cols, dset_ptr=dset, dinput_ptr=dinput,
        input_strides=input.stride() if is_dense else (0, 0, 0), target_strides=target.stride(),
        grad_out_strides=grad_out.stride() if per_token else (0, 0),
        N=N, T=T, V=V, C=C, NUM_BLOCKS=num_blocks,
        CAP=options.logit_softcap, IS_SET=options.kind == "set", IS_REVERSE=is_reverse, IS_DENSE=is_dense,
        SMOOTH=options.label_smoothing > 0, PER_TOKEN=per_token, ALIGN=align, ACC=acc_of(dinput),
        BLOCK_V=block_v, BLOCK_C=block_of(C, 128),
    ), num_warps=8 if is_dense else 4)]
# fmt: on


def subset_cross_entropy_fwd(input, target, *rest) -> None:
    """Writes the outputs of torch.ops.fastcap.subset_cross_entropy_fwd."""
    *_, out, inv_denom, _, _, _, _ = rest
    if target.numel() == 0:
        out.zero_()
        inv_denom.zero_()
    else:
        run(plan_subset_cross_entropy_fwd(input, target, *rest), input)


def subset_cross_entropy_bwd(grad_out, *rest) -> None:
    """Writes dinput, the output of torch.ops.fastcap.subset_cross_entropy_bwd."""
    dinput = rest[-2]
    if dinput.numel() > 0:
        run(plan_subset_cross_entropy_bwd(grad_out, *rest), dinput)
