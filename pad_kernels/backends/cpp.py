"""Row passes in C++, on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from pad_kernels.backends.base import RawBlock
from pad_kernels.backends.native import NativeBackend, Passes
from pad_kernels.backends.registry import native, native_error
from pad_kernels.engine.recipe import Recipe
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.divergence import Outcomes
from pad_kernels.functionals.statistics import Moment, Normalizer, Statistic


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

    def walks(self, wanted: list[Statistic]) -> bool:
        return all(isinstance(s, (Normalizer, Moment, Outcomes)) for s in wanted)

    def walk(
        self,
        block: RawBlock,
        wanted: list[Statistic],
        gradient: LogitGradient,
        out: Tensor,
        bound: Tensor | None,
    ) -> Tensor | None:
        peaks = self.peaks(out, bound)
        Passes(self, block).walk(wanted, gradient, out, peaks)
        return peaks
