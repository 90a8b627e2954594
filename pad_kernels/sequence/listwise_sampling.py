"""Unbiased sampled estimates of Jensen–Shannon divergences over rankings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Elements of one temporary; the samples are drawn and used up in blocks.
_BLOCK = 1 << 18


def _draw(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` rankings per group from the Plackett–Luce distribution of x, [groups, count, n].

    Sorting x plus Gumbel noise in descending order draws from it exactly.
    """
    groups, n = x.shape
    noise = torch.empty((groups, count, n), dtype=x.dtype, device=x.device)
    noise.exponential_(generator=generator)
    return (x[:, None] - noise.log_()).argsort(-1, descending=True)


def _along(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards in ranked order and the log-sum-exp of what is left at each place."""
    ranked = x[:, None].expand_as(order).gather(-1, order)
    return ranked, ranked.flip(-1).logcumsumexp(-1).flip(-1)


def _terms(log_p: Tensor, log_q: Tensor, released: bool) -> tuple[Tensor, Tensor]:
    """Value and gradient weight of a ranking drawn from the mixture M of both distributions.

    They are what the exact sum adds for the ranking, divided by M; for the Jensen–Shannon
    divergence the values lie between 0 and log 2 whatever the rewards are.
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    above_p, above_q = log_p - log_m, log_q - log_m  # at most log 2
    if released:
        gap = -0.5 * (above_p + above_q)
        return gap, 0.5 * (above_p.exp() * gap - 1.0)
    weight = 0.5 * above_p.exp() * above_p
    return weight + 0.5 * above_q.exp() * above_q, weight


def sample(
    kind: str, student: Tensor, teacher: Tensor, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate from half the rankings drawn from the student, half from the teacher.

    Args:
        kind: jsd or jsd_released.
        student: rewards [groups, n], float64.
        teacher: the same.
        samples: rankings per group, at least 4; an odd one goes to the student.
        generator: of the tensors' device.

    Returns:
        Estimate [groups], its standard error [groups], the gradient's estimate [groups, n].
    """
    groups, n = student.shape
    estimate, variance = student.new_zeros(groups), student.new_zeros(groups)
    grad = torch.zeros_like(student)
    step = max(1, _BLOCK // max(1, groups * n))
    for source, count in ((student, samples - samples // 2), (teacher, samples // 2)):
        values = []
        for start in range(0, count, step):
            order = _draw(source, min(step, count - start), generator)
            ranked, left = _along(student, order)
            log_q = torch.sub(*_along(teacher, order)).sum(-1)
            value, weight = _terms((ranked - left).sum(-1), log_q, kind == "jsd_released")
            values.append(value)
            # d log P / d s of the response at place j: 1 - its share of every set up to there.
            slope = 1.0 - (ranked + (-left).logcumsumexp(-1)).exp()
            slope = torch.empty_like(slope).scatter_(-1, order, slope)
            grad += (weight[..., None] * slope).sum(1) * (0.5 / count)
        drawn = torch.cat(values, -1)
        estimate += 0.5 * drawn.mean(-1)
        variance += 0.25 * drawn.var(-1) / count
    return estimate, variance.sqrt(), grad
