"""What a planner has to know of a device: memory, rates, and what one block costs besides."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Rates to compare plans with, and to predict times from; only their ratios decide a plan.

    Args:
        type: "cpu" or "cuda".
        memory: total bytes; 0 for a CPU, whose budget is fixed.
        flops: of a large matrix product a second: float64, float32 (without TF32), half
            precision.
        bandwidth: bytes of memory traffic a second.
        block_seconds: Python, dispatch and launches for one block.
    """

    type: str
    memory: int
    flops: tuple[float, float, float]
    bandwidth: float
    block_seconds: float

    def rate(self, dtype: torch.dtype) -> float:
        """Flops a second of products of this dtype."""
        known = (torch.float64, torch.float32, torch.bfloat16)
        return self.flops[known.index(torch.bfloat16 if dtype == torch.float16 else dtype)]


_GIB = 1 << 30
#: The CPU's are measured, on two cores of an AVX-512 server with AMX. A GPU's are its data sheet's
#: dense peaks times 0.75 for products and 0.85 for memory: what well-kept libraries reach.
DEVICES = {
    "cpu": Device("cpu", 0, (1.2e11, 2.4e11, 9e11), 2e10, 3e-4),
    "a100": Device("cuda", 80 * _GIB, (1.5e13, 1.5e13, 2.3e14), 1.7e12, 4e-5),
    "rtx4090": Device("cuda", 24 * _GIB, (1.0e12, 6.2e13, 1.2e14), 8.6e11, 4e-5),
    "h100": Device("cuda", 80 * _GIB, (5.0e13, 5.0e13, 7.4e14), 2.8e12, 4e-5),
    "h200": Device("cuda", 141 * _GIB, (5.0e13, 5.0e13, 7.4e14), 4.1e12, 4e-5),
    "b200": Device("cuda", 180 * _GIB, (3.0e13, 6.0e13, 1.7e15), 6.8e12, 4e-5),
}
#: Compute capability -> the entry that stands for its generation.
_GENERATIONS = {(8, 0): "a100", (8, 6): "rtx4090", (8, 9): "rtx4090", (9, 0): "h100"}


@functools.cache
def generation(device: torch.device) -> str:
    """The entry of DEVICES whose rates a device is planned with."""
    if device.type != "cuda":
        return "cpu"
    found = torch.cuda.get_device_properties(device)
    fallback = "b200" if found.major > 9 else "a100"
    name = _GENERATIONS.get((found.major, found.minor), fallback)
    return "h200" if name == "h100" and found.total_memory > 100 * _GIB else name


@functools.cache
def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, in use or not; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)
