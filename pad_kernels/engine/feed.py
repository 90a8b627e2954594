"""Matrices on their way into products: as they lie, copied to fit, or sent over from the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: Entries that are gathered or cast at a time: what lies between two buffers is in no plan.
_PIECE = 1 << 20


def enters_product(weight: Tensor, gemm: torch.dtype) -> bool:
    """Whether a matrix product takes the weight [V, H] as it lies, without a copy."""
    if weight.dtype != gemm:
        return False
    rows, cols = weight.shape
    by_rows = weight.stride(1) == 1 and weight.stride(0) >= cols
    by_cols = weight.stride(0) == 1 and weight.stride(1) >= rows
    return by_rows or by_cols


def elsewhere(weight: Tensor, device: torch.device) -> bool:
    """Whether the weight must travel to the device of the products."""
    return weight.device != device


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks."""
    for start in range(0, total, max(size, 1)):
        yield start, min(start + max(size, 1), total)


def pieces(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows of a matrix, or entries of a vector, few enough to be copied."""
    return blocks(matrix.shape[0], _PIECE // max(matrix[:1].numel(), 1))


def copy_rows(
    weight: Tensor, start: int, stop: int, buffer: Tensor, order: Tensor | None = None
) -> Tensor:
    """The entries start to stop of a weight [V, H], copied to a buffer [rows, H].

    Args:
        order: which row of the weight each entry is; the weight then has the buffer's dtype.
    """
    target = buffer[: stop - start]
    if order is None:
        return target.copy_(weight[start:stop])
    return torch.index_select(weight, 0, order[start:stop], out=target)


def weight_chunks(
    weight: Tensor, start: int, stop: int, buffer: Tensor | None, order: Tensor | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """The entries start to stop of a weight [V, H], in pieces that products can take.

    Each piece is valid until the next one is asked for.

    Args:
        buffer: [rows, H] on the products' device and in their dtype; None if the weight enters a
            product as it lies.
        order: as for :func:`copy_rows`; such a weight is on the products' device.

    Yields:
        First entry, end, weight rows.
    """
    if buffer is None:
        yield start, stop, weight[start:stop]
    elif elsewhere(weight, buffer.device):
        yield from _sent(weight, start, stop, buffer)
    else:
        for a, b in blocks(stop - start, buffer.shape[0]):
            yield start + a, start + b, copy_rows(weight, start + a, start + b, buffer, order)


class _SideStream:
    """A CUDA stream beside the current one; from pinned memory its copies overlap the products.

    Nothing of it outlives its reader: events that wait for nobody, or for another thread, would
    let a product read what has not arrived.
    """

    def __init__(self, device: torch.device) -> None:
        # Of the tensors' device, which need not be the current one.
        self._products = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)  # out of torch's pool: nothing is created

    def send(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Start a copy, after every product that was asked for so far.

        What is returned lets every product from its call on wait for this copy.
        """
        self._copies.wait_stream(self._products)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            arrived = self._copies.record_event()
        return functools.partial(self._products.wait_event, arrived)


def _sent(
    weight: Tensor, start: int, stop: int, buffer: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """Pieces of half a buffer: one travels while a product reads the other."""
    lane = _SideStream(buffer.device)
    half = max(buffer.shape[0] // 2, 1)
    places = [buffer[:half], buffer[-half:]]
    spans = [(start + a, start + b) for a, b in blocks(stop - start, half)]

    def send(index: int) -> tuple[Tensor, Callable[[], None]]:
        a, b = spans[index]
        place = places[index % 2][: b - a]
        return place, lane.send(place, weight[a:b])

    # A buffer of one row has one place, which is free when its product has been asked for.
    ahead = buffer.shape[0] > 1
    coming = send(0) if spans else None
    try:
        for i, (a, b) in enumerate(spans):
            assert coming is not None
            piece, arrive = coming
            more = i + 1 < len(spans)
            if ahead and more:
                coming = send(i + 1)
            arrive()
            yield a, b, piece
            if not ahead and more:
                coming = send(i + 1)
    finally:
        # A reader that stops in between gives the buffer back: its next user must not be written
        # over by the copy that is still under way.
        if coming is not None:
            coming[1]()
