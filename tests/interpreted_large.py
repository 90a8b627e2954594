"""Matrices whose entries lie beyond 2^31 of each other.

Rows are 2^30 entries apart in memory that nobody has touched, so that the few pages in use are all
there is. ``triton_sanitizer.py`` sees integers overflow; results are those of ordinary matrices.
"""

import math
import mmap
import resource
import tempfile
from collections.abc import Iterator

import triton_interpreter  # noqa: F401  (first: it switches the interpreter on)

# isort: split
import interpreted_rows as row_passes
import pytest
import torch
import triton_sanitizer
from interpreted_fused import SMALL, make_streams, operands_of
from torch import Tensor

from pad_kernels.backends.base import GivenTokens, RawBlock
from pad_kernels.backends.choice import get_backend
from pad_kernels.backends.triton import fused, gather, passes, topk
from pad_kernels.backends.triton.fused_operands import Measured
from pad_kernels.backends.triton.live import LiveLaunches
from pad_kernels.backends.triton.tilings import LiveTiling
from pad_kernels.engine.problem import Stream
from pad_kernels.functionals.base import LogitGradient
from pad_kernels.functionals.statistics import Largest, Normalizer, Statistic, Total, empty_stats
from pad_kernels.heads import HeadOptions

pytestmark = pytest.mark.usefixtures("one_thread")

#: Entries between rows: a number of 32 bits, whose double is none. 16 divides it.
APART = 2**30 + 16


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # KiB


def untouched(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    with tempfile.TemporaryFile() as file:  # one without any blocks
        file.truncate(size * dtype.itemsize)
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=dtype)


def far(x: Tensor, axis: int = 0) -> Tensor:
    """The same matrix with rows, or columns, far apart."""
    strides = [1, 1]
    strides[axis] = APART
    size = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
    return untouched(size, x.dtype).as_strided(x.shape, strides).copy_(x)


def test_row_passes() -> None:
    problem, near, inputs = row_passes.block(
        3, 700, torch.bfloat16, row_passes.HEADS["capped"], biased=True
    )
    apart = {j: far(z) for j, z in near.items()}
    a, b = (row_passes.measured("triton", problem, z, inputs, [0, 700]) for z in (near, apart))
    assert all(torch.equal(a[s], b[s]) for s in row_passes.STATISTICS)
    curved = row_passes.Divergence("jsd", 0.3, 1)
    a, b = (row_passes.outcomes("triton", curved, problem, z, inputs) for z in (near, apart))
    assert torch.equal(a, b)
    stats = row_passes.measured("triton", problem, near, inputs, [0, 700])
    terms = LogitGradient(
        student=torch.randn(3), sparse=[(torch.randint(700, (3, 2)), torch.randn(3, 2))]
    )
    found = []
    for logits in (near, apart):
        out = far(torch.zeros(3, 700, dtype=torch.bfloat16))
        get_backend("triton").gradient(RawBlock(problem, stats, logits, 0), terms, out, None)
        found.append(out.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("tma", [False, True])
def test_fused(tma: bool) -> None:
    streams = make_streams((5, 4, (32, 48)), 2, torch.bfloat16)
    wanted: list[Statistic] = [Normalizer(0), Normalizer(1), Total()]
    measured = Measured.of(range(2), wanted)
    assert measured is not None
    terms = LogitGradient(student=torch.randn(5), probabilities={1: torch.randn(5)})
    found = []
    for move in (torch.clone, far):
        for s in streams:
            s.hidden, s.weight = move(s.hidden), move(s.weight)
        stats = empty_stats(wanted, 5, {}, torch.device("cpu"))
        partial = torch.empty(1, len(measured.slots), 5, dtype=torch.float64)
        out = move(torch.zeros(5, 4, dtype=torch.bfloat16))
        operands = operands_of(streams)
        for launch in (
            *fused.statistics_launches(measured, operands, SMALL, stats, partial, tma=tma),
            fused.gradient_launch(operands, [0, 1], SMALL, stats, terms, out, 0, None, tma=tma),
        ):
            launch.run()
        found.append((*(stats[s] for s in wanted), out.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_live_products() -> None:
    dz, peaks = torch.randn(4, 5).bfloat16(), torch.ones(1, 1)
    weight, hidden = torch.randn(5, 16).bfloat16(), torch.randn(4, 16).bfloat16()
    index, found = torch.tensor([3, 0, 4, 1, 2]), []
    for move in (torch.clone, far):
        live = LiveLaunches(move(dz), peaks, torch.zeros(1), 16)
        sums = move(torch.zeros(4, 16)), move(torch.zeros(5, 16))
        for launch in live.lists():
            launch.run()
        for add in (False, True):
            how = {"add": add, "tiling": LiveTiling(16, 16, 4, 3)}
            live.product(sums[0], move(weight), index, transposed=False, **how).run()
            live.product(sums[1], move(hidden), index, transposed=True, **how).run()
        found.append([x.clone() for x in sums])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("axis", [0, 1])
def test_given_tokens(axis: int) -> None:
    """A weight may be a transpose, of whose columns the stride is the vocabulary's size."""
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    ids, counted = torch.tensor([[0, 4], [3, 1], [2, 2], [4, 3]]), torch.ones(4, dtype=torch.bool)
    keys, order = ids.view(-1).sort(stable=True)
    found = []
    for move in (torch.clone, lambda x: far(x, axis)):
        h, w, z = move(hidden), move(weight), torch.empty(4, 2)
        given = GivenTokens(h, w, ids, counted)
        gather.gather_logits(given, z).run()
        d_hidden, d_weight = move(torch.zeros(4, 3)), move(torch.zeros(5, 3))
        gather.gather_hidden(given, z, d_hidden).run()
        gather.scatter_weight(z, h, keys, order, d_weight).run()
        found.append((z, d_hidden.clone(), d_weight.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_largest() -> None:
    """Of millions of rows: their ids lie k times as many numbers further."""
    raw, head = torch.randn(3, 70), HeadOptions()
    stream = Stream(torch.empty(0), torch.empty(0), None, head)
    found = []
    for move in (torch.clone, far):
        state = empty_stats([Largest(2)], 3, {}, torch.device("cpu"))[Largest(2)]
        state = move(state)
        topk.merge_largest(stream, move(raw), 0, state, tile=64).run()
        found.append(state.clone())
    assert torch.equal(*found)


def test_many_values() -> None:
    """The last program of 2^31 / 1024 and one."""
    values, head = untouched(2**31 + 3, torch.float32), HeadOptions(None, 2.0, 1.0)
    values[-3:] = torch.tensor([1.0, 2.0, 3.0])
    launch = passes.transform(head, values)
    with triton_sanitizer.running([math.prod(launch.grid) - 1]):
        launch.run()
    assert values[-3:].tolist() == [2.0, 4.0, 6.0]
