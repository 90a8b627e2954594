"""The Triton backend: every functional of the library on an NVIDIA GPU."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from pad_kernels.backends.base import get_backend
from pad_kernels.backends.registry import interpreting, triton_error
from pad_kernels.backends.triton.launch import Block, Device, Launch, transform
from pad_kernels.engine.gradients import FILTER_TILE
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.recipe import Recipe
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.divergence import Outcomes
from pad_kernels.functionals.statistics import (
    Argmax,
    Moment,
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    Tail,
    Total,
)
from pad_kernels.heads import HeadOptions

_KNOWN = (Normalizer, Moment, Total, Argmax, Tail, Outcomes)
#: How many of a kind one pass takes.
_ROOM: dict[type[Statistic], int] = {Tail: 1, Outcomes: 1}
#: Streams of one pass: the student and three teachers.
_STREAMS = 4
_HALF = (torch.bfloat16, torch.float16)


class TritonBackend:
    """Row passes on a GPU; under ``TRITON_INTERPRET=1`` also on CPU tensors, for tests."""

    def refuses(self, recipe: Recipe, device: torch.device) -> str | None:
        if reason := triton_error():
            return reason
        if device.type != "cuda" and not (interpreting() and device.type == "cpu"):
            return f"tensors are on {device.type}"
        if recipe.gemm not in (torch.float32, *_HALF):
            return f"no row pass for {recipe.gemm}: the kernels compute in float32"
        if len(recipe.heads) > _STREAMS:
            return f"a row pass has room for {_STREAMS} streams"
        for functional in recipe.functionals:
            for statistic in functional.statistics:
                if not isinstance(statistic, (*_KNOWN, Picked)):
                    name = type(functional).__name__
                    return f"{name} needs {type(statistic).__name__}, which has no kernel yet"
        for kind, room in _ROOM.items():
            if sum(isinstance(s, kind) for s in recipe.statistics) > room:
                return f"a row pass has room for {room} of {kind.__name__}"
        return None

    def transform(self, head: HeadOptions, raw: Tensor) -> Tensor:
        logits = raw.contiguous().clone()
        _run(logits, transform(head, logits))
        return logits

    def measure(
        self,
        problem: Problem,
        stats: RowStats,
        wanted: list[Statistic],
        logits: dict[int, Tensor],
        offset: int,
    ) -> None:
        if len(ours := [s for s in wanted if isinstance(s, _KNOWN)]) < len(wanted):
            others = [s for s in wanted if s not in ours]
            get_backend("torch_blocked").measure(problem, stats, others, logits, offset)
        block = Block(problem, stats, logits, offset, Device.of(logits[0].device))
        if not block.rows:
            return
        for statistic in ours:
            if isinstance(statistic, Outcomes):
                launch, partial = block.outcomes(statistic)
                _run(logits[0], launch)
                stats[statistic] += partial.sum(1, dtype=torch.float64)
        first: list[Statistic] = [s for s in ours if not isinstance(s, Outcomes)]
        if first:
            _run(logits[0], *block.statistics(first))

    def gradient(
        self,
        problem: Problem,
        out: Tensor,
        logits: dict[int, Tensor],
        offset: int,
        stats: RowStats,
        gradient: LogitGradient,
        bound: float,
    ) -> Tensor | None:
        peaks = None
        if bound > 0:
            peaks = out.new_zeros(-(-out.shape[1] // FILTER_TILE), dtype=torch.int32)
        block = Block(problem, stats, logits, offset, Device.of(out.device))
        if block.rows:
            _run(out, block.gradient(gradient, out, peaks))
        return None if peaks is None else peaks.view(torch.float32)


def _run(like: Tensor, *launches: Launch) -> None:
    """Run launches on the device of a tensor, which need not be the current one."""
    on_device = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with on_device:
        for launch in launches:
            launch.run()
