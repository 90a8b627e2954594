"""The one place that workspace comes from, accounted for: tests hold plans to their word."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; full of NaN where a test asks for it."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    return tensor.fill_(math.nan) if account.poison and dtype.is_floating_point else tensor


class _Slab:
    """One CPU buffer that is kept from one pass to the next, so that its pages stay mapped.

    Faulting in a fresh 100 MiB buffer takes longer than a bfloat16 row pass over it. The slab is
    never larger than the workspace that the ops were allowed, and one pass at a time uses it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: Tensor | None = None

    def acquire(self, wanted: int, limit: int) -> Tensor | None:
        """At least ``wanted`` and at most ``limit`` bytes; None if another pass has the slab."""
        if wanted > limit or not self._lock.acquire(blocking=False):
            return None
        if self._memory is None or not wanted <= self._memory.nbytes <= limit:
            self._memory = None  # before the new one is there
            # Outside inference mode, or no later pass could write to it.
            with torch.inference_mode(False):
                self._memory = empty((wanted // 8,), torch.float64, torch.device("cpu"))
        return self._memory

    def release(self) -> None:
        """Let the next pass have it."""
        self._lock.release()


_slab = _Slab()
_ALIGNMENT = 128
_ROOM = 32 * _ALIGNMENT


class Workspace:
    """Buffers of one pass over the rows; all are given back together when the pass ends.

    Args:
        device: where the buffers lie.
        wanted: bytes the pass will need at most; 0 if unknown or too little to keep.
        limit: bytes it may use: a larger slab is not kept.
    """

    def __init__(self, device: torch.device, wanted: int = 0, limit: int = 0) -> None:
        # Whole float64 numbers, with room for the alignment of every buffer.
        self.device, self._wanted = device, -(-(wanted and wanted + _ROOM) // 8) * 8
        self._limit = max(limit, self._wanted)
        self._bytes = self._offset = 0
        self._slab: Tensor | None = None

    def __enter__(self) -> Workspace:
        if self.device.type == "cpu" and self._wanted:
            self._slab = _slab.acquire(self._wanted, self._limit)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        account.add(-self._bytes)
        if self._slab is not None:
            self._slab = None
            _slab.release()

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
