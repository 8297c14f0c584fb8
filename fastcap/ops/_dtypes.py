"""The dtypes in which operations sum and answer."""

from __future__ import annotations

import torch
from torch import Tensor


def acc_of(x: Tensor) -> torch.dtype:
    """What sums of its elements run in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widens(x: Tensor) -> bool:
    """Whether autocast is on for `x`, and results are float32 whatever its dtype; float64 stays float64."""
    device = x.device.type
    return device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device)


def result_of(x: Tensor) -> torch.dtype:
    """The dtype of a result that is of the dtype of `x`."""
    return torch.float32 if widens(x) else x.dtype
