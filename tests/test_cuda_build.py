"""What nvcc makes of csrc/cuda/, read without a GPU: machine code, a module without a driver.

``PAD_KERNELS_CUBINS=all`` compiles every source for every device (``make check-kernels``); by
default each source for one device, and each device with one stored type.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cuda_on_cpu
import pytest

import pad_kernels as pk
from pad_kernels.backends import registry

#: Bytes of shared memory that a block may have.
SHARED = {"80": 163 << 10, "90a": 227 << 10, "100": 227 << 10}
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on the path")
FLAGS = ["-std=c++17", "-O3", "-cubin", "--resource-usage"]
#: Kernels of every source: of a stored type 3 statistics, 4 outcomes and 7 gradients; a listwise
#: loss of each kind; rewards and their gradient; the head transform; one that is asked for only.
STORED = {"row_float32": 14, "row_bfloat16": 14, "row_float16": 14}
KERNELS = {**STORED, "listwise": 3, "rewards": 2, "row_pass": 1, "device": 1}
FEW = [
    *(("row_float32", "80"), ("row_bfloat16", "90a"), ("row_float16", "100")),
    *(("rewards", "80"), ("listwise", "90a"), ("row_pass", "100"), ("device", "80")),
]
ALL = [(source, arch) for arch in SHARED for source in KERNELS]
CASES = ALL if os.environ.get("PAD_KERNELS_CUBINS") == "all" else FEW


def _compile(arch: str, folder: Path) -> None:
    def one(name: str) -> None:
        source, cubin = cuda_on_cpu.CSRC / "cuda" / f"{name}.cu", folder / f"{name}.cubin"
        said = cuda_on_cpu.run([NVCC, *FLAGS, f"-arch=sm_{arch}", "-o", cubin, source])
        cubin.with_suffix(".log").write_text(said)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, _sources(arch)))


def _sources(arch: str) -> list[str]:
    return [source for source, of in CASES if of == arch]


def _cubins(arch: str) -> Path:
    recipe = " ".join([arch, *_sources(arch), *FLAGS])
    return cuda_on_cpu.cached(f"cubin-sm{arch}", recipe, lambda to: _compile(arch, to))


def _cuobjdump() -> str | None:
    """The disassembler: of CUDA, or the one that Triton brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None


def _entries(log: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Every kernel of a compiler's log with its numbers."""
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        numbers = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers, shared = (
            re.search(r"Used (\d+) registers", part),
            re.search(r"(\d+) bytes smem", part),
        )
        assert numbers is not None and registers is not None, part
        yield (
            name,
            {
                "stack": int(numbers[1]),
                "spilled": int(numbers[2]) + int(numbers[3]),
                "registers": int(registers[1]),
                "shared": int(shared[1]) if shared else 0,
            },
        )


@needs_nvcc
@pytest.mark.parametrize(("source", "arch"), CASES)
def test_no_kernel_spills_or_has_local_memory(source: str, arch: str) -> None:
    """And a block of the most threads that it is launched with fits into the registers."""
    said = (_cubins(arch) / f"{source}.log").read_text()
    assert "warning" not in said, said
    kernels = list(_entries(said))
    assert len(kernels) == KERNELS[source]
    for name, has in kernels:
        assert has["stack"] == has["spilled"] == 0, f"{name}: {has}"
        assert has["registers"] <= 128, f"{name}: {has}"  # 512 threads fit
        assert has["shared"] <= 4 << 10, f"{name}: {has}"


def test_every_source_with_kernels_is_compiled() -> None:
    found = {path.stem for path in (cuda_on_cpu.CSRC / "cuda").glob("*.cu")}
    assert found == set(KERNELS) == {source for source, _ in CASES}


@needs_nvcc
@pytest.mark.parametrize(("source", "arch"), [case for case in CASES if case[0] in STORED])
def test_row_passes_read_and_write_sixteen_bytes(source: str, arch: str) -> None:
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump, neither of CUDA nor of Triton")
    sass = cuda_on_cpu.run([tool, "-sass", _cubins(arch) / f"{source}.cubin"])
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == KERNELS[source]
    for kernel in kernels:
        name = kernel.splitlines()[0]
        assert re.search(r"\bLDG\.E(\.\w+)*\.128", kernel), f"{name} reads no vectors"
        if "Gradient" in name:
            assert re.search(r"\bSTG\.E(\.\w+)*\.128", kernel), f"{name} writes no vectors"
        assert not re.search(r"\b(LDL|STL)\b", kernel), f"{name} has local memory"
        assert not re.search(r"\b(ATOMG|RED)\b.*ADD", kernel), f"{name} adds by atomics"


@pytest.fixture(scope="module")
def module() -> Any:
    return cuda_on_cpu.load()


@pytest.mark.parametrize("arch", SHARED)
def test_listwise_launches_fit_into_every_gpu(module: Any, arch: str) -> None:
    """Subset recursions stay in shared memory up to n = 15, and go to global memory beyond."""
    limit = SHARED[arch]
    for kind in ("kl", "reverse_kl"):
        for n in range(2, 17):
            for wide in (False, True):
                storage, threads, shared, scratch = module.listwise_plan(kind, n, 7, wide, limit)
                assert shared + 4096 <= limit  # what the kernels have statically
                assert threads % 32 == 0 and 32 <= threads <= 512
                if n <= (14 if wide else 15):
                    assert storage.startswith("shared") and scratch == 0
                if storage == "global64":
                    assert scratch == 7 * 8 << n
        assert module.listwise_plan(kind, 14, 1, False, limit)[0] == "shared64"
    *_, shared, scratch = module.listwise_plan("jsd", 8, 64, True, limit)
    assert scratch == 0 and shared + 4096 <= limit
    with pytest.raises(ValueError, match="subset: expected 1 to 8, got 9"):
        module.listwise_plan("jsd", 9, 1, False, limit)


WITHOUT_A_DRIVER = """
import torch
import pad_kernels as pk
from pad_kernels.backends import registry
assert registry.cuda() is not None
print(pk.available_backends()["cuda"])
"""


@pytest.mark.skipif(registry.cuda() is None, reason="the CUDA extension is not built")
def test_the_module_loads_without_a_driver_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_DRIVER], capture_output=True, text=True, check=True
    )
    state = done.stdout.strip()
    if state == "available":
        pytest.skip("there is a GPU")
    assert re.match("no NVIDIA driver|no usable GPU: .|not compiled for this GPU: .", state), state
    module = registry.cuda()
    assert module is not None and module.archs
    with pytest.raises(RuntimeError, match=r"head_transform: .*driver"):
        module.head_transform("float32", 16, 1, 1.0, 0.0, 1.0)  # never read: it is not launched


def test_a_missing_module_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pad_kernels._cuda", None)
    registry._load.cache_clear()
    registry.cuda_error.cache_clear()
    try:
        assert len(pk.available_backends()["cuda"]) > 10
        assert registry.cuda() is None
    finally:
        monkeypatch.undo()
        registry._load.cache_clear()
        registry.cuda_error.cache_clear()
