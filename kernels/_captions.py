"""Tokens that choose among their caption's own words: gathered rows of the head, products, softmax, gradient in one kernel.

Forward: one program a caption. Its T positions are rows and columns of a [T, T] product S = h W[y]^T, summed over blocks of
features; a column counts where it is the first of its id. Backward: one program a caption and a block of features gives
dh = dS W[y] and the caption's share of the head's gradient, dS^T h, by position; positions of equal id are added afterwards.

Floor, bytes of a caption: forward T (h) + T (rows of W) times H; backward the same again, and twice T H written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcap.kernels._common import acc_of, block_of, factors_of, softcap

MAX_TOKENS = 64  # of a caption, above which the [T, T] block would not fit in registers; half in float64


@triton.jit
def _load_words(weight_ptr, weight_strides, ids, m_k, o_h, m_h, FACTOR: tl.constexpr):
    """[BLOCK_T, BLOCK_H] rows of the head by id."""
    p_w = weight_ptr + ids[:, None] * weight_strides[0] + o_h[None, :].to(tl.int64) * weight_strides[1]
    return tl.load(p_w, mask=m_k[:, None] & m_h[None, :], other=0.0).to(FACTOR)


@triton.jit
def _caption_fwd_kernel(
    x_ptr, head_ptr, bias_ptr, target_ptr, weight_ptr, token_weight_ptr, loss_ptr, dset_ptr,
    head_strides, target_strides, token_weight_strides,
    T, V, H,
    smoothing: tl.float64, z_loss: tl.float64,
    IGNORE_INDEX: tl.constexpr, CAP: tl.constexpr, FIRST_FULL: tl.constexpr, SMOOTH: tl.constexpr, NEED_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss = tl.full((), smoothing, ACC), tl.full((), z_loss, ACC)
    i_b = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    p_target = target_ptr + i_b * target_strides[0]
    y = tl.load(p_target + o_t.to(tl.int64) * target_strides[1], mask=o_t < T, other=IGNORE_INDEX)
    valid = y != IGNORE_INDEX
    inside = valid & (y >= 0) & (y < V)

    s = tl.zeros((BLOCK_T, BLOCK_T), ACC)
    for start in range(0, H, BLOCK_H):
        o_h = start + tl.arange(0, BLOCK_H)
        m_h = o_h < H
        p_x = x_ptr + (i_b * T + o_t[:, None]) * H + o_h[None, :]
        x = tl.load(p_x, mask=(o_t < T)[:, None] & m_h[None, :], other=0.0)
        words = _load_words(head_ptr, head_strides, y, inside, o_h, m_h, FACTOR)
        s += tl.dot(x.to(FACTOR), tl.trans(words), input_precision=PRECISION, out_dtype=ACC)
    if bias_ptr is not None:
        s += tl.load(bias_ptr + y, mask=inside, other=0.0)[None, :]
    z = softcap(s, CAP)

    if CAP > 0:
        chain = 1 - (z / CAP) * (z / CAP)

    # Columns, read as a row so that [t, k] compares label t with label k. Masks become numbers early: fewer are held.
    earlier = (y[:, None] == y[None, :]) & (o_t[None, :] < o_t[:, None])
    first = inside & (tl.sum(earlier.to(tl.int32), 1) == 0)
    n = tl.sum(first.to(ACC), 0)
    z = tl.where(first[None, :], z, float("-inf"))
    is_y = tl.where((y[:, None] == y[None, :]) & first[None, :], 1.0, 0.0).to(ACC)
    wrong = tl.sum((valid & (inside == 0)).to(tl.int32), 0) > 0
    scale = tl.where(wrong, float("nan"), 1.0).to(ACC) + tl.zeros((BLOCK_T,), ACC)
    if token_weight_ptr is not None:
        p_scale = token_weight_ptr + i_b * token_weight_strides[0] + o_t.to(tl.int64) * token_weight_strides[1]
        scale *= tl.load(p_scale, mask=valid, other=0.0)
    w = tl.full((BLOCK_T,), 1.0, ACC)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + y, mask=inside, other=0.0)

    z_y = tl.sum(tl.where(is_y > 0, z, 0.0), 1)
    top = tl.max(z, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    lse = top + tl.log(tl.sum(tl.exp(z - shift[:, None]), 1))
    d = (1 - smoothing) * w
    loss = d * (lse - z_y) + z_loss * w * lse * lse
    a = d + 2 * z_loss * w * lse
    if SMOOTH:
        share = smoothing / tl.maximum(n, 1.0) * tl.where(first, w, 0.0)  # of each column
        sum_w = tl.sum(share, 0)
        loss += sum_w * lse - tl.sum(tl.where(share[None, :] != 0, share[None, :] * z, 0.0), 1)
        a += sum_w
    wanted = valid
    if FIRST_FULL:
        wanted = valid & (o_t > tl.min(tl.where(valid, o_t, BLOCK_T), 0))
    tl.store(loss_ptr + i_b * T + o_t, tl.where(wanted, scale * loss, 0.0), mask=o_t < T)
    if NEED_GRAD:
        dz = a[:, None] * tl.exp(z - lse[:, None]) - is_y * d[:, None]
        if SMOOTH:
            dz -= share[None, :]
        if CAP > 0:
            dz *= chain
        dz = tl.where(wanted[:, None], scale[:, None] * dz, 0.0)
        p_dset = dset_ptr + (i_b * T + o_t[:, None]) * T + o_t[None, :]
        tl.store(p_dset, dz, mask=(o_t < T)[:, None] & (o_t < T)[None, :])


@triton.jit
def _caption_bwd_kernel(
    x_ptr, head_ptr, target_ptr, dset_ptr, grad_out_ptr, inv_denom_ptr, dx_ptr, dwords_ptr, dbias_ptr,
    head_strides, target_strides, grad_out_strides,
    T, V, H,
    NEED_X: tl.constexpr, NEED_WORDS: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < T
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    p_g = grad_out_ptr + i_b * grad_out_strides[0] + o_t.to(tl.int64) * grad_out_strides[1]
    g = tl.load(p_g, mask=m_t, other=0.0)
    g *= tl.load(inv_denom_ptr)
    p_dset = dset_ptr + (i_b * T + o_t[:, None]) * T + o_t[None, :]
    ds = tl.load(p_dset, mask=m_t[:, None] & m_t[None, :], other=0.0) * g[:, None]
    p_x = x_ptr + (i_b * T + o_t[:, None]) * H + o_h[None, :]
    x = tl.load(p_x, mask=m_t[:, None] & m_h[None, :], other=0.0)
    if NEED_X:
        p_y = target_ptr + i_b * target_strides[0] + o_t.to(tl.int64) * target_strides[1]
        y = tl.load(p_y, mask=m_t, other=-1)
        words = _load_words(head_ptr, head_strides, y, (y >= 0) & (y < V) & m_t, o_h, m_h, FACTOR)
        dx = tl.dot(ds.to(FACTOR), words, input_precision=PRECISION, out_dtype=ACC)
        p_dx = dx_ptr + (i_b * T + o_t[:, None]) * H + o_h[None, :]
        tl.store(p_dx, dx.to(dx_ptr.dtype.element_ty), mask=m_t[:, None] & m_h[None, :])
    if NEED_WORDS:
        dwords = tl.dot(tl.trans(ds).to(FACTOR), x.to(FACTOR), input_precision=PRECISION, out_dtype=ACC)
        p_dw = dwords_ptr + (i_b * T + o_t[:, None]) * H + o_h[None, :]
        tl.store(p_dw, dwords, mask=m_t[:, None] & m_h[None, :])
        if tl.program_id(1) == 0:
            tl.store(dbias_ptr + i_b * T + o_t, tl.sum(ds, 0), mask=m_t)


class CaptionKernels:
    """The part of LinearKernels that launches these."""

    def fuses(self, x):
        """Whether the candidates are a caption's own words, and few: one kernel then does it all."""
        most = MAX_TOKENS // 2 if x.dtype == torch.float64 else MAX_TOKENS
        return self.own and 0 < self.target.shape[1] <= most

    def caption_forward(self, x, head, loss, dset):
        losses = self._losses(loss)
        for name in ("IDS_PAD", "UNIQUE", "BLOCK_K", "BLOCK_T"):
            losses.pop(name)
        tiles = _tiles(x, self.target)
        self._launch(_caption_fwd_kernel, (self.target.shape[0],), _warps(tiles), dict(
            x_ptr=x, head_ptr=head, bias_ptr=self.bias, target_ptr=self.target, weight_ptr=self.weight, loss_ptr=loss,
            dset_ptr=loss if dset is None else dset, head_strides=head.stride(), target_strides=self.target.stride(),
            **losses, T=self.target.shape[1], V=self.V, H=x.shape[1], NEED_GRAD=dset is not None, **tiles,
        ))  # fmt: skip

    def caption_backward(self, x, head, dset, grad_out, inv_denom, dx, need_words):
        """Writes dx; returns the head's gradient by position, [N, H] and [N, 1]."""
        N, (B, T), tiles = x.shape[0], self.target.shape, _tiles(x, self.target)
        dwords, dbias = dset.new_empty(N if need_words else 0, x.shape[1]), dset.new_empty(N if need_words else 0, 1)
        self._launch(_caption_bwd_kernel, (B, triton.cdiv(x.shape[1], tiles["BLOCK_H"])), _warps(tiles), dict(
            x_ptr=x, head_ptr=head, target_ptr=self.target, dset_ptr=dset, grad_out_ptr=grad_out, inv_denom_ptr=inv_denom,
            dx_ptr=x if dx is None else dx, dwords_ptr=dwords, dbias_ptr=dbias, head_strides=head.stride(),
            target_strides=self.target.stride(), grad_out_strides=grad_out.stride() if grad_out.dim() else (0, 0),
            T=T, V=self.V, H=x.shape[1], NEED_X=dx is not None, NEED_WORDS=need_words, ACC=acc_of(dset), **tiles,
        ))  # fmt: skip
        return dwords, dbias


def _tiles(x, target):
    """Blocks of the kernels of a caption, and how float32 is multiplied: as torch has been told."""
    precision, factor = factors_of(x)
    block = block_of(target.shape[1], MAX_TOKENS)
    features = 32 if block > 32 and x.element_size() > 2 else 64  # 64 spill where H is odd
    return {"PRECISION": precision, "FACTOR": factor, "BLOCK_T": block, "BLOCK_H": features}


def _warps(tiles):
    """With 4, tiles of 64 tokens spill in float32, and those of 32 in float64."""
    return 8 if tiles["BLOCK_T"] > 32 or tiles["FACTOR"] == tl.float64 else 4
