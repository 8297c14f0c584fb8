"""A run by reward from its first step: which objective it takes, and the steps by likelihood that it may begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcap.objectives import SELF_CRITICAL

from . import embedders, rl
from .config import TrainConfig
from .objectives import TrainingLoss
from .scst import SelfCriticalLoss


def make(
    config: TrainConfig, model: nn.Module, tokenizer: Any, embedder: Any, loss_fn: Any, kept: dict[str, Any] | None,
    data: tuple, out: Path, device: torch.device, autocast: Callable[[], Any], note: Callable[[str], None],
) -> Any:  # fmt: skip
    """What the steps of a run by reward minimise.

    embedder: in place of `config.reward_clip`; kept: of `state`, where a run is resumed; data: to train on, and to validate
    on or None. The rest is of `fastcap.train.rl.ReinforcedLoss`.
    """
    rl.check(config, model, embedder, loss_fn)
    if embedder is None and config.reward_clip:
        embedder = embedders.load(config.reward_clip, device)
    if kept is not None and embedder is not None:  # before it embeds all pictures
        rl.check_resumed(kept, embedder, config.reward_clip)
    if config.objective in SELF_CRITICAL:
        made = SelfCriticalLoss(config, model, tokenizer, embedder, *data, out, device, autocast, note)
    else:
        made = rl.ReinforcedLoss(config, model, tokenizer, embedder, data[0], out, device, autocast, note)
    return WarmedUp(config, model, made) if config.mle_steps else made


class WarmedUp:
    """The first `mle_steps` of a run by likelihood, with its coverage, scheduled sampling and label smoothing; the rest by
    `reinforced`, whose state a checkpoint keeps from the start."""

    def __init__(self, config: TrainConfig, model: nn.Module, reinforced: Any) -> None:
        self._steps, self._reinforced = config.mle_steps, reinforced
        self._likelihood = TrainingLoss(config.as_likelihood(), model, None)
        self.keeps_tensors = reinforced.keeps_tensors
        self.validate, self.state, self.load = reinforced.validate, reinforced.state, reinforced.load

    def begin(self, images: Tensor, batch: dict[str, Any], step: int) -> None:
        self._now = self._likelihood if step <= self._steps else self._reinforced
        self._now.begin(images, batch, step)
        self.part, self.values, self.end = self._now.part, self._now.values, self._now.end

    def samples(self) -> dict[str, Any] | None:
        """None in the steps by likelihood, which draw nothing."""
        return self._reinforced.samples() if self._now is self._reinforced else None
