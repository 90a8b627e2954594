"""The gradient filter: which tiles of the logit gradient products leave out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pad_kernels.engine.plan import Plan
from pad_kernels.engine.rows import capturing

#: Columns of the logit gradient that the filter keeps or skips together, and rows, for a backend
#: that multiplies single tiles. 128 x 128 is what a product of tensor cores wants; how many tiles
#: are left at other sizes: docs/performance.md.
FILTER_TILE = 128


def filter_bound(plan: Plan, weights: Tensor) -> Tensor | None:
    """What a tile's largest magnitude has to reach, 0-d; None without a filter.

    Args:
        weights: [outputs, live rows], of the values.
    """
    return plan.filter * weights.abs().max() if plan.filter and weights.numel() else None


def column_runs(
    peaks: Sequence[Tensor | None], bound: Tensor | None, cols: int
) -> list[tuple[int, int]]:
    """Column ranges to multiply: all of them, or those whose tiles reach the filter's bound.

    While a CUDA graph is captured nobody can look: then it is all of them.

    Args:
        peaks: of some rows each, the largest magnitudes of column tiles, or of row tiles by those.
    """
    found = [p.view(-1, p.shape[-1]).amax(0) for p in peaks if p is not None]
    if bound is None or not found or capturing(bound):
        return [(0, cols)]
    runs: list[tuple[int, int]] = []
    for tile, keep in enumerate((~(torch.stack(found).amax(0) < bound)).tolist()):
        if keep:
            start, stop = tile * FILTER_TILE, min((tile + 1) * FILTER_TILE, cols)
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
    return runs
