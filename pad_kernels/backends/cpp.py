"""Row passes in C++, on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from pad_kernels.backends.native import NativeBackend
from pad_kernels.backends.registry import native, native_error
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.recipe import Recipe
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import RowStats


class CppBackend(NativeBackend):
    """The row passes of ``csrc/cpu/``."""

    devices: ClassVar = ("cpu",)
    dtypes: ClassVar = {
        torch.float32: "float32",
        torch.float64: "float64",
        torch.bfloat16: "bfloat16",
    }
    place = "threads"

    def module(self) -> Any:
        return native()

    def running(self, device: torch.device) -> AbstractContextManager[int]:
        return nullcontext(torch.get_num_threads())

    def refuses(self, recipe: Recipe, device: torch.device) -> str | None:
        return native_error() or super().refuses(recipe, device)

    def close(
        self,
        problem: Problem,
        out: Tensor,
        logits: dict[int, Tensor],
        stats: RowStats,
        gradient: LogitGradient,
        bound: float,
    ) -> Tensor | None:
        return self._gradient(problem, out, logits, 0, stats, gradient, bound, close=True)
