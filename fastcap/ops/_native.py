"""Calls into fastcap._C: the same launchers as fastcap.kernels.<op> has, for the CPU and for CUDA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _backend
from fastcap.ops._subset import Options

_KINDS = {"set": 0, "reverse": 1, "full": 2}
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_COVERAGE_REDUCTIONS = {"none": 0, "mean": 1, "batchmean": 2, "sum": 3}


def _subset_options(options: Options):
    for name, value, known in (("kind", options.kind, _KINDS), ("reduction", options.reduction, _REDUCTIONS)):
        if value not in known:
            raise bad("subset_cross_entropy", name, f"be one of {', '.join(known)}", value, "call the public function")
    fields = options._asdict()
    fields.update(subset=_KINDS[fields.pop("kind")], reduction=_REDUCTIONS[options.reduction])
    return _backend.extension().SubsetOptions(**fields)


def _coverage_reduction(reduction: str) -> int:
    if reduction not in _COVERAGE_REDUCTIONS:
        known = ", ".join(_COVERAGE_REDUCTIONS)
        raise bad("attention_coverage", "reduction", f"be one of {known}", reduction, "call the public function")
    return _COVERAGE_REDUCTIONS[reduction]


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    """The same memory, as csrc reads truth values."""
    return None if mask is None else mask.view(torch.uint8)


def _or_none(tensor: Tensor | None) -> Tensor | None:
    """Operators return empty tensors for what was not asked for; csrc knows absent ones."""
    return None if tensor is None or tensor.numel() == 0 else tensor


class CPU:
    @staticmethod
    def subset_cross_entropy_fwd(input, target, ids, weight, token_weight, out, inv_denom, stats, cols, dset, options):
        _backend.extension().subset_cross_entropy_fwd_cpu(
            input, target, ids, weight, token_weight, out, inv_denom, _or_none(stats), _or_none(cols), _or_none(dset),
            _subset_options(options), torch.get_num_threads(),
        )  # fmt: skip

    @staticmethod
    def subset_cross_entropy_bwd(grad_out, inv_denom, input, target, ids, weight, stats, cols, dset, dinput, options):
        _backend.extension().subset_cross_entropy_bwd_cpu(
            grad_out, inv_denom, input, target, ids, weight, _or_none(stats), _or_none(cols), _or_none(dset), dinput,
            _subset_options(options), torch.get_num_threads(),
        )  # fmt: skip

    @staticmethod
    def attention_coverage_fwd(alpha, valid, tau, out, residual, target, reduction):
        _backend.extension().attention_coverage_fwd_cpu(
            alpha, _as_bytes(valid), tau, out, _or_none(residual), target, _coverage_reduction(reduction),
            torch.get_num_threads(),
        )  # fmt: skip

    @staticmethod
    def attention_coverage_bwd(grad_out, residual, valid, dalpha, reduction):
        if dalpha.numel() == 0:
            return
        _backend.extension().attention_coverage_bwd_cpu(
            grad_out, residual, _as_bytes(valid), dalpha, _coverage_reduction(reduction), torch.get_num_threads()
        )

    @staticmethod
    def attention_coverage_from_scores_rows_fwd(scores, key_mask, valid, lse, sums, add):
        _backend.extension().attention_coverage_from_scores_rows_fwd_cpu(
            scores, _as_bytes(key_mask), _as_bytes(valid), lse, sums, add, torch.get_num_threads()
        )

    @staticmethod
    def attention_coverage_from_scores_rows_bwd(scores, key_mask, valid, lse, residual, grad_out, coefficient):
        _backend.extension().attention_coverage_from_scores_rows_bwd_cpu(
            scores, _as_bytes(key_mask), _as_bytes(valid), lse, residual, grad_out, coefficient, torch.get_num_threads()
        )

    @staticmethod
    def additive_attention_weights_fwd(keys, query, v, mask, activation, alpha):
        mask = None if mask is None else mask.view(torch.uint8).contiguous()
        _backend.extension().additive_attention_weights_fwd_cpu(
            keys, query, v, mask, alpha, activation == "relu", torch.get_num_threads()
        )

    @staticmethod
    def additive_attention_weights_bwd(dalpha, alpha, keys, query, v, activation, need_keys, dscore, dquery, dv, dkeys):
        _backend.extension().additive_attention_weights_bwd_cpu(
            dalpha, alpha, keys, query, v, dscore, dquery, _or_none(dv), _or_none(dkeys), activation == "relu",
            torch.get_num_threads(),
        )  # fmt: skip

    @staticmethod
    def additive_attention_context_fwd(weights, values, context):
        _backend.extension().additive_attention_context_fwd_cpu(weights, values, context, torch.get_num_threads())

    @staticmethod
    def additive_attention_context_bwd(dcontext, weights, values, need_weights, need_values, dweights, dvalues):
        _backend.extension().additive_attention_context_bwd_cpu(
            dcontext, weights, values, _or_none(dweights), _or_none(dvalues), torch.get_num_threads()
        )

    @staticmethod
    def additive_attention_memory_bwd(dscores, queries, keys, v, activation, dv, dkeys):
        _backend.extension().additive_attention_memory_bwd_cpu(
            dscores, queries, keys, v, dv, dkeys, activation == "relu", torch.get_num_threads()
        )

    @staticmethod
    def contrastive_reward_block_fwd(
        scores, positive, row_factor, col_factor, own, row_top, row_sum, row_index, col_top, col_sum, col_index, row, col
    ):  # fmt: skip
        _backend.extension().contrastive_reward_block_fwd_cpu(
            scores, positive, row_factor, col_factor, own, row_top, row_sum, row_index, col_top, col_sum, col_index, row,
            col, torch.get_num_threads(),
        )  # fmt: skip

    @staticmethod
    def contrastive_reward_block_bwd(scores, positive, row_factor, col_factor, down, row, drow, col, dcol, first_col):
        _backend.extension().contrastive_reward_block_bwd_cpu(
            scores, positive, row_factor, col_factor, down, row, drow, col, dcol, first_col, torch.get_num_threads()
        )

    @staticmethod
    def contrastive_reward_others_fwd(own, positive, Q, value, index):
        _backend.extension().contrastive_reward_others_fwd_cpu(own, positive, value, _or_none(index), Q)

    @staticmethod
    def contrastive_reward_others_bwd(dvalue, value, own, positive, Q, down):
        _backend.extension().contrastive_reward_others_bwd_cpu(dvalue, value, own, positive, down, Q)

    @staticmethod
    def retrieval_ranks_rows(x, norm, same):
        _backend.extension().retrieval_ranks_rows_cpu(x, norm, same, torch.get_num_threads())

    @staticmethod
    def retrieval_ranks_own(pairs):
        _backend.extension().retrieval_ranks_own_cpu(pairs, torch.get_num_threads())

    @staticmethod
    def retrieval_ranks_block(pairs, scores, row, col, text_same, image_same, texts, counts, last):
        return _backend.extension().retrieval_ranks_block_cpu(
            pairs, scores, row, col, text_same, image_same, texts, *counts, last, torch.get_num_threads()
        )


class CUDA:
    @staticmethod
    def subset_cross_entropy_fwd(input, target, ids, weight, token_weight, out, inv_denom, stats, cols, dset, options):
        if target.numel() == 0:
            out.zero_()
            inv_denom.zero_()
            return
        from fastcap.kernels._ids import excluded_marks, without_repeats

        excluded = excluded_marks(ids, options.ids_pad, input.shape[2]) if options.kind == "reverse" else None
        if options.kind == "set":
            ids = without_repeats(ids, options.ids_pad)
        scratch = None if options.reduction == "none" else out.new_empty((2, *target.shape))
        with torch.cuda.device(input.device):
            _backend.extension().subset_cross_entropy_fwd_cuda(
                input, target, ids, weight, token_weight, out, inv_denom, _or_none(stats), _or_none(cols), _or_none(dset),
                scratch, excluded, _subset_options(options), torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip

    @staticmethod
    def subset_cross_entropy_bwd(grad_out, inv_denom, input, target, ids, weight, stats, cols, dset, dinput, options):
        if dinput.numel() == 0:
            return
        from fastcap.kernels._ids import excluded_marks

        excluded = excluded_marks(ids, options.ids_pad, dinput.shape[2]) if options.kind == "reverse" else None
        with torch.cuda.device(dinput.device):
            _backend.extension().subset_cross_entropy_bwd_cuda(
                grad_out, inv_denom, input, target, ids, weight, _or_none(stats), _or_none(cols), _or_none(dset), dinput,
                excluded, _subset_options(options), torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip

    @staticmethod
    def attention_coverage_fwd(alpha, valid, tau, out, residual, target, reduction):
        if 0 in alpha.shape[:-2]:  # no captions
            out.zero_()
            return
        c, how = _backend.extension(), _coverage_reduction(reduction)
        scratch = None if reduction == "none" else out.new_empty(c.attention_coverage_blocks_cuda(alpha))
        with torch.cuda.device(alpha.device):
            stream = torch.cuda.current_stream().cuda_stream
            c.attention_coverage_fwd_cuda(
                alpha, _as_bytes(valid), tau, out, _or_none(residual), scratch, target, how, stream
            )

    @staticmethod
    def attention_coverage_bwd(grad_out, residual, valid, dalpha, reduction):
        if dalpha.numel() == 0:
            return
        with torch.cuda.device(dalpha.device):
            stream = torch.cuda.current_stream().cuda_stream
            _backend.extension().attention_coverage_bwd_cuda(
                grad_out, residual, _as_bytes(valid), dalpha, _coverage_reduction(reduction), stream
            )


class Words(NamedTuple):
    """M tokens by their ids."""

    distinct: Tensor  # [U], ascending
    group: Tensor  # [M]: the place of each token's id among them, -1 where it has none


class LinearKernels:
    """linear_subset_cross_entropy's row kernels on the CPU, for one batch. `rows` are the dense rows' tokens."""

    def __init__(self, target, ids, weight, token_weight, bias, V, options):
        own = options.kind == "set" and ids is None  # the candidates are the caption's words
        self._tensors = target, target.unsqueeze(1) if own else ids, weight, token_weight, bias
        self._c, self._options, self._threads = _backend.extension(), _subset_options(options), torch.get_num_threads()
        self._tokens = self._c.LinearTokens(*self._tensors, V)
        self._V, self._columns = V, 1 + (self._tensors[1].shape[2] if options.kind == "set" else 0)

    def find_rows(self, rows: Tensor, inv_denom: Tensor) -> Tensor:
        """Checks the labels; writes `rows` and `inv_denom`; returns those rows that there are."""
        n = self._c.linear_subset_cross_entropy_tokens_cpu(self._tokens, _or_none(rows), inv_denom, self._options)
        return rows[:n]

    def kept_rows(self, rows: Tensor) -> Tensor:
        return rows[: int((rows >= 0).sum())]

    def fuses(self, x: Tensor) -> bool:
        """Products are torch's on the CPU."""
        return False

    def reduce(self, loss: Tensor, inv_denom: Tensor, out: Tensor) -> None:
        """The sum of the losses times inv_denom; 0 where that is 0, whatever the losses."""
        factor = inv_denom.item()
        out.fill_(loss.sum(dtype=torch.float64).item() * factor if factor else 0.0)

    def set(self, scores, score_y, loss, dset):
        self._c.linear_subset_cross_entropy_set_cpu(self._tokens, scores, score_y, loss, dset, self._options, self._threads)

    def rows(self, logits, rows, loss, need_grad):
        self._c.linear_subset_cross_entropy_rows_cpu(
            self._tokens, logits, rows, loss, need_grad, self._options, self._threads
        )

    def start(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.zeros(n, 8, dtype=torch.float64)
        state[:, ::4] = -torch.inf
        return state, torch.zeros(n, self._columns, dtype=like.dtype)

    def absorb(self, logits, begin, rows, running):
        self._c.linear_subset_cross_entropy_absorb_cpu(
            self._tokens, logits, begin, rows, *running, self._options, self._threads
        )

    def finish(self, rows, running, loss, stats, cols, dset):
        n = rows.shape[0]
        self._c.linear_subset_cross_entropy_finish_cpu(
            self._tokens, rows, *running, loss, *self._first(n, stats, cols, dset), self._options
        )

    def emit(self, logits, begin, rows, stats, cols, dset):
        self._c.linear_subset_cross_entropy_emit_cpu(
            self._tokens, logits, begin, rows, *self._first(rows.shape[0], stats, cols, dset), self._options, self._threads
        )

    def _first(self, n, stats, cols, dset):
        """What n rows use of tensors made for more: stats [8 * n], cols and dset [n, C]."""
        if stats.numel() == 0:
            return None, None, None
        stats = stats.view(-1)[: 8 * n].view(8, n)
        return (stats, cols[:n], dset[:n]) if cols.numel() else (stats, None, None)

    def group(self, ids: Tensor) -> Words:
        """The tokens by their ids [M]; -1 is none."""
        group, distinct = torch.empty_like(ids), torch.empty_like(ids)
        U = self._c.linear_subset_cross_entropy_group_cpu(ids, -1, self._V, group, distinct)
        return Words(distinct[:U], group)

    def add_rows(self, values, words, begin, end, factor, source, share):
        """values [U, H] += the source rows of the tokens [begin, end), times their factor, by word."""
        group = words.group[begin:end]
        self._c.linear_subset_cross_entropy_add_rows_cpu(values, group, factor, source, share, self._threads)

    def write_rows(self, out, ids, values, add, clear):
        if out.stride(1) != 1 and out.shape[1] > 1:  # rows that are not contiguous: somebody's own .grad
            out[ids] = (out[ids].to(values.dtype) + values if add else values).to(out.dtype)
            return
        if out.dtype != torch.float64:
            values = values.float()
        self._c.linear_subset_cross_entropy_write_rows_cpu(out, ids, values, add, clear, self._threads)

    def sparse_rows(self, ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
        return torch.sparse_coo_tensor(ids.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False)

    def advise(self, tensor: Tensor) -> None:
        self._c.advise_huge_pages(tensor)
