"""Launches of the fused kernels: whether there are any, their arguments and grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import cdiv

from pad_kernels.backends.base import HiddenRows
from pad_kernels.backends.triton import autotune
from pad_kernels.backends.triton.columns import Columns
from pad_kernels.backends.triton.fused_gradient import fused_gradient_kernel
from pad_kernels.backends.triton.fused_operands import Measured, Operands
from pad_kernels.backends.triton.fused_stats import fused_statistics_kernel, merge_splits_kernel
from pad_kernels.backends.triton.launch import Device, Launch, reach
from pad_kernels.backends.triton.tilings import (
    MERGE_ROWS,
    Tiling,
    choose_splits,
    gradient_tiling,
    statistics_tiling,
    tiling_trials,
)
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.recipe import Recipe
from pad_kernels.engine.workspace import Workspace
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import Picked, RowStats, Statistic


def statistics_launches(
    measured: Measured,
    operands: Operands,
    tiling: Tiling,
    stats: RowStats,
    partial: Tensor,
    *,
    tma: bool,
) -> tuple[Launch, Launch]:
    """The two launches that fill ``stats``; ``partial`` is [splits, slots, rows] float64."""
    rows, vocab = operands.shape
    split_cols = cdiv(cdiv(vocab, tiling.cols), partial.shape[0]) * tiling.cols
    splits = cdiv(vocab, split_cols)
    listed, places, tail = None, None, -1
    if measured.picked:
        ids = torch.cat([stats.inputs[p.ids] for p in measured.picked], 1)
        if measured.tail is not None:
            tail = measured.picked.index(Picked(measured.tail.ids))
        if ids.shape[1] > 1 or measured.tail is not None:
            ids, places = ids.sort(dim=1)
        listed = ids, ids.shape[1]
    measure = Launch(
        fused_statistics_kernel,
        (cdiv(rows, tiling.rows) * splits,),
        {
            **operands.arguments(tiling, tma=tma),
            "listed": listed,
            "places": places,
            "picks": tuple((stats[p], stats[p].stride(0), len(stats[p])) for p in measured.picked),
            "partial": partial,
            "split_cols": split_cols,
        },
        {**measured.constants, **operands.constants(tiling, tma=tma), "TAIL": tail},
        tiling.warps,
        tiling.stages,
    )
    targets = tuple(stats[s][i] if s in stats else None for s, i in measured.slots)
    merge = Launch(
        merge_splits_kernel,
        (cdiv(rows, MERGE_ROWS),),
        {"partial": partial, "targets": targets, "rows": rows, "splits": splits},
        {**measured.constants, "STREAMS": len(measured.normalizers), "BLOCK_M": MERGE_ROWS},
    )
    return measure, merge


def fusable(rows: HiddenRows, wanted: Sequence[Statistic], chunk: int) -> Measured | None:
    """What the fused kernels measure of the recipe; None if they leave it to the row passes.

    The answer is the same in forward and backward: a gradient must see logits that are rounded as
    those of the statistics were, and the row passes' are rounded to half precision. A functional
    whose statistics are all known here has a gradient of the linear form.

    Args:
        chunk: vocabulary entries of a block of logits in the plan; it bounds the workspace.
    """
    measured = Measured.of(list(rows.hidden), wanted)
    if measured is None or not Operands.of(rows.problem, rows.hidden).readable:
        return None
    return measured if _most_splits(measured, rows.problem.recipe, chunk) else None


def _most_splits(measured: Measured, recipe: Recipe, chunk: int) -> int:
    """How many splits' partial statistics take no more than ``chunk`` logits a row and stream."""
    room = len(measured.streams) * chunk * recipe.gemm.itemsize
    return room // (len(measured.slots) * 8)


def plan_statistics(
    rows: HiddenRows, wanted: Sequence[Statistic], room: Tensor, chunk: int
) -> tuple[Launch, Launch]:
    """Launches that fill the rows' statistics over the whole vocabulary.

    Partial statistics lie in ``room``: place for ``chunk`` logits of every row and stream.
    """
    measured = fusable(rows, wanted, chunk)
    assert measured is not None
    stats, operands = rows.stats, Operands.of(rows.problem, rows.hidden)
    count, vocab = operands.shape
    device = Device.of(rows.problem.device)
    slots, most = len(measured.slots), _most_splits(measured, rows.problem.recipe, chunk)

    def splits(tiling: Tiling) -> int:
        tiles = cdiv(count, tiling.rows), cdiv(vocab, tiling.cols)
        return choose_splits(*tiles, device.multiprocessors, tiling.group, most)

    def build(tiling: Tiling, scratch: Workspace | None = None) -> tuple[Launch, Launch]:
        bytes_of = room.view(-1).view(torch.uint8)[: splits(tiling) * slots * count * 8]
        partial = bytes_of.view(torch.float64).view(-1, slots, count)
        copies = device.capability >= 90
        return statistics_launches(measured, operands, tiling, stats, partial, tma=copies)

    extras = measured.extras_with(stats.inputs)
    streams, tail = len(measured.streams), measured.tail is not None
    shipped = statistics_tiling(device.capability, streams, extras, plain=operands.plain, tail=tail)
    trials = tiling_trials(device.capability, shipped)
    key = f"statistics/{extras}{'t' * tail}/{operands.key}"
    return build(autotune.choose(key, room, shipped, trials, build))


def gradient_launch(
    operands: Operands,
    used: Sequence[int],
    tiling: Tiling,
    stats: RowStats,
    terms: LogitGradient,
    out: Tensor,
    offset: int,
    peaks: Tensor | None,
    bound: Tensor | None = None,
    *,
    tile: int = FILTER_TILE,
    tma: bool,
) -> Launch:
    """The launch that writes dL/dz of a block to ``out`` [rows, cols].

    Args:
        operands: of the streams ``used``, their weights and biases cut to the block.
        offset: vocabulary id of the block's first entry.
        peaks: [row tiles, column tiles], receives the filter's largest magnitudes as int32 bits.
        bound: float32 [1]; a tile below it need not be written. None: all are.
        tile: rows and columns of a filter tile; the kernel's own divide it.
    """
    assert not terms.centred, "a settled gradient is wanted"
    whole = (tiling.rows, tiling.cols) == (tile, tile)
    columns = Columns(stats, used)
    linear, (shared, left_out) = columns.linear(terms), columns.outside(terms)
    constants = {
        **operands.constants(tiling, tma=tma),
        **linear,
        "OUTSIDE": shared,
        "FILTER": tile,
        "FIELDS": columns.count,
    }
    sparse, outside = None, None
    if (listed := terms.sorted_sparse()) is not None:
        sparse = listed[0], listed[1].float(), listed[0].shape[1]
    if left_out is not None:
        outside = left_out, left_out.shape[1]
    arguments = {
        **operands.arguments(tiling, tma=tma),
        "out": (out, out.stride(0), reach(operands.shape[1], out) or operands.shape[1]),
        "coefficients": columns.packed(),
        "sparse": sparse,
        "outside": outside,
        "peaks": peaks,
        "bound": bound if whole else None,
        "offset": offset,
    }
    rows, cols = operands.shape
    grid = (cdiv(rows, tiling.rows) * cdiv(cols, tiling.cols),)
    return Launch(fused_gradient_kernel, grid, arguments, constants, tiling.warps, tiling.stages)


def plan_gradient(
    rows: HiddenRows,
    weights: dict[int, Tensor],
    offset: int,
    terms: LogitGradient,
    out: Tensor,
    peaks: Tensor | None,
    bound: Tensor | None,
) -> Launch:
    """The launch for a block of logits, of the streams that the gradient reads."""
    used = sorted({0, *terms.moments, *terms.probabilities})
    operands = Operands.of(rows.problem, {j: rows.hidden[j] for j in used})
    operands = operands.cut(offset, [weights[j] for j in used])
    device = Device.of(rows.problem.device)
    plain, filtered = operands.plain, peaks is not None
    least = bound if filters_tiles(rows.problem.recipe) else None

    def build(tiling: Tiling) -> Launch:
        return gradient_launch(
            *(operands, used, tiling, rows.stats, terms, out, offset, peaks, least),
            tma=device.capability >= 90,
        )

    def attempt(tiling: Tiling, scratch: Workspace) -> list[Launch]:
        """It may write dL/dz again and again, but not merge other sums' magnitudes into peaks."""
        launch = build(tiling)
        if peaks is None:
            return [launch]
        return [launch.instead(peaks=scratch.empty(*peaks.shape, dtype=peaks.dtype))]

    tiles = len(used) + len(terms.outside)
    shipped = gradient_tiling(device.capability, tiles, plain=plain, filtered=filtered)
    trials = tiling_trials(device.capability, shipped, filtered=filtered)
    name = "filtered gradient" if filtered else "gradient"
    key = f"{name}/{tiles}{len(terms.moments)}{len(terms.probabilities)}/{operands.key}"
    return build(autotune.choose(key, out, shipped, trials, attempt))


def filters_tiles(recipe: Recipe) -> bool:
    """Whether tiles below the filter's bound need not be written: a bias gradient reads them."""
    return not recipe.needs[2]
