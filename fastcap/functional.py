"""The operations, as functions. `from fastcap import functional as F_cap`."""

from fastcap.ops.subset_cross_entropy import subset_cross_entropy

__all__ = ["subset_cross_entropy"]
