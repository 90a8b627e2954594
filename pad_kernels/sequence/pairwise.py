"""Pairwise preference losses over sequence log-probs: the DPO family and SimPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pad_kernels._checks import (
    FLOATS,
    check_choice,
    check_constant,
    check_number,
    check_reduction,
    check_tensor,
    fail_type,
    fail_value,
)
from pad_kernels._dtypes import accumulate_dtype


class PairwiseOutput(NamedTuple):
    """A preference loss and the implicit rewards it compares, which carry no gradient."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True)
class _Pairs:
    """Log-ratios to the reference, [pairs], and the options of the loss."""

    chosen: Tensor  # log π(y_w) − log π_ref(y_w)
    rejected: Tensor
    policy_gap: Tensor  # log π(y_w) − log π(y_l)
    reference_gap: Tensor | float  # the same of the reference
    beta: float
    smoothing: float
    tau: float
    gamma: float
    shift: float

    @property
    def margin(self) -> Tensor:
        """β times the difference of the log-ratios: DPO's logit."""
        return self.beta * (self.chosen - self.rejected)


def logistic_loss(margin: Tensor, smoothing: float) -> Tensor:
    """Logistic loss when a share ``smoothing`` of the labels is taken to be flipped."""
    loss = -F.logsigmoid(margin) * (1.0 - smoothing)
    return loss - F.logsigmoid(-margin) * smoothing if smoothing else loss


def _dpo(p: _Pairs) -> Tensor:
    return logistic_loss(p.margin, p.smoothing)


def _hinge(p: _Pairs) -> Tensor:
    return torch.relu(1.0 - p.margin)


def _ipo(p: _Pairs) -> Tensor:
    return (p.chosen - p.rejected - 0.5 / p.beta).square()


def _robust(p: _Pairs) -> Tensor:
    right, flipped = F.logsigmoid(p.margin), F.logsigmoid(-p.margin)
    return (p.smoothing * flipped - (1.0 - p.smoothing) * right) / (1.0 - 2.0 * p.smoothing)


def _exo_pair(p: _Pairs) -> Tensor:
    # Reverse KL between (σ(margin), σ(−margin)) and the smoothed labels (1 − ε, ε): infinite at 0.
    epsilon = p.smoothing or 1e-3
    log_win, log_lose = F.logsigmoid(p.margin), F.logsigmoid(-p.margin)
    win = log_win.exp() * (log_win - math.log1p(-epsilon))
    return win + log_lose.exp() * (log_lose - math.log(epsilon))


def _nca_pair(p: _Pairs) -> Tensor:
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def _bco_pair(p: _Pairs) -> Tensor:
    chosen, rejected = p.beta * p.chosen - p.shift, p.beta * p.rejected - p.shift
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def _sppo_hard(p: _Pairs) -> Tensor:
    return (p.chosen - 0.5 / p.beta).square() + (p.rejected + 0.5 / p.beta).square()


def _sorted(values: Tensor) -> Tensor:
    return values.flatten().sort().values.view(values.shape)


def _aot(p: _Pairs) -> Tensor:
    # Paired: the batch's policy gaps against the reference's, quantile by quantile.
    assert isinstance(p.reference_gap, Tensor)
    return logistic_loss(p.beta * (_sorted(p.policy_gap) - _sorted(p.reference_gap)), p.smoothing)


def _aot_unpaired(p: _Pairs) -> Tensor:
    return logistic_loss(p.beta * (_sorted(p.chosen) - _sorted(p.rejected)), p.smoothing)


def _apo_zero(p: _Pairs) -> Tensor:
    return torch.sigmoid(-p.beta * p.chosen) + torch.sigmoid(p.beta * p.rejected)


def _apo_down(p: _Pairs) -> Tensor:
    return torch.sigmoid(p.beta * p.chosen) + torch.sigmoid(-p.margin)


def _discopop(p: _Pairs) -> Tensor:
    # exp(−m)·σ(m/τ) in one exponential: the factors alone overflow and vanish at once.
    margin = p.margin
    exponential = (F.logsigmoid(margin / p.tau) - margin).exp()
    return exponential - F.logsigmoid(margin) * torch.sigmoid(-margin / p.tau)


def _simpo(p: _Pairs) -> Tensor:
    return logistic_loss(p.margin - p.gamma, p.smoothing)


@dataclass(frozen=True)
class _Kind:
    loss: Callable[[_Pairs], Tensor]
    options: tuple[str, ...] = ()
    reference: bool = True


_KINDS = {
    "dpo": _Kind(_dpo, ("label_smoothing",)),
    "hinge": _Kind(_hinge),
    "ipo": _Kind(_ipo),
    "robust": _Kind(_robust, ("label_smoothing",)),
    "exo_pair": _Kind(_exo_pair, ("label_smoothing",)),
    "nca_pair": _Kind(_nca_pair),
    "bco_pair": _Kind(_bco_pair, ("reward_shift",)),
    "sppo_hard": _Kind(_sppo_hard),
    "aot": _Kind(_aot, ("label_smoothing",)),
    "aot_unpaired": _Kind(_aot_unpaired, ("label_smoothing",)),
    "apo_zero": _Kind(_apo_zero),
    "apo_down": _Kind(_apo_down),
    "discopop": _Kind(_discopop, ("discopop_tau",)),
    "simpo": _Kind(_simpo, ("label_smoothing", "gamma"), reference=False),
}
_ALIASES = {"sigmoid": "dpo", "sigmoid_norm": "dpo", "aot_pair": "aot"}
KINDS = (*_KINDS, *_ALIASES)


def reduced(values: Tensor, reduction: str) -> Tensor:
    """Mean (0 over nothing), sum, or the values themselves."""
    if reduction == "none":
        return values
    total = values.sum()
    return total / max(1, values.numel()) if reduction == "mean" else total


def check_logprobs(**tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Check that sequence log-probs agree in shape and device; return them in one dtype.

    The first one is the student's; those whose name starts with "ref" may not require grad.
    """
    optional = ("ref_chosen", "ref_rejected")
    given: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value is not None:
            given[name] = value
        elif name not in optional:
            fail_type(name, "a torch.Tensor", value)
    first = check_tensor(next(iter(given)), next(iter(given.values())), dtypes=FLOATS)
    for name, value in given.items():
        check_tensor(name, value, dtypes=FLOATS, shape=first.shape, device=first.device)
        if name.startswith("ref"):
            check_constant(name, value)
    wide = any(value.dtype == torch.float64 for value in given.values())
    dtype = torch.float64 if wide else accumulate_dtype(first.dtype)
    return tuple(value.to(dtype) for value in given.values())


def _option(kind: str, name: str, value: float | None, default: float, **bounds: float) -> float:
    """An option's value; one that the kind has no use for raises."""
    if value is None:
        return default
    number = check_number(name, value, **bounds)
    if name not in _KINDS[kind].options:
        users = ", ".join(k for k, v in _KINDS.items() if name in v.options)
        fail_value(name, f"None for kind={kind!r} (it belongs to {users})", value)
    return number


def _check_reference(kind: str, ref_chosen: Tensor | None, ref_rejected: Tensor | None) -> None:
    for name, value in (("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected)):
        if value is None and _KINDS[kind].reference:
            fail_type(name, f"a torch.Tensor for kind={kind!r}", value)
        if value is not None and not _KINDS[kind].reference:
            fail_value(name, f"None: {kind} has no reference model", "a tensor")


def pairwise_preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    kind: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float | None = None,
    discopop_tau: float | None = None,
    gamma: float | None = None,
    reward_shift: float | None = None,
    reduction: str = "mean",
) -> PairwiseOutput:
    """Losses that prefer one response over another: DPO, its variants, and SimPO.

    With c = log π(y_w|x) − log π_ref(y_w|x) for the chosen response, r the same for the rejected
    one, m = β(c − r) and ε = ``label_smoothing``; kinds and defaults are TRL's.

    ============ ============================================================== ================
    kind         loss of a pair                                                 source (arXiv)
    ============ ============================================================== ================
    dpo, sigmoid −(1−ε) log σ(m) − ε log σ(−m)                                   2305.18290, cDPO
    hinge        max(0, 1 − m)                                                  2305.10425
    ipo          (c − r − 1/(2β))²                                              2310.12036
    robust       (−(1−ε) log σ(m) + ε log σ(−m)) / (1 − 2ε)                      2403.00409
    exo_pair     KL of (σ(m), σ(−m)) from (1−ε, ε); ε = 1e-3 by default          2402.00856
    nca_pair     −log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr)                        2402.05369
    bco_pair     −log σ(βc − δ) − log σ(δ − βr), δ = ``reward_shift``            2404.04656
    sppo_hard    (c − 1/(2β))² + (r + 1/(2β))²                                  2405.00675
    aot          dpo on sorted policy gaps minus sorted reference gaps          2406.05882
    aot_unpaired dpo on sorted c minus sorted r                                 2406.05882
    apo_zero     σ(−βc) + σ(βr)                                                 2408.06266
    apo_down     σ(βc) + σ(−m)                                                  2408.06266
    discopop     −log σ(m)·σ(−m/τ) + exp(−m)·σ(m/τ), τ = ``discopop_tau``        2406.08414
    simpo        dpo with m = β(log π(y_w) − log π(y_l)) − γ; no reference      2405.14734
    ============ ============================================================== ================

    ``aot_pair`` is older TRL's name of ``aot``; what older TRL called ``aot`` is ``aot_unpaired``.

    All take log-probs summed over a response's tokens
    (``sequence_reward(..., normalize="none")``), except ``ipo``, ``simpo`` and ``sigmoid_norm``
    (the formula of dpo), which take means (``normalize="length"``). The function cannot tell:
    it computes with what it gets.

    Args:
        chosen: [pairs] (any shape) floating point, nats: the student's log-prob of the preferred
            response.
        rejected: like ``chosen``: of the other response.
        ref_chosen: like ``chosen``, of the reference model; may not require grad. Needed by all
            kinds but simpo, which refuses it.
        ref_rejected: the same for the other response.
        kind: see the table.
        beta: positive inverse temperature. SimPO's paper uses 2 to 2.5.
        label_smoothing: ε in [0, 0.5), default 0 (exo_pair: 1e-3, since 0 is infinite).
        discopop_tau: positive, default 0.05.
        gamma: SimPO's target margin, at least 0, default 0.5 as in TRL. TRL divides it by beta
            inside the bracket that beta multiplies: the same margin.
        reward_shift: δ of bco_pair, default 0 as in TRL today; the paper and older TRL keep a
            running mean of the rewards, which is the caller's to keep.
        reduction: "mean", "sum" or "none" over pairs. The aot kinds couple the batch: with "none"
            their losses are in sorted order.

    Returns:
        ``PairwiseOutput(loss, chosen_rewards, rejected_rewards)``, float32 (float64 where an input
        is float64); the rewards βc and βr (simpo: β log π) have the shape of ``chosen`` and no
        gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype, or a reference that is missing.
        ValueError: shapes or devices that differ, numbers out of range, an option of another kind.

    Example:
        >>> import torch
        >>> zero = torch.zeros(2)
        >>> out = pairwise_preference_loss(torch.tensor([1.0, 3.0]), zero, zero, zero, beta=1.0)
        >>> round(out.loss.item(), 4)
        0.1809
    """
    check_choice("kind", kind, KINDS)
    kind = _ALIASES.get(kind, kind)
    check_reduction(reduction)
    scale = check_number("beta", beta, above=0.0)
    _check_reference(kind, ref_chosen, ref_rejected)
    smoothing = _option(kind, "label_smoothing", label_smoothing, 0.0, at_least=0.0, below=0.5)
    tau = _option(kind, "discopop_tau", discopop_tau, 0.05, above=0.0)
    margin = _option(kind, "gamma", gamma, 0.5, at_least=0.0)
    shift = _option(kind, "reward_shift", reward_shift, 0.0)
    tensors = check_logprobs(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    up, down = tensors[:2]
    policy_gap = up - down
    reference_gap: Tensor | float = 0.0
    if len(tensors) == 4:
        reference_gap = tensors[2] - tensors[3]
        up, down = up - tensors[2], down - tensors[3]
    pairs = _Pairs(up, down, policy_gap, reference_gap, scale, smoothing, tau, margin, shift)
    loss = reduced(_KINDS[kind].loss(pairs), reduction)
    return PairwiseOutput(loss, scale * up.detach(), scale * down.detach())
