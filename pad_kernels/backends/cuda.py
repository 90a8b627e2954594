"""Row passes in CUDA C++, on an NVIDIA GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch

from pad_kernels.backends import registry, streams
from pad_kernels.backends.native import NativeBackend
from pad_kernels.engine.recipe import Recipe


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
        return registry.cuda()

    def running(self, device: torch.device) -> AbstractContextManager[int]:
        return streams.current_stream(device)

    def refuses(self, recipe: Recipe, device: torch.device) -> str | None:
        return super().refuses(recipe, device) or registry.cuda_error(device.index or 0) or None
