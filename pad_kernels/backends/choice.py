"""The choice between backends: which are there, which can do an op, which one does."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pad_kernels._checks import fail_value
from pad_kernels.backends.base import Backend, GatheringBackend
from pad_kernels.backends.registry import cuda_error, native_error, triton_error
from pad_kernels.engine.recipe import Recipe


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend of that name."""
    if name == "cpp":
        from pad_kernels.backends.cpp import CppBackend

        return CppBackend()
    if name == "cuda":
        from pad_kernels.backends.cuda import CudaBackend

        return CudaBackend()
    if name == "triton":
        from pad_kernels.backends.triton.backend import TritonBackend

        return TritonBackend()
    from pad_kernels.backends.torch_blocked import TorchBackend

    return TorchBackend()


def available_backends() -> dict[str, str]:
    """Every backend's name, with "available" or the reason why it is not.

    Example:
        >>> import pad_kernels as pk
        >>> pk.available_backends()["torch_blocked"]
        'available'
    """
    return {
        "reference": "available",
        "torch_blocked": "available",
        "cpp": native_error() or "available",
        "triton": triton_error() or "available",
        "cuda": cuda_error() or "available",
    }


#: The backends to try on a type of device, the first that can is taken; torch_blocked always can.
#: On a GPU Triton comes first because it also has fused statistics; where the row passes of CUDA
#: are faster is not measured.
PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}


def resolve_backend(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with its backend named: a named one never falls back, else the first that can."""
    name = recipe.request.backend
    if name in ("reference", "torch_blocked"):
        return recipe
    if name:
        if reason := refusal(name, recipe, device):
            fail_value("plan", "a backend that can do this", f"{name!r}, which cannot: {reason}")
        return recipe.on(name)
    able = (n for n in PREFERRED.get(device.type, ()) if refusal(n, recipe, device) is None)
    return recipe.on(next(able, "torch_blocked"))


def refusal(name: str, recipe: Recipe, device: torch.device) -> str | None:
    """Why the backend of that name cannot do the recipe on that device; None if it can."""
    if not _loads(name):
        return triton_error()
    return get_backend(name).refuses(recipe, device)


def gathering_backend(name: str, hidden: Tensor) -> GatheringBackend:
    """Who gathers given tokens' rows of a weight: the named backend, or the first that can.

    Args:
        name: the one that the caller named; empty for any. torch_blocked does what it cannot.
        hidden: [N, H].
    """
    names = (name,) if name else PREFERRED.get(hidden.device.type, ())
    there = (get_backend(n) for n in (*names, "torch_blocked") if _loads(n))
    return next(b for b in there if isinstance(b, GatheringBackend) and b.gathers(hidden))


def _loads(name: str) -> bool:
    """Whether the backend can be asked at all: its module may import what is not there."""
    return name != "triton" or not triton_error()
