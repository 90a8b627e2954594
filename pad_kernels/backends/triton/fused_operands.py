"""What fused kernels work on: which statistics, and matrices that they can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pad_kernels.backends.triton import autotune
from pad_kernels.backends.triton.launch import head_kind
from pad_kernels.backends.triton.math import IDENTITY
from pad_kernels.backends.triton.tilings import MOST_STREAMS, Tiling
from pad_kernels.engine.problem import Problem
from pad_kernels.functionals.statistics import (
    Argmax,
    Moment,
    Normalizer,
    Picked,
    Statistic,
    Tail,
    Total,
)
from pad_kernels.heads import HeadOptions

_KNOWN = (Normalizer, Moment, Total, Argmax, Picked, Tail)


@dataclass(frozen=True)
class Measured:
    """Which statistics a launch measures.

    Args:
        streams: the streams' numbers in the recipe.
        moments: the moments among the wanted statistics.
        total: whether the sum of the student's logits is wanted.
        argmax: whether the greedy token is.
        picked: the picked logits.
        tail: the normaliser of all but some picked logits, if it is wanted.
    """

    streams: tuple[int, ...]
    moments: tuple[Moment, ...]
    total: bool
    argmax: bool
    picked: tuple[Picked, ...]
    tail: Tail | None

    @staticmethod
    def of(streams: Sequence[int], wanted: Sequence[Statistic]) -> Measured | None:
        """What to measure; None if not all of it can stay on the chip."""
        picked = tuple(s for s in wanted if isinstance(s, Picked))
        tail = next((s for s in wanted if isinstance(s, Tail)), None)
        known = all(isinstance(s, _KNOWN) for s in wanted)
        listed = tail is None or Picked(tail.ids) in picked
        if not known or not listed or len(streams) > MOST_STREAMS:
            return None
        moments = tuple(s for s in wanted if isinstance(s, Moment))
        total, argmax = Total() in wanted, Argmax() in wanted
        return Measured(tuple(streams), moments, total, argmax, picked, tail)

    def extras_with(self, inputs: Mapping[str, Tensor]) -> int:
        """How much there is besides normalisers and a label: lists of ids count as one thing."""
        many = sum(inputs[p.ids].shape[1] for p in self.picked) > 1
        return len(self.moments) + self.total + self.argmax + many

    @property
    def normalizers(self) -> list[Statistic]:
        """What the state has a maximum and a sum of: the streams, and the tail as one more."""
        return [*(Normalizer(j) for j in self.streams), *([self.tail] if self.tail else [])]

    @property
    def slots(self) -> list[tuple[Statistic, int]]:
        """(statistic, which of its numbers) of each number of a state, in the kernels' order."""
        found: list[tuple[Statistic, int]] = []
        found += [(normalizer, 0) for normalizer in self.normalizers]
        found += [(normalizer, 1) for normalizer in self.normalizers]
        found += [(moment, 0) for moment in self.moments]
        found += [(Total(), 0)] * self.total
        found += [(Argmax(), 0)] * self.argmax
        return found

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that both kernels share."""
        padded = [(*m.coefficients, *[0.0] * (max(self.streams) + 1)) for m in self.moments]
        tail = [0.0] if self.tail else []
        rows = [[*(row[j] for j in self.streams), *tail] for row in padded]
        return {
            "WEIGHTS": tuple(self.streams.index(m.stream) for m in self.moments),
            "COEFFICIENTS": tuple(float(c) for row in rows for c in row),
            "TOTAL": self.total,
            "ARGMAX": self.argmax,
        }


@dataclass(frozen=True)
class Operands:
    """The matrices and heads of some streams, for some rows, as kernels take them."""

    hidden: list[Tensor]  # (rows, H) for each stream
    weight: list[Tensor]  # (V, H)
    biases: tuple[Tensor | None, ...]  # (V,) float32
    heads: list[HeadOptions]

    @staticmethod
    def of(problem: Problem, hidden: Mapping[int, Tensor]) -> Operands:
        """Of the streams that ``hidden`` has."""
        used = [problem.streams[j] for j in hidden]
        return Operands(
            list(hidden.values()),
            [s.weight for s in used],
            tuple(s.bias for s in used),
            [s.head for s in used],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, vocabulary)."""
        return self.hidden[0].shape[0], self.weight[0].shape[0]

    @property
    def readable(self) -> bool:
        """Whether kernels can read every matrix 16 bytes at a time, in half precision.

        Triton knows of a size or stride whether 16 divides it, and the copy engine wants rows that
        start at multiples of 16 bytes.
        """
        dtype = self.hidden[0].dtype
        return dtype in (torch.bfloat16, torch.float16) and all(
            x.dtype == dtype
            and x.stride(1) == 1
            and x.shape[1] % 16 == 0
            and x.stride(0) % 16 == 0
            and (x.device.type == "meta" or x.data_ptr() % 16 == 0)
            for x in (*self.hidden, *self.weight)
        )

    @property
    def plain(self) -> bool:
        """Whether no head transforms its logits."""
        return all(head_kind(head) == IDENTITY for head in self.heads)

    @property
    def key(self) -> str:
        """What block sizes may depend on: dtype, head transforms, the class of the shape."""
        like = self.hidden[0]
        heads = "".join(str(head_kind(head)) for head in self.heads)
        sizes = autotune.shape_class(*self.shape, like.shape[1])
        return f"{str(like.dtype).removeprefix('torch.')}/heads {heads}/{sizes}"

    def cut(self, start: int, weights: list[Tensor]) -> Operands:
        """The same streams, the vocabulary entries from ``start`` whose weight rows these are."""
        stop = start + weights[0].shape[0]
        return Operands(
            self.hidden,
            weights,
            tuple(None if b is None else b[start:stop] for b in self.biases),
            self.heads,
        )

    def arguments(self, tiling: Tiling, *, tma: bool) -> dict[str, Any]:
        """Arguments that the kernels share."""
        found: dict[str, Any] = {}
        for name, matrices, size in (
            ("hidden", self.hidden, tiling.rows),
            ("weight", self.weight, tiling.cols),
        ):
            for j in range(MOST_STREAMS):
                x = matrices[j] if j < len(matrices) else None
                if x is not None and tma:
                    box = [size, tiling.depth]
                    x = TensorDescriptor(x, list(x.shape), list(x.stride()), box)
                found[f"{name}{j}"] = x
        pairs = zip(self.hidden, self.weight, strict=True)
        found["biases"] = self.biases
        found["shapes"] = tuple((h.shape[1], h.stride(0), w.stride(0)) for h, w in pairs)
        found["heads"] = tuple(head.numbers for head in self.heads)
        found["rows"], found["vocab"] = self.shape
        return found

    def constants(self, tiling: Tiling, *, tma: bool) -> dict[str, Any]:
        """Constants that the kernels share."""
        return {
            "KINDS": tuple(head_kind(head) for head in self.heads),
            "BLOCK_M": tiling.rows,
            "BLOCK_N": tiling.cols,
            "BLOCK_K": tiling.depth,
            "GROUP": tiling.group,
            "TMA": tma,
        }
