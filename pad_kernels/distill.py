"""Several losses from one set of student logits: cross-entropy, divergence, advantage, entropy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pad_kernels._checks import check_number, check_tensor, fail_type
from pad_kernels._tokens import Tokens, check_weights
from pad_kernels.engine.call import Call, weighted
from pad_kernels.engine.mixture import Mixture, check_kind, check_pair
from pad_kernels.engine.plan import PlanLike
from pad_kernels.functionals import Entropy, LogProb
from pad_kernels.heads import Head
from pad_kernels.offline import TopKAdvantage, TopKTeacher

Weight = float | Tensor


class DistillOutput(NamedTuple):
    """What :func:`linear_distill` returns; None for what it was not given the means to compute.

    With a reduction: ``loss`` = cross_entropy + divergence - advantage - entropy, differentiable,
    and its four parts, weights and normaliser included, 0-d and without gradient. With "none": no
    loss; the four per-token values [...], unweighted, each differentiable.
    """

    loss: Tensor | None
    cross_entropy: Tensor | None
    divergence: Tensor | None
    advantage: Tensor | None
    entropy: Tensor | None


#: The parts and the sign of their weight in the loss.
_SIGNS = {"cross_entropy": 1.0, "divergence": 1.0, "advantage": -1.0, "entropy": -1.0}


def linear_distill(
    student: Head,
    labels: Tensor,
    *,
    teacher: Head | TopKTeacher | None = None,
    aligned: Head | TopKAdvantage | None = None,
    reference: Head | None = None,
    kind: str = "forward_kl",
    alpha: float | None = None,
    beta: float = 1.0,
    ce_weight: Weight = 0.0,
    divergence_weight: Weight = 0.0,
    advantage_weight: Weight = 0.0,
    entropy_weight: Weight = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    plan: PlanLike = None,
) -> DistillOutput:
    """Cross-entropy, divergence, expected advantage and entropy of a student in one pass.

    loss = (sum ce_w CE + sum div_w D - sum adv_w A - sum ent_w H) / normalizer, over tokens, with
    CE the negative log-prob of the label, D as in :func:`linear_divergence`, A as in
    :func:`linear_expected_advantage` and H the student's entropy. DCKD and ADPA (arXiv 2502.17927)
    are one call each.

    A teacher is only computed for tokens whose weight of it is not 0, and a token without any
    weight costs nothing.

    Args:
        student: a Head; the gradient goes to its hidden, weight and bias.
        labels: int64 or int32 [...], already aligned: label i is what row i predicts.
        teacher: for the divergence, a Head or TopKTeacher.
        aligned, reference: for the advantage, two Heads, or a TopKAdvantage and None.
        kind, alpha: of the divergence.
        beta: of the advantage, > 0.
        ce_weight, divergence_weight, advantage_weight, entropy_weight: numbers, or floating-point
            tensors [...] that may require grad. They are of the sums; "none" does not apply them.
        reduction: "mean", "sum" or "none" (unweighted per-token values of all that is given).
        normalizer: what "mean" divides by, a number or 0-d tensor (a trainer's
            num_items_in_batch); default: the count of labels that are not ignored, never the sum of
            weights. A mean over no tokens is 0.
        ignore_index: label of tokens that are left out of everything and cost nothing.
        shift, cu_seqlens: as in :func:`linear_logprob`.
        plan: as in :func:`linear_cross_entropy`.

    Returns:
        DistillOutput(loss, cross_entropy, divergence, advantage, entropy).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range; a
            weight for which the teacher is missing.

    Example:
        >>> import torch, pad_kernels as pk
        >>> student = pk.Head(torch.zeros(3, 4), torch.zeros(10, 4))
        >>> teacher = pk.Head(torch.zeros(3, 6), torch.zeros(10, 6))
        >>> out = pk.linear_distill(
        ...     student, torch.tensor([1, 2, -100]), teacher=teacher,
        ...     ce_weight=1.0, divergence_weight=0.5)
        >>> out.loss
        tensor(2.3026)
    """
    check_tensor("labels", labels)
    tokens = Tokens.checked(student, labels, reduction, normalizer, ignore_index, shift, cu_seqlens)
    weights: dict[str, Weight] = {
        "cross_entropy": _weight("ce_weight", ce_weight, tokens),
        "divergence": _weight("divergence_weight", divergence_weight, tokens),
        "advantage": _weight("advantage_weight", advantage_weight, tokens),
        "entropy": _weight("entropy_weight", entropy_weight, tokens),
    }
    _check_given(weights, teacher, aligned, reference)
    parts = _Parts(Mixture(student), tokens, weights)
    mix, scale = check_kind(kind, alpha), check_number("beta", beta, above=0.0)
    if parts.wanted("cross_entropy"):
        parts.places["cross_entropy"] = parts.mixture.add(LogProb()), -1.0
    apart = teacher if isinstance(teacher, TopKTeacher) and teacher.tail != "bucket" else None
    if teacher is not None and apart is None and parts.wanted("divergence"):
        parts.places["divergence"] = parts.mixture.add_divergence(teacher, kind, mix), 1.0
    if aligned is not None and parts.wanted("advantage"):
        parts.places["advantage"] = parts.mixture.add_advantage(aligned, reference), scale
    if parts.wanted("entropy"):
        parts.places["entropy"] = parts.mixture.add(Entropy()), 1.0
    call = parts.mixture.call(tokens.labels, ignore_index, plan)
    if reduction == "none":
        call.refuse_early()
    if apart is not None and parts.wanted("divergence"):
        parts.add_renormalized(apart, kind, mix, call.backend)  # once all arguments are checked
    if reduction == "none":
        return DistillOutput(None, *parts.per_token(call))
    loss, found = parts.summed(call)
    absent = {"divergence": teacher is None, "advantage": aligned is None}
    return DistillOutput(loss, *[None if absent.get(n) else x for n, x in found.items()])


def _check_given(
    weights: dict[str, Weight],
    teacher: Head | TopKTeacher | None,
    aligned: Head | TopKAdvantage | None,
    reference: Head | None,
) -> None:
    """Raise if a weight lacks its teacher, or a teacher is not one."""
    if teacher is None and not _is_zero(weights["divergence"]):
        fail_type("teacher", "the Head or TopKTeacher that divergence_weight needs", None)
    if aligned is None and not _is_zero(weights["advantage"]):
        fail_type("aligned", "the Head or TopKAdvantage that advantage_weight needs", None)
    if aligned is None and reference is not None:
        fail_type("aligned", "a teacher to go with reference", None)
    if aligned is not None:
        check_pair(aligned, reference)
    if teacher is not None and not isinstance(teacher, Head | TopKTeacher):
        fail_type("teacher", "a pad_kernels.Head or TopKTeacher", teacher)


@dataclass
class _Parts:
    """The parts of one call: most are outputs of the engine, a few are computed beside it."""

    mixture: Mixture
    tokens: Tokens
    weights: dict[str, Weight]
    #: part -> place among the engine's outputs, and its factor
    places: dict[str, tuple[int, float]] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)

    def wanted(self, name: str) -> bool:
        """Whether a part is computed if it can be.

        Without any weight the cross-entropy is, of no token: a loss of 0 has gradients, too.
        """
        if self.tokens.reduction == "none" or not _is_zero(self.weights[name]):
            return True
        return name == "cross_entropy" and all(map(_is_zero, self.weights.values()))

    def add_renormalized(self, teacher: TopKTeacher, kind: str, alpha: float, backend: str) -> None:
        """The divergence where k tokens are all there is, beside the pass over the vocabulary."""
        counted = self.tokens.counted
        if self.tokens.reduction != "none":
            counted = self.tokens.used(self.weights["divergence"])
        found = self.mixture.renormalized(teacher, kind, alpha, counted, backend)
        self.beside["divergence"] = found

    def per_token(self, call: Call) -> list[Tensor | None]:
        """The unweighted values [...] of every part, None for those that are not there."""
        values, _ = call.tokens(self.mixture.functionals)
        found = {name: values[i] * factor for name, (i, factor) in self.places.items()}
        shaped = {n: x.reshape(self.tokens.leading) for n, x in (found | self.beside).items()}
        return [shaped.get(name) for name in _SIGNS]

    def summed(self, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts."""

        def weight(name: str) -> Tensor:
            return self.tokens.weights(self.weights[name], call.accumulate)

        def zero() -> Tensor:
            return call.student.hidden.new_zeros((), dtype=call.accumulate)

        loss, parts = zero(), {name: zero() for name in _SIGNS}
        if self.places:
            rows = [weight(n) * (_SIGNS[n] * factor) for n, (_, factor) in self.places.items()]
            loss, summands = call.total(self.mixture.functionals, torch.stack(rows))
            for name, (i, _) in self.places.items():
                parts[name] = summands[i] * _SIGNS[name]
        for name, values in self.beside.items():
            total = weighted(values, weight(name)).sum()
            loss, parts[name] = loss + total, total.detach()
        return loss, parts


def _weight(name: str, given: Weight, tokens: Tokens) -> Weight:
    """A weight as it came: a tensor of the tokens' shape, or a finite number."""
    if not isinstance(given, Tensor):
        return check_number(name, given)
    check_weights(name, given, tokens.leading, tokens.counted.device)
    return given


def _is_zero(weight: Weight) -> bool:
    """Whether a weight is the number 0; what a tensor holds is not looked at."""
    return not isinstance(weight, Tensor) and weight == 0
