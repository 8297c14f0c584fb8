"""The operations, as modules that hold their options."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

from fastcap import functional as F


class SubsetCrossEntropyLoss(Module):
    """`fastcap.functional.subset_cross_entropy` with its options kept, as torch.nn.CrossEntropyLoss keeps its own.

    Args:
        subset: as the function's: "caption" (SMILE), "full", "reverse", "random"; or ids [K], kept as a buffer.
        weight: class weights [V] or None, kept as a buffer.
        The other options are the function's, with its defaults.

    `forward(input, target, token_weight=None)`: input [B, T, V], target [B, T], token_weight [B, T] or [B, 1].

    >>> import torch
    >>> criterion = SubsetCrossEntropyLoss(first_token="subset")
    >>> loss = criterion(torch.randn(2, 5, 100), torch.randint(100, (2, 5)))
    """

    def __init__(
        self,
        *,
        subset: str | Tensor = "caption",
        first_token: str = "full",
        mle_weight: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        logit_softcap: float | None = None,
        z_loss: float = 0.0,
        num_random: int = 10,
        seed: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.subset = None if isinstance(subset, Tensor) else subset
        self.register_buffer("subset_ids", subset if isinstance(subset, Tensor) else None)
        self.register_buffer("weight", weight)
        self.options = {
            "first_token": first_token,
            "mle_weight": mle_weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "logit_softcap": logit_softcap,
            "z_loss": z_loss,
            "num_random": num_random,
            "seed": seed,
            "reduction": reduction,
        }

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        subset = self.subset_ids if self.subset is None else self.subset
        return F.subset_cross_entropy(
            input, target, subset=subset, weight=self.weight, token_weight=token_weight, **self.options
        )

    def extra_repr(self) -> str:
        shown = {"subset": self.subset or f"ids {list(self.subset_ids.shape)}", **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
