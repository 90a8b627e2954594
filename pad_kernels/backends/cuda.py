"""Row passes in CUDA C++, on an NVIDIA GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from pad_kernels.backends.native import NativeBackend
from pad_kernels.backends.registry import cuda, cuda_error
from pad_kernels.engine.recipe import Recipe


@contextlib.contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """The device's current stream, as a number, while the device is the current one."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


class CudaBackend(NativeBackend):
    """The row passes of ``csrc/cuda/``."""

    devices: ClassVar = ("cuda",)
    dtypes: ClassVar = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    place = "stream"

    def module(self) -> Any:
        return cuda()

    def running(self, device: torch.device) -> contextlib.AbstractContextManager[int]:
        return current_stream(device)

    def refuses(self, recipe: Recipe, device: torch.device) -> str | None:
        return super().refuses(recipe, device) or cuda_error(device.index or 0) or None
