"""The ``torch.library`` ops of the row engine: the only autograd there is.

``token_outputs`` gives per-token values, each differentiable (late and kept schedules).
``weighted_sum`` gives one number, with its gradients made on the way (early) or later.
Both take their static half as a recipe string. Backwards are ops of their own without a derivative,
so second derivatives raise; so are those of scaling.py, which finish early gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pad_kernels._dtypes import accumulate_dtype, without_autocast
from pad_kernels.backends import reference
from pad_kernels.backends.choice import resolve_backend
from pad_kernels.engine import schedule
from pad_kernels.engine.arguments import Arguments
from pad_kernels.engine.gradients import GradientBuffers
from pad_kernels.engine.order import ordered
from pad_kernels.engine.plan import Plan
from pad_kernels.engine.problem import Problem, build_problem, op_plan, planned_device
from pad_kernels.engine.recipe import Recipe
from pad_kernels.engine.run import Run
from pad_kernels.engine.scaling import scale_gradients_, scaled_gradients
from pad_kernels.engine.workspace import account, empty
from pad_kernels.functionals.statistics import Argmax

OptionalTensor = Tensor | None


def _read(recipe: str, hidden: Tensor) -> Recipe:
    return resolve_backend(Recipe.loads(recipe), planned_device(hidden))


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _kept_shape(recipe: Recipe, plan: Plan) -> tuple[int, int, int]:
    """Kept logits [streams, rows, V]; empty unless the plan keeps some for a gradient."""
    if plan.kept_rows == 0 or not any(recipe.needs):
        return (0, 0, 0)
    return (len(recipe.heads), plan.kept_rows, recipe.vocab)


def _kept_logits(problem: Problem, plan: Plan) -> Tensor:
    """Room for the logits that the plan keeps."""
    shape, gemm = _kept_shape(problem.recipe, plan), problem.recipe.gemm
    return empty(shape, gemm, problem.device, limit=problem.limit, workspace=True)


def _stats_rows(recipe: Recipe, inputs: Mapping[str, Tensor]) -> int:
    return sum(s.width(inputs) for s in recipe.statistics)


def _forward(problem: Problem, plan: Plan, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values [outputs, N], greedy tokens [N] (or nothing) and packed statistics [numbers, N]."""
    with problem.workspace(plan) as workspace:
        run = Run.start(problem, plan, workspace)
        stats = schedule.measure_rows(run, kept if kept.numel() else None)
        values = schedule.values_of(problem, stats)
    greedy = torch.empty(0, dtype=torch.int64, device=problem.device)
    if problem.recipe.argmax:
        greedy = problem.outputs(stats[Argmax()], missing=-1)[0]
    packed = schedule.pack_stats(problem, stats)
    return problem.outputs(values), greedy, packed


def _backward(
    problem: Problem, plan: Plan, grad: Tensor, packed: Tensor, kept: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from the upstream gradient of the values, [outputs, N]."""
    stats = schedule.unpack_stats(problem, packed)
    upstream = problem.factors(grad.to(problem.accumulate))
    with problem.workspace(plan) as workspace:
        if plan.ordered:
            problem = ordered(problem, workspace)
        run = Run.start(problem, plan, workspace)
        buffers = GradientBuffers(run, early=False)
        held = kept if kept.numel() else None
        schedule.differentiate_vocabulary(run, upstream, stats, held, buffers)
        hidden, weight, bias, _ = buffers.finish()
    return hidden, weight, bias


# --- per-token values -----------------------------------------------------------------------------


@torch.library.custom_op("pad_kernels::token_outputs", mutates_args=())
def token_outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    row_inputs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [outputs, N], greedy tokens, statistics for the backward, kept logits."""
    todo, given = _read(recipe, hidden), Arguments(hidden, weight, bias, row_inputs, teachers)
    with without_autocast(hidden.device):
        if todo.request.backend == "reference":
            values, greedy = reference.forward(todo, given)
            return values, greedy, _nothing(values), _nothing(hidden)
        plan = op_plan(todo, given, reduced=False)
        problem = build_problem(todo, given)
        kept = _kept_logits(problem, plan)
        with account.holding(kept):
            return (*_forward(problem, plan, kept), kept)


@token_outputs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    row_inputs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    todo, given = _read(recipe, hidden), Arguments(hidden, weight, bias, row_inputs, teachers)
    rows, dtype = hidden.shape[0], accumulate_dtype(hidden.dtype)
    values = hidden.new_empty((todo.outputs(given.inputs(todo)), rows), dtype=dtype)
    greedy = hidden.new_empty((rows if todo.argmax else 0,), dtype=torch.int64)
    if todo.request.backend == "reference":
        return values, greedy, _nothing(values), _nothing(hidden)
    plan = op_plan(todo, given, reduced=False)
    stats = hidden.new_empty((_stats_rows(todo, given.inputs(todo)), rows), dtype=torch.float64)
    return values, greedy, stats, hidden.new_empty(_kept_shape(todo, plan), dtype=todo.gemm)


@torch.library.custom_op("pad_kernels::token_outputs_backward", mutates_args=())
def token_outputs_backward(
    grad: Tensor,
    coefficients: OptionalTensor,
    hidden: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    row_inputs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    stats: Tensor,
    kept: Tensor,
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; nothing for those that do not want one.

    ``grad`` is [outputs, N], or one number to be multiplied by ``coefficients`` [outputs, N].
    """
    todo, given = _read(recipe, hidden), Arguments(hidden, weight, bias, row_inputs, teachers)
    with without_autocast(hidden.device):
        if coefficients is not None:
            grad = coefficients * grad
        if todo.request.backend == "reference":
            found: Sequence[Tensor | None] = reference.backward(todo, given, grad)
        else:
            plan = op_plan(todo, given, reduced=coefficients is not None)
            problem = build_problem(todo, given, coefficients)
            with account.holding(kept):
                found = _backward(problem, plan, grad, stats, kept)
    first, second, third = (_nothing(hidden) if g is None else g for g in found)
    return first, second, third


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@token_outputs_backward.register_fake
def _(
    grad: Tensor,
    coefficients: OptionalTensor,
    hidden: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    row_inputs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    stats: Tensor,
    kept: Tensor,
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = zip(Recipe.loads(recipe).needs, (hidden, weight, bias), strict=True)
    first, second, third = (
        _like(x) if need and x is not None else _nothing(hidden) for need, x in needs
    )
    return first, second, third


def _save_token_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, row_inputs, teachers, ctx.recipe = inputs
    _, greedy, stats, kept = output
    ctx.mark_non_differentiable(greedy, stats, kept)
    ctx.set_materialize_grads(False)
    ctx.counts = len(row_inputs), len(teachers)
    ctx.save_for_backward(hidden, weight, bias, stats, kept, *row_inputs, *teachers)


def _token_outputs_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return _for_inputs(ctx, (None, None, None), 1)
    hidden, weight, bias, stats, kept, *rest = ctx.saved_tensors
    row_inputs, teachers = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    found = token_outputs_backward(
        grad, None, hidden, weight, bias, row_inputs, teachers, stats, kept, ctx.recipe
    )
    return _for_inputs(ctx, found, 1)


def _for_inputs(ctx: Any, found: Sequence[Tensor | None], others: int) -> tuple[Any, ...]:
    """Gradients in the order of the op's inputs: three tensors, two lists, ``others`` more."""
    needs = Recipe.loads(ctx.recipe).needs
    wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
    lists = [[None] * count for count in ctx.counts]
    return (*wanted, *lists, *[None] * others)


token_outputs.register_autograd(_token_outputs_autograd, setup_context=_save_token_outputs)


# --- one number -----------------------------------------------------------------------------------

#: Loss, its summands, three gradients, their factors, statistics, kept logits. An early plan fills
#: the gradients, the others what the backward needs.
_Sum = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _sum_outputs(
    parts: Tensor,
    gradients: Sequence[Tensor | None] = (None, None, None),
    factors: Tensor | None = None,
    stats: Tensor | None = None,
    kept: Tensor | None = None,
) -> _Sum:
    first, second, third, fourth, fifth, sixth = (
        _nothing(parts) if x is None else x for x in (*gradients, factors, stats, kept)
    )
    return parts.sum(), parts, first, second, third, fourth, fifth, sixth


@torch.library.custom_op("pad_kernels::weighted_sum", mutates_args=())
def weighted_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    row_inputs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    coefficients: Tensor,
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sum(coefficients * values), ``coefficients`` [outputs, N], and what its backward needs."""
    todo, given = _read(recipe, hidden), Arguments(hidden, weight, bias, row_inputs, teachers)
    with without_autocast(hidden.device):
        if todo.request.backend == "reference":
            values, _ = reference.forward(todo, given)
            return _sum_outputs(_weighted(values, coefficients))
        plan = op_plan(todo, given, reduced=True)
        problem = build_problem(todo, given, coefficients)
        if plan.schedule == "early" and any(todo.needs):
            return _early(problem, plan, coefficients)
        kept = _kept_logits(problem, plan)
        with account.holding(kept):
            values, _, stats = _forward(problem, plan, kept)
        return _sum_outputs(_weighted(values, coefficients), stats=stats, kept=kept)


def _weighted(values: Tensor, coefficients: Tensor) -> Tensor:
    """Summands [outputs]; a row without weight counts 0 whatever its value."""
    return torch.where(coefficients == 0, 0.0, values * coefficients).sum(1)


def _early(problem: Problem, plan: Plan, coefficients: Tensor) -> _Sum:
    weights = problem.factors(coefficients)
    stats = None
    if plan.gradient_over == "vocabulary":
        with problem.workspace(plan) as workspace:
            run = Run.start(problem, plan, workspace)
            stats = schedule.measure_rows(run, None)
    with problem.workspace(plan) as workspace:
        if plan.ordered:
            problem = ordered(problem, workspace)
        run = Run.start(problem, plan, workspace)
        buffers = GradientBuffers(run, early=True)
        if stats is None:
            values = schedule.differentiate_tokens(run, weights, buffers)
        else:
            values = schedule.values_of(problem, stats)
            schedule.differentiate_vocabulary(run, weights, stats, None, buffers)
        *gradients, factors = buffers.finish()
    summands = _weighted(problem.outputs(values), coefficients)
    return _sum_outputs(summands, gradients, factors)


@weighted_sum.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: OptionalTensor,
    row_inputs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    coefficients: Tensor,
    recipe: str,
) -> _Sum:
    todo, given = _read(recipe, hidden), Arguments(hidden, weight, bias, row_inputs, teachers)
    dtype = accumulate_dtype(hidden.dtype)
    parts = hidden.new_empty((coefficients.shape[0],), dtype=dtype)
    if todo.request.backend == "reference":
        return _sum_outputs(parts)
    plan = op_plan(todo, given, reduced=True)
    if plan.schedule == "early" and any(todo.needs):
        needs = zip(todo.needs, (hidden, weight, bias), strict=True)
        gradients = [_like(x) if need and x is not None else None for need, x in needs]
        factors = hidden.new_empty(3, dtype=torch.float64)
        return _sum_outputs(parts, gradients, factors)
    size = (_stats_rows(todo, given.inputs(todo)), hidden.shape[0])
    stats = hidden.new_empty(size, dtype=torch.float64)
    kept = hidden.new_empty(_kept_shape(todo, plan), dtype=todo.gemm)
    return _sum_outputs(parts, stats=stats, kept=kept)


def _save_weighted_sum(ctx: Any, inputs: tuple[Any, ...], output: _Sum) -> None:
    hidden, weight, bias, row_inputs, teachers, coefficients, ctx.recipe = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.counts = len(row_inputs), len(teachers)
    ctx.early = output[5].numel() > 0
    ctx.spent = False
    if ctx.early:
        # What was computed early needs no inputs; they serve to refuse second derivatives.
        ctx.save_for_backward(hidden, *output[2:6])
    else:
        saved = (hidden, weight, bias, coefficients, *output[6:], *row_inputs, *teachers)
        ctx.save_for_backward(*saved)


def _weighted_sum_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return _for_inputs(ctx, (None, None, None), 2)
    if ctx.spent:
        raise RuntimeError(
            "plan: expected one backward through an early plan, got a second one; early gradients "
            "are scaled in place. Pass plan='late', which allows it"
        )
    if not ctx.early:
        hidden, weight, bias, coefficients, stats, kept, *rest = ctx.saved_tensors
        row_inputs, teachers = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
        found = token_outputs_backward(
            grad, coefficients, hidden, weight, bias, row_inputs, teachers, stats, kept, ctx.recipe
        )
        return _for_inputs(ctx, found, 2)
    hidden, *gradients, factors = ctx.saved_tensors
    traced = any(type(gradient) is not Tensor for gradient in gradients)
    if traced or torch.is_grad_enabled():
        copies = scaled_gradients(*gradients, factors, grad, hidden)
        return _for_inputs(ctx, copies, 2)
    ctx.spent = True
    scale_gradients_(*gradients, factors, grad)
    return _for_inputs(ctx, gradients, 2)


weighted_sum.register_autograd(_weighted_sum_autograd, setup_context=_save_weighted_sum)
