"""Kernel launches: which kernel, which grid, which arguments.

Making a launch and running it are two steps, so that what is compiled ahead of time for a device
that is not there is what would run on it.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pad_kernels.backends.triton import math
from pad_kernels.engine.plan import padded
from pad_kernels.heads import HeadOptions


@dataclass(frozen=True)
class Launch:
    """One kernel over a grid.

    ``registers`` is the most that a thread may have. Left to itself ptxas aims at a round number of
    programs a multiprocessor, and may give up a few registers to the stack for it.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 1
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """How it is compiled: without fused multiply-adds, see math.py."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
            "enable_fp_fusion": False,
        }

    def instead(self, grid: tuple[int, ...] | None = None, **arguments: Any) -> Launch:
        """The same kernel with some other arguments, or over another grid."""
        return replace(self, grid=grid or self.grid, arguments={**self.arguments, **arguments})

    def run(self) -> None:
        """Put it on the current stream of the current device."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def run(like: Tensor, *launches: Launch) -> None:
    """Run launches on the device of a tensor, which need not be the current one."""
    on_device = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with on_device:
        for launch in launches:
            launch.run()


@dataclass(frozen=True)
class Device:
    """What block sizes depend on: compute capability (90 for sm_90) and multiprocessors."""

    capability: int
    multiprocessors: int

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Device:
        """Of a GPU; the interpreter counts as a very small one."""
        if device.type != "cuda":
            return Device(90, 1)
        found = torch.cuda.get_device_properties(device)
        return Device(10 * found.major + found.minor, found.multi_processor_count)


def reach(cols: int, *matrices: Tensor) -> int | None:
    """Columns of matrices [rows, cols] that kernels touch, whole accesses; None: no more than cols.

    Padding (``engine.plan.row_pitch``) belongs to nobody. Where it is read it counts nothing;
    gradients write zeros there, so that it adds nothing to products over it either.
    """
    pitch = padded(cols)
    return pitch if pitch > cols and all(x.stride(0) == pitch for x in matrices) else None


def head_kind(head: HeadOptions) -> int:
    """How much there is to do."""
    if head.softcap is not None:
        return math.CAPPED
    plain = head.logit_scale == 1.0 and head.temperature == 1.0
    return math.IDENTITY if plain else math.LINEAR
