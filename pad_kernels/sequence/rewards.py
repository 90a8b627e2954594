"""Rewards of whole sequences from per-token log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from pad_kernels._checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_integer,
    check_number,
    check_tensor,
    fail_value,
)
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels._transforms import reject_transforms
from pad_kernels.sequence import gpu
from pad_kernels.sequence.token_ops import token_rewards

NORMALIZATIONS = ("length", "none")


@torch.library.custom_op("pad_kernels::checked_offsets", mutates_args=())
def checked_offsets(cu_seqlens: Tensor, total: int) -> Tensor:
    """Sequence boundaries as int64 [n + 1], their values checked on a CPU.

    An op, so that the check also runs in compiled code.
    """
    offsets = cu_seqlens.to(torch.int64, copy=True)
    if offsets.device.type == "cpu":
        ends = (int(offsets[0]), int(offsets[-1]))
        if ends != (0, total) or bool((offsets.diff() < 0).any()):
            fail_value(
                "cu_seqlens",
                f"boundaries that start at 0, never fall and end at {total}",
                offsets.tolist() if len(offsets) <= 16 else f"{ends[0]} … {ends[1]}",
            )
    return offsets


@checked_offsets.register_fake
def _fake_offsets(cu_seqlens: Tensor, total: int) -> Tensor:
    return torch.empty_like(cu_seqlens, dtype=torch.int64)


def _packed_sums(values: Tensor, offsets: Tensor) -> Tensor:
    # segment_reduce adds each sequence in order: deterministic on every device, unlike index_add.
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, initial=0)


def _rewards_on_gpu(
    logprob: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """The same by one kernel, sequences [..., T] side by side."""
    reject_transforms("logprob", logprob)
    shape = logprob.shape
    if offsets is None:
        logprob = logprob.reshape(shape[:-1].numel(), shape[-1])
        mask = None if mask is None else mask.reshape(logprob.shape)
        labels = None if labels is None else labels.reshape(logprob.shape)
    reward, _ = token_rewards(logprob, offsets, mask, labels, ignore_index, mean)
    return reward.view(shape[:-1]) if offsets is None else reward


def sequence_reward(
    logprob: Tensor,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "length",
    ignore_index: int = -100,
) -> Tensor:
    """Sum or mean of the log-probs of each sequence's tokens.

    r(y) = (1/|y|) Σ_t log π(y_t | x, y_<t): a language model as its own reward function
    (Preference-Aligned Distillation, arXiv 2502.14272, and SimPO, arXiv 2405.14734); with
    ``normalize="none"`` the sum that DPO takes. |y| counts only the tokens that are not masked out.

    Args:
        logprob: [..., T] floating point, nats per token; or [total] with ``cu_seqlens``.
        mask: like ``logprob``, bool, True for tokens that count. What it leaves out is not looked
            at, NaN included.
        labels: like ``logprob``, integer; tokens equal to ``ignore_index`` do not count. Give the
            labels that ``logprob`` was computed with: an ignored token's log-prob of 0 would
            otherwise count as a token. With ``mask``, a token must pass both.
        cu_seqlens: [n + 1] integer, boundaries of packed sequences: 0, ..., total.
        normalize: "length" for the mean over the counted tokens, "none" for the sum.
        ignore_index: the label of tokens that do not count.

    Returns:
        [...] or [n], float32 (float64 for float64): one reward per sequence, differentiable.
        A sequence in which nothing counts has reward 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, boundaries that are not boundaries (looked
            at on a CPU only).

    Example:
        >>> import torch
        >>> logprob = torch.tensor([[-1.0, -3.0, -9.0]])
        >>> sequence_reward(logprob, mask=torch.tensor([[True, True, False]]))
        tensor([-2.])
    """
    check_tensor("logprob", logprob, dtypes=FLOATS)
    check_choice("normalize", normalize, NORMALIZATIONS)
    ignore_index = check_integer("ignore_index", ignore_index)
    if logprob.dim() == 0:
        fail_value("logprob", "at least 1 dimension", "shape ()")
    shape, device = logprob.shape, logprob.device
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), shape=shape, device=device)
    if labels is not None:
        check_tensor("labels", labels, dtypes=INTEGERS, shape=shape, device=device)
    offsets = None
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, dtypes=INTEGERS, ndim=1, device=logprob.device)
        if logprob.dim() != 1:
            fail_value("logprob", "one dimension with cu_seqlens", f"shape {tuple(logprob.shape)}")
        if cu_seqlens.shape[0] < 1:
            fail_value("cu_seqlens", "at least one boundary", "none")
        offsets = checked_offsets(cu_seqlens, logprob.shape[0])
    if gpu.usable(logprob):
        return _rewards_on_gpu(logprob, offsets, mask, labels, ignore_index, normalize == "length")
    counted = torch.ones_like(logprob, dtype=torch.bool)
    if mask is not None:
        counted = counted & mask
    if labels is not None:
        # A narrow integer is compared with the index as that integer has it: 156 with -100.
        counted = counted & (labels.to(torch.int64) != ignore_index)
    accumulate = accumulate_dtype(logprob.dtype)
    kept = torch.where(counted, logprob.to(accumulate), 0.0)
    if offsets is None:
        total, length = kept.sum(-1), counted.sum(-1)
    else:
        total = _packed_sums(kept, offsets)
        length = _packed_sums(counted.to(torch.float64), offsets)
    if normalize == "none":
        return total
    return total / length.clamp(min=1).to(accumulate)


def calibrated_rewards(
    avg_logprob: Tensor, option_probability: Tensor, *, alpha: float, floor: float = 1e-8
) -> Tensor:
    """PAD's calibration of a teacher's rewards with a multiple-choice question.

    r̂ = α·r + (1 − α)·log p, where r is the teacher's mean log-prob of a response and p the
    probability that it gives to the response's option letter when shown all candidates
    (Preference-Aligned Distillation, arXiv 2502.14272, section on reward calibration).

    Args:
        avg_logprob: [...] floating point, nats per token.
        option_probability: like ``avg_logprob``, in [0, 1]; a probability, not its logarithm.
        alpha: weight of ``avg_logprob``, in [0, 1]. The released configuration has 0.
        floor: probabilities below it count as it, so that an option the teacher never considers
            has a finite reward.

    Returns:
        Like ``avg_logprob``, float32 (float64 if it is float64).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that differ, alpha outside [0, 1], floor outside (0, 1],
            probabilities outside [0, 1] or NaN (looked at on a CPU outside compiled code).

    Example:
        >>> import torch
        >>> calibrated_rewards(torch.tensor([-2.0]), torch.tensor([1.0]), alpha=0.25)
        tensor([-0.5000])
    """
    check_tensor("avg_logprob", avg_logprob, dtypes=FLOATS)
    check_tensor(
        "option_probability",
        option_probability,
        dtypes=FLOATS,
        shape=avg_logprob.shape,
        device=avg_logprob.device,
    )
    weight = check_number("alpha", alpha, at_least=0.0, at_most=1.0)
    lowest = check_number("floor", floor, above=0.0, at_most=1.0)
    if option_probability.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ~((option_probability >= 0) & (option_probability <= 1))
        if bool(outside.any()):
            fail_value(
                "option_probability",
                "probabilities in [0, 1]",
                option_probability.detach()[outside][0].item(),
            )
    dtype = accumulate_dtype(avg_logprob.dtype)
    log_option = option_probability.to(dtype).clamp(min=lowest).log()
    own = avg_logprob.to(dtype)
    if weight == 0:  # a reward of -inf counts nothing then
        own = own.masked_fill(own.isinf(), 0.0)
    return weight * own + (1.0 - weight) * log_option
