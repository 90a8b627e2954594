"""The Triton backend without a GPU: not imported, refused by name."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import pad_kernels as pk
from pad_kernels.backends import registry

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def _environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**kept, **more}


def test_nothing_imports_triton_unasked() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import pad_kernels as pk
pk.available_backends()
assert not any(name.split(".")[0] == "triton" for name in set(sys.modules) - before)
# torch may import it from now on, the kernels nobody.
pk.linear_logprob(torch.randn(3, 4), torch.randn(7, 4), torch.arange(3))
assert not any("pad_kernels.backends.triton" in name for name in sys.modules)
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_missing_for_a_reason() -> None:
    reason = pk.available_backends()["triton"]
    assert reason in ("triton is not installed", "torch finds no CUDA device"), reason
    with pytest.raises(ValueError, match="'triton', which cannot: t"):
        pk.linear_logprob(torch.randn(3, 4), torch.randn(7, 4), torch.arange(3), plan="triton")


def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(registry.importlib.metadata, "version", lambda name: "3.5.1")
    registry.triton_error.cache_clear()
    try:
        assert registry.triton_error() == "triton 3.5.1 is too old: 3.6 or later is needed"
    finally:
        registry.triton_error.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_triton
def test_a_cpu_tensor_is_refused_where_kernels_are_not_interpreted() -> None:
    code = """
import torch, pad_kernels as pk
from pad_kernels.backends import choice, registry
registry.triton_error = choice.triton_error = lambda: ""
from pad_kernels.backends.triton import backend
backend.triton_error = lambda: ""
x = torch.randn(3, 4)
try:
    pk.linear_logprob(x, x, torch.arange(3), plan="late:triton")
except ValueError as error:
    assert "'triton', which cannot: tensors are on cpu" in str(error), error
else:
    raise AssertionError("CPU tensors were accepted")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())
