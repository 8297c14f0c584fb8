"""The loss of a run: its objective, through the model's head, and what attention adds to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastcap.data import Attributed
from fastcap.errors import bad
from fastcap.functional import linear_subset_cross_entropy
from fastcap.models import Glied
from fastcap.objectives import OBJECTIVES, REINFORCED

from .attention_terms import coverage_penalty, coverage_penalty_of_heads, hard_attention_loss, update_baseline
from .config import TrainConfig

IGNORE = -100
ATTRIBUTE_WEIGHT = 0.1  # of the cross-entropy of attribute words, added up over them: some twelve nats at first

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, T, V], target [B, T] with -100 where there is no word) -> the mean over valid tokens, a scalar."""


def make_loss(config: TrainConfig, head: nn.Linear, reduction: str = "mean") -> LossFunction:
    """The objective of a run: `loss(hidden [B, T, H], target)`, fused with `head`, which would make logits [B * T, V].

    "smile" needs the whole vocabulary for the first words alone, [B, V]; "mle", "smile+mle" and "resmile" need it for every
    word. The gradient of the logits so needed is kept from the forward to the backward where it fits
    `config.memory_budget`, else logits are made in blocks. (The reference backend, plain torch, makes them all.)

    Label smoothing is part of MLE alone (`recipes.complete` refuses it elsewhere), so a mixture is one pass over the
    vocabulary. `reduction="none"` gives the loss of each token, [B, T]. Of a run by reinforcement it is MLE, to validate by.
    """
    options = dict(OBJECTIVES["mle" if config.objective in REINFORCED else config.objective])
    if config.objective == "mle":
        options["label_smoothing"] = config.label_smoothing or 0.0
    if config.objective == "smile+mle" and config.mle_weight is not None:
        options["mle_weight"] = config.mle_weight
    options["memory_budget"] = int(config.memory_budget * 2**20)
    options["reduction"] = reduction

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return linear_subset_cross_entropy(hidden, head.weight, target, linear_bias=head.bias, **options)

    return loss


class _Read(NamedTuple):
    """Of a model that is not asked for more: hidden states, or logits for a loss of one's own; and attention, if any."""

    hidden: Tensor
    alphas: Tensor | None


class TrainingLoss:
    """What the steps of a run minimise: the objective and, where the model attends, the terms that the run asks for.

    A step is `begin` with its batch, `part` for each part in which it is computed, whose losses add up to the batch's, and
    `end`. What an optimiser step changes beside the weights, the baseline of hard attention, `end` changes.

    Args:
        loss_fn: of one's own, on logits, in place of the objective.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, loss_fn: LossFunction | None) -> None:
        self._config, self._model, self._loss_fn = config, model, loss_fn
        self._attends, self._heads = hasattr(model, "teacher_forced"), isinstance(model, Glied)
        self._hard = getattr(model.config, "attention", None) == "hard"
        if self._hard and loss_fn is not None:
            remedy = "train with attention='soft', or with one of the objectives"
            rule = "be left out with hard attention, which needs the loss of each token"
            raise bad("train", "loss_fn", rule, loss_fn, remedy)
        self._objective = make_loss(config, model.head, "none" if self._hard else "mean")

    def begin(self, images: Tensor, batch: dict[str, Any], step: int) -> None:
        """Counts what the batch of a step holds, which lies on the CPU; `images` are on the device."""
        target = batch["target"]
        self._tokens, self._captions = int((target != IGNORE).sum()), len(target)
        self._locations = None
        if self._config.coverage:
            mask = self._model.encoder.mask(images.images if isinstance(images, Attributed) else images)
            self._locations = None if mask is None else mask.sum().clamp(min=1)
        self._sums: dict[str, Tensor] = {}

    def part(self, images: Tensor, inputs: Tensor, target: Tensor, lengths: Tensor, tokens: int) -> Tensor:
        """The loss of some captions of the step, `tokens` of whose targets count, to run backward."""
        decoded = self._decode(images, inputs, lengths)
        if self._hard:
            losses = self._objective(decoded.hidden, target)
            loss = losses.sum() / self._tokens
            self._add("loss", loss)
            self._add("entropy", decoded.entropy.sum() / self._tokens)
            given = decoded.log_probs, decoded.entropy, lengths, self._model.baseline, self._tokens
            loss = loss + hard_attention_loss(losses, *given)
        else:
            objective = self._loss_fn or self._objective
            # each part's mean, weighted by its tokens: the sum is the mean over the tokens of the whole batch
            loss = objective(decoded.hidden, target) * (tokens / self._tokens)
            self._add("loss", loss)
        if self._config.coverage:
            penalty = self._coverage(images, decoded, lengths)
            self._add("coverage", penalty)
            loss = loss + self._config.coverage * penalty
        if self._heads and decoded.absent is not None:
            attributes = self._model.predictor.loss(decoded.absent, target).sum() / self._captions
            self._add("attributes", attributes)
            loss = loss + ATTRIBUTE_WEIGHT * attributes
        return loss

    def values(self) -> dict[str, float]:
        """What the parts so far added up to: `loss`, the objective alone, and where they are `coverage`, not weighted,
        `attributes`, the cross-entropy of a caption's attribute words, not weighted, and `entropy`, in nats a token."""
        return {name: value.item() for name, value in self._sums.items()}

    def end(self) -> dict[str, float]:
        """After the optimiser's step: the baseline, moved, where there is one."""
        if not self._hard:
            return {}
        update_baseline(self._model.baseline, self._sums["loss"])
        return {"baseline": self._model.baseline.item()}

    def _decode(self, images: Tensor, inputs: Tensor, lengths: Tensor) -> Any:
        """`Decoded`; with a loss of one's own, logits are in place of the hidden states."""
        options = {"scheduled_sampling": self._config.scheduled_sampling} if self._config.scheduled_sampling else {}
        if self._heads:
            read = self._model.teacher_forced(images, inputs, lengths)
            return read if self._loss_fn is None else read._replace(hidden=self._model.head(read.hidden))
        if self._loss_fn is not None:
            return _Read(*self._model(images, inputs, lengths, **options))
        if self._attends:
            return self._model.teacher_forced(images, inputs, lengths, **options)
        return _Read(self._model.hidden_states(images, inputs, lengths), None)

    def _coverage(self, images: Tensor, decoded: Any, lengths: Tensor) -> Tensor:
        config = self._config
        options = {"captions": self._captions, "locations": self._locations}
        options |= {"target": config.coverage_target, "reduction": config.coverage_reduction}
        if self._heads:
            return coverage_penalty_of_heads(decoded.query, decoded.key, lengths, decoded.mask, **options)
        return coverage_penalty(decoded.alphas, lengths, self._model.encoder.mask(images), **options)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
