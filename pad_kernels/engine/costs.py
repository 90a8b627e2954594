"""Flops, memory traffic and time of each way to do an op."""

from __future__ import annotations

from dataclasses import dataclass

from pad_kernels._dtypes import accumulate_dtype
from pad_kernels.engine.devices import DEVICES
from pad_kernels.engine.plan import Shape


@dataclass(frozen=True)
class Way:
    """One way to do an op: a plan without its costs. The names are those of :class:`Plan`.

    Args:
        schedule: "early", "late" or "kept".
        over: "tokens" or "vocabulary": what gradients go over, block by block.
        rows: of a token block; 0 for all.
        cols: of a vocabulary chunk.
        kept: rows that keep their logits.
        accumulator: whether weight gradients add up in an accumulator.
    """

    schedule: str
    over: str
    rows: int
    cols: int
    kept: int = 0
    accumulator: bool = False


@dataclass(frozen=True)
class Costs:
    """Of one way to do an op of one shape."""

    shape: Shape
    way: Way

    @property
    def flops(self) -> int:
        """Of the matrix products, forward and backward."""
        shape, way = self.shape, self.way
        student = 2 * shape.tokens * shape.vocab * shape.hidden[0]
        flops = 2 * shape.unit + student * (shape.needs[0] + shape.needs[1])
        if any(shape.needs) and way.over == "vocabulary":
            flops += 2 * shape.unit * (shape.tokens - way.kept) // max(shape.tokens, 1)
        return flops

    @property
    def seconds(self) -> float:
        """Predicted time of the products, of the traffic around them and of starting blocks."""
        device = DEVICES[self.shape.device]
        traffic = self._packed_traffic() if device.type == "cpu" else self._row_traffic()
        seconds = self.flops / device.rate(self.shape.gemm) + traffic / device.bandwidth
        return seconds + self._starts() * device.block_seconds

    @property
    def _token_blocks(self) -> int:
        return -(-self.shape.tokens // self.way.rows) if self.way.rows else 0

    @property
    def _chunks(self) -> int:
        return -(-self.shape.vocab // self.way.cols)

    @property
    def _logits(self) -> int:
        """Bytes of every logit."""
        shape = self.shape
        return shape.streams * shape.tokens * shape.vocab * shape.gemm.itemsize

    def _starts(self) -> int:
        """How many times the host starts work on a block."""
        shape, blocks, chunks = self.shape, self._token_blocks, self._chunks
        if self.way.over == "tokens":
            return blocks
        if shape.fused:
            return max(blocks, 1) + chunks * any(shape.needs)
        return blocks * (shape.sweeps == 2) + chunks * (1 + any(shape.needs))

    def _accumulator_traffic(self) -> float:
        """Bytes to add each block's weight gradient to the accumulator, if there is one."""
        if not self.way.accumulator:
            return 0.0
        shape = self.shape
        entry = 2 * accumulate_dtype(shape.input).itemsize + 2 * shape.gemm.itemsize
        return float(self._token_blocks * shape.vocab * shape.hidden[0] * entry)

    def _packed_traffic(self) -> float:
        """Bytes moved besides a CPU's arithmetic: a product packs its operands at every call."""
        shape, way, logits = self.shape, self.way, self._logits
        needs, gradient, item = shape.needs, any(shape.needs), shape.gemm.itemsize
        weight = shape.vocab * sum(shape.hidden) * item
        if way.over == "tokens":
            # Packing reads and writes W in both products with it; dW is read and written.
            traffic = self._token_blocks * weight * (2 + 2 * needs[0] + 2 * needs[1]) + 4 * logits
            return traffic + self._accumulator_traffic()
        hidden = shape.tokens * sum(shape.hidden) * item
        passes = 1 + (2 + 2 * needs[0] if gradient else 0)
        traffic = self._chunks * hidden * passes + (2 if gradient else 1) * 2 * weight
        traffic += (6 if gradient else 2) * logits
        if shape.sweeps == 2:
            return traffic + self._token_blocks * 2 * weight
        return traffic + (-(-way.kept // max(way.rows, 1)) * 2 * weight if way.kept else 0)

    def _row_traffic(self) -> float:
        """Bytes moved besides a GPU's products, which overlap their own: the row passes'."""
        shape, way, logits = self.shape, self.way, self._logits
        # Statistics read every stream, in each sweep; where no logits are stored, none.
        fused = shape.fused and way.over == "vocabulary"
        share = way.kept / max(shape.tokens, 1) if fused else 1.0
        traffic = share * shape.sweeps * logits
        if any(shape.needs):
            traffic += logits + logits // shape.streams  # the gradient is written where it was read
        return traffic + self._accumulator_traffic()
