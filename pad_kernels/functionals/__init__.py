"""Row functionals: one short file each, found by name through the registry."""

from pad_kernels.functionals.advantage import Advantage, TopKAdvantage
from pad_kernels.functionals.base import REGISTRY, Functional, LogitGradient
from pad_kernels.functionals.divergence import Divergence, ForwardKL, ReverseKL
from pad_kernels.functionals.entropy import Entropy
from pad_kernels.functionals.logprob import LogProb
from pad_kernels.functionals.logsumexp import LogitSum, LogSumExp, SquaredLogSumExp
from pad_kernels.functionals.topk_teacher import TopKDivergence

__all__ = [
    "REGISTRY",
    "Advantage",
    "Divergence",
    "Entropy",
    "ForwardKL",
    "Functional",
    "LogProb",
    "LogSumExp",
    "LogitGradient",
    "LogitSum",
    "ReverseKL",
    "SquaredLogSumExp",
    "TopKAdvantage",
    "TopKDivergence",
]
