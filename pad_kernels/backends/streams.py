"""The stream that a kernel is launched on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """The device's current stream, as a number, while the device is the current one."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
