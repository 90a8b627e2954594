"""The op behind ``linear_topk``: the largest logits of each row, never all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pad_kernels._checks import fail_value
from pad_kernels._dtypes import accumulate_dtype, without_autocast
from pad_kernels.backends.choice import resolve_backend
from pad_kernels.engine import schedule
from pad_kernels.engine.arguments import Arguments
from pad_kernels.engine.problem import build_problem, op_plan, planned_device
from pad_kernels.engine.recipe import Recipe
from pad_kernels.engine.run import Run
from pad_kernels.functionals.statistics import Largest


@torch.library.custom_op("pad_kernels::topk", mutates_args=())
def topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_inputs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    recipe: str,
) -> tuple[Tensor, Tensor]:
    """Token ids [N, k] int64 and log-probabilities [N, k] of the k likeliest tokens."""
    todo = resolve_backend(Recipe.loads(recipe), planned_device(hidden))
    if todo.request.backend == "reference":
        fail_value("plan", "a blocked backend", "'reference', which has no top-k")
    with without_autocast(hidden.device):
        given = Arguments(hidden, weight, bias, row_inputs, teachers)
        plan = op_plan(todo, given, reduced=False)
        problem = build_problem(todo, given)
        with problem.workspace(plan) as workspace:
            stats = schedule.measure_rows(Run.start(problem, plan, workspace), None)
        values, ids = stats[Largest(todo.topk)].view(2, todo.topk, -1)
        # Not less the statistics' maximum: a kernel's tanh may differ from the selection's, and a
        # log-probability must not be above 0.
        logprobs = (values - values[0]) - stats.total().log()
        logprobs = logprobs.t().to(problem.accumulate).contiguous()
        return ids.t().to(torch.int64).contiguous(), logprobs


@topk.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_inputs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    recipe: str,
) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], Recipe.loads(recipe).topk)
    ids = hidden.new_empty(shape, dtype=torch.int64)
    return ids, hidden.new_empty(shape, dtype=accumulate_dtype(hidden.dtype))
