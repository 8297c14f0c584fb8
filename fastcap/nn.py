"""The operations, as modules that hold their options."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

from fastcap import functional as F


class _SubsetLoss(Module):
    """The options that the losses over a subset share, kept; `subset` ids and class weights as buffers."""

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

    def _arguments(self, token_weight: Tensor | None) -> dict:
        subset = self.subset_ids if self.subset is None else self.subset
        return {"subset": subset, "weight": self.weight, "token_weight": token_weight, **self.options}

    def extra_repr(self) -> str:
        shown = {"subset": self.subset or f"ids {list(self.subset_ids.shape)}", **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class SubsetCrossEntropyLoss(_SubsetLoss):
    """`fastcap.functional.subset_cross_entropy` with its options kept, as torch.nn.CrossEntropyLoss keeps its own.

    Args:
        subset: as the function's: "caption" (SMILE), "full", "reverse", "random"; or ids [K], kept as a buffer.
        weight: class weights [V] or None, kept as a buffer.
        first_token, mle_weight, ignore_index, label_smoothing, logit_softcap, z_loss, num_random, seed, reduction: the
            function's, with its defaults.

    `forward(input, target, token_weight=None)`: input [B, T, V], target [B, T], token_weight [B, T] or [B, 1].

    >>> import torch
    >>> criterion = SubsetCrossEntropyLoss(first_token="subset")
    >>> loss = criterion(torch.randn(2, 5, 100), torch.randint(100, (2, 5)))
    """

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        return F.subset_cross_entropy(input, target, **self._arguments(token_weight))


class LinearSubsetCrossEntropyLoss(_SubsetLoss):
    """`fastcap.functional.linear_subset_cross_entropy` with its options kept.

    Args:
        grad_weight: "dense", "sparse" or "accumulate", as the function's.
        memory_budget: bytes of scratch, or None for the function's own.
        The others are those of `SubsetCrossEntropyLoss`.

    `forward(input, linear_weight, target, linear_bias=None, token_weight=None)`: input [B, T, H] hidden states,
    linear_weight [V, H] and linear_bias [V] of the head, target [B, T], token_weight [B, T] or [B, 1]. The head stays the
    model's: it is passed in and not a parameter of the loss.

    >>> import torch
    >>> head = torch.nn.Linear(16, 100)
    >>> criterion = LinearSubsetCrossEntropyLoss(mle_weight=0.01)
    >>> loss = criterion(torch.randn(2, 5, 16), head.weight, torch.randint(100, (2, 5)), head.bias)
    """

    def __init__(self, *, grad_weight: str = "dense", memory_budget: int | None = None, **options) -> None:
        super().__init__(**options)
        self.options.update(grad_weight=grad_weight, memory_budget=memory_budget)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        arguments = self._arguments(token_weight)
        return F.linear_subset_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **arguments)
