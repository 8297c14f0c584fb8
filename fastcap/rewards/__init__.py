"""Rewards of captions, for training by reinforcement: how well a caption fits its image, and how human it reads."""

from .contrastive import BASELINES, SimilarityReward
from .discriminator import Adversary, Discriminator

__all__ = ["BASELINES", "Adversary", "Discriminator", "SimilarityReward"]
