"""The command line: `pad-kernels sample | score | cache | train | eval | demo | plan | ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pad_kernels import __version__

DTYPES = ("float32", "bfloat16", "float16", "float64")
MIB = 2**20

EXPLAIN = """\
Print the plan of a loss before running it: which schedule and backend, the block sizes, how much
workspace, and what dense logits would have cost. Nothing of the given size is allocated.

examples:
  pad-kernels explain --tokens 4096 --hidden 2304 --vocab 256000 --dtype bfloat16
  pad-kernels explain --tokens 4096 --hidden 512 --vocab 65536 --per-token --workspace 64
"""
DEMO = """\
Distil preferences end to end on this machine's CPU, in about five minutes: train a small teacher
and a smaller student on English text that ships with Python, let the student write, let the teacher
judge, and train the student with PAD's listwise loss, with DPO and SimPO beside it. Ends with a
table and a self-contained HTML report.
"""
BENCH = """\
Time the losses of this library and of its peers as a ratio to the bare matrix products of the same
shapes, each behind an accuracy gate, with peak memory from fresh processes. Prints a table, writes
JSON and plots.
"""

Command = Callable[[argparse.Namespace], int]


def fail(message: str) -> int:
    """Say what is wrong on standard error; returns the exit code of a wrong call."""
    print(f"pad-kernels: {message}", file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to 2^31 - 1, got {text!r}"
        )
    return int(text)


def _add_explain(parser: argparse.ArgumentParser) -> Command:
    add = parser.add_argument
    add("--tokens", type=_positive, required=True, metavar="N", help="rows: tokens of a batch")
    add("--hidden", type=_positive, required=True, metavar="H", help="hidden size")
    add("--vocab", type=_positive, required=True, metavar="V", help="vocabulary entries")
    add("--dtype", choices=DTYPES, default="float32", help="of both tensors (default %(default)s)")
    add("--per-token", action="store_true", help="the op returns a value for each token, not a sum")
    add("--device", metavar="NAME", help="plan for a100, h100, h200, b200, rtx4090 or cpu")
    add("--frozen-weight", action="store_true", help="the LM head is not trained, as under LoRA")
    add("--frozen-hidden", action="store_true", help="only the LM head is trained")
    add(
        "--plan",
        metavar="PLAN",
        help="a schedule, a backend or schedule:backend; default: the best",
    )
    add(
        "--workspace",
        type=_positive,
        metavar="MIB",
        help="most workspace in MiB; default: by device",
    )
    return explain


def explain(args: argparse.Namespace) -> int:
    """`pad-kernels explain`."""
    import contextlib

    import torch

    import pad_kernels as pk

    dtype = getattr(torch, args.dtype)

    def empty(rows: int, trained: bool) -> torch.Tensor:
        return torch.empty(rows, args.hidden, dtype=dtype, device="meta", requires_grad=trained)

    limit = pk.workspace_limit(args.workspace * MIB) if args.workspace else contextlib.nullcontext()
    try:
        with limit:
            pk.explain(
                empty(args.tokens, not args.frozen_hidden),
                empty(args.vocab, not args.frozen_weight),
                per_token=args.per_token,
                device=args.device,
                plan=args.plan,
            )
    except ValueError as error:
        return fail(str(error))
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> Command:
    add = parser.add_argument
    out = Path("demo-output")
    add(
        "--out",
        type=Path,
        default=out,
        metavar="DIR",
        help="where the report goes (default %(default)s)",
    )
    add("--seed", type=_seed, default=0, help="same seed, same numbers (default %(default)s)")
    add(
        "--small",
        action="store_true",
        help="everything in miniature, seconds instead of minutes; the figures mean nothing",
    )
    add("--quiet", action="store_true", help="print nothing but the report's path")
    return demo


def demo(args: argparse.Namespace) -> int:
    """`pad-kernels demo`."""
    from dataclasses import replace

    from pad_kernels import demo as package
    from pad_kernels.demo.settings import SMALL, Settings

    missing = package.missing_packages()
    if missing:
        return fail(f"the demo needs {', '.join(missing)}; install with: {package.INSTALL}")
    if args.out.exists() and not args.out.is_dir():
        return fail(f"--out: expected a folder, got the file {args.out}")
    from pad_kernels.demo import pipeline

    settings = replace(SMALL if args.small else Settings(), seed=args.seed)
    pipeline.run(settings, args.out, quiet=args.quiet)
    if args.quiet:
        print((args.out / "report.html").resolve())
    return 0


def _add_bench(parser: argparse.ArgumentParser) -> Command:
    from pad_kernels.bench import runner

    runner.add_arguments(parser)
    return runner.run


def _plan_text() -> str:
    from pad_kernels.fit.command import DESCRIPTION
    from pad_kernels.fit.models import built_in

    return DESCRIPTION.format(shapes=", ".join(built_in()))


def _add_plan(parser: argparse.ArgumentParser) -> Command:
    from pad_kernels.fit import command

    command.add_arguments(parser)

    def plan(args: argparse.Namespace) -> int:
        try:
            return command.run(args)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            return fail(str(error))

    return plan


def _add_stage(name: str, parser: argparse.ArgumentParser) -> Command:
    from pad_kernels.pipeline import command

    command.add_arguments(name, parser)
    stage = command.command(name)

    def run(args: argparse.Namespace) -> int:
        try:
            stage(args)
        except command.MISTAKES as error:
            if args.debug:
                raise
            return fail(command.message(args.file, error))
        return 0

    return run


def _stages() -> list[tuple[str, str, str, Callable[[argparse.ArgumentParser], Command]]]:
    from pad_kernels.pipeline.command import COMMANDS

    return [
        (name, short, text, partial(_add_stage, name))
        for name, (_, short, text) in COMMANDS.items()
    ]


def make_parser() -> argparse.ArgumentParser:
    """The whole command line as a parser; a command's function is its `run` attribute."""
    parser = argparse.ArgumentParser(
        prog="pad-kernels",
        description="Losses over an LM head in vocabulary chunks: distil, measure, explain.",
    )
    parser.add_argument("--version", action="version", version=f"pad-kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    table = (
        *_stages(),
        ("demo", "distil preferences end to end and write a report", DEMO, _add_demo),
        ("explain", "print the plan of a loss of a given size", EXPLAIN, _add_explain),
        ("plan", "what of a training step fits in a GPU's memory", _plan_text(), _add_plan),
        ("bench", "time and memory beside bare matrix products and peers", BENCH, _add_bench),
    )
    for name, short, text, add in table:
        description, _, epilog = text.partition("\n\n")
        command = commands.add_parser(
            name,
            help=short,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=add(command))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\npad-kernels: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
