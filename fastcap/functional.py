"""The operations, as functions. `from fastcap import functional as F_cap`."""

from fastcap.ops.additive_attention import additive_attention, additive_attention_steps
from fastcap.ops.attention_coverage import attention_coverage, convert_coverage_weight
from fastcap.ops.attention_coverage_from_scores import attention_coverage_from_scores
from fastcap.ops.contrastive_reward import contrastive_reward, decoupled_contrastive_loss
from fastcap.ops.linear_subset_cross_entropy import linear_subset_cross_entropy
from fastcap.ops.retrieval_ranks import retrieval_counts, retrieval_ranks
from fastcap.ops.subset_cross_entropy import subset_cross_entropy

__all__ = [
    "additive_attention",
    "additive_attention_steps",
    "attention_coverage",
    "attention_coverage_from_scores",
    "contrastive_reward",
    "convert_coverage_weight",
    "decoupled_contrastive_loss",
    "linear_subset_cross_entropy",
    "retrieval_counts",
    "retrieval_ranks",
    "subset_cross_entropy",
]
