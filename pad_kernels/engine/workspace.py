"""The one place that workspace comes from, accounted for: tests hold plans to their word."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from pad_kernels.backends.registry import native

#: Smaller buffers may come from the heap, where the advice costs more than it saves.
_HUGE = 40 << 20


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
    """Uninitialised memory; on Linux large CPU buffers are offered to huge pages.

    A gradient of a gigabyte is a quarter of a million page faults otherwise, more time than a
    matrix product at bfloat16 speed.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    module = native()
    nbytes = tensor.numel() * tensor.element_size()
    if module is not None and device.type == "cpu" and nbytes >= _HUGE:
        module.advise_huge_pages(tensor.data_ptr(), nbytes)
    if account.poison and dtype.is_floating_point:
        tensor.fill_(math.nan)
    return tensor


class _Slab:
    """One CPU buffer that is kept from one pass to the next, so that its pages stay mapped.

    Faulting in a fresh 100 MiB buffer takes longer than a bfloat16 row pass over it. The slab is
    never larger than the workspace that the ops were allowed, and one pass at a time uses it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: Tensor | None = None
        self._wanted = 0

    def acquire(self, limit: int) -> Tensor | None:
        """The slab, at most ``limit`` bytes; None if it is in use or was never asked for."""
        if not self._lock.acquire(blocking=False):
            return None
        if self._memory is not None and self._memory.nbytes > limit:
            self._memory = None
        if self._memory is None and 0 < self._wanted <= limit:
            # Outside inference mode, or no later pass could write to it.
            with torch.inference_mode(False):
                self._memory = empty((self._wanted // 8,), torch.float64, torch.device("cpu"))
        if self._memory is None:
            self._lock.release()
        return self._memory

    def release(self) -> None:
        """Let the next pass have it."""
        self._lock.release()

    def want(self, nbytes: int) -> None:
        """A pass took so much in all: next time have that at hand."""
        if self._memory is None or self._memory.nbytes < nbytes:
            self._memory, self._wanted = None, -(-nbytes // 8) * 8


_slab = _Slab()
_ALIGNMENT = 128


class Workspace:
    """Buffers of one pass over the rows; all are given back together when the pass ends.

    Args:
        device: where the buffers lie.
        limit: bytes the pass may use; decides what may be kept for the next one.
    """

    def __init__(self, device: torch.device, limit: int = 0) -> None:
        self.device, self._limit = device, limit
        self._bytes = self._offset = 0
        self._slab: Tensor | None = None

    def __enter__(self) -> Workspace:
        if self.device.type == "cpu":
            self._slab = _slab.acquire(self._limit)
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
        if self.device.type == "cpu" and self._offset <= self._limit:
            _slab.want(self._offset)

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
