"""Peak memory of a step, in a process of its own.

The figure is what two steps in a row need beyond their inputs and one copy of the gradients. A step
before them warms the libraries up: a tiny one, so that workspaces of the real shape are still to
come, except where an implementation compiles for its shape, which has to happen before.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from pad_kernels.bench.cases import OPS, Case, Inputs, make_inputs
from pad_kernels.bench.implementations import all_implementations, step

MIB = 2**20


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _trim() -> None:
    """Give freed memory back to the system, so that the baseline does not contain it."""
    gc.collect()
    # Without glibc the baseline stays a little high and the figure low.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak() -> None:
    """Forget the high-water mark of this process (Linux)."""
    # Where /proc is read-only the mark of the warm-up stays, which is small by design.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_growth(case: Case, name: str, device: torch.device) -> int:
    found = [i for i in all_implementations() if i.name == name and i.op == case.op]
    implementation = found[0]
    small = replace(case, tokens=min(case.tokens, 64), vocab=min(case.vocab, 1024))
    warm = case if implementation.compiled else small
    function = implementation.build(case)
    warm_inputs = make_inputs(warm, device)
    step(function, warm, warm_inputs)
    del warm_inputs
    inputs = make_inputs(case, device)

    def steps() -> None:
        for _ in range(2):  # what the first keeps for the second counts
            inputs.clear()
            step(function, case, inputs)

    _trim()
    _reset_peak()
    before = _status("VmRSS")
    steps()
    return _status("VmHWM") - before - _gradient_bytes(case, inputs)


def _gradient_bytes(case: Case, inputs: Inputs) -> int:
    """Of one copy of the gradients that a step leaves behind."""
    return inputs.hidden.nbytes + inputs.weight.nbytes if OPS[case.op].backward else 0


def device_peak(action: Callable[[], object], case: Case, inputs: Inputs) -> float:
    """MiB on a GPU of a warmed-up step, beyond its inputs and gradients.

    torch's allocator counts exactly, so that this needs no process of its own. What libraries keep
    from step to step, such as the workspace of matrix products, is not in it.
    """
    device = inputs.hidden.device
    inputs.clear()
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    peak = torch.cuda.max_memory_allocated(device)
    inputs.clear()
    return (peak - before - _gradient_bytes(case, inputs)) / MIB


def start(case: Case, name: str, device: str, threads: int) -> subprocess.Popen[str]:
    """Begin to measure in a fresh process; hand the result to :func:`finish`."""
    request = {"case": asdict(case), "name": name, "device": device, "threads": threads}
    command = [sys.executable, "-m", "pad_kernels.bench.memory", json.dumps(request)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )


def finish(process: subprocess.Popen[str]) -> float | None:
    """MiB beyond inputs and gradients, or None where this system cannot say."""
    out, error = process.communicate()
    if process.returncode != 0:
        print(error.strip()[-400:], file=sys.stderr)
        return None
    return float(json.loads(out.splitlines()[-1])["mib"])


def main(argument: str) -> None:
    """Entry of the child process; prints one JSON object."""
    request = json.loads(argument)
    torch.set_num_threads(request["threads"])
    growth = _peak_growth(Case(**request["case"]), request["name"], torch.device(request["device"]))
    print(json.dumps({"mib": growth / MIB}))


if __name__ == "__main__":
    main(sys.argv[1])
