"""KTO: a preference loss for responses that are each good or bad, without pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pad_kernels._checks import (
    FLOATS,
    check_choice,
    check_number,
    check_reduction,
    check_tensor,
    fail_type,
    fail_value,
)
from pad_kernels.sequence.pairwise import check_logprobs, reduced

KINDS = ("kto", "apo_zero_unpaired")


class KTOOutput(NamedTuple):
    """The loss and, without gradient, the rewards β(log π − log π_ref) and the reference point."""

    loss: Tensor
    rewards: Tensor
    kl: Tensor


def _reference_point(
    kl: Tensor | float | None,
    kl_logprob: Tensor | None,
    kl_ref_logprob: Tensor | None,
    like: Tensor,
) -> Tensor:
    """KTO's z0, at least 0 and without gradient."""
    if kl is not None:
        if kl_logprob is not None or kl_ref_logprob is not None:
            fail_value("kl", "None where kl_logprob and kl_ref_logprob are given", "both")
        if not isinstance(kl, Tensor):
            return like.new_tensor(check_number("kl", kl, at_least=0.0))
        check_tensor("kl", kl, dtypes=FLOATS, ndim=0, device=like.device)
        return kl.detach().to(like.dtype).clamp(min=0.0)
    for name, value in (("kl_logprob", kl_logprob), ("kl_ref_logprob", kl_ref_logprob)):
        if value is None:
            fail_type(name, "a torch.Tensor for kind='kto' without kl", value)
    assert kl_logprob is not None and kl_ref_logprob is not None
    check_tensor("kl_logprob", kl_logprob, dtypes=FLOATS, device=like.device)
    check_tensor(
        "kl_ref_logprob",
        kl_ref_logprob,
        dtypes=FLOATS,
        shape=kl_logprob.shape,
        device=like.device,
    )
    ratio = kl_logprob.detach().to(like.dtype) - kl_ref_logprob.detach().to(like.dtype)
    return reduced(ratio, "mean").clamp(min=0.0)


def kto_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | float | None = None,
    kl_logprob: Tensor | None = None,
    kl_ref_logprob: Tensor | None = None,
    kind: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> KTOOutput:
    """Kahneman–Tversky optimisation: responses that are desirable or not, one by one.

    With h = log π(y|x) − log π_ref(y|x), log-probs summed over tokens, and the reference point
    z0 = max(0, mean of log π − log π_ref over responses paired with wrong prompts), a desirable
    response's loss is w_d σ(−β(h − z0)), an undesirable one's w_u σ(−β(z0 − h)) (KTO,
    arXiv 2402.01306, eq. 7, as in TRL). ``kind="apo_zero_unpaired"`` has z0 = 0 (APO,
    arXiv 2408.06266).

    Args:
        logprob: [responses] floating point, nats: the student's summed log-prob.
        ref_logprob: like ``logprob``: the reference model's; may not require grad.
        desirable: like ``logprob``, bool.
        kl: z0 itself, a number or a 0-d tensor, for instance averaged over ranks; or else
        kl_logprob: [any] floating point: log-probs of responses under prompts that are not theirs,
        kl_ref_logprob: and the same under the reference. None of them gets a gradient.
        kind: "kto" or "apo_zero_unpaired", which takes no reference point.
        beta: positive inverse temperature.
        desirable_weight: w_d, at least 0.
        undesirable_weight: w_u, at least 0.
        reduction: "mean" over all responses, "sum" or "none".

    Returns:
        ``KTOOutput(loss, rewards, kl)``: rewards βh like ``logprob``, kl 0-d; float32, or float64
        where a log-prob is.

    Raises:
        TypeError: an argument of the wrong type or dtype, or a reference point that is missing.
        ValueError: shapes or devices that differ, numbers out of range.

    Example:
        >>> import torch
        >>> good = torch.tensor([True, False])
        >>> kto_loss(torch.zeros(2), torch.zeros(2), good, kl=0.0).loss
        tensor(0.5000)
    """
    check_choice("kind", kind, KINDS)
    check_reduction(reduction)
    scale = check_number("beta", beta, above=0.0)
    good = check_number("desirable_weight", desirable_weight, at_least=0.0)
    bad = check_number("undesirable_weight", undesirable_weight, at_least=0.0)
    policy, reference = check_logprobs(logprob=logprob, ref_logprob=ref_logprob)
    check_tensor(
        "desirable", desirable, dtypes=(torch.bool,), shape=policy.shape, device=policy.device
    )
    if kind == "kto":
        point = _reference_point(kl, kl_logprob, kl_ref_logprob, policy)
    else:
        for name, value in (
            ("kl", kl),
            ("kl_logprob", kl_logprob),
            ("kl_ref_logprob", kl_ref_logprob),
        ):
            if value is not None:
                fail_value(name, f"None for kind={kind!r}", "a reference point")
        point = policy.new_zeros(())
    ratio = policy - reference
    # A response is pushed up or down: the two cases differ in one sign. Tensors of the result's
    # dtype, since torch.where makes float32 of two numbers.
    up, down = policy.new_full((), -scale), policy.new_full((), scale)
    weights = torch.where(desirable, policy.new_full((), good), policy.new_full((), bad))
    losses = torch.sigmoid(torch.where(desirable, up, down) * (ratio - point)) * weights
    return KTOOutput(reduced(losses, reduction), scale * ratio.detach(), point)
