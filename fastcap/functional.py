"""The operations, as functions. `from fastcap import functional as F_cap`."""

from fastcap.ops.linear_subset_cross_entropy import linear_subset_cross_entropy
from fastcap.ops.subset_cross_entropy import subset_cross_entropy

__all__ = ["linear_subset_cross_entropy", "subset_cross_entropy"]
