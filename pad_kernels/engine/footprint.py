"""Bytes of workspace that each pass takes, in the terms of engine/schedule.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pad_kernels._dtypes import accumulate_dtype, product_dtype
from pad_kernels.backends.traits import traits
from pad_kernels.engine.plan import Shape, row_pitch

#: Bytes for each entry of an ordered vocabulary: the order, its inverse, and what sorting takes.
ORDER_BYTES = 48
#: Bytes of a row's numbers on a GPU, and the fewest rows to count them for: coefficients side by
#: side and, where rows are few, the parts of each that several programs make. 64 doubles.
ROW_NUMBERS, LEAST_ROWS = 512, 4096


@dataclass(frozen=True)
class Footprint:
    """Memory of the passes over a shape.

    Args:
        shape: of the op.
        filtered: whether tiles of the logit gradient are left out.
    """

    shape: Shape
    filtered: bool

    @property
    def item(self) -> int:
        """Bytes of an operand of products."""
        return self.shape.gemm.itemsize

    @property
    def acc(self) -> int:
        """Bytes of an entry of a statistic or an accumulator."""
        return accumulate_dtype(self.shape.input).itemsize

    @property
    def _product(self) -> int:
        """Bytes of an entry of a gradient's product."""
        return product_dtype(self.shape.gemm).itemsize

    @property
    def ordered(self) -> bool:
        """Whether the filter's tiles are of a vocabulary that is put in order, if none are kept."""
        return self.filtered and any(self.shape.needs) and not self.shape.copied_weights

    def _shared(self, cols: int) -> int:
        """Buffers of every pass: a copied weight chunk, a row's numbers, the row passes' own."""
        copied = cols * max(self.shape.hidden) * self.item if self.shape.copied_weights else 0
        if self.shape.device_bytes:
            copied += max(self.shape.tokens, LEAST_ROWS) * ROW_NUMBERS
        own = traits(self.shape.backend).temporaries * self.acc
        return copied + self._order(cols) + own

    def _order(self, cols: int) -> int:
        """The order, biases in it, and weight rows on their way into it."""
        if not self.ordered:
            return 0
        rows = cols * sum(self.shape.hidden) * self.item
        return rows + self.shape.vocab * (ORDER_BYTES + self.shape.streams * self.acc)

    def _rows(self, rows: int) -> int:
        """Hidden states of some rows of every stream, gathered in the product's dtype."""
        return rows * sum(self.shape.hidden) * self.item

    def logits(self, rows: int, cols: int) -> int:
        """Logits of every stream."""
        return self.shape.streams * rows * cols * self.item

    def _room(self, rows: int, cols: int) -> int:
        """Room for logits, whose rows are apart as far as the device likes it."""
        return self.logits(rows, row_pitch(cols, self.shape.device_bytes))

    def tokens(self, rows: int, cols: int) -> int:
        """A token block through the whole vocabulary, no gradient."""
        return self._room(rows, self.shape.vocab) + self._rows(rows) + self._shared(cols)

    def chunks(self, cols: int, gradient: bool, rows: int = 0) -> int:
        """All rows, or so many at a time, through a vocabulary chunk."""
        shape = self.shape
        rows = rows or shape.tokens
        need = self._room(rows, cols) + self._rows(rows) + self._shared(cols)
        if gradient and shape.needs[0]:
            half = shape.gemm.itemsize == 2
            need += shape.tokens * shape.hidden[0] * (self.acc + (self._product if half else 0))
        if gradient and shape.needs[1]:
            apart = shape.weight != product_dtype(shape.gemm)
            need += cols * shape.hidden[0] * (self._product * apart + self.item * self.ordered)
        if gradient and shape.needs[2]:
            need += shape.vocab * self.acc
        return need

    def early(self, rows: int, cols: int, accumulator: bool) -> int:
        """A token block through the whole vocabulary, and its gradient."""
        shape, h = self.shape, self.shape.hidden[0]
        need = self.tokens(rows, cols)
        if shape.needs[0]:
            need += rows * h * self._product
            if shape.copied_weights or self.filtered:
                need += rows * h * self.acc
            if shape.input == torch.float16:
                need += shape.tokens * h * self.acc
        if shape.needs[1]:
            need += cols * h * self._product if accumulator or shape.weight != shape.gemm else 0
            need += cols * h * (self.item + self.acc) if self.ordered else 0
            need += shape.vocab * h * self.acc if accumulator else 0
        if shape.needs[2]:
            need += shape.vocab * self.acc
        return need
