"""One forward and backward in a fresh process: peak resident memory beyond inputs and gradients.

Run as ``python peak_memory.py '{"op": "cross_entropy", ...}'``; prints bytes. ``earlier`` lists the
workspace limits of steps to take before the one that is measured.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch

import pad_kernels as pk

CLEAR = Path("/proc/self/clear_refs")


def resident(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is now, VmHWM the most since it was cleared."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def step(op: str, dtype: str, plan: str | None, limit: int | None, n: int, h: int, v: int) -> int:
    """Highest resident memory less the inputs and one copy of each gradient, in bytes."""
    kind = getattr(torch, dtype)
    hidden = torch.randn(n, h, dtype=kind).requires_grad_()
    weight = torch.randn(v, h, dtype=kind).mul_(0.05).requires_grad_()
    labels = torch.randint(v, (n,))
    CLEAR.write_text("5")
    with contextlib.nullcontext() if limit is None else pk.workspace_limit(limit):
        if op == "cross_entropy":
            loss = pk.linear_cross_entropy(hidden, weight, labels, plan=plan)
        else:
            loss = pk.linear_logprob(hidden, weight, labels, plan=plan).sum()
        loss.backward()
    return resident("VmHWM") - sum(x.nbytes + x.grad.nbytes for x in (hidden, weight))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(2)
    case = json.loads(sys.argv[1])
    earlier = case.pop("earlier", [])
    # Libraries, thread pools and packing buffers of the same products are there before we measure.
    step(**{**case, "n": 64, "v": 1024})
    before = resident("VmRSS")
    for smaller in earlier:
        step(**{**case, "limit": smaller})
    print(step(**case) - before)
