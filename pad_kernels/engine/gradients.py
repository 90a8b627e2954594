"""Where gradients add up: hidden states, weight and bias, each in the dtype that loses nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pad_kernels._dtypes import product_dtype
from pad_kernels.backends.base import LiveTiles
from pad_kernels.engine.feed import pieces
from pad_kernels.engine.filter import column_runs
from pad_kernels.engine.products import add_product, multiply, multiply_in_blocks
from pad_kernels.engine.run import Run
from pad_kernels.engine.workspace import empty

#: Exponent of the largest upstream gradient that float16 operands are made of. It leaves room for
#: slopes of some thousand, and 1 / V of the largest vocabularies is still a normal number.
_TOP = 4


class GradientBuffers:
    """Gradients of hidden [N, H], weight [V, H] and bias [V], in the making.

    ``early`` says that the upstream gradient is not known yet. float16 gradients are then summed in
    float32 and stored times a power of two, so that a loss scale that arrives later finds them
    whole; :meth:`finish` tells the factors that are left to apply.

    Where products take float16 operands, dL/dz is a power of two times what it is, so that the
    largest per-row factor is about 2^_TOP: 1 / N and a loss scale, of now or later, change nothing.
    Products are then written in float32, and the power is taken out at the end.
    """

    def __init__(self, run: Run, *, early: bool) -> None:
        self.run, self.early = run, early
        self.problem, self.plan, self.workspace = run.problem, run.plan, run.workspace
        problem, plan, workspace = run.problem, run.plan, run.workspace
        needs, student = problem.recipe.needs, problem.streams[0]
        accumulate, device = problem.accumulate, problem.device
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._hidden_sum: Tensor | None = None
        self._weight_sum: Tensor | None = None
        self._scratch: dict[str, Tensor] = {}
        self._weight_started = False
        self._product = product_dtype(problem.recipe.gemm)
        self._inverse: Tensor | None = None  # what the operands lack
        if needs[0]:
            shape = (problem.tokens, student.hidden.shape[1])
            self.hidden = empty(shape, student.hidden.dtype, device, limit=problem.limit)
            if problem.live is not None or problem.rows == 0:
                self.hidden.zero_()
            if early and student.hidden.dtype == torch.float16:
                self._hidden_sum = workspace.empty(*shape, dtype=accumulate).zero_()
        if needs[1]:
            whole = tuple(problem.weight.shape)
            self.weight = empty(whole, student.weight.dtype, device, limit=problem.limit)
            self.weight[problem.recipe.vocab if problem.rows else 0 :].zero_()
            if plan.weight_accumulator:
                shape = (problem.recipe.vocab, student.weight.shape[1])
                self._weight_sum = workspace.empty(*shape, dtype=accumulate)
        if needs[2]:
            self.bias = workspace.empty(problem.weight.shape[0], dtype=accumulate).zero_()

    def _buffer(self, name: str, rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A scratch buffer [rows, H] that is made once."""
        if name not in self._scratch:
            self._scratch[name] = self.workspace.empty(rows, like.shape[1], dtype=dtype)
        return self._scratch[name]

    def operand(self, grad: Tensor) -> Tensor:
        """Upstream gradients [outputs, rows] as dL/dz, an operand of products, is made of them."""
        if self.problem.recipe.gemm != torch.float16 or not grad.numel():
            return grad
        factor = _power(grad, _TOP)
        self._inverse = 1 / factor
        return grad * factor.to(grad.dtype)

    # --- early: a block of rows, the whole vocabulary --------------------------------------------

    def add_rows(
        self,
        dz: Tensor,
        hidden: Tensor,
        span: tuple[int, int],
        peaks: Tensor | None,
        bound: Tensor | None,
    ) -> None:
        """Add a token block: ``dz`` [rows, V] of the live rows of ``span``, filtered."""
        if self.bias is not None:
            self.bias[: dz.shape[1]] += dz.sum(0, dtype=self.bias.dtype)
        if (live := self.run.live_tiles(hidden, dz, peaks, bound)) is not None:
            self._add_live_rows(live, hidden, span)
            return
        runs = column_runs([peaks], bound, dz.shape[1])
        if self.hidden is not None:
            self._set_hidden(dz, span, runs)
        if self.weight is not None:
            self._add_weight(dz, hidden, runs)

    def _add_live_rows(self, live: LiveTiles, hidden: Tensor, span: tuple[int, int]) -> None:
        order, student = self.problem.order, self.problem.streams[0]
        if self.hidden is not None:
            found = self._row_sums(span[1] - span[0])
            live.times_weight(found, student.weight, order, add=False)
            self._put_hidden(found, span)
        if self.weight is not None:
            live.times_hidden(self._weight_total, hidden, order, add=self._weight_started)
            self._weight_started = True

    def _row_sums(self, rows: int) -> Tensor:
        problem = self.problem
        weight = problem.streams[0].weight
        return self._buffer("rows", self.plan.token_block, weight, problem.accumulate)[:rows]

    def _put_hidden(self, found: Tensor, span: tuple[int, int]) -> None:
        """Hidden gradients of the live rows of ``span``, where they belong."""
        live = self.problem.live
        target = self.hidden if self._hidden_sum is None else self._hidden_sum
        assert target is not None
        if live is None:
            target[span[0] : span[1]].copy_(found)
        else:
            _put_rows(target, live[span[0] : span[1]], found)

    def _set_hidden(self, dz: Tensor, span: tuple[int, int], runs: list[tuple[int, int]]) -> None:
        student, gemm = self.problem.streams[0], self.problem.recipe.gemm
        rows, copy = dz.shape[0], self.run.copies[0]
        part = self._buffer("product", self.plan.token_block, student.weight, self._product)[:rows]
        if copy is None and runs == [(0, dz.shape[1])]:
            found = multiply_in_blocks(dz, student.weight, part)
        else:
            found = self._row_sums(rows).zero_()
            for a, b in _steps(runs, dz.shape[1] if copy is None else copy.shape[0]):
                add_product(found, dz[:, a:b], student.weights(a, b, gemm, copy), part)
        self._put_hidden(found, span)

    @property
    def _weight_total(self) -> Tensor:
        """Where token blocks add up: the output itself if it can hold the sum."""
        total = self.weight if self._weight_sum is None else self._weight_sum
        assert total is not None
        return total[: self.problem.recipe.vocab]

    def _add_weight(self, dz: Tensor, hidden: Tensor, runs: list[tuple[int, int]]) -> None:
        total, order = self._weight_total, self.problem.order
        if not self._weight_started and (order is not None or runs != [(0, dz.shape[1])]):
            total.zero_()
            self._weight_started = True
        direct = total.dtype == dz.dtype and order is None
        step = dz.shape[1] if direct else self.plan.vocab_block
        for a, b in _steps(runs, step):
            left = dz[:, a:b].t()
            if not self._weight_started:
                self._set_product(total[a:b], left, hidden, step)
                continue
            part = None if direct else self._buffer("weight", step, hidden, self._product)[: b - a]
            if order is None:
                add_product(total[a:b], left, hidden, part)
            else:
                assert part is not None
                added = multiply(left, hidden, part).to(total.dtype)
                total.index_add_(0, order[a:b], added)
        self._weight_started = True

    # --- late and kept: all rows, a vocabulary chunk ---------------------------------------------

    def add_columns(
        self,
        dz: Tensor,
        hidden: Tensor,
        span: tuple[int, int],
        peaks: list[tuple[slice, Tensor | None]],
        bound: Tensor | None,
    ) -> None:
        """Add a vocabulary chunk: ``dz`` [live rows, cols] of the entries of ``span``, filtered.

        Args:
            peaks: of some rows each, what the filter looks at.
        """
        start, stop = span
        if self.bias is not None:
            torch.sum(dz, 0, dtype=self.bias.dtype, out=self.bias[start:stop])
        live = [(rows, self.run.live_tiles(hidden[rows], dz[rows], p, bound)) for rows, p in peaks]
        if all(tiles is not None for _, tiles in live):
            self._add_live_columns(live, hidden, span)
            return
        runs = column_runs([p for _, p in peaks], bound, dz.shape[1])
        if self.weight is not None:
            self._set_weight(dz, hidden, span, runs)
        if self.hidden is None:
            return
        student, gemm = self.problem.streams[0], self.problem.recipe.gemm
        total = self._hidden_total()
        part = None
        if total.dtype != gemm:
            part = self._buffer("product", total.shape[0], total, self._product)
        for a, b in runs:
            weight = student.weights(start + a, start + b, gemm, self.run.copies[0])
            add_product(total, dz[:, a:b], weight, part)

    def _add_live_columns(
        self,
        live: Sequence[tuple[slice, LiveTiles | None]],
        hidden: Tensor,
        span: tuple[int, int],
    ) -> None:
        order, weight = self.problem.order, self.problem.streams[0].weight
        target = self.weight
        if order is None:
            weight = weight[span[0] : span[1]]
            target = None if target is None else target[span[0] : span[1]]
        else:
            order = order[span[0] : span[1]]
        for i, (rows, tiles) in enumerate(live):
            assert tiles is not None
            if target is not None:
                # Other sums are float32 and wait for their power of two until the end.
                tiles.times_hidden(target, hidden[rows], order, add=i > 0, scale=self._inverse)
            if self.hidden is not None:
                tiles.times_weight(self._hidden_total()[rows], weight, order, add=True)

    def _set_weight(
        self, dz: Tensor, hidden: Tensor, span: tuple[int, int], runs: list[tuple[int, int]]
    ) -> None:
        assert self.weight is not None
        order, rows = self.problem.order, self.plan.vocab_block
        chunk = self.weight[span[0] : span[1]]
        if order is not None:
            chunk = self._buffer("ordered", rows, chunk, chunk.dtype)[: dz.shape[1]]
        if runs != [(0, dz.shape[1])]:
            chunk.zero_()
        for a, b in runs:
            self._set_product(chunk[a:b], dz[:, a:b].t(), hidden, rows)
        if chunk.dtype == self._product:
            self._restored(chunk)
        if order is not None:
            self.weight.index_copy_(0, order[span[0] : span[1]], chunk)

    def _hidden_total(self) -> Tensor:
        """Where chunks add up: the output itself if it can hold the sum, else an accumulator."""
        assert self.hidden is not None
        if self._hidden_sum is None:
            if self.problem.live is None and self.hidden.dtype == self.problem.accumulate:
                self._hidden_sum = self.hidden.zero_()
            else:
                shape = (self.problem.rows, self.hidden.shape[1])
                self._hidden_sum = self.workspace.empty(*shape, dtype=self.problem.accumulate)
                self._hidden_sum.zero_()
        return self._hidden_sum

    def _set_product(self, target: Tensor, left: Tensor, right: Tensor, step: int) -> None:
        """Target = left @ right, restored through scratch where the product has another dtype."""
        if target.dtype == self._product:
            multiply(left, right, target)
        else:
            part = self._buffer("weight", step, right, self._product)[: target.shape[0]]
            target.copy_(self._restored(multiply(left, right, part)))

    # --- the end ----------------------------------------------------------------------------------

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """Gradients in their parameters' dtypes, and the three factors that they still lack."""
        factors = torch.ones(3, dtype=torch.float64, device=self.problem.device)
        rows = self.problem.rows
        if self.hidden is not None and rows:
            total, live = self._hidden_sum, self.problem.live
            if total is None or live is None or self.plan.gradient_over == "tokens":
                self._store(self.hidden, self.hidden if total is None else total, factors[0])
            else:
                _put_rows(self.hidden, live, self._restored(total))
        if self.weight is not None and rows and self._weight_started:
            weight = self.weight[: self.problem.recipe.vocab]
            total = weight if self._weight_sum is None else self._weight_sum
            self._store(weight, total, factors[1])
        bias = None
        if self.bias is not None:
            assert self.problem.bias_dtype is not None
            if (order := self.problem.order) is not None:
                self.bias[order] = self.bias[: order.shape[0]].clone()
            bias = torch.empty_like(self.bias, dtype=self.problem.bias_dtype)
            self._store(bias, self.bias, factors[2])
        return self.hidden, self.weight, bias, factors

    def _restored(self, total: Tensor) -> Tensor:
        """A sum of products, in place without the power of two that was put into them."""
        return total if self._inverse is None else total.mul_(self._inverse)

    def _store(self, target: Tensor, total: Tensor, factor: Tensor) -> None:
        """Copy a sum to its final dtype, float16 times a power of two; note what is lacking."""
        if self.early and target.dtype == torch.float16 and total.numel():
            power = _power(total, 14)
            total.mul_(power)
            factor.div_(power)
            if self._inverse is not None:
                factor.mul_(self._inverse)
        else:
            self._restored(total)
        if target is not total:
            target.copy_(total)


def _put_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """Rows of another dtype at their places in a matrix."""
    for a, b in pieces(rows):
        target.index_copy_(0, index[a:b], rows[a:b].to(target.dtype))


def _steps(runs: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    for start, stop in runs:
        for a in range(start, stop, size):
            yield a, min(a + size, stop)


def _power(x: Tensor, exponent: int) -> Tensor:
    """The power of two that brings the largest magnitude to [2^(exponent - 1), 2^exponent), 0-d.

    1 where there is none: of zeros, infinities or NaN. It stays on its device.
    """
    low, high = torch.aminmax(x)
    largest = torch.maximum(-low, high).double()
    found = exponent - torch.frexp(largest).exponent
    found = torch.where((largest > 0) & largest.isfinite(), found.clamp(-126, 126), 0)
    # Put together bit by bit: a device's power function may be off by a rounding.
    return ((found.long() + 1023) << 52).view(torch.float64)
