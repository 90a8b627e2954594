"""``liger_kernel.chunked_loss.orpo_loss``: odds-ratio preference optimisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import pad_kernels as pk
from pad_kernels.compat._arguments import check_schedule
from pad_kernels.compat.liger.chunked_loss._sequences import pairs


class LigerFusedLinearORPOFunction:
    """ORPO over an LM head, called as Liger's autograd function is: ``apply`` with positions."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        nll_target: Tensor | None = None,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics; the arguments are those of :class:`LigerFusedLinearORPOLoss`."""
        check_schedule(compiled, chunk_size)
        batch = pairs(
            _input,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            average_log_prob=True,
            compute_nll_loss=compute_nll_loss,
            nll_target=nll_target,
        )
        out = pk.orpo_loss(batch.chosen, batch.rejected, batch.nll, beta=beta)
        count = max(1, out.log_odds.numel())
        odds = (F.logsigmoid(out.log_odds).sum() / count, out.log_odds.sum() / count)
        return out.loss, batch.metrics(out.chosen_rewards, out.rejected_rewards, *odds)


class LigerFusedLinearORPOLoss(nn.Module):
    """ORPO from hidden states, with the signature of Liger's class.

    The formula is that of :func:`pad_kernels.orpo_loss`; log-probs are means over a response's
    tokens.

    Args:
        ignore_index: label of tokens that do not count.
        beta: weight of the odds-ratio term, > 0.
        compute_nll_loss: whether the chosen responses' NLL is part of the loss.
        compiled: no effect: the schedule is planned.
        chunk_size: no effect: the schedule is planned.

    Shape:
        ``forward(lin_weight [V, H], _input [2 pairs, T, H], target [2 pairs, T], bias [V],
        nll_target [2 pairs, T])``, the chosen responses first, gives (loss, (chosen_logps [pairs],
        rejected_logps [pairs], chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards [pairs], rejected_rewards [pairs], log_odds_ratio, log_odds_chosen)), the
        last two the means of log σ(log odds ratio) and of the log odds ratio.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> hidden, target = torch.zeros(2, 3, 8), torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> loss, metrics = LigerFusedLinearORPOLoss(beta=1.0)(torch.zeros(10, 8), hidden, target)
        >>> round(loss.item(), 4)
        2.9957
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics, see the class."""
        return LigerFusedLinearORPOFunction.apply(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            compute_nll_loss=self.compute_nll_loss,
            nll_target=nll_target,
            compiled=self.compiled,
            chunk_size=self.chunk_size,
        )
