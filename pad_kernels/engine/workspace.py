"""The one place that memory comes from, accounted for: tests hold plans to their word."""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor


class Account:
    """Bytes of workspace in use now, and the most there has been."""

    def __init__(self) -> None:
        self.current = 0
        self.high_water = 0
        #: Fill workspace with NaN, so that a test sees whatever is read before it is written.
        self.poison = False

    def reset(self) -> None:
        """Forget the high-water mark."""
        self.high_water = self.current

    def add(self, nbytes: int) -> None:
        """Count bytes taken (or, if negative, given back)."""
        self.current += nbytes
        self.high_water = max(self.high_water, self.current)

    @contextmanager
    def holding(self, tensor: Tensor) -> Iterator[None]:
        """Count a tensor that outlives the pass, such as kept logits, while a pass runs."""
        nbytes = tensor.numel() * tensor.element_size()
        self.add(nbytes)
        try:
            yield
        finally:
            self.add(-nbytes)


account = Account()


@dataclass(eq=False)
class _Block:
    """Some CPU memory, and the count of requests when it was last used."""

    memory: Tensor  # (bytes / 8,), float64
    used: int = 0


class _Pool:
    """CPU memory that is kept from one op to the next, so that its pages stay mapped.

    The C library gives every large tensor fresh pages and takes them back with it. Faulting in
    96 MiB inside a matrix product costs more than a bfloat16 product that fills them. What lies
    idle here and what workspaces hold never exceed the limit of the last op together.
    """

    #: Smaller tensors keep their pages without help.
    LEAST = 4 << 20
    #: Sizes are whole multiples of this, so that lengths that differ a little share a block.
    STEP = 2 << 20
    #: Requests that a block may miss before it is let go.
    PATIENCE = 64

    def __init__(self) -> None:
        # Reentrant: a garbage collection in the middle of a request may give a block back.
        self._lock = threading.RLock()
        self._idle: list[_Block] = []
        self._requests = self._lent = self._limit = 0

    def take(
        self, nbytes: int, limit: int, *, workspace: bool, brief: bool
    ) -> torch.UntypedStorage | None:
        """At least ``nbytes``; None if it is too little or too much to be kept.

        The memory comes back by itself when no tensor uses the storage any more.

        Args:
            nbytes: how much.
            limit: of the op, in bytes.
            workspace: it counts towards the limit while it is out, as gradients do not.
            brief: it comes back within the op, so that a block of any larger size will do.
        """
        size = -(-nbytes // self.STEP) * self.STEP
        if nbytes < self.LEAST or size > limit:
            return None
        with self._lock:
            self._requests, self._limit = self._requests + 1, limit
            most = limit if brief else size * 5 // 4
            fitting = [b for b in self._idle if size <= b.memory.nbytes <= most]
            block = min(fitting, key=lambda b: b.memory.nbytes, default=None)
            if block is not None:
                self._idle.remove(block)
            held = size if block is None else block.memory.nbytes
            held = held if workspace else 0
            self._trim(limit - self._lent - held)
            if block is None:
                # Outside inference mode, or no later op could write to it.
                with torch.inference_mode(False):
                    block = _Block(torch.empty(size // 8, dtype=torch.float64))
            self._lent += held
        view = (ctypes.c_char * block.memory.nbytes).from_address(block.memory.data_ptr())
        weakref.finalize(view, self._give, block, held).atexit = False
        return torch.frombuffer(view, dtype=torch.float64).untyped_storage()

    def _give(self, block: _Block, held: int) -> None:
        with self._lock:
            self._lent -= held
            block.used = self._requests
            idle = sum(b.memory.nbytes for b in self._idle)
            # The newcomer goes if there is no room: what came first is what the next step asks
            # for first.
            if idle + block.memory.nbytes <= self._limit - self._lent:
                self._idle.append(block)

    def _trim(self, room: int) -> None:
        """Let go of what nobody asked for in a long time, and of the oldest beyond ``room``."""
        latest = self._requests - self.PATIENCE
        self._idle = [b for b in self._idle if b.used >= latest]
        while sum(b.memory.nbytes for b in self._idle) > max(room, 0) and self._idle:
            self._idle.remove(min(self._idle, key=lambda b: b.used))


_pool = _Pool()
_ALIGNMENT = 128
_ROOM = 32 * _ALIGNMENT


def empty(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    limit: int = 0,
    workspace: bool = False,
    brief: bool = False,
) -> Tensor:
    """Uninitialised memory; full of NaN where a test asks for it.

    ``limit`` is the op's workspace limit in bytes, ``workspace`` whether this is part of it,
    ``brief`` whether it is given back before the op ends.
    """
    storage = None
    if device.type == "cpu":
        nbytes = math.prod(shape) * dtype.itemsize
        storage = _pool.take(nbytes, limit, workspace=workspace, brief=brief)
    if storage is None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
    else:
        # Not a view of a larger tensor: the caller's gradients come from here too.
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        tensor = torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)
    return tensor.fill_(math.nan) if account.poison and dtype.is_floating_point else tensor


class Workspace:
    """Buffers of one pass over the rows; all are given back together when the pass ends.

    Args:
        device: where the buffers lie.
        wanted: bytes the pass will need at most; 0 if unknown or too little to keep.
        limit: bytes that the op may use.
    """

    def __init__(self, device: torch.device, wanted: int = 0, limit: int = 0) -> None:
        # With room for the alignment of every buffer.
        self.device, self._wanted = device, wanted and wanted + _ROOM
        # Whoever allows exactly what is wanted does not mean to forbid that room.
        self._limit = max(limit, self._wanted + _Pool.STEP)
        self._bytes = self._offset = 0
        self._slab: Tensor | None = None

    def __enter__(self) -> Workspace:
        if self.device.type == "cpu" and self._wanted:
            words = -(-self._wanted // 8)
            self._slab = empty(
                (words,), torch.float64, self.device, limit=self._limit, workspace=True, brief=True
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        account.add(-self._bytes)
        self._slab = None

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer that counts until the pass ends."""
        nbytes = math.prod(shape) * dtype.itemsize
        self._bytes += nbytes
        account.add(nbytes)
        start, self._offset = self._offset, self._offset + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._slab is None or self._offset > self._slab.nbytes:
            return empty(shape, dtype, self.device)
        flat = self._slab[start // 8 : self._offset // 8].view(dtype)
        buffer = flat[: math.prod(shape)].view(shape)
        return buffer.fill_(math.nan) if account.poison and dtype.is_floating_point else buffer
