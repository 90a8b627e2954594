"""Launches of the products over live tiles."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from triton import cdiv

from pad_kernels.backends.triton.launch import Device, Launch, reach
from pad_kernels.backends.triton.live_kernels import list_live_kernel, live_product_kernel
from pad_kernels.backends.triton.tilings import LIVE, LiveTiling, generation
from pad_kernels.engine.filter import FILTER_TILE

#: Tiles that a program looks at together when it lists the live ones.
_LISTED = 256


@dataclass
class LiveTiles:
    """A block of dL/dz and which of its tiles to read.

    Args:
        dz: [rows, cols].
        peaks: [row tiles, column tiles] float32, the largest magnitude of each.
        bound: [1] float32.
        tile: rows and columns of a tile.
        tiling: of the products; None: the device's.
    """

    dz: Tensor
    peaks: Tensor
    bound: Tensor
    tile: int = FILTER_TILE
    tiling: LiveTiling | None = None
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
    ) -> Launch:
        """The launch of dz @ other, or of dz.T @ other.

        Args:
            total: where it goes, [rows, H], or [entries of the vocabulary, H] if transposed.
            other: the weight, or the hidden states [rows, H] if transposed.
            index: int64 [cols], which row of the weight, or of its gradient, a column is.
            add: to what is there.
            scale: one number, a power of two that the product is multiplied by.
        """
        lists, counts = self._lists[transposed]
        rows, cols = self.dz.shape
        width = other.shape[1]
        tiling = self.tiling or LIVE[generation(Device.of(self.dz.device).capability)]
        arguments = {
            "dz": (self.dz, self.dz.stride(0), reach(cols, self.dz)),
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
