"""Modules of rewards and of losses over sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pad_kernels import sequence
from pad_kernels._checks import check_choice, check_integer
from pad_kernels.nn._options import HeadModule, LabelOptions, Options
from pad_kernels.sequence.plackett_luce import check_ranking
from pad_kernels.sequence.rewards import NORMALIZATIONS


def _zeros(*shape: int) -> Tensor:
    """Log-probs or rewards on which a function's own checks of its options can run."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


@dataclass(kw_only=True, eq=False, repr=False)
class SequenceReward(Options):
    """Sum or mean of the log-probs of each sequence: :func:`pad_kernels.sequence_reward`.

    Args:
        normalize, ignore_index: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> pknn.SequenceReward(normalize="none")(torch.tensor([[-1.0, -3.0]]))
        tensor([-4.])
    """

    normalize: str = "length"
    ignore_index: int = -100

    def check(self) -> None:
        """Check the options."""
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        check_integer("ignore_index", self.ignore_index)

    def forward(
        self,
        logprob: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """One reward per sequence."""
        return sequence.sequence_reward(
            logprob, mask=mask, labels=labels, cu_seqlens=cu_seqlens, **self.options()
        )


@dataclass(kw_only=True, eq=False, repr=False)
class CalibratedRewards(Options):
    """PAD's calibration of rewards: :func:`pad_kernels.calibrated_rewards`.

    Args:
        alpha, floor: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> pknn.CalibratedRewards(alpha=0.25)(torch.tensor([-2.0]), torch.tensor([1.0]))
        tensor([-0.5000])
    """

    alpha: float
    floor: float = 1e-8

    def check(self) -> None:
        """Check the options."""
        self.forward(_zeros(1), _zeros(1))

    def forward(self, avg_logprob: Tensor, option_probability: Tensor) -> Tensor:
        """Rewards like ``avg_logprob``."""
        return sequence.calibrated_rewards(avg_logprob, option_probability, **self.options())


@dataclass(kw_only=True, eq=False, repr=False)
class RankingOptions(Options):
    """A comparison of distributions over rankings."""

    beta: float = 1.0
    kind: str = "jsd"
    subset_size: int | None = None
    samples: int | None = None
    reduction: str = "mean"

    def check(self) -> None:
        """Check the options on a group of the smallest size that they allow."""
        super().check()
        size = 2
        if self.subset_size is not None:
            size = check_integer("subset_size", self.subset_size, at_least=2)
        rewards = torch.empty((1, size), dtype=torch.float32, device="meta")
        given = {name: getattr(self, name) for name in RankingOptions.__dataclass_fields__}
        check_ranking(rewards, valid=None, seed=0, **given)


@dataclass(kw_only=True, eq=False, repr=False)
class ListwisePreferenceLoss(RankingOptions):
    """Listwise preference distillation: :func:`pad_kernels.listwise_preference_loss`.

    Args:
        beta, kind, subset_size, samples, reduction: as the function's; a seed goes to the call.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> pknn.ListwisePreferenceLoss(beta=10.0)(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.)
    """

    def forward(
        self,
        student_rewards: Tensor,
        teacher_rewards: Tensor,
        *,
        valid: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The loss, 0-d, or per group for "none"."""
        return sequence.listwise_preference_loss(
            student_rewards, teacher_rewards, valid=valid, seed=seed, **self.options()
        )


@dataclass(kw_only=True, eq=False, repr=False)
class ListwisePreferenceEstimate(RankingOptions):
    """The same with its standard error: :func:`pad_kernels.listwise_preference_estimate`.

    Args:
        beta, kind, subset_size, samples, reduction: as the function's; a seed goes to the call.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> estimate = pknn.ListwisePreferenceEstimate(samples=64)
        >>> estimate(torch.zeros(1, 9), torch.zeros(1, 9), seed=0).standard_error
        tensor(0.)
    """

    def forward(
        self,
        student_rewards: Tensor,
        teacher_rewards: Tensor,
        *,
        valid: Tensor | None = None,
        seed: int | None = None,
    ) -> sequence.ListwiseEstimate:
        """The loss and its standard error."""
        return sequence.listwise_preference_estimate(
            student_rewards, teacher_rewards, valid=valid, seed=seed, **self.options()
        )


@dataclass(kw_only=True, eq=False, repr=False)
class LinearPreferenceLoss(RankingOptions, LabelOptions, HeadModule):
    """From hidden states to the listwise loss: :func:`pad_kernels.linear_preference_loss`.

    Args:
        beta, kind, normalize, subset_size, samples, reduction: as the function's, like all others:
        softcap, logit_scale, temperature, vocab_size, ignore_index, shift, plan.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> loss = pknn.LinearPreferenceLoss(beta=10.0)
        >>> labels = torch.zeros(1, 2, 3, dtype=torch.long)
        >>> loss(torch.zeros(1, 2, 3, 4), torch.zeros(5, 4), labels, torch.zeros(1, 2)).item()
        0.0
    """

    beta: float = field()
    normalize: str = "length"

    def check(self) -> None:
        """Check the options."""
        super().check()
        check_choice("normalize", self.normalize, NORMALIZATIONS)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        teacher_rewards: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
        valid: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The loss, 0-d, or per group for "none"."""
        return sequence.linear_preference_loss(
            hidden,
            weight,
            labels,
            teacher_rewards,
            mask=mask,
            cu_seqlens=cu_seqlens,
            bias=bias,
            valid=valid,
            seed=seed,
            **self.options(),
        )
