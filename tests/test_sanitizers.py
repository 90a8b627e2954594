"""The native code under sanitizers: memory errors, undefined behaviour, races.

``PAD_KERNELS_SANITIZE=all`` (``make check-native``) takes the tests of the row passes and of the
sequence kernels through both; by default a few of the CUDA sources, whose threads share memory, are
looked at for races.
"""

from __future__ import annotations

import functools
import os
import subprocess

import cuda_on_cpu
import pytest
import sanitized

CUDA = ["tests/test_cuda_rows.py", "tests/test_cuda_sequences.py"]
CPU = [f"tests/test_{x}.py" for x in ("row_pass", "row_pass_numerics", "row_walk", "listwise")]
#: Every listwise kernel, and row passes with several streams and blocks.
FEW = [*CUDA, "-k", "losses and 1.5 or wild or tiles or rewards or statistics and shape6"]
#: All but what is mostly torch, or about the usual build.
MOST = ["-k", "not awkward and not well_behaved and not _level"]
CASES = [("thread", cuda_on_cpu.NAME, FEW)]
if os.environ.get("PAD_KERNELS_SANITIZE") == "all":
    CASES = [
        (sanitizer, name, [*tests, *MOST])
        for sanitizer in sanitized.FLAGS
        for name, tests in ((cuda_on_cpu.NAME, CUDA), ("_C", CPU))
    ]


@functools.cache
def reason_against(sanitizer: str) -> str:
    """Why it cannot be used here; empty where a program without a mistake runs."""
    try:
        sanitized.run([sanitized.faulty(sanitizer), "none"])
    except AssertionError as error:
        return f"no {sanitizer} sanitizer: {error}"
    return ""


def need(sanitizer: str) -> None:
    if reason := reason_against(sanitizer):
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("sanitizer", "mistake", "report"),
    [
        *(("thread", x, "data race") for x in ("no_barrier", "two_blocks", "shared_sum")),
        *(("address", x, "buffer-overflow") for x in ("beyond_shared", "beyond_global")),
    ],
)
def test_mistakes_are_found(sanitizer: str, mistake: str, report: str) -> None:
    need(sanitizer)
    done = subprocess.run([sanitized.faulty(sanitizer), mistake], capture_output=True, text=True)
    assert done.returncode != 0 and report in done.stderr


@pytest.mark.parametrize(("sanitizer", "name", "tests"), CASES, ids=[s + n for s, n, _ in CASES])
def test_nothing_is_found_in_the_kernels(sanitizer: str, name: str, tests: list[str]) -> None:
    need(sanitizer)
    done = sanitized.run_tests(sanitizer, name, tests)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
