"""Kernels compiled ahead of time, without a GPU, and what their machine code shows.

A launch is described by the arguments it would get; tensors may lie on device "meta".
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

#: Compute capabilities that the kernels are checked for: Ampere, Hopper, Blackwell.
CAPABILITIES = (80, 90, 100)
#: Most shared memory of one program, bytes.
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel.

    Attributes:
        registers: of one thread.
        stack: bytes of local memory of one thread, spilled registers included.
        shared: bytes of shared memory of one program.
        scratch: bytes of global memory that a launch would have to be given besides.
        sass: the instructions as text.
    """

    registers: int
    stack: int
    shared: int
    scratch: int
    sass: str

    def count(self, instruction: str) -> int:
        """How many instructions match a regular expression: opcode and modifiers."""
        return len(re.findall(rf"(?<![\w.]){instruction}(?![\w])", self.sass))

    @property
    def local_accesses(self) -> int:
        """Loads from and stores to local memory."""
        return self.count(r"LDL[.\w]*") + self.count(r"STL[.\w]*")


@dataclass(frozen=True)
class _Absent:
    """Triton's driver of a device that is not there: all that it asks before it runs a kernel."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Whose compiled kernels are kept apart from those of other devices."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    capability: int,
    **options: Any,
) -> Cubin:
    """Compile a kernel as a launch with these arguments does, by Triton's own launcher.

    Args:
        kernel: a ``@triton.jit`` function.
        arguments: run-time arguments by name: tensors, numbers, None, or tuples of them.
        constants: ``tl.constexpr`` arguments by name.
        capability: compute capability, 90 for sm_90.
        options: num_warps, num_stages, enable_fp_fusion and the like.
    """
    before = driver._active
    driver.set_active(_Absent(capability))
    try:
        compiled = kernel.warmup(**arguments, **constants, **options, grid=(1,))
    finally:
        driver.set_active(before)
    metadata = compiled.metadata
    scratch = int(metadata.global_scratch_size) + int(metadata.profile_scratch_size)
    return _read(compiled.asm["cubin"], int(metadata.shared), scratch)


def _read(cubin: bytes, shared: int, scratch: int) -> Cubin:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True)
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout
    return Cubin(int(found[1]), int(found[2]), shared, scratch, sass.stdout)
