"""Losses of a student against teachers, full vocabulary or offline: validate, describe, call."""

from __future__ import annotations

import torch
from torch import Tensor

from pad_kernels._checks import FLOATS, check_number, check_tensor, fail_type
from pad_kernels._tokens import Tokens, check_weights
from pad_kernels.engine.call import weighted
from pad_kernels.engine.mixture import Mixture, check_kind
from pad_kernels.engine.plan import PlanLike
from pad_kernels.heads import Head
from pad_kernels.offline import TopKAdvantage, TopKTeacher


def _reduced(
    mixture: Mixture,
    factor: float,
    tokens: Tokens,
    token_weights: Tensor | None,
    ignore_index: int,
    plan: PlanLike,
) -> Tensor:
    """The only functional of a mixture times ``factor``, per token or summed."""
    call = mixture.call(tokens.labels, ignore_index, plan)
    if tokens.reduction == "none":
        values = call.tokens(mixture.functionals)[0][0] * factor
        return _weighted(values, token_weights, tokens)
    weights = tokens.weights(token_weights, call.accumulate)
    return call.total(mixture.functionals, (weights * factor).unsqueeze(0))[0]


def _weighted(values: Tensor, token_weights: Tensor | None, tokens: Tokens) -> Tensor:
    """Per-token values [N] in the tokens' shape, times their weights."""
    if token_weights is not None:
        values = weighted(values, token_weights.reshape(-1).to(values.dtype))
    return values.reshape(tokens.leading)


def linear_divergence(
    student: Head,
    teacher: Head | TopKTeacher,
    *,
    kind: str = "forward_kl",
    alpha: float | None = None,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    plan: PlanLike = None,
) -> Tensor:
    """Divergence between a student's and a teacher's next-token distributions, token by token.

    With s and t their softmaxes over the whole vocabulary, per token: ``forward_kl``
    sum t log(t/s); ``reverse_kl`` sum s log(s/t); ``jsd`` alpha KL(t||m) + (1 - alpha) KL(s||m),
    m = alpha t + (1 - alpha) s (arXiv 2306.13649); ``skew_forward_kl`` KL(t||m) with the same m and
    ``skew_reverse_kl`` KL(s||m), m = (1 - alpha) t + alpha s (arXiv 2402.03898); ``tvd``
    sum |s - t| / 2. In nats, without a factor temperature**2.

    Args:
        student: a Head; the gradient goes to its hidden, weight and bias.
        teacher: a Head with the same leading shape and vocabulary size, its own hidden size and
            options; or a TopKTeacher. Must not require grad.
        kind: one of the above.
        alpha: in (0, 1), of the kinds with a mixture: 0.5 for jsd, else 0.1 by default.
        labels: int64 or int32 [...]; only says which tokens are left out.
        token_weights: [...], float; may require grad.
        reduction: "mean", "sum" or "none".
        normalizer: what "mean" divides by, a number or 0-d tensor; default: the count of tokens
            that are not left out. A mean over no tokens is 0.
        ignore_index: label of tokens that are left out and cost nothing.
        shift, cu_seqlens: as in :func:`linear_logprob`.
        plan: as in :func:`linear_cross_entropy`.

    Returns:
        A 0-d tensor, or per-token values [...] for "none"; float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.

    Example:
        >>> import torch, pad_kernels as pk
        >>> student = pk.Head(torch.zeros(3, 4), torch.zeros(10, 4))
        >>> teacher = pk.Head(torch.zeros(3, 6), torch.zeros(10, 6))
        >>> pk.linear_divergence(student, teacher, kind="jsd", reduction="none")
        tensor([0., 0., 0.])
    """
    tokens = Tokens.checked(student, labels, reduction, normalizer, ignore_index, shift, cu_seqlens)
    check_weights("token_weights", token_weights, tokens.leading, tokens.counted.device)
    mix = check_kind(kind, alpha)
    if not isinstance(teacher, Head | TopKTeacher):
        fail_type("teacher", "a pad_kernels.Head or TopKTeacher", teacher)
    mixture = Mixture(student)
    if isinstance(teacher, TopKTeacher) and teacher.tail == "renormalize":
        call = mixture.call(tokens.labels, ignore_index, plan)  # for its checks: there is no pass
        if reduction == "none":
            call.refuse_early()
        counted = tokens.used(token_weights)
        values = mixture.renormalized(teacher, kind, mix, counted, call.backend)
        if reduction == "none":
            return _weighted(values, token_weights, tokens)
        return weighted(values, tokens.weights(token_weights, values.dtype)).sum()
    mixture.add_divergence(teacher, kind, mix)
    return _reduced(mixture, 1.0, tokens, token_weights, ignore_index, plan)


def linear_expected_advantage(
    student: Head,
    aligned: Head | TopKAdvantage,
    reference: Head | None = None,
    *,
    beta: float = 1.0,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    plan: PlanLike = None,
) -> Tensor:
    """Expected advantage of ADPA: sum over tokens a of s(a) beta log(aligned(a) / reference(a)).

    The quantity to be made large (arXiv 2502.17927); a loss subtracts it. Exact over the
    whole vocabulary with two heads, or over k tokens with a :class:`TopKAdvantage`, where the
    log-ratio of all other tokens counts as 0.

    Args:
        student: a Head; the gradient goes to its hidden, weight and bias.
        aligned: the teacher after preference alignment, a Head; or offline log-ratios.
        reference: the teacher before it, a Head; None with offline log-ratios.
        beta: > 0.
        labels, token_weights, reduction, normalizer, ignore_index, shift, cu_seqlens, plan: as in
            :func:`linear_divergence`.

    Returns:
        A 0-d tensor, or per-token values [...] for "none"; float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.

    Example:
        >>> import torch, pad_kernels as pk
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(10, 4)
        >>> one = torch.zeros(10).index_fill(0, torch.tensor(3), 1.0)
        >>> student, aligned = pk.Head(hidden, weight), pk.Head(hidden, weight, one)
        >>> pk.linear_expected_advantage(student, aligned, student)
        tensor(-0.0586)
    """
    tokens = Tokens.checked(student, labels, reduction, normalizer, ignore_index, shift, cu_seqlens)
    check_weights("token_weights", token_weights, tokens.leading, tokens.counted.device)
    factor = check_number("beta", beta, above=0.0)
    mixture = Mixture(student)
    mixture.add_advantage(aligned, reference)
    return _reduced(mixture, factor, tokens, token_weights, ignore_index, plan)


def token_mean_weights(*sets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights that turn one weighted sum over tokens into a sum of means over sets of them.

    DCKD adds the mean over chosen tokens to the mean over rejected ones (arXiv 2502.17927): two
    denominators. A token weighs 1/|set| for each set that it is in; pass the result with
    ``reduction="sum"``.

    Args:
        sets: bool tensors of one shape [...], each the tokens of one mean.
        dtype: of the result; float64 for losses in float64.

    Returns:
        Weights [...]; an empty set adds nothing.

    Raises:
        TypeError, ValueError: no set, or tensors that are not bool or of one shape and device.

    Example:
        >>> import torch, pad_kernels as pk
        >>> chosen = torch.tensor([True, True, False, False, False])
        >>> pk.token_mean_weights(chosen, ~chosen)
        tensor([0.5000, 0.5000, 0.3333, 0.3333, 0.3333])
    """
    if dtype not in FLOATS:
        fail_type("dtype", "a floating-point dtype", dtype)
    if not sets:
        fail_type("sets", "at least one bool tensor", "none")
    first = sets[0]
    total = None
    for i, mask in enumerate(sets):
        check_tensor(f"sets[{i}]", mask, dtypes=(torch.bool,))
        check_tensor(f"sets[{i}]", mask, shape=tuple(first.shape), device=first.device)
        part = mask.to(dtype) / mask.sum().clamp(min=1)
        total = part if total is None else total + part
    assert total is not None
    return total
