"""Row passes in plain torch, on any device, in tiles that bound the temporaries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pad_kernels.backends.base import GivenTokens, RawBlock
from pad_kernels.backends.traits import TORCH_TILE
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.recipe import Recipe
from pad_kernels.engine.workspace import Workspace
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import (
    Block,
    Normalizer,
    RowStats,
    Statistic,
    Tail,
    finite_or_zero,
    measure,
    merge,
)
from pad_kernels.heads import HeadOptions

#: Bytes of gathered weight rows at a time.
_GATHERED = 8 << 20


def _tiles(rows: int, cols: int) -> Iterator[tuple[int, int, int, int]]:
    """Row and column ranges of tiles of at most TORCH_TILE elements, columns in filter tiles."""
    width = max(TORCH_TILE // max(rows, 1) // FILTER_TILE, 1) * FILTER_TILE
    height = max(TORCH_TILE // min(width, max(cols, 1)), 1)
    for top in range(0, rows, height):
        for left in range(0, cols, width):
            yield top, min(top + height, rows), left, min(left + width, cols)


class TorchBackend:
    """Every functional, any device."""

    def refuses(self, recipe: Recipe, device: torch.device) -> str | None:
        return None

    def transform(self, head: HeadOptions, raw: Tensor) -> Tensor:
        return head.transform(raw)

    @staticmethod
    def _raw(problem: Problem, stream: int, tile: Tensor, offset: int) -> Tensor:
        """A tile's products in the accumulation dtype, bias added."""
        raw = tile.to(problem.accumulate)
        bias = problem.streams[stream].bias
        return raw if bias is None else raw + bias[offset : offset + tile.shape[1]]

    def _logits(self, problem: Problem, tiles: dict[int, Tensor], offset: int) -> dict[int, Tensor]:
        return {
            j: problem.streams[j].head.transform(self._raw(problem, j, tile, offset))
            for j, tile in tiles.items()
        }

    def measure(self, block: RawBlock, wanted: list[Statistic]) -> None:
        for top, bottom, left, right in _tiles(*block.shape):
            rows = block.stats.rows(top, bottom)
            tiles = {j: z[top:bottom, left:right] for j, z in block.logits.items()}
            shift = block.offset + left
            a = self._logits(block.problem, tiles, shift)
            fresh = measure(wanted, Block(a, shift, rows.inputs), rows)
            running = RowStats({s: rows[s] for s in wanted}, rows.inputs)
            for statistic, value in merge(running, fresh).items():
                rows[statistic].copy_(value)

    def gradient(
        self, block: RawBlock, gradient: LogitGradient, out: Tensor, bound: Tensor | None
    ) -> Tensor | None:
        assert not gradient.centred, "a settled gradient is wanted"
        problem, cols = block.problem, out.shape[1]
        peaks = None
        if bound is not None:
            peaks = out.new_zeros(-(-cols // FILTER_TILE), dtype=torch.float32)
        for top, bottom, left, right in _tiles(*out.shape):
            rows, part = block.stats.rows(top, bottom), gradient.rows(top, bottom)
            tiles = {j: z[top:bottom, left:right] for j, z in block.logits.items()}
            shift = block.offset + left
            a = self._logits(problem, tiles, shift)
            dense = _dense(Block(a, shift, rows.inputs), rows, part)
            for ids, values in part.sparse:
                local = ids - shift
                inside = (local >= 0) & (local < right - left)
                added = (values * inside).to(dense.dtype)
                dense.scatter_add_(1, torch.where(inside, local, 0), added)
            dense *= problem.streams[0].head.chain(self._raw(problem, 0, tiles[0], shift))
            if peaks is not None:
                first = left // FILTER_TILE
                for k in range(first, -(-right // FILTER_TILE)):
                    tile_max = dense[:, k * FILTER_TILE - left :][:, :FILTER_TILE].abs().max()
                    peaks[k] = torch.maximum(peaks[k], tile_max.float())
            out[top:bottom, left:right].copy_(dense)
        return peaks

    def gathers(self, hidden: Tensor) -> bool:
        return True

    def gather_logits(self, given: GivenTokens, out: Tensor) -> None:
        for rows in _row_blocks(given, out.dtype):
            gathered = given.weight[given.ids[rows]].to(out.dtype)
            hidden = given.hidden[rows].to(out.dtype)
            out[rows] = torch.bmm(gathered, hidden.unsqueeze(2)).squeeze(2)

    def gather_gradients(
        self,
        given: GivenTokens,
        grad: Tensor,
        hidden: Tensor,
        weight: Tensor,
        workspace: Workspace,
    ) -> None:
        dtype, total, met = grad.dtype, weight, None
        if weight.dtype != dtype and weight.numel():
            # A sum in half precision would lose what is small: the tokens that are met add up
            # in float32, beside the gradient.
            met = given.ids[given.counted].unique()
            total = workspace.empty(met.shape[0], weight.shape[1], dtype=dtype).zero_()
        for rows in _row_blocks(given, dtype):
            g, ids = grad[rows], given.ids[rows]
            if hidden.numel():
                found = torch.bmm(g.unsqueeze(1), given.weight[ids].to(dtype)).squeeze(1)
                hidden[rows] = found.to(hidden.dtype)
            if weight.numel():
                outer = g.unsqueeze(2) * given.hidden[rows].to(dtype).unsqueeze(1)
                places = ids.reshape(-1)
                if met is not None:
                    places = torch.searchsorted(met, places)
                total.index_add_(0, places, outer.flatten(0, 1))
        if met is not None:
            weight.index_copy_(0, met, total.to(weight.dtype))


def _row_blocks(given: GivenTokens, dtype: torch.dtype) -> Iterator[Tensor]:
    """Indices of counted rows whose rows of the weight are gathered together."""
    live = given.counted.nonzero().squeeze(1)
    row = given.ids.shape[1] * given.hidden.shape[1] * dtype.itemsize
    yield from live.split(max(_GATHERED // max(row, 1), 1)) if live.numel() else ()


def _dense(block: Block, stats: RowStats, gradient: LogitGradient) -> Tensor:
    """The dense part of the gradient with respect to the transformed logits."""
    a = block.logits
    dtype = a[0].dtype

    def column(x: Tensor) -> Tensor:
        return x.to(dtype).unsqueeze(-1)

    def probability(j: int) -> Tensor:
        maximum, total = stats[Normalizer(j)]
        return torch.exp(a[j] - column(finite_or_zero(maximum))) / column(total)

    dense = torch.zeros_like(a[0])
    if gradient.student is not None or gradient.moments:
        s = probability(0)
        factor = torch.zeros_like(s)
        for j, q in gradient.moments.items():
            factor += column(q) * (a[j] - column(finite_or_zero(stats.maximum(j))))
        if gradient.student is not None:  # last: a mean of the sum so far, which it may cancel
            factor += column(gradient.student)
        dense += torch.where(s == 0, 0.0, s * factor)
    for j, p in gradient.probabilities.items():
        dense += column(p) * probability(j)
    for name, x in gradient.outside.items():
        maximum, total = stats[Tail(name)]
        share = torch.exp(a[0] - column(finite_or_zero(maximum)))
        share = share.masked_fill(block.listed(stats.inputs[name]), 0.0)
        dense += share * column(torch.where(total == 0, 0.0, x / total))
    for functional, grad in gradient.curved:
        dense += functional.curved(block, grad, stats)
    if gradient.constant is not None:
        dense += column(gradient.constant)
    return dense
