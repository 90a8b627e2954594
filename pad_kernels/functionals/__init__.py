"""Row functionals: one short file each, found by name through the registry."""

from pad_kernels.functionals.base import REGISTRY, Functional, LogitGradient
from pad_kernels.functionals.entropy import Entropy
from pad_kernels.functionals.jsd import JensenShannon
from pad_kernels.functionals.logprob import LogProb
from pad_kernels.functionals.logsumexp import LogitSum, LogSumExp, SquaredLogSumExp
from pad_kernels.functionals.topk_teacher import TopKForwardKL

__all__ = [
    "REGISTRY",
    "Entropy",
    "Functional",
    "JensenShannon",
    "LogProb",
    "LogSumExp",
    "LogitGradient",
    "LogitSum",
    "SquaredLogSumExp",
    "TopKForwardKL",
]
