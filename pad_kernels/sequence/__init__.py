"""Losses over sequences: rewards, listwise (Plackett–Luce) and pairwise preferences."""

from pad_kernels.sequence.pairwise import PairwiseOutput, pairwise_preference_loss
from pad_kernels.sequence.plackett_luce import (
    ListwiseEstimate,
    listwise_preference_estimate,
    listwise_preference_loss,
)
from pad_kernels.sequence.preference import linear_preference_loss
from pad_kernels.sequence.reference_free import ORPOOutput, cpo_loss, orpo_loss
from pad_kernels.sequence.rewards import calibrated_rewards, sequence_reward
from pad_kernels.sequence.unpaired import KTOOutput, kto_loss

__all__ = [
    "KTOOutput",
    "ListwiseEstimate",
    "ORPOOutput",
    "PairwiseOutput",
    "calibrated_rewards",
    "cpo_loss",
    "kto_loss",
    "linear_preference_loss",
    "listwise_preference_estimate",
    "listwise_preference_loss",
    "orpo_loss",
    "pairwise_preference_loss",
    "sequence_reward",
]
