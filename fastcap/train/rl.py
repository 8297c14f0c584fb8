"""Distinctive captions by reinforcement: what the steps of `--objective wtf-rl` minimise.

For captions x of an image, with r(x) = alpha r_sim(x) + (1 - alpha) r_disc(x) and log p the mean over a caption's words and
its end,

    loss = mean over captions that the model drew   of -r(x) log p(x)          REINFORCE
         + mean over the batch's own captions       of -w(r(x)) log p(x)       teacher forcing, weighted by reward

r_sim is `fastcap.rewards.SimilarityReward` over the drawn, the own and the greedy captions of the batch and over its images
and their neighbours; r_disc is the probability of a human by `fastcap.rewards.Adversary`, as it was before it learns from
the same step. Drawn captions are weighted by r as it is: what its baseline subtracts is all that is subtracted, and nothing
is scaled. w is `--gt-weight`: max(r, 0) ("clamp0"), r less its mean over the batch ("centered"), r ("raw"), or 0 ("none").

Two passes: captions are drawn without gradients, then read back by the model, drawn and own ones in one forward, whose
hidden states the loss takes with the head's weight; logits [N, T, V] are never made, and the memory is that of one forward.

Source: Chaffin, Claveau and Kijak, Distinctive Image Captioning: Leveraging Ground Truth Captions in CLIP Guided
Reinforcement Learning (arXiv:2402.13936).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcap.data import Attributed
from fastcap.errors import bad
from fastcap.functional import linear_subset_cross_entropy
from fastcap.rewards import parse_rewards

from .config import TrainConfig
from .rl_guards import Collapse, check_finite
from .rl_policy import Policy, Sequences, hidden_states, joined, without_dropout
from .rl_rewards import Rewarder, Rewards

_SHOWN = 4  # captions of a line in samples.jsonl


def check(config: TrainConfig, model: nn.Module, embedder: Any, loss_fn: Any) -> None:
    """Raises for what does not combine with reinforcement."""
    if needs_clip(config) and embedder is None and not config.reward_clip:
        remedy = "pass --reward-clip RUN of fastcap train --model clip, or the folder or hub name of a transformers CLIP"
        what = f"objective {config.objective}" if config.objective == "wtf-rl" else f"rewards {config.rewards!r}"
        raise bad("train", "reward_clip", f"be given with {what}", None, remedy)
    if embedder is not None and not needs_clip(config):
        remedy = "or give similarity a weight, such as rewards='cider-d=1,similarity=0.2'"
        raise bad("train", "embedder", f"be left out with rewards {config.rewards!r}", embedder, remedy)
    if not config.init_from and config.pretrained in (None, "none") and not config.mle_steps:
        remedy = (
            "train a captioner with --objective mle first and pass its run, or begin with steps by likelihood, "
            "--mle-steps 2000: a random one has no captions to improve"
        )
        raise bad("train", "init_from", f"be given with objective {config.objective}", None, remedy)
    if loss_fn is not None:
        raise bad("train", "loss_fn", f"be left out with objective {config.objective}", loss_fn, "leave one of them out")
    if getattr(getattr(model, "config", None), "attention", None) == "hard":
        remedy = "start from a captioner with soft attention: hard attention's locations need an estimator of their own"
        raise bad("train", "attention", f"be soft or mean with objective {config.objective}", "hard", remedy)


def needs_clip(config: TrainConfig) -> bool:
    """Whether the objective looks at pictures and captions with a CLIP."""
    return config.objective == "wtf-rl" or "similarity" in parse_rewards(config.rewards, "train")


def check_resumed(kept: dict[str, Any], embedder: Any, reward_clip: str | None) -> None:
    """Raises where a run goes on with another CLIP than it began with; kept: of `ReinforcedLoss.state`."""
    if kept.get("clip") != embedder.fingerprint:
        rule, remedy = "have the weights that the run began with", "pass the CLIP of before, or start a new run"
        raise bad("train", "reward_clip", rule, f"others ({reward_clip})", remedy)


class ReinforcedLoss:
    """The loss of a run's steps, in the form of `fastcap.train.objectives.TrainingLoss`: `begin`, `part`s, `values`, `end`.

    Args:
        embedder: the reward's CLIP.
        pairs: the training data, a `KarpathyDataset`.
        out: the run's folder.
        autocast: makes the context in which the model runs.
        note: told what takes a while.
    """

    def __init__(
        self, config: TrainConfig, model: nn.Module, tokenizer: Any, embedder: Any, pairs: Any, out: Path,
        device: torch.device, autocast: Callable[[], Any], note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._config, self._model, self._pad = config, model, tokenizer.pad_id
        self._embedder, self._autocast, self._device = embedder, autocast, device
        self._policy = Policy(model, tokenizer, config)
        self._rewarder = Rewarder(config, embedder, pairs.records, out / "reward", device, note)
        self._collapse = Collapse()

    @property
    def keeps_tensors(self) -> bool:
        """Whether a checkpoint has tensors of it: the discriminator's."""
        return self._rewarder.adversary is not None

    def begin(self, images: Tensor, batch: dict[str, Any], step: int) -> None:
        """Draws captions of the batch's images, rewards them and the batch's own, and teaches the discriminator.

        images: [B, ...] on the device; batch: of the data's `collate`; step: the number of this one, from 1.
        """
        without_dropout(self._model)
        with self._autocast():
            drawn, greedy = self._policy.captions(images, step, self._rewarder.uses_greedy)
        said, own = self._policy.texts(drawn), list(batch["captions"])
        spoken = None if greedy is None else self._policy.texts(greedy)
        rewards = self._rewarder(batch["imgids"], said, own, spoken)
        self._values = {**rewards.values, "length": drawn.lengths.float().mean().item(), "unique": len({*said}) / len(said)}
        check_finite(self._values, step)
        if self._config.on_collapse == "stop":
            similarity, spread = self._values["reward_similarity"], self._values["reward_spread"]
            self._collapse.check(said, similarity, spread, step, len({*batch["imgids"]}))
        self._sequences = self._policy.sequences(drawn)
        self._weigh(rewards, batch["lengths"])
        self._first, self._n, self._loss = 0, len(said) // len(own), torch.zeros((), device=self._device)
        self._shown = {"step": step, "captions": _shown(batch["imgids"], said, own, rewards)}

    def part(self, images: Tensor, inputs: Tensor, target: Tensor, lengths: Tensor, tokens: int) -> Tensor:
        """The loss of some captions of the step, and of what was drawn for their images, to run backward."""
        first, n = self._first, self._n
        self._first = last = first + len(images)
        drawn = slice(first * n, last * n)
        of = [torch.arange(len(images)).repeat_interleave(n)]
        parts, weights = [self._sequences.rows(drawn)], [self._drawn[drawn]]
        kept = self._own[first:last].nonzero().flatten()  # a caption of weight 0 changes nothing
        if len(kept):
            parts.append(Sequences(inputs, target, lengths).rows(kept))
            of.append(kept)
            weights.append(self._own[first:last][kept])
        read, weight = joined(parts, self._pad), torch.cat(weights).to(self._device)
        hidden = hidden_states(self._model, images, torch.cat(of), read)
        loss = reinforce(hidden, self._model.head, read.target, weight, int(self._config.memory_budget * 2**20))
        self._loss = self._loss + loss.detach()
        return loss

    def values(self) -> dict[str, float]:
        """`loss`, and the means of the step that docs/recipes/distinctive.md lists."""
        return {"loss": self._loss.item(), **self._values}

    def end(self) -> dict[str, float]:
        """Nothing changes after the optimiser's step."""
        return {}

    def samples(self) -> dict[str, Any]:
        """Some captions of the step with their rewards, as JSON."""
        return self._shown

    def validate(self, images: Tensor, batch: dict[str, Any]) -> Tensor | None:
        """The two-way rewards of the greedy captions of a validation batch's images; None where it holds features."""
        if images.dim() != 4:
            return None
        with self._autocast():
            greedy = self._policy.texts(self._policy.greedy(images))
        pictures = images.images if isinstance(images, Attributed) else images
        return self._rewarder.of_validation(batch["imgids"], pictures, greedy, list(batch["captions"]))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint keeps beside the model: plain values, and tensors by name."""
        adversary = self._rewarder.adversary
        kept = {"clip": self._embedder.fingerprint, "collapse": dict(self._collapse.counts)}
        return kept, {} if adversary is None else adversary.state()

    def load(self, kept: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Goes on from what `state` gave; the CLIP is of `check_resumed`."""
        self._collapse = Collapse(dict(kept["collapse"]))
        if self._rewarder.adversary is not None:
            self._rewarder.adversary.load(tensors)

    def _weigh(self, rewards: Rewards, lengths: Tensor) -> None:
        """The weight of each word of the drawn captions, and of the batch's own: on the CPU."""
        kind, own = self._config.gt_weight, rewards.own
        own = {"clamp0": own.clamp(min=0), "centered": own - own.mean(), "raw": own, "none": torch.zeros_like(own)}[kind]
        self._drawn = caption_weights(rewards.drawn.cpu(), self._sequences.lengths)
        self._own = caption_weights(own.cpu(), lengths)


def caption_weights(reward: Tensor, lengths: Tensor) -> Tensor:
    """[N], by which each word of N captions counts in the mean over captions of reward times the mean over words."""
    return reward / (lengths * len(lengths))


def reinforce(hidden: Tensor, head: nn.Linear, target: Tensor, weight: Tensor, memory_budget: int) -> Tensor:
    """-sum_nt weight_n log p(target_nt), of words that are not -100: raises log p where the weight is above 0.

    hidden: [N, T, H]; target: [N, T]; weight: [N], of any sign. Logits are made in blocks of `memory_budget` bytes at most.
    """
    options = {"subset": "full", "token_weight": weight[:, None], "reduction": "sum", "memory_budget": memory_budget}
    return linear_subset_cross_entropy(hidden, head.weight, target, linear_bias=head.bias, **options)


def _shown(imgids: list, said: list[str], own: list[str], rewards: Rewards) -> list[dict[str, Any]]:
    n = len(said) // len(own)
    return [
        {
            "imgid": imgids[b],
            "drawn": said[b * n],
            "reward": rewards.drawn[b * n].item(),
            "similarity": rewards.similarity[b * n].item(),
            "own": own[b],
            "own_reward": rewards.own[b].item(),
        }
        for b in range(min(_SHOWN, len(own)))
    ]
