"""The op behind the listwise losses: ``pad_kernels::listwise_preference``.

The body prepares rows (subsets of groups, valid responses first, float64), hands them to the C++
kernels or their torch twin, and averages; autograd only scales the gradient that the forward made.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pad_kernels._checks import fail_value
from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.backends.registry import native, native_error
from pad_kernels.engine.workspace import Workspace
from pad_kernels.sequence import gpu, listwise_sampling, listwise_torch

#: Kinds that csrc/listwise.h has; the others are a few vectorised torch operations.
_NATIVE_KINDS = ("kl", "reverse_kl", "jsd", "jsd_released")

#: Where rewards are looked at before work starts; elsewhere bad ones make the group's loss NaN.
_CHECKED_DEVICES = ("cpu",)

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@contextlib.contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Compute with ``cpp`` or ``torch`` and nothing else; for tests and benchmarks."""
    if name not in ("cpp", "torch"):
        raise ValueError(f"name: expected cpp or torch, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _use_native(kind: str, device: torch.device) -> bool:
    forced = _forced.get()
    if forced == "cpp" and native() is None:
        raise RuntimeError(f"the cpp backend is not available: {native_error()}")
    possible = kind in _NATIVE_KINDS and device.type == "cpu" and native() is not None
    return possible and forced != "torch"


def _solve_native(
    kind: str, student: Tensor, teacher: Tensor, counts: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    rows, n = student.shape
    loss, grad = student.new_empty(rows), torch.zeros_like(student)
    module = native()
    assert module is not None
    threads = max(1, min(torch.get_num_threads(), rows))
    with Workspace(student.device) as workspace:
        words = module.listwise_words(kind, n)
        space = workspace.empty(threads * words, dtype=torch.float64)
        module.listwise(
            kind,
            student.data_ptr(),
            teacher.data_ptr(),
            counts.data_ptr(),
            rows,
            n,
            loss.data_ptr(),
            grad.data_ptr() if with_gradient else 0,
            space.data_ptr(),
            threads,
        )
    return loss, grad


def _solve_rows(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    counts: Tensor,
    samples: int,
    seed: Tensor | None,
    *,
    whole: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, standard error and gradient of rows whose first ``counts`` entries are responses.

    ``whole`` says that all entries are, so that nobody has to wait for a device to tell.
    """
    error = student.new_zeros(len(student))
    if not samples and _use_native(kind, student.device):
        loss, grad = _solve_native(kind, student, teacher, counts, with_gradient)
        return loss, error, grad
    loss, grad = torch.zeros_like(error), torch.zeros_like(student)
    generator = None
    if seed is not None:
        generator = torch.Generator(device=student.device).manual_seed(int(seed))
    for count, rows in [(student.shape[1], slice(None))] if whole else _by_count(counts):
        s, t = student[rows, :count], teacher[rows, :count]
        if generator is not None:
            part = listwise_sampling.sample(kind, s, t, samples, generator)
            loss[rows], error[rows], grad[rows, :count] = part
        else:
            loss[rows], grad[rows, :count] = listwise_torch.solve(kind, s, t)
    return loss, error, grad


def _by_count(counts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every number of responses with something to rank, and the rows that have so many."""
    for count in counts.unique().tolist():
        if count >= 2:
            yield count, (counts == count).nonzero()[:, 0]


def check_finite(name: str, rewards: Tensor, valid: Tensor | None) -> Tensor | None:
    """Raise for rewards that are NaN or infinite.

    On a device that this would have to wait for, return which groups have some instead, [groups].
    """
    bad = ~rewards.isfinite()
    if valid is not None:
        bad &= valid
    if rewards.device.type not in _CHECKED_DEVICES:
        return bad.any(1)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        fail_value(name, "finite numbers", f"{rewards[tuple(where)].item()} at {where}")
    return None


def _subsets(x: Tensor, size: int, fill: float | bool) -> Tensor:
    """Consecutive subsets of each group as contiguous rows of their own, the last one padded."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.cat([x, x.new_full((len(x), missing), fill)], 1)
    return x.reshape(-1, size).contiguous()  # arithmetic keeps the layout of a transpose


@torch.library.custom_op("pad_kernels::listwise_preference", mutates_args=())
def listwise_preference(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    seed: Tensor | None,
    kind: str,
    beta: float,
    subset_size: int,
    samples: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [groups], its standard error [groups] and its gradient [groups, n]."""
    if kind in gpu.KINDS and not samples and gpu.usable(student) and _forced.get() is None:
        loss, grad, _ = gpu.listwise(
            kind, student, teacher, valid, beta, subset_size, with_gradient
        )
        return loss, torch.zeros_like(loss), grad
    bad = check_finite("student_rewards", student, valid)
    bad_teacher = check_finite("teacher_rewards", teacher, valid)
    groups, n = student.shape
    present = valid
    if present is None and n % subset_size:
        present = torch.ones_like(student, dtype=torch.bool)
    rows = _subsets(student.double() * beta, subset_size, 0.0)
    targets = _subsets(teacher.double() * beta, subset_size, 0.0)
    order = None
    if present is None:
        counts = torch.full((len(rows),), subset_size, device=student.device)
    else:
        present = _subsets(present, subset_size, False)
        counts = present.sum(1)
        # Valid responses first, in their order, so that ties in a ranking stay by index.
        index = torch.arange(subset_size, device=student.device)
        order = torch.where(present, index, index + subset_size).argsort(1)
        rows, targets = rows.gather(1, order), targets.gather(1, order)
    loss, error, grad = _solve_rows(
        *(kind, rows, targets, counts, samples, seed),
        whole=present is None and groups > 0,
        with_gradient=with_gradient,
    )
    if order is not None:
        grad = torch.zeros_like(grad).scatter_(1, order, grad)
    # A group's loss is the mean over its subsets that have something to rank.
    parts = (groups, -(-n // subset_size))
    per_group = (counts >= 2).view(parts).sum(1).clamp(min=1).to(loss.dtype)
    # No kind is ever negative; rounding can make one so by 1e-16.
    loss = loss.clamp(min=0.0).view(parts).sum(1) / per_group
    error = error.square().view(parts).sum(1).sqrt() / per_group
    grad = grad.view(groups, parts[1] * subset_size)[:, :n] * (beta / per_group[:, None])
    if bad is not None and bad_teacher is not None:
        loss = loss.masked_fill(bad | bad_teacher, math.nan)
        grad = grad.masked_fill((bad | bad_teacher)[:, None], math.nan)
    dtype = accumulate_dtype(student.dtype)
    kept = grad.to(dtype) if with_gradient else grad.new_empty((0, n), dtype=dtype)
    return loss.to(dtype), error.to(dtype), kept.contiguous()


@listwise_preference.register_fake
def _fake(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    seed: Tensor | None,
    kind: str,
    beta: float,
    subset_size: int,
    samples: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(student.dtype)
    groups, n = student.shape
    loss = student.new_empty(groups, dtype=dtype)
    kept = student.new_empty((groups if with_gradient else 0, n), dtype=dtype)
    return loss, torch.empty_like(loss), kept


@torch.library.custom_op("pad_kernels::listwise_scale", mutates_args=())
def listwise_scale(upstream: Tensor, gradient: Tensor, student: Tensor) -> Tensor:
    """The backward's product, an op without a derivative.

    ``student`` is an argument so that the result, where someone asks for a second derivative,
    requires grad and raises, rather than being taken for a constant.
    """
    return (upstream[:, None] * gradient).to(student.dtype)


@listwise_scale.register_fake
def _fake_scale(upstream: Tensor, gradient: Tensor, student: Tensor) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, error, gradient = output
    ctx.mark_non_differentiable(error, gradient)
    ctx.save_for_backward(inputs[0], gradient)


def _backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    student, gradient = ctx.saved_tensors
    return listwise_scale(upstream, gradient, student), *([None] * 8)


listwise_preference.register_autograd(_backward, setup_context=_setup_context)
