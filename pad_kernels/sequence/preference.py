"""From hidden states to a listwise preference loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pad_kernels._checks import (
    FLOATS,
    IDS,
    check_choice,
    check_flag,
    check_integer,
    check_tensor,
    fail_value,
)
from pad_kernels.engine.plan import PlanLike
from pad_kernels.sequence import gpu
from pad_kernels.sequence.listwise_op import check_finite
from pad_kernels.sequence.plackett_luce import check_ranking, listwise_preference_loss, reduced
from pad_kernels.sequence.rewards import NORMALIZATIONS, checked_offsets, sequence_reward
from pad_kernels.sequence.token_ops import token_listwise


def _check_layout(
    hidden: Tensor, labels: Tensor, teacher_rewards: Tensor, cu_seqlens: Tensor | None
) -> None:
    """Check that hidden states, labels and teacher rewards speak of the same responses."""
    check_tensor("hidden", hidden, dtypes=FLOATS)
    check_tensor("teacher_rewards", teacher_rewards, dtypes=FLOATS, ndim=2, device=hidden.device)
    groups, n = teacher_rewards.shape
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, dtypes=IDS, ndim=1, device=hidden.device)
        if cu_seqlens.shape[0] != groups * n + 1:
            fail_value(
                "cu_seqlens",
                f"{groups * n + 1} boundaries, for the {groups} × {n} teacher rewards",
                f"shape {tuple(cu_seqlens.shape)}",
            )
        if hidden.dim() != 2:
            fail_value("hidden", "[total, H] with cu_seqlens", f"shape {tuple(hidden.shape)}")
    elif not (
        (hidden.dim() == 4 and hidden.shape[:2] == (groups, n))
        or (hidden.dim() == 3 and hidden.shape[0] == groups * n)
    ):
        fail_value(
            "hidden",
            f"[{groups}, {n}, T, H] or [{groups * n}, T, H] for {groups} × {n} teacher rewards",
            f"shape {tuple(hidden.shape)}",
        )
    check_tensor("labels", labels, dtypes=IDS, shape=hidden.shape[:-1], device=hidden.device)


def _counted_labels(
    labels: Tensor,
    mask: Tensor | None,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Labels with ``ignore_index`` wherever a token's log-prob will not be looked at.

    Ignored rows cost the head nothing, so responses that are not valid are ignored whole.
    """
    labels = labels.to(torch.int64)  # as ignore_index is
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), shape=labels.shape, device=labels.device)
        labels = torch.where(mask, labels, ignore_index)
    if valid is None:
        return labels
    exists = valid.reshape(-1)
    if cu_seqlens is None:
        exists = exists.view(*labels.shape[:-1], 1)
    else:
        position = torch.arange(labels.shape[0], device=labels.device)
        inner = cu_seqlens[1:-1].to(torch.int64)
        exists = exists[torch.searchsorted(inner, position, right=True)]
    return torch.where(exists, labels, ignore_index)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher_rewards: Tensor,
    *,
    beta: float,
    kind: str = "jsd",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "length",
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    valid: Tensor | None = None,
    subset_size: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    reduction: str = "mean",
    plan: PlanLike = None,
) -> Tensor:
    """The training step of Preference-Aligned Distillation, from hidden states to the loss.

    It is :func:`listwise_preference_loss` of :func:`sequence_reward` of
    :func:`pad_kernels.linear_logprob`: each response's reward is the mean (or sum) of its tokens'
    log-probs under the head, and the loss compares the distributions over rankings of the n
    responses to a prompt that the student's and the teacher's rewards define (PAD,
    arXiv 2502.14272). The N×V logits are never held, and tokens that do not count cost nothing.

    Args:
        hidden: the student's last hidden states, [groups, n, T, H] or [groups·n, T, H], the n
            responses of a group side by side; or packed, [total, H] with ``cu_seqlens``.
            float32, float64, bfloat16 or float16.
        weight: [V, H], the LM head.
        labels: ``hidden``'s leading shape, int64 or int32: the token that each position predicts;
            ``ignore_index`` where nothing counts (prompt, padding).
        teacher_rewards: [groups, n] floating point, no gradient; its shape says what n is.
        beta: positive scale of student and teacher rewards.
        kind: jsd, jsd_released, kl, reverse_kl, ranking or top1.
        mask: like ``labels``, bool, True for tokens that count.
        cu_seqlens: [groups·n + 1] int64 or int32, boundaries of packed responses.
        normalize: "length" for the mean over a response's tokens, "none" for the sum.
        bias: [V] bias of the head.
        softcap: final logit soft cap.
        logit_scale: factor on the raw logits.
        temperature: divisor of the logits.
        vocab_size: leading entries of ``weight`` that are real.
        ignore_index: label of tokens that do not count.
        shift: labels and mask are the inputs' own: position i predicts label i + 1 of its sequence.
        valid: [groups, n] bool, False for responses that do not exist.
        subset_size: the decomposed loss, see :func:`listwise_preference_loss`; so are the next.
        samples: rankings to draw for a sampled jsd.
        seed: of the draws.
        reduction: "mean", "sum" or "none" over groups.
        plan: how :func:`pad_kernels.linear_logprob` runs.

    Returns:
        The loss, float32 (float64 for float64), differentiable once with respect to hidden, weight
        and bias.

    Raises:
        TypeError, ValueError: as the functions it is made of; shapes that do not fit
            ``teacher_rewards``.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(1, 2, 3, 4), torch.zeros(5, 4)
        >>> labels = torch.zeros(1, 2, 3, dtype=torch.long)
        >>> teacher = torch.tensor([[0.0, 0.0]])
        >>> linear_preference_loss(hidden, weight, labels, teacher, beta=10.0).item()
        0.0
    """
    from pad_kernels._tokens import shifted_labels
    from pad_kernels.api import linear_logprob  # api is above this module

    _check_layout(hidden, labels, teacher_rewards, cu_seqlens)
    options: dict[str, Any] = {
        "beta": beta,
        "kind": kind,
        "valid": valid,
        "subset_size": subset_size,
        "samples": samples,
        "seed": seed,
        "reduction": reduction,
    }
    ranking = check_ranking(teacher_rewards, **options)
    check_choice("normalize", normalize, NORMALIZATIONS)
    ignore_index = check_integer("ignore_index", ignore_index)
    if cu_seqlens is not None:
        cu_seqlens = checked_offsets(cu_seqlens, hidden.shape[0])
    if not torch.compiler.is_compiling() and teacher_rewards.device.type == "cpu":
        check_finite("teacher_rewards", teacher_rewards, valid)
    counted = _counted_labels(labels, mask, valid, cu_seqlens, ignore_index)
    if check_flag("shift", shift):
        counted = shifted_labels(counted, ignore_index, cu_seqlens)
    logprob = linear_logprob(
        hidden,
        weight,
        counted,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        plan=plan,
    )
    if kind in gpu.KINDS and samples is None and gpu.usable(logprob):
        packed = cu_seqlens is not None
        loss, _, _ = token_listwise(
            logprob if packed else logprob.flatten(0, -2),
            teacher_rewards,
            cu_seqlens,
            counted if packed else counted.flatten(0, -2),
            valid,
            *(kind, ranking.beta, ranking.subset_size, ignore_index, normalize == "length"),
            torch.is_grad_enabled() and logprob.requires_grad,
        )
        return reduced(loss, valid, ranking.subset_size, reduction)
    rewards = sequence_reward(
        logprob,
        labels=counted,
        cu_seqlens=cu_seqlens,
        normalize=normalize,
        ignore_index=ignore_index,
    )
    rewards = rewards.view(teacher_rewards.shape)
    return listwise_preference_loss(rewards, teacher_rewards, **options)
