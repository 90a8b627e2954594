"""Every Triton kernel run by the interpreter: each ``interpreted_*.py`` in a process of its own.

Whether kernels are interpreted is decided when triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
#: The largest files first: they take longest, and run side by side.
FILES = sorted(HERE.glob("interpreted_*.py"), key=lambda file: -file.stat().st_size)
PARTS = [file.stem.removeprefix("interpreted_") for file in FILES]
Run = Future[subprocess.CompletedProcess[str]]


def _run(part: str) -> subprocess.CompletedProcess[str]:
    file = HERE / f"interpreted_{part}.py"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Run]]:
    """What the parts that were asked for come to; as many at once as there are cores, up to 4."""
    asked = {
        item.callspec.params["part"]
        for item in request.session.items
        if item.path == Path(__file__) and hasattr(item, "callspec")
    }
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        yield {part: pool.submit(_run, part) for part in PARTS if part in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_under_the_interpreter(part: str, runs: dict[str, Run]) -> None:
    found = runs[part].result()
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout and " skipped" not in found.stdout
