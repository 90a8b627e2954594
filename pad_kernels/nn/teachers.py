"""Modules of the losses against teachers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pad_kernels import distill, divergences
from pad_kernels._checks import check_number
from pad_kernels.engine.mixture import check_kind
from pad_kernels.heads import Head
from pad_kernels.nn._options import LabelOptions, PlannedOptions, ReducedOptions
from pad_kernels.offline import TopKAdvantage, TopKTeacher


@dataclass(kw_only=True, eq=False, repr=False)
class LinearDivergence(ReducedOptions, LabelOptions, PlannedOptions):
    """Divergence from a teacher, token by token: :func:`pad_kernels.linear_divergence`.

    Args:
        kind, alpha, reduction, ignore_index, shift, plan: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels as pk, pad_kernels.nn as pknn
        >>> student = pk.Head(torch.zeros(3, 4), torch.zeros(10, 4))
        >>> pknn.LinearDivergence(kind="tvd")(student, student)
        tensor(0.)
    """

    kind: str = "forward_kl"
    alpha: float | None = None

    def check(self) -> None:
        """Check the options."""
        super().check()
        check_kind(self.kind, self.alpha)

    def forward(
        self,
        student: Head,
        teacher: Head | TopKTeacher,
        *,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The divergence, 0-d, or per token for "none"."""
        return divergences.linear_divergence(
            student,
            teacher,
            labels=labels,
            token_weights=token_weights,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            **self.options(),
        )


@dataclass(kw_only=True, eq=False, repr=False)
class LinearExpectedAdvantage(ReducedOptions, LabelOptions, PlannedOptions):
    """ADPA's expected advantage: :func:`pad_kernels.linear_expected_advantage`.

    Args:
        beta, reduction, ignore_index, shift, plan: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels as pk, pad_kernels.nn as pknn
        >>> student = pk.Head(torch.zeros(3, 4), torch.zeros(10, 4))
        >>> pknn.LinearExpectedAdvantage(beta=0.1)(student, student, student)
        tensor(0.)
    """

    beta: float = 1.0

    def check(self) -> None:
        """Check the options."""
        super().check()
        check_number("beta", self.beta, above=0.0)

    def forward(
        self,
        student: Head,
        aligned: Head | TopKAdvantage,
        reference: Head | None = None,
        *,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The advantage (to be made large), 0-d, or per token for "none"."""
        return divergences.linear_expected_advantage(
            student,
            aligned,
            reference,
            labels=labels,
            token_weights=token_weights,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            **self.options(),
        )


_WEIGHTS = ("ce_weight", "divergence_weight", "advantage_weight", "entropy_weight")


@dataclass(kw_only=True, eq=False, repr=False)
class LinearDistill(ReducedOptions, LabelOptions, PlannedOptions):
    """Several losses from one set of student logits: :func:`pad_kernels.linear_distill`.

    Args:
        kind, alpha, beta, reduction, ignore_index, shift, plan: as the function's.
        ce_weight, divergence_weight, advantage_weight, entropy_weight: numbers, of the calls that
            give none; per-token weights, tensors, go to the call.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels as pk, pad_kernels.nn as pknn
        >>> student = pk.Head(torch.zeros(2, 4), torch.zeros(10, 4))
        >>> loss = pknn.LinearDistill(kind="jsd", ce_weight=1.0, divergence_weight=0.5)
        >>> loss(student, torch.tensor([1, 2]), teacher=student).loss
        tensor(2.3026)
        >>> loss(student, torch.tensor([1, 2]), ce_weight=torch.ones(2), divergence_weight=0.0).loss
        tensor(2.3026)
    """

    kind: str = "forward_kl"
    alpha: float | None = None
    beta: float = 1.0
    ce_weight: float = 0.0
    divergence_weight: float = 0.0
    advantage_weight: float = 0.0
    entropy_weight: float = 0.0

    def check(self) -> None:
        """Check the options."""
        super().check()
        check_kind(self.kind, self.alpha)
        check_number("beta", self.beta, above=0.0)
        for name in _WEIGHTS:
            check_number(name, getattr(self, name))

    def forward(
        self,
        student: Head,
        labels: Tensor,
        *,
        teacher: Head | TopKTeacher | None = None,
        aligned: Head | TopKAdvantage | None = None,
        reference: Head | None = None,
        ce_weight: float | Tensor | None = None,
        divergence_weight: float | Tensor | None = None,
        advantage_weight: float | Tensor | None = None,
        entropy_weight: float | Tensor | None = None,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> distill.DistillOutput:
        """The loss and its parts; a weight of None is the module's."""
        given = (ce_weight, divergence_weight, advantage_weight, entropy_weight)
        weights = {n: w for n, w in zip(_WEIGHTS, given, strict=True) if w is not None}
        return distill.linear_distill(
            student,
            labels,
            teacher=teacher,
            aligned=aligned,
            reference=reference,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            **{**self.options(), **weights},
        )
