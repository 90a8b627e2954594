"""Modules of pairwise and unpaired preference losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pad_kernels import sequence
from pad_kernels._checks import check_choice
from pad_kernels.nn._options import Options
from pad_kernels.sequence.pairwise import KINDS


def _pairs(count: int) -> list[Tensor]:
    """Log-probs on which a function's own checks of its options can run."""
    return [torch.zeros(1, dtype=torch.float32, device="cpu") for _ in range(count)]


@dataclass(kw_only=True, eq=False, repr=False)
class PairwisePreferenceLoss(Options):
    """The DPO family and SimPO: :func:`pad_kernels.pairwise_preference_loss`.

    Args:
        kind, beta, label_smoothing, discopop_tau, gamma, reward_shift, reduction: as the
            function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range, or of another kind.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> zero = torch.zeros(2)
        >>> pknn.PairwisePreferenceLoss(kind="hinge")(zero, zero, zero, zero).loss
        tensor(1.)
    """

    kind: str = "dpo"
    beta: float = 0.1
    label_smoothing: float | None = None
    discopop_tau: float | None = None
    gamma: float | None = None
    reward_shift: float | None = None
    reduction: str = "mean"

    def check(self) -> None:
        """Check the options."""
        check_choice("kind", self.kind, KINDS)
        self.forward(*_pairs(2 if self.kind == "simpo" else 4))

    def forward(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor | None = None,
        ref_rejected: Tensor | None = None,
    ) -> sequence.PairwiseOutput:
        """The loss and the implicit rewards."""
        return sequence.pairwise_preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, **self.options()
        )


@dataclass(kw_only=True, eq=False, repr=False)
class KTOLoss(Options):
    """Responses that are each good or bad: :func:`pad_kernels.kto_loss`.

    Args:
        kind, beta, desirable_weight, undesirable_weight, reduction: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> zero, good = torch.zeros(2), torch.tensor([True, False])
        >>> pknn.KTOLoss(beta=0.5)(zero, zero, good, kl=0.0).loss
        tensor(0.5000)
    """

    kind: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reduction: str = "mean"

    def check(self) -> None:
        """Check the options."""
        zero, ref = _pairs(2)
        self.forward(zero, ref, zero == ref, kl=0.0 if self.kind == "kto" else None)

    def forward(
        self,
        logprob: Tensor,
        ref_logprob: Tensor,
        desirable: Tensor,
        *,
        kl: Tensor | float | None = None,
        kl_logprob: Tensor | None = None,
        kl_ref_logprob: Tensor | None = None,
    ) -> sequence.KTOOutput:
        """The loss, the rewards and the reference point."""
        return sequence.kto_loss(
            logprob,
            ref_logprob,
            desirable,
            kl=kl,
            kl_logprob=kl_logprob,
            kl_ref_logprob=kl_ref_logprob,
            **self.options(),
        )


@dataclass(kw_only=True, eq=False, repr=False)
class ORPOLoss(Options):
    """Odds-ratio preference optimisation: :func:`pad_kernels.orpo_loss`.

    Args:
        beta, reduction: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> half = torch.tensor([0.5]).log()
        >>> pknn.ORPOLoss(beta=1.0)(half, half, torch.tensor(0.0)).loss
        tensor(0.6931)
    """

    beta: float = 0.1
    reduction: str = "mean"

    def check(self) -> None:
        """Check the options."""
        self.forward(*_pairs(2))

    def forward(
        self, chosen: Tensor, rejected: Tensor, chosen_nll: Tensor | None = None
    ) -> sequence.ORPOOutput:
        """The loss, the rewards and the log odds."""
        return sequence.orpo_loss(chosen, rejected, chosen_nll, **self.options())


@dataclass(kw_only=True, eq=False, repr=False)
class CPOLoss(Options):
    """Contrastive preference optimisation: :func:`pad_kernels.cpo_loss`.

    Args:
        kind, beta, nll_weight, label_smoothing, gamma, reduction: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range, or of another kind.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> same = torch.tensor([-4.0])
        >>> pknn.CPOLoss()(same, same, torch.tensor(1.0)).loss
        tensor(1.6931)
    """

    kind: str = "sigmoid"
    beta: float = 0.1
    nll_weight: float = 1.0
    label_smoothing: float = 0.0
    gamma: float | None = None
    reduction: str = "mean"

    def check(self) -> None:
        """Check the options."""
        self.forward(*_pairs(3))

    def forward(
        self, chosen: Tensor, rejected: Tensor, chosen_nll: Tensor | None = None
    ) -> sequence.PairwiseOutput:
        """The loss and the implicit rewards."""
        return sequence.cpo_loss(chosen, rejected, chosen_nll, **self.options())
