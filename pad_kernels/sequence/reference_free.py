"""ORPO and CPO: preference losses without a reference model, held in place by the chosen NLL."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
from pad_kernels.sequence.pairwise import (
    PairwiseOutput,
    check_logprobs,
    logistic_loss,
    reduced,
)

CPO_KINDS = ("sigmoid", "hinge", "ipo", "simpo")


class ORPOOutput(NamedTuple):
    """The loss and, without gradient, β log π of both responses and the log odds ratio."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    log_odds: Tensor


def _check_nll(chosen_nll: Tensor, chosen: Tensor) -> Tensor:
    check_tensor("chosen_nll", chosen_nll, dtypes=FLOATS, device=chosen.device)
    if chosen_nll.dim() and chosen_nll.shape != chosen.shape:
        fail_value(
            "chosen_nll",
            f"shape () or that of chosen, {tuple(chosen.shape)}",
            f"shape {tuple(chosen_nll.shape)}",
        )
    return chosen_nll.to(chosen.dtype)


def _log_complement(logprob: Tensor) -> Tensor:
    """log(1 − exp(logprob)); a probability of 1 is taken to fall short of it by the least there is.

    expm1 keeps what 1 − exp would cancel near 0; far below 0 the result is 0 to rounding.
    """
    return (-torch.expm1(logprob.clamp(max=-torch.finfo(logprob.dtype).tiny))).log()


def orpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_nll: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> ORPOOutput:
    """Odds-ratio preference optimisation: NLL − β log σ(log odds(y_w) − log odds(y_l)).

    odds(y) = p/(1 − p) with log p the *mean* log-prob of the response's tokens (ORPO,
    arXiv 2403.07691, eqs. 4, 6 and 7; β is the paper's λ, the default TRL's).

    Args:
        chosen: [pairs] floating point, at most 0: the preferred response's mean log-prob, nats per
            token (``sequence_reward(..., normalize="length")``).
        rejected: like ``chosen``: the other response's.
        chosen_nll: the supervised loss, 0-d (for instance a mean over all chosen tokens of the
            batch, TRL's choice) or like ``chosen``; by default ``-chosen``, the mean per response.
        beta: positive weight of the odds-ratio term.
        reduction: "mean", "sum" or "none" over pairs; a 0-d ``chosen_nll`` is added to each pair.

    Returns:
        ``ORPOOutput(loss, chosen_rewards, rejected_rewards, log_odds)``, float32 (float64 where an
        input is); all but the loss like ``chosen`` and without gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that differ, beta out of range, log-probs above 0 (looked at
            on a CPU outside compiled code).

    Example:
        >>> import torch
        >>> half = torch.tensor([0.5]).log()
        >>> round(orpo_loss(half, half, torch.tensor(0.0), beta=1.0).loss.item(), 4)
        0.6931
    """
    check_reduction(reduction)
    scale = check_number("beta", beta, above=0.0)
    up, down = check_logprobs(chosen=chosen, rejected=rejected)
    if up.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, value in (("chosen", up), ("rejected", down)):
            if bool((value > 0).any()):
                worst = value.detach().max().item()
                fail_value(name, "mean log-probs, at most 0", worst)
    nll = -up if chosen_nll is None else _check_nll(chosen_nll, up)
    log_odds = (up - down) - (_log_complement(up) - _log_complement(down))
    losses = nll - scale * F.logsigmoid(log_odds)
    return ORPOOutput(
        reduced(losses, reduction), scale * up.detach(), scale * down.detach(), log_odds.detach()
    )


def cpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_nll: Tensor | None = None,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
    gamma: float | None = None,
    reduction: str = "mean",
) -> PairwiseOutput:
    """Contrastive preference optimisation: DPO with a uniform reference, plus the chosen NLL.

    With m = β(log π(y_w|x) − log π(y_l|x)) the preference term is −(1−ε) log σ(m) − ε log σ(−m)
    (kind "sigmoid"; CPO, arXiv 2401.08417), max(0, 1 − m) ("hinge"), (m/β − 1/(2β))² ("ipo") or
    the logistic loss of m − γ ("simpo", with the NLL known as CPO-SimPO); to it
    ``nll_weight`` × NLL is added (TRL's ``cpo_alpha``). As in TRL and the paper "sigmoid" and
    "hinge" take log-probs *summed* over a response's tokens, "ipo" and "simpo" take *means*.

    Args:
        chosen: [pairs] floating point, nats: the preferred response's log-prob.
        rejected: like ``chosen``: the other response's.
        chosen_nll: mean negative log-prob of the chosen tokens, 0-d (over the batch, TRL's choice)
            or like ``chosen``. Needed unless ``nll_weight`` is 0: a sum does not tell the mean.
        kind: "sigmoid", "hinge", "ipo" or "simpo".
        beta: positive inverse temperature.
        nll_weight: at least 0.
        label_smoothing: ε in [0, 0.5); for sigmoid and simpo.
        gamma: simpo's target margin, at least 0, default 0.5 as in TRL.
        reduction: "mean", "sum" or "none" over pairs; a 0-d ``chosen_nll`` is added to each pair.

    Returns:
        ``PairwiseOutput(loss, chosen_rewards, rejected_rewards)``, float32 (float64 where an input
        is); the rewards β log π have no gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype, or an NLL that is missing.
        ValueError: shapes or devices that differ, numbers out of range, an option of another kind.

    Example:
        >>> import torch
        >>> same = torch.tensor([-4.0])
        >>> round(cpo_loss(same, same, torch.tensor(1.0)).loss.item(), 4)
        1.6931
    """
    check_choice("kind", kind, CPO_KINDS)
    check_reduction(reduction)
    scale = check_number("beta", beta, above=0.0)
    weight = check_number("nll_weight", nll_weight, at_least=0.0)
    smoothing = check_number("label_smoothing", label_smoothing, at_least=0.0, below=0.5)
    if smoothing and kind not in ("sigmoid", "simpo"):
        fail_value("label_smoothing", f"0 for kind={kind!r}", label_smoothing)
    if gamma is not None and kind != "simpo":
        fail_value("gamma", f"None for kind={kind!r} (it belongs to simpo)", gamma)
    target = 0.5 if gamma is None else check_number("gamma", gamma, at_least=0.0)
    up, down = check_logprobs(chosen=chosen, rejected=rejected)
    margin = scale * (up - down)
    if kind == "simpo":
        margin = margin - target
    if kind == "hinge":
        losses = torch.relu(1.0 - margin)
    elif kind == "ipo":
        losses = (up - down - 0.5 / scale).square()
    else:
        losses = logistic_loss(margin, smoothing)
    if chosen_nll is not None:
        losses = losses + weight * _check_nll(chosen_nll, up)
    elif weight:
        fail_type("chosen_nll", "a torch.Tensor unless nll_weight is 0", chosen_nll)
    return PairwiseOutput(reduced(losses, reduction), scale * up.detach(), scale * down.detach())
