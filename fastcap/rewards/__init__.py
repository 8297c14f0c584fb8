"""Rewards of captions, for training by reinforcement: how well a caption fits its image, how human it reads, and how much of
what people say of the image it says."""

from .bleu import Bleu
from .cider_d import CiderD
from .combined import REWARDS, CombinedReward, parse_rewards
from .contrastive import BASELINES, SimilarityReward
from .discriminator import Adversary, Discriminator

__all__ = [
    "BASELINES",
    "REWARDS",
    "Adversary",
    "Bleu",
    "CiderD",
    "CombinedReward",
    "Discriminator",
    "SimilarityReward",
    "parse_rewards",
]
