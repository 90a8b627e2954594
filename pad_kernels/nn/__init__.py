"""A ``torch.nn.Module`` for every op.

What stays the same from step to step are options of the constructor, keyword-only and checked
there; tensors, and what else changes from call to call (labels, weights, a normalizer, a seed), go
to ``forward`` in the function's order. Modules have no parameters and no state.
"""

from pad_kernels.nn.preferences import CPOLoss, KTOLoss, ORPOLoss, PairwisePreferenceLoss
from pad_kernels.nn.sequences import (
    CalibratedRewards,
    LinearPreferenceLoss,
    ListwisePreferenceEstimate,
    ListwisePreferenceLoss,
    SequenceReward,
)
from pad_kernels.nn.teachers import LinearDistill, LinearDivergence, LinearExpectedAdvantage
from pad_kernels.nn.tokens import (
    LinearCrossEntropy,
    LinearLogProb,
    LinearTokenStats,
    LinearTopK,
    OptionLogProbs,
)

__all__ = [
    "CPOLoss",
    "CalibratedRewards",
    "KTOLoss",
    "LinearCrossEntropy",
    "LinearDistill",
    "LinearDivergence",
    "LinearExpectedAdvantage",
    "LinearLogProb",
    "LinearPreferenceLoss",
    "LinearTokenStats",
    "LinearTopK",
    "ListwisePreferenceEstimate",
    "ListwisePreferenceLoss",
    "ORPOLoss",
    "OptionLogProbs",
    "PairwisePreferenceLoss",
    "SequenceReward",
]
