"""The operations, as modules that hold their options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Linear, Module, Parameter

from fastcap import functional as F

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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


class AdditiveAttention(Module):
    """The soft attention of Show, Attend and Tell: `fastcap.functional.additive_attention` with its projections.

    Args:
        value_width: D, of the annotations.
        query_width: H, of the decoder's state.
        attention_width: A, of the hidden layer between them.
        activation: "tanh" (original) or "relu" (the widely used PyTorch tutorial).

    `forward(values, state, mask=None, *, keys=None, alpha=None)`: values [B, L, D], state [B, H], mask [B, L] -> (context
    [B, D], alpha [B, L]). The projection of the annotations does not change while a caption is decoded: pass
    `keys=attention.keys(values)`. To train on whole captions, `attend = attention.steps(values, steps=T)` and then
    `attend(attention.query(state))` at each word: see `fastcap.functional.additive_attention_steps`.

    >>> import torch
    >>> attention = AdditiveAttention(value_width=512, query_width=256, attention_width=128)
    >>> context, alpha = attention(torch.randn(2, 196, 512), torch.randn(2, 256))
    """

    def __init__(self, value_width: int, query_width: int, attention_width: int, *, activation: str = "tanh") -> None:
        super().__init__()
        self.keys = Linear(value_width, attention_width)
        self.query = Linear(query_width, attention_width, bias=False)  # the bias is in keys
        self.score = Linear(attention_width, 1, bias=False)  # the softmax cancels a bias
        self.activation = activation

    def forward(
        self,
        values: Tensor,
        state: Tensor,
        mask: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        keys = self.keys(values) if keys is None else keys
        v = self.score.weight[0]
        return F.additive_attention(keys, self.query(state), v, values, activation=self.activation, mask=mask, alpha=alpha)

    def steps(self, values: Tensor, *, steps: int, mask: Tensor | None = None):
        """`additive_attention_steps` over `values`, for at most `steps` calls with queries."""
        keys, v = self.keys(values), self.score.weight[0]
        return F.additive_attention_steps(keys, v, values, steps=steps, activation=self.activation, mask=mask)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class AttentionCoverage(Module):
    """`fastcap.functional.attention_coverage` with its options kept: Show, Attend and Tell's penalty on attention.

    Args:
        target: what a location's attention should sum to: 1.0, "length" for T_b / L, any finite number, or a tensor [B].
        reduction: "mean", "batchmean", "sum" or "none".

    `forward(alpha, lengths=None, mask=None)`: alpha [B, T, L] or [B, heads, T, L]; lengths [B] or mask [B, T], True where a
    step counts.

    >>> import torch
    >>> coverage = AttentionCoverage(target="length")
    >>> loss = 1.0 * coverage(torch.rand(2, 5, 9).softmax(-1), lengths=[5, 3])
    """

    def __init__(self, *, target: float | str | Tensor = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.target = None if isinstance(target, Tensor) else target
        self.register_buffer("target_sums", target if isinstance(target, Tensor) else None)
        self.reduction = reduction

    def forward(self, alpha: Tensor, lengths: Tensor | list[int] | None = None, mask: Tensor | None = None) -> Tensor:
        target = self.target_sums if self.target is None else self.target
        return F.attention_coverage(alpha, lengths=lengths, mask=mask, target=target, reduction=self.reduction)

    def extra_repr(self) -> str:
        target = f"tensor {list(self.target_sums.shape)}" if self.target is None else repr(self.target)
        return f"target={target}, reduction={self.reduction!r}"


class ContrastiveReward(Module):
    """`fastcap.functional.contrastive_reward` with its options kept: the reward of CLIP-guided captioning.

    Args:
        logit_scale: the inverse temperature; a tensor of one is kept as a buffer, a parameter as a parameter.
        baseline, direction, exclude, clamp, normalize, precision: the function's, with its defaults.

    `forward(text, image, positive=None, *, group=None)`: text [P, D], image [Q, D], positive [P], the image of each text ->
    [P]. `group` are the processes that hold the rows in shards.

    >>> import torch
    >>> reward_of = ContrastiveReward(exclude="group", clamp=(None, 16.0))
    >>> reward = reward_of(torch.randn(6, 512), torch.randn(3, 512), torch.arange(6) // 2)
    """

    def __init__(
        self,
        *,
        logit_scale: float | Tensor = 100.0,
        baseline: str = "logsumexp",
        direction: str = "both",
        exclude: str = "self",
        clamp: tuple[float | None, float | None] | None = None,
        normalize: bool = True,
        precision: str = "highest",
    ) -> None:
        super().__init__()
        if isinstance(logit_scale, Tensor) and not isinstance(logit_scale, Parameter):
            self.register_buffer("logit_scale", logit_scale)
        else:
            self.logit_scale = logit_scale
        self.options = {
            "baseline": baseline,
            "direction": direction,
            "exclude": exclude,
            "clamp": clamp,
            "normalize": normalize,
            "precision": precision,
        }

    def forward(
        self, text: Tensor, image: Tensor, positive: Tensor | None = None, *, group: ProcessGroup | None = None
    ) -> Tensor:
        given = {"positive": positive, "logit_scale": self.logit_scale, "group": group, **self.options}
        return F.contrastive_reward(text, image, **given)

    def extra_repr(self) -> str:
        scale = "tensor" if isinstance(self.logit_scale, Tensor) else repr(self.logit_scale)
        return ", ".join([f"logit_scale={scale}", *(f"{name}={value!r}" for name, value in self.options.items())])
