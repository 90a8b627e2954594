"""Modules of the ops over one head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pad_kernels import api
from pad_kernels._checks import check_integer, check_number
from pad_kernels.nn._options import HeadModule, LabelOptions, ReducedOptions


@dataclass(kw_only=True, eq=False, repr=False)
class LinearLogProb(LabelOptions, HeadModule):
    """Log-probability of each label under an LM head: :func:`pad_kernels.linear_logprob`.

    Args:
        softcap, logit_scale, temperature, vocab_size, ignore_index, shift, plan: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> logprob = pknn.LinearLogProb(temperature=2.0)
        >>> logprob(torch.zeros(2, 8), torch.zeros(10, 8), torch.tensor([1, -100]))
        tensor([-2.3026,  0.0000])
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Log-probs like ``labels``."""
        return api.linear_logprob(
            hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens, **self.options()
        )


@dataclass(kw_only=True, eq=False, repr=False)
class LinearTokenStats(LabelOptions, HeadModule):
    """Per-token statistics: :func:`pad_kernels.linear_token_stats`.

    Args:
        softcap, logit_scale, temperature, vocab_size, ignore_index, shift, plan: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> stats = pknn.LinearTokenStats()
        >>> stats(torch.zeros(1, 8), torch.zeros(10, 8), torch.tensor([1])).entropy
        tensor([2.3026])
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> api.TokenStats:
        """Statistics, each like ``labels``."""
        return api.linear_token_stats(
            hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens, **self.options()
        )


@dataclass(kw_only=True, eq=False, repr=False)
class LinearCrossEntropy(ReducedOptions, LabelOptions, HeadModule):
    """Cross-entropy of an LM head: :func:`pad_kernels.linear_cross_entropy`.

    Args:
        reduction, label_smoothing, z_loss: as the function's, like all others:
        softcap, logit_scale, temperature, vocab_size, ignore_index, shift, plan.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> loss = pknn.LinearCrossEntropy(reduction="sum")
        >>> loss
        LinearCrossEntropy(reduction='sum')
        >>> loss(torch.zeros(2, 8), torch.zeros(10, 8), torch.tensor([1, 2]))
        tensor(4.6052)
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def check(self) -> None:
        """Check the options."""
        super().check()
        check_number("label_smoothing", self.label_smoothing, at_least=0.0, at_most=1.0)
        check_number("z_loss", self.z_loss, at_least=0.0)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-d, or like ``labels`` for "none"."""
        return api.linear_cross_entropy(
            hidden,
            weight,
            labels,
            token_weights=token_weights,
            normalizer=normalizer,
            bias=bias,
            cu_seqlens=cu_seqlens,
            **self.options(),
        )


@dataclass(kw_only=True, eq=False, repr=False)
class LinearTopK(HeadModule):
    """The k likeliest tokens: :func:`pad_kernels.linear_topk`.

    Args:
        k: how many.
        softcap, logit_scale, temperature, vocab_size, plan: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> pknn.LinearTopK(k=2)(torch.zeros(1, 8), torch.zeros(4, 8)).ids
        tensor([[0, 1]])
    """

    k: int

    def check(self) -> None:
        """Check the options."""
        super().check()
        check_integer("k", self.k, at_least=1)

    def forward(self, hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> api.TopK:
        """Ids and log-probs [..., k]."""
        return api.linear_topk(hidden, weight, bias=bias, **self.options())


@dataclass(kw_only=True, eq=False, repr=False)
class OptionLogProbs(HeadModule):
    """Log-probabilities of candidate tokens: :func:`pad_kernels.option_logprobs`.

    Args:
        softcap, logit_scale, temperature, vocab_size, plan: as the function's.

    Raises:
        TypeError, ValueError: an option of the wrong type or range.

    Example:
        >>> import torch, pad_kernels.nn as pknn
        >>> options = pknn.OptionLogProbs()
        >>> options(torch.zeros(1, 8), torch.zeros(10, 8), torch.tensor([3, 5]))
        tensor([[-2.3026, -2.3026]])
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        option_ids: Tensor,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Log-probs [..., C]."""
        return api.option_logprobs(hidden, weight, option_ids, bias=bias, **self.options())
