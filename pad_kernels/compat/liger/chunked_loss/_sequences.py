"""What the preference losses share: sequence log-probs, the chosen NLL and the logged logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import pad_kernels as pk
from pad_kernels._checks import check_flag, fail_type, fail_value
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.compat._arguments import check_head, check_labels, detached

# Rows of the weight that are cast at a time when its rows are added up in float32.
_WEIGHT_ROWS = 4096


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    average: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probs per sequence [B] (mean or sum over tokens) and per token [B, T]."""
    tokens = pk.linear_logprob(hidden, weight, target, bias=bias, ignore_index=ignore_index)
    how = "length" if average else "none"
    return (
        pk.sequence_reward(tokens, labels=target, ignore_index=ignore_index, normalize=how),
        tokens,
    )


def reference_logprobs(
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    average: bool,
) -> Tensor:
    """The reference model's log-probs per sequence [B], without gradient."""
    for name, value in (("ref_input", ref_input), ("ref_weight", ref_weight)):
        if value is None:
            fail_type(name, "a torch.Tensor with use_ref_model=True", value)
    assert ref_input is not None and ref_weight is not None
    check_head(ndim=3, ref_input=ref_input, ref_weight=ref_weight, ref_bias=ref_bias)
    if ref_input.shape[:-1] != target.shape:
        expected = f"shape [{target.shape[0]}, {target.shape[1]}, H'] to match target"
        fail_value("ref_input", expected, f"shape {tuple(ref_input.shape)}")
    with torch.no_grad():
        return sequence_logprobs(
            ref_input.detach(),
            ref_weight.detach(),
            target,
            detached(ref_bias),
            ignore_index,
            average,
        )[0]


@torch.no_grad()
def summed_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sum of a sequence's logits over tokens and vocabulary, [B], without computing the logits.

    Σ_t Σ_v h_t·w_v + b_v = (Σ_t h_t)·(Σ_v w_v) + T Σ_v b_v.
    """
    dtype = accumulate_dtype(hidden.dtype)
    rows = torch.zeros(weight.shape[1], dtype=dtype, device=weight.device)
    for block in weight.split(_WEIGHT_ROWS):
        rows += block.sum(0, dtype=dtype)
    sums = (hidden.sum(1, dtype=dtype) * rows).sum(-1)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=dtype)


class Pairs(NamedTuple):
    """A batch whose first half is preferred over its second."""

    chosen: Tensor  # [pairs]: log-probs of the chosen responses
    rejected: Tensor
    nll: Tensor  # 0-d: mean negative log-prob of the chosen tokens; 0 where it is not wanted
    chosen_logits: Tensor  # 0-d: mean over pairs, positions and vocabulary
    rejected_logits: Tensor

    def metrics(self, *more: Tensor) -> tuple[Tensor, ...]:
        """What is returned beside the loss, without gradient, in Liger's order."""
        chosen, rejected, nll, *logits = self
        return tuple(x.detach() for x in (chosen, rejected, *logits, nll, *more))


def pairs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    average_log_prob: bool,
    compute_nll_loss: bool,
    nll_target: Tensor | None = None,
) -> Pairs:
    """Log-probs, NLL and mean logits of a batch of chosen and rejected responses.

    Args:
        hidden: [2 pairs, T, H]: the chosen responses, then the rejected ones.
        weight: [V, H].
        target: [2 pairs, T], aligned with ``hidden``.
        bias: [V] or None.
        ignore_index: label of tokens that do not count.
        average_log_prob: mean instead of sum over a response's tokens.
        compute_nll_loss: whether the NLL is wanted.
        nll_target: like ``target``: labels of the NLL where they are not the same.
    """
    check_flag("average_log_prob", average_log_prob)
    check_flag("compute_nll_loss", compute_nll_loss)
    check_head(ndim=3, _input=hidden, weight=weight, bias=bias)
    check_labels("target", target, hidden)
    batch, length = target.shape
    if batch % 2:
        fail_value("_input", "as many chosen as rejected responses", f"{batch} in all")
    if nll_target is not None:
        check_labels("nll_target", nll_target, hidden)
    half = batch // 2
    logprob, tokens = sequence_logprobs(
        hidden, weight, target, bias, ignore_index, average_log_prob
    )
    nll = logprob.new_zeros(())
    if compute_nll_loss and nll_target is not None:
        options: dict[str, Any] = {"bias": bias, "ignore_index": ignore_index}
        nll = pk.linear_cross_entropy(hidden[:half], weight, nll_target[:half], **options)
    elif compute_nll_loss:
        count = (target[:half] != ignore_index).sum()
        nll = -tokens[:half].sum() / count.clamp(min=1)
    logits = summed_logits(hidden, weight, bias) / max(1, half * length * weight.shape[0])
    return Pairs(logprob[:half], logprob[half:], nll, logits[:half].sum(), logits[half:].sum())
