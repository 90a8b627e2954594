"""Preference-distillation losses over vocabulary chunks: full logits are never held.

See DESIGN and docs/ for the map; the names below are the public API.
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
from pad_kernels.backends.base import available_backends
from pad_kernels.engine.explain import explain
from pad_kernels.engine.plan import Plan, PlanRequest, workspace_limit
from pad_kernels.heads import Head

__all__ = [
    "Head",
    "Plan",
    "PlanRequest",
    "TokenStats",
    "TopK",
    "__version__",
    "available_backends",
    "explain",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_token_stats",
    "linear_topk",
    "option_logprobs",
    "workspace_limit",
]
