"""Launches of the products over live tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from triton import cdiv

from pad_kernels.backends.triton import autotune
from pad_kernels.backends.triton.launch import Device, Launch, reach
from pad_kernels.backends.triton.live_kernels import list_live_kernel, live_product_kernel
from pad_kernels.backends.triton.tilings import (
    LIVE,
    LIVE_TRIALS,
    LiveTiling,
    generation,
)
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.workspace import Workspace

#: Tiles that a program looks at together when it lists the live ones.
_LISTED = 256


@dataclass
class LiveLaunches:
    """A block of dL/dz and which of its tiles to read.

    Args:
        dz: [rows, cols].
        peaks: [row tiles, column tiles] float32, the largest magnitude of each.
        bound: [1] float32.
        tile: rows and columns of a tile.
    """

    dz: Tensor
    peaks: Tensor
    bound: Tensor
    tile: int = FILTER_TILE
    _lists: dict[bool, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def lists(self) -> list[Launch]:
        """Launches that list the live tiles by rows and by columns, before any product."""
        found = []
        for transposed in (False, True):
            peaks = self.peaks.t() if transposed else self.peaks
            lines, length = peaks.shape
            empty = [
                torch.empty(shape, dtype=torch.int32, device=peaks.device)
                for shape in ((lines, length), (lines,))
            ]
            self._lists[transposed] = empty[0], empty[1]
            arguments = {
                "peaks": peaks,
                "bound": self.bound,
                "lists": empty[0],
                "counts": empty[1],
                "length": length,
                "strides": peaks.stride(),
            }
            found.append(Launch(list_live_kernel, (lines,), arguments, {"BLOCK": _LISTED}))
        return found

    def product(
        self,
        total: Tensor,
        other: Tensor,
        index: Tensor | None,
        *,
        transposed: bool,
        add: bool,
        scale: Tensor | None = None,
        tiling: LiveTiling | None = None,
    ) -> Launch:
        """The launch of dz @ other, or of dz.T @ other.

        Args:
            total: where it goes, [rows, H], or [entries of the vocabulary, H] if transposed.
            other: the weight, or the hidden states [rows, H] if transposed.
            index: int64 [cols], which row of the weight, or of its gradient, a column is.
            add: to what is there.
            scale: one number, a power of two that the product is multiplied by.
            tiling: None: the device's.
        """
        lists, counts = self._lists[transposed]
        rows, cols = self.dz.shape
        width = other.shape[1]
        if tiling is None:
            build = functools.partial(
                self.product, total, other, index, transposed=transposed, add=add, scale=scale
            )
            dtypes = "-".join(str(x.dtype).removeprefix("torch.") for x in (other, total))
            kind = "".join(str(int(x)) for x in (transposed, add, index is not None))
            key = f"live product/{kind}/{dtypes}/{autotune.shape_class(rows, cols, width)}"
            tiling = self._measured(key, build)
        arguments = {
            "dz": (self.dz, self.dz.stride(0), reach(cols, self.dz) or cols),
            "other": (other, other.stride(0)),
            "total": (total, total.stride(0)),
            "index": index,
            "lists": lists,
            "counts": counts,
            "scale": None if scale is None else scale.float().reshape(1),
            "length": lists.shape[1],
            "rows": rows,
            "cols": cols,
            "width": width,
        }
        constants = {
            "ADD": add,
            "TRANSPOSED": transposed,
            "TILE": self.tile,
            "BLOCK_H": tiling.features,
            "BLOCK_K": tiling.depth,
        }
        grid = (lists.shape[0] * cdiv(width, tiling.features),)
        return Launch(live_product_kernel, grid, arguments, constants, tiling.warps, tiling.stages)

    def _measured(self, key: str, build: Callable[..., Launch]) -> LiveTiling:
        """The device's tiling, or the fastest if that was asked for."""
        known = generation(Device.of(self.dz.device).capability)

        def attempt(tiling: LiveTiling, scratch: Workspace) -> list[Launch]:
            return [self._elsewhere(build(tiling=tiling), scratch)]

        return autotune.choose(key, self.dz, LIVE[known], LIVE_TRIALS[known], attempt)

    def _elsewhere(self, launch: Launch, scratch: Workspace) -> Launch:
        """A product of as many lines of tiles as scratch has room for, written there.

        A sum has to get it once; and all tiles are read, as how many are alive is this step's.
        """
        given = launch.arguments
        (total, _), index, lists = given["total"], given["index"], given["lists"]
        line = self.tile * given["width"] * total.element_size()
        lines = max(min(lists.shape[0], autotune.SCRATCH // line), 1)
        room = scratch.empty(lines * self.tile, given["width"], dtype=total.dtype)
        every = scratch.empty(lines, lists.shape[1], dtype=lists.dtype)
        every.copy_(torch.arange(lists.shape[1], device=every.device))
        counts = scratch.empty(lines, dtype=lists.dtype).fill_(lists.shape[1])
        if index is not None and launch.constants["TRANSPOSED"]:
            places = torch.arange(index.shape[0], device=index.device) % room.shape[0]
            index = scratch.empty(index.shape[0], dtype=index.dtype).copy_(places)
        return launch.instead(
            (launch.grid[0] // lists.shape[0] * lines,),
            total=(room, room.stride(0)),
            index=index,
            lists=every,
            counts=counts,
        )
