"""The native code under a compiler sanitizer: what builds it, and a process that runs tests on it.

``address`` stands for memory errors and undefined behaviour, ``thread`` for data races. A sanitizer
sees the code that it was compiled into, so other tests run in a process with modules of its own:
``sanitized.py thread _C tests/test_row_walk.py``, its runtime loaded before anything else. That
is scalar code; what vector code touches is for tests/test_row_bounds.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import pytest
from cuda_on_cpu import CSRC, ROOT, compiler, run

FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
#: Runtimes and what they are told: what Python keeps until its end is no leak, and neither Python
#: nor torch is compiled for a sanitizer.
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
}
OPENMP = ROOT / "tests" / "openmp_on_threads.cpp"
FAULTY = ROOT / "tests" / "faulty_kernels.cpp"


def module(sanitizer: str, name: str) -> Path:
    """A file with ``_C``, or with the module of the CUDA sources on a CPU."""
    flags = ["-g1", "-fno-omit-frame-pointer", *FLAGS[sanitizer]]
    sources = cuda_on_cpu.SOURCES
    if name == "_C":
        sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp")), OPENMP]
        flags.append("-fopenmp")
    return cuda_on_cpu.build(name, sources, flags, f"{sanitizer}{name}")


def faulty(sanitizer: str) -> Path:
    """A program whose argument names the mistake that it makes."""
    flags = ["-std=c++20", "-O1", "-g1", "-fopenmp", *FLAGS[sanitizer]]

    def compile_both(folder: Path) -> None:
        made = [folder / "kernels.o", folder / "openmp.o"]
        run([compiler(), *flags, "-c", FAULTY, "-o", made[0]])
        run([compiler(), "-std=c++20", "-c", OPENMP, "-o", made[1]])
        run([compiler(), *FLAGS[sanitizer], *made, "-pthread", "-o", folder / "faulty"])

    recipe = " ".join([*flags, FAULTY.read_text("utf-8"), OPENMP.read_text("utf-8")])
    return cuda_on_cpu.cached(f"{sanitizer}-faulty", recipe, compile_both) / "faulty"


def environment(sanitizer: str) -> dict[str, str]:
    """That of a process which has the sanitizer's runtime, and the C++ library it looks into."""
    names = (RUNTIMES[sanitizer], "libstdc++.so.6")
    loaded = [run([compiler(), f"-print-file-name={name}"]).strip() for name in names]
    return {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(loaded), "OMP_NUM_THREADS": "1"}


def run_tests(sanitizer: str, name: str, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Those tests, with that module built for that sanitizer."""
    module(sanitizer, name)  # here: a compiler with such a runtime would take very long
    command = [sys.executable, __file__, sanitizer, name, *tests]
    return subprocess.run(
        command, env=environment(sanitizer), cwd=ROOT, capture_output=True, text=True
    )


def main(sanitizer: str, name: str, *tests: str) -> int:
    """Put the module in the place of the usual one and run the tests."""
    path = module(sanitizer, name)
    if name == "_C":
        sys.modules["pad_kernels._C"] = cuda_on_cpu.imported(path, "pad_kernels._C")
    else:
        cuda_on_cpu.load = lambda: cuda_on_cpu.imported(path, name)
    import row_pass_harness

    # Digits are judged elsewhere: scalar code adds up in another order.
    row_pass_harness.assert_as_good = lambda *_, **__: None
    # What a sanitizer says on the way out has to reach the standard error.
    return pytest.main(["-q", "-p", "no:cacheprovider", "--capture=sys", *tests])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
