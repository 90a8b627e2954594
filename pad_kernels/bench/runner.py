"""``pad-kernels bench``: measure cases × dtypes × implementations and report.

Every implementation gets the same tensors and first has to pass the accuracy gate; the step that
the gate looks at is also its warm-up. What is left is timed in interleaved rounds together with the
bare matrix products, then its peak memory is measured in fresh processes.

Without ``--op``, ``--case`` or ``--all``, operations with teachers run at the first shape only, so
that a whole run stays near ten minutes. On a GPU the cases are ``cases.make_gpu_cases()``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pad_kernels.bench import cases as catalogue
from pad_kernels.bench import report
from pad_kernels.bench.cases import OPS, Case, make_cases, make_gpu_cases
from pad_kernels.bench.implementations import all_implementations
from pad_kernels.bench.measure import IGNORED_SHARE, Row, fill_memory, measure, measure_ignored


def _threads() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--quick", action="store_true", help="one small shape, three rounds: a few minutes")
    add("--case", default="", metavar="TEXT", help="only cases whose op/NxHxV/dtype has TEXT in it")
    add("--op", nargs="+", choices=list(OPS), help="only these operations")
    add("--dtype", nargs="+", choices=list(catalogue.DTYPES), help="default: float32 bfloat16")
    add("--impl", default="", metavar="TEXT", help="only implementations whose name has TEXT in it")
    add("--repeats", type=int, help="timed rounds a case (default 5, with --quick 3)")
    add("--threads", type=int, default=_threads(), help="CPU threads (default: all, %(default)s)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    add("--all", action="store_true", help="also what takes minutes, and every case")
    add("--no-memory", action="store_true", help="skip peak memory (measured where N·V is largest)")
    add("--no-ignored", action="store_true", help="skip the comparison with 80 %% of rows ignored")
    add(
        "--out",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="where bench.json and the plots go (default %(default)s)",
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _select(args: argparse.Namespace) -> list[Case]:
    shapes = catalogue.QUICK_SHAPES if args.quick else catalogue.SHAPES
    asked = bool(args.all or args.op or args.case)
    every = make_cases(args.op, shapes, args.dtype, asked)
    if args.device.startswith("cuda") and not args.quick:
        every = [c for c in make_gpu_cases() if c.op in (args.op or OPS)]
    found = [case for case in every if args.case in case.name]
    if not found:
        raise SystemExit(f"--case {args.case!r}: no case has that in its name")
    return found


def _ignored(args: argparse.Namespace, chosen: list[Case], device: torch.device) -> list[Row]:
    """The ignored-rows comparison at the middle shape of every operation with a backward pass."""
    rows = []
    for op in ("cross_entropy", "logprob"):
        same = [c for c in chosen if c.op == op and c.dtype == "float32"]
        if not same or args.no_ignored:
            continue
        case = same[len(same) // 2]
        every = [i for i in all_implementations(device.type) if i.op == op]
        wanted = [i for i in every if i.ours or "eager" in i.name]
        _say(f"{case.name}: {IGNORED_SHARE:.0%} of the rows ignored")
        rows += measure_ignored(case, [i for i in wanted if args.impl in i.name], 3, device)
    return rows


def run(args: argparse.Namespace) -> int:
    """Do what the parsed options say; returns the exit code."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no GPU")
    torch.set_num_threads(args.threads)
    repeats = args.repeats or (3 if args.quick else 5)
    chosen = _select(args)
    by_size = sorted(chosen, key=lambda case: case.tokens * case.vocab)
    largest = {case.op: case.shape for case in by_size}
    records = []
    for case in chosen:
        every = [i for i in all_implementations(device.type) if i.op == case.op]
        wanted = [i for i in every if args.impl in i.name]
        if not wanted:
            continue
        _say(f"{case.name}: {len(wanted)} implementations")
        record = measure(case, wanted, repeats, device, args.all)
        if case.shape == largest[case.op] and not args.no_memory and device.type == "cpu":
            fill_memory(case, record, args.device, args.threads)
        records.append(record)
        print(report.table(record), end="\n\n", flush=True)
    if not records:
        raise SystemExit(f"--impl {args.impl!r}: no implementation has that in its name")
    ignored = _ignored(args, chosen, device)
    for row in ignored:
        what = f"{row['case']}  {row['implementation']}"
        print(f"{what}: {row['share']:.2f} of the full time with {row['ignored']:.0%} ignored")
    result = {"meta": report.metadata(device, args.threads), "cases": records, "ignored": ignored}
    for path in report.write(result, args.out):
        print(f"wrote {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m pad_kernels.bench.runner`` and of benchmarks/run.py."""
    parser = argparse.ArgumentParser("pad-kernels bench", description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
