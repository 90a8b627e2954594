"""What trainers log: ratios of sums over everything since the last log, and rank correlation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Meter:
    """Sums of (sum, count) pairs, on their device until they are read."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, pairs: Mapping[str, Tensor]) -> None:
        """Add a pair [2] for each name."""
        for name, pair in pairs.items():
            pair = pair.detach().double()
            self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def read(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Each name's sum / count over all ranks, and start anew.

        Args:
            gather: from a tensor [1, ...] to those of all ranks, [ranks, ...].
        """
        if not self._totals:
            return {}
        names = sorted(self._totals)
        local = torch.stack([self._totals[name] for name in names])
        sums, counts = gather(local.unsqueeze(0)).sum(0).unbind(1)
        self._totals = {}
        means = (sums / counts.where(counts != 0, 1.0)).tolist()
        return {
            name: mean for name, mean, count in zip(names, means, counts, strict=True) if count != 0
        }


def pair(values: Tensor, where: Tensor | None = None) -> Tensor:
    """Sum and count [2] of some values, or of those where a mask is set."""
    if where is None:
        where = torch.ones_like(values, dtype=torch.bool)
    kept = torch.where(where, values.detach().double(), 0.0)
    return torch.stack([kept.sum(), where.sum().double()])


def kendall_tau(a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    """Kendall's tau-a of each group's two rankings.

    Concordant pairs minus discordant ones over all pairs; ties count as neither.

    Args:
        a, b: scores [groups, n].
        valid: bool [groups, n], at least two in a group.

    Returns:
        [groups], from -1 to 1.
    """
    upper = torch.triu(torch.ones_like(valid[0][:, None] & valid[0][None]), diagonal=1)
    pairs = valid[:, :, None] & valid[:, None, :] & upper
    sign_a = torch.sign(a[:, :, None] - a[:, None, :])
    sign_b = torch.sign(b[:, :, None] - b[:, None, :])
    agreement = torch.where(pairs, sign_a * sign_b, 0.0).sum((1, 2))
    return agreement / pairs.sum((1, 2)).clamp(min=1)


def peak_memory(device: torch.device) -> dict[str, float]:
    """``peak_memory_mib``, the most so far: allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        return {"peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_mib": peak * unit / 2**20}
