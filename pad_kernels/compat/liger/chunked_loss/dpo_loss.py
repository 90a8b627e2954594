"""``liger_kernel.chunked_loss.dpo_loss``: DPO and its variants."""

from __future__ import annotations

from torch import Tensor, nn

import pad_kernels as pk
from pad_kernels._checks import check_flag, check_number, fail_value
from pad_kernels.compat._arguments import check_schedule
from pad_kernels.compat.liger.chunked_loss._sequences import pairs, reference_logprobs

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
_DEFAULT_TAU = 0.05


def _check_loss_type(loss_type: str, label_smoothing: float) -> None:
    # Callers match on these words of Liger's messages.
    if loss_type not in LOSS_TYPES:
        expected = "one of " + ", ".join(LOSS_TYPES)
        fail_value("Unsupported loss_type", expected, repr(loss_type))
    if loss_type == "exo_pair" and not label_smoothing > 0:
        must = "label_smoothing must be > 0 for loss_type='exo_pair'"
        fail_value(must, "a number in (0, 0.5), 1e-3 in the paper", label_smoothing)
    if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
        must = "label_smoothing must lie in [0.0, 0.5) for loss_type='robust'"
        fail_value(must, "a number in it", label_smoothing)


class LigerFusedLinearDPOFunction:
    """DPO over an LM head, called as Liger's autograd function is: ``apply`` with positions."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = _DEFAULT_TAU,
        alpha: float = 1.0,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics; the arguments are those of :class:`LigerFusedLinearDPOLoss`."""
        check_schedule(compiled, chunk_size)
        check_flag("use_ref_model", use_ref_model)
        nll_weight = check_number("alpha", alpha)
        _check_loss_type(loss_type, check_number("label_smoothing", label_smoothing))
        batch = pairs(
            _input,
            weight,
            target,
            bias,
            ignore_index=ignore_index,
            average_log_prob=average_log_prob,
            compute_nll_loss=compute_nll_loss,
        )
        half = batch.chosen.shape[0]
        if use_ref_model:
            reference = reference_logprobs(
                ref_input, ref_weight, ref_bias, target, ignore_index, average_log_prob
            )
        else:
            reference = batch.chosen.new_zeros(2 * half)
        # An option that is not at its default goes along, so that a kind without it raises.
        preference = pk.pairwise_preference_loss(
            batch.chosen,
            batch.rejected,
            reference[:half],
            reference[half:],
            kind=loss_type,
            beta=beta,
            label_smoothing=label_smoothing or None,
            discopop_tau=None if discopop_tau == _DEFAULT_TAU else discopop_tau,
        )
        loss = preference.loss + nll_weight * batch.nll
        rewards = (preference.chosen_rewards, preference.rejected_rewards)
        return loss, batch.metrics(*rewards)


class LigerFusedLinearDPOLoss(nn.Module):
    """DPO and its variants from hidden states, with the signature of Liger's class.

    The formulas are those of :func:`pad_kernels.pairwise_preference_loss`, kind ``loss_type``.

    Args:
        ignore_index: label of tokens that do not count.
        beta: inverse temperature, > 0.
        alpha: weight of the chosen responses' NLL.
        compute_nll_loss: whether the NLL is part of the loss.
        compiled: no effect: the schedule is planned.
        use_ref_model: False takes the reference's log-probs to be 0.
        average_log_prob: mean instead of sum over a response's tokens.
        chunk_size: no effect: the schedule is planned.
        loss_type: sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero,
            apo_down or discopop.
        label_smoothing: in [0, 0.5), for sigmoid, robust and exo_pair (> 0 there).
        discopop_tau: > 0, for discopop.

    Shape:
        ``forward(lin_weight [V, H], _input [2 pairs, T, H], target [2 pairs, T], bias [V],
        ref_input [2 pairs, T, H'], ref_weight [V, H'], ref_bias [V])``, the chosen responses first,
        gives (loss, (chosen_logps [pairs], rejected_logps [pairs], chosen_logits_mean,
        rejected_logits_mean, nll_loss, chosen_rewards [pairs], rejected_rewards [pairs])).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> loss_fn = LigerFusedLinearDPOLoss(use_ref_model=False)
        >>> hidden, target = torch.zeros(2, 3, 8), torch.tensor([[1, 2, 3], [4, 5, -100]])
        >>> round(loss_fn(torch.zeros(10, 8), hidden, target)[0].item(), 4)
        0.8149
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = _DEFAULT_TAU,
    ) -> None:
        super().__init__()
        _check_loss_type(loss_type, check_number("label_smoothing", label_smoothing))
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics, see the class."""
        return LigerFusedLinearDPOFunction.apply(
            _input,
            lin_weight,
            target,
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            compute_nll_loss=self.compute_nll_loss,
            compiled=self.compiled,
            use_ref_model=self.use_ref_model,
            average_log_prob=self.average_log_prob,
            chunk_size=self.chunk_size,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.discopop_tau,
            alpha=self.alpha,
        )
