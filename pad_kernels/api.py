"""The one-head API: validate, describe the work as row functionals, call the engine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pad_kernels._checks import (
    IDS,
    check_integer,
    check_number,
    check_reduction,
    check_tensor,
    fail_value,
)
from pad_kernels._tokens import check_labels, check_normalizer, check_weights, per_token_weights
from pad_kernels.engine.call import Call, weighted
from pad_kernels.engine.plan import PlanLike
from pad_kernels.engine.topk import topk
from pad_kernels.functionals import (
    Entropy,
    Functional,
    LogitSum,
    LogProb,
    LogSumExp,
    SquaredLogSumExp,
)
from pad_kernels.heads import Head


class TokenStats(NamedTuple):
    """Per-token statistics, each like ``labels``; 0 (argmax: -1) where ignored."""

    logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    argmax: Tensor


class TopK(NamedTuple):
    """The k likeliest tokens of each row, [..., k]: ids int64 and full-vocabulary log-probs."""

    ids: Tensor
    logprobs: Tensor


def _call(
    head: Head,
    labels: Tensor,
    ignore_index: int,
    shift: bool,
    cu_seqlens: Tensor | None,
    plan: PlanLike,
) -> Call:
    """Check a head and its labels and make them a call over flat rows."""
    call = Call(head, plan=plan, ignore_index=ignore_index)
    aligned = check_labels(labels, head.hidden, ignore_index, shift, cu_seqlens)
    call.inputs["labels"] = aligned.reshape(-1, 1)
    return call


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    plan: PlanLike = None,
) -> Tensor:
    """Log-probability of each label under an LM head, without holding the logits.

    With z = softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap) / temperature, the
    value is log softmax(z)[label], per token.

    Args:
        hidden: hidden states [..., H], float32, float64, bfloat16 or float16.
        weight: head weight [V, H], same dtype.
        labels: int64 or int32 [...], already aligned: label i is what row i predicts.
        bias: [V].
        softcap: final logit soft cap, > 0.
        logit_scale: factor on the raw logits.
        temperature: divisor of the logits, > 0.
        vocab_size: leading entries of ``weight`` that are real; the rest have probability 0.
        ignore_index: label of rows that are left out and cost nothing.
        shift: do the causal shift here: row i predicts label i + 1, the last position is ignored.
        cu_seqlens: with ``shift`` and packed [N] input, the sequences' boundaries [n + 1], integer,
            so that no sequence predicts the first token of the next.
        plan: None, "late", "kept", a backend, "schedule:backend", a PlanRequest or a Plan.

    Returns:
        Tensor like ``labels``, float32 (float64 for float64 input), 0 where ignored;
        differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.

    Example:
        >>> import torch, pad_kernels as pk
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(10, 8)
        >>> pk.linear_logprob(hidden, weight, torch.tensor([[1, 2, -100], [3, 4, 5]]))
        tensor([[-2.3026, -2.3026,  0.0000],
                [-2.3026, -2.3026, -2.3026]])
    """
    head = Head(hidden, weight, bias, softcap, logit_scale, temperature, vocab_size)
    call = _call(head, labels, ignore_index, shift, cu_seqlens, plan)
    values, _ = call.tokens([LogProb()])
    return values[0].reshape(labels.shape)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    plan: PlanLike = None,
) -> TokenStats:
    """Log-prob of the label, log normaliser, entropy and greedy token of each row, in one pass.

    In the inverse-reinforcement-learning view of PAD (arXiv 2502.14272), Q is the label's logit
    (logprob + logsumexp) and V the logsumexp.

    Args:
        hidden, weight, labels and the options: as in :func:`linear_logprob`.

    Returns:
        TokenStats(logprob, logsumexp, entropy, argmax), each like ``labels``. The first three are
        differentiable; entropy is in nats. Ignored rows hold 0 (argmax: -1).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.

    Example:
        >>> import torch, pad_kernels as pk
        >>> labels = torch.tensor([1, 2])
        >>> stats = pk.linear_token_stats(torch.zeros(2, 8), torch.zeros(10, 8), labels)
        >>> stats.entropy
        tensor([2.3026, 2.3026])
    """
    head = Head(hidden, weight, bias, softcap, logit_scale, temperature, vocab_size)
    call = _call(head, labels, ignore_index, shift, cu_seqlens, plan)
    values, greedy = call.tokens([LogProb(), LogSumExp(), Entropy()], argmax=True)
    # Not by iteration: autograd allows no in-place change of one of several views made at once.
    logprob, logsumexp, entropy = (values[i].reshape(labels.shape) for i in range(3))
    return TokenStats(logprob, logsumexp, entropy, greedy.reshape(labels.shape))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    plan: PlanLike = None,
) -> Tensor:
    """Cross-entropy of an LM head: ``F.cross_entropy(F.linear(hidden, weight, bias), labels)``.

    Per token: (1 - label_smoothing) (-logprob) + label_smoothing (-mean log-prob over the
    vocabulary) + z_loss * logsumexp**2, times the token's weight.

    Args:
        hidden, weight, labels and the head options: as in :func:`linear_logprob`; ``plan`` may also
            be "early" (gradients are made in the forward pass) unless ``reduction="none"``.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        z_loss: coefficient of logsumexp**2, >= 0; part of the returned loss.
        token_weights: like ``labels``, float; may require grad.
        normalizer: what "mean" divides by, a number or 0-d tensor (a trainer's num_items_in_batch);
            default: the count of labels that are not ignored, never the sum of weights. A mean
            over no tokens is 0.

    Returns:
        A 0-d tensor, or one like ``labels`` for "none"; float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.

    Example:
        >>> import torch, pad_kernels as pk
        >>> pk.linear_cross_entropy(torch.zeros(2, 8), torch.zeros(10, 8), torch.tensor([1, -100]))
        tensor(2.3026)
    """
    check_reduction(reduction)
    smoothing = check_number("label_smoothing", label_smoothing, at_least=0.0, at_most=1.0)
    z_weight = check_number("z_loss", z_loss, at_least=0.0)
    head = Head(hidden, weight, bias, softcap, logit_scale, temperature, vocab_size)
    call = _call(head, labels, ignore_index, shift, cu_seqlens, plan)
    weights = check_weights("token_weights", token_weights, labels.shape, labels.device)
    divisor = check_normalizer(normalizer, reduction, hidden.device)

    terms: list[tuple[Functional, float]] = []
    if smoothing < 1:
        terms += [(LogProb(), smoothing - 1)]
    if smoothing:
        terms += [(LogSumExp(), smoothing), (LogitSum(), -smoothing / call.vocab)]
    if z_weight:
        terms += [(SquaredLogSumExp(), z_weight)]
    functionals, factors = zip(*terms, strict=True)

    if reduction == "none":
        values, _ = call.tokens(functionals)
        parts = [c * v for c, v in zip(factors, values, strict=True)]
        loss = torch.stack(parts).sum(0).reshape(labels.shape)
        return loss if weights is None else weighted(loss, weights.to(call.accumulate))
    counted = (call.inputs["labels"] != ignore_index).reshape(-1)
    per_token = per_token_weights(weights, counted, reduction, divisor, call.accumulate)
    return call.total(functionals, torch.stack([c * per_token for c in factors]))[0]


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    plan: PlanLike = None,
) -> TopK:
    """The k likeliest tokens of each row and their full-vocabulary log-probabilities.

    Args:
        hidden, weight and the head options: as in :func:`linear_logprob`.
        k: how many, 1 <= k <= V.

    Returns:
        TopK(ids int64 [..., k], logprobs [..., k]): value descending, id ascending among equals;
        no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.

    Example:
        >>> import torch, pad_kernels as pk
        >>> pk.linear_topk(torch.zeros(1, 8), torch.zeros(4, 8), 2).ids
        tensor([[0, 1]])
    """
    head = Head(hidden, weight, bias, softcap, logit_scale, temperature, vocab_size)
    call = Call(head, plan=plan)
    k = check_integer("k", k, at_least=1)
    if k > call.vocab:
        fail_value("k", f"at most the vocabulary size {call.vocab}", k)
    call.refuse_early()
    with torch.no_grad():
        recipe = call.recipe([LogSumExp()], topk=k)
        ids, logprobs = topk(*call.tensors(), recipe.dumps())
    shape = (*hidden.shape[:-1], k)
    return TopK(ids.reshape(shape), logprobs.reshape(shape))


def option_logprobs(
    hidden: Tensor,
    weight: Tensor,
    option_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    plan: PlanLike = None,
) -> Tensor:
    """Full-vocabulary log-probabilities of a few candidate tokens, such as option letters.

    Args:
        hidden, weight and the head options: as in :func:`linear_logprob`.
        option_ids: int64 or int32 [C], the same candidates for every row, or [..., C] for each its
            own.

    Returns:
        Tensor [..., C], float32 (float64 for float64 input), differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.

    Example:
        >>> import torch, pad_kernels as pk
        >>> pk.option_logprobs(torch.zeros(1, 8), torch.zeros(10, 8), torch.tensor([3, 5]))
        tensor([[-2.3026, -2.3026]])
    """
    head = Head(hidden, weight, bias, softcap, logit_scale, temperature, vocab_size)
    call = Call(head, plan=plan)
    check_tensor("option_ids", option_ids, dtypes=IDS, device=hidden.device)
    leading = tuple(hidden.shape[:-1])
    if option_ids.dim() != 1 and tuple(option_ids.shape[:-1]) != leading:
        expected = f"shape [C] or [{', '.join(map(str, leading))}, C]"
        fail_value("option_ids", expected, f"shape {tuple(option_ids.shape)}")
    if option_ids.dim() == 0 or option_ids.shape[-1] == 0:
        fail_value("option_ids", "at least one candidate", f"shape {tuple(option_ids.shape)}")
    count = option_ids.shape[-1]
    ids = option_ids.to(torch.int64).expand(*leading, count).reshape(-1, count)
    call.inputs["option_ids"] = ids
    values, _ = call.tokens([LogProb("option_ids")])
    return values.t().reshape(*leading, count)
