"""Self-critical training: what the steps of `--objective scst` and `--objective new-scst` minimise.

For captions x that the model drew, with r(x) the run's rewards and b(x) a baseline that does not depend on x,

    loss = -sum_x (r(x) - b(x)) log p(x) / sum_x |x|        log p(x) = sum_t log p(x_t | x_<t), over the words and the end

where |x| counts the words of x and its end. Of scst, b is r of the image's greedy caption; of new-scst, the mean of r over
the other samples of the image. A baseline takes away noise alone: the sum over captions of p(x) b grad log p(x) is 0.

Two passes: captions are drawn without gradients, then read back by the model in one forward, whose hidden states the loss
takes with the head's weight; logits [N, T, V] are never made. A caption whose advantage is 0, such as a sample that equals
the greedy one, is not read back: it changes nothing. For an image that is in a batch with two of its captions, captions are
drawn twice.

Sources: Rennie, Marcheret, Mroueh, Ross and Goel, Self-critical Sequence Training for Image Captioning (arXiv:1612.00563);
Luo, A Better Variant of Self-Critical Sequence Training (arXiv:2003.09971).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .rl import reinforce
from .rl_guards import SELF_CRITICAL, Collapse, check_finite
from .rl_policy import Policy, Sequences, hidden_states, without_dropout
from .scst_rewards import SelfCriticalRewarder

_SHOWN = 4  # captions of a line in samples.jsonl


class SelfCriticalLoss:
    """The loss of a run's steps, in the form of `fastcap.train.objectives.TrainingLoss`: `begin`, `part`s, `values`, `end`.

    Args:
        embedder: the CLIP of the reward "similarity", else None.
        pairs, validation: the training and the validation data, `KarpathyDataset`s; there may be none to validate on.
        out: the run's folder.
        autocast: makes the context in which the model runs.
        note: told what takes a while.
    """

    keeps_tensors = False

    def __init__(
        self, config: TrainConfig, model: nn.Module, tokenizer: Any, embedder: Any, pairs: Any, validation: Any, out: Path,
        device: torch.device, autocast: Callable[[], Any], note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._config, self._model, self._embedder = config, model, embedder
        self._autocast, self._device = autocast, device
        self._policy = Policy(model, tokenizer, config)
        given = (tokenizer, embedder, pairs.records, None if validation is None else validation.records)
        self._rewarder = SelfCriticalRewarder(config, *given, out / "reward", device, note)
        self._collapse = Collapse(told=SELF_CRITICAL)

    def begin(self, images: Tensor, batch: dict[str, Any], step: int) -> None:
        """Draws captions of the batch's images and rewards them.

        images: [B, ...] on the device; batch: of the data's `collate`; step: the number of this one, from 1.
        """
        without_dropout(self._model)
        against_greedy = self._config.objective == "scst"
        with self._autocast():
            drawn, greedy = self._policy.captions(images, step, against_greedy)
        said, read, n = self._policy.texts(drawn), self._policy.sequences(drawn), self._config.samples
        rows = self._rewarder.rows(batch["imgids"])
        found = self._rewarder(words_of(read), said, rows.repeat_interleave(n))
        if against_greedy:
            spoken = words_of(self._policy.sequences(greedy))
            baseline = self._rewarder(spoken, self._policy.texts(greedy), rows).total.repeat_interleave(n)
        else:
            baseline = others_mean(found.total, n)
        advantage = found.total - baseline
        told = {"reward": found.total.mean(), "reward_baseline": baseline.mean()}
        told |= {f"reward_{name.replace('-', '_')}": each.mean() for name, each in found.parts.items()}
        told |= {"reward_spread": advantage.std(correction=0), "length": drawn.lengths.float().mean()}
        self._values = {**{name: value.item() for name, value in told.items()}, "unique": len({*said}) / len(said)}
        check_finite(self._values, step)
        if self._config.on_collapse == "stop":
            reward, spread = self._values["reward"], self._values["reward_spread"]
            self._collapse.check(said, reward, spread, step, len({*batch["imgids"]}))
        self._sequences, self._first = read, 0
        self._weights = (advantage / read.lengths.sum()).float()
        self._loss = torch.zeros((), device=self._device)
        self._shown = {"step": step, "captions": _shown(batch, said, found.total, baseline, n)}

    def part(self, images: Tensor, inputs: Tensor, target: Tensor, lengths: Tensor, tokens: int) -> Tensor:
        """The loss of what was drawn for some images of the step, to run backward; the data's own captions have no part."""
        n = self._config.samples
        first, last = self._first * n, (self._first + len(images)) * n
        self._first += len(images)
        kept = self._weights[first:last].nonzero().flatten()
        if not len(kept):
            kept = torch.tensor([0])  # something to run backward; its weight is 0
        read, weight = self._sequences.rows(kept + first), self._weights[kept + first].to(self._device)
        hidden = hidden_states(self._model, images, kept // n, read)
        loss = reinforce(hidden, self._model.head, read.target, weight, int(self._config.memory_budget * 2**20))
        self._loss = self._loss + loss.detach()
        return loss

    def values(self) -> dict[str, float]:
        """`loss`, and the means of the step that docs/recipes/self-critical.md lists."""
        return {"loss": self._loss.item(), **self._values}

    def end(self) -> dict[str, float]:
        """Nothing changes after the optimiser's step."""
        return {}

    def samples(self) -> dict[str, Any]:
        """Some captions of the step with their rewards, as JSON."""
        return self._shown

    def validate(self, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """CIDEr-D of the greedy captions of a validation batch's images, whatever the rewards are, so that runs compare."""
        with self._autocast():
            greedy = self._policy.sequences(self._policy.greedy(images))
        return self._rewarder.of_validation(batch["imgids"], words_of(greedy))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint keeps beside the model: plain values, and no tensors."""
        clip = None if self._embedder is None else self._embedder.fingerprint
        return {"clip": clip, "collapse": dict(self._collapse.counts)}, {}

    def load(self, kept: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Goes on from what `state` gave."""
        self._collapse = Collapse(dict(kept["collapse"]), SELF_CRITICAL)


def words_of(captions: Sequences) -> list[list[int]]:
    """The ids of each caption, with the end as the last word where the caption came to it."""
    lengths = captions.lengths.tolist()
    return [row[:length] for row, length in zip(captions.target.tolist(), lengths, strict=True)]


def others_mean(rewards: Tensor, n: int) -> Tensor:
    """[B n] of rewards [B n], those of an image together: of each the mean over the other n - 1 of its image, n >= 2."""
    by_image = rewards.view(-1, n)
    return ((by_image.sum(1, keepdim=True) - by_image) / (n - 1)).flatten()


def _shown(batch: dict[str, Any], said: list[str], total: Tensor, baseline: Tensor, n: int) -> list[dict[str, Any]]:
    imgids, own = batch["imgids"], batch["captions"]
    return [
        {
            "imgid": imgids[b],
            "drawn": said[b * n],
            "reward": total[b * n].item(),
            "baseline": baseline[b * n].item(),
            "own": own[b],
        }
        for b in range(min(_SHOWN, len(imgids)))
    ]
