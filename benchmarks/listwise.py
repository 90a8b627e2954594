"""Listwise preference losses against the ways they are usually computed.

Jensen–Shannon at n = 8: our C++ kernel and its plain-torch twin against a dense tensor of all 40320
rankings. KL and reverse KL at n = 16: against a plain-Python loop over the 65536 sets of responses
(measured on one group and multiplied by the number of groups).

Every implementation runs in a process of its own: forward and backward of one loss over all groups,
the median of the repetitions, and the peak resident memory of a first run above what the process
held before it (Linux). What disagrees with the first implementation is not reported.

    python benchmarks/listwise.py --groups 16 --repeats 9
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pad_kernels.backends.registry import native
from pad_kernels.sequence import listwise_preference_loss
from pad_kernels.sequence.listwise_op import forced_backend

#: kind, responses, what it is compared with, targets: times faster, times less memory.
CASES = {
    "jsd": (8, "dense", 50.0, 100.0),
    "kl": (16, "loop", 20.0, None),
    "reverse_kl": (16, "loop", 20.0, None),
}
MIB = 2.0**20
#: The kernel counts resident pages in batches of this size; memory ratios take no less.
RESOLUTION_MIB = 0.25
#: What a group may take at n = 16.
GROUP_LIMIT_MIB = 4.0

Step = Callable[[], tuple[float, Tensor]]


def make_rewards(groups: int, n: int) -> tuple[Tensor, Tensor]:
    """Student and teacher rewards; the first group is the same however many there are."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(groups, 2, n, generator=generator).unbind(1)
    return student.contiguous().requires_grad_(), teacher.contiguous()


def ours(kind: str, student: Tensor, teacher: Tensor) -> Step:
    """One step of this library."""

    def step() -> tuple[float, Tensor]:
        loss = listwise_preference_loss(student, teacher, kind=kind)
        (grad,) = torch.autograd.grad(loss, student)
        return loss.item(), grad

    return step


def dense(student: Tensor, teacher: Tensor) -> Step:
    """Jensen–Shannon divergence from a tensor of all rankings, by autograd."""
    n = student.shape[1]
    orders = torch.tensor(list(itertools.permutations(range(n))))

    def log_prob(rewards: Tensor) -> Tensor:
        ranked = rewards[:, orders]
        return (ranked - ranked.flip(-1).logcumsumexp(-1).flip(-1)).sum(-1)

    def step() -> tuple[float, Tensor]:
        p = log_prob(student)
        with torch.no_grad():
            q = log_prob(teacher)
        m = torch.logaddexp(p, q) - math.log(2.0)
        loss = 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1).mean()
        (grad,) = torch.autograd.grad(loss, student)
        return loss.item(), grad

    return step


def _softmax(rewards: list[float], items: list[int]) -> dict[int, float]:
    top = max(rewards[i] for i in items)
    weights = {i: math.exp(rewards[i] - top) for i in items}
    total = sum(weights.values())
    return {i: w / total for i, w in weights.items()}


def loop_group(kind: str, s: list[float], t: list[float]) -> tuple[float, list[float]]:
    """Loss and gradient of one group by a loop over the sets of responses left to rank."""
    n = len(s)
    x, y = (t, s) if kind == "kl" else (s, t)
    value = [0.0] * (1 << n)
    share_x: list[dict[int, float]] = [{}] * (1 << n)
    share_y: list[dict[int, float]] = [{}] * (1 << n)
    for left in range(1, 1 << n):
        items = [i for i in range(n) if left >> i & 1]
        a, b = share_x[left], share_y[left] = _softmax(x, items), _softmax(y, items)
        value[left] = sum(a[i] * (math.log(a[i] / b[i]) + value[left ^ (1 << i)]) for i in items)
    flow = [0.0] * (1 << n)
    flow[-1] = 1.0
    grad = [0.0] * n
    for left in range((1 << n) - 1, 0, -1):
        a, b = share_x[left], share_y[left]
        for i in a:
            flow[left ^ (1 << i)] += flow[left] * a[i]
            if kind == "kl":
                grad[i] += flow[left] * (b[i] - a[i])
            else:
                ahead = math.log(a[i] / b[i]) + value[left ^ (1 << i)] - value[left]
                grad[i] += flow[left] * a[i] * ahead
    return value[-1], grad


def loop(kind: str, student: Tensor, teacher: Tensor) -> Step:
    """The loop over all groups it is given."""
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))

    def step() -> tuple[float, Tensor]:
        results = [loop_group(kind, s, t) for s, t in rows]
        loss = sum(r[0] for r in results) / len(rows)
        return loss, torch.tensor([r[1] for r in results]) / len(rows)

    return step


def make_step(name: str, kind: str, groups: int, n: int) -> Step:
    """A step of one implementation, its rewards made."""
    student, teacher = make_rewards(groups, n)
    if name == "dense":
        return dense(student, teacher)
    if name == "loop":
        return loop(kind, student, teacher)
    return ours(kind, student, teacher)


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"{field} is not in /proc/self/status")


def measure(step: Step, repeats: int) -> dict[str, float]:
    """Peak memory of the first run, median seconds of the others."""
    peak = math.nan
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        loss, grad = step()
        peak = resident("VmHWM") - before
    else:
        loss, grad = step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times),
        "spread": max(times) - min(times),
        "mib": peak,
        "loss": loss,
        "grad": grad[0].double().norm().item() * len(grad),
    }


def work(arguments: argparse.Namespace) -> None:
    """In the fresh process: warm up on a small problem, measure, print JSON."""
    torch.set_num_threads(arguments.threads)
    name, kind = arguments.worker.split(":")
    n = CASES[kind][0]
    groups, repeats = arguments.groups, arguments.repeats
    if name == "loop":
        groups, repeats = 1, 1  # seconds a group, and every group takes the same
    with forced_backend("torch" if name == "torch" else "cpp"):
        make_step(name, kind, groups, 4)()  # code, threads and autograd loaded; little memory
        result = measure(make_step(name, kind, groups, n), repeats)
    print(json.dumps({**result, "groups": groups}))


def spawn(name: str, kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One implementation in a process of its own."""
    command = [sys.executable, __file__, "--worker", f"{name}:{kind}"]
    for option in ("groups", "repeats", "threads"):
        command += [f"--{option}", str(getattr(arguments, option))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def agree(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two implementations computed the same thing (the first group's gradient)."""
    same = math.isclose(one["grad"], other["grad"], rel_tol=1e-3)
    if one["groups"] == other["groups"]:
        same = same and math.isclose(one["loss"], other["loss"], rel_tol=1e-4)
    return same


def report(arguments: argparse.Namespace) -> bool:
    """Measure every case and print the table; whether all targets are met."""
    met, groups = True, arguments.groups
    print(f"{groups} groups, {arguments.threads} threads, forward + backward, float32 rewards")
    print(
        f"{'loss':<11}{'n':>3}  {'by':<6}{'ms':>12}{'spread':>9}{'MiB':>10}"
        f"{'faster':>10}{'smaller':>10}"
    )
    for kind in arguments.kind or CASES:
        n, peer, faster, smaller = CASES[kind]
        names = [peer, "torch", *(["cpp"] if native() else [])]
        rows = {name: spawn(name, kind, arguments) for name in names}
        base = rows[peer]
        scale = groups / base["groups"]
        for name, row in rows.items():
            factor = scale if name == peer else 1.0
            line = f"{kind:<11}{n:>3}  {name:<6}{1e3 * row['seconds'] * factor:>12.2f}"
            line += f"{1e3 * row['spread']:>9.2f}{row['mib']:>10.2f}"
            if name != peer:
                if not agree(base, row):
                    print(f"{line}  disagrees with {peer}: {row} {base}")
                    met = False
                    continue
                speed = base["seconds"] * scale / row["seconds"]
                memory = base["mib"] / max(row["mib"], RESOLUTION_MIB)
                line += f"{speed:>9.0f}×" + (f"{memory:>9.0f}×" if smaller else f"{'':>10}")
                if name == names[-1]:  # what is chosen by itself; the twin may be slower
                    met &= speed >= faster and (smaller is None or memory >= smaller)
                met &= n != 16 or row["mib"] < GROUP_LIMIT_MIB * groups
            print(line)
        if scale != 1.0:
            print(f"{'':<16}{peer} measured on {base['groups']} group, time × {scale:g}")
    return met


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=16, help="groups in a batch (default 16)")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--kind", action="append", choices=CASES, help="only this loss; repeatable")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return 0
    met = report(arguments)
    print("every target met" if met else "a target was missed")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
