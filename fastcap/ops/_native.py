"""Calls into fastcap._C: the same launcher functions as fastcap.kernels.<op> has, for the CPU and for CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.errors import bad
from fastcap.ops import _backend
from fastcap.ops._subset import Options

_KINDS = {"set": 0, "reverse": 1, "full": 2}
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _subset_options(options: Options):
    for name, value, known in (("kind", options.kind, _KINDS), ("reduction", options.reduction, _REDUCTIONS)):
        if value not in known:
            raise bad("subset_cross_entropy", name, f"be one of {', '.join(known)}", value, "call the public function")
    fields = options._asdict()
    fields.update(subset=_KINDS[fields.pop("kind")], reduction=_REDUCTIONS[options.reduction])
    return _backend.extension().SubsetCrossEntropyOptions(**fields)


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
