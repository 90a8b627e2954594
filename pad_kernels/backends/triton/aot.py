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

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Compute capabilities that the kernels are checked for: Ampere, Hopper, Blackwell.
CAPABILITIES = (80, 90, 100)
#: Most shared memory of one program, bytes.
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_Path = tuple[int, ...]


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel.

    Attributes:
        registers: of one thread.
        stack: bytes of local memory of one thread, spilled registers included.
        shared: bytes of shared memory of one program.
        sass: the instructions as text.
    """

    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        """How many instructions match a regular expression such as ``r"LDG\\.E\\.128"``."""
        return len(re.findall(rf"(?<![\w.]){instruction}(?![\w])", self.sass))

    @property
    def local_accesses(self) -> int:
        """Loads from and stores to local memory."""
        return self.count(r"LDL[.\w]*") + self.count(r"STL[.\w]*")


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    capability: int,
    **options: Any,
) -> Cubin:
    """Compile a kernel as a launch with these arguments would.

    Args:
        kernel: a ``@triton.jit`` function.
        arguments: run-time arguments by name: tensors, numbers, None, or tuples of them.
        constants: ``tl.constexpr`` arguments by name.
        capability: compute capability, 90 for sm_90.
        options: num_warps, num_stages, enable_fp_fusion and the like.
    """
    signature: dict[str, Any] = {}
    known: dict[_Path, Any] = {}
    attributes: dict[_Path, list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], known[(i,)] = "constexpr", constants[name]
        elif kernel.params[i].do_not_specialize:
            signature[name] = _type_of(arguments[name], (i,), {}, {}, plain=True)
        else:
            signature[name] = _type_of(arguments[name], (i,), known, attributes)
    source = ASTSource(kernel, signature, known, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    return _read(compiled.asm["cubin"], int(compiled.metadata.shared))


def _type_of(
    value: Any,
    path: _Path,
    known: dict[_Path, Any],
    attributes: dict[_Path, list[list[Any]]],
    *,
    plain: bool = False,
) -> Any:
    """The type of a run-time argument; notes what a launch would specialise on, unless plain."""
    if isinstance(value, tuple):
        return tuple(_type_of(x, (*path, i), known, attributes) for i, x in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1 and not plain):
        known[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        aligned = value.device.type == "meta" or value.data_ptr() % 16 == 0
        kind = "*" + _TYPES[value.dtype]
    elif isinstance(value, int):
        aligned, kind = value % 16 == 0, "i32" if -(2**31) <= value < 2**31 else "i64"
    else:
        aligned, kind = False, "fp32"
    if aligned:
        attributes[path] = [["tt.divisibility", 16]]
    return kind


def _read(cubin: bytes, shared: int) -> Cubin:
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
    return Cubin(int(found[1]), int(found[2]), shared, sass.stdout)
