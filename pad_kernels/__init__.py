"""Preference-distillation losses over vocabulary chunks: full logits are never held.

The names in ``__all__`` are the public API; docs/design.md is the map.
"""

from pad_kernels._version import __version__
from pad_kernels.api import (
    TokenStats,
    TopK,
    linear_cross_entropy,
    linear_logprob,
    linear_token_stats,
    linear_topk,
    option_logprobs,
)
from pad_kernels.backends.choice import available_backends
from pad_kernels.distill import DistillOutput, linear_distill
from pad_kernels.divergences import (
    linear_divergence,
    linear_expected_advantage,
    token_mean_weights,
)
from pad_kernels.engine.explain import explain
from pad_kernels.engine.plan import Plan, PlanRequest, workspace_limit
from pad_kernels.heads import Head
from pad_kernels.offline import TopKAdvantage, TopKTeacher
from pad_kernels.sequence import (
    KTOOutput,
    ListwiseEstimate,
    ORPOOutput,
    PairwiseOutput,
    calibrated_rewards,
    cpo_loss,
    kto_loss,
    linear_preference_loss,
    listwise_preference_estimate,
    listwise_preference_loss,
    orpo_loss,
    pairwise_preference_loss,
    sequence_reward,
)

from pad_kernels import nn as nn  # isort: skip  # its modules call the functions above

__all__ = [
    "DistillOutput",
    "Head",
    "KTOOutput",
    "ListwiseEstimate",
    "ORPOOutput",
    "PairwiseOutput",
    "Plan",
    "PlanRequest",
    "TokenStats",
    "TopK",
    "TopKAdvantage",
    "TopKTeacher",
    "__version__",
    "available_backends",
    "calibrated_rewards",
    "cpo_loss",
    "explain",
    "kto_loss",
    "linear_cross_entropy",
    "linear_distill",
    "linear_divergence",
    "linear_expected_advantage",
    "linear_logprob",
    "linear_preference_loss",
    "linear_token_stats",
    "linear_topk",
    "listwise_preference_estimate",
    "listwise_preference_loss",
    "option_logprobs",
    "orpo_loss",
    "pairwise_preference_loss",
    "sequence_reward",
    "token_mean_weights",
    "workspace_limit",
]
