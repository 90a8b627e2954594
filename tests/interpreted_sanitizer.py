"""Each thing that triton_sanitizer.py looks for is found."""

import contextlib
from collections.abc import Callable
from typing import Any

import triton_interpreter  # noqa: F401  (first: it switches the interpreter on)

# isort: split
import pytest
import torch
import triton
import triton.language as tl
import triton_sanitizer
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 4


@triton.jit
def copy(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < count, other=0.0), at < count)


@triton.jit
def move(x, y, source, target, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.load(target + at), tl.load(x + tl.load(source + at)))


@triton.jit
def store_then_load(x, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, at.to(tl.float32))
    tl.store(y + at, tl.load(x + at))


@triton.jit
def tickets(counter, y, READ: tl.constexpr):
    tl.store(y + tl.program_id(0), tl.atomic_add(counter, 1))
    if READ:
        tl.store(y + tl.program_id(0) + tl.num_programs(0), tl.load(counter))


@triton.jit
def without_other(x, y, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < count))


@triton.jit
def far(x, y, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y + tl.program_id(0), tl.load(x + row * stride))


@triton.jit
def hinted(y, start, step, KIND: tl.constexpr, VALUE: tl.constexpr):
    at = start + tl.arange(0, 8) // 4 * 4 + tl.arange(0, 8) % 4 * step
    if KIND == "multiple":
        at = tl.multiple_of(at, VALUE)
    if KIND == "contiguous":
        at = tl.max_contiguous(at, VALUE)
    if KIND == "constant":
        at = tl.max_constancy(at, VALUE)
    if KIND == "assume":
        tl.assume(start == VALUE)
    tl.store(y, tl.max(at, 0))


@triton.jit
def copy_box(box, y, ROWS: tl.constexpr, COLS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(y + at, box.load([0, 0]))


def fault(match: str) -> Any:
    """Found in a kernel or before it, after it, or by Triton itself."""
    return pytest.raises((triton.runtime.errors.InterpreterError, AssertionError), match=match)


def test_what_is_right_passes() -> None:
    x, y = torch.randn(4, 9)[:, :7], torch.full((7,), torch.nan)
    copy[(2,)](x[3], y, 7, BLOCK=BLOCK)
    assert torch.equal(x[3], y)
    order = torch.randperm(8)
    z = torch.randn(8)
    expected = 0 + z[order]
    move[(2,)](z, y := torch.empty(8), order, torch.arange(8), BLOCK=BLOCK)
    assert torch.equal(y, expected)
    move[(2,)](z, z, order, order, BLOCK=BLOCK)  # in place, each entry by one program
    move[(1,)](z, z, torch.arange(4), torch.arange(4), BLOCK=BLOCK)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            lambda z: (z[:7], z[8:], 8),
            r"load outside float32 \(7,\) by \(1,\): 1 entries, one at 7",
        ),
        (lambda z: (z[:8], z[8:15], 8), "store outside"),
        (lambda z: (z.view(3, 8)[:, :5], torch.zeros(8), 6), "load outside"),  # a gap
        (lambda z: (z.view(3, 8)[:, 1:3].t(), torch.zeros(8), 3), "load outside"),
        (lambda z: (z[:0], torch.zeros(8), 1), "which is empty"),
    ],
)
def test_out_of_bounds(arguments: Callable[[Tensor], tuple[Any, ...]], match: str) -> None:
    """By one, into a neighbour of the same storage, or into the gaps of a view."""
    with fault(match):
        copy[(2,)](*arguments(torch.zeros(24)), BLOCK=BLOCK)


@pytest.mark.parametrize(
    ("shared", "source", "target", "match"),
    [
        (False, [*range(8)], [0, 1, 2, 3, 3, 5, 6, 7], "store by program . of entry 3"),
        (False, [*range(8)], [0, 1, 2, 2, 4, 5, 6, 7], "several values"),
        (True, [0, 1, 2, 4, 4, 5, 6, 7], [*range(8)], "entry 4"),  # another's, loaded
        (True, [0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 2, 6, 8, 9, 10, 11], "entry 6"),  # stored
    ],
)
def test_races(shared: bool, source: list[int], target: list[int], match: str) -> None:
    x = torch.arange(12.0)
    y = x if shared else x.clone()
    with fault(match):
        move[(2,)](x, y, torch.tensor(source), torch.tensor(target), BLOCK=BLOCK)


def test_what_was_stored_is_not_loaded_without_a_barrier() -> None:
    with fault("load by program . of entry"):
        store_then_load[(2,)](torch.zeros(8), torch.zeros(8), BLOCK=BLOCK)


def test_atomics_and_order() -> None:
    counter, y = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    tickets[(32,)](counter, y, READ=False)
    assert int(counter) == 32
    assert sorted(y[:32].tolist()) == [*range(32)] != y[:32].tolist()
    with fault("load by program .* stored by -2"):
        tickets[(32,)](counter, y, READ=True)
    with triton_sanitizer.running([31]):
        tickets[(32,)](counter.fill_(7), y.zero_(), READ=False)
    assert y[31] == 7 and y.count_nonzero() == 1


def test_what_nobody_wrote() -> None:
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.int64) == 2**63 - 1).all()
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        y = torch.zeros(4, dtype=dtype)
        without_other[(1,)](torch.ones(3, dtype=dtype), y, 3, BLOCK=BLOCK)
        assert y[:3].eq(1).all() and (y[3].isnan() or y[3] == -1)


def test_integers_overflow() -> None:
    x = torch.zeros(1).expand(4)
    far[(1,)](x, torch.zeros(4), 2**30, WIDE=False)
    for wide, match in ((False, "multiply overflows int32"), (True, "load outside")):
        with triton_sanitizer.running([3]), fault(match):
            far[(4,)](x, torch.zeros(4), 2**30, WIDE=wide)


@pytest.mark.parametrize(
    ("kind", "start", "step", "value", "true"),
    [
        ("multiple", 8, 1, 4, True),
        ("multiple", 8, 4, 4, True),
        ("multiple", 9, 1, 4, False),
        ("multiple", 8, 2, 4, False),
        ("contiguous", 3, 1, 8, True),
        ("contiguous", 3, 2, 4, False),
        ("constant", 3, 0, 4, True),
        ("constant", 3, 0, 8, False),
        ("assume", 3, 0, 3, True),
        ("assume", 3, 0, 4, False),
    ],
)
def test_hints(kind: str, start: int, step: int, value: int, true: bool) -> None:
    with contextlib.nullcontext() if true else fault("is not true|Assume failed"):
        hinted[(1,)](torch.zeros(1, dtype=torch.int32), start, step, KIND=kind, VALUE=value)


@pytest.mark.parametrize(
    ("start", "width", "box", "match"),
    [
        (0, 32, (4, 8), None),
        (1, 32, (4, 8), "16-byte aligned"),
        (0, 33, (4, 8), "16-byte aligned"),
        (0, 32, (4, 4), "at least 16 bytes"),
        (0, 32, (512, 8), "for the copy engine"),
    ],
)
def test_descriptors(start: int, width: int, box: tuple[int, int], match: str | None) -> None:
    """A base, a stride, a box that the copy engine cannot take; Triton looks at most of it."""
    x = torch.randn(start + 4 * width).bfloat16()[start:].view(4, width)
    y = torch.zeros(box, dtype=torch.bfloat16)
    errors = (triton.runtime.errors.InterpreterError, AssertionError, ValueError)
    with pytest.raises(errors, match=match) if match else contextlib.nullcontext():
        described = TensorDescriptor(x, list(x.shape), list(x.stride()), list(box))
        copy_box[(1,)](described, y, ROWS=box[0], COLS=box[1])
        assert torch.equal(y, x[:, :8])


def test_grids() -> None:
    with fault("a grid of"):
        copy[(1, 65536)](torch.zeros(4), torch.zeros(4), 4, BLOCK=BLOCK)
