"""Calls of the C++ row passes on tensors, and the same formulas densely in any dtype."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

C: Any = pytest.importorskip(
    "pad_kernels._C", reason="the C++ extension is not built", exc_type=ImportError
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# one entry; below one vector; a vector and a rest; several tiles; several segments of a row
SHAPES = [(1, 1), (5, 7), (1, 123), (5, 507), (5, 5000), (3, 40007)]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.4, "temperature": 1.7},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "scale": 1.3, "softcap": 4.0, "temperature": 0.8},
}
NAN, INF = math.nan, math.inf


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Stream:
    """A block of raw logits (rows, cols) inside wider, NaN-padded storage."""

    logits: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0

    def packed(self, begin: int = 0) -> tuple[int, int, int, float, float, float]:
        item = self.logits.element_size()
        bias = 0 if self.bias is None else self.bias[begin:].data_ptr()
        pointer = self.logits.data_ptr() + begin * item
        return (pointer, self.logits.stride(0), bias, self.scale, self.softcap, self.temperature)

    def transformed(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """a and da/dz in ``dtype``."""
        a = self.logits.to(dtype)
        if self.bias is not None:
            a = a + self.bias.to(dtype)
        slope = self.scale / self.temperature
        if not self.softcap:
            # Step by step, as a head computes it.
            return a * self.scale / self.temperature, torch.full_like(a, slope)
        capped = torch.tanh(a * (self.scale / self.softcap))
        return capped * (self.softcap / self.temperature), slope * (1 - capped * capped)


def strided(values: Tensor, pad: int = 5) -> Tensor:
    """The same values with a leading dimension that is larger than the row."""
    storage = torch.full((values.shape[0], values.shape[1] + pad), NAN, dtype=values.dtype)
    storage[:, : values.shape[1]] = values
    return storage[:, : values.shape[1]]


def make_streams(
    count: int, rows: int, cols: int, dtype: torch.dtype, head: dict[str, Any], spread: float = 3.0
) -> list[Stream]:
    options = {k: v for k, v in head.items() if k != "bias"}
    return [
        Stream(
            strided((torch.randn(rows, cols, dtype=torch.float64) * spread).to(dtype)),
            torch.randn(cols, dtype=acc_of(dtype)) if head.get("bias") else None,
            **options,
        )
        for _ in range(count)
    ]


class State:
    """The running state of rows, as the engine would hold it."""

    def __init__(
        self,
        streams: Sequence[Stream],
        moments: Sequence[tuple[int, tuple[float, ...]]] = (),
        threads: int = 2,
    ) -> None:
        self.streams, self.moments, self.threads = streams, moments, threads
        logits = streams[0].logits
        self.rows, self.cols = logits.shape
        self.dtype, number = str(logits.dtype)[6:], torch.float64
        self.maxima = torch.full((len(streams), self.rows), -INF, dtype=number)
        self.sums = torch.zeros(len(streams), self.rows, dtype=number)
        self.moment = torch.zeros(len(moments), self.rows, dtype=number)
        self.total = torch.zeros(self.rows, dtype=number)
        self.best = torch.full((self.rows,), -INF, dtype=number)
        self.argmax = torch.full((self.rows,), -1)

    def add(self, begin: int = 0, end: int | None = None, offset: int = 0) -> "State":
        """Merge columns [begin, end)."""
        C.row_statistics(
            self.dtype,
            [stream.packed(begin) for stream in self.streams],
            self.rows,
            (self.cols if end is None else end) - begin,
            offset + begin,
            [m.data_ptr() for m in self.maxima],
            [s.data_ptr() for s in self.sums],
            [(w, c, m.data_ptr()) for (w, c), m in zip(self.moments, self.moment, strict=True)],
            address(self.total),
            address(self.argmax),
            address(self.best),
            threads=self.threads,
        )
        return self

    @property
    def everything(self) -> list[Tensor]:
        return [self.maxima, self.sums, self.moment, self.total, self.best, self.argmax]


@dataclass
class Terms:
    """The gradient's coefficients; absent ones are None."""

    c0: Tensor | None = None
    c1: Tensor | None = None
    q: Sequence[Tensor | None] = ()
    p: Sequence[Tensor | None] = ()
    ids: Tensor | None = None
    values: Tensor | None = None
    outside_ids: Tensor | None = None
    outside: Tensor | None = None
    outside_maximum: Tensor | None = None


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def run_gradient(
    streams: Sequence[Stream],
    maxima: Tensor,
    sums: Tensor,
    terms: Terms,
    out: Tensor,
    offset: int = 0,
    tile: int = 0,
    absmax: Tensor | None = None,
    threads: int = 2,
) -> Tensor:
    logits = streams[0].logits
    held: list[Tensor] = []

    def doubles(tensor: Tensor | None) -> int:
        """The address of the same numbers as float64; they live until this function returns."""
        if tensor is None:
            return 0
        held.append(tensor.double().contiguous())
        return held[-1].data_ptr()

    given = C.GradientTerms()
    given.c0, given.c1 = doubles(terms.c0), doubles(terms.c1)
    given.q, given.p = [doubles(q) for q in terms.q], [doubles(p) for p in terms.p]
    if terms.ids is not None:
        given.sparse = (terms.ids.data_ptr(), terms.ids.shape[1])
        given.sparse_values = doubles(terms.values)
    if terms.outside_ids is not None:
        given.outside = (terms.outside_ids.data_ptr(), terms.outside_ids.shape[1])
        given.outside_value = doubles(terms.outside)
        given.outside_maximum = doubles(terms.outside_maximum)
    C.row_gradient(
        str(logits.dtype)[6:],
        [stream.packed() for stream in streams],
        *logits.shape,
        offset,
        [doubles(m) for m in maxima],
        [doubles(s) for s in sums],
        out.data_ptr(),
        out.stride(0),
        given,
        tile,
        address(absmax),
        threads,
    )
    return out


def oracle_gradient(
    streams: Sequence[Stream],
    maxima: Tensor,
    sums: Tensor,
    terms: Terms,
    offset: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The formula written down once more, densely."""

    def column(values: Tensor | None) -> Tensor | float:
        return 0.0 if values is None else values.to(dtype)[:, None]

    a = [s.transformed(dtype)[0] for s in streams]
    x = [v - m.to(dtype)[:, None] for v, m in zip(a, maxima, strict=True)]
    shares = [v.exp() / s.to(dtype)[:, None] for v, s in zip(x, sums, strict=True)]
    factor = column(terms.c1) + torch.zeros_like(x[0])
    for q, v in zip(terms.q, x, strict=False):
        factor = factor + column(q) * v if q is not None else factor
    d = column(terms.c0) + torch.where(shares[0] == 0, 0.0, shares[0] * factor)
    if terms.outside_ids is not None:
        listed = (terms.outside_ids[:, :, None] - offset == torch.arange(d.shape[1])).any(1)
        grown = torch.exp(a[0] - column(terms.outside_maximum)) * column(terms.outside)
        d = d + torch.where(listed, 0.0, grown)
    for p, share in zip(terms.p, shares, strict=False):
        d = d + column(p) * share if p is not None else d
    if terms.ids is not None and terms.values is not None:
        inside = (terms.ids >= offset) & (terms.ids < offset + d.shape[1])
        d.scatter_add_(
            1,
            (terms.ids - offset).clamp(0, d.shape[1] - 1),
            torch.where(inside, terms.values.to(dtype), 0.0),
        )
    return d * streams[0].transformed(dtype)[1]


def assert_as_good(
    got: Tensor, exact: Tensor, dense: Tensor, k: float, scale: Tensor | None = None
) -> None:
    """By norm: error <= k max(error of the dense computation in this dtype, eps ||exact||).

    ``scale`` is the size of what was subtracted to get there, where that is larger than the result.
    What is float64 because there is one of it per row is judged as what it was computed from.
    """
    dtype = dense.dtype if got.dtype == torch.float64 else got.dtype
    got64, dense64 = got.double(), dense.to(dtype).double()
    finite = exact.isfinite()
    torch.testing.assert_close(got64[~finite], exact[~finite], equal_nan=True)
    size = exact if scale is None else torch.maximum(exact.abs(), scale)
    bound = torch.finfo(dtype).eps * size[finite].norm().item()
    bound = k * max(bound, (dense64 - exact)[finite].norm().item())
    error = (got64 - exact)[finite].norm().item()
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"
