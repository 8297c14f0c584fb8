"""Calls into fastcap._C: the same launcher functions as fastcap.kernels.<op> has, for the CPU and for CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcap.ops import _backend
from fastcap.ops._subset import Options

_KINDS = {"set": 0, "reverse": 1, "full": 2}
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _subset_options(options: Options):
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
