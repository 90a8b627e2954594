"""``liger_kernel.chunked_loss.cpo_loss``: contrastive preference optimisation."""

from __future__ import annotations

from torch import Tensor, nn

import pad_kernels as pk
from pad_kernels.compat._arguments import check_schedule
from pad_kernels.compat.liger.chunked_loss._sequences import pairs


class LigerFusedLinearCPOFunction:
    """CPO over an LM head, called as Liger's autograd function is: ``apply`` with positions."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics; the arguments are those of :class:`LigerFusedLinearCPOLoss`."""
        check_schedule(compiled, chunk_size)
        batch = pairs(
            _input,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            average_log_prob=average_log_prob,
            compute_nll_loss=compute_nll_loss,
        )
        out = pk.cpo_loss(
            batch.chosen,
            batch.rejected,
            batch.nll,
            beta=beta,
            nll_weight=alpha,
            label_smoothing=label_smoothing,
        )
        return out.loss, batch.metrics(out.chosen_rewards, out.rejected_rewards)


class LigerFusedLinearCPOLoss(nn.Module):
    """CPO from hidden states, with the signature of Liger's class.

    The formula is that of :func:`pad_kernels.cpo_loss`, kind "sigmoid".

    Args:
        ignore_index: label of tokens that do not count.
        beta: inverse temperature, > 0.
        alpha: weight of the chosen responses' NLL, >= 0.
        label_smoothing: in [0, 0.5).
        compute_nll_loss: whether the NLL is part of the loss.
        compiled: no effect: the schedule is planned.
        average_log_prob: mean instead of sum over a response's tokens.
        chunk_size: no effect: the schedule is planned.

    Shape:
        ``forward(lin_weight [V, H], _input [2 pairs, T, H], target [2 pairs, T], bias [V])``, the
        chosen responses first, gives (loss, (chosen_logps [pairs], rejected_logps [pairs],
        chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards [pairs],
        rejected_rewards [pairs])).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> hidden, target = torch.zeros(2, 3, 8), torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> loss, metrics = LigerFusedLinearCPOLoss()(torch.zeros(10, 8), hidden, target)
        >>> round(loss.item(), 4)
        2.9957
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics, see the class."""
        return LigerFusedLinearCPOFunction.apply(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            compute_nll_loss=self.compute_nll_loss,
            compiled=self.compiled,
            average_log_prob=self.average_log_prob,
            chunk_size=self.chunk_size,
        )
