"""Attention coverage, the penalty of Show, Attend and Tell. Maths and names: csrc/attention_coverage/attention_coverage.h.

Forward: one program a block of locations of one caption and head. It adds its columns over the valid steps in registers, a
tile of steps at a time, and writes the residuals and the sum of their squares; a second launch of one program adds those, in
a fixed order. Backward: one launch, the same blocks, writes each residual's gradient to the valid steps and 0 to the others;
where all steps are valid it writes one row, which the caller expands.

Floor, bytes, per caption and head: forward T * L * itemsize read and 4 L written; backward 4 L read, and L * itemsize
written, or T * L * itemsize where some step is invalid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastcap.kernels._common import Launch, acc_of, block_of, run
from fastcap.kernels._totals import divisor, scaled_sum_kernel


@triton.jit
def _attention_coverage_fwd_kernel(
    alpha_ptr, valid_ptr, tau_ptr, residual_ptr, out_ptr, part_ptr,
    alpha_strides, valid_strides, tau_stride,
    HEADS, T, L, NUM_BLOCKS, target: tl.float64,
    VEC: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    i_l = tl.program_id(0) % NUM_BLOCKS
    i_b, i_h = i_n // HEADS, i_n % HEADS
    o_l = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < L * VEC
    # Strides and L are counted in packs of VEC elements: so the compiler knows that rows can be read by 16 bytes.
    p_alpha = alpha_ptr + (i_b * alpha_strides[0] + i_h * alpha_strides[1]) * VEC
    p_l = p_alpha + o_l.to(tl.int64) * alpha_strides[3]
    sums = tl.zeros((BLOCK_T, BLOCK_L), ACC)
    for start in range(0, T, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        if valid_ptr is not None:
            p_valid = valid_ptr + i_b * valid_strides[0] + o_t.to(tl.int64) * valid_strides[1]
            m_t = m_t & (tl.load(p_valid, mask=m_t, other=0) != 0)
        p_tile = p_l[None, :] + (o_t.to(tl.int64) * alpha_strides[2] * VEC)[:, None]
        sums += tl.load(p_tile, mask=m_t[:, None] & m_l[None, :], other=0.0).to(ACC)
    if tau_ptr is None:
        tau = tl.full((), target, ACC)
    else:
        tau = tl.load(tau_ptr + i_b * tau_stride)
    r = tau - tl.sum(sums, 0)
    o_out = i_n * (L * VEC) + o_l
    if residual_ptr is not None:
        tl.store(residual_ptr + o_out, r, mask=m_l)
    if out_ptr is not None:
        tl.store(out_ptr + o_out, r * r, mask=m_l)
    if part_ptr is not None:
        tl.store(part_ptr + tl.program_id(0), tl.sum(tl.where(m_l, r * r, 0.0), 0))


@triton.jit
def _attention_coverage_bwd_kernel(
    grad_out_ptr, residual_ptr, valid_ptr, dalpha_ptr,
    grad_out_strides, valid_strides,
    HEADS, T, L, NUM_BLOCKS, scale: tl.float64,
    PER_LOCATION: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64) // NUM_BLOCKS
    i_l = tl.program_id(0) % NUM_BLOCKS
    i_b, i_h = i_n // HEADS, i_n % HEADS
    o_l = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < L * VEC
    if PER_LOCATION:
        p_grad = grad_out_ptr + i_b * grad_out_strides[0] + i_h * grad_out_strides[1]
        g = tl.load(p_grad + o_l.to(tl.int64) * grad_out_strides[2], mask=m_l, other=0.0)
    else:
        g = tl.load(grad_out_ptr)
    r = tl.load(residual_ptr + i_n * (L * VEC) + o_l, mask=m_l, other=0.0)
    d = tl.full((), scale, ACC) * r * g
    p_l = dalpha_ptr + i_n * T * (L * VEC) + o_l
    for start in range(0, T, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        tile = tl.broadcast_to(d[None, :], (BLOCK_T, BLOCK_L))
        if valid_ptr is not None:
            p_valid = valid_ptr + i_b * valid_strides[0] + o_t.to(tl.int64) * valid_strides[1]
            counts = tl.load(p_valid, mask=m_t, other=0) != 0
            tile = tl.where(counts[:, None], tile, 0.0)
        p_tile = p_l[None, :] + (o_t.to(tl.int64) * L * VEC)[:, None]
        tl.store(p_tile, tile.to(dalpha_ptr.dtype.element_ty), mask=m_t[:, None] & m_l[None, :])


# Launchers -------------------------------------------------------------------------------------------------------------


def _sizes(x) -> tuple[int, int, int, int]:
    """B, heads, T and L of [B, T, L] or [B, heads, T, L]."""
    return (x.shape[0], 1, *x.shape[1:]) if x.dim() == 3 else tuple(x.shape)


def _strides(x) -> list[int]:
    """Four strides; 0 for a dimension of one element, which nothing steps over."""
    strides = (x.stride(0), 0, x.stride(1), x.stride(2)) if x.dim() == 3 else x.stride()
    return [0 if size == 1 else stride for size, stride in zip(_sizes(x), strides, strict=True)]


def _pack(x) -> int:
    """How many elements side by side can be one load or store, wherever a row begins: 16 bytes or 1 element."""
    vec = 16 // x.element_size()
    *outer, last = _strides(x)
    whole = (last == 1 or x.shape[-1] == 1) and x.shape[-1] % vec == 0 and not any(stride % vec for stride in outer)
    return vec if whole else 1


# fmt: off
def plan_attention_coverage_fwd(alpha, valid, tau, out, residual, target, reduction) -> list[Launch]:
    """The launches of the forward. Scratch is made here; nothing is launched."""
    B, heads, T, L = _sizes(alpha)
    vec, none = _pack(alpha), reduction == "none"
    *outer, last = _strides(alpha)
    block_l = block_of(L, 64 if alpha.element_size() > 2 else 128)
    num_blocks = triton.cdiv(L, block_l)
    parts = None if none else out.new_empty(B * heads * num_blocks)
    forward = Launch(_attention_coverage_fwd_kernel, (B * heads * num_blocks,), dict(
        alpha_ptr=alpha, valid_ptr=None if valid is None else valid.view(torch.uint8), tau_ptr=tau,
        residual_ptr=residual if residual.numel() else None, out_ptr=out if none else None, part_ptr=parts,
        alpha_strides=(*(stride // vec for stride in outer), last),
        valid_strides=(0, 0) if valid is None else valid.stride(), tau_stride=0 if tau is None else tau.stride(0),
        HEADS=heads, T=T, L=L // vec, NUM_BLOCKS=num_blocks, target=target,
        VEC=vec, ACC=acc_of(alpha), BLOCK_T=16, BLOCK_L=block_l,
    ))
    if none:
        return [forward]
    return [forward, Launch(scaled_sum_kernel, (1,), dict(
        part_ptr=parts, out_ptr=out, N=B * heads * num_blocks, scale=1 / divisor(B * heads, L, reduction),
        BLOCK_N=block_of(B * heads * num_blocks, 2048),
    ), num_warps=8)]


def plan_attention_coverage_bwd(grad_out, residual, valid, dalpha, reduction) -> list[Launch]:
    """The one launch of the backward."""
    B, heads, T, L = _sizes(dalpha)
    vec, per_location = _pack(dalpha), reduction == "none"
    strides = (0, 0, 0)
    if per_location:
        strides = grad_out.stride() if grad_out.dim() == 3 else (grad_out.stride(0), 0, grad_out.stride(1))
    block_l = block_of(L, 256 if T == 1 else 64 if dalpha.element_size() > 2 else 128)
    num_blocks = triton.cdiv(L, block_l)
    return [Launch(_attention_coverage_bwd_kernel, (B * heads * num_blocks,), dict(
        grad_out_ptr=grad_out, residual_ptr=residual, valid_ptr=None if valid is None else valid.view(torch.uint8),
        dalpha_ptr=dalpha, grad_out_strides=strides, valid_strides=(0, 0) if valid is None else valid.stride(),
        HEADS=heads, T=T, L=L // vec, NUM_BLOCKS=num_blocks, scale=-2 / divisor(B * heads, L, reduction),
        PER_LOCATION=per_location, VEC=vec, ACC=acc_of(dalpha), BLOCK_T=1 if T == 1 else 16, BLOCK_L=block_l,
    ), num_warps=2 if T == 1 else 4)]
# fmt: on


def attention_coverage_fwd(alpha, valid, tau, out, residual, target, reduction) -> None:
    """Writes the outputs of torch.ops.fastcap.attention_coverage_fwd."""
    if 0 in alpha.shape[:-2]:  # no captions
        out.zero_()
    else:
        run(plan_attention_coverage_fwd(alpha, valid, tau, out, residual, target, reduction), alpha)


def attention_coverage_bwd(grad_out, residual, valid, dalpha, reduction) -> None:
    """Writes dalpha, the output of torch.ops.fastcap.attention_coverage_bwd."""
    if dalpha.numel() > 0:
        run(plan_attention_coverage_bwd(grad_out, residual, valid, dalpha, reduction), dalpha)
