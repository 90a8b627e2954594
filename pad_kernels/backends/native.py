"""Row passes of a compiled module, by pointers: what the C++ and the CUDA backend have in common.

One read of a block for its statistics, one more for its gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from pad_kernels.backends.base import ROW_PASS_STATISTICS, RawBlock, beyond_row_passes
from pad_kernels.backends.choice import get_backend
from pad_kernels.engine.filter import FILTER_TILE
from pad_kernels.engine.recipe import Recipe
from pad_kernels.functionals import Divergence
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.divergence import Outcomes
from pad_kernels.functionals.statistics import (
    Argmax,
    Moment,
    Statistic,
    Tail,
    Total,
)
from pad_kernels.heads import HeadOptions

#: How many of a kind one pass takes.
_ROOM: dict[type[Statistic], int] = {Moment: 4, Tail: 1, Outcomes: 1}
_Stream = tuple[int, int, int, float, float, float]


class NativeBackend:
    """Every functional of the library, by the row passes of a compiled module."""

    #: Types of device whose tensors the module takes, and dtypes with the module's names for them.
    devices: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[dict[torch.dtype, str]]
    #: What the module calls the number of :meth:`running`.
    place: str

    def module(self) -> Any:
        """The compiled module."""
        raise NotImplementedError

    def running(self, device: torch.device) -> AbstractContextManager[int]:
        """The number that each pass wants to know: of threads, or a stream's."""
        raise NotImplementedError

    def refuses(self, recipe: Recipe, device: torch.device) -> str | None:
        """Why the passes cannot do the recipe; None if they can."""
        if device.type not in self.devices:
            return f"tensors are on {device.type}"
        if recipe.gemm not in self.dtypes:
            return f"no row pass for {recipe.gemm}"
        return beyond_row_passes(recipe, _ROOM)

    def transform(self, head: HeadOptions, raw: Tensor) -> Tensor:
        logits = raw.contiguous().clone()
        with self.running(logits.device) as where:
            dtype, count = self.dtypes[logits.dtype], logits.numel()
            self.module().head_transform(dtype, logits.data_ptr(), count, *head.numbers, where)
        return logits

    def measure(self, block: RawBlock, wanted: list[Statistic]) -> None:
        ours = [s for s in wanted if isinstance(s, ROW_PASS_STATISTICS)]
        if others := [s for s in wanted if s not in ours]:
            get_backend("torch_blocked").measure(block, others)
        passes = Passes(self, block)
        for statistic in ours:
            if isinstance(statistic, Outcomes):
                passes.outcomes(statistic)
        first: list[Statistic] = [s for s in ours if not isinstance(s, Outcomes)]
        if first:
            passes.statistics(first)

    def gradient(
        self, block: RawBlock, gradient: LogitGradient, out: Tensor, bound: Tensor | None
    ) -> Tensor | None:
        peaks = self.peaks(out, bound)
        Passes(self, block).gradient(gradient, out, peaks)
        return peaks

    def peaks(self, out: Tensor, bound: Tensor | None) -> Tensor | None:
        """Room for the largest magnitude of each column tile, if a filter wants to know it."""
        if bound is None:
            return None
        tiles = -(-out.shape[1] // FILTER_TILE)
        return torch.zeros(tiles, dtype=torch.float32, device=out.device)


class Passes:
    """The passes over one block, in the pointers and numbers that a module's functions take.

    What pointers lead to is held as long as the object lives.
    """

    def __init__(self, backend: NativeBackend, block: RawBlock) -> None:
        self._held: list[Tensor] = []
        self.backend, self.block, self.device = backend, block, block.device
        self.stats, self.offset = block.stats, block.offset
        self.rows, self.cols = block.shape
        self.dtype = backend.dtypes[block.logits[0].dtype]
        self.streams = [self._stream(block, j) for j in range(max(block.logits) + 1)]
        normalizers = [block.normalizer(j) for j in range(len(self.streams))]
        self.maxima = [self._pointer(n[0]) for n in normalizers]
        self.sums = [self._pointer(n[1]) for n in normalizers]

    def _pointer(self, tensor: Tensor | None) -> int:
        """The address of a contiguous tensor that stays alive; 0 for none."""
        if tensor is None:
            return 0
        self._held.append(tensor)
        return tensor.data_ptr()

    def _column(self, tensor: Tensor | None) -> int:
        """The address of one double per row."""
        return self._pointer(None if tensor is None else tensor.double().contiguous())

    @staticmethod
    def _stream(block: RawBlock, j: int) -> _Stream:
        if j not in block.logits:
            return 0, 0, 0, 1.0, 0.0, 1.0
        raw, stream = block.logits[j], block.problem.streams[j]
        shifted = 0 if stream.bias is None else stream.bias[block.offset :].data_ptr()
        return raw.data_ptr(), raw.stride(0), shifted, *stream.head.numbers

    def _moments(self, wanted: list[Statistic]) -> list[tuple[int, tuple[float, ...], int]]:
        found = []
        for s in wanted:
            if isinstance(s, Moment):
                padded = (*s.coefficients, *[0.0] * len(self.streams))[: len(self.streams)]
                found.append((s.stream, padded, self.stats[s].data_ptr()))
        return found

    def statistics(self, wanted: list[Statistic]) -> None:
        """Merge this block into first-sweep statistics."""
        more: dict[str, Any] = {}
        for s in wanted:
            if isinstance(s, Total):
                more["total"] = self.stats[s].data_ptr()
            elif isinstance(s, Argmax):
                more["argmax"] = self.stats[s].data_ptr()
                # The running best value is the running maximum; the pass updates a copy of it.
                more["argmax_value"] = self._pointer(self.block.normalizer(0)[0].clone())
            elif isinstance(s, Tail):
                ids = self.stats.ascending(s.ids)
                more["tail"] = (self._pointer(ids), ids.shape[1])
                more["tail_maximum"], more["tail_sum"] = (x.data_ptr() for x in self.stats[s])
        with self.backend.running(self.device) as where:
            self.backend.module().row_statistics(
                *(self.dtype, self.streams, self.rows, self.cols, self.offset),
                *(self.maxima, self.sums, self._moments(wanted)),
                **more,
                **{self.backend.place: where},
            )

    def outcomes(self, statistic: Outcomes) -> None:
        """Merge this block into the sums of a second sweep."""
        value, slope = (x.data_ptr() for x in self.stats[statistic])
        with self.backend.running(self.device) as where:
            self.backend.module().row_outcomes(
                *(self.dtype, self.streams, self.rows, self.cols, self.maxima, self.sums),
                (statistic.kind, statistic.alpha, statistic.teacher),
                *(value, slope, where),
            )

    def _terms(self, gradient: LogitGradient) -> Any:
        """A gradient's coefficients as the module takes them."""
        assert not gradient.centred, "a settled gradient is wanted"
        terms = self.backend.module().GradientTerms()
        terms.c0, terms.c1 = self._column(gradient.constant), self._column(gradient.student)
        streams = range(len(self.streams))
        terms.q = [self._column(gradient.moments.get(j)) for j in streams]
        terms.p = [self._column(gradient.probabilities.get(j)) for j in streams]
        if (sparse := gradient.sorted_sparse()) is not None:
            terms.sparse = (self._pointer(sparse[0]), sparse[0].shape[1])
            terms.sparse_values = self._column(sparse[1])
        for name, value in gradient.outside.items():
            ids, (maximum, total) = self.stats.ascending(name), self.stats[Tail(name)]
            terms.outside = (self._pointer(ids), ids.shape[1])
            terms.outside_maximum = self._column(maximum)
            terms.outside_value = self._column(torch.where(total == 0, 0.0, value / total))
        for functional, grad in gradient.curved:
            assert isinstance(functional, Divergence)
            terms.divergence = (functional.kind, functional.alpha, functional.teacher)
            terms.divergence_weight = self._column(grad[0])
            slope = self.stats[functional.outcomes][1]
            # Early statistics are float64 already, and a walk writes to them.
            terms.divergence_slope = self._column(slope)
        return terms

    def gradient(self, gradient: LogitGradient, out: Tensor, peaks: Tensor | None) -> None:
        """Write the gradient with respect to the student's raw logits."""
        with self.backend.running(self.device) as where:
            self.backend.module().row_gradient(
                *(self.dtype, self.streams, self.rows, self.cols, self.offset),
                *(self.maxima, self.sums, out.data_ptr(), out.stride(0)),
                *(self._terms(gradient), FILTER_TILE, self._pointer(peaks), where),
            )

    def walk(
        self,
        wanted: list[Statistic],
        gradient: LogitGradient,
        out: Tensor,
        peaks: Tensor | None,
    ) -> None:
        """Statistics of both sweeps, and the gradient."""
        values = [self.stats[s][0].data_ptr() for s in wanted if isinstance(s, Outcomes)]
        centred = [gradient.centred.get(s) for s in wanted if isinstance(s, Moment)]
        terms = self._terms(gradient.uncentred())
        if gradient.centred:
            # The walk takes the means off.
            student = gradient.student
            own = torch.zeros(self.rows) if student is None else student
            terms.c1 = self._pointer(own.to(torch.float64, copy=True))
        with self.backend.running(self.device) as where:
            self.backend.module().row_walk(
                *(self.dtype, self.streams, self.rows, self.cols),
                *(
                    self.maxima,
                    self.sums,
                    self._moments(wanted),
                    [self._column(x) for x in centred],
                ),
                *(values[0] if values else 0, out.data_ptr(), out.stride(0)),
                *(terms, FILTER_TILE, self._pointer(peaks), where),
            )
