"""Listwise preference losses: divergences between Plackett–Luce distributions over rankings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pad_kernels._checks import (
    FLOATS,
    check_choice,
    check_constant,
    check_integer,
    check_number,
    check_reduction,
    check_tensor,
    fail_value,
)
from pad_kernels._transforms import reject_transforms
from pad_kernels.sequence.listwise_op import listwise_preference

KINDS = ("jsd", "jsd_released", "kl", "reverse_kl", "ranking", "top1")
#: Most responses that a kind can rank exactly: 2^n sets for kl, n! rankings for jsd.
EXACT_LIMITS = {"jsd": 8, "jsd_released": 8, "kl": 16, "reverse_kl": 16}
_SAMPLED_KINDS = ("jsd", "jsd_released")


class ListwiseEstimate(NamedTuple):
    """A listwise loss and the standard error that sampling gave it (0 for exact losses)."""

    loss: Tensor
    standard_error: Tensor


def _check_size(kind: str, n: int, samples: int | None) -> None:
    limit = EXACT_LIMITS.get(kind)
    if samples is None and limit is not None and n > limit:
        how = "samples= or subset_size=" if kind in _SAMPLED_KINDS else "subset_size="
        fail_value(
            "student_rewards",
            f"at most {limit} responses to rank at once for an exact {kind!r} (above, use {how})",
            n,
        )


def _check_subsets(n: int, subset_size: int | None) -> int:
    if subset_size is None:
        return n
    size = check_integer("subset_size", subset_size, at_least=2)
    if size > n:
        fail_value("subset_size", f"at most the {n} responses of a group", size)
    if n % size == 1:
        fail_value(
            "subset_size",
            f"a size that does not leave one of the {n} responses alone in the last subset",
            size,
        )
    return size


class Ranking(NamedTuple):
    """What the checked arguments of a listwise loss come to."""

    beta: float
    subset_size: int
    seed: Tensor | None


def check_ranking(
    teacher: Tensor,
    *,
    beta: float,
    kind: str,
    valid: Tensor | None,
    subset_size: int | None,
    samples: int | None,
    seed: int | None,
    reduction: str,
) -> Ranking:
    """Check every argument of a listwise loss but the student's rewards, before any work."""
    reject_transforms("teacher_rewards", teacher)
    check_choice("kind", kind, KINDS)
    check_reduction(reduction)
    scale = check_number("beta", beta, above=0.0)
    check_tensor("teacher_rewards", teacher, dtypes=FLOATS, ndim=2)
    if teacher.shape[1] < 2:
        fail_value("teacher_rewards", "at least 2 responses in a group", tuple(teacher.shape))
    check_constant("teacher_rewards", teacher)
    if valid is not None:
        shape, device = teacher.shape, teacher.device
        check_tensor("valid", valid, dtypes=(torch.bool,), shape=shape, device=device)
    size = _check_subsets(teacher.shape[1], subset_size)
    if samples is not None and kind not in _SAMPLED_KINDS:
        fail_value("samples", f"None: {kind!r} is never sampled", samples)
    seeded = _seed_tensor(samples, seed)
    _check_size(kind, size, samples)
    return Ranking(scale, size, seeded)


def _seed_tensor(samples: int | None, seed: int | None) -> Tensor | None:
    if seed is not None:
        check_integer("seed", seed, at_least=0)
    if samples is None:
        return None
    check_integer("samples", samples, at_least=4)
    if seed is None:
        return torch.randint(1 << 62, ())
    return torch.tensor(seed, dtype=torch.int64)


def _counted_groups(valid: Tensor | None, groups: int, size: int) -> Tensor | int:
    """How many groups have something to rank, that is, two valid responses in one subset.

    At least 1, so that a mean over no groups is 0.
    """
    if valid is None:
        return max(1, groups)
    parts = -(-valid.shape[1] // size)
    padded = torch.nn.functional.pad(valid, (0, parts * size - valid.shape[1]))
    return (padded.view(groups, parts, size).sum(-1) >= 2).any(-1).sum().clamp(min=1)


def reduced(loss: Tensor, valid: Tensor | None, size: int, reduction: str) -> Tensor:
    """Losses [groups] of subsets of that size as the reduction has it."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / _counted_groups(valid, loss.shape[0], size)


def listwise_preference_estimate(
    student_rewards: Tensor,
    teacher_rewards: Tensor,
    *,
    beta: float = 1.0,
    kind: str = "jsd",
    valid: Tensor | None = None,
    subset_size: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    reduction: str = "mean",
) -> ListwiseEstimate:
    """:func:`listwise_preference_loss` together with the standard error of a sampled loss.

    Args:
        student_rewards: as for :func:`listwise_preference_loss`, like everything below.
        teacher_rewards: [groups, n].
        beta: scale of both.
        kind: the divergence.
        valid: [groups, n] bool.
        subset_size: responses ranked at once.
        samples: rankings drawn per group (per subset, with ``subset_size``).
        seed: of the draws.
        reduction: "mean", "sum" or "none"; the standard error is that of the reduced loss.

    Returns:
        ``ListwiseEstimate(loss, standard_error)``. The loss is differentiable, its gradient as
        unbiased as itself; the standard error is a number to look at, 0 where the loss is exact.

    Raises:
        TypeError, ValueError: as :func:`listwise_preference_loss`.

    Example:
        >>> import torch
        >>> student, teacher = torch.linspace(0.0, 1.0, 10)[None], torch.zeros(1, 10)
        >>> estimate = listwise_preference_estimate(student, teacher, samples=4096, seed=0)
        >>> bool(estimate.standard_error < 0.01)
        True
    """
    reject_transforms("student_rewards", student_rewards)
    student = check_tensor("student_rewards", student_rewards, dtypes=FLOATS, ndim=2)
    if student.shape[1] < 2:
        fail_value("student_rewards", "at least 2 responses in a group", tuple(student.shape))
    shape, device = student.shape, student.device
    check_tensor("teacher_rewards", teacher_rewards, dtypes=FLOATS, shape=shape, device=device)
    ranking = check_ranking(
        teacher_rewards,
        beta=beta,
        kind=kind,
        valid=valid,
        subset_size=subset_size,
        samples=samples,
        seed=seed,
        reduction=reduction,
    )
    loss, error, _ = listwise_preference(
        student_rewards,
        teacher_rewards,
        valid,
        ranking.seed,
        kind,
        ranking.beta,
        ranking.subset_size,
        samples or 0,
        torch.is_grad_enabled() and student_rewards.requires_grad,
    )
    if reduction == "none":
        return ListwiseEstimate(loss, error)
    # Groups are sampled independently: their variances add up.
    size = ranking.subset_size
    total = error.square().sum().sqrt()
    if reduction == "mean":
        total = total / _counted_groups(valid, student.shape[0], size)
    return ListwiseEstimate(reduced(loss, valid, size, reduction), total)


def listwise_preference_loss(
    student_rewards: Tensor,
    teacher_rewards: Tensor,
    *,
    beta: float = 1.0,
    kind: str = "jsd",
    valid: Tensor | None = None,
    subset_size: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """How far the student's distribution over rankings of n responses is from the teacher's.

    Rewards r define the Plackett–Luce distribution over rankings τ,
    P(τ) = Π_k exp(β r(τ_k)) / Σ_{j≥k} exp(β r(τ_j)), β scaling student and teacher alike. With
    rewards of :func:`sequence_reward` this is the last step of Preference-Aligned Distillation
    (PAD, arXiv 2502.14272), whose released configuration has β = 10 and n = 4.

    Kinds, S the student's distribution, T the teacher's, M = ½(S + T):

    - ``jsd``: ½KL(S‖M) + ½KL(T‖M), the paper's probabilistic loss, between 0 and log 2;
    - ``jsd_released``: ½KL(M‖S) + ½KL(M‖T), what the paper's released code computes;
    - ``kl``: KL(T‖S); ``reverse_kl``: KL(S‖T);
    - ``ranking``: −log S(τ*), τ* the teacher's ranking (PAD's vanilla loss, ListMLE); responses
      that the teacher rewards equally are ranked by index;
    - ``top1``: KL between the teacher's and the student's softmax(β r), the distributions of the
      response ranked first (ListNet's top-one model; ListNet's cross-entropy differs from it by the
      teacher's entropy, which has no gradient).

    ``jsd`` and ``jsd_released`` are exact up to 8 responses, ``kl`` and ``reverse_kl`` up to 16,
    none of them with memory in n!; the other two have no limit. Whatever the inputs are, the
    arithmetic is float64 inside.

    Args:
        student_rewards: [groups, n] floating point, n ≥ 2, for instance mean log-probs in nats per
            token; may require grad.
        teacher_rewards: [groups, n] floating point, on the same device; may not require grad.
        beta: positive scale of all rewards.
        kind: the divergence, see above.
        valid: [groups, n] bool, False for responses that do not exist; their rewards are not looked
            at and get no gradient. A group with fewer than two valid responses contributes 0 and
            does not count in the mean.
        subset_size: the decomposed loss: responses are split, in the order given, into consecutive
            subsets of this size, and the losses of the subsets (those with at least two valid
            responses) are averaged. The paper speaks of subsets of one size; a smaller last one is
            allowed here as long as two responses are left for it. The limits on n then hold for
            the subset size. Shuffle the responses beforehand if their order means something.
        samples: for ``jsd`` and ``jsd_released``: estimate from this many rankings (at least 4),
            half of them drawn from S and half from T; unbiased in value and gradient.
            :func:`listwise_preference_estimate` tells the standard error.
        seed: of the draws, which it makes repeatable on one kind of device; None takes one from
            torch's default generator. Without ``samples`` it has no effect.
        reduction: "mean" over the groups that count (0 if none does), "sum", or "none": [groups].

    Returns:
        The loss in nats, float32 (float64 for float64 student rewards). Differentiable once, with
        respect to the student's rewards.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, n = 1, n above a kind's limit, numbers out of range, a
            teacher that requires grad, and rewards that are NaN or infinite (on a CPU).
        RuntimeError: under ``torch.func`` transforms or forward-mode differentiation, and where a
            second derivative is asked for.

    Example:
        Two responses: the Bernoulli KL of a Bradley–Terry model.

        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> round(listwise_preference_loss(student, teacher, kind="kl").item(), 4)
        0.1109
    """
    return listwise_preference_estimate(
        student_rewards,
        teacher_rewards,
        beta=beta,
        kind=kind,
        valid=valid,
        subset_size=subset_size,
        samples=samples,
        seed=seed,
        reduction=reduction,
    ).loss
