"""An order of the vocabulary in which the entries that matter come together.

The filter leaves out tiles, and a tile is as alive as its likeliest entry. What rows have in common
(some tokens are frequent, most are not) is in their mean: the mean logit of every entry costs one
product of a single row, and sorting by it puts the entries that hardly any row believes in side by
side. Values do not change, nor does what an entry of the gradient is; only which of them share a
tile does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pad_kernels.engine.problem import Problem
from pad_kernels.engine.workspace import Workspace


def ordered(problem: Problem, workspace: Workspace) -> Problem:
    """The same problem, its vocabulary by mean logit, the largest first.

    Weights stay where they are: :class:`Stream` gathers the rows that it is asked for.
    """
    order = workspace.empty(problem.recipe.vocab, dtype=torch.int64)
    inverse = torch.empty_like(order)
    order.copy_(_mean_logits(problem).argsort(descending=True, stable=True))
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    streams = [
        replace(s, bias=None if s.bias is None else s.bias.index_select(0, order), order=order)
        for s in problem.streams
    ]
    inputs = {name: _places(x, inverse) for name, x in problem.inputs.items()}
    return replace(problem, streams=streams, inputs=inputs)


def _places(x: Tensor, inverse: Tensor) -> Tensor:
    """Per-row ids as places in the order; while a graph is captured they may be anything."""
    return inverse[x.clamp(0, inverse.shape[0] - 1)] if x.dtype == torch.int64 else x


def _mean_logits(problem: Problem) -> Tensor:
    """The student's mean raw logit of every entry over the live rows, [V]."""
    student = problem.streams[0]
    hidden, weight = student.hidden, student.weight
    share = hidden.new_full((problem.tokens,), 1 / max(problem.rows, 1))
    if problem.live is not None:
        share = torch.zeros_like(share).index_fill_(0, problem.live, 1 / max(problem.rows, 1))
    mean = torch.mv(hidden.t(), share)
    found = torch.mv(weight, mean.to(weight.dtype))
    return found if student.bias is None else found + student.bias
