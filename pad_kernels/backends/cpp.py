"""Row passes in C++: one read of a block for its statistics, one more for its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pad_kernels.backends.base import get_backend
from pad_kernels.backends.registry import native, native_error
from pad_kernels.engine.gradients import FILTER_TILE
from pad_kernels.engine.problem import Problem
from pad_kernels.engine.recipe import Recipe
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import (
    Argmax,
    Moment,
    Normalizer,
    Picked,
    RowStats,
    Statistic,
    Total,
)
from pad_kernels.heads import HeadOptions

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_KNOWN = (Normalizer, Moment, Total, Argmax)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class CppBackend:
    """Functionals whose statistics and gradients are linear in the logits, on a CPU."""

    def refuses(self, recipe: Recipe, device: torch.device) -> str | None:
        if native() is None:
            return native_error()
        if device.type != "cpu":
            return f"tensors are on {device.type}"
        if recipe.gemm not in _DTYPES:
            return f"no row pass for {recipe.gemm}"
        for functional in recipe.functionals:
            for statistic in functional.statistics:
                if not isinstance(statistic, (*_KNOWN, Picked)):
                    name = type(functional).__name__
                    return f"{name} needs {type(statistic).__name__}, which has no C++ yet"
        return None

    def transform(self, head: HeadOptions, raw: Tensor) -> Tensor:
        module = native()
        assert module is not None
        logits = raw.contiguous().clone()
        module.head_transform(
            _DTYPES[logits.dtype],
            logits.data_ptr(),
            logits.numel(),
            head.logit_scale,
            head.softcap or 0.0,
            head.temperature,
        )
        return logits

    @staticmethod
    def _streams(
        problem: Problem, logits: list[Tensor], offset: int
    ) -> list[tuple[int, int, int, float, float, float]]:
        found = []
        for stream, z in zip(problem.streams, logits, strict=True):
            bias = 0 if stream.bias is None else _pointer(stream.bias[offset:])
            head = stream.head
            found.append(
                (
                    _pointer(z),
                    z.stride(0),
                    bias,
                    head.logit_scale,
                    head.softcap or 0.0,
                    head.temperature,
                )
            )
        return found

    def measure(
        self,
        problem: Problem,
        stats: RowStats,
        wanted: list[Statistic],
        logits: list[Tensor],
        offset: int,
    ) -> None:
        if len(ours := [s for s in wanted if isinstance(s, _KNOWN)]) < len(wanted):
            others = [s for s in wanted if s not in ours]
            get_backend("torch_blocked").measure(problem, stats, others, logits, offset)
        module = native()
        assert module is not None
        rows, cols = logits[0].shape
        total = stats.get(Total()) if Total() in wanted else None
        argmax = stats.get(Argmax()) if Argmax() in wanted else None
        normalizers = _normalizers(stats, len(logits), rows)
        best = None
        if argmax is not None:
            # The running best value is the running maximum; the pass updates a copy of it.
            best = normalizers[0][0].clone()
        module.row_statistics(
            _DTYPES[logits[0].dtype],
            self._streams(problem, logits, offset),
            rows,
            cols,
            offset,
            [_pointer(n[0]) for n in normalizers],
            [_pointer(n[1]) for n in normalizers],
            [
                (s.stream, s.coefficients, _pointer(stats[s]))
                for s in wanted
                if isinstance(s, Moment)
            ],
            _pointer(total),
            _pointer(argmax),
            _pointer(best),
            torch.get_num_threads(),
        )

    def gradient(
        self,
        problem: Problem,
        out: Tensor,
        logits: list[Tensor],
        offset: int,
        stats: RowStats,
        gradient: LogitGradient,
        bound: float,
    ) -> Tensor | None:
        module = native()
        assert module is not None
        rows, cols = out.shape
        peaks = None
        if bound > 0:
            peaks = torch.zeros(-(-cols // FILTER_TILE), dtype=torch.float32)
        sparse = gradient.sorted_sparse()
        ids, values = sparse if sparse is not None else (None, None)
        normalizers = _normalizers(stats, len(logits), rows)
        # Contiguous copies stay referenced until the call returns.
        rowwise = {
            "constant": _contiguous(gradient.constant),
            "student": _contiguous(gradient.student),
        }
        q = [_contiguous(gradient.moments.get(j)) for j in range(len(logits))]
        p = [_contiguous(gradient.probabilities.get(j)) for j in range(len(logits))]
        module.row_gradient(
            _DTYPES[out.dtype],
            self._streams(problem, logits, offset),
            rows,
            cols,
            offset,
            [_pointer(n[0]) for n in normalizers],
            [_pointer(n[1]) for n in normalizers],
            _pointer(out),
            out.stride(0),
            _pointer(rowwise["constant"]),
            _pointer(rowwise["student"]),
            [_pointer(x) for x in q],
            [_pointer(x) for x in p],
            _pointer(ids),
            _pointer(values),
            0 if ids is None else ids.shape[1],
            FILTER_TILE,
            _pointer(peaks),
            torch.get_num_threads(),
        )
        return peaks


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _normalizers(stats: RowStats, streams: int, rows: int) -> list[Tensor]:
    """(max, sum) of every stream; a scratch pair where no functional asked for one."""
    like = next(x for x in stats.values() if x.is_floating_point())
    found = []
    for j in range(streams):
        state = stats.get(Normalizer(j))
        found.append(Normalizer(j).empty(rows, {}, like) if state is None else state)
    return found
