"""``liger_kernel.chunked_loss.simpo_loss``: SimPO, by default with the chosen NLL (CPO-SimPO)."""

from __future__ import annotations

from torch import Tensor, nn

import pad_kernels as pk
from pad_kernels.compat._arguments import check_schedule
from pad_kernels.compat.liger.chunked_loss._sequences import pairs


class LigerFusedLinearSimPOFunction:
    """SimPO over an LM head, called as Liger's autograd function is: ``apply`` with positions."""

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
        compute_nll_loss: bool = False,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics; the arguments are those of :class:`LigerFusedLinearSimPOLoss`.

        Only the default of ``compute_nll_loss`` differs.
        """
        check_schedule(compiled, chunk_size)
        batch = pairs(
            _input,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            average_log_prob=True,
            compute_nll_loss=compute_nll_loss,
        )
        out = pk.cpo_loss(
            batch.chosen,
            batch.rejected,
            batch.nll,
            kind="simpo",
            beta=beta,
            nll_weight=alpha,
            label_smoothing=label_smoothing,
            gamma=gamma,
        )
        return out.loss, batch.metrics(out.chosen_rewards, out.rejected_rewards)


class LigerFusedLinearSimPOLoss(nn.Module):
    """SimPO from hidden states, with the signature of Liger's class.

    The formula is that of :func:`pad_kernels.cpo_loss`, kind "simpo": log-probs are means over a
    response's tokens, ``gamma`` is not multiplied by ``beta``.

    Args:
        ignore_index: label of tokens that do not count.
        beta: inverse temperature, > 0.
        alpha: weight of the chosen responses' NLL, >= 0.
        label_smoothing: in [0, 0.5).
        compute_nll_loss: whether the NLL is part of the loss.
        compiled: no effect: the schedule is planned.
        gamma: target margin, >= 0.
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
        >>> loss_fn = LigerFusedLinearSimPOLoss(compute_nll_loss=False, gamma=0.0)
        >>> hidden, target = torch.zeros(2, 3, 8), torch.tensor([[1, 2, 3], [4, 5, -100]])
        >>> round(loss_fn(torch.zeros(10, 8), hidden, target)[0].item(), 4)
        0.6931
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.gamma = gamma
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics, see the class."""
        return LigerFusedLinearSimPOFunction.apply(
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
            gamma=self.gamma,
            chunk_size=self.chunk_size,
        )
