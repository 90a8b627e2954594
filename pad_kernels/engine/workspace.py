"""The one place that workspace comes from, accounted for: tests hold plans to their word."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from pad_kernels.backends.registry import native

_HUGE = 4 << 20


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


class Workspace:
    """Buffers of one pass over the rows; all are given back together when the pass ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bytes = 0

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        account.add(-self._bytes)
        self._bytes = 0

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer that counts until the pass ends."""
        tensor = empty(shape, dtype, self.device)
        nbytes = tensor.numel() * tensor.element_size()
        self._bytes += nbytes
        account.add(nbytes)
        return tensor
