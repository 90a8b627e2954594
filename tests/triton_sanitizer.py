"""What Triton's interpreter hides and a GPU does not, made an error.

The interpreter runs the programs of a grid one after the other, reads and writes wherever a pointer
leads, wraps integers silently and takes every hint for true. Once this is imported:

- Programs run in a shuffled order. An access stays inside the very view whose pointer it started
  from, gaps between its rows excluded but for padding to whole accesses.
- What a launch stores, it stores once and does not load afterwards, and what one program loads no
  other stores; atomics touch what nothing else touches. That holds within a program as well: its
  threads wait for each other only at a barrier, of which the kernels have none.
- One store has one value for an address; a masked load without ``other`` gives NaN, or -1.
- Integers of 32 bits and less do not overflow in sums, differences and products.
- Hints are true, grids and the copy engine's boxes are within the hardware's limits.
- ``torch.empty`` is full of NaN, or of the largest integer.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    InterpreterOptions,
    TensorDescHandle,
    TensorHandle,
)
from triton_accesses import Fault, Launch

#: Programs on each axis of a grid.
GRID_LIMITS = (2**31 - 1, 65535, 65535)
#: Entries on each axis of what the copy engine moves at once.
BOX_LIMIT = 256


_random = np.random.default_rng(0)
_chosen: Sequence[int] | None = None
# Of the launch under way: its accesses, its grid, and its programs in their order.
_launch, _dims, _order = Launch(""), (1, 1, 1), [0]


@contextlib.contextmanager
def running(programs: Sequence[int]) -> Iterator[None]:
    """Launches run these programs alone: of a grid too large for the interpreter."""
    global _chosen
    _chosen = programs
    try:
        yield
    finally:
        _chosen = None


def _around(owner: Any, *names: str) -> Callable[[Callable[..., Any]], None]:
    """Put a function in place of some others; it gets the original first."""

    def install(watch: Callable[..., Any]) -> None:
        for name in names:
            setattr(owner, name, functools.partialmethod(_pass_on, watch, getattr(owner, name)))

    return install


def _pass_on(self: Any, watch: Any, original: Any, *args: Any, **options: Any) -> Any:
    return watch(original, self, *args, **options)


# --- launches ---


@_around(GridExecutor, "__call__")
def _run(original: Any, self: GridExecutor, *args: Any, **options: Any) -> None:
    global _launch, _dims, _order
    _launch, _dims = Launch(self.fn.__name__), (*self.grid, *[1] * (3 - len(self.grid)))
    if any(n > limit for n, limit in zip(_dims, GRID_LIMITS, strict=True)):
        raise Fault(f"{_launch.kernel}: a grid of {_dims} programs")
    _order = _random.permutation(math.prod(_dims)) if _chosen is None else _chosen
    self.grid = (len(_order),)
    original(self, *args, **options)
    _launch.check_races()


@_around(InterpreterBuilder, "set_grid_dim")
def _set_grid_dim(original: Any, self: InterpreterBuilder, *_: int) -> None:
    original(self, *_dims)


@_around(InterpreterBuilder, "set_grid_idx")
def _set_grid_idx(original: Any, self: InterpreterBuilder, x: int, *_: int) -> None:
    _launch.program = int(_order[x])
    original(self, *(int(i) for i in np.unravel_index(_launch.program, _dims)))


# --- where pointers come from ---

_convert = interpreter._implicit_cvt


def _register(argument: Any) -> Any:
    found = _convert(argument)
    if isinstance(argument, Tensor):
        found.handle.attr["region"] = _launch.region(argument)
    return found


interpreter._implicit_cvt = _register

_POINTERS = ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "bitcast")


@_around(InterpreterBuilder, *(f"create_{name}" for name in _POINTERS))
def _keep_region(original: Any, self: InterpreterBuilder, *args: Any) -> TensorHandle:
    found = original(self, *args)
    for x in args:
        if isinstance(x, TensorHandle) and "region" in x.attr:
            found.attr["region"] = x.attr["region"]
    return found


@_around(TensorDescHandle, "materialize_pointers")
def _materialize(original: Any, self: TensorDescHandle, offsets: Any) -> Any:
    pointers, mask = original(self, offsets)
    pointers.attr["region"] = self.base.attr["region"]
    return pointers, mask


@_around(InterpreterBuilder, "create_make_tensor_descriptor")
def _describe(
    original: Any,
    self: InterpreterBuilder,
    base: Any,
    shape: Any,
    strides: Any,
    box: Any,
    *more: Any,
) -> TensorDescHandle:
    if any(n > BOX_LIMIT for n in box):
        raise Fault(f"a box of {box} entries for the copy engine")
    return original(self, base, shape, strides, box, *more)


# --- accesses ---


@_around(InterpreterBuilder, "create_masked_load")
def _load(
    original: Any,
    self: Any,
    pointer: TensorHandle,
    mask: Any,
    other: Any,
    *more: Any,
    **options: Any,
) -> TensorHandle:
    chosen = np.asarray(mask.data)
    _launch.touch("load", pointer, chosen)
    if other is None and not chosen.all():
        kind = pointer.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        bits = np.full((*chosen.shape, dtype.itemsize), 255, np.uint8)
        other = TensorHandle(bits.view(dtype)[..., 0], kind)
    return original(self, pointer, mask, other, *more, **options)


@_around(InterpreterBuilder, "create_masked_store")
def _store(
    original: Any, self: Any, pointer: TensorHandle, value: TensorHandle, mask: Any, *more: Any
) -> None:
    chosen = np.asarray(mask.data)
    _launch.touch("store", pointer, chosen)
    original(self, pointer, value, mask, *more)
    there = interpreter._interpreter.load(pointer.data, chosen, value.data, value.data.dtype)
    if there.tobytes() != value.data.tobytes():
        raise Fault("one store of several values to one address")


@_around(InterpreterBuilder, "create_atomic_rmw")
def _change(
    original: Any, self: Any, op: Any, pointer: TensorHandle, value: Any, mask: Any, *more: Any
) -> TensorHandle:
    _launch.touch("atomic", pointer, np.asarray(mask.data))
    return original(self, op, pointer, value, mask, *more)


# --- numbers ---


def _exact(
    op: np.ufunc, original: Any, self: Any, a: TensorHandle, b: TensorHandle
) -> TensorHandle:
    found = original(self, a, b)
    if a.data.dtype.kind in "iu" and a.data.dtype.itemsize < 8:
        wide = op(a.data.astype(np.int64), b.data.astype(np.int64))
        if not np.array_equal(wide, found.data):
            raise Fault(f"{op.__name__} overflows {found.dtype}: {wide.min()} to {wide.max()}")
    return found


for _name, _op in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    _around(InterpreterBuilder, f"create_{_name}")(functools.partial(_exact, _op))


@_around(TensorHandle, "set_attr")
def _hint(original: Any, self: TensorHandle, name: str, values: Sequence[int]) -> None:
    """``values``, one for each axis, must say something true of the entries."""
    for axis, n in enumerate(values):
        x = np.moveaxis(self.data, axis, -1)
        grown = np.diff(x, axis=-1)
        if name == "tt.divisibility":  # of where each run of consecutive entries starts
            first = np.concatenate((np.ones_like(x[..., :1], bool), grown != 1), -1)
            true = not (x[first] % n).any()
        else:
            inner = (np.arange(grown.shape[-1]) + 1) % n != 0  # within groups of n
            true = bool((grown[..., inner] == (name == "tt.contiguity")).all())
        if not true:
            raise Fault(f"{name} {values} is not true of {self.data}")
    original(self, name, values)


# It would compute every sum and product several times over and look at nothing.
interpreter.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
torch.use_deterministic_algorithms(True, warn_only=True)  # what fills torch.empty
