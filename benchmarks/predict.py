"""What the planner predicts for a GPU, as the table of docs/performance.md.

python benchmarks/predict.py [DEVICE]     writes the table into the page
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pad_kernels.engine.devices import DEVICES
from pad_kernels.engine.plan import Plan, PlanRequest, Shape
from pad_kernels.engine.planner import make_plan

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SHAPES = ((8192, 4096, 128256), (4096, 4096, 128256), (8192, 2304, 256000))
BOTH, NONE = (True, True, False), (False, False, False)
GIB = 1 << 30
#: Name, streams, sweeps, gradients wanted, one number, schedule, flops of the floor in N·H·V.
OPS = (
    ("cross-entropy, early", 1, 1, BOTH, True, "early", 6),
    ("log-prob, forward only", 1, 1, NONE, False, None, 2),
    ("log-prob, late", 1, 1, BOTH, False, "late", 8),
    ("forward KL, early", 2, 1, BOTH, True, "early", 8),
    ("JSD, early", 2, 2, BOTH, True, "early", 8),
    ("expected advantage, early", 3, 1, BOTH, True, "early", 10),
)


def plan_of(op: tuple, size: tuple[int, int, int], device: str) -> Plan:
    """The plan of an op at (N, H, V) within 1 GiB, bfloat16."""
    _, streams, sweeps, needs, reduced, schedule, _ = op
    tokens, hidden, vocab = size
    shape = Shape(
        tokens=tokens,
        vocab=vocab,
        hidden=(hidden,) * streams,
        input=torch.bfloat16,
        weight=torch.bfloat16,
        gemm=torch.bfloat16,
        needs=needs,
        reduced=reduced,
        sweeps=sweeps,
        backend="triton",
        device=device,
        device_bytes=DEVICES[device].memory,
        fused=sweeps == 1,
    )
    return make_plan(shape, PlanRequest(schedule, budget=None if streams > 1 else GIB))


def table(device: str) -> str:
    """Markdown rows."""
    lines = [
        "| op | N, H, V | products | predicted | share of the rate | rows a block | workspace |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for op in OPS:
        for size in SHAPES:
            tokens, hidden, vocab = size
            plan = plan_of(op, size, device)
            floor = op[-1] * tokens * hidden * vocab / DEVICES[device].rate(torch.bfloat16)
            lines.append(
                f"| {op[0]} | {tokens}, {hidden}, {vocab} | {1e3 * floor:.1f} ms "
                f"| {1e3 * plan.seconds:.1f} ms | {floor / plan.seconds:.2f} "
                f"| {plan.token_block or '–'} | {plan.workspace_bytes / 2**20:,.0f} MiB |"
            )
    return "\n".join(lines)


def main(device: str = "h200") -> None:
    """Put the table between the page's two markers."""
    begin, end = f"<!-- predicted: {device} -->", "<!-- end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    after = rest.split(end, 1)[1]
    PAGE.write_text(f"{before}{begin}\n{table(device)}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
