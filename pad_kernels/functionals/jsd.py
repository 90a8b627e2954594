"""Generalised Jensen-Shannon divergence between student and teacher: two sweeps, two streams."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pad_kernels.functionals.base import Functional, LogitGradient, register
from pad_kernels.functionals.statistics import Block, Normalizer, RowStats, Statistic


def _log_mixture(logprobs: list[Tensor], alpha: float) -> Tensor:
    return torch.logaddexp(logprobs[0] + math.log1p(-alpha), logprobs[1] + math.log(alpha))


def _weighted(logprob: Tensor, log_ratio: Tensor) -> Tensor:
    weight = logprob.exp()
    return torch.where(weight == 0, 0.0, weight * log_ratio)


@dataclass(frozen=True)
class JsdTerms(Statistic):
    """KL(student||mixture) and KL(teacher||mixture), summed once both normalisers are known."""

    sweep = 2
    alpha: float

    def width(self, inputs: object) -> int:
        return 2

    def measure(self, block: Block, first: RowStats | None) -> Tensor:
        assert first is not None
        logprobs = [first.logprobs(j, a) for j, a in enumerate(block.logits)]
        mixture = _log_mixture(logprobs, self.alpha)
        return torch.stack([_weighted(p, p - mixture).sum(-1) for p in logprobs])


@register
@dataclass(frozen=True)
class JensenShannon(Functional):
    """alpha KL(t||m) + (1 - alpha) KL(s||m), m = alpha t + (1 - alpha) s (arXiv 2306.13649).

    Gradient: (1 - alpha) s (log(s/m) - KL(s||m)).
    """

    streams: ClassVar[int] = 2
    alpha: float = 0.5

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return Normalizer(0), Normalizer(1), JsdTerms(self.alpha)

    def value(self, stats: RowStats) -> Tensor:
        student, teacher = stats[JsdTerms(self.alpha)]
        return (self.alpha * teacher + (1 - self.alpha) * student).unsqueeze(0)

    def gradient(self, grad: Tensor, stats: RowStats) -> LogitGradient:
        return LogitGradient(curved=[(self, grad)])

    def curved(self, block: Block, grad: Tensor, stats: RowStats) -> Tensor:
        logprobs = [stats.logprobs(j, block.logits[j]) for j in range(2)]
        divergence = stats[JsdTerms(self.alpha)][0].unsqueeze(-1)
        log_ratio = logprobs[0] - _log_mixture(logprobs, self.alpha) - divergence
        return _weighted(logprobs[0], log_ratio) * (1 - self.alpha) * grad[0].unsqueeze(-1)
