"""Where rows lie: against pages that may not be touched, and further apart than 2^31 entries.

As a script, the first of these on every instruction set that the machine has.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import row_pass_harness
import torch
from row_pass_harness import DTYPES, HEADS, C, State, Stream, Terms, make_streams, run_gradient
from torch import Tensor

# one entry; less than a vector; odd; a tile and a rest; rows enough for a walk
SHAPES = [(1, 1), (2, 17), (3, 507), (2, 4099), (33, 17), (33, 507)]
LEVELS = ["avx512", "avx2", "baseline"]
#: Memory is only counted where it is touched.
NO_RESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


def walled(values: Tensor, at_end: bool) -> Tensor:
    """The same between two pages that may not be touched, and right at one of them."""
    page, size = mmap.PAGESIZE, values.numel() * values.element_size()
    room = -(-size // page) * page
    start = page + (room - size if at_end else 0)
    memory = mmap.mmap(-1, room + 2 * page)
    placed = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=start)
    first = placed.data_ptr() - start
    for wall in (first, first + page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), page, 0) == 0
    return placed.view(values.shape).copy_(values)


def far_apart(values: Tensor) -> Tensor:
    """The same with over 2^31 entries between the first row and the last."""
    rows, cols = values.shape
    step = 2**31 // (rows - 1) + 7
    count = (rows - 1) * step + cols
    try:
        memory = mmap.mmap(-1, count * values.element_size(), NO_RESERVE)
    except OSError as error:
        pytest.skip(f"no room for an address space: {error}")
    flat = torch.frombuffer(memory, dtype=values.dtype)
    return flat.as_strided((rows, cols), (step, 1)).copy_(values)


def passes(streams: list[Stream], out: Tensor) -> list[Tensor]:
    """Statistics and gradient by the row passes, every term that streams so many can have."""
    (rows, cols), count = streams[0].logits.shape, len(streams)
    torch.manual_seed(rows + cols)
    state = State(streams, [(0, tuple(torch.randn(count).tolist()))], threads=1).add()
    ids = torch.stack([torch.randperm(cols)[:5].sort().values for _ in range(rows)])
    terms = Terms(
        *(torch.randn(rows), torch.randn(rows), [torch.randn(rows) for _ in streams]),
        [None, *(torch.randn(rows) for _ in streams[1:])],
        *(ids, torch.randn(ids.shape), ids, torch.randn(rows), torch.zeros(rows)),
    )
    peaks = torch.zeros(-(-cols // 128))
    run_gradient(
        *(streams, state.maxima, state.sums, terms, out, 0, 128, peaks),
        threads=1,
    )
    return [*state.everything, out.clone(), peaks]


def walk(streams: list[Stream], out: Tensor) -> list[Tensor]:
    """A walk with a divergence of the first two streams, which overwrites the second's logits."""
    (rows, cols), number = out.shape, torch.float64
    state = State(streams)
    value, slope, weight = torch.ones(3, rows, dtype=number).cumsum(0) - 1
    terms = C.GradientTerms()
    terms.divergence, terms.divergence_weight = ("jsd", 0.5, 1), weight.data_ptr()
    terms.divergence_slope = slope.data_ptr()
    C.row_walk(
        *(state.dtype, [s.packed() for s in streams], rows, cols),
        *([m.data_ptr() for m in state.maxima], [s.data_ptr() for s in state.sums], [], []),
        *(value.data_ptr(), out.data_ptr(), out.stride(0), terms, 0, 0, 1),
    )
    return [state.maxima, state.sums, value, slope, out.clone()]


def placed(streams: list[Stream], place: Callable[[Tensor], Tensor]) -> tuple[list[Stream], Tensor]:
    """Streams and an output that lie where ``place`` puts them."""
    moved = [Stream(place(s.logits), s.bias, s.scale, s.softcap, s.temperature) for s in streams]
    return moved, place(torch.zeros(streams[0].logits.shape, dtype=streams[0].logits.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_further_apart_than_an_int_counts(dtype: torch.dtype) -> None:
    check_far_apart(dtype)
    streams = make_streams(2, 33, 77, dtype, {})
    wanted = walk(*placed(streams, torch.clone))
    for found, value in zip(walk(*placed(streams, far_apart)), wanted, strict=True):
        torch.testing.assert_close(found, value)  # as much as that from what is kept of a row


def check_far_apart(dtype: torch.dtype) -> None:
    streams = make_streams(2, 3, 77, dtype, HEADS["all"])
    wanted = passes(*placed(streams, torch.clone))
    for found, value in zip(passes(*placed(streams, far_apart)), wanted, strict=True):
        # Sums depend a little on where vectors begin; other rows' numbers would be far off.
        torch.testing.assert_close(found, value, rtol=0.02, atol=1e-3)


def test_nothing_beyond_the_rows_is_touched_on_any_instruction_set() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "baseline"


def touch_rows() -> None:
    """All of the passes next to walls; a wrong access ends the process."""
    for dtype, shape, at_end in itertools.product(DTYPES, SHAPES, (False, True)):

        def place(values: Tensor, at_end: bool = at_end) -> Tensor:
            return walled(values, at_end)

        for count, head in itertools.product((1, 2, 3), ("plain", "all")):
            streams = make_streams(count, *shape, dtype, HEADS[head])
            for stream in streams:
                stream.bias = None if stream.bias is None else place(stream.bias)
            passes(*placed(streams, place))
            if count == 2:
                walk(*placed(streams, place))


def main() -> int:
    """A process for each level: it is chosen at the first use."""
    for level in LEVELS:
        child = os.fork()
        if child == 0:
            os.environ["PAD_KERNELS_SIMD"] = level
            torch.set_num_threads(1)
            touch_rows()
            print(row_pass_harness.C.simd_level(), flush=True)
            os._exit(0)
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            print(f"{level}: {code}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
