"""``liger_kernel.chunked_loss.kto_loss``: responses that are good or bad, without pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pad_kernels as pk
from pad_kernels._checks import FLOATS, check_flag, check_number, check_tensor, fail_value
from pad_kernels.compat._arguments import check_head, check_labels, check_schedule
from pad_kernels.compat.liger.chunked_loss._sequences import (
    reference_logprobs,
    sequence_logprobs,
    summed_logits,
)


def _reference_point(kl: Tensor | float | None, like: Tensor) -> Tensor:
    """KTO's reference point for each response, [B]; as it came, below 0 too."""
    if kl is None:
        return torch.zeros_like(like)
    if not isinstance(kl, Tensor):
        return torch.full_like(like, check_number("kl", kl))
    check_tensor("kl", kl, dtypes=FLOATS, device=like.device)
    if kl.numel() != 1 and kl.shape != like.shape:
        fail_value("kl", f"one number or shape {tuple(like.shape)}", f"shape {tuple(kl.shape)}")
    return kl.detach().to(like.dtype).reshape(-1).expand(like.shape)


class LigerFusedLinearKTOFunction:
    """KTO over an LM head, called as Liger's autograd function is: ``apply`` with positions."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        preference_labels: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics; the arguments are those of :class:`LigerFusedLinearKTOLoss`."""
        check_schedule(compiled, chunk_size)
        check_flag("use_ref_model", use_ref_model)
        check_flag("average_log_prob", average_log_prob)
        check_head(ndim=3, _input=_input, weight=weight, bias=bias)
        check_labels("target", target, _input)
        good = check_tensor(
            "preference_labels",
            preference_labels,
            dtypes=(torch.bool,),
            shape=target.shape[:1],
            device=target.device,
        )
        options = (ignore_index, average_log_prob)
        logprob, _ = sequence_logprobs(_input, weight, target, bias, *options)
        reference = torch.zeros_like(logprob)
        if use_ref_model:
            reference = reference_logprobs(ref_input, ref_weight, ref_bias, target, *options)
        # The point may be negative or differ between responses: it goes with the reference.
        point = _reference_point(kl, reference)
        out = pk.kto_loss(logprob, reference + point, good, kl=0.0, beta=beta)
        values = (logprob, summed_logits(_input, weight, bias), beta * (logprob - reference))
        metrics = [torch.where(of, x.detach(), 0.0).sum() for x in values for of in (good, ~good)]
        return out.loss, tuple(metrics)


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO from hidden states, with the signature of Liger's class.

    The formula is that of :func:`pad_kernels.kto_loss` with equal weights.

    Args:
        ignore_index: label of tokens that do not count.
        beta: inverse temperature, > 0.
        compiled: no effect: the schedule is planned.
        use_ref_model: False takes the reference's log-probs to be 0.
        average_log_prob: mean instead of sum over a response's tokens.
        chunk_size: no effect: the schedule is planned.

    Shape:
        ``forward(_input [B, T, H], lin_weight [V, H], target [B, T], bias [V],
        preference_labels [B] bool, ref_input [B, T, H'], ref_weight [V, H'], ref_bias [V],
        kl () or [1] or [B])`` gives (loss, (chosen_logps, rejected_logps, chosen_logits,
        rejected_logits, chosen_rewards, rejected_rewards)), the metrics being sums over the good
        (chosen) or the bad (rejected) responses; logits over their positions and vocabulary too.
        ``kl`` is the reference point, 0 by default, used as it is: it is not clamped at 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or range.

    Example:
        >>> import torch
        >>> hidden, target = torch.zeros(2, 3, 8), torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> good, loss_fn = torch.tensor([True, False]), LigerFusedLinearKTOLoss()
        >>> loss, metrics = loss_fn(hidden, torch.zeros(10, 8), target, preference_labels=good)
        >>> round(loss.item(), 4)
        0.5
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics, see the class."""
        return LigerFusedLinearKTOFunction.apply(
            _input,
            lin_weight,
            target,
            preference_labels,  # type: ignore[arg-type]  # None is refused there, by name
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            kl,
            ignore_index=self.ignore_index,
            beta=self.beta,
            compiled=self.compiled,
            use_ref_model=self.use_ref_model,
            average_log_prob=self.average_log_prob,
            chunk_size=self.chunk_size,
        )
