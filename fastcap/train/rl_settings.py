"""What a run by reward may ask for: what does not combine is an error, not ignored."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fastcap.errors import bad
from fastcap.objectives import REINFORCED, SELF_CRITICAL

if TYPE_CHECKING:
    from .config import TrainConfig

POLICIES = ("sample", "beam")
REWARD_BASELINES = ("two-way", "one-way", "similar", "greedy", "none")
REWARD_EXCLUDES = ("self", "group")
GT_WEIGHTS = ("clamp0", "centered", "raw", "none")

SAMPLES = {"wtf-rl": 1, "scst": 1, "new-scst": 5}  # where `samples` is left open

# What is a wtf-rl's alone, and a self-critical objective's.
_OF_WTF_RL = (
    "reward_baseline", "reward_scale", "reward_exclude", "neighbours", "alpha", "discriminator_lr", "gt_weight", "policy",
    "beam_size",
)  # fmt: skip
_OF_SELF_CRITICAL = ("rewards", "df")
_FORMER = {"samples": 1}  # what checkpoints of before hold where None stands now


def usual(config: TrainConfig) -> dict[str, Any]:
    """The settings under the heading Reinforcement, as they are where nothing is said."""
    fields = dataclasses.fields(config)
    return {field.name: field.default for field in fields if field.metadata["panel"] == "Reinforcement"}


def check(config: TrainConfig) -> None:
    """Raises FastcapError for the first setting of `config` that its objective has no use for, or that breaks its rule."""
    _check_mle_steps(config)
    objective, defaults = config.objective, usual(config)
    unused = set(defaults)
    if objective in REINFORCED:
        unused = set(_OF_WTF_RL if objective in SELF_CRITICAL else _OF_SELF_CRITICAL)
    for name, default in defaults.items():
        value = getattr(config, name)
        if name in unused and value != default and (objective in REINFORCED or value != _FORMER.get(name, default)):
            others = " or ".join(_with_use_for(name))
            raise bad("train", name, f"be left out with objective {objective}", value, f"or pass --objective {others}")
    if objective not in REINFORCED:
        return
    config.one_of("on_collapse", ("stop", "go-on"))
    for name in ("samples", "samples_every"):
        config.at_least(name, int(name == "samples"))
    _check_positive(config, "temperature", 1.0)
    for name in ("coverage", "scheduled_sampling"):
        if getattr(config, name) and not config.mle_steps:
            remedy = "leave it out: it belongs to the likelihood, with which the captioner was trained before"
            raise bad("train", name, f"be 0 with objective {objective}", getattr(config, name), remedy)
    (_check_self_critical if objective in SELF_CRITICAL else _check_wtf_rl)(config, defaults)


def _check_wtf_rl(config: TrainConfig, defaults: dict[str, Any]) -> None:
    config.one_of("policy", POLICIES)
    config.one_of("reward_baseline", REWARD_BASELINES)
    config.one_of("reward_exclude", REWARD_EXCLUDES)
    config.one_of("gt_weight", GT_WEIGHTS)
    config.at_least("beam_size", 1)
    config.at_least("neighbours", 0)
    _check_positive(config, "discriminator_lr", 7e-5)
    _check_positive(config, "reward_scale", 100.0)
    if not 0 <= config.alpha <= 1:
        raise bad("train", "alpha", "be in [0, 1]", config.alpha, "pass alpha=0.94, or 1 for no discriminator")
    if config.reward_baseline == "similar" and not config.neighbours:
        remedy = "pass neighbours=2, or another reward_baseline"
        raise bad("train", "neighbours", "be at least 1 with reward baseline 'similar'", 0, remedy)
    for name, value in (("samples", 1), ("temperature", 1.0)):
        if config.policy == "beam" and getattr(config, name) not in (value, None):
            raise bad("train", name, f"be {value} with policy 'beam'", getattr(config, name), "or pass policy='sample'")
    if config.policy != "beam" and config.beam_size != defaults["beam_size"]:
        raise bad("train", "beam_size", "be left out with policy 'sample'", config.beam_size, "or pass policy='beam'")
    if config.alpha == 1 and config.discriminator_lr != defaults["discriminator_lr"]:
        remedy = "there is no discriminator then; or pass alpha=0.94"
        raise bad("train", "discriminator_lr", "be left out with alpha 1", config.discriminator_lr, remedy)


def _check_self_critical(config: TrainConfig, defaults: dict[str, Any]) -> None:
    from fastcap.rewards import parse_rewards

    weights = parse_rewards(config.rewards, "train")
    if config.objective == "new-scst" and config.samples == 1:
        remedy = "pass samples=5: the baseline of each is the mean of the others; or pass objective='scst'"
        raise bad("train", "samples", "be at least 2 with objective new-scst", 1, remedy)
    if config.reward_clip is not None and "similarity" not in weights:
        remedy = "or give similarity a weight, such as rewards='cider-d=1,similarity=0.2'"
        raise bad("train", "reward_clip", f"be left out with rewards {config.rewards!r}", config.reward_clip, remedy)


def _check_mle_steps(config: TrainConfig) -> None:
    config.at_least("mle_steps", 0)
    if config.mle_steps and config.objective not in REINFORCED:
        remedy = "leave it out, or pass an objective by reward, such as --objective scst"
        raise bad("train", "mle_steps", f"be 0 with objective {config.objective}", config.mle_steps, remedy)
    if config.mle_steps >= max(config.steps, 1):
        remedy = f"the steps after them are by {config.objective}: pass more --steps, or --objective mle"
        raise bad("train", "mle_steps", f"be less than steps, {config.steps}", config.mle_steps, remedy)
    for name in ("mle_lr", "mle_warmup"):
        if getattr(config, name) is not None and not config.mle_steps:
            raise bad("train", name, "be left out without mle_steps", getattr(config, name), "or pass --mle-steps 2000")


def _check_positive(config: TrainConfig, name: str, such_as: float) -> None:
    value = getattr(config, name)
    if value is not None and not 0 < value < math.inf:
        raise bad("train", name, "be positive and finite", value, f"pass {name}={such_as}")


def _with_use_for(name: str) -> tuple[str, ...]:
    if name in _OF_WTF_RL:
        return ("wtf-rl",)
    return SELF_CRITICAL if name in _OF_SELF_CRITICAL else REINFORCED
